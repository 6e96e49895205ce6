"""flash_attn_with_kvcache against the reference: append, rotary, paging, padding, canaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_with_kvcache, reference
from flashtile.testing import assert_within_budget, fence

BATCH, CAPACITY, HEADS, KV_HEADS, DIM = 3, 48, 6, 2, 32


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cache(page_size: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    if not page_size:
        shape = (rows, CAPACITY, KV_HEADS, DIM)
        return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), {}
    pages = -(-CAPACITY // page_size)
    shape = (2 * pages * BATCH, page_size, KV_HEADS, DIM)
    table = torch.randperm(shape[0])[: pages * BATCH].view(BATCH, pages).to(torch.int32)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), {"block_table": table}


def _angles(rotary_dim: int) -> dict[str, Tensor]:
    angle = torch.rand(CAPACITY + 8, rotary_dim // 2) * 6.28
    return {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (7, 2)},
    {"attention_chunk": 5},
    {"causal": True, "softcap": 3.0, "alibi_slopes": torch.rand(HEADS)},
    {"causal": True, "learnable_sink": torch.randn(HEADS)},
]


def _assert_same(q: Tensor, caches: list[Tensor], keywords: dict[str, Any]) -> None:
    """out, lse and the caches after the call, against the reference; canaries around the caches."""
    fences = [fence(x) for x in caches]
    out, lse = flash_attn_with_kvcache(
        q, fences[0].tensor, fences[1].tensor, **keywords, return_softmax_lse=True
    )
    golden, k_after, v_after = reference.attention_with_kvcache(q, *caches, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, dtype=None)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
    for guard, after in zip(fences, (k_after, v_after), strict=True):
        guard.assert_canaries("cache")
        assert torch.equal(guard.tensor, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 7, 16])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_reads(seqlen_q: int, variant: dict[str, Any], page_size: int, dtype: torch.dtype) -> None:
    k_cache, v_cache, paging = _cache(page_size, BATCH, dtype)
    q = torch.randn(BATCH, seqlen_q, HEADS, DIM, dtype=dtype)
    keywords = {**variant, **paging, "cache_seqlens": _ints(0, 31, CAPACITY)}
    _assert_same(q, [k_cache, v_cache], keywords)


@pytest.mark.parametrize("page_size", [0, 1, 7, 16])
@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("variant", VARIANTS[:3], ids=lambda v: "-".join(v) or "plain")
def test_appends(
    page_size: int, rotary_dim: int, interleaved: bool, variant: dict[str, Any]
) -> None:
    k_cache, v_cache, paging = _cache(page_size, BATCH, torch.float32)
    q, k, v = (torch.randn(BATCH, 5, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    keywords = {
        **variant, **paging, **(_angles(rotary_dim) if rotary_dim else {}), "k": k, "v": v,
        "cache_seqlens": _ints(0, 29, CAPACITY - 5), "rotary_interleaved": interleaved,
    }  # fmt: skip
    _assert_same(q, [k_cache, v_cache], keywords)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("leftpad", [False, True])
def test_remapped_rows_and_leftpad(new: bool, leftpad: bool) -> None:
    k_cache, v_cache, _ = _cache(0, 2 * BATCH, torch.float32)
    q, k, v = (torch.randn(BATCH, 2, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    keywords: dict[str, Any] = {
        "cache_seqlens": _ints(9, 30, 41), "cache_batch_idx": _ints(4, 0, 3), "causal": True,
    }  # fmt: skip
    if leftpad:
        keywords["cache_leftpad"] = _ints(0, 11, 9)
    if new:
        keywords |= {"k": k, "v": v}
    _assert_same(q, [k_cache, v_cache], keywords)


def test_queries_without_a_mask_need_one_rotary_position() -> None:
    """They all stand at cache_seqlens: the tables need not reach past the appended keys."""
    k_cache, v_cache, _ = _cache(0, BATCH, torch.float32)
    q, k, v = (torch.randn(BATCH, n, h, DIM) for n, h in ((4, HEADS), (1, 2), (1, 2)))
    angle = torch.rand(8, 8) * 6.28
    keywords = {
        "k": k, "v": v, "rotary_cos": angle.cos(), "rotary_sin": angle.sin(),
        "cache_seqlens": _ints(0, 3, 7),
    }  # fmt: skip
    _assert_same(q, [k_cache, v_cache], keywords)


def test_mask_is_indexed_by_slot() -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, torch.float32)
    q = torch.randn(BATCH, 4, HEADS, DIM)
    mask = torch.rand(BATCH, 1, 4, CAPACITY) > 0.5
    keywords = {
        "attn_mask": mask, "cache_seqlens": _ints(9, 30, 41), "cache_leftpad": _ints(0, 11, 9),
    }  # fmt: skip
    _assert_same(q, [k_cache, v_cache], keywords)


def test_int_and_missing_lengths() -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, torch.float32)
    q = torch.randn(BATCH, 1, HEADS, DIM)
    by_int = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=17)
    by_tensor = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=_ints(17, 17, 17))
    assert torch.equal(by_int, by_tensor)
    full = flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(full, flash_attn_func(q, k_cache, v_cache))


def test_garbage_in_unused_slots_and_pages_is_not_read() -> None:
    k_cache, v_cache, paging = _cache(8, BATCH, torch.float32)
    q = torch.randn(BATCH, 2, HEADS, DIM)
    lengths, table = [3, 17, 30], paging["block_table"]
    expected = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=_ints(*lengths), block_table=table, causal=True
    )
    for cache in (k_cache, v_cache):
        for b, length in enumerate(lengths):
            cache[table[b, length // 8], length % 8 :] = float("nan")
    table = table.clone()
    for b, length in enumerate(lengths):
        table[b, length // 8 + 1 :] = 2**30
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=_ints(*lengths), block_table=table, causal=True
    )
    assert torch.equal(found, expected)


def test_prefill_equals_tokens_one_by_one() -> None:
    tokens = 23
    q, k, v = (torch.randn(1, tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    prefill = flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = (torch.full((1, 32, KV_HEADS, DIM), float("nan")) for _ in range(2))
    for t in range(tokens):
        at = slice(t, t + 1)
        out = flash_attn_with_kvcache(
            q[:, at], k_cache, v_cache, k[:, at], v[:, at], cache_seqlens=t, causal=True
        )
        torch.testing.assert_close(out, prefill[:, at])


def test_writes_into_out() -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, torch.float32)
    q, k, v = (torch.randn(BATCH, 2, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    guard = fence(torch.randn(BATCH, 2, HEADS, DIM))
    result = flash_attn_with_kvcache(
        q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=4, out=guard.tensor
    )
    assert result is guard.tensor
    guard.assert_canaries("out")
    plain = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=4)
    assert torch.equal(result, plain)


def test_reading_a_cache_is_differentiable() -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, torch.float32)
    q = torch.randn(BATCH, 2, HEADS, DIM, requires_grad=True)
    flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9).square().sum().backward()
    golden, _, _ = reference.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=9)
    (expected,) = torch.autograd.grad(golden.out.square().sum(), q)
    assert q.grad is not None
    torch.testing.assert_close(q.grad, expected)


def test_autocast_follows_the_cache() -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, torch.bfloat16)
    q, k, v = (torch.randn(BATCH, 1, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(k_cache[:, 5:6], k.to(torch.bfloat16))


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_autocast_of_another_dtype_than_the_cache(dtype: torch.dtype, prefixed: bool) -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, dtype)
    q, k, v = (torch.randn(BATCH, 1, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    prefix = (k_cache[0, :3].clone(), v_cache[0, :3].clone()) if prefixed else None
    found = []
    for enabled in (False, True):
        caches = k_cache.clone(), v_cache.clone()
        new = (q, k, v) if enabled else [x.to(dtype) for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = flash_attn_with_kvcache(new[0], *caches, *new[1:], cache_seqlens=5, prefix=prefix)
        found.append((out, *caches))
    for without, within in zip(*found, strict=True):
        assert torch.equal(without, within)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_leaves_a_cache_that_is_only_read_as_it_is(dtype: torch.dtype) -> None:
    k_cache, v_cache, _ = _cache(0, BATCH, dtype)
    q = torch.randn(BATCH, 1, HEADS, DIM)
    expected = flash_attn_with_kvcache(q.to(dtype), k_cache, v_cache, cache_seqlens=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_mask_that_does_not_reach_the_new_tokens(width: int) -> None:
    """Refused before they are written: packed queries' masks are no shorter than the longest."""
    k_cache, v_cache = torch.zeros(2, 1, 16, 1, 8)
    new = torch.ones(1, 2, 1, 8)
    with pytest.raises(ValueError, match="attn_mask"):
        flash_attn_with_kvcache(
            torch.randn(2, 1, 8), k_cache, v_cache, new, new, cache_seqlens=_ints(4),
            cu_seqlens_q=_ints(0, 2), attn_mask=torch.ones(1, 1, 2, width, dtype=torch.bool),
        )  # fmt: skip
    assert not k_cache.any() and not v_cache.any()


def test_heads_that_are_none_have_slopes_too() -> None:
    q = torch.randn(1, 3, 0, 8)
    assert flash_attn_func(q, q, q, alibi_slopes=torch.zeros(0)).shape == q.shape
