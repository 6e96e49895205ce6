"""Tensors in memory as callers have them: transposed, packed, strided, misaligned."""

from __future__ import annotations

import math

from torch import Tensor

LAYOUTS = (
    "contiguous", "heads_first", "packed", "every_other_head", "offset", "strided", "one_head",
)  # fmt: skip


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides, and NaN in the memory between its elements."""
    *outer, tokens, heads, dim = x.shape

    def empty(*shape: int) -> Tensor:
        return x.new_full(shape, math.nan)

    if layout == "one_head":
        return x[..., :1, :].expand(x.shape)
    storages = {
        "contiguous": lambda: empty(*x.shape),
        "heads_first": lambda: empty(*outer, heads, tokens, dim).transpose(-2, -3),
        "packed": lambda: empty(*outer, tokens, 3, heads, dim)[..., 1, :, :],
        "every_other_head": lambda: empty(*outer, tokens, 2 * heads, dim)[..., 1::2, :],
        "offset": lambda: empty(x.numel() + 9)[3 : 3 + x.numel()].view(x.shape),
        "strided": lambda: empty(*x.shape, 2)[..., 1],
    }
    return storages[layout]().copy_(x)
