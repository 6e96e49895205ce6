"""What the Hopper backward does before and after its main kernel, in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.api import normalise
from flashtile.backends import triton
from flashtile.backends.hopper_backward import Workspace, finish_launch, prepare_launch
from flashtile.backends.launch import run
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile
from flashtile.problem import Call, describe
from flashtile.testing.hopper_backward import in_their_order, poisoned

SHAPES = [(48, 70), (64, 130), (96, 64), (128, 150), (192, 70), (256, 130)]
LENGTHS = ((70, 100), (0, 9), (129, 1), (128, 0), (1, 64))
"""Of packed queries and keys; 20 tokens of neither follow."""


def _call(
    dim: int, seqlen: int, dim_v: int | None = None, **given: Any
) -> tuple[Call, HopperBackwardTile]:
    q, k = (torch.randn(2, seqlen, heads, dim) for heads in (4, 2))
    call = normalise(q, k, torch.randn(2, seqlen, 2, dim_v or dim), causal=True, **given)
    return call, backward_tile(describe(call))


def _packed_call(dim: int) -> tuple[Call, HopperBackwardTile]:
    cu_seqlens = [
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
        for x in zip(*LENGTHS, strict=True)
    ]
    q, k = (
        torch.randn(int(cu[-1]) + 20, heads, dim)
        for cu, heads in zip(cu_seqlens, (4, 2), strict=True)
    )
    call = normalise(q, k, k, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1],
                     max_seqlen_q=129, max_seqlen_k=100)  # fmt: skip
    return call, backward_tile(describe(call))


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, tokens) in whole blocks, zeros behind: (batch * heads * blocks, block)."""
    padding = -x.shape[-1] % block
    return torch.nn.functional.pad(x, (0, padding)).reshape(-1, block)


@pytest.mark.parametrize(
    ("dim", "dim_v", "seqlen"), [*((dim, dim, n) for dim, n in SHAPES), (192, 128, 130)]
)
def test_rows_are_prepared_block_by_block(dim: int, dim_v: int, seqlen: int) -> None:
    """lse in base 2, +inf where there is nothing; delta with lse's own gradient, whatever that
    is where there is nothing; sums of zeros, or where the first share is stored locks of them."""
    call, tile = _call(dim, seqlen, dim_v)
    out, dout = torch.randn(2, 2, seqlen, 4, dim_v)
    lse, dlse = torch.randn(2, 2, 4, seqlen)
    lse[0, 1, 3], dlse[0, 1, 3] = -torch.inf, torch.nan
    space = poisoned(call, tile)
    run(prepare_launch(call, tile, space, out, dout, lse, dlse, None))

    lse2, delta = space.rows.view(-1, 2, tile.block_m).unbind(1)
    there = _blocks(torch.ones(2, 4, seqlen), tile.block_m) == 1
    wanted = _blocks(lse / torch.log(torch.tensor(2.0)), tile.block_m)
    hidden = ~there | (wanted == -torch.inf)
    assert lse2[hidden].eq(torch.inf).all()
    torch.testing.assert_close(lse2[~hidden], wanted[~hidden])
    sums = ((out * dout).sum(-1).transpose(1, 2) - dlse).where(lse > -torch.inf, 0.0)
    torch.testing.assert_close(delta, _blocks(sums, tile.block_m), rtol=1e-4, atol=1e-4)
    cleared = space.acc if space.locks is None else space.locks
    assert cleared.numel() > 0
    assert cleared.eq(0).all()


def test_probabilities_have_what_makes_up_for_dropout_as_a_factor() -> None:
    """A quarter is dropped: 4 / 3 of the rest, by lse, and delta without it."""
    call, tile = _call(64, 64, dropout_p=0.25)
    out, dout = torch.randn(2, 2, 64, 4, 64)
    lse, sink = torch.randn(2, 4, 64), torch.zeros(4)
    call = call._replace(operands=call.operands._replace(learnable_sink=sink))
    space, shares = poisoned(call, tile), torch.empty(triton.query_grid(call, tile.block_m))
    run(prepare_launch(call, tile, space, out, dout, lse, None, shares))

    lse2, delta = (x.view(2, 4, -1)[..., :64] for x in space.rows.view(-1, 2, 128).unbind(1))
    torch.testing.assert_close(torch.exp2(-lse2), 4 / 3 * torch.exp(-lse))
    sums = (out * dout).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta, 0.75 * sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        shares.view(2, 4), -(torch.exp(-lse) * sums).sum(-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dim", [64, 128])
def test_rows_of_packed_sequences_are_prepared(dim: int) -> None:
    """Sequence b owns the blocks from cu_seqlens[b] // block + b on, of every head."""
    call, tile = _packed_call(dim)
    total = call.operands.q.shape[0]
    out, dout = torch.randn(2, total, 4, dim)
    lse, dlse = torch.randn(2, 4, total)
    space = poisoned(call, tile)
    run(prepare_launch(call, tile, space, out, dout, lse, dlse, None))

    lse2, delta = space.rows.view(4, -1, 2, tile.block_m).unbind(2)
    sums = (out * dout).sum(-1).T - dlse
    start, hidden = 0, torch.ones_like(lse2, dtype=torch.bool)
    for b, (length, _) in enumerate(LENGTHS):
        for first in range(0, length, tile.block_m):
            block = start // tile.block_m + b + first // tile.block_m
            rows = slice(start + first, start + min(length, first + tile.block_m))
            n = rows.stop - rows.start
            torch.testing.assert_close(lse2[:, block, :n], lse[:, rows] / math.log(2.0))
            torch.testing.assert_close(delta[:, block, :n], sums[:, rows], rtol=1e-4, atol=1e-4)
            hidden[:, block, :n] = False
        start += length
    assert lse2[hidden].eq(torch.inf).all()
    assert space.acc.eq(0).all()


@pytest.mark.parametrize("dim", [128, 256])
def test_tiles_of_sequences_with_many_queries_come_first(dim: int) -> None:
    """The tokens of no sequence have the slots that are left."""
    call, tile = _packed_call(dim)
    total = call.operands.q.shape[0]
    out, lse = torch.randn(total, 4, dim), torch.randn(4, total)
    space = poisoned(call, tile)
    run(prepare_launch(call, tile, space, out, out, lse, None, None))
    keys = [(2, 1), (0, 100), (4, 64), (1, 9)]
    found = [[b, n] for b, length in keys for n in range(-(-length // tile.block_n))]
    assert space.order is not None
    left = len(space.order) - len(found)
    assert left > 0
    assert space.order.tolist() == found + [[len(LENGTHS), n] for n in range(left)]


def test_where_the_first_tile_stores_locks_are_cleared_rather_than_sums() -> None:
    call, tile = _call(64, 300)
    tile = replace(tile, adds="after the first", persistent=True)
    out, lse = torch.randn(2, 300, 4, 64), torch.randn(2, 4, 300)
    space = poisoned(call, tile)
    run(prepare_launch(call, tile, space, out, out, lse, None, None))
    assert space.locks is not None
    assert space.counter is not None
    assert space.locks.eq(0).all()
    assert space.counter.eq(0).all()
    assert space.acc.isnan().all()


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize(("dim", "seqlen"), SHAPES)
def test_the_order_of_sums_is_undone(dim: int, seqlen: int, locked: bool) -> None:
    """Sums that no tile has added to hold nothing: the block's dQ is 0."""
    call, tile = _call(dim, seqlen)
    blocks = triton.query_grid(call, tile.block_m)
    sums = torch.randn(blocks, tile.block_m, tile.padded)
    acc, locks = in_their_order(sums, tile), None
    if locked:
        locks = torch.arange(blocks, dtype=torch.int32) % 2
        acc.view(blocks, -1)[locks == 0] = torch.nan
        sums[locks == 0] = 0.0
    dq = torch.full_like(call.operands.q, torch.nan)
    run(finish_launch(call, tile, Workspace(acc, acc, None, locks), dq))

    wanted = sums.view(2, 4, -1, tile.padded)[:, :, :seqlen, :dim].transpose(1, 2)
    torch.testing.assert_close(dq, wanted * call.variant.softmax_scale)


@pytest.mark.parametrize("dim", [64, 128])
def test_sums_of_packed_sequences_become_gradients(dim: int) -> None:
    """And tokens of no sequence get what is summed for them, zeros."""
    call, tile = _packed_call(dim)
    sums = torch.randn(triton.query_grid(call, tile.block_m), tile.block_m, dim)
    wanted, start = torch.zeros_like(call.operands.q), 0
    by_head = sums.view(4, -1, tile.block_m, dim)
    for b, length in enumerate([x for x, _ in LENGTHS] + [20]):
        first = start // tile.block_m + b
        if b == len(LENGTHS):
            by_head[:, first:] = 0.0
        rows = by_head[:, first:].flatten(1, 2)[:, :length]
        wanted[start : start + length] = rows.transpose(0, 1) * call.variant.softmax_scale
        start += length
    acc = in_their_order(sums, tile)
    dq = torch.full_like(call.operands.q, torch.nan)
    run(finish_launch(call, tile, Workspace(acc, acc), dq))
    torch.testing.assert_close(dq, wanted)
