"""Attention over a KV cache, and merging of partial results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flashtile import checks, ops
from flashtile.api import warm
from flashtile.api.call import Window, attend, host_int, normalise, refuse_forward_mode
from flashtile.api.tokens import check_appendable, check_new_tokens
from flashtile.backends.cache import NewTokens
from flashtile.problem import E4M3, FLOATING


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
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    split_size: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attn_mask: Tensor | None = None,
    tree_mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    learnable_sink: Tensor | None = None,
    attention_chunk: int = 0,
    out: Tensor | None = None,
) -> Any:
    """Attention of q over a cache; new keys and values are appended to it in place first.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64; or with
            cu_seqlens_q (total_q, heads, head_dim).
        k_cache: (batch_cache, seqlen_cache, kv_heads, head_dim), or with block_table (pages,
            page_size, kv_heads, head_dim), page_size at least 1. q's dtype, or float8_e4m3fn.
        v_cache: as k_cache, with head_dim_v. It may be a part of k_cache, as in MLA: (..., 512) of
            (..., 576).
        k: (batch, seqlen_new, kv_heads, head_dim), written to slots cache_seqlens onwards, or with
            cu_seqlens_k_new (total_new, kv_heads, head_dim). q's dtype.
        v: as k, with head_dim_v. Given with k or not at all.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2) floating, given with k: rotary embedding
            of k at positions cache_seqlens, cache_seqlens + 1, ..., and of q at the same if causal,
            windowed or in chunks, else of all q at cache_seqlens. seqlen_ro covers every position.
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
        split_size: tokens of a part, instead: the result of a row then has the same bits whatever
            else is in the batch. 0 is no such size.
        return_softmax_lse: also return lse (batch, heads, seqlen_q) or (heads, total_q), fp32,
            natural units.
        cu_seqlens_q, cu_seqlens_k_new: (batch + 1,) int32, where the sequences of a packed q, and
            of packed k and v, begin and end: prefills and decodes in one call.
        max_seqlen_q: upper bound of the lengths of packed queries, optional.
        rotary_seqlens: (batch,) int32 position of each row's first new token, default
            cache_seqlens.
        k_descale, v_descale: fp32 scales of an e4m3 cache, default 1: () of all, (kv_heads,),
            (batch, kv_heads), or (batch_cache, seqlen_cache, kv_heads) or (pages, page_size,
            kv_heads) of the tokens. What is stored times its scale is the value. New tokens are
            quantised: by given scales, and where the scales are the tokens' own, those are written.
        attn_mask: (1|batch, 1|heads, 1|seqlen_q, slots), bool or floating, by slot of the cache.
        tree_mask: (n, n) or (1|batch, n, n) bool: which of its row's last seqlen_q keys each query
            sees (speculative decoding); it sees those before them, and whatever lies beyond n.
        prefix: K (seqlen_prefix, kv_heads, head_dim) and V, of q's dtype, that come before the
            cache of every row and are attended to once for all of them. Positions do not count it.
        learnable_sink, attention_chunk: as `flash_attn_func`.
        out: tensor to write the result into.

    Returns:
        out, q's shape with head_dim_v, or (out, lse).

    Raises:
        TypeError, ValueError: as `flash_attn_func`; a cache too small for the append; an input that
            requires grad, if tokens are appended, the cache is e4m3 or there is a prefix. Nothing
            is written before. Values on an accelerator are checked with flashtile.config.checked
            only; else tokens that have no slot are not written.

    Source: Dao et al., "Flash-Decoding", 2023; rotary: Su et al., "RoFormer", 2021, section 3.2.

    >>> cache_seqlens = torch.tensor([3, 7], dtype=torch.int32)
    >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)
    """
    parts = k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, *_pair(prefix)
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    given, tensors = None, (q, k_cache, v_cache, alibi_slopes, learnable_sink, k_descale, v_descale,
                            cu_seqlens_q, lengths, block_table, cache_batch_idx, cache_leftpad,
                            *parts)  # fmt: skip
    if cache_seqlens is lengths and attn_mask is tree_mask is out is None:
        # Appending refuses gradients, where they are recorded.
        given = ("cache", softmax_scale, causal, window_size, attention_chunk, softcap,
                 rotary_interleaved, num_splits, split_size, host_int(max_seqlen_q),
                 torch.is_grad_enabled(), return_softmax_lse)  # fmt: skip
        if (found := warm.again(given, tensors)) is not None:
            if k is not None:
                _count_change(k_cache, v_cache, k_descale, v_descale)
            return found
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.is_tensor(name, x, 3 if name == "q" and cu_seqlens_q is not None else 4)
    if cu_seqlens_q is not None:
        checks.offsets("cu_seqlens_q", cu_seqlens_q)
    casts = checks.autocasts(q) and k_cache.dtype != E4M3
    if casts:
        q = q.to(k_cache.dtype)
        k, v = (x if x is None else x.to(k_cache.dtype) for x in (k, v))
    if k is not None:
        check_appendable(k_cache, v_cache, k_descale, v_descale)
    call = normalise(
        q, k_cache, v_cache, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        attention_chunk=attention_chunk, softcap=softcap, alibi_slopes=alibi_slopes,
        attn_mask=attn_mask, tree_mask=tree_mask, k_descale=k_descale, v_descale=v_descale,
        learnable_sink=learnable_sink,
        seqused_k=_lengths(cache_seqlens, (q, k_cache, cu_seqlens_q, block_table)),
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        block_table=block_table, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        num_splits=num_splits, split_size=split_size,
    )  # fmt: skip
    new = NewTokens(k, v, *parts[2:], bool(rotary_interleaved))
    check_new_tokens(call, new, cache_seqlens)
    appends = k is not None or prefix is not None
    if not appends:
        with torch.autocast(q.device.type, enabled=False) if casts else nullcontext():
            found = attend(call, out=out, return_lse=True)
    else:
        if out is not None:
            checks.check_out(out, call)
        refuse_forward_mode(call.operands, new)
        result, lse = ops.with_kvcache(*new, *call.flat())
        if k is not None:
            _count_change(k_cache, v_cache, k_descale, v_descale)
        found = result if out is None else out.copy_(result), lse
    if given is not None:
        warm.remember(given, tensors, call, return_softmax_lse, new if appends else None)
    return found if return_softmax_lse else found[0]


def _count_change(*caches: Tensor | None) -> None:
    """Tell autograd that kernels wrote into these: who saved them for a backward gets an error."""
    if not torch.compiler.is_compiling():
        changed = [x for x in caches if x is not None and not x.is_inference()]
        torch.autograd.graph.increment_version(changed)


def _pair(prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if prefix is None:
        return None, None
    if not isinstance(prefix, tuple | list) or len(prefix) != 2:
        raise TypeError(f"prefix is a {type(prefix).__name__}; it must be a pair of tensors")
    return prefix[0], prefix[1]


def _lengths(cache_seqlens: int | Tensor | None, call: Sequence[Tensor | None]) -> Tensor | None:
    """cache_seqlens as a tensor; None for a full cache of one length for all."""
    q, k_cache, cu_seqlens_q, block_table = call
    assert q is not None
    assert k_cache is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if isinstance(cache_seqlens, Tensor):
        checks.int32("cache_seqlens", cache_seqlens, q, (batch,))
    if isinstance(cache_seqlens, Tensor) or (cache_seqlens is None and cu_seqlens_q is None):
        return cache_seqlens
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[-1])
    if not isinstance(cache_seqlens, int | torch.SymInt):
        kind = type(cache_seqlens).__name__
        raise TypeError(f"cache_seqlens is a {kind}; it must be an int or an int32 tensor")
    if not -(2**31) <= cache_seqlens < 2**31:  # what an int32 holds is checked with the cache
        limit = "at least 0" if cache_seqlens < 0 else "less than 2^31"
        raise ValueError(f"cache_seqlens is {cache_seqlens}; it must be {limit}")
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)


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
        lse_partial: out_partial's shape without head_dim, natural units, -inf for an empty part,
            whose out may be anything.
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
    checks.same_device("lse_partial", lse_partial, out_partial, "out_partial")
    if out_dtype is not None and out_dtype not in FLOATING:
        raise TypeError(f"out_dtype is {out_dtype}; it must be a floating torch.dtype")
    if out_partial.dim() < 2 or out_partial.shape[:-1] != lse_partial.shape:
        raise ValueError(
            f"lse_partial has shape {tuple(lse_partial.shape)}; it must be out_partial's "
            f"{tuple(out_partial.shape)} without the last dimension"
        )
    if out_partial.shape[0] == 0:
        raise ValueError("out_partial has 0 splits; it must have at least 1")
    if out is not None:
        _check_merged(out, out_partial, out_dtype)
    dtype = torch.promote_types(out_partial.dtype, torch.float32)
    # An empty union has lse -inf: its parts weigh 0, not exp(-inf + inf), in the gradients too.
    given = lse_partial.to(dtype)
    empty = (given == -math.inf).all(0)
    lse = torch.logsumexp(torch.where(empty, 0.0, given), dim=0)
    weights = torch.exp(given - lse)
    lse = torch.where(empty, -math.inf, lse)
    # Nor is the out of an empty part looked at, which nobody may have written.
    parts = torch.where((weights == 0.0).unsqueeze(-1), 0.0, out_partial.to(dtype))
    merged = (weights.unsqueeze(-1) * parts).sum(0)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    return out.copy_(merged), lse


def _check_merged(out: Tensor, out_partial: Tensor, out_dtype: torch.dtype | None) -> None:
    checks.is_tensor("out", out)
    if out.dtype not in FLOATING:
        raise TypeError(f"out has dtype {out.dtype}; it must be floating")
    checks.same_device("out", out, out_partial, "out_partial")
    checks.is_writable("out", out)
    if out.shape != out_partial.shape[1:] or (out_dtype is not None and out.dtype != out_dtype):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}; it must be "
            f"{out_dtype or out.dtype} of shape {tuple(out_partial.shape[1:])}"
        )
