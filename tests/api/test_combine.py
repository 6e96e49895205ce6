"""flash_attn_combine: attention over parts merges into attention over the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from flashtile import flash_attn_combine, flash_attn_func


def _parts(splits: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(2, n, 4, 16, dtype=dtype) for n in (7, 60, 60))
    cuts = [round(60 * i / splits) for i in range(splits + 1)]
    outs, lses = [], []
    for lo, hi in pairwise(cuts):
        out, lse = flash_attn_func(q, k[:, lo:hi], v[:, lo:hi], return_lse=True)
        outs.append(out.float())
        lses.append(lse.transpose(1, 2))
    whole, lse = flash_attn_func(q, k, v, return_lse=True)
    return torch.stack(outs), torch.stack(lses), whole, lse.transpose(1, 2)


@pytest.mark.parametrize("splits", [1, 2, 3, 13, 33])
def test_parts_merge_into_the_whole(splits: int) -> None:
    outs, lses, whole, lse = _parts(splits)
    found, found_lse = flash_attn_combine(outs, lses)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found_lse, lse)


def test_empty_parts_weigh_nothing() -> None:
    outs, lses, whole, lse = _parts(2)
    nothing = torch.full_like(outs[:1], 0.0)
    none = torch.full_like(lses[:1], -math.inf)
    found, found_lse = flash_attn_combine(torch.cat((nothing, outs)), torch.cat((none, lses)))
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found_lse, lse)
    both, both_lse = flash_attn_combine(torch.cat((nothing,) * 2), torch.cat((none,) * 2))
    assert both.eq(0).all()
    assert both_lse.eq(-math.inf).all()


def test_dtype_and_out() -> None:
    outs, lses, whole, _ = _parts(3)
    half, _ = flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, whole.to(torch.bfloat16))
    out = torch.full_like(whole, math.nan)
    found, _ = flash_attn_combine(outs, lses, out)
    assert found is out
    torch.testing.assert_close(out, whole)


def test_an_out_of_the_wrong_kind_is_named() -> None:
    outs, lses, whole, _ = _parts(3)
    with pytest.raises(TypeError, match=r"out is a list; it must be a torch\.Tensor"):
        flash_attn_combine(outs, lses, [whole])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"out has dtype torch\.int32; it must be floating"):
        flash_attn_combine(outs, lses, whole.int())
    with pytest.raises(ValueError, match=r"out is torch.float32 of shape \(1,\); it must be"):
        flash_attn_combine(outs, lses, torch.zeros(1))


def test_gradients() -> None:
    outs, lses, _, _ = _parts(3)
    outs, lses = outs[..., :2].double().requires_grad_(), lses.double().requires_grad_()
    small = (outs[:, :1, :2, :2], lses[:, :1, :2, :2])
    assert torch.autograd.gradcheck(flash_attn_combine, small)


def test_empty_unions_have_zero_gradients() -> None:
    """Rows of which every part is empty, beside rows of which one is."""
    outs, lses, _, _ = _parts(2)
    lses[:, 0] = -math.inf
    lses[0, 1] = -math.inf
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    out, lse = flash_attn_combine(outs, lses)
    assert out[0].eq(0).all()
    assert lse[0].eq(-math.inf).all()
    grads = torch.autograd.grad((out.sum() + lse[1].sum()), (outs, lses))
    for grad in grads:
        assert grad.isfinite().all()
        assert grad[:, 0].eq(0).all()
        assert grad[0, 1].eq(0).all()


def test_what_an_empty_part_holds_does_not_matter() -> None:
    outs, lses, whole, lse = _parts(2)
    garbage = torch.full_like(outs[:1], math.nan)
    none = torch.full_like(lses[:1], -math.inf)
    found, found_lse = flash_attn_combine(torch.cat((outs, garbage)), torch.cat((lses, none)))
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found_lse, lse)
    both, _ = flash_attn_combine(torch.cat((garbage,) * 2), torch.cat((none,) * 2))
    assert both.eq(0).all()
