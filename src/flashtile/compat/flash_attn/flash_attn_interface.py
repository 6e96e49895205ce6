"""`flash_attn.flash_attn_interface`: the public functions, and the private ones others build on.

The public functions are flashtile's, called with FlashAttention-2's arguments and returning its
tuples. The private ones lie in `private`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import flashtile
from flashtile.compat.flash_attn import extension as flash_attn_gpu
from flashtile.compat.flash_attn.conventions import (
    dmask_to_flash_attn,
    get_block_size_n,
    lse_to_flash_attn,
)
from flashtile.compat.flash_attn.private import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
)

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False
"""flash_attn's switch to its other backend."""

_get_block_size_n = get_block_size_n


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m that is not below x."""
    return -(-x // m) * m


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (batch, seqlen, 3, heads, head_dim)."""
    result = flashtile.flash_attn_qkvpacked_func(
        qkv, dropout_p, softmax_scale, causal, flash_attn_gpu.window(*window_size),
        max(softcap, 0.0), alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
    return _result(result, return_attn_probs, qkv.shape[-1], causal)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of kv (batch, seqlen_k, 2, kv_heads, head_dim)."""
    result = flashtile.flash_attn_kvpacked_func(
        q, kv, dropout_p, softmax_scale, causal, flash_attn_gpu.window(*window_size),
        max(softcap, 0.0), alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
    return _result(result, return_attn_probs, q.shape[-1], causal)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flashtile.flash_attn_func`: out, or (out, softmax_lse, S_dmask) with return_attn_probs.

    softmax_lse is +inf where a row sees no key. S_dmask (batch, heads, seqlen_q, seqlen_k), both
    rounded up to 128, is negative where dropped and unnormalised between blocks of
    `_get_block_size_n` keys; without dropout it has shape (0,).
    """
    result = flashtile.flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, flash_attn_gpu.window(*window_size),
        max(softcap, 0.0), alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
    return _result(result, return_attn_probs, q.shape[-1], causal)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, heads, head_dim)."""
    result = flashtile.flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal,
        flash_attn_gpu.window(*window_size), max(softcap, 0.0), alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip
    return _result(result, return_attn_probs, qkv.shape[-1], causal)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` of kv (total_k, 2, kv_heads, head_dim)."""
    result = flashtile.flash_attn_varlen_kvpacked_func(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, flash_attn_gpu.window(*window_size), max(softcap, 0.0), alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip
    return _result(result, return_attn_probs, q.shape[-1], causal)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flashtile.flash_attn_varlen_func`, returning as `flash_attn_func` here does.

    softmax_lse is (heads, total_q); S_dmask is (batch, heads, max_seqlen_q, max_seqlen_k), both
    rounded up to 128.
    """
    result = flashtile.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, flash_attn_gpu.window(*window_size), max(softcap, 0.0), alibi_slopes,
        deterministic, return_attn_probs, block_table,
    )  # fmt: skip
    return _result(result, return_attn_probs, q.shape[-1], causal)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`flashtile.flash_attn_with_kvcache`, without gradients even where an input asks for them.

    Returns out, or (out, softmax_lse) with return_softmax_lse. Lengths past the pages of
    block_table are a RuntimeError.
    """
    out, softmax_lse = flash_attn_gpu.fwd_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx,
        cache_leftpad, block_table, alibi_slopes, None, softmax_scale, causal,
        *window_size, softcap, rotary_interleaved, num_splits,
    )  # fmt: skip
    return (out, softmax_lse) if return_softmax_lse else out


def _result(result: Any, with_probs: bool, head_dim: int, causal: bool) -> Any:
    """What flash_attn returns: out, or (out, softmax_lse, S_dmask)."""
    if not with_probs:
        return result
    out, lse, probabilities = result
    return out, lse_to_flash_attn(lse), dmask_to_flash_attn(probabilities, head_dim, causal)
