"""Users' score and mask functions in the kernels: results and gradients against the reference,
which runs their counterparts in PyTorch and differentiates those by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile import MaskFunction, ScoreFunction, flash_attn_func, reference
from flashtile.testing import Case
from flashtile.testing.allocations import assert_touches_nothing_else
from flashtile.testing.functions import bending, prefixed, remembering, striding
from flashtile.testing.interpreter import interpreted

SHAPES = ((20, 36), (36, 20), (33, 33), (17, 48))
LENGTHS = ((5, 20), (0, 3), (18, 17), (2, 0), (1, 1))


def _score() -> ScoreFunction:
    return bending(torch.linspace(-0.4, 0.7, 2))


def _mask(ranges: bool, batch: int = 2) -> MaskFunction:
    return prefixed(torch.tensor([7, 19, 2, 30, 11], dtype=torch.int32)[:batch], ranges)


def _features(name: str, batch: int) -> dict[str, Any]:
    return {
        "score": {"score_mod": _score()},
        "mask": {"mask_mod": _mask(False, batch)},
        "ranges": {"mask_mod": _mask(True, batch)},
        "strided": {"mask_mod": striding()},
        "both": {"score_mod": _score(), "mask_mod": _mask(True, batch)},
    }[name]


NAMES = ("score", "mask", "ranges", "strided", "both")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", range(2))
def test_functions(name: str, place: int) -> None:
    """Shapes and dtypes rotate: fewer queries than keys, and as many or more."""
    turn = NAMES.index(name) % 2
    at, dtype = ((0, 3), (2, 1))[place][turn], (torch.float32, torch.float16)[place ^ turn]
    case = Case(name, *SHAPES[at], heads=2, kv_heads=1, head_dim=8, features=_features(name, 2))
    assert_touches_nothing_else(case.draw(at, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_packed_and_paged_sequences(name: str) -> None:
    features = _features(name, 5)
    for page_size in (0, 7):
        case = Case(name, lengths=LENGTHS, page_size=page_size, heads=2, kv_heads=1, head_dim=8,
                    features=features)  # fmt: skip
        assert_touches_nothing_else(case.draw(3))


def test_bounds_of_one_side_alone() -> None:
    """Tiles of keys that all queries see in part, some in whole, and others not."""
    case = Case("remembering", 420, 420, batch=1, heads=1, kv_heads=1, head_dim=8,
                features={"mask_mod": remembering()})  # fmt: skip
    assert_touches_nothing_else(case.draw(4))


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "softcap": ({"softcap": 2.0}, ()),
    "scale": ({"softmax_scale": -0.4}, ()),
    "window": ({"window_size": (9, 3)}, ()),
    "alibi-sink": ({}, ("alibi_slopes", "learnable_sink")),
    "bias": ({"softcap": 2.0, "causal": True}, ("bias",)),
    "dropout": ({"dropout_p": 0.3}, ()),
    "mask": ({}, ("attn_mask",)),
    "documents": ({}, ("document_ids",)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_functions_beside_other_features(other: str) -> None:
    """In the contract's order: after softcap, ALiBi and bias, before masks."""
    features, tensors = OTHERS[other]
    case = Case(other, 33, 33, heads=2, kv_heads=1, head_dim=8, tensors=tensors,
                features=features | _features("both", 2))  # fmt: skip
    assert_touches_nothing_else(case.draw(5))


def test_a_float_mask_is_added_after_the_function() -> None:
    """Which never sees -inf: bent(-inf) is NaN."""
    case = Case("float", 20, 36, heads=2, kv_heads=1, head_dim=8, features=_features("score", 2))
    problem = case.draw(6)
    mask = torch.randn(20, 36).masked_fill(torch.rand(20, 36) > 0.6, -torch.inf)
    problem.keywords["attn_mask"] = mask
    assert_touches_nothing_else(problem)


def test_ranges_skip_blocks() -> None:
    """What lies outside the ranges is not read."""
    q, k, v = (torch.randn(2, 48, 2, 8) for _ in range(3))
    counts = torch.tensor([3, 5], dtype=torch.int32)
    mask_mod = prefixed(counts, True)
    expected = flash_attn_func(q[:, :16], k, v, mask_mod=mask_mod)
    k[:, 16:], v[:, 16:] = torch.nan, torch.nan
    assert torch.equal(flash_attn_func(q[:, :16], k, v, mask_mod=mask_mod), expected)


def test_replays_read_the_tensors_of_their_own_call() -> None:
    q, k, v = (torch.randn(2, 20, 2, 8) for _ in range(3))
    with interpreted(16, 16, list_block=32, capacity=64):
        for seed in range(3):
            torch.manual_seed(seed)
            score_mod, mask_mod = _score(), _mask(True)
            score_mod.args[0].copy_(torch.randn(2))
            mask_mod.args[0].copy_(torch.randint(0, 20, (2,)))
            keywords: dict[str, Any] = {"score_mod": score_mod, "mask_mod": mask_mod}
            expected = reference.attention(q, k, v, **keywords).out
            found = flash_attn_func(q, k, v, **keywords)
            torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
