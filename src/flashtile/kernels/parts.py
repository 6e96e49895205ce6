"""Results of tiles, and states of those whose keys several programs had.

A tile of few rows is merged by the last program that leaves a part of it, in the order of the keys,
so that who comes last makes no difference; else `combine` merges, a row at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.forward import Softmax
from flashtile.kernels.numbers import LN2, LOG2E, number
from flashtile.kernels.shares import row_work
from flashtile.kernels.views import TokenView, open_sequence, row_pointers, tokens
from flashtile.kernels.widen import nothing


class Parts(NamedTuple):
    """States of tiles whose keys several programs had; all contiguous."""

    m: Any  # (slots, rows) fp32, log2 units
    l: Any  # (slots, rows) fp32
    acc: Any  # (slots, rows, PADDED_V) fp32
    tiles: Any  # (records, 4) int32: batch, tile in it, how many parts (0: none), unused
    count: Any  # (1,) int64, how many records there are
    counter: Any = None  # (programs,) int32, 0 before and after a launch: parts of its last tile


class Prefix(NamedTuple):
    """What attention to keys before those of all sequences gave."""

    out: Any  # fp32, strides of the result
    lse: Any  # RowView


class Rows(NamedTuple):
    """The rows of a tile."""

    token: Any  # (BLOCK_M,) index in the sequence
    head: Any  # (BLOCK_M,) query head


@triton.jit
def place_rows(row, kv_head, heads):
    """Tokens and heads of rows of a KV head: its heads innermost."""
    group = number(heads.group)
    return Rows(row // group, kv_head * group + row % group)


@triton.jit
def tile_rows(tile, q_tiles, heads, BLOCK_M: tl.constexpr):
    """Tokens and heads of a tile's rows."""
    row = tile % q_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return place_rows(row, tile // q_tiles, heads)


@triton.jit
def join_prefix(state, prefix, out, q_seq, span, rows, TILE: tl.constexpr):
    """The state with a prefix's: its result is the value of one key whose score is its lse."""
    there, dims = rows.token < span.length, tl.arange(0, TILE.padded_v)
    s = tl.load(row_pointers(prefix.lse, span, rows.head, rows.token), mask=there,
                other=-float("inf")) * LOG2E  # fmt: skip
    given = TokenView(prefix.out, out.stride_batch, out.stride_token, out.stride_head, out.far)
    pointers = tokens(given, q_seq, span, rows.head) + rows.token.to(tl.int64) * out.stride_token
    value = tl.load(pointers[:, None] + dims[None, :],
                    mask=there[:, None] & (dims < TILE.dim_v)[None, :], other=0.0)  # fmt: skip
    m = tl.maximum(state.m, s)
    anchor = tl.where(m == -float("inf"), 0.0, m)
    alpha, weight = tl.math.exp2(state.m - anchor), tl.math.exp2(s - anchor)
    acc = state.acc * alpha[:, None] + weight[:, None] * value
    return Softmax(m, state.l * alpha + weight, acc)


@triton.jit
def store_rows(out, lse, state, q_seq, span, rows, sink, prefix, TILE: tl.constexpr):
    """Finish rows and write them, as far as the sequence has room. A prefix joins here, after all
    keys, and a sink, which is a key without a value."""
    if prefix is not None:
        state = join_prefix(state, prefix, out, q_seq, span, rows, TILE)
    m, l, factor = state.m, state.l, 1.0
    if sink is not None:
        logit = tl.load(sink + rows.head).to(tl.float32) * LOG2E
        m = tl.maximum(m, logit)
        anchor = tl.where(m == -float("inf"), 0.0, m)
        factor = tl.math.exp2(state.m - anchor)
        l = l * factor + tl.math.exp2(logit - anchor)
    empty = (l == 0.0) | (rows.token >= span.length)
    factor = tl.where(empty, 0.0, factor / tl.where(empty, 1.0, l))
    there, dims = rows.token < span.room, tl.arange(0, TILE.padded_v)
    pointers = tokens(out, q_seq, span, rows.head) + rows.token.to(tl.int64) * out.stride_token
    tl.store(pointers[:, None] + dims[None, :],
             (state.acc * factor[:, None]).to(out.ptr.dtype.element_ty),
             mask=there[:, None] & (dims < TILE.dim_v)[None, :])  # fmt: skip
    row_lse = tl.where(empty, -float("inf"), (m + tl.math.log2(l)) * LN2)
    tl.store(row_pointers(lse, span, rows.head, rows.token), row_lse, mask=there)


@triton.jit
def store_part(parts, slot, state, count, TILE: tl.constexpr):
    """Write the first `count` rows, as many as a slot has."""
    row = tl.arange(0, TILE.block_m)
    there = row < count
    row = slot * count + row
    tl.store(parts.m + row, state.m, mask=there)
    tl.store(parts.l + row, state.l, mask=there)
    dims = tl.arange(0, TILE.padded_v)
    pointers = parts.acc + row[:, None] * TILE.padded_v + dims[None, :]
    tl.store(pointers, state.acc, mask=there[:, None])


@triton.jit
def store_record(parts, record, batch, tile, count):
    """Tell `combine` of a tile whether it is to be merged, and from how many parts."""
    tl.store(parts.tiles + 4 * record, batch)
    tl.store(parts.tiles + 4 * record + 1, tile)
    tl.store(parts.tiles + 4 * record + 2, count)


@triton.jit
def clear_rows(out, lse, batch, q_seq, k_seq, masks, sink, heads, work, TILE: tl.constexpr):
    """Write the rows of a sequence that no tile with keys has: those of queries that see none, and
    padding."""
    BLOCK_M: tl.constexpr = TILE.block_m
    q_span = open_sequence(q_seq, batch)
    k_span = open_sequence(k_seq, tl.maximum(tl.minimum(batch, number(q_seq.batch) - 1), 0))
    row = row_work(q_span, k_span, masks, heads, work, TILE)
    done = tl.where(row.units > 0, row.q_tiles, 0)
    tiles = tl.cdiv(q_span.room * number(heads.group), BLOCK_M)
    empty = nothing(BLOCK_M, TILE.padded_v)
    for i in range(tl.maximum(tiles - done, 0) * number(work.kv_heads)):
        kv_head, tile = i // (tiles - done), done + i % (tiles - done)
        rows = tile_rows(kv_head * tiles + tile, tiles, heads, BLOCK_M)
        store_rows(out, lse, empty, q_seq, q_span, rows, sink, work.prefix, TILE)


@triton.jit
def clear_rest(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE: tl.constexpr):
    """Write the rows that no tile with keys has, the last programs first: they may have no keys."""
    batches = number(q_seq.batch)
    if q_seq.cu_seqlens is not None:
        batches += 1  # the rows past the last offset
    last = tl.num_programs(0) - 1
    for batch in range(last - tl.program_id(0), batches, last + 1):
        clear_rows(out, lse, batch, q_seq, k_seq, masks, sink, heads, work, TILE)


@triton.jit
def merge_rows(parts, record, count, rows, row, ROWS: tl.constexpr, SPREAD: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """The states of the rows from `row` on from their parts in the order of their keys, PARTS
    together."""
    PARTS: tl.constexpr = TILE.parts if ROWS == 1 else TILE.parts // 2
    m, l, acc = nothing(ROWS, TILE.padded_v)
    row = tl.minimum(row + tl.arange(0, ROWS), rows - 1)
    dims = tl.arange(0, TILE.padded_v)
    for first in range(0, count, PARTS):
        idx = first + tl.arange(0, PARTS)
        slot = record + idx
        if SPREAD:
            slot = 2 * slot + (idx == 0).to(tl.int64)
        at, there = slot[:, None] * rows + row[None, :], (idx < count)[:, None]
        part_m = tl.load(parts.m + at, mask=there, other=-float("inf"), cache_modifier=".cg")
        part_l = tl.load(parts.l + at, mask=there, other=0.0, cache_modifier=".cg")
        pointers = parts.acc + at[:, :, None] * TILE.padded_v + dims[None, None, :]
        part_acc = tl.load(pointers, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(part_m, 0))
        anchor = tl.where(top == -float("inf"), 0.0, top)
        weight, alpha = tl.math.exp2(part_m - anchor[None, :]), tl.math.exp2(m - anchor)
        l = l * alpha + tl.sum(part_l * weight, 0)
        acc = acc * alpha[:, None] + tl.sum(part_acc * weight[:, :, None], 0)
        m = top
    return Softmax(m, l, acc)


@triton.jit
def merge_last(out, lse, leader, several, tile, q_tiles, q_seq, q_span, heads, sink, work,
               TILE: tl.constexpr):  # fmt: skip
    """Write a tile whose parts `several` programs from `leader` on leave, if the others have. What
    is read after the counter is not older than what it counts; the last leaves it cleared."""
    tl.debug_barrier()
    counter = work.parts.counter + leader
    if tl.atomic_add(counter, 1) == several - 1:
        # At most a tile's: the rows after it are the next tile's.
        ROWS: tl.constexpr = min(TILE.block_m, max(1, 512 // TILE.padded_v))
        count = number(work.rows)
        for row in range(0, count, ROWS):
            state = merge_rows(work.parts, leader, several, count, row, ROWS, True, TILE)
            place = tile % q_tiles * TILE.block_m + row + tl.arange(0, ROWS)
            # Those past the last row of a slot are past the end of the sequence.
            those = place_rows(place, tile // q_tiles, heads)
            store_rows(out, lse, state, q_seq, q_span, those, sink, work.prefix, TILE)
        tl.store(counter, 0)
