"""Calls that have been made before: from metadata straight to allocations and launches.

Plan, views, variants and Triton's binding of arguments are most of the host time of a call (200 of
240 us), and depend on nothing but shapes, strides, alignment, scalars and switches. The first call
of a kind is taped: what it makes, what it launches, and where its tensors stand in that. Later
calls run the tape with their own tensors, as a function written for it:

    def replay(t0, t1, t2, p0, p1, p2):
        t3 = c0()
        listened = ...
        stream = current(0)
        p3 = t3.data_ptr()
        if listened or (result := c1(*c2(c3, p0, p1, p2, p3, stream))) and c4(result):
            (c5 if listened else c6)(c7, 1, 1, stream, ..., (p0, c8, c9), ...)
        return (t3, )

Values of tensors are never looked at, so none can be kept by mistake.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from flashtile import config

CAPACITY = 4096
"""Calls that are kept; 0 keeps none."""

APART = 512
"""Bytes that parts of a workspace start at multiples of, as allocations do."""

Key = tuple[Any, ...]
_replays: dict[Key, Any] = {}
_thread = threading.local()


def key_of(kind: Hashable, tensors: Iterable[Tensor | None]) -> Key:
    """All that what is made and launched depends on, and what Triton specialises a kernel on."""
    return (
        kind, *switches(),
        *[
            None if x is None else
            (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)
            for x in tensors
        ],
    )  # fmt: skip


def switches() -> tuple[bool, ...]:
    """Those of the process that change what is made or launched."""
    return config.allow_tf32, torch.are_deterministic_algorithms_enabled()


def find(key: Key) -> Any:
    return _replays.get(key)


def keep(key: Key, found: Any) -> None:
    """Keep what a key leads to. When there is no more room everything goes."""
    if len(_replays) >= CAPACITY:
        _replays.clear()
    if CAPACITY:
        _replays[key] = found


def run(
    kind: Hashable,
    tensors: Sequence[Tensor],
    compute: Callable[[Sequence[Tensor]], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """compute(tensors), a tuple of tensors and None, or its replay if it was met before.

    The current device is the tensors'.
    """
    key = key_of(kind, tensors)
    again = _replays.get(key)
    if again is not None:
        return again(*tensors, *map(Tensor.data_ptr, tensors))
    if not CAPACITY or key in _replays:
        return compute(tensors)
    # A tensor in two places is two tensors, since in the next call it may be.
    apart = [x.detach() if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)]
    outer, tape = taping(), Tape(apart)
    _thread.tape = tape
    try:
        found = compute(apart)
    finally:
        _thread.tape = outer
    keep(key, tape.replay(found))
    return found


def taping() -> Tape | None:
    """The tape of the call that this thread is in, if it is the first of its kind."""
    return getattr(_thread, "tape", None)


def make(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), now and in every replay: its other arguments must be metadata."""
    found = function(*tensors)
    if (tape := taping()) is not None:
        tape.made(found, function, tensors)
    return found


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a contiguous tensor on `like`'s device, the current one; of its dtype, unless one
    is given."""
    dtype = dtype or like.dtype
    found = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    if (tape := taping()) is not None:
        tape.made(found, _allocation(found))
    return found


def workspace(like: Tensor, *parts: tuple[Sequence[int], torch.dtype] | None) -> list[Any]:
    """Contiguous tensors of these shapes and dtypes on `like`'s device, or None, in memory that is
    allocated at once, where each would take 2.5 us of a slow host. Only kernels get them."""
    sizes = [0 if part is None else math.prod(part[0]) * part[1].itemsize for part in parts]
    ends = list(accumulate(-(-size // APART) * APART for size in sizes))
    memory = empty((ends[-1],), like, torch.uint8)
    found: list[Tensor | None] = [None] * len(parts)
    for i, (part, place) in enumerate(zip(parts, (0, *ends), strict=False)):
        if part is not None:
            found[i] = within(memory, *part, place)
    return found


def within(memory: Tensor, shape: Sequence[int], dtype: torch.dtype, place: int = 0) -> Tensor:
    """A contiguous tensor in the memory of another one, from a byte on. Only kernels get it."""
    view = partial(_part, shape=tuple(shape), dtype=dtype, place=place)
    found = view(memory)
    if (tape := taping()) is not None:
        tape.lies_in(found, memory, place, view)
    return found


def _part(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, place: int) -> Tensor:
    flat = memory.view(-1).view(torch.uint8)
    return flat[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _allocation(x: Tensor) -> Callable[[], Tensor]:
    """How to allocate such a tensor on the current device."""
    filled = torch.are_deterministic_algorithms_enabled()  # torch.empty may fill memory with NaN
    # Inductor's way, 3 us sooner than torch.empty, whose time goes to parsing its arguments.
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if quick is None or filled or not x.is_cuda:
        return partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
    return partial(quick, tuple(x.shape), x.stride(), x.dtype)


class Tape:
    """Source of a function that does again, with other tensors, what was done with these."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self._tensors = list(given)  # alive, so that no other tensor gets the id of one of them
        self._names = {id(x): f"t{i}" for i, x in enumerate(given)}
        names = [*self._names.values(), *(f"p{i}" for i in range(len(given)))]
        self._head = f"def replay({', '.join(names)}):"
        self._given = len(given)
        self._lines: list[str] = []
        self._constants: dict[str, Any] = {}
        self._parts: dict[int, tuple[Any, ...]] = {}  # tensors that lie in another
        self._foreign = False  # whether it met a tensor from nowhere

    def constant(self, x: Any) -> str:
        """A name of what is the same in every replay."""
        name = f"c{len(self._constants)}"
        self._constants[name] = x
        return name

    def made(
        self, x: Tensor, function: Callable[..., Tensor], tensors: Sequence[Tensor] = ()
    ) -> None:
        """x = function(*tensors). It may be one of them."""
        if id(x) not in self._names:
            arguments = ", ".join(map(self._name, tensors))
            self._names[id(x)] = name = f"t{len(self._tensors)}"
            self._tensors.append(x)
            self._lines.append(f"{name} = {self.constant(function)}({arguments})")

    def lies_in(self, x: Tensor, memory: Tensor, place: int, view: Callable[..., Tensor]) -> None:
        """x is view(memory), and begins `place` bytes from there: replays make the view only if
        more than its address is asked for."""
        self._parts[id(x)] = x, memory, place, view

    def launched(self, start: str, arguments: tuple[Any, ...], pointers: bool) -> None:
        """A launch: `start` is source up to the kernel's arguments, tensors or their addresses."""
        self._lines.append(start + ", ".join(self._written(x, pointers) for x in arguments) + ")")

    def replay(self, results: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]] | None:
        """The function; None for a call in which there was a tensor from nowhere."""
        written = "".join(f"{'None' if x is None else self._name(x)}, " for x in results)
        if self._foreign:
            return None
        source = "\n    ".join((self._head, *self._lines, f"return ({written})"))
        exec(compiled(source), self._constants)
        return self._constants["replay"]

    def _name(self, x: Tensor) -> str:
        if id(x) not in self._names and id(x) in self._parts:
            _, memory, _, view = self._parts[id(x)]
            self.made(x, view, (memory,))
        self._foreign |= id(x) not in self._names
        return self._names.get(id(x), "t")

    def place(self, x: Tensor) -> tuple[Tensor, int]:
        """The tensor in whose memory x lies, and how far from its start."""
        _, memory, place, _ = self._parts.get(id(x), (x, x, 0, None))
        return memory, place

    def address(self, x: Tensor) -> str:
        """Source of a tensor's address, which is asked for once: it takes 0.2 us."""
        memory, place = self.place(x)
        name = self._name(memory)
        address = name.replace("t", "p")
        if not any(memory is y for y in self._tensors[: self._given]):
            self.once(address, f"{name}.data_ptr()")
        return f"{address} + {place}" if place else address

    def stream(self, current: Callable[[int], int], device: int) -> str:
        """A name of the current stream's handle."""
        self._constants["current"] = current
        return self.once("stream", f"current({device})")

    def memory(self, arguments: Any) -> list[Tensor]:
        """The tensors in whose memory those of a kernel's arguments lie, each once."""
        found: dict[int, Tensor] = {}
        for x in arguments:
            if isinstance(x, tuple):
                found.update((id(y), y) for y in self.memory(x))
            elif isinstance(y := getattr(x, "base", x), Tensor):
                y, _ = self.place(y)
                found[id(y)] = y
        return list(found.values())

    def once(self, name: str, value: str) -> str:
        """The name of what a replay asks for once; value: its source. All its own lines have that
        name in common, so that the first is every one's."""
        if not any(line.startswith(f"{name} = ") for line in self._lines):
            self._lines.append(f"{name} = {value}")
        return name

    def _written(self, x: Any, pointers: bool) -> str:
        """Source of a kernel's argument: a tensor, a tuple, a descriptor, or a constant."""
        if isinstance(x, Tensor):
            return self.address(x) if pointers else self._name(x)
        if isinstance(x, ByAddress):
            return f"*{self.constant(x.find)}({self.address(x.base)})"
        if isinstance(x, tuple) and any(map(_holds_tensor, x)):
            inside = "".join(f"{self._written(y, pointers)}, " for y in x)
            # A compiled kernel takes any tuple, the interpreter looks up fields.
            named = not pointers and type(x) is not tuple
            return f"{self.constant(type(x)) if named else ''}({inside})"
        if not isinstance(x, tuple) and _holds_tensor(x):
            return f"{self.constant(partial(rebased, rebased(x, None)))}({self._name(x.base)})"
        return self.constant(x)


@dataclass(frozen=True)
class ByAddress:
    """Arguments of a kernel that follow from a tensor's address: a TMA map, shape and strides."""

    base: Tensor
    find: Callable[[int], tuple[Any, ...]]


@lru_cache(maxsize=256)
def compiled(source: str) -> CodeType:
    """Calls of one kind share their source: only their constants differ."""
    return compile(source, "<flashtile replay>", "exec")


def _holds_tensor(x: Any) -> bool:
    if isinstance(x, tuple):
        return any(map(_holds_tensor, x))
    return isinstance(x, Tensor) or isinstance(getattr(x, "base", None), Tensor)


def rebased(descriptor: Any, base: Any) -> Any:
    """A tensor descriptor (anything with a `base`) of another tensor of the same metadata. It is
    not validated again, which takes Triton's 5 us."""
    new = object.__new__(type(descriptor))
    vars(new).update(vars(descriptor))
    new.base = base
    return new
