"""The Hopper backend's host side: forward with its tile counter; `hopper_backward` has the rest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import blocklists, operands, triton
from flashtile.backends.counters import counters_beside
from flashtile.backends.hopper_backward import backward, ragged_k, ragged_q, variant_with
from flashtile.backends.launch import Launch, processors, run
from flashtile.backends.operands import row_view
from flashtile.backends.replays import empty
from flashtile.backends.tensormaps import (
    folds,
    mapped,
    packed_map,
    ragged_map,
    slot_map,
    tensor_map,
)
from flashtile.hopper_decode_tiles import HopperDecodeTile
from flashtile.hopper_tiles import MOST_CAP, HopperTile
from flashtile.kernels import scores
from flashtile.kernels.forward import Heads, Variant
from flashtile.kernels.hopper import capped, layouts
from flashtile.kernels.hopper import forward as kernels
from flashtile.kernels.hopper.scheduler import Work
from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import Sequences
from flashtile.plan import Plan
from flashtile.problem import Call
from flashtile.strides import Steps

__all__ = ["backward", "forward"]

L2_BYTES = 32 * 2**20
"""What K and V of the heads whose tiles are taken together may fill: two thirds of an H200's L2."""

MOST_UNIT = 2.0**27
"""What scores may be counted in: the kernel's least maximum, -1e30 of it, must be finite."""

PAGE_COLUMNS = 64
"""Columns of a part of a page that is loaded at once (see `pages.load_part`)."""


def forward(call: Call, plan: Plan) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; rows of no sequence and rows that see no key are 0 and -inf."""
    empty_operand = 0 in (x.numel() for x in call.operands[:3])  # TMA has none
    if empty_operand or operands.score_unit(call) > MOST_UNIT:
        return triton.forward(call, plan)
    call = _mapped(call)
    q, v = call.operands.q, call.operands.v
    out = empty((*q.shape[:-1], v.shape[-1]), q)
    lse = empty(call.lse_shape, q, torch.float32)
    run(forward_launch(call, plan, out, lse))
    return out, lse


def forward_launch(call: Call, plan: Plan, out: Tensor, lse: Tensor) -> Launch:
    if plan.hopper is None:
        raise ValueError(f"plan.hopper is None; the plan is for the {plan.backend} backend")
    q, a = call.operands.q, operands.arguments(call)
    variant = _by_columns(call, variant_with(call, blocklists.by_queries(call)))
    tile = _fitting(plan.hopper, call, variant)
    if tile.bounded:
        variant = _by_polynomials(call, variant)
    k_seq, keys = key_maps(call, a.k_seq, tile)
    queries, outputs, heads, rows = _query_maps(call, out, a.heads, tile)
    grid = min(processors(q.device), triton.query_grid(rows, tile.block_m))
    return Launch(
        kernels.attention_forward, grid,
        (*queries, *keys, *outputs, row_view(lse), a.q_seq, k_seq, variant,
         call.operands.learnable_sink, a.scale, heads, _work(rows, tile), tile),
    )  # fmt: skip


def _fitting(tile: HopperTile, call: Call, variant: Variant) -> HopperTile:
    """The tile with the first block's maxima where a cap bounds all scores, and the dtype has the
    exponents."""
    capped = [mod.fn for mod in variant.score_mods] == [scores.softcap_approximate]
    small = capped and call.variant.softcap <= MOST_CAP
    return replace(tile, bounded=small and call.operands.q.dtype == torch.bfloat16)


def _by_polynomials(call: Call, variant: Variant) -> Variant:
    """With the polynomials for small scores behind a cap that bounds them."""
    (mod,) = variant.score_mods
    terms = capped.polynomials(mod.args[0], operands.score_unit(call) * operands.LOG2E)
    return variant._replace(score_mods=(mod._replace(args=(*mod.args, *terms)),))


def _by_columns(call: Call, variant: Variant) -> Variant:
    """With ALiBi, where it comes last and no query sees a key after it, added column by column."""
    mods = variant.score_mods
    if call.variant.window_right != 0 or not mods or mods[-1].fn is not scores.alibi:
        return variant
    last = mods[-1]._replace(fn=scores.alibi_columns)
    return variant._replace(score_mods=(*mods[:-1], last))


def _query_maps(
    call: Call, out: Tensor, heads: Heads, tile: HopperTile
) -> tuple[list[TensorDescriptor], list[TensorDescriptor], Heads, Call]:
    """Maps of q and out, the heads that tiles have, and the call whose tiles these are."""
    q, count = call.operands.q, layouts.ROWS.value
    if tile.pack == 1:
        queries = _maps(ragged_q(call), count, (q, tile.padded))
        return queries, _maps(call.varlen, count, (out, tile.padded_v)), heads, call
    kv_heads = call.operands.k.shape[-2]
    packed = q.as_strided((q.shape[0], q.shape[1] * tile.pack, kv_heads, 1), (0, 0, 0, 1))
    return (
        [packed_map(q, kv_heads, tile.pack, count, tile.padded)],
        [packed_map(out, kv_heads, tile.pack, count, tile.padded_v)],
        heads._replace(count=opaque(kv_heads)),
        call._replace(operands=call.operands._replace(q=packed)),
    )


def key_maps(
    call: Call, seq: Sequences, tile: HopperTile | HopperDecodeTile
) -> tuple[Sequences, list[TensorDescriptor]]:
    """The keys' sequences, and maps of k and v."""
    k, v = call.operands[1:3]
    rows, widths = tile.block_n, tile.widths
    if not call.held:
        return seq, _maps(ragged_k(call), rows, (k, widths[0]), (v, widths[1]))
    steps = Steps.of(k)
    columns = widths
    if call.sequences.block_table is not None:
        rows, columns = min(rows, k.shape[1]), (PAGE_COLUMNS, PAGE_COLUMNS)
    maps = [
        slot_map(x, rows, width, padded, steps)
        for x, width, padded in zip((k, v), columns, widths, strict=True)
    ]
    return seq._replace(steps=tuple(map(opaque, steps))), maps


def _maps(ragged: bool, rows: int, *tensors: tuple[Tensor, int]) -> list[TensorDescriptor]:
    """Tensor maps of one form for tensors and the widths of their tiles."""
    if ragged:
        return [ragged_map(x, rows, padded) for x, padded in tensors]
    folded = all(folds(x, padded) for x, padded in tensors)
    return [tensor_map(x, rows, padded, folded) for x, padded in tensors]


def _work(call: Call, tile: HopperTile) -> Work:
    q, k, v = call.operands[:3]
    pairs, together = q.shape[-2] * (1 if call.varlen else call.batch), 1
    if call.banded:
        # Longest first over as many heads as leave their K and V in L2.
        per_head = k.element_size() * call.seqlen_k * (k.shape[-1] + v.shape[-1])
        group = q.shape[-2] // k.shape[-2]
        together = heads_in_l2(pairs // group, L2_BYTES // max(1, per_head)) * group
    row_tiles = -(-call.seqlen_q // tile.block_m)
    counter = counters_beside(q, 2)
    return Work(counter, opaque(row_tiles), opaque(pairs), opaque(min(together, pairs)))


def heads_in_l2(heads: int, fitting: int) -> int:
    """How many of some heads are taken together, at most `fitting`, in groups of one size if twice
    as many at most make that: of 16 five at a time leave one to the end, whose longest tiles then
    wait for nobody. Simulated, causal, 16 heads of 3k to 33k tokens: 1.04 times the work as many as
    fit, 1.01 so; 12,345 tokens were measured at 1.15 (H200)."""
    if heads == 0:
        return 1
    least = -(-heads // max(1, min(fitting, heads)))
    return next(
        (heads // n for n in range(least, 2 * least + 1) if heads % n == 0), -(-heads // least)
    )


def _mapped(call: Call) -> Call:
    """The call with copies of those of q, k and v that TMA cannot read where they lie."""
    q, k, v = call.operands[:3]
    q, k, v = mapped(q, ragged_q(call)), mapped(k), mapped(v)
    return call._replace(operands=call.operands._replace(q=q, k=k, v=v))
