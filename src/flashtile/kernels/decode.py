"""Attention of few queries over long keys: the keys of a row are dealt out to many programs.

All query heads of a KV head, for all queries of a sequence, are the rows of one tile, so that its
keys are read once (grouped-query attention as a matrix product). Tiles times blocks of keys make
the work; each program of a fixed grid finds its equal share of it from the lengths themselves, so
that an empty row costs nothing, a long one among short ones is spread over the whole GPU, and a
captured graph replays with other lengths. A tile that one program had all keys of is written by it;
else programs leave partial states, which are merged in the order of the keys: those of few rows by
the last program that leaves one, others by `combine`.

Dao et al., "Flash-Decoding" (2023); shares of a common sum: Osama et al., "Stream-K" (2023).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import At, key_range, visible
from flashtile.kernels.numbers import number
from flashtile.kernels.parts import (
    Parts,
    clear_rest,
    merge_last,
    store_part,
    store_record,
    store_rows,
    tile_rows,
)
from flashtile.kernels.scores import apply_score_mods
from flashtile.kernels.shares import count_units, find_row, rounded, row_work
from flashtile.kernels.views import (
    inside,
    open_sequence,
    scales_at,
    shared_scale,
    tokens,
)
from flashtile.kernels.widen import (
    finish_state,
    fold,
    halves,
    pointers_to_pairs,
    score_step,
    score_unit,
    start_state,
)


class Work(NamedTuple):
    """How work is dealt out. A unit is a block of keys of a tile, or with `cut` a part of a tile's
    keys that one program has, whatever else is in the batch."""

    programs: Any  # opaque, how many share it
    kv_heads: Any  # opaque
    rows: Any  # opaque, rows of a tile that may hold a query
    parts: Parts
    cut: Any = None  # function of (blocks, size): blocks of a part
    size: Any = None  # opaque
    widen: Any = None  # function of (tile, dtype): (even, odd) dims of e4m3, with `TILE.pairs`
    prefix: Any = None  # Prefix that all queries have seen besides, or None


@triton.jit
def load_queries(q, q_seq, span, rows, FIRST: tl.constexpr, DIM: tl.constexpr,
                 PADDED: tl.constexpr):  # fmt: skip
    """(BLOCK_M, PADDED) dims from FIRST on, 0 past the sequence's end and past DIM of them."""
    dims = tl.arange(0, PADDED)
    pointers = tokens(q, q_seq, span, rows.head) + rows.token.to(tl.int64) * q.stride_token + FIRST
    valid = (rows.token < span.length)[:, None] & (dims < DIM)[None, :]
    return tl.load(pointers[:, None] + dims[None, :], mask=valid, other=0.0)


@triton.jit
def find_pages(seq, span, first, TILE: tl.constexpr):
    """Pages of the block of keys from `first` on: one, or one for each row; 0 past the end. As the
    table has them, which may be none: a loop loads a block ahead what it hands on as loaded, and
    what it computes of that, where it is used."""
    if seq.table is None:
        return 0
    else:
        table = seq.table + span.batch * seq.table_stride
        idx = first
        if TILE.page_size % TILE.block_n != 0:
            idx = first + tl.arange(0, TILE.block_n)
        return tl.load(table + idx // TILE.page_size, mask=idx < span.length, other=0)


@triton.jit
def load_keys(x, base, seq, span, first, pages, DIM: tl.constexpr, PADDED: tl.constexpr,
              WIDE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """(BLOCK_N, PADDED / WIDE) keys or values from `first` on, 0 past the end and past DIM; an
    element is WIDE dims. `pages` is what `find_pages` found: it is asked a block ahead, so that no
    load waits for an address."""
    stride_batch, stride_token = x.stride_batch // WIDE, x.stride_token // WIDE
    idx, dims = tl.arange(0, TILE.block_n), tl.arange(0, PADDED // WIDE)
    valid = (first + idx < span.length)[:, None]
    if DIM != PADDED:
        valid = valid & (dims < (DIM + WIDE - 1) // WIDE)[None, :]
    if seq.table is None:
        base += tl.cast(first, tl.int64) * stride_token
    elif TILE.page_size % TILE.block_n == 0:
        base += inside(pages, seq).to(tl.int64) * stride_batch
        base += tl.cast(first % TILE.page_size, tl.int64) * stride_token
    if seq.table is None or TILE.page_size % TILE.block_n == 0:
        rows = idx if x.far is None else idx.to(tl.int64)
        rows *= stride_token
    else:
        rows = ((first + idx) % TILE.page_size).to(tl.int64) * stride_token
        rows += inside(pages, seq).to(tl.int64) * stride_batch
    return tl.load(base + (rows[:, None] + dims[None, :]), mask=valid, other=0.0)


@triton.jit
def load_own_scales(x, seq, span, kv_head, first, pages, TILE: tl.constexpr):
    """(BLOCK_N,) scales of the keys from `first` on, 0 past the end. `pages` as for the keys: a
    table read for them once more leaves one block of keys on its way, not three."""
    idx = first + tl.arange(0, TILE.block_n)
    if seq.table is None:
        row, token = span.row, span.start + idx
    else:
        row, token = inside(pages, seq).to(tl.int64), idx % TILE.page_size
    return scales_at(x, span, kv_head, row, token, idx < span.length)


@triton.jit
def common_scale(x, span, kv_head):
    """The scale that all keys of a KV head share."""
    if x is None:
        return 1.0
    else:
        return tl.load(shared_scale(x, span, kv_head))


@triton.jit
def attend_keys(q, k, v, q_seq, k_seq, rows, at, begin, end, kv_head, variant, scale, work,
                TILE: tl.constexpr):  # fmt: skip
    """The state of a tile of queries after the keys from `begin`, a multiple of the block, to
    `end`."""
    BLOCK_N: tl.constexpr = TILE.block_n
    DTYPE: tl.constexpr = q.ptr.dtype.element_ty
    WIDE: tl.constexpr = 2 if TILE.pairs else 1  # dims of what is loaded
    k_base, v_base = tokens(k, k_seq, at.k, kv_head), tokens(v, k_seq, at.k, kv_head)
    q_tile = load_queries(q, q_seq, at.q, rows, 0, TILE.main, TILE.padded)
    if TILE.tail > 0:
        q_tail = load_queries(q, q_seq, at.q, rows, TILE.main, TILE.tail, TILE.padded_tail)
    if TILE.pairs:
        k_base, v_base = pointers_to_pairs(k_base), pointers_to_pairs(v_base)
        q_tile = halves(q_tile)
        if TILE.tail > 0:
            q_tail = halves(q_tail)
    state = start_state(TILE)
    pages = find_pages(k_seq, at.k, begin, TILE)
    k_scale = common_scale(variant.k_scale, at.k, kv_head) * score_unit(DTYPE, TILE)
    for first in range(begin, end, BLOCK_N):
        here = At(at.batch, at.head, at.first_q, first, at.q_idx, first + at.k_idx, at.q, at.k)
        keys = load_keys(k, k_base, k_seq, at.k, first, pages, TILE.main, TILE.padded, WIDE, TILE)
        if TILE.tail > 0:
            tails = load_keys(k, k_base + TILE.main // WIDE, k_seq, at.k, first, pages, TILE.tail,
                              TILE.padded_tail, WIDE, TILE)  # fmt: skip
        if TILE.latent:
            values = keys
        else:
            values = load_keys(
                v, v_base, k_seq, at.k, first, pages, TILE.dim_v, TILE.padded_v, WIDE, TILE
            )
        v_scales = None
        if TILE.scaled_keys:
            k_scales = load_own_scales(variant.k_scale, k_seq, at.k, kv_head, first, pages, TILE)
        if TILE.scaled_values:
            v_scales = load_own_scales(variant.v_scale, k_seq, at.k, kv_head, first, pages, TILE)
        pages = find_pages(k_seq, at.k, first + BLOCK_N, TILE)
        s = score_step(q_tile, keys, None, work, TILE)
        if TILE.tail > 0:
            s = score_step(q_tail, tails, s, work, TILE)
        if TILE.scaled_keys:
            s *= k_scales[None, :] * score_unit(DTYPE, TILE)
        else:
            s *= k_scale
        s = apply_score_mods(variant.score_mods, s, here)
        s = tl.where(visible(variant.masks, here), s, -float("inf"))
        state = fold(state, s, scale.log2, values, here, v_scales, DTYPE, work, TILE)
    return finish_state(state, common_scale(variant.v_scale, at.k, kv_head), DTYPE, TILE)


@triton.jit
def part_keys(row, tile, part, ahead, q_span, k_span, masks, heads, TILE: tl.constexpr):
    """(first query of a tile, first key, the key after the last) of `ahead` units from `part`."""
    BLOCK_N: tl.constexpr = TILE.block_n
    first_row = tile % row.q_tiles * TILE.block_m
    first_q = first_row // number(heads.group)
    last_q = (first_row + TILE.block_m - 1) // number(heads.group)
    last_q = tl.minimum(last_q, q_span.length - 1)
    seen = key_range(masks, first_q, last_q, q_span, k_span)
    begin = (row.first + part.to(tl.int32) * row.cut) * BLOCK_N
    end = tl.minimum(begin + tl.cast(ahead, tl.int32) * row.cut * BLOCK_N, seen.hi)
    return first_q, tl.maximum(begin, seen.lo // BLOCK_N * BLOCK_N), end


@triton.jit
def attention_decode(q, k, v, out, lse, q_seq, k_seq, variant, sink, scale, heads, work,
                     TILE: tl.constexpr):  # fmt: skip
    """A program's share of all blocks of keys: out and lse of tiles that are whole in it, states of
    the others."""
    BLOCK_N: tl.constexpr = TILE.block_n
    program = tl.program_id(0).to(tl.int64)
    total, longest = count_units(q_seq, k_seq, variant.masks, heads, work, TILE)
    share = tl.cdiv(total, number(work.programs))
    if work.cut is None:
        share = rounded(share, longest)
    unit, row_end = program * share, program * 0
    start, batch = row_end, tl.program_id(0) * 0
    stop = tl.minimum(unit + share, total)
    if program == 0:
        records = total
        if work.cut is None:
            records = tl.cdiv(total, tl.maximum(share, 1))
        tl.store(work.parts.count, records)
    while unit < stop:
        if unit >= row_end:
            batch, start = find_row(unit, q_seq, k_seq, variant.masks, heads, work, TILE)
        q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
        row = row_work(q_span, k_span, variant.masks, heads, work, TILE)
        units = row.units.to(tl.int64)
        row_end = start + units * row.q_tiles * number(work.kv_heads)
        tile, part = ((unit - start) // units).to(tl.int32), (unit - start) % units
        ahead = 1 if work.cut is not None else tl.minimum(units - part, stop - unit)

        rows = tile_rows(tile, row.q_tiles, heads, TILE.block_m)
        first_q, begin, end = part_keys(row, tile, part, ahead, q_span, k_span, variant.masks,
                                        heads, TILE)  # fmt: skip
        at = At(batch, rows.head[:, None], first_q, 0, rows.token[:, None],
                tl.arange(0, BLOCK_N)[None, :], q_span, k_span)  # fmt: skip
        state = attend_keys(q, k, v, q_seq, k_seq, rows, at, begin, end, tile // row.q_tiles,
                            variant, scale, work, TILE)  # fmt: skip
        record, parts = unit if work.cut is not None else program, batch * 0
        if units == ahead:
            store_rows(out, lse, state, q_seq, q_span, rows, sink, work.prefix, TILE)
        else:
            slot, leader, several = unit, program, units
            if work.cut is None:
                slot = 2 * program + (part == 0).to(tl.int64)
                leader = (unit - part) // share
                several = (unit - part + units - 1) // share - leader + 1
            parts = tl.where(part == 0, several, 0).to(tl.int32)
            store_part(work.parts, slot, state, number(work.rows), TILE)
            if TILE.alone:
                merge_last(out, lse, leader, several, tile, row.q_tiles, q_seq, q_span, heads, sink,
                           work, TILE)  # fmt: skip
        if not TILE.alone:
            store_record(work.parts, record, batch, tile, parts)
        unit += ahead
    if TILE.alone:
        clear_rest(out, lse, q_seq, k_seq, variant.masks, sink, heads, work, TILE)
