"""Results say what they depend on, and rows of different code do not mix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtile.bench import record

HERE = {"commit": "a" * 40, "dirty": False, "torch": "2.11.0"}


def _row(seqlen: int, value: float) -> dict[str, Any]:
    return {"feature": "causal", "seqlen": seqlen, "mode": "fwd", "value": value}


def _values(path: Path) -> dict[int, float]:
    return {row["seqlen"]: row["value"] for row in json.loads(path.read_text())["rows"]}


def test_a_suite_may_be_run_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "dense.json"
    record.write(path, [_row(512, 1.0), _row(1024, 2.0)], HERE)
    record.write(path, [_row(1024, 3.0), _row(2048, 4.0)], HERE)

    assert _values(path) == {512: 1.0, 1024: 3.0, 2048: 4.0}
    assert json.loads(path.read_text())["suite"] == "dense"


@pytest.mark.parametrize("change", [{"commit": "b" * 40}, {"dirty": True}, {"torch": "2.12.0"},
                                    {"threads": 77}])  # fmt: skip
def test_rows_of_other_code_are_dropped(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "dense.json"
    record.write(path, [_row(512, 1.0)], HERE)
    record.write(path, [_row(1024, 2.0)], HERE | change)

    assert _values(path) == {1024: 2.0}


def test_environment_names_the_commit() -> None:
    found = record.environment(torch.device("cpu"))
    assert re.fullmatch(r"[0-9a-f]{40}|", found["commit"])
    assert isinstance(found["dirty"], bool)

    given = record.environment(torch.device("cpu"), "c" * 40 + "-dirty")
    assert (given["commit"], given["dirty"]) == ("c" * 40, True)


def test_no_repository_counts_as_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "PACKAGE", tmp_path)
    found = record.environment(torch.device("cpu"))
    assert (found["commit"], found["dirty"]) == ("", True)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
     ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090")],
)  # fmt: skip
def test_folders_of_gpus(name: str, folder: str) -> None:
    assert record.slug(name) == folder


def test_a_file_is_whole_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dense.json"
    record.write(path, [_row(1, 1.0)], HERE)

    def cut(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="no space"):
        record.write(path, [_row(2, 2.0)], HERE)
    assert _values(path) == {1: 1.0}
    assert list(tmp_path.iterdir()) == [path]
