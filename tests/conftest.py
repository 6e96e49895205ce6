"""Shared fixtures. Every test runs on the CPU with one thread a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from flashtile.testing import blocks

if not torch.cuda.is_available():
    # Triton asks when it is first imported: its kernels run in its interpreter (tests/kernels).
    # A test that compiles for a GPU that is not there does so in a process without this variable.
    os.environ.setdefault("TRITON_INTERPRET", "1")
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
