"""From a `Call` to the arguments of the Triton kernels: views, sequences, variants."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.backends.replays import make
from flashtile.kernels import dropout, forward, masks, schedule, scores, views
from flashtile.kernels.config import Tile
from flashtile.kernels.numbers import opaque
from flashtile.mods import functions
from flashtile.problem import UNBOUNDED, Call
from flashtile.quantize import scale_strides
from flashtile.random import NUMBERS, drop_threshold
from flashtile.tiles import KernelConfig

LOG2E = math.log2(math.e)
LEAST_UNIT = 2.0**-64
"""Scores are not counted in less: dividing by it must stay far from overflow in float32."""

FAR = 2**22
"""Token strides above this need 64-bit offsets within a block of up to 128 rows."""


class Arguments(NamedTuple):
    """What every kernel of a call takes."""

    q: views.TokenView
    k: views.TokenView
    v: views.TokenView
    q_seq: views.Sequences
    k_seq: views.Sequences
    scale: forward.Scale
    heads: forward.Heads


def arguments(call: Call) -> Arguments:
    q, k, v = call.operands[:3]
    scale = call.variant.softmax_scale
    heads, kv_heads = q.shape[-2], k.shape[-2]
    return Arguments(
        token_view(q), token_view(k), token_view(v), query_sequences(call), key_sequences(call),
        forward.Scale(scale, score_unit(call) * LOG2E),
        forward.Heads(opaque(heads), opaque(heads // max(1, kv_heads))),
    )  # fmt: skip


def rows_of_a_tile(call: Call, block_m: int) -> int:
    """Of a decode tile, at most: the queries of a KV head, as far as it holds them."""
    q, kv_heads = call.operands.q, call.operands.k.shape[-2]
    return min(block_m, call.seqlen_q * q.shape[-2] // kv_heads)


def token_view(x: Tensor) -> views.TokenView:
    strides = x.stride()
    batch = strides[0] if len(strides) == 4 else 0
    far = 1 if strides[-3] > FAR else None
    return views.TokenView(x, batch, strides[-3], strides[-2], far)


def row_view(x: Tensor) -> views.RowView:
    """x: contiguous (batch, heads, length) or (heads, total)."""
    strides = x.stride()
    batch = strides[0] if len(strides) == 3 else 0
    return views.RowView(x, opaque(batch), opaque(strides[-2]))


def query_sequences(call: Call) -> views.Sequences:
    q, seqs = call.operands.q, call.sequences
    tokens = q.shape[0] if call.varlen else q.shape[1]
    return views.Sequences(opaque(call.batch), opaque(tokens), seqs.cu_seqlens_q, seqs.seqused_q)


def key_sequences(call: Call) -> views.Sequences:
    k, seqs = call.operands.k, call.sequences
    table = seqs.block_table
    tokens = k.shape[0] if k.dim() == 3 else k.shape[1]
    if table is None:
        cu_seqlens = seqs.cu_seqlens_k if k.dim() == 3 else None
        return views.Sequences(
            opaque(call.batch), opaque(tokens), cu_seqlens, seqs.seqused_k,
            seqs.cache_leftpad, seqs.cache_batch_idx,
            pages=None if seqs.cache_batch_idx is None else opaque(k.shape[0]),
        )  # fmt: skip
    return views.Sequences(
        opaque(call.batch), opaque(tokens * table.shape[1]), seqs.cu_seqlens_k, seqs.seqused_k,
        table=table, table_stride=table.stride(0), page_size=opaque(tokens),
        pages=opaque(k.shape[0]),
    )  # fmt: skip


def tile(call: Call, config: KernelConfig, precision: str) -> Tile:
    q, _, v = call.operands[:3]
    return Tile(config.block_q, config.block_k, q.shape[-1], v.shape[-1], precision)


def matrix_view(x: Tensor) -> masks.MatrixView:
    """A (1|batch, 1|heads, 1|seqlen_q, seqlen_k) tensor; broadcast dimensions get stride 0."""
    batch, head, row = (
        0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return masks.MatrixView(x, batch, head, row, x.stride(3))


def score_unit(call: Call) -> float:
    """What the kernels count scores in (see `kernels.scores`)."""
    if call.variant.score_mod:
        return 1.0  # the user's function gets natural units
    if call.variant.softcap > 0.0:
        return call.variant.softcap
    return call.variant.softmax_scale if call.variant.softmax_scale > LEAST_UNIT else 1.0


def score_mods(call: Call, nvidia: bool) -> tuple[scores.ScoreMod, ...]:
    """Scale or softcap, unless the unit says it all, then ALiBi, bias, the user's function and
    float mask, in the contract's order."""
    operands, scale, cap = call.operands, call.variant.softmax_scale, call.variant.softcap
    unit, found = score_unit(call), []
    if cap > 0.0:
        approximate = nvidia and operands.q.element_size() == 2
        function = scores.softcap_approximate if approximate else scores.softcap
        found.append(scores.ScoreMod(function, (scale / cap,), scores.softcap_slope))
        if unit != cap:
            found.append(scores.ScoreMod(scores.scaled, (cap,)))
    elif unit != scale:
        found.append(scores.ScoreMod(scores.scaled, (scale,)))
    slopes = operands.alibi_slopes
    if slopes is not None:
        slopes = slopes.contiguous()
        stride = slopes.stride(0) if slopes.dim() == 2 else 0
        found.append(scores.ScoreMod(scores.alibi, (slopes, opaque(stride), 1.0 / unit)))
    own = functions.score_function(call)
    users = None if own is None else scores.ScoreMod(own.fn, own.args, own.slope, masks.within_ends)
    added = (_added(x, unit) for x in (operands.bias, float_mask(call)))
    return (*found, *filter(None, (next(added), users, next(added))))


def _added(matrix: Tensor | None, unit: float) -> scores.ScoreMod | None:
    if matrix is None:
        return None
    return scores.ScoreMod(scores.add_matrix, (matrix_view(matrix), 1.0 / unit))


def around_bias(
    mods: tuple[scores.ScoreMod, ...],
) -> tuple[tuple[scores.ScoreMod, ...], scores.ScoreMod, tuple[scores.ScoreMod, ...]]:
    """Score mods before the bias, the bias, and those after it, by whose slopes its gradient is."""
    i = next(i for i, mod in enumerate(mods) if mod.fn is scores.add_matrix)
    return mods[:i], mods[i], mods[i + 1 :]


def mask_functions(call: Call) -> tuple[masks.Mask, ...]:
    """The user's mask, which may carry ranges."""
    own = functions.mask_function(call)
    if own is None:
        return ()
    return (masks.Mask(own.fn, own.args, own.keys or masks.anywhere,
                       own.queries or masks.anywhere, place=masks.within_ends),)  # fmt: skip


def float_mask(call: Call) -> Tensor | None:
    mask = call.operands.attn_mask
    return mask if mask is not None and mask.is_floating_point() else None


def scale_view(scale: Tensor | None, x: Tensor, batch: int) -> views.ScaleView | None:
    """The scales of an e4m3 k or v; None: they are 1."""
    if scale is None:
        return None
    return views.ScaleView(scale, *map(opaque, scale_strides(scale, x, batch)))


def band(call: Call) -> tuple[masks.Mask, ...]:
    """Causality, the window, chunks and the tree: masks that carry ranges."""
    left, right = call.variant.window_left, call.variant.window_right
    far = call.seqlen_q + call.seqlen_k  # no two tokens are further apart
    found = []
    if left != UNBOUNDED:
        found.append(masks.Mask(masks.not_earlier, (opaque(min(left, far)),),
                                masks.not_earlier_keys, masks.not_earlier_queries))  # fmt: skip
    if right != UNBOUNDED:
        found.append(masks.Mask(masks.not_later, (opaque(min(right, far)),),
                                masks.not_later_keys, masks.not_later_queries))  # fmt: skip
    if call.variant.attention_chunk > 0:
        chunk = opaque(min(call.variant.attention_chunk, far))
        found.append(masks.Mask(masks.same_chunk, (chunk,), masks.same_chunk_keys,
                                masks.same_chunk_queries))  # fmt: skip
    tree = call.operands.tree_mask
    if tree is not None:
        strides = 0 if tree.shape[0] == 1 else tree.stride(0), *tree.stride()[1:]
        view = masks.TreeView(make(as_bytes, tree), *map(opaque, (tree.shape[1], *strides)))
        found.append(masks.Mask(masks.in_tree, (view,), masks.in_tree_keys, masks.in_tree_queries))
    return tuple(found)


def as_bytes(x: Tensor) -> Tensor:
    """A bool or e4m3 tensor as kernels read it."""
    return x.view(torch.uint8)


def tensor_masks(call: Call, classifying: bool = False) -> tuple[masks.Mask, ...]:
    """Documents and the mask tensor. A float mask hides only where whole tiles are -inf."""
    operands, found = call.operands, []
    if operands.document_ids_q is not None and operands.document_ids_k is not None:
        ids = tuple(
            masks.IdsView(make(Tensor.contiguous, x), opaque(x.shape[1] if x.dim() == 2 else 0))
            for x in (operands.document_ids_q, operands.document_ids_k)
        )
        found.append(masks.Mask(masks.same_document, ids, tile=masks.same_document_tile))
    mask = operands.attn_mask
    if mask is not None and not mask.is_floating_point():
        view = matrix_view(mask)._replace(ptr=make(as_bytes, mask))
        found.append(masks.Mask(masks.mask_tensor, (view,), tile=masks.mask_tensor_tile))
    elif mask is not None and classifying:
        view = matrix_view(mask)
        found.append(masks.Mask(masks.finite_mask, (view,), tile=masks.finite_mask_tile))
    return tuple(found)


def dropouts(call: Call, nvidia: bool) -> tuple[dropout.Dropout, ...]:
    variant, state = call.variant, call.operands.rng_state
    if variant.dropout_p == 0.0 or state is None:
        return ()
    threshold = drop_threshold(variant.dropout_p)
    rescale = 1.0 / (1.0 - variant.dropout_p) if threshold < NUMBERS else 1.0
    heads = opaque(call.operands.q.shape[-2])
    found = dropout.Dropout(state, float(threshold), rescale, heads)
    if nvidia:
        found = found._replace(
            multiply=dropout.multiply_wide, own_halves=dropout.own_halves_at_once
        )
    if nvidia and threshold <= dropout.INFINITY:
        found = found._replace(
            zero_below=dropout.zero_below_in_pairs, score_gradient=dropout.score_gradient_in_pairs
        )
    return (found,)


def variant(call: Call, nvidia: bool, blocks: schedule.BlockList | None = None) -> forward.Variant:
    tensors = call.operands
    return forward.Variant(
        score_mods(call, nvidia),
        band(call) + mask_functions(call) + tensor_masks(call),
        dropouts(call, nvidia),
        blocks,
        scale_view(tensors.k_descale, tensors.k, call.batch),
        scale_view(tensors.v_descale, tensors.v, call.batch),
    )
