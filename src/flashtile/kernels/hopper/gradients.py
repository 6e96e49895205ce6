"""The backward's step: what one block of queries adds to the gradients.

Dao, "FlashAttention-2" (2023), algorithm 2, with keys as rows: P^T and dS^T are then the left
operands of dV and dK, from registers. Only dS passes through shared memory, for dQ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.kernels.hopper import barriers, layouts
from flashtile.kernels.hopper.block import compares_positions, in_chunks
from flashtile.kernels.hopper.hidden import halved, hide, load_hidden
from flashtile.kernels.hopper.query_gradients import hand_over
from flashtile.kernels.hopper.stages import CONSUMERS, DS_GIVEN, DS_WRITTEN
from flashtile.kernels.hopper.units import report_steep
from flashtile.kernels.hopper.walk import first_of, needs_masks
from flashtile.kernels.hopper.words import dropped_queries
from flashtile.kernels.masks import At, query_range, visible
from flashtile.kernels.scores import apply_with_slope
from flashtile.kernels.views import Span


class KeyGradients(NamedTuple):
    k: Any  # (64, PADDED) of dK / softmax_scale
    v: Any  # (64, PADDED)


class Keys(NamedTuple):
    """A warpgroup's keys."""

    at: Any  # At, without queries
    lo: Any  # queries [lo, hi) may see some of them, [full_lo, full_hi) see all
    full_lo: Any
    full_hi: Any
    hi: Any


@gluon.jit
def probabilities(s, lse2, hidden, keys, head, place, variant, unit):
    """(p, slope of the score mods) of the queries of a place, from their raw scores (64, BLOCK_M).
    Where dropout drops, p has a minus: no register more.

    A thread's queries are its own first one plus constants, and masks compare with constants.
    """
    BLOCK_M: gl.constexpr = s.shape[1]
    first_q = first_of(variant.blocks, place)
    columns = gl.arange(0, BLOCK_M, layouts.columns_of(layouts.accumulator(BLOCK_M)))[None, :]
    own, constants = layouts.opaque(first_q + (columns & 6)), columns & -7
    at, slope = keys.at, 1.0
    if len(variant.score_mods) > 0:
        here = At(at.batch, head, first_q, at.first_k, own + constants, at.k_idx, at.q, at.k)
        s, slope = apply_with_slope(variant.score_mods, s, here)
    p = gl.exp2(s * unit - lse2[None, :])
    if needs_masks(keys, place, first_q, variant.blocks, BLOCK_M):
        if _bounded(variant, at, first_q):
            p = gl.where(_see(variant, at, head, first_q, own, constants), p, 0.0)
        p = hide(p, hidden, variant)
    if len(variant.dropouts) > 0:
        tile = At(at.batch, head, layouts.opaque(first_q), at.first_k, 0, 0, at.q, at.k)
        p = gl.where(dropped_queries(variant.dropouts[0], tile, BLOCK_M), -p, p)
    if variant.steep is not None:
        report_steep(p, slope, variant.steep)
    return p, slope


@gluon.jit
def _bounded(variant, at, first_q):
    """Whether more than a mask tensor may hide something of a block that needs masks."""
    if len(variant.masks) > 0 or len(variant.tensors) == 0:
        return True
    else:
        return (first_q >= at.q.length) | (at.first_k + layouts.ROWS > at.k.length)


@gluon.jit
def _see(variant, at, head, first_q, own, constants):
    """Which queries see which keys. Masks that only compare positions compare a key with a
    constant."""
    if in_chunks(variant.masks):
        seen = query_range(variant.masks, at.k_idx, at.k_idx, at.q, at.k)
        return (constants >= seen.lo - own) & (constants < seen.hi - own)
    elif compares_positions(variant.masks):
        q = Span(at.q.batch, at.q.row, at.q.start, at.q.length - own, at.q.room, at.q.leftpad)
        relative = At(at.batch, head, 0, at.first_k, constants, at.k_idx, q,
                      _keys_of(variant.blocks, at, first_q))  # fmt: skip
        return visible(variant.masks, relative)
    else:
        here = At(at.batch, head, first_q, at.first_k, own + constants, at.k_idx, at.q, at.k)
        return visible(variant.masks, here) & (here.q_idx < at.q.length)


@gluon.jit
def _keys_of(blocks, at, first_q):
    """The keys' Span. Queries past the end have lse +inf, but a list's block that begins there has
    the lse of others: it sees no keys."""
    if blocks is None:
        return at.k
    else:
        k, length = at.k, gl.where(first_q < at.q.length, at.k.length, 0)
        return Span(k.batch, k.row, k.start, length, k.room, k.leftpad)


@gluon.jit
def kept(p, dropouts):
    """The probabilities that dropout leaves."""
    if len(dropouts) > 0:
        return gl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return p


@gluon.jit
def score_gradient(p, dp, delta, dropouts):
    """dS, from probabilities times the slope of the score mods. Dropout's slopes are not below 0:
    a minus still tells what it drops."""
    if len(dropouts) > 0:
        return kept(p, dropouts) * dp - gl.abs(p) * delta[None, :]
    else:
        return p * (dp - delta[None, :])


@gluon.jit
def score_parts(s, dp, hidden, blocks, i, keys, head, place, variant, unit, dtype: gl.constexpr,
                FIRST: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """(P, dS) of item i's columns from FIRST on, one part after the other: what is between scores
    and gradients is then in registers for few of them."""
    COLUMNS: gl.constexpr = s.shape[1]
    if PARTS > 1:
        HALF: gl.constexpr = COLUMNS // 2
        hidden0, hidden1 = halved(hidden, variant, HALF)
        s0, s1 = layouts.halves(s)
        dp0, dp1 = layouts.halves(dp)
        p0, ds0 = score_parts(s0, dp0, hidden0, blocks, i, keys, head, place, variant, unit, dtype,
                              FIRST, PARTS // 2)  # fmt: skip
        p1, ds1 = score_parts(s1, dp1, hidden1, blocks, i, keys, head, place, variant, unit, dtype,
                              FIRST + HALF, PARTS // 2)  # fmt: skip
        return layouts.whole(p0, p1), layouts.whole(ds0, ds1)
    else:
        of_queries: gl.constexpr = layouts.columns_of(layouts.accumulator(COLUMNS))
        lse2 = blocks.lse_of(i).slice(FIRST, COLUMNS, dim=0).load(of_queries)
        p, slope = probabilities(s, lse2, hidden, keys, head, place + FIRST, variant, unit)
        delta = blocks.delta_of(i).slice(FIRST, COLUMNS, dim=0).load(of_queries)
        ds = score_gradient(p * slope, dp, delta, variant.dropouts)
        return kept(p, variant.dropouts).to(dtype), ds.to(dtype)


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
def give(i, WARPGROUP: gl.constexpr):
    """Tell the other warpgroup, which may be a step behind, that the step of item i - 1 is done."""
    barriers.arrive(DS_GIVEN + 2 * (i & 1) + 1 - WARPGROUP, CONSUMERS)


@gluon.jit
def take(i, WARPGROUP: gl.constexpr):
    """Wait until the other warpgroup gives the same."""
    barriers.sync(DS_GIVEN + 2 * (i & 1) + WARPGROUP, CONSUMERS)


@gluon.jit
def start_keys(TILE: gl.constexpr):
    """The gradients before a tile's first block."""
    PADDED: gl.constexpr = TILE.padded
    zeros = gl.zeros([layouts.ROWS, PADDED], gl.float32, layouts.accumulator(PADDED))
    return KeyGradients(zeros, zeros)


@gluon.jit
def finish_queries(side, blocks, i, steps, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """After a tile's last block, item i - 1: its share of dQ, where shares lag. Both warpgroups
    have then read all keys."""
    if TILE.lags:
        if steps > 0:
            take(i, WARPGROUP)
            dq = warpgroup_mma_wait(0, deps=[multiply_ds(side, i - 1, WARPGROUP, TILE)])
            hand_over(side, blocks, i - 1, dq, WARPGROUP)
        give(i + 1, WARPGROUP)
        take(i + 1, WARPGROUP)
    else:
        barriers.sync(DS_WRITTEN, CONSUMERS)


@gluon.jit
def store_ds(side, i, ds, FIRST: gl.constexpr, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Store a warpgroup's dS of item i, when the place is free, as it is where a tile begins."""
    if TILE.lags and not FIRST:
        take(i, WARPGROUP)
    side.ds_of(i, WARPGROUP).store(ds)


@gluon.jit
def meet(TILE: gl.constexpr):
    """After this the dS that a step's share of dQ takes is in shared memory."""
    fence_async_shared()
    if not TILE.lags:
        barriers.sync(DS_WRITTEN, CONSUMERS)


@gluon.jit
def start_share(side, i, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Start a warpgroup's 64 x 64 of item i's share of dQ or, where shares lag, of the one
    before's."""
    of = i - 1 if TILE.lags else i
    return multiply_ds(side, of, WARPGROUP, TILE)


@gluon.jit
def share_queries(side, blocks, dq, i, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Hand over a share of dQ, and where shares lag what the next one takes."""
    hand_over(side, blocks, i - 1 if TILE.lags else i, dq, WARPGROUP)
    if TILE.lags:
        give(i + 1, WARPGROUP)


@gluon.jit
def gradient_step(grads, side, blocks, i, keys, head, place, variant, unit, FIRST: gl.constexpr,
                  WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Add item i to dK and dV of a warpgroup's keys, and hand over its share of dQ, or where shares
    lag that of the block before: none with the FIRST of a tile."""
    if TILE.skips:
        if (place < keys.hi) & (place + TILE.block_m > keys.lo):
            grads = seen_step(grads, side, blocks, i, keys, head, place, variant, unit,
                              TILE.block_m, FIRST, WARPGROUP, TILE)  # fmt: skip
        else:
            unseen_step(side, blocks, i, FIRST, WARPGROUP, TILE)
        return grads
    else:
        return seen_step(grads, side, blocks, i, keys, head, place, variant, unit, TILE.block_m,
                         FIRST, WARPGROUP, TILE)  # fmt: skip


@gluon.jit
def first_step(grads, side, blocks, i, keys, head, place, variant, unit, WARPGROUP: gl.constexpr,
               TILE: gl.constexpr):  # fmt: skip
    """A tile's first `gradient_step`, where shares lag. The last block of a packed sequence is the
    first in the walk, and of half of them half is past the end."""
    HALF: gl.constexpr = TILE.block_m // 2
    if TILE.halves:
        if place + HALF >= keys.at.q.length:
            own = beside(keys, HALF // TILE.parts)
            grads = seen_step(grads, side, blocks, i, own, head, place, variant, unit, HALF, True,
                              WARPGROUP, TILE)  # fmt: skip
        else:
            grads = gradient_step(grads, side, blocks, i, keys, head, place, variant, unit, True,
                                  WARPGROUP, TILE)  # fmt: skip
        return grads
    else:
        return gradient_step(grads, side, blocks, i, keys, head, place, variant, unit, True,
                             WARPGROUP, TILE)  # fmt: skip


@gluon.jit
def beside(keys, QUERIES: gl.constexpr):
    """Keys for scores of so many queries."""
    at = keys.at
    k_idx = gl.convert_layout(at.k_idx, layouts.accumulator(QUERIES), assert_trivial=True)
    at = At(at.batch, at.head, at.first_q, at.first_k, at.q_idx, k_idx, at.q, at.k)
    return Keys(at, keys.lo, keys.full_lo, keys.full_hi, keys.hi)


@gluon.jit
def first_rows(tile, COUNT: gl.constexpr):
    """The first rows of shared memory, or elements."""
    if tile.shape[0] == COUNT:
        return tile
    else:
        return tile.slice(0, COUNT, dim=0)


@gluon.jit
def unseen_step(side, blocks, i, FIRST: gl.constexpr, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """A `gradient_step` whose queries see none of a warpgroup's keys."""
    BLOCK_M: gl.constexpr = TILE.block_m
    q = blocks.wait_queries(i)
    blocks.wait_dout(i)
    ds = gl.zeros([layouts.ROWS, BLOCK_M], q.dtype, layouts.accumulator(BLOCK_M))
    store_ds(side, i, ds, FIRST, WARPGROUP, TILE)
    meet(TILE)
    if FIRST:
        give(i + 1, WARPGROUP)
    else:
        dq = warpgroup_mma_wait(0, deps=[start_share(side, i, WARPGROUP, TILE)])
        share_queries(side, blocks, dq, i, WARPGROUP, TILE)
    blocks.release(i)


@gluon.jit
def seen_step(grads, side, blocks, i, keys, head, place, variant, unit, QUERIES: gl.constexpr,
              FIRST: gl.constexpr, WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """A `gradient_step` with products, of the first QUERIES of a block; there are no others.

    The order is what measurement left of ten (H200): dV and dK in front of dQ, dQ stored later,
    and the next block's scores under this one's products all cost time or registers.
    """
    scores: gl.constexpr = layouts.accumulator(QUERIES)
    of_queries: gl.constexpr = layouts.columns_of(scores)
    zeros = gl.zeros([layouts.ROWS, QUERIES], gl.float32, scores)
    SLOPES: gl.constexpr = len(variant.score_mods) > 0
    q = first_rows(blocks.wait_queries(i), QUERIES)
    s_token = warpgroup_mma(side.keys(WARPGROUP), q.permute((1, 0)), zeros, use_acc=False,
                            is_async=True)  # fmt: skip
    do = first_rows(blocks.wait_dout(i), QUERIES)
    if TILE.parts > 1:
        dp_token = multiply_values(side, do, zeros, WARPGROUP)
        hidden = load_hidden(variant, keys, head, place, QUERIES)
        s, dp = warpgroup_mma_wait(0, deps=[s_token, dp_token])
        p, ds = score_parts(s, dp, hidden, blocks, i, keys, head, place, variant, unit, q.dtype, 0,
                            TILE.parts)  # fmt: skip
        p_operand = layouts.as_operand(p, q.dtype, TILE.padded)
    elif SLOPES and TILE.block_m == 128:
        # Scores, slopes and dP are 192 registers a thread: dP later, 1,040 -> 680 bytes of spills.
        lse2 = first_rows(blocks.lse_of(i), QUERIES).load(of_queries)
        hidden = load_hidden(variant, keys, head, place, QUERIES)
        s = warpgroup_mma_wait(0, deps=[s_token])
        p, slope = probabilities(s, lse2, hidden, keys, head, place, variant, unit)
        p_operand = layouts.as_operand(kept(p, variant.dropouts), q.dtype, TILE.padded)
        weight = p * slope
        dp_token = multiply_values(side, do, zeros, WARPGROUP)
    else:
        dp_token = multiply_values(side, do, zeros, WARPGROUP)
        hidden = load_hidden(variant, keys, head, place, QUERIES)
        if TILE.block_m == 64:
            lse2 = first_rows(blocks.lse_of(i), QUERIES).load(of_queries)
        s = warpgroup_mma_wait(1, deps=[s_token])
        if TILE.block_m == 128:  # 32 registers a thread: no room beside the scores in flight
            lse2 = first_rows(blocks.lse_of(i), QUERIES).load(of_queries)
        p, weight = probabilities(s, lse2, hidden, keys, head, place, variant, unit)
        if SLOPES:
            p_operand = layouts.as_operand(kept(p, variant.dropouts), q.dtype, TILE.padded)
            weight = p * weight
        else:
            weight = p
    if TILE.parts == 1:
        # The exponentials pass through the wait: ptxas would start it before them.
        dp, weight = warpgroup_mma_wait(0, deps=[dp_token, weight])
        if not SLOPES:
            p_operand = layouts.as_operand(kept(weight, variant.dropouts), q.dtype, TILE.padded)
        delta = first_rows(blocks.delta_of(i), QUERIES).load(of_queries)
        ds = score_gradient(weight, dp, delta, variant.dropouts).to(q.dtype)
    grads = add_block(grads, side, blocks, i, q, do, p_operand, ds, FIRST, WARPGROUP, TILE)
    blocks.release(i)
    return grads


@gluon.jit
def add_block(grads, side, blocks, i, q, do, p_operand, ds, FIRST: gl.constexpr,
              WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """The products with P and dS of item i."""
    ds_operand = layouts.as_operand(ds, q.dtype, TILE.padded)
    if ds.shape[1] < TILE.block_m:
        ds = layouts.whole(ds, gl.zeros_like(ds))
    store_ds(side, i, ds, FIRST, WARPGROUP, TILE)
    dv_token = warpgroup_mma(p_operand, do, grads.v, is_async=True)
    meet(TILE)
    if FIRST:
        dk_token = warpgroup_mma(ds_operand, q, grads.k, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv_token])
        give(i + 1, WARPGROUP)
    else:
        dq_token = start_share(side, i, WARPGROUP, TILE)
        dk_token = warpgroup_mma(ds_operand, q, grads.k, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=[dq_token, dv_token])
        share_queries(side, blocks, dq, i, WARPGROUP, TILE)
    return KeyGradients(warpgroup_mma_wait(0, deps=[dk_token]), dv)
