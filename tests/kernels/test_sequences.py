"""Where the Triton kernels find rows: lengths in use, pages, caches, very many sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_varlen_func, flash_attn_with_kvcache, ops, reference
from flashtile.testing import (
    Case,
    Problem,
    assert_matches_reference,
    assert_within_budget,
    fence,
    run,
)
from flashtile.testing.allocations import assert_touches_nothing_else
from flashtile.testing.caches import assert_cache_gradients
from flashtile.testing.drawing import GARBAGE

FP32, FP16 = torch.float32, torch.float16


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _packed(lengths: tuple[tuple[int, int], ...], seed: int = 0, **changes: Any) -> Problem:
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 8, "features": {"causal": True}}
    return Case("packed", lengths=lengths, **(shape | changes)).draw(seed)


def _every_other(x: Tensor) -> Tensor:
    """x, with something else between its elements."""
    return torch.stack((x, torch.full_like(x, 3)), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("names", [
    ("cu_seqlens_q", "cu_seqlens_k"), ("seqused_q", "seqused_k"), ("block_table",),
    ("learnable_sink",),
], ids=lambda names: names[0])  # fmt: skip
def test_lengths_tables_and_sinks_of_any_stride(names: tuple[str, ...]) -> None:
    paged, sink = "block_table" in names, [n for n in names if "sink" in n]
    problem = _packed(((20, 18), (3, 20)), tensors=tuple(sink), page_size=4 if paged else 0)
    if "seqused_q" in names:
        problem.keywords.update(seqused_q=_ints(17, 2), seqused_k=_ints(15, 20))
    strided = {n: _every_other(x) for n, x in problem.keywords.items() if n in names}
    leaves = {n: _every_other(x) for n, x in problem.tensors.items() if n in names}
    assert {*strided, *leaves} == set(names)
    assert_matches_reference(
        problem._replace(tensors=problem.tensors | leaves, keywords=problem.keywords | strided)
    )


@pytest.mark.parametrize("name", ["cu_seqlens_k", "seqused_k"])
def test_keys_past_a_tables_end_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lengths are on a GPU nobody has looked at them before the kernel."""
    monkeypatch.setattr(ops.values, "check", lambda call: None)
    problem = _packed(((20, 18), (3, 20)), page_size=4)
    table = problem.keywords["block_table"][:, :5].contiguous()
    fitting = {"cu_seqlens_k": _ints(0, 18, 38), "seqused_k": _ints(18, 20)}[name]
    outs = []
    for lengths in (fitting, fitting + 15 * (fitting >= fitting.max())):
        keywords = problem.keywords | {"block_table": table, name: lengths.int()}
        if name == "seqused_k":
            keywords["cu_seqlens_k"] = None
        outs.append(flash_attn_varlen_func(
            **problem.tensors, max_seqlen_q=20, max_seqlen_k=20, **keywords
        ))  # fmt: skip
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()


def _in_use(cu_seqlens: Tensor, counts: tuple[int, ...], total: int) -> Tensor:
    there = torch.zeros(total, dtype=torch.bool)
    for start, count in zip(cu_seqlens.tolist(), counts, strict=False):
        there[start : start + count] = True
    return there


@pytest.mark.parametrize(
    ("sides", "tensors"),
    [("q", ()), ("k", ()), ("qk", ()), ("qk", ("bias",)), ("qk", ("attn_mask",))],
)
def test_rows_out_of_use(sides: str, tensors: tuple[str, ...]) -> None:
    """seqused: what lies past it, and past the last offset, is NaN and never read; results there
    are 0 and -inf, gradients 0."""
    problem = _packed(((20, 18), (3, 20), (18, 5)), tensors=tensors)
    used, there = {"q": (17, 0, 18), "k": (18, 16, 0)}, {}
    for side in "qk":
        cu = problem.keywords[f"cu_seqlens_{side}"]
        counts = used[side] if side in sides else tuple(cu.diff().tolist())
        there[side] = _in_use(cu, counts, int(cu[-1]) + 19)
        if side in sides:
            problem.keywords[f"seqused_{side}"] = _ints(*counts)
    for name in "qkv":
        longer = torch.cat((problem.tensors[name], problem.tensors[name][:19]))
        longer[~there["q" if name == "q" else "k"]] = math.nan
        problem.tensors[name] = longer
    results = assert_touches_nothing_else(problem)
    assert results.out[~there["q"]].eq(0).all()
    assert results.lse[:, ~there["q"]].eq(-math.inf).all()
    for name in "qkv":
        assert results.grads[name][~there["q" if name == "q" else "k"]].eq(0).all()


@pytest.mark.parametrize("longest", [20, 5000, None, torch.tensor(3)], ids=str)
def test_any_bound_of_the_lengths(longest: Any) -> None:
    """Exact, too large, absent or on the device: the same bits."""
    problem = _packed(((18, 20), (0, 4), (5, 5)))
    expected = run(problem)
    bounds = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    found = run(problem._replace(keywords=problem.keywords | bounds))
    assert torch.equal(found.out, expected.out)
    for name, grad in found.grads.items():
        assert torch.equal(grad, expected.grads[name])


def test_more_sequences_than_are_searched_at_once() -> None:
    """260 sequences of 0 to 2 tokens, then a longer one: more offsets than one block of them."""
    lengths = (*((i % 3, 1 + i % 2) for i in range(260)), (20, 33))
    problem = _packed(lengths, heads=1, kv_heads=1)
    out, lse = flash_attn_varlen_func(**problem.tensors, **problem.keywords, return_lse=True)
    golden = reference.attention(**problem.tensors, **problem.keywords)
    torch.testing.assert_close(out, golden.out.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, golden.lse.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [((0, 0),), ((5, 0), (0, 0)), ((0, 9),), ((0, 0), (16, 16))])
def test_sequences_of_nothing(lengths: Any) -> None:
    assert_touches_nothing_else(_packed(lengths))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_table_entries_past_the_end(garbage: int) -> None:
    """They are never followed, and what no sequence uses of the pages is NaN."""
    lengths = ((5, 20), (0, 3), (18, 16), (2, 0))
    problem = _packed(lengths, page_size=8, seed=1)
    pages, table = problem.tensors["k"], problem.keywords["block_table"]
    there = torch.zeros(pages.shape[:2], dtype=torch.bool)
    for row, (_, length) in enumerate(lengths):
        for slot in range(length):
            there[table[row, slot // 8], slot % 8] = True
        table[row, -(-length // 8) :] = garbage
    for name in "kv":
        problem.tensors[name][~there] = math.nan
    results = assert_touches_nothing_else(problem)
    for name in "kv":
        assert results.grads[name][~there].eq(0).all()


def test_pages_that_sequences_share() -> None:
    """A shared prefix is read by both and gets the sum of their gradients."""
    problem = _packed(((18, 20), (5, 17)), page_size=8, seed=2)
    table = problem.keywords["block_table"]
    table[1, :2] = table[0, :2]
    assert_touches_nothing_else(problem)


def test_lengths_of_pages_in_use() -> None:
    """seqused_k in the place of cu_seqlens_k."""
    problem = _packed(((18, 20), (5, 17), (2, 9)), page_size=7, seed=3)
    problem.keywords.update(cu_seqlens_k=None, seqused_k=_ints(13, 0, 9))
    assert_touches_nothing_else(problem)


def _assert_cache_call(q: Tensor, caches: list[Tensor], keywords: dict[str, Any]) -> None:
    """out, lse and the caches after the call, canaries around the caches."""
    fences = [fence(x) for x in caches]
    out, lse = flash_attn_with_kvcache(
        q, *(guard.tensor for guard in fences), **keywords, return_softmax_lse=True
    )
    golden, k_after, v_after = reference.attention_with_kvcache(q, *caches, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, dtype=None)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
    for guard, after in zip(fences, (k_after, v_after), strict=True):
        guard.assert_canaries("cache")
        assert torch.equal(guard.tensor.isnan(), after.isnan())
        assert torch.equal(guard.tensor.nan_to_num(), after.nan_to_num())


VARIANTS: list[dict[str, Any]] = [
    {"causal": True},
    {"window_size": (7, 2), "softcap": 3.0},
    {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.3]),
     "learnable_sink": torch.tensor([0.5, -1.0])},
]  # fmt: skip


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_reading_a_cache(variant: dict[str, Any], seqlen_q: int, page_size: int) -> None:
    """Lengths 0, some and all; what is out of use is NaN."""
    dtype = FP16 if page_size else FP32
    lengths, keywords = (0, 17, 28), dict(variant)
    q = torch.randn(3, seqlen_q, 2, 8, dtype=dtype)
    shape = (12, 7, 1, 8) if page_size else (3, 28, 1, 8)
    caches = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    there = torch.zeros(shape[:2], dtype=torch.bool)
    table = torch.randperm(12).view(3, 4).to(torch.int32)
    for row, length in enumerate(lengths):
        for slot in range(length):
            there[(table[row, slot // 7], slot % 7) if page_size else (row, slot)] = True
    for cache in caches:
        cache[~there] = math.nan
    if page_size:
        keywords["block_table"] = table
    _assert_cache_call(q, caches, keywords | {"cache_seqlens": _ints(*lengths)})


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("leftpad", [False, True])
def test_remapped_and_padded_rows(leftpad: bool, mask: bool) -> None:
    """cache_batch_idx and cache_leftpad; a mask is indexed by slot."""
    q = torch.randn(3, 5, 2, 8)
    caches = [torch.randn(5, 28, 1, 8) for _ in range(2)]
    keywords: dict[str, Any] = {
        "causal": True, "cache_seqlens": _ints(9, 28, 3), "cache_batch_idx": _ints(4, 0, 3),
    }  # fmt: skip
    if leftpad:
        keywords["cache_leftpad"] = _ints(2, 11, 3)
    if mask:
        keywords["attn_mask"] = torch.rand(3, 2, 5, 28) > 0.4
    _assert_cache_call(q, caches, keywords)


@pytest.mark.parametrize("page_size", [0, 7])
def test_appending_to_a_cache(page_size: int) -> None:
    """New keys, rotated, are in the cache before the kernel reads it."""
    q, k, v = (torch.randn(3, 4, h, 8) for h in (2, 1, 1))
    shape = (12, 7, 1, 8) if page_size else (3, 28, 1, 8)
    angle = torch.rand(40, 4) * 6.28
    keywords: dict[str, Any] = {
        "k": k, "v": v, "causal": True, "cache_seqlens": _ints(0, 13, 24),
        "rotary_cos": angle.cos(), "rotary_sin": angle.sin(),
    }  # fmt: skip
    if page_size:
        keywords["block_table"] = torch.randperm(12).view(3, 4).to(torch.int32)
    _assert_cache_call(q, [torch.randn(shape) for _ in range(2)], keywords)


def test_gradients_of_a_padded_cache() -> None:
    """Reading a dense cache is differentiable: slots out of use get 0."""
    q, k, v = (torch.randn(2, n, h, 8).requires_grad_() for n, h in ((5, 2), (20, 1), (20, 1)))
    lengths = {"cache_seqlens": _ints(17, 4), "cache_leftpad": _ints(3, 0)}
    assert_cache_gradients(q, k, v, {"causal": True, **lengths}, rtol=1e-5, atol=1e-5)


def test_rows_of_a_cache_that_sequences_share() -> None:
    """Two sequences read one row: its gradient is their sum, and rows that nobody reads get 0."""
    problem = Case("shared", 5, 20, batch=3, heads=2, kv_heads=1, head_dim=8).draw(4)
    keywords: dict[str, Any] = {"cache_batch_idx": _ints(2, 0, 2), "cache_seqlens": _ints(20, 9, 4)}
    q, k, v = (x.requires_grad_() for x in problem.tensors.values())
    assert_cache_gradients(q, k, v, keywords, rtol=1e-5, atol=1e-5)


def test_documents_of_packed_sequences_with_other_keys() -> None:
    """Ids of queries and of keys apart, indexed by token of the packed tensor."""
    problem = _packed(((18, 20), (3, 0), (5, 17)), seed=5)
    ids = tuple(torch.randint(0, 3, (n,)) for n in (26, 37))
    problem.keywords["document_ids"] = ids
    assert_matches_reference(problem)
