"""Results as JSON, with what they depend on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import flashtile

PACKAGE = Path(flashtile.__file__).parent

IDENTITY = ("dtype", "feature", "path", "batch", "seqlen", "heads", "kv_heads", "head_dim", "mode")
"""What tells a row of a suite from another."""

CONDITIONS = ("commit", "dirty", "torch", "triton", "gpu", "driver", "cuda", "cpu", "capability",
              "threads")  # fmt: skip
"""What rows of one file have in common."""


def folder(device: torch.device) -> str:
    """The folder of a device's results: cpu, h200, a100-sxm4-80gb, ..."""
    if device.type != "cuda":
        return device.type
    return slug(torch.cuda.get_device_name(device))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def read(path: Path) -> dict[str, Any] | None:
    """A suite's document, or None where it has not been run."""
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, rows: Iterable[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write a suite's rows, beside those that the file has from the same code and device.

    A suite may thus be run in parts. Rows of a changed tree, whose code nobody can look up, are
    not kept beside others.
    """
    rows = list(rows)
    old = read(path)
    same = old is not None and _conditions(old["environment"]) == _conditions(environment)
    if old is not None and same and not environment["dirty"]:
        new = {_identity(row) for row in rows}
        rows = [row for row in old["rows"] if _identity(row) not in new] + rows
    document = {"suite": path.stem, "environment": environment, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a cut file would end every later run
    try:
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in IDENTITY)


def _conditions(environment: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(environment.get(name) for name in CONDITIONS)


def environment(device: torch.device, commit: str = "") -> dict[str, Any]:
    """What a figure depends on. `dirty` is true where the code differs from the commit.

    `commit` is for a copy without a repository: what `git describe --always --dirty --abbrev=40
    --exclude '*'` says where it was copied from.
    """
    described = commit or _describe()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": described.removesuffix("-dirty"),
        "dirty": described.endswith("-dirty") or not described,
        "flashtile": flashtile.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **(_gpu(device) if device.type == "cuda" else {}),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.splitlines()[0] if driver else "",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": import_module("triton").__version__ if find_spec("triton") else "",
    }


def _describe() -> str:
    """The commit of this package's own repository, with -dirty where the package has changed."""
    if not _run("git", "-C", str(PACKAGE), "ls-files", "__init__.py"):
        return ""
    commit = _run("git", "-C", str(PACKAGE), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(PACKAGE), "status", "--porcelain", "--", ".")
    return f"{commit}-dirty" if changes else commit


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
