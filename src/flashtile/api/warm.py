"""The second call of a kind: straight from metadata to the launch.

An eager call whose shapes, strides, alignment, scalars and switches were met before needs no
checks, no plan and no operator: they depend on nothing else. What is left is to allocate the
results and to launch, under an autograd function if an input requires grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile import guards, ops
from flashtile.backends import replays
from flashtile.backends.cache import NewTokens
from flashtile.form import Form
from flashtile.mods.functions import leaves
from flashtile.observers import unseen
from flashtile.problem import Call, latent

ALIKE = 4
"""Calls that are kept of the same scalars and shapes: of other strides, devices or modes."""

_HASHED = frozenset((bool, int, float, str, type(None)))

_guards = guards.TensorGuards


_kept: dict[Any, tuple[Callable[..., Any], ...]] = {}
_latest: dict[tuple[Any, ...], Callable[..., Any]] = {}  # of what was given besides tensors


def again(given: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Any:
    """The call's results if its like was met before, else None. `given` is what the user gave
    besides tensors, after a name of the function; `tensors` are in the order of the operator's
    arguments."""
    if torch.compiler.is_dynamo_compiling():  # other tracers bring tensors or modes of their own
        return None
    try:
        latest = _latest.get(given)
    except TypeError:  # a list for a tuple, which has no hash
        return None
    if latest is None:
        return None
    found = latest(*tensors)
    return _among_others(given, tensors) if found is None else found


def _among_others(given: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Any:
    """The results of a call unlike the latest one that was given the same."""
    try:
        alike = _kept.get(_key(given, tensors), ())
    except (AttributeError, TypeError):  # no tensor
        return None
    for known in alike:
        if (found := known(*tensors)) is not None:
            _latest[given] = known
            return found
    return None


def remember(
    given: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    call: Call,
    return_lse: bool,
    new: NewTokens | None = None,
) -> None:
    """Let calls like one that has just succeeded lead to its replay, if nobody was there to see it
    and if its operator got the tensors that the user gave: not copies of them, nor others. new: of
    a call whose operator is `with_kvcache`."""
    q, k, v = call.operands[:3]
    if not (ops.classifies(q.device.type) and _guards and unseen(tensors)) or _cast(q, k, v):
        return
    form, those = Form.of(call.flat())
    kind = ops.kind_of_forward(form)
    if new is not None:
        kind, those = ops.kind_of_cache(form, new), [*those, *new.tensors()]
    these = [x for x in tensors if x is not None]
    same = len(these) == len(those) and all(x is y for x, y in zip(these, those, strict=True))
    # What is not a number, such as a tensor for the scale, may have another value next time.
    if not same or not _HASHED.issuperset(map(type, leaves(given))):
        return
    run = replays.find(replays.key_of(kind, those))
    if run is None:
        return
    if len(_kept) >= replays.CAPACITY:
        _kept.clear()
        _latest.clear()
    key, known = _key(given, tensors), _written(tensors, run, form, return_lse)
    _kept[key] = (known, *_kept.get(key, ()))[:ALIKE]
    _latest[given] = known


def _written(
    tensors: Sequence[Any], run: Callable[..., Any], form: Form, return_lse: bool
) -> Callable[..., Any]:
    """A function for calls like one of these tensors: their results, or None for any other."""
    q, k, v, *_ = tensors
    tests = ["ops.plan is plan"]
    if _autocast(q) is not None:
        tests.append(f"autocast({q.device.type!r}) is {_autocast(q)}")
    if v.shape[-1] < k.shape[-1]:
        tests.append(f"latent(t1, t2) is {latent(k, v)}")
    recording = ops.recording([x for x in tensors if x is not None])

    def result(these: str, addresses: str) -> str:
        if recording is not None:
            return f"record(run, left, ({addresses}, ), {bool(return_lse)}, {these})"
        return f"run({these}, {addresses})" + ("" if return_lse else "[0]")

    names = {
        "ops": ops, "plan": ops.plan, "torch": torch, "autocast": torch.get_autocast_dtype,
        "latent": latent, "run": run, "record": recording, "left": ops.Recorded(form, kept=True),
    }  # fmt: skip
    return guards.written(tensors, result, tests, names)


def _key(given: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Part of what a call depends on: enough to find the few like it."""
    q, k = tensors[0], tensors[1]
    return given, q.shape, k.shape, q.dtype, *map(type, tensors)


def _autocast(q: Tensor) -> torch.dtype | None:
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _cast(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the operator casts them, under autocast."""
    return _autocast(q) is not None and not q.dtype == k.dtype == v.dtype == _autocast(q)
