"""In which order the Hopper forward takes tiles: the scheduler's own source, run on CPU tensors."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flashtile.api import normalise
from flashtile.backends import hopper
from flashtile.hopper_tiles import TILES
from flashtile.kernels.hopper import scheduler
from flashtile.kernels.numbers import opaque

CHUNK = 8
"""Sequences that are looked at together here."""


class Pointer(NamedTuple):
    """A tensor's address plus an offset; loads outside it fail."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def _load(pointer: Pointer, mask: Tensor, other: int) -> Tensor:
    inside = pointer.offset[mask]
    assert ((inside >= 0) & (inside < len(pointer.memory))).all()
    found = torch.full(pointer.offset.shape, other)
    found[mask] = pointer.memory[inside]
    return found


def _tensors(function: Any) -> Any:
    return lambda *values: function(*(torch.as_tensor(x) for x in values))


LANGUAGE = SimpleNamespace(
    BlockedLayout=lambda *_: None, arange=lambda start, stop, _: torch.arange(start, stop),
    load=_load, where=_tensors(torch.where), maximum=_tensors(torch.maximum), int32=torch.int32,
    minimum=_tensors(torch.minimum), associative_scan=lambda x, dim, _: x.cumsum(dim),
    max=torch.amax, min=torch.amin, sum=torch.sum, cdiv=lambda a, b: -(-a // b),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("split_tile", "split_rows", "dense_tile", "count_keys", "find_sequence",
                 "packed_tile", "find_tile", "first_order"):  # fmt: skip
        monkeypatch.setattr(scheduler, name, getattr(scheduler, name).fn)
    monkeypatch.setattr(scheduler, "gl", LANGUAGE)
    monkeypatch.setattr(scheduler, "SEQUENCES", CHUNK)
    monkeypatch.setattr(scheduler, "pinned", lambda n: (n - 3) // 2)
    monkeypatch.setattr(scheduler, "open_sequence", _open_sequence)
    monkeypatch.setattr(scheduler, "quotient", _quotient)


def _quotient(n: Any, divisor: Any) -> Any:
    assert n >= 0 < divisor
    return n // divisor


def _open_sequence(seq: Any, batch: Any) -> Any:
    ends = [*seq.cu_seqlens.memory.tolist(), (seq.length - 3) // 2]
    return SimpleNamespace(room=ends[int(batch) + 1] - ends[int(batch)])


def _sequences(lengths: list[int], padding: int, **given: Any) -> Any:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    fields = {"cu_seqlens": Pointer(offsets), "used": None, **given}
    return SimpleNamespace(
        batch=opaque(len(lengths)), length=opaque(int(offsets[-1]) + padding), **fields
    )


def _take(
    q_seq: Any, k_seq: Any, pairs: int, heads: int, together: int, rows: int
) -> list[tuple[int, ...]]:
    """(sequence, head, first query) in the order of tiles, which three CTAs take by turns."""
    work = scheduler.Work(None, opaque(rows), opaque(pairs), opaque(together))
    orders = [scheduler.first_order()] * 3
    found: list[tuple[int, ...]] = []
    for tile in range(100_000):
        orders[tile % 3], *where = scheduler.find_tile(
            work, opaque(heads), q_seq, k_seq, orders[tile % 3], tile, 128, 64
        )
        if where[2] < 0:
            return found
        found.append(tuple(int(x) for x in where))
    raise AssertionError("no end")


def _draw(seed: int) -> tuple[list[int], list[int], int]:
    """Lengths of queries and of keys, and rows of no sequence."""
    draw = random.Random(seed)
    count = draw.choice([1, 2, CHUNK - 1, CHUNK, 3 * CHUNK + 1])
    queries = [draw.choice([0, draw.randint(1, 40), draw.randint(1, 2000)]) for _ in range(count)]
    keys = [draw.choice([n, 0, draw.randint(0, 3000)]) for n in queries]
    return queries, keys, draw.choice([0, 37, 300])


@pytest.mark.parametrize("seed", range(20))
def test_packed_tiles_are_taken_once_and_long_sequences_first(seed: int) -> None:
    queries, keys, padding = _draw(seed)
    heads, together = (1, 1) if seed == 0 else (6, 1 + seed % 6)
    k_seq = _sequences(keys, padding)
    if seed % 2:
        k_seq.cu_seqlens, k_seq.used = None, Pointer(torch.tensor(keys))
    found = _take(_sequences(queries, padding), k_seq, heads, heads, together, 0)

    every = [
        (batch, head, row)
        for batch, length in enumerate([*queries, padding])
        for head in range(heads)
        for row in range(0, length, 128)
    ]
    assert sorted(found) == every
    longest = 2**31
    for batch, _, _ in found:  # no later sequence has twice the keys; a block is the least
        count = max(64, [*keys, 0][batch])
        assert count < 2 * longest
        longest = min(longest, count)
    for batch, head in {x[:2] for x in found}:
        rows = [row for *where, row in found if where == [batch, head]]
        assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize(
    ("batch", "heads", "together"), [(1, 1, 1), (3, 4, 5), (2, 6, 12), (5, 2, 4)]
)
def test_dense_tiles_are_taken_once_and_long_ones_first(
    batch: int, heads: int, together: int
) -> None:
    seq = SimpleNamespace(cu_seqlens=None)
    found = _take(seq, seq, batch * heads, heads, together, 7)
    assert sorted(found) == [
        (b, h, 128 * row) for b in range(batch) for h in range(heads) for row in range(7)
    ]
    for start in range(0, len(found), 7 * together):
        rows = [row for *_, row in found[start : start + 7 * together]]
        assert rows == sorted(rows, reverse=True)


@pytest.mark.parametrize(("pages", "together"), [(32, 8), (64, 4), (1024, 1)])
def test_heads_whose_keys_fit_in_l2_together(pages: int, together: int) -> None:
    """Of the longest sequence that a table of pages, not one page, can hold: 8 MB a KV head at
    16,384 tokens."""
    q, pool = (
        torch.zeros(40, 16, 128, dtype=torch.bfloat16),
        torch.zeros(3, 256, 16, 128).bfloat16(),
    )
    table = torch.zeros(2, pages, dtype=torch.int32)
    call = normalise(
        q, pool, pool, cu_seqlens_q=torch.tensor([0, 10, 40], dtype=torch.int32),
        seqused_k=torch.tensor([3, 5], dtype=torch.int32), block_table=table, causal=True,
    )  # fmt: skip
    work = hopper._work(call, TILES[2])
    assert [opaque(16), opaque(together)] == [work.pairs, work.together]
