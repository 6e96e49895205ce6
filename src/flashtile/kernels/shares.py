"""How the keys of all sequences are dealt out to the programs of the portable decode kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import key_range
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence


class Row(NamedTuple):
    """The work of one sequence, or of a vector of them."""

    blocks: Any  # of keys, of each tile
    first: Any  # the first of them
    cut: Any  # blocks of a unit
    units: Any  # of each tile
    q_tiles: Any  # tiles of a KV head


@triton.jit
def cut_in(blocks, size):
    """Blocks of a part, for at most `size` parts."""
    return tl.maximum(tl.cdiv(blocks, size), 1)


@triton.jit
def cut_every(blocks, size):
    """Blocks of a part, for parts of `size` blocks."""
    return blocks * 0 + size


@triton.jit
def row_work(q_span, k_span, masks, heads, work, TILE: tl.constexpr):
    """What there is to do for a sequence; no units where its queries see no key. The first and last
    of its queries bound the keys of all its tiles."""
    BLOCK_N: tl.constexpr = TILE.block_n
    seen = key_range(masks, 0, q_span.length - 1, q_span, k_span)
    first = seen.lo // BLOCK_N
    blocks = tl.maximum(tl.cdiv(seen.hi, BLOCK_N) - first, 0)
    cut = 1
    if work.cut is not None:
        cut = work.cut(blocks, number(work.size))
    q_tiles = tl.cdiv(q_span.length * number(heads.group), TILE.block_m)
    return Row(blocks, first, cut, tl.cdiv(blocks, cut), q_tiles)


@triton.jit
def units_from(first, q_seq, k_seq, masks, heads, work, TILE: tl.constexpr):
    """(SCAN,) units of sequences first, first + 1, ..., int64, and of each of their tiles; 0 past
    the last."""
    batches = number(q_seq.batch)
    idx = first + tl.arange(0, TILE.scan)
    batch = tl.minimum(idx, batches - 1)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    row = row_work(q_span, k_span, masks, heads, work, TILE)
    tiles = tl.cast(row.q_tiles, tl.int64) * number(work.kv_heads)
    there = idx < batches
    return tl.where(there, tiles * row.units, 0), tl.where(there & (tiles > 0), row.units, 0)


@triton.jit
def count_units(q_seq, k_seq, masks, heads, work, TILE: tl.constexpr):
    """(all units, the most of a tile)."""
    total = tl.program_id(0).to(tl.int64) * 0
    longest = tl.program_id(0) * 0
    for first in range(0, number(q_seq.batch), TILE.scan):
        units, of_tile = units_from(first, q_seq, k_seq, masks, heads, work, TILE)
        total += tl.sum(units, 0)
        longest = tl.maximum(longest, tl.max(of_tile, 0))
    return total, longest


@triton.jit
def rounded(share, units):
    """The size of a share, a sixteenth more at most, if that makes it whole tiles of so many units,
    or a part of one of which all are alike: fewer states are left to merge, and a program begins
    fewer tiles. Programs that get nothing are not missed, since it is memory that is short."""
    units = tl.maximum(units, 1)
    parts = tl.maximum(units // tl.maximum(share, 1), 1)
    wide = tl.where(units < share, tl.cdiv(share, units) * units, tl.cdiv(units, parts))
    return tl.where(wide <= share + share // 16, tl.maximum(wide, share), share)


@triton.jit
def find_row(unit, q_seq, k_seq, masks, heads, work, TILE: tl.constexpr):
    """(sequence, its first unit) of a unit: the sequences that end at or before it, counted."""
    batch, start, before = tl.program_id(0) * 0, unit * 0, unit * 0
    for first in range(0, number(q_seq.batch), TILE.scan):
        units, _ = units_from(first, q_seq, k_seq, masks, heads, work, TILE)
        ends = before + tl.cumsum(units, 0)
        batch += tl.sum((ends <= unit).to(tl.int32), 0)
        start = tl.maximum(start, tl.max(tl.where(ends <= unit, ends, 0), 0))
        before += tl.sum(units, 0)
    return batch, start
