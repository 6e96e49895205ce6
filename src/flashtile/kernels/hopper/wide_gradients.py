"""The backward's step at head dims above 128, on 64 keys by 64 queries.

dK and dV of 64 keys are more than a warpgroup's registers, so that both have the same keys:
warpgroup w computes S^T and dP^T of half of the queries, and owns some columns of dK, dV and dQ. P
and dS pass through shared memory, where each finds the other's half.
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
from flashtile.kernels.hopper._compat import tma_store_wait
from flashtile.kernels.hopper.channels import store_rows
from flashtile.kernels.hopper.gradients import kept, probabilities, score_gradient
from flashtile.kernels.hopper.hidden import load_hidden
from flashtile.kernels.hopper.query_gradients import hand_over, own_columns
from flashtile.kernels.hopper.scheduler import pin
from flashtile.kernels.hopper.stages import CONSUMERS, DS_WRITTEN


class Columns(NamedTuple):
    """What a warpgroup takes from step to step."""

    k: Any  # (64, own_columns) of dK / softmax_scale
    v: Any
    s: Any  # (64, 32) raw scores of its half of the next block


@gluon.jit
def own(tile, DIM: gl.constexpr, WARPGROUP: gl.constexpr):
    """A warpgroup's columns of a tile in shared memory."""
    FIRST: gl.constexpr = 128 * WARPGROUP if DIM > 128 else 64 * WARPGROUP
    return tile.slice(FIRST, own_columns(DIM, WARPGROUP), dim=1)


@gluon.constexpr_function
def products(padded, kept=0):
    """How many products `multiply_rows` starts."""
    return padded // 128 + (kept > 0)


@gluon.jit
def multiply_rows(left, kept, right, DIM: gl.constexpr):
    """Start left right^T of (64, PADDED) and (32, PADDED), without the padding behind 192 columns;
    `kept` is None or the first 64 columns of left."""
    N: gl.constexpr = right.shape[0]
    x = gl.zeros([layouts.ROWS, N], gl.float32, layouts.accumulator(N))
    if kept is None:
        x = multiply_part(left, right, x, 0, 128)
    else:
        x = warpgroup_mma(kept, right.slice(0, 64, dim=1).permute((1, 0)), x, use_acc=False,
                          is_async=True)  # fmt: skip
        x = multiply_part(left, right, x, 64, 64)
    if left.shape[1] == 256:
        x = multiply_part(left, right, x, 128, 64 if DIM <= 192 else 128)
    return x


@gluon.jit
def multiply_part(left, right, x, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Start the part of COUNT columns, the first one without what is in x."""
    return warpgroup_mma(left.slice(FIRST, COUNT, dim=1),
                         right.slice(FIRST, COUNT, dim=1).permute((1, 0)), x, use_acc=FIRST > 0,
                         is_async=True)  # fmt: skip


@gluon.jit
def multiply_keys(side, kept, blocks, i, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Start S^T of a warpgroup's half of item i, (64, 32)."""
    HALF: gl.constexpr = TILE.block_m // 2
    q = blocks.queries_of(i).slice(WARPGROUP * HALF, HALF, dim=0)
    return multiply_rows(side.keys(0), kept, q, TILE.dim)


@gluon.jit
def multiply_ds(side, i, COLUMN: gl.constexpr):
    """Start 64 columns of item i's dQ = dS K."""
    ds, k = side.ds.index(i & 1).permute((1, 0)), side.keys(0).slice(COLUMN, 64, dim=1)
    dq = gl.zeros([64, 64], gl.float32, layouts.accumulator(64))
    return warpgroup_mma(ds, k, dq, use_acc=False, is_async=True)


@gluon.jit
def keep_keys(side, TILE: gl.constexpr):
    """The first columns of the keys, as the left operand of S^T: from shared memory they would be
    read in every step, and there are registers for 64 (128 are C7512)."""
    half: gl.constexpr = layouts.operand(layouts.accumulator(TILE.block_m // 2))
    return side.keys(0).slice(0, TILE.kept, dim=1).load(half)


@gluon.jit
def start_columns(side, kept, blocks, i, steps, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Zeros, and the scores of a tile's first block, item i, if it has any."""
    K: gl.constexpr = own_columns(TILE.dim, WARPGROUP)
    V: gl.constexpr = own_columns(TILE.dim_v, WARPGROUP)
    if steps > 0:
        blocks.wait_queries(i)
    s = warpgroup_mma_wait(0, deps=[multiply_keys(side, kept, blocks, i, WARPGROUP, TILE)])
    k = gl.zeros([layouts.ROWS, K], gl.float32, layouts.accumulator(K))
    v = gl.zeros([layouts.ROWS, V], gl.float32, layouts.accumulator(V))
    return Columns(k, v, s)


@gluon.jit
def share_scores(side, blocks, i, x, keys, head, place, variant, unit, WARPGROUP: gl.constexpr,
                 TILE: gl.constexpr):  # fmt: skip
    """Write a warpgroup's half of P and dS of item i. dO, which has come."""
    HALF: gl.constexpr = TILE.block_m // 2
    FIRST: gl.constexpr = WARPGROUP * HALF
    of_queries: gl.constexpr = layouts.columns_of(layouts.accumulator(HALF))
    do = blocks.wait_dout(i)
    values = side.values(pin(0))
    dp_token = multiply_rows(values, None, do.slice(FIRST, HALF, dim=0), TILE.dim_v)
    hidden = load_hidden(variant, keys, head, place + FIRST, HALF)
    lse2 = blocks.lse_of(i).slice(FIRST, HALF, dim=0).load(of_queries)
    p, weight = probabilities(x.s, lse2, hidden, keys, head, place + FIRST, variant, unit)
    side.p.index(i & 1).slice(FIRST, HALF, dim=1).store(kept(p, variant.dropouts).to(do.dtype))
    weight = p * weight if len(variant.score_mods) > 0 else p
    # The exponentials pass through the wait: ptxas would start it before them.
    dp, weight = warpgroup_mma_wait(0, deps=[dp_token, weight])
    delta = blocks.delta_of(i).slice(FIRST, HALF, dim=0).load(of_queries)
    ds = score_gradient(weight, dp, delta, variant.dropouts)
    side.ds.index(i & 1).slice(FIRST, HALF, dim=1).store(ds.to(do.dtype))
    fence_async_shared()
    return do


@gluon.jit
def wide_step(x, side, kept, blocks, i, more, keys, head, place, variant, unit,
              WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Add item i to a warpgroup's columns of dK and dV, hand over its columns of dQ, 64 at a time,
    and compute the scores of the item after it, under the last share's way to shared memory.

    Without `more` items the scores are of whatever lies there, and nobody reads them.
    """
    SCORES: gl.constexpr = products(TILE.padded, TILE.kept)
    COLUMN: gl.constexpr = 128 * WARPGROUP
    do = share_scores(side, blocks, i, x, keys, head, place, variant, unit, WARPGROUP, TILE)
    barriers.sync(DS_WRITTEN, CONSUMERS)
    p, ds, q = side.p.index(i & 1), side.ds.index(i & 1), blocks.queries_of(i)
    dv_token = warpgroup_mma(p, own(do, TILE.dim_v, WARPGROUP), x.v, is_async=True)
    dq_token = multiply_ds(side, i, COLUMN)
    dk_token = warpgroup_mma(ds, own(q, TILE.dim, WARPGROUP), x.k, is_async=True)
    dv = warpgroup_mma_wait(2, deps=[dv_token])
    blocks.release_dout()  # as soon as may be: it has one slot
    dq = warpgroup_mma_wait(1, deps=[dq_token])
    if own_columns(TILE.dim, WARPGROUP) == 128:
        hand_over(side, blocks, i, dq, WARPGROUP)
        dq_token = multiply_ds(side, i, COLUMN + 64)
        if more:
            blocks.wait_queries(i + 1)
        s_token = multiply_keys(side, kept, blocks, i + 1, WARPGROUP, TILE)
        dk = warpgroup_mma_wait(1 + SCORES, deps=[dk_token])
        blocks.release(i)
        dq = warpgroup_mma_wait(SCORES, deps=[dq_token])
    else:
        if more:
            blocks.wait_queries(i + 1)
        s_token = multiply_keys(side, kept, blocks, i + 1, WARPGROUP, TILE)
        dk = warpgroup_mma_wait(SCORES, deps=[dk_token])
        blocks.release(i)
    hand_over(side, blocks, i, dq, WARPGROUP)
    s = warpgroup_mma_wait(0, deps=[s_token])
    return Columns(dk, dv, s)


@gluon.jit
def store_columns(outputs, side, x, tile, window, scale, WARPGROUP: gl.constexpr,
                  TILE: gl.constexpr):  # fmt: skip
    """Write dK and dV, one each, through the places of the keys and values, which both warpgroups
    have read."""
    row = window.row + tile.key
    own(side.values(0), TILE.dim_v, WARPGROUP).store(x.v.to(outputs.dv.dtype))
    own(side.keys(0), TILE.dim, WARPGROUP).store((x.k * scale).to(outputs.dk.dtype))
    fence_async_shared()
    barriers.sync(DS_WRITTEN, CONSUMERS)
    if WARPGROUP == 0:
        store_rows(outputs.dv, window.batch, tile.kv_head, row, side.v.index(0))
    else:
        store_rows(outputs.dk, window.batch, tile.kv_head, row, side.k.index(0))
    tma_store_wait(0)
