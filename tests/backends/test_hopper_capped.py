"""The polynomials that stand for the tanh of capped scores."""

import math

import numpy as np
import pytest

from flashtile.kernels.hopper.capped import TANH, polynomials

TANH_APPROX = 2.0**-11
"""Relative error of the instruction that it replaces."""


def split(numbers: tuple[float, ...]) -> list[tuple[float, list[float]]]:
    """(square of the largest score, coefficients) of each polynomial, as the kernel takes them."""
    rest, found = np.array(numbers, np.float32).tolist(), []
    for terms in TANH:
        found.append((rest[0], rest[1 : 1 + len(terms)]))
        rest = rest[1 + len(terms) :]
    return found


@pytest.mark.parametrize("cap", [50.0, 0.05])
@pytest.mark.parametrize("scale", [0.125, -0.0884])
def test_they_are_as_exact_as_the_instruction(cap: float, scale: float) -> None:
    unit = cap * math.log2(math.e)
    for square, terms in split(polynomials(scale / cap, unit)):
        largest = math.sqrt(square)
        s = np.linspace(largest * 1e-6, largest, 100_001)
        y = s * np.polynomial.polynomial.polyval(s * s, terms)
        assert np.abs(y / (np.tanh(s * scale / cap) * unit) - 1).max() < 0.82 * TANH_APPROX


def test_the_next_one_reaches_further() -> None:
    (near, _), (far, _) = split(polynomials(0.01, 1.0))
    assert 0 < near < far


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e30, math.inf, math.nan])
def test_no_score_is_small_where_fp32_has_not_the_powers(rate: float) -> None:
    for square, terms in split(polynomials(rate, 1.0)):
        assert square < 0
        assert np.isfinite(terms).all()
