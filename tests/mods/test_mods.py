"""Mods and masks on tiles: derivatives by autograd, bounds by brute force."""

from __future__ import annotations

import pytest
import torch

from flashtile.mods import Alibi, Band, Bias, Documents, MaskTensor, Softcap, Tile

TILE = Tile(0, 2, 3, 7, 5, 9, 20, 31)


def test_softcap_derivative() -> None:
    s = (torch.randn(2, 3, 7, 9, dtype=torch.float64) * 4).requires_grad_()
    expected = torch.autograd.grad((2.5 * torch.tanh(s / 2.5)).sum(), s)[0]
    changed = s.detach().clone()
    mod = Softcap(2.5)
    mod.apply(changed, TILE)
    derivative = mod.derivative(changed, changed, TILE)
    assert derivative is not None
    torch.testing.assert_close(derivative, expected)


def test_alibi_by_definition() -> None:
    slopes, s = torch.rand(2, 3), torch.zeros(2, 3, 7, 9)
    Alibi(slopes).apply(s, TILE)
    for i in range(7):
        for j in range(9):
            distance = abs((i + 3) + 31 - 20 - (j + 5))
            torch.testing.assert_close(s[:, :, i, j], -slopes * distance)


@pytest.mark.parametrize("shape", [(1, 1, 1, 31), (1, 3, 20, 31), (2, 1, 20, 31), (2, 3, 1, 31)])
def test_bias_gradient_sums_over_broadcast_dimensions(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    s, ds = torch.randn(2, 2, 3, 7, 9, dtype=torch.float64).unbind()
    mod = Bias(bias.detach(), torch.zeros(shape, dtype=torch.float64))
    changed = s.clone()
    mod.apply(changed, TILE)
    full = bias.expand(2, 3, 20, 31)[:, :, 3:10, 5:14]
    torch.testing.assert_close(changed, (s + full).detach())
    (expected,) = torch.autograd.grad((full * ds).sum(), bias)
    mod.accumulate(ds, TILE)
    assert mod.grad is not None
    torch.testing.assert_close(mod.grad, expected)


@pytest.mark.parametrize("left", [-1, 0, 2, 9, 60])
@pytest.mark.parametrize("right", [-1, 0, 3, 11, 60])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(20, 31), (31, 20), (24, 24)])
@pytest.mark.parametrize("chunk", [0, 1, 8, 13, 60])
def test_band_bounds_and_elements(
    left: int, right: int, seqlen_q: int, seqlen_k: int, chunk: int
) -> None:
    band = Band(left, right, chunk)
    distance = torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    if chunk > 0:
        keys = torch.arange(seqlen_k)
        seen &= keys // chunk == (keys - distance) // chunk
    whole = band.visible(Tile(0, 1, 0, seqlen_q, 0, seqlen_k, seqlen_q, seqlen_k), torch.empty(0))
    assert torch.equal(torch.ones_like(seen) if whole is None else whole, seen)
    for row in range(0, seqlen_q, 8):
        for col in range(0, seqlen_k, 8):
            rows, cols = min(8, seqlen_q - row), min(8, seqlen_k - col)
            tile = Tile(0, 1, row, rows, col, cols, seqlen_q, seqlen_k)
            part = seen[row : row + rows, col : col + cols]
            visible = band.visible(tile, torch.empty(0))
            assert torch.equal(torch.ones_like(part) if visible is None else visible, part)
            assert (visible is None) == bool(part.all())
            lo, hi = band.key_range(tile)
            columns = seen[row : row + rows].any(0).nonzero().flatten().tolist()
            assert (lo, hi) == (columns[0], columns[-1] + 1) if columns else lo >= hi
            lo, hi = band.query_range(tile)
            lines = seen[:, col : col + cols].any(1).nonzero().flatten().tolist()
            assert (lo, hi) == (lines[0], lines[-1] + 1) if lines else lo >= hi


def test_documents_and_mask_tensors_are_sliced_by_the_tile() -> None:
    ids_q, ids_k = torch.randint(0, 3, (2, 20)), torch.randint(0, 3, (2, 31))
    seen = Documents(ids_q, ids_k).visible(TILE, torch.empty(0))
    assert seen is not None
    expected = ids_q[:, 3:10, None] == ids_k[:, None, 5:14]
    assert torch.equal(seen, expected[:, None])
    mask = torch.rand(1, 3, 20, 31) > 0.5
    assert torch.equal(MaskTensor(mask).visible(TILE, mask), mask[:, :, 3:10, 5:14])
