"""Every test here runs the Triton kernels in Triton's interpreter, in blocks of 16 x 16, and lists
blocks by tiles of 32 x 32."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from flashtile.testing.interpreter import interpreted


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "a GPU is here: tests/gpu runs the kernels compiled (TRITON_INTERPRET=1: these)"
        )
    with interpreted(16, 16, list_block=32):
        yield
