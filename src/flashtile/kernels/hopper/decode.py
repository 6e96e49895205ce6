"""Attention of few queries over long keys on Hopper: K and V are streamed by TMA.

All query heads of a KV head, for all queries of a sequence, are the rows of one tile. Two programs
run on a multiprocessor, and each has a ring of blocks of keys and values on their way, which runs
on from one tile to the next: loads are always under way, while one program of the two computes. One
launch does it all, but for parts of many rows: see `shares` for who does what, `parts` for what is
left to merge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.kernels.hopper import columns, layouts
from flashtile.kernels.hopper._compat import barrier
from flashtile.kernels.hopper.block import Rows, modify
from flashtile.kernels.hopper.channels import Ring, make_barriers, make_blocks
from flashtile.kernels.hopper.parts import (
    clear_rows,
    finish,
    last_to_arrive,
    merge_tile,
    slot_of,
    store_part,
    store_result,
    tile_rows,
)
from flashtile.kernels.hopper.shares import blocks_seen, find_segment, open_share
from flashtile.kernels.hopper.softmax import LEAST
from flashtile.kernels.hopper.stream import (
    Cursor,
    Sources,
    fill,
    load_queries,
    touch,
    touch_queries,
)
from flashtile.kernels.masks import At, key_range
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence

LATE = gl.constexpr(3)
"""Blocks before the end of a segment that the counter of its parts is asked for once more."""


class Work(NamedTuple):
    kv_heads: Any  # opaque
    parts: Any  # Parts


class State(NamedTuple):
    m: Any  # (64,) running max, units of scores
    l: Any  # (64, 4) running sums of each thread's columns
    acc: Any  # (64, PADDED_V)


@gluon.jit
def start_state(TILE: gl.constexpr):
    rows: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.block_n))
    m = gl.full([layouts.ROWS], LEAST, gl.float32, rows)
    BLOCK_N: gl.constexpr = TILE.block_n
    s = gl.zeros([layouts.ROWS, BLOCK_N], gl.float32, layouts.accumulator(BLOCK_N))
    PADDED: gl.constexpr = TILE.padded_v
    acc = gl.zeros([layouts.ROWS, PADDED], gl.float32, layouts.accumulator(PADDED))
    return State(m, layouts.partial_row_sums(s), acc)


@gluon.jit
def open_rows(s, heads, masks, TILE: gl.constexpr):
    """A tile's rows, for masks and score mods, and the keys that all of them see."""
    layout: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.block_n))
    rows = tile_rows(gl.arange(0, layouts.ROWS, layout), s.head, heads)
    token = rows.token & 0x7FFFFFFF  # `visible` asks whether rows are negative
    seen = key_range(masks, 0, s.q.length - 1, s.q, s.k)
    at = At(s.batch, rows.head[:, None], 0, 0, token[:, None], 0, s.q, s.k)
    return Rows(at, seen.full_lo, seen.full_hi)


@gluon.jit
def attend_block(state, query, ring, i, first_k, rows, variant, unit, TILE: gl.constexpr):
    """One more block of keys, item i of the ring, and of values, the item after it."""
    BLOCK_N: gl.constexpr = TILE.block_n
    keys = ring.wait(i)
    s = gl.zeros([layouts.ROWS, BLOCK_N], gl.float32, layouts.accumulator(BLOCK_N))
    s = warpgroup_mma(query, keys.permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = modify(s, variant, rows, first_k, True, TILE)
    m = gl.maximum(state.m, gl.max(s, 1))
    p = gl.exp2(s * unit - (m * unit)[:, None])
    alpha = gl.exp2((state.m - m) * unit)
    l = state.l * gl.convert_layout(alpha, gl.SliceLayout(1, state.l.type.layout))[:, None]
    l = l + layouts.partial_row_sums(p)
    wide: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.padded_v))
    acc = state.acc * gl.convert_layout(alpha, wide)[:, None]
    values = ring.wait(i + 1)
    p = layouts.as_operand(p, keys.dtype, TILE.padded_v)
    acc = warpgroup_mma(p, values, acc, is_async=True)
    return State(m, l, warpgroup_mma_wait(0, deps=[acc]))


@gluon.jit
def finish_state(state, unit, TILE: gl.constexpr):
    wide: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.padded_v))
    l = gl.convert_layout(gl.sum(state.l, 1), wide)
    return finish(gl.convert_layout(state.m * unit, wide), l, state.acc)


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
        done = gl.where(blocks > 0, layouts.ROWS, 0)
        clear_rows(out, lse, batch, done, q_seq, q_span, work.kv_heads, heads, sink, TILE)


@gluon.jit
def close_segment(out, lse, result, q_seq, s, heads, sink, parts, TILE: gl.constexpr):
    """Write the result of a tile, or a part of it, and merge the parts if they are all there and
    have few rows."""
    if s.several == 1:
        row = gl.arange(0, result.out.shape[0], result.lse.type.layout)
        rows = tile_rows(row, s.head, heads)
        store_result(out, lse, result, q_seq, s.q, rows, sink, TILE.dim_v)
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
        if TILE.e4m3:
            query = columns.load_queries(source, s, TILE)
            rows = columns.open_columns(source, s, variant, TILE)
            state = columns.start_state(TILE)
            first_k = (s.base + unit * s.step) * TILE.block_n
            coming = columns.load_scales(variant, s, first_k, TILE)
        else:
            query = load_queries(source, s, TILE)
            rows = open_rows(s, heads, variant.masks, TILE)
            state = start_state(TILE)
        if TILE.alone:
            touch(work.parts.counter + s.first)
        while unit < s.stop:
            if TILE.alone and unit + LATE == s.stop:
                touch(work.parts.counter + s.first)
            first_k = (s.base + unit * s.step) * TILE.block_n
            i = 2 * (unit - share.start)
            if TILE.e4m3:
                scales, step = coming, s.step * TILE.block_n
                columns.touch_scales(variant, s, first_k + columns.FAR * step, TILE)
                coming = columns.load_scales(variant, s, first_k + step, TILE)
                state = columns.attend_block(state, query, ring, i, first_k, rows, scales, variant,
                                             scale.log2, TILE)  # fmt: skip
                barrier()
            else:
                state = attend_block(state, query, ring, i, first_k, rows, variant, scale.log2,
                                     TILE)  # fmt: skip
            unit += 1
            cursor = fill(ring, share, cursor, s.stop, unit, source, variant.masks, TILE)
        if TILE.e4m3:
            result = columns.finish_state(state, scale.log2, rows, TILE)
        else:
            result = finish_state(state, scale.log2, TILE)
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
