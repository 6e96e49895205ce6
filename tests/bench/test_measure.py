"""Timing in turns, with clocks of our own."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise, permutations

import pytest
import torch

from flashtile.bench import measure
from flashtile.bench.measure import MOST_CALLS, Function, Timing, host_clock, interleaved


class Scripted:
    """A clock for which each function takes the milliseconds it returns; notes the turns."""

    def __init__(self) -> None:
        self.turns: list[tuple[object, int]] = []

    def __call__(self, function: Function, calls: int) -> list[float]:
        taken = function()
        assert isinstance(taken, float)
        self.turns.append((taken, calls))
        return [taken] * calls


def test_rounds_have_orders_and_short_functions_are_called_more_often() -> None:
    clock = Scripted()
    functions: dict[str, Function] = {"a": lambda: 2.0, "b": lambda: 10.0, "c": lambda: 500.0}

    found = interleaved(functions, rounds=4, warmup=1, clock=clock, turn_ms=20.0)

    assert [calls for _, calls in clock.turns[:3]] == [1, 1, 1]  # the warm-up
    order = [taken for taken, _ in clock.turns[3:]]
    assert all(sorted(order[i : i + 3]) == [2.0, 10.0, 500.0] for i in range(0, 12, 3))
    assert {name: timing.calls for name, timing in found.items()} == {"a": 10, "b": 2, "c": 1}
    assert found["b"] == Timing(10.0, 10.0, 10.0, 0.0, rounds=4, calls=2)


def test_nobody_always_runs_behind_the_same_other_one() -> None:
    """A hungry function leaves its clocks to the next one. Orders are the same in every run."""
    functions: dict[str, Function] = {str(n): partial(float, n) for n in range(1, 6)}
    orders = []
    for _ in range(2):
        clock = Scripted()
        interleaved(functions, rounds=20, warmup=1, clock=clock, turn_ms=0.0)
        orders.append([taken for taken, _ in clock.turns[5:]])
    assert orders[0] == orders[1]
    before = Counter(pairwise(orders[0]))
    for a, b in permutations(range(1, 6), 2):
        assert before[float(a), float(b)] <= 10, (a, b)


def test_long_functions_are_called_often_enough() -> None:
    clock = Scripted()

    found = interleaved({"a": lambda: 500.0}, rounds=2, warmup=1, clock=clock, least_calls=3)

    assert [calls for _, calls in clock.turns] == [1, 3, 3]
    assert found["a"].calls == 3


def test_a_timing_is_of_its_rounds() -> None:
    found = Timing.of([4.0, 1.0, 2.0, 3.0, 100.0], calls=7)

    assert (found.median_ms, found.fastest_ms, found.slowest_ms) == (3.0, 1.0, 100.0)
    assert (found.iqr_ms, found.rounds, found.calls) == (2.0, 5, 7)
    assert Timing.of([4.0], calls=1).iqr_ms == 0.0


def test_warmup_is_not_timed() -> None:
    calls: list[int] = []

    interleaved({"a": lambda: calls.append(1)}, rounds=3, warmup=5, clock=host_clock, turn_ms=0.0)

    assert len(calls) == 5 + 3


def test_nothing_to_time() -> None:
    assert interleaved({}, rounds=2, clock=host_clock) == {}


def test_calls_have_a_limit() -> None:
    found = interleaved({"a": lambda: None}, rounds=1, clock=lambda _, calls: [1e-9] * calls)

    assert found["a"].calls == MOST_CALLS


@pytest.mark.parametrize("calls", [1, 4])
def test_host_clock_times_each_call(calls: int) -> None:
    assert len(host_clock(lambda: None, calls)) == calls


def test_gpu_clock_puts_events_around_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(done)
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(measure, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))

    times = measure.CudaClock("cpu")(lambda: done.append("call"), 3)

    assert times == [2.0] * 3
    assert done == ["event", "call", "event"] * 3 + ["wait"]
