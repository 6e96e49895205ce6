"""The forward mainloop: online softmax over the key blocks that a tile of queries sees.

Dao, "FlashAttention-2" (2023), algorithm 1, with the running maximum in base 2 and the scores'
unit folded into the exponential's one FMA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.dropout import drop_queries_by_keys
from flashtile.kernels.masks import At, key_range, visible
from flashtile.kernels.numbers import LN2, LOG2E, number
from flashtile.kernels.schedule import (
    PARTIAL,
    RUN,
    SCATTERED,
    block_count,
    block_start,
    schedule_tile,
)
from flashtile.kernels.scores import apply_score_mods
from flashtile.kernels.views import (
    interleave_heads,
    load_scales,
    load_tile,
    open_sequence,
    open_tile,
    row_pointers,
    store_tile,
    tokens,
)

V_SCALE_UNIT = tl.constexpr(256.0)
"""What V's scales are multiplied by where probabilities take them along, and the result is divided
by: largest values from 1e-3 to 65,504 neither leave fp16's range nor its full precision."""


class Variant(NamedTuple):
    """What a call does to its scores. Empty tuples cost nothing."""

    score_mods: Any = ()
    masks: Any = ()
    dropouts: Any = ()  # none or one
    blocks: Any = None  # BlockList of the masks, or None
    k_scale: Any = None  # ScaleView of an e4m3 K, or None
    v_scale: Any = None
    steep: Any = None  # of the Hopper backward: (1,) int32, see `hopper.units`
    tensors: Any = ()  # of the Hopper backward: none or one mask tensor, not in masks


class Scale(NamedTuple):
    natural: Any  # softmax_scale
    log2: Any  # what turns scores that have passed the score mods into log2 units


class Heads(NamedTuple):
    count: Any  # opaque, query heads
    group: Any  # opaque, query heads of a KV head


class Softmax(NamedTuple):
    m: Any  # (BLOCK_M,) running max, log2 units
    l: Any  # (BLOCK_M,) running sum
    acc: Any  # (BLOCK_M, PADDED_V) unnormalised output


@triton.jit
def start_softmax(sink, head, BLOCK_M: tl.constexpr, PADDED_V: tl.constexpr):
    """The state before any key: empty, or the sink's logit, a key without a value."""
    acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    if sink is None:
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        return Softmax(m, tl.zeros([BLOCK_M], tl.float32), acc)
    else:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink + head).to(tl.float32) * LOG2E
        return Softmax(m, tl.where(m == -float("inf"), 0.0, 1.0), acc)


@triton.jit
def softmax_step(state, s, unit, v, at, dropouts, TILE: tl.constexpr, v_scales=None):
    """Fold one block of scores and values into the state. v_scales: (BLOCK_N,), or None."""
    m = tl.maximum(state.m, tl.max(s, 1) * unit)
    anchor = tl.where(m == -float("inf"), 0.0, m)
    p = tl.math.exp2(s * unit - anchor[:, None])
    alpha = tl.math.exp2(state.m - anchor)
    l = state.l * alpha + tl.sum(p, 1)
    if v_scales is not None:
        p *= v_scales[None, :] * V_SCALE_UNIT
    p = p.to(v.dtype)
    if len(dropouts) > 0:
        p = drop_queries_by_keys(dropouts[0], p, at, TILE.block_m, TILE.block_n)
    acc = tl.dot(p, v, state.acc * alpha[:, None], input_precision=TILE.precision)
    return Softmax(m, l, acc)


@triton.jit
def attend(state, q, k, v, k_seq, at, schedule, variant, scale, kv_head,
           PART: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Fold one part of a schedule's blocks into the softmax state."""
    FULL: tl.constexpr = PART != PARTIAL
    BLOCK_N: tl.constexpr = TILE.block_n
    k_base, v_base = tokens(k, k_seq, at.k, kv_head), tokens(v, k_seq, at.k, kv_head)
    for i in range(block_count(schedule, PART)):
        first = block_start(variant.blocks, schedule, i, PART, BLOCK_N)
        here = At(at.batch, at.head, at.first_q, first, at.q_idx, first + at.k_idx, at.q, at.k)
        keys = load_tile(k, k_base, k_seq, at.k, first, FULL, BLOCK_N, TILE.dim, TILE.padded)
        s = tl.dot(q, keys.to(q.dtype).T, input_precision=TILE.precision)
        if variant.k_scale is not None:
            s *= load_scales(variant.k_scale, k_seq, at.k, kv_head, first, BLOCK_N)[None, :]
        s = apply_score_mods(variant.score_mods, s, here)
        if not FULL:
            s = tl.where(visible(variant.masks, here), s, -float("inf"))
        values = load_tile(v, v_base, k_seq, at.k, first, FULL, BLOCK_N, TILE.dim_v, TILE.padded_v)
        v_scales = None
        if variant.v_scale is not None:
            v_scales = load_scales(variant.v_scale, k_seq, at.k, kv_head, first, BLOCK_N)
        state = softmax_step(state, s, scale.log2, values.to(q.dtype), here, variant.dropouts,
                             TILE, v_scales)  # fmt: skip
    return state


@triton.jit
def attention_forward(q, k, v, out, lse, q_seq, k_seq, variant, sink, scale, heads,
                      TILE: tl.constexpr):  # fmt: skip
    """One tile of queries of one head: out and lse."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    count = number(heads.count)
    tile = interleave_heads(q_seq, count, tl.program_id(0), BLOCK_M)
    batch, head, first = open_tile(q_seq, count, tile, True, BLOCK_M)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    if (first < 0) | (first >= q_span.room):
        return
    rows = first + tl.arange(0, BLOCK_M)
    at = At(batch, head, first, 0, rows[:, None], tl.arange(0, BLOCK_N)[None, :], q_span, k_span)
    q_tile = load_tile(q, tokens(q, q_seq, q_span, head), q_seq, q_span, first, False, BLOCK_M,
                       TILE.dim, TILE.padded)  # fmt: skip
    seen = key_range(variant.masks, first, first + BLOCK_M - 1, q_span, k_span)
    schedule = schedule_tile(variant.blocks, seen, batch, head, first, q_span.length, BLOCK_N)
    state = start_softmax(sink, head, BLOCK_M, TILE.padded_v)
    kv_head = head // number(heads.group)
    state = attend(state, q_tile, k, v, k_seq, at, schedule, variant, scale, kv_head,
                   PARTIAL, TILE)  # fmt: skip
    state = attend(state, q_tile, k, v, k_seq, at, schedule, variant, scale, kv_head,
                   RUN, TILE)  # fmt: skip
    if variant.blocks is not None:
        state = attend(state, q_tile, k, v, k_seq, at, schedule, variant, scale, kv_head,
                       SCATTERED, TILE)  # fmt: skip
    empty = (state.l == 0.0) | (rows >= q_span.length)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, state.l))
    if len(variant.dropouts) > 0:
        factor *= variant.dropouts[0].rescale
    if variant.v_scale is not None:
        factor *= 1.0 / V_SCALE_UNIT
    row_lse = tl.where(empty, -float("inf"), (state.m + tl.math.log2(state.l)) * LN2)
    store_tile(out, state.acc * factor[:, None], tokens(out, q_seq, q_span, head), q_seq, q_span,
               first, BLOCK_M, TILE.dim_v, TILE.padded_v)  # fmt: skip
    tl.store(row_pointers(lse, q_span, head, rows), row_lse, mask=rows < q_span.room)
