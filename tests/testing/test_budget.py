"""The error budget itself: it passes eager's own noise and catches what a kernel gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashtile.testing import assert_within_budget


def _results(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    golden = torch.randn(4, 50, 3, 32, dtype=torch.float64)
    ulp = torch.finfo(dtype).eps
    eager, actual = (
        (golden + torch.randn_like(golden) * golden.abs() * ulp).to(dtype) for _ in range(2)
    )
    return actual, eager, golden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_passes_an_error_like_eagers(dtype: torch.dtype) -> None:
    assert_within_budget(*_results(dtype))


def test_catches_one_wrong_row() -> None:
    actual, eager, golden = _results()
    actual[2, 17, 1] += 0.15
    with pytest.raises(AssertionError, match="worst row's rms error"):
        assert_within_budget(actual, eager, golden)


def test_catches_one_wrong_element() -> None:
    actual, eager, golden = _results()
    actual[0, 0, 0, 0] += 0.5
    with pytest.raises(AssertionError, match="max error"):
        assert_within_budget(actual, eager, golden)


def test_catches_a_small_error_everywhere() -> None:
    actual, eager, golden = _results()
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(actual * 1.02, eager, golden)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_catches_what_is_not_finite(value: float) -> None:
    actual, eager, golden = _results()
    actual[1, 2, 0, 3] = value
    with pytest.raises(AssertionError, match=r"out\[1, 2, 0, 3\] is"):
        assert_within_budget(actual, eager, golden)


def test_infinities_must_agree() -> None:
    actual, eager, golden = _results()
    for x in (actual, eager, golden):
        x[0, 0] = -math.inf
    assert_within_budget(actual, eager, golden)
    actual[0, 0] = -1e30
    with pytest.raises(AssertionError, match="golden -inf"):
        assert_within_budget(actual, eager, golden)


def test_catches_a_wrong_shape() -> None:
    actual, eager, golden = _results()
    with pytest.raises(AssertionError, match="has shape"):
        assert_within_budget(actual[:, 1:], eager, golden)
