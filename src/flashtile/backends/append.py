"""The launch that appends to a KV cache (see `kernels.append`). No length is read on the host."""

from __future__ import annotations

from torch import Tensor

from flashtile.backends import operands
from flashtile.backends.cache import NewTokens
from flashtile.backends.launch import Launch, run
from flashtile.backends.operands import scale_view, token_view
from flashtile.backends.replays import empty, make
from flashtile.kernels import append as kernels
from flashtile.kernels.append import AppendTile
from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import Sequences
from flashtile.problem import Call
from flashtile.quantize import scaled_by_token
from flashtile.tiles import padded_dims, power_of_two

ELEMENTS = 4096
"""Of a program's tile: 32 for each of 128 threads."""

HEADS = 8
"""Of a program's tile at most: a decode of few rows should occupy many multiprocessors."""


def append(call: Call, new: NewTokens) -> Call:
    """Write the new tokens into the cache; the call with q rotated and lengths advanced."""
    assert new.k is not None
    q, turns = call.operands.q, new.rotary_cos is not None and new.rotary_cos.shape[1] > 0
    if call.batch == 0 or (new.k.shape[-3] == 0 and not turns):
        return call
    lengths = call.sequences.seqused_k
    assert lengths is not None
    q_out = empty(q.shape, q) if turns else q
    after = empty((call.batch,), lengths) if new.k.shape[-3] else lengths
    run(append_launch(call, new, q_out, after))
    return call._replace(
        operands=call.operands._replace(q=q_out),
        sequences=call.sequences._replace(seqused_k=after),
    )


def append_launch(call: Call, new: NewTokens, q_out: Tensor, after: Tensor) -> Launch:
    q, k_cache, v_cache = call.operands[:3]
    k, v = new.k, new.v
    assert k is not None
    assert v is not None
    k, v = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else make(Tensor.contiguous, x) for x in (k, v)
    )
    rotary, tile = _rotary(call, new), _tile(call, new)
    tokens = k.shape[0] if k.dim() == 3 else k.shape[1]
    new_seq = Sequences(opaque(call.batch), opaque(tokens), new.cu_seqlens)
    q_programs = _programs(q, q.shape[-2], call.batch, tile) if rotary is not None else 0
    k_programs = _programs(k, k.shape[-2], call.batch, tile) if tokens else 0
    shares = kernels.Shares(*map(opaque, (q.shape[-2], k.shape[-2], q_programs, k_programs)))
    k_scale, v_scale = call.operands.k_descale, call.operands.v_descale
    return Launch(
        kernels.append_tokens, q_programs + 2 * k_programs,
        (token_view(q), token_view(q_out), token_view(k), token_view(v),
         _cache(k_cache, k_scale, call.batch), _cache(v_cache, v_scale, call.batch),
         operands.query_sequences(call), new_seq, operands.key_sequences(call), after, rotary,
         shares, tile),
        fused=False,
    )  # fmt: skip


def _cache(x: Tensor, scale: Tensor | None, batch: int) -> kernels.Cache:
    own = 1 if scaled_by_token(scale, x, batch) else None
    return kernels.Cache(token_view(x), scale_view(scale, x, batch), own)


def _rotary(call: Call, new: NewTokens) -> kernels.Rotary | None:
    cos, sin = new.rotary_cos, new.rotary_sin
    if cos is None or sin is None or cos.shape[1] == 0:
        return None
    cos, sin = (x if x.is_contiguous() else make(Tensor.contiguous, x) for x in (cos, sin))
    return kernels.Rotary(
        cos, sin, opaque(cos.shape[0]), new.rotary_seqlens,
        1 if new.rotary_interleaved else None, 1 if call.banded else None,
    )  # fmt: skip


def _tile(call: Call, new: NewTokens) -> AppendTile:
    q, k, v = call.operands[:3]
    rows = max(1, ELEMENTS // max(padded_dims(k.shape[-1], v.shape[-1])))
    heads = min(rows, HEADS, power_of_two(k.shape[-2]))
    tokens = rows // heads
    if call.varlen or new.cu_seqlens is not None:
        tokens = max(2, tokens)  # `find_sequence` counts in slots of 2 tokens at least
    else:
        longest = max(x.shape[1] for x in (q, new.k) if x is not None)
        tokens = min(tokens, power_of_two(longest))
    rotary_dim = 0 if new.rotary_cos is None else 2 * new.rotary_cos.shape[1]
    return AppendTile(tokens, heads, k.shape[-1], v.shape[-1], rotary_dim)


def _programs(x: Tensor, heads: int, batch: int, tile: AppendTile) -> int:
    """Tiles of all heads of all sequences, as `open_tile` counts them."""
    blocks = -(-heads // tile.heads)
    if x.dim() == 3:
        return (x.shape[0] // tile.tokens + batch + 1) * blocks
    return -(-x.shape[1] // tile.tokens) * batch * blocks
