"""Attention of few queries over long keys on Hopper: K and V are streamed by TMA.

All query heads of a KV head, for all queries of a sequence, are the rows of one tile. Two programs
run on a multiprocessor, and each has a ring of blocks of keys and values on their way, which runs
on from one tile to the next: loads are always under way, while one program of the two computes. One
launch does it all, but for parts of many rows: see `shares` for who does what, `parts` for what is
left to merge. `rows` attends to blocks of 16-bit keys, `columns` to those of e4m3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.kernels.hopper import columns, rows
from flashtile.kernels.hopper.channels import Ring, make_barriers, make_blocks
from flashtile.kernels.hopper.parts import (
    clear_rows,
    last_to_arrive,
    merge_tile,
    slot_of,
    store_part,
    store_result,
    tile_rows,
)
from flashtile.kernels.hopper.shares import blocks_seen, find_segment, first_key, open_share
from flashtile.kernels.hopper.stream import Cursor, Sources, fill, touch, touch_queries
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence

LATE = gl.constexpr(3)
"""Blocks before the end of a segment that the counter of its parts is asked for once more."""


class Work(NamedTuple):
    kv_heads: Any  # opaque
    parts: Any  # Parts


@gluon.jit
def open_tile(source, s, first_k, variant, TILE: gl.constexpr):
    """(Tile, State) of a segment, whose first block is the one from first_k on."""
    if TILE.e4m3:
        return columns.open_tile(source, s, first_k, variant, TILE)
    else:
        return rows.open_tile(source, s, first_k, variant, TILE)


@gluon.jit
def attend_block(state, tile, ring, i, s, first_k, variant, unit, TILE: gl.constexpr):
    """One more block of keys, item i of the ring, and of values, the item after it."""
    if TILE.e4m3:
        return columns.attend_block(state, tile, ring, i, s, first_k, variant, unit, TILE)
    else:
        return rows.attend_block(state, tile, ring, i, s, first_k, variant, unit, TILE)


@gluon.jit
def finish_state(state, tile, unit, TILE: gl.constexpr):
    """The Result of a segment."""
    if TILE.e4m3:
        return columns.finish_state(state, tile, unit, TILE)
    else:
        return rows.finish_state(state, tile, unit, TILE)


@gluon.jit
def clear_rest(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE: gl.constexpr):
    """Write the rows that no tile with keys has: those of queries that see none, and padding."""
    batches = number(q_seq.batch)
    if q_seq.cu_seqlens is not None:
        batches += 1  # the rows past the last offset
    for batch in range(gl.program_id(0), batches, gl.num_programs(0)):
        q_span = open_sequence(q_seq, batch)
        k_span = open_sequence(k_seq, gl.minimum(batch, number(q_seq.batch) - 1))
        _, blocks = blocks_seen(q_span, k_span, masks, TILE.block_n)
        done = gl.where(blocks > 0, TILE.block_m, 0)
        clear_rows(out, lse, batch, done, q_seq, q_span, work.kv_heads, heads, sink, TILE)


@gluon.jit
def close_segment(out, lse, result, q_seq, s, heads, sink, parts, TILE: gl.constexpr):
    """Write the result of a tile, or a part of it, and merge the parts if they are all there and
    have few rows."""
    if s.several == 1:
        row = gl.arange(0, result.out.shape[0], result.lse.type.layout)
        own = tile_rows(row, s.head, heads)
        store_result(out, lse, result, q_seq, s.q, own, sink, TILE.dim_v)
    else:
        program = gl.program_id(0)
        store_part(parts, slot_of(program, program - s.first), result)
        if TILE.alone and last_to_arrive(parts, s.first, s.several):
            merge_tile(out, lse, parts, s, q_seq, heads, sink, 0, 1, TILE)
            gl.store(parts.counter + s.first, 0)


@gluon.jit
def attention_decode(q, k, v, out, lse, q_seq, k_seq, variant, sink, scale, heads, work,
                     TILE: gl.constexpr):  # fmt: skip
    """A program's share of all blocks of keys."""
    source = Sources(q, k, v, q_seq, k_seq, heads, work.kv_heads)
    share = open_share(q_seq, k_seq, variant.masks, work.kv_heads, TILE)
    SLOTS: gl.constexpr = 2 * TILE.pairs
    blocks = make_blocks(k, SLOTS, TILE.block_n, TILE.stored)
    ring = Ring(blocks, make_barriers(SLOTS), SLOTS, 128)
    fence_async_shared()
    unit = share.start
    s = find_segment(unit, share, q_seq, k_seq, variant.masks, work.kv_heads, TILE)
    if unit < share.stop:
        touch_queries(source, s, TILE)
    cursor = fill(ring, share, Cursor(unit, s), s.stop, unit, source, variant.masks, TILE)
    clear_rest(out, lse, q_seq, k_seq, variant.masks, sink, heads, work, TILE)
    while unit < share.stop:
        tile, state = open_tile(source, s, first_key(s, unit, TILE), variant, TILE)
        if TILE.alone:
            touch(work.parts.counter + s.first)
        while unit < s.stop:
            if TILE.alone and unit + LATE == s.stop:
                touch(work.parts.counter + s.first)
            i, first_k = 2 * (unit - share.start), first_key(s, unit, TILE)
            state = attend_block(state, tile, ring, i, s, first_k, variant, scale.log2, TILE)
            unit += 1
            cursor = fill(ring, share, cursor, s.stop, unit, source, variant.masks, TILE)
        result = finish_state(state, tile, scale.log2, TILE)
        close_segment(out, lse, result, q_seq, s, heads, sink, work.parts, TILE)
        s = cursor.segment


@gluon.jit
def merge_parts(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE: gl.constexpr):
    """Merge what `attention_decode` left, as many programs: those with parts of a tile divide its
    rows among themselves."""
    share = open_share(q_seq, k_seq, masks, work.kv_heads, TILE)
    unit = share.start
    while unit < share.stop:
        s = find_segment(unit, share, q_seq, k_seq, masks, work.kv_heads, TILE)
        if s.several > 1:
            place = gl.program_id(0) - s.first
            merge_tile(out, lse, work.parts, s, q_seq, heads, sink, place, s.several, TILE)
        unit = s.stop
