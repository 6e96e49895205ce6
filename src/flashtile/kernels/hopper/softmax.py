"""Online softmax on a warpgroup's 64 queries, with the output one block behind the scores.

Dao, "FlashAttention-2" (2023), algorithm 1, and Shah et al., "FlashAttention-3" (2024), algorithm
2: while the exponentials of block j are taken, the tensor cores multiply block j - 1 by its values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashtile.kernels.hopper import barriers, layouts
from flashtile.kernels.hopper.block import by_columns, column_shift, drop_block, hide, modify
from flashtile.kernels.hopper.capped import capped_exponentials
from flashtile.kernels.hopper.channels import left_columns
from flashtile.kernels.numbers import LN2, LOG2E

LEAST = gl.constexpr(-1e30)
"""The maximum of a row that has seen nothing, in the units of scores: finite, so that no later step
must tell such a row from others."""

FLOOR = gl.constexpr(-24.0)
"""The least maximum of bounded scores, in log2 units: those of MOST_CAP are at most 2^96 above."""

GROWTH = gl.constexpr(8.0)
"""By how much, in log2 units, a maximum may grow before a lazy rescale: probabilities up to 256,
which keep their relative precision in either 16-bit format."""


class Softmax(NamedTuple):
    m: Any  # (64,) running max, units of scores
    l: Any  # (64, 4) running sums of each thread's columns
    acc: Any  # (64, PADDED_V) unnormalised output, without the last block
    p: Any  # (64, BLOCK_N) probabilities of the last block, 16 bits
    alpha: Any  # (64,) what acc is yet to be multiplied by (lazy rescale)
    grown: Any  # whether any row's is not 1


class Query(NamedTuple):
    """A (64, PADDED) tile of queries: its first columns in registers, all of them in shared
    memory."""

    registers: Any  # (64, TILE.q_registers), or the tile where there are none
    tile: Any


@gluon.jit
def load_query(tile, TILE: gl.constexpr):
    COLUMNS: gl.constexpr = TILE.q_registers
    layout: gl.constexpr = layouts.operand(layouts.accumulator(TILE.block_n))
    if COLUMNS == 0:
        return Query(tile, tile)
    elif TILE.padded == COLUMNS:
        return Query(tile.load(layout), tile)
    else:
        return Query(tile.slice(0, COLUMNS, dim=1).load(layout), tile)


@gluon.jit
def multiply_keys(query, keys, TILE: gl.constexpr):
    """Start Q K^T, (64, BLOCK_N) fp32.

    At head dim 256 both operands from shared memory would take 98% of its bandwidth: half of Q is
    in registers, 2.342M -> 2.182M cycles (H200, full, 8k).
    """
    BLOCK_N: gl.constexpr = TILE.block_n
    COLUMNS: gl.constexpr = TILE.q_registers
    LEFT: gl.constexpr = TILE.padded - COLUMNS
    s = gl.zeros([layouts.ROWS, BLOCK_N], gl.float32, layouts.accumulator(BLOCK_N))
    if COLUMNS == 0:
        return warpgroup_mma(query.tile, keys.permute((1, 0)), s, use_acc=False, is_async=True)
    elif LEFT == 0:
        return warpgroup_mma(query.registers, keys.permute((1, 0)), s, use_acc=False, is_async=True)
    else:
        near = keys.slice(0, COLUMNS, dim=1).permute((1, 0))
        rest = keys.slice(COLUMNS, LEFT, dim=1).permute((1, 0))
        s = warpgroup_mma(query.registers, near, s, use_acc=False, is_async=True)
        return warpgroup_mma(query.tile.slice(COLUMNS, LEFT, dim=1), rest, s, is_async=True)


@gluon.jit
def rescale(acc, alpha, grown, TILE: gl.constexpr):
    """acc * alpha. The lazy kind is skipped where no row's maximum grew: 1.287M -> 1.186M cycles at
    head dim 256 (H200, causal, 8k), a loss at 64 and 128."""
    rows: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.padded_v))
    if TILE.bounded:
        return acc
    elif TILE.lazy_rescale:
        if grown > 0:
            acc = acc * gl.convert_layout(alpha, rows)[:, None]
    else:
        acc = acc * gl.convert_layout(alpha, rows)[:, None]
    return acc


@gluon.jit
def row_maxima(s, shift):
    """Of s + shift, which is the same for all columns of a thread."""
    if shift is None:
        return gl.max(s, 1)
    else:
        partial = layouts.partial_row_maxima(s) + layouts.partial_row_maxima(shift)
        rows: gl.constexpr = layouts.rows_of(s.type.layout)
        return gl.convert_layout(gl.max(partial, 1), rows, assert_trivial=True)


@gluon.jit
def raise_maximum(old, s, shift, unit, TILE: gl.constexpr):
    """(new maxima, whether rows have to be rescaled)."""
    m, grown = gl.maximum(old, row_maxima(s, shift)), 0
    if TILE.lazy_rescale:
        grows = (m - old) * unit > GROWTH
        m = gl.where(grows, m, old)
        grown = gl.max(grows.to(gl.int32), 0)
    return m, grown


@gluon.jit
def first_maximum(s, shift, unit, TILE: gl.constexpr):
    """Of bounded scores these serve the whole row."""
    least = LEAST
    if TILE.bounded:
        least = FLOOR / unit
    return gl.maximum(row_maxima(s, shift), least)


@gluon.jit
def exponentials(s, m, shift, unit):
    if shift is None:
        return gl.exp2(s * unit - (m * unit)[:, None])
    else:
        return gl.exp2(s * unit - (m[:, None] - shift) * unit)


@gluon.jit
def decay(state, m, unit):
    """What goes before maxima rose to m is to be multiplied by."""
    return gl.exp2((state.m - m) * unit)  # from `m * unit` an FMA would keep -1e30's rounding


@gluon.jit
def add_sums(l, alpha, p, TILE: gl.constexpr):
    """Running sums with those of p."""
    if not TILE.bounded:
        l = l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None]
    return l + layouts.partial_row_sums(p)


@gluon.constexpr_function
def waits_ahead(dropouts, masks, mods, tile):
    """Whether a step ends with the wait for the next one's keys.

    ptxas moves the wait for the values' product above the exponentials wherever a block may be
    masked or has score mods, and at head dim 64. A branch keeps it from that: the wait for the next
    step's keys (H200, 16k: causal 64 and 128 3% faster; full 64 4%, full 128 2% slower).
    """
    return len(dropouts) == 0 and (len(masks) + len(mods) > 0 or tile.padded == 64)


@gluon.jit
def start_softmax(query, ring, places, i, following, place, rows, variant, unit,
                  TILE: gl.constexpr):  # fmt: skip
    """The first block, item i: its scores alone. Where steps wait ahead, the item that follows has
    come at the end."""
    keys = ring.wait(i)
    if variant.blocks is not None:
        place = places.get(i)
    s = warpgroup_mma_wait(0, deps=[multiply_keys(query, keys, TILE)])
    ring.release(i)
    s = modify(s, variant, rows, place, True, TILE)
    columns: gl.constexpr = by_columns(variant.score_mods)
    shift = column_shift(variant, rows, place, TILE) if columns else None
    m = first_maximum(s, shift, unit, TILE)
    p = exponentials(s, m, shift, unit)
    sums = layouts.partial_row_sums(p)
    p = drop_block(p, keys.dtype, variant, rows, place, TILE)
    acc: gl.constexpr = layouts.accumulator(TILE.padded_v)
    PADDED: gl.constexpr = TILE.padded_v
    one = gl.inline_asm_elementwise(
        "mov.b32 $0, 0x3f800000;", "=f,f", [m], dtype=gl.float32, is_pure=False, pack=1
    )
    if waits_ahead(variant.dropouts, variant.masks, variant.score_mods, TILE):
        ring.wait(following)
    return Softmax(
        m, sums, gl.zeros([layouts.ROWS, PADDED], gl.float32, acc),
        layouts.as_operand(p, keys.dtype, TILE.padded_v), one, 0,
    )  # fmt: skip


@gluon.jit
def weigh(s, state, variant, rows, place, unit, TILE: gl.constexpr):
    """(probabilities of a block's scores, new maxima, what goes before them is to be multiplied by,
    whether that is not 1)."""
    if TILE.bounded:
        p = capped_exponentials(s, state.m, variant.score_mods[0].args, unit)
        return hide(p, variant, rows, place, TILE), state.m, state.alpha, 0
    else:
        s = modify(s, variant, rows, place, False, TILE)
        columns: gl.constexpr = by_columns(variant.score_mods)
        shift = column_shift(variant, rows, place, TILE) if columns else None
        m, grown = raise_maximum(state.m, s, shift, unit, TILE)
        # ptxas orders the loop by what is first. H200, 16k, head dim 128: with the decay causal is
        # 2% slower; full is 5% faster, if the loop has no wait for the second item before it.
        if waits_ahead(variant.dropouts, variant.masks, variant.score_mods, TILE):
            p = exponentials(s, m, shift, unit)
            alpha = decay(state, m, unit)
        else:
            alpha = decay(state, m, unit)
            p = exponentials(s, m, shift, unit)
        return p, m, alpha, grown


@gluon.jit
def softmax_step(state, query, ring, places, i, place, rows, variant, unit,
                 WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Scores of the next block, item i of the ring, and values of the last, item i + 1."""
    AHEAD: gl.constexpr = waits_ahead(variant.dropouts, variant.masks, variant.score_mods, TILE)
    keys = ring.tile(i) if AHEAD else ring.wait(i)
    if variant.blocks is not None:
        place = places.get(i)
    barriers.wait_turn(WARPGROUP, TILE)
    s_token = multiply_keys(query, keys, TILE)
    acc = state.acc
    if TILE.lazy_rescale:
        acc = rescale(acc, state.alpha, state.grown, TILE)
    values = left_columns(ring.wait(i + 1), TILE.padded_v)
    acc_token = warpgroup_mma(state.p, values, acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_token])
    barriers.pass_turn(WARPGROUP, TILE)
    ring.release(i)
    if AHEAD:  # or ptxas moves both arrivals behind 40 exponentials
        s = warpgroup_mma_wait(1, deps=[s])
    p, m, alpha, grown = weigh(s, state, variant, rows, place, unit, TILE)
    l = add_sums(state.l, alpha, p, TILE)
    p = drop_block(p, keys.dtype, variant, rows, place, TILE)
    if AHEAD:
        ring.wait(i + 2)
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    p = layouts.as_operand(p, keys.dtype, TILE.padded_v)
    ring.release(i + 1)
    if not TILE.lazy_rescale:
        acc = rescale(acc, alpha, grown, TILE)
    return Softmax(m, l, acc, p, alpha, grown)


@gluon.jit
def last_values(state, ring, i, TILE: gl.constexpr):
    """Start the last block's product with its values, item i."""
    acc = state.acc
    if TILE.lazy_rescale:
        acc = rescale(acc, state.alpha, state.grown, TILE)
    values = left_columns(ring.wait(i), TILE.padded_v)
    return warpgroup_mma(state.p, values, acc, is_async=True)


@gluon.jit
def finish_softmax(state, sink, dropouts, head, unit):
    """(what the output is to be multiplied by, lse), each (64,). A sink is a key without a value,
    which joins here."""
    l = gl.convert_layout(gl.sum(state.l, 1), state.m.type.layout)
    m = state.m * unit
    factor = 1.0
    if sink is not None:
        logit = gl.load(sink + head).to(gl.float32) * LOG2E
        top = gl.maximum(m, logit)
        factor = gl.exp2(gl.minimum(m - top, 0.0))  # an FMA may keep the rounding of -1e30
        l = l * factor + gl.exp2(logit - top)
        m = top
    if len(dropouts) > 0:
        factor = factor * dropouts[0].rescale
    empty = l == 0.0
    factor = gl.where(empty, 0.0, factor / gl.where(empty, 1.0, l))
    return factor, gl.where(empty, -float("inf"), (m + gl.log2(l)) * LN2)
