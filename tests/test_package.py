"""The package itself: what importing it costs, which way its imports point, its style."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashtile

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "flashtile"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    ("strides",),
    ("config", "problem", "random", "rotary", "tiles"),
    ("decode_tiles", "form", "hopper_tiles", "quantize"),
    ("hopper_backward_tiles", "hopper_decode_tiles"),
    ("checks", "kernels", "mods", "plan", "reference"),
    ("backends",),
    ("observers", "values"),
    ("guards",),
    ("ops",),
    ("explain", "api"),
    ("",),  # flashtile itself
    ("compat", "compiling", "models", "testing"),
    ("demo",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
"""A module imports from layers above it in this list, and from its own package."""


def _layer(module: str) -> int:
    top = module.split(".")[1] if "." in module else ""
    return next(i for i, names in enumerate(LAYERS) if top in names)


def _imports(path: Path) -> list[str]:
    """The flashtile modules that a file imports when it is loaded."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashtile"):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            is_module = [
                (SOURCE.parent / (m.replace(".", "/") + ".py")).exists()
                or (SOURCE.parent / m.replace(".", "/")).is_dir()
                for m in submodules
            ]
            found += [
                m if yes else str(node.module) for m, yes in zip(submodules, is_module, strict=True)
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("flashtile")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    module = ".".join(("flashtile", *(p for p in parts if p != "__init__")))
    own = module.split(".")[1] if "." in module else ""
    for imported in _imports(path):
        same_package = own != "" and imported.split(".")[1:2] == [own]
        assert same_package or _layer(imported) < _layer(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_functions_fit_a_screen(path: Path) -> None:
    """60 lines without signature and docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("command", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)])
def test_is_clean(command: tuple[str, ...]) -> None:
    arguments = [] if command[0] == "mypy" else ["src", "tests", "benchmarks", "examples"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


PROBE = """
import sys, time
import torch, torch.library
loaded, start = set(sys.modules), time.process_time()
import flashtile
took = time.process_time() - start
new = set(sys.modules) - loaded
heavy = ("triton", "matplotlib", "typer", "rich", "numpy", "torch._dynamo", "torch._inductor")
heavy = [m for m in new if m in heavy or m.startswith("flash_attn")]
print(took, torch.cuda.is_initialized(), heavy)
"""


def test_import_is_cheap(tmp_path: Path) -> None:
    """No triton, no CUDA, no more than 50 ms of the processor over torch (the best of several)."""
    times = []
    # Byte code as an installation has it, wherever the tests run from.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    for _ in range(8):
        out = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True,
            env=environment,
        )  # fmt: skip
        took, initialised, heavy = out.stdout.strip().split(" ", 2)
        assert (initialised, heavy) == ("False", "[]")
        times.append(float(took))
        if times[-1] < 0.05:
            return
    assert min(times) < 0.05, times


@pytest.mark.parametrize("name", [n for n in flashtile.__all__ if n.startswith("flash_attn")])
def test_docstrings_say_what_a_caller_needs(name: str) -> None:
    function = getattr(flashtile, name)
    text = inspect.getdoc(function) or ""
    for part in ("Args:", "Raises:", "ource", "head", "float"):
        assert part in text, f"{name} lacks {part!r}"
    if "packed" not in name:
        for parameter in inspect.signature(function).parameters:
            documented = parameter in text or "as `flash_attn_func`" in text or "those of" in text
            assert documented, f"{name} does not document {parameter}"
