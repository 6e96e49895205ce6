"""Timing in interleaved rounds, so that functions are compared under the same conditions."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Function = Callable[[], object]
Clock = Callable[[Function, int], list[float]]
"""Milliseconds of each of so many calls of a function."""

FLUSH_BYTES = 2**29
"""Overwritten before every timed call: nine times the L2 cache of an H200. It also keeps the GPU
busy for about 140 us, in which the host launches the call: its own time stays out of the figure."""

TURN_MS = 20.0
"""How long a function is at it in one round: many calls of a short one, one call of a long one."""

MOST_CALLS = 50

LEAST_CALLS = 3
"""Of a turn on a GPU: the first still runs at the clocks that the function before has left."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median of the rounds, each the median of its calls."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    iqr_ms: float  # between the quartiles of the rounds; 0 for a single round
    rounds: int
    calls: int  # in each round

    @staticmethod
    def of(rounds: list[float], calls: int) -> Timing:
        quartiles = statistics.quantiles(rounds, method="inclusive") if len(rounds) > 1 else [0.0]
        return Timing(
            statistics.median(rounds), min(rounds), max(rounds), quartiles[-1] - quartiles[0],
            len(rounds), calls,
        )  # fmt: skip

    def row(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(
    functions: Mapping[str, Function],
    rounds: int = 10,
    warmup: int = 2,
    clock: Clock | None = None,
    turn_ms: float = TURN_MS,
    least_calls: int = 1,
) -> dict[str, Timing]:
    """Time functions in turns, by default on the GPU's clock where there is one.

    Each round gives every function one turn, so that a slow spell of the machine falls on all of
    them, in an order of its own, the same in every run, so that none always runs behind the same
    other one: behind a hungry kernel, and MHA behind a frugal one, gradients of GQA took 1.06 of
    MHA's, where they take 1.02 with a rest before each (H200). `warmup` calls of each come first:
    they compile, and the last says how many calls fill a turn.
    """
    clock = clock or best_clock()
    calls = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        for _ in range(warmup):
            [last] = clock(function, 1)
            calls[name] = max(least_calls, min(MOST_CALLS, int(turn_ms / max(last, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, orders = list(functions), random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(names, len(names)):
            times[name].append(statistics.median(clock(functions[name], calls[name])))
    return {name: Timing.of(times[name], calls[name]) for name in names}


def best_clock() -> Clock:
    """The GPU's clock where there is a GPU, else the host's."""
    return CudaClock() if torch.cuda.is_available() else host_clock


def host_clock(function: Function, calls: int) -> list[float]:
    """Wall-clock time: for functions that return when they are done, as on a CPU."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times


class CudaClock:
    """CUDA events around each call, behind a flush of the L2 cache."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Function, calls: int) -> list[float]:
        starts, ends = (
            [torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2)
        )
        for start, end in zip(starts, ends, strict=True):
            self._scratch.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
