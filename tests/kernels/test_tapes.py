"""What a replay is made of: memory, launches and descriptors as the tape has them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from flashtile.backends import driver, launch, packed, replays
from flashtile.testing.interpreter import interpreted


@dataclass
class _Descriptor:
    """Stands in for Triton's TensorDescriptor."""

    base: Tensor
    block_shape: list[int]

    def __post_init__(self) -> None:
        assert self.base is not None


class _Kernel:
    """Stands in for a kernel: compiled, or of the interpreter."""

    def __init__(self, compiled: Any = None) -> None:
        self.compiled, self.seen = compiled, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.seen.append(args) or self.compiled


def test_a_descriptor_is_rebuilt_around_another_tensor() -> None:
    kernel = _Kernel()
    with interpreted(capacity=64):
        for x in (torch.zeros(4), torch.ones(4)):

            def compute(tensors: Any) -> tuple[Tensor]:
                scratch = replays.empty((3,), tensors[0])
                described = _Descriptor(tensors[0], [2])
                launch.run(launch.Launch(kernel, 1, (described, (7, (scratch,)))))
                return (scratch,)

            (found,) = replays.run("test", (x,), compute)
            described, (seven, (scratch,)) = kernel.seen[-1]
            assert described.base is x
            assert described.block_shape == [2]
            assert seven == 7
            assert scratch is found
        assert len(kernel.seen) == 2
        assert None not in replays._replays.values()


def test_a_call_within_a_call_has_a_tape_of_its_own() -> None:
    kernel = _Kernel()

    def inner(tensors: Any) -> tuple[Tensor]:
        return (replays.make(torch.neg, tensors[0]),)

    def outer(tensors: Any) -> tuple[Tensor]:
        out = replays.empty((4,), tensors[0])
        replays.run("inner", tensors, inner)
        launch.run(launch.Launch(kernel, 1, (tensors[0], out)))
        return (out,)

    with interpreted(capacity=64):
        for x in (torch.zeros(4), torch.ones(4)):
            (out,) = replays.run("outer", (x,), outer)
            assert kernel.seen.pop() == (x, out)
        assert replays.taping() is None


def _workspace(tensors: Any, kernel: _Kernel) -> tuple[Tensor]:
    first, none, second = replays.workspace(
        tensors[0], ((3, 2), torch.float32), None, ((5,), torch.int32)
    )
    assert none is None
    launch.run(launch.Launch(kernel, 1, (first, (second, 7), tensors[0])))
    return (replays.make(torch.neg, tensors[0]),)


def test_a_workspace_is_allocated_at_once() -> None:
    kernel = _Kernel()
    with interpreted(capacity=64):
        for _ in range(2):
            replays.run("test", (torch.ones(4),), lambda x: _workspace(x, kernel))
        assert None not in replays._replays.values()
    assert len(kernel.seen) == 2
    for first, (second, _), _ in kernel.seen:
        assert (first.shape, first.dtype) == ((3, 2), torch.float32)
        assert (second.shape, second.dtype) == ((5,), torch.int32)
        assert first.is_contiguous()
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert second.data_ptr() == first.data_ptr() + replays.APART


def test_a_part_of_another_tensor_s_memory() -> None:
    kernel = _Kernel()

    def compute(tensors: Any) -> tuple[Tensor]:
        made = replays.empty((4, 3), tensors[0], torch.bfloat16)
        part = replays.within(made, (2, 1), torch.float32, place=8)
        launch.run(launch.Launch(kernel, 1, (part, made)))
        return (made,)

    with interpreted(capacity=64):
        for _ in range(2):
            (made,) = replays.run("test", (torch.ones(4),), compute)
            part, found = kernel.seen[-1]
            assert found is made
            assert (part.shape, part.dtype) == ((2, 1), torch.float32)
            assert part.data_ptr() == made.data_ptr() + 8
        assert None not in replays._replays.values()


def _compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A kernel without scratch memory, and what its launcher in C got."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launches: list[Any] = []
    run = MagicMock(launch_cooperative_grid=False, launch_pdl=False)
    run.launch = MagicMock(side_effect=lambda *a: launches.append(a))
    run.global_scratch_size = run.profile_scratch_size = 0
    del run.arg_annotations
    compiled = SimpleNamespace(run=run, function=1, packed_metadata=2, launch_metadata=lambda *a: a)
    return compiled, launches


def test_the_driver_launches_and_triton_if_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread without a context, and where a profiler listens or has a hook of its own. Another
    error is raised."""
    compiled, launches = _compiled(monkeypatch)
    results, driven = iter((0, 201, 700)), []  # type: ignore[var-annotated]

    def start(*a: Any) -> int:
        driven.append(a)
        return next(results)

    monkeypatch.setattr(packed, "packing", lambda *_: (start, "how"))
    monkeypatch.setattr(packed, "packed", lambda *a: a)
    monkeypatch.setattr(driver, "_said", lambda by, result: f"{by} of {result}")
    kernel, x = _Kernel(compiled), torch.ones(4)

    def again() -> None:
        replays.run("test", (x,), lambda x: _workspace(x, kernel))

    with interpreted(capacity=64):
        for expected in (0, 0, 1):
            again()
            assert len(launches) == expected
        (arguments,) = launches
        first, (second, seven), last = arguments[13:]
        assert (second, seven, last) == (first + replays.APART, 7, x.data_ptr())
        assert [a[:1] + a[2:] for a in driven] == [("how", x.data_ptr(), 5)] * 2
        assert driven[1][1] == first
        with pytest.raises(RuntimeError, match="cuGetErrorName of 700"):
            again()
        assert (len(driven), len(launches)) == (3, 1)
        with patch.object(knobs.runtime.launch_exit_hook, "calls", [print]):
            again()
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
        again()
        assert len(driven) == 3
        compiled.run.assert_called()
        assert compiled.run.call_args.args[7] is print


@pytest.mark.parametrize("scratch", [0, 64, None], ids=["", "scratch memory", "another Triton"])
def test_a_compiled_kernel_takes_addresses(
    scratch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the launcher in C, where that has no more to do than launch. If a profiler listens, or if
    a kernel needs scratch memory, Triton's own is called, on the same stream."""
    compiled, inner = _compiled(monkeypatch)
    launches: list[Any] = []
    run, kernel = compiled.run, _Kernel(compiled)
    run.side_effect = lambda *a: launches.append(a)
    run.launch_pdl, run.profile_scratch_size = True, scratch

    def compute(tensors: Any) -> tuple[Tensor]:
        launch.run(launch.Launch(kernel, 3, ((tensors[0], 4), None)))
        return (replays.make(torch.neg, tensors[0]),)

    with interpreted(capacity=64):
        for number in (1.0, 2.0):
            x = torch.full((4,), number)
            (found,) = replays.run("test", (x,), compute)
            assert found.eq(-number).all()
        head, arguments = (3, 1, 1, 5, 1), ((x.data_ptr(), 4), None)
        rest = (2, None, None, None, *arguments)
        direct = scratch == 0
        assert inner == ([(*head, False, True, None, None, *rest)] if direct else [])
        assert launches == ([] if direct else [(*head, *rest)])
        launches.clear()
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        monkeypatch.setattr(enter, "calls", [print])
        replays.run("test", (x,), compute)
    assert launches == [(*head, 2, ((3, 1, 1), 5), enter, leave, *arguments)]
    assert len(kernel.seen) == 1


@pytest.mark.parametrize("version", ["as known", "of another Triton"])
def test_maps_of_tensors_are_kept_by_address(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's launcher is the closure that we know; else it gets its descriptors."""
    known, encoded, launches = version == "as known", [], []  # type: ignore[var-annotated]

    def encode(descriptor: Any, metadata: Any) -> list[Any]:
        encoded.append(descriptor.base.data_ptr())
        return [("map", descriptor.base.data_ptr(), metadata), *descriptor.block_shape]

    def encode_later(descriptor: Any, metadata: Any, _: Any) -> list[Any]:
        return encode(descriptor, metadata)

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", encode if known else encode_later)
    signature = {0: "*fp32", 1: "tensordesc<fp32[2]>"}
    taking = nvidia.wrap_handle_tensordesc(lambda *a: launches.append(a), signature, ["meta"])
    run, arguments = launch._with_maps(
        SimpleNamespace(launch=taking), (x := torch.zeros(4), _Descriptor(torch.ones(4), [2]))
    )
    assert arguments[0] is x
    if not known:
        assert run.launch is taking
        assert isinstance(arguments[1], _Descriptor)
        return
    run.launch(7)
    assert launches == [(7,)]
    base, find = arguments[1].base, arguments[1].find
    assert [find(base.data_ptr()), find(64), find(64)] == [
        (("map", base.data_ptr(), "meta"), 2), *[(("map", 64, "meta"), 2)] * 2
    ]  # fmt: skip
    assert encoded == [base.data_ptr(), 64]
