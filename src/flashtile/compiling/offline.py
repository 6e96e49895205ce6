"""Compile a launch for an architecture that is not here, and read what came out.

Triton asks its driver for the target and for nothing else until a kernel is loaded, so a driver
that names a target is all that cross-compilation takes.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from flashtile.backends.jitcache import settle_keys
from flashtile.backends.launch import Launch
from flashtile.compiling.launches import tile_of
from flashtile.compiling.record import Record

MATRIX = (
    ("UTCMMA", r"tcgen05\.mma"),
    ("HGMMA", r"wgmma\.mma_async"),
    ("HMMA", r"mma\.sync"),
    ("MFMA", r"v_mfma"),
)
"""Matrix instructions by their assembly, the newest first."""


class OfflineDriver:
    """A driver of a GPU that is not here. Triton keeps kernels by device, so each is another."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture, and its warps: 64 wide on AMD's data-centre GPUs."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_launch(launch: Launch, arch: str) -> tuple[Any, str]:
    """(Triton's compiled kernel, what ptxas said), for an architecture that need not be here."""
    settle_keys()
    log = io.StringIO()
    driver.set_active(OfflineDriver(arch))
    with contextlib.redirect_stdout(log):
        kernel = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    return kernel, log.getvalue()


def record(launch: Launch, arch: str, case: str, dtype: str) -> Record:
    """Compile a launch and describe the result, or the reason for there being none."""
    tile = tile_of(launch)
    edges: tuple[int, int] = (tile.block_m, tile.block_n) if tile else (0, 0)
    start = time.perf_counter()
    settings: dict[str, Any] = {}
    try:
        settings = _measured(*compile_launch(launch, arch))
    except Exception as wrong:  # whatever a compiler raises is the record
        settings["error"] = next(iter(str(wrong).strip().splitlines()), type(wrong).__name__)
    return Record(
        arch, launch.kernel.__name__, case, dtype, *edges, launch.num_warps, launch.num_stages,
        time.perf_counter() - start, **settings,
    )  # fmt: skip


def _measured(kernel: Any, log: str) -> dict[str, Any]:
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    if "amdgcn" in kernel.asm:
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    else:
        registers = _number(r"Used (\d+) registers", log)
        spills = _number(r"(\d+) bytes spill stores", log)
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": kernel.metadata.shared,
        "tensor_columns": getattr(kernel.metadata, "tmem_size", None) or 0,
        "matrix": next((name for name, pattern in MATRIX if re.search(pattern, text)), ""),
        "warnings": tuple(re.findall(r"\((C75\d\d)\)", log)),
    }


def _number(pattern: str, text: str) -> int:
    """The largest number that a pattern finds."""
    return max(map(int, re.findall(pattern, text)), default=0)
