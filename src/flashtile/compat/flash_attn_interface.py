"""`flash_attn_interface`: FlashAttention-3's module, with its arguments and what it returns.

Arguments that only say how its kernels share the work (`pack_gqa`, `sm_margin`, metadata of its
scheduler, splits without a cache) change nothing here, nor do scales of tensors that are not of 8
bits. What flashtile does not compute is refused: a second query for values (`qv`), queries of 8
bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import flash_attn_combine
from flashtile.api.call import attend, normalise
from flashtile.compat.flash_attn.extension import gradients, window
from flashtile.compat.flash_attn.private import maybe_contiguous
from flashtile.problem import E4M3

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
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
    k_descale, v_descale = _scales(k, k_descale, v_descale)
    _refuse(qv=qv, k_descale=k_descale, v_descale=v_descale)
    return flashtile.flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window(*window_size),
        softcap=softcap, deterministic=deterministic, return_lse=return_attn_probs,
        attention_chunk=attention_chunk,
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
    _refuse(qv=qv)
    k_descale, v_descale = _scales(k, k_descale, v_descale)
    return flashtile.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, causal=causal, window_size=window(*window_size),
        softcap=softcap, deterministic=deterministic, return_lse=return_attn_probs,
        attention_chunk=attention_chunk,
        seqused_q=seqused_q, seqused_k=seqused_k, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip


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
    _refuse(qv=qv)
    page_table, cache_batch_idx = _rows_of_pages(page_table, cache_batch_idx)
    k_descale, v_descale = _scales(k_cache, k_descale, v_descale)
    with torch.no_grad():
        out, lse = flashtile.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, page_table, softmax_scale, causal, window(*window_size), softcap,
            rotary_interleaved, num_splits=max(num_splits, 0), return_softmax_lse=True,
            cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            cu_seqlens_k_new=None if k is None else cu_seqlens_k_new,
            rotary_seqlens=None if rotary_cos is None else rotary_seqlens,
            k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
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


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all of the above are, in one function: (out, softmax_lse, and two empty tensors)."""
    # flashtile counts the queries in use of packed sequences alone.
    _refuse(qv=qv, seqused_q=seqused_q if cu_seqlens_q is None else None)
    if k_new is not None:
        return flash_attn_with_kvcache(
            q, k, v, k_new, v_new, None, rotary_cos, rotary_sin, seqused_k, kv_batch_idx, leftpad_k,
            page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, seqlens_rotary, None,
            k_descale, v_descale, softmax_scale, causal, (window_size_left, window_size_right),
            attention_chunk, softcap, rotary_interleaved, None, num_splits, return_softmax_lse=True,
        )  # fmt: skip
    page_table, kv_batch_idx = _rows_of_pages(page_table, kv_batch_idx)
    k_descale, v_descale = _scales(k, k_descale, v_descale)
    call = normalise(
        q, k, v, softmax_scale=softmax_scale, causal=causal,
        window_size=window(window_size_left, window_size_right),
        attention_chunk=attention_chunk, softcap=softcap,
        k_descale=k_descale, v_descale=v_descale, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q, seqused_k=seqused_k, block_table=page_table,
        cache_batch_idx=kv_batch_idx, cache_leftpad=leftpad_k,
    )  # fmt: skip
    out, lse = attend(call, out=out_, return_lse=True)
    return out, lse, lse.new_empty(0), lse.new_empty(0)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Write the gradients into dq, dk and dv; returns softmax_d.

    softmax_lse and out may be those of a longer sequence that k and v are a part of.
    """
    _refuse(sequed_q=sequed_q if cu_seqlens_q is None else None)
    call = normalise(
        q, k, v, softmax_scale=softmax_scale, causal=is_causal,
        window_size=window(window_size_left, window_size_right), softcap=softcap,
        deterministic=deterministic, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=sequed_q,
        seqused_k=sequed_k,
    )  # fmt: skip
    return gradients(call, dout, out, softmax_lse, (dq, dk, dv)).softmax_d


def _refuse(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            raise ValueError(f"{name} is given; it must be None in this function of flashtile")


def _rows_of_pages(
    page_table: Tensor | None, rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Rows choose among the page table's, where flashtile's are always the batch's own."""
    if page_table is None or rows is None:
        return page_table, rows
    return page_table.index_select(0, rows), None


def _scales(k: Tensor, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scales count beside 8 bits alone: serving engines pass them with every cache."""
    return scales if getattr(k, "dtype", None) == E4M3 else (None,) * len(scales)
