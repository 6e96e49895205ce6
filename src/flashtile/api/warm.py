"""The second call of a kind: straight from metadata to the launch.

An eager call whose shapes, strides, alignment, scalars and switches were met before needs no
checks, no plan and no operator: all that they depend on is in the key. What is left is to allocate
the results and to launch, under an autograd function if an input requires grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile import ops
from flashtile.backends import replays
from flashtile.problem import Call, latent

_HASHED = frozenset((bool, int, float, str, type(None)))


def key_of(given: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> replays.Key | None:
    """All that a call depends on, or None for a call that has to take the long way. `given` is
    what the user gave besides tensors, `tensors` are in the order of the operator's arguments."""
    if not ops.unseen(tensors):
        return None
    q, k, v, *_ = tensors
    if q is None or k is None or v is None or not (q.is_cuda or ops.classifies(q.device.type)):
        return None
    if torch.is_autocast_enabled() and not (
        q.dtype == k.dtype == v.dtype == torch.get_autocast_dtype("cuda")
    ):
        return None  # the operator casts them
    try:
        return replays.key_of((given, ops.plan, latent(k, v)), tensors)
    except RuntimeError:
        return None  # a tensor that wraps another, left behind by a transform


def again(key: replays.Key | None, tensors: Sequence[Tensor | None]) -> Any:
    """(out, lse) if the call's like was met before, else None."""
    if key is None:
        return None
    try:
        found = replays.find(key)
    except TypeError:  # a list for a tuple has no hash
        return None
    if found is None:
        return None
    run, form = found
    return ops.attend_again(run, form, [x for x in tensors if x is not None])


def remember(key: replays.Key | None, tensors: Sequence[Tensor | None], call: Call) -> None:
    """Let the key of a call that has just succeeded lead to its replay, if its operator got the
    tensors that the user gave: not copies of them, nor others besides."""
    if key is None:
        return
    form, those = ops.Form.of(call.flat())
    these = [x for x in tensors if x is not None]
    same = len(these) == len(those) and all(x is y for x, y in zip(these, those, strict=True))
    run = replays.find(replays.key_of(ops.kind_of_forward(form), those)) if same else None
    # What is not a number, such as a tensor for the scale, may have another value next time.
    if run is not None and _HASHED.issuperset(map(type, _leaves(key[0][0]))):
        replays.keep(key, (run, form))


def _leaves(x: Any) -> list[Any]:
    return [z for y in x for z in _leaves(y)] if isinstance(x, tuple) else [x]
