"""The suites `memory` and `host`, the CPU's suites, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flashtile.bench import cpu, host, memory, run
from flashtile.bench.options import Options
from flashtile.bench.summary import cpu_line
from flashtile.cli.app import app

Make = Callable[..., Options]


def test_memory_grows_with_the_length(options: Make) -> None:
    rows = list(memory.measure(options(seqlens=(512, 1024))))

    assert [(row["path"], row["seqlen"]) for row in rows] == [
        (path, seqlen) for path in ("causal", "softcap") for seqlen in (512, 1024)
    ]
    assert rows[1]["flashtile_bytes"] < 3 * rows[0]["flashtile_bytes"]
    assert rows[1]["standard_bytes"] > 3 * rows[0]["standard_bytes"]


def test_quadratic_memory_is_not_run_to_the_end(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.SETTINGS, "cpu", memory.SETTINGS["cpu"]._replace(
        longest_quadratic=256))  # fmt: skip
    rows = list(memory.measure(options(seqlens=(256, 512))))
    assert [("standard_bytes" in row) for row in rows] == [True, False] * 2


def test_host_counts_a_hundred_calls(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CALLS", 3)
    rows = list(host.measure(options(providers=("flashtile", "math", "efficient"))))

    assert [row["mode"] for row in rows] == ["no_grad", "autograd"]
    for row in rows:
        found = row["providers"]
        assert 1.0 < found["flashtile"]["fastest_us"] <= found["flashtile"]["median_us"]
        assert found["efficient"].keys() == {"reason"} and "median_us" in found["math"]


def test_cpu_suite(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cpu.Cell(torch.float32, 32, name, keywords) for name, keywords in (
        ("causal", {}), ("dropout 0.1", {"dropout_p": 0.1}))]  # fmt: skip
    monkeypatch.setattr(cpu, "cells", lambda dtype: cells)
    rows = list(cpu.measure_float32(options()))

    assert [(row["peer"], row["flashtile"]["rounds"]) for row in rows] == [
        ("aten", 3),
        ("eager", 1),
    ]
    assert rows[0]["speedup"] > 0.0 and "causal" in cpu_line(rows[0])


def test_rows_are_written_as_they_come(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(options: Options) -> object:
        yield {"path": "causal", "seqlen": 1, "flashtile_bytes": 1}
        raise KeyboardInterrupt

    suite = run.SUITES["memory"]._replace(measure=measure)
    monkeypatch.setitem(run.SUITES, "memory", suite)
    asked = options()
    with pytest.raises(KeyboardInterrupt):
        run.run("memory", asked)

    assert len(json.loads((asked.output / "cpu" / "memory.json").read_text())["rows"]) == 1


def test_nothing_matches(options: Make, lines: list[str]) -> None:
    assert run.run("dense", options(seqlens=(7,))) == []
    assert lines == ["dense: no cell matches"]


def _bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_command(tmp_path: Path) -> None:
    done = _bench(
        "dense", "--quick", "--device", "cpu", "--output", str(tmp_path), "--head-dim", "128",
        "--feature", "causal", "--mode", "fwd", "--provider", "flashtile", "--provider", "math",
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    [row] = json.loads((tmp_path / "quick" / "cpu" / "dense.json").read_text())["rows"]
    assert (row["head_dim"], row["mode"]) == (128, "fwd")
    assert "fwd causal 1 x 256 x 2 x 128" in done.output and "over math" in done.output


def test_command_decodes(tmp_path: Path) -> None:
    done = _bench("decode", "--quick", "--device", "cpu", "--output", str(tmp_path),
                  "--feature", "queries 4", "--commit", "a" * 40)  # fmt: skip

    assert done.exit_code == 0, done.output
    [row] = json.loads((tmp_path / "quick" / "cpu" / "decode.json").read_text())["rows"]
    assert (row["seqlen"], row["queries"], row["plain"]["queries"]) == (1024, 4, 1)
    assert "decode queries 4 1 x 1,024 x 4/1 x 128" in done.output and "plain" in done.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("speed",), "'speed' is none of dense, features, memory, host, decode"),
        (("dense", "--mode", "both"), "'both' is none of fwd, bwd"),
        (("dense", "--provider", "xformers"), "'xformers' is none of flashtile"),
        (("dense", "--output", __file__), f"{__file__}: File exists"),
        (("dense", "--output", f"{__file__}/x"), f"{__file__}/x: Not a directory"),
        (("features", "--feature", "swa"), "'swa' is none of full, causal, window"),
    ],
)
def test_command_names_what_it_does_not_know(arguments: tuple[str, ...], complaint: str) -> None:
    done = _bench(*arguments, "--device", "cpu")
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("\u2502", " ").split())


def test_nothing_matches_beside_an_older_file(options: Make, lines: list[str]) -> None:
    """Whose claims are not this run's."""
    run.run("host", options())
    lines.clear()
    asked = options(providers=("none",))
    suite = run.SUITES["host"]._replace(measure=lambda _: iter(()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.SUITES, "host", suite)
        assert run.run("host", asked) == []
    assert lines == ["host: no cell matches"]
