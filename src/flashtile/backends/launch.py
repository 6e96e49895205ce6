"""One launch of a Triton kernel: what it is, and how it reaches the GPU."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from triton import knobs

from flashtile.backends.jitcache import launch_healing
from flashtile.backends.replays import Tape, taping


class Launch(NamedTuple):
    kernel: Any  # a @triton.jit function
    grid: int  # programs, all on x: y and z end at 65,535
    arguments: tuple[Any, ...]
    num_warps: int = 4
    num_stages: int = 1


def run(launch: Launch) -> None:
    """Launch on the current stream. An empty grid is no launch."""
    if launch.grid == 0:
        return
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    start = partial(launch.kernel[(launch.grid,)], **options)
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

    While a profiler has hooked itself into launches, Triton's own way is taken.
    """
    grid, runner = launch.grid, compiled[(launch.grid, 1, 1)]

    def heard(*arguments: Any) -> None:
        runner(*arguments[9:], stream=arguments[3])

    c = tape.constant
    before, after = c(knobs.runtime.launch_enter_hook), c(knobs.runtime.launch_exit_hook)
    start = f"({c(heard)} if {before}.calls or {after}.calls else {c(compiled.run)})"
    # The stream's handle as Triton's own launcher asks for it, 2 us sooner.
    stream = f"{c(torch._C._cuda_getCurrentRawStream)}({torch.cuda.current_device()})"
    kernel = f"{c(compiled.function)}, {c(compiled.packed_metadata)}, None, None, None"
    tape.launched(f"{start}({c(grid)}, 1, 1, {stream}, {kernel}, ", launch.arguments, pointers=True)
