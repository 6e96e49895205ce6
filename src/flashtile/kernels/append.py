"""Appending to a KV cache: new keys and values to their slots, turned and quantised on the way.

One launch, whose programs have three parts to play: some turn queries, some write keys, some write
values. A program has a tile of a few tokens by a few heads, each pair of them a row. What a table
or a length says is not believed: a row whose slot is not in the cache is not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.config import HeadDims
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence, open_tile
from flashtile.quantize import LEAST_SCALE, MOST

E4M3_MOST = tl.constexpr(MOST)
E4M3_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


class Rotary(NamedTuple):
    """Angles, and which of them are whose. Flags are None where they are not set."""

    cos: Any  # (length, rotary_dim / 2), contiguous
    sin: Any
    length: Any  # opaque
    start: Any  # (batch,) position of the first new token; None: the cache's length
    interleaved: Any  # pairs are dims (0, 1), (2, 3), ...
    advance: Any  # queries stand one after another; else all at the first new token's place


class Cache(NamedTuple):
    """K or V of a cache."""

    view: Any  # TokenView
    scale: Any = None  # ScaleView of an e4m3 cache
    own: Any = None  # present where scales are the tokens' own, to be written


class Shares(NamedTuple):
    """Who does what; all opaque."""

    heads: Any  # query heads
    kv_heads: Any
    q_programs: Any
    k_programs: Any  # and as many for V


@dataclass(frozen=True)
class AppendTile(HeadDims):
    """Numbers that the kernel is compiled for."""

    tokens: int  # powers of two
    heads: int
    dim: int
    dim_v: int
    rotary_dim: int  # 0: nothing is turned

    @property
    def rows(self) -> int:
        return self.tokens * self.heads


class Rows(NamedTuple):
    """The rows of a program's tile."""

    batch: Any
    token: Any  # (ROWS,) int64, index in the sequence
    head: Any  # (ROWS,) int64
    valid: Any  # (ROWS,)
    base: Any  # (ROWS,) addresses in the source


@triton.jit
def open_rows(x, seq, heads, tile, TILE: tl.constexpr):
    """Rows of a tile of x, and whether it is the first of its sequence."""
    blocks = (heads + TILE.heads - 1) // TILE.heads
    batch, block, first = open_tile(seq, blocks, tile, False, TILE.tokens)
    span = open_sequence(seq, batch)
    idx = tl.arange(0, TILE.rows)
    token = (first + idx // TILE.heads).to(tl.int64)
    head = (block * TILE.heads + idx % TILE.heads).to(tl.int64)
    valid = (first >= 0) & (token < span.length) & (head < heads)
    base = x.ptr + span.row * x.stride_batch + span.start * x.stride_token
    base += token * x.stride_token + head * x.stride_head
    return Rows(batch, token, head, valid, base), span, (first == 0) & (block == 0)


@triton.jit
def turn(x, rows, position, rotary, TILE: tl.constexpr):
    """x (ROWS, PADDED) fp32, its first dims turned by the angles of `position` (ROWS,).

    Launched without contraction into FMAs: bit for bit what `rotary.rotate` computes.
    """
    HALF: tl.constexpr = TILE.rotary_dim // 2
    dims = tl.arange(0, TILE.padded)
    if rotary.interleaved is not None:
        partner, angle, first = dims ^ 1, dims // 2, dims % 2 == 0
    else:
        partner, angle, first = (
            tl.where(dims < HALF, dims + HALF, dims - HALF),
            dims % HALF,
            dims < HALF,
        )
    turning = rows.valid[:, None] & (dims < TILE.rotary_dim)[None, :]
    other = tl.load(rows.base[:, None] + partner[None, :], mask=turning, other=0.0).to(tl.float32)
    at = tl.minimum(tl.maximum(position, 0), number(rotary.length) - 1)
    at = (at * HALF)[:, None] + angle[None, :]
    c = tl.load(rotary.cos + at, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(rotary.sin + at, mask=turning, other=0.0).to(tl.float32)
    y = other * s
    return tl.where(turning, x * c + tl.where(first[None, :], -y, y), x)


@triton.jit
def first_position(rotary, lengths, batch, batches):
    """The rotary position of a sequence's first new token."""
    start = lengths if rotary.start is None else rotary.start
    return tl.load(start + batch, mask=batch < batches, other=0).to(tl.int64)


@triton.jit
def turn_queries(q, q_out, q_seq, cache_seq, rotary, shares, tile, TILE: tl.constexpr):
    rows, span, _ = open_rows(q, q_seq, number(shares.heads), tile, TILE)
    dims = tl.arange(0, TILE.padded)
    there = rows.valid[:, None] & (dims < TILE.dim)[None, :]
    x = tl.load(rows.base[:, None] + dims[None, :], mask=there, other=0.0).to(tl.float32)
    position = first_position(rotary, cache_seq.used, rows.batch, number(q_seq.batch))
    position += rows.token * 0 if rotary.advance is None else rows.token
    x = turn(x, rows, position, rotary, TILE)
    target = q_out.ptr + span.row * q_out.stride_batch + span.start * q_out.stride_token
    target += rows.token * q_out.stride_token + rows.head * q_out.stride_head
    tl.store(target[:, None] + dims[None, :], x.to(q_out.ptr.dtype.element_ty), mask=there)


@triton.jit
def find_slots(seq, rows, before):
    """(row or page, slot in it, whether there is one) of tokens after the first `before`."""
    slot = before + rows.token
    valid = rows.valid & (before >= 0) & (slot < number(seq.length))
    if seq.table is not None:
        size = number(seq.page_size)
        table = seq.table + tl.cast(rows.batch, tl.int64) * seq.table_stride
        row = tl.load(table + slot // size, mask=valid, other=-1).to(tl.int64)
        slot = slot % size
    elif seq.batch_row is not None:
        row = slot * 0 + tl.load(seq.batch_row + rows.batch, mask=rows.batch < number(seq.batch),
                                 other=-1).to(tl.int64)  # fmt: skip
    else:
        row = slot * 0 + rows.batch
    if seq.pages is not None:
        valid = valid & (row >= 0) & (row < number(seq.pages))
    return row, slot, valid


@triton.jit
def quantise(x, scale, own, rows, row, slot, valid):
    """x (ROWS, PADDED) fp32 in units of its scale; a token's own scale is written."""
    if scale is not None:
        where = scale.ptr + tl.cast(rows.batch, tl.int64) * number(scale.stride_batch)
        where += row * number(scale.stride_row) + slot * number(scale.stride_token)
        where += rows.head * number(scale.stride_head)
        if own is not None:
            unit = tl.max(tl.abs(x), 1) * (1.0 / E4M3_MOST)
            unit = tl.maximum(unit, E4M3_LEAST_SCALE)
            tl.store(where, unit, mask=valid)
        else:
            unit = tl.load(where, mask=valid, other=1.0)
        x *= tl.div_rn(tl.full(unit.shape, 1.0, tl.float32), unit)[:, None]
    x = tl.minimum(x, E4M3_MOST, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -E4M3_MOST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def write_rows(x, rows, cache, cache_seq, before, rotary, TURN: tl.constexpr, DIM: tl.constexpr,
               PADDED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Rows of new keys or values to their slots."""
    dims = tl.arange(0, PADDED)
    pointers = rows.base[:, None] + dims[None, :]
    tokens = tl.load(pointers, mask=rows.valid[:, None] & (dims < DIM)[None, :], other=0.0)
    if TURN:
        start = first_position(rotary, cache_seq.used, rows.batch, number(cache_seq.batch))
        turned = turn(tokens.to(tl.float32), rows, start + rows.token, rotary, TILE)
        tokens = turned.to(x.ptr.dtype.element_ty)
    row, slot, valid = find_slots(cache_seq, rows, before)
    kind: tl.constexpr = cache.view.ptr.dtype.element_ty
    if kind == tl.float8e4nv:
        tokens = quantise(tokens.to(tl.float32), cache.scale, cache.own, rows, row, slot, valid)
    target = cache.view.ptr + row * cache.view.stride_batch + slot * cache.view.stride_token
    target += rows.head * cache.view.stride_head
    there = valid[:, None] & (dims < DIM)[None, :]
    tl.store(target[:, None] + dims[None, :], tokens.to(kind), mask=there)


@triton.jit
def append_tokens(q, q_out, k, v, k_cache, v_cache, q_seq, new_seq, cache_seq, after, rotary,
                  shares, TILE: tl.constexpr):  # fmt: skip
    """Turn q into q_out, write k and v after the tokens of each row of the cache, and to `after`
    (batch,) how many those are then."""
    program = tl.program_id(0)
    q_programs, k_programs = number(shares.q_programs), number(shares.k_programs)
    if program < q_programs:
        if TILE.rotary_dim > 0:
            turn_queries(q, q_out, q_seq, cache_seq, rotary, shares, program, TILE)
    else:
        is_v = program >= q_programs + k_programs
        tile = program - q_programs - tl.where(is_v, k_programs, 0)
        if is_v:
            rows, span, leads = open_rows(v, new_seq, number(shares.kv_heads), tile, TILE)
            there = rows.batch < number(new_seq.batch)
            before = tl.load(cache_seq.used + rows.batch, mask=there, other=0).to(tl.int64)
            write_rows(v, rows, v_cache, cache_seq, before, rotary, False,
                       TILE.dim_v, TILE.padded_v, TILE)  # fmt: skip
            count = tl.minimum(tl.maximum(before + span.length, 0), number(cache_seq.length))
            tl.store(after + rows.batch, count.to(tl.int32), mask=leads & there)
        else:
            rows, span, leads = open_rows(k, new_seq, number(shares.kv_heads), tile, TILE)
            there = rows.batch < number(new_seq.batch)
            before = tl.load(cache_seq.used + rows.batch, mask=there, other=0).to(tl.int64)
            write_rows(k, rows, k_cache, cache_seq, before, rotary,
                       TILE.rotary_dim > 0, TILE.dim, TILE.padded, TILE)  # fmt: skip
