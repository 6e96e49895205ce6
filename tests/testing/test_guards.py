"""Canaries and poison show what they are there to show."""

from __future__ import annotations

import pytest
import torch

from flashtile.testing import fence, poisoned_allocations


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 6)])
def test_a_fenced_tensor_is_a_copy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    guard = fence(x)
    assert torch.equal(guard.tensor, x)
    guard.assert_unchanged()
    guard.tensor.mul_(2.0)
    guard.assert_canaries()
    with pytest.raises(AssertionError, match="x, or memory around it, was written"):
        guard.assert_unchanged("x")


@pytest.mark.parametrize("at", [0, 66, -1, 67 + 6])
def test_a_write_beside_the_tensor_is_seen(at: int) -> None:
    guard = fence(torch.randn(3, 6))
    guard.storage[at] = 1.0
    with pytest.raises(AssertionError, match="memory around k was written"):
        guard.assert_canaries("k")


def test_integers_have_canaries_too() -> None:
    guard = fence(torch.arange(6, dtype=torch.int32))
    guard.storage[0] = 0
    with pytest.raises(AssertionError, match="memory around"):
        guard.assert_canaries()


def test_fresh_memory_is_nan_inside_only() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_allocations():
        assert torch.empty(3, 5).isnan().all()
        assert torch.randn(2).new_empty(7).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before
