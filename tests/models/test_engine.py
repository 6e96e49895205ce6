"""The engine writes for each request what the model alone would, and gives every page back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from flashtile.models.engine import Engine, Generation, Request
from flashtile.models.gpt import GPT, GPTConfig, KVCache

CONFIG = GPTConfig(vocab_size=32, seqlen=32, layers=2, heads=4, kv_heads=2, head_dim=8)
LENGTHS = ((1, 12), (13, 14), (5, 1), (8, 9), (19, 13), (1, 5), (28, 4), (7, 15))
"""Prompt and limit of each request: length 1, whole pages, up to the context."""


@pytest.fixture(scope="module")
def model() -> GPT:
    """All weights random; fp64, so that no two likeliest tokens are closer than roundings."""
    torch.manual_seed(1)
    model = GPT(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def _requests(**options: object) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        replace(Request(tuple(_draw(length, generator)), limit, seed=i), **options)  # type: ignore[arg-type]
        for i, (length, limit) in enumerate(LENGTHS)
    ]


def _draw(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(CONFIG.vocab_size, (count,), generator=generator).tolist()


@lru_cache
def _alone(model: GPT, request: Request) -> list[int]:
    """What the model writes for a request by itself, without a cache."""
    generator = torch.Generator().manual_seed(request.seed)
    prompt = torch.tensor([request.prompt])
    tokens = model.generate(prompt, request.limit, request.temperature, generator)
    written = tokens[0, len(request.prompt) :].tolist()
    if request.stop in written:
        written = written[: written.index(request.stop) + 1]
    return written


def _serve(engine: Engine, requests: list[Request], every: int = 1) -> list[Generation]:
    """Submit a request every so many steps; at each step the pages are accounted for."""
    generations: list[Generation] = []
    while len(generations) < len(requests) or engine.busy:
        for request in requests[len(generations) : len(generations) + 1]:
            generations.append(engine.submit(request))
        for _ in range(every):
            ended = engine.step()
            assert all(each.ended and not each.pages for each in ended)
            held = [page for each in engine.running for page in each.pages]
            assert sorted(held + engine.pool.free) == list(range(engine.pool.pages))
            assert not any(each.pages or each.computed for each in engine.waiting)
    assert engine.pool.in_use == 0
    return generations


@pytest.mark.parametrize(
    ("pages", "page_size", "batch", "chunk"),
    [
        (64, 16, 8, 64),  # room for all, whole prompts
        (2, 16, 8, 64),  # the least for the longest: others wait or give their pages back
        (50, 1, 4, 3),  # a page a token, chunks of prompts
        (13, 3, 3, 7),
        (2, 32, 8, 1),  # prompts token by token
        (9, 16, 1, 16),  # one at a time
    ],
)
def test_writes_what_the_model_alone_does(
    model: GPT, pages: int, page_size: int, batch: int, chunk: int
) -> None:
    requests = _requests()
    engine = Engine(model, pages=pages, page_size=page_size, batch=batch, chunk=chunk)
    engine.pool.k.fill_(torch.nan)  # what no token was written to is never read
    engine.pool.v.fill_(torch.nan)

    generations = _serve(engine, requests)

    assert [each.written for each in generations] == [_alone(model, r) for r in requests]


@pytest.mark.parametrize("every", [1, 4])
def test_requests_that_end_early(model: GPT, every: int) -> None:
    requests = [replace(r, stop=_alone(model, r)[r.limit // 3]) for r in _requests()]
    generations = _serve(Engine(model, pages=7, page_size=8, chunk=10), requests, every)

    assert [each.written for each in generations] == [_alone(model, r) for r in requests]
    assert sum(len(each.written) < each.request.limit for each in generations) > 4


def test_sampling_does_not_depend_on_company(model: GPT) -> None:
    requests = _requests(temperature=1.0)
    engine = Engine(model, pages=5, page_size=8, chunk=6)
    generations = _serve(engine, requests)

    assert engine.preemptions > 0
    assert [each.written for each in generations] == [_alone(model, r) for r in requests]
    assert generations[0].written != _alone(model, replace(requests[0], seed=9))


def test_admits_in_order_and_the_oldest_goes_on(model: GPT) -> None:
    engine = Engine(model, pages=4, page_size=8)
    generations = [engine.submit(request) for request in _requests()]
    order: list[Generation] = []
    while engine.busy:
        oldest = (engine.running or list(engine.waiting))[0]
        before = oldest.computed
        ended = engine.step()
        assert oldest.computed > before
        order += ended
        queued = [*engine.running, *engine.waiting]
        assert queued == [each for each in generations if each in queued]

    assert engine.preemptions > 0
    assert len(order) == len(generations)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_that_fails_can_be_taken_again(
    model: GPT, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _requests(temperature=temperature)
    engine = Engine(model, pages=20, chunk=8)
    forward: Callable[..., Tensor] = model.forward
    calls = 0

    def unreliable(tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        nonlocal calls
        calls += cache is not None
        if cache is not None and calls % 7 == 0:
            raise MemoryError
        return forward(tokens, cache)

    generations = [engine.submit(request) for request in requests]
    monkeypatch.setattr(model, "forward", unreliable)
    failures = 0
    while engine.busy:
        try:
            engine.step()
        except MemoryError:
            failures += 1
    monkeypatch.undo()

    assert failures > 3
    assert [each.written for each in generations] == [_alone(model, r) for r in requests]
    assert engine.pool.in_use == 0


def test_logits_with_a_cache_are_those_without(model: GPT) -> None:
    """In chunks, over shuffled pages; whatever is not appended to stays as it is."""
    tokens = torch.tensor(
        [request.prompt[:5] for request in _requests() if len(request.prompt) > 4]
    )
    rows = len(tokens)
    k = torch.full((CONFIG.layers, 3 * rows, 2, CONFIG.kv_heads, CONFIG.head_dim), 7.0).double()
    v, table = k.clone(), torch.randperm(3 * rows).view(rows, 3).int()
    parts = []
    with torch.no_grad():
        for lo, hi in ((0, 2), (2, 3), (3, 5)):
            lengths = torch.full((rows,), lo, dtype=torch.int32)
            parts.append(model(tokens[:, lo:hi], KVCache(k, v, table, lengths)))
        expected = model(tokens)

    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)
    last = table[:, 2].long()
    assert (k[:, last, 1] == 7.0).all()
    assert (v[:, last, 1] == 7.0).all()
    assert (k[:, last, 0] != 7.0).all()


def test_step_without_requests(model: GPT) -> None:
    engine = Engine(model, pages=1)

    assert not engine.busy
    assert engine.step() == []


@pytest.mark.parametrize("name", ["pages", "page_size", "batch", "chunk"])
def test_sizes_are_checked(model: GPT, name: str) -> None:
    sizes = {"pages": 4, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Engine(model, **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} is 1.5; it must be an int"):
        Engine(model, **sizes | {name: 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "prompt has 0 tokens; it must have at least 1"),
        (Request((3, 32), 1), r"prompt has token 32; it must be in \[0, 32\)"),
        (Request((-1,), 1), r"prompt has token -1; it must be in \[0, 32\)"),
        (Request((1,), 1, stop=99), r"stop has token 99; it must be in \[0, 32\)"),
        (Request((1,), 0), "limit is 0; it must be at least 1"),
        (Request((1.5,), 1), "prompt has token 1.5; it must be an int"),  # type: ignore[arg-type]
        (Request((True,), 1), "prompt has token True; it must be an int"),
        (Request((1,), 1, temperature="1"), "temperature is 1; it must be finite"),  # type: ignore[arg-type]
        (Request((1,), 1, temperature=1.0, seed=2**64), r"seed is 18446744073709551616; it must"),
        (Request((1,), 1, seed=1.5), "seed is 1.5; it must be an int"),  # type: ignore[arg-type]
        (Request((1,), 2.5), "limit is 2.5; it must be an int"),  # type: ignore[arg-type]
        (Request((1,), 1, temperature=-0.5), "temperature is -0.5; it must be finite and at least"),
        (Request((1,), 1, temperature=float("nan")), "temperature is nan; it must be finite"),
        (
            Request((1,) * 24, 9),
            "prompt has 24 tokens and limit is 9; together they must be at most 32, the context",
        ),
        (
            Request((1,) * 10, 8),
            "prompt has 10 tokens and limit is 8; they need 3 pages of 8, the pool has 2",
        ),
    ],
)
def test_requests_are_checked(model: GPT, request_: Request, message: str) -> None:
    engine = Engine(model, pages=2, page_size=8)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)

    assert not engine.busy


def test_a_request_may_fill_the_pool(model: GPT) -> None:
    """The last token is written and needs no room."""
    request = Request((1,) * 12, 5)
    (generation,) = _serve(Engine(model, pages=2, page_size=8), [request])

    assert generation.written == _alone(model, request)
