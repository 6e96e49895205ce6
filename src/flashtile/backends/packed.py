"""Launches by the CUDA driver itself, whose parameters are packed once for each set of addresses.

Triton's launcher in C parses the 60 to 130 Python objects of a launch anew each time, which takes
2.7 us of a call's 10 before the driver has begun. An allocator gives the same addresses again and
again: what the driver gets is kept by address, the parameters as one block of memory and the grid
and the stream beside it. Nobody writes to it once it is packed, so that threads may share it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from flashtile.backends import driver
from flashtile.backends.replays import ByAddress

CALLS = 8192
"""Packed launches that are kept, of 1.5 KB each: a model attends once a layer, and in each layer at
other addresses if the backward needs what lies there. To pack one anew takes 7 us."""

MAP_BYTES = 128
"""Of a TMA map (CUtensorMap), which is a parameter by value."""

_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B",
            "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip
_CONFIG = struct.Struct("3I 3I I 4x Q Q I 4x")
"""CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes and their number."""

_EXTRA = struct.Struct("5Q Q")
"""Five words that say where the parameters and their size are, and, behind them, that size."""

_BUFFER, _SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END
_HEAD = _CONFIG.size + _EXTRA.size
_write_address = struct.Struct("Q").pack_into
_write_map = struct.Struct(f"{MAP_BYTES}s").pack_into


class Places(NamedTuple):
    """Where a launch's tensors lie."""

    memory: Sequence[Tensor]
    place: Callable[[Tensor], tuple[Tensor, int]]  # the one in whose memory, bytes from its start

    def of(self, x: Tensor) -> tuple[int, int]:
        """(which of the memory, bytes from its start)."""
        base, start = self.place(x)
        return next(i for i, y in enumerate(self.memory) if y is base), start


class Parameter(NamedTuple):
    """One of a kernel's."""

    format: str  # of `struct`
    value: Any  # a number, a tensor for its address, or a ByAddress for its map


@dataclass(frozen=True, eq=False)
class Packing:
    """How a launch is packed: its configuration, where its parameters are, and they themselves."""

    function: ctypes.c_void_p
    shape: tuple[int, ...]  # grid, block, bytes of shared memory
    template: bytes  # without addresses
    kind: type[ctypes.Array[ctypes.c_char]]  # of as many bytes
    pointers: list[tuple[int, int, int]]  # offset, which address, bytes from there
    maps: list[tuple[int, int, int, Callable[[int], tuple[Any, ...]]]]  # likewise, and the map


def packing(
    compiled: Any, run: Any, grid: int, arguments: Sequence[Any], places: Places
) -> tuple[Any, Packing] | None:
    """(the driver's function, what `packed` packs its arguments by) of a plain launch by Triton
    3.6, else None. The function returns 0 if it has launched."""
    metadata = compiled.packed_metadata
    plain = isinstance(metadata, tuple) and len(metadata) == 3 and metadata[1] == 1
    if not plain or run.launch_cooperative_grid or run.launch_pdl:
        return None
    try:
        parameters = list(_parameters(tuple(compiled.src.signature.values()), arguments))
        offsets = _offsets(compiled.function, parameters)
        start = driver.library().cuLaunchKernelEx
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return None  # another Triton, another driver, a type that is not known here
    if offsets is None:
        return None
    warps, _, shared_bytes = metadata
    shape = grid, 1, 1, 32 * warps, 1, 1, shared_bytes
    template, pointers, maps = bytearray(_HEAD + offsets[-1] + 8), [], []
    for offset, (kind, x) in zip(offsets, parameters, strict=False):
        if isinstance(x, ByAddress):
            maps.append((_HEAD + offset, *places.of(x.base), x.find))
        elif isinstance(x, Tensor):
            pointers.append((_HEAD + offset, *places.of(x)))
        else:
            struct.pack_into(kind, template, _HEAD + offset, x or 0)
    function, kept = ctypes.c_void_p(compiled.function), ctypes.c_char * len(template)
    return start, Packing(function, shape, bytes(template), kept, pointers, maps)


def _parameters(signature: Sequence[Any], arguments: Sequence[Any]) -> Iterator[Parameter]:
    """The kernel's own parameters, as Triton's launcher finds them."""
    for kind, x in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, x)
        elif isinstance(x, ByAddress):
            tensor_map, *numbers = x.find(x.base.data_ptr())
            if type(tensor_map).__basicsize__ != 2 * MAP_BYTES:
                raise TypeError("not an object's head and, behind it, a map")
            rank = len(numbers) // 2
            yield Parameter(f"{MAP_BYTES}s", x)
            yield from (Parameter("i", size) for size in numbers[:rank])
            yield from (Parameter("q", stride) for stride in numbers[rank:])
        elif kind != "constexpr":
            yield Parameter("Q" if kind[0] == "*" else _FORMATS[kind], x)


def _offsets(function: int, parameters: Sequence[Parameter]) -> list[int] | None:
    """Where the parameters lie, if the driver finds these in the kernel and, last, two addresses of
    scratch memory, which end a kernel of Triton 3.6. Nothing past them is asked for: a memory
    checker reports what the driver refuses."""
    ask, found = driver.library().cuFuncGetParamInfo, []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    for i, parameter in enumerate((*parameters, *2 * [Parameter("Q", None)])):
        asked = ctypes.c_void_p(function), ctypes.c_size_t(i)
        refused = ask(*asked, ctypes.byref(offset), ctypes.byref(size))
        if refused or size.value != struct.calcsize(parameter.format):
            return None
        found.append(offset.value)
    return found


@lru_cache(maxsize=CALLS)
def packed(how: Packing, *addresses: int) -> tuple[Any, ...]:
    """The arguments of the driver's function. The last of the addresses is the stream's."""
    memory = how.kind.from_buffer_copy(how.template)
    extra = ctypes.addressof(memory) + _CONFIG.size
    _CONFIG.pack_into(memory, 0, *how.shape, addresses[-1], 0, 0)
    size = len(how.template) - _HEAD
    where = _BUFFER, extra + _EXTRA.size, _SIZE, extra + 5 * 8, _END
    _EXTRA.pack_into(memory, _CONFIG.size, *where, size)
    for offset, i, start in how.pointers:
        _write_address(memory, offset, addresses[i] + start)
    for offset, i, start, find in how.maps:
        _write_map(memory, offset, _bytes(find(addresses[i] + start)[0]))
    # The references keep the memory alive.
    return ctypes.byref(memory), how.function, None, ctypes.byref(memory, _CONFIG.size)


def _bytes(tensor_map: Any) -> bytes:
    """A TMA map out of Triton's object, which ends with it."""
    return ctypes.string_at(id(tensor_map) + type(tensor_map).__basicsize__ - MAP_BYTES, MAP_BYTES)
