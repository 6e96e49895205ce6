"""`sanitize.py` under NVIDIA's memory checker: no access outside an allocation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_process

CHECKER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(CHECKER is None, reason="compute-sanitizer (CUDA toolkit) is not on PATH")
def test_memory_checker_is_silent() -> None:
    script = Path(__file__).with_name("sanitize.py")
    done = subprocess.run(
        [str(CHECKER), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device or its virtualisation")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
