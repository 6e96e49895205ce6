"""The Hopper backward's host side: what it launches for the gradients that are asked for, with what
tiles, in what memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile.api import normalise
from flashtile.backends import hopper_backward, triton
from flashtile.backends.launch import Launch
from flashtile.backends.torch import Gradients
from flashtile.hopper_backward_tiles import backward_tile, cannot_backward
from flashtile.kernels.numbers import opaque
from flashtile.plan import plan
from flashtile.problem import describe
from flashtile.testing.problems import LLAMA, SM_90, half

LEFT = Gradients(*(torch.zeros(1) for _ in Gradients._fields))
"""What the portable kernels are asked for."""

KERNELS = ["prepare_backward", "attention_backward", "finish_query_gradient"]


@pytest.mark.parametrize(
    ("needs", "launched", "asked"),
    [("q k v", KERNELS, []), ("q k", KERNELS, []), ("q v", KERNELS, []), ("q", [], ["q"]),
     ("k v", [], ["k v"]), ("q k v bias", KERNELS, ["bias"]), ("bias", [], ["bias"])],
)  # fmt: skip
def test_gradients_asked_for_in_part(
    needs: str, launched: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dQ alone, or without it, is one portable kernel, and so is a bias's gradient."""
    found: list[Launch] = []
    left: list[str] = []

    def portable(*arguments: Any) -> Gradients:
        wanted = zip(Gradients._fields, arguments[-1], strict=True)
        left.append(" ".join(name for name, need in wanted if need))
        return LEFT

    monkeypatch.setattr(hopper_backward, "run", found.append)
    monkeypatch.setattr(triton, "backward", portable)
    q = half(1, 256, 2, 128)
    call = normalise(q, q, q, bias=half(1, 2, 256, 256) if "bias" in needs else None)
    asking = tuple(name in needs.split() for name in Gradients._fields)
    chosen = plan(describe(call), SM_90, ("triton",))
    lse = torch.zeros(1, 2, 256)
    grads = hopper_backward.backward(call, chosen, q, None, q, lse, asking)

    assert [x.kernel.__name__ for x in found] == launched
    assert left == asked
    if launched:
        assert [name for name, x in grads._asdict().items() if x is not None] == needs.split()


def test_what_the_backward_leaves_to_the_portable_kernels() -> None:
    packed = {"layout": "varlen", "features": frozenset({"seqused_q", "seqused_k"})}
    small = {"head_dim": 64, "head_dim_v": 64}
    capped = {**small, "features": frozenset({"softcap", "alibi_slopes"})}
    for problem in (LLAMA, replace(LLAMA, **packed), replace(LLAMA, **capped)):  # type: ignore[arg-type]
        assert cannot_backward(problem) is None
    for changes, reason in (
        ({"head_dim": 264, "head_dim_v": 264}, "not 264 and 264"),
        ({"head_dim": 256, "head_dim_v": 32}, "not 256 and 32"),
        ({"head_dim": 128, "head_dim_v": 64}, "above 128, not 128 and 64"),
        ({"page_size": 64}, "paged"),
        ({"features": frozenset({"tree_mask"})}, "tree_mask"),
        ({"features": frozenset({"score_mod", "dropout"})}, "slopes"),
        ({**small, "features": frozenset({"softcap", "dropout"})}, "for dropout and softcap at"),
        ({**small, "features": frozenset({"softcap", "float_mask"})}, "for float_mask and softcap"),
        ({**small, "features": frozenset({"bias", "dropout"})}, "for bias and dropout at"),
    ):
        problem = replace(LLAMA, **changes)  # type: ignore[arg-type]
        assert reason in (cannot_backward(problem) or "")
    for features in (("document_ids",), ("attn_mask",), ("attn_mask", "float_mask"), ("mask_mod",)):
        for dim, tokens in itertools.product((64, 128, 256), (512, 4096)):
            sizes = {"head_dim": dim, "head_dim_v": dim, "seqlen_q": tokens, "seqlen_k": tokens}
            masked = replace(LLAMA, features=frozenset(features), **sizes)
            assert cannot_backward(masked) is None
            assert backward_tile(masked).adds == "in any order"


@pytest.mark.parametrize(
    ("tiles", "together"),
    [(4, 64), (5, 64), (16, 16), (64, 4), (65, 4), (128, 2), (256, 1), (999, 1)],
)
def test_backward_tiles_are_taken_longest_first_over_some_heads(tiles: int, together: int) -> None:
    """At least 256 tiles, of a power of two of heads; half as many of groups."""
    assert hopper_backward.heads_together(tiles, 1) == together
    assert hopper_backward.heads_together(tiles, 4) == max(1, together // 2)


def test_backward_tiles_of_a_launch() -> None:
    """Dense: pairs of a batch and a KV head. Packed: slots for any lengths, all heads together."""
    cu_seqlens = torch.tensor([0, 5, 300, 700], dtype=torch.int32)
    dense = normalise(*(half(2, 700, heads, 128) for heads in (8, 2, 2)), causal=True)
    packed = normalise(*(half(700, heads, 128) for heads in (8, 2, 2)), causal=True,
                       cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=400,
                       max_seqlen_k=400)  # fmt: skip
    for call, grid, wanted in ((dense, 24, [6, 11, 4, 4]), (packed, 18, [9, 14, 2, 2])):
        tile = replace(backward_tile(describe(call)), persistent=False)
        q, k, v = call.operands[:3]
        space = hopper_backward.workspace(call, tile, torch.zeros_like(q))
        launch = hopper_backward.gradient_launch(call, tile, space, q, k, v)
        work = launch.arguments[-2]
        assert launch.grid == grid
        assert work[:4] == tuple(map(opaque, wanted))
        blocks = wanted[1] * q.shape[-2] * (1 if call.varlen else 2)
        assert space.rows.shape == (2 * blocks, 64)


@pytest.mark.parametrize(
    ("tokens", "deterministic", "within"),
    [(700, False, True), (1, False, False), (700, True, False)],
)
def test_rows_lie_where_dq_will(tokens: int, deterministic: bool, within: bool) -> None:
    """Unless a block of them is more than dQ is, or what writes dQ reads units beside them."""
    call = normalise(*(half(2, tokens, 8, 64) for _ in range(3)), causal=True)
    tile, dq = backward_tile(describe(call), deterministic), torch.zeros_like(call.operands.q)

    space = hopper_backward.workspace(call, tile, dq)

    parts = [x for x in space if x is not None]
    assert (space.rows.data_ptr() == dq.data_ptr()) == within
    assert len({x.untyped_storage().data_ptr() for x in parts}) == 1 + within
    space.rows.fill_(1.0)
    assert bool(dq.any()) == within
    assert all(bool((x == 1.0).all()) == (x is space.rows) for x in parts if x.is_floating_point())


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize(
    ("features", "steepest"), [((), 1.0), (("attn_mask",), 1.0), (("score_mod", "mask_mod"), 8.0)]
)
def test_sums_are_integers_where_they_are_to_be_the_same_bits(
    dim: int, tokens: int, features: tuple[str, ...], steepest: float
) -> None:
    """In the tile of the others, with room for slopes where a function may have any."""
    sizes = {"head_dim": dim, "head_dim_v": dim, "seqlen_q": tokens, "seqlen_k": tokens}
    problem = replace(LLAMA, features=frozenset(features), **sizes)
    tile = backward_tile(problem, deterministic=True)
    assert tile == replace(backward_tile(problem), integers=True, steepest=steepest)
    assert tile.shared_bytes + 1024 <= 232_448


@pytest.mark.parametrize(
    ("tiles", "group", "parts"),
    [(64, 32, 4), (512, 4, 1), (231, 8, 1), (230, 8, 2), (1, 8, 8), (100, 3, 3), (0, 4, 4),
     (64, 1, 1)],
)  # fmt: skip
def test_groups_of_few_tiles_go_in_parts(tiles: int, group: int, parts: int) -> None:
    """As few as leave 132 multiprocessors nearly two tiles each, all of a size."""
    assert hopper_backward.parts_of_groups(tiles, group, 132) == parts


def test_parts_of_a_kv_head_are_summed() -> None:
    x = torch.randn(2, 5, 6, 8)
    found = hopper_backward._sum_of_parts(x, 3)
    torch.testing.assert_close(found, torch.stack([x[..., :3, :].sum(2), x[..., 3:, :].sum(2)], 2))
