"""The Hopper decode kernel's host side: launches whose grid and workspace depend on shapes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashtile.backends import operands
from flashtile.backends.counters import counters_beside
from flashtile.backends.hopper import key_maps
from flashtile.backends.launch import Launch, processors
from flashtile.backends.operands import row_view, token_view
from flashtile.backends.replays import make, workspace
from flashtile.backends.tensormaps import mapped
from flashtile.hopper_decode_tiles import PROGRAMS_PER_SM, HopperDecodeTile
from flashtile.kernels.hopper import decode as kernels
from flashtile.kernels.hopper.parts import Parts
from flashtile.kernels.numbers import opaque
from flashtile.problem import Call
from flashtile.quantize import scaled_by_token


def launches(call: Call, tile: HopperDecodeTile, out: Tensor, lse: Tensor) -> tuple[Launch, ...]:
    """The attention, and the merge of parts where a program does not do it alone."""
    q, k, v = call.operands[:3]
    call = call._replace(operands=call.operands._replace(k=mapped(k), v=mapped(v)))
    if tile.e4m3:
        tile = _with_scales(tile, call)
    a, variant = operands.arguments(call), operands.variant(call, True)
    k_seq, keys = key_maps(_in_pairs(call) if tile.e4m3 else call, a.k_seq, tile)
    grid = PROGRAMS_PER_SM * processors(q.device)
    work, sink = _work(call, tile, grid), call.operands.learnable_sink
    results = token_view(out), row_view(lse)
    attention = Launch(
        kernels.attention_decode, grid,
        (a.q, *keys, *results, a.q_seq, k_seq, variant, sink, a.scale, a.heads, work, tile),
    )  # fmt: skip
    if tile.alone:
        return (attention,)
    return attention, Launch(
        kernels.merge_parts, grid,
        (*results, a.q_seq, k_seq, variant.masks, sink, a.heads, work, tile),
    )  # fmt: skip


def _with_scales(tile: HopperDecodeTile, call: Call) -> HopperDecodeTile:
    k, v, batch = *call.operands[1:3], call.batch
    keys, values = call.operands.k_descale, call.operands.v_descale
    return replace(tile, scaled_keys=scaled_by_token(keys, k, batch),
                   scaled_values=scaled_by_token(values, v, batch))  # fmt: skip


def _in_pairs(call: Call) -> Call:
    """A call whose e4m3 keys and values are 16-bit elements of two dims."""
    k, v = (make(_as_pairs, x) for x in call.operands[1:3])
    return call._replace(operands=call.operands._replace(k=k, v=v))


def _as_pairs(x: Tensor) -> Tensor:
    return x.view(torch.bfloat16)


def _work(call: Call, tile: HopperDecodeTile, grid: int) -> kernels.Work:
    q, kv_heads = call.operands.q, call.operands.k.shape[-2]
    rows = operands.rows_of_a_tile(call, tile.block_m)
    counter = counters_beside(q, grid)
    shape = rows, 2 * grid
    outs, lses = workspace(q, ((*shape, tile.padded_v), torch.float32), (shape, torch.float32))
    return kernels.Work(opaque(kv_heads), Parts(outs, lses, opaque(rows), counter))
