"""The whole demo, in a few seconds: what it prints, what it writes, and when it fails."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.demo import Settings, read_text, run
from flashtile.demo.layer import Cost, Row, TensorError
from flashtile.demo.plot import draw
from flashtile.demo.results import Results
from flashtile.demo.train import Training

demo_run = importlib.import_module("flashtile.demo.run")

SETTINGS = replace(Settings(torch.device("cpu"), steps=4).quick(), longest=128)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small sizes gain nothing from more, and lose much where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(settings: Settings) -> tuple[list[str], str]:
    printed = StringIO()
    console = Console(file=printed, width=100)
    return run(settings, read_text(settings), console), printed.getvalue()


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its first chunk."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_prints_its_findings_and_draws_them(tmp_path: Path) -> None:
    output = tmp_path / "figure.png"
    failures, printed = _run(replace(SETTINGS, output=output))

    assert failures == []
    for part in ("pydoc_data.topics", "what it then writes", "32 query heads", "dv", "speed"):
        assert part in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"wrote {output}; backend: torch; not hopper: needs an NVIDIA Hopper")
    assert "; not triton: needs a GPU" in last
    assert _png_size(output) == (2016, 777)
    assert output.stat().st_size > 20_000


def test_fails_where_the_attentions_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return 2.0 * flash_attn_func(q, k, v, causal=causal)

    monkeypatch.setattr(demo_run, "flash_attn_func", wrong)
    monkeypatch.setattr(demo_run.layer, "flash_attn_func", wrong)
    settings = replace(SETTINGS, steps=8, output=tmp_path / "figure.png")
    failures, printed = _run(settings)

    assert [failure.split()[0] for failure in failures] == ["out:", "dq:", "dk:", "dv:", "the"]
    assert "the loss curves differ by" in failures[-1]
    assert printed.count("failed: ") == 5
    assert printed.splitlines()[-1].startswith("wrote ")


def test_prints_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "find_spec", lambda name: None)
    output = tmp_path / "figure.png"
    failures, printed = _run(replace(SETTINGS, steps=2, longest=64, output=output))

    assert failures == []
    assert printed.splitlines()[-1].startswith(
        "no plot drawn, pip install 'flashtile[plot]' for one; backend: torch; "
    )
    assert not output.exists()


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_draws_whatever_ran(runs: int, tmp_path: Path) -> None:
    rows = [
        Row(
            seqlen=512 << i,
            flash=Cost(0.1 * 2**i, 10 << (20 + i)),
            standard=Cost(0.2 * 4**i, 90 << (20 + i), "" if i < runs else "out of memory"),
            free_bytes=2**30,
        )
        for i in range(3)
    ]
    training = Training(flash_attn_func, SETTINGS)
    training.losses += [3.0, 2.0]
    errors = [TensorError("out", 1e-7, 1e-6, 1e-7, 1e-6, "")]
    output = tmp_path / "figure.png"
    settings = replace(SETTINGS, output=output)

    draw(Results(settings, "2 CPU threads", training, training, errors, rows))

    assert _png_size(output) == (2016, 777)
