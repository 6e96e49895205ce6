"""The Triton kernels on the CPU: in Triton's interpreter, in small blocks.

Set TRITON_INTERPRET=1 before anything imports triton. The interpreter knows fp32 and fp16; it
computes bfloat16 wrongly without a word, so a bfloat16 problem is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from flashtile import ops, plan
from flashtile.problem import AttentionProblem
from flashtile.tiles import KernelConfig, KernelConfigs


@contextmanager
def interpreted(block_q: int = 32, block_k: int = 16) -> Iterator[None]:
    """Run calls on CPU tensors through the Triton backend, in blocks of block_q x block_k."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; set it before triton is imported")
    row = KernelConfig(block_q, block_k, 1, 1)
    column = KernelConfig(block_k, block_q, 1, 1)

    def small(*_: Any) -> KernelConfigs:
        return KernelConfigs(row, row, column, row)

    def why_not(name: str, _: plan.Device) -> str | None:
        return "not interpreted" if name == "hopper" else None

    def cannot(name: str, problem: AttentionProblem) -> str | None:
        if name == "triton" and problem.dtype not in ("float32", "float16"):
            raise TypeError(f"q has dtype {problem.dtype}; the interpreter knows fp32 and fp16")
        return None

    plan.plan.cache_clear()
    with (
        patch.object(plan, "_why_not", why_not),
        patch.object(plan, "_cannot", cannot),
        patch.object(plan, "configs", small),
        patch.object(ops, "classifies", lambda device_type: True),
    ):
        yield
    plan.plan.cache_clear()
