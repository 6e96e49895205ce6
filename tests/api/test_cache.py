"""Calls over a cache that append, whatever the cache: ragged, remapped, paged, quantised; trees and
prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import flash_attn_varlen_func, flash_attn_with_kvcache, reference
from flashtile.api import normalise
from flashtile.backends.cache import NewTokens
from flashtile.testing import assert_within_budget
from flashtile.testing.caches import (
    BATCH,
    CACHE_CASES,
    HEADS,
    KV_HEADS,
    CacheCase,
    assert_cache_gradients,
    check_cache_case,
    draw_cache_case,
)

E4M3 = torch.float8_e4m3fn


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [{}, {"causal": True}, {"window_size": (9, 0)}], ids=str)
@pytest.mark.parametrize("name", CACHE_CASES)
def test_appends(name: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    check_cache_case(draw_cache_case(CACHE_CASES[name], dtype), **variant)


@pytest.mark.parametrize("name", ["dense rotary halves", "page 7", "ragged", "fp8 token pages"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_tree_masks(shared: bool, causal: bool, name: str) -> None:
    """The last queries of longer sequences lie beyond the mask, and see all."""
    tree = torch.rand(1 if shared else BATCH, 4, 4) > 0.5
    drawn = draw_cache_case(CACHE_CASES[name], torch.float32)
    check_cache_case(drawn, tree_mask=tree[0] if shared else tree, causal=causal)


def test_a_tree_mask_hides_a_branch() -> None:
    """Two branches of a root: neither sees the other, both see the root and the cache."""
    q = torch.randn(1, 3, HEADS, 16)
    k_cache, v_cache = (torch.randn(1, 9, KV_HEADS, 16) for _ in range(2))
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9, tree_mask=tree)
    branch = [*range(7), 8]
    alone = flash_attn_with_kvcache(q[:, 2:], k_cache[:, branch], v_cache[:, branch])
    torch.testing.assert_close(out[:, 2:], alone)


def test_a_tree_mask_has_gradients() -> None:
    q = torch.randn(2, 3, HEADS, 16, requires_grad=True)
    k_cache, v_cache = (torch.randn(2, 9, KV_HEADS, 16, requires_grad=True) for _ in range(2))
    tree = torch.rand(2, 3, 3) > 0.5
    keywords: dict[str, Any] = {"cache_seqlens": _ints(9, 5), "tree_mask": tree}
    assert_cache_gradients(q, k_cache, v_cache, keywords)


def _joined(
    q: Tensor, cache: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor], causal: bool,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One row's attention over prefix and cache in one tensor, in fp64."""
    k, v = (torch.cat((p, x))[None] for p, x in zip(prefix, cache, strict=True))
    new, seqlen_q = len(cache[0]), q.shape[0]
    mask = torch.ones(seqlen_q, k.shape[1], dtype=torch.bool)
    if causal:
        mask[:, -new:] = torch.ones(seqlen_q, new, dtype=torch.bool).tril(new - seqlen_q)
    out, lse = reference.attention(q[None], k, v, attn_mask=mask, **keywords)
    return out[0], lse[0]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefix(dtype: torch.dtype, append: bool, ragged: bool) -> None:
    """A prefix counts as keys before the cache's, and is the same for all; the sink counts once."""
    drawn = draw_cache_case(CacheCase(0, 3, ragged), dtype)
    keywords = drawn.keywords | {"causal": True, "softcap": 3.0}
    sink, prefix = torch.randn(HEADS), tuple(torch.randn(11, KV_HEADS, 24).to(dtype) for _ in "kv")
    if not append:
        for name in ("k", "v", "cu_seqlens_k_new"):
            keywords.pop(name, None)
    k_cache, v_cache = (x.clone() for x in drawn.caches)
    out, lse = flash_attn_with_kvcache(
        drawn.q, k_cache, v_cache, **keywords, prefix=prefix, learnable_sink=sink,
        return_softmax_lse=True,
    )  # fmt: skip
    offsets = drawn.keywords.get("cu_seqlens_q", _ints(0, 3, 6, 9))
    counts = offsets.diff().tolist()
    flat = (drawn.q, out) if ragged else (drawn.q.flatten(0, 1), out.flatten(0, 1))
    lse = lse if ragged else lse.transpose(0, 1).flatten(1)
    for b, length in enumerate(drawn.keywords["cache_seqlens"].tolist()):
        used = length + (counts[b] if append else 0)
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        if counts[b] == 0 or used < counts[b]:
            continue
        cache = (k_cache[b, :used], v_cache[b, :used])
        variant: dict[str, Any] = {"softcap": 3.0, "learnable_sink": sink}
        golden = _joined(flat[0][rows], cache, prefix, True, **variant)  # type: ignore[arg-type]
        eager = _joined(flat[0][rows], cache, prefix, True, **variant, dtype=None)  # type: ignore[arg-type]
        assert_within_budget(flat[1][rows], eager[0], golden[0], "out")
        assert_within_budget(lse[:, rows], eager[1], golden[1], "lse")


def test_a_prefix_with_an_empty_cache_and_an_empty_prefix() -> None:
    q = torch.randn(2, 1, HEADS, 16)
    k_cache, v_cache = (torch.randn(2, 8, KV_HEADS, 16) for _ in range(2))
    prefix = torch.randn(5, KV_HEADS, 16), torch.randn(5, KV_HEADS, 16)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=0, prefix=prefix)
    golden = reference.attention(q, *(x.expand(2, -1, -1, -1) for x in prefix))
    torch.testing.assert_close(out, golden.out.float())
    none = tuple(x[:0] for x in prefix)
    found, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=0, prefix=none, return_softmax_lse=True
    )
    assert found.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_a_prefix_of_no_sequences() -> None:
    """Queries of none of them are padding, which sees no prefix."""
    q, pool = torch.randn(5, HEADS, 16), torch.randn(4, 8, KV_HEADS, 16)
    prefix = torch.randn(3, KV_HEADS, 16), torch.randn(3, KV_HEADS, 16)
    out, lse = flash_attn_with_kvcache(
        q, pool, pool, cache_seqlens=_ints(), block_table=_ints().view(0, 2), cu_seqlens_q=_ints(0),
        max_seqlen_q=3, prefix=prefix, return_softmax_lse=True,
    )  # fmt: skip
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


@pytest.mark.parametrize("page_size", [0, 8])
def test_mla_shares_storage(page_size: int) -> None:
    """V is the first 512 of K's 576 dims."""
    rows = (12, 8) if page_size else (2, 48)
    cache = torch.randn(*rows, 1, 576)
    q, new = torch.randn(2, 3, 8, 576), torch.randn(2, 3, 1, 576)
    keywords: dict[str, Any] = {
        "k": new, "v": new[..., :512], "cache_seqlens": _ints(3, 40), "causal": True,
        "softmax_scale": 0.05,
    }  # fmt: skip
    if page_size:
        keywords["block_table"] = torch.randperm(12).view(2, 6).int()
    golden, after, _ = reference.attention_with_kvcache(q, cache, cache[..., :512], **keywords)
    eager, _, _ = reference.attention_with_kvcache(
        q, cache, cache[..., :512], **keywords, dtype=None
    )
    out = flash_attn_with_kvcache(q, cache, cache[..., :512], **keywords)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert torch.equal(cache, after)


def test_packed_queries_default_to_a_full_cache() -> None:
    q, offsets = torch.randn(7, HEADS, 16), _ints(0, 2, 7)
    k_cache, v_cache = (torch.randn(2, 9, KV_HEADS, 16) for _ in range(2))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cu_seqlens_q=offsets, causal=True)
    for b, rows in enumerate((slice(0, 2), slice(2, 7))):
        row = slice(b, b + 1)
        alone = flash_attn_with_kvcache(q[None, rows], k_cache[row], v_cache[row], causal=True)
        torch.testing.assert_close(out[rows], alone[0])


def test_packed_keys_in_e4m3() -> None:
    q, offsets = torch.randn(12, HEADS, 16), _ints(0, 5, 12)
    k, v = ((100 * torch.randn(12, KV_HEADS, 16)).to(E4M3) for _ in range(2))
    keywords: dict[str, Any] = {
        "k_descale": torch.rand(2, KV_HEADS) * 0.01, "v_descale": torch.rand(KV_HEADS) * 0.01,
        "causal": True,
    }  # fmt: skip
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, **keywords)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    golden, eager = (
        reference.attention(q, k, v, **lengths, **keywords, dtype=dtype)
        for dtype in (torch.float64, None)
    )
    assert_within_budget(out, eager.out, golden.out, "out")


@pytest.mark.parametrize("name", ["ragged pages", "fp8 token pages", "fp8 head", "remapped"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_opcheck(prefixed: bool, name: str) -> None:
    q, caches, keywords, scales = draw_cache_case(CACHE_CASES[name], torch.float32)
    new = NewTokens(
        *(keywords.get(x) for x in ("k", "v", "cu_seqlens_k_new", "rotary_cos", "rotary_sin")),
        rotary_seqlens=keywords.get("rotary_seqlens"),
        prefix_k=torch.randn(5, KV_HEADS, 24) if prefixed else None,
        prefix_v=torch.randn(5, KV_HEADS, 24) if prefixed else None,
    )
    where = ("block_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")
    call = normalise(
        q, *caches, causal=True, seqused_k=keywords["cache_seqlens"], **scales,
        **{x: keywords.get(x) for x in where},
    )  # fmt: skip
    tests = ("test_faketensor",)  # the others compute with what is mutated: not in e4m3
    if not scales:
        tests += ("test_schema", "test_aot_dispatch_dynamic")  # type: ignore[assignment]
    torch.library.opcheck(
        torch.ops.flashtile.with_kvcache.default, (*new, *call.flat()), test_utils=tests
    )


def test_compiled_append_writes_scales() -> None:
    torch._dynamo.reset()
    drawn = draw_cache_case(CACHE_CASES["fp8 token"], torch.float32)

    def step(k_cache: Tensor, v_cache: Tensor, k_descale: Tensor, v_descale: Tensor) -> Tensor:
        return flash_attn_with_kvcache(
            drawn.q, k_cache, v_cache, **drawn.keywords, k_descale=k_descale, v_descale=v_descale
        )

    state = (*drawn.caches, *drawn.scales.values())
    eager, compiled = ([x.clone() for x in state] for _ in range(2))
    expected = step(*eager)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(found, expected)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_quantised_append_is_quantize_kv() -> None:
    """Tokens appended with their own scales are what quantize_kv makes of them."""
    k, v = (torch.randn(2, 8, KV_HEADS, 16) for _ in range(2))
    filled, appended = (
        [torch.zeros(2, 8, KV_HEADS, 16).to(E4M3) for _ in range(2)]
        + [torch.zeros(2, 8, KV_HEADS) for _ in range(2)]
        for _ in range(2)
    )
    flashtile.quantize_kv(k, v, *filled)
    k_cache, v_cache, k_descale, v_descale = appended
    flash_attn_with_kvcache(
        torch.randn(2, 8, HEADS, 16), k_cache, v_cache, k, v, cache_seqlens=0,
        k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    for a, b in zip(appended, filled, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
