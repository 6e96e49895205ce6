"""The example trains, serves every request and loads what it saved."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

PATH = Path(__file__).parent.parent.parent / "examples" / "generate.py"
FAST = ("--requests", "3", "--steps", "2", "--limit", "6", "--gap", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def _run(example: ModuleType, *options: str) -> Any:
    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, [*FAST, *options], env={"COLUMNS": "100"})


def _words(done: Any) -> str:
    """The output without the frames and line breaks of rich."""
    return " ".join(re.sub("[│╭╮╰╯─]", "", done.output).split())


def test_serves_what_arrives(example: ModuleType) -> None:
    done = _run(example)

    assert done.exit_code == 0, done.output
    assert re.search(r"^3 requests, \d+ tokens in ", done.output, re.MULTILINE)
    assert "0 pages still in use" in _words(done)
    assert done.output.count("ended") == 3 + 1


def test_checkpoint_writes_the_same_texts(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    trained, loaded = (_run(example, "--checkpoint", str(path)) for _ in range(2))

    assert (trained.exit_code, loaded.exit_code) == (0, 0)
    assert "learning" in trained.output
    assert "learning" not in loaded.output
    rows = [
        sorted(line for line in done.output.splitlines() if line.startswith("│"))
        for done in (trained, loaded)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"\x80\x02X\x01\x00\x00\x00\x8b.", b"\x80\x02M", None],
)
def test_says_what_is_wrong_with_a_checkpoint(
    example: ModuleType, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / ("model.pt" if content is not None else "nowhere/model.pt")
    if content is not None:
        path.write_bytes(content)
    done = _run(example, "--checkpoint", str(path))

    assert done.exit_code == 2
    wrong = "is no file that this option wrote" if content is not None else "is not a folder"
    assert wrong in _words(done)
    assert "--checkpoint" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "200", "--pages", "2"), "they may need 15 pages of 16, the pool has 2"),
        (("--limit", "225"), "together they must be at most 256, the context"),
        (("--temperature", "inf"), "inf is not finite"),
    ],
)
def test_says_what_does_not_fit(
    example: ModuleType, options: tuple[str, ...], message: str
) -> None:
    """And before it has learned anything."""
    done = _run(example, *options)

    assert done.exit_code == 2
    assert message in _words(done)
    assert "learning" not in done.output
