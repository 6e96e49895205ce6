"""The GPU as a machine: bits that repeat, streams, captured graphs, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashtile.api import warm
from flashtile.backends import launch, packed, replays
from flashtile.testing import CASES, Case, Results, run

BF16 = torch.bfloat16
BY_NAME = {case.name: case for case in CASES}


def _same(a: Results, b: Results) -> bool:
    return (
        torch.equal(a.out, b.out)
        and torch.equal(a.lse, b.lse)
        and all(torch.equal(grad, b.grads[name]) for name, grad in a.grads.items())
    )


@contextmanager
def _busy() -> Iterator[None]:
    """Another thread keeps another stream full of matrix products."""
    done = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.randn(1024, 1024, device="cuda", dtype=BF16)
            while not done.is_set():
                for _ in range(8):
                    x = (x @ x).clamp(-1, 1)
                stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


REPEATED = [
    Case("plain", 515, 515, heads=6, head_dim=64, features={"causal": True}),
    Case("wide", 300, 700, heads=8, head_dim=128),
    Case("widest", 200, 300, heads=4, head_dim=256, features={"causal": True}),
    Case("window_dropout", 515, 515, head_dim=64,
         features={"window_size": (100, 0), "dropout_p": 0.2}),
    Case("mask_bias", 277, 391, head_dim=64, tensors=("attn_mask", "bias")),
    Case("packed_sink", lengths=((300, 300), (1, 129), (64, 0), (200, 257)), head_dim=64,
         features={"causal": True}, tensors=("learnable_sink",)),
    Case("paged", lengths=((300, 300), (1, 129), (200, 257)), head_dim=64, page_size=16),
    Case("group", 260, 390, heads=8, kv_heads=2, head_dim=128, features={"causal": True}),
    Case("many_tiles", 1100, 1100, heads=16, kv_heads=16, head_dim=128,
         features={"causal": True}),
    Case("softcap_alibi", 200, 515, head_dim=128, features={"softcap": 5.0},
         tensors=("alibi_slopes",)),
    Case("narrower_values", 257, 257, head_dim=192, head_dim_v=128, features={"causal": True}),
    Case("packed_documents", lengths=((300, 300), (129, 129)), kv_heads=4, head_dim=128,
         tensors=("document_ids",)),
]  # fmt: skip

REPEATS = 200


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside_another_stream"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_bits_repeat(case: Case, dtype: torch.dtype, busy: bool) -> None:
    """Two hundred runs, out, lse and every gradient."""
    problem = case.draw(79, dtype, "cuda")
    problem.keywords["deterministic"] = True
    first = run(problem)
    if busy:
        with _busy():
            assert all(_same(run(problem), first) for _ in range(REPEATS))
    else:
        assert all(_same(run(problem), first) for _ in range(REPEATS))


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_bits_repeat_by_default(case: Case, backend: str) -> None:
    """All but dQ where tiles of keys add to it in any order, as for Hopper."""
    problem = case.draw(79, BF16, "cuda")
    first = run(problem)
    for _ in range(REPEATS):
        again = run(problem)
        if backend == "hopper":
            again.grads["q"] = first.grads["q"]
        assert _same(again, first)


def test_a_side_stream() -> None:
    """Kernels run on the current stream, after its producer and not before."""
    q, k, v = (torch.randn(2, 300, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2))
    expected = flash_attn_func(q, k, v, causal=True)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        late.copy_(q)
        out = flash_attn_func(late, k, v, causal=True)
    stream.synchronize()
    assert torch.equal(out, expected)


def _capture(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Capture a call after one warm one. Each replay starts from results full of NaN, so that a
    kernel that is missing from the graph shows."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> tuple[Tensor, ...]:
        for x in results:
            x.detach().fill_(float("nan"))
        graph.replay()
        return tuple(x.detach().clone() for x in results)

    return replay


def _with_gradients(
    attention: Callable[..., Any], leaves: tuple[Tensor, ...], dout: Tensor, **keywords: Any
) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        out, lse = attention(*leaves, return_lse=True, **keywords)
        return (out, lse, *torch.autograd.grad(out, leaves, dout))

    return call


def _assert_replays(
    call: Callable[[], tuple[Tensor, ...]], changes: list[Callable[[], Any]],
    in_any_order: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """After each change of what the graph reads, a replay gives the bits that a new call gives, but
    for rounding where a result's terms are added in any order."""
    replay = _capture(call)
    for change in (lambda: None, *changes):
        change()
        for i, (found, expected) in enumerate(zip(replay(), call(), strict=True)):
            if i in in_any_order:
                torch.testing.assert_close(found, expected.detach(), rtol=2e-2, atol=1e-3)
            else:
                assert torch.equal(found, expected.detach())


def _leaves(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, device="cuda", dtype=BF16).requires_grad_() for s in shapes)


def test_a_graph_replays_with_other_lengths() -> None:
    """Packed: offsets and lengths in use are read on the device."""
    leaves = _leaves((600, 4, 64), (700, 2, 64), (700, 2, 64))
    cu_q, cu_k, used = (
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in ([0, 100, 101, 600], [0, 300, 300, 700], [250, 0, 399])
    )
    call = _with_gradients(
        flash_attn_varlen_func, leaves, torch.randn(600, 4, 64, device="cuda", dtype=BF16),
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, causal=True, deterministic=True,
    )  # fmt: skip
    _assert_replays(call, [
        lambda: cu_q.copy_(torch.tensor([0, 0, 599, 599])),
        lambda: (cu_k.copy_(torch.tensor([0, 1, 699, 700])),
                 used.copy_(torch.tensor([1, 600, 1]))),
        lambda: leaves[0].detach().mul_(2.0),
    ])  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
def test_a_graph_replays_a_dense_call(gradients: bool) -> None:
    """With other contents of q, with and without autograd."""
    leaves = _leaves((2, 300, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    if gradients:
        dout = torch.randn(2, 300, 4, 64, device="cuda", dtype=BF16)
        call = _with_gradients(flash_attn_func, leaves, dout, causal=True, deterministic=True)
    else:
        plain = [x.detach() for x in leaves]

        def call() -> tuple[Tensor, ...]:
            return flash_attn_func(*plain, causal=True, return_lse=True)

    _assert_replays(call, [lambda: leaves[0].detach().mul_(2.0)])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "documents"])
def test_a_graph_replays_with_another_mask(kind: str, deterministic: bool) -> None:
    """The tiles are classified inside the graph."""
    leaves = _leaves((2, 300, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    mask = torch.rand(2, 1, 300, 300, device="cuda") > 0.5
    added = torch.zeros(mask.shape, device="cuda", dtype=BF16).masked_fill(~mask, -torch.inf)
    ids = torch.randint(0, 3, (2, 300), device="cuda").sort(-1).values
    keywords = {"bool": {"attn_mask": mask}, "float": {"attn_mask": added},
                "documents": {"document_ids": ids}}[kind]  # fmt: skip
    call = _with_gradients(
        flash_attn_func, leaves, torch.randn(2, 300, 4, 64, device="cuda", dtype=BF16),
        deterministic=deterministic, **keywords,
    )  # fmt: skip
    if kind == "documents":
        changes = [ids.zero_, lambda: ids.copy_(torch.arange(300, device="cuda") // 128)]
    else:
        full, none = (True, False) if kind == "bool" else (0.0, -torch.inf)
        mask = mask if kind == "bool" else added
        changes = [lambda: mask.fill_(full), lambda: mask[:, :, :, :256].fill_(none),
                   lambda: mask.fill_(none)]  # fmt: skip
    _assert_replays(call, changes, in_any_order=() if deterministic else (2,))  # dQ


def test_a_graph_replays_decoding() -> None:
    """A cache that grows: its lengths and page table change between replays."""
    q = torch.randn(3, 1, 4, 64, device="cuda", dtype=BF16)
    caches = [torch.randn(24, 16, 2, 64, device="cuda", dtype=BF16) for _ in range(2)]
    table = torch.randperm(24, device="cuda").view(3, 8).int()
    lengths = torch.tensor([5, 0, 128], dtype=torch.int32, device="cuda")

    def call() -> tuple[Tensor, ...]:
        return flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths, block_table=table, causal=True,
            return_softmax_lse=True,
        )  # fmt: skip

    _assert_replays(call, [
        lambda: lengths.copy_(torch.tensor([6, 1, 100])),
        lambda: table.copy_(table.flip(0)),
    ])  # fmt: skip


def test_a_graph_draws_a_new_dropout_mask_at_each_replay() -> None:
    q = torch.randn(1, 200, 2, 64, device="cuda", dtype=BF16)
    replay = _capture(lambda: (flash_attn_func(q, q, q, dropout_p=0.3),))
    first, second = replay()[0], replay()[0]
    assert first.isfinite().all()
    assert not torch.equal(first, second)


def test_a_graph_of_replays() -> None:
    """Calls that have been replayed before, several to a graph, at the addresses of its pool: the
    driver's launches are captured with the parameters that they had then."""
    leaves = _leaves((1, 128, 8, 128), (1, 128, 8, 128), (1, 128, 8, 128))
    dout = torch.randn(1, 128, 8, 128, device="cuda", dtype=BF16)
    once = _with_gradients(flash_attn_func, leaves, dout, causal=True, deterministic=True)

    def call() -> tuple[Tensor, ...]:
        return *once(), *once()

    for _ in range(3):
        call()
    _assert_replays(call, [lambda: leaves[0].detach().mul_(2.0), dout.neg_])


def test_no_host_sync() -> None:
    """torch raises at a synchronising call: there is none, forward or backward."""
    problems = [BY_NAME[name].draw(3, BF16, "cuda") for name in (
        "causal", "varlen_cross_causal", "varlen_window_softcap", "mask", "bias", "sink",
        "documents", "dropout", "paged",
    )]  # fmt: skip
    calls = []
    for problem in problems:
        leaves = {n: x.detach().requires_grad_() for n, x in problem.tensors.items()}
        function = flash_attn_varlen_func if problem.varlen else flash_attn_func

        def call(function: Any = function, leaves: Any = leaves, problem: Any = problem) -> None:
            out = function(**leaves, **problem.keywords)
            torch.autograd.grad(out, list(leaves.values()), out.detach())

        call()
        calls.append(call)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_compile_together() -> None:
    """Eight threads make the first calls of the same and of different problems."""
    problems = [
        Case("first", 70, 90, head_dim=dim, features=features).draw(87, BF16, "cuda")
        for dim, features in ((52, {}), (52, {"causal": True}), (84, {}), (84, {"causal": True}))
    ]
    torch.cuda.synchronize()
    start = threading.Barrier(8)

    def work(thread: int) -> list[Results]:
        start.wait()
        results = [run(problems[(turn + thread // 2) % 4]) for turn in range(4)]
        torch.cuda.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    expected = [run(problem) for problem in problems]
    for thread, results in enumerate(found):
        for turn, result in enumerate(results):
            assert _same(result, expected[(turn + thread // 2) % 4])


@pytest.mark.parametrize("new_addresses", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_thread_without_a_context(replayed: bool, new_addresses: bool) -> None:
    """All its tensors come from PyTorch's cache: attention is the first in it that needs CUDA."""
    leaves = _leaves(*[(1, 128, 8, 128)] * 3)
    dout = torch.randn(1, 128, 8, 128, device="cuda", dtype=BF16)
    call = _with_gradients(flash_attn_func, leaves, dout, deterministic=True)
    expected, *_ = [call() for _ in range(3)]
    if new_addresses:
        packed.packed.cache_clear()
        launch._encoded.cache_clear()
    if not replayed:
        for kept in (replays._replays, warm._kept, warm._latest):
            kept.clear()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(call).result()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("side", [False, True], ids=["one_stream", "a_stream_each"])
def test_threads_replay_together(side: bool, gradients: bool) -> None:
    """Eight threads make one kind of call a hundred times, each with tensors of its own."""

    def draw() -> Callable[[], tuple[Tensor, ...]]:
        leaves = _leaves(*[(2, 256, 4, 64)] * 3)
        dout = torch.randn(2, 256, 4, 64, device="cuda", dtype=BF16)
        if gradients:
            return _with_gradients(flash_attn_func, leaves, dout, causal=True, deterministic=True)
        x = [leaf.detach() for leaf in leaves]
        return partial(flash_attn_func, *x, causal=True, return_lse=True)

    calls = [draw() for _ in range(8)]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    start = threading.Barrier(8)

    def work(thread: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()) if side else nullcontext():
            start.wait()
            found = [calls[thread]() for _ in range(100)]
            return all(all(map(torch.equal, results, expected[thread])) for results in found)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


def test_a_launch_that_fails_is_an_error() -> None:
    """In the call that made it, by the driver's name; the next call is right."""
    x = [leaf.detach() for leaf in _leaves(*[(1, 128, 8, 128)] * 3)]
    expected, *_ = [flash_attn_func(*x) for _ in range(3)]
    with ExitStack() as broken:
        for run_again in filter(None, replays._replays.values()):
            names = run_again.__globals__
            wrong = {
                name: replace(how, shape=(*how.shape[:3], 4096, *how.shape[4:]))  # threads
                for name, how in names.items()
                if isinstance(how, packed.Packing)
            }
            broken.enter_context(patch.dict(names, wrong))
        with pytest.raises(RuntimeError, match="CUDA driver: CUDA_ERROR_"):
            flash_attn_func(*x)
    assert torch.equal(flash_attn_func(*x), expected)
