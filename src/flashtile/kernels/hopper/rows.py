"""Attention of up to 64 rows over blocks of 16-bit keys, for the Hopper decode kernel.

The rows are those of wgmma's instructions, which read keys and values where TMA has put them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.hopper import layouts
from flashtile.kernels.hopper.block import Rows, modify
from flashtile.kernels.hopper.parts import finish, tile_rows
from flashtile.kernels.hopper.softmax import LEAST
from flashtile.kernels.masks import At, key_range
from flashtile.kernels.views import tokens


class Tile(NamedTuple):
    """What all of a segment's blocks share."""

    query: Any  # (64, PADDED), the left operand
    rows: Any  # Rows


class State(NamedTuple):
    m: Any  # (64,) running max, units of scores
    l: Any  # (64, 4) running sums of each thread's columns
    acc: Any  # (64, PADDED_V)


@gluon.jit
def open_tile(source, s, first_k, variant, TILE: gl.constexpr):
    """(Tile, State) of a segment, whose first block is the one from first_k on."""
    query = load_queries(source, s, TILE)
    rows = open_rows(s, source.heads, variant.masks, TILE)
    return Tile(query, rows), start_state(TILE)


@gluon.jit
def load_queries(source, s, TILE: gl.constexpr):
    """The (64, PADDED) rows of a tile as the left operand of wgmma, 0 past the sequence's end."""
    layout: gl.constexpr = layouts.operand(layouts.accumulator(TILE.block_n))
    rows = tile_rows(gl.arange(0, layouts.ROWS, gl.SliceLayout(1, layout)), s.head, source.heads)
    dims = gl.arange(0, TILE.padded, gl.SliceLayout(0, layout))
    valid = (rows.token < s.q.length)[:, None]
    if TILE.dim != TILE.padded:
        valid = valid & (dims < TILE.dim)[None, :]
    pointers = tokens(source.q, source.q_seq, s.q, rows.head)
    pointers += rows.token.to(gl.int64) * source.q.stride_token
    return gl.load(pointers[:, None] + dims[None, :], mask=valid, other=0.0)


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
def start_state(TILE: gl.constexpr):
    rows: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.block_n))
    m = gl.full([layouts.ROWS], LEAST, gl.float32, rows)
    BLOCK_N: gl.constexpr = TILE.block_n
    s = gl.zeros([layouts.ROWS, BLOCK_N], gl.float32, layouts.accumulator(BLOCK_N))
    PADDED: gl.constexpr = TILE.padded_v
    acc = gl.zeros([layouts.ROWS, PADDED], gl.float32, layouts.accumulator(PADDED))
    return State(m, layouts.partial_row_sums(s), acc)


@gluon.jit
def attend_block(state, tile, ring, i, segment, first_k, variant, unit, TILE: gl.constexpr):
    """One more block of keys, item i of the ring, and of values, the item after it."""
    BLOCK_N: gl.constexpr = TILE.block_n
    keys = ring.wait(i)
    s = gl.zeros([layouts.ROWS, BLOCK_N], gl.float32, layouts.accumulator(BLOCK_N))
    s = warpgroup_mma(tile.query, keys.permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = modify(s, variant, tile.rows, first_k, True, TILE)
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
def finish_state(state, tile, unit, TILE: gl.constexpr):
    """The Result of a segment."""
    wide: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.padded_v))
    l = gl.convert_layout(gl.sum(state.l, 1), wide)
    return finish(gl.convert_layout(state.m * unit, wide), l, state.acc)
