"""Gradients under mask tensors, which the kernels for Hopper load as bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.testing import Case, assert_matches_reference, poisoned_allocations
from flashtile.testing.guards import fence

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _only_hopper(backend: str) -> None:
    if backend != "hopper":
        pytest.skip("the portable kernels have tests of their own")


def _mask(*shape: int) -> Tensor:
    """A third of the blocks of each kind: any, none and all seen."""
    codes = torch.randint(0, 3, (*shape[:2], -(-shape[2] // 128), -(-shape[3] // 128)))
    codes = codes.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., : shape[2], : shape[3]]
    return ((codes == 2) | ((codes == 1) & (torch.rand(shape) < 0.5))).cuda()


@pytest.mark.parametrize("keys", [331, 336, 16, 1])
@pytest.mark.parametrize("queries", [203, 300, 130])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_masks_end_where_queries_and_keys_do(dim: int, queries: int, keys: int) -> None:
    """Canaries around each row; any byte but 0 is true; rows that are units of 16 bytes, and rows
    that begin one byte later."""
    case = Case("mask", queries, keys, 2, 6, 2, dim, tensors=())
    for heads, rows in ((6, queries), (1, queries), (1, 1)):
        mask = _mask(2, heads, rows, keys)
        many = torch.where(mask, torch.randint_like(mask, 1, 256, dtype=torch.uint8), 0)
        wide = torch.ones(2, heads, rows, keys + 32, dtype=torch.bool, device="cuda")
        for first in (16, 1):
            later = wide.clone()[..., first : first + keys]
            later.copy_(mask)
            fenced = fence(mask.to(torch.uint8)).tensor
            for given in (mask, many.view(torch.bool), fenced.view(torch.bool), later):
                problem = case.draw(dim, BF16, "cuda")
                problem.keywords["attn_mask"] = given
                with poisoned_allocations():
                    assert_matches_reference(problem)


@pytest.mark.parametrize(
    ("features", "tensors"),
    [({"window_size": (90, 20)}, ()), ({"causal": True}, ()), ({"softcap": 4.0}, ()),
     ({"dropout_p": 0.2}, ()), ({}, ("bias",)), ({}, ("alibi_slopes",)), ({}, ("document_ids",))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("keys", [320, 331])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_masks_beside_others(
    dim: int, keys: int, features: dict[str, Any], tensors: tuple[str, ...]
) -> None:
    queries = keys if "document_ids" in tensors else 300
    case = Case("mask", queries, keys, 2, 4, 2, dim, features=features, tensors=tensors)
    problem = case.draw(dim, BF16, "cuda")
    problem.keywords["attn_mask"] = _mask(2, 1, queries, keys)
    assert_matches_reference(problem)


@pytest.mark.parametrize("queries", [129, 192, 780])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float_masks_with_a_block_past_the_end(dim: int, causal: bool, queries: int) -> None:
    """A list counts in 128 queries: of two blocks of 64 the second begins past the end."""
    case = Case("mask", queries, 300, 2, 4, 2, dim, features={"causal": causal})
    problem = case.draw(dim, BF16, "cuda")
    mask = torch.zeros(1, 1, queries, 300, device="cuda", dtype=BF16)
    problem.keywords["attn_mask"] = mask.masked_fill_(~_mask(1, 1, queries, 300), -torch.inf)
    assert_matches_reference(problem)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "features", [{}, {"causal": True}, {"deterministic": True}, {"softcap": 4.0}], ids=str
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_masks_of_packed_sequences(dim: int, features: dict[str, Any], known: bool) -> None:
    """Where the longest are unknown there are no lists: no block is seen as a whole."""
    lengths = ((300, 331), (1, 200), (0, 9), (130, 336), (256, 256))
    longest = {"max_seqlen_q": 300, "max_seqlen_k": 336} if known else {}
    case = Case("mask", heads=4, kv_heads=2, head_dim=dim, lengths=lengths,
                features=features | longest)  # fmt: skip
    for heads, keys in ((1, 336), (4, 341)):  # in units of 16 bytes, and not
        problem = case.draw(dim, BF16, "cuda")
        mask = torch.rand(len(lengths), heads, 300, keys, device="cuda") < 0.5
        problem.keywords["attn_mask"] = mask
        with poisoned_allocations():
            assert_matches_reference(problem)
