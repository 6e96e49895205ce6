"""What flash_attn returns differently from flashtile: lse of empty rows, and S_dmask."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def get_block_size_n(
    device: torch.device | str, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Keys in a block of flash_attn's forward kernel on the device, the A100's on the CPU."""
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if 96 < head_dim <= 128:
        return 32 if is_dropout or (_is_sm8x(device) and not is_causal) else 64
    return 64


def _is_sm8x(device: torch.device | str) -> bool:
    """The compute capabilities 8.6 and 8.9, with less shared memory than 8.0."""
    if torch.device(device).type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return major == 8 and minor > 0


def lse_to_flash_attn(lse: Tensor) -> Tensor:
    """+inf where a row sees no key, as flash_attn's kernels write it."""
    return torch.where(lse == -math.inf, math.inf, lse)


def lse_from_flash_attn(lse: Tensor) -> Tensor:
    """The inverse of `lse_to_flash_attn`."""
    return torch.where(lse == math.inf, -math.inf, lse)


def dmask_to_flash_attn(probabilities: Tensor, head_dim: int, causal: bool) -> Tensor:
    """S_dmask with flash_attn's magnitudes from normalised ones (batch, heads, q, k).

    Its kernels walk over the key blocks from right to left and store exp(s - m) with the running
    max m of that moment. So a block's p = exp(s - lse) is divided by exp(m - lse), the largest p
    in the block and to its right. The sign bit, set where dropped, stays.
    """
    if probabilities.numel() == 0:
        return probabilities
    block = get_block_size_n(probabilities.device, head_dim, True, causal)
    p = probabilities.abs().float().unflatten(-1, (-1, block))
    top = p.amax(-1, keepdim=True).flip(-2).cummax(-2).values.flip(-2)
    unnormalised = (p / torch.where(top > 0, top, 1.0)).flatten(-2)
    return torch.copysign(unnormalised, probabilities).to(probabilities.dtype)
