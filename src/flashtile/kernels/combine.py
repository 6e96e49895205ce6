"""What `attention_decode` left over: rows without keys, and tiles whose keys several programs had.

A kernel of its own, rather than the last program to arrive: that one would merge up to all parts by
itself (264 of them, 2 MiB, where one KV head has one long sequence), a row at a time spreads them
over the GPU; and there is no counter to keep, nor an order of arrival to depend on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.decode import Rows, store_rows, tile_rows
from flashtile.kernels.forward import Softmax
from flashtile.kernels.numbers import number
from flashtile.kernels.shares import row_work
from flashtile.kernels.views import open_sequence
from flashtile.kernels.widen import nothing


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
def merge_row(parts, record, count, rows, row, SPREAD: tl.constexpr, TILE: tl.constexpr):
    """The state of one row of a tile from its parts in the order of their keys, PARTS together."""
    PARTS: tl.constexpr = TILE.parts
    m, l, acc = nothing(1, TILE.padded_v)
    dims = tl.arange(0, TILE.padded_v)
    for first in range(0, count, PARTS):
        idx = first + tl.arange(0, PARTS)
        slot = record + idx
        if SPREAD:
            slot = 2 * slot + (idx == 0).to(tl.int64)
        at, there = slot * rows + row, idx < count
        part_m = tl.load(parts.m + at, mask=there, other=-float("inf"))
        part_l = tl.load(parts.l + at, mask=there, other=0.0)
        pointers = parts.acc + at[:, None] * TILE.padded_v + dims[None, :]
        part_acc = tl.load(pointers, mask=there[:, None], other=0.0)
        top = tl.maximum(m, tl.max(part_m, 0))
        anchor = tl.where(top == -float("inf"), 0.0, top)
        weight, alpha = tl.math.exp2(part_m - anchor), tl.math.exp2(m - anchor)
        l = l * alpha + tl.sum(part_l * weight, 0)
        acc = acc * alpha[:, None] + tl.sum(part_acc * weight[:, None], 0)[None, :]
        m = top
    return Softmax(m, l, acc)


@triton.jit
def combine_parts(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE: tl.constexpr):
    """What `attention_decode` left: rows without keys, and a row of a tile at a time its parts."""
    batches = number(q_seq.batch)
    if q_seq.cu_seqlens is not None:
        batches += 1  # the rows past the last offset
    for batch in range(tl.program_id(0), batches, tl.num_programs(0)):
        clear_rows(out, lse, batch, q_seq, k_seq, masks, sink, heads, work, TILE)
    rows = number(work.rows)
    items = tl.load(work.parts.count) * rows
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        record = item // rows
        row = (item % rows).to(tl.int32)
        count = tl.load(work.parts.tiles + 4 * record + 2)
        if count > 0:
            batch = tl.load(work.parts.tiles + 4 * record)
            tile = tl.load(work.parts.tiles + 4 * record + 1)
            q_span = open_sequence(q_seq, batch)
            group = number(heads.group)
            q_tiles = tl.cdiv(q_span.length * group, TILE.block_m)
            place = tile % q_tiles * TILE.block_m + row + tl.arange(0, 1)
            those = Rows(place // group, tile // q_tiles * group + place % group)
            state = merge_row(work.parts, record, count, rows, row, work.cut is None, TILE)
            store_rows(out, lse, state, q_seq, q_span, those, sink, work.prefix, TILE)
