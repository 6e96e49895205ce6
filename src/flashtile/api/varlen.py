"""Attention over packed sequences of different lengths, and over paged K/V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile import checks
from flashtile.api import warm
from flashtile.api.call import Documents, Window, attend, host_int, normalise
from flashtile.mods.functions import MaskFunction, ScoreFunction


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    num_splits: int = 0,
    split_size: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """`flash_attn_func` for each of the sequences packed along the token dimension.

    Args:
        q: (total_q, heads, head_dim), float16, bfloat16, float32 or float64. Any strides.
        k: (total_k, kv_heads, head_dim), or with block_table (pages, page_size, kv_heads,
            head_dim), page_size at least 1.
        v: as k, with head_dim_v.
        cu_seqlens_q: (batch + 1,) int32, sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
            It starts at 0 and does not decrease; sequences may be empty, and rows past the last
            are padding: 0 in out, -inf in lse, never read.
        cu_seqlens_k: (batch + 1,) int32, likewise. With block_table only its differences count,
            and with block_table and seqused_k it may be None.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, optional. A tensor counts as None,
            since reading it would be a host sync.
        block_table: (batch, max_pages) int32 page numbers of each sequence; entries past its last
            page are never read.
        bias, attn_mask: (1|batch, 1|heads, 1|seqlen, seqlen), indexed from each sequence's own
            start, at least as large as the longest sequence.
        document_ids: (total,) integers, or a pair for q and k.
        seqused_q, seqused_k: (batch,) int32, how many rows of each sequence are in use; the rest
            are treated as padding.
        num_splits, split_size: as `flash_attn_with_kvcache`, where few queries meet long keys.
        k_descale, v_descale: fp32 scales of e4m3 k and v, as `flash_attn_with_kvcache`; those of
            tokens with block_table only.
        return_lse: lse is (heads, total_q).
        return_attn_probs: S_dmask is (batch, heads, max_seqlen_q, max_seqlen_k) rounded up to 128.

    The other arguments (units and shapes) are those of `flash_attn_func`.

    Returns:
        out (total_q, heads, head_dim_v), or (out, lse), or (out, lse, S_dmask).

    Raises:
        TypeError, ValueError: as `flash_attn_func`. Values of lengths and page numbers are checked
            on the CPU, and elsewhere with flashtile.config.checked (a host sync).

    Source: Dao, "FlashAttention-2", 2023; paging: Kwon et al., "PagedAttention", SOSP 2023.

    >>> cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32)
    >>> q = torch.randn(10, 8, 64)
    >>> out = flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, causal=True)  # (10, 8, 64)
    """
    given, tensors = None, (q, k, v, bias, alibi_slopes, learnable_sink, cu_seqlens_q, cu_seqlens_k,
                          seqused_q, seqused_k, block_table)  # fmt: skip
    plain = attn_mask is document_ids is score_mod is mask_mod is out is None
    plain = plain and k_descale is v_descale is None
    if plain and dropout_p == 0.0 and not return_attn_probs:
        longest = host_int(max_seqlen_q), host_int(max_seqlen_k)
        given = ("varlen", softmax_scale, causal, window_size, attention_chunk, softcap,
                 deterministic, num_splits, split_size, *longest, return_lse)  # fmt: skip
        if (found := warm.again(given, tensors)) is not None:
            return found
    checks.is_tensor("cu_seqlens_q", cu_seqlens_q, 1)
    call = normalise(
        q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, bias=bias, attn_mask=attn_mask,
        learnable_sink=learnable_sink, document_ids=document_ids, score_mod=score_mod,
        mask_mod=mask_mod, attention_chunk=attention_chunk, k_descale=k_descale,
        v_descale=v_descale, dropout_generator=dropout_generator, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        block_table=block_table, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        num_splits=num_splits, split_size=split_size,
    )  # fmt: skip
    found = attend(call, out=out, return_lse=return_lse, return_attn_probs=return_attn_probs)
    if given is not None:
        warm.remember(given, tensors, call, return_lse)
    return found


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """`flash_attn_varlen_func` of the three slices of one tensor; its gradient is one tensor too.

    Args:
        qkv: (total, 3, heads, head_dim), float16, bfloat16, float32 or float64.
        cu_seqlens: (batch + 1,) int32 of q and k.
        max_seqlen: upper bound of the lengths, optional.

    The other arguments (units and shapes), the returns, the errors and the source are those of
    `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`, and for a qkv that is not packed so.
    """
    checks.packed("qkv", qkv, 4, 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        return_lse=return_lse, bias=bias, attn_mask=attn_mask, learnable_sink=learnable_sink,
        document_ids=document_ids, score_mod=score_mod, mask_mod=mask_mod,
        attention_chunk=attention_chunk, seqused_q=seqused_q, seqused_k=seqused_k, out=out,
        dropout_generator=dropout_generator,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """`flash_attn_varlen_func` of q and the two slices of one tensor, whose gradient is one tensor.

    Args:
        q: (total_q, heads, head_dim), float16, bfloat16, float32 or float64.
        kv: (total_k, 2, kv_heads, head_dim), q's dtype.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32.

    The other arguments (units and shapes), the returns, the errors and the source are those of
    `flash_attn_varlen_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_varlen_func`, and for a kv that is not packed so.
    """
    checks.packed("kv", kv, 4, 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        return_lse=return_lse, bias=bias, attn_mask=attn_mask, learnable_sink=learnable_sink,
        document_ids=document_ids, score_mod=score_mod, mask_mod=mask_mod,
        attention_chunk=attention_chunk, seqused_q=seqused_q, seqused_k=seqused_k, out=out,
        dropout_generator=dropout_generator,
    )  # fmt: skip
