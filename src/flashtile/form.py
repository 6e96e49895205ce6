"""What the operators' calls have besides tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flashtile.problem import Operands, Sequences

DIFFERENTIABLE = ("q", "k", "v", "bias", "learnable_sink")
POSITIONS = tuple(Operands._fields.index(name) for name in DIFFERENTIABLE)
TENSORS = len(Operands._fields) + sum("max_" not in name for name in Sequences._fields)
"""Arguments of `flashtile::forward` that may be tensors, the first ones."""


class Form(NamedTuple):
    """A call without its tensors."""

    places: tuple[int, ...]  # of its tensors among the operator's arguments
    wanted: tuple[int, ...]  # where q, k, v, bias and learnable_sink stand among them, or -1
    scalars: tuple[Any, ...]

    @staticmethod
    def of(flat: Sequence[Any]) -> tuple[Form, list[Tensor]]:
        """A call's form and its tensors."""
        places = tuple(i for i in range(TENSORS) if flat[i] is not None)
        wanted = tuple(places.index(i) if i in places else -1 for i in POSITIONS)
        return Form(places, wanted, tuple(flat[TENSORS:])), [flat[i] for i in places]

    def flat(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The operator's arguments."""
        flat: list[Any] = [None] * TENSORS
        for i, x in zip(self.places, tensors, strict=True):
            flat[i] = x
        return [*flat, *self.scalars]
