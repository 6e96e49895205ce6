"""Sums of dQ as integers: how they become dQ after the main kernel, and what is computed again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtile import plan, reference
from flashtile.api import normalise
from flashtile.backends import blocklists, triton
from flashtile.backends.hopper_backward import (
    Workspace,
    again_launch,
    finish_launch,
)
from flashtile.backends.launch import run
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile
from flashtile.kernels.hopper.again import TOGETHER, block_of
from flashtile.problem import Call, describe
from flashtile.testing import assert_within_budget
from flashtile.testing.functions import bending
from flashtile.testing.hopper_backward import (
    DIMS,
    ROOM,
    Work,
    begin,
    by_blocks,
    by_tokens,
    dense_work,
    gradient,
    in_their_order,
    like_lse,
    packed_work,
    prepared,
    units_of,
)
from flashtile.testing.interpreter import interpreted


def _row_numbers(units: Tensor) -> Tensor:
    """space.rows of (blocks, block_m) units."""
    rows = torch.full((len(units), 3, units.shape[1]), torch.nan)
    rows[:, 2] = units
    return rows.view(-1, units.shape[1])


def _least(call: Call, tile: HopperBackwardTile) -> int:
    """256 for one share, and as many times more as the errors of several are."""
    return math.ceil(256 * math.sqrt(-(-call.seqlen_k // tile.block_n)))


def _finished(call: Call, tile: HopperBackwardTile, sums: Tensor, units: Tensor,
              **more: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dq, coarse) of integers, and of units of each row."""
    acc, rows = in_their_order(sums, tile), _row_numbers(units)
    coarse = torch.full((len(sums),), 77, dtype=torch.int32)
    dq = torch.full_like(call.operands.q, torch.nan)
    run(finish_launch(call, tile, Workspace(rows=rows, acc=acc, coarse=coarse, **more), dq))
    return dq, coarse


FINISHED = [(64, 150, torch.float32), (96, 70, torch.float32), (128, 130, torch.float16),
            (256, 70, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize(("dim", "seqlen", "dtype"), FINISHED)
def test_multiples_of_units_become_gradients(
    dim: int, seqlen: int, dtype: torch.dtype, locked: bool
) -> None:
    """Of 0 where a row has none, or nobody has stored: that block's sums hold anything."""
    q, k = (torch.randn(2, seqlen, n, dim, dtype=dtype) for n in (4, 2))
    call = normalise(q, k, k, deterministic=True)
    tile = backward_tile(describe(call), True)
    blocks = triton.query_grid(call, tile.block_m)
    exponents = torch.randint(13, 31, (blocks, tile.block_m, 1))
    integers = torch.rand(blocks, tile.block_m, tile.padded).mul(2).sub(1).mul(2.0**exponents)
    sums = integers.int()
    units = 2.0 ** exponents[..., 0] * (1 + torch.rand(blocks, tile.block_m))
    units[:, ::7] = 0.0
    sums[:, ::7] = 0
    locks = torch.arange(blocks, dtype=torch.int32) % 3 if locked else None
    golden = torch.where(units == 0, 0.0, call.variant.softmax_scale / units.double())
    golden = sums * golden[..., None]
    if locks is not None:
        golden[locks == 0] = 0.0
    dq, coarse = _finished(call, tile, sums, units, locks=locks)
    few = locks == 0 if locks is not None else torch.zeros(blocks, dtype=torch.bool)
    assert coarse.equal(few.int())
    kind = torch.finfo(dtype)
    torch.testing.assert_close(dq.double(), by_tokens(golden, call, tile),
                               rtol=kind.eps / 2 + 3e-7, atol=kind.tiny * kind.eps)  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_which_blocks_are_coarse(dim: int, packed: bool) -> None:
    """One entry of enough units, whatever its sign and wherever, is enough for a row; rows without
    a gradient, or of units below 0, want none, and one without a number wants the block again."""
    work = packed_work(dim) if packed else dense_work(dim, seqlen=300)
    call, tile = work.call, work.tile
    blocks, least = triton.query_grid(call, tile.block_m), _least(call, tile)
    sums = torch.randint(-least + 1, least, (blocks, tile.block_m, tile.padded), dtype=torch.int32)
    columns = torch.randint(tile.dim, (blocks, tile.block_m, 1))
    signs = torch.randint(2, columns.shape, dtype=torch.int32) * 2 - 1
    sums.scatter_(2, columns, signs * least)
    units = torch.rand(blocks, tile.block_m) + 0.5
    wanted = torch.zeros(blocks, dtype=torch.int32)
    for block in range(blocks):
        row = int(torch.randint(tile.block_m, ()))
        few = sums[block, row].clamp(1 - least, least - 1)
        match block % 6:
            case 1:
                sums[block, row], wanted[block] = few, 1
            case 2:
                sums[block, row], units[block, row] = few, -units[block, row]
            case 3:
                sums[block, row], units[block, row] = 0, 0.0
            case 4:
                units[block, row], wanted[block] = torch.nan, 1
            case 5:
                sums[block], units[block] = 0, 0.0
    _, coarse = _finished(call, tile, sums, units)
    assert coarse.equal(wanted)
    for steep in (0, 1):
        _, coarse = _finished(call, tile, sums, units, steep=torch.tensor([steep]).int())
        assert coarse.equal(wanted | steep)


def _again(work: Work, space: Workspace, dq: Tensor) -> None:
    its_plan = plan.plan(describe(work.call), plan.Device.of(dq.device))
    run(again_launch(work.call, its_plan, work.tile, space, work.dout, dq))


COMPUTED: dict[str, dict[str, Any]] = {
    "causal": {},
    "wide": {"dim": 192, "dim_v": 128},
    "padded": {"dim": 96},
    "dlse": {"with_dlse": True},
    "mask": {"causal": False, "attn_mask": torch.arange(150 * 150).view(1, 1, 150, 150) % 7 > 3},
    "documents": {"document_ids": torch.arange(150) // 40},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.4},
    "window and dropout": {"dropout_p": 0.2, "window_size": (9, 3), "with_dlse": True},
    "function": {"score_mod": bending(torch.full((3,), 0.5))},
    "bias": {"bias": torch.arange(150.0).remainder(3).expand(1, 1, 150, 150)},
}


def _drawn(name: str) -> Work:
    """Of a number of blocks that programs of again do not share evenly."""
    if name == "packed":
        return packed_work(128, with_dlse=True)
    more = dict(COMPUTED[name])
    if (ids := more.get("document_ids")) is not None:
        more["document_ids"] = ids.expand(1, -1).contiguous()
    return dense_work(**{"dim": 64, "batch": 1, "heads": (3, 1), **more})


@pytest.mark.parametrize("name", [*COMPUTED, "packed"])
def test_coarse_blocks_and_no_others_are_computed_again(name: str) -> None:
    work = _drawn(name)
    space, tile = prepared(work), work.tile
    assert space.coarse is not None
    blocks = len(space.coarse)
    assert blocks % TOGETHER.value or name == "packed"
    space.coarse.copy_(torch.arange(blocks) % 5 % 2)
    space.coarse[-1] = 1
    dq = torch.full_like(work.call.operands.q, 77.0)
    _again(work, space, dq)
    coarse = space.coarse.view(-1, 1, 1).expand(-1, tile.block_m, tile.padded)
    wanted = torch.where(by_tokens(coarse, work.call, tile) > 0, work.golden, 77.0)
    torch.testing.assert_close(dq.double(), wanted, rtol=2e-5, atol=2e-5)


def test_again_where_no_block_is_coarse() -> None:
    work = dense_work(heads=(3, 1))
    space = prepared(work)
    assert space.coarse is not None
    dq = torch.full_like(work.call.operands.q, 77.0)
    _again(work, space._replace(coarse=torch.zeros_like(space.coarse)), dq)
    assert dq.eq(77.0).all()


def test_tiles_that_are_hidden_are_passed_over_again() -> None:
    """Of all rows, since values of them are no numbers."""
    with interpreted(16, 16, list_block=128):
        seen = torch.arange(300) % 7 > 1
        seen[128:256] = False
        work = dense_work(seqlen=300, batch=1, heads=(2, 1), causal=False, attn_mask=seen)
        codes = blocklists.classify(work.call)
        call = work.call._replace(operands=work.call.operands._replace(mask_blocks=codes))
        call.operands.v[:, 128:256] = torch.nan
        work = work._replace(call=call)
        space = prepared(work)
        assert units_of(work, space).isnan().all()
        assert space.coarse is not None
        dq = torch.full_like(call.operands.q, torch.nan)
        _again(work, space._replace(coarse=torch.ones_like(space.coarse)), dq)
        torch.testing.assert_close(dq.double(), work.golden, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 296, 300, 1000, 4096, 5555])
def test_every_block_is_somebodys(blocks: int) -> None:
    """Once; and neighbours are not one program's, nor are the same blocks of several heads."""
    programs = -(-blocks // TOGETHER.value)
    whose = {
        block_of.fn(program, programs, turn): program
        for program in range(programs)
        for turn in range(TOGETHER.value)
    }
    assert len(whose) == TOGETHER.value * programs
    assert set(range(blocks)) <= set(whose)
    for heads in (2, 8, 16, 64) if blocks > 1000 else ():
        for first in (0, 1):
            own = [whose[first + blocks // heads * head] for head in range(heads)]
            assert len(set(own)) == heads
    if blocks > 512:
        assert all(len({whose[n + i] for i in range(8)}) == 8 for n in range(blocks - 8))


def test_rows_of_no_numbers_stay_so() -> None:
    """Their block is computed again, in which they are NaN and the others are not."""
    work = dense_work(dim=64, batch=1, heads=(3, 1))
    work.dout[0, 40, 1, 7] = torch.nan
    dq = _sum_in_integers(work, prepared(work))[0]
    wrong = torch.zeros_like(dq, dtype=torch.bool)
    wrong[0, 40, 1] = True
    assert dq.isnan().equal(wrong)
    torch.testing.assert_close(dq[~wrong].double(), work.golden[~wrong], rtol=1e-5, atol=1e-5)


def _shares(work: Work) -> Tensor:
    """What each tile of keys adds to dQ before the factor, of a dense call: (tiles, *q.shape)."""
    q, k, v = (x.double() for x in work.call.operands[:3])
    batch, seqlen, heads, _ = q.shape
    scores = torch.zeros(batch, heads, seqlen, k.shape[1], dtype=torch.float64, requires_grad=True)
    out, _ = reference.attention(q, k, v, bias=scores, **work.keywords)
    (ds,) = torch.autograd.grad((out * work.dout).sum(), scores)
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    tiles = zip(ds.split(work.tile.block_n, -1), k.split(work.tile.block_n, 1), strict=True)
    return torch.stack([torch.einsum("bhij,bjhd->bihd", *pair) for pair in tiles])


def _sum_in_integers(work: Work, space: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, coarse, units), with what the main kernel does to shares in plain PyTorch. Every share
    and every sum has room."""
    call, tile, shares = work.call, work.tile, _shares(work)
    units = units_of(work, space)
    factors = units.nan_to_num(0.0)[..., None]
    integers = (like_lse(shares) * factors.double()).round().to(torch.int64)
    sums = integers.sum(0)
    for x in (*integers, sums):
        assert x.abs().le(ROOM * 1.001 + len(shares)).all()
    space.acc.copy_(in_their_order(by_blocks(sums.int(), call, tile), tile))
    if space.locks is not None:
        space.locks.fill_(1)
    dq = torch.full_like(call.operands.q, torch.nan)
    run(finish_launch(call, tile, space, dq))
    _again(work, space, dq)
    assert space.coarse is not None
    coarse = space.coarse.view(-1, 1, 1).expand(-1, tile.block_m, tile.padded)
    return dq, by_tokens(coarse, call, tile), units


OUTLIERS = ("q", "k", "v", "dout", "channel", "last")


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(seed=st.integers(0, 2**32 - 1), dims=st.sampled_from(DIMS), causal=st.booleans(),
       sizes=st.tuples(*[st.floats(-6.0, 6.0)] * 3), heat=st.floats(-6.0, 0.7),
       outliers=st.sets(st.sampled_from(OUTLIERS)))  # fmt: skip
def test_gradients_of_any_size(
    seed: int, dims: tuple[int, int], causal: bool, sizes: tuple[float, ...], heat: float,
    outliers: set[str],
) -> None:  # fmt: skip
    """Within the roundings of shares to units where those are enough, and as good as eager
    attention. Queries are as small as keys are large: beyond scores of 100 or so all that is left
    is lse's own rounding."""
    torch.manual_seed(seed)
    seqlen = 70 + seed % 160
    q, k = torch.randn(1, seqlen, 2, dims[0]), torch.randn(1, seqlen, 1, dims[0])
    v, dout = torch.randn(1, seqlen, 1, dims[1]), torch.randn(1, seqlen, 2, dims[1])
    token = int(torch.randint(seqlen, ()))
    q, k = q * 10.0 ** (heat - sizes[0]), k * 10.0 ** sizes[0]
    v, dout = v * 10.0 ** sizes[1], dout * 10.0 ** sizes[2]
    q[:, token] *= 10.0 if "q" in outliers else 1.0
    k[:, token // 2] *= 10.0 if "k" in outliers else 1.0
    v[:, token] *= 1e5 if "v" in outliers else 1.0
    dout[:, token] *= 1e4 if "dout" in outliers else 1.0
    k[..., 5] *= 30.0 if "channel" in outliers else 1.0
    v[:, -1] *= 1e3 if "last" in outliers else 1.0
    dq, coarse, work, units = _rounded(q, k, v, dout, causal)
    tiles = -(-seqlen // work.tile.block_n)
    unit = (1 / units.double().abs()).nan_to_num(0.0).transpose(1, 2)[..., None]
    step = tiles / 2 * work.call.variant.softmax_scale * unit
    error = (dq.double() - work.golden).abs()
    allowed = (1 + 1e-3) * step + 4 * torch.finfo(torch.float32).eps * work.golden.abs()
    assert (error <= allowed)[coarse == 0].all()
    _assert_as_good_as_eager(work, dq)


def _rounded(q: Tensor, k: Tensor, v: Tensor, dout: Tensor,
             causal: bool) -> tuple[Tensor, Tensor, Work, Tensor]:  # fmt: skip
    """(dq, coarse, work, units) of numbers that bfloat16 has."""
    q, k, v, dout = (x.bfloat16().float() for x in (q, k, v, dout))
    work = begin(q, k, v, dout=dout, causal=causal)
    dq, coarse, units = _sum_in_integers(work, prepared(work))
    return dq, coarse, work, units


def _assert_as_good_as_eager(work: Work, dq: Tensor) -> None:
    eager = gradient(work.call, work.dout.bfloat16(), None, torch.bfloat16, work.keywords)
    assert_within_budget(dq.bfloat16(), eager, work.golden, "dq", gradient=True)


def test_a_large_row_of_large_units() -> None:
    """The last row sees a large value, and has units enough; before it, a row that has more of the
    gradient than all others has a few, since it might have seen that value."""
    q, k, v, dout = (torch.randn(1, 70, n, 64) for n in (2, 1, 1, 2))
    v[:, -1] *= 1e8
    dout[:, 40] *= 1e10
    dq, _, work, _ = _rounded(q, k, v, dout, True)
    _assert_as_good_as_eager(work, dq)
