"""Decoding on a GPU: large caches against the reference, graphs with other lengths, equal bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_with_kvcache, reference
from flashtile.testing import assert_within_budget

HEADS, KV_HEADS, CAPACITY = 8, 2, 2500
LENGTHS = (1700, 0, 1, 777, 64, 2500)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _cache(page: int, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """(caches, keywords): whatever no row uses is NaN, and table entries past its end are wild."""
    rows, per_row = len(LENGTHS), -(-CAPACITY // page) if page else 1
    shape = (rows * per_row, page) if page else (rows, CAPACITY)
    caches = [torch.randn(*shape, KV_HEADS, dim, device="cuda").to(dtype) for _ in "kv"]
    there = torch.zeros(shape, dtype=torch.bool, device="cuda")
    table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).to(torch.int32)
    for row, length in enumerate(LENGTHS):
        slots = torch.arange(length, device="cuda")
        if page:
            there[table[row, slots // page].long(), slots % page] = True
            table[row, -(-length // page) :] = 2**30
        else:
            there[row, :length] = True
    for cache in caches:
        cache[~there] = math.nan
    keywords: dict[str, Any] = {"cache_seqlens": _ints(*LENGTHS)}
    return caches, keywords | ({"block_table": table} if page else {})


def _assert_right(q: Tensor, caches: list[Tensor], keywords: dict[str, Any]) -> None:
    out, lse = flash_attn_with_kvcache(q, *caches, **keywords, return_softmax_lse=True)
    ignored = {n: x for n, x in keywords.items() if n not in ("num_splits", "split_size")}
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **ignored)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **ignored, dtype=None)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")


@pytest.mark.parametrize("page", [0, 1, 16, 24, 128])
@pytest.mark.parametrize("seqlen_q", [1, 8, 16])
def test_pages_and_queries(seqlen_q: int, page: int) -> None:
    torch.manual_seed(page)
    caches, keywords = _cache(page, 128, torch.bfloat16)
    q = torch.randn(len(LENGTHS), seqlen_q, HEADS, 128, device="cuda").to(torch.bfloat16)
    _assert_right(q, caches, keywords | {"causal": True})


@pytest.mark.parametrize("page", [0, 24, 128])
@pytest.mark.parametrize("chunk", [1, 200, 1024])
def test_chunks(chunk: int, page: int) -> None:
    """Of which one, two or eight have keys that some query sees."""
    torch.manual_seed(page)
    caches, keywords = _cache(page, 128, torch.bfloat16)
    q = torch.randn(len(LENGTHS), 8, HEADS, 128, device="cuda").to(torch.bfloat16)
    _assert_right(q, caches, keywords | {"causal": True, "attention_chunk": chunk})


@pytest.mark.parametrize("narrow", ["k", "v"])
@pytest.mark.parametrize("seqlen_q", [1, 200])
def test_pages_of_heads_narrower_than_the_tile(seqlen_q: int, narrow: str) -> None:
    """64 columns, as many as are read of a page at once: behind them lies the next head."""
    torch.manual_seed(0)
    (k, v), keywords = _cache(16, 128, torch.bfloat16)
    if narrow == "k":
        k = k[..., :64].contiguous()
    else:
        v = v[..., :64].contiguous()
    q = torch.randn(len(LENGTHS), seqlen_q, HEADS, k.shape[-1], device="cuda").to(torch.bfloat16)
    _assert_right(q, [k, v], keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 96, 256, 512])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    caches, keywords = _cache(0, dim, dtype)
    _assert_right(
        torch.randn(len(LENGTHS), 2, HEADS, dim, device="cuda").to(dtype), caches, keywords
    )


@pytest.mark.parametrize("keywords", [{"num_splits": 1}, {"num_splits": 7}, {"split_size": 500}])
def test_splits_that_the_caller_asks_for(keywords: dict[str, int]) -> None:
    caches, given = _cache(16, 128, torch.bfloat16)
    q = torch.randn(len(LENGTHS), 1, HEADS, 128, device="cuda").to(torch.bfloat16)
    features = {"window_size": (1000, 0), "softcap": 20.0, "learnable_sink": torch.randn(8).cuda(),
                "alibi_slopes": torch.rand(HEADS, device="cuda")}  # fmt: skip
    _assert_right(q, caches, given | features | keywords)


def test_split_size_gives_the_same_bits_in_any_batch() -> None:
    caches, keywords = _cache(0, 128, torch.bfloat16)
    q = torch.randn(len(LENGTHS), 2, HEADS, 128, device="cuda").to(torch.bfloat16)
    together = flash_attn_with_kvcache(q, *caches, **keywords, causal=True, split_size=256)
    for row, length in enumerate(LENGTHS):
        own = [x[row : row + 1] for x in (q, *caches)]
        alone = flash_attn_with_kvcache(*own, cache_seqlens=length, causal=True, split_size=256)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("page", [0, 16])
def test_a_captured_graph_replays_with_other_lengths(page: int) -> None:
    """A thousand times, each with the bits of a call of its own."""
    torch.manual_seed(0)
    caches, keywords = _cache(page, 128, torch.bfloat16)
    for cache in caches:
        cache.nan_to_num_(1.0)
    if page:
        keywords["block_table"].remainder_(len(caches[0]))
    q = torch.randn(len(LENGTHS), 1, HEADS, 128, device="cuda").to(torch.bfloat16)
    lengths = keywords["cache_seqlens"]
    flash_attn_with_kvcache(q, *caches, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(q, *caches, **keywords)
    for replay in range(1000):
        new = torch.randint(0, CAPACITY + 1, (len(LENGTHS),), device="cuda", dtype=torch.int32)
        lengths.copy_(torch.where(torch.rand(len(LENGTHS), device="cuda") < 0.3, 0, new))
        graph.replay()
        assert torch.equal(out, flash_attn_with_kvcache(q, *caches, **keywords)), replay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_prefill_equals_its_tokens_one_by_one(dtype: torch.dtype) -> None:
    """The same rows of the same attention, by the forward kernel and, appending, by decoding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 97, h, 128, device="cuda").to(dtype) for h in (8, 2, 2))
    golden = reference.attention(q, k, v, causal=True).out
    eager = reference.attention(q, k, v, causal=True, dtype=None).out
    caches = [torch.zeros(2, 112, 2, 128, device="cuda", dtype=dtype) for _ in "kv"]
    ones = []
    for at in range(97):
        new_q, new_k, new_v = (x[:, at : at + 1] for x in (q, k, v))
        ones.append(
            flash_attn_with_kvcache(
                new_q, *caches, new_k, new_v, cache_seqlens=_ints(at, at), causal=True
            )
        )
    assert_within_budget(torch.cat(ones, 1), eager, golden, "out, one by one")
    assert_within_budget(flash_attn_func(q, k, v, causal=True), eager, golden, "out of a prefill")


@pytest.mark.parametrize("page", [0, 16])
def test_e4m3_with_scales_by_token(page: int) -> None:
    """Tables and scales are loaded blocks ahead."""
    torch.manual_seed(page)
    caches, keywords = _cache(page, 128, torch.bfloat16)
    caches = [x.nan_to_num_(400.0).to(torch.float8_e4m3fn) for x in caches]
    for name, x in zip("kv", caches, strict=True):
        keywords[f"{name}_descale"] = torch.rand(x.shape[:3], device="cuda") + 0.5
    q = torch.randn(len(LENGTHS), 2, HEADS, 128, device="cuda").to(torch.bfloat16)
    out = flash_attn_with_kvcache(q, *caches, **keywords, causal=True)
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, causal=True)
    error = (out.double() - golden.out.double()).norm() / golden.out.double().norm()
    assert error < 6e-3


@pytest.mark.parametrize("batch", [6, 36])
def test_a_prefix_that_all_rows_see(batch: int) -> None:
    """In shares of the keys, and in parts of them where tiles of 64 rows are several."""
    torch.manual_seed(batch)
    q = torch.randn(batch, 1, HEADS, 128, device="cuda").to(torch.bfloat16)
    caches = torch.randn(2, batch, 600, KV_HEADS, 128, device="cuda").to(torch.bfloat16)
    prefix = torch.randn(2, 1100, KV_HEADS, 128, device="cuda").to(torch.bfloat16)
    lengths = torch.randint(0, 601, (batch,), device="cuda", dtype=torch.int32)
    lengths[0] = 0
    out, lse = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=lengths, prefix=tuple(prefix), return_softmax_lse=True
    )
    longer = [torch.cat((p.expand(batch, -1, -1, -1), x), 1)
              for p, x in zip(prefix, caches, strict=True)]  # fmt: skip
    golden, _, _ = reference.attention_with_kvcache(q, *longer, cache_seqlens=lengths + 1100)
    eager, _, _ = reference.attention_with_kvcache(
        q, *longer, cache_seqlens=lengths + 1100, dtype=None
    )
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
