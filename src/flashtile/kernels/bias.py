"""The gradient of an additive bias: dS summed over the dimensions that the bias is broadcast in.

A program owns one tile of the bias and walks over the heads (and sequences) that share it, so the
sum is deterministic and nothing of the size of the scores is kept. A bias of one row is summed
over the tiles of queries as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.backward import load_query_tile, recompute, rescale, score_gradient
from flashtile.kernels.dropout import numbers_queries_by_keys, words_queries_by_keys
from flashtile.kernels.masks import At, key_range
from flashtile.kernels.numbers import number
from flashtile.kernels.scores import apply_with_slope
from flashtile.kernels.views import load_tile, open_sequence, tokens


class BiasShape(NamedTuple):
    """The bias and its gradient, contiguous (batches, heads, rows, columns) fp32; all opaque."""

    batches: Any
    heads: Any
    rows: Any
    columns: Any
    row_tiles: Any  # tiles of queries that a program walks over: 1, or all for a bias of one row


class Inputs(NamedTuple):
    q: Any  # TokenViews
    k: Any
    v: Any
    saved: Any
    q_seq: Any
    k_seq: Any


@triton.jit
def score_tile_gradient(ds, x, variant, scale, heads, batch, head, first_q, first_k,
                        TILE: tl.constexpr):  # fmt: skip
    """Add one head's dS of a tile (queries by keys) to `ds`. Slopes are those of the mods that come
    after the bias."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    q_span, k_span = open_sequence(x.q_seq, batch), open_sequence(x.k_seq, batch)
    r = key_range(variant.masks, first_q, first_q + BLOCK_M - 1, q_span, k_span)
    if (first_k < r.hi) & (first_k + BLOCK_N > r.lo):
        kv_head = head // number(heads.group)
        rows = first_q + tl.arange(0, BLOCK_M)
        columns = first_k + tl.arange(0, BLOCK_N)
        at = At(batch, head, first_q, first_k, rows[:, None], columns[None, :], q_span, k_span)
        own = load_query_tile(x.q, x.saved, x.q_seq, q_span, head, first_q, TILE)
        keys = load_tile(x.k, tokens(x.k, x.k_seq, k_span, kv_head), x.k_seq, k_span, first_k,
                         False, BLOCK_N, TILE.dim, TILE.padded)  # fmt: skip
        values = load_tile(x.v, tokens(x.v, x.k_seq, k_span, kv_head), x.k_seq, k_span, first_k,
                           False, BLOCK_N, TILE.dim_v, TILE.padded_v)  # fmt: skip
        numbers = ()
        if len(variant.dropouts) > 0:
            words = words_queries_by_keys(variant.dropouts[0], at, BLOCK_M, BLOCK_N)
            numbers = (numbers_queries_by_keys(words, BLOCK_M, BLOCK_N),)
        s = tl.dot(own.q, keys.T, input_precision=TILE.precision)
        dp = tl.dot(own.do, values.T, input_precision=TILE.precision)
        s, slope = apply_with_slope(variant.score_mods, s, at)
        p = recompute(s, own.lse2[:, None], at, variant, scale, False)
        ds += score_gradient(p, slope, dp, own.delta[:, None], variant, numbers)
    return ds


@triton.jit
def attention_backward_dbias(q, k, v, dbias, shape, saved, q_seq, k_seq, variant, scale,
                             heads, TILE: tl.constexpr):  # fmt: skip
    """One tile of dbias, over every (batch, head) that shares it."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    columns, rows = number(shape.columns), number(shape.rows)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    first_k, tile = tile % column_tiles * BLOCK_N, tile // column_tiles
    first_q, tile = tile % row_tiles * BLOCK_M, tile // row_tiles
    bias_head, bias_batch = tile % number(shape.heads), tile // number(shape.heads)
    head_step, batch_step = number(shape.heads), number(shape.batches)
    walk = number(shape.row_tiles)
    inputs = Inputs(q, k, v, saved, q_seq, k_seq)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(bias_batch, number(q_seq.batch), batch_step):
        for head in range(bias_head, number(heads.count), head_step):
            for i in range(walk):
                ds = score_tile_gradient(ds, inputs, variant, scale, heads, batch, head,
                                         first_q + i * BLOCK_M, first_k, TILE)  # fmt: skip
    ds *= rescale(variant)
    q_idx, k_idx = first_q + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_N)
    plane = (tl.cast(bias_batch, tl.int64) * number(shape.heads) + bias_head) * rows
    pointers = dbias + (plane + q_idx[:, None]) * columns + k_idx[None, :]
    if rows == 1:
        total = tl.sum(ds, 0)
        tl.store(dbias + plane * columns + k_idx, total, mask=k_idx < columns)
    else:
        tl.store(pointers, ds, mask=(q_idx < rows)[:, None] & (k_idx < columns)[None, :])
