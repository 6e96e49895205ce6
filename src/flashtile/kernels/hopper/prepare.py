"""What the backward needs of the forward, row by row, and zeros where dQ is summed. Of packed
sequences, which tiles of keys they have."""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.hopper.units import (
    bounds_of_keys,
    lengths,
    mass_beside,
    rows_of,
    squares,
    units_in_one,
)
from flashtile.kernels.numbers import LOG2E, number
from flashtile.kernels.prepare import row_numbers, sink_weights
from flashtile.kernels.views import load_tile, open_sequence, open_tile, tokens

TOGETHER = tl.constexpr(256)
"""Packed sequences, or tiles of one, that are looked at together."""


@triton.jit
def order_tiles(order, q_seq, k_seq, slots, BLOCK: tl.constexpr):
    """Write down (sequence, which of its tiles) for the tiles of keys of one packed sequence: a
    program each. Those with more queries come first, whose tiles take longer; the tokens of no
    sequence come last, and have the slots that are left."""
    program, batches = tl.program_id(0), number(k_seq.batch)
    if program <= batches:
        own, before = open_sequence(q_seq, program).length, 0
        for first in range(0, batches + 1, TOGETHER):
            idx = first + tl.arange(0, TOGETHER)
            batch = tl.minimum(idx, batches)
            queries = open_sequence(q_seq, batch).length
            earlier = (idx <= batches) & ((queries > own) | ((queries == own) & (idx < program)))
            tiles = tl.cdiv(open_sequence(k_seq, batch).room, BLOCK)
            before += tl.sum(tl.where(earlier, tiles, 0), 0)
        count = tl.cdiv(open_sequence(k_seq, program).room, BLOCK)
        count = tl.where(program == batches, number(slots) - before, count)
        for first in range(0, count, TOGETHER):
            tile = first + tl.arange(0, TOGETHER)
            place = order + 2 * (before + tile)
            tl.store(place, tile * 0 + program, mask=tile < count)
            tl.store(place + 1, tile, mask=tile < count)


@triton.jit
def prepare_backward(out, dout, lse, dlse, space, sink, dsink, q_seq, k_seq, slots, heads, rescale,
                     TILE: tl.constexpr):  # fmt: skip
    """Of one block of queries: lse in log2 units and delta = rowsum(dout * out) - dlse, both
    block_m numbers, block after block in space.rows; zeros in the locks or, without any, in the
    sums; this block's share of dsink. The last blocks come first: what the main kernel begins with
    is then in L2.

    Rows that saw no key, and rows past the end, get lse +inf: their probabilities are 0, so that
    the backward masks no queries. Probabilities have dropout's `rescale` as a factor, unless it is
    None: delta goes without.

    The first programs, of which there are more than sequences, write down the tiles of keys.
    """
    if space.order is not None:
        order_tiles(space.order, q_seq, k_seq, slots, TILE.block_n)
    BLOCK_M: tl.constexpr = TILE.block_m
    PADDED: tl.constexpr = TILE.padded_v
    SUMS: tl.constexpr = BLOCK_M * TILE.padded
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head, first = open_tile(q_seq, number(heads.count), block, False, BLOCK_M)
    span = open_sequence(q_seq, batch)
    rows = first + tl.arange(0, BLOCK_M)
    if space.locks is None:
        sums = space.acc + block.to(tl.int64) * SUMS + tl.arange(0, SUMS)
        tl.store(sums, tl.zeros([SUMS], space.acc.dtype.element_ty))
    else:
        tl.store(space.locks + block, 0)
    if block == 0:
        if space.counter is not None:
            tl.store(space.counter, 0)
        if space.steep is not None:
            tl.store(space.steep, 0)
    o = load_tile(out, tokens(out, q_seq, span, head), q_seq, span, first, False, BLOCK_M,
                  TILE.dim_v, PADDED)  # fmt: skip
    do = load_tile(dout, tokens(dout, q_seq, span, head), q_seq, span, first, False, BLOCK_M,
                   TILE.dim_v, PADDED)  # fmt: skip
    row_lse, row_delta = row_numbers(o, do, lse, dlse, span, head, rows)
    place = rows_of(space, block, TILE.row_numbers, BLOCK_M)
    if TILE.integers:
        # Ahead of the keys' bounds, in whose loop O and dO would be 72 registers more.
        length, out_length = lengths(do), tl.sqrt(squares(o))
        group, count = number(heads.group), number(heads.count)
        keys = bounds_of_keys(space.bounds, k_seq, batch, head // group, count // group,
                              TILE.block_n)  # fmt: skip
        if rescale is not None:
            length *= rescale
        mass = 1.0
        if sink is not None:
            mass = mass_beside(sink_weights(sink, head, row_lse), row_lse)
        units = units_in_one(length, out_length, mass, row_lse, row_delta, keys,
                             do.dtype == tl.float16, TILE)  # fmt: skip
        tl.store(place + 2 * BLOCK_M, units)
    saved_lse, saved_delta = row_lse * LOG2E, row_delta
    if rescale is not None:
        saved_lse, saved_delta = saved_lse - tl.log2(rescale), row_delta / rescale
    tl.store(place, saved_lse)
    tl.store(place + BLOCK_M, saved_delta)
    if dsink is not None:
        tl.store(dsink + block, -tl.sum(sink_weights(sink, head, row_lse) * row_delta, 0))
