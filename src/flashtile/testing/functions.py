"""Score and mask functions as users write them, for tests of every backend. Imports triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.masks import Range
from flashtile.mods.functions import MaskFunction, ScoreFunction


@triton.jit
def bent(s, at, args):
    """s + gain[head] * s^2 / (1 + distance^2)"""
    gain = tl.load(args[0] + at.head).to(tl.float32)
    far = (at.q_idx + at.k.length - at.q.length - at.k_idx).to(tl.float32)
    return s + gain * s * s / (1.0 + far * far)


@triton.jit
def bent_slope(before, after, at, args):
    gain = tl.load(args[0] + at.head).to(tl.float32)
    far = (at.q_idx + at.k.length - at.q.length - at.k_idx).to(tl.float32)
    return 1.0 + 2.0 * gain * before / (1.0 + far * far)


def _bent(s: Tensor, at: Any, args: tuple[Tensor, ...]) -> Tensor:
    far = (at.q_idx + at.k.length - at.q.length - at.k_idx).to(s.dtype)
    return s + args[0][at.head].to(s.dtype) * s * s / (1.0 + far * far)


def _bent_slope(before: Tensor, after: Tensor, at: Any, args: tuple[Tensor, ...]) -> Tensor:
    far = (at.q_idx + at.k.length - at.q.length - at.k_idx).to(before.dtype)
    return 1.0 + 2.0 * args[0][at.head].to(before.dtype) * before / (1.0 + far * far)


@triton.jit
def prefix(at, args):
    """The first keys of a sequence, as many as a tensor says, and those that are not later."""
    return (at.k_idx < tl.load(args[0] + at.batch)) | (at.k_idx <= at.q_idx)


@triton.jit
def prefix_keys(first, last, q, k, args):
    seen = tl.load(args[0] + q.batch)
    return Range(0, 0, tl.maximum(seen, first + 1), tl.maximum(seen, last + 1))


@triton.jit
def prefix_queries(first, last, q, k, args):
    seen = tl.load(args[0] + q.batch)
    return Range(tl.where(first < seen, 0, first), tl.where(last < seen, 0, last), 2147483647,
                 2147483647)  # fmt: skip


def _prefix(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return (at.k_idx < args[0][at.batch]) | (at.k_idx <= at.q_idx)


@triton.jit
def strided(at, args):
    """All but every third key, by head."""
    return (at.k_idx + at.head) % 3 != 1


def _strided(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return (at.k_idx + at.head) % 3 != 1


@triton.jit
def recent(at, args):
    """The first four keys, and those less than 200 before a query."""
    return (at.k_idx < 4) | (at.q_idx - at.k_idx < 200)


@triton.jit
def recent_queries(first, last, q, k, args):
    return Range(0, 0, first + 200, tl.where(first < 4, 2147483647, last + 200))


def _recent(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return (at.k_idx < 4) | (at.q_idx - at.k_idx < 200)


def bending(gain: Tensor) -> ScoreFunction:
    """A score function that depends on head, distance and a tensor (heads,)."""
    return ScoreFunction(bent, bent_slope, (gain,), (_bent, _bent_slope))


def prefixed(counts: Tensor, ranges: bool) -> MaskFunction:
    """Causality with a prefix that all queries see, of counts (batch,) int32 keys. ranges: with the
    bounds by which whole blocks are skipped."""
    bounds = (prefix_keys, prefix_queries) if ranges else (None, None)
    return MaskFunction(prefix, (counts,), *bounds, eager=_prefix)


def remembering() -> MaskFunction:
    """A window and the first keys, with a bound of the queries that see keys and none of the keys
    that queries see: the one says nothing of the other."""
    return MaskFunction(recent, queries=recent_queries, eager=_recent)


def striding() -> MaskFunction:
    """Two keys of every three: there is no whole block to skip."""
    return MaskFunction(strided, eager=_strided)
