"""Appending to a KV cache in place, with rotary embedding, on any torch device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.problem import Call
from flashtile.rotary import query_positions, rotate


class NewTokens(NamedTuple):
    """What is appended: after `seqused_k` tokens of each row of the cache."""

    k: Tensor  # (batch, seqlen_new, kv_heads, head_dim)
    v: Tensor
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2)
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = True


def append(call: Call, new: NewTokens) -> Call:
    """Write the new tokens into the cache; the call with q rotated and lengths advanced."""
    operands, sequences, variant = call
    lengths = sequences.seqused_k
    if lengths is None:
        raise ValueError("seqused_k is None; appending needs the cache's lengths")
    q, k = operands.q, new.k
    seqlen_new = k.shape[1]
    k_at = query_positions(lengths, seqlen_new, advance=True)
    if new.rotary_cos is not None and new.rotary_sin is not None:
        q_at = query_positions(lengths, q.shape[1], advance=call.banded)
        q = rotate(q, new.rotary_cos, new.rotary_sin, q_at, new.rotary_interleaved)
        k = rotate(k, new.rotary_cos, new.rotary_sin, k_at, new.rotary_interleaved)
    pages, slots = _places(call, k_at)
    operands.k.index_put_((pages, slots), k.to(operands.k.dtype))
    operands.v.index_put_((pages, slots), new.v.to(operands.v.dtype))
    return Call(
        operands._replace(q=q),
        sequences._replace(seqused_k=(lengths + seqlen_new).to(torch.int32)),
        variant,
    )


def _places(call: Call, positions: Tensor) -> tuple[Tensor, Tensor]:
    """First two indices into the cache of the tokens at `positions` (batch, seqlen_new)."""
    sequences, k_cache = call.sequences, call.operands.k
    if sequences.block_table is not None:
        page_size = k_cache.shape[1]
        pages = sequences.block_table.long().gather(1, positions // page_size)
        return pages, positions % page_size
    rows = sequences.cache_batch_idx
    if rows is None:
        rows = torch.arange(call.batch, device=positions.device)
    return rows.long()[:, None].expand_as(positions), positions
