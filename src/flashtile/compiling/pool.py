"""Compiling in parallel: processes of their own, since a compiler's crash ends its process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from flashtile.compiling.cases import Case
from flashtile.compiling.record import Record


class Job(NamedTuple):
    """One kernel to compile. Launches hold functions, which do not pickle: a job names one."""

    arch: str
    case: Case
    place: int  # in `launches(case, arch)`
    kernel: str

    def __str__(self) -> str:
        return f"{self.case} {self.kernel}"


def jobs(archs: Sequence[str], cases: Sequence[Case]) -> list[Job]:
    """Every kernel of the cases once for each architecture, those that take longest first."""
    from triton import knobs  # noqa: PLC0415, triton is optional

    from flashtile.compiling.launches import launches, signature, tiling  # noqa: PLC0415

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    found: dict[tuple[str, str], Job] = {}
    tiles = set()
    for arch in archs:
        for case in cases:
            for place, launch in enumerate(launches(case, arch)):
                tile = arch, case.dtype, *tiling(launch)
                job = Job(arch, case, place, launch.kernel.__name__)
                seen = case.new_tiles and tile in tiles
                if not seen and case.kernel in ("", job.kernel):
                    found.setdefault((_machine(job), signature(launch)), job)
                tiles.add(tile)
    return sorted(found.values(), key=_weight, reverse=True)


def _machine(job: Job) -> str:
    """fp32 products are FMAs, which NVIDIA's architectures share: the first of those asked for
    stands for all that have the same tile. They take a third of an architecture's time."""
    fma = job.case.dtype == "float32" and job.arch.startswith("sm_")
    return "sm" if fma else job.arch


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
    return record(launch, job.arch, str(job.case), job.case.dtype)


def _compile_alone(job: Job, cache: str | None) -> Record:
    """In a process that no other job's crash can end."""
    with _pool(1, cache) as pool:
        try:
            return pool.submit(compile_job, job).result()
        except BrokenProcessPool:
            return Record(
                job.arch, job.kernel, str(job.case), job.case.dtype, 0, 0, 0, 0,
                error="the compiler crashed",
            )  # fmt: skip
