"""Attention over a KV cache, and merging of partial results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashtile import checks, ops
from flashtile.api.call import Window, attend, normalise
from flashtile.problem import FLOATING, Call


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
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    out: Tensor | None = None,
) -> Any:
    """Attention of q over a cache; new keys and values are appended to it in place first.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
        k_cache: (batch_cache, seqlen_cache, kv_heads, head_dim), or with block_table (pages,
            page_size, kv_heads, head_dim), page_size at least 1. q's dtype.
        v_cache: as k_cache, with head_dim_v.
        k: (batch, seqlen_new, kv_heads, head_dim), written to slots cache_seqlens onwards.
        v: (batch, seqlen_new, kv_heads, head_dim_v), likewise. Given with k or not at all.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2) floating, given with k: rotary embedding
            of k at positions cache_seqlens, cache_seqlens + 1, ..., and of q at the same if causal
            or windowed, else of all q at cache_seqlens. seqlen_ro covers every position.
        cache_seqlens: tokens in the cache before the append, an int or (batch,) int32. Default:
            the cache is full.
        cache_batch_idx: (batch,) int32 row of the cache of each batch row, default its own; rows
            that are appended to must be distinct.
        cache_leftpad: (batch,) int32 first slot in use, default 0.
        block_table: (batch, max_pages) int32 page numbers; entries past a row's last page are
            never read.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as `flash_attn_func`, with
            seqlen_k the tokens in use after the append.
        rotary_interleaved: pair dims (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ... (GPT-NeoX).
        num_splits: parts that the keys are split into, 0 is planned. The torch backend uses one.
        return_softmax_lse: also return lse (batch, heads, seqlen_q), fp32, natural units.
        attn_mask: (1|batch, 1|heads, 1|seqlen_q, slots), bool or floating, by slot of the cache.
        learnable_sink: (heads,), as `flash_attn_func`.
        out: tensor to write the result into.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), or (out, lse).

    Raises:
        TypeError, ValueError: as `flash_attn_func`; a cache too small for the append, new tokens
            that require grad (appending has no backward). Nothing is written before. Values on an
            accelerator are checked with flashtile.config.checked only.

    Source: Dao et al., "Flash-Decoding", 2023; rotary: Su et al., "RoFormer", 2021, section 3.2.

    >>> cache_seqlens = torch.tensor([3, 7], dtype=torch.int32)
    >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.is_tensor(name, x, 4)
    if num_splits < 0:
        raise ValueError(f"num_splits is {num_splits}; it must be at least 0 (0: planned)")
    if torch.is_autocast_enabled(q.device.type):
        q = q.to(k_cache.dtype)
        k, v = (x if x is None else x.to(k_cache.dtype) for x in (k, v))
    call = normalise(
        q, k_cache, v_cache, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, attn_mask=attn_mask,
        learnable_sink=learnable_sink, seqused_k=_lengths(cache_seqlens, q),
        block_table=block_table, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
    )  # fmt: skip
    if k is None and v is None:
        if rotary_cos is not None or rotary_sin is not None:
            raise ValueError("rotary_cos is given and k is None; rotary goes with new tokens")
        return attend(call, out=out, return_lse=return_softmax_lse)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {x.stride()}; to be appended to, its last must be 1"
            )
    _check_append(call, k, v, cache_seqlens)
    _check_rotary(call, rotary_cos, rotary_sin)
    if out is not None:
        checks.check_out(out, call)
    result, lse = ops.with_kvcache(k, v, rotary_cos, rotary_sin, rotary_interleaved, *call.flat())
    result = result if out is None else out.copy_(result)
    return (result, lse) if return_softmax_lse else result


def _lengths(cache_seqlens: int | Tensor | None, q: Tensor) -> Tensor | None:
    if cache_seqlens is None or isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _check_append(
    call: Call, k: Tensor | None, v: Tensor | None, cache_seqlens: int | Tensor | None
) -> None:
    """New tokens fit the cache, as far as the host knows."""
    q, k_cache, v_cache = call.operands[:3]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x is None:
            raise ValueError(f"{name} is None; k and v are given together")
        checks.is_tensor(name, x, 4)
        checks.same_device(name, x, q)
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; the cache has {cache.dtype}")
        wanted = (q.shape[0], k.shape[1] if k is not None else 0, *cache.shape[2:])
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {wanted}")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens is None; appending needs to know where to write")
    assert k is not None
    if not isinstance(cache_seqlens, Tensor) and cache_seqlens + k.shape[1] > call.seqlen_k:
        raise ValueError(
            f"cache_seqlens is {cache_seqlens} with {k.shape[1]} new tokens; "
            f"the cache holds {call.seqlen_k}"
        )
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*call.operands, k, v)
    ):
        raise ValueError("an input requires grad; appending to a cache has no backward")


def _check_rotary(call: Call, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    q = call.operands.q
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x is None:
            raise ValueError(f"{name} is None; rotary_cos and rotary_sin are given together")
        checks.is_tensor(name, x, 2)
        checks.same_device(name, x, q)
        if x.dtype not in FLOATING:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be floating")
        if 2 * x.shape[1] > q.shape[-1]:
            raise ValueError(f"{name} rotates {2 * x.shape[1]} dims; head_dim is {q.shape[-1]}")
    assert cos is not None and sin is not None
    if cos.shape != sin.shape:
        raise ValueError(f"rotary_sin has shape {tuple(sin.shape)}; cos has {tuple(cos.shape)}")


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union.

    out = sum_s exp(lse_s - lse) out_s, lse = log sum_s exp(lse_s). Differentiable.

    Args:
        out_partial: (splits, batch, seqlen, heads, head_dim), float32 for no loss; or any other
            dimensions between the first and the last.
        lse_partial: out_partial's shape without head_dim, natural units, -inf for an empty part.
        out: tensor to write the result into.
        out_dtype: dtype of the result, default out's, else out_partial's.

    Returns:
        (out (batch, seqlen, heads, head_dim), lse (batch, seqlen, heads)); 0 and -inf where every
        part is empty.

    Raises:
        TypeError, ValueError: an argument that is not a tensor, or of a wrong shape or dtype.

    Source: Dao et al., "Flash-Decoding", 2023.

    >>> out, lse = flash_attn_combine(torch.stack(outs), torch.stack(lses))
    """
    checks.is_tensor("out_partial", out_partial)
    checks.is_tensor("lse_partial", lse_partial)
    if out_partial.dtype not in FLOATING or not lse_partial.is_floating_point():
        raise TypeError(
            f"out_partial and lse_partial have dtypes {out_partial.dtype} and {lse_partial.dtype}; "
            "they must be floating"
        )
    if out_partial.dim() < 2 or out_partial.shape[:-1] != lse_partial.shape:
        raise ValueError(
            f"lse_partial has shape {tuple(lse_partial.shape)}; it must be out_partial's "
            f"{tuple(out_partial.shape)} without the last dimension"
        )
    if out_partial.shape[0] == 0:
        raise ValueError("out_partial has 0 splits; it must have at least 1")
    dtype = torch.promote_types(out_partial.dtype, torch.float32)
    lse = torch.logsumexp(lse_partial.to(dtype), dim=0)
    # An empty union has lse -inf: its parts weigh 0, not exp(-inf + inf).
    weights = torch.exp(lse_partial.to(dtype) - torch.where(lse == -math.inf, 0.0, lse))
    merged = (weights.unsqueeze(-1) * out_partial.to(dtype)).sum(0)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    if out.shape != merged.shape or (out_dtype is not None and out.dtype != out_dtype):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}; it must be "
            f"{out_dtype or out.dtype} of shape {tuple(merged.shape)}"
        )
    return out.copy_(merged), lse
