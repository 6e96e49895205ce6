"""What only the kernels for Hopper can get wrong: tiles, tensor maps, the order of work.

Head dims that they do, one for each kind of tile; the features themselves are tested elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)
from flashtile.testing import (
    Case,
    Problem,
    assert_matches_reference,
    assert_within_budget,
    poisoned_allocations,
    run,
)
from flashtile.testing.functions import bending, prefixed, remembering, striding

BF16 = torch.bfloat16

LENGTHS = ((1, 1), (64, 63), (65, 129), (130, 40), (128, 300), (0, 5), (7, 0), (257, 257), (3, 0))
"""Tiles of which either warpgroup, or one, or none has queries, or keys."""

TILES = [(64, 64, 512), (64, 64, 8192), (128, 128, 512), (192, 128, 512), (256, 256, 512)]
"""(head_dim, head_dim_v, max_seqlen): a large bound chooses the tile of long sequences."""

BACKWARD_DIMS = [(64, 64), (128, 128), (192, 192), (192, 128), (256, 256)]
"""(head_dim, head_dim_v): above 128 both warpgroups have the same keys, and of 192 the first one
has twice as many columns."""


@pytest.fixture(autouse=True)
def _only_hopper(backend: str) -> None:
    if backend != "hopper":
        pytest.skip("the portable kernels have tests of their own")


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


@pytest.mark.parametrize(
    "features",
    [{}, {"causal": True}, {"window_size": (40, 10)}, {"window_size": (9, -1)},
     {"attention_chunk": 90}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("dim", "dim_v", "bound"), TILES, ids=str)
def test_packed_lengths(dim: int, dim_v: int, bound: int, features: dict[str, Any]) -> None:
    """Rows past the last offset, sequences without queries or keys, warpgroups that pass over
    different blocks, rows that see nothing in their tile's first blocks."""
    case = Case("tile", heads=6, head_dim=dim, head_dim_v=dim_v, lengths=LENGTHS, features=features,
                tensors=("learnable_sink",))  # fmt: skip
    problem = case.draw(dim, BF16, "cuda")
    problem.keywords.update(max_seqlen_q=bound, max_seqlen_k=bound)
    problem.tensors["q"] = torch.cat((problem.tensors["q"], torch.full_like(
        problem.tensors["q"][:70], math.nan)))  # fmt: skip
    with poisoned_allocations():
        results = assert_matches_reference(problem)
    assert results.out[-70:].eq(0).all()
    assert results.lse[:, -70:].eq(-math.inf).all()


@pytest.mark.parametrize("bound", [512, 1 << 17])
@pytest.mark.parametrize("features", [{}, {"causal": True}], ids=str)
def test_many_packed_sequences(bound: int, features: dict[str, Any]) -> None:
    """More than the producer looks at together, in all orders of length. The larger bound leaves
    one head at a time in L2."""
    lengths = tuple((37 * n % 130, 2 ** (n % 10) - (n + n // 10) % 2) for n in range(200))
    case = Case("many", heads=6, head_dim=128, lengths=lengths, features=features)
    problem = case.draw(5, BF16, "cuda")
    problem.keywords.update(max_seqlen_q=bound, max_seqlen_k=bound)
    with poisoned_allocations():
        assert_matches_reference(problem)


def test_documents_of_sequences_without_keys() -> None:
    """The last key's id is the last of its tensor; a query past it has none to read."""
    lengths = ((130, 200), (70, 0))
    case = Case("ids", lengths=lengths, head_dim=128, features={"causal": True})
    problem = case.draw(3, BF16, "cuda")
    ids = (torch.arange(200, device="cuda") // 70, torch.arange(200, device="cuda") // 70)
    problem.keywords["document_ids"] = tuple(x.int() for x in ids)
    results = assert_matches_reference(problem)
    assert results.out[130:].eq(0).all()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("size", [8, 16, 64, 128, 384])
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (96, 96), (192, 128), (256, 256)], ids=str)
def test_pages(dim: int, dim_v: int, size: int, heads_first: bool) -> None:
    """The bits of the same keys without pages. What a page has after a sequence's end is NaN, and
    entries of the table past its last page are no pages."""
    lengths = (1, 130, 0, 700, 385)
    widest = max(-(-n // size) for n in lengths)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    keys, values = _randn(starts[-1], 2, dim), _randn(starts[-1], 2, dim_v)
    pools = [x.new_full((5 * widest, size, *x.shape[1:]), math.nan) for x in (keys, values)]
    if heads_first:
        pools = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pools]
    table = torch.full((5, widest + 1), -1, dtype=torch.int32, device="cuda")
    pages = iter(torch.randperm(5 * widest).tolist())
    for row, length in enumerate(lengths):
        for at in range(0, length, size):
            page, n = next(pages), min(size, length - at)
            table[row, at // size] = page
            for pool, x in zip(pools, (keys, values), strict=True):
                pool[page, :n] = x[starts[row] + at : starts[row] + at + n]
    q, cu_q = _randn(5 * 70, 4, dim), _ints(*range(0, 351, 70))
    bounds = {"max_seqlen_q": 70, "max_seqlen_k": 1000, "causal": True}
    expected = flash_attn_varlen_func(q, keys, values, cu_q, _ints(*starts), **bounds)
    with poisoned_allocations():
        found = flash_attn_varlen_func(
            q, *pools, cu_q, None, seqused_k=_ints(*lengths), block_table=table, **bounds
        )
    assert torch.equal(found, expected)


def _cache(layout: str, dim: int) -> Tensor:
    """(5, 300, 2, dim), as caches lie in memory."""
    if layout == "heads_first":
        return _randn(5, 2, 300, dim).transpose(1, 2)
    if layout == "tokens_first":
        return _randn(300, 5, 2, dim).transpose(0, 1)
    if layout == "first_slots":  # gaps between rows
        return _randn(5, 400, 2, dim)[:, :300]
    if layout == "one_row":  # shared by all
        return _randn(1, 300, 2, dim).expand(5, 300, 2, dim)
    if layout == "one_head":
        return _randn(5, 300, 1, dim).expand(5, 300, 2, dim)
    return _randn(5, 300, 2, dim)


@pytest.mark.parametrize(
    "layout",
    ["contiguous", "heads_first", "tokens_first", "first_slots", "one_row", "one_head"],
)
@pytest.mark.parametrize("dim", [128, 256])
def test_caches(layout: str, dim: int) -> None:
    """Every way to lie in memory, with rows that are read twice, and slots before the first token:
    one row has no other slots."""
    q, caches = _randn(5, 70, 4, dim), [_cache(layout, dim) for _ in range(2)]
    keywords: dict[str, Any] = {
        "cache_seqlens": _ints(300, 77, 300, 0, 129), "cache_leftpad": _ints(0, 13, 300, 0, 1),
        "cache_batch_idx": _ints(4, 0, 4, 2, 2), "causal": True,
    }  # fmt: skip
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, dtype=None)
    with poisoned_allocations():
        found = flash_attn_with_kvcache(q, *caches, **keywords)
    assert_within_budget(found, eager.out, golden.out)


@pytest.mark.parametrize("features", [{"softmax_scale": 1e9}, {"softcap": 1e9}], ids=str)
def test_large_units(features: dict[str, Any]) -> None:
    """Scores near 1 whose unit is not: rows that see nothing in their first block stay finite."""
    case = Case("unit", 200, 301, head_dim=128, features={"window_size": (20, 20), **features})
    problem = case.draw(5, BF16, "cuda")
    if "softmax_scale" in features:
        problem.tensors["q"] *= 1e-10
    assert_matches_reference(problem)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "length"), [(64, 500), (64, 2100), (128, 500), (256, 500)])
def test_more_tiles_than_ctas(dim: int, length: int, causal: bool) -> None:
    """A head's bits do not depend on what else there is to do, nor on launches before."""
    q, k, v = (_randn(3, length, 60, dim) for _ in range(3))
    alone = [x[1:2, :, 17:18].contiguous() for x in (q, k, v)]
    expected, expected_lse = flash_attn_func(*alone, causal=causal, return_lse=True)
    for _ in range(10):
        with poisoned_allocations():
            out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
        assert torch.equal(out[1:2, :, 17:18], expected)
        assert torch.equal(lse[1:2, 17:18], expected_lse)
        assert out.isfinite().all()


def _leave_nan_in_freed_memory() -> None:
    """For what is allocated next. `poisoned_allocations` asks for deterministic algorithms, and so
    for dQ in integers."""
    sizes = (2**17, 2**17, 2**24, 2**24)  # of torch's pools for small and large tensors
    held = [torch.full((n,), math.nan, device="cuda") for n in sizes for _ in range(8)]
    del held


@pytest.mark.parametrize(
    "features",
    [{}, {"causal": True}, {"window_size": (9, -1)}, {"window_size": (10, 10)},
     {"attention_chunk": 70}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("dim", "dim_v"), BACKWARD_DIMS, ids=str)
def test_gradients_at_edges_of_tiles(dim: int, dim_v: int, features: dict[str, Any]) -> None:
    """Lengths around 64 and 128, a group of three; keys that no query sees get exactly 0."""
    for seqlen_q, seqlen_k in ((1, 1), (65, 129), (127, 1), (200, 64), (64, 600), (600, 64)):
        case = Case("edge", seqlen_q, seqlen_k, heads=6, head_dim=dim, head_dim_v=dim_v,
                    features=features)  # fmt: skip
        problem = case.draw(seqlen_q, BF16, "cuda")
        _leave_nan_in_freed_memory()
        results = assert_matches_reference(problem)
        if (seqlen_q, features.get("window_size")) == (64, (10, 10)):
            for name in ("k", "v"):
                assert results.grads[name][:, :500].eq(0).all()


OWN_HEADS: list[dict[str, Any]] = [
    {"causal": True}, {"window_size": (-1, 20)}, {"causal": True, "softcap": 5.0},
    {"causal": True, "dropout_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("features", OWN_HEADS, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_packed_gradients_of_heads_of_their_own(dim: int, features: dict[str, Any]) -> None:
    """Of no group, in sums of floats, and more tiles than CTAs: last blocks of all lengths, half
    empty or not, sequences without queries or keys, keys past a tile's last query."""
    lengths = tuple((n % 200, (n + 33 * (n % 5) - 40) % 330) for n in range(1, 201))
    case = Case("own", heads=3, kv_heads=3, head_dim=dim, lengths=lengths, features=features)
    problem = case.draw(dim, BF16, "cuda")
    problem.keywords.update(max_seqlen_q=200, max_seqlen_k=330)
    _leave_nan_in_freed_memory()
    assert_matches_reference(problem)


@pytest.mark.parametrize("features", OWN_HEADS[:2], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_dense_gradients_of_heads_of_their_own(dim: int, features: dict[str, Any]) -> None:
    """Long enough that shares of dQ lag, and more tiles than CTAs: steps that a warpgroup passes
    over, tiles that no query sees, queries that see no key."""
    for seqlen_q, seqlen_k in ((600, 600), (700, 577), (33, 1100), (1100, 700)):
        case = Case("own", seqlen_q, seqlen_k, heads=20, kv_heads=20, head_dim=dim,
                    features=features)  # fmt: skip
        problem = case.draw(seqlen_q, BF16, "cuda")
        _leave_nan_in_freed_memory()
        assert_matches_reference(problem, str((seqlen_q, seqlen_k)))


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_gradients_of_keys_repeat(dim: int) -> None:
    """dK and dV are summed in one order; dQ is not."""
    problem = Case("bits", 515, 643, heads=24, kv_heads=8, head_dim=dim,
                   features={"causal": True}).draw(9, BF16, "cuda")  # fmt: skip
    expected = run(problem)
    for _ in range(20):
        found = run(problem)
        assert torch.equal(found.out, expected.out)
        assert all(torch.equal(found.grads[n], expected.grads[n]) for n in "kv")


@pytest.mark.parametrize(
    "features",
    [{}, {"causal": True}, {"window_size": (70, 0)}, {"window_size": (10, 90)},
     {"attention_chunk": 90}, {"causal": True, "attention_chunk": 150}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("lengths", [(), ((300, 300), (1, 700), (0, 9), (500, 130))], ids=bool)
@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 4), (128, 4), (256, 2), (256, 4), (256, 12)])
def test_deterministic_gradients(
    dim: int, kv_heads: int, lengths: tuple[tuple[int, int], ...], features: dict[str, Any]
) -> None:
    """dQ is bitwise the same in integers; blocks that see no key are 0."""
    case = Case("same bits", 515, 343, heads=12, kv_heads=kv_heads, head_dim=dim, lengths=lengths,
                features=features)  # fmt: skip
    problem = case.draw(dim, BF16, "cuda")
    with poisoned_allocations():
        assert_matches_reference(problem)
        problem.keywords["deterministic"] = True
        expected = assert_matches_reference(problem)
    for _ in range(10):
        found = run(problem)
        assert all(torch.equal(found.grads[n], expected.grads[n]) for n in "qkv")


def _listed_masks(kind: str, lengths: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Of 780 queries and 643 keys: the 13th block of 64 queries shares a list's with none."""
    ids = [torch.randint(0, 9, (1, n), device="cuda").sort(-1).values.int() for n in (780, 643)]
    if lengths:
        totals = [sum(x) for x in zip(*lengths, strict=True)]
        ids = tuple(torch.arange(n, device="cuda").int() // 170 for n in totals)
        bounds = {"max_seqlen_q": 780, "max_seqlen_k": 700} if "bounded" in kind else {}
        return {"document_ids": ids, **bounds}
    if kind.endswith("documents"):
        return {"document_ids": tuple(x.expand(2, -1).contiguous() for x in ids)}
    if kind == "causal tensor":
        return {"attn_mask": torch.ones(780, 643, dtype=torch.bool, device="cuda").tril(-137)}
    shape = (2, 12 if kind == "heads" else 1, 7, 6)
    codes = torch.randint(0, 3, shape, device="cuda")
    codes = codes.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :780, :643]
    return {
        "attn_mask": (codes == 2) | ((codes == 1) & (torch.rand(codes.shape, device="cuda") < 0.5))
    }


@pytest.mark.parametrize(
    "kind",
    ["documents", "causal documents", "packed documents", "bounded packed documents", "blocks",
     "heads", "window blocks", "chunk blocks", "causal tensor"],
)  # fmt: skip
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_gradients_of_masks_given_as_tensors(dim: int, kind: str) -> None:
    """Lists of blocks that are full, partial and neither, of all heads and of each: those that two
    warpgroups or two tiles share, and that begin past the end. Packed sequences have none unless
    their longest is known."""
    lengths = ((300, 300), (1, 700), (0, 9), (500, 130), (780, 643)) if "packed" in kind else ()
    features: dict[str, Any] = {"causal": True} if kind == "causal documents" else {}
    features |= {"window_size": (300, 90)} if "window" in kind else {}
    features |= {"causal": True, "attention_chunk": 200} if "chunk" in kind else {}
    case = Case("same bits", 780, 643, heads=12, kv_heads=4, head_dim=dim, lengths=lengths,
                features=features)  # fmt: skip
    _assert_repeats(case.draw(dim, BF16, "cuda"), _listed_masks(kind, lengths))


def _assert_repeats(problem: Problem, given: dict[str, Any]) -> None:
    """With deterministic=True, to the bit."""
    problem.keywords.update(given, deterministic=True)
    with poisoned_allocations():
        expected = assert_matches_reference(problem)
    for _ in range(10):
        found = run(problem)
        assert all(torch.equal(found.grads[n], expected.grads[n]) for n in "qkv")


FUNCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("prefix", {}), ("bare prefix", {}), ("recent", {}), ("strided", {}),
    ("prefix", {"causal": True}), ("strided", {"causal": True}),
    ("recent", {"window_size": (300, 90)}), ("prefix", {"causal": True, "attention_chunk": 200}),
    ("prefix", {"dropout_p": 0.2}), ("recent", {"softcap": 5.0}), ("prefix", {"score_mod": True}),
    ("prefix", {"document_ids": True}), ("recent", {"attn_mask": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "features"), FUNCTIONS, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_gradients_of_mask_functions(
    dim: int, name: str, features: dict[str, Any]
) -> None:
    """A function with ranges, also beside tensors with lists, and one without, whose blocks are the
    band's."""
    counts = torch.tensor([333, 70], dtype=torch.int32, device="cuda")
    function = {"prefix": prefixed(counts, True), "bare prefix": prefixed(counts, False),
                "recent": remembering(), "strided": striding()}[name]  # fmt: skip
    given: dict[str, Any] = {**features, "mask_mod": function}
    if "document_ids" in features:
        given |= _listed_masks("documents", ())
    if "attn_mask" in features:
        given |= _listed_masks("heads", ())
    if "score_mod" in features:
        given["score_mod"] = bending(torch.linspace(-0.4, 0.7, 12, device="cuda"))
    case = Case("same bits", 780, 643, heads=12, kv_heads=4, head_dim=dim)
    _assert_repeats(case.draw(dim, BF16, "cuda"), given)


@pytest.mark.parametrize("name", ["prefix", "bare prefix", "recent"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_gradients_of_packed_mask_functions(dim: int, name: str) -> None:
    """In use as a whole or in part, and where the longest are unknown."""
    lengths = ((300, 300), (1, 700), (0, 9), (500, 130), (780, 643))
    counts = torch.tensor([40, 333, 0, 70, 129], dtype=torch.int32, device="cuda")
    function = prefixed(counts, name == "prefix") if "prefix" in name else remembering()
    case = Case("same bits", heads=12, kv_heads=4, head_dim=dim, lengths=lengths)
    known = {"max_seqlen_q": 780, "max_seqlen_k": 700}
    used = {"seqused_q": _ints(170, 1, 0, 500, 700), "seqused_k": _ints(300, 650, 9, 65, 600)}
    for bounds in (known, known | used, {}):
        _assert_repeats(case.draw(dim, BF16, "cuda"), {"mask_mod": function, **bounds})


def test_deterministic_gradients_of_one_side_of_bounds() -> None:
    """What queries say of keys is no bound of the keys' tiles."""
    for dim in (64, 128, 256):
        function = prefixed(torch.tensor([333, 70], dtype=torch.int32, device="cuda"), True)
        case = Case("same bits", 780, 643, heads=12, kv_heads=4, head_dim=dim)
        given = {"mask_mod": replace(function, queries=None)}
        _assert_repeats(case.draw(dim, BF16, "cuda"), given)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_of_groups_in_one_part(dim: int, deterministic: bool) -> None:
    """240 tiles of 80 KV heads (480 at head dim 256): one CTA has all query heads of a group."""
    case = Case("groups", 350, 350, heads=160, kv_heads=80, head_dim=dim,
                features={"causal": True, "deterministic": deterministic})  # fmt: skip
    assert_matches_reference(case.draw(dim, BF16, "cuda"))


@pytest.mark.parametrize(
    "features",
    [{"causal": True}, {"window_size": (60, 10)}, {"causal": True, "softcap": 5.0},
     {"causal": True, "attention_chunk": 100}],
    ids=str,
)  # fmt: skip
def test_tiles_of_192_rows(features: dict[str, Any]) -> None:
    """Of three warpgroups at head dim 64, on both sides of their rows' edges; 2,050 keys have
    blocks of 128, the others of 64."""
    sizes = ((129, 129), (191, 200), (192, 192), (193, 300), (385, 511), (512, 512), (2050, 2050))
    for seqlen_q, seqlen_k in sizes:
        case = Case("rows", seqlen_q, seqlen_k, batch=1, heads=2, kv_heads=1, head_dim=64,
                    features=features)  # fmt: skip
        assert_matches_reference(case.draw(seqlen_q, BF16, "cuda"), str((seqlen_q, seqlen_k)))


PACKED: list[dict[str, Any]] = [
    {}, {"causal": True}, {"window_size": (40, 10)}, {"window_size": (9, -1)},
    {"causal": True, "softcap": 5.0}, {"causal": True, "attention_chunk": 30},
]  # fmt: skip


@pytest.mark.parametrize("features", PACKED, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (28, 4), (64, 1), (32, 8)])
@pytest.mark.parametrize(("dim", "seqlen_q"), [(64, 40), (128, 17), (128, 100), (256, 70)])
def test_packed_heads(
    dim: int, seqlen_q: int, heads: int, kv_heads: int, features: dict[str, Any]
) -> None:
    """Query heads of a KV head in one tile, of a group that may be no power of two: results, lse,
    and gradients that follow from it."""
    case = Case("packed", seqlen_q, 300, heads=heads, kv_heads=kv_heads, head_dim=dim,
                features=features, tensors=("learnable_sink", "alibi_slopes"))  # fmt: skip
    problem = case.draw(dim + seqlen_q, BF16, "cuda")
    with poisoned_allocations():
        assert_matches_reference(problem)


def test_packed_heads_of_any_strides() -> None:
    """Queries whose heads are outermost, and whose tokens are."""
    k, v = _randn(2, 300, 2, 128), _randn(2, 300, 2, 128)
    q = _randn(2, 40, 14, 128)
    expected = flash_attn_func(q, k, v, causal=True)
    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)):
        other = q.permute(order).contiguous().permute(order)
        assert torch.equal(flash_attn_func(other, k, v, causal=True), expected)


@pytest.mark.parametrize("keys", [40, 200, 300, 330])
@pytest.mark.parametrize("dim", [128, 192, 256])
def test_float_masks_end_where_the_keys_do(dim: int, keys: int) -> None:
    """A list of blocks and no mask: of a tile of 128 keys several blocks may be past the end, and
    none of them need be the first."""
    q, (k, v) = _randn(2, 150, 4, dim), (_randn(2, keys, 2, dim) for _ in range(2))
    mask = torch.zeros(2, 1, 1, keys, device="cuda", dtype=BF16)
    for padded in (0, 20):  # from the left
        mask[1, ..., :padded] = -math.inf
        out, lse = flash_attn_func(q, k, v, attn_mask=mask, return_lse=True)
        golden = reference.attention(q, k, v, attn_mask=mask)
        eager = reference.attention(q, k, v, attn_mask=mask, dtype=None)
        assert_within_budget(out, eager.out, golden.out)
        torch.testing.assert_close(lse.double(), golden.lse.double(), rtol=0, atol=1e-2)
