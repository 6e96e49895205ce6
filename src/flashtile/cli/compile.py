"""`flashtile compile`: every kernel for GPUs that need not be here, and what it needs of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashtile.cli.info import triton_cache
from flashtile.compiling.cases import device_cases, every_case
from flashtile.compiling.pool import InterpreterError, Job, compile_jobs, jobs
from flashtile.compiling.record import Record, faults
from flashtile.plan import Device
from flashtile.tiles import SHARED_LIMIT

ARCHITECTURES = ("sm_90", "sm_80", "sm_86", "sm_100", "gfx942")
"""H100 and H200, A100, RTX 30, B200, MI300X: one for each kind of matrix instruction and memory."""

LOG_EVERY = 50
"""Kernels between lines of progress where the output is a log."""

WIDTH = 132
"""Characters of the table, also where the output is a file."""


def wanted_jobs(archs: Sequence[str], match: str, for_device: bool = False) -> list[Job]:
    """The kernels whose calls and names contain `match`. for_device: of common calls too."""
    if find_spec("triton") is None:
        raise typer.BadParameter("triton is not installed; it is what compiles the kernels")
    for arch in archs:
        if arch not in SHARED_LIMIT:
            known = ", ".join(SHARED_LIMIT)
            raise typer.BadParameter(f"{arch!r} is not one of {known}", param_hint="--arch")
    try:
        every = jobs(archs, device_cases() if for_device else every_case())
    except InterpreterError as wrong:
        raise typer.BadParameter(str(wrong)) from wrong
    found = [job for job in every if match in str(job)]
    if not found:
        names = "; ".join(sorted({str(job) for job in every}))
        raise typer.BadParameter(f"{match!r} is in none of: {names}", param_hint="--match")
    return found


def device_arch() -> str:
    """The architecture of the GPU that is here."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no cuda device here", param_hint="--for-device")
    return Device.of(torch.device("cuda", torch.cuda.current_device())).arch


def compile_all(wanted: Sequence[Job], workers: int, keep: bool) -> list[Record]:
    """The records in the order of the cases. keep: in Triton's own cache, else nowhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    found: list[Record] = []
    console = Console(stderr=True)
    with ExitStack() as stack:
        folder = None if keep else stack.enter_context(tempfile.TemporaryDirectory())
        bar = stack.enter_context(Progress(*columns, console=console))
        task = bar.add_task("compiling", total=len(wanted))
        for record in compile_jobs(wanted, folder, workers):
            found.append(record)
            bar.update(task, advance=1, description=f"{record.arch} {record.case}")
            if not console.is_terminal and len(found) % LOG_EVERY == 0:  # nor is there a bar
                console.print(f"{len(found)} of {len(wanted)} kernels", highlight=False)
    order = {str(case): place for place, case in reversed(list(enumerate(device_cases())))}
    return sorted(found, key=lambda r: (r.arch, order[r.case], r.kernel))


def summary(records: Sequence[Record]) -> str:
    """What was compiled into Triton's cache, where kernels that were there are not measured."""
    lines = [f"{r.case} {r.kernel}: {'; '.join(faults(r))}" for r in records if faults(r)]
    good = f"{len(records) - len(lines)} of {len(records)} kernels for {records[0].arch}"
    return "\n".join([*lines, f"{good} are in {triton_cache()}"])


def as_json(records: Sequence[Record]) -> str:
    return json.dumps([asdict(r) | {"faults": faults(r)} for r in records], indent=2)


def as_table(records: Sequence[Record]) -> Table:
    """Tiles are queries x keys, `w` warps and `s` pipeline stages."""
    table = Table(box=None, pad_edge=False)
    for name in ("arch", "case", "kernel", "tile", "w", "s"):
        table.add_column(name, no_wrap=True)
    for name in ("registers", "spilled", "shared"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("matrix", no_wrap=True)
    table.add_column("faults", style="red", min_width=20)
    for r in records:
        kernel = r.kernel.removeprefix("attention_")
        tile = f"{r.block_q} x {r.block_k}" if r.block_q else ""
        archs = " ".join((r.arch, *r.also))
        table.add_row(
            archs, r.case, kernel, tile, str(r.num_warps), str(r.num_stages), str(r.registers),
            f"{r.spill_bytes:,}", f"{r.shared_bytes:,}", r.matrix, "; ".join(faults(r)),
        )  # fmt: skip
    return table
