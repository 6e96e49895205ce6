"""The peak memory of a call, exact to the byte, on the CPU as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile


def peak_bytes(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most that torch's allocator held during fn(), above what it held before.

    `device` says which allocator. What fn returns counts until it has returned. fn must not free
    memory from before the call: the CPU's allocator does not report a block that it handed out
    unobserved. Scratch memory of libraries that allocate by themselves (oneDNN) is not seen.
    Raises ValueError for a device that is neither cpu nor cuda.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak_bytes(fn, device)
    if device.type != "cpu":
        raise ValueError(f"device={str(device)!r} must be cpu or cuda: no other reports a peak")
    level = peak = 0
    for change in _cpu_changes(fn):
        level += change
        peak = max(peak, level)
    return peak


def _cuda_peak_bytes(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_changes(fn: Callable[[], object]) -> Iterator[int]:
    """Bytes of every allocation (positive) and release (negative) during fn(), in time's order."""
    # The profiler's library writes lines of its own to stderr unless told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(profile_memory=True) as profiler:
        fn()
    results = profiler.kineto_results
    if results is None:
        raise RuntimeError("torch's profiler returned no events")
    memory = [
        event
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    yield from (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
