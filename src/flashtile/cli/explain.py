"""`flashtile explain`: the plan of a problem that need not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from flashtile.api import normalise
from flashtile.explain import explain_problem
from flashtile.plan import Device
from flashtile.problem import FLOATING, AttentionProblem, describe

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}


@dataclass(frozen=True)
class Request:
    """A problem as the options give it."""

    batch: int
    seqlen_q: int
    heads: int
    head_dim: int
    kv_heads: int | None  # None: as heads
    seqlen_k: int | None  # None: as seqlen_q
    head_dim_v: int | None  # None: as head_dim
    causal: bool
    window: tuple[int, int]
    softcap: float
    dropout: float
    alibi: bool
    bias: bool
    mask: bool
    sink: bool
    varlen: bool
    dtype: str


def plan_table(request: Request, device: Device) -> Table:
    """Raises what the call itself would raise."""
    table = Table(show_header=False, box=None, pad_edge=False)
    problem = replace(problem_of(request), device=device.type)
    for name, value in explain_problem(problem, device).rows():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def problem_of(request: Request) -> AttentionProblem:
    """The metadata of a call with tensors that have shapes and no memory."""
    r = request
    if r.dtype not in DTYPES:
        raise ValueError(f"dtype is {r.dtype}; it must be {', '.join(DTYPES)}")
    dtype = DTYPES[r.dtype]
    seqlen_k = r.seqlen_q if r.seqlen_k is None else r.seqlen_k
    kv_heads = r.heads if r.kv_heads is None else r.kv_heads
    q = _meta(dtype, r.batch, r.seqlen_q, r.heads, r.head_dim)
    k = _meta(dtype, r.batch, seqlen_k, kv_heads, r.head_dim)
    head_dim_v = r.head_dim if r.head_dim_v is None else r.head_dim_v
    v = _meta(dtype, r.batch, seqlen_k, kv_heads, head_dim_v)
    if r.varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    call = normalise(
        q, k, v, causal=r.causal, window_size=r.window, softcap=r.softcap,
        dropout_p=r.dropout, **_features(r, seqlen_k, dtype),
    )  # fmt: skip
    return describe(call)


def _features(r: Request, seqlen_k: int, dtype: torch.dtype) -> dict[str, Any]:
    """The tensors besides q, k and v, and the packing, as keywords."""
    tensors = {
        "alibi_slopes": (r.alibi, (r.heads,)),
        "bias": (r.bias, (1, r.heads, r.seqlen_q, seqlen_k)),
        "attn_mask": (r.mask, (r.batch, 1, r.seqlen_q, seqlen_k)),
        "learnable_sink": (r.sink, (r.heads,)),
    }
    keywords: dict[str, Any] = {
        name: _meta(dtype, *shape) for name, (wanted, shape) in tensors.items() if wanted
    }
    if r.varlen:
        for side, longest in (("q", r.seqlen_q), ("k", seqlen_k)):
            keywords[f"cu_seqlens_{side}"] = _meta(torch.int32, r.batch + 1)
            keywords[f"max_seqlen_{side}"] = longest
    return keywords


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    if prod(max(1, n) for n in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"a tensor of shape {shape} has more than 2^63 bytes")
    return torch.empty(shape, dtype=dtype, device="meta")
