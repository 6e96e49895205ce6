"""The dropout contract: Philox itself, its statistics, and one mask for every tile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashtile.mods import Dropout, Tile
from flashtile.random import NUMBERS, draw_rng_state, drop_threshold, keep_mask, philox

STATE = torch.tensor([1234567, 89])


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, (0, 0), 0, (0x257A3673, 0xCD26BE2A)),
        (7, (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (7, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
        (10, (0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_philox_known_answers(
    rounds: int, counter: tuple[int, int], key: int, expected: tuple[int, int]
) -> None:
    """The vectors of Random123's kat_vectors for philox2x32; it has none with 6 rounds."""
    words = torch.tensor(counter[0]), torch.tensor(counter[1])
    assert tuple(int(x) for x in philox(words, torch.tensor(key), rounds)) == expected


def _full_mask(state: torch.Tensor, p: float, heads: int, rows: int, cols: int) -> torch.Tensor:
    head, q, k = (torch.arange(n) for n in (heads, rows, cols))
    return keep_mask(state, p, head[:, None, None], q[:, None], k)


def _dropped(state: torch.Tensor, p: float, heads: int = 8, tokens: int = 512) -> torch.Tensor:
    """(heads, tokens, tokens) float32, by tiles' own way of drawing."""
    tile = Tile(0, 1, 0, tokens, 0, tokens, tokens, tokens)
    return Dropout(p, state).factor(tile, torch.empty(1, heads, tokens, tokens))[0].eq(0).float()


@pytest.mark.parametrize("p", [0.003, 0.1, 0.17, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    keep = _full_mask(STATE, p, 8, 256, 256)
    n = keep.numel()
    exact = 1.0 - drop_threshold(p) / NUMBERS
    assert abs(keep.double().mean().item() - exact) < 4 * math.sqrt(p * (1 - p) / n)
    assert abs(exact - (1.0 - p)) <= 0.5 / NUMBERS


def _chi_square(found: torch.Tensor, expected: torch.Tensor) -> float:
    """In standard deviations from its mean, of cells that expect ten at least."""
    cells = expected >= 10
    degrees = int(cells.sum()) - 1
    chi = ((found - expected)[cells] ** 2 / expected[cells]).sum().item()
    return (chi - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5])
def test_elements_of_a_block_are_independent(p: float) -> None:
    """Each of the 256 ways that the eight elements of a Philox block can be dropped comes as often
    as it would of eight coins."""
    counts = torch.zeros(256)
    weights = 2 ** torch.arange(8)
    for seed in range(4):
        dropped = _dropped(torch.tensor([seed, 3]), p).long()
        blocks = dropped.view(8, 32, 2, 8, 32, 2, 4, 2)  # head, a, h, r, c, g, t, b
        ways = blocks.permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(-1, 8) @ weights
        counts += torch.bincount(ways, minlength=256)
    q = drop_threshold(p) / NUMBERS
    drops = torch.tensor([i.bit_count() for i in range(256)])
    expected = counts.sum() * q**drops * (1 - q) ** (8 - drops)
    assert abs(_chi_square(counts, expected)) < 5


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5])
def test_neighbours_are_independent(p: float) -> None:
    """Pairs of elements nearby, of one Philox block or of others, are uncorrelated: 5 sigma, where
    a pair of the 240 exceeds 4 in one run of 70."""
    dropped = _dropped(torch.tensor([5, 7]), p)
    q = drop_threshold(p) / NUMBERS
    centred = (dropped - q) / math.sqrt(q * (1 - q))
    for dq, dk in itertools.product((0, 1, 2, 4, 7, 8, 9, 15, 16, 64), (0, 1, 2, 7, 8, 9, 16, 128)):
        if dq or dk:
            a, b = centred[:, : 512 - dq, : 512 - dk], centred[:, dq:, dk:]
            assert abs((a * b).mean().item()) * math.sqrt(a.numel()) < 5, (dq, dk)


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5])
def test_sums_of_rows_columns_and_heads(p: float) -> None:
    """How many are dropped of a row, a column or a head varies as if they were independent."""
    dropped = _dropped(torch.tensor([11, 2**61]), p, heads=16)
    q = drop_threshold(p) / NUMBERS
    for dims in ((1,), (2,), (0,), (1, 2), (0, 2)):
        sums = dropped.sum(dims)
        each = dropped.numel() // sums.numel()
        chi = ((sums - each * q) ** 2 / (each * q * (1 - q))).sum().item()
        kurtosis = (1 - 6 * q * (1 - q)) / (each * q * (1 - q))
        assert abs(chi - sums.numel()) < 5 * math.sqrt(sums.numel() * (2 + kurtosis)), dims


@pytest.mark.parametrize("other", [(1234568, 89), (1234567 + 2**32, 89), (1234567, 90),
                                   (1234567, 89 + 2**32)], ids=str)  # fmt: skip
def test_states_draw_independent_masks(other: tuple[int, int]) -> None:
    """One bit of any 32-bit word of the state."""
    a, b = (_dropped(state, 0.5) - 0.5 for state in (STATE, torch.tensor(other)))
    assert abs(4 * (a * b).mean().item()) * math.sqrt(a.numel()) < 5


def test_heads_draw_independent_masks() -> None:
    masks = _dropped(STATE, 0.5, heads=24, tokens=256).flatten(1) - 0.5
    correlations = 4 * (masks @ masks.T) / masks.shape[1]
    correlations.fill_diagonal_(0.0)
    assert correlations.abs().max().item() * math.sqrt(masks.shape[1]) < 5


@pytest.mark.parametrize(
    ("row", "rows", "col", "cols"),
    [(0, 64, 0, 64), (3, 50, 21, 33), (16, 16, 32, 16), (63, 1, 7, 1)],
)
@pytest.mark.parametrize("p", [0.003, 0.3])
def test_any_tile_draws_the_same_mask(row: int, rows: int, col: int, cols: int, p: float) -> None:
    state = torch.tensor([99, 3])
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
