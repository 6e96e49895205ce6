"""Rotary position embedding (Su et al., "RoFormer", 2021, section 3.2), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first rotary_dim of head_dim by the angles of each token's position.

    x: (batch, seqlen, heads, head_dim), floating; cos, sin: (seqlen_ro, rotary_dim / 2);
    positions: (batch, seqlen) or (1, seqlen), int64, below seqlen_ro. Pairs are dims (0, 1),
    (2, 3), ... if interleaved, else (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ... as GPT-NeoX.
    Computed in fp32 (fp64 for fp64 inputs), returned in x's dtype. Differentiable.
    """
    rotary_dim = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    c = cos[positions].to(dtype).unsqueeze(2)  # (batch, seqlen, 1, rotary_dim / 2)
    s = sin[positions].to(dtype).unsqueeze(2)
    turning, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    if interleaved:
        x1, x2 = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1).flatten(-2)
    else:
        x1, x2 = turning.chunk(2, dim=-1)
        turned = torch.cat((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def query_positions(start: Tensor, seqlen_q: int, advance: bool) -> Tensor:
    """(batch, seqlen_q) rotary positions of queries that follow `start` (batch,) cached tokens.

    Without a causal mask or window all queries stand at the first new position, as in
    FlashAttention-2: they see the same keys, so they are alternatives, not successors.
    """
    steps = torch.arange(seqlen_q, device=start.device)
    return start.long()[:, None] + (steps if advance else torch.zeros_like(steps))
