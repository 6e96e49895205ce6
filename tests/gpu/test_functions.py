"""Users' score and mask functions, compiled: results and gradients on every backend of the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile import MaskFunction, flash_attn_func
from flashtile.testing import Case, assert_matches_reference
from flashtile.testing.functions import bending, prefixed, remembering

LENGTHS = ((1, 1), (64, 63), (130, 300), (0, 5), (7, 0), (257, 257))


@triton.jit
def listed(at, args):
    """Reads a number for each key."""
    return (tl.load(args[0] + tl.minimum(at.k_idx, at.k.length - 1)) + at.q_idx) % 3 != 0


def _listed(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return (args[0][at.k_idx] + at.q_idx) % 3 != 0


def _features(name: str) -> dict[str, Any]:
    gain = torch.linspace(-0.4, 0.7, 4, device="cuda")
    counts = torch.tensor([40, 3, 150, 0, 9, 200], dtype=torch.int32, device="cuda")
    table = torch.randint(0, 9, (700,), dtype=torch.int32, device="cuda")
    score = {"score_mod": bending(gain)}
    ranges = {"mask_mod": prefixed(counts, True)}
    return {
        "score": score,
        "mask": {"mask_mod": prefixed(counts, False)},
        "ranges": ranges,
        "listed": {"mask_mod": MaskFunction(listed, (table,), eager=_listed)},
        "both": score | ranges,
        "causal": score | ranges | {"causal": True, "softcap": 8.0},
    }[name]


@pytest.mark.parametrize("name", ["score", "mask", "ranges", "listed", "both", "causal"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_functions(name: str, dim: int) -> None:
    for shape in ({"seqlen_q": 300, "seqlen_k": 517}, {"lengths": LENGTHS}):
        case = Case(name, **shape, heads=4, kv_heads=2, head_dim=dim,  # type: ignore[arg-type]
                    features=_features(name))  # fmt: skip
        assert_matches_reference(case.draw(dim, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bounds_of_one_side_alone(dim: int, deterministic: bool, causal: bool) -> None:
    """What a tile of keys waits for may be computed from the other side's bounds: it hung here."""
    for tokens in (450, 900):
        case = Case("remembering", tokens, tokens, heads=4, kv_heads=2, head_dim=dim,
                    features={"mask_mod": remembering(), "causal": causal,
                              "deterministic": deterministic})  # fmt: skip
        assert_matches_reference(case.draw(dim, torch.bfloat16, "cuda"))


def _shifted(by: int) -> MaskFunction:
    """Functions of one name that differ in a constant."""
    shift = tl.constexpr(by)

    @triton.jit
    def later(at, args):
        return at.k_idx <= at.q_idx + shift

    return MaskFunction(later, eager=lambda at, args: at.k_idx <= at.q_idx + by)


def test_functions_of_one_name_are_different_kernels() -> None:
    for by in (0, 5, 70):
        case = Case("shift", 130, 130, head_dim=64, features={"mask_mod": _shifted(by)})
        assert_matches_reference(case.draw(by, torch.bfloat16, "cuda"))


def test_new_tensors_compile_nothing_and_are_read() -> None:
    q = torch.randn(1, 200, 4, 64, dtype=torch.bfloat16, device="cuda")
    found = []
    for _ in range(2):
        features = _features("both")
        features["score_mod"].args[0].normal_()
        found.append(flash_attn_func(q, q, q, **features))
    assert not torch.equal(*found)
