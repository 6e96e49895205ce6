"""Attention of up to 16 rows over blocks of e4m3 keys, for the Hopper decode kernel.

A block of keys is dealt out to the four warps, and each has a softmax state of its own until the
last: nothing is exchanged and no warp waits for another in the loop. Products are transposed, S^T =
K Q^T and O^T = V^T P^T, so that keys and dims are the 16 rows of a matrix instruction and queries
its 8 columns: K and V go from shared memory to registers, where they become float16, and to the
instruction. Two dims are one 16-bit element until then.

float16 has all e4m3 numbers. Queries are multiplied by a power of two, so that a row's largest is
between 2^12 and 2^13: what its others lose is 2^-37 of that. Probabilities are counted in 2^-13,
which leaves them in full down to 2^-27, bfloat16's three bits longer. What is not a number
stays so, but in values with scales of tokens, see `widen`.

Tokens a second, in those of bf16 (H200, 32 x 16,384 keys, 32/8 heads), with a scale for each head,
for each token, and for each head in pages of 16: 1.90, 1.79, 1.75; by the portable kernel 1.66,
1.56, 1.63; with three blocks on their way to a program rather than two 1.87, 1.76, 1.73.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from flashtile.kernels.decode import common_scale
from flashtile.kernels.hopper._compat import barrier
from flashtile.kernels.hopper.block import narrow
from flashtile.kernels.hopper.parts import finish, tile_rows
from flashtile.kernels.hopper.softmax import LEAST
from flashtile.kernels.hopper.stream import touch
from flashtile.kernels.masks import At, key_range, visible
from flashtile.kernels.scores import apply_score_mods
from flashtile.kernels.views import scale_pointers, scales_at, tokens
from flashtile.kernels.widen import assemble, filled, shrunk, value_unit, widen_at_once

WARPS = gl.constexpr(4)

TOP = gl.constexpr(13)
"""log2 of the largest probability, and of what queries are less than. float16 ends at 2^16: scores
of 2^25, of which fp32 has every fourth, may round the largest probability up to that."""

FAR = gl.constexpr(4)
"""Blocks before scales of tokens are loaded that they are asked for."""

LANES = gl.constexpr(8)
"""Of a warp, that have rows of the same columns."""


class Tile(NamedTuple):
    """The rows of a tile of queries, as columns, and what all of a segment's blocks share."""

    query: Any  # Queries
    at: Any  # At, without keys
    full_lo: Any  # keys [full_lo, full_hi) are seen by all of them
    full_hi: Any
    k_scale: Any  # of the scores that products of widened numbers are
    v_scale: Any


class Queries(NamedTuple):
    """(WARPS, dims, ROWS): of every four dims the first two, and the others."""

    first: Any
    second: Any
    unit: Any  # (ROWS,) what products with them are to be multiplied by


class Scales(NamedTuple):
    """Of a block's keys and values, (WARPS, keys); 0 where all keys of a head share one."""

    k: Any
    v: Any


class State(NamedTuple):
    """Each warp's, and what is on its way to the next block."""

    m: Any  # (WARPS, ROWS) running max, units of scores
    l: Any  # (WARPS, LANES, ROWS) running sums of each thread's keys
    even: Any  # (WARPS, dims, ROWS) results, of even dims
    odd: Any
    scales: Any  # Scales of the next block


@gluon.constexpr_function
def product():
    """(WARPS, 16 n, 8 n): a warp has matrices of its own."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS.value, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def left():
    """Keys and values, (WARPS, keys or dims, what is summed over)."""
    return gl.DotOperandLayout(0, product(), 2)


@gluon.constexpr_function
def right():
    """Queries and probabilities, (WARPS, what is summed over, ROWS)."""
    return gl.DotOperandLayout(1, product(), 2)


@gluon.constexpr_function
def along(axis, layout):
    """Of a vector along one of three axes."""
    first, second = [(2, 1), (2, 0), (1, 0)][axis]
    return gl.SliceLayout(second, gl.SliceLayout(first, layout))


@gluon.jit
def open_tile(source, s, first_k, variant, TILE: gl.constexpr):
    """(Tile, State) of a segment, whose first block is the one from first_k on."""
    query = load_queries(source, s, TILE)
    tile = open_columns(query, source, s, variant, TILE)
    return tile, start_state(load_scales(variant, s, first_k, TILE), TILE)


@gluon.jit
def load_queries(source, s, TILE: gl.constexpr):
    """The rows of a tile as `read_keys` has the dims; 0 past the end."""
    layout: gl.constexpr = right()
    HALF: gl.constexpr = TILE.padded // 2
    rows = tile_rows(gl.arange(0, TILE.block_m, along(2, layout)), s.head, source.heads)
    pointers = tokens(source.q, source.q_seq, s.q, rows.head)
    pointers += rows.token.to(gl.int64) * source.q.stride_token
    idx = gl.arange(0, HALF, along(1, layout))
    dims = (2 * idx - idx % 2)[None, :, None]  # 0, 1, 4, 5, 8, ...
    warps = gl.arange(0, WARPS, along(0, layout))[:, None, None] * 0
    pointers = pointers[None, None, :] + (dims + warps)
    valid = (rows.token < s.q.length)[None, None, :]
    first = gl.load(pointers, mask=valid, other=0.0).to(gl.float32)
    second = gl.load(pointers + 2, mask=valid, other=0.0).to(gl.float32)
    up, unit = power_above(gl.max(gl.maximum(gl.abs(first), gl.abs(second)), 1))
    first, second = first * up[:, None, :], second * up[:, None, :]
    return Queries(first.to(gl.float16), second.to(gl.float16), to_columns(unit))


@gluon.jit
def power_above(x):
    """(the power of two that takes x >= 0 to less than 2^TOP and no less than half of it, its
    inverse), both normal numbers."""
    exponent = x.to(gl.int32, bitcast=True) >> 23
    exponent = gl.maximum(gl.minimum(2 * 127 + (TOP - 1) - exponent, 253), 1)
    up, down = exponent << 23, (254 - exponent) << 23
    return up.to(gl.float32, bitcast=True), down.to(gl.float32, bitcast=True)


@gluon.jit
def to_columns(x):
    """(WARPS, ROWS) of queries to where the scores' are."""
    return gl.convert_layout(x, gl.SliceLayout(1, product()))


@gluon.jit
def open_columns(query, source, s, variant, TILE: gl.constexpr):
    """The Tile of a segment's queries."""
    rows = tile_rows(gl.arange(0, TILE.block_m, along(2, product())), s.head, source.heads)
    token = rows.token & 0x7FFFFFFF  # `visible` asks whether rows are negative
    seen = key_range(variant.masks, 0, s.q.length - 1, s.q, s.k)
    at = At(s.batch, rows.head[None, None, :], 0, 0, token[None, None, :], 0, s.q, s.k)
    k_scale, v_scale = 1.0, 1.0
    if not TILE.scaled_keys:
        k_scale = common_scale(variant.k_scale, s.k, s.head)
    if not TILE.scaled_values:
        v_scale = common_scale(variant.v_scale, s.k, s.head)
    return Tile(query, at, seen.full_lo, seen.full_hi, k_scale, v_scale)


@gluon.jit
def block_keys(first_k, TILE: gl.constexpr):
    """(WARPS, keys) of a block."""
    KEYS: gl.constexpr = TILE.block_n // WARPS
    layout: gl.constexpr = gl.SliceLayout(2, product())
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, layout))[:, None] * KEYS
    return warp + gl.arange(0, KEYS, gl.SliceLayout(0, layout))[None, :] + first_k


@gluon.jit
def load_scales(variant, s, first_k, TILE: gl.constexpr):
    """Of the keys from first_k on, which may be past either end."""
    k_scales, v_scales = 0.0, 0.0
    if TILE.scaled_keys or TILE.scaled_values:
        idx = block_keys(first_k, TILE)
        there = (idx >= 0) & (idx < s.k.length)
        if TILE.scaled_keys:
            k_scales = scales_at(variant.k_scale, s.k, s.head, s.k.row, s.k.start + idx, there)
        if TILE.scaled_values:
            v_scales = scales_at(variant.v_scale, s.k, s.head, s.k.row, s.k.start + idx, there)
    return Scales(k_scales, v_scales)


@gluon.jit
def touch_scales(variant, s, first_k, TILE: gl.constexpr):
    """Those that `load_scales` will load, or others where there are none."""
    if TILE.scaled_keys or TILE.scaled_values:
        idx = gl.maximum(gl.minimum(block_keys(first_k, TILE), s.k.length - 1), 0)
        if TILE.scaled_keys:
            touch(scale_pointers(variant.k_scale, s.k, s.head, s.k.row, s.k.start + idx))
        if TILE.scaled_values:
            touch(scale_pointers(variant.v_scale, s.k, s.head, s.k.row, s.k.start + idx))


@gluon.jit
def start_state(scales, TILE: gl.constexpr):
    """The state before a block of these scales."""
    layout: gl.constexpr = product()
    KEYS: gl.constexpr = TILE.block_n // WARPS
    HALF: gl.constexpr = TILE.padded_v // 2
    ROWS: gl.constexpr = TILE.block_m
    m = gl.full([WARPS, ROWS], LEAST, gl.float32, gl.SliceLayout(1, layout))
    p = gl.zeros([WARPS, KEYS, ROWS], gl.float32, layout)
    acc = gl.zeros([WARPS, HALF, ROWS], gl.float32, layout)
    return State(m, sums_of_lanes(p), acc, acc, scales)


@gluon.jit
def sums_of_lanes(p):
    """(WARPS, LANES, ROWS): of each thread's own keys. The eight meet after the last block."""
    return gl.sum(p.reshape(p.shape[0], p.shape[1] // LANES, LANES, p.shape[2]), 1)


CONVERT = gl.constexpr(
    """
    {
    .reg .b16 low, high;
    .reg .b32 sorted;
    SORT;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, HALF;
    }
    """
)
"""Half of the e4m3 numbers of two 16-bit elements as two of float16: 64 lanes a cycle and
multiprocessor, as other instructions of its pipe."""

AS_THEY_ARE, BY_DIMS = "mov.b32 sorted, $1", "prmt.b32 sorted, $1, $1, 0x3120"

LOW, HIGH = (filled(CONVERT, SORT=AS_THEY_ARE, HALF=half) for half in ("low", "high"))
EVEN, ODD = (filled(CONVERT, SORT=BY_DIMS, HALF=half) for half in ("low", "high"))


@gluon.jit
def parts_of(tile):
    """A block of keys or values as its warps have it, (WARPS, keys, dims)."""
    return tile.reshape((WARPS, tile.shape[0] // WARPS, tile.shape[1]))


@gluon.jit
def read_keys(tile):
    """(WARPS, keys, dims): of every four dims the first two, and the others. What a register of an
    operand has are neighbours: two elements, four dims."""
    x = parts_of(tile).load(left()).to(gl.int16, bitcast=True)
    return assemble(x, LOW, gl.float16), assemble(x, HIGH, gl.float16)


@gluon.jit
def read_values(tile, TILE: gl.constexpr):
    """(WARPS, dims, keys), even dims and odd ones: neighbours are two keys. Beside scales of their
    own, which float16 may not have the range for, in bfloat16."""
    x = parts_of(tile).permute((0, 2, 1)).load(left()).to(gl.int16, bitcast=True)
    if TILE.scaled_values:
        return widen_at_once(x, gl.bfloat16)
    else:
        return assemble(x, EVEN, gl.float16), assemble(x, ODD, gl.float16)


@gluon.jit
def weigh(p, v_scales, TILE: gl.constexpr):
    """Probabilities as the products with `read_values` take them."""
    if TILE.scaled_values:
        return (p * (v_scales * value_unit(gl.bfloat16, TILE))[:, :, None]).to(gl.bfloat16)
    else:
        return p.to(gl.float16)


@gluon.jit
def result_unit(TILE: gl.constexpr):
    """What makes results of what these products give."""
    if TILE.scaled_values:
        return 1.0 / (shrunk(gl.bfloat16) * value_unit(gl.bfloat16, TILE))
    else:
        return 1.0


@gluon.jit
def modify(s, variant, tile, first_k, TILE: gl.constexpr):
    """Score mods and masks of the block of keys from first_k on; masks where it is not seen as a
    whole by all rows."""
    at, k_idx = tile.at, block_keys(first_k, TILE)[:, :, None]
    here = At(at.batch, at.head, at.first_q, first_k, at.q_idx, k_idx, at.q, at.k)
    s = apply_score_mods(variant.score_mods, s, here)
    if (first_k < narrow(tile.full_lo)) | (first_k + TILE.block_n > narrow(tile.full_hi)):
        s = gl.where(visible(variant.masks, here), s, -float("inf"))
    return s


@gluon.jit
def attend_block(state, tile, ring, i, segment, first_k, variant, unit, TILE: gl.constexpr):
    """One more block of keys, item i of the ring, and of values, the item after it."""
    layout: gl.constexpr = product()
    KEYS: gl.constexpr = TILE.block_n // WARPS
    ROWS: gl.constexpr = TILE.block_m
    query, scales = tile.query, state.scales
    step = segment.step * TILE.block_n
    touch_scales(variant, segment, first_k + FAR * step, TILE)
    coming = load_scales(variant, segment, first_k + step, TILE)
    first, second = read_keys(ring.wait(i))
    s = gl.zeros([WARPS, KEYS, ROWS], gl.float32, layout)
    s = mma_v2(second, query.second, mma_v2(first, query.first, s))
    s *= (query.unit * tile.k_scale)[:, None, :]
    if TILE.scaled_keys:
        s *= scales.k[:, :, None]
    s = modify(s, variant, tile, first_k, TILE)
    m = gl.maximum(state.m, gl.max(s, 1))
    p = gl.exp2(s * unit - (m * unit - TOP)[:, None, :])
    alpha = gl.exp2((state.m - m) * unit)
    l = state.l * gl.convert_layout(alpha, gl.SliceLayout(1, state.l.type.layout))[:, None, :]
    l = l + sums_of_lanes(p)
    p = gl.convert_layout(weigh(p, scales.v, TILE), right())
    even, odd = read_values(ring.wait(i + 1), TILE)
    even = mma_v2(even, p, state.even * alpha[:, None, :])
    odd = mma_v2(odd, p, state.odd * alpha[:, None, :])
    barrier()  # `fill` loads over both blocks, which all warps have read then
    return State(m, l, even, odd, coming)


@gluon.jit
def finish_state(state, tile, unit, TILE: gl.constexpr):
    """The Result of a segment from those of the warps."""
    m = gl.max(state.m, 0)
    weight = gl.exp2((state.m - m[None, :]) * unit)
    l = gl.sum(state.l, 1)
    l = gl.sum(gl.convert_layout(l, weight.type.layout) * weight, 0)
    even = gl.sum(state.even * weight[:, None, :], 0)
    odd = gl.sum(state.odd * weight[:, None, :], 0)
    acc = gl.join(even, odd).permute(1, 0, 2).reshape(TILE.block_m, TILE.padded_v)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS.value, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    acc = gl.convert_layout(acc, layout) * (tile.v_scale * result_unit(TILE))
    return finish(gl.convert_layout(m * unit - TOP, rows), gl.convert_layout(l, rows), acc)
