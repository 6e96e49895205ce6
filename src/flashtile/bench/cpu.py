"""Suites `speed-float32` and `speed-bfloat16`: forward plus backward on a CPU.

Against torch's own flash kernel where that can do the problem, against eager attention elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashtile import flash_attn_func, reference
from flashtile.bench.measure import host_clock, interleaved
from flashtile.bench.options import Options
from flashtile.random import draw_rng_state
from flashtile.testing import assert_within_budget
from flashtile.testing.standard import standard_attention

HEADS, HEAD_DIM = 8, 64


@dataclass(frozen=True)
class Cell:
    dtype: torch.dtype
    seqlen: int
    feature: str
    keywords: dict[str, Any] = field(default_factory=dict)

    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.seqlen} {self.feature}"


def cells(dtype: torch.dtype) -> list[Cell]:
    features: dict[str, dict[str, Any]] = {
        "causal": {},
        "window 512": {"window_size": (512, 0)},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": torch.logspace(-1, -8, HEADS, base=2.0)},
        "dropout 0.1": {"dropout_p": 0.1},
    }
    return [
        Cell(dtype, seqlen, feature, keywords)
        for seqlen in (2048, 4096)
        for feature, keywords in features.items()
    ]


def measure_float32(options: Options) -> Iterator[dict[str, Any]]:
    return (_measure(cell, options.rounds) for cell in cells(torch.float32))


def measure_bfloat16(options: Options) -> Iterator[dict[str, Any]]:
    return (_measure(cell, options.rounds) for cell in cells(torch.bfloat16))


def _measure(cell: Cell, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (1, cell.seqlen, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=cell.dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape, dtype=cell.dtype)
    _check(cell, q, k, v)
    peer = "aten" if cell.feature == "causal" else "eager"
    providers: dict[str, Callable[[], object]] = {
        "flashtile": lambda: torch.autograd.grad(
            flash_attn_func(q, k, v, causal=True, **cell.keywords), (q, k, v), dout
        ),
        peer: (lambda: _aten(q, k, v, dout))
        if peer == "aten"
        else lambda: torch.autograd.grad(
            standard_attention(q, k, v, causal=True, **cell.keywords), (q, k, v), dout
        ),
    }
    # Eager bf16 takes 13 s at 2,048 tokens and 50 s at 4,096 where the CPU has no bf16 units.
    if cell.dtype == torch.bfloat16:
        rounds, warmup = 3 if cell.seqlen <= 2048 else 2, 0
    else:
        # A few per cent against torch's kernel are at stake in the plain cell.
        rounds, warmup = 3 * rounds if peer == "aten" else rounds, 1
    times = interleaved(providers, rounds, warmup, host_clock, turn_ms=0.0)
    return {
        "dtype": str(cell.dtype).removeprefix("torch."),
        "seqlen": cell.seqlen,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "feature": cell.feature,
        "peer": peer,
        "flashtile": times["flashtile"].row(),
        "peer_time": times[peer].row(),
        "speedup": times[peer].median_ms / times["flashtile"].median_ms,
    }


def _check(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The gate: the first 256 queries' worth of the same problem, against fp64."""
    part = [x.detach()[:, :256] for x in (q, k, v)]
    keywords = {**cell.keywords, "causal": True}
    state = None
    if "dropout_p" in keywords:
        generator = torch.Generator().manual_seed(3)
        state = draw_rng_state(q.device, generator)
        keywords["dropout_generator"] = torch.Generator().manual_seed(3)
    out = flash_attn_func(part[0], part[1], part[2], **keywords)
    keywords.pop("dropout_generator", None)
    golden = reference.attention(*part, **keywords, rng_state=state).out
    eager = reference.attention(*part, **keywords, rng_state=state, dtype=None).out
    assert_within_budget(out, eager, golden, cell.name())


def _aten(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> object:
    """torch's own CPU flash kernel, called directly."""
    q, k, v, dout = (x.detach().transpose(1, 2) for x in (q, k, v, dout))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, True
    )
