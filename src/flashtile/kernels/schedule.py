"""Which blocks a tile folds in: first those that need their masks, then those that do not.

Without a block list the masks' ranges say it; with one (masks given as tensors, see `blocks`) a
row of the list does. Either way block i is found from i alone, which keeps the mainloop's loads
pipelined. Full blocks that lie side by side are walked without the list: looking up where a block
is delays the loads of its keys (causality as a tensor, forward at 16k: 2.99 ms, else 2.29).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number

LIST_BLOCK = tl.constexpr(128)
"""Edge of the tiles that a block list counts in; the mainloops' blocks divide it."""

PARTIAL = tl.constexpr(0)  # blocks that need masks
RUN = tl.constexpr(1)  # full blocks side by side
SCATTERED = tl.constexpr(2)  # full blocks of a list


class BlockList(NamedTuple):
    """Per (batch, head, tile): blocks that need masks from the front, full ones from the back."""

    entries: Any  # (batch, 1 | heads, tiles, blocks) int32
    counts: Any  # (batch, 1 | heads, tiles, 4) int32: how many need masks, how many full ones are
    # scattered, how many in a run, and the run's first
    stride_batch: Any  # opaque, in tiles
    stride_head: Any  # opaque, in tiles
    blocks: Any  # opaque


class Schedule(NamedTuple):
    partial: Any  # how many blocks need masks
    run: Any  # how many do not and lie side by side
    scattered: Any  # how many do not and are in the list
    lo: Any  # first index of the blocks left of the full ones
    left: Any  # how many those are
    full_lo: Any  # first index of the run
    full_hi: Any  # first index of the blocks right of the full ones
    row: Any  # where this tile's row of the list begins


@triton.jit
def schedule_range(r, BLOCK: tl.constexpr):
    """The blocks of a Range, rounded to whole blocks."""
    lo = r.lo // BLOCK * BLOCK
    hi = tl.cdiv(tl.maximum(r.hi, 0), BLOCK) * BLOCK
    most = tl.maximum(hi, lo)
    # A bound may be the greatest number, which rounded up would be negative.
    full_lo = tl.maximum(tl.cdiv(tl.minimum(r.full_lo, most), BLOCK) * BLOCK, lo)
    full_hi = tl.maximum(r.full_hi // BLOCK * BLOCK, full_lo)
    left = (full_lo - lo) // BLOCK
    right = tl.maximum(hi - full_hi, 0) // BLOCK
    return Schedule(left + right, (full_hi - full_lo) // BLOCK, 0, lo, left, full_lo, full_hi, 0)


@triton.jit
def schedule_list(blocks, batch, head, first, length, BLOCK: tl.constexpr):
    """The blocks of a list's row; none past `length`, where there may be no list either."""
    tile = tl.cast(batch, tl.int64) * number(blocks.stride_batch)
    tile += head * number(blocks.stride_head) + first // LIST_BLOCK
    split = LIST_BLOCK // BLOCK
    used = first < length
    counts = blocks.counts + 4 * tile
    partial = tl.load(counts, mask=used, other=0)
    scattered = tl.load(counts + 1, mask=used, other=0)
    run = tl.load(counts + 2, mask=used, other=0)
    run_first = tl.load(counts + 3, mask=used, other=0) * LIST_BLOCK
    row = tile * number(blocks.blocks)
    return Schedule(partial * split, run * split, scattered * split, 0, 0, run_first, 0, row)


@triton.jit
def schedule_tile(blocks, r, batch, head, first, length, BLOCK: tl.constexpr):
    """The blocks of a tile: those of its list, or where there is none those of the masks' range."""
    if blocks is None:
        return schedule_range(r, BLOCK)
    else:
        return schedule_list(blocks, batch, head, first, length, BLOCK)


@triton.jit
def block_count(schedule, PART: tl.constexpr):
    if PART == PARTIAL:
        return schedule.partial
    elif PART == RUN:
        return schedule.run
    else:
        return schedule.scattered


@triton.jit
def block_start(blocks, schedule, i, PART: tl.constexpr, BLOCK: tl.constexpr):
    """First index of the i-th block of a part; any where there is none such."""
    if PART == RUN:
        return schedule.full_lo + i * BLOCK
    elif blocks is not None:
        split: tl.constexpr = LIST_BLOCK // BLOCK
        at = i // split if PART == PARTIAL else number(blocks.blocks) - 1 - i // split
        inner = (i - i // split * split) * BLOCK
        entry = tl.load(blocks.entries + schedule.row + at, mask=i < block_count(schedule, PART),
                        other=0)  # fmt: skip
        return entry * LIST_BLOCK + inner
    else:
        left, right = schedule.lo + i * BLOCK, schedule.full_hi + (i - schedule.left) * BLOCK
        return tl.where(i < schedule.left, left, right)
