"""Keys and values in e4m3: what is stored times its scale, and how a scale and its numbers come.

A scale belongs to the whole tensor, to each KV head, to each KV head of a batch row
(FlashAttention-3's), or to each token and KV head of a cache; its shape says which. An append to a
cache whose scales are the tokens' writes them beside the tokens; other scales are given.
"""

from __future__ import annotations

from torch import Tensor

from flashtile.problem import E4M3

MOST = 448.0
"""The largest e4m3 number. Larger ones are stored as it: e4m3 has no infinity."""

LEAST_SCALE = 1e-30
"""The scale of zeros: its reciprocal is finite."""


def scale_kind(scale: Tensor, k: Tensor, batch: int) -> str | None:
    """Whose scales these are of a k (or v) with shape (..., kv_heads, head_dim), or None.

    "tensor": () or (1,); "head": (kv_heads,); "row": (batch, kv_heads); "token": k's shape without
    head_dim, of a cache, which has four dimensions.
    """
    kv_heads, shape = k.shape[-2], tuple(scale.shape)
    if shape in ((), (1,)):
        return "tensor"
    if shape == (kv_heads,):
        return "head"
    if k.dim() == 4 and shape == tuple(k.shape[:-1]):
        return "token"
    return "row" if shape == (batch, kv_heads) else None


def scaled_by_token(scale: Tensor | None, k: Tensor, batch: int) -> bool:
    """Whether each token has a scale of its own: one that it shares is read once a tile."""
    return scale is not None and scale_kind(scale, k, batch) == "token"


def scale_strides(scale: Tensor, k: Tensor, batch: int) -> tuple[int, int, int, int]:
    """Strides of a scale by batch row, by k's first dimension, by slot in it, and by KV head."""
    kind, strides = scale_kind(scale, k, batch), scale.stride()
    if kind == "head":
        return 0, 0, 0, strides[0]
    if kind == "row":
        return strides[0], 0, 0, strides[1]
    return (0, *strides) if kind == "token" else (0, 0, 0, 0)  # type: ignore[return-value]


def token_scales(x: Tensor) -> Tensor:
    """The scale of each token and head of x (..., kv_heads, head_dim): its largest is MOST."""
    return (x.float().abs().amax(-1) * (1.0 / MOST)).clamp_min(LEAST_SCALE)


def encode(x: Tensor, scale: Tensor | None) -> Tensor:
    """x (..., kv_heads, head_dim) in e4m3, for a scale that broadcasts to x without head_dim."""
    x = x.float()
    if scale is not None:
        x = x * scale.float().reciprocal().unsqueeze(-1)
    return x.clamp(-MOST, MOST).to(E4M3)
