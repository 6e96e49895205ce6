"""Every feature of the Triton kernels and every pair of them: forward, lse and all gradients
against the reference, on shapes of a few blocks, canaries around all memory."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.testing import Case, Problem
from flashtile.testing.allocations import assert_touches_nothing_else

FP32, FP16 = torch.float32, torch.float16

FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "causal": ({"causal": True}, ()),
    "window": ({"window_size": (5, 3)}, ()),
    "left": ({"window_size": (7, -1)}, ()),
    "chunk": ({"attention_chunk": 11}, ()),
    "softcap": ({"softcap": 2.0}, ()),
    "scale": ({"softmax_scale": -0.4}, ()),
    "dropout": ({"dropout_p": 0.3}, ()),
    "alibi": ({}, ("alibi_slopes",)),
    "bias": ({}, ("bias",)),
    "mask": ({}, ("attn_mask",)),
    "sink": ({}, ("learnable_sink",)),
    "documents": ({}, ("document_ids",)),
}
PAIRS = list(itertools.combinations(FEATURES, 2))
SHAPES = ((20, 36), (36, 20), (33, 33), (17, 48))
DIMS = ((8, 8), (16, 8), (8, 24), (24, 16))
LENGTHS = ((5, 20), (0, 3), (18, 17), (2, 0), (1, 1))


def _case(names: tuple[str, ...], **shape: Any) -> Case:
    features: dict[str, Any] = {}
    tensors: tuple[str, ...] = ()
    for name in names:
        features |= FEATURES[name][0]
        tensors += FEATURES[name][1]
    return Case("-".join(names), heads=2, kv_heads=1, features=features, tensors=tensors, **shape)


def test_kernels_are_interpreted() -> None:
    """Nothing here would mean anything if another backend had been chosen in silence."""
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415, not for collection

    kernels = importlib.import_module("flashtile.kernels.forward")
    assert isinstance(kernels.attention_forward, InterpretedFunction)


@pytest.mark.parametrize("at", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_pairs(at: int) -> None:
    """Shapes, head dims and dtypes rotate with the pair."""
    pair = PAIRS[at]
    seqlen_q, seqlen_k = (33, 33) if "documents" in pair else SHAPES[at % 4]
    dim, dim_v = DIMS[at // 2 % 4]
    case = _case(pair, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1, head_dim=dim,
                 head_dim_v=dim_v)  # fmt: skip
    assert_touches_nothing_else(case.draw(at, (FP32, FP16)[at % 2]))


@pytest.mark.parametrize("at", range(1 + len(FEATURES)), ids=["plain", *FEATURES])
def test_features_of_a_batch(at: int) -> None:
    """Dtypes rotate: pairs have every feature in both."""
    names = tuple(FEATURES)[at - 1 : at]  # none of them at 0
    case = _case(names, seqlen_q=18, seqlen_k=18, batch=2, head_dim=8)
    assert_touches_nothing_else(case.draw(2, (FP32, FP16)[at % 2]))


@pytest.mark.parametrize("at", range(len(FEATURES)), ids=FEATURES)
def test_features_of_packed_sequences(at: int) -> None:
    """Some without queries, some without keys; every second feature in fp16 and beside causality,
    which meets all of them in pairs."""
    name, causal = list(FEATURES)[at], at % 2 == 1
    if name == "documents":
        case = _case(("documents", "causal")[: 1 + causal], lengths=((18, 18), (0, 0), (2, 2)))
    else:
        names = (name, "causal") if causal and name != "causal" else (name,)
        case = _case(names, lengths=LENGTHS, head_dim=8)
    assert_touches_nothing_else(case.draw(3, FP16 if causal else FP32))


PAGED = [(name, 7) for name in FEATURES if name != "documents"]


@pytest.mark.parametrize(("name", "page_size"), [*PAGED, ("causal", 1), ("mask", 16)])
def test_features_of_paged_keys(name: str, page_size: int) -> None:
    case = _case((name,), lengths=LENGTHS, page_size=page_size, head_dim=8)
    assert_touches_nothing_else(case.draw(4))


BROADCASTS = list(itertools.product((1, 2), (1, 2), (1, 20)))


def _with(case: Case, seed: int, **tensors: Tensor) -> Problem:
    problem = case.draw(seed)
    leaves = {n: x for n, x in tensors.items() if n == "bias"}
    others = {n: x for n, x in tensors.items() if n != "bias"}
    return problem._replace(tensors=problem.tensors | leaves, keywords=problem.keywords | others)


@pytest.mark.parametrize(("batch", "heads", "rows"), BROADCASTS)
def test_bias_of_every_broadcast_shape(batch: int, heads: int, rows: int) -> None:
    """Its gradient is summed over what it is broadcast in."""
    case = _case(("causal",), seqlen_q=20, seqlen_k=36, batch=2, head_dim=8)
    assert_touches_nothing_else(_with(case, 5, bias=torch.randn(batch, heads, rows, 36)))


def test_bias_in_another_dtype_and_expanded() -> None:
    """A bias of half the width, and one that the caller broadcast by strides of 0."""
    case = _case((), seqlen_q=20, seqlen_k=36, batch=2, head_dim=8)
    assert_touches_nothing_else(_with(case, 6, bias=torch.randn(1, 2, 20, 36).half()))
    problem = _with(case, 6, bias=torch.randn(1, 1, 1, 36).expand(2, 2, 20, 36))
    assert_touches_nothing_else(problem)


def test_bias_longer_than_the_longest_sequence() -> None:
    """Rows and columns that no sequence has: no part in the result, and no gradient."""
    case = _case(("softcap",), lengths=LENGTHS, head_dim=8)
    results = assert_touches_nothing_else(_with(case, 7, bias=torch.randn(1, 2, 23, 40)))
    assert results.grads["bias"][:, :, 18:].eq(0).all()
    assert results.grads["bias"][:, :, :, 20:].eq(0).all()


@pytest.mark.parametrize(("batch", "heads", "rows"), BROADCASTS)
def test_mask_of_every_broadcast_shape(batch: int, heads: int, rows: int) -> None:
    """Each kind of mask with and without a batch, heads and rows of its own."""
    kind = ("bool", "float")[(batch + heads + rows) % 2]
    case = _case((), seqlen_q=20, seqlen_k=36, batch=2, head_dim=8)
    mask = torch.rand(batch, heads, rows, 36) > 0.4
    mask[..., 16:32] = batch == 1  # a block all of whose keys are seen, or none
    if kind == "float":
        mask = torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
    assert_touches_nothing_else(_with(case, 8, attn_mask=mask))


def test_mask_of_any_strides() -> None:
    """Keys outermost in memory, and a slice of a larger mask."""
    case = _case((), seqlen_q=20, seqlen_k=36, batch=2, head_dim=8)
    mask = torch.rand(36, 20, 2, 3) > 0.4
    assert_touches_nothing_else(_with(case, 9, attn_mask=mask.permute(2, 3, 1, 0)[:, 1:2]))


@pytest.mark.parametrize(
    ("dim", "dim_v", "dtype"),
    [(8, 8, FP32), (16, 24, FP16), (24, 16, FP32), (33, 1, FP32), (33, 1, FP16), (5, 40, FP16)],
)
def test_head_dims(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    """Powers of two and what is padded to one."""
    case = _case(("causal",), seqlen_q=20, seqlen_k=20, batch=1, head_dim=dim, head_dim_v=dim_v)
    assert_touches_nothing_else(case.draw(10, dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_ratios_of_heads(heads: int, kv_heads: int) -> None:
    case = Case("heads", 18, 20, heads=heads, kv_heads=kv_heads, head_dim=8)
    assert_touches_nothing_else(case.draw(11))


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-30, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_finite_scale(scale: float, causal: bool) -> None:
    """Masked scores stay masked whatever the scale: -inf * 0 is NaN, -inf * -1 is +inf."""
    features = {"softmax_scale": scale, "causal": causal}
    case = Case("scale", 20, 20, 1, 2, 1, 8, features=features)
    assert_touches_nothing_else(case.draw(12))
