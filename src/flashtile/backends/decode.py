"""The decode kernels' host side: launches whose grids and workspace depend on shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashtile import config as switches
from flashtile.backends import hopper_decode, operands
from flashtile.backends.counters import counters_beside
from flashtile.backends.hopper import MOST_UNIT
from flashtile.backends.launch import Launch, processors, run
from flashtile.backends.operands import as_bytes, row_view, token_view
from flashtile.backends.replays import empty, make, workspace
from flashtile.decode_tiles import DecodeConfig
from flashtile.kernels import combine, parts, shares, widen
from flashtile.kernels import decode as kernels
from flashtile.kernels.config import DecodeTile
from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import TokenView
from flashtile.plan import Plan
from flashtile.problem import Call
from flashtile.quantize import scaled_by_token

MOST_PROGRAMS = 2**20
"""Of a launch whose parts the caller has fixed; with more parts a program does several."""

COMBINES = 8
"""Programs of the second launch that a multiprocessor has at least."""

MOST_ALONE = 40 * 1024
"""Elements of a tile's parts that one program merges, 4,096 at a time, each as long as it takes to
come from L2. More are merged by all, in a second launch: those of a sequence with one KV head are
264 where one with eight has 33 of each."""

SCANS = (32, 1024)
"""Sequences that a program looks at together: the first that holds the batch, or the last."""


def forward(
    call: Call,
    plan: Plan,
    out_dtype: torch.dtype | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; rows of no sequence and rows that see no key are 0 and -inf. out is in
    q's dtype, unless another is given. prefix: out, contiguous, and lse, in the call's shapes and
    fp32, of keys that all queries see besides."""
    q, v = call.operands.q, call.operands.v
    out = empty((*q.shape[:-1], v.shape[-1]), q, out_dtype)
    lse = empty(call.lse_shape, q, torch.float32)
    if plan.stream is not None and prefix is None and out_dtype is None and _streams(call):
        for launch in hopper_decode.launches(call, plan.stream, out, lse):
            run(launch)
    elif lse.numel() > 0:
        for launch in launches(call, plan, out, lse, prefix):
            run(launch)
    return out, lse


def _streams(call: Call) -> bool:
    """Whether nothing of a call, which depends on more than its metadata, keeps TMA from it."""
    return all(x.numel() > 0 for x in call.operands[:3]) and operands.score_unit(call) <= MOST_UNIT


def launches(
    call: Call,
    plan: Plan,
    out: Tensor,
    lse: Tensor,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Launch, ...]:
    """The attention, and the merge of what it had to split where a program does not do it alone."""
    if plan.decode is None:
        raise ValueError(f"plan.decode is None; the plan is for the {plan.backend} backend")
    config, a = plan.decode, operands.arguments(call)
    tile = _tile(call, config, plan.nvidia)
    variant, sink = operands.variant(call, plan.nvidia), call.operands.learnable_sink
    if call.quantized:
        a = a._replace(k=_bytes(a.k.ptr), v=_bytes(a.v.ptr))
    grid, work = _work(call, config, tile, plan.nvidia)
    if prefix is not None:
        work = work._replace(prefix=parts.Prefix(prefix[0], row_view(prefix[1])))
    results = token_view(out), row_view(lse)
    attention = Launch(
        kernels.attention_decode, grid,
        (a.q, a.k, a.v, *results, a.q_seq, a.k_seq, variant, sink, a.scale, a.heads, work, tile),
        config.num_warps, config.num_stages,
        max_registers=config.max_registers if plan.nvidia else None,
    )  # fmt: skip
    if tile.alone:
        return (attention,)
    merges = max(grid, COMBINES * processors(call.operands.q.device))
    return attention, Launch(
        combine.combine_parts, merges,
        (*results, a.q_seq, a.k_seq, variant.masks, sink, a.heads, work, tile),
    )  # fmt: skip


def _bytes(x: Tensor) -> TokenView:
    """An e4m3 tensor as kernels read it, two dims at a time."""
    return token_view(make(as_bytes, x))


def _tile(call: Call, config: DecodeConfig, nvidia: bool) -> DecodeTile:
    q, k, v = call.operands[:3]
    k_scale, v_scale = call.operands.k_descale, call.operands.v_descale
    tile = DecodeTile(
        config.block_m, config.block_n, q.shape[-1], v.shape[-1],
        "tf32" if switches.allow_tf32 else "ieee",
        page_size=k.shape[1] if call.sequences.block_table is not None else 0,
        scan=next((n for n in SCANS if call.batch <= n), SCANS[-1]),
        scaled_keys=scaled_by_token(k_scale, k, call.batch),
        scaled_values=scaled_by_token(v_scale, v, call.batch),
        latent=call.variant.latent, pairs=call.quantized,
    )  # fmt: skip
    return replace(tile, alone=nvidia and _merges_alone(call, config, tile))


def _merges_alone(call: Call, config: DecodeConfig, tile: DecodeTile) -> bool:
    """Whether one program merges the parts of a tile. In registers that are bounded it would spill
    in the loop over keys."""
    parted = call.variant.split_size or call.variant.num_splits
    if parted or config.max_registers is not None:
        return False
    several = _at_once(call, config) // call.operands.k.shape[-2] + 1  # of one sequence
    elements = several * operands.rows_of_a_tile(call, tile.block_m) * tile.padded_v
    return elements <= MOST_ALONE


def _at_once(call: Call, config: DecodeConfig) -> int:
    """Programs that the GPU holds."""
    return config.programs_per_sm * processors(call.operands.q.device)


def _work(
    call: Call, config: DecodeConfig, tile: DecodeTile, nvidia: bool
) -> tuple[int, kernels.Work]:
    """The grid, and how it shares the work."""
    q, variant, cut, size = call.operands.q, call.variant, None, None
    kv_heads = call.operands.k.shape[-2]
    at_once = grid = _at_once(call, config)
    blocks = -(-call.seqlen_k // tile.block_n)
    slots = 2 * grid
    if variant.split_size:
        size = min(-(-variant.split_size // tile.block_n), max(1, blocks))
        cut = shares.cut_every
        cuts = -(-blocks // size)
    elif variant.num_splits:
        cut, size = shares.cut_in, variant.num_splits
        cuts = min(blocks, size)
    if cut is not None and size is not None:
        slots = _tiles(call, tile.block_m) * max(1, cuts)
        grid = at_once * -(-min(MOST_PROGRAMS, slots) // at_once)
    rows = operands.rows_of_a_tile(call, tile.block_m)
    shape = slots, rows
    counter = None
    if tile.alone:
        counter = counters_beside(q, grid)
    return grid, kernels.Work(
        opaque(grid), opaque(kv_heads), opaque(rows),
        parts.Parts(*workspace(
            q, (shape, torch.float32), (shape, torch.float32),
            ((*shape, tile.padded_v), torch.float32), ((slots, 4), torch.int32),
            ((1,), torch.int64),
        ))._replace(counter=counter),
        cut, None if size is None else opaque(size),
        _widening(call, nvidia),
    )  # fmt: skip


def _widening(call: Call, nvidia: bool) -> Any:
    if not call.quantized:
        return None
    return widen.widen_at_once if nvidia else widen.widen


def _tiles(call: Call, block_m: int) -> int:
    """Of all KV heads of all sequences, at most."""
    q, kv_heads = call.operands.q, call.operands.k.shape[-2]
    group = q.shape[-2] // kv_heads
    if call.varlen:
        return kv_heads * (q.shape[0] * group // block_m + call.batch + 1)
    return kv_heads * call.batch * -(-q.shape[1] * group // block_m)
