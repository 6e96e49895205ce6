"""Canaries around what a backend allocates: results, gradients, workspaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashtile.testing.cases import Problem
from flashtile.testing.guards import MARGIN, Fenced, fence
from flashtile.testing.run import Results, assert_matches_reference

_ALLOCATING = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "zeros"),
    (torch.Tensor, "new_empty"),
)


@contextmanager
def fenced_allocations() -> Iterator[None]:
    """Surround what torch.empty and its kin return with canaries, and check them on leaving.

    Uninitialised memory is NaN (or the lowest integer) too, so that unwritten parts show. Only
    calls from Python are seen.
    """
    fences: list[Fenced] = []
    with ExitStack() as patches:
        for owner, name in _ALLOCATING:
            fenced = _fenced(getattr(owner, name), name == "zeros", fences)
            patches.enter_context(patch.object(owner, name, fenced))
        yield
    for at, guard in enumerate(fences):
        guard.assert_canaries(f"allocation {at}, of shape {tuple(guard.tensor.shape)},")


def _fenced(
    allocate: Callable[..., Tensor], zero: bool, fences: list[Fenced]
) -> Callable[..., Tensor]:
    def allocate_fenced(*args: Any, **kwargs: Any) -> Tensor:
        plain = allocate(*args, **kwargs)
        if plain.numel() == 0 or not plain.is_contiguous():
            return plain
        canary = math.nan if plain.is_floating_point() else _lowest(plain.dtype)
        storage = plain.new_full((plain.numel() + 2 * MARGIN,), canary)
        # Not a view: autograd treats views of a result otherwise than results.
        inside = plain.set_(storage.untyped_storage(), MARGIN, plain.shape, plain.stride())
        if zero:
            inside.zero_()
        fences.append(Fenced(inside, storage, storage.clone()))
        return inside

    return allocate_fenced


def _lowest(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def assert_touches_nothing_else(problem: Problem, what: str = "") -> Results:
    """`assert_matches_reference` with canaries around and between the rows of every input, which
    stay as they are, and around every allocation."""
    guards: dict[str, Fenced] = {}

    def guarded(tensors: dict[str, Any]) -> dict[str, Any]:
        fences = {n: fence(x) for n, x in tensors.items()
                  if isinstance(x, Tensor) and x.dtype != torch.bool}  # fmt: skip
        guards.update(fences)
        return {n: fences[n].tensor if n in fences else x for n, x in tensors.items()}

    fenced = Problem(guarded(problem.tensors), guarded(problem.keywords), problem.varlen)
    with fenced_allocations():
        results = assert_matches_reference(fenced, what)
    for name, guard in guards.items():
        guard.assert_unchanged(name)
    return results
