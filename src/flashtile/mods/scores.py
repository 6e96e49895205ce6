"""Score mods: what is done to a tile of scores before masking, beside its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashtile.mods.functions import place
from flashtile.mods.tile import Tile


class ScoreMod(Protocol):
    """s -> mod(s), elementwise, on fp32 (or fp64) tiles in natural units."""

    def apply(self, s: Tensor, tile: Tile) -> None:
        """Change the scores in place."""

    def derivative(self, before: Tensor, s: Tensor, tile: Tile) -> Tensor | None:
        """d mod(s) / d s from the changed scores, or None where it is 1. `Function` alone is given
        the scores before."""

    def accumulate(self, ds: Tensor, tile: Tile) -> None:
        """Add the tile's share to the gradient of the mod's own operand, if it has one."""


class Softcap(NamedTuple):
    """cap * tanh(s / cap) (Gemma 2 report, 2024, section 2)."""

    cap: float

    def apply(self, s: Tensor, tile: Tile) -> None:
        s.div_(self.cap).tanh_().mul_(self.cap)

    def derivative(self, before: Tensor, s: Tensor, tile: Tile) -> Tensor | None:
        return (s / self.cap).square_().neg_().add_(1.0)

    def accumulate(self, ds: Tensor, tile: Tile) -> None:
        pass


class Alibi(NamedTuple):
    """s - slope * |q + seqlen_k - seqlen_q - k| (Press et al., ICLR 2022)."""

    slopes: Tensor  # (1 | batch, heads)

    def apply(self, s: Tensor, tile: Tile) -> None:
        diagonal = tile.q_idx(s.device)[:, None] + tile.offset
        distance = (diagonal.to(s.dtype) - tile.k_idx(s.device).to(s.dtype)).abs_()
        s.addcmul_(tile.batches_of(self.slopes)[:, :, None, None], distance, value=-1.0)

    def derivative(self, before: Tensor, s: Tensor, tile: Tile) -> Tensor | None:
        return None

    def accumulate(self, ds: Tensor, tile: Tile) -> None:
        pass


class Bias(NamedTuple):
    """s + bias, with the gradient of bias where a buffer is given for it."""

    bias: Tensor  # (1 | batch, 1 | heads, 1 | seqlen_q, seqlen_k)
    grad: Tensor | None = None  # bias's shape, fp32 or fp64

    def apply(self, s: Tensor, tile: Tile) -> None:
        s.add_(tile.part_of(self.bias))

    def derivative(self, before: Tensor, s: Tensor, tile: Tile) -> Tensor | None:
        return None

    def accumulate(self, ds: Tensor, tile: Tile) -> None:
        if self.grad is not None:
            part = tile.part_of(self.grad)
            part.add_(ds.sum_to_size(part.shape))


class Function(NamedTuple):
    """A user's function (see `mods.functions`)."""

    functions: tuple[Callable[..., Tensor], Callable[..., Tensor | float]]  # and its slope
    args: tuple[Tensor, ...]

    def apply(self, s: Tensor, tile: Tile) -> None:
        s.copy_(self.functions[0](s, place(tile, s.shape[1], s.device), self.args))

    def derivative(self, before: Tensor, s: Tensor, tile: Tile) -> Tensor | None:
        at = place(tile, s.shape[1], s.device)
        slope = self.functions[1](before, s, at, self.args)
        return torch.as_tensor(slope, dtype=s.dtype, device=s.device)

    def accumulate(self, ds: Tensor, tile: Tile) -> None:
        pass


def alibi(slopes: Tensor, heads: int, dtype: torch.dtype) -> Alibi:
    """Alibi from slopes of shape (heads,) or (batch, heads)."""
    return Alibi(slopes.reshape(-1 if heads else 1, heads).to(dtype))
