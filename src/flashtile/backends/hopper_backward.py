"""The Hopper backward's host side: three launches, and the portable kernels for what it lacks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import operands, triton
from flashtile.backends.launch import Launch, run
from flashtile.backends.operands import row_view, token_view
from flashtile.backends.replays import empty
from flashtile.backends.tensormaps import folds, mapped, numbers_map, tensor_map
from flashtile.backends.torch import Gradients
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile, cannot_backward
from flashtile.kernels.forward import Heads
from flashtile.kernels.hopper import backward as kernels
from flashtile.kernels.hopper import layouts, prepare, query_gradients
from flashtile.kernels.numbers import opaque
from flashtile.plan import Plan
from flashtile.problem import Call, describe

L2_BYTES = 24 * 2**20
"""What dQ's fp32 sums of the heads whose tiles are taken together may fill: half of an H200's
L2."""

ROWS = layouts.ROWS.value
"""Keys of a warpgroup."""


class Workspace(NamedTuple):
    """What the three kernels pass on, linear in tokens. Queries are padded to whole blocks."""

    rows: Tensor  # (2 * query blocks, block_m) fp32: lse in log2 units, delta, lse, ...
    acc: Tensor  # (query blocks * block_m * padded / 256, 256) fp32: sums of dQ, in its own order


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
    and calls that want a part of dQ, dK and dV, are the portable backend's."""
    problem = describe(call)
    if not all(needs[:3]) or cannot_backward(problem, call.variant.deterministic) is not None:
        return triton.backward(call, plan, dout, dlse, out, lse, needs)
    q, k, v, dout = map(mapped, (*call.operands[:3], dout))
    call = call._replace(operands=call.operands._replace(q=q, k=k, v=v))
    tile = backward_tile(problem)
    space = workspace(call, tile, lse)
    wants_sink = needs[4] and call.operands.learnable_sink is not None
    shares = empty((triton.query_grid(call, tile.block_m),), lse) if wants_sink else None
    dq, dk, dv = (empty(x.shape, x) for x in call.operands[:3])
    run(prepare_launch(call, tile, space, out, dout, lse, dlse, shares))
    run(gradient_launch(call, tile, space, dout, dk, dv))
    run(finish_launch(call, tile, space, dq))
    dsink = None
    if shares is not None and (logits := call.operands.learnable_sink) is not None:
        dsink = triton.sink_gradient(call, logits, shares)
    return Gradients(dq, dk, dv, None, dsink)


def workspace(call: Call, tile: HopperBackwardTile, like: Tensor) -> Workspace:
    blocks = triton.query_grid(call, tile.block_m)
    rows = empty((2 * blocks, tile.block_m), like)
    return Workspace(rows, empty((blocks * tile.block_m * tile.padded // 256, 256), like))


def prepare_launch(
    call: Call, tile: HopperBackwardTile, space: Workspace, out: Tensor, dout: Tensor, lse: Tensor,
    dlse: Tensor | None, shares: Tensor | None,
) -> Launch:  # fmt: skip
    """Fill the workspace; this call's shares of dsink, if they are asked for."""
    return Launch(
        prepare.prepare_backward, triton.query_grid(call, tile.block_m),
        (token_view(out), token_view(dout), row_view(lse),
         triton.gradient_rows(dlse), space.rows, space.acc,
         None if shares is None else call.operands.learnable_sink, shares,
         operands.query_sequences(call), operands.arguments(call).heads, tile),
    )  # fmt: skip


def gradient_launch(
    call: Call, tile: HopperBackwardTile, space: Workspace, dout: Tensor, dk: Tensor, dv: Tensor
) -> Launch:
    """dK and dV, and the sums of dQ."""
    q, k, v = call.operands[:3]
    a, padded = operands.arguments(call), tile.padded
    return Launch(
        kernels.attention_backward, triton.key_grid(call, tile.block_n),
        (_heads_map(q, tile.block_m, padded), _heads_map(k, ROWS, padded),
         _heads_map(v, ROWS, padded), _heads_map(dout, tile.block_m, padded),
         numbers_map(space.rows, 1), numbers_map(space.acc, 16),
         _heads_map(dk, ROWS, padded), _heads_map(dv, ROWS, padded), (a.q_seq, a.k_seq),
         operands.variant(call, True), a.scale, _work(call, tile, a.heads), tile),
    )  # fmt: skip


def _heads_map(x: Tensor, rows: int, padded: int) -> TensorDescriptor:
    return tensor_map(x, rows, padded, folds(x, padded))


def finish_launch(call: Call, tile: HopperBackwardTile, space: Workspace, dq: Tensor) -> Launch:
    """dQ from its sums."""
    a = operands.arguments(call)
    return Launch(
        query_gradients.finish_query_gradient, triton.query_grid(call, tile.block_m),
        (space.acc, token_view(dq), a.q_seq, a.scale, a.heads, tile),
    )  # fmt: skip


def _work(call: Call, tile: HopperBackwardTile, opened: Heads) -> kernels.KeyWork:
    heads, kv_heads = call.operands.q.shape[-2], call.operands.k.shape[-2]
    pairs, together = call.batch * kv_heads, 1
    if call.banded:
        # Longest first over as many heads as leave their sums of dQ in L2.
        per_pair = 4 * tile.padded * call.seqlen_q * (heads // kv_heads)
        together = min(pairs, max(1, L2_BYTES // per_pair))
    tiles, blocks = -(-call.seqlen_k // tile.block_n), -(-call.seqlen_q // tile.block_m)
    return kernels.KeyWork(opaque(tiles), opaque(blocks), opaque(pairs), opaque(together), opened)
