"""Sums of dQ as integers: how many units are 1, row by row, before the main kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends.hopper_backward import Workspace
from flashtile.problem import Call
from flashtile.testing.functions import bending
from flashtile.testing.hopper_backward import (
    DIMS,
    ROOM,
    Work,
    begin,
    dense_work,
    like_lse,
    packed_work,
    prepared,
    units_of,
)


def _spans(call: Call) -> Iterator[tuple[Any, Any]]:
    """Where each sequence's tokens are in q, and in k."""
    seqs = call.sequences
    if seqs.cu_seqlens_q is None or seqs.cu_seqlens_k is None:
        for b in range(call.batch):
            used = None if seqs.seqused_k is None else int(seqs.seqused_k[b])
            yield (b,), (b, slice(used))
    else:
        ends = [[slice(*x) for x in pairwise(cu)]
                for cu in (seqs.cu_seqlens_q.tolist(), seqs.cu_seqlens_k.tolist())]  # fmt: skip
        yield from (((q,), (k,)) for q, k in zip(*ends, strict=True))


def _formula(work: Work) -> Tensor:
    """The bound of each row's sums, like lse: see `kernels.hopper.units`."""
    call = work.call
    rescale = 1.0 / (1.0 - call.variant.dropout_p)
    group = call.operands.q.shape[-2] // call.operands.k.shape[-2]
    delta = (work.out.double() * work.dout.double()).sum(-1)
    if work.dlse is not None:
        delta -= work.dlse.double().transpose(-1, -2)
    bound = torch.zeros_like(delta)
    for q, k in _spans(call):
        keys, values = (x[k].double() for x in call.operands[1:3])
        if len(keys) == 0:
            continue
        longest, most = values.norm(dim=-1).amax(0), keys.abs().amax((0, 2))
        longest, most = (x.repeat_interleave(group) for x in (longest, most))
        length = work.dout[q].double().norm(dim=-1)
        bound[q] = (length * rescale * longest + delta[q].abs()) * most * work.tile.steepest
    return bound.transpose(-1, -2) * _mass(work)


def _mass(work: Work) -> Tensor | float:
    """What rows' probabilities sum to, and a little more."""
    sink = work.call.operands.learnable_sink
    if sink is None:
        return 1.0
    taken = torch.exp(sink[:, None].double() - work.lse.double())
    return 1.0 - taken + 2.0**-14 + work.lse.double().abs() * 2.0**-21


def _assert_bounded(work: Work, space: Workspace) -> None:
    """Every row's sums have room, and not much more than the formula says."""
    units, seeing = units_of(work, space), work.lse > -torch.inf
    assert units[seeing].abs().gt(0).all()
    assert units[~seeing].eq(0).all()
    room = ROOM / units[seeing].double().abs()
    largest = like_lse(work.sums.abs()).amax(-1)[seeing]
    formula = _formula(work)[seeing]
    assert room.ge(largest).all()
    assert room.ge(formula * (1 - 1e-5)).all()
    assert room.le(formula * 1.01).all()


@pytest.mark.parametrize(("dim", "dim_v"), DIMS)
def test_units_leave_room_for_the_sums_of_every_row(dim: int, dim_v: int) -> None:
    work = dense_work(dim, dim_v)
    _assert_bounded(work, prepared(work))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_units_of_packed_sequences(dim: int) -> None:
    """Of the keys of a row's own sequence, and of no other tokens."""
    work = packed_work(dim, with_dlse=True)
    _assert_bounded(work, prepared(work))


CALLS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.4},
    "dropout and dlse": {"dropout_p": 0.4, "with_dlse": True},
    "dlse": {"with_dlse": True},
    "softcap": {"softcap": 1.5},
    "window": {"window_size": (9, 0)},
    "function": {"score_mod": bending(torch.full((4,), 0.1))},
    "sink": {"learnable_sink": torch.tensor([-3.0, 2.0, 9.0, 14.0]), "with_dlse": True},
    "few keys used": {"seqused_k": torch.tensor([131, 40], dtype=torch.int32)},
}


@pytest.mark.parametrize("name", CALLS)
def test_units_where_more_is_asked_for(name: str) -> None:
    work = dense_work(**CALLS[name])
    _assert_bounded(work, prepared(work))


def test_keys_that_are_not_in_use_do_not_count() -> None:
    """Not even where they are no numbers. Some rows see no key."""
    q, k, v = (torch.randn(2, 150, n, 128) for n in (4, 2, 2))
    used = torch.tensor([131, 40], dtype=torch.int32)
    for b, n in enumerate(used.tolist()):
        k[b, n:] = v[b, n:] = torch.nan
    work = begin(q, k, v, seqused_k=used, causal=True)
    assert work.lse.eq(-torch.inf).any()
    _assert_bounded(work, prepared(work))


def test_the_last_of_many_tiles_of_keys_counts() -> None:
    """More than are looked at together, of a sequence behind another."""
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(x, dtype=torch.int32)
                                  for x in ([0, 1, 2], [0, 40, 33_000]))  # fmt: skip
    q, k, v = torch.randn(2, 1, 64), *torch.randn(2, 33_000, 1, 64)
    k[-1, 0, 3], v[-1, 0, 5] = -1e4, 1e4
    work = begin(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                 max_seqlen_q=1, max_seqlen_k=32_960)  # fmt: skip
    _assert_bounded(work, prepared(work))
    assert _formula(work)[0, 1] > 1e5 * _formula(work)[0, 0]


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-12, 1e12, 1e20])
@pytest.mark.parametrize("dim", [128, 256])
def test_units_of_small_and_large_numbers(dim: int, size: float) -> None:
    """Squares that are too small for a float, and too large ones: the last bound is no number."""
    q, k, v = (torch.randn(1, 70, n, dim) for n in (2, 1, 1))
    work = begin(q, k, v, dout=size * torch.randn(1, 70, 2, dim), causal=True)
    units = units_of(work, prepared(work))
    if size == 1e20:
        assert units.isnan().all()
    else:
        room, formula = ROOM / units.double().abs(), _formula(work)
        assert room.ge(formula * (1 - 1e-5)).all()
        assert room.le(formula * 16).all()


@pytest.mark.parametrize("size", [2.0**-97, 2.0**80])
def test_bounds_whose_inverse_would_be_no_number(size: float) -> None:
    """Of rows of their own sizes: those without a number are just those out of range."""
    q, k, v = (torch.randn(1, 200, n, 64) for n in (2, 1, 1))
    dout = torch.randn(1, 200, 2, 64) * torch.exp2(torch.linspace(-6, 6, 200)).view(-1, 1, 1)
    work = begin(q / size, k * size, v, dout=dout)
    units, bound = units_of(work, prepared(work)), _formula(work)
    inside = (bound > 2.0**-90) & (bound < 2.0**90 / 1.01)
    outside = (bound < 2.0**-90 / 1.01) | (bound > 2.0**90)
    assert inside.any()
    assert outside.any()
    assert units[inside].abs().gt(0).all()
    assert units[outside].isnan().all()


def test_rows_without_a_gradient_have_no_units() -> None:
    """Neither dO nor delta; with dlse there is one of lse alone."""
    work = dense_work(dim=64, with_dlse=True)
    work.dout[0, 20:40, 1] = 0.0
    assert work.dlse is not None
    work.dlse[0, 1, 30:40] = 0.0
    units = units_of(work, prepared(work))
    none = torch.zeros_like(work.lse, dtype=torch.bool)
    none[0, 1, 30:40] = True
    assert units[none].eq(0).all()
    assert units[~none].abs().gt(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("what", ["dout", "out", "dlse", "lse"])
def test_rows_of_no_numbers(what: str, bad: float) -> None:
    """A row's own. lse is infinite where no key is seen."""
    work = dense_work(dim=128, with_dlse=True)
    wanted = torch.zeros_like(work.lse, dtype=torch.bool)
    wanted[1, 2, 77] = wanted[0, 0, 0] = True
    given = {"dout": work.dout, "out": work.out, "dlse": work.dlse, "lse": work.lse}[what]
    assert given is not None
    for b, h, i in wanted.nonzero().tolist():
        given[(b, h, i) if what in ("lse", "dlse") else (b, i, h, 50)] = bad
    units = units_of(work, prepared(work))
    if what == "lse" and not math.isnan(bad):
        assert units[wanted].eq(0).all()
    else:
        assert units[wanted].isnan().all()
    assert units[~wanted].abs().gt(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("what", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_and_values_of_no_numbers(packed: bool, what: int, bad: float) -> None:
    """All rows that see anything have them, of their sequence and KV head."""
    work = packed_work(128) if packed else dense_work(dim=256)
    x, wanted = work.call.operands[what], torch.zeros_like(work.lse, dtype=torch.bool)
    if packed:
        x[99, 1, 3] = bad
        wanted[2:, :70] = True
    else:
        x[1, 149, 1, 255] = bad
        wanted[1, 2:] = True
    units = units_of(work, prepared(work))
    assert units.isnan().equal(wanted)
    assert units[~wanted & work.lse.isfinite()].abs().gt(0).all()


@pytest.mark.parametrize("what", [1, 2], ids=["k", "v"])
def test_rows_may_be_of_few_units_where_no_key_is_far_from_the_others(what: int) -> None:
    """Below 0. With a token of 1e4 rows want some, but those of another sequence and KV head."""
    q, k, v = (torch.randn(2, 300, n, 64) for n in (4, 2, 2))
    work = begin(q, k, v, causal=True)
    assert units_of(work, prepared(work)).lt(0).all()
    (q, k, v)[what][1, 200, 1] *= 1e4
    work = begin(q, k, v, causal=True)
    units = units_of(work, prepared(work))
    assert units[0].lt(0).all()
    assert units[1, :2].lt(0).all()
    assert units[1, 2:, :200].gt(0).all()


@pytest.mark.parametrize("sink", [None, torch.tensor([5.0, 5.0])], ids=["alone", "sink"])
def test_how_far_from_a_row_keys_may_be_for_it_to_be_of_few_units(sink: Tensor | None) -> None:
    """256 times what is left of it."""
    q, k, v = torch.randn(1, 300, 2, 64), *torch.randn(2, 1, 300, 1, 64)
    v[:, 200], k[:, 270] = 10 * v[:, 200], 4 * k[:, 270]
    work = begin(q, k, v, causal=True, **({} if sink is None else {"learnable_sink": sink}))
    work.out.mul_(torch.logspace(-3, 1, 300).view(-1, 1, 1))
    units = units_of(work, prepared(work))
    tiles = [x.abs().max() for x in k.split(work.tile.block_n, 1)]
    far = v.norm(dim=-1).max() / work.out.norm(dim=-1) * max(tiles) / min(tiles)
    far = far.transpose(1, 2) * _mass(work)
    assert far.min() < 64
    assert far.max() > 1024
    assert units[far < 255].lt(0).all()
    assert units[far > 257].gt(0).all()


def test_scores_of_which_few_bits_are_behind_the_point() -> None:
    """Their probabilities may sum to more than 2."""
    work = dense_work()
    work.lse[0, 1, 5], work.lse[1, 2, 9], work.lse[1, 2, 10] = 2.0**20, -(2.0**21), 2.0**20 - 1
    units = units_of(work, prepared(work))
    assert units.isnan().nonzero().tolist() == [[0, 1, 5], [1, 2, 9]]


def test_in_fp16_gradients_of_scores_may_have_no_number() -> None:
    """And of half of the size they have."""
    q, k, v = (torch.randn(1, 70, n, 64, dtype=torch.float16) for n in (2, 1, 1))
    dout = torch.full((1, 70, 2, 64), 100.0)
    v[:, :, :, :] = 4.0
    dout[:, 30:] = 50.0
    work = begin(q, k, v, dout=dout)
    units = units_of(work, prepared(work))
    assert units[..., :30].isnan().all()
    assert units[..., 30:].abs().gt(0).all()
