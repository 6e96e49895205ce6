"""Hypothesis strategies for whole problems: shape, dtype, memory layout, every feature.

Hypothesis draws the structure of a problem, a torch generator its values. What a problem does not
use is poison: NaN between rows, past lengths and in unused pages, garbage in unused table entries.
This module alone needs hypothesis.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from flashtile.testing.layouts import LAYOUTS, lay_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GARBAGE = (2**30, -1, -(2**31))
"""Page numbers of table entries that no sequence uses."""
SIDES = (-1, None, 0, 1, 5, 16, 33, 10**6, sys.maxsize)
CHUNKS = (0, 0, 0, 1, 5, 16, 33, 10**6, sys.maxsize)
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
        tokens: list[int] = []
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
            "attention_chunk": self.pick(*CHUNKS),
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
            "attention_chunk": self.pick(*CHUNKS),
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
