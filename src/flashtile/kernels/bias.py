"""The gradient of an additive bias: dS summed over the dimensions that the bias is broadcast in.

A program owns tiles of the bias and walks over the heads (and sequences) that share each, so the
sum is deterministic and nothing of the size of the scores is kept but the gradient. A bias of one
row is summed over the tiles of queries as well. Where there are few tiles several programs share
the walk of each, and what they leave is summed in one order.

Two products of a tile read four operands and leave nothing for the next tile, so that L2 limits
them: large tiles, of which shared memory has some dims at a time, in one loop over dims, heads and
tiles, whose loads run ahead of all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.backward import (
    recompute,
    rescale,
    score_gradient,
    unseeing_past_the_end,
)
from flashtile.kernels.dropout import numbers_queries_by_keys, words_queries_by_keys
from flashtile.kernels.masks import At, key_range, load_matrix, query_range
from flashtile.kernels.numbers import number
from flashtile.kernels.scores import apply_score_mods, apply_with_slope
from flashtile.kernels.views import (
    first_two,
    load_fours,
    open_sequence,
    tile_pointers,
    tokens,
)


class BiasShape(NamedTuple):
    """The bias (batches, heads, rows, columns), whose gradient is contiguous, and once for each
    part; opaque but for the columns, by whose alignment stores are wide."""

    batches: Any
    heads: Any
    rows: Any
    columns: Any
    parts: Any  # of the pairs of batch and head that share a tile, each with a sum of its own
    run: Any  # tiles beside each other that a program has
    ragged: Any = None  # present where sequences may differ in length, or in a user's ranges


class Bias(NamedTuple):
    view: Any  # MatrixView
    per_unit: Any  # 1 / unit of the scores


class BiasVariant(NamedTuple):
    """A `Variant`: `before` are the score mods before the bias, whose gradient is by the slopes of
    those after it."""

    before: Any
    score_mods: Any
    masks: Any
    dropouts: Any


class Inputs(NamedTuple):
    bias: Any
    q: Any  # TokenViews
    k: Any
    v: Any
    saved: Any
    q_seq: Any
    k_seq: Any
    heads: Any


class Pairs(NamedTuple):
    """The pairs of batch and head that share a plane of the bias, and a program's part of them."""

    first_batch: Any
    first_head: Any
    batch_step: Any
    head_step: Any
    heads: Any  # that share it
    begin: Any
    count: Any


class Terms(NamedTuple):
    """What makes dS of both products."""

    bias: Any  # (BLOCK_M, BLOCK_N), or (1, BLOCK_N), in its own dtype
    rows: Any  # (BLOCK_M, 4): lse2 and delta (see `Saved`)


class Sums(NamedTuple):
    """Of a tile (BLOCK_M, BLOCK_N)."""

    ds: Any
    s: Any  # the scores and dP of the pair at hand, as far as its dims have been multiplied
    dp: Any


@triton.jit
def open_pairs(shape, plane, part, q_seq, heads):
    bias_heads, batches = number(shape.heads), number(shape.batches)
    sharing = number(heads.count) // bias_heads
    count, parts = number(q_seq.batch) // batches * sharing, number(shape.parts)
    # The first ones have one more: count * part has more than 31 bits from 2^23 pairs on.
    own, more = count // parts, count % parts
    begin = part * own + tl.minimum(part, more)
    return Pairs(plane // bias_heads, plane % bias_heads, batches, bias_heads, sharing, begin,
                 own + (part < more).to(tl.int32))  # fmt: skip


@triton.jit
def pair_at(pairs, i):
    """(batch, head) of the i-th of a program."""
    pair = pairs.begin + i
    batch = pairs.first_batch + pair // pairs.heads * pairs.batch_step
    return batch, pairs.first_head + pair % pairs.heads * pairs.head_step


@triton.jit
def place(x, batch, head, first_q, first_k, TILE: tl.constexpr):
    q_span, k_span = open_sequence(x.q_seq, batch), open_sequence(x.k_seq, batch)
    rows, columns = first_q + tl.arange(0, TILE.block_m), first_k + tl.arange(0, TILE.block_n)
    return At(batch, head, first_q, first_k, rows[:, None], columns[None, :], q_span, k_span)


@triton.jit
def load_dims(x, seq, span, head, first, start, BLOCK: tl.constexpr, DIM: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    """(BLOCK, chunk): dims from `start` on of rows, 0 past the sequence's end and past DIM."""
    CHUNK: tl.constexpr = TILE.chunk
    WIDTH: tl.constexpr = TILE.chunk * TILE.chunks
    pointers = tile_pointers(x, tokens(x, seq, span, head) + start, seq, span, first, BLOCK, CHUNK)
    valid = (first + tl.arange(0, BLOCK) < span.length)[:, None]
    if DIM != WIDTH:
        valid = valid & (start + tl.arange(0, CHUNK) < DIM)[None, :]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def load_terms(x, at, TILE: tl.constexpr):
    rows = load_fours(x.saved.rows, at.q, at.head, at.first_q, False, TILE.block_m)
    return Terms(load_matrix(x.bias.view, at), rows)


@triton.jit
def tile_gradient(s, dp, terms, x, at, variant, scale, TILE: tl.constexpr):
    """dS of a tile from both products."""
    s = apply_score_mods(variant.before, s, at)
    s += terms.bias.to(tl.float32) * x.bias.per_unit
    s, slope = apply_with_slope(variant.score_mods, s, at)
    lse2, delta = first_two(terms.rows)
    lse2 = unseeing_past_the_end(lse2, at.first_q + tl.arange(0, TILE.block_m), at.q)
    p = recompute(s, lse2[:, None], at, variant, scale, False)
    numbers = ()
    if len(variant.dropouts) > 0:
        words = words_queries_by_keys(variant.dropouts[0], at, TILE.block_m, TILE.block_n)
        numbers = (numbers_queries_by_keys(words, TILE.block_m, TILE.block_n),)
    return score_gradient(p, slope, dp, delta[:, None], variant, numbers)


@triton.jit
def add_chunk(sums, x, at, chunk, variant, scale, TILE: tl.constexpr):
    """Multiply some dims of a pair, and after its last ones add its dS."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    kv_head, start = at.head // number(x.heads.group), chunk * TILE.chunk
    if TILE.chunks == 1:  # ahead of the products, which take as long
        terms = load_terms(x, at, TILE)
    queries = load_dims(x.q, x.q_seq, at.q, at.head, at.first_q, start, BLOCK_M, TILE.dim, TILE)
    keys = load_dims(x.k, x.k_seq, at.k, kv_head, at.first_k, start, BLOCK_N, TILE.dim, TILE)
    do = load_dims(x.saved.dout, x.q_seq, at.q, at.head, at.first_q, start, BLOCK_M, TILE.dim_v,
                   TILE)  # fmt: skip
    values = load_dims(x.v, x.k_seq, at.k, kv_head, at.first_k, start, BLOCK_N, TILE.dim_v, TILE)
    s, dp = sums.s, sums.dp
    # Cleared behind the last dims instead, ptxas would wait for every matrix instruction (C7515).
    s, dp = tl.where(chunk == 0, 0.0, s), tl.where(chunk == 0, 0.0, dp)
    s = tl.dot(queries, keys.T, s, input_precision=TILE.precision)
    dp = tl.dot(do, values.T, dp, input_precision=TILE.precision)
    ds = sums.ds
    if chunk == TILE.chunks - 1:
        if TILE.chunks > 1:
            terms = load_terms(x, at, TILE)
        ds += tile_gradient(s, dp, terms, x, at, variant, scale, TILE)
    return Sums(ds, s, dp)


@triton.jit
def no_sums(TILE: tl.constexpr):
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return Sums(zeros, zeros, zeros)


@triton.jit
def seen_tiles(x, variant, batch, first_q, TILE: tl.constexpr):
    """[lo, hi) of the tiles of keys that a tile of queries sees some of."""
    q_span, k_span = open_sequence(x.q_seq, batch), open_sequence(x.k_seq, batch)
    r = key_range(variant.masks, first_q, first_q + TILE.block_m - 1, q_span, k_span)
    return r.lo // TILE.block_n, tl.cdiv(r.hi, TILE.block_n)


@triton.jit
def store_gradient(base, ds, rows, columns, first_q, first_k, TILE: tl.constexpr):
    q_idx, k_idx = first_q + tl.arange(0, TILE.block_m), first_k + tl.arange(0, TILE.block_n)
    pointers = base + q_idx.to(tl.int64)[:, None] * columns + k_idx[None, :]
    tl.store(pointers, ds.to(base.dtype.element_ty),
             mask=(q_idx < rows)[:, None] & (k_idx < columns)[None, :])  # fmt: skip


@triton.jit
def attention_backward_dbias(q, k, v, bias, dbias, shape, saved, q_seq, k_seq, variant,
                             scale, heads, TILE: tl.constexpr):  # fmt: skip
    """A run of tiles of dbias, each over a part of the (batch, head) that share it."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    CHUNKS: tl.constexpr = TILE.chunks
    columns, rows, width = shape.columns, number(shape.rows), number(shape.run)
    column_tiles, row_tiles = tl.cdiv(columns, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    runs, planes = tl.cdiv(column_tiles, width), number(shape.batches) * number(shape.heads)
    tile = tl.program_id(0)
    begin, tile = tile % runs * width, tile // runs
    end = tl.minimum(begin + width, column_tiles)
    first_q, plane = tile % row_tiles * BLOCK_M, tile // row_tiles
    base = dbias + tl.cast(plane, tl.int64) * rows * columns
    pairs = open_pairs(shape, plane % planes, plane // planes, q_seq, heads)
    x = Inputs(bias, q, k, v, saved, q_seq, k_seq, heads)
    lo, hi = begin, end
    if shape.ragged is None:
        lo, hi = seen_tiles(x, variant, 0, first_q, TILE)
        lo = tl.minimum(tl.maximum(lo, begin), end)
        hi = tl.minimum(tl.maximum(hi, lo), end)
    sums = no_sums(TILE)
    for i in range(begin, lo):
        store_gradient(base, sums.ds, rows, columns, first_q, i * BLOCK_N, TILE)
    for i in range(hi, end):
        store_gradient(base, sums.ds, rows, columns, first_q, i * BLOCK_N, TILE)
    for i in range((hi - lo) * pairs.count * CHUNKS):
        chunk, step = i % CHUNKS, i // CHUNKS
        column_tile = lo + step // pairs.count
        batch, head = pair_at(pairs, step % pairs.count)
        at = place(x, batch, head, first_q, column_tile * BLOCK_N, TILE)
        if shape.ragged is None:
            sums = add_chunk(sums, x, at, chunk, variant, scale, TILE)
        else:
            seen_lo, seen_hi = seen_tiles(x, variant, batch, first_q, TILE)
            if (column_tile >= seen_lo) & (column_tile < seen_hi):
                sums = add_chunk(sums, x, at, chunk, variant, scale, TILE)
        if (chunk == CHUNKS - 1) & (step % pairs.count == pairs.count - 1):
            ds = sums.ds * rescale(variant)
            store_gradient(base, ds, rows, columns, first_q, column_tile * BLOCK_N, TILE)
            sums = Sums(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), sums.s, sums.dp)


@triton.jit
def attention_backward_dbias_row(q, k, v, bias, dbias, shape, saved, q_seq, k_seq, variant,
                                 scale, heads, TILE: tl.constexpr):  # fmt: skip
    """A tile of keys of the gradient of a bias of one row, over all queries of a part of the
    (batch, head) that share it."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    CHUNKS: tl.constexpr = TILE.chunks
    columns, planes = shape.columns, number(shape.batches) * number(shape.heads)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    first_k, plane = tl.program_id(0) % column_tiles * BLOCK_N, tl.program_id(0) // column_tiles
    pairs = open_pairs(shape, plane % planes, plane // planes, q_seq, heads)
    x = Inputs(bias, q, k, v, saved, q_seq, k_seq, heads)
    sums = no_sums(TILE)
    for i in range(pairs.count):
        batch, head = pair_at(pairs, i)
        q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
        r = query_range(variant.masks, first_k, first_k + BLOCK_N - 1, q_span, k_span)
        lo = r.lo // BLOCK_M
        for j in range(tl.maximum(tl.cdiv(r.hi, BLOCK_M) - lo, 0) * CHUNKS):
            at = place(x, batch, head, (lo + j // CHUNKS) * BLOCK_M, first_k, TILE)
            sums = add_chunk(sums, x, at, j % CHUNKS, variant, scale, TILE)
    total, k_idx = tl.sum(sums.ds, 0) * rescale(variant), first_k + tl.arange(0, BLOCK_N)
    pointers = dbias + tl.cast(plane, tl.int64) * columns + k_idx
    tl.store(pointers, total.to(dbias.dtype.element_ty), mask=k_idx < columns)
