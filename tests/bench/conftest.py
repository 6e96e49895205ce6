"""Small problems of the benchmark suites, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtile.bench.options import Options


@pytest.fixture
def lines() -> list[str]:
    """What a run has shown."""
    return []


@pytest.fixture
def options(tmp_path: Path, lines: list[str]) -> Callable[..., Options]:
    """Options of a run that takes a second."""

    def make(**changes: object) -> Options:
        small: dict[str, object] = {
            "rounds": 1, "tokens": 64, "hidden": 128, "head_dims": (64,), "show": lines.append,
            "providers": ("flashtile", "math"), "commit": "a" * 40,
        }  # fmt: skip
        return Options(tmp_path, torch.device("cpu"), **(small | changes))  # type: ignore[arg-type]

    return make
