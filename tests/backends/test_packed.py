"""Launches packed for the driver, without a driver."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends import driver, packed
from flashtile.backends.packed import Packing, Places
from flashtile.backends.replays import ByAddress

FORMATS = ["Q", "i", "128s", "i", "i", "q", "q", "f", "Q", "Q"]
"""Parameters of the kernel below, and two addresses of scratch memory."""

SIGNATURE = {"x": ("*bf16", "i32", "constexpr"), "map": "tensordesc<bf16[1, 2]>", "unit": "fp32",
             "TILE": "constexpr"}  # fmt: skip


class _Map:
    """Stands in for Triton's map: an object of 256 bytes that ends with a map's 128."""

    __slots__ = tuple(f"word_{i:02}" for i in range(30))


class _Driver:
    """Knows the parameters of one kernel, and what it was last given."""

    def __init__(self, formats: list[str], result: int = 0) -> None:
        self.formats, self.result = formats, result
        self.offsets, end = [], 0
        for kind in formats:
            size = struct.calcsize(kind)
            self.offsets.append(-(-end // min(size, 64)) * min(size, 64))
            end = self.offsets[-1] + size
        self.parameters, self.config = b"", ()  # type: ignore[var-annotated]

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:  # noqa: N802
        assert function.value == 1234
        if index.value >= len(self.formats):
            return 1
        offset._obj.value = self.offsets[index.value]
        size._obj.value = struct.calcsize(self.formats[index.value])
        return 0

    def cuLaunchKernelEx(self, launch: Any, function: Any, each: None, extra: Any) -> int:  # noqa: N802
        assert function.value == 1234
        memory = launch._obj
        assert extra._obj is memory
        assert each is None
        self.config = packed._CONFIG.unpack_from(memory, 0)
        buffer, parameters, size_of, size, end = struct.unpack_from(
            "5Q", memory, packed._CONFIG.size
        )
        assert (buffer, size_of, end) == (1, 2, 0)
        (count,) = struct.unpack("Q", ctypes.string_at(size, 8))
        assert parameters + count == ctypes.addressof(memory) + len(memory)
        self.parameters = ctypes.string_at(parameters, count)
        return self.result

    def value(self, i: int) -> Any:
        return struct.unpack_from(self.formats[i], self.parameters, self.offsets[i])[0]


def _packing(given: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A launch of 7 programs whose first tensor lies 512 bytes behind its memory's start."""
    monkeypatch.setattr(driver, "library", lambda: given)
    memory = [torch.zeros(4), torch.zeros(4)]
    x, y = torch.zeros(2), memory[1]

    def place(of: Tensor) -> tuple[Tensor, int]:
        return (memory[0], 512) if of is x else (of, 0)

    settings = {"packed_metadata": (4, 1, 99), "cooperative": False, "pdl": False,
                "signature": SIGNATURE, "map": _Map(), **changes}  # fmt: skip
    compiled = SimpleNamespace(
        function=1234, packed_metadata=settings["packed_metadata"],
        src=SimpleNamespace(signature=settings["signature"]),
    )  # fmt: skip
    run = SimpleNamespace(
        launch_cooperative_grid=settings["cooperative"], launch_pdl=settings["pdl"]
    )
    arguments = (x, 3, None), ByAddress(y, lambda _: (settings["map"], 5, 6, 7, 1)), 0.5, "tile"
    return packed.packing(compiled, run, 7, arguments, Places(memory, place))


def test_what_the_driver_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_bytes", lambda tensor_map: b"m" * 128)
    fake = _Driver(FORMATS)
    start, how = _packing(fake, monkeypatch)
    assert isinstance(how, Packing)
    for address, stream in ((4096, 0), (8192, 77), (4096, 0)):
        assert start(*packed.packed(how, address, 64, stream)) == 0
        found = [fake.value(i) for i in range(len(FORMATS))]
        assert found == [address + 512, 3, b"m" * 128, 5, 6, 7, 1, 0.5, 0, 0]
        assert fake.config == (7, 1, 1, 128, 1, 1, 99, stream, 0, 0)
    assert packed.packed(how, 4096, 64, 0) is packed.packed(how, 4096, 64, 0)


def test_a_map_is_the_end_of_its_object() -> None:
    tensor_map = _Map()
    assert type(tensor_map).__basicsize__ == 256
    found = packed._bytes(tensor_map)
    tensor_map.word_29 = tensor_map  # type: ignore[attr-defined]
    changed = packed._bytes(tensor_map)
    assert found[:-8] == changed[:-8]
    assert int.from_bytes(changed[-8:], "little") == id(tensor_map)


@pytest.mark.parametrize("changes", [
    {"pdl": True}, {"cooperative": True}, {"packed_metadata": (4, 2, 99)},
    {"packed_metadata": (4, 1, 99, 0)}, {"signature": {**SIGNATURE, "unit": "bf16"}},
    {"signature": {**SIGNATURE, "another": "i32"}}, {"map": object()},
], ids=["early", "cooperative", "clusters", "more metadata", "a bf16 number", "more types",
        "another map"])  # fmt: skip
def test_what_is_left_to_triton(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _packing(_Driver(FORMATS), monkeypatch, **changes) is None


@pytest.mark.parametrize("formats", [
    FORMATS[:-1], [*FORMATS[:3], "q", *FORMATS[4:]],
], ids=["fewer", "wider"])  # fmt: skip
def test_a_kernel_of_other_parameters_is_left_to_triton(
    formats: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _packing(_Driver(formats), monkeypatch) is None


def test_a_driver_that_knows_no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before CUDA 12.4."""
    assert _packing(SimpleNamespace(), monkeypatch) is None
