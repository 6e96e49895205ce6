"""Calls of the Hopper backward, for tests of what surrounds its main kernel in Triton's
interpreter. Imports triton."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import reference
from flashtile.api import normalise
from flashtile.backends import triton
from flashtile.backends.hopper_backward import Workspace, bound_launch, prepare_launch, workspace
from flashtile.backends.launch import run
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile
from flashtile.problem import Call, describe

LENGTHS = ((70, 100), (0, 9), (129, 1), (20, 0), (1, 64))
"""Of packed queries and keys; 20 tokens of neither follow."""

ROOM = 2.0**30
"""Units of a row's bound."""

DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


class Work(NamedTuple):
    """A call, and what its backward is given."""

    call: Call
    tile: HopperBackwardTile
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    golden: Tensor  # dQ in fp64
    keywords: dict[str, Any]  # the reference's

    @property
    def sums(self) -> Tensor:
        """dQ before the factor softmax_scale."""
        return self.golden / self.call.variant.softmax_scale


def gradient(
    call: Call, dout: Tensor, dlse: Tensor | None, dtype: torch.dtype, keywords: dict[str, Any]
) -> Tensor:
    """dQ by the reference in a dtype."""
    q = call.operands.q.clone().requires_grad_()
    out, lse = reference.attention(q, *call.operands[1:3], dtype=dtype, **keywords)
    finite = lse.isfinite()
    more = 0.0 if dlse is None else (lse[finite] * dlse[finite]).sum()
    (grad,) = torch.autograd.grad((out * dout).sum() + more, q)
    return grad


def begin(
    q: Tensor, k: Tensor, v: Tensor, *, dout: Tensor | None = None, with_dlse: bool = False,
    **keywords: Any,
) -> Work:  # fmt: skip
    """A call's forward and its dQ, from the reference in fp64."""
    call = normalise(q, k, v, deterministic=True, **keywords)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        keywords.pop(name, None)
    if call.operands.rng_state is not None:
        keywords["rng_state"] = call.operands.rng_state
    wide = call._replace(operands=call.operands._replace(q=q.double()))
    out, lse = reference.attention(q, k, v, **keywords)
    dout = torch.randn(out.shape) if dout is None else dout
    dlse = torch.randn(lse.shape) if with_dlse else None
    golden = gradient(wide, dout, dlse, torch.float64, keywords)
    tile = backward_tile(describe(call), True)
    return Work(call, tile, out.to(q.dtype), lse.float(), dout.to(q.dtype), dlse, golden, keywords)


def dense_work(
    dim: int = 64, dim_v: int | None = None, seqlen: int = 150, batch: int = 2,
    heads: tuple[int, int] = (4, 2), **given: Any,
) -> Work:  # fmt: skip
    """Of random numbers, causal unless that is given."""
    q, k = (torch.randn(batch, seqlen, n, dim) for n in heads)
    v = torch.randn(batch, seqlen, heads[1], dim_v or dim)
    return begin(q, k, v, **{"causal": True, **given})


def packed_work(dim: int = 64, **given: Any) -> Work:
    """What keys of no sequence hold is no number."""
    lengths = [torch.tensor(x) for x in zip(*LENGTHS, strict=True)]
    cu_seqlens = [torch.tensor([0, *x.cumsum(0)], dtype=torch.int32) for x in lengths]
    tokens_q, tokens_k = (int(x.sum()) + 20 for x in lengths)
    q, k, v = (torch.randn(*n, dim) for n in ((tokens_q, 4), (tokens_k, 2), (tokens_k, 2)))
    k[-20:] = v[-20:] = torch.nan
    return begin(q, k, v, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1],
                 max_seqlen_q=129, max_seqlen_k=100, **given)  # fmt: skip


def poisoned(call: Call, tile: HopperBackwardTile) -> Workspace:
    """A workspace that holds nothing of use."""
    space = workspace(call, tile, torch.empty_like(call.operands.q))
    for x in space:
        if x is not None:
            x.fill_(torch.nan if x.is_floating_point() else 77)
    return space


def prepared(work: Work) -> Workspace:
    """The workspace before the main kernel."""
    space = poisoned(work.call, work.tile)
    run(bound_launch(work.call, work.tile, space))
    run(prepare_launch(work.call, work.tile, space, work.out, work.dout, work.lse, work.dlse, None))
    return space


def places(call: Call, block: int) -> Tensor:
    """Of each row of lse, its place among the rows of all blocks."""
    heads, cu_seqlens = call.operands.q.shape[-2], call.sequences.cu_seqlens_q
    if cu_seqlens is None:
        rows = -(-call.operands.q.shape[1] // block) * block
        pairs = torch.arange(call.batch * heads).view(call.batch, heads, 1)
        return pairs * rows + torch.arange(call.operands.q.shape[1])
    total = call.operands.q.shape[0]
    slots = total // block + call.batch + 1
    ends = [*cu_seqlens.tolist(), total]
    own = [torch.arange(stop - start) + (start // block + b) * block
           for b, (start, stop) in enumerate(pairwise(ends))]  # fmt: skip
    return torch.arange(heads)[:, None] * slots * block + torch.cat(own)


def units_of(work: Work, space: Workspace) -> Tensor:
    """Those of lse's rows; what is in no row is 0."""
    found = space.rows.view(-1, 3, work.tile.block_m)[:, 2].reshape(-1).clone()
    at = places(work.call, work.tile.block_m)
    units = found[at]
    found[at] = 0.0
    assert found.eq(0).all()
    return units


def like_lse(x: Tensor) -> Tensor:
    """(..., tokens, heads, any) to (..., heads, tokens, any)."""
    return x.transpose(-3, -2)


def in_their_order(sums: Tensor, tile: HopperBackwardTile) -> Tensor:
    """(blocks, block_m, padded) sums of dQ as the main kernel leaves them: 64 x 64 shares, in which
    row 16 w + 8 i + r and column 8 n + 2 c + j are at (n, w, r, c, i, j). Warpgroups own halves of
    the rows of a block of 128, of the columns of one of 64."""
    shares = sums.unflatten(1, (-1, 64)).unflatten(3, (-1, 64)).transpose(2, 3)
    if tile.block_m == 128:  # block, g, s: a share of each warpgroup follows the other's
        shares = shares.transpose(1, 2)
    else:
        shares = shares[:, 0].unflatten(1, (2, -1)).transpose(1, 2)
    held = shares.reshape(-1, 4, 2, 8, 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    return held.reshape(-1, 256)


def by_blocks(x: Tensor, call: Call, tile: HopperBackwardTile) -> Tensor:
    """(..., heads, tokens, dim) as (blocks, block_m, padded), with zeros."""
    found = x.new_zeros(triton.query_grid(call, tile.block_m) * tile.block_m, tile.padded)
    found[places(call, tile.block_m), : x.shape[-1]] = x
    return found.view(-1, tile.block_m, tile.padded)


def by_tokens(blocks: Tensor, call: Call, tile: HopperBackwardTile) -> Tensor:
    """What blocks hold of each element of dQ."""
    rows = blocks.reshape(-1, tile.padded)[places(call, tile.block_m)]
    return rows[..., : tile.dim].transpose(-3, -2)
