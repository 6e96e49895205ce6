"""`flash_attn_interface`: FlashAttention-3's module, with its arguments and what it returns.

Arguments that only say how its kernels share the work (`pack_gqa`, `sm_margin`, metadata of its
scheduler, splits without a cache) change nothing here. What flashtile does not compute is refused:
a second query for values (`qv`), `attention_chunk`, queries of 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile.compat.flash_attn.extension import window

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch,
    seqlen, num_heads_q + 2 kv_heads, head_dim)."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = _split_heads(qkv, num_heads_q)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size,
        attention_chunk, softcap, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def _split_heads(qkv: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    if heads is None or qkv.dim() != 4 or not 0 < heads < qkv.shape[2]:
        raise ValueError(
            f"num_heads_q is {heads} and qkv has shape {tuple(qkv.shape)}; without num_heads_q qkv "
            "must be (batch, seqlen, 3, heads, head_dim), with it (batch, seqlen, num_heads_q + 2 "
            "kv_heads, head_dim)"
        )
    kv_heads, odd = divmod(qkv.shape[2] - heads, 2)
    if odd:
        raise ValueError(f"qkv has {qkv.shape[2]} heads, {heads} of q; k and v must have as many")
    return qkv.split([heads, kv_heads, kv_heads], 2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flashtile.flash_attn_func`: out, or (out, softmax_lse) with return_attn_probs.

    softmax_lse (batch, heads, seqlen_q) is -inf where a row sees no key.
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            attention_chunk=attention_chunk)  # fmt: skip
    return flashtile.flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window(*window_size),
        softcap=softcap, deterministic=deterministic, return_lse=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flashtile.flash_attn_varlen_func`, returning as `flash_attn_func` here does; softmax_lse is
    (heads, total_q)."""
    _refuse(qv=qv, q_descale=q_descale, attention_chunk=attention_chunk)
    return flashtile.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window(*window_size),
        softcap=softcap, deterministic=deterministic, return_lse=return_attn_probs,
        seqused_q=seqused_q, seqused_k=seqused_k, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashtile.flash_attn_combine`."""
    return flashtile.flash_attn_combine(out_partial, lse_partial, out, out_dtype)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`flashtile.flash_attn_with_kvcache`, without gradients even where an input asks for them.

    Returns out, or with return_softmax_lse (out, softmax_lse, and two empty tensors where
    FlashAttention-3 has the states of its splits).
    """
    _refuse(qv=qv, q_descale=q_descale, attention_chunk=attention_chunk)
    if page_table is not None and cache_batch_idx is not None:
        # Rows of the table, where flashtile's are always the batch's own.
        page_table, cache_batch_idx = page_table.index_select(0, cache_batch_idx), None
    with torch.no_grad():
        out, lse = flashtile.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, softmax_scale, causal, window(*window_size), softcap,
            rotary_interleaved, num_splits=num_splits, return_softmax_lse=True,
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_seqlens=None if rotary_cos is None else rotary_seqlens,
            k_descale=k_descale, v_descale=v_descale,
        )  # fmt: skip
    return (out, lse, lse.new_empty(0), lse.new_empty(0)) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Nothing, as an int32 tensor of shape (0,): the work is planned where the lengths are, in the
    kernel itself."""
    return cache_seqlens.new_empty(0, dtype=torch.int32)


def _refuse(attention_chunk: int, **tensors: Tensor | None) -> None:
    if attention_chunk != 0:
        raise ValueError(f"attention_chunk is {attention_chunk}; it must be 0 (off)")
    for name, x in tensors.items():
        if x is not None:
            raise ValueError(f"{name} is given; it must be None in this function of flashtile")
