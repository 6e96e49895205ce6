"""`flashtile info`: versions, devices, backends and caches."""

from __future__ import annotations

import getpass
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

from flashtile import __version__
from flashtile.cli.devices import describe
from flashtile.plan import Device, backends

TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")


def info_table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (*_versions(), *_devices(), *_caches()):
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def _versions() -> Iterator[tuple[str, str]]:
    yield "flashtile", __version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", torch.__version__
    yield "triton", next(_installed(TRITON_DISTRIBUTIONS), "not installed")


def _installed(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        try:
            yield metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _devices() -> Iterator[tuple[str, str]]:
    """Each device, and what each backend says about it."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in (*found, torch.device("cpu")):
        yield str(device), describe(device)
        for name, why_not in backends(Device.of(device)):
            yield f"  {name}", "[green]runs[/green]" if why_not is None else f"no: {why_not}"


def _caches() -> Iterator[tuple[str, str]]:
    """Where compiled kernels are kept."""
    for name, folder in (("triton cache", triton_cache()), ("inductor cache", inductor_cache())):
        yield name, f"{folder}" if folder.is_dir() else f"{folder} (not there yet)"


def triton_cache() -> Path:
    """As triton.knobs has it; triton itself is slow to import and may be absent."""
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    return Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))


def inductor_cache() -> Path:
    """As torch._inductor has it, whose import takes two seconds."""
    try:
        name = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user without a name
        name = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    user = re.sub(r'[\\/:*?"<>|]', "_", name)
    default = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default))
