"""Random problems on a GPU for as long as is asked for: FLASHTILE_STRESS seconds, default 10.

Sizes, lengths, groups of heads and windows are free; head dims and variants are few, since each
pair of them is compiled once (2 to 5 s).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor

from flashtile.testing import Case, assert_within_budget, run
from flashtile.testing.run import run_reference

SECONDS = float(os.environ.get("FLASHTILE_STRESS", "10"))

ROUNDINGS = 3.0
"""What a result may be wrong by where eager attention is right by luck, such as of one key alone:
roundings of a number of the size of the largest one, or of 1."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"features": {"softcap": 5.0}}, {"tensors": ("learnable_sink",)},
    {"tensors": ("document_ids",)}, {"features": {"dropout_p": 0.2}},
)  # fmt: skip

DTYPES = (torch.bfloat16, torch.float16)

LENGTHS = st.one_of(
    st.integers(0, 700), st.sampled_from((0, 1, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 513))
)


@st.composite
def cases(draw: Any) -> Case:
    """Dense or packed, any band and chunk."""
    group, kv_heads = draw(st.sampled_from((1, 2, 3, 8))), draw(st.integers(1, 4))
    variant = dict(draw(st.sampled_from(VARIANTS)))
    sides = st.sampled_from((-1, 0, 1, 17, 64, 130, 1000))
    features = dict(variant.pop("features", {}))
    features |= {"causal": draw(st.booleans()), "window_size": (draw(sides), draw(sides)),
                 "attention_chunk": draw(st.sampled_from((0, 0, 1, 64, 130, 1000)))}  # fmt: skip
    sizes: dict[str, Any] = {"batch": draw(st.integers(1, 4))}
    if draw(st.booleans()):
        pairs = draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=6))
        if "document_ids" in variant.get("tensors", ()):
            pairs = [(n, n) for n, _ in pairs]  # ids of one tensor are of queries and keys alike
        sizes["lengths"] = tuple(pairs)
    else:
        sizes |= {"seqlen_q": draw(LENGTHS), "seqlen_k": draw(LENGTHS)}
        if "document_ids" in variant.get("tensors", ()):
            sizes["seqlen_k"] = sizes["seqlen_q"]
    return Case("stress", heads=group * kv_heads, kv_heads=kv_heads,
                head_dim=draw(st.sampled_from((64, 128, 256))), features=features,
                **sizes, **variant)  # fmt: skip


def _check(case: Case, dtype: torch.dtype, seed: int) -> None:
    problem = case.draw(seed, dtype, "cuda")
    actual, golden, eager = run(problem), run_reference(problem), run_reference(problem, None)
    found, exact, base = (
        {"out": x.out, "lse": x.lse, **x.grads} for x in (actual, golden, eager)
    )  # fmt: skip
    for name, x in found.items():
        _assert_close(x, base[name], exact[name], name, torch.finfo(dtype).eps)


def _assert_close(actual: Tensor, eager: Tensor, golden: Tensor, name: str, eps: float) -> None:
    try:
        assert_within_budget(actual, eager, golden, name, gradient=name not in ("out", "lse"))
    except AssertionError:
        finite = golden.isfinite()
        if not torch.equal(actual[~finite].double(), golden[~finite]):
            raise
        error = (actual[finite].double() - golden[finite]).abs().max()
        if not error <= ROUNDINGS * eps * golden[finite].abs().max().clamp_min(1.0):
            raise


def test_random_problems() -> None:
    """Batches of fifty until the time is over; a failure is shrunk and says how to draw it."""
    end, batches = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        options = settings(max_examples=50, deadline=None, database=None, print_blob=True,
                           suppress_health_check=list(HealthCheck))  # fmt: skip
        drawn = given(cases(), st.sampled_from(DTYPES), st.integers(0, 2**31))
        seeded(batches)(options(drawn(_check)))()
        batches += 1
    print(f"{50 * batches} problems")
    assert batches > 0
