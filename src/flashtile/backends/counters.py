"""Counters in global memory that kernels find cleared and leave cleared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from flashtile.backends.replays import make

LAUNCHES = 4096
"""Streams and captured launches that find their counters cleared beforehand."""

_of_stream: dict[tuple[int, int, int], Tensor] = {}
_spare: dict[tuple[int, int], list[Tensor]] = {}
_cleared: list[Tensor] = []  # graphs outlive what holds their counters


def counters_beside(x: Tensor, count: int) -> Tensor:
    """`counters` of a launch on x's device, found again whenever the call is replayed."""
    return make(partial(counters, x.device.type, x.get_device(), count))


def counters(kind: str, device: int, count: int) -> Tensor:
    """(count,) int32 zeros on the current device, which the launch leaves as zeros.

    Launches of one stream follow each other and share them. A captured launch gets some that no
    other launch uses: its graph may be replayed on any stream, beside any other.
    """
    if kind != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=kind)
    stream = torch._C._cuda_getCurrentRawStream(device)
    if stream != 0 and torch._C._cuda_isCurrentStreamCapturing():  # CUDA captures no default stream
        return _take(device, count)
    key = device, stream, count
    found = _of_stream.get(key)
    if found is None:
        if (device, count) not in _spare:
            # By another thread: this one may be allocating in a graph's pool, as torch.compile does
            # to warm up for "reduce-overhead", and there nothing but results may stay.
            with ThreadPoolExecutor(1) as thread:
                _spare[device, count] = thread.submit(_clear, device, count).result()
        found = _of_stream[key] = _take(device, count)
    return found


def _take(device: int, count: int) -> Tensor:
    spare = _spare.get((device, count))
    return spare.pop() if spare else torch.zeros(count, dtype=torch.int32, device=device)


def _clear(device: int, count: int) -> list[Tensor]:
    """Counters that launches on any stream may use: waited for, once a process. Each launch's begin
    at 16 bytes."""
    cleared = torch.zeros((LAUNCHES, (count + 3) // 4 * 4), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    _cleared.append(cleared)
    return [row[:count] for row in cleared.unbind()]
