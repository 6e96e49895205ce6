"""One launch of a Triton kernel: what it is, and how it reaches the GPU."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from flashtile.backends import driver, packed
from flashtile.backends.jitcache import launch_healing
from flashtile.backends.replays import ByAddress, Tape, rebased, taping

MAPS = 8192
"""TMA maps that are kept, of 600 bytes each: an allocator gives the same addresses again and
again."""


class Launch(NamedTuple):
    kernel: Any  # a @triton.jit function
    grid: int  # programs, all on x: y and z end at 65,535
    arguments: tuple[Any, ...]
    num_warps: int = 4
    num_stages: int = 1
    fused: bool = True  # products and sums may be contracted to FMAs
    max_registers: int | None = None  # of a thread; None: as many as the compiler likes

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told besides."""
        found: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if not self.fused:
            found["enable_fp_fusion"] = False
        if self.max_registers is not None:
            found["maxnreg"] = self.max_registers
        return found


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 where there is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(launch: Launch) -> None:
    """Launch on the current stream. An empty grid is no launch."""
    if launch.grid == 0:
        return
    driver.enter()
    start = partial(launch.kernel[(launch.grid,)], **launch.options)
    compiled = launch_healing(lambda: start(*launch.arguments), launch.kernel)
    if (tape := taping()) is None:
        return
    if hasattr(compiled, "packed_metadata"):
        _tape_compiled(tape, launch, compiled)
    else:  # Triton's interpreter compiles nothing
        tape.launched(f"{tape.constant(start)}(", launch.arguments, pointers=False)


def _tape_compiled(tape: Tape, launch: Launch, compiled: Any) -> None:
    """Go to the compiled kernel with addresses: binding and specialisation of arguments, and a
    look at each tensor in C, are most of the host time of a launch.

    A profiler that has hooked itself into launches hears of them as of Triton's own.
    """
    run, expanded = _with_maps(compiled.run, launch.arguments)
    quick, besides = _without_scratch(run)
    grid, last = (launch.grid, 1, 1), 5 + len(besides)

    def heard(*arguments: Any) -> None:
        metadata = compiled.launch_metadata(grid, arguments[3])
        listeners = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        run(*arguments[:5], arguments[last], metadata, *listeners, *arguments[last + 4 :])

    c, listened = tape.constant, _listened(tape)
    start = f"({c(heard)} if {listened} else {c(quick)})"
    # The stream's handle as Triton's own launcher asks for it, 2 us sooner.
    stream = tape.stream(torch._C._cuda_getCurrentRawStream, torch.cuda.current_device())
    kernel = ", ".join(map(c, (compiled.function, *besides, compiled.packed_metadata)))
    memory = tape.memory(expanded)
    places = packed.Places(memory, tape.place)
    direct = packed.packing(compiled, run, launch.grid, expanded, places) if besides else None
    unless = ""
    if direct is not None:
        addresses = "".join(f"{tape.address(x)}, " for x in memory)
        start_driver, how = map(c, direct)
        driven = f"{start_driver}(*{c(packed.packed)}({how}, {addresses}{stream}))"
        unless = f"if {listened} or (result := {driven}) and {c(driver.refused)}(result): "
    tape.launched(
        f"{unless}{start}({c(launch.grid)}, 1, 1, {stream}, {kernel}, None, None, None, ", expanded,
        pointers=True,
    )  # fmt: skip


def _listened(tape: Tape) -> str:
    """Source of whether somebody listens to launches, or has put another hook in its place."""
    c, tests = tape.constant, []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        calls = f"{c(hook)}.calls" if hasattr(hook, "calls") else "True"
        tests.append(f"{c(knobs.runtime)}.{name} is not {c(hook)} or {calls}")
    return tape.once("listened", " or ".join(tests))


def _without_scratch(run: Any) -> tuple[Any, tuple[Any, ...]]:
    """What launches a kernel that needs no scratch memory, and what it takes between the function
    and the metadata: of Triton 3.6 the launcher in C, where the one around it asks two allocators
    for nothing and copies 75 arguments, which takes 2 us."""
    sizes = [getattr(run, f"{whose}_scratch_size", None) for whose in ("global", "profile")]
    if sizes != [0, 0] or hasattr(run, "arg_annotations") or isinstance(run.launch, FunctionType):
        return run, ()
    return run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)


def _with_maps(run: Any, arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A launcher that takes TMA maps where Triton's takes descriptors, and the arguments with maps
    that are kept by address: Triton encodes all of them at every launch, which takes 5 us each.

    Triton's launcher is a closure around one that takes maps; where it is not, nothing changes.
    """
    descriptors = [x for x in arguments if not isinstance(x, Tensor) and hasattr(x, "base")]
    inner = getattr(run, "launch", None)
    if not descriptors or not isinstance(inner, FunctionType):
        return run, arguments
    inside = {
        name: cell.cell_contents
        for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
    }
    launcher, metadata = inside.get("launcher"), inside.get("tensordesc_meta") or ()
    if launcher is None or len(metadata) != len(descriptors) or None in metadata:
        return run, arguments
    quick, following = copy(run), iter(metadata)
    quick.launch = launcher
    expanded = tuple(
        ByAddress(x.base, _Maps(rebased(x, None), next(following)))
        if any(x is y for y in descriptors)
        else x
        for x in arguments
    )
    try:  # Triton's function has other arguments from 3.8 on
        for x in expanded:
            if isinstance(x, ByAddress):
                x.find(x.base.data_ptr())
    except TypeError:
        return run, arguments
    return quick, expanded


@dataclass(frozen=True, eq=False)
class _Maps:
    """From an address to what the kernel takes for a descriptor of the tensor there."""

    like: Any  # a descriptor without a tensor
    metadata: Any

    def __call__(self, address: int) -> tuple[Any, ...]:
        return _encoded(self, address)


@lru_cache(maxsize=MAPS)
def _encoded(maps: _Maps, address: int) -> tuple[Any, ...]:
    from triton.backends.nvidia.driver import make_tensordesc_arg  # noqa: PLC0415, not on AMD

    driver.enter()
    return tuple(make_tensordesc_arg(rebased(maps.like, _Address(address)), maps.metadata))


class _Address(int):
    """A tensor, as far as encoding a map of it goes."""

    def data_ptr(self) -> int:
        return int(self)
