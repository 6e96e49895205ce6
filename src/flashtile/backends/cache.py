"""Appending to a KV cache in place, with rotary embedding, on any torch device.

Kernels do the same in one launch: `backends.append`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.problem import E4M3, Call
from flashtile.quantize import encode, scale_kind, token_scales
from flashtile.rotary import rotate


class NewTokens(NamedTuple):
    """What a call over a cache has besides: what is appended to each row of the cache after its
    `seqused_k` tokens, how it and q are turned, and a prefix that all sequences share."""

    k: Tensor | None = None  # (batch, seqlen_new, kv_heads, head_dim), or (total_new, ...) packed
    v: Tensor | None = None
    cu_seqlens: Tensor | None = None  # (batch + 1,) of packed k and v
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2)
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None  # (batch,) position of the first new token
    prefix_k: Tensor | None = None  # (seqlen_prefix, kv_heads, head_dim)
    prefix_v: Tensor | None = None
    rotary_interleaved: bool = True

    def tensors(self) -> list[Tensor]:
        """Those that a call has."""
        return [x for x in self if isinstance(x, Tensor)]


class _Tokens(NamedTuple):
    """Tokens of all sequences, one after another."""

    batch: Tensor  # (tokens,) their sequences
    place: Tensor  # (tokens,) counted in them
    row: Tensor  # (tokens,) their rows of a flat token dimension


def append(call: Call, new: NewTokens) -> Call:
    """Write the new tokens into the cache; the call with q rotated and lengths advanced."""
    operands, sequences, variant = call
    lengths = sequences.seqused_k
    if lengths is None or new.k is None or new.v is None:
        raise ValueError("seqused_k is None; appending needs the cache's lengths")
    tokens = _tokens(new.k, new.cu_seqlens, call.batch)
    q, k, v = operands.q, *(x.reshape(-1, *x.shape[-2:])[tokens.row] for x in (new.k, new.v))
    if new.rotary_cos is not None and new.rotary_sin is not None:
        start = (lengths if new.rotary_seqlens is None else new.rotary_seqlens).long()
        k = _turn(k, new, start[tokens.batch] + tokens.place)
        q = _turn_queries(call, new, start)
    places = _places(call, tokens.batch, lengths.long()[tokens.batch] + tokens.place)
    for x, cache, scale in (
        (k, operands.k, operands.k_descale),
        (v, operands.v, operands.v_descale),
    ):
        _write(x, cache, scale, tokens.batch, places)
    after = lengths + (new.k.shape[1] if new.cu_seqlens is None else new.cu_seqlens.diff())
    return Call(
        operands._replace(q=q), sequences._replace(seqused_k=after.to(torch.int32)), variant
    )


def _tokens(x: Tensor, cu_seqlens: Tensor | None, batch: int) -> _Tokens:
    """Tokens of x, (batch, tokens, ...), or packed."""
    every = torch.arange(batch, device=x.device)
    if cu_seqlens is None:
        index = torch.arange(x.shape[1], device=x.device).repeat(batch)
        return _Tokens(
            every.repeat_interleave(x.shape[1]), index, torch.arange(len(index), device=x.device)
        )
    offsets = cu_seqlens.long()
    owner = every.repeat_interleave(offsets.diff())
    row = torch.arange(len(owner), device=x.device)
    return _Tokens(owner, row - offsets[owner], row)


def _turn(x: Tensor, new: NewTokens, positions: Tensor) -> Tensor:
    """x (tokens, heads, head_dim) turned to its positions (tokens,)."""
    assert new.rotary_cos is not None
    assert new.rotary_sin is not None
    cos, sin = new.rotary_cos, new.rotary_sin
    return rotate(x[None], cos, sin, positions[None], new.rotary_interleaved)[0]


def _turn_queries(call: Call, new: NewTokens, start: Tensor) -> Tensor:
    """Without a causal mask or window all queries stand at the first new position, as in
    FlashAttention-2: they see the same keys, so they are alternatives, not successors."""
    q = call.operands.q
    tokens = _tokens(q, call.sequences.cu_seqlens_q, call.batch)
    positions = start[tokens.batch] + (tokens.place if call.banded else 0)
    turned = q.reshape(-1, *q.shape[-2:]).clone()
    turned[tokens.row] = _turn(turned[tokens.row], new, positions)
    return turned.view(q.shape)


def _places(call: Call, batch: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """First two indices into the cache of the tokens at `positions` of sequences `batch`."""
    sequences, k_cache = call.sequences, call.operands.k
    if sequences.block_table is not None:
        page_size = k_cache.shape[1]
        return sequences.block_table.long()[batch, positions // page_size], positions % page_size
    rows = sequences.cache_batch_idx
    return (batch if rows is None else rows.long()[batch]), positions


def _write(
    x: Tensor, cache: Tensor, scale: Tensor | None, batch: Tensor, places: tuple[Tensor, Tensor]
) -> None:
    """Write tokens x (tokens, kv_heads, head_dim), and their scales where those are their own."""
    if cache.dtype != E4M3:
        cache.index_put_(places, x.to(cache.dtype))
        return
    if scale is not None:
        kind, given = scale_kind(scale, cache, -1), scale
        if kind == "token":
            scale = token_scales(x)
            given.index_put_(places, scale)
        elif scale.dim() == 2:  # a batch row's
            scale = scale[batch]
    cache.view(torch.uint8).index_put_(places, encode(x, scale).view(torch.uint8))
