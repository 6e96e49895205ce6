"""Filling a quantised KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile import checks
from flashtile.problem import E4M3, FLOATING
from flashtile.quantize import encode, scale_kind, token_scales


def quantize_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_descale: Tensor, v_descale: Tensor
) -> None:
    """Write k and v into an e4m3 cache, and into its scales what makes them fit.

    k = k_cache * k_descale up to e4m3's rounding, the largest of what shares a scale at 448. To
    append tokens to a cache that is in use, pass them to `flash_attn_with_kvcache`. No host sync.

    Args:
        k: (batch, seqlen, kv_heads, head_dim) or (pages, page_size, kv_heads, head_dim), float16,
            bfloat16, float32 or float64; finite. No gradient flows through.
        v: as k, with head_dim_v.
        k_cache, v_cache: float8_e4m3fn of the shapes of k and v.
        k_descale, v_descale: fp32, whose shape says who shares a scale: () everything, (kv_heads,)
            a KV head, (batch, kv_heads) a KV head of a batch row, or k's shape without head_dim
            nobody: a scale for each token and KV head.

    Raises:
        TypeError, ValueError: an argument that is not a tensor, or of a wrong shape, dtype or
            device. Nothing is written before.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.

    >>> k_cache, v_cache = (torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in (k, v))
    >>> k_descale, v_descale = (torch.empty(k.shape[:-1]) for _ in range(2))
    >>> quantize_kv(k, v, k_cache, v_cache, k_descale, v_descale)
    """
    pairs = (("k", k, k_cache, k_descale), ("v", v, v_cache, v_descale))
    for name, x, cache, scale in pairs:
        _check(name, x, cache, scale, k)
    if k_cache is v_cache or k_descale is v_descale:
        raise ValueError("K and V are to be written to one tensor; each has a cache and a scale")
    with torch.no_grad():
        for _, x, cache, scale in pairs:
            found = _scales(x, scale)
            scale.copy_(found)
            cache.copy_(encode(x, found[:, None] if found.dim() == 2 else found))


def _scales(x: Tensor, scale: Tensor) -> Tensor:
    """What makes x fit, of the shape of `scale`."""
    own = token_scales(x)
    kind = scale_kind(scale, x, x.shape[0])
    if kind == "tensor":
        return own.amax().view(scale.shape) if own.numel() else own.new_ones(scale.shape)
    if kind == "token" or own.numel() == 0:
        return own if kind == "token" else own.new_ones(scale.shape)
    return own.amax((0, 1) if kind == "head" else 1)


def _check(name: str, x: Tensor, cache: Tensor, scale: Tensor, k: Tensor) -> None:
    checks.is_tensor(name, x, 4)
    checks.same_device(name, x, k, "k")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be float16, bfloat16 or wider")
    for what, other, dtype in (("cache", cache, E4M3), ("descale", scale, torch.float32)):
        checks.is_tensor(f"{name}_{what}", other)
        checks.same_device(f"{name}_{what}", other, k, "k")
        if other.dtype != dtype:
            raise TypeError(f"{name}_{what} has dtype {other.dtype}; it must be {dtype}")
        checks.is_writable(f"{name}_{what}", other)
    if cache.shape != x.shape:
        raise ValueError(
            f"{name}_cache has shape {tuple(cache.shape)}; it must be {name}'s {tuple(x.shape)}"
        )
    if scale_kind(scale, x, x.shape[0]) is None:
        heads = x.shape[2]
        raise ValueError(
            f"{name}_descale has shape {tuple(scale.shape)}; it must be (), ({heads},), "
            f"({x.shape[0]}, {heads}) or {tuple(x.shape[:-1])}"
        )
