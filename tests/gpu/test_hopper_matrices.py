"""Gradients of biases and of float masks, which the kernels for Hopper load keys by queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flashtile.testing import Case, assert_matches_reference, poisoned_allocations, run
from flashtile.testing.guards import fence

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _only_hopper(backend: str) -> None:
    if backend != "hopper":
        pytest.skip("the portable kernels have tests of their own")


@pytest.mark.parametrize(
    ("dim", "shape", "width"),
    [(64, (2, 6), BF16), (64, (1, 1), FP32), (96, (1, 6), FP16), (128, (2, 1), BF16),
     (128, (1, 6), FP32), (192, (2, 6), FP16), (256, (1, 1), BF16)],
)  # fmt: skip
def test_biases_end_where_queries_and_keys_do(
    dim: int, shape: tuple[int, int], width: torch.dtype
) -> None:
    """Canaries around each row, at odd addresses; rows that see nothing, keys that none sees; one
    row for all."""
    for rows, causal in ((203, False), (203, True), (1, False)):
        case = Case("bias", 203, 331, 2, 6, 2, dim, features={"causal": causal})
        bias = torch.randn(*shape, rows, 331, device="cuda").to(width)
        bias[..., :17] = -math.inf
        if rows > 1:
            bias[..., 3, :] = bias[..., 64:130, 100:] = -math.inf
        problem = case.draw(dim, BF16, "cuda")
        tensors = problem.tensors | {"bias": fence(bias).tensor}
        with poisoned_allocations():
            assert_matches_reference(problem._replace(tensors=tensors))


@pytest.mark.parametrize(
    ("features", "tensors"),
    [({"window_size": (90, 20)}, ("alibi_slopes",)), ({"softcap": 4.0, "causal": True}, ()),
     ({"dropout_p": 0.2}, ()), ({"softmax_scale": -0.2}, ("attn_mask",))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_biases_beside_others(dim: int, features: dict[str, Any], tensors: tuple[str, ...]) -> None:
    """Dense and packed sequences. One key alone, with dropout, has dS of the rounding of out and of
    nothing else, which eager attention rounds otherwise."""
    few = 9 if "dropout_p" in features else 1
    for lengths in ((), ((70, 100), (0, 9), (129, few), (128, 0), (1, 64))):
        case = Case("bias", 300, 300, 2, 4, 2, dim, lengths=lengths, features=features,
                    tensors=("bias", *tensors))  # fmt: skip
        assert_matches_reference(case.draw(dim, BF16, "cuda"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bias", "attn_mask"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_deterministic_gradients(dim: int, kind: str, causal: bool) -> None:
    """Of a float mask by its lists, with blocks of which nothing is seen."""
    case = Case(kind, 780, 643, heads=12, kv_heads=4, head_dim=dim,
                features={"causal": causal, "deterministic": True})  # fmt: skip
    problem = case.draw(dim, BF16, "cuda")
    matrix = torch.randn(2, 1, 780, 643, device="cuda", dtype=BF16)
    matrix[0, :, 128:400, 256:520] = matrix[1, :, :, 600:] = -math.inf
    if kind == "bias":
        problem = problem._replace(tensors=problem.tensors | {"bias": matrix.requires_grad_()})
    else:
        problem = problem._replace(keywords=problem.keywords | {"attn_mask": matrix})
    with poisoned_allocations():
        expected = assert_matches_reference(problem)
    for _ in range(10):
        found = run(problem)
        assert all(torch.equal(found.grads[n], expected.grads[n]) for n in expected.grads)
