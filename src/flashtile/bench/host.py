"""Suite `host`: what one eager call costs the host, on a problem too small to matter to a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from flashtile.bench import providers
from flashtile.bench.features import Cell
from flashtile.bench.measure import Function, Timing, interleaved
from flashtile.bench.options import Options
from flashtile.bench.speed import Prepared

CELL = Cell("full", batch=1, seqlen=128, heads=8, kv_heads=8, head_dim=128)

CALLS = 100
"""Between two synchronisations: more than a clock's tick, fewer than a launch queue holds."""

WARMUP = 10
"""Times as many rounds before those that count, 5 s. Just after the peers' compilers have run all
calls may be half as slow again: 15.3 us for 10.8, FlashAttention-2's 39.1 for 24.9 (H200)."""

NAMES = ("flashtile", "fa2", "cudnn", "flex", "flash-attn", "fa3", "fa4")

MODES: dict[str, type[AbstractContextManager[Any]]] = {"no_grad": torch.no_grad,
                                                       "autograd": nullcontext}  # fmt: skip


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row a mode: microseconds of a call until it returns, without waiting for the device.

    Backends are not forced here: that is done in every plan, and costs the host more than a call.
    All modes take turns: the first to be measured alone was half as slow again.
    """
    prepared = Prepared(CELL, options)
    asked = (n for n in options.providers or NAMES if not n.startswith("flashtile-"))
    names = [name for name in asked if providers.importable(name)]
    reasons: dict[str, Any] = {}
    for name in names:
        [found] = prepared.functions(name, ("fwd",)).values()
        if isinstance(found, str):
            reasons[name] = {"reason": found}
    turns: dict[str, Function] = {
        f"{mode} {name}": _hundred(prepared, name, recording)
        for mode, recording in MODES.items() for name in names if name not in reasons
    }  # fmt: skip
    warmup = WARMUP * options.rounds
    clock = Enqueue(options.device)
    times = interleaved(turns, options.rounds, warmup, clock=clock, turn_ms=0.0)
    for mode in MODES:
        results = {name: reasons.get(name) or _row(times[f"{mode} {name}"]) for name in names}
        yield {**CELL.row(), "mode": mode, "providers": results}


def _row(timing: Timing) -> dict[str, Any]:
    scale = 1e3 / CALLS
    return {
        "median_us": timing.median_ms * scale,
        "fastest_us": timing.fastest_ms * scale,
        "slowest_us": timing.slowest_ms * scale,
        "rounds": timing.rounds,
        "calls": CALLS,
    }


def _hundred(
    prepared: Prepared, name: str, recording: type[AbstractContextManager[Any]]
) -> Function:
    """So many calls in a row. SDPA's backend is chosen once for all of them, as a program does."""
    attend = prepared.attend(name)

    def calls() -> None:
        with recording(), providers.context(name):
            for _ in range(CALLS):
                attend()

    return calls


class Enqueue:
    """The host's clock from an idle device until a function has returned."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, function: Function, calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            self._wait()
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        self._wait()
        return times

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
