"""Whole problems drawn by hypothesis, against the reference: out, lse and every gradient.

Continuous integration draws the same problems each time; FLASHTILE_HYPOTHESIS=nightly draws ten
thousand new ones. Hypothesis draws the structure of a problem, a torch generator its values. What a
problem does not use is poison: NaN between rows, past lengths and in unused pages, garbage in
unused table entries.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtile import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    plan,
    reference,
)
from flashtile.backends import aten
from flashtile.mods import Band, Tile
from flashtile.random import draw_rng_state
from flashtile.testing import Results, assert_within_budget, poisoned_allocations

COMMON: dict[str, Any] = {
    "deadline": None, "database": None, "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip
settings.register_profile("ci", max_examples=250, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=10_000, **COMMON)
settings.load_profile(os.environ.get("FLASHTILE_HYPOTHESIS", "ci"))

LSE_SLACK = 0.1
"""Roundings of q's dtype that lse may be wrong by: torch's kernel takes exp of 16-bit problems to
5e-6, while eager attention, if the scores are small, may be lucky."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (
    "contiguous", "heads_first", "packed", "every_other_head", "offset", "strided", "one_head",
)  # fmt: skip
GARBAGE = (2**30, -1, -(2**31))
"""Page numbers of table entries that no sequence uses."""
SIDES = (-1, None, 0, 1, 5, 16, 33, 10**6, sys.maxsize)
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((0, 1, 15, 16, 17, 32, 33)))


@dataclass
class Drawn:
    """Arguments of `flash_attn_func` or `flash_attn_varlen_func`, and how to run them."""

    leaves: dict[str, Tensor]  # what is differentiable
    keywords: dict[str, Any]
    varlen: bool
    small_blocks: bool
    poisoned: bool
    broadcast_dout: bool
    seed: int
    plain: dict[str, Any] = field(default_factory=dict)  # keywords the reference does not have

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def __str__(self) -> str:
        def show(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if x.numel() < 12 and not x.is_floating_point():
                return x.tolist()
            return f"{str(x.dtype)[6:]}{list(x.shape)} strides {list(x.stride())}"

        shown = {n: show(x) for n, x in {**self.leaves, **self.keywords, **self.plain}.items()}
        flags = [n for n in ("varlen", "small_blocks", "poisoned", "broadcast_dout")
                 if getattr(self, n)]  # fmt: skip
        return f"{shown} {flags} seed {self.seed}"


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides, and NaN in the memory between its elements."""
    *outer, tokens, heads, dim = x.shape

    def empty(*shape: int) -> Tensor:
        return x.new_full(shape, math.nan)

    if layout == "one_head":
        return x[..., :1, :].expand(x.shape)
    storages = {
        "contiguous": lambda: empty(*x.shape),
        "heads_first": lambda: empty(*outer, heads, tokens, dim).transpose(-2, -3),
        "packed": lambda: empty(*outer, tokens, 3, heads, dim)[..., 1, :, :],
        "every_other_head": lambda: empty(*outer, tokens, 2 * heads, dim)[..., 1::2, :],
        "offset": lambda: empty(x.numel() + 9)[3 : 3 + x.numel()].view(x.shape),
        "strided": lambda: empty(*x.shape, 2)[..., 1],
    }
    return storages[layout]().copy_(x)


class _Maker:
    """Draws one problem, part by part; hypothesis draws structure, a torch generator values."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.seed = draw(st.integers(0, 2**32 - 1))
        self.generator = torch.Generator().manual_seed(self.seed)
        self.dtype = self.pick(*DTYPES)
        self.kv_heads = self.pick(1, 2, 3)
        self.heads = self.kv_heads * self.pick(1, 2, 3, 5)
        self.dim = self.pick(8, 1, 2, 3, 16, 20)
        self.dim_v = self.pick(self.dim, 1, 5, 12)
        self.magnitude = self.pick(1.0, 0.1, 4.0)
        self.keywords: dict[str, Any] = {}
        self.plain: dict[str, Any] = {}
        self.unused: dict[str, Tensor] = {}  # True where a row of q, or of k and v, is never read

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * self.magnitude
        return x.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def make(self) -> Drawn:
        kind = self.pick("dense", "varlen", "paged")
        rows_q, rows_k = self.dense() if kind == "dense" else self.packed(kind == "paged")
        leaves = {}
        for name, rows, heads, dim in (
            ("q", rows_q, self.heads, self.dim),
            ("k", rows_k, self.kv_heads, self.dim),
            ("v", rows_k, self.kv_heads, self.dim_v),
        ):
            x = lay_out(self.normal(*rows, heads, dim), layout := self.pick(*LAYOUTS))
            unused = self.unused.get(name[0].replace("v", "k"))
            if unused is not None:
                (x[..., 0, :] if layout == "one_head" else x)[unused] = math.nan
            leaves[name] = x
        leaves |= self.scores()
        self.masks(kind)
        return Drawn(
            leaves, self.keywords, kind != "dense", small_blocks=self.draw(st.booleans()),
            poisoned=self.draw(st.booleans()), broadcast_dout=self.pick(False, False, True),
            seed=self.seed, plain=self.plain,
        )  # fmt: skip

    def dense(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        self.batch = self.pick(2, 1, 3, 5, 2, 0)
        self.longest_q, self.longest_k = self.draw(LENGTHS), self.draw(LENGTHS)
        if self.pick(False, True):
            self.longest_k = self.longest_q
        return (self.batch, self.longest_q), (self.batch, self.longest_k)

    def packed(self, paged: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets, lengths in use and pages of a few sequences, NaN in every row they leave out."""
        self.batch = self.pick(2, 1, 3, 4, 0)
        lengths = [(self.draw(LENGTHS), self.draw(LENGTHS)) for _ in range(self.batch)]
        tokens = []
        for at, side in enumerate("qk"):
            counts = torch.tensor([n[at] for n in lengths], dtype=torch.int32)
            cu = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32)
            used = counts
            if self.pick(False, False, True):
                used = (torch.rand(self.batch, generator=self.generator) * (counts + 1)).int()
                self.keywords[f"seqused_{side}"] = used
            self.keywords[f"cu_seqlens_{side}"] = cu
            longest = int(counts.max()) if self.batch else 0
            setattr(self, f"longest_{side}", longest)
            self.plain[f"max_seqlen_{side}"] = self.pick(None, longest, torch.tensor(longest))
            if side == "k" and paged:
                return (tokens[0],), self.pages(used, longest)
            unused = torch.ones(int(cu[-1]) + self.pick(0, 0, 1, 5), dtype=torch.bool)
            for start, count in zip(cu.tolist(), used.tolist(), strict=False):
                unused[start : start + count] = False
            self.unused[side] = unused
            tokens.append(len(unused))
        return (tokens[0],), (tokens[1],)

    def pages(self, used: Tensor, longest: int) -> tuple[int, int]:
        """A shuffled block table, garbage in what is not used, now and then a shared first page."""
        size = self.draw(st.integers(1, 20))
        per_row = -(-longest // size) + self.pick(0, 1, 3)
        count = per_row * self.batch + self.pick(0, 2)
        order = torch.randperm(count, generator=self.generator)[: per_row * self.batch]
        table = order.view(self.batch, per_row).to(torch.int32)
        if per_row and self.pick(False, False, True):
            table[:, 0] = table[:1, 0]
        unused = torch.ones(count, size, dtype=torch.bool)
        for row, length in enumerate(used.tolist()):
            for slot in range(length):
                unused[table[row, slot // size], slot % size] = False
            table[row, -(-length // size) :] = self.pick(*GARBAGE)
        self.unused["k"] = unused
        self.keywords["block_table"] = table
        if "seqused_k" in self.keywords and self.pick(False, True):
            self.keywords["cu_seqlens_k"] = None
        return count, size

    def scores(self) -> dict[str, Tensor]:
        """Scalars and score mods; what is differentiable is returned."""
        self.keywords |= {
            "causal": self.draw(st.booleans()),
            "window_size": (self.pick(*SIDES), self.pick(*SIDES)),
            "softcap": self.pick(0.0, 0.0, 0.7, 20.0),
            "softmax_scale": self.pick(None, None, 0.3, 0.0, -0.2),
            "dropout_p": self.pick(0.0, 0.0, 0.2, 0.9),
        }
        leaves = {}
        if self.pick(False, False, True):
            shape = self.pick((self.heads,), (self.batch, self.heads))
            self.keywords["alibi_slopes"] = torch.rand(shape, generator=self.generator)
        if self.pick(False, False, True):
            sink = self.normal(self.heads, dtype=self.pick(self.dtype, torch.float32))
            if self.pick(False, False, True):
                sink[0] = -math.inf
            leaves["learnable_sink"] = sink
        if self.pick(False, False, True):
            dtype = self.pick(self.dtype, torch.float32)
            leaves["bias"] = self.square(lambda *shape: self.normal(*shape, dtype=dtype))
        return leaves

    def square(self, make: Any) -> Tensor:
        """A bias or mask of any broadcastable shape; larger than needed for packed sequences."""
        more = 0 if self.plain == {} else self.pick(0, 3)
        rows = self.pick(1, self.longest_q + more)
        shape = (self.pick(1, self.batch), self.pick(1, self.heads), rows, self.longest_k + more)
        x = make(*shape)
        expanded = (self.batch, self.heads, rows, self.longest_k + more)
        return x.expand(expanded) if self.pick(False, False, True) else x

    def masks(self, kind: str) -> None:
        choice = self.pick(None, None, "bool", "float")
        if choice is not None:
            seen = self.square(lambda *shape: torch.rand(shape, generator=self.generator) > 0.3)
            if choice == "float":
                added = self.normal(*seen.shape, dtype=self.pick(self.dtype, torch.float32))
                self.keywords["attn_mask"] = added.masked_fill(~seen, -math.inf)
            else:
                self.keywords["attn_mask"] = seen
        if kind == "dense" and self.pick(False, False, True):
            ids = [self.integers(3, self.batch, n) for n in (self.longest_q, self.longest_k)]
            self.keywords["document_ids"] = (
                ids[0] if self.longest_q == self.longest_k else tuple(ids)
            )
        if kind == "varlen" and self.pick(False, False, True):
            ids = [self.integers(3, len(self.unused[side])) for side in "qk"]
            self.keywords["document_ids"] = tuple(x.to(torch.int32) for x in ids)


@st.composite
def problems(draw: Any) -> Drawn:
    return _Maker(draw).make()


class _CacheMaker(_Maker):
    """Draws a call of `flash_attn_with_kvcache`; slots out of use are NaN."""

    def make(self) -> Any:
        self.batch, seqlen_q = self.pick(2, 1, 3, 4), self.pick(1, 2, 5, 20)
        new = self.pick(None, 0, 1, 3, 17)
        capacity = self.draw(st.integers(max(1, new or 0), 50))
        highest = capacity - (new or 0)
        lengths = self.integers(highest + 1, self.batch).int()
        self.longest_q, self.longest_k = seqlen_q, capacity
        keywords: dict[str, Any] = {"cache_seqlens": lengths}
        if self.pick(False, False, True):
            lengths = lengths[:1].expand(self.batch)
            keywords["cache_seqlens"] = int(lengths[0])
        used = lengths + (new or 0)
        starts = torch.zeros_like(used)
        if self.pick("dense", "paged") == "paged":
            rows = self.pages(used, capacity)
            self.longest_k = rows[1] * self.keywords["block_table"].shape[1]
            keywords["block_table"] = self.keywords["block_table"]
        else:
            rows = (self.batch + self.pick(0, 2), capacity)
            order = torch.randperm(rows[0], generator=self.generator)[: self.batch].int()
            if rows[0] == self.batch and self.pick(False, True):
                order = torch.arange(self.batch, dtype=torch.int32)
            else:
                keywords["cache_batch_idx"] = order
            if self.pick(False, False, True):
                starts = (torch.rand(self.batch, generator=self.generator) * (lengths + 1)).int()
                keywords["cache_leftpad"] = starts
            self.unused["k"] = torch.ones(rows, dtype=torch.bool)
            for row, start, stop in zip(order, starts, used, strict=True):
                self.unused["k"][row, start:stop] = False
        caches = []
        for dim in (self.dim, self.dim_v):
            layouts = LAYOUTS[:5] if new is not None else LAYOUTS[:6]
            caches.append(lay_out(self.normal(*rows, self.kv_heads, dim), self.pick(*layouts)))
            caches[-1][self.unused["k"]] = math.nan
        q = lay_out(self.normal(self.batch, seqlen_q, self.heads, self.dim), self.pick(*LAYOUTS))
        if new is not None:
            keywords |= self.new_tokens(new, capacity + seqlen_q)
        return q, caches, keywords | self.variant(), self.draw(st.booleans())

    def new_tokens(self, new: int, positions: int) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        for name, dim in (("k", self.dim), ("v", self.dim_v)):
            x = self.normal(self.batch, new, self.kv_heads, dim)
            keywords[name] = lay_out(x, self.pick(*LAYOUTS))
        half = self.draw(st.integers(0, self.dim // 2))
        if half:
            angle = torch.rand(positions, half, generator=self.generator) * 6.28
            dtype = self.pick(torch.float32, self.dtype)
            keywords |= {
                "rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype),
                "rotary_interleaved": self.draw(st.booleans()),
            }  # fmt: skip
        return keywords

    def variant(self) -> dict[str, Any]:
        keywords: dict[str, Any] = {
            "causal": self.draw(st.booleans()),
            "window_size": (self.pick(*SIDES), self.pick(*SIDES)),
            "softcap": self.pick(0.0, 0.0, 2.0),
        }
        if self.pick(False, False, True):
            keywords["alibi_slopes"] = torch.rand(self.heads, generator=self.generator)
        if self.pick(False, False, True):
            keywords["learnable_sink"] = self.normal(self.heads)
        if self.pick(False, False, True):
            keywords["attn_mask"] = self.square(
                lambda *shape: torch.rand(shape, generator=self.generator) > 0.3
            )
        return keywords


@st.composite
def cache_calls(draw: Any) -> Any:
    return _CacheMaker(draw).make()


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """The fixture of this name, once an example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", 16)
        patch.setattr(plan, "BLOCK_ELEMENTS", 16 * 16 * 4)
        patch.setattr(aten, "can", lambda call, segment: False)
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


def evaluate(drawn: Drawn, dtype: torch.dtype | None, reference_too: bool) -> Results:
    """flashtile's results, or the reference's in `dtype` (None: the problem's own)."""
    leaves = {n: x.detach() for n, x in drawn.leaves.items()}
    if dtype is not None:
        leaves = {n: x.to(dtype) for n, x in leaves.items()}
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    generator = torch.Generator().manual_seed(drawn.seed)
    arguments = {**leaves, **drawn.keywords}
    if reference_too:
        state = draw_rng_state(torch.device("cpu"), generator)
        out, lse = reference.attention(**arguments, rng_state=state, dtype=dtype)
    else:
        function = flash_attn_varlen_func if drawn.varlen else flash_attn_func
        out, lse = function(
            **arguments, **drawn.plain, return_lse=True, dropout_generator=generator
        )
    g = torch.Generator().manual_seed(drawn.seed + 1)
    dout, dlse = (torch.randn(x.shape, generator=g).bfloat16() for x in (out, lse))
    dout = dout.to(out.dtype)
    if drawn.broadcast_dout and dout.numel():
        dout = dout.flatten()[0].expand(dout.shape)
    dlse = torch.where(lse.detach().isfinite(), dlse, 0.0).to(lse.dtype)
    if not out.requires_grad:  # the reference of no sequence at all
        return Results(out, lse, {n: torch.zeros_like(x) for n, x in leaves.items()})
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout, dlse), allow_unused=True, materialize_grads=True
    )
    return Results(out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True)))


def rounding(drawn: Drawn, name: str) -> float:
    """A size for one rounding of the intermediate results behind a result.

    The budget compares with the error that eager attention happens to make, which for a handful of
    numbers may be none; dP - delta cancels, so that a gradient's own size is no measure either.
    In 10,000 draws no error over the budget was more than 0.6 of this.
    """
    if name == "out":
        return 0.0
    if name == "lse":
        return LSE_SLACK * torch.finfo(drawn.leaves["q"].dtype).eps
    q, k, v = (x.detach()[x.detach().isfinite()].double().abs() for x in
               (drawn.leaves[n] for n in "qkv"))  # fmt: skip
    dim, dim_v = (drawn.leaves[n].shape[-1] for n in "qv")
    largest_q, largest_k, largest_v = (float(x.max()) if len(x) else 0.0 for x in (q, k, v))
    scale = drawn.keywords["softmax_scale"]
    scale = dim**-0.5 if scale is None else abs(scale)
    dout = 3.0 / (1.0 - drawn.keywords["dropout_p"])
    dp = dout * largest_v * dim_v**0.5 + 3.0
    spread = 8.0 + scale * largest_q * largest_k * dim**0.5  # of exp's argument
    many = (len(q) / dim) ** 0.5
    size = {
        "dq": scale * dp * largest_k, "dk": scale * dp * largest_q * many,
        "dv": spread * dout * many, "dbias": dp * many, "dlearnable_sink": dp * many,
    }  # fmt: skip
    return torch.finfo(drawn.leaves["q"].dtype).eps * size[name]


def assert_close(actual: Tensor, eager: Tensor, golden: Tensor, name: str, slack: float) -> None:
    """Within the budget or, where that measures luck, within `slack` of golden."""
    try:
        assert_within_budget(actual, eager, golden, name, gradient=name.startswith("d"))
    except AssertionError as over_budget:
        finite = golden.isfinite()
        if not torch.equal(actual[~finite].double(), golden[~finite]):
            raise
        error = (actual[finite].double() - golden[finite]).abs().max()
        if not error <= slack:
            raise AssertionError(f"{over_budget}; max error is {error:.3g}") from over_budget


def run_as_drawn(drawn: Drawn) -> contextlib.ExitStack:
    """The blocks and the memory that a problem asks for."""
    stack = contextlib.ExitStack()
    if drawn.small_blocks:
        stack.enter_context(small_blocks())
    if drawn.poisoned:
        stack.enter_context(poisoned_allocations())
    return stack


def storage(x: Tensor) -> Tensor:
    """Every byte of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@given(problems())
def test_whole_problems(drawn: Drawn) -> None:
    inputs = [storage(x) for x in (*drawn.leaves.values(), *drawn.keywords.values())
              if isinstance(x, Tensor)]  # fmt: skip
    before = [x.clone() for x in inputs]
    with run_as_drawn(drawn):
        actual = evaluate(drawn, None, False)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    golden, eager = evaluate(drawn, torch.float64, True), evaluate(drawn, None, True)
    assert all(grad.is_contiguous() for grad in actual.grads.values())
    found, base, exact = (
        {"out": x.out, "lse": x.lse, **{f"d{n}": grad for n, grad in x.grads.items()}}
        for x in (actual, eager, golden)
    )
    for name, x in found.items():
        assert_close(x, base[name], exact[name], name, rounding(drawn, name))


@given(cache_calls())
def test_whole_cache_calls(drawn: Any) -> None:
    """Also: memory around the written slots keeps every bit."""
    q, caches, keywords, blocks = drawn
    golden, *after = reference.attention_with_kvcache(q, *caches, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, dtype=None)
    expected = [storage(x).clone() for x in caches]
    for cache, memory, x in zip(caches, expected, after, strict=True):
        view = torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage())
        view.as_strided(cache.shape, cache.stride(), cache.storage_offset()).copy_(x)
    with small_blocks() if blocks else contextlib.nullcontext(), poisoned_allocations():
        out, lse = flash_attn_with_kvcache(q, *caches, **keywords, return_softmax_lse=True)
    for cache, memory in zip(caches, expected, strict=True):
        assert torch.equal(storage(cache), memory)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_close(lse, eager.lse, golden.lse, "lse", LSE_SLACK * torch.finfo(q.dtype).eps)


@given(st.data())
def test_a_band_with_bounds_equals_itself_without(data: Any) -> None:
    """Elements of a tile, and the exact ranges that it implies, by brute force."""
    seqlen_q, seqlen_k = (data.draw(st.integers(1, 70)) for _ in range(2))
    left, right = (-1 if side is None else side
                   for side in (data.draw(st.sampled_from(SIDES)) for _ in range(2)))  # fmt: skip
    row, col = data.draw(st.integers(0, seqlen_q - 1)), data.draw(st.integers(0, seqlen_k - 1))
    rows = data.draw(st.integers(1, seqlen_q - row))
    cols = data.draw(st.integers(1, seqlen_k - col))
    seen = torch.tensor([
        [(left < 0 or j >= at - left) and (right < 0 or j <= at + right) for j in range(seqlen_k)]
        for at in range(seqlen_k - seqlen_q, seqlen_k)
    ])  # fmt: skip
    band, tile = Band(left, right), Tile(0, 1, row, rows, col, cols, seqlen_q, seqlen_k)
    part = seen[row : row + rows, col : col + cols]
    visible = band.visible(tile, part)
    assert torch.equal(part, torch.ones_like(part) if visible is None else visible.expand_as(part))
    for (lo, hi), line in (
        (band.key_range(tile), seen[row : row + rows].any(0)),
        (band.query_range(tile), seen[:, col : col + cols].any(1)),
    ):
        inside = torch.zeros_like(line)
        inside[lo : max(lo, hi)] = True
        assert not (line & ~inside).any()
        assert not (line.any() and lo >= hi)
