"""`flash_attn.layers.rotary`: rotary position embedding, differentiable, in place if asked.

An in-place call writes into x and returns x. Where a gradient is needed it returns the rotated
values as a tensor of their own instead, and writes the same values into x: autograd allows no
in-place change of a leaf, FlashAttention does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtile import checks
from flashtile.rotary import rotate


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first rotary_dim of each head by its token's position.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens (batch + 1,);
    cos, sin: (seqlen_ro, rotary_dim / 2). A token stands at its place in its sequence plus
    seqlen_offsets, an int or (batch,). Pairs are dims (0, 1), (2, 3), ... if interleaved, else
    (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ... Returns x's shape and dtype.
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    if isinstance(seqlen_offsets, Tensor) or cu_seqlens is not None:
        # These positions are known on the device only. As in FlashAttention, a token past the end
        # of the tables is left as it is.
        cos, sin = F.pad(cos, (0, 0, 0, 1), value=1.0), F.pad(sin, (0, 0, 0, 1))
        positions = positions.clamp(max=cos.shape[0] - 1)
    rows = x if cu_seqlens is None else x[None]
    rotated = rotate(rows, cos, sin, positions, interleaved).view(x.shape)
    if not inplace:
        return rotated
    if cu_seqlens is not None:  # rows of no sequence stay as they are
        tokens = torch.arange(x.shape[0], device=x.device)
        rotated = torch.where((tokens < cu_seqlens[-1])[:, None, None], rotated, x)
    _write(x, rotated)
    return rotated if rotated.requires_grad else x


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The plain formula in x's own dtype.

    x: (batch, seqlen, heads, head_dim); cos, sin: ([batch,] seqlen, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    c, s = (
        (t.repeat_interleave(2, dim=-1) if interleaved else torch.cat((t, t), dim=-1)).unsqueeze(-2)
        for t in (cos, sin)
    )
    return torch.cat((turning * c + rotate_half(turning, interleaved) * s, rest), dim=-1)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair of dims turned by 90 degrees: (x1, x2) to (-x2, x1)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed qkv in place.

    qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q, (batch, seqlen,
    num_heads_q + 2 * kv_heads, head_dim). cos_k and sin_k are k's tables where they differ.
    """
    if qkv.dim() == 5:
        checks.packed("qkv", qkv, 5, 3)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    elif num_heads_q is not None:
        if num_heads_q > qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2:
            raise ValueError(
                f"num_heads_q is {num_heads_q}; qkv has {qkv.shape[2]} heads, of which an even "
                "number must be left for k and v"
            )
        end = num_heads_q + (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end], qkv[:, :, end:]
    else:
        raise ValueError(f"num_heads_q is None; a qkv of {qkv.dim()} dimensions needs it")
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    turned_q = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    turned_k = apply_rotary_emb(k, cos_k, sin_k, interleaved, seqlen_offsets=seqlen_offsets)
    result = qkv
    if turned_q.requires_grad:
        join = torch.stack if qkv.dim() == 5 else torch.cat
        result = join((turned_q, turned_k, v), dim=2)
    _write(q, turned_q)
    _write(k, turned_k)
    return result


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate k of a packed kv (batch, seqlen, 2, kv_heads, head_dim) in place."""
    checks.packed("kv", kv, 5, 2)
    k, v = kv[:, :, 0], kv[:, :, 1]
    turned = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    result = torch.stack((turned, v), dim=2) if turned.requires_grad else kv
    _write(k, turned)
    return result


class RotaryEmbedding(nn.Module):
    """The rotary embedding of RoFormer (https://arxiv.org/abs/2104.09864) with its tables.

    dim is rotary_dim. With scale_base the embedding is XPos (https://arxiv.org/abs/2212.10554):
    q grows and k shrinks with position, by powers of a scale of each dim.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device).float() + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place: qkv as in `apply_rotary_emb_qkv_`, or q and kv apart.

        The tables reach max_seqlen, or seqlen + seqlen_offset where that is an int.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen is None; a tensor seqlen_offset needs it, once")
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, self._cos_k_cached, self._sin_k_cached, self.interleaved,
                seqlen_offset, num_heads_q,
            )  # fmt: skip
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        if self._cos_k_cached is not None and self._sin_k_cached is not None:
            cos, sin = self._cos_k_cached, self._sin_k_cached
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponents

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables reach seqlen positions, on the device, in the dtype.

        Angles are fp32 even where the module was cast: bf16 has no digits left for them.
        """
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
        ):
            return
        self._seq_len_cached = seqlen
        exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq.to(device) if exact else self._compute_inv_freq(device)
        angles = torch.arange(seqlen, device=device).float()[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (torch.arange(seqlen, device=device) - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    rotary_dim = 2 * cos.shape[-1]
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}; it must be cos's {tuple(cos.shape)}")
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"{rotary_dim=} of cos must not exceed x's head_dim {x.shape[-1]}")
    if cu_seqlens is None:
        batch, longest = x.shape[0], x.shape[1]
    elif max_seqlen is None:
        raise ValueError("max_seqlen is None; cu_seqlens needs it")
    else:
        batch, longest = cu_seqlens.shape[0] - 1, max_seqlen
    if isinstance(offsets, Tensor):
        if offsets.shape != (batch,):
            raise ValueError(f"seqlen_offsets.shape={tuple(offsets.shape)} must be ({batch=},)")
    elif offsets + longest > cos.shape[0]:
        raise ValueError(f"cos has {cos.shape[0]} positions, seqlen_offsets={offsets} + {longest}")


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The position of each token: int64, (1 | batch, seqlen) or (1, total)."""
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)[None]
        return steps + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    tokens = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    steps = tokens.long() - cu_seqlens[sequence]
    return (steps + (offsets[sequence] if isinstance(offsets, Tensor) else offsets))[None]


def _write(x: Tensor, rotated: Tensor) -> None:
    """Give x the values of `rotated`, behind autograd's back but counted as a change."""
    x.detach().copy_(rotated.detach())
