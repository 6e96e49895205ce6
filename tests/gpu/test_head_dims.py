"""Every head dim, every ratio of heads, on a GPU: each against the error budget, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.testing import Case, assert_matches_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

DIMS = [
    *((dim, BF16) for dim in (*range(8, 257, 8), 512)),
    *((dim, FP16) for dim in (40, 64, 128, 200, 256, 512)),
    *((dim, FP32) for dim in (8, 24, 64, 96, 128, 192, 256, 512)),
    *((dim, BF16) for dim in (1, 46, 100, 111)),
]
"""Two 16-bit dtypes differ in one type of a kernel, so that fp16 needs no more than samples."""

DIM_PAIRS = [(192, 128, BF16), (64, 512, BF16), (128, 64, BF16), (128, 64, FP32), (24, 8, FP16)]


@pytest.mark.parametrize(("dim", "dtype"), DIMS, ids=str)
def test_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    """Several tiles, both lengths ending inside one; three query heads share a KV head."""
    case = Case("dim", 200, 301, heads=6, kv_heads=2, head_dim=dim, features={"causal": True})
    assert_matches_reference(case.draw(dim, dtype, "cuda"))


@pytest.mark.parametrize(("dim", "dim_v", "dtype"), DIM_PAIRS, ids=str)
def test_values_of_another_head_dim(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    case = Case("dims", 200, 301, heads=4, head_dim=dim, head_dim_v=dim_v,
                features={"causal": True})  # fmt: skip
    assert_matches_reference(case.draw(dim, dtype, "cuda"))


@pytest.mark.parametrize("lengths", [(), ((130, 130), (1, 300), (0, 7), (257, 64))],
                         ids=["dense", "packed"])  # fmt: skip
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (8, 8), (8, 2), (6, 3), (15, 5), (12, 1), (71, 1)]
)
def test_every_ratio_of_heads(heads: int, kv_heads: int, lengths: Any) -> None:
    """Multi-head, grouped and multi-query attention."""
    case = Case("heads", 150, 150, heads=heads, kv_heads=kv_heads, head_dim=64, lengths=lengths,
                features={"causal": True})  # fmt: skip
    assert_matches_reference(case.draw(heads, BF16, "cuda"))


FEATURES = [
    Case("full"),
    Case("window", features={"window_size": (70, 30)}),
    Case("softcap_causal", features={"softcap": 3.0, "causal": True}),
    Case("alibi_dropout", features={"dropout_p": 0.17}, tensors=("alibi_slopes",)),
    Case("mask", tensors=("attn_mask",)),
    Case("bias_causal", features={"causal": True}, tensors=("bias",)),
    Case("sink_window", features={"window_size": (40, 0)}, tensors=("learnable_sink",)),
    Case("documents_causal", features={"causal": True}, tensors=("document_ids",)),
    Case("packed_dropout", features={"dropout_p": 0.3, "causal": True},
         lengths=((300, 300), (1, 129), (64, 0), (200, 257))),
    Case("paged_window", features={"window_size": (100, 0)}, page_size=64,
         lengths=((300, 300), (1, 129), (64, 0), (200, 257))),
]  # fmt: skip


@pytest.mark.parametrize(("dim", "dtype"), [(64, FP16), (128, BF16)], ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_at_common_head_dims(case: Case, dim: int, dtype: torch.dtype) -> None:
    wider = {"head_dim": dim, "seqlen_q": 277, "seqlen_k": 277}
    assert_matches_reference(Case(**{**vars(case), **wider}).draw(dim, dtype, "cuda"))
