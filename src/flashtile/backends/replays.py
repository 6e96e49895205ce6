"""Launches that have been made before: from metadata to the compiled kernel.

Views, variants and Triton's binding of arguments take most of the host time of a launch (75 of 80
us), and depend on nothing but shapes, strides, alignment and scalars. A launch whose metadata was
met before only puts the new tensors in the places that the old ones had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from flashtile import config
from flashtile.backends.launch import Launch, run, warm
from flashtile.problem import Call

CAPACITY = 4096
"""Launches that are kept; 0 keeps none."""

Tensors = Sequence[Tensor | None]
_replays: dict[tuple[Any, ...], Callable[[Tensors], None] | None] = {}


def launch(
    name: str, call: Call, more: tuple[Tensor | None, ...], build: Callable[[], Launch]
) -> None:
    """Launch what `build` builds from a call's tensors and `more`, or built for their like."""
    tensors = (*call.operands, *call.sequences[:7], *more)
    key = (
        name, call.sequences[7:], call.variant, config.allow_tf32,
        *(None if x is None else _signature(x) for x in tensors),
    )  # fmt: skip
    again = _replays.get(key)
    if again is not None:
        again(tensors)
        return
    found = build()
    run(found)
    if key not in _replays and CAPACITY and found.grid > 0:
        if len(_replays) >= CAPACITY:
            _replays.clear()
        _replays[key] = _replay(found, tensors)


def _signature(x: Tensor) -> tuple[Any, ...]:
    """What Triton specialises a kernel on, and more."""
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


def _replay(found: Launch, tensors: Tensors) -> Callable[[Tensors], None] | None:
    """How to launch it with other tensors; None where it holds others than those given, or where
    one tensor stands in two places, which the next call need not repeat."""
    try:
        fill = _slots(found.arguments, tensors)
    except LookupError:
        return None
    start = warm(found)
    return None if fill is None else lambda others: start(*fill(others))


def _slots(x: Any, tensors: Tensors) -> Callable[[Tensors], Any] | None:
    """A function that makes x with other tensors in its places, or None if it has none."""
    if isinstance(x, Tensor):
        places = [i for i, tensor in enumerate(tensors) if tensor is x]
        if len(places) != 1:
            raise LookupError
        return itemgetter(places[0])
    if not isinstance(x, tuple):
        return None
    slots = [(i, slot) for i, slot in ((i, _slots(y, tensors)) for i, y in enumerate(x)) if slot]
    if not slots:
        return None
    filled = {i for i, _ in slots}
    blank = [None if i in filled else y for i, y in enumerate(x)]
    make = getattr(type(x), "_make", tuple)

    def fill(others: Tensors) -> Any:
        values: list[Any] = blank.copy()
        for i, slot in slots:
            values[i] = slot(others)
        return make(values)

    return fill
