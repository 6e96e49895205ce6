"""Checks of what a call over a cache appends, of its rotary and its prefix, by metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile import checks
from flashtile.backends.cache import NewTokens
from flashtile.problem import FLOATING, UNBOUNDED, Call
from flashtile.quantize import scaled_by_token


def check_appendable(
    k_cache: Tensor, v_cache: Tensor, k_descale: Tensor | None, v_descale: Tensor | None
) -> None:
    """A cache of other strides would be copied, and the copy appended to; rows, or scales of
    tokens, that are one in memory would overwrite each other."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {cache.stride()}; to be appended to, its last must be 1"
            )
        checks.is_writable(name, cache)
    for name, scale in (("k_descale", k_descale), ("v_descale", v_descale)):
        if isinstance(scale, Tensor) and scaled_by_token(scale, k_cache, k_cache.shape[0]):
            checks.is_writable(name, scale)
            if k_descale is v_descale:
                raise ValueError("k_descale and v_descale are one tensor; tokens have two scales")


def check_new_tokens(call: Call, new: NewTokens, cache_seqlens: int | Tensor | None) -> None:
    """Raise ValueError or TypeError for tokens that cannot be appended to the call's cache."""
    if new.prefix_k is not None or new.prefix_v is not None:
        _check_prefix(call, new)
    if new.k is None and new.v is None:
        if isinstance(cache_seqlens, int) and not 0 <= cache_seqlens <= call.seqlen_k:
            raise ValueError(f"cache_seqlens is {cache_seqlens}; the cache holds {call.seqlen_k}")
        for name in ("rotary_cos", "rotary_sin", "rotary_seqlens", "cu_seqlens"):
            if getattr(new, name) is not None:
                shown, kind = (
                    (name, "rotary") if name != "cu_seqlens" else ("cu_seqlens_k_new", "it")
                )
                raise ValueError(f"{shown} is given and k is None; {kind} goes with new tokens")
        return
    _check_append(call, new, cache_seqlens)
    _check_rotary(call, new)
    _refuse_gradients(call, new, "appending to a cache")


def _check_append(call: Call, new: NewTokens, cache_seqlens: int | Tensor | None) -> None:
    """New tokens fit the cache, as far as the host knows."""
    q, k_cache, v_cache = call.operands[:3]
    checks.int32("cu_seqlens_k_new", new.cu_seqlens, q, (call.batch + 1,))
    for name, x, cache in (("k", new.k, k_cache), ("v", new.v, v_cache)):
        if x is None:
            raise ValueError(f"{name} is None; k and v are given together")
        checks.is_tensor(name, x, 4 if new.cu_seqlens is None else 3)
        checks.same_device(name, x, q)
        dtype = q.dtype if call.quantized else cache.dtype
        if x.dtype != dtype:
            whose = "q" if call.quantized else "the cache"
            raise TypeError(f"{name} has dtype {x.dtype}; {whose} has {dtype}")
        tokens = 0 if new.k is None else new.k.shape[-3]
        rows = (call.batch, tokens) if new.cu_seqlens is None else (tokens,)
        wanted = (*rows, *cache.shape[2:])
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {wanted}")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens is None; appending needs to know where to write")
    assert new.k is not None
    count = new.k.shape[1] if new.cu_seqlens is None else 0
    if not isinstance(cache_seqlens, Tensor) and not 0 <= cache_seqlens <= call.seqlen_k - count:
        raise ValueError(
            f"cache_seqlens is {cache_seqlens} with {count} new tokens; "
            f"the cache holds {call.seqlen_k}"
        )


def _refuse_gradients(call: Call, new: NewTokens, what: str) -> None:
    tensors = (*call.operands, *new[:-1])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"an input requires grad; {what} has no backward")


def _check_rotary(call: Call, new: NewTokens) -> None:
    cos, sin = new.rotary_cos, new.rotary_sin
    if cos is None and sin is None:
        if new.rotary_seqlens is not None:
            raise ValueError("rotary_seqlens is given and rotary_cos is None")
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
    assert cos is not None
    assert sin is not None
    if cos.shape != sin.shape:
        raise ValueError(f"rotary_sin has shape {tuple(sin.shape)}; cos has {tuple(cos.shape)}")
    if cos.shape[0] == 0:
        raise ValueError("rotary_cos has 0 positions; it must have at least 1")
    checks.int32("rotary_seqlens", new.rotary_seqlens, q, (call.batch,))


def _check_prefix(call: Call, new: NewTokens) -> None:
    q, k_cache, v_cache = call.operands[:3]
    for name, x, cache in (("K", new.prefix_k, k_cache), ("V", new.prefix_v, v_cache)):
        checks.is_tensor(f"prefix {name}", x, 3)
        assert x is not None
        checks.same_device(f"prefix {name}", x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"prefix {name} has dtype {x.dtype}; q has {q.dtype}")
        if x.shape[1:] != cache.shape[2:]:
            raise ValueError(
                f"prefix {name} has shape {tuple(x.shape)}; it must be (any, "
                f"{', '.join(map(str, cache.shape[2:]))})"
            )
    assert new.prefix_k is not None
    assert new.prefix_v is not None
    if new.prefix_k.shape[0] != new.prefix_v.shape[0]:
        raise ValueError(
            f"prefix V has {new.prefix_v.shape[0]} tokens; K has {new.prefix_k.shape[0]}"
        )
    if call.variant.window_left != UNBOUNDED:
        raise ValueError(
            f"window_size left is {call.variant.window_left} and prefix is given; "
            "a prefix is seen whole"
        )
    if call.variant.attention_chunk > 0:
        raise ValueError(
            f"attention_chunk is {call.variant.attention_chunk} and prefix is given; "
            "a prefix is seen whole"
        )
    if call.operands.alibi_slopes is not None:
        raise ValueError("alibi_slopes and prefix are given; a prefix has no positions")
    _refuse_gradients(call, new, "a prefix")
