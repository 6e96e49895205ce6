"""`flashtile compile --for-device`: what it compiles is what calls look for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_process

CALLS = """
import logging
import torch
from flashtile import flash_attn_func, flash_attn_varlen_func

logging.basicConfig(level=logging.WARNING)
for dtype in (torch.bfloat16, torch.float16):
    for batch, tokens, heads, kv_heads in ((3, 515, 4, 4), (1, 64, 6, 2), (2, 1024, 1, 1)):
        q, k, v = (torch.randn(batch, tokens, n, 64, device="cuda", dtype=dtype).requires_grad_()
                   for n in (heads, kv_heads, kv_heads))
        flash_attn_func(q, k, v, causal=True).sum().backward()
torch.cuda.synchronize()
"""


def _run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=500,
        env=environment,
    )  # fmt: skip


def test_warmed_calls_compile_nothing(tmp_path: Path) -> None:
    """In a process of their own, on a cache that another process filled. Without it they say that
    they compile, so the second half of the test does see compiling."""
    warm, cold = tmp_path / "warm", tmp_path / "cold"
    filled = [
        _run(warm, "-m", "flashtile", "compile", "--for-device", "--match", f"causal {dtype} 64 ")
        for dtype in ("bfloat16", "float16")
    ]
    for done in filled:
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"are in {warm}" in done.stdout
    program = tmp_path / "program.py"
    program.write_text(CALLS)
    done = _run(warm, str(program))

    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stderr
    assert "compiling attention_forward" in _run(cold, str(program)).stderr
