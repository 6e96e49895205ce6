"""Calls over a cache, drawn for tests: caches, what is appended, and what must be left alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import flash_attn_with_kvcache, reference
from flashtile.problem import E4M3
from flashtile.testing.budget import assert_within_budget
from flashtile.testing.guards import Fenced, fence

BATCH, CAPACITY, HEADS, KV_HEADS = 3, 40, 6, 2


class CacheCase(NamedTuple):
    """What a call over a cache is like. It appends `tokens` to each row, or to ragged rows some."""

    page_size: int = 0  # 0: rows of a cache
    tokens: int = 1
    ragged: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    start: bool = False  # rotary_seqlens are given
    scale: str | None = None  # of an e4m3 cache: none, tensor, head, row or token
    remapped: bool = False  # cache_batch_idx and cache_leftpad
    head_dim: int = 24
    head_dim_v: int = 24


class Drawn(NamedTuple):
    q: Tensor
    caches: tuple[Tensor, Tensor]
    keywords: dict[str, Any]
    scales: dict[str, Tensor]


def draw_cache_case(case: CacheCase, dtype: torch.dtype, device: str = "cpu") -> Drawn:
    """Operands of a case. Lengths, offsets and tables are int32 on the device."""

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    keywords: dict[str, Any] = {}
    rows: tuple[int, ...] = (2 * BATCH if case.remapped else BATCH, CAPACITY)
    if case.page_size:
        pages = -(-CAPACITY // case.page_size)
        order = torch.randperm(2 * pages * BATCH)[: pages * BATCH].view(BATCH, pages)
        keywords["block_table"] = order.to(device, torch.int32)
        rows = (2 * pages * BATCH, case.page_size)
    elif case.remapped:
        keywords |= {"cache_batch_idx": ints(4, 0, 3), "cache_leftpad": ints(0, 5, 17)}
    dims = (case.head_dim, case.head_dim_v)
    k_cache, v_cache = (torch.randn(*rows, KV_HEADS, d, device=device).to(dtype) for d in dims)
    scales: dict[str, Tensor] = {}
    if case.scale is not None:
        k_cache, v_cache = ((40 * x).to(E4M3) for x in (k_cache, v_cache))
        shapes: dict[str, tuple[int, ...]] = {
            "tensor": (), "head": (KV_HEADS,), "row": (BATCH, KV_HEADS), "token": (*rows, KV_HEADS),
        }  # fmt: skip
        if case.scale in shapes:
            scales = {
                name: torch.rand(shapes[case.scale], device=device) * 0.02 + 0.005
                for name in ("k_descale", "v_descale")
            }
    counts, lead = [case.tokens] * BATCH, (BATCH, case.tokens)
    if case.ragged:
        counts = [case.tokens, 0, case.tokens + 2]
        lead = (sum(counts),)  # type: ignore[assignment]
        offsets = ints(0, *accumulate(counts))
        keywords |= {"cu_seqlens_q": offsets, "cu_seqlens_k_new": offsets}
    q, k, v = (
        torch.randn(*lead, heads, d, device=device).to(dtype)
        for heads, d in ((HEADS, dims[0]), (KV_HEADS, dims[0]), (KV_HEADS, dims[1]))
    )
    if case.rotary_dim:
        angle = torch.rand(CAPACITY + 24, case.rotary_dim // 2, device=device) * 6.28
        keywords |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
        keywords["rotary_interleaved"] = case.interleaved
        if case.start:
            keywords["rotary_seqlens"] = ints(5, 1, 20)
    keywords |= {"k": k, "v": v, "cache_seqlens": ints(0, 13, CAPACITY - counts[-1])}
    return Drawn(q, (k_cache, v_cache), keywords, scales)


def check_cache_case(drawn: Drawn, **variant: Any) -> None:
    """out and lse within budget of the reference; caches and scales, bit for bit its own, with
    canaries around."""
    q, caches, keywords, scales = drawn
    keywords = keywords | variant
    fences = [fence(_bits(x)) for x in caches]
    k_cache, v_cache = (x.tensor.view(cache.dtype) for x, cache in zip(fences, caches, strict=True))
    guards: dict[str, Fenced | None] = {n: fence(x) if x.dim() else None for n, x in scales.items()}
    given: dict[str, Any] = {n: scales[n] if g is None else g.tensor for n, g in guards.items()}
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, **keywords, **given, return_softmax_lse=True
    )
    expected: dict[str, Any] = {name: x.clone() for name, x in scales.items()}
    golden, *after = reference.attention_with_kvcache(
        q, caches[0], caches[1], **keywords, **expected
    )
    eager, _, _ = reference.attention_with_kvcache(
        q, caches[0], caches[1], **keywords, **expected, dtype=None
    )
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
    for name, fenced, wanted in zip(("k_cache", "v_cache"), fences, after, strict=True):
        fenced.assert_canaries(name)
        if not torch.equal(fenced.tensor, _bits(wanted)):
            raise AssertionError(f"{name} is not what the reference has")
    for name, guard in guards.items():
        if guard is not None:
            guard.assert_canaries(name)
        if not torch.equal(given[name], expected[name]):
            raise AssertionError(f"{name} is not what the reference has")


def assert_cache_gradients(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, keywords: dict[str, Any], **tolerances: Any
) -> None:
    """Gradients of all three, of a call that appends nothing, as the reference has them."""
    inputs = q, k_cache, v_cache
    out = flash_attn_with_kvcache(*inputs, **keywords)
    golden, _, _ = reference.attention_with_kvcache(*inputs, **keywords)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(golden.out, inputs, dout.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def _bits(x: Tensor) -> Tensor:
    """x, or what torch can compare of it."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


CACHE_CASES: dict[str, CacheCase] = {
    "dense": CacheCase(),
    "dense rotary halves": CacheCase(tokens=3, rotary_dim=16),
    "dense rotary pairs": CacheCase(tokens=3, rotary_dim=24, interleaved=True),
    "remapped": CacheCase(tokens=5, rotary_dim=8, remapped=True),
    "page 1": CacheCase(1, 5, rotary_dim=24, start=True),
    "page 7": CacheCase(7, 5, rotary_dim=16, interleaved=True, start=True),
    "page 16": CacheCase(16, 18, rotary_dim=24),
    "ragged": CacheCase(0, 4, ragged=True, rotary_dim=16, interleaved=True),
    "ragged pages": CacheCase(7, 4, ragged=True, rotary_dim=24, start=True),
    "ragged remapped": CacheCase(0, 9, ragged=True, remapped=True),
    "fp8": CacheCase(0, 3, scale="none"),
    "fp8 tensor": CacheCase(16, 3, rotary_dim=24, scale="tensor"),
    "fp8 head": CacheCase(0, 3, rotary_dim=24, scale="head", remapped=True),
    "fp8 row": CacheCase(7, 3, scale="row"),
    "fp8 token": CacheCase(0, 5, rotary_dim=16, scale="token", remapped=True),
    "fp8 token pages": CacheCase(7, 4, ragged=True, rotary_dim=24, scale="token"),
    "dims": CacheCase(7, 3, rotary_dim=8, head_dim=40, head_dim_v=17),
}
"""Calls that append, by name."""
