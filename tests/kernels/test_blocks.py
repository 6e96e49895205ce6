"""Masks given as tensors: what their tiles are classified as, the lists that follow, and attention
over several of the tiles of 128 that a GPU uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import ops
from flashtile.api import normalise
from flashtile.backends import blocklists
from flashtile.problem import Call
from flashtile.testing import Case, Problem, assert_matches_reference, run
from flashtile.testing.interpreter import interpreted

EDGE = 32
"""Of the tiles in this folder's tests."""


def _call(seqlen_q: int, seqlen_k: int, **keywords: Any) -> Call:
    q, k = torch.randn(2, seqlen_q, 2, 8), torch.randn(2, seqlen_k, 1, 8)
    return normalise(q, k, k, **keywords)


def _tiles(seen: Tensor) -> Tensor:
    """(batch, heads, q, k) bool padded and cut: (batch, heads, q_tiles, k_tiles, EDGE, EDGE)."""
    rows, columns = (-n % EDGE for n in seen.shape[-2:])
    seen = torch.nn.functional.pad(seen, (0, columns, 0, rows))
    return seen.unflatten(-1, (-1, EDGE)).unflatten(-3, (-1, EDGE)).transpose(-2, -3)


def _codes(seen: Tensor) -> Tensor:
    """0 where nothing of a tile is seen; 2 where all of its real rows see all of its columns."""
    real = torch.ones(seen.shape[-2], 1, dtype=torch.bool).expand(seen.shape[-2:])
    outside = ~_tiles(real)[..., :1]  # rows past the end
    some, every = _tiles(seen).any((-1, -2)), (_tiles(seen) | outside).all((-1, -2))
    return torch.where(some, torch.where(every, 2, 1), 0)


def _assert_codes(codes: Tensor, seen: Tensor, exact: bool = True) -> None:
    """Never hidden where something is seen, nor full where something is not; what is exact is so
    at least in the tiles that the keys fill."""
    codes, expected = codes.long(), _codes(seen)
    assert codes.shape == expected.shape
    assert not ((codes == 0) & (expected != 0)).any()
    assert not ((codes == 2) & (expected != 2)).any()
    if exact:
        inside = seen.shape[-1] // EDGE
        assert torch.equal(codes[..., :inside], expected[..., :inside])


def _patchwork(batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Tiles that are hidden, full, and random, in every order."""
    q, k = (torch.arange(n) // EDGE for n in (seqlen_q, seqlen_k))
    kind = (q[:, None] + 2 * k + torch.arange(heads)[:, None, None]) % 3
    random = torch.rand(batch, heads, seqlen_q, seqlen_k) > 0.5
    return torch.where(kind == 0, False, (kind == 1) | random)


SHAPES = [(96, 96), (70, 100), (100, 33), (1, 65)]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SHAPES)
@pytest.mark.parametrize(
    ("batch", "heads", "kind"), [(1, 1, "bool"), (2, 2, "bool"), (2, 1, "float"), (2, 2, "float")]
)
def test_codes_of_masks(seqlen_q: int, seqlen_k: int, batch: int, heads: int, kind: str) -> None:
    seen = _patchwork(batch, heads, seqlen_q, seqlen_k)
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    _assert_codes(blocklists.classify(_call(seqlen_q, seqlen_k, attn_mask=mask)), seen)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_codes_of_documents(seqlen_q: int, seqlen_k: int, masked: bool) -> None:
    """Sorted ids, which leave whole tiles out, alone and with a row of a mask for all queries."""
    ids = tuple(torch.arange(2 * n).view(2, n) // 40 for n in (seqlen_q, seqlen_k))
    seen = (ids[0][:, :, None] == ids[1][:, None, :])[:, None]
    mask = torch.arange(seqlen_k) >= 32 if masked else None
    call = _call(seqlen_q, seqlen_k, document_ids=ids, attn_mask=mask)
    seen = seen if mask is None else seen & mask
    _assert_codes(blocklists.classify(call), seen, exact=mask is None)


def test_codes_of_packed_sequences() -> None:
    """A mask is indexed from each sequence's start, and its tiles end where the sequence does."""
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 70, 75], [0, 33, 40, 140]))
    q, k = torch.randn(75, 2, 8), torch.randn(140, 1, 8)
    mask = _patchwork(3, 1, 70, 100)
    call = normalise(q, k, k, attn_mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                     max_seqlen_q=70, max_seqlen_k=100)  # fmt: skip
    codes = blocklists.classify(call)
    assert codes.shape == (3, 1, 3, 4)
    for b, (seqlen_q, seqlen_k) in enumerate(((70, 33), (0, 7), (5, 100))):
        q_tiles, k_tiles = -(-seqlen_q // EDGE), -(-seqlen_k // EDGE)
        _assert_codes(codes[b, :, :q_tiles, :k_tiles], mask[b, :, :seqlen_q, :seqlen_k])
        assert codes[b, :, q_tiles:].eq(0).all()
        assert codes[b, :, :, k_tiles:].eq(0).all()


def _left(seen: Tensor, window: tuple[int | None, int | None]) -> tuple[Tensor, Tensor]:
    """Whether mask and window leave some, and all, of each tile."""
    seqlen_q, seqlen_k = seen.shape[-2:]
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = (1000 if side is None else side for side in window)
    codes, in_band = _tiles(seen), _tiles((distance >= -left) & (distance <= right))
    some = codes.any((-1, -2)) & in_band.any((-1, -2))
    return some, codes.all((-1, -2)) & in_band.all((-1, -2))


WINDOWS = [(None, None), (None, 0), (40, 10), (0, 0)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["by_queries", "by_keys"])
def test_lists(window: tuple[int | None, int | None], transposed: bool) -> None:
    """Each block that mask and window leave, once: the full ones as a run where they lie side by
    side and at the end else, the others before."""
    seqlen_q, seqlen_k = 96, 160
    heads = 1 + (WINDOWS.index(window) + transposed) % 2
    seen = _patchwork(2, heads, seqlen_q, seqlen_k)
    call = ops.with_mask_blocks(_call(seqlen_q, seqlen_k, attn_mask=seen, window_size=window))
    lists = blocklists.by_keys(call) if transposed else blocklists.by_queries(call)
    assert lists is not None
    some, every = _left(seen, window)
    if transposed:
        some, every = some.transpose(-1, -2), every.transpose(-1, -2)
    for entries, counts, wanted, full in zip(
        *(x.flatten(0, 2) for x in (lists.entries, lists.counts, some, every)), strict=True
    ):
        partial, scattered, run, first = counts.tolist()
        assert sorted(entries[:partial].tolist()) == (wanted & ~full).nonzero()[:, 0].tolist()
        found = entries[len(entries) - scattered :].tolist() + list(range(first, first + run))
        assert sorted(found) == full.nonzero()[:, 0].tolist()
        assert scattered == 0 or (run == 0 and max(found) - min(found) >= scattered)


def _long(**features: Any) -> Problem:
    return Case("long", 300, 260, 1, 1, 1, 8, features=features).draw(1)


def _tiles_of_128(mask: Tensor) -> Tensor:
    """Of a 300 x 260 mask one tile hidden, two full, one row of tiles hidden and one full."""
    mask[..., :128, :128] = False
    mask[..., :128, 128:256] = True
    mask[..., 128:256, :128] = True
    mask[..., 128:256, 128:256] = False
    mask[..., 290:, :] = False
    return mask


@pytest.mark.parametrize(
    ("kind", "window"),
    [("random", (None, None)), ("random", (None, 0)), ("random", (100, 30)),
     ("documents", (None, None)), ("documents", (None, 0)), ("hidden", (None, None)),
     ("full", (100, 30))],
    ids=str,
)  # fmt: skip
def test_attention_over_many_tiles(kind: str, window: tuple[int | None, int | None]) -> None:
    """Blocks of 64 x 32 in tiles of 128, as on a GPU."""
    if kind == "documents":
        ids = tuple((torch.arange(n)[None] + n // 3) // 120 for n in (300, 260))
        problem = _long(window_size=window, document_ids=ids)
    else:
        mask = torch.rand(1, 1, 300, 260) > 0.5
        mask = {"random": _tiles_of_128(mask), "hidden": mask & False, "full": mask | True}[kind]
        problem = _long(window_size=window, attn_mask=mask)
    with interpreted(64, 32):
        results = assert_matches_reference(problem)
    if kind == "hidden":
        assert results.out.eq(0).all()
        assert all(grad.eq(0).all() for grad in results.grads.values())


@pytest.mark.parametrize("name", ["attn_mask", "document_ids"])
def test_lists_change_nothing(name: str) -> None:
    """Packed sequences have lists where their longest length is known, and masks alone else."""
    lengths = ((18, 18), (0, 0), (40, 40), (3, 3))
    problem = Case("packed", heads=1, kv_heads=1, head_dim=8, lengths=lengths,
                   features={"causal": True}, tensors=(name,)).draw(3)  # fmt: skip
    expected = run(problem)
    bounds = {"max_seqlen_q": 40, "max_seqlen_k": 40}
    found = run(problem._replace(keywords=problem.keywords | bounds))
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-6)
    for leaf, grad in found.grads.items():
        torch.testing.assert_close(grad, expected.grads[leaf], rtol=1e-5, atol=1e-5)


def test_rows_past_the_last_offset_have_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the lists lie traps: one full block, of NaN."""
    lists_of = blocklists._lists

    def trapped(call: Call, transposed: bool) -> Any:
        lists = lists_of(call, transposed)
        assert lists is not None
        counts = torch.tensor([0, 1, 1, 1], dtype=torch.int32).repeat(100)
        entries = torch.ones(100, dtype=torch.int32)
        return lists._replace(
            entries=torch.cat((lists.entries.flatten(), entries)),
            counts=torch.cat((lists.counts.flatten(), counts)),
        )

    monkeypatch.setattr(blocklists, "_lists", trapped)
    lengths = ((18, 18), (5, 5))
    problem = Case("padding", heads=1, kv_heads=1, head_dim=8, lengths=lengths).draw(4)
    problem.keywords.update(max_seqlen_q=18, max_seqlen_k=18, attn_mask=torch.rand(18, 18) > 0.4)
    for name, x in problem.tensors.items():
        memory = torch.full((200, 1, 8), torch.nan)
        memory[: len(x)] = x
        problem.tensors[name] = memory[:60]
    results = assert_matches_reference(problem)
    assert results.out[23:].eq(0).all()
