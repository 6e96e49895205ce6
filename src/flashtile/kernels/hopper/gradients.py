"""The backward's step: what one block of queries adds to the gradients.

Dao, "FlashAttention-2" (2023), algorithm 2, with keys as rows: P^T and dS^T are then the left
operands of dV and dK, from registers. Only dS passes through shared memory, for dQ.
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

from flashtile.kernels.hopper import barriers, layouts
from flashtile.kernels.hopper.query_gradients import hand_over
from flashtile.kernels.hopper.stages import CONSUMERS, DS_WRITTEN
from flashtile.kernels.masks import At, visible
from flashtile.kernels.scores import apply_with_slope
from flashtile.kernels.views import Span


class KeyGradients(NamedTuple):
    k: Any  # (64, PADDED) of dK / softmax_scale
    v: Any  # (64, PADDED)


class Keys(NamedTuple):
    """A warpgroup's keys."""

    at: Any  # At, without queries
    full_lo: Any  # queries [full_lo, full_hi) see all of them
    full_hi: Any


@gluon.jit
def probabilities(s, lse2, keys, head, first_q, variant, unit, TILE: gl.constexpr):
    """(p, slope of the score mods) of a block, from its raw scores, both (64, BLOCK_M).

    A thread's queries are its own first one plus constants, and masks compare with constants.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    columns = gl.arange(0, BLOCK_M, layouts.columns_of(layouts.accumulator(BLOCK_M)))[None, :]
    own, constants = layouts.opaque(first_q + (columns & 6)), columns & -7
    at, slope = keys.at, 1.0
    if len(variant.score_mods) > 0:
        here = At(at.batch, head, first_q, at.first_k, own + constants, at.k_idx, at.q, at.k)
        s, slope = apply_with_slope(variant.score_mods, s, here)
    p = gl.exp2(s * unit - lse2[None, :])
    if (first_q < keys.full_lo) | (first_q + BLOCK_M > keys.full_hi):
        # Masks that only compare positions compare a key with a constant.
        q = Span(at.q.batch, at.q.row, at.q.start, at.q.length - own, at.q.room, at.q.leftpad)
        relative = At(at.batch, head, 0, at.first_k, constants, at.k_idx, q, at.k)
        p = gl.where(visible(variant.masks, relative), p, 0.0)
    return p, slope


@gluon.jit
def multiply_values(side, do, zeros, WARPGROUP: gl.constexpr):
    """Start dP^T = V dO^T, (64, BLOCK_M)."""
    return warpgroup_mma(side.values(WARPGROUP), do.permute((1, 0)), zeros, use_acc=False,
                         is_async=True)  # fmt: skip


@gluon.jit
def multiply_ds(side, i, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Start a warpgroup's 64 x 64 of this block's dQ = dS K: half of the columns where the block
    has 64 rows, half of the rows where it has 128."""
    ds0, ds1 = side.ds_of(i, 0), side.ds_of(i, 1)
    k0, k1 = side.keys(0), side.keys(1)
    HALF: gl.constexpr = WARPGROUP * 64
    if TILE.block_m == 64:
        k0, k1 = k0.slice(HALF, 64, dim=1), k1.slice(HALF, 64, dim=1)
    else:
        ds0, ds1 = ds0.slice(HALF, 64, dim=1), ds1.slice(HALF, 64, dim=1)
    dq = gl.zeros([64, 64], gl.float32, layouts.accumulator(64))
    dq = warpgroup_mma(ds0.permute((1, 0)), k0, dq, use_acc=False, is_async=True)
    return warpgroup_mma(ds1.permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def gradient_step(grads, side, blocks, i, keys, head, first_q, variant, unit,
                  WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Add block i to dK and dV of a warpgroup's keys, and hand over its share of dQ.

    The order is what measurement left of ten (H200): dV and dK in front of dQ, dQ stored later,
    and the next block's scores under this one's products all cost time or registers.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    scores: gl.constexpr = layouts.accumulator(BLOCK_M)
    of_queries: gl.constexpr = layouts.columns_of(scores)
    zeros = gl.zeros([layouts.ROWS, BLOCK_M], gl.float32, scores)
    SLOPES: gl.constexpr = len(variant.score_mods) > 0
    q = blocks.wait_queries(i)
    s_token = warpgroup_mma(side.keys(WARPGROUP), q.permute((1, 0)), zeros, use_acc=False,
                            is_async=True)  # fmt: skip
    do = blocks.wait_dout(i)
    if SLOPES and BLOCK_M == 128:
        # Scores, slopes and dP are 192 registers a thread: dP later, 1,040 -> 680 bytes of spills.
        lse2 = blocks.load_lse(i, of_queries)
        s = warpgroup_mma_wait(0, deps=[s_token])
        p, slope = probabilities(s, lse2, keys, head, first_q, variant, unit, TILE)
        p_operand, weight = layouts.as_operand(p, q.dtype, TILE.padded), p * slope
        dp_token = multiply_values(side, do, zeros, WARPGROUP)
    else:
        dp_token = multiply_values(side, do, zeros, WARPGROUP)
        if BLOCK_M == 64:
            lse2 = blocks.load_lse(i, of_queries)
        s = warpgroup_mma_wait(1, deps=[s_token])
        if BLOCK_M == 128:  # 32 registers a thread: no room beside the scores in flight
            lse2 = blocks.load_lse(i, of_queries)
        p, weight = probabilities(s, lse2, keys, head, first_q, variant, unit, TILE)
        if SLOPES:
            p_operand, weight = layouts.as_operand(p, q.dtype, TILE.padded), p * weight
        else:
            weight = p
    # The exponentials pass through the wait: ptxas would start it before them.
    dp, weight = warpgroup_mma_wait(0, deps=[dp_token, weight])
    if not SLOPES:
        p_operand = layouts.as_operand(weight, q.dtype, TILE.padded)
    delta = blocks.load_delta(i, of_queries)
    ds = (weight * (dp - delta[None, :])).to(q.dtype)
    ds_operand = layouts.as_operand(ds, q.dtype, TILE.padded)
    side.ds_of(i, WARPGROUP).store(ds)
    dv_token = warpgroup_mma(p_operand, do, grads.v, is_async=True)
    fence_async_shared()
    barriers.sync(DS_WRITTEN, CONSUMERS)
    dq_token = multiply_ds(side, i, WARPGROUP, TILE)
    dk_token = warpgroup_mma(ds_operand, q, grads.k, is_async=True)
    dq, dv = warpgroup_mma_wait(1, deps=[dq_token, dv_token])
    hand_over(side.dq, dq, WARPGROUP)
    dk = warpgroup_mma_wait(0, deps=[dk_token])
    blocks.release(i)
    return KeyGradients(dk, dv)
