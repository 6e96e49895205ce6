"""Score and mask functions of the user's own, which run inside the kernels.

A function is written in Triton, elementwise, and reads its operands at run time. Kernels get the
function itself; PyTorch's operators take only numbers and tensors, so it travels through them as a
handle, which means something in this process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.mods.tile import Tile
from flashtile.problem import At, Call, Length, Operands

MOST_TENSORS = 4
"""What a score_mod and a mask_mod may read together."""


def place(tile: Tile, heads: int, device: torch.device) -> At:
    """Where scores (batches, heads, rows, cols) of a tile stand."""
    batch = torch.arange(tile.batch, tile.batch + tile.batches, device=device)
    return At(
        batch[:, None, None, None], torch.arange(heads, device=device)[:, None, None],
        tile.q_idx(device)[:, None], tile.k_idx(device), Length(tile.seqlen_q),
        Length(tile.seqlen_k),
    )  # fmt: skip


class _Copied:
    """Deep copies and pickles are made anew of what they were made of: functions stay the same
    objects, and the handle is that of the process that reads the pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = (getattr(self, x.name) for x in fields(self) if x.init)  # type: ignore[arg-type]
        return type(self), tuple(made_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made_of: Any = self
        return replace(made_of, args=deepcopy(made_of.args, memo))


@dataclass(frozen=True)
class ScoreFunction(_Copied):
    """A score mod: scores become fn(score), elementwise, after softcap, ALiBi and bias.

    Args:
        fn: a @triton.jit function (s, at, args) -> fp32 scores, in natural units. `at` has batch,
            head, q_idx and k_idx (counted in the sequence) and q.length and k.length; they and s
            broadcast to each other, and no other shape is there to rely on.
        slope: a @triton.jit function (before, after, at, args) -> d after / d before.
        args: tensors, for the functions to `tl.load` from, at most 4 with those of a mask_mod.
            They have no gradient.
        eager: (fn, slope) in PyTorch, with the same arguments: what the torch backend and
            `flashtile.reference` compute with. Operators alone (`s * at.q_idx`) are both.

    >>> @triton.jit
    ... def warmer(s, at, args):
    ...     return s * tl.load(args[0] + at.head)
    >>> @triton.jit
    ... def warmer_slope(before, after, at, args):
    ...     return tl.load(args[0] + at.head)
    >>> score_mod = ScoreFunction(warmer, warmer_slope, (temperatures,))
    """

    fn: Any
    slope: Any
    args: tuple[Tensor, ...] = ()
    eager: tuple[Callable[..., Tensor], Callable[..., Tensor | float]] | None = None
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", _handle(self, (self.fn, self.slope, self.eager)))


@dataclass(frozen=True)
class MaskFunction(_Copied):
    """A mask: a query sees the keys for which fn is true, of those that other masks leave.

    Args:
        fn: a @triton.jit function (at, args) -> bool, elementwise; at and args as `ScoreFunction`.
        args: as `ScoreFunction`.
        keys: a @triton.jit function (first, last, q, k, args) -> `flashtile.kernels.masks.Range` of
            the keys that the queries first..last may see, and of those that all of them surely do;
            q and k have `length` and `batch`. Blocks outside are skipped; default: none are.
        queries: its transpose, for the gradients of keys: the queries that see keys first..last.
        eager: fn in PyTorch, with the same arguments.
    """

    fn: Any
    args: tuple[Tensor, ...] = ()
    keys: Any = None
    queries: Any = None
    eager: Callable[..., Tensor] | None = None
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        functions = (self.fn, self.keys, self.queries, self.eager)
        object.__setattr__(self, "handle", _handle(self, functions))


class _Known(NamedTuple):
    function: ScoreFunction | MaskFunction  # without its args, which nothing here keeps alive
    tensors: int  # that it reads


_known: list[_Known] = []
_handles: dict[tuple[Any, ...], int] = {}


def _handle(function: ScoreFunction | MaskFunction, parts: tuple[Any, ...]) -> int:
    """The number of a combination of functions, the same whenever it comes again."""
    key = (type(function).__name__, len(function.args), *map(id, leaves(parts)))
    if key not in _handles:
        bare = object.__new__(type(function))
        vars(bare).update(vars(function), args=())
        _known.append(_Known(bare, len(function.args)))
        _handles[key] = len(_known)
    return _handles[key]


def leaves(x: Any) -> list[Any]:
    """What nested tuples hold, in order."""
    return [z for y in x for z in leaves(y)] if isinstance(x, tuple) else [x]


def mod_operands(
    score_mod: ScoreFunction | None, mask_mod: MaskFunction | None, q: Tensor
) -> dict[str, Tensor]:
    """What a call's functions read, by the names of `Operands`; raises for what it cannot take."""
    found: list[Tensor] = []
    given: tuple[tuple[str, Any, Any], ...] = (
        ("score_mod", score_mod, ScoreFunction), ("mask_mod", mask_mod, MaskFunction),
    )  # fmt: skip
    for name, function, kind in given:
        if function is None:
            continue
        if not isinstance(function, kind):
            raise TypeError(
                f"{name} is a {type(function).__name__}; it must be a flashtile.{kind.__name__}"
            )
        for i, x in enumerate(function.args):
            _check_arg(f"{name}.args[{i}]", x, q)
        found += function.args
    if len(found) > MOST_TENSORS:
        raise ValueError(
            f"score_mod and mask_mod have {len(found)} args; they may have {MOST_TENSORS} together"
        )
    return {f"mod_{i}": x for i, x in enumerate(found)}


def _check_arg(name: str, x: Any, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; q is on {q.device}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad; what a function reads has none (a bias has)")


def score_function(call: Call) -> ScoreFunction | None:
    """The score_mod of a call, with its args."""
    return _open(call, call.variant.score_mod, 0)


def mask_function(call: Call) -> MaskFunction | None:
    """The mask_mod of a call, with its args, which follow the score_mod's."""
    before = call.variant.score_mod
    return _open(call, call.variant.mask_mod, _find(before).tensors if before else 0)


def eager_of(name: str, function: ScoreFunction | MaskFunction) -> Any:
    """A function's counterpart in PyTorch."""
    if function.eager is None:
        raise ValueError(
            f"{name}.eager is None; PyTorch's operators compute this call (`explain` says why), "
            "and cannot run a Triton function"
        )
    return function.eager


def _open(call: Call, handle: int, first: int) -> Any:
    if handle == 0:
        return None
    function, count = _find(handle)
    held: Any = call.operands[Operands._fields.index("mod_0") :][first : first + count]
    return replace(function, args=held)


def _find(handle: int) -> _Known:
    if not 0 < handle <= len(_known):
        raise LookupError(f"score_mod or mask_mod has handle {handle}, of another process")
    return _known[handle - 1]
