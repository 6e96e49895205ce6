"""Timing in interleaved rounds, and the record of where a figure comes from."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import flashtile

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def interleaved(
    providers: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest time of each provider in milliseconds.

    Providers take turns within a round, so that a slow spell of the machine falls on all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    for i in range(warmup + rounds):
        for name, run in providers.items():
            start = time.perf_counter()
            run()
            took = (time.perf_counter() - start) * 1e3
            if i >= warmup:
                times[name].append(took)
    return {
        name: {
            "median_ms": statistics.median(t),
            "fastest_ms": min(t),
            "slowest_ms": max(t),
            "rounds": rounds,
        }
        for name, t in times.items()
    }


def write(
    suite: str, rows: list[dict[str, Any]], environment: dict[str, Any], device: str = "cpu"
) -> Path:
    """Write results/<device>/<suite>.json with the environment as it was before the run."""
    path = RESULTS / device / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"suite": suite, "environment": environment, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def read(suite: str, device: str = "cpu") -> dict[str, Any]:
    return json.loads((RESULTS / device / f"{suite}.json").read_text())


def environment() -> dict[str, Any]:
    """What a figure depends on. `dirty` is true where src differs from the commit."""
    changes = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(changes),
        "flashtile": flashtile.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
