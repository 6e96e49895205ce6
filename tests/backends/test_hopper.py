"""The Hopper backend's host side: which tensors TMA can address, how, and with which tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import hopper_tiles, strides
from flashtile.api import normalise
from flashtile.backends import hopper, operands, tensormaps
from flashtile.compiling.cases import TOKENS, VARIANTS, Case
from flashtile.compiling.launches import launches
from flashtile.explain import explain_problem
from flashtile.hopper_backward_tiles import backward_tile, cannot_backward
from flashtile.hopper_tiles import TILES, cannot, forward_tile, padded_dim
from flashtile.kernels import scores
from flashtile.kernels.forward import Variant
from flashtile.kernels.hopper import block
from flashtile.kernels.numbers import opaque
from flashtile.plan import plan
from flashtile.problem import describe
from flashtile.testing.problems import LLAMA, SM_90, half


@pytest.mark.parametrize(
    ("dims", "padded"),
    [((64, 64), 64), ((40, 40), 64), ((96, 96), 128), ((128, 128), 128), ((192, 192), 256),
     ((256, 256), 256), ((264, 264), None)],
    ids=str,
)  # fmt: skip
def test_head_dims_are_padded_to_the_next_tile(dims: tuple[int, int], padded: int | None) -> None:
    assert padded_dim(*dims) == padded


def test_what_the_kernel_cannot_do_is_said() -> None:
    assert cannot(LLAMA) is None
    for changes, reason in (
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 320, "head_dim_v": 320}, "320"),
        ({"head_dim": 16, "head_dim_v": 16}, "not 16"),
        ({"head_dim": 100, "head_dim_v": 100}, "multiples of 8, this one is 100"),
        ({"seqlen_k": 0}, "empty"),
        ({"page_size": 24}, "pages of a power of two from 8, or a multiple of 128"),
        ({"head_dim": 64, "head_dim_v": 64, "features": frozenset({"bias"})}, "slower"),
    ):
        problem = replace(LLAMA, **changes)  # type: ignore[arg-type]
        assert reason in (cannot(problem) or "")
        assert plan(problem, SM_90).backend == "triton"


def test_masks_are_compiled_with_the_lists_that_calls_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sequences of which the longest is unknown have none."""
    unknown = {**VARIANTS["packed"](), "max_seqlen_q": None, "max_seqlen_k": None}
    unknown["attn_mask"] = torch.empty(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    monkeypatch.setitem(VARIANTS, "unknown", lambda: unknown)
    monkeypatch.setitem(VARIANTS, "known", lambda: unknown | {"max_seqlen_q": 9, "max_seqlen_k": 9})
    for name in ("unknown", "known"):
        found = launches(Case(name, "bfloat16", 64, 64), "sm_90")
        kernels = {launch.kernel.__name__ for launch in found}
        assert "attention_backward" in kernels
        assert ("list_blocks" in kernels) == (name == "known")


def test_tiles_fit_and_do_not_depend_on_lengths_alone() -> None:
    """Named barriers: six are Triton's, one is the queries', the others serve slots and turns."""
    for tile in TILES:
        assert tile.shared_bytes + 256 <= 232_448
        assert tile.slots + (tile.warpgroups if tile.turns else 0) <= 9
        assert tile.frees_queries in ("loaded", "read", "stored")
    for dim, dim_v in ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (256, 64)):
        problem = replace(LLAMA, head_dim=dim, head_dim_v=dim_v)
        assert cannot_backward(problem) is None
        backward = backward_tile(problem)
        assert backward.shared_bytes + 1024 <= 232_448
        assert backward.dim_v <= backward.padded_v <= backward.padded
        assert backward.wide == (dim > 128)
        assert backward.adds == ("after the first" if dim == 64 else "in any order")
        for tokens, adds in ((512, True), (2048, dim <= 128), (4096, dim == 64)):
            apart = replace(problem, seqlen_q=tokens, seqlen_k=tokens, kv_heads=problem.heads)
            assert backward_tile(apart).adds == ("after the first" if adds else "in any order")
        full = replace(problem, window_right=-1, seqlen_q=512, seqlen_k=512)
        assert backward_tile(full).adds == "in any order"
    for causal in (False, True):
        problem = replace(LLAMA, window_right=0 if causal else -1)
        assert backward_tile(problem).persistent
        sloped = replace(problem, features=problem.features | {"alibi_slopes"})
        assert backward_tile(sloped).persistent != causal
    dims = replace(LLAMA, head_dim=64, head_dim_v=64)
    for tokens, rows in ((128, 128), (512, 192), (1024, 128), (2048, 192), (16384, 192)):
        tile = forward_tile(replace(dims, seqlen_q=tokens, seqlen_k=tokens))
        assert tile.block_m == rows
        assert tile.turns == (tokens > 1024)
    for features, shape in (
        (("softcap",), (192, 128)), (("alibi_slopes",), (192, 128)), (("bias",), (128, 128)),
        (("dropout", "softcap"), (128, 128)), (("alibi_slopes", "softcap"), (192, 64)),
    ):  # fmt: skip
        tile = forward_tile(replace(dims, features=frozenset(features)))
        assert (tile.block_m, tile.block_n) == shape
    capped = replace(dims, features=frozenset({"softcap"}))
    for changes in ({"dtype": "float16"}, {"seqlen_q": 1024, "seqlen_k": 1024}):
        assert forward_tile(replace(capped, **changes)).block_n == 64
    packed = replace(dims, layout="varlen")
    assert not forward_tile(packed).turns
    assert forward_tile(replace(packed, window_left=100)).block_n == 64
    assert forward_tile(replace(packed, attention_chunk=100)).block_n == 64
    assert hopper_tiles.forward_tile(LLAMA).block_m == 128


@pytest.mark.parametrize(
    ("heads", "fitting", "together"),
    [(16, 5, 4), (16, 4, 4), (16, 3, 2), (16, 0, 1), (20, 6, 5), (7, 3, 3), (2, 100, 2), (0, 4, 1)],
)
def test_heads_are_taken_in_groups_alike(heads: int, fitting: int, together: int) -> None:
    assert hopper.heads_in_l2(heads, fitting) == together


def test_heads_of_a_group_are_taken_together() -> None:
    """12,345 keys: K and V of five heads fit."""
    call = normalise(half(1, 12345, 32, 128), *[half(1, 12345, 8, 128)] * 2, causal=True)
    assert hopper._work(call, forward_tile(describe(call))).together == opaque(16)


def test_which_tensors_tma_can_address() -> None:
    x = half(2, 20, 4, 64)
    assert strides.maps(x)
    assert strides.maps(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert strides.maps(half(2, 20, 3, 4, 64)[:, :, 1])
    assert strides.maps(x[:1].expand(1, 20, 4, 64))
    assert not strides.maps(x[:1].expand(2, 20, 4, 64))  # a stride of 0
    assert not strides.maps(half(2, 20, 4, 65)[..., :64])  # strides of 130 bytes
    assert not strides.maps(half(2 * 20 * 4 * 64 + 1)[1:].view(2, 20, 4, 64))  # 2 bytes off


def test_heads_are_folded_where_they_follow_each_other() -> None:
    x = half(2, 20, 4, 64)
    assert tensormaps.folds(x, 64)
    assert not tensormaps.folds(half(2, 4, 20, 64).transpose(1, 2), 64)
    assert not tensormaps.folds(half(2, 20, 4, 48), 64)  # the next head would fill the padding
    folded, apart = (tensormaps.tensor_map(x, 64, 64, fold) for fold in (True, False))
    assert (list(folded.shape), list(folded.strides)) == ([2, 20, 256], [5120, 256, 1])
    assert (list(apart.shape), list(apart.strides)) == ([2, 4, 20, 64], [5120, 64, 256, 1])
    assert list(folded.block_shape) == [1, 64, 64]
    assert list(apart.block_shape) == [1, 1, 64, 64]


def test_a_dense_call_is_planned_for_hopper() -> None:
    q, k = (torch.empty(1, 200, h, 96, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    problem = replace(describe(normalise(q, k, k, causal=True)), device="cuda")
    chosen = plan(problem, SM_90)
    assert (chosen.backend, chosen.hopper) == ("hopper", forward_tile(problem))
    assert (chosen.tile.block_q, chosen.tile.block_k) == (128, 128)


@pytest.mark.parametrize(
    ("keywords", "portable"),
    [({}, False), ({"softmax_scale": 2.0**27}, False), ({"softmax_scale": 1e9}, True),
     ({"softmax_scale": -1e9}, False), ({"softcap": 1e9}, True),
     ({"seqused_k": torch.tensor([3, 20], dtype=torch.int32)}, False)],
    ids=str,
)  # fmt: skip
def test_what_goes_to_the_portable_kernel(
    keywords: dict[str, Any], portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores whose unit times -1e30 is infinite, but not a cache with gaps between its rows."""
    asked: list[str] = []
    monkeypatch.setattr(hopper.triton, "forward", lambda call, plan: asked.append("portable"))
    monkeypatch.setattr(hopper, "run", lambda launch: asked.append("hopper"))
    x = half(2, 30, 4, 128)[:, :20]
    call = normalise(x, x, x, **keywords)
    hopper.forward(call, plan(replace(describe(call), device="cuda"), SM_90))
    assert asked == ["portable" if portable else "hopper"]


def _pool(layout: str, heads: int, dim: int) -> Tensor:
    """(6, 32, heads, dim): pages, or rows of a cache, as they lie in memory."""
    if layout == "heads first":  # HND, BHSD
        return half(6, heads, 32, dim).transpose(1, 2)
    if layout == "k beside v":
        return half(6, 2, 32, heads, dim)[:, 1]
    if layout == "tokens outermost":
        return half(32, 6, heads, dim).transpose(0, 1)
    if layout == "first slots":
        return half(6, 50, heads, dim)[:, :32]
    return half(6, 32, heads, dim)


LAYOUTS = ("contiguous", "heads first", "k beside v", "tokens outermost", "first slots")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_addresses_of_caches(layout: str, heads: int) -> None:
    """At the coordinates that kernels use: what the map leaves of their products, in 64 bits, is
    where a row lies, and rows past a length are past the map's end."""
    x = _pool(layout, heads, 64)
    assert strides.alike(x, x)
    steps = strides.Steps.of(x)
    found = tensormaps.slot_map(x, 16, 64, 64, steps)
    for page, head, first, left in ((0, 0, 0, 16), (5, heads - 1, 16, 7), (3, heads // 2, 8, 1)):
        unit = page * steps.batch + head * steps.head
        for i in (0, left - 1):
            at = (unit, tensormaps.END, first + left, tensormaps.END - left + i, 5)
            assert all(0 <= c < n for c, n in zip(at, found.shape, strict=True))
            address = 2 * sum(c * s for c, s in zip(at, found.strides, strict=True)) % 2**64
            assert address == 2 * (x[page, first + i, head, 5:].storage_offset()
                                   - x.storage_offset())  # fmt: skip
        assert tensormaps.END - left + left == found.shape[3]
    assert all(s % 8 == 0 and 2 * s < 2**40 for s in found.strides[:-1])


@pytest.mark.parametrize(("dim", "dim_v"), [(64, 128), (128, 64), (64, 256), (96, 128), (64, 64)])
@pytest.mark.parametrize("page", [0, 16])
def test_columns_past_a_head_are_past_the_maps_end(dim: int, dim_v: int, page: int) -> None:
    """Behind a head lies the next one, and behind the last the next slot, which may hold NaN."""
    k, v = (half(6, page or 512, 2, n) for n in (dim, dim_v))
    paged = {"block_table": torch.zeros(1, 32, dtype=torch.int32)} if page else {}
    q, used = half(1 if page else 6, 1000, 4, dim), torch.ones(6, dtype=torch.int32)
    call = normalise(q, k, v, seqused_k=used[: q.shape[0]], **paged)
    chosen = plan(replace(describe(call), device="cuda"), SM_90)
    tile, out = chosen.hopper, half(*q.shape[:-1], dim_v)
    assert tile is not None
    launch = hopper.forward_launch(call, chosen, out, torch.empty(call.lse_shape))
    for x, found, padded in zip(
        (k, v), launch.arguments[1:3], (tile.padded, tile.padded_v), strict=True
    ):
        assert found.base is x
        assert padded == x.shape[-1] or found.shape[-1] == x.shape[-1]


def test_caches_that_tma_cannot_address_are_the_portable_kernels() -> None:
    """And `explain` says so: k and v laid out differently, rows that are read twice."""
    used, (nhd, hnd) = torch.ones(6, dtype=torch.int32), (
        _pool(layout, 2, 128) for layout in ("contiguous", "heads first")
    )  # fmt: skip
    q, shared = half(6, 1000, 4, 128), nhd[:1].expand(6, -1, -1, -1)
    for k, v, backend in ((nhd, nhd, "hopper"), (hnd, hnd, "hopper"), (hnd, nhd, "triton"),
                          (shared, shared, "triton")):  # fmt: skip
        problem = replace(describe(normalise(q, k, v, seqused_k=used)), device="cuda")
        chosen = plan(problem, SM_90)
        assert chosen.backend == backend
        assert (dict(chosen.passed_over).get("hopper", "").startswith("reads caches by TMA")) == (
            backend == "triton"
        )
    assert not normalise(q, q, q).held  # nothing but whole tensors: any strides


PACKED = {
    (8, 1): {1: 8, 3: 8, 16: 8, 40: 8, 100: 8, 128: 1, 1000: 1},
    (32, 8): {1: 4, 3: 4, 16: 4, 40: 4, 100: 1, 128: 1, 200: 4},
    (28, 4): {1: 8, 3: 8, 16: 8, 40: 8, 100: 1},
    (64, 1): {1: 64, 3: 64, 100: 64},
    (128, 1): {1: 1, 3: 1},
    (8, 8): {1: 1, 3: 1},
}


def test_heads_are_packed_where_that_saves_tiles() -> None:
    for (heads, kv_heads), expected in PACKED.items():
        for seqlen_q, pack in expected.items():
            problem = replace(LLAMA, batch=32, seqlen_q=seqlen_q, heads=heads,
                              kv_heads=kv_heads)  # fmt: skip
            assert forward_tile(problem).pack == pack, (heads, kv_heads, seqlen_q)
    few = replace(LLAMA, batch=8, seqlen_q=40)
    assert forward_tile(few).pack == 4
    assert forward_tile(replace(few, batch=4)).pack == 1, "128 tiles of 132 processors"
    for changes in ({"layout": "varlen"}, {"features": frozenset({"dropout"})},
                    {"features": frozenset({"bias"})}, {"features": frozenset({"score_mod"})},
                    {"features": frozenset({"seqused_q"})}):  # fmt: skip
        assert forward_tile(replace(few, **changes)).pack == 1  # type: ignore[arg-type]
    sunk = replace(few, features=frozenset({"learnable_sink", "seqused_k", "softcap"}))
    assert forward_tile(sunk).pack == 4
    assert dict(explain_problem(few, SM_90).rows())["packing"].startswith("4 query heads")
    assert "packing" not in dict(explain_problem(LLAMA, SM_90).rows())


@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_a_packed_map_has_queries_outside_heads(group: int) -> None:
    """Row r of a tile is query r // pack of head r % pack; what lies past a group is past the map's
    end."""
    pack = 1 << (group - 1).bit_length()
    for x in (half(2, 40, 3 * group, 128), half(2, 3 * group, 40, 128).transpose(1, 2)):
        found = tensormaps.packed_map(x, 3, pack, 64, 128)
        assert list(found.block_shape) == [1, 1, 64 // pack, pack, 128]
        assert list(found.shape) == [2, 3, 40, group, 128]
        for at in ((1, 2, 33, group - 1, 7), (0, 1, 5, 0, 0)):
            batch, kv_head, query, member, column = at
            address = sum(c * s for c, s in zip(at, found.strides, strict=True))
            where = x[batch, query, kv_head * group + member, column:]
            assert address == where.storage_offset()


def test_a_packed_launch_has_tiles_of_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(hopper, "run", launches.append)
    q, k = half(5, 40, 28, 128), half(5, 500, 4, 128)
    call = normalise(q, k, k, causal=True)
    chosen = plan(replace(describe(call), device="cuda"), SM_90)
    assert chosen.hopper is not None
    assert chosen.hopper.pack == 8
    out, lse = hopper.forward(call, chosen)
    assert (out.shape, lse.shape) == (q.shape, (5, 28, 40))
    *_, heads, work, tile = launches[0].arguments
    assert (heads.count, heads.group) == (opaque(4), opaque(7))
    assert (work.row_tiles, work.pairs) == (opaque(3), opaque(20))  # 320 rows of 20 KV heads
    assert tile.pack == 8


@pytest.mark.parametrize(
    ("bounded", "keywords"),
    [(True, {"softcap": 50.0}), (True, {"softcap": 0.05, "causal": True}),
     (True, {"softcap": 30.0, "attn_mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
     (False, {}), (False, {"softcap": 50.1}),
     (False, {"softcap": 30.0, "alibi_slopes": torch.ones(2)}),
     (False, {"softcap": 30.0, "attn_mask": torch.zeros(1, 1, 64, 64)}),
     (False, {"softcap": 30.0, "dtype": torch.float16})],
    ids=str,
)  # fmt: skip
def test_only_a_small_cap_bounds_the_scores(bounded: bool, keywords: dict[str, Any]) -> None:
    """What is added may leave no key of a row near 0, and float16 has no exponents for it."""
    dtype = keywords.pop("dtype", torch.bfloat16)
    q = torch.zeros((1, 64, 2, 128), dtype=dtype)
    call = normalise(q, q, q, **keywords)
    tile = hopper._fitting(forward_tile(describe(call)), call, operands.variant(call, True))
    assert tile.bounded == bounded


@pytest.mark.parametrize(
    ("columns", "keywords"),
    [(True, {"causal": True}), (True, {"window_size": (16, 0), "softcap": 30.0}), (False, {}),
     (False, {"window_size": (16, 16)}),
     (False, {"causal": True, "attn_mask": torch.zeros(1, 1, 64, 64)})],
    ids=str,
)  # fmt: skip
def test_alibi_goes_by_columns_where_no_key_is_after_its_query(
    columns: bool, keywords: dict[str, Any]
) -> None:
    q = torch.zeros((1, 64, 2, 128), dtype=torch.bfloat16)
    call = normalise(q, q, q, alibi_slopes=torch.ones(2), **keywords)
    variant = hopper._by_columns(call, operands.variant(call, True))
    found = [mod.fn for mod in variant.score_mods]
    assert (scores.alibi_columns in found, scores.alibi in found) == (columns, not columns)


@pytest.mark.parametrize("masks", [(), ("causal",)], ids=bool)
def test_any_listed_block_may_end_the_keys(
    masks: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float mask has a list and is no mask of the kernel: the block with the last key, and those
    after it, may come anywhere."""
    for name in ("block_columns", "first_of"):
        monkeypatch.setattr(block, name, lambda *_: (0, 0))
    monkeypatch.setattr(block, "mask_block", lambda *_: "masked")
    for blocks, last in itertools.product((None, "list"), (True, False)):
        variant, tile = Variant(masks=masks, blocks=blocks), forward_tile(LLAMA)
        found = block.modify.fn("scores", variant, None, 0, last, tile)
        assert found == ("masked" if masks or blocks or last else "scores")
