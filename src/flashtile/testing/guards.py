"""Memory that shows who touches it: canaries around tensors, NaN in fresh allocations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 67
"""Elements before and after a fenced tensor: odd, so that its base is misaligned as well."""


class Fenced(NamedTuple):
    """A tensor with canaries before, after and between its rows."""

    tensor: Tensor
    storage: Tensor  # flat, everything that is not the tensor is NaN (or the lowest integer)
    before: Tensor  # copy of the storage

    def assert_unchanged(self, name: str = "tensor") -> None:
        """The tensor and its canaries are bit for bit what they were."""
        if not _same_bits(self.storage, self.before):
            raise AssertionError(f"{name}, or memory around it, was written")

    def assert_canaries(self, name: str = "tensor") -> None:
        """Only the tensor itself may have changed."""
        now, then = self.storage.clone(), self.before.clone()
        for flat in (now, then):
            _view(flat, self.tensor).zero_()
        if not _same_bits(now, then):
            raise AssertionError(f"memory around {name} was written")


def fence(x: Tensor, gap: int = 3) -> Fenced:
    """A copy of x in memory of its own, `gap` canaries after each row of its last dimension."""
    row = x.shape[-1] + gap
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    canary = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).min
    storage = torch.full((2 * MARGIN + rows * row,), canary, dtype=x.dtype, device=x.device)
    strides = [*(row * math.prod(x.shape[i + 1 : -1]) for i in range(x.dim() - 1)), 1]
    inside = storage.as_strided(x.shape, strides, MARGIN)
    inside.copy_(x.detach())
    return Fenced(inside, storage, storage.clone())


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that unwritten memory shows."""
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = was[2]  # type: ignore[attr-defined]


def _view(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
