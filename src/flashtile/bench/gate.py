"""The gate before every timing: what is fast must be right.

A provider's results at the cell's own size are compared on the first KV head and the query heads
that read it, over the whole batch: heads do not depend on each other, and the score matrix of one
fits into memory where that of all does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import reference
from flashtile.bench.features import DTYPE, Cell, Work
from flashtile.random import draw_rng_state
from flashtile.testing import assert_within_budget

PEER_ERROR = 0.02
"""The largest relative error of another library: several roundings of bf16, which are 0.4 % each.
flashtile's results are held to the budget of `testing/budget.py` instead."""

LONGEST_FP64 = 4096
"""Tokens of a row up to which the reference is fp64; a score matrix of 16,384 has 2.1 GB in it, and
autograd keeps a dozen of them. Beyond, fp32: 2^16 times finer than bf16."""

SEED = 3


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def draw(cell: Cell, work: Work, device: torch.device) -> Inputs:
    """Random normal inputs, with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    queries = keys = (cell.seqlen,) if work.packed else (cell.batch, cell.seqlen)
    if work.page_size:
        keys = (work.keywords["block_table"].numel(), work.page_size)
    q, k, v, dout = (
        torch.randn(*rows, h, cell.head_dim, dtype=DTYPE, device=device, generator=generator)
        for rows, h in ((queries, cell.heads), (keys, cell.kv_heads), (keys, cell.kv_heads),
                        (queries, cell.heads))
    )  # fmt: skip
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def assert_close(label: str, found: Tensor, exact: Tensor, limit: float = PEER_ERROR) -> None:
    """Raise AssertionError if the relative error of another library's result is above a limit."""
    error = float((found.detach().double() - exact).norm() / exact.double().norm())
    if not error <= limit:
        raise AssertionError(f"{label} has a relative error of {error:.2g}")


class Gate:
    """Checks of one cell. Raises AssertionError where a result is wrong."""

    def __init__(self, cell: Cell, work: Work, inputs: Inputs) -> None:
        self._cell, self._work, self._inputs = cell, work, inputs
        self._group = cell.heads // cell.kv_heads

    def seed(self) -> None:
        """Have the next dropout mask that flashtile draws be the one that `golden` has."""
        torch.manual_seed(SEED)

    def check(self, name: str, results: Sequence[Tensor]) -> None:
        """Of out alone, or of the gradients of q, k, v and what else is learned."""
        forward = len(results) == 1
        labels = ("out",) if forward else ("dq", "dk", "dv", "dbias")
        part = slice(0, 1) if forward else slice(1, None)
        ours = name.startswith("flashtile")
        # Another library drops other elements.
        golden = (self.golden if ours else self.golden_kept)[part]
        eager = self.eager[part] if ours else golden
        for label, actual, base, exact in zip(labels, results, eager, golden, strict=False):
            found = self._first_heads(label, actual)
            if ours:
                assert_within_budget(found, base, exact, label, gradient=not forward)
            else:
                self._check_peer(label, found, exact)

    def _check_peer(self, label: str, found: Tensor, exact: Tensor) -> None:
        p = self._work.keywords.get("dropout_p", 0.0)
        # Dropped terms are noise of sqrt(p / (1 - p)) of a sum of independent ones.
        limit = PEER_ERROR if p == 0.0 else 2.0 * math.sqrt(p / (1.0 - p))
        assert_close(label, found, exact, limit)

    @cached_property
    def golden(self) -> list[Tensor]:
        long = self._cell.seqlen > LONGEST_FP64
        return self._reference(torch.float32 if long else torch.float64)

    @cached_property
    def eager(self) -> list[Tensor]:
        return self._reference(None)

    @cached_property
    def golden_kept(self) -> list[Tensor]:
        """golden without dropout."""
        if "dropout_p" not in self._work.keywords:
            return self.golden
        return self._reference(torch.float32, dropout_p=0.0)

    def _reference(self, dtype: torch.dtype | None, **changes: Any) -> list[Tensor]:
        """out and the gradients of q, k, v and what else is learned, of the first heads."""
        unknown = {"max_seqlen_q", "max_seqlen_k", "deterministic"}
        keywords = {n: x for n, x in self._work.keywords.items() if n not in unknown}
        keywords |= changes
        q, k, v, dout = (
            self._first_heads(name, x.detach())
            for name, x in zip(("q", "dk", "dv", "dout"), self._inputs, strict=True)
        )
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
        learned = []
        for name in {"alibi_slopes", "learnable_sink"} & keywords.keys():
            keywords[name] = keywords[name][: self._group]
        if "bias" in keywords:
            part = self._first_heads("dbias", keywords["bias"].detach())
            keywords["bias"] = part.to(dtype or part.dtype)
            learned = [keywords["bias"].requires_grad_()] if self._work.learned else []
        if keywords.get("dropout_p"):
            self.seed()
            keywords["rng_state"] = draw_rng_state(q.device)
        out = reference.attention(*leaves, **keywords, dtype=dtype).out
        grads = torch.autograd.grad(out, leaves + learned, dout.to(out.dtype))
        return [out.detach(), *grads]

    def _first_heads(self, label: str, x: Tensor) -> Tensor:
        if label == "dbias":
            return x[:, : self._group]
        return x[..., : 1 if label in ("dk", "dv") else self._group, :]
