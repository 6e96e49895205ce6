"""One test for each message: the argument, its value and the limit, before anything is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import config

Q, K, V = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
PACKED = [x.flatten(0, 1) for x in (Q, K, V)]
CU = torch.tensor([0, 6, 16], dtype=torch.int32)
POOL = torch.randn(6, 4, 2, 16)


def dense(q: Any = Q, k: Any = K, v: Any = V, **keywords: Any) -> Any:
    return flashtile.flash_attn_func(q, k, v, **keywords)


def varlen(cu_q: Any = CU, cu_k: Any = CU, **keywords: Any) -> Any:
    return flashtile.flash_attn_varlen_func(*PACKED, cu_q, cu_k, **keywords)


def paged(table: Any, **keywords: Any) -> Any:
    keywords = {"seqused_k": torch.tensor([4, 7], dtype=torch.int32), **keywords}
    return flashtile.flash_attn_varlen_func(
        PACKED[0], POOL, POOL, CU, None, block_table=table, **keywords
    )


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)

TYPE_ERRORS: list[tuple[Any, str]] = [
    (lambda: dense(q=[1]), "q is a list; it must be a torch.Tensor"),
    (lambda: dense(v=None), "v is a NoneType"),
    (
        lambda: dense(attn_mask=torch.zeros(1, 8).to(torch.float8_e4m3fn)),
        "attn_mask has dtype torch.float8_e4m3fn; it must be bool or floating",
    ),
    (lambda: dense(Q.int(), K.int(), V.int()), "q has dtype torch.int32; it must be float16"),
    (lambda: dense(k=K.half()), "q, k and v have dtypes torch.float32, torch.float16 and torch.fl"),
    (lambda: varlen(CU.long()), "cu_seqlens_q has dtype torch.int64; it must be torch.int32"),
    (lambda: varlen(cu_k=CU.long()), "cu_seqlens_k has dtype torch.int64; it must be torch.int32"),
    (lambda: varlen(None), "cu_seqlens_q is a NoneType; it must be a torch.Tensor"),
    (lambda: varlen(seqused_k=ints(1, 2).long()), "seqused_k has dtype torch.int64"),
    (lambda: paged(TABLE.long()), "block_table has dtype torch.int64; it must be torch.int32"),
    (lambda: dense(bias=torch.ones(8, 8).bool()), "bias has dtype torch.bool; it must be floating"),
    (
        lambda: dense(attn_mask=torch.ones(8, 8).int()),
        "attn_mask has dtype torch.int32; it must be",
    ),
    (lambda: dense(alibi_slopes=ints(1, 2, 3, 4)), "alibi_slopes has dtype torch.int32"),
    (lambda: dense(learnable_sink=ints(1, 2, 3, 4)), "learnable_sink has dtype torch.int32"),
    (lambda: dense(document_ids=torch.rand(2, 8)), "document_ids has dtype torch.float32"),
    (lambda: dense(out=torch.empty(2, 8, 4, 16).half()), "out has dtype torch.float16; it must be"),
    (lambda: dense(window_size=5), "window_size is 5; it must be a pair (left, right)"),
    (lambda: dense(window_size=(1, 2, 3)), "window_size is (1, 2, 3); it must be a pair"),
    (lambda: dense(window_size=None), "window_size is None; it must be a pair"),
    (lambda: dense(window_size=(1.5, 0)), "window_size is (1.5, 0); its sides must be ints"),
    (lambda: dense(window_size=(torch.tensor(1.5), 0)), "window_size is (tensor(1.5000), 0); its"),
    (lambda: cached(num_splits=None), "num_splits is a NoneType; it must be an int"),
    (lambda: cached(split_size=2.5), "split_size is a float; it must be an int"),
    (lambda: cached(cache_seqlens=3.5), "cache_seqlens is a float; it must be an int or an int32"),
    (lambda: cached(cache_seqlens=[3, 4]), "cache_seqlens is a list; it must be an int or"),
    (lambda: combine(lse=torch.ones(2, 8).int()), "they must be floating"),
    (lambda: combine(out_dtype=torch.int32), "out_dtype is torch.int32; it must be a floating"),
    (lambda: combine(out_dtype=3), "out_dtype is 3; it must be a floating torch.dtype"),
    (lambda: dense(attention_chunk=2.0), "attention_chunk is a float; it must be an int"),
    (lambda: dense(window_size=("a", 0)), "window_size is ('a', 0); its sides must be ints"),
    (lambda: dense(softmax_scale=[0.3]), "softmax_scale is [0.3]; it must be a number"),
    (lambda: dense(softcap=None), "softcap is None; it must be a number"),
    (lambda: dense(dropout_p="high"), "dropout_p is 'high'; it must be a number"),
    (lambda: dense(document_ids=3), "document_ids is a int; it must be a tensor or a pair"),
    (lambda: dense(q=Q.to_sparse()), "q has layout torch.sparse_coo; it must be torch.strided"),
    (lambda: varlen(max_seqlen_q=7.0), "max_seqlen_q is a float; it must be an int"),
    (lambda: varlen(max_seqlen_k="7"), "max_seqlen_k is a str; it must be an int"),
]

VALUE_ERRORS: list[tuple[Any, str]] = [
    (lambda: dense(v=V[..., :0]), "v has head_dim 0; it must be at least 1"),
    (
        lambda: strided_append(16),
        "k_cache has strides (512, 32, 32, 2); to be appended to, its last",
    ),
    (
        lambda: paged(TABLE, document_ids=(CU, CU)),
        "document_ids and block_table are given; they ex",
    ),
    (
        lambda: varlen(bias=torch.randn(1, 1, 9, 10)),
        "bias has shape (1, 1, 9, 10); the longest seq",
    ),
    (
        lambda: varlen(attn_mask=torch.randn(1, 1, 1, 9)),
        "attn_mask has shape (1, 1, 1, 9); the long",
    ),
    (lambda: dense(q=Q[0]), "q has shape (8, 4, 16); it must have 4 dimensions"),
    (lambda: dense(k=K[0]), "k has shape (8, 2, 16); it must have 4 dimensions"),
    (lambda: dense(v=V[:, :7]), "v has shape (2, 7, 2, 16); all but head_dim must be k's"),
    (lambda: dense(k=K[..., :8]), "k has head_dim 8; q has 16"),
    (lambda: dense(Q[..., :0], K[..., :0], V), "q has head_dim 0; it must be at least 1"),
    (lambda: dense(k=K[:1], v=V[:1]), "k has batch 1; q has 2"),
    (lambda: dense(q=Q[:, :, :3]), "q has 3 heads; they must be a multiple of k's 2"),
    (lambda: dense(k=K[:, :, :0], v=V[:, :, :0]), "k has 0 heads; q has 4"),
    (lambda: dense(k=K.to("meta")), "k is on meta; q is on cpu"),
    (lambda: dense(dropout_p=1.0), "dropout_p is 1.0; it must be in [0, 1)"),
    (lambda: dense(dropout_p=-0.1), "dropout_p is -0.1; it must be in [0, 1)"),
    (lambda: dense(softcap=-1.0), "softcap is -1.0; it must be finite and at least 0"),
    (lambda: dense(softmax_scale=float("nan")), "softmax_scale is nan; it must be finite"),
    (lambda: dense(attention_chunk=-1), "attention_chunk is -1; it must be at least 0 (0: off)"),
    (lambda: dense(window_size=(-2, 0)), "window_size left is -2; it must be at least 0, or -1 or"),
    (lambda: dense(window_size=(0, -7)), "window_size right is -7; it must be at least 0"),
    (
        lambda: dense(window_size=(-1, -7), causal=True),
        "window_size right is -7; it must be at least 0",
    ),
    (lambda: dense(bias=torch.randn(1, 3, 8, 8)), "bias has shape (1, 3, 8, 8); it must broadcast"),
    (
        lambda: dense(attn_mask=torch.ones(7, 8) > 0),
        "attn_mask has shape (1, 1, 7, 8); it must bro",
    ),
    (
        lambda: dense(attn_mask=torch.ones(8, 1) > 0),
        "attn_mask has shape (1, 1, 8, 1); it must bro",
    ),
    (
        lambda: dense(attn_mask=torch.randn(8, 8, requires_grad=True)),
        "attn_mask requires grad; pas",
    ),
    (lambda: dense(alibi_slopes=torch.rand(3)), "alibi_slopes has shape (3,); it must be (4,) or"),
    (lambda: dense(learnable_sink=torch.rand(3)), "learnable_sink has shape (3,); it must be (4,)"),
    (lambda: dense(document_ids=ints(1, 2)), "document_ids of q has shape (2,); it must be (2, 8)"),
    (lambda: dense(document_ids=(ints(1),)), "document_ids has 1 entries; it must be a tensor or"),
    (lambda: dense(out=torch.empty(2, 8, 4, 8)), "out has shape (2, 8, 4, 8); it must be"),
    (lambda: dense(out=Q), "out overlaps q in memory; give it memory of its own"),
    (
        lambda: dense(out=torch.empty(1, 8, 4, 16).expand(2, -1, -1, -1)),
        "out has shape (2, 8, 4, 16) "
        "and strides (0, 64, 16, 1); to be written to, no two of its elements may be one in memory",
    ),
    (lambda: dense(q=torch.tensor(1.0)), "q has shape (); it must have dimensions"),
    (
        lambda: dense(q=Q.clone().requires_grad_(), out=torch.empty_like(Q)),
        "out is given and an in",
    ),
    (
        lambda: flashtile.flash_attn_qkvpacked_func(torch.randn(2, 8, 2, 4, 16)),
        "dimension 2 must be",
    ),
    (
        lambda: flashtile.flash_attn_qkvpacked_func(torch.randn(2, 8, 16)),
        "qkv has shape (2, 8, 16)",
    ),
    (lambda: flashtile.flash_attn_kvpacked_func(Q, torch.randn(2, 8, 3, 4, 16)), "kv has shape"),
    (lambda: varlen(CU[:0]), "cu_seqlens_q has 0 entries; it must have batch + 1"),
    (lambda: varlen(cu_k=CU[:2]), "cu_seqlens_k has shape (2,); it must be (3,)"),
    (lambda: varlen(CU[None]), "cu_seqlens_q has shape (1, 3); it must have 1 dimensions"),
    (lambda: varlen(CU.to("meta")), "cu_seqlens_q is on meta; q is on cpu"),
    (
        lambda: varlen(cu_k=None),
        "cu_seqlens_k is None; only block_table with seqused_k can do with",
    ),
    (lambda: varlen(max_seqlen_q=-3), "max_seqlen_q is -3; it must be at least 0"),
    (lambda: varlen(ints(1, 6, 16)), "cu_seqlens_q starts at 1; it must start at 0"),
    (lambda: varlen(ints(0, 9, 5)), "cu_seqlens_q decreases after entry 1: [9, 5]"),
    (lambda: varlen(cu_k=ints(0, 6, 17)), "cu_seqlens_k ends at 17; there are 16 tokens"),
    (lambda: varlen(max_seqlen_k=9), "max_seqlen_k is 9; the longest sequence has 10 tokens"),
    (lambda: varlen(seqused_q=ints(7, 1)), "seqused_q[0] is 7; it must be in [0, 6]"),
    (lambda: varlen(seqused_k=ints(1, -1)), "seqused_k[1] is -1; it must be in [0, 10]"),
    (lambda: varlen(seqused_k=ints(1)), "seqused_k has shape (1,); it must be (2,)"),
    (lambda: paged(TABLE[:1]), "block_table has shape (1, 2); it must be (2, -1)"),
    (lambda: paged(TABLE + 3), "block_table holds page 6; the pool has 6"),
    (lambda: paged(TABLE - 1), "block_table holds page -1; the pool has 6"),
    (lambda: paged(TABLE, seqused_k=ints(4, 9)), "seqused_k[1] is 9; it must be in [0, 8]"),
    (lambda: cached(cache_seqlens=ints(1, 17)), "cache_seqlens[1] is 17; it must be in [0, 16]"),
    (lambda: cached(cache_batch_idx=ints(0, 3)), "cache_batch_idx holds 3; the cache has 3 rows"),
    (lambda: cached(cache_leftpad=ints(0, 17)), "cache_leftpad[1] is 17; it must be in [0, 16]"),
    (lambda: cached(cache_seqlens=2**40), "cache_seqlens is 1099511627776; it must be less than"),
    (lambda: cached(num_splits=-1), "num_splits is -1; it must be at least 0"),
    (lambda: cached(rotary_cos=torch.rand(9, 4)), "rotary_cos is given and k is None"),
    (lambda: append(v=None), "v is None; k and v are given together"),
    (
        lambda: append(k=torch.randn(2, 3, 1, 16)),
        "k has shape (2, 3, 1, 16); it must be (2, 3, 2, 1",
    ),
    (lambda: append(cache_seqlens=None), "cache_seqlens is None; appending needs to know where"),
    (lambda: append(cache_seqlens=14), "cache_seqlens is 14 with 3 new tokens; the cache holds 16"),
    (
        lambda: append(cache_seqlens=ints(14, 0)),
        "cache_seqlens plus 3 new tokens reaches 17; k_cach",
    ),
    (lambda: append(cache_seqlens=ints(-1, 0)), "cache_seqlens holds -1; lengths are at least 0"),
    (lambda: append(rotary_cos=torch.rand(30, 4)), "rotary_sin is None; rotary_cos and rotary_sin"),
    (lambda: append(**angles(30, 9)), "rotary_cos rotates 18 dims; head_dim is 16"),
    (
        lambda: append(**angles(6, 4)),
        "rotary_cos has 6 positions; cache_seqlens plus the new token",
    ),
    (lambda: append(**angles(30, 4) | {"rotary_sin": torch.rand(30, 3)}), "rotary_sin has shape"),
    (
        lambda: append(k=torch.randn(2, 3, 2, 16, requires_grad=True)),
        "an input requires grad; appen",
    ),
    (
        lambda: append(block_table=TABLE, cache_batch_idx=ints(0, 1)),
        "cache_batch_idx and block_tabl",
    ),
    (
        lambda: combine(lse=torch.randn(2, 7)),
        "lse_partial has shape (2, 7); it must be out_partial",
    ),
    (
        lambda: combine(torch.randn(0, 8, 16), torch.randn(0, 8)),
        "out_partial has 0 splits; it must",
    ),
    (
        lambda: combine(lse=torch.randn(2, 8, device="meta")),
        "lse_partial is on meta; out_partial is on cpu",
    ),
    (lambda: combine(out=torch.empty(8, 16, device="meta")), "out is on meta; out_partial is on"),
    (
        lambda: combine(out=torch.empty(1, 16).expand(8, 16)),
        "out has shape (8, 16) and strides (0, 1); to be written to",
    ),
    (lambda: combine(out=torch.empty(7, 16)), "out is torch.float32 of shape (7, 16); it must be"),
]


def cached(**keywords: Any) -> Any:
    k_cache, v_cache = torch.randn(3, 16, 2, 16), torch.randn(3, 16, 2, 16)
    if "cache_batch_idx" not in keywords:
        k_cache, v_cache = k_cache[:2], v_cache[:2]
    return flashtile.flash_attn_with_kvcache(Q[:, :1], k_cache, v_cache, **keywords)


def append(**keywords: Any) -> Any:
    """Append to a cache and fail; the cache must be as it was."""
    new = {"k": torch.randn(2, 3, 2, 16), "v": torch.randn(2, 3, 2, 16)}
    keywords = {**new, "cache_seqlens": ints(5, 2), **keywords}
    caches = [torch.randn(2, 16, 2, 16) for _ in range(2)]
    before = [x.clone() for x in caches]
    try:
        return flashtile.flash_attn_with_kvcache(Q[:, :3], *caches, **keywords)
    finally:
        for x, y in zip(caches, before, strict=True):
            assert torch.equal(x, y)


def strided_append(slots: int) -> Any:
    """A cache whose last dimension is strided would be copied, and the copy appended to."""
    wide = torch.randn(2, slots, 1, 16, 2)
    q, new = Q[:, :3, :1], torch.randn(2, 3, 1, 16)
    return flashtile.flash_attn_with_kvcache(
        q, wide[..., 0], wide[..., 1], new, new, cache_seqlens=2
    )


def angles(positions: int, half: int) -> dict[str, Tensor]:
    return {"rotary_cos": torch.rand(positions, half), "rotary_sin": torch.rand(positions, half)}


def combine(
    out_partial: Tensor | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: Any = None,
) -> Any:
    return flashtile.flash_attn_combine(
        torch.randn(2, 8, 16) if out_partial is None else out_partial,
        torch.randn(2, 8) if lse is None else lse,
        out,
        out_dtype,
    )


@pytest.mark.parametrize(("call", "message"), TYPE_ERRORS, ids=[m for _, m in TYPE_ERRORS])
def test_type_errors(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS, ids=[m for _, m in VALUE_ERRORS])
def test_value_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_out_is_not_written_on_error() -> None:
    out = torch.randn(16, 4, 16)
    before = out.clone()
    with pytest.raises(ValueError, match="ends at 17"):
        varlen(cu_k=ints(0, 6, 17), out=out)
    assert torch.equal(out, before)


def test_checked_mode_is_off_by_default() -> None:
    assert config.checked is False
