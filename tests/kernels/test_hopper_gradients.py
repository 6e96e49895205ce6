"""What the Hopper backward does before and after its main kernel, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtile.api import normalise
from flashtile.backends import triton
from flashtile.backends.hopper_backward import Workspace, finish_launch, prepare_launch, workspace
from flashtile.backends.launch import run
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile
from flashtile.problem import Call, describe

SHAPES = [(48, 70), (64, 130), (96, 64), (128, 150)]


def _call(dim: int, seqlen: int) -> tuple[Call, HopperBackwardTile]:
    q, k = (torch.randn(2, seqlen, heads, dim) for heads in (4, 2))
    call = normalise(q, k, k, causal=True)
    return call, backward_tile(describe(call))


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, tokens) in whole blocks, zeros behind: (batch * heads * blocks, block)."""
    padding = -x.shape[-1] % block
    return torch.nn.functional.pad(x, (0, padding)).reshape(-1, block)


@pytest.mark.parametrize(("dim", "seqlen"), SHAPES)
def test_rows_are_prepared_block_by_block(dim: int, seqlen: int) -> None:
    """lse in base 2, +inf where there is nothing; delta with lse's own gradient; sums of zeros."""
    call, tile = _call(dim, seqlen)
    out, dout = torch.randn(2, 2, seqlen, 4, dim)
    lse, dlse = torch.randn(2, 2, 4, seqlen)
    lse[0, 1, 3] = -torch.inf
    space = workspace(call, tile, lse)
    for x in space:
        x.fill_(torch.nan)
    run(prepare_launch(call, tile, space, out, dout, lse, dlse, None))

    lse2, delta = space.rows.view(-1, 2, tile.block_m).unbind(1)
    there = _blocks(torch.ones(2, 4, seqlen), tile.block_m) == 1
    wanted = _blocks(lse / torch.log(torch.tensor(2.0)), tile.block_m)
    hidden = ~there | (wanted == -torch.inf)
    assert lse2[hidden].eq(torch.inf).all()
    torch.testing.assert_close(lse2[~hidden], wanted[~hidden])
    sums = (out * dout).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(delta, _blocks(sums, tile.block_m), rtol=1e-4, atol=1e-4)
    assert space.acc.eq(0).all()


def _as_threads_hold(share: Tensor) -> Tensor:
    """A (64, 64) share of dQ in the order in which a warpgroup stores it: row 16 w + 8 i + r and
    column 8 n + 2 c + j at (n, w, r, c, i, j)."""
    return share.reshape(4, 2, 8, 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(-1)


@pytest.mark.parametrize(("dim", "seqlen"), SHAPES)
def test_the_order_of_sums_is_undone(dim: int, seqlen: int) -> None:
    call, tile = _call(dim, seqlen)
    blocks = triton.query_grid(call, tile.block_m)
    sums = torch.randn(blocks, tile.block_m, tile.padded)
    along = 1 if tile.block_m == 128 else 2  # warpgroups own halves of the rows, or of the columns
    halves = [part for block in sums for part in block.chunk(2, along - 1)]
    acc = torch.stack([_as_threads_hold(half) for half in halves]).reshape(-1, 256)
    dq = torch.full_like(call.operands.q, torch.nan)
    run(finish_launch(call, tile, Workspace(acc, acc), dq))

    wanted = sums.view(2, 4, -1, tile.padded)[:, :, :seqlen, :dim].transpose(1, 2)
    torch.testing.assert_close(dq, wanted * call.variant.softmax_scale)
