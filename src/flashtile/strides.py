"""Which tensors Hopper's TMA can address where they lie, and how."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from torch import Tensor

MOST = 0x7FFF0000
"""More than any number of rows."""

ALIGNED = 8
"""16-bit elements of 16 bytes, what strides are multiples of."""


def maps(x: Tensor) -> bool:
    """Whether TMA can address a tensor: rows in a piece, 16-byte aligned, and so are its strides,
    none of them 0."""
    steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def has_gaps(x: Tensor) -> bool:
    """Whether the tokens of all sequences of a batch are more than one step apart somewhere."""
    return x.dim() == 4 and min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1)


class Steps(NamedTuple):
    """From one sequence or page of a (batch, token, head, dim) tensor to the next, and from one
    head to the next, counted in the largest unit that both are whole numbers of."""

    batch: int
    head: int

    @staticmethod
    def of(x: Tensor) -> Steps:
        batch, _, head, _ = x.stride()
        if min(x.shape[0], x.shape[2]) <= 1:
            return Steps(int(x.shape[0] > 1), int(x.shape[2] > 1))
        unit = gcd(batch, head)
        return Steps(batch // unit, head // unit)

    def unit(self, x: Tensor) -> int:
        """In elements."""
        if self.batch:
            return x.stride(0) // self.batch
        return x.stride(2) // self.head if self.head else ALIGNED

    def count(self, x: Tensor) -> int:
        """Units of all heads of all sequences."""
        return (x.shape[0] - 1) * self.batch + (x.shape[2] - 1) * self.head + 1


def alike(k: Tensor, v: Tensor) -> bool:
    """Whether TMA can address rows of a cache, or pages, where they lie: those of k and v by the
    same steps, in 32 bits."""
    if not (maps(k) and maps(v)):
        return False
    steps = Steps.of(k)
    return steps == Steps.of(v) and max(steps.count(k), steps.count(v)) <= MOST
