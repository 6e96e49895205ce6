"""Appending to a cache on the GPU, bit for bit what the CPU writes; quantised caches; graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_with_kvcache, quantize_kv, reference
from flashtile.api import normalise
from flashtile.backends import append as kernels
from flashtile.backends import cache as plain
from flashtile.backends.cache import NewTokens
from flashtile.testing import assert_within_budget
from flashtile.testing.caches import CACHE_CASES, CacheCase, check_cache_case, draw_cache_case

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _appended(drawn: Any, device: str, causal: bool) -> list[Tensor]:
    """Caches, scales, q and lengths after an append."""

    def on(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone().to(device)

    keywords = {name: on(x) for name, x in drawn.keywords.items() if isinstance(x, Tensor)}
    caches = [x.clone().to(device) for x in drawn.caches]
    scales = {name: x.clone().to(device) for name, x in drawn.scales.items()}
    where = ("block_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q")
    call = normalise(
        drawn.q.to(device), *caches, causal=causal, seqused_k=keywords["cache_seqlens"], **scales,
        **{name: keywords.get(name) for name in where},
    )  # fmt: skip
    names = ("k", "v", "cu_seqlens_k_new", "rotary_cos", "rotary_sin", "rotary_seqlens")
    new = NewTokens(
        *map(keywords.get, names),
        rotary_interleaved=drawn.keywords.get("rotary_interleaved", True),
    )
    after = (plain if device == "cpu" else kernels).append(call, new)
    lengths = after.sequences.seqused_k
    assert lengths is not None
    return [x.cpu() for x in (*caches, *scales.values(), after.operands.q, lengths)]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


WIDE = {
    "wide pages": CacheCase(16, 9, True, 128, False, False, "token", False, 128, 128),
    "wide": CacheCase(0, 9, False, 64, True, False, "head", True, 128, 128),
    "mla": CacheCase(16, 3, head_dim=576, head_dim_v=512),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*CACHE_CASES, *WIDE])
def test_the_same_bits_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    drawn = draw_cache_case((CACHE_CASES | WIDE)[name], dtype)
    pairs = zip(_appended(drawn, "cuda", True), _appended(drawn, "cpu", True), strict=True)
    for found, expected in pairs:
        assert torch.equal(_bits(found), _bits(expected))


@pytest.mark.parametrize("name", CACHE_CASES)
def test_appends_and_attends(name: str) -> None:
    check_cache_case(draw_cache_case(CACHE_CASES[name], BF16, "cuda"), causal=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (3, 640, 2)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5, 200])
def test_a_quantised_cache(seqlen_q: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k, v = (torch.randn(3, 640, 2, 128, device="cuda", dtype=dtype) for _ in range(2))
    k_cache, v_cache = (torch.empty_like(x, dtype=E4M3) for x in (k, v))
    k_descale, v_descale = (torch.empty(shape, device="cuda") for _ in range(2))
    quantize_kv(k, v, k_cache, v_cache, k_descale, v_descale)
    q = torch.randn(3, seqlen_q, 8, 128, device="cuda", dtype=dtype)
    keywords: dict[str, Any] = {
        "cache_seqlens": torch.tensor([640, 3, 300], dtype=torch.int32, device="cuda"),
        "causal": True, "k_descale": k_descale, "v_descale": v_descale,
    }  # fmt: skip
    out = flash_attn_with_kvcache(q, k_cache, v_cache, **keywords)
    golden, eager = (
        reference.attention_with_kvcache(q, k_cache, v_cache, **keywords, dtype=x)[0].out
        for x in (torch.float64, None)
    )
    assert_within_budget(out, eager, golden, "out")


@pytest.mark.parametrize("name", ["page 7", "fp8 token pages", "ragged remapped"])
def test_a_graph_appends_at_other_lengths(name: str) -> None:
    """Lengths past the end are clamped: the rows of the others are what they should be."""
    drawn = draw_cache_case(CACHE_CASES[name], BF16, "cuda")
    lengths = drawn.keywords["cache_seqlens"]
    caches = [x.clone() for x in drawn.caches]
    scales = {n: x.clone() for n, x in drawn.scales.items()}

    def step() -> Tensor:
        return flash_attn_with_kvcache(drawn.q, *caches, **drawn.keywords, **scales, causal=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for values in ([0, 13, 25], [7, 25, 3], [20, 1, 0]):
        for x, before in zip((*caches, *scales.values()), (*drawn.caches, *drawn.scales.values()),
                             strict=True):  # fmt: skip
            x.copy_(before)
        lengths.copy_(torch.tensor(values))
        graph.replay()
        expected = {n: x.clone() for n, x in drawn.scales.items()}
        golden, *after = reference.attention_with_kvcache(
            drawn.q, *drawn.caches, **drawn.keywords, **expected, causal=True
        )
        for x, wanted in zip(caches, after, strict=True):
            assert torch.equal(_bits(x), _bits(wanted))
        eager, *_ = reference.attention_with_kvcache(
            drawn.q, *drawn.caches, **drawn.keywords, **expected, causal=True, dtype=None
        )
        assert_within_budget(out, eager.out, golden.out, "out")
    lengths.copy_(torch.tensor([2**31 - 2, -5, 400]))
    before = [x.clone() for x in caches]
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(caches, before, strict=True):
        assert torch.equal(_bits(x), _bits(y))


def test_a_prefix_is_merged() -> None:
    q = torch.randn(4, 2, 8, 128, device="cuda", dtype=BF16)
    caches = [torch.randn(4, 300, 2, 128, device="cuda", dtype=BF16) for _ in range(2)]
    k, v = (torch.randn(500, 2, 128, device="cuda", dtype=BF16) for _ in range(2))
    lengths = torch.tensor([300, 2, 77, 150], dtype=torch.int32, device="cuda")
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths, prefix=(k, v), causal=True)
    whole = [
        torch.cat((x.expand(4, -1, -1, -1), y), 1) for x, y in zip((k, v), caches, strict=True)
    ]
    golden, eager = (
        reference.attention_with_kvcache(
            q, *whole, cache_seqlens=lengths + 500, causal=True, dtype=x
        )[0].out
        for x in (torch.float64, None)
    )
    assert_within_budget(out, eager, golden, "out")
