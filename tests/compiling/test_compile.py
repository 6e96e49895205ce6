"""`flashtile compile`, for GPUs that are not here: in processes whose Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashtile.cli import compile as compiling
from flashtile.cli.app import app
from flashtile.compiling.cases import FEATURES, VARIANTS, Case, build, device_cases, every_case
from flashtile.compiling.pool import Job, machine_of
from flashtile.compiling.record import Record
from flashtile.decode_tiles import decode_config, shared_bytes
from flashtile.plan import Device, plan
from flashtile.problem import describe
from flashtile.tiles import KernelConfig

pytest.importorskip("triton")

COMPOSITION = """
from typing import Any, NamedTuple
import torch, triton, triton.language as tl
from triton.runtime.driver import driver
from flashtile.compiling.offline import OfflineDriver

class Mod(NamedTuple):
    fn: Any

def scale_by(number):
    factor = tl.constexpr(number)
    @triton.jit
    def scale(x):
        return x * factor
    return scale

@triton.jit
def plain(x, mod):
    tl.store(x, mod.fn(tl.load(x)))

@triton.jit
def constant(x, mod: tl.constexpr):
    tl.store(x, mod.fn(tl.load(x)))

def assembly(kernel, number):
    kernel.device_caches.clear()
    x = torch.empty(16, device="meta")
    return kernel.warmup(x, Mod(scale_by(number)), grid=(1,)).asm["ptx"]

driver.set_active(OfflineDriver("sm_90"))
for kernel in (plain, constant):
    print(assembly(kernel, 2.0) == assembly(kernel, 3.0))
"""


def _run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=300,
        env=environment,
    )  # fmt: skip


def test_functions_are_part_of_what_a_kernel_is(tmp_path: Path) -> None:
    """A function in a plain NamedTuple is; in a constexpr one Triton 3.6 to 3.9 hash its name, and
    reuse the kernel of another function with that name. The kernels must not pass any that way."""
    program = tmp_path / "program.py"
    program.write_text(COMPOSITION)
    done = _run(tmp_path, str(program))

    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_call_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """With Triton set to keep no assembly too, which is read here."""
    archs = ("--arch", "sm_90", "--arch", "gfx942")
    done = _run(
        tmp_path, "-m", "flashtile", "compile", *archs, "--match", "paged float16 128 attention_f",
        "--json", "--workers", "1", TRITON_STORE_BINARY_ONLY="1",
    )  # fmt: skip
    found = json.loads(done.stdout)

    assert {r["arch"]: (r["kernel"], r["matrix"]) for r in found} == {
        "sm_90": ("attention_forward", "HGMMA"),
        "gfx942": ("attention_forward", "MFMA"),
    }
    for record in found:
        assert record["also"] == []
        assert set(record) == {field.name for field in fields(Record)} | {"faults"}
        assert record["case"] == "paged float16 128"
        assert 32 < record["registers"] <= 512
        assert record["shared_bytes"] > 0
        assert record["error"] == ""
    assert done.returncode == int(any(r["faults"] for r in found)), done.stderr
    assert not (tmp_path / "cache").exists()


def test_registers_of_a_tile_are_bounded(tmp_path: Path) -> None:
    """Without the bound dQ takes 209 here, and two blocks fit where three do."""
    done = _run(
        tmp_path, "-m", "flashtile", "compile", "--arch", "sm_90", "--match",
        "scores bfloat16 64 attention_backward_dq", "--json", "--workers", "1",
    )  # fmt: skip
    found = {r["case"]: r for r in json.loads(done.stdout)}["scores bfloat16 64"]

    assert 3 * found["registers"] * 32 * found["num_warps"] <= 65_536
    assert found["spill_bytes"] <= 32


PREFIX = """
from dataclasses import replace
import torch
from flashtile.backends import decode
from flashtile.compiling.cases import Case, build
from flashtile.compiling.offline import compile_launch
from flashtile.plan import Device, plan
from flashtile.problem import describe

call = build(Case("decode", "bfloat16", 128, 128))
chosen = plan(replace(describe(call), device="cuda"), Device("cuda", "sm_90", True))
out, lse = torch.empty_like(call.operands.q), torch.empty(call.lse_shape, device="meta")
cut = call._replace(variant=call.variant._replace(num_splits=2))
for given in (call, cut):
    for launch in decode.launches(given, chosen, out, lse, (out.float(), lse)):
        print(compile_launch(launch, "sm_90")[0].metadata.name)
"""


def test_decoding_after_a_prefix_compiles(tmp_path: Path) -> None:
    """No call has one by itself, so that no case does. Parts that are given are merged in a launch
    of their own."""
    program = tmp_path / "program.py"
    program.write_text(PREFIX)
    done = _run(tmp_path, str(program))

    both = ["attention_decode", "combine_parts"]
    assert done.stdout.split() == [both[0], *both], done.stderr


WIDE_BOUNDS = """
import torch, triton, triton.language as tl
from flashtile import MaskFunction
from flashtile.compiling import cases
from flashtile.compiling.launches import launches
from flashtile.compiling.offline import compile_launch
from flashtile.kernels.masks import Range

@triton.jit
def later(at, args):
    return at.k_idx >= tl.load(args[0] + at.batch)

@triton.jit
def bounds(first, last, q, k, args):
    start = tl.load(args[0] + q.batch)
    return Range(start * 0, start * 0, start, start + 2**30)

starts = torch.empty(cases.BATCH, dtype=torch.int64, device="meta")
mask_mod = MaskFunction(later, (starts,), bounds, bounds)
cases.VARIANTS["wide"] = lambda: {"mask_mod": mask_mod} | cases.VARIANTS["packed"]()
cases.VARIANTS["same"] = lambda: {"deterministic": True} | cases.VARIANTS["wide"]()
modules = "flashtile.kernels.hopper", "flashtile.kernels.blocks"
for variant in ("wide", "same"):
    for launch in launches(cases.Case(variant, "bfloat16", 128, 128), "sm_90"):
        if launch.kernel.__module__.startswith(modules):
            print(compile_launch(launch, "sm_90")[0].metadata.name)
"""


def test_bounds_of_users_may_be_of_64_bits(tmp_path: Path) -> None:
    """As those that follow from an int64 tensor are: a tile's numbers have 32."""
    program = tmp_path / "program.py"
    program.write_text(WIDE_BOUNDS)
    done = _run(tmp_path, str(program))

    backward = "prepare_backward attention_backward finish_query_gradient"
    wanted = f"attention_forward {backward} "
    wanted += f"attention_forward bound_keys {backward} query_gradients_again"
    assert done.stdout.split() == wanted.split(), done.stderr[-3000:]


def test_decoding_over_pages_has_its_blocks_on_their_way(tmp_path: Path) -> None:
    """Triton makes one block of stages that a table, read in the loop, leads to the values of."""
    case = Case("decode-e4m3", "bfloat16", 128, 128)
    match = f"{case} attention_decode"
    done = _run(
        tmp_path, "-m", "flashtile", "compile", "--arch", "sm_90", "--match", match, "--json",
        "--workers", "1",
    )  # fmt: skip
    found = json.loads(done.stdout)
    problem = replace(describe(build(case)), device="cuda")

    assert len(found) == 1, done.stderr
    assert found[0]["shared_bytes"] >= shared_bytes(decode_config("sm_90", problem), problem)


def test_faults_exit_with_1_and_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = Record(
        "sm_80", "attention_forward", "causal bfloat16 64", "bfloat16", 128, 64, 4, 3,
        registers=255, spill_bytes=716, shared_bytes=65_536, matrix="HMMA",
    )  # fmt: skip
    found: list[Record] = []
    monkeypatch.setattr(compiling, "wanted_jobs", lambda archs, match, for_device: [])
    monkeypatch.setattr(compiling, "compile_jobs", lambda jobs, folder, workers: iter(found))

    assert CliRunner().invoke(app, ["compile"]).exit_code == 0
    found.append(spilling)
    done = CliRunner().invoke(app, ["compile"], env={"COLUMNS": "80", "TERM": "dumb"})

    assert done.exit_code == 1
    row = "sm_80 causal bfloat16 64 forward 128 x 64 4 3 255 716 65,536 HMMA spills 716 bytes,"
    assert row in " ".join(done.stdout.split())


def test_for_the_device_that_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernels go where calls look for them; those that were there have no ptxas log."""
    good = Record("sm_90", "attention_forward", "paged float16 128", "float16", 128, 64, 8, 3,
                  shared_bytes=98_560, matrix="HGMMA")  # fmt: skip
    found = [good]
    folders = []

    def compile_jobs(jobs: list[Job], folder: str | None, workers: int) -> list[Record]:
        folders.append(folder)
        return found

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "device_arch", lambda: "sm_90")
    monkeypatch.setattr(compiling, "wanted_jobs", lambda archs, match, for_device: [])
    monkeypatch.setattr(compiling, "compile_jobs", compile_jobs)
    done = CliRunner().invoke(app, ["compile", "--for-device"])

    assert done.exit_code == 0
    assert done.stdout == f"1 of 1 kernels for sm_90 are in {tmp_path}\n"
    assert folders == [None]
    found.append(replace(good, error="out of memory"))
    done = CliRunner().invoke(app, ["compile", "--for-device"])

    assert done.exit_code == 1
    assert "paged float16 128 attention_forward: does not compile: out of memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_12"), "'sm_12' is not one of sm_80, sm_86"),
        (("--match", "nothing"), "'nothing' is in none of: documents bfloat16 128 kernel"),
        (("--for-device", "--arch", "sm_90"), "--for-device chooses the architecture"),
        (("--for-device",), "torch finds no cuda device here"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiling, "jobs", lambda archs, cases: [Job("", cases[0], 0, "kernel")])
    done = CliRunner().invoke(app, ["compile", *arguments], env={"COLUMNS": "200"})

    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, ["compile"], env={"COLUMNS": "200"})

    assert done.exit_code == 2
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing" in done.output


def test_the_cases_cover_every_feature() -> None:
    assert {case.variant for case in every_case()} == set(VARIANTS)


@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_cases_cover_every_tile(arch: str, dtype: str) -> None:
    """fp16 has bf16's tiles, and its instructions but for the type."""
    cases = [c for c in every_case() if (c.dtype == "float32") == (dtype == "float32")]
    covered = set().union(*(_tiles(case, arch) for case in cases))
    for dim in range(8, 513, 8):
        for variant in ("full", "causal", "scores", "bias", "dropout", "masked dropout"):
            assert _tiles(Case(variant, dtype, dim, dim), arch) <= covered, (dim, variant)


COVERAGE = """
import json, sys
from flashtile.cli.compile import ARCHITECTURES
from flashtile.compiling.cases import every_case
from flashtile.compiling.launches import launches
from flashtile.compiling.pool import Job, jobs, tile_of

wanted = jobs(ARCHITECTURES, every_case())
widest = {}
for j in wanted:
    tile, dims = tile_of(j, launches(j.case, j.arch)[j.place])
    widest[tile] = max(dims, widest.get(tile, 0))
missing = []
for arch in ARCHITECTURES:
    for case in (case for case in every_case() if case.only in ("", arch)):
        for place, launch in enumerate(launches(case, arch)):
            job = Job(arch, case, place, launch.kernel.__name__)
            tile, dims = tile_of(job, launch)
            if widest.get(tile, -1) < dims:
                missing.append(str(job))
kernels = {}
for j in wanted:
    kernels.setdefault(j.arch, []).append(str(j))
print(json.dumps({"missing": missing, "kernels": kernels, "count": len(wanted)}))
"""


def test_every_tile_is_compiled_for_every_kind_of_machine(tmp_path: Path) -> None:
    """What is left out has the tile of another kernel that is compiled for the same machines, with
    head dims as wide; every feature is in every kernel on Hopper, in one of them elsewhere."""
    program = tmp_path / "program.py"
    program.write_text(COVERAGE)
    done = _run(tmp_path, str(program))
    found = json.loads(done.stdout)

    assert found["missing"] == []
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        features = {case.variant for case in every_case()
                    if not case.new_tiles and case.only in ("", arch)}  # fmt: skip
        for feature in features:
            assert any(name.startswith(f"{feature} ") for name in found["kernels"][arch]), feature
    assert found["count"] < 255  # 2.3 CPU seconds each, and CI has 15 minutes for all it does
    single = [name for name in found["kernels"]["sm_90"] if "float32" in name]  # all of NVIDIA's
    assert "causal float32 512 attention_backward_dq" in single
    assert "causal float32 256 attention_backward_dq" not in single  # the same 16 x 16
    assert "causal float32 256 attention_forward" in single  # 16 x 32 where 512 has 16 x 16
    for arch, least in (("sm_90", 2), ("sm_80", 1), ("sm_100", 1), ("gfx942", 1)):
        for name, _, _ in FEATURES:
            backward = {kernel.rpartition("_")[2] for kernel in found["kernels"][arch]
                        if kernel.startswith(f"{name} ")} & {"dq", "dkdv"}  # fmt: skip
            assert len(backward) >= least, (arch, name)


SPECIALISATION = """
import torch
from triton.runtime.driver import driver
from flashtile.compiling import cases
from flashtile.compiling.launches import launches
from flashtile.compiling.offline import OfflineDriver

driver.set_active(OfflineDriver("sm_90"))
sizes = ("BATCH", "TOKENS", "HEADS", "KV_HEADS")

def keys(variant, numbers):
    for name, number in zip(sizes, numbers):
        setattr(cases, name, number)
    found = []
    for launch in launches(cases.Case(variant, "bfloat16", 64, 64, tokens=numbers[1]), "sm_90"):
        bind = launch.kernel.device_caches["sm_90"][4]
        _, key, _ = bind(*launch.arguments, num_warps=launch.num_warps)
        found.append((launch.kernel.__name__, str(key)))
    return found

for variant in ("full", "causal", "scores", "dropout", "documents", "varlen"):
    offline = keys(variant, (2, 1024, 8, 2))
    on_meta, cases._meta = cases._meta, lambda *n, dtype=torch.float32: torch.zeros(n, dtype=dtype)
    # None so short that a causal backward on Hopper is another kernel.
    for numbers in ((3, 515, 4, 4), (1, 640, 6, 6), (5, 515, 3, 1), (1, 1601, 1, 1)):
        if keys(variant, numbers) != offline:
            print(variant, numbers)
    cases._meta = on_meta
"""


def test_kernels_are_compiled_for_what_calls_specialise_on(tmp_path: Path) -> None:
    """Tensors with memory, of other sizes, give the keys that tensors without give: what
    --for-device compiles is what calls look for."""
    program = tmp_path / "program.py"
    program.write_text(SPECIALISATION)
    done = _run(tmp_path, str(program))

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel", "machine"),
    [
        ("sm_80", "bfloat16", "attention_forward", "sm_8x"),
        ("sm_86", "float16", "attention_forward", "sm_8x"),
        ("sm_90", "bfloat16", "attention_forward", "sm_90"),
        ("sm_90", "float32", "attention_forward", "sm"),
        ("sm_86", "bfloat16", "prepare_backward", "sm_8x"),
        ("sm_100", "bfloat16", "prepare_backward", "sm_100"),
        ("gfx942", "float32", "prepare_backward", "gfx942"),
    ],
)
def test_what_shares_its_code(arch: str, dtype: str, kernel: str, machine: str) -> None:
    assert machine_of(Job(arch, Case("causal", dtype, 64, 64), 0, kernel)) == machine


def test_a_device_gets_what_calls_ask_for_most() -> None:
    common = {(case.variant, case.dtype, case.head_dim) for case in device_cases()}

    assert set(every_case()) <= set(device_cases())
    assert ("full", "float16", 96) in common and ("causal", "float16", 64) in common
    assert any(case.variant == "decode" and not case.only for case in device_cases())


def _tiles(case: Case, arch: str) -> set[tuple[str, KernelConfig]]:
    problem = replace(describe(build(case)), device="cuda")
    kernels = plan(problem, Device("cuda", arch, has_triton=True)).kernels
    if kernels is None:  # PyTorch's operators compute it
        return set()
    return {(field.name, getattr(kernels, field.name)) for field in fields(kernels)}
