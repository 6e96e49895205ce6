"""The dropout contract: Philox itself, its statistics, and one mask for every tile."""

from __future__ import annotations

import math

import pytest
import torch

from flashtile.mods import Dropout, Tile
from flashtile.random import draw_rng_state, drop_threshold, keep_mask, philox


def _words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(x) for x in values)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_known_answers(word: int, expected: tuple[int, ...]) -> None:
    """The vectors of Random123's kat_vectors for philox4x32 with 7 rounds."""
    found = philox(_words(word, word, word, word), _words(word, word))  # type: ignore[arg-type]
    assert tuple(int(x) for x in found) == expected


def _full_mask(state: torch.Tensor, p: float, heads: int, rows: int, cols: int) -> torch.Tensor:
    head, q, k = (torch.arange(n) for n in (heads, rows, cols))
    return keep_mask(state, p, head[:, None, None], q[:, None], k)


@pytest.mark.parametrize("p", [0.1, 0.17, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    keep = _full_mask(torch.tensor([1234567, 89]), p, 8, 256, 256)
    n = keep.numel()
    exact = 1.0 - drop_threshold(p) / 65536
    assert abs(keep.double().mean().item() - exact) < 4 * math.sqrt(p * (1 - p) / n)
    assert abs(exact - (1.0 - p)) <= 2**-17


def test_neighbours_are_independent() -> None:
    """Elements of one Philox block, and of neighbouring blocks, are uncorrelated: 4 sigma."""
    kept = _full_mask(torch.tensor([5, 7]), 0.5, 4, 256, 256).double() - 0.5
    for dq, dk in ((0, 1), (1, 0), (8, 0), (0, 8), (8, 8), (16, 0), (0, 16), (8, 1)):
        a = kept[:, : 256 - dq, : 256 - dk]
        b = kept[:, dq:, dk:]
        correlation = 4 * (a * b).mean().item()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), (dq, dk)


@pytest.mark.parametrize(
    ("row", "rows", "col", "cols"),
    [(0, 64, 0, 64), (3, 50, 21, 33), (16, 16, 32, 16), (63, 1, 7, 1)],
)
def test_any_tile_draws_the_same_mask(row: int, rows: int, col: int, cols: int) -> None:
    state, p = torch.tensor([99, 3]), 0.3
    whole = _full_mask(state, p, 6, 96, 96)
    tile = Tile(1, 2, row, rows, col, cols, 96, 96)  # batch rows 1 and 2 of 3 with 2 heads each
    factor = Dropout(p, state).factor(tile, torch.empty(2, 2, rows, cols))
    expected = whole[2:6, row : row + rows, col : col + cols].view(2, 2, rows, cols)
    torch.testing.assert_close(factor, expected / (1 - p))


def test_state_depends_on_generator_alone() -> None:
    device = torch.device("cpu")
    a, b = (draw_rng_state(device, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, draw_rng_state(device, torch.Generator().manual_seed(5)))
