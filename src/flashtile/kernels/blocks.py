"""Masks given as tensors, classified per tile once, and the lists of blocks that follow.

`classify_blocks` reads a mask once and leaves one code a tile of 128 x 128: hidden, partly visible
or fully. `list_blocks` turns a row of codes (a column, for dK and dV) and the ranges of the other
masks into the list of blocks that a mainloop walks (FlexAttention's BlockMask, Dong et al. 2024,
section 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import At, key_range, query_range
from flashtile.kernels.numbers import number
from flashtile.kernels.schedule import LIST_BLOCK
from flashtile.kernels.views import open_sequence

HIDDEN = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)


class CodeGrid(NamedTuple):
    """Codes (batches, heads, q_tiles, k_tiles) uint8, contiguous; all but ptr opaque."""

    ptr: Any
    heads: Any  # 1 or heads
    q_tiles: Any
    k_tiles: Any


@triton.jit
def classify_blocks(codes, q_seq, k_seq, masks):
    """The code of one tile: what all masks may show, and what they show for sure."""
    BLOCK: tl.constexpr = LIST_BLOCK
    tile = tl.program_id(0)
    k_tile, rest = tile % number(codes.k_tiles), tile // number(codes.k_tiles)
    q_tile, rest = rest % number(codes.q_tiles), rest // number(codes.q_tiles)
    head, batch = rest % number(codes.heads), rest // number(codes.heads)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    first_q, first_k = q_tile * BLOCK, k_tile * BLOCK
    rows, columns = first_q + tl.arange(0, BLOCK), first_k + tl.arange(0, BLOCK)
    code = HIDDEN
    if (first_q < q_span.length) & (first_k < k_span.length):
        at = At(batch, head, first_q, first_k, rows[:, None], columns[None, :], q_span, k_span)
        some, every = 1, (first_k + BLOCK <= k_span.length).to(tl.int32)
        for i in tl.static_range(len(masks)):
            may, surely = masks[i].tile(at, masks[i].args)
            some, every = some & may, every & surely
        code = tl.where(some == 0, HIDDEN, tl.where(every == 1, FULL, PARTIAL))
    tl.store(codes.ptr + tile, code.to(tl.uint8))


@triton.jit
def list_blocks(codes, entries, counts, q_seq, k_seq, ranges, TRANSPOSED: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """One row of the list: partial blocks from the front, full ones from the back unless they all
    lie side by side."""
    BLOCK: tl.constexpr = LIST_BLOCK
    q_tiles, k_tiles = number(codes.q_tiles), number(codes.k_tiles)
    own, other = q_tiles, k_tiles
    if TRANSPOSED:
        own, other = k_tiles, q_tiles
    row = tl.program_id(0)
    tile, plane = row % own, row // own
    batch = plane // number(codes.heads)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    first = tile * BLOCK
    if TRANSPOSED:
        r = query_range(ranges, first, first + BLOCK - 1, q_span, k_span)
    else:
        r = key_range(ranges, first, first + BLOCK - 1, q_span, k_span)
    grid = codes.ptr + plane.to(tl.int64) * q_tiles * k_tiles
    partial, full, least, most = 0, 0, other, -1
    line = entries + row.to(tl.int64) * other
    for start in range(0, other, CHUNK):
        j = start + tl.arange(0, CHUNK)
        at = j * k_tiles + tile if TRANSPOSED else tile * k_tiles + j
        code = tl.load(grid + at, mask=j < other, other=0).to(tl.int32)
        seen = (code != HIDDEN) & (j * BLOCK < r.hi) & ((j + 1) * BLOCK > r.lo)
        inside = (j * BLOCK >= r.full_lo) & ((j + 1) * BLOCK <= r.full_hi)
        is_full = (seen & inside & (code == FULL)).to(tl.int32)
        is_partial = seen.to(tl.int32) - is_full
        front = partial + tl.cumsum(is_partial, 0) - 1
        back = other - 1 - (full + tl.cumsum(is_full, 0) - 1)
        tl.store(line + front, j, mask=is_partial == 1)
        tl.store(line + back, j, mask=is_full == 1)
        partial += tl.sum(is_partial, 0)
        full += tl.sum(is_full, 0)
        least = tl.minimum(least, tl.min(tl.where(is_full == 1, j, other), 0))
        most = tl.maximum(most, tl.max(tl.where(is_full == 1, j, -1), 0))
    run = tl.where(most - least + 1 == full, full, 0)
    tl.store(counts + 4 * row, partial)
    tl.store(counts + 4 * row + 1, full - run)
    tl.store(counts + 4 * row + 2, run)
    tl.store(counts + 4 * row + 3, least)
