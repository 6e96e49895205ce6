"""How much memory a call may still take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")

CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""A container's limit and use: it sees its host's memory, and is killed at its own limit."""

UNKNOWN = 4 * 2**30
"""Assumed where the system says nothing."""


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated without swapping, or on a GPU at all."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min([_system_bytes(), *_container_bytes()])


def _system_bytes() -> int:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    try:  # macOS counts no available memory: half of it all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError):
        return UNKNOWN


def _reclaimable_bytes(stat: Path) -> int:
    """Of files that a container has read: they count as its use, and are given up for a call."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    found = dict(line.split() for line in lines)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _container_bytes() -> list[int]:
    left = []
    for limit, used in CGROUPS:
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            in_use = int(used.read_text()) - _reclaimable_bytes(used.with_name("memory.stat"))
            left.append(max(0, int(limit.read_text()) - in_use))
    return left
