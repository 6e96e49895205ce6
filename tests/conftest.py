"""Shared fixtures. Every test runs on the CPU with one thread a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from flashtile.testing import blocks

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers of two spinning OpenMP threads on two cores take ten times as long.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Many small blocks: the loops at every boundary."""
    with blocks.small_blocks():
        yield
