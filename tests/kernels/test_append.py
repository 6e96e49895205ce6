"""The kernel that appends to a cache, in the interpreter: every kind of cache, and what nobody has
checked before a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_with_kvcache, ops, reference, values
from flashtile.backends import append as backend
from flashtile.testing import assert_within_budget, fence
from flashtile.testing.caches import (
    BATCH,
    CACHE_CASES,
    CAPACITY,
    HEADS,
    KV_HEADS,
    CacheCase,
    check_cache_case,
    draw_cache_case,
)
from flashtile.testing.interpreter import interpreted, refuse_long_way


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", CACHE_CASES)
def test_appends(name: str) -> None:
    check_cache_case(draw_cache_case(CACHE_CASES[name], torch.float32), causal=True)


@pytest.mark.parametrize("name", ["dense rotary pairs", "ragged"])
def test_without_causality_all_queries_turn_alike(name: str) -> None:
    check_cache_case(draw_cache_case(CACHE_CASES[name], torch.float32))


@pytest.mark.parametrize("name", ["page 7", "ragged pages", "fp8 token"])
def test_in_half_precision(name: str) -> None:
    check_cache_case(draw_cache_case(CACHE_CASES[name], torch.float16), causal=True)


@pytest.mark.parametrize("elements", [16, 64, 4096])
def test_tiles_of_any_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer heads than there are, several tokens, one row: the same bits."""
    monkeypatch.setattr(backend, "ELEMENTS", elements)
    case = CacheCase(7, 4, ragged=True, rotary_dim=16, interleaved=True)
    check_cache_case(draw_cache_case(case, torch.float32), causal=True)


@pytest.mark.parametrize("name", ["dense rotary halves", "ragged", "fp8 token pages"])
def test_tree_masks(name: str) -> None:
    """In blocks that the tree's range makes whole, and in those that it does not."""
    tree = torch.rand(BATCH, 4, 4) > 0.5
    drawn = draw_cache_case(CACHE_CASES[name], torch.float32)
    check_cache_case(drawn, tree_mask=tree)
    slots = torch.rand(BATCH, 1, 1, CAPACITY) > 0.2
    if "page" not in name and "cu_seqlens_q" not in drawn.keywords:
        check_cache_case(drawn, tree_mask=tree, attn_mask=slots)


def test_prefix_after_an_append() -> None:
    drawn = draw_cache_case(CacheCase(7, 3, rotary_dim=16), torch.float32)
    prefix = torch.randn(11, KV_HEADS, 24), torch.randn(11, KV_HEADS, 24)
    found = _outcome(drawn.q, drawn.caches, {**drawn.keywords, "prefix": prefix, "causal": True})
    with interpreted(16, 16, capacity=16):
        again = [
            _outcome(drawn.q, drawn.caches, {**drawn.keywords, "prefix": prefix, "causal": True})
            for _ in range(2)
        ]
    alone, after = _outcome(drawn.q, drawn.caches, {**drawn.keywords, "causal": True})
    assert torch.equal(after, found[1])
    assert not torch.allclose(alone, found[0])
    for out, cache in again:  # the second of them is a replay
        assert torch.equal(out, found[0])
        assert torch.equal(cache, found[1])


def _outcome(
    q: Tensor, caches: tuple[Tensor, ...], keywords: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = (x.clone() for x in caches)
    return flash_attn_with_kvcache(q, k_cache, v_cache, **keywords), k_cache


@pytest.mark.parametrize(
    "name", ["dense rotary pairs", "page 7", "remapped", "ragged pages", "fp8 token pages"]
)
def test_replays_append_to_the_caches_they_are_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later calls of a kind, of other tensors and lengths, do not meet the operator."""
    with interpreted(16, 16, capacity=16):
        for turn in range(3):
            drawn = draw_cache_case(CACHE_CASES[name], torch.float32)
            drawn.keywords["cache_seqlens"].sub_(turn).clamp_(min=0)
            check_cache_case(drawn, causal=True)
            monkeypatch.setattr(ops, "with_kvcache", refuse_long_way)


@pytest.mark.parametrize("prefixed", [False, True])
def test_replays_of_calls_that_append_nothing(
    prefixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interpreted(16, 16, capacity=16):
        for turn in range(3):
            q, lengths = torch.randn(2, 3, 4, 8), _ints(17 - turn, 40)
            caches, prefix = torch.randn(2, 2, 40, 2, 8), torch.randn(2, 9, 2, 8)
            keywords = {"prefix": tuple(prefix)} if prefixed else {}
            found = flash_attn_with_kvcache(
                q, *caches, cache_seqlens=lengths, causal=True, **keywords
            )
            if prefixed:  # before the cache's tokens, whose number then is the longest
                rows = [torch.cat((p.expand(2, -1, -1, -1), x), 1)
                        for p, x in zip(prefix, caches, strict=True)]  # fmt: skip
                caches, lengths = torch.stack(rows), lengths + 9
            golden, _, _ = reference.attention_with_kvcache(
                q, *caches, cache_seqlens=lengths, causal=True
            )
            torch.testing.assert_close(found, golden.out.float(), rtol=1e-5, atol=1e-5)
            monkeypatch.setattr(ops, "with_kvcache" if prefixed else "forward", refuse_long_way)


@pytest.mark.parametrize("change", ["lengths", "out", "mask"])
def test_what_is_no_metadata_takes_the_operator(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An int's tensor is the operator's own, and the int none of the key's."""
    drawn = draw_cache_case(CacheCase(), torch.float32)
    changes: dict[str, Any] = {
        "lengths": {"cache_seqlens": 3}, "out": {"out": torch.empty_like(drawn.q)},
        "mask": {"tree_mask": torch.ones(1, 1, dtype=torch.bool)},
    }[change]  # fmt: skip
    with interpreted(16, 16, capacity=16):
        for _ in range(2):
            flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords | changes)
        monkeypatch.setattr(ops, "with_kvcache", refuse_long_way)
        with pytest.raises(AssertionError, match="the long way"):
            flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords | changes)


def test_a_replay_refuses_gradients_as_the_first_call_does() -> None:
    drawn = draw_cache_case(CacheCase(), torch.float32)
    with interpreted(16, 16, capacity=16):
        flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords)
        before = drawn.caches[0].clone()
        drawn.keywords["k"].requires_grad_()
        with pytest.raises(ValueError, match="requires grad"):
            flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords)
        assert torch.equal(drawn.caches[0], before)
        with torch.no_grad():
            flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords)


BAD: dict[str, dict[str, Any]] = {
    "past the end": {"cache_seqlens": _ints(CAPACITY - 1, 3, 2**31 - 2)},
    "before the start": {"cache_seqlens": _ints(-7, 3, -(2**31))},
    "rows that are not there": {"cache_batch_idx": _ints(BATCH, 1, -1)},
    "rows far away": {"cache_batch_idx": _ints(2**30, 1, -(2**31))},
    "rotary past its end": {"rotary_seqlens": _ints(2**31 - 1, 0, -5)},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("paged", [False, True])
def test_what_no_slot_has_is_not_written(
    paged: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchecked, as on a GPU: the good row is written, the others as far as there are slots."""
    if paged and "rows" in name:
        pytest.skip("pages have no rows")
    monkeypatch.setattr(values, "_reads", lambda x: False)
    drawn = draw_cache_case(CacheCase(7 if paged else 0, 4, rotary_dim=8), torch.float32)
    keywords = drawn.keywords | BAD[name]
    lengths = keywords["cache_seqlens"].tolist()
    rows = keywords.get("cache_batch_idx", torch.arange(BATCH)).tolist()
    for x in drawn.caches:
        x.fill_(-3.0)
    fences = [fence(x) for x in drawn.caches]
    out = flash_attn_with_kvcache(drawn.q, fences[0].tensor, fences[1].tensor, **keywords)
    assert out.isfinite().all()
    written = torch.zeros(*drawn.caches[1].shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(4):
            slot = length + i
            if length < 0 or slot >= _capacity(keywords) or not 0 <= rows[b] < BATCH:
                continue
            at = (rows[b], slot)
            if paged:
                at = int(keywords["block_table"][b, slot // 7]), slot % 7
            written[at] = True
            assert torch.equal(fences[1].tensor[at], keywords["v"][b, i])
    for guard in fences:
        guard.assert_canaries("cache")
        assert guard.tensor[~written].eq(-3.0).all()
        assert guard.tensor[written].ne(-3.0).all()


def _capacity(keywords: dict[str, Any]) -> int:
    table = keywords.get("block_table")
    return CAPACITY if table is None else 7 * table.shape[1]


@pytest.mark.parametrize("page", [-1, 36, 2**31 - 1, -(2**31)])
def test_pages_outside_the_pool(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of such pages are not written; what is read in their place is in the pool."""
    monkeypatch.setattr(values, "_reads", lambda x: False)
    drawn = draw_cache_case(CacheCase(7, 4), torch.float32)
    table = drawn.keywords["block_table"]
    assert drawn.caches[0].shape[0] == 36
    table[1, 1:3] = page  # slots 7 to 20, and tokens 13 to 16 are new
    fences = [fence(x) for x in drawn.caches]
    out = flash_attn_with_kvcache(
        drawn.q, fences[0].tensor, fences[1].tensor, **drawn.keywords, causal=True
    )
    assert out.isfinite().all()
    good = [0, 2]
    keywords = {
        name: x[good] if name in ("block_table", "k", "v", "cache_seqlens") else x
        for name, x in drawn.keywords.items()
    }
    golden, *after = reference.attention_with_kvcache(
        drawn.q[good], *drawn.caches, **keywords, causal=True
    )
    eager, *_ = reference.attention_with_kvcache(
        drawn.q[good], *drawn.caches, **keywords, causal=True, dtype=None
    )
    assert_within_budget(out[good], eager.out, golden.out, "out")
    for guard, wanted in zip(fences, after, strict=True):
        guard.assert_canaries("cache")
        assert torch.equal(guard.tensor, wanted)


def test_nothing_new_still_turns_queries() -> None:
    drawn = draw_cache_case(CacheCase(0, 3, rotary_dim=16), torch.float32)
    empty = {name: drawn.keywords[name][:, :0] for name in ("k", "v")}
    check_cache_case(drawn._replace(keywords=drawn.keywords | empty), causal=True)
    assert drawn.q.shape == (BATCH, 3, HEADS, 24)


@pytest.mark.parametrize("capacity", [0, 16])
def test_what_read_a_cache_hears_of_an_append(capacity: int) -> None:
    """Its backward would use the new keys: an append is a change in place as any other."""
    with interpreted(16, 16, capacity=capacity):
        for turn in range(3):
            caches = torch.randn(2, 1, 32, 1, 8).unbind()
            q = torch.randn(1, 1, 1, 8, requires_grad=True)
            used, new = torch.tensor([8], dtype=torch.int32), torch.randn(2, 1, 4, 1, 8)
            out = flash_attn_with_kvcache(q, *caches, cache_seqlens=used + 8)
            with torch.no_grad():
                flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=used)
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                out.sum().backward()
            with torch.inference_mode():
                inferred = [x.clone() for x in caches]
                flash_attn_with_kvcache(q.detach(), *inferred, *new, cache_seqlens=used)
            assert torch.equal(inferred[0], caches[0]), turn
