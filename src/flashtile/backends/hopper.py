"""The Hopper backend's host side: forward with its tile counter; `hopper_backward` has the rest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends import blocklists, operands, triton
from flashtile.backends.hopper_backward import backward
from flashtile.backends.launch import Launch, run
from flashtile.backends.operands import row_view
from flashtile.backends.replays import empty, make
from flashtile.backends.tensormaps import (
    folds,
    has_gaps,
    mapped,
    maps,
    page_map,
    ragged_map,
    tensor_map,
)
from flashtile.hopper_tiles import HopperTile
from flashtile.kernels.hopper import forward as kernels
from flashtile.kernels.hopper import layouts, words
from flashtile.kernels.hopper.scheduler import Work
from flashtile.kernels.numbers import opaque
from flashtile.plan import Plan
from flashtile.problem import Call

__all__ = ["backward", "forward"]

L2_BYTES = 32 * 2**20
"""What K and V of the heads whose tiles are taken together may fill: two thirds of an H200's L2."""

MOST_UNIT = 2.0**27
"""What scores may be counted in: the kernel's least maximum, -1e30 of it, must be finite."""

COUNTERS = 4096
"""Streams and captured launches that find a counter cleared beforehand."""


def forward(call: Call, plan: Plan) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; rows of no sequence and rows that see no key are 0 and -inf."""
    empty_operand = 0 in (x.numel() for x in call.operands[:3])  # TMA has none
    if empty_operand or _scattered(call) or operands.score_unit(call) > MOST_UNIT:
        return triton.forward(call, plan)
    call = _mapped(call)
    q, v = call.operands.q, call.operands.v
    out = empty((*q.shape[:-1], v.shape[-1]), q)
    lse = empty(call.lse_shape, q, torch.float32)
    run(forward_launch(call, plan, out, lse))
    return out, lse


def forward_launch(call: Call, plan: Plan, out: Tensor, lse: Tensor) -> Launch:
    if plan.hopper is None:
        raise ValueError(f"plan.hopper is None; the plan is for the {plan.backend} backend")
    tile, (q, k, v) = plan.hopper, call.operands[:3]
    a = operands.arguments(call)
    variant = operands.variant(call, True, blocklists.by_queries(call))
    if variant.dropouts:
        dropout = variant.dropouts[0]._replace(multiply=words.multiply)
        variant = variant._replace(dropouts=(dropout,))
    rows = layouts.ROWS.value
    queries = _maps(ragged_q(call), rows, (q, tile.padded))
    keys = _maps(ragged_k(call), tile.block_n, (k, tile.padded), (v, tile.padded_v))
    if call.sequences.block_table is not None:
        keys = [page_map(x, min(tile.block_n, k.shape[1])) for x in (k, v)]
    outputs = _maps(call.varlen, rows, (out, tile.padded_v))
    work = _work(call, tile)
    return Launch(
        kernels.attention_forward, min(_ctas(q.device), triton.query_grid(call, tile.block_m)),
        (*queries, *keys, *outputs, row_view(lse), a.q_seq, a.k_seq, variant,
         call.operands.learnable_sink, a.scale, a.heads, work, tile),
    )  # fmt: skip


def ragged_q(call: Call) -> bool:
    """Whether queries are read up to the end of a sequence that the device knows."""
    return call.varlen or call.sequences.seqused_q is not None


def ragged_k(call: Call) -> bool:
    """The same of keys."""
    s = call.sequences
    given = (s.cu_seqlens_k, s.seqused_k, s.cache_batch_idx, s.cache_leftpad)
    return any(x is not None for x in given)


def _scattered(call: Call) -> bool:
    """Whether TMA cannot read a cache or a pool of pages where it lies: none of them is copied."""
    k, v = call.operands[1:3]
    held = ragged_k(call) or call.sequences.block_table is not None
    return k.dim() == 4 and held and any(has_gaps(x) or not maps(x) for x in (k, v))


def _maps(ragged: bool, rows: int, *tensors: tuple[Tensor, int]) -> list[TensorDescriptor]:
    """Tensor maps of one form for tensors and the widths of their tiles."""
    if ragged:
        return [ragged_map(x, rows, padded) for x, padded in tensors]
    folded = all(folds(x, padded) for x, padded in tensors)
    return [tensor_map(x, rows, padded, folded) for x, padded in tensors]


def _work(call: Call, tile: HopperTile) -> Work:
    q, k, v = call.operands[:3]
    pairs, together = call.batch * q.shape[-2], 1
    if call.banded:
        # Longest first over as many heads as leave their K and V in L2.
        per_head = k.element_size() * k.shape[-3] * (k.shape[-1] + v.shape[-1])
        group = q.shape[-2] // k.shape[-2]
        together = max(1, L2_BYTES // max(1, per_head)) * group
    row_tiles = -(-call.seqlen_q // tile.block_m)
    counter = make(partial(_counter, q.device.type, q.get_device()))
    return Work(counter, opaque(row_tiles), opaque(pairs), opaque(min(together, pairs)))


def _mapped(call: Call) -> Call:
    """The call with copies of those of q, k and v that TMA cannot read where they lie."""
    ragged = (ragged_q(call), ragged_k(call), ragged_k(call))
    q, k, v = (mapped(x, gaps) for x, gaps in zip(call.operands[:3], ragged, strict=True))
    return call._replace(operands=call.operands._replace(q=q, k=k, v=v))


@lru_cache
def _ctas(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], Tensor] = {}
_spare: dict[int, list[Tensor]] = {}
_cleared: list[Tensor] = []  # graphs outlive what holds their counters


def _counter(kind: str, device: int) -> Tensor:
    """(2,) int32 zeros on the current device, which the launch leaves as zeros.

    Launches of one stream follow each other and share one. A captured launch gets one that no other
    launch uses: its graph may be replayed on any stream, beside any other.
    """
    if kind != "cuda":
        return torch.zeros(2, dtype=torch.int32, device=kind)
    if torch._C._cuda_isCurrentStreamCapturing():
        return _spare_counter(device)
    key = device, torch._C._cuda_getCurrentRawStream(device)
    found = _counters.get(key)
    if found is None:
        if device not in _spare:
            # By another thread: this one may be allocating in a graph's pool, as torch.compile does
            # to warm up for "reduce-overhead", and there nothing but results may stay.
            with ThreadPoolExecutor(1) as thread:
                _spare[device] = thread.submit(_cleared_counters, device).result()
        found = _counters[key] = _spare_counter(device)
    return found


def _spare_counter(device: int) -> Tensor:
    spare = _spare.get(device)
    return spare.pop() if spare else torch.zeros(2, dtype=torch.int32, device=device)


def _cleared_counters(device: int) -> list[Tensor]:
    """Counters that launches on any stream may use: waited for, once a process."""
    cleared = torch.zeros((COUNTERS, 4), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    _cleared.append(cleared)
    return list(cleared.unbind())
