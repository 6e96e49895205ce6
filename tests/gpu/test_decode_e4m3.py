"""Decoding over e4m3 caches on a GPU, by the Hopper kernel where it reads them and by the portable
one: whose scales, pages, groups, features, graphs with other lengths, equal bits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flashtile import explain, flash_attn_with_kvcache, reference
from flashtile.testing import assert_within_budget

DEVICE, E4M3, DIM = "cuda", torch.float8_e4m3fn, 128
CAPACITY = 1280
LENGTHS = (900, 0, 1, 129, 256, CAPACITY)
NAN = 0x7F


class Layout(NamedTuple):
    """What a cache is like, and how many queries and heads there are."""

    owner: str | None  # of a scale
    page: int = 0  # 0: rows of a cache
    group: int = 4
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16


class Drawn(NamedTuple):
    q: Tensor
    caches: list[Tensor]  # whatever no row uses is NaN
    clean: list[Tensor]  # rows of a cache, 0 instead
    scales: dict[str, Tensor]  # of clean
    keywords: dict[str, Any]  # of a call of caches: lengths, tables, scales


def _draw(layout: Layout) -> Drawn:
    """All numbers of e4m3 are among a cache's."""
    torch.manual_seed(layout.page + layout.group)
    rows, kv_heads = len(LENGTHS), 2
    heads = kv_heads * layout.group
    q = torch.randn(rows, layout.queries, heads, DIM, device=DEVICE).to(layout.dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    unused = torch.arange(CAPACITY, device=DEVICE)[None, :] >= lengths[:, None]
    codes = [_codes(rows, CAPACITY, kv_heads, DIM) for _ in "kv"]
    clean = [x.masked_fill(unused[..., None, None], 0).view(E4M3) for x in codes]
    poisoned = [x.masked_fill(unused[..., None, None], NAN) for x in codes]
    shapes: dict[str, tuple[int, ...]] = {
        "all": (1,), "head": (kv_heads,), "row": (rows, kv_heads), "token": (rows, CAPACITY, 2),
    }  # fmt: skip
    scales = {
        name: torch.rand(shapes[layout.owner], device=DEVICE) * 0.02 + 0.005
        for name in (("k_descale", "v_descale") if layout.owner else ())
    }
    given = dict(scales)
    if layout.owner == "token":
        given = {n: x.masked_fill(unused[..., None], math.nan) for n, x in scales.items()}
    keywords: dict[str, Any] = {"cache_seqlens": lengths}
    if layout.page:
        count = CAPACITY // layout.page
        order = torch.randperm(2 * rows * count, device=DEVICE)[: rows * count]
        poisoned = [_paged(x, order, layout.page, NAN) for x in poisoned]
        keywords["block_table"] = order.view(rows, count).to(torch.int32)
        if layout.owner == "token":
            given = {n: _paged(x, order, layout.page, math.nan) for n, x in given.items()}
    return Drawn(q, [x.view(E4M3) for x in poisoned], clean, scales, keywords | given)


def _codes(*shape: int) -> Tensor:
    codes = (40 * torch.randn(shape, device=DEVICE)).clamp(-448, 448).to(E4M3).view(torch.uint8)
    others = torch.randint(0, 256, shape, device=DEVICE).to(torch.uint8)
    others[(others & NAN) == NAN] = 0
    return torch.where(torch.rand(shape, device=DEVICE) < 0.02, others, codes)


def _paged(x: Tensor, order: Tensor, page: int, fill: float) -> Tensor:
    """Rows of a cache in pages, as many others between them."""
    pool = x.new_full((2 * len(order), page, *x.shape[2:]), fill)
    pool[order] = x.reshape(len(order), page, *x.shape[2:])
    return pool


def _assert_right(drawn: Drawn, **features: Any) -> None:
    out, lse = flash_attn_with_kvcache(
        drawn.q, *drawn.caches, **drawn.keywords, **features, return_softmax_lse=True
    )
    (golden, _, _), (eager, _, _) = (
        reference.attention_with_kvcache(
            drawn.q, *drawn.clean, cache_seqlens=drawn.keywords["cache_seqlens"], **drawn.scales,
            **features, dtype=dtype,
        )
        for dtype in (torch.float64, None)
    )  # fmt: skip
    for row in range(len(LENGTHS)):
        assert_within_budget(out[row], eager.out[row], golden.out[row], f"out of row {row}")
    torch.testing.assert_close(lse, golden.lse.float(), rtol=1e-3, atol=1e-3)


def _streams(drawn: Drawn) -> bool:
    """Whether the plan of this device has the Hopper kernel."""
    keywords = {n: x for n, x in drawn.keywords.items() if n != "cache_seqlens"}
    used = drawn.keywords["cache_seqlens"]
    return explain(drawn.q, *drawn.caches, seqused_k=used, **keywords).plan.stream is not None


READ_BY_HOPPER = [
    Layout(None), Layout("all", group=1), Layout("head"), Layout("row", group=8),
    Layout("token", group=16), Layout("token", group=1, queries=5), Layout("head", queries=4),
    Layout("head", 16), Layout("all", 16, group=1), Layout("row", 256, group=16),
    Layout("head", 256, group=8, dtype=torch.float16),
]  # fmt: skip
OTHERS = [
    Layout("token", 16), Layout("token", 256, group=8), Layout("row", group=16, queries=2),
    Layout("token", dtype=torch.float16), Layout("head", 1),
]  # fmt: skip


def _name(layout: Layout) -> str:
    return " ".join(map(str, layout))


@pytest.mark.parametrize("layout", [*READ_BY_HOPPER, *OTHERS], ids=_name)
def test_scales_pages_and_groups(layout: Layout, backend: str) -> None:
    drawn = _draw(layout)
    if backend == "hopper":
        assert _streams(drawn) == (layout in READ_BY_HOPPER)
    _assert_right(drawn, causal=layout.queries > 1)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window_size": (200, 0)},
    "chunk": {"attention_chunk": 300, "causal": True},
    "softcap": {"softcap": 15.0},
    "alibi": {"alibi_slopes": torch.arange(1, 9) / 64},
    "sink": {"learnable_sink": torch.linspace(-2, 3, 8), "causal": True},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("layout", [Layout("token", queries=2), Layout("head", 16)], ids=_name)
def test_features(layout: Layout, name: str) -> None:
    features = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in FEATURES[name].items()}
    _assert_right(_draw(layout), **features)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("operand", [0, 1], ids=["k", "v"])
def test_a_nan_inside_stays_in_its_row_and_head(operand: int, page: int, backend: str) -> None:
    """The portable kernel takes it for 480."""
    drawn = _draw(Layout("head", page))
    before = flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords)
    row, slot = 3, 70
    at = (row, slot)
    if page:
        at = (int(drawn.keywords["block_table"][row, slot // page]), slot % page)
    drawn.caches[operand].view(torch.uint8)[at][1, 3] = NAN
    out = flash_attn_with_kvcache(drawn.q, *drawn.caches, **drawn.keywords)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[row, :, 4:, 3 if operand else slice(None)] = True  # the heads of KV head 1; of V its dim
    assert torch.equal(out[~hit], before[~hit])
    assert backend != "hopper" or bool(out[hit].isnan().all())


@pytest.mark.parametrize("layout", [Layout("token"), Layout("head", 16, queries=2)], ids=_name)
def test_a_captured_graph_replays_with_other_lengths(layout: Layout) -> None:
    """Each time with the bits of a call of its own, and of another one."""
    drawn = _draw(layout)
    caches = [torch.where(x.view(torch.uint8) == NAN, 0, x.view(torch.uint8)).view(E4M3)
              for x in drawn.caches]  # fmt: skip
    keywords = {n: x.nan_to_num(1.0) if n.endswith("descale") else x
                for n, x in drawn.keywords.items()}  # fmt: skip
    lengths = keywords["cache_seqlens"]

    def call() -> Tensor:
        return flash_attn_with_kvcache(drawn.q, *caches, **keywords, causal=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for replay in range(200):
        new = torch.randint(0, CAPACITY + 1, (len(LENGTHS),), device=DEVICE, dtype=torch.int32)
        lengths.copy_(torch.where(torch.rand(len(LENGTHS), device=DEVICE) < 0.3, 0, new))
        graph.replay()
        expected = call()
        assert torch.equal(out, expected), replay
        assert torch.equal(call(), expected), replay
