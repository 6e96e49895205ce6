"""The calls whose kernels are compiled: every tile that a plan can choose, and every feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.api import normalise
from flashtile.problem import Call

BATCH, TOKENS, HEADS, KV_HEADS, PAGE, SMALL_PAGE = 32, 1024, 8, 2, 256, 16
"""Sizes of the calls. Kernels are compiled for types and for divisibility by 16, not for sizes."""

LONG = 2048
"""From here on a causal call of head_dim 64 has another tile on Hopper."""

SHORT = 512
"""Up to here a causal call has another tile on Hopper, forward at head_dim 64 and backward."""

FEW = 40
"""So few that query heads of a KV head share a tile on Hopper."""


class Case(NamedTuple):
    """One call, by what its kernels are compiled for."""

    variant: str  # a name of VARIANTS
    dtype: str  # bfloat16, ...
    head_dim: int
    head_dim_v: int
    kernels: tuple[str, ...] = ()  # those that differ from another case's; empty: all it launches
    new_tiles: bool = False  # only those of its kernels whose tile no case before it has
    tokens: int = TOKENS  # the Hopper kernel's tiles depend on it
    kv_heads: int = 0  # 0: KV_HEADS; the Hopper backward has another tile for as many as heads
    only: str = ""  # the one architecture that it is compiled for

    def __str__(self) -> str:
        dims = {self.head_dim: None, self.head_dim_v: None}
        return f"{self.variant} {self.dtype} {'/'.join(map(str, dims))}"


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scores() -> dict[str, Any]:
    """Both ends of the band, and two mods of the scores."""
    return {"window_size": (256, 0), "softcap": 30.0, "alibi_slopes": _meta(HEADS)}


def _documents() -> dict[str, Any]:
    """Lists of blocks, and mods of the scores in them."""
    ids = _meta(BATCH, TOKENS, dtype=torch.int32)
    return {"causal": True, "document_ids": ids, "softcap": 30.0, "alibi_slopes": _meta(HEADS)}


def _bias() -> dict[str, Any]:
    return {"bias": _meta(1, HEADS, TOKENS, TOKENS, dtype=torch.bfloat16),
            "learnable_sink": _meta(HEADS)}  # fmt: skip


def _packed_bias() -> dict[str, Any]:
    return {**_packed(), "bias": _meta(1, HEADS, TOKENS, TOKENS, dtype=torch.bfloat16)}


def _masked_dropout() -> dict[str, Any]:
    return {"dropout_p": 0.1, "bias": _meta(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16)}


def _varlen() -> dict[str, Any]:
    """Packed sequences, and dropout."""
    cu_seqlens = _meta(BATCH + 1, dtype=torch.int32)
    used = _meta(BATCH, dtype=torch.int32)
    return {
        "causal": True, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "seqused_q": used,
        "seqused_k": used, "max_seqlen_q": TOKENS, "max_seqlen_k": TOKENS,
        "dropout_p": 0.1,
    }  # fmt: skip


def _packed() -> dict[str, Any]:
    """Packed sequences alone, which the Hopper backward does."""
    keywords = _varlen()
    del keywords["dropout_p"]
    return keywords


def _paged() -> dict[str, Any]:
    table = _meta(BATCH, TOKENS // PAGE, dtype=torch.int32)
    return {"causal": True, "block_table": table, "seqused_k": _meta(BATCH, dtype=torch.int32)}


def _decode() -> dict[str, Any]:
    return {"seqused_k": _meta(BATCH, dtype=torch.int32)}


def _decode_pages() -> dict[str, Any]:
    """Ragged queries over small pages, and all that happens to scores without a matrix."""
    table = _meta(BATCH, TOKENS // SMALL_PAGE, dtype=torch.int32)
    cu_seqlens = _meta(BATCH + 1, dtype=torch.int32)
    return {
        **_scores(), **_decode(), "learnable_sink": _meta(HEADS), "block_table": table,
        "cu_seqlens_q": cu_seqlens, "max_seqlen_q": QUERIES["decode-pages"],
    }  # fmt: skip


def _decode_e4m3() -> dict[str, Any]:
    """Small pages; scales of keys by head, of values by token."""
    table = _meta(BATCH, TOKENS // SMALL_PAGE, dtype=torch.int32)
    pages = BATCH * TOKENS // SMALL_PAGE
    scales = {"k_descale": _meta(KV_HEADS), "v_descale": _meta(pages, SMALL_PAGE, KV_HEADS)}
    return {**_decode(), **scales, "block_table": table, "split_size": 256}


def _decode_e4m3_rows() -> dict[str, Any]:
    """Scales of keys by token, of values by head."""
    return {**_decode(), "k_descale": _meta(BATCH, TOKENS, KV_HEADS), "v_descale": _meta(KV_HEADS)}


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dict,
    "causal": lambda: {"causal": True},
    "deterministic": lambda: {"causal": True, "deterministic": True},
    "scores": _scores,
    "chunks": lambda: {"causal": True, "attention_chunk": 256},
    "dropout": lambda: {"causal": True, "dropout_p": 0.1},
    "masked dropout": _masked_dropout,
    "documents": _documents,
    "deterministic documents": lambda: {**_documents(), "deterministic": True},
    "bias": _bias,
    "packed bias": _packed_bias,
    "row of bias": lambda: {"causal": True, "bias": _meta(1, HEADS, 1, TOKENS)},
    "varlen": _varlen,
    "packed": _packed,
    "paged": _paged,
    "decode": _decode,
    "decode-latent": _decode,
    "decode-tall": lambda: {"causal": True, **_decode()},
    "decode-pages": _decode_pages,
    "decode-e4m3": _decode_e4m3,
    "decode-e4m3-rows": _decode_e4m3_rows,
}

QUERIES = {"decode": 1, "decode-latent": 1, "decode-tall": 16, "decode-pages": 4, "decode-e4m3": 1,
           "decode-e4m3-rows": 1}  # fmt: skip
"""Queries of a sequence of the variants that do not have TOKENS."""

DIMS = ((512, 512), (256, 256), (128, 128), (64, 64), (32, 32), (16, 16))
"""One head dim for each column of the tile tables in `tiles`, and smaller ones whose tiles an
architecture of little shared memory need not shrink. The widest first: what has its tile is not
compiled again."""

MIXED_DIMS = (192, 128)
"""A padded head dim, and values narrower than the keys."""

ALWAYS = ("attention_forward", "prepare_backward", "list_blocks", "classify_blocks")

DQ, DKDV, DBIAS = "attention_backward_dq", "attention_backward_dkdv", "attention_backward_dbias"
DBIAS_ROW = "attention_backward_dbias_row"

FEATURES = (
    ("documents", (128, 128), (*ALWAYS, DKDV)),
    ("bias", (192, 192), (*ALWAYS, DQ, DBIAS)),
    ("varlen", (128, 64), (*ALWAYS, DKDV)),
)
"""Variants that change forward and backward and have all features but the cache's between them,
beside a padded head dim and narrower values: a third of all CPU seconds. dQ and dK/dV compute
scores and their gradients with the same functions, so a feature is compiled in one of them but on
Hopper, whose tiles are measured."""

HOPPER = "sm_90"

HOPPER_BACKWARD = ("prepare_backward", "attention_backward", "finish_query_gradient")

COMMON_DIMS = ((64, 64), (96, 96), (128, 128), (256, 256))
"""Head dims that a cache is warmed for in both 16-bit dtypes."""


def every_case() -> list[Case]:
    """Every feature, and every tile that a plan can choose with the widest head dim that has it."""
    cases = [Case(name, "bfloat16", *dims, kernels) for name, dims, kernels in FEATURES]
    cases += [Case(name, "bfloat16", *dims, only=HOPPER) for name, dims, _ in FEATURES]
    # Backward gathers pages first; without masks the mainloops are those of causal calls.
    cases.append(Case("paged", "float16", 128, 128, ("attention_forward",)))
    cases.append(Case("full", "float16", 128, 128, only=HOPPER))
    cases += [
        Case(name, "bfloat16", 64, 64, HOPPER_BACKWARD[1:2], only=HOPPER)
        for name in ("full", "bias")
    ]  # of one tile
    chunked = ("attention_forward", DKDV, *HOPPER_BACKWARD)  # masks both ways round
    cases.append(Case("chunks", "bfloat16", 64, 64, chunked))
    cases += [Case("packed", "bfloat16", 128, 128, HOPPER_BACKWARD, kv_heads=kv_heads, only=HOPPER)
              for kv_heads in (KV_HEADS, HEADS)]  # fmt: skip
    summed = ("bound_keys", *HOPPER_BACKWARD, "query_gradients_again")
    cases.append(Case("deterministic documents", "bfloat16", 128, 128, summed, only=HOPPER))
    cases.append(Case("decode-pages", "bfloat16", 128, 128))
    cases += [Case(name, "bfloat16", 128, 128, only=HOPPER)
              for name in ("decode", "decode-tall", "decode-e4m3")]  # fmt: skip
    cases.append(Case("decode-e4m3-rows", "bfloat16", 128, 128, ("attention_decode",), only=HOPPER))
    cases.append(Case("decode-latent", "bfloat16", 576, 512, only=HOPPER))
    # Its tile is a bias's alone.
    cases.append(Case("masked dropout", "bfloat16", 64, 64, (DBIAS,)))
    cases += [Case("packed bias", "bfloat16", 128, 128, (DBIAS,)),
              Case("row of bias", "bfloat16", 128, 128, (DBIAS_ROW,))]  # fmt: skip
    # A bias launches every kernel, with the tiles that causality alone does not choose.
    kinds = ("causal", "bias", "scores", "dropout", "masked dropout")
    cases += [
        Case(name, dtype, *dims, new_tiles=True) for dims in DIMS for name in kinds
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip
    # The tiles of the Hopper kernels depend on more.
    hopper = [Case("causal", "bfloat16", *MIXED_DIMS), Case("full", "bfloat16", 64, 64)]
    hopper += [Case("causal", "bfloat16", dim, dim, tokens=tokens)
               for dim, tokens in ((64, SHORT), (128, SHORT), (64, LONG), (128, FEW))]  # fmt: skip
    hopper += [Case("causal", "bfloat16", dim, dim, tokens=tokens, kv_heads=HEADS)
               for dim, tokens in ((128, TOKENS), (256, SHORT))]  # fmt: skip
    hopper.append(Case("deterministic", "bfloat16", 256, 256))
    return cases + [case._replace(new_tiles=True, only=HOPPER) for case in hopper]


def device_cases() -> list[Case]:
    """What `every_case` has, and what calls on a GPU ask for most."""
    return every_case() + [Case("decode", "bfloat16", 128, 128)] + [
        Case(name, dtype, *dims) for dtype in ("bfloat16", "float16") for dims in COMMON_DIMS
        for name in ("causal", "full")
    ] + [
        Case("causal", dtype, *dims, HOPPER_BACKWARD, tokens=tokens, kv_heads=HEADS)
        for dtype in ("bfloat16", "float16") for dims in COMMON_DIMS for tokens in (SHORT, TOKENS)
    ]  # fmt: skip


def build(case: Case) -> Call:
    """The call, on tensors that have shapes and no memory."""
    dtype = getattr(torch, case.dtype)
    keywords = VARIANTS[case.variant]()
    queries = QUERIES.get(case.variant, case.tokens)
    tokens_q: tuple[int, ...] = (BATCH, queries)
    tokens_k: tuple[int, ...] = (BATCH, case.tokens)
    if "cu_seqlens_q" in keywords:
        tokens_q, tokens_k = (BATCH * queries,), (BATCH * case.tokens,)
    if "block_table" in keywords:
        page = TOKENS // keywords["block_table"].shape[1]
        tokens_k = (BATCH * TOKENS // page, page)
    stored = torch.float8_e4m3fn if "k_descale" in keywords else dtype
    q = _meta(*tokens_q, HEADS, case.head_dim, dtype=dtype)
    kv_heads = case.kv_heads or KV_HEADS
    k = _meta(*tokens_k, kv_heads, case.head_dim, dtype=stored)
    v = _meta(*tokens_k, kv_heads, case.head_dim_v, dtype=stored)
    if case.variant == "decode-latent":
        v = k[..., : case.head_dim_v]
    return normalise(q, k, v, **keywords)
