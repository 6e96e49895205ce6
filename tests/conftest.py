"""Shared fixtures. Every test runs on the CPU with one thread a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from flashtile import plan
from flashtile.backends import aten

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers of two spinning OpenMP threads on two cores take ten times as long.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many small blocks, and never torch's own kernel: the loops at every boundary."""
    monkeypatch.setattr(plan, "BLOCK", 16)
    monkeypatch.setattr(plan, "BLOCK_ELEMENTS", 16 * 16 * 4)
    monkeypatch.setattr(aten, "can", lambda call, segment: False)
    plan.plan.cache_clear()
    yield
    plan.plan.cache_clear()
