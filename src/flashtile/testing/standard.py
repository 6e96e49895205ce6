"""Standard attention, as people write it without a fused kernel: the baseline of every figure."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile.problem import scale_or_default, window_sides


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v in the inputs' dtype, with the whole score matrix in memory.

    q: (batch, seqlen_q, heads, head_dim); k, v: (batch, seqlen_k, kv_heads, head_dim), repeated
    for each query head. Causal and windows align bottom-right. Returns q's shape. Differentiable.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = q @ k.transpose(-2, -1) * scale_or_default(softmax_scale, q)
    seqlen_q, seqlen_k = s.shape[-2:]
    rows = torch.arange(seqlen_q, device=s.device)[:, None] + seqlen_k - seqlen_q
    distance = torch.arange(seqlen_k, device=s.device) - rows
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - (alibi_slopes[:, None, None] * distance.abs()).to(s.dtype)
    left, right = window_sides(window_size, causal)
    if right >= 0:
        s = s.masked_fill(distance > right, -math.inf)
    if left >= 0:
        s = s.masked_fill(distance < -left, -math.inf)
    p = s.softmax(dim=-1)
    if dropout_p > 0.0:
        p = F.dropout(p, dropout_p)
    return (p @ v).transpose(1, 2)
