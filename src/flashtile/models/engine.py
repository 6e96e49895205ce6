"""Continuous batching: a GPT that continues many prompts at once, over a paged KV cache.

Requests come and go while others are being written. A step advances every running one: by its next
token, or while its prompt is not yet in the cache, by a chunk of it. To the engine these are the
same, tokens that are known and not yet computed; those with equally many share one call of the
model. Pages are taken as sequences grow. When none is left the youngest request gives its own back
and waits, to be computed again from its tokens, so that the oldest always goes on: no request that
was accepted fails, and what is written for it does not depend on its company.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashtile.models.gpt import GPT, GPTConfig, KVCache, check_size, check_temperature, sample


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    limit: int  # tokens to write at most
    stop: int | None = None  # the token that ends the text, the last one written
    temperature: float = 0.0  # 0 takes the likeliest token
    seed: int = 0  # of the request's own random numbers


@dataclass(eq=False)
class Generation:
    """A request and what has become of it."""

    request: Request
    generator: torch.Generator | None  # None at temperature 0
    tokens: list[int]  # the prompt and what was written
    computed: int = 0  # how many of them are in the cache
    pages: list[int] = field(default_factory=list)  # of the pool, in the order of the tokens

    @property
    def written(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def ended(self) -> bool:
        count = len(self.tokens) - len(self.request.prompt)
        return count > 0 and (count == self.request.limit or self.tokens[-1] == self.request.stop)


class PagePool:
    """Room for the keys and values of all layers, in pages that generations take and return."""

    def __init__(
        self, config: GPTConfig, pages: int, page_size: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.pages, self.page_size = pages, page_size
        self.free = list(range(pages))

    @property
    def in_use(self) -> int:
        return self.pages - len(self.free)

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Add to a sequence's pages until they hold its tokens; if too few are free, none."""
        missing = self.needed(tokens) - len(pages)
        if missing > len(self.free):
            return False
        pages.extend(self.free.pop() for _ in range(missing))
        return True

    def release(self, pages: list[int]) -> None:
        self.free.extend(pages)
        pages.clear()


class Engine:
    """Serves requests first come, first served, as many at a time as rows and pages allow.

    Args:
        model: a GPT; its context bounds prompt and text of a request.
        pages, page_size: pages of the pool, and tokens in each.
        batch: requests running at a time.
        chunk: tokens of a prompt computed in a step.
        dtype: of the cache, default the model's. Under autocast, autocast's.

    Raises:
        ValueError: a size that is no int or below 1.

    >>> engine = Engine(model, pages=64)
    >>> generation = engine.submit(Request(prompt=(84, 104, 101), limit=20))
    >>> while engine.busy:
    ...     engine.step()
    >>> generation.written
    """

    def __init__(
        self, model: GPT, *, pages: int, page_size: int = 16, batch: int = 8, chunk: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        sizes = {"pages": pages, "page_size": page_size, "batch": batch, "chunk": chunk}
        for name, size in sizes.items():
            check_size(name, size)
        weight = model.embedding.weight
        self.model, self.batch, self.chunk, self.device = model, batch, chunk, weight.device
        self.pool = PagePool(model.config, pages, page_size, self.device, dtype or weight.dtype)
        self.running: list[Generation] = []  # the oldest first
        self.waiting: deque[Generation] = deque()
        self.preemptions = 0  # times that a request had to give its pages back

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises:
            ValueError: a prompt that is empty or not of the vocabulary, a limit, stop, temperature
                or seed out of range, or more tokens than the model's context or the whole pool can
                hold. One that fits the pool but not its free pages waits.
        """
        self._check(request)
        generator = None
        if request.temperature > 0.0:
            generator = torch.Generator(self.device).manual_seed(request.seed)
        generation = Generation(request, generator, list(request.prompt))
        self.waiting.append(generation)
        return generation

    @torch.no_grad()
    def step(self) -> list[Generation]:
        """Advance every running request, admitting what fits. Returns those that ended.

        Tables and lengths go to the device and are never read back; the tokens are, once a step.
        If the model raises, the requests are as if the step had not computed anything.
        """
        self._schedule()
        groups: dict[int, list[Generation]] = {}
        for generation in self.running:
            pending = len(generation.tokens) - generation.computed
            groups.setdefault(min(pending, self.chunk), []).append(generation)
        if not groups:
            return []
        # Nothing is drawn before all is computed: what the model raises leaves no generator moved.
        logits = [self._compute(group, n) for n, group in groups.items()]
        drawn = map(self._draw, groups.values(), groups, logits)
        following = torch.cat(list(drawn)).tolist()
        advanced = [(each, count) for count, group in groups.items() for each in group]
        for (generation, count), token in zip(advanced, following, strict=True):
            generation.computed += count
            if generation.computed == len(generation.tokens):
                generation.tokens.append(token)
        ended = [each for each in self.running if each.ended]
        self.running = [each for each in self.running if not each.ended]
        for generation in ended:
            self.pool.release(generation.pages)
        return ended

    def _schedule(self) -> None:
        """Pages for the known tokens of those that run, the oldest first; then of those that wait.

        The oldest is never without: `_check` saw that the pool holds it to its end.
        """
        for generation in tuple(self.running):
            while generation in self.running and not self._fits(generation):
                youngest = self.running.pop()
                self.pool.release(youngest.pages)
                youngest.computed = 0
                self.waiting.appendleft(youngest)
                self.preemptions += 1
        while self.waiting and len(self.running) < self.batch and self._fits(self.waiting[0]):
            self.running.append(self.waiting.popleft())

    def _fits(self, generation: Generation) -> bool:
        return self.pool.grow(generation.pages, len(generation.tokens))

    def _compute(self, group: list[Generation], count: int) -> Tensor:
        """The next `count` tokens of each: to the cache, and logits of the token that follows."""
        width = self.pool.needed(self.model.config.seqlen)  # one shape whatever the lengths
        tables = [each.pages + [0] * (width - len(each.pages)) for each in group]
        tokens = [each.tokens[each.computed : each.computed + count] for each in group]
        cache = KVCache(
            self.pool.k,
            self.pool.v,
            torch.tensor(tables, dtype=torch.int32, device=self.device),
            torch.tensor([e.computed for e in group], dtype=torch.int32, device=self.device),
        )
        return self.model(torch.tensor(tokens, device=self.device), cache)[:, -1]

    @staticmethod
    def _draw(group: list[Generation], count: int, logits: Tensor) -> Tensor:
        """The token that follows the next `count` of each, (rows,) int64.

        Where known tokens are left to compute, what follows is known too, and is not drawn.
        """
        following = sample(logits, 0.0, None)
        for row, each in enumerate(group):
            if each.generator is not None and each.computed + count == len(each.tokens):
                drawn = sample(logits[row : row + 1], each.request.temperature, each.generator)
                following[row : row + 1] = drawn
        return following

    def _check(self, request: Request) -> None:
        vocabulary, context = self.model.config.vocab_size, self.model.config.seqlen
        prompt, limit, pool = request.prompt, request.limit, self.pool
        if not prompt:
            raise ValueError("prompt has 0 tokens; it must have at least 1")
        for name, tokens in (("prompt", prompt), ("stop", (request.stop or 0,))):
            for token in tokens:
                if not isinstance(token, int) or isinstance(token, bool):
                    raise ValueError(f"{name} has token {token}; it must be an int")
                if not 0 <= token < vocabulary:
                    raise ValueError(f"{name} has token {token}; it must be in [0, {vocabulary})")
        check_size("limit", limit)
        check_temperature(request.temperature)
        if not (isinstance(request.seed, int) and -(2**63) <= request.seed < 2**64):
            raise ValueError(f"seed is {request.seed}; it must be an int in [-2^63, 2^64)")
        size = f"prompt has {len(prompt)} tokens and limit is {limit}"
        if len(prompt) + limit > context:
            raise ValueError(f"{size}; together they must be at most {context}, the context")
        # The last token is written and never computed.
        if (needed := pool.needed(len(prompt) + limit - 1)) > pool.pages:
            raise ValueError(
                f"{size}; they need {needed} pages of {pool.page_size}, the pool has {pool.pages}"
            )
