"""One launch of a Triton kernel: what it is, and how it reaches the GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from flashtile.backends.jitcache import launch_healing


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
    start = launch.kernel[(launch.grid,)]
    launch_healing(
        lambda: start(*launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages),
        launch.kernel,
    )


def warm(launch: Launch) -> Callable[..., None]:
    """A launcher of the compiled kernel for arguments of the same types, strides and alignment.

    It skips Triton's binding and specialisation of arguments, most of the host time of a launch.
    """
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if not hasattr(launch.kernel, "device_caches"):  # Triton's interpreter compiles nothing
        return partial(launch.kernel[(launch.grid,)], **options)

    def load() -> Callable[..., None]:
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **options)
        return compiled[(launch.grid, 1, 1)]

    start = launch_healing(load, launch.kernel)
    index = torch.cuda.current_device()
    return lambda *arguments: start(*arguments, stream=_stream(index))


def _stream(device: int) -> int:
    """The current stream's handle, as Triton's own launcher asks for it, 2 us sooner."""
    return torch._C._cuda_getCurrentRawStream(device)
