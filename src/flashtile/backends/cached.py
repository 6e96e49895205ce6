"""Calls over a cache: append, attend, and merge with a prefix that all sequences share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashtile.backends import cache
from flashtile.backends.cache import NewTokens
from flashtile.backends.replays import make
from flashtile.decode_tiles import MOST_ROWS
from flashtile.plan import Plan
from flashtile.problem import UNBOUNDED, Call, Operands, Sequences

SPLIT_ROWS, PARTS, PART = 512, 32, 256
"""Where at most so many queries times heads of a KV head see a prefix, its keys are in so many
parts of so many keys at least, each for all KV heads of a tile of queries. The general kernels have
a program for 128 queries of a head: 32 for an H200's 132 multiprocessors, where 32 sequences with
a query each have 32 heads."""

Planner = Callable[[Call], Plan]
Chooser = Callable[[Plan], Any]


def forward(call: Call, new: NewTokens, plan: Planner, backend: Chooser) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, whose cache holds the new tokens afterwards. plan: of a call; backend:
    the module that computes a plan's forward."""
    chosen = plan(call)
    if new.k is not None:
        appends: Any = cache if chosen.backend == "torch" else _module("append")
        call = appends.append(call, new)
    q, prefix_k, prefix_v = call.operands.q, new.prefix_k, new.prefix_v
    if prefix_k is None or prefix_v is None or 0 in (prefix_k.shape[0], q.numel(), call.batch):
        return backend(chosen).forward(call, chosen)
    theirs = _attend(_over_prefix(call, prefix_k, prefix_v), plan)
    lse = _heads_first(call, theirs[1])
    if chosen.decode is not None:
        shape = *q.shape[:-1], prefix_v.shape[-1]
        out = make(partial(torch.reshape, shape=shape), theirs[0])
        return backend(chosen).forward(call, chosen, prefix=(out, lse))
    ours = _attend(call, plan)
    out = make(partial(_merge, dtype=q.dtype), *ours, theirs[0], lse)
    return out, make(torch.logaddexp, ours[1], lse)


def _module(name: str) -> Any:
    """A backend. Triton is imported by the first call that needs it."""
    return importlib.import_module(f"flashtile.backends.{name}")


def _attend(call: Call, plan: Planner) -> tuple[Tensor, Tensor]:
    """(out, lse), out in fp32: rounding parts before they are merged would cost as much again."""
    chosen = plan(call)
    wide = torch.promote_types(call.operands.q.dtype, torch.float32)
    portable = "torch" if chosen.backend == "torch" else "triton"
    module = _module(portable if chosen.decode is None else "decode")
    return module.forward(call, chosen, out_dtype=wide)


def _over_prefix(call: Call, k: Tensor, v: Tensor) -> Call:
    """All queries of all sequences as one sequence, over a prefix that comes before what they see
    of the cache: neither causality nor a window to the right reaches it."""
    q, cu_seqlens = call.operands.q, call.sequences.cu_seqlens_q
    variant = call.variant._replace(window_left=UNBOUNDED, window_right=UNBOUNDED, latent=False)
    planned = not (variant.num_splits or variant.split_size)
    if planned and MOST_ROWS < q.numel() // (q.shape[-1] * k.shape[-2]) <= SPLIT_ROWS:
        variant = variant._replace(num_splits=min(PARTS, k.shape[0] // PART))
    if cu_seqlens is None:
        rows = make(partial(torch.reshape, shape=(1, -1, *q.shape[2:])), q)
        k, v = (make(partial(torch.unsqueeze, dim=0), x) for x in (k, v))
        return Call(Operands(rows, k, v), Sequences(), variant)
    ends = make(partial(_every, step=call.batch), cu_seqlens)  # rows past the last are padding
    of_prefix = make(partial(_offsets, length=k.shape[0]), cu_seqlens)
    longest = Sequences(ends, of_prefix, max_seqlen_q=q.shape[0], max_seqlen_k=k.shape[0])
    return Call(Operands(q, k, v), longest, variant)


def _every(x: Tensor, step: int) -> Tensor:
    return x[::step].contiguous()


def _offsets(like: Tensor, length: int) -> Tensor:
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=like.device)


def _heads_first(call: Call, lse: Tensor) -> Tensor:
    """lse of all queries as one sequence, (1, heads, batch * seqlen_q), as (batch, heads, ...)."""
    if call.varlen:
        return lse
    return make(partial(_split, batch=call.batch), lse)


def _split(lse: Tensor, batch: int) -> Tensor:
    return lse[0].unflatten(-1, (batch, -1)).transpose(0, 1)


def _merge(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> Tensor:
    """out of both sets of keys; 0 where neither has any."""
    both = torch.logaddexp(lse, other_lse)
    both = torch.where(both == -math.inf, 0.0, both)
    here, there = (torch.exp(x - both).transpose(-1, -2).unsqueeze(-1) for x in (lse, other_lse))
    return (here * out + there * other.view_as(out)).to(dtype).contiguous()
