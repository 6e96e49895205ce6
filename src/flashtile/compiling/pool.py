"""Compiling in parallel: processes of their own, since a compiler's crash ends its process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from flashtile.compiling.cases import Case
from flashtile.compiling.record import Record

if TYPE_CHECKING:
    from flashtile.backends.launch import Launch


class InterpreterError(RuntimeError):
    """Triton runs kernels in its interpreter."""


class Job(NamedTuple):
    """One kernel to compile. Launches hold functions, which do not pickle: a job names one."""

    arch: str
    case: Case
    place: int  # in `launches(case, arch)`
    kernel: str
    also: tuple[str, ...] = ()  # architectures that get the same code

    def __str__(self) -> str:
        return f"{self.case} {self.kernel}"


def jobs(archs: Sequence[str], cases: Sequence[Case]) -> list[Job]:
    """Every kernel of the cases once for each kind of machine, those that take longest first.

    Of what two architectures share the first is compiled; the second adds the tiles that it has
    for itself, with the first of the cases that has them. A tile is not new for narrower head dims,
    which need less of everything.
    """
    from triton import knobs  # noqa: PLC0415, triton is optional

    from flashtile.compiling.launches import launches, signature  # noqa: PLC0415

    if knobs.runtime.interpret:
        raise InterpreterError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    found: dict[tuple[str, str], Job] = {}
    owners: dict[str, str] = {}
    widest: dict[tuple[Any, ...], int] = {}
    for arch in archs:
        for case in (case for case in cases if case.only in ("", arch)):
            for place, launch in enumerate(launches(case, arch)):
                job = Job(arch, case, place, launch.kernel.__name__)
                if case.kernels and job.kernel not in case.kernels:
                    continue
                machine, (tile, dims) = machine_of(job), tile_of(job, launch)
                owner, key = owners.setdefault(machine, arch), (machine, signature(launch))
                same, new = found.get(key), dims > widest.get(tile, -1)
                if same is not None and arch not in (same.arch, *same.also):
                    found[key] = same._replace(also=(*same.also, arch))
                elif same is None and (new or (arch == owner and not case.new_tiles)):
                    found[key] = job
                widest[tile] = max(dims, widest.get(tile, -1))
    return sorted(found.values(), key=_weight, reverse=True)


def tile_of(job: Job, launch: Launch) -> tuple[tuple[Any, ...], int]:
    """(what a kernel's tile is a choice for, its head dims): both 16-bit dtypes have the same."""
    from flashtile.compiling.launches import tiling  # noqa: PLC0415

    tile, dims = tiling(launch)
    return (machine_of(job), job.case.dtype == "float32", *tile), dims


def machine_of(job: Job) -> str:
    """A name for all architectures that a kernel's code is the same on: sm_80, sm_86 and sm_89 have
    one set of instructions, and fp32 products are FMAs on all of NVIDIA's. What does not multiply
    is not shared: prepare at head_dim 512 has 90 registers on sm_90, 255 and spills on sm_100."""
    if job.arch.startswith("sm_") and job.case.dtype == "float32":
        return "sm"
    return "sm_8x" if job.arch.startswith("sm_8") else job.arch


def _weight(job: Job) -> tuple[bool, bool, int]:
    """fp32 products are unrolled into FMAs: 5 s a kernel where 16-bit ones take 2."""
    heavy = job.kernel.startswith("attention_")
    return heavy, job.case.dtype == "float32", job.case.head_dim + job.case.head_dim_v


def compile_jobs(jobs: Sequence[Job], cache: str | None, workers: int = 0) -> Iterator[Record]:
    """The records of the jobs, as they are done.

    cache: the folder that compiled kernels go to, and which is not read; None reads and writes
    Triton's own. workers: processes, 0 for one a CPU.
    """
    crashed = []
    with _pool(workers or _cpus(), cache) as pool:
        futures: dict[Future[Record], Job] = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                crashed.append(futures[future])
    for job in crashed:
        yield _compile_alone(job, cache)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(workers: int, cache: str | None) -> ProcessPoolExecutor:
    """Spawned, not forked: a fork of a process that holds CUDA or LLVM threads is not usable."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(cache,))


def _start(cache: str | None) -> None:
    from triton import knobs  # noqa: PLC0415

    if knobs.compilation.store_binary_only:  # what is kept already has no assembly to be read
        knobs.compilation.store_binary_only, knobs.compilation.always_compile = False, True
    if cache is not None:
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True  # takes 8% of the time
        knobs.nvidia.dump_ptxas_log = True


def compile_job(job: Job) -> Record:
    """Compile in this process."""
    from flashtile.compiling.launches import launches  # noqa: PLC0415
    from flashtile.compiling.offline import record  # noqa: PLC0415

    launch = launches(job.case, job.arch)[job.place]
    return replace(record(launch, job.arch, str(job.case), job.case.dtype), also=job.also)


def _compile_alone(job: Job, cache: str | None) -> Record:
    """In a process that no other job's crash can end."""
    with _pool(1, cache) as pool:
        try:
            return pool.submit(compile_job, job).result()
        except BrokenProcessPool:
            return Record(
                job.arch, job.kernel, str(job.case), job.case.dtype, 0, 0, 0, 0,
                also=job.also, error="the compiler crashed",
            )  # fmt: skip
