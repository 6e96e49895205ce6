"""One launch of a Triton kernel: what it is, and how it reaches the GPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from flashtile.backends.jitcache import launch_healing
from flashtile.backends.replays import ByAddress, Tape, rebased, taping

MAPS = 64
"""TMA maps that are kept for each argument of a kernel: an allocator gives the same addresses again
and again."""


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
    hooks, grid, last = knobs.runtime, (launch.grid, 1, 1), 5 + len(besides)

    def heard(*arguments: Any) -> None:
        metadata = compiled.launch_metadata(grid, arguments[3])
        listeners = hooks.launch_enter_hook, hooks.launch_exit_hook
        run(*arguments[:5], arguments[last], metadata, *listeners, *arguments[last + 4 :])

    c = tape.constant
    before, after = c(hooks.launch_enter_hook), c(hooks.launch_exit_hook)
    start = f"({c(heard)} if {before}.calls or {after}.calls else {c(quick)})"
    # The stream's handle as Triton's own launcher asks for it, 2 us sooner.
    stream = f"{c(torch._C._cuda_getCurrentRawStream)}({torch.cuda.current_device()})"
    kernel = ", ".join(map(c, (compiled.function, *besides, compiled.packed_metadata)))
    tape.launched(
        f"{start}({c(launch.grid)}, 1, 1, {stream}, {kernel}, None, None, None, ", expanded,
        pointers=True,
    )  # fmt: skip


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
        ByAddress(x.base, _maps(x, next(following))) if any(x is y for y in descriptors) else x
        for x in arguments
    )
    try:  # Triton's function has other arguments from 3.8 on
        for x in expanded:
            if isinstance(x, ByAddress):
                x.find(x.base.data_ptr())
    except TypeError:
        return run, arguments
    return quick, expanded


def _maps(descriptor: Any, metadata: Any) -> Callable[[int], tuple[Any, ...]]:
    """From an address to what the kernel takes for a descriptor of the tensor there."""
    from triton.backends.nvidia.driver import make_tensordesc_arg  # noqa: PLC0415, not on AMD

    like = rebased(descriptor, None)

    @lru_cache(maxsize=MAPS)
    def encoded(address: int) -> tuple[Any, ...]:
        return tuple(make_tensordesc_arg(rebased(like, _Address(address)), metadata))

    return encoded


class _Address(int):
    """A tensor, as far as encoding a map of it goes."""

    def data_ptr(self) -> int:
        return int(self)
