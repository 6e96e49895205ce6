"""The calls whose kernels are compiled: every tile that a plan can choose, and every feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.api import normalise
from flashtile.problem import Call

BATCH, TOKENS, HEADS, KV_HEADS, PAGE = 2, 1024, 8, 2, 256
"""Sizes of the calls. Kernels are compiled for types and for divisibility by 16, not for sizes."""


class Case(NamedTuple):
    """One call, by what its kernels are compiled for."""

    variant: str  # a name of VARIANTS
    dtype: str  # bfloat16, ...
    head_dim: int
    head_dim_v: int
    kernel: str = ""  # the one kernel that differs from another case's; empty: all it launches
    new_tiles: bool = False  # only those of its kernels whose tile no case before it has

    def __str__(self) -> str:
        dims = {self.head_dim: None, self.head_dim_v: None}
        return f"{self.variant} {self.dtype} {'/'.join(map(str, dims))}"


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scores() -> dict[str, Any]:
    """Both ends of the band, and two mods of the scores."""
    return {"window_size": (256, 0), "softcap": 30.0, "alibi_slopes": _meta(HEADS)}


def _documents() -> dict[str, Any]:
    ids = _meta(BATCH, TOKENS, dtype=torch.int32)
    return {"causal": True, "document_ids": ids}


def _bias() -> dict[str, Any]:
    return {"bias": _meta(1, HEADS, TOKENS, TOKENS, dtype=torch.bfloat16),
            "learnable_sink": _meta(HEADS)}  # fmt: skip


def _varlen() -> dict[str, Any]:
    cu_seqlens = _meta(BATCH + 1, dtype=torch.int32)
    used = _meta(BATCH, dtype=torch.int32)
    return {
        "causal": True, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "seqused_q": used,
        "seqused_k": used, "max_seqlen_q": TOKENS, "max_seqlen_k": TOKENS,
    }  # fmt: skip


def _paged() -> dict[str, Any]:
    table = _meta(BATCH, TOKENS // PAGE, dtype=torch.int32)
    return {"causal": True, "block_table": table, "seqused_k": _meta(BATCH, dtype=torch.int32)}


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "causal": lambda: {"causal": True},
    "scores": _scores,
    "dropout": lambda: {"causal": True, "dropout_p": 0.1},
    "documents": _documents,
    "bias": _bias,
    "varlen": _varlen,
    "paged": _paged,
}

DIMS = ((64, 64), (128, 128), (256, 256), (512, 512))
"""One head dim for each column of the tile tables in `tiles`."""

SMALL_DIMS = ((16, 16), (32, 32))
"""Head dims whose tiles an architecture of little shared memory need not shrink."""

ODD_DIMS = ((80, 80), (192, 128), (64, 512))
"""A padded head dim, and those whose values are narrower or wider than the keys."""


def every_case() -> list[Case]:
    """Every tile that a plan can choose, and every feature at head_dim 128."""
    causal = [Case("causal", "bfloat16", *dims) for dims in (*DIMS, *ODD_DIMS)]
    causal += [Case("causal", "float32", *dims) for dims in DIMS]
    features = ("scores", "dropout", "documents", "bias", "varlen")
    cases = causal + [Case(name, "bfloat16", 128, 128) for name in features]
    # Backward gathers pages first; without masks, and in fp16, the mainloops are causal bf16's.
    cases += [Case(name, "bfloat16", 128, 128, "attention_forward") for name in ("full", "paged")]
    cases.append(Case("causal", "float16", 128, 128, "attention_forward"))
    # A bias launches every kernel, with the tiles that causality alone does not choose.
    cases += [Case(name, dtype, *dims, new_tiles=True) for name in ("bias", "dropout", "causal")
              for dtype in ("bfloat16", "float32") for dims in (*SMALL_DIMS, *DIMS)]  # fmt: skip
    return cases


def build(case: Case) -> Call:
    """The call, on tensors that have shapes and no memory."""
    dtype = getattr(torch, case.dtype)
    keywords = VARIANTS[case.variant]()
    tokens_q: tuple[int, ...] = (BATCH, TOKENS)
    tokens_k: tuple[int, ...] = tokens_q
    if "cu_seqlens_q" in keywords:
        tokens_q = tokens_k = (BATCH * TOKENS,)
    if "block_table" in keywords:
        tokens_k = (BATCH * TOKENS // PAGE, PAGE)
    q = _meta(*tokens_q, HEADS, case.head_dim, dtype=dtype)
    k = _meta(*tokens_k, KV_HEADS, case.head_dim, dtype=dtype)
    v = _meta(*tokens_k, KV_HEADS, case.head_dim_v, dtype=dtype)
    return normalise(q, k, v, **keywords)
