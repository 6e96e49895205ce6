"""Attention in plain PyTorch, on any device: FlashAttention's algorithm, a block at a time.

Forward is the online softmax over key blocks, backward recomputes the probabilities of a block
from lse (Dao, "FlashAttention-2", 2023, algorithms 1 and 2). Nothing is larger than a block of
scores but tensors linear in sequence length; blocks that no row sees are skipped; the query heads
of a KV head are rows of one matrix product, so K and V are never expanded. Where torch's own CPU
flash kernel can do a segment, it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from flashtile.backends import aten
from flashtile.backends.segments import Segment, segments
from flashtile.mods import (
    Band,
    Bias,
    Documents,
    Dropout,
    Function,
    Mask,
    MaskByFunction,
    MaskTensor,
    ScoreMod,
    Softcap,
    Tile,
    Tree,
    functions,
)  # fmt: skip
from flashtile.mods.scores import alibi
from flashtile.plan import Plan, TileConfig
from flashtile.problem import Call

LOG2E = math.log2(math.e)


class Gradients(NamedTuple):
    """What backward is asked for, or None; in the operands' dtypes."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    learnable_sink: Tensor | None


class _Pieces(NamedTuple):
    """The variant of a call as mods and masks."""

    band: Band
    masks: tuple[Mask, ...]
    scores: tuple[ScoreMod, ...]
    dropout: Dropout | None


class _Work(NamedTuple):
    """What the blocks of one segment have in common."""

    call: Call
    pieces: _Pieces
    tile: TileConfig
    dtype: torch.dtype  # of the accumulators
    segment: Segment

    @property
    def kv_heads(self) -> int:
        return self.call.operands.k.shape[-2]

    def q_block(self, x: Tensor, row: int, stop: int) -> Tensor:
        """Rows of a q-shaped tensor: (batches * kv_heads, group * rows, head_dim)."""
        return _matrix(self.segment.q_rows(x, row, stop), self.kv_heads, self.dtype)

    def k_block(self, x: Tensor, col: int, end: int, scale: Tensor | None = None) -> Tensor:
        """Rows of a k-shaped tensor: (batches * kv_heads, cols, head_dim)."""
        rows = self.segment.k_rows(x, col, end)
        if scale is not None:
            rows = rows.to(self.dtype) * self.segment.scales(scale, x, col, end)
        return _matrix(rows, self.kv_heads, self.dtype)


class _Saved(NamedTuple):
    """What backward knows of the forward, row by row."""

    dout: Tensor
    lse: Tensor
    delta: Tensor  # lse's shape: rowsum(dout * out) - dlse


P = ParamSpec("P")
R = TypeVar("R")


def _in_own_dtypes(
    function: Callable[Concatenate[Call, P], R],
) -> Callable[Concatenate[Call, P], R]:
    """A function of calls in which autocast casts nothing: what is to be cast has been, and it
    would cast the factors of a product and not the sum that it is added to."""

    @wraps(function)
    def run(call: Call, *args: P.args, **kwargs: P.kwargs) -> R:
        kind = call.operands.q.device.type
        if not torch.is_autocast_enabled(kind):
            return function(call, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(call, *args, **kwargs)

    return run


@_in_own_dtypes
def forward(call: Call, plan: Plan, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; rows of no sequence and rows that see no key are 0 and -inf. out is in
    q's dtype, unless another is given."""
    own = out_dtype in (None, call.operands.q.dtype)
    if own and (segment := aten.whole(call)) is not None:
        out, lse = aten.attend(call, segment)
        return out.contiguous(), lse.contiguous()
    q, v = call.operands.q, call.operands.v
    dtype = _accumulator(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype)
    lse = q.new_empty(call.lse_shape, dtype=dtype)
    if call.varlen:  # rows of no sequence are not visited below
        out.zero_()
        lse.fill_(-math.inf)
    pieces = _compose(call, dtype)
    for segment in segments(call, plan.tile.batches):
        if own and aten.can(call, segment):
            o, row_lse = aten.attend(call, segment)
            segment.q_rows(out, 0, segment.seqlen_q).copy_(o)
            segment.lse_rows(lse, 0, segment.seqlen_q).copy_(row_lse)
            continue
        work = _Work(call, pieces, plan.tile, dtype, segment)
        for row in range(0, segment.seqlen_q, plan.tile.block_q):
            _forward_rows(work, row, out, lse)
    return out, lse


@_in_own_dtypes
def backward(
    call: Call,
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients asked for: needs is (q, k, v, bias, learnable_sink)."""
    operands = call.operands
    wanted = (operands.q, operands.k, operands.v, operands.bias, operands.learnable_sink)
    if dlse is None and (segment := aten.whole(call)) is not None:
        found = aten.gradients(call, segment, dout, out, lse)
        wide = Gradients(
            *(g if n else None for g, n in zip((*found, None, None), needs, strict=True))
        )
        return _narrow(wide, wanted)
    saved = _remember(dout, dlse, out, lse)
    dtype = _accumulator(operands.q.dtype)
    grads = Gradients(*(
        x.new_zeros(x.shape, dtype=dtype) if need and x is not None else None
        for x, need in zip(wanted, needs, strict=True)
    ))  # fmt: skip
    pieces = _compose(call, dtype, grads.bias)
    for segment in segments(call, plan.tile.batches):
        if dlse is None and aten.can(call, segment):
            _add_gradients(segment, aten.gradients(call, segment, dout, out, lse), grads)
            continue
        work = _Work(call, pieces, plan.tile, dtype, segment)
        for col in range(0, segment.seqlen_k, plan.tile.block_k):
            _backward_columns(work, col, saved, grads)
        if grads.learnable_sink is not None:
            _add_sink_gradient(work, saved, grads.learnable_sink)
    return _narrow(grads, wanted)


def _narrow(grads: Gradients, wanted: tuple[Tensor | None, ...]) -> Gradients:
    """Gradients in their operands' dtypes, contiguous."""
    return Gradients(*(
        g if g is None or x is None else g.to(x.dtype).contiguous()
        for g, x in zip(grads, wanted, strict=True)
    ))  # fmt: skip


def _add_gradients(segment: Segment, found: tuple[Tensor, ...], grads: Gradients) -> None:
    dq, dk, dv = found
    if grads.q is not None:
        segment.q_rows(grads.q, 0, segment.seqlen_q).copy_(dq)
    for grad, x in ((grads.k, dk), (grads.v, dv)):
        if grad is not None:
            segment.add_k_rows(grad, 0, segment.seqlen_k, x)


def _remember(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> _Saved:
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    return _Saved(dout, lse, delta if dlse is None else delta - dlse)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compose(call: Call, dtype: torch.dtype, bias_grad: Tensor | None = None) -> _Pieces:
    """The mods and masks of a call, in the contract's order."""
    operands, _, variant = call
    scores: list[ScoreMod] = []
    masks: list[Mask] = []
    if variant.softcap > 0.0:
        scores.append(Softcap(variant.softcap))
    if operands.alibi_slopes is not None:
        scores.append(alibi(operands.alibi_slopes, operands.q.shape[-2], dtype))
    if operands.bias is not None:
        scores.append(Bias(operands.bias, bias_grad))
    if (score_mod := functions.score_function(call)) is not None:
        scores.append(Function(functions.eager_of("score_mod", score_mod), score_mod.args))
    if (mask_mod := functions.mask_function(call)) is not None:
        eager = functions.eager_of("mask_mod", mask_mod)
        masks.append(MaskByFunction(eager, mask_mod.args, operands.q.shape[-2]))
    if operands.document_ids_q is not None and operands.document_ids_k is not None:
        masks.append(Documents(operands.document_ids_q, operands.document_ids_k))
    if operands.tree_mask is not None:
        masks.append(Tree(operands.tree_mask))
    if operands.attn_mask is not None:
        if operands.attn_mask.dtype == torch.bool:
            masks.append(MaskTensor(operands.attn_mask))
        else:
            scores.append(Bias(operands.attn_mask))
    dropout = None
    if variant.dropout_p > 0.0 and operands.rng_state is not None:
        dropout = Dropout(variant.dropout_p, operands.rng_state)
    band = Band(variant.window_left, variant.window_right, variant.attention_chunk)
    return _Pieces(band, tuple(masks), tuple(scores), dropout)


def _matrix(rows: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(batches, rows, heads, dim) to (batches * kv_heads, group * rows, dim), accumulator dtype."""
    batches, _, _, dim = rows.shape
    return rows.transpose(1, 2).to(dtype).reshape(batches * kv_heads, -1, dim)


def _rows(matrix: Tensor, batches: int, heads: int) -> Tensor:
    """The inverse of `_matrix`, as a view."""
    return matrix.view(batches, heads, -1, matrix.shape[-1]).transpose(1, 2)


def _unseen(tile: Tile, pieces: _Pieces, like: Tensor) -> Tensor | None:
    """True where a query does not see a key, broadcastable to the tile; None: nowhere."""
    unseen: Tensor | None = None
    for mask in (pieces.band, *pieces.masks):
        visible = mask.visible(tile, like)
        if visible is not None:
            unseen = ~visible if unseen is None else unseen | ~visible
    return unseen


def _skips(unseen: Tensor | None) -> bool:
    """Whether no row sees a key of the tile. Asked on the CPU only: elsewhere it is a sync."""
    return unseen is not None and unseen.device.type == "cpu" and bool(unseen.all())


def _scores(
    q: Tensor, k: Tensor, tile: Tile, pieces: _Pieces, unseen: Tensor | None, derive: bool = False
) -> tuple[Tensor, list[Tensor | None]]:
    """Scores after mods and masks (batches, heads, rows, cols), and each mod's derivative."""
    s = torch.bmm(q, k.mT).view(tile.batches, -1, tile.rows, tile.cols)
    derivatives: list[Tensor | None] = []
    for mod in pieces.scores:
        before = s.clone() if derive and isinstance(mod, Function) else s
        mod.apply(s, tile)
        if derive:
            derivatives.append(mod.derivative(before, s, tile))
    if unseen is not None:
        _hide(s, unseen)
    return s, derivatives


def _exp(x: Tensor) -> Tensor:
    """exp in place. On the CPU torch.exp is 2.5 times slower than exp2, and 70 times where results
    underflow (10.0 against 0.14 ms for 8 x 256 x 256 scores near -95)."""
    return x.mul_(LOG2E).exp2_()


def _hide(s: Tensor, unseen: Tensor) -> None:
    """Set scores to -inf in place. masked_fill_ is not vectorised on the CPU: 0.99 ms for
    8 x 256 x 256 scores, minimum with -inf takes 0.06, but it keeps a NaN."""
    if s.device.type == "cpu":
        torch.minimum(s, torch.where(unseen, -math.inf, math.inf).to(s.dtype), out=s)
        if not s.sum().isnan():
            return
    s.masked_fill_(unseen, -math.inf)


def _forward_rows(work: _Work, row: int, out: Tensor, lse: Tensor) -> None:
    """One block of query rows: fold the key blocks it sees into the softmax state, then write."""
    call, pieces, tiles, dtype, segment = work
    q, k, v, sink = *call.operands[:3], call.operands.learnable_sink
    k_scale, v_scale = call.operands.k_descale, call.operands.v_descale
    stop = min(row + tiles.block_q, segment.seqlen_q)
    heads, rows = q.shape[-2], stop - row
    q_block = work.q_block(q, row, stop).mul(call.variant.softmax_scale)
    state = (segment.batches, heads, rows, 1)
    # A finite floor for the running max keeps fully masked rows free of inf - inf.
    m = q_block.new_full(state, torch.finfo(dtype).min)  # running max
    l = q_block.new_zeros(state)  # running sum
    if sink is not None:
        logit = sink.to(dtype)[:, None, None]
        m = m.maximum(logit)
        l = torch.exp(logit - m)
    acc = q_block.new_zeros((*q_block.shape[:2], v.shape[-1]))
    lo, hi = pieces.band.key_range(segment.tile(row, rows, 0, 0))
    for col in range(lo, hi, tiles.block_k):
        end = min(col + tiles.block_k, hi)
        tile = segment.tile(row, rows, col, end - col)
        unseen = _unseen(tile, pieces, q_block)
        if _skips(unseen):
            continue
        s, _ = _scores(q_block, work.k_block(k, col, end, k_scale), tile, pieces, unseen)
        m_new = torch.maximum(m, s.amax(-1, keepdim=True))
        p = _exp(s.sub_(m_new))
        alpha = torch.exp(m - m_new)
        l = l.mul_(alpha).add_(p.sum(-1, keepdim=True))
        m = m_new
        if pieces.dropout is not None:
            p.mul_(pieces.dropout.factor(tile, p))
        acc.mul_(alpha.view(*acc.shape[:2], 1))
        acc.baddbmm_(p.view(*acc.shape[:2], -1), work.k_block(v, col, end, v_scale))
    acc.div_(torch.where(l == 0, 1.0, l).view(*acc.shape[:2], 1))
    segment.q_rows(out, row, stop).copy_(_rows(acc, segment.batches, heads))
    segment.lse_rows(lse, row, stop).copy_((m + torch.log(l)).squeeze(-1))


def _backward_columns(work: _Work, col: int, saved: _Saved, grads: Gradients) -> None:
    """One block of keys: recompute its probabilities with each query block that sees it."""
    call, pieces, tiles, _, segment = work
    q, k, v = call.operands[:3]
    end = min(col + tiles.block_k, segment.seqlen_k)
    k_block, v_block = work.k_block(k, col, end), work.k_block(v, col, end)
    dk, dv = torch.zeros_like(k_block), torch.zeros_like(v_block)
    lo, hi = pieces.band.query_range(segment.tile(0, 0, col, end - col))
    for row in range(lo, hi, tiles.block_q):
        stop = min(row + tiles.block_q, hi)
        tile = segment.tile(row, stop - row, col, end - col)
        unseen = _unseen(tile, pieces, k_block)
        if _skips(unseen):
            continue
        q_block = work.q_block(q, row, stop).mul(call.variant.softmax_scale)
        do_block = work.q_block(saved.dout, row, stop)
        s, derivatives = _scores(q_block, k_block, tile, pieces, unseen, derive=True)
        row_lse = segment.lse_rows(saved.lse, row, stop).unsqueeze(-1)
        p = _exp(s.sub_(torch.where(row_lse == -math.inf, math.inf, row_lse)))
        dp = torch.bmm(do_block, v_block.mT).view_as(p)
        kept = p
        if pieces.dropout is not None:
            factor = pieces.dropout.factor(tile, p)
            dp.mul_(factor)
            kept = factor.mul_(p)
        dv.baddbmm_(kept.reshape(len(dv), -1, end - col).mT, do_block)
        ds = dp.sub_(segment.lse_rows(saved.delta, row, stop).unsqueeze(-1)).mul_(p)
        for mod, derivative in zip(reversed(pieces.scores), reversed(derivatives), strict=True):
            mod.accumulate(ds, tile)
            if derivative is not None:
                ds.mul_(derivative)
        ds = ds.view(len(dk), -1, end - col)
        dk.baddbmm_(ds.mT, q_block)
        if grads.q is not None:
            dq = torch.bmm(ds, k_block).mul_(call.variant.softmax_scale)
            segment.q_rows(grads.q, row, stop).add_(_rows(dq, segment.batches, q.shape[-2]))
    for grad, block in ((grads.k, dk), (grads.v, dv)):
        if grad is not None:
            segment.add_k_rows(grad, col, end, _rows(block, segment.batches, work.kv_heads))


def _add_sink_gradient(work: _Work, saved: _Saved, grad: Tensor) -> None:
    """d sink = - sum over rows of p_sink * delta: the sink's value row is zero."""
    sink, segment = work.call.operands.learnable_sink, work.segment
    if sink is None:
        return
    row_lse, delta = (segment.lse_rows(x, 0, segment.seqlen_q) for x in (saved.lse, saved.delta))
    # A sink of -inf on a row that sees no key has weight 0, not exp(-inf + inf).
    row_lse = torch.where(row_lse == -math.inf, math.inf, row_lse)
    grad.sub_((torch.exp(sink.to(work.dtype)[:, None] - row_lse) * delta).sum((0, 2)))
