"""The backward mainloops: dQ by tiles of queries, dK and dV by tiles of keys.

Both recompute the probabilities of a block from lse (Dao, "FlashAttention-2", 2023, algorithm 2).
Two kernels do seven matrix products where one with atomic additions does five, but each result is
summed in registers by one program in one order: bitwise deterministic, no fp32 workspace for dQ,
and the query heads of a KV head need no expanded tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.dropout import (
    draw_keys_by_queries,
    draw_queries_by_keys,
    drop,
    drop_score_gradient,
    numbers_keys_by_queries,
    numbers_queries_by_keys,
)
from flashtile.kernels.masks import At, key_range, query_range, visible
from flashtile.kernels.numbers import number
from flashtile.kernels.schedule import (
    PARTIAL,
    RUN,
    SCATTERED,
    block_count,
    block_start,
    schedule_tile,
)
from flashtile.kernels.scores import apply_with_slope
from flashtile.kernels.views import (
    interleave_heads,
    load_pairs,
    load_tile,
    open_sequence,
    open_tile,
    store_tile,
    tokens,
)


class Saved(NamedTuple):
    """What backward knows of the forward, row by row (see `prepare`)."""

    dout: Any  # TokenView
    rows: Any  # RowView, four floats wide: lse in log2 units, +inf where a row saw no key, so
    # that p is 0; delta = (rowsum(dout * out) - dlse) / rescale; two unused


class QueryTile(NamedTuple):
    q: Any  # (BLOCK_M, PADDED)
    do: Any  # (BLOCK_M, PADDED_V)
    lse2: Any  # (BLOCK_M,)
    delta: Any  # (BLOCK_M,)


class KeyGradients(NamedTuple):
    k: Any  # (BLOCK_N, PADDED) of dK / (softmax_scale * rescale)
    v: Any  # (BLOCK_N, PADDED_V) of dV / rescale


@triton.jit
def recompute(s, lse2, at, variant, scale, FULL: tl.constexpr):
    """The probabilities of a block from scores that have passed the score mods; lse2 broadcasts to
    the block."""
    p = tl.math.exp2(s * scale.log2 - lse2)
    if not FULL:
        p = tl.where(visible(variant.masks, at), p, 0.0)
    return p


@triton.jit
def score_gradient(p, slope, dp, delta, variant, numbers):
    """ds of the raw scores, without the factor `rescale`, which their sums get and delta does
    without; delta broadcasts to the block. numbers: dropout's, or ()."""
    if len(numbers) == 0:
        return p * (dp - delta) * slope
    else:
        return drop_score_gradient(variant.dropouts[0], p, dp, delta, numbers[0]) * slope


@triton.jit
def rescale(variant):
    """What makes up for what dropout drops."""
    if len(variant.dropouts) > 0:
        return variant.dropouts[0].rescale
    else:
        return 1.0


@triton.jit
def unseeing_past_the_end(lse2, rows, span):
    """lse2, +inf for rows past the queries' end. Their scores are 0 until a score mod raises them,
    and then their probabilities may be infinite, of which 0 times is in dK, dV and the bias."""
    return tl.where(rows < span.length, lse2, float("inf"))


@triton.jit
def load_queries(q, dout, q_seq, span, head, first, TILE: tl.constexpr):
    """(Q, dO) of a tile of queries."""
    q_base, do_base = tokens(q, q_seq, span, head), tokens(dout, q_seq, span, head)
    queries = load_tile(q, q_base, q_seq, span, first, False, TILE.block_m, TILE.dim, TILE.padded)
    do = load_tile(dout, do_base, q_seq, span, first, False, TILE.block_m, TILE.dim_v,
                   TILE.padded_v)  # fmt: skip
    return queries, do


@triton.jit
def load_query_tile(q, saved, q_seq, span, head, first, TILE: tl.constexpr):
    """What a tile of queries keeps in registers or shared memory while keys pass by."""
    BLOCK_M: tl.constexpr = TILE.block_m
    q_tile, do = load_queries(q, saved.dout, q_seq, span, head, first, TILE)
    lse2, delta = load_pairs(saved.rows, span, head, first, False, BLOCK_M)
    lse2 = unseeing_past_the_end(lse2, first + tl.arange(0, BLOCK_M), span)
    return QueryTile(q_tile, do, lse2, delta)


@triton.jit
def query_gradient(dq, rows, k, v, k_seq, at, schedule, variant, scale,
                   kv_head, PART: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Add one part of a schedule's key blocks to dQ / (softmax_scale * rescale)."""
    FULL: tl.constexpr = PART != PARTIAL
    BLOCK_N: tl.constexpr = TILE.block_n
    k_base, v_base = tokens(k, k_seq, at.k, kv_head), tokens(v, k_seq, at.k, kv_head)
    words = draw_queries_by_keys(variant, schedule, 0, at, PART, TILE)
    for i in range(block_count(schedule, PART)):
        first = block_start(variant.blocks, schedule, i, PART, BLOCK_N)
        here = At(at.batch, at.head, at.first_q, first, at.q_idx, first + at.k_idx, at.q, at.k)
        keys = load_tile(k, k_base, k_seq, at.k, first, FULL, BLOCK_N, TILE.dim, TILE.padded)
        s = tl.dot(rows.q, keys.T, input_precision=TILE.precision)
        # Before dP's product, which exponentials hide.
        s, slope = apply_with_slope(variant.score_mods, s, here)
        values = load_tile(v, v_base, k_seq, at.k, first, FULL, BLOCK_N, TILE.dim_v, TILE.padded_v)
        dp = tl.dot(rows.do, values.T, input_precision=TILE.precision)
        p = recompute(s, rows.lse2[:, None], here, variant, scale, FULL)
        numbers = ()
        if len(words) > 0:
            numbers = (numbers_queries_by_keys(words, TILE.block_m, TILE.block_n),)
        ds = score_gradient(p, slope, dp, rows.delta[:, None], variant, numbers)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=TILE.precision)
        words = draw_queries_by_keys(variant, schedule, i + 1, at, PART, TILE)
    return dq


@triton.jit
def attention_backward_dq(q, k, v, dq, saved, q_seq, k_seq, variant, scale, heads,
                          TILE: tl.constexpr):  # fmt: skip
    """One tile of queries of one head: dQ."""
    BLOCK_M: tl.constexpr = TILE.block_m
    count = number(heads.count)
    tile = interleave_heads(q_seq, count, tl.program_id(0), BLOCK_M)
    batch, head, first = open_tile(q_seq, count, tile, True, BLOCK_M)
    q_span = open_sequence(q_seq, batch)
    if (first < 0) | (first >= q_span.room):
        return
    own = load_query_tile(q, saved, q_seq, q_span, head, first, TILE)
    query_tile_gradient(own, k, v, dq, batch, head, first, q_seq, k_seq, variant, scale, heads,
                        TILE)  # fmt: skip


@triton.jit
def query_tile_gradient(own, k, v, dq, batch, head, first, q_seq, k_seq, variant, scale, heads,
                        TILE: tl.constexpr):  # fmt: skip
    """Compute and write dQ of a QueryTile."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    rows = first + tl.arange(0, BLOCK_M)
    at = At(batch, head, first, 0, rows[:, None], tl.arange(0, BLOCK_N)[None, :], q_span, k_span)
    seen = key_range(variant.masks, first, first + BLOCK_M - 1, q_span, k_span)
    schedule = schedule_tile(variant.blocks, seen, batch, head, first, q_span.length, BLOCK_N)
    kv_head = head // number(heads.group)
    PADDED: tl.constexpr = TILE.padded
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    acc = query_gradient(acc, own, k, v, k_seq, at, schedule, variant, scale, kv_head,
                         PARTIAL, TILE)  # fmt: skip
    acc = query_gradient(acc, own, k, v, k_seq, at, schedule, variant, scale, kv_head,
                         RUN, TILE)  # fmt: skip
    if variant.blocks is not None:
        acc = query_gradient(acc, own, k, v, k_seq, at, schedule, variant, scale, kv_head,
                             SCATTERED, TILE)  # fmt: skip
    acc *= scale.natural * rescale(variant)
    store_tile(dq, acc, tokens(dq, q_seq, q_span, head), q_seq, q_span, first, BLOCK_M, TILE.dim,
               TILE.padded)  # fmt: skip


@triton.jit
def load_row_numbers(saved, variant, at, rows, first, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """lse2 and delta of a block of queries."""
    lse2, delta = load_pairs(saved.rows, at.q, at.head, first, FULL, BLOCK)
    if not FULL and len(variant.score_mods) > 0:
        lse2 = unseeing_past_the_end(lse2, rows, at.q)
    return lse2, delta


@triton.jit
def key_gradient(grads, k, v, q, saved, q_seq, at, schedule, variant, scale,
                 PART: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Add one part of a schedule's query blocks to the gradients."""
    FULL: tl.constexpr = PART != PARTIAL
    BLOCK_M: tl.constexpr = TILE.block_m
    # Behind the last product exponentials would wait for a thread's 16 loads of lse and delta, one
    # by one: dK and dV at head dim 64 4.60 -> 4.34 ms, with dropout 6.07 -> 5.71 (H200, causal
    # 16k, 32 heads). Wider gradients leave no registers for it.
    EARLY: tl.constexpr = TILE.padded + TILE.padded_v <= 128
    # With dropout all that does not need dP is done before it takes 32 registers: behind it ptxas
    # has none left, waits for exponentials one by one, and puts P for dV where dP was, so that dV
    # waits for dS. Here dV starts ahead of dP, and of dS one FMA is left behind.
    DV_FIRST: tl.constexpr = EARLY and len(variant.dropouts) > 0
    q_base = tokens(q, q_seq, at.q, at.head)
    do_base = tokens(saved.dout, q_seq, at.q, at.head)
    words = draw_keys_by_queries(variant, schedule, 0, at, PART, TILE)
    for i in range(block_count(schedule, PART)):
        first = block_start(variant.blocks, schedule, i, PART, BLOCK_M)
        rows = first + tl.arange(0, BLOCK_M)
        here = At(at.batch, at.head, first, at.first_k, rows[None, :], at.k_idx, at.q, at.k)
        if EARLY:
            lse2, delta = load_row_numbers(saved, variant, at, rows, first, FULL, BLOCK_M)
        queries = load_tile(q, q_base, q_seq, at.q, first, FULL, BLOCK_M, TILE.dim, TILE.padded)
        s = tl.dot(k, queries.T, input_precision=TILE.precision)
        s, slope = apply_with_slope(variant.score_mods, s, here)
        do = load_tile(saved.dout, do_base, q_seq, at.q, first, FULL, BLOCK_M, TILE.dim_v,
                       TILE.padded_v)  # fmt: skip
        if not DV_FIRST:
            dp = tl.dot(v, do.T, input_precision=TILE.precision)
        if not EARLY:
            lse2, delta = load_row_numbers(saved, variant, at, rows, first, FULL, BLOCK_M)
        p = recompute(s, lse2[None, :], here, variant, scale, FULL)
        kept = p if DV_FIRST else p.to(do.dtype)
        numbers = ()
        if len(words) > 0:
            numbers = (numbers_keys_by_queries(variant.dropouts[0], words, TILE.block_m,
                                               TILE.block_n),)  # fmt: skip
            kept = drop(variant.dropouts[0], kept, numbers[0])
        # Before dS, so that the tensor cores are busy while it is computed.
        dv = tl.dot(kept.to(do.dtype), do, grads.v, input_precision=TILE.precision)
        if DV_FIRST:
            dp = tl.dot(v, do.T, input_precision=TILE.precision)
            ds = (kept * dp - p * delta[None, :]) * slope
        else:
            ds = score_gradient(p, slope, dp, delta[None, :], variant, numbers)
        dk = tl.dot(ds.to(queries.dtype), queries, grads.k, input_precision=TILE.precision)
        words = draw_keys_by_queries(variant, schedule, i + 1, at, PART, TILE)
        grads = KeyGradients(dk, dv)
    return grads


@triton.jit
def attention_backward_dkdv(q, k, v, dk, dv, saved, q_seq, k_seq, variant, scale, heads,
                            TILE: tl.constexpr):  # fmt: skip
    """One tile of keys of one KV head, over all query heads of its group: dK and dV."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    group = number(heads.group)
    kv_heads = number(heads.count) // group
    tile = interleave_heads(k_seq, kv_heads, tl.program_id(0), BLOCK_N)
    batch, kv_head, first = open_tile(k_seq, kv_heads, tile, False, BLOCK_N)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    if first >= k_span.room:
        return
    columns = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, tokens(k, k_seq, k_span, kv_head), k_seq, k_span, first, False, BLOCK_N,
                       TILE.dim, TILE.padded)  # fmt: skip
    v_tile = load_tile(v, tokens(v, k_seq, k_span, kv_head), k_seq, k_span, first, False, BLOCK_N,
                       TILE.dim_v, TILE.padded_v)  # fmt: skip
    PADDED: tl.constexpr = TILE.padded
    PADDED_V: tl.constexpr = TILE.padded_v
    grads = KeyGradients(
        tl.zeros([BLOCK_N, PADDED], tl.float32), tl.zeros([BLOCK_N, PADDED_V], tl.float32)
    )
    for member in range(group):
        head = kv_head * group + member
        at = At(batch, head, 0, first, columns[None, :], columns[:, None], q_span, k_span)
        seen = query_range(variant.masks, first, first + BLOCK_N - 1, q_span, k_span)
        schedule = schedule_tile(variant.blocks, seen, batch, head, first, k_span.length, BLOCK_M)
        grads = key_gradient(grads, k_tile, v_tile, q, saved, q_seq, at, schedule, variant,
                             scale, PARTIAL, TILE)  # fmt: skip
        grads = key_gradient(grads, k_tile, v_tile, q, saved, q_seq, at, schedule, variant,
                             scale, RUN, TILE)  # fmt: skip
        if variant.blocks is not None:
            grads = key_gradient(grads, k_tile, v_tile, q, saved, q_seq, at, schedule, variant,
                                 scale, SCATTERED, TILE)  # fmt: skip
    used = (columns < k_span.length)[:, None]
    grad_k, grad_v = (tl.where(used, grads.k * (scale.natural * rescale(variant)), 0.0),
                      tl.where(used, grads.v * rescale(variant), 0.0))  # fmt: skip
    store_tile(dk, grad_k, tokens(dk, k_seq, k_span, kv_head), k_seq, k_span, first, BLOCK_N,
               TILE.dim, TILE.padded)  # fmt: skip
    store_tile(dv, grad_v, tokens(dv, k_seq, k_span, kv_head), k_seq, k_span, first, BLOCK_N,
               TILE.dim_v, TILE.padded_v)  # fmt: skip
