"""Numbers as people read them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from flashtile.demo.results import largest_difference
from flashtile.demo.units import of_bytes, of_ratio, of_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (2**20 // 2, "0.5 MiB"),
        (33 * 2**20 + 1, "33 MiB"),
        (999 * 2**20, "999 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (1234 * 2**30, "1,234 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert of_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00123, "1.23 ms"), (0.5, "500 ms"), (4.5678, "4.57 s"), (300, "300 s")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert of_seconds(seconds) == text


def test_ratio() -> None:
    assert [of_ratio(x) for x in (0.54, 3.72, 13.4)] == ["0.54x", "3.7x", "13x"]


def test_a_loss_that_is_no_number_is_a_difference() -> None:
    """Wherever it is: `max` passes over what compares with nothing."""
    standard = SimpleNamespace(losses=[5.0, 4.0, 3.0])
    for at in range(3):
        losses = [math.nan if i == at else x for i, x in enumerate(standard.losses)]
        assert math.isnan(largest_difference(SimpleNamespace(losses=losses), standard))  # type: ignore[arg-type]
    assert largest_difference(SimpleNamespace(losses=[5.0, 4.5, 3.0]), standard) == 0.5  # type: ignore[arg-type]
