"""README: its tables are the results', its Python runs, its commands are the project's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_generated(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(TEXT)
    script = (
        "import sys; sys.path.insert(0, 'benchmarks'); import pathlib, report;"
        f"p = pathlib.Path({str(copy)!r}); p.write_text(report.fill(p.read_text()))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert copy.read_text() == TEXT
    assert TEXT.count("<!-- table:") == TEXT.count("<!-- end -->") == 10


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*/*.json")), ids=str
)
def test_results_say_where_they_come_from(path: Path) -> None:
    document = json.loads(path.read_text())
    environment = document["environment"]
    assert re.fullmatch(r"[0-9a-f]{40}", environment["commit"])
    assert environment["dirty"] is False
    assert document["rows"]


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=ROOT, check=True, timeout=120)


def test_ci_runs_the_test_command() -> None:
    command = re.search(r"pip install -c constraints.txt '\.\[dev\]' && pytest.*", TEXT)
    assert command is not None
    assert "grep" in (ROOT / ".ci" / "run").read_text()
