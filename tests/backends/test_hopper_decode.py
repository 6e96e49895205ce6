"""How the Hopper decode kernel deals out keys: its own source, run on CPU tensors."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile.kernels.hopper import parts, shares
from flashtile.kernels.numbers import opaque

BLOCK, SCAN = 64, 32
TILE = SimpleNamespace(block_n=BLOCK, scan=SCAN)


def _tensors(function: Any) -> Any:
    return lambda *values: function(*(torch.as_tensor(x) for x in values))


class _Grid:
    program, programs = 0, 1


def _language(grid: _Grid) -> SimpleNamespace:
    return SimpleNamespace(
        BlockedLayout=lambda *_: None, arange=lambda start, stop, _: torch.arange(start, stop),
        where=_tensors(torch.where), maximum=_tensors(torch.maximum), int32=torch.int32,
        minimum=_tensors(torch.minimum), associative_scan=lambda x, dim, _: x.cumsum(dim),
        max=torch.amax, sum=torch.sum, program_id=lambda _: torch.tensor(grid.program),
        num_programs=lambda _: grid.programs,
    )  # fmt: skip


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> _Grid:
    found = _Grid()
    for name in ("blocks_seen", "blocks_from", "rounded", "open_share", "find_segment"):
        monkeypatch.setattr(shares, name, getattr(shares, name).fn)
    for module in (shares, parts):
        monkeypatch.setattr(module, "gl", _language(found))
    monkeypatch.setattr(shares, "number", lambda n: (n - 3) // 2)
    monkeypatch.setattr(shares, "quotient", lambda n, divisor: n // divisor)
    monkeypatch.setattr(shares, "open_sequence", lambda seq, batch: seq.span(batch))
    monkeypatch.setattr(shares, "key_range", _key_range)
    return found


def _key_range(window: int | None, first: int, last: Any, q: Any, k: Any) -> Any:
    lo = torch.zeros_like(k.length) if window is None else (k.length - window).clamp_min(0)
    return SimpleNamespace(lo=lo, hi=torch.where(q.length > 0, k.length, 0))


def _sequences(lengths: list[int]) -> Any:
    values = torch.tensor(lengths)
    return SimpleNamespace(
        batch=opaque(len(lengths)), span=lambda b: SimpleNamespace(length=values[b]), table=None
    )


@pytest.mark.parametrize("seed", range(30))
def test_every_block_is_dealt_out_once_and_parts_meet_in_the_order_of_keys(
    seed: int, grid: _Grid
) -> None:
    """What the programs leave for each KV head is what the last of them merges."""
    draw = random.Random(seed)
    batch = draw.choice([1, 2, SCAN, SCAN + 1, 3 * SCAN])
    keys = [draw.choice([0, 1, 64, 65, draw.randint(0, 9000)]) for _ in range(batch)]
    if seed % 3 == 0:  # shares are whole heads, or equal parts of one
        batch = draw.choice([1, 8])
        keys = [draw.choice([4096, 65536])] * batch
    queries = [draw.choice([1, 1, 0]) for _ in range(batch)]
    heads, window = draw.choice([1, 3]), draw.choice([None, 700])
    grid.programs = draw.choice([1, 5, 264])
    arguments = _sequences(queries), _sequences(keys), window, opaque(heads), TILE
    blocks: list[tuple[int, int, int]] = []
    whole: set[tuple[int, int]] = set()
    left: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for program in range(grid.programs):
        grid.program = program
        share = shares.open_share(*arguments)
        assert share.stop - share.start <= share.size
        unit = share.start
        while unit < share.stop:
            s = shares.find_segment(unit, share, *arguments)
            tile = int(s.batch), int(s.head)
            own = [int(s.base + u * s.step) for u in range(int(unit), int(s.stop))]
            blocks += [(*tile, block) for block in own]
            first, several = int(s.first), int(s.several)
            if several == 1:
                whole.add(tile)
            else:
                slot = int(parts.slot_of.fn(torch.tensor(program), program - s.first))
                left.setdefault(tile, []).append((slot, own[0]))
                expected = [
                    int(parts.slot_of.fn(first + torch.tensor(i), torch.tensor(i)))
                    for i in range(several)
                ]
            unit = s.stop
            if several > 1 and program == first + several - 1:
                assert [slot for slot, _ in left[tile]] == expected
                assert [block for _, block in left[tile]] == sorted(b for _, b in left[tile])
    every = [
        (b, head, block)
        for b, length in enumerate(keys)
        if queries[b]
        for head in range(heads)
        for block in range(max(0, length - (window or length)) // BLOCK, -(-length // BLOCK))
    ]
    assert sorted(blocks) == every
    assert not whole & left.keys()
    slots = [slot for found in left.values() for slot, _ in found]
    assert len(set(slots)) == len(slots)


@pytest.mark.parametrize(
    ("size", "blocks", "wide"),
    [(63, 64, 64), (125, 32, 128), (497, 256, 512), (249, 8192, 256), (32, 1024, 32), (2, 64, 2),
     (50, 64, 50), (100, 64, 100), (1, 1, 1), (1, 0, 1), (0, 0, 0), (40, 121, 41)],
)  # fmt: skip
def test_shares_are_rounded_to_whole_heads_or_equal_parts(
    size: int, blocks: int, wide: int, grid: _Grid
) -> None:
    assert int(shares.rounded(torch.tensor(size), torch.tensor(blocks))) == wide
