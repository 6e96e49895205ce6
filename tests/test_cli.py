"""The command line, as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from typer.testing import CliRunner, Result

import flashtile
from flashtile import cli
from flashtile.cli import devices, info
from flashtile.cli.app import app

SHAPE = ("explain", "--shape", "2,64,8,32")


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def _rows(printed: str) -> dict[str, str]:
    """A table of two columns as a dict; indented names keep their indent."""
    lines = (re.fullmatch(r"( *\S+(?: \S+)*) {2,}(.*)", line) for line in printed.splitlines())
    return {line[1]: line[2].strip() for line in lines if line}


def test_module_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", "--help"], capture_output=True, text=True, check=True
    )

    assert all(f" {command} " in done.stdout for command in ("demo", "info", "explain"))


@pytest.mark.parametrize("missing", [("typer", "rich"), ("rich",)])
def test_without_its_extra_says_how_to_get_it(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in missing else object())

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    needs = f"flashtile's command line needs {' and '.join(missing)}"
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{needs}: pip install 'flashtile[cli]'\n"


def test_info_names_versions_devices_backends_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "absent"))
    done = _invoke("info")
    rows = _rows(done.stdout)

    assert done.exit_code == 0
    assert rows["flashtile"] == flashtile.__version__
    assert rows["torch"] == torch.__version__
    assert rows["cpu"].endswith("CPU threads")
    assert rows["  hopper"].startswith("no: needs an NVIDIA Hopper GPU")
    assert rows["  torch"] == "runs"
    assert rows["triton cache"] == str(tmp_path)
    assert rows["inductor cache"] == f"{tmp_path / 'absent'} (not there yet)"


def test_inductors_cache_is_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    assert str(info.inductor_cache()) == default_cache_dir()


def test_a_user_without_a_name_has_caches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any number."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(info.getpass, "getuser", nobody)
    assert info.inductor_cache().name.startswith("torchinductor_uid_")


def test_explain_is_what_python_explains() -> None:
    q = torch.empty(2, 64, 8, 32, dtype=torch.float16)
    k = torch.empty(2, 96, 2, 32, dtype=torch.float16)
    v = torch.empty(2, 96, 2, 16, dtype=torch.float16)
    expected = flashtile.explain(
        q, k, v, window_size=(20, 0), softcap=5.0, dropout_p=0.1, alibi_slopes=torch.empty(8),
        bias=torch.empty(1, 8, 64, 96), attn_mask=torch.empty(2, 1, 64, 96),
        learnable_sink=torch.empty(8),
    )  # fmt: skip
    sizes = ("--kv-heads", "2", "--seqlen-k", "96", "--head-dim-v", "16", "--window", "20,0")
    scalars = ("--softcap", "5", "--dropout", "0.1", "--dtype", "float16", "--device", "cpu")
    done = _invoke(*SHAPE, *sizes, *scalars, "--alibi", "--bias", "--mask", "--sink")

    assert done.exit_code == 0
    assert _rows(done.stdout) == dict(expected.rows())


def test_explain_packed_sequences() -> None:
    tokens = torch.empty(128, 8, 32, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 64, 128], dtype=torch.int32)
    expected = flashtile.explain(
        tokens, tokens, tokens, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=64, max_seqlen_k=64,
    )  # fmt: skip
    done = _invoke(*SHAPE, "--causal", "--varlen", "--device", "cpu")

    assert _rows(done.stdout) == dict(expected.rows())


def test_explain_a_gpu_that_is_not_here() -> None:
    rows = _rows(_invoke(*SHAPE, "--arch", "sm_80").stdout)

    assert rows["dtype"] == "bfloat16 on cuda"
    assert "sm_80" in rows["not hopper"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "--shape", "1,2,3"), "'1,2,3' is not 4 integers of at least 0"),
        (("explain", "--shape", "1,-2,3,4"), "'1,-2,3,4' is not 4 integers of at least 0"),
        ((*SHAPE, "--window", "4"), "'4' is not 2 integers of at least -1"),
        ((*SHAPE, "--kv-heads", "3"), "q has 8 heads; they must be a multiple of k's 3"),
        ((*SHAPE, "--dtype", "int8"), "dtype is int8; it must be float16, bfloat16, float32"),
        ((*SHAPE, "--dropout", "1.5"), "dropout_p is 1.5; it must be in [0, 1)"),
        (("explain", "--shape", f"{10**20},1,1,1"), "has more than 2^63 bytes"),
        (("explain", "--shape", f"1,{2**31},{2**31},1"), "has more than 2^63 bytes"),
        (("explain", "--shape", f"0,{10**20},1,1"), "has more than 2^63 bytes"),
        ((*SHAPE, "--arch", "sm_90a"), "'sm_90a' is not of the form sm_90 or gfx942"),
        ((*SHAPE, "--arch", "h100"), "'h100' is not of the form sm_90 or gfx942"),
        ((*SHAPE, "--device", "tpu"), "'tpu' is not cpu or cuda"),
        (("demo", "--device", "tpu"), "'tpu' is not cpu or cuda"),
        (("demo", "--output", "/nowhere/x.png"), "/nowhere is not a folder"),
        (("demo", "--output", "/"), "/ is a folder"),
        (("demo", "--text", "/nowhere/x"), "/nowhere/x is not a file"),
        (("demo", "--text", "/dev/null"), "/dev/null is not a file"),
        (("demo", "--steps", "1"), "--steps"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = _invoke(*arguments)

    assert done.exit_code == 2
    assert message in done.output


def test_a_short_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("short")
    done = _invoke("demo", "--text", str(path))

    assert done.exit_code == 2
    assert "has 5 bytes; training needs more than 257" in done.output


def test_cuda_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    done = _invoke("demo", "--device", "cuda")

    assert done.exit_code == 2
    assert "torch finds no cuda device here" in done.output


def test_quick_demo(tmp_path: Path) -> None:
    """Its contents are tested in tests/demo."""
    text, output = tmp_path / "text.txt", tmp_path / "figure.png"
    text.write_text("to be or not to be, " * 100)
    done = _invoke(
        *("demo", "--quick", "--steps", "2", "--device", "cpu"),
        *("--text", str(text), "--output", str(output)),
    )

    assert done.exit_code == 0, done.output
    assert "2,000 bytes of text" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"wrote {output}; backend: torch; ")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_failed_demo_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtile.demo.run", lambda *arguments: ["the loss curves differ"])

    assert _invoke("demo", "--output", str(tmp_path / "figure.png")).exit_code == 1
