"""Attention of up to 16 rows over blocks of e4m3 keys, for the Hopper decode kernel.

A block of keys is dealt out to the four warps, and each has a softmax state of its own until the
last: nothing is exchanged and no warp waits for another in the loop. Products are transposed, S^T =
K Q^T and O^T = V^T P^T, so that keys and dims are the 16 rows of a matrix instruction and queries
its 8 columns: K and V go from shared memory to registers, where they are widened (see `widen`), and
to the instruction. An even dim and the odd one after it are one 16-bit element until then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from flashtile.kernels.decode import common_scale
from flashtile.kernels.hopper.block import narrow
from flashtile.kernels.hopper.parts import finish, tile_rows
from flashtile.kernels.hopper.softmax import LEAST
from flashtile.kernels.masks import At, key_range, visible
from flashtile.kernels.scores import apply_score_mods
from flashtile.kernels.views import tokens
from flashtile.kernels.widen import query_unit, shrunk, widen_at_once

WARPS = gl.constexpr(4)

LANES = gl.constexpr(8)
"""Of a warp, that have rows of the same columns."""


class Columns(NamedTuple):
    """The rows of a tile of queries, as columns, and what all of a segment's blocks share."""

    at: Any  # At, without keys
    full_lo: Any  # keys [full_lo, full_hi) are seen by all of them
    full_hi: Any
    k_scale: Any  # of the scores that products of widened numbers are
    v_scale: Any


class State(NamedTuple):
    """Each warp's."""

    m: Any  # (WARPS, ROWS) running max, units of scores
    l: Any  # (WARPS, LANES, ROWS) running sums of each thread's keys
    even: Any  # (WARPS, dims, ROWS) results, of even dims
    odd: Any


@gluon.constexpr_function
def product():
    """(WARPS, 16 n, 8 n): a warp has matrices of its own."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def left():
    return gl.DotOperandLayout(0, product(), 2)


@gluon.constexpr_function
def right():
    return gl.DotOperandLayout(1, product(), 2)


@gluon.constexpr_function
def along(axis, layout):
    """Of a vector along one of three axes."""
    first, second = [(2, 1), (2, 0), (1, 0)][axis]
    return gl.SliceLayout(second, gl.SliceLayout(first, layout))


@gluon.jit
def load_queries(source, s, TILE: gl.constexpr):
    """(even, odd) dims of a tile's rows, (WARPS, dims, ROWS), in their unit; 0 past the end."""
    layout: gl.constexpr = right()
    DTYPE: gl.constexpr = source.q.ptr.dtype.element_ty
    HALF: gl.constexpr = TILE.padded // 2
    rows = tile_rows(gl.arange(0, TILE.rows, along(2, layout)), s.head, source.heads)
    pointers = tokens(source.q, source.q_seq, s.q, rows.head)
    pointers += rows.token.to(gl.int64) * source.q.stride_token
    dims = 2 * gl.arange(0, HALF, along(1, layout))[None, :, None]
    warps = gl.arange(0, WARPS, along(0, layout))[:, None, None] * 0
    pointers = pointers[None, None, :] + (dims + warps)
    valid = (rows.token < s.q.length)[None, None, :]
    even = gl.load(pointers, mask=valid & (dims < TILE.dim), other=0.0)
    odd = gl.load(pointers + 1, mask=valid & (dims < TILE.dim), other=0.0)
    unit: gl.constexpr = query_unit(DTYPE)
    return (even * unit).to(DTYPE), (odd * unit).to(DTYPE)


@gluon.jit
def value_unit(dtype: gl.constexpr):
    """What probabilities are multiplied by (see `widen`)."""
    return query_unit(dtype) * query_unit(dtype)


@gluon.jit
def open_columns(source, s, variant, TILE: gl.constexpr):
    """A tile's rows, the keys that all of them see, and its scales."""
    DTYPE: gl.constexpr = source.q.ptr.dtype.element_ty
    rows = tile_rows(gl.arange(0, TILE.rows, along(2, product())), s.head, source.heads)
    token = rows.token & 0x7FFFFFFF  # `visible` asks whether rows are negative
    seen = key_range(variant.masks, 0, s.q.length - 1, s.q, s.k)
    at = At(s.batch, rows.head[None, None, :], 0, 0, token[None, None, :], 0, s.q, s.k)
    k_scale = common_scale(variant.k_scale, s.k, s.head)
    v_scale = common_scale(variant.v_scale, s.k, s.head)
    return Columns(at, seen.full_lo, seen.full_hi,
                   k_scale * (1.0 / (shrunk(DTYPE) * query_unit(DTYPE))),
                   v_scale * (1.0 / (shrunk(DTYPE) * value_unit(DTYPE))))  # fmt: skip


@gluon.jit
def start_state(TILE: gl.constexpr):
    layout: gl.constexpr = product()
    KEYS: gl.constexpr = TILE.block_n // WARPS
    HALF: gl.constexpr = TILE.padded_v // 2
    ROWS: gl.constexpr = TILE.rows
    m = gl.full([WARPS, ROWS], LEAST, gl.float32, gl.SliceLayout(1, layout))
    p = gl.zeros([WARPS, KEYS, ROWS], gl.float32, layout)
    acc = gl.zeros([WARPS, HALF, ROWS], gl.float32, layout)
    return State(m, sums_of_lanes(p), acc, acc)


@gluon.jit
def sums_of_lanes(p):
    """(WARPS, LANES, ROWS): of each thread's own keys. The eight meet after the last block."""
    return gl.sum(p.reshape(p.shape[0], p.shape[1] // LANES, LANES, p.shape[2]), 1)


@gluon.jit
def read(tile, dtype: gl.constexpr, ORDER: gl.constexpr):
    """(even, odd) dims of a block, (WARPS, keys, dims) in the given order."""
    tile = tile.reshape((WARPS, tile.shape[0] // WARPS, tile.shape[1])).permute(ORDER)
    return widen_at_once(tile.load(left()).to(gl.int16, bitcast=True), dtype)


@gluon.jit
def modify(s, variant, columns, first_k, TILE: gl.constexpr):
    """Score mods and masks of the block of keys from first_k on; masks where it is not seen as a
    whole by all rows."""
    KEYS: gl.constexpr = TILE.block_n // WARPS
    layout: gl.constexpr = product()
    at = columns.at
    k_idx = gl.arange(0, WARPS, along(0, layout))[:, None, None] * KEYS
    k_idx += gl.arange(0, KEYS, along(1, layout))[None, :, None] + first_k
    here = At(at.batch, at.head, at.first_q, first_k, at.q_idx, k_idx, at.q, at.k)
    s = apply_score_mods(variant.score_mods, s, here)
    if (first_k < narrow(columns.full_lo)) | (first_k + TILE.block_n > narrow(columns.full_hi)):
        s = gl.where(visible(variant.masks, here), s, -float("inf"))
    return s


@gluon.jit
def attend_block(state, query, ring, i, first_k, columns, variant, unit, TILE: gl.constexpr):
    """One more block of keys, item i of the ring, and of values, the item after it."""
    layout: gl.constexpr = product()
    DTYPE: gl.constexpr = query[0].dtype
    even, odd = read(ring.wait(i), DTYPE, (0, 1, 2))
    KEYS: gl.constexpr = TILE.block_n // WARPS
    ROWS: gl.constexpr = TILE.rows
    s = gl.zeros([WARPS, KEYS, ROWS], gl.float32, layout)
    s = mma_v2(odd, query[1], mma_v2(even, query[0], s))
    s = modify(s * columns.k_scale, variant, columns, first_k, TILE)
    m = gl.maximum(state.m, gl.max(s, 1))
    p = gl.exp2(s * unit - (m * unit)[:, None, :])
    alpha = gl.exp2((state.m - m) * unit)
    l = state.l * gl.convert_layout(alpha, gl.SliceLayout(1, state.l.type.layout))[:, None, :]
    l = l + sums_of_lanes(p)
    p = gl.convert_layout((p * value_unit(DTYPE)).to(DTYPE), right())
    even, odd = read(ring.wait(i + 1), DTYPE, (0, 2, 1))
    even = mma_v2(even, p, state.even * alpha[:, None, :])
    return State(m, l, even, mma_v2(odd, p, state.odd * alpha[:, None, :]))


@gluon.jit
def finish_state(state, unit, columns, TILE: gl.constexpr):
    """The Result of a segment from those of the warps."""
    m = gl.max(state.m, 0)
    weight = gl.exp2((state.m - m[None, :]) * unit)
    l = gl.sum(state.l, 1)
    l = gl.sum(gl.convert_layout(l, weight.type.layout) * weight, 0)
    even = gl.sum(state.even * weight[:, None, :], 0)
    odd = gl.sum(state.odd * weight[:, None, :], 0)
    acc = gl.join(even, odd).permute(1, 0, 2).reshape(TILE.rows, TILE.padded_v)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS.value, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    acc = gl.convert_layout(acc, layout) * columns.v_scale
    return finish(gl.convert_layout(m * unit, rows), gl.convert_layout(l, rows), acc)
