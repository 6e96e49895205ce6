"""The definition of correctness: eager attention, every feature, on any device.

Dense in memory and plain to read: one sequence at a time, scores written out, gradients by
autograd. In fp64 it is the oracle of the tests; in a low precision (`dtype=None`) it is the error
that standard attention itself makes, which every kernel is measured against. It shares no
code with the backends but the random numbers that define the dropout mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.problem import E4M3, At, Call, Length, Sequences, scale_or_default, window_sides
from flashtile.quantize import encode, scale_kind, token_scales
from flashtile.random import keep_mask
from flashtile.rotary import query_positions, rotate


class AttentionResult(NamedTuple):
    out: Tensor  # q's layout with head_dim_v, zero where no key is seen
    lse: Tensor  # (batch, heads, seqlen_q) or (heads, total_q), natural log, -inf on empty rows


class _Variant(NamedTuple):
    scale: float
    left: int
    right: int
    chunk: int
    softcap: float
    alibi_slopes: Tensor | None  # (batch | 1, heads)
    bias: Tensor | None  # (1 | batch, 1 | heads, 1 | seqlen_q, seqlen_k)
    attn_mask: Tensor | None
    sink: Tensor | None
    documents: Any  # (ids of q, ids of k) or None
    dropout_p: float
    rng_state: Tensor | None
    tree_mask: Tensor | None = None  # (1 | batch, n, n)
    functions: tuple[Any, Any] = (None, None)  # score_mod, mask_mod


class _Scales(NamedTuple):
    """fp32 scales of e4m3 k and v."""

    k: Tensor | None = None
    v: Tensor | None = None


class _Sequence(NamedTuple):
    """One sequence: its index, its rows of q and slots of k, and where they start."""

    batch: int
    q: Tensor  # (seqlen_q, heads, head_dim)
    k: Tensor  # (seqlen_k, kv_heads, head_dim)
    v: Tensor
    k_scale: Tensor | None  # broadcasts to k
    v_scale: Tensor | None
    q_start: int  # first row in q's token dimension
    k_start: int  # first slot in k's token dimension
    k_slot: int  # first slot, counted from the start of the sequence


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    attention_chunk: int = 0,
    dtype: torch.dtype | None = torch.float64,
) -> AttentionResult:
    """softmax(mask(mods(q k^T * scale))) v, and its log-sum-exp.

    q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens_q; k and v
    alike with kv_heads, or (pages, page_size, kv_heads, head_dim) with block_table. The other
    arguments are those of `flash_attn_func` and `flash_attn_varlen_func`, with dropout's mask
    given by rng_state. Computes and returns in `dtype`, or with None in q's own; lse is at least
    fp32. Differentiable, any number of times.
    """
    left, right = window_sides(window_size, causal)
    ids = (document_ids, document_ids) if isinstance(document_ids, Tensor) else document_ids
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(-1, q.shape[-2])
    variant = _Variant(
        scale_or_default(softmax_scale, q), left, right, attention_chunk, softcap, slopes, bias,
        attn_mask, learnable_sink, ids, dropout_p, rng_state,
        tree_mask[None] if tree_mask is not None and tree_mask.dim() == 2 else tree_mask,
        (score_mod, mask_mod),
    )  # fmt: skip
    dtype = q.dtype if dtype is None else dtype
    seqs = Sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table,
                     cache_batch_idx, cache_leftpad)  # fmt: skip
    shape = (*q.shape[:-1], v.shape[-1])
    out = torch.zeros(shape, dtype=dtype, device=q.device)
    lse = torch.full(shape[:-1], -math.inf, dtype=_at_least_fp32(dtype), device=q.device)
    for sequence in _sequences(q, k, v, seqs, _Scales(k_descale, v_descale)):
        o, row_lse = _attend(sequence, variant, dtype)
        rows = slice(sequence.q_start, sequence.q_start + o.shape[0])
        at = rows if cu_seqlens_q is not None else (sequence.batch, rows)
        out[at], lse[at] = o, row_lse
    return AttentionResult(out, lse.transpose(-1, -2).contiguous())


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotary_seqlens: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    **keywords: Any,
) -> tuple[AttentionResult, Tensor, Tensor]:
    """Append k and v to the cache, rotate, and attend: ((out, lse), new k_cache, new v_cache).

    Shapes and keywords as `flash_attn_with_kvcache` and `attention`. The inputs stay as they are,
    but for scales of tokens, which are written.
    """
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    capacity = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    lengths = torch.as_tensor(capacity if cache_seqlens is None else cache_seqlens).to(q.device)
    lengths = lengths.expand(batch).to(torch.int64)
    k_cache, v_cache, q = k_cache.clone(), v_cache.clone(), q.clone()
    advance = attention_chunk > 0 or window_sides(window_size, causal) != (-1, -1)
    after = lengths.clone()
    if k is not None and v is not None:
        for b in range(batch):
            queries, keys, values = (
                x[b] if cu is None else x[slice(*_span(cu, b))]
                for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k_new), (v, cu_seqlens_k_new))
            )
            after[b] += len(keys)
            if rotary_cos is not None and rotary_sin is not None:
                start = (lengths if rotary_seqlens is None else rotary_seqlens)[b : b + 1]
                at = query_positions(start, len(queries), advance)
                turn = rotary_cos, rotary_sin
                queries.copy_(rotate(queries[None], *turn, at, rotary_interleaved)[0])
                at = query_positions(start, len(keys), True)
                keys = rotate(keys[None], *turn, at, rotary_interleaved)[0]
            for i in range(len(keys)):
                slot = _locate(b, int(lengths[b]) + i, k_cache, block_table, cache_batch_idx)
                _store(keys[i], k_cache, k_descale, b, slot)
                _store(values[i], v_cache, v_descale, b, slot)
    result = attention(
        q, k_cache, v_cache, causal=causal, window_size=window_size, seqused_k=after,
        cu_seqlens_q=cu_seqlens_q, block_table=block_table, cache_batch_idx=cache_batch_idx,
        k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk, **keywords,
    )  # fmt: skip
    return result, k_cache, v_cache


def _store(x: Tensor, cache: Tensor, scale: Tensor | None, b: int, at: tuple[int, int]) -> None:
    """Put a token (kv_heads, head_dim) into a cache, quantised if that is."""
    if cache.dtype == E4M3:
        if scale is not None and scale_kind(scale, cache, -1) == "token":
            scale[at] = token_scales(x)
        here = _scale_of(scale, cache, b, at)
        x = encode(x, None if here is None else here[..., 0])
    cache[at] = x


def signed_probabilities(call: Call, score_mod: Any = None, mask_mod: Any = None) -> Tensor:
    """FlashAttention-2's S_dmask of a call: P in q's dtype, negative where dropped.

    (batch, heads, seqlen_q, seqlen_k) rounded up to multiples of 128, zero outside the sequences.
    """
    operands, seqs, scalars = call
    q, k, v = operands[:3]
    slopes, ids = operands.alibi_slopes, (operands.document_ids_q, operands.document_ids_k)
    variant = _Variant(
        *scalars[:5],  # scale to softcap
        None if slopes is None else slopes.reshape(-1, q.shape[-2]), operands.bias,
        operands.attn_mask, operands.learnable_sink, None if ids[0] is None else ids,
        scalars.dropout_p, operands.rng_state, operands.tree_mask, (score_mod, mask_mod),
    )  # fmt: skip
    sequences = list(_sequences(q, k, v, seqs, _Scales(operands.k_descale, operands.v_descale)))
    longest_q = max((len(x.q) for x in sequences), default=0) if call.varlen else q.shape[1]
    longest_k = max((len(x.k) for x in sequences), default=0) if call.varlen else call.seqlen_k
    seqlen_q, seqlen_k = (-(-max(x) // 128) * 128 for x in (
        (seqs.max_seqlen_q, longest_q), (seqs.max_seqlen_k, longest_k)))  # fmt: skip
    signed = q.new_zeros((call.batch, q.shape[-2], seqlen_q, seqlen_k))
    for sequence in sequences:
        p, _ = _probabilities(sequence, variant, _at_least_fp32(q.dtype))
        keep = _keep(sequence, variant, p.shape)
        signed[sequence.batch, :, : p.shape[1], : p.shape[2]] = torch.where(keep, p, -p)
    return signed


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _locate(
    batch: int, slot: int, cache: Tensor, block_table: Tensor | None, batch_idx: Tensor | None
) -> tuple[int, int]:
    """The first two indices of a cached token: (page or row, slot in it)."""
    if block_table is not None:
        page_size = cache.shape[1]
        return int(block_table[batch, slot // page_size]), slot % page_size
    return (batch if batch_idx is None else int(batch_idx[batch])), slot


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scales: _Scales
) -> Iterator[_Sequence]:
    """Cut a call into its sequences."""
    cu_q, cu_k, _, _, table, rows = seqs[:6]
    for b in range(q.shape[0] if cu_q is None else len(cu_q) - 1):
        q_start, q_stop = (0, q.shape[1]) if cu_q is None else _span(cu_q, b)
        if seqs.seqused_q is not None:
            q_stop = q_start + int(seqs.seqused_q[b])
        k_start, k_stop = (0, k.shape[1]) if cu_k is None else _span(cu_k, b)
        if table is not None:
            k_start, k_stop = 0, k_stop - k_start
        if seqs.seqused_k is not None:
            k_stop = k_start + int(seqs.seqused_k[b])
        pad = 0 if seqs.cache_leftpad is None else int(seqs.cache_leftpad[b])
        slots = range(k_start + pad, max(k_stop, k_start + pad))
        if table is not None:
            at = [_locate(b, slot, k, table, rows) for slot in slots]
            pages = torch.tensor([page for page, _ in at], dtype=torch.long, device=k.device)
            inside = torch.tensor([slot for _, slot in at], dtype=torch.long, device=k.device)
            where: Any = (pages, inside)
        else:
            span = slice(slots.start, slots.stop)
            where = (b if rows is None else int(rows[b]), span) if k.dim() == 4 else span
        keys, values = (
            x.view(torch.uint8)[where].view(E4M3) if x.dtype == E4M3 else x[where] for x in (k, v)
        )
        k_scale, v_scale = (
            _scale_of(scale, x, b, where) for scale, x in ((scales.k, k), (scales.v, v))
        )
        queries = (q[b] if cu_q is None else q)[q_start:q_stop]
        yield _Sequence(b, queries, keys, values, k_scale, v_scale, q_start, slots.start, pad)


def _scale_of(scale: Tensor | None, x: Tensor, batch: int, where: Any) -> Tensor | None:
    """The scales of one sequence's keys or values; it broadcasts to them."""
    if scale is None:
        return None
    if scale_kind(scale, x, -1) == "token":
        scale = scale[where]
    elif scale.dim() == 2:
        scale = scale[batch]
    return scale.unsqueeze(-1)


def _span(cu_seqlens: Tensor, b: int) -> tuple[int, int]:
    return int(cu_seqlens[b]), int(cu_seqlens[b + 1])


def _attend(seq: _Sequence, variant: _Variant, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One sequence: out (seqlen_q, heads, head_dim_v) and lse (seqlen_q, heads)."""
    p, lse = _probabilities(seq, variant, dtype)
    if variant.dropout_p > 0.0:
        p = p * _keep(seq, variant, p.shape).to(p.dtype) / (1.0 - variant.dropout_p)
    group = seq.q.shape[1] // max(1, seq.k.shape[1])
    v = _wide(seq.v, seq.v_scale, dtype).repeat_interleave(group, dim=1)
    return torch.einsum("hqk,khd->qhd", p, v), lse.T


def _probabilities(seq: _Sequence, variant: _Variant, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """softmax over keys (and the sink): p (heads, seqlen_q, seqlen_k), lse (heads, seqlen_q).

    The softmax is taken in fp32 at least and rounded once, as torch.softmax does.
    """
    s = _scores(seq, variant, dtype).to(_at_least_fp32(dtype))
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:2], 1), -1e38)
    sink = None if variant.sink is None else variant.sink.to(s.dtype)[:, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.clamp_min(torch.finfo(top.dtype).min)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    some = total > 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, top + torch.log(total), -math.inf)
    return (e / total).to(dtype), lse.squeeze(-1)


def _wide(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if scale is None else x * scale.to(dtype)


def _scores(seq: _Sequence, variant: _Variant, dtype: torch.dtype) -> Tensor:
    """Scores after every mod and mask: (heads, seqlen_q, seqlen_k), -inf where not seen."""
    group = seq.q.shape[1] // max(1, seq.k.shape[1])
    k = _wide(seq.k, seq.k_scale, dtype).repeat_interleave(group, dim=1)
    s = torch.einsum("qhd,khd->hqk", seq.q.to(dtype) * variant.scale, k)
    seqlen_q, seqlen_k = s.shape[1:]
    q_idx = torch.arange(seqlen_q, device=s.device)[:, None]
    k_idx = torch.arange(seqlen_k, device=s.device)[None, :]
    distance = k_idx - (q_idx + seqlen_k - seqlen_q)  # 0 on the bottom-right diagonal
    if variant.softcap > 0.0:
        s = variant.softcap * torch.tanh(s / variant.softcap)
    if variant.alibi_slopes is not None:
        slopes = variant.alibi_slopes[seq.batch % len(variant.alibi_slopes)].to(dtype)
        s = s - slopes[:, None, None] * distance.abs()
    if variant.bias is not None:
        s = s + _window_of(variant.bias, seq, seqlen_q, seqlen_k).to(dtype)
    head = torch.arange(len(s), device=s.device)[:, None, None]
    at = At(seq.batch, head, q_idx, k_idx, Length(seqlen_q), Length(seqlen_k))
    score_mod, mask_mod = variant.functions
    if score_mod is not None:
        s = score_mod.eager[0](s, at, score_mod.args)
    visible = _in_band(variant, k_idx, distance)
    if mask_mod is not None:
        visible = visible & mask_mod.eager(at, mask_mod.args)
    if variant.documents is not None:
        visible = visible & _same_document(seq, variant.documents)
    if variant.tree_mask is not None:
        visible = visible & _in_tree(variant.tree_mask[seq.batch % len(variant.tree_mask)], visible)
    if variant.attn_mask is not None:
        mask = _window_of(variant.attn_mask, seq, seqlen_q, seqlen_k)
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            s = s + mask.to(dtype)
    return torch.where(visible, s, -math.inf)


def _in_band(variant: _Variant, k_idx: Tensor, distance: Tensor) -> Tensor:
    """What causality, the window and chunks leave."""
    left, right = (math.inf if x < 0 else x for x in (variant.left, variant.right))
    seen, chunk = (distance >= -left) & (distance <= right), variant.chunk
    return seen if chunk == 0 else seen & (k_idx // chunk == (k_idx - distance) // chunk)


def _window_of(x: Tensor, seq: _Sequence, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The part of a broadcastable (batch, heads, seqlen_q, seqlen_k) tensor for one sequence."""
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    x = x[seq.batch % x.shape[0]][..., seq.k_slot : seq.k_slot + seqlen_k]
    return x if x.shape[-2] == 1 else x[:, :seqlen_q]


def _in_tree(tree: Tensor, like: Tensor) -> Tensor:
    """(seqlen_q, seqlen_k): what the tree shows among the first queries and the last keys."""
    seen, first = torch.ones_like(like), like.shape[1] - like.shape[0]
    for i in range(min(len(tree), like.shape[0])):
        for j in range(max(0, -first), min(len(tree), like.shape[0])):
            seen[i, first + j] = tree[i, j]
    return seen


def _same_document(seq: _Sequence, documents: tuple[Tensor, Tensor]) -> Tensor:
    q_ids, k_ids = (ids if ids.dim() == 1 else ids[seq.batch] for ids in documents)
    q_ids = q_ids[seq.q_start : seq.q_start + len(seq.q)]
    k_ids = k_ids[seq.k_start : seq.k_start + len(seq.k)]
    return q_ids[:, None] == k_ids[None, :]


def _keep(seq: _Sequence, variant: _Variant, shape: torch.Size) -> Tensor:
    """The dropout mask of one sequence, True where kept: (heads, seqlen_q, seqlen_k)."""
    if variant.rng_state is None:
        raise ValueError("rng_state is None; dropout_p > 0 needs the (seed, offset) of its mask")
    heads, seqlen_q, seqlen_k = shape
    at = [torch.arange(n, device=variant.rng_state.device) for n in (heads, seqlen_q, seqlen_k)]
    head = (seq.batch * heads + at[0])[:, None, None]
    return keep_mask(variant.rng_state, variant.dropout_p, head, at[1][:, None], at[2])
