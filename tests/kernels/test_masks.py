"""Masks that carry ranges: which blocks they make a tile visit, and that visiting fewer changes
nothing."""

# ruff: noqa: N803, compile-time constants of a kernel are upper case

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtile.api import normalise
from flashtile.backends import operands
from flashtile.kernels.masks import anywhere, key_range, query_range
from flashtile.kernels.schedule import PARTIAL, RUN, block_start, schedule_range
from flashtile.kernels.views import open_sequence
from flashtile.testing import Case, run

MOST = 16
"""Blocks that a probed tile visits at most: 100 rows in blocks of 8."""


@triton.jit
def probe(found, q_seq, k_seq, masks, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          BY_KEYS: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """For each tile its partial and its full blocks: (tiles, 2, MOST) of -1 where there is none."""
    tile = tl.program_id(0)
    q, k = open_sequence(q_seq, 0), open_sequence(k_seq, 0)
    first = tile * ROWS
    if BY_KEYS:
        r = query_range(masks, first, first + ROWS - 1, q, k)
    else:
        r = key_range(masks, first, first + ROWS - 1, q, k)
    schedule = schedule_range(r, BLOCK)
    for i in range(schedule.partial):
        at = block_start(None, schedule, i, PARTIAL, BLOCK)
        tl.store(found + tile * 2 * MOST + i, at)
    for i in range(schedule.run):
        at = block_start(None, schedule, i, RUN, BLOCK)
        tl.store(found + (tile * 2 + 1) * MOST + i, at)


class Geometry(NamedTuple):
    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None
    rows: int
    block: int
    chunk: int = 0


def _visible(g: Geometry) -> Tensor:
    distance = torch.arange(g.seqlen_k) - torch.arange(g.seqlen_q)[:, None]
    distance = distance - (g.seqlen_k - g.seqlen_q)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if g.left is not None:
        seen &= distance >= -g.left
    if g.right is not None:
        seen &= distance <= g.right
    if g.chunk:
        keys = torch.arange(g.seqlen_k)
        seen &= keys // g.chunk == (keys - distance) // g.chunk
    return seen


def _visited(g: Geometry, by_keys: bool) -> list[tuple[list[int], list[int]]]:
    """(partial, full) blocks of each tile, by the kernels' own functions."""
    q, k = torch.randn(1, g.seqlen_q, 1, 8), torch.randn(1, g.seqlen_k, 1, 8)
    call = normalise(q, k, k, window_size=(g.left, g.right), attention_chunk=g.chunk)
    tiles = -(-(g.seqlen_k if by_keys else g.seqlen_q) // g.rows)
    found = torch.full((tiles, 2, MOST), -1, dtype=torch.int32)
    probe[(tiles,)](
        found, operands.query_sequences(call), operands.key_sequences(call), operands.band(call),
        g.rows, g.block, by_keys, MOST,
    )  # fmt: skip
    return [tuple([i for i in half if i >= 0] for half in tile) for tile in found.tolist()]  # type: ignore[misc]


SIDES = st.one_of(st.none(), st.integers(0, 9), st.integers(10, 120))
GEOMETRIES = st.builds(
    Geometry, st.integers(1, 100), st.integers(1, 100), SIDES, SIDES,
    st.sampled_from((8, 16, 32)), st.sampled_from((8, 16, 32)),
    st.one_of(st.just(0), st.integers(1, 120)),
)  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(g=GEOMETRIES, by_keys=st.booleans())
def test_blocks_that_a_tile_visits(g: Geometry, by_keys: bool) -> None:
    """Each block that anything is visible in, once; as full only where all is visible; and, in
    tiles that do not reach past the end, no other block and none of the full ones as partial."""
    seen = _visible(g).T if by_keys else _visible(g)
    for tile, (partial, full) in enumerate(_visited(g, by_keys)):
        rows = seen[tile * g.rows : (tile + 1) * g.rows]
        starts = range(0, seen.shape[1], g.block)
        some = [i for i in starts if rows[:, i : i + g.block].any()]
        every = [i for i in starts if rows[:, i : i + g.block].all()
                 and i + g.block <= seen.shape[1]]  # fmt: skip
        visited = partial + full
        assert len(set(visited)) == len(visited)
        assert set(some) <= set(visited) <= set(starts)
        assert set(full) <= set(every)
        if len(rows) == g.rows:
            assert set(visited) == set(some)
            assert set(full) == set(every)


@triton.jit
def probe_rows(found, q_seq, k_seq, masks, ROWS: tl.constexpr, BY_KEYS: tl.constexpr):
    """(2, ROWS) first key that a row sees, and the one after its last; or queries, of keys."""
    q, k = open_sequence(q_seq, 0), open_sequence(k_seq, 0)
    rows = tl.arange(0, ROWS)
    r = query_range(masks, rows, rows, q, k) if BY_KEYS else key_range(masks, rows, rows, q, k)
    tl.store(found + rows, rows * 0 + r.lo)
    tl.store(found + ROWS + rows, r.hi)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(g=GEOMETRIES, by_keys=st.booleans())
def test_what_a_row_sees(g: Geometry, by_keys: bool) -> None:
    """A row's own range is all that it sees, and rows past the end see nothing: what the Hopper
    kernels mask blocks by."""
    q, k = torch.randn(1, g.seqlen_q, 1, 8), torch.randn(1, g.seqlen_k, 1, 8)
    call = normalise(q, k, k, window_size=(g.left, g.right), attention_chunk=g.chunk)
    found = torch.full((2, 128), -1, dtype=torch.int32)
    q_seq, k_seq = operands.query_sequences(call), operands.key_sequences(call)
    probe_rows[(1,)](found, q_seq, k_seq, operands.band(call), 128, by_keys)
    wanted = _visible(g).T if by_keys else _visible(g)
    columns = torch.arange(wanted.shape[1])
    seen = (columns >= found[0, :, None]) & (columns < found[1, :, None])
    assert torch.equal(seen[: len(wanted)], wanted)
    assert not seen[len(wanted) :].any()


BANDS = [
    ((None, 0), (40, 40)), ((None, 0), "packed"), ((5, 3), (20, 52)), ((5, 3), "packed"),
    ((0, 0), (52, 20)), ((0, 0), (20, 52)), ((17, None), (52, 20)), ((None, 20), (20, 52)),
    ((40, 40), "packed"), ((3, 0), (40, 40)), ((None, None, 16), (40, 40)),
    ((None, 0, 13), "packed"), ((9, 3, 7), (52, 20)), ((None, 0, 24), (20, 52)),
]  # fmt: skip


@pytest.mark.parametrize(("window", "shape"), BANDS, ids=str)
def test_ranges_change_nothing(window: tuple[Any, ...], shape: Any) -> None:
    """The same masks without ranges, every block visited and masked: the same results."""
    sizes = {"lengths": ((18, 30), (0, 4), (20, 3))} if shape == "packed" else {
        "seqlen_q": shape[0], "seqlen_k": shape[1]}  # fmt: skip
    features = {"window_size": window[:2], "attention_chunk": sum(window[2:])}
    case = Case("band", heads=2, kv_heads=1, head_dim=8, batch=1, features=features, **sizes)
    problem = case.draw(1)
    results = run(problem)
    with_ranges = operands.band

    def without_ranges(call: Any) -> Any:
        return tuple(m._replace(keys=anywhere, queries=anywhere) for m in with_ranges(call))

    with patch.object(operands, "band", without_ranges):
        expected = run(problem)
    torch.testing.assert_close(results.out, expected.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results.lse, expected.lse, rtol=1e-5, atol=1e-6)
    for name, grad in results.grads.items():
        torch.testing.assert_close(grad, expected.grads[name], rtol=1e-5, atol=1e-5)
