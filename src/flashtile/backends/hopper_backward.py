"""The Hopper backward's host side: three launches or five; the portable kernels for the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import blocklists, operands, replays, triton
from flashtile.backends.launch import Launch, processors, run
from flashtile.backends.operands import row_view, token_view
from flashtile.backends.replays import empty, make
from flashtile.backends.tensormaps import folds, mapped, numbers_map, ragged_map, tensor_map
from flashtile.backends.torch import Gradients
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile, cannot_backward
from flashtile.kernels import masks, scores
from flashtile.kernels.forward import Heads, Variant
from flashtile.kernels.hopper import (
    again,
    hidden,
    layouts,
    matrices,
    prepare,
    query_gradients,
    units,
    words,
)
from flashtile.kernels.hopper import backward as kernels
from flashtile.kernels.hopper.key_tiles import KeyWork
from flashtile.kernels.numbers import opaque
from flashtile.kernels.schedule import BlockList
from flashtile.plan import Plan
from flashtile.problem import Call, describe
from flashtile.tiles import power_of_two

TILES_TOGETHER = 256
"""Tiles that are taken longest first before those of other heads follow: about two for each of an
H200's 132 SMs. Fewer, and CTAs end far apart; more, and dQ's sums leave L2. Of groups, whose tiles
have several heads' sums, half as many do as well (simulated, 32/8 heads, head dim 128: ends 0.5% to
1% apart), and gradients take 1.014 of those of MHA at 16k, not 1.024, 1.021 for 1.028 at 8k and
1.034 for 1.052 of 32/1 heads at 4k (H200)."""

LEAST_UNITS = 256
"""Units that the largest entry of a row of dQ has at least beside outliers, times the square root
of how many shares are rounded to one, and in fp16 four times as many: their errors are 2^-10 and
2^-12 of it then, rms. Those of dQ by default are 2^-9 and 2^-12 of a row's rms entry, which is a
third of its largest."""

FAR_ROWS = 2**31
"""Elements between the rows of a matrix from which products with them need 64 bits."""

MASK_UNIT = 16
"""Bytes of a mask's row that a thread loads at once."""

ROWS = layouts.ROWS.value
"""Keys of a warpgroup."""


class Workspace(NamedTuple):
    """What the kernels pass on, linear in tokens. Queries are padded to whole blocks."""

    rows: Tensor  # (2 | 3 * query blocks, block_m) fp32: lse in log2 units, delta, units, lse, ...
    acc: Tensor  # (query blocks * block_m * padded / 256, 256) fp32 or int32: sums of dQ
    counter: Tensor | None = None  # (1,) int32: see `key_tiles.KeyWork`
    locks: Tensor | None = None  # (query blocks,) int32: see `query_gradients.add_shares`
    bounds: Tensor | None = None  # (tiles of keys, 2) fp32: see `kernels.hopper.units`
    coarse: Tensor | None = None  # (query blocks,) int32: whether dQ is computed again
    steep: Tensor | None = None  # (1,) int32: whether all of it is
    order: Tensor | None = None  # (tiles of a head, 2) int32: see `key_tiles.KeyWork`


def backward(
    call: Call,
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients asked for: needs is (q, k, v, bias, learnable_sink). What the kernel cannot do,
    and calls that want dQ alone or only dK and dV, are the portable backend's; so is dbias."""
    problem, deterministic = describe(call), call.variant.deterministic
    empty_operand = 0 in (x.numel() for x in call.operands[:3])  # TMA has none
    # One of dQ alone, or without it, is one kernel of the portable backend's.
    several = needs[0] and (needs[1] or needs[2])
    if empty_operand or not several or cannot_backward(problem) is not None:
        return triton.backward(call, plan, dout, dlse, out, lse, needs)
    q, dout = (mapped(x, ragged_q(call)) for x in (call.operands.q, dout))
    k, v = (mapped(x, ragged_k(call)) for x in call.operands[1:3])
    call = call._replace(operands=call.operands._replace(q=q, k=k, v=v))
    tile = backward_tile(problem, deterministic)
    dq = empty(q.shape, q)
    space = workspace(call, tile, dq)
    wants_sink = needs[4] and call.operands.learnable_sink is not None
    shares = empty((triton.query_grid(call, tile.block_m),), lse) if wants_sink else None
    parts = parts_of_groups(
        triton.key_grid(call, tile.block_n), problem.group, processors(q.device)
    )
    if (codes := call.operands.mask_blocks) is not None and codes.shape[1] > 1:
        parts = problem.group  # each head has lists of its own
    dk, dv = (empty((*x.shape[:-2], x.shape[-2] * parts, x.shape[-1]), x) for x in (k, v))
    if tile.integers:
        run(bound_launch(call, tile, space))
    run(prepare_launch(call, tile, space, out, dout, lse, dlse, shares))
    run(gradient_launch(call, tile, space, dout, dk, dv))
    run(finish_launch(call, tile, space, dq))
    if tile.integers:
        run(again_launch(call, plan, tile, space, dout, dq))
    if parts > 1:
        dk, dv = (make(partial(_sum_of_parts, parts=parts), x) for x in (dk, dv))
    dsink = None
    if shares is not None and (logits := call.operands.learnable_sink) is not None:
        dsink = triton.sink_gradient(call, logits, shares)
    dbias = None
    if needs[3] and call.operands.bias is not None:
        alone = (False, False, False, True, False)
        dbias = triton.backward(call, plan, dout, dlse, out, lse, alone).bias
    return Gradients(dq, dk if needs[1] else None, dv if needs[2] else None, dbias, dsink)


def parts_of_groups(tiles: int, group: int, processors: int) -> int:
    """In how many parts the query heads of a KV head go, each with dK and dV of its own, which are
    summed at the end: as few as give each multiprocessor nearly two tiles (causal, 8k, 32/1 heads,
    head dim 128, simulated: 64 tiles take 4.1 times the ideal time, 256 in four parts 1.04)."""
    enough = [n for n in range(1, group) if group % n == 0 and 4 * n * tiles >= 7 * processors]
    return enough[0] if enough else group


def _sum_of_parts(x: Tensor, parts: int) -> Tensor:
    return x.unflatten(-2, (-1, parts)).sum(-2)


def variant_with(call: Call, blocks: BlockList | None) -> Variant:
    """A call's variant with a list of blocks, for a Gluon kernel."""
    variant = operands.variant(call, True, blocks)
    return variant._replace(
        dropouts=tuple(x._replace(multiply=words.multiply) for x in variant.dropouts)
    )


def backward_variant(call: Call, blocks: BlockList | None) -> Variant:
    """The same for a kernel whose scores are keys by queries."""
    variant = variant_with(call, blocks)
    return variant._replace(
        score_mods=tuple(map(added_within, variant.score_mods)),
        masks=tuple(x for x in variant.masks if x.fn is not masks.mask_tensor),
        tensors=tuple(tensor_apart(*x.args) for x in variant.masks if x.fn is masks.mask_tensor),
    )


def tensor_apart(view: masks.MatrixView) -> hidden.MaskTensor:
    """A mask tensor as the kernel loads it, apart from other masks."""
    steps = (view.stride_batch, view.stride_head, view.stride_q, view.ptr.shape[-1])
    units = all(n % MASK_UNIT == 0 for n in (view.ptr.data_ptr(), *steps))
    by_rows = (1,) if view.stride_k == 1 and units else ()
    return hidden.MaskTensor(view, far_rows(view), by_rows)


def far_rows(view: masks.MatrixView) -> tuple[int, ...]:
    """Whether the rows of a matrix lie far apart, as `matrices.load_within` takes it."""
    return (1,) if view.stride_q >= FAR_ROWS else ()


def added_within(mod: scores.ScoreMod) -> scores.ScoreMod:
    """A score mod as it is or, of one that adds a matrix, what does so there."""
    if mod.fn is not scores.add_matrix:
        return mod
    view, per_unit = mod.args
    return mod._replace(fn=matrices.add_matrix_within, args=(view, per_unit, far_rows(view)))


def workspace(call: Call, tile: HopperBackwardTile, dq: Tensor) -> Workspace:
    """Rows lie where dQ will, if there is room: what writes dQ at the end reads nothing of them but
    units, and 8 bytes a row are what made the memory of a backward more than FlashAttention-2's."""
    blocks = triton.query_grid(call, tile.block_m)
    sum_dtype = torch.int32 if tile.integers else torch.float32
    rows = (tile.row_numbers * blocks, tile.block_m), torch.float32
    in_dq = not tile.integers and math.prod(rows[0]) * 4 <= dq.nbytes
    space = Workspace(*replays.workspace(
        dq,
        None if in_dq else rows,
        ((blocks * tile.block_m * tile.padded // 256, 256), sum_dtype),
        ((1,), torch.int32) if tile.persistent else None,
        ((blocks,), torch.int32) if tile.locked else None,
        ((triton.key_grid(call, tile.block_n), 2), torch.float32) if tile.integers else None,
        ((blocks,), torch.int32) if tile.integers else None,
        ((1,), torch.int32) if tile.integers and call.variant.score_mod else None,
        ((tiles_of_a_head(call, tile), 2), torch.int32) if call.operands.k.dim() == 3 else None,
    ))  # fmt: skip
    return space._replace(rows=replays.within(dq, *rows)) if in_dq else space


def tiles_of_a_head(call: Call, tile: HopperBackwardTile) -> int:
    """Of all sequences; of packed ones as many as any lengths need."""
    return triton.key_grid(call, tile.block_n) // call.operands.k.shape[-2]


def prepare_launch(
    call: Call, tile: HopperBackwardTile, space: Workspace, out: Tensor, dout: Tensor, lse: Tensor,
    dlse: Tensor | None, shares: Tensor | None,
) -> Launch:  # fmt: skip
    """Fill the workspace; this call's shares of dsink, if they are asked for."""
    dropped, a = operands.dropouts(call, False), operands.arguments(call)
    packed = space.order is not None
    # Units take 134 registers a thread in as many warps as do without them: 55 -> 41 us at head dim
    # 64, 70 -> 67 at 128, 75 -> 68 at 256 (16k tokens of a hidden size of 2,048; H200).
    warps = _warps(tile) * (2 if tile.integers else 1)
    return Launch(
        prepare.prepare_backward, triton.query_grid(call, tile.block_m),
        (token_view(out), token_view(dout), row_view(lse),
         triton.gradient_rows(dlse), space,
         call.operands.learnable_sink if tile.integers or shares is not None else None, shares,
         a.q_seq, a.k_seq if packed or tile.integers else None,
         opaque(tiles_of_a_head(call, tile)) if packed else None, a.heads,
         dropped[0].rescale if dropped else None, tile), warps,
    )  # fmt: skip


def gradient_launch(
    call: Call, tile: HopperBackwardTile, space: Workspace, dout: Tensor, dk: Tensor, dv: Tensor
) -> Launch:
    """dK and dV, of as many parts of each KV head's group as they have heads for, and the sums of
    dQ."""
    q, k, v = call.operands[:3]
    a, padded, padded_v = operands.arguments(call), tile.padded, tile.padded_v
    queries = [_map(x, tile.block_m, n, ragged_q(call)) for x, n in ((q, padded), (dout, padded_v))]
    keys = [_map(x, ROWS, padded, ragged_k(call)) for x in (k, dk)]
    values = [_map(x, ROWS, padded_v, ragged_k(call)) for x in (v, dv)]
    parts = dk.shape[-2] // k.shape[-2]
    lists = blocklists.by_keys(call)
    work = _work(call, tile, parts)._replace(
        counter=space.counter, locks=space.locks, order=space.order
    )
    variant = backward_variant(call, lists)._replace(steep=space.steep)
    grid = triton.key_grid(call, tile.block_n) * parts
    return Launch(
        kernels.attention_backward, min(grid, processors(q.device)) if tile.persistent else grid,
        (queries[0], keys[0], values[0], queries[1], numbers_map(space.rows, 1),
         numbers_map(space.acc, 16), keys[1], values[1], (a.q_seq, a.k_seq),
         variant, a.scale, work, tile),
    )  # fmt: skip


def _map(x: Tensor, rows: int, padded: int, ragged: bool) -> TensorDescriptor:
    return ragged_map(x, rows, padded) if ragged else tensor_map(x, rows, padded, folds(x, padded))


def ragged_q(call: Call) -> bool:
    """Whether queries are read up to the end of a sequence that the device knows."""
    return call.varlen or call.sequences.seqused_q is not None


def ragged_k(call: Call) -> bool:
    """The same of keys."""
    s = call.sequences
    given = (s.cu_seqlens_k, s.seqused_k, s.cache_batch_idx, s.cache_leftpad)
    return any(x is not None for x in given)


def finish_launch(call: Call, tile: HopperBackwardTile, space: Workspace, dq: Tensor) -> Launch:
    """dQ from its sums."""
    a, factor = operands.arguments(call), 4 if dq.dtype == torch.float16 else 1
    least = math.ceil(factor * LEAST_UNITS * shares_of_a_block(call, tile) ** 0.5)
    return Launch(
        query_gradients.finish_query_gradient, triton.query_grid(call, tile.block_m),
        (space, token_view(dq), a.q_seq, a.scale, opaque(least), a.heads, tile), _warps(tile),
    )  # fmt: skip


def shares_of_a_block(call: Call, tile: HopperBackwardTile) -> int:
    """At most so many, as far as the host knows; of a window as many as it has tiles of keys."""
    left, right = call.variant.window_left, call.variant.window_right
    keys = call.seqlen_k
    if left >= 0 and right >= 0:
        keys = min(keys, left + right + tile.block_m + tile.block_n)
    return -(-keys // tile.block_n)


def bound_launch(call: Call, tile: HopperBackwardTile, space: Workspace) -> Launch:
    """Bounds of what a block's dQ may be."""
    a = operands.arguments(call)
    return Launch(
        units.bound_keys, triton.key_grid(call, tile.block_n),
        (a.k, a.v, space.bounds, a.k_seq, a.heads, tile),
    )  # fmt: skip


def again_launch(
    call: Call, plan: Plan, tile: HopperBackwardTile, space: Workspace, dout: Tensor, dq: Tensor
) -> Launch:
    """dQ of the blocks whose sums say too little. Four warps would spill 400 to 600 bytes."""
    assert plan.kernels is not None
    config = replace(plan.kernels.dq, block_q=tile.block_m, num_warps=8)
    a = operands.arguments(call)
    blocks = triton.query_grid(call, tile.block_m)
    return Launch(
        again.query_gradients_again, -(-blocks // again.TOGETHER.value),
        (a.q, a.k, a.v, token_view(dout), token_view(dq), space, opaque(blocks), a.q_seq, a.k_seq,
         operands.variant(call, plan.nvidia, blocklists.by_queries(call)), a.scale, a.heads,
         operands.tile(call, config, "ieee")),
        config.num_warps, config.num_stages,
    )  # fmt: skip


def _warps(tile: HopperBackwardTile) -> int:
    """Of the kernels over blocks of queries: 64 sums of dQ a thread."""
    return max(4, tile.block_m * tile.padded // (32 * 64))


def _work(call: Call, tile: HopperBackwardTile, parts: int) -> KeyWork:
    q, k = call.operands[:2]
    blocks = triton.query_grid(call, tile.block_m) // q.shape[-2]
    pairs, together = k.shape[-2] * parts, 1
    group = q.shape[-2] // pairs
    tiles = tiles_of_a_head(call, tile)
    if not call.varlen:
        blocks //= call.batch
    if k.dim() == 3:
        together = pairs  # a sequence's tiles of all heads, and then the next one's
    else:
        pairs, tiles = pairs * call.batch, tiles // call.batch
        if call.banded:
            together = min(pairs, heads_together(tiles, group))
    heads = Heads(opaque(q.shape[-2]), opaque(group))
    return KeyWork(
        opaque(tiles), opaque(blocks), opaque(pairs), opaque(together), heads,
        opaque(parts),
    )  # fmt: skip


def heads_together(tiles: int, group: int) -> int:
    """KV heads whose tiles, `tiles` of each, for a group of query heads, are taken longest first
    together: a power of two, so that the last ones are as many as the others (head dim 128, causal,
    simulated: 3 heads of 16 together end 4.5% after 4 do; one of eight, in groups of four query
    heads, 23%)."""
    enough = TILES_TOGETHER if group == 1 else TILES_TOGETHER // 2
    return power_of_two(-(-enough // tiles))
