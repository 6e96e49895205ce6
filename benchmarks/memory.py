"""Suite `memory`: peak allocation of forward plus backward, one head of dim 64, fp32, causal."""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import track

from flashtile import flash_attn_func
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention

SEQLENS = (1024, 2048, 4096, 8192, 16384)
LONGEST_STANDARD = 8192
"""Standard attention needs 0.9 GB here, and 3.5 GB at twice the length."""


def run() -> list[dict[str, Any]]:
    """One row a path and length: plain causal (torch's kernel) and with softcap (our blocks)."""
    return [
        _measure(path, keywords, seqlen)
        for path, keywords in track((("causal", {}), ("softcap", {"softcap": 30.0})), "memory")
        for seqlen in SEQLENS
    ]


def _measure(path: str, keywords: dict[str, Any], seqlen: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 1, 64).requires_grad_() for _ in range(3))
    dout = torch.randn(1, seqlen, 1, 64)

    def step(attention: Any) -> object:
        return torch.autograd.grad(attention(q, k, v, causal=True, **keywords), (q, k, v), dout)

    row = {
        "path": path,
        "seqlen": seqlen,
        "flashtile_bytes": peak_bytes(lambda: step(flash_attn_func)),
    }
    if seqlen <= LONGEST_STANDARD:
        row["standard_bytes"] = peak_bytes(lambda: step(standard_attention))
    return row
