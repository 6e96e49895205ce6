"""Rotary embedding against complex multiplication."""

from __future__ import annotations

import pytest
import torch

from flashtile.rotary import query_positions, rotate


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_is_a_complex_rotation(interleaved: bool, rotary_dim: int) -> None:
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    angle = torch.rand(30, rotary_dim // 2, dtype=torch.float64) * 6
    positions = torch.randint(0, 30, (2, 5))
    found = rotate(x, angle.cos(), angle.sin(), positions, interleaved)
    turning = x[..., :rotary_dim]
    pairs = (
        turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).mT
    ).contiguous()
    turned = torch.view_as_complex(pairs) * torch.polar(
        torch.ones(()).double(), angle[positions].unsqueeze(2)
    )
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else expected.mT.flatten(-2)
    torch.testing.assert_close(found[..., :rotary_dim], expected)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


def test_dtype_and_gradient() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    angle = torch.rand(9, 4)
    out = rotate(x, angle.cos(), angle.sin(), torch.arange(4)[None], True)
    assert out.dtype == torch.bfloat16
    dout = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dout)
    back = rotate(dout, angle.cos(), -angle.sin(), torch.arange(4)[None], True)
    torch.testing.assert_close(dx, back)


def test_positions_of_queries() -> None:
    start = torch.tensor([3, 10], dtype=torch.int32)
    assert query_positions(start, 3, True).tolist() == [[3, 4, 5], [10, 11, 12]]
    assert query_positions(start, 3, False).tolist() == [[3, 3, 3], [10, 10, 10]]
