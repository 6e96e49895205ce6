"""Counters that launches find cleared."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends import counters


def test_counters_belong_to_a_stream_or_to_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made by another thread: where this one allocates, in the pool of a graph that
    torch.compile warms up for, nothing may stay."""
    spare, late = [torch.zeros(2) for _ in range(4)], torch.zeros(2)
    now, makers = {"capturing": True, "stream": 5}, []

    def clear(device: int, count: int) -> list[Tensor]:
        makers.append(threading.get_ident())
        return list(spare)

    def counter(**changes: Any) -> int:
        now.update(changes)
        return int(counters.counters("cuda", 0, 2).data_ptr())

    for name, new in (("_clear", clear), ("_of_stream", {}), ("_spare", {})):
        monkeypatch.setattr(counters, name, new)
    for name, key in (("isCurrentStreamCapturing", "capturing"), ("getCurrentRawStream", "stream")):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *_, key=key: now[key], raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: late)

    assert counter() == late.data_ptr()  # a graph before any launch clears its own
    first = counter(capturing=False)
    assert counter() == first
    found = {first, counter(stream=6), counter(capturing=True), counter()}
    assert found == {x.data_ptr() for x in spare}
    assert counter() == late.data_ptr()
    assert counter(capturing=False, stream=5) == first
    assert len(makers) == 1
    assert makers[0] != threading.get_ident()
