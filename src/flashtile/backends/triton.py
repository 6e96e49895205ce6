"""The portable kernels' host side: from a call and its plan to launches.

Every feature of the contract on any GPU that Triton compiles for; no length is read on the host,
and grids depend on shapes alone, so that a captured graph replays with other lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import config as switches
from flashtile.backends import blocklists, operands, paged
from flashtile.backends.launch import Launch, processors, run
from flashtile.backends.operands import row_view, token_view
from flashtile.backends.replays import empty, make
from flashtile.backends.torch import Gradients
from flashtile.kernels import backward as backward_kernels
from flashtile.kernels import bias as bias_kernels
from flashtile.kernels import forward as forward_kernels
from flashtile.kernels import prepare
from flashtile.kernels.config import BiasTile
from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import RowView
from flashtile.mods.functions import mask_function
from flashtile.plan import Plan
from flashtile.problem import Call
from flashtile.tiles import CHUNK, KernelConfig, KernelConfigs, chunk

PREPARE_ROWS = 64


def forward(call: Call, plan: Plan, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call; rows of no sequence and rows that see no key are 0 and -inf. out is in
    q's dtype, unless another is given."""
    q, v = call.operands.q, call.operands.v
    out = empty((*q.shape[:-1], v.shape[-1]), q, out_dtype)
    lse = empty(call.lse_shape, q, torch.float32)
    run(forward_launch(call, plan, out, lse))
    return out, lse


def forward_launch(call: Call, plan: Plan, out: Tensor, lse: Tensor) -> Launch:
    configs = _configs(plan)
    lists = blocklists.by_queries(call)
    a = operands.arguments(call)
    variant = operands.variant(call, plan.nvidia, lists)
    tile = operands.tile(call, configs.forward, _precision())
    return Launch(
        forward_kernels.attention_forward,
        query_grid(call, configs.forward.block_q),
        (a.q, a.k, a.v, token_view(out), row_view(lse), a.q_seq, a.k_seq, variant,
         call.operands.learnable_sink, a.scale, a.heads, tile),
        configs.forward.num_warps, configs.forward.num_stages,
        max_registers=configs.forward.max_registers,
    )  # fmt: skip


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
    if call.sequences.block_table is not None or call.sequences.cache_batch_idx is not None:
        return paged.backward(call, plan, dout, dlse, out, lse, needs, backward)
    configs, tensors = _configs(plan), call.operands
    if out.numel() == 0 or call.batch == 0:  # nothing, or tokens of no sequence
        wanted = (tensors.q, tensors.k, tensors.v, tensors.bias, tensors.learnable_sink)
        return Gradients(*(
            x.new_zeros(x.shape) if x is not None and need else None
            for x, need in zip(wanted, needs, strict=True)
        ))  # fmt: skip
    dout = dout if dout.stride(-1) == 1 else make(Tensor.contiguous, dout)
    rows = empty((*lse.shape, 4), lse)
    saved = backward_kernels.Saved(token_view(dout), row_view(lse)._replace(ptr=rows))
    dsink = _prepare(call, dlse, out, lse, saved, needs[4])
    dq = dk = dv = dbias = None
    if needs[0]:
        dq = empty(tensors.q.shape, tensors.q)
        run(_dq_launch(call, plan, configs.dq, saved, dq))
    if needs[1] or needs[2]:
        # Slots before a leftpad are no tile's.
        allocate = empty if call.sequences.cache_leftpad is None else _zeros
        dk, dv = (allocate(x.shape, x) for x in (tensors.k, tensors.v))
        run(_dkdv_launch(call, plan, configs.dkdv, saved, dk, dv))
    if needs[3] and tensors.bias is not None:
        dbias = _bias_gradient(call, plan, configs.dbias, saved)
    return Gradients(dq, dk if needs[1] else None, dv if needs[2] else None, dbias, dsink)


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    return make(partial(torch.zeros, shape, dtype=like.dtype, device=like.device))


def _configs(plan: Plan) -> KernelConfigs:
    if plan.kernels is None:
        raise ValueError(f"plan.kernels is None; the plan is for the {plan.backend} backend")
    return plan.kernels


def _precision() -> str:
    return "tf32" if switches.allow_tf32 else "ieee"


def query_grid(call: Call, block: int) -> int:
    """Tiles of queries of all heads of all sequences."""
    return _tiles(call.operands.q, call.varlen, call.batch, block) * call.operands.q.shape[-2]


def key_grid(call: Call, block: int) -> int:
    """Tiles of keys of all KV heads of all sequences."""
    k = call.operands.k
    return _tiles(k, k.dim() == 3, call.batch, block) * k.shape[-2]


def _tiles(x: Tensor, packed: bool, batch: int, block: int) -> int:
    """Tiles of all sequences, as `open_tile` counts them."""
    if packed:
        return x.shape[0] // block + batch + 1
    return -(-x.shape[1] // block) * batch


def _prepare(
    call: Call,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    saved: backward_kernels.Saved,
    sink: bool,
) -> Tensor | None:
    """Fill what all gradients share, delta and lse in log2 units; dsink, if it is asked for."""
    grid = query_grid(call, PREPARE_ROWS)
    logits = call.operands.learnable_sink if sink else None
    shares = None if logits is None else empty((grid,), lse)
    config = KernelConfig(PREPARE_ROWS, 16, 4, 1)
    dropped = operands.dropouts(call, False)
    run(Launch(
        prepare.prepare_backward, grid,
        (token_view(out), saved.dout, row_view(lse),
         gradient_rows(dlse), saved.rows, logits, shares,
         operands.query_sequences(call), operands.arguments(call).heads,
         dropped[0].rescale if dropped else None,
         operands.tile(call, config, "ieee")),
        config.num_warps, config.num_stages,
    ))  # fmt: skip
    if logits is None or shares is None:
        return None
    return sink_gradient(call, logits, shares)


def gradient_rows(dlse: Tensor | None) -> RowView | None:
    """dlse as kernels read it, or a copy."""
    if dlse is None:
        return None
    return row_view(dlse if dlse.is_contiguous() else make(Tensor.contiguous, dlse))


def sink_gradient(call: Call, logits: Tensor, shares: Tensor) -> Tensor:
    """dsink from a share for each tile of queries, head by head."""
    batches, heads, dtype = 1 if call.varlen else call.batch, logits.shape[0], logits.dtype
    return make(lambda x: x.view(batches, heads, -1).sum((0, 2)).to(dtype), shares)


def _dq_launch(
    call: Call, plan: Plan, config: KernelConfig, saved: backward_kernels.Saved, dq: Tensor
) -> Launch:
    a = operands.arguments(call)
    variant = operands.variant(call, plan.nvidia, blocklists.by_queries(call))
    return Launch(
        backward_kernels.attention_backward_dq, query_grid(call, config.block_q),
        (a.q, a.k, a.v, token_view(dq), saved, a.q_seq, a.k_seq, variant, a.scale, a.heads,
         operands.tile(call, config, _precision())),
        config.num_warps, config.num_stages, max_registers=config.max_registers,
    )  # fmt: skip


def _dkdv_launch(
    call: Call, plan: Plan, config: KernelConfig, saved: backward_kernels.Saved, dk: Tensor,
    dv: Tensor,
) -> Launch:  # fmt: skip
    a = operands.arguments(call)
    variant = operands.variant(call, plan.nvidia, blocklists.by_keys(call))
    return Launch(
        backward_kernels.attention_backward_dkdv, key_grid(call, config.block_k),
        (a.q, a.k, a.v, token_view(dk), token_view(dv), saved, a.q_seq, a.k_seq, variant, a.scale,
         a.heads, operands.tile(call, config, _precision())),
        config.num_warps, config.num_stages, max_registers=config.max_registers,
    )  # fmt: skip


def _bias_gradient(
    call: Call, plan: Plan, config: KernelConfig, saved: backward_kernels.Saved
) -> Tensor:
    """dbias, fp32 sums over what the bias is broadcast in, in the bias's dtype."""
    bias = call.operands.bias
    assert bias is not None
    batches, heads, rows, columns = bias.shape
    pairs = call.batch * call.operands.q.shape[-2] // max(1, batches * heads)
    share = bias_share(bias.shape, pairs, config, processors(bias.device))
    if share.parts == 1:
        grad = empty(bias.shape, bias)
    else:
        grad = empty((share.parts, *bias.shape), bias, torch.float32)
    a, dims = operands.arguments(call), (call.operands.q.shape[-1], call.operands.v.shape[-1])
    variant = operands.variant(call, plan.nvidia)
    ragged = any(
        x is not None for s in (a.q_seq, a.k_seq) for x in (s.cu_seqlens, s.used, s.leftpad)
    )
    own = mask_function(call)
    ranged = own is not None and own.keys is not None  # which may read a sequence's number
    shape = bias_kernels.BiasShape(
        opaque(batches), opaque(heads), opaque(rows), columns, opaque(share.parts),
        opaque(share.run), 1 if ragged or ranged else None,
    )  # fmt: skip
    before, added, after = operands.around_bias(variant.score_mods)
    parted = bias_kernels.BiasVariant(before, after, variant.masks, variant.dropouts)
    one_row = bias_kernels.attention_backward_dbias_row
    run(Launch(
        one_row if rows == 1 else bias_kernels.attention_backward_dbias, share.programs,
        (a.q, a.k, a.v, bias_kernels.Bias(*added.args), grad, shape, saved, a.q_seq,
         a.k_seq, parted, a.scale, a.heads,
         BiasTile(config.block_q, config.block_k, *dims, _precision(), _dims_at_once(call))),
        config.num_warps, config.num_stages, max_registers=config.max_registers,
    ))  # fmt: skip
    if share.parts == 1:
        return grad
    dtype = bias.dtype  # a replay keeps the function, and would keep the bias with it
    return make(lambda x: x.sum(0).to(dtype), grad)


def _dims_at_once(call: Call) -> int:
    """Head dims that dbias multiplies at a time: fewer where a tile of 8 bytes an element, which
    takes 64 KiB of shared memory on its way to the scores, may be read for them."""
    variant, tensors = call.variant, (call.operands.bias, call.operands.attn_mask)
    wide = any(x is not None and x.element_size() == 8 for x in tensors)
    found = chunk(call.operands.q.shape[-1], call.operands.v.shape[-1])
    return min(found, CHUNK // 2) if wide or variant.score_mod or variant.mask_mod else found


class BiasShare(NamedTuple):
    """How the tiles of a bias are shared out."""

    programs: int
    parts: int  # of the pairs of batch and head that a tile is summed over
    run: int  # tiles beside each other that a program has


STEPS = 32
"""Products of tiles that a program of dbias does one after another, at most: what its first loads
wait for is little beside them, and the last programs end together."""


def bias_share(
    shape: Sequence[int], pairs: int, config: KernelConfig, processors: int
) -> BiasShare:
    """Programs for a bias that `pairs` of batch and head share: two at least for each
    multiprocessor, if there is that much to do."""
    batches, heads, rows, columns = shape
    beside = -(-columns // config.block_k)
    others = -(-rows // config.block_q) * heads * batches
    tiles = beside * others
    if tiles == 0:
        return BiasShare(0, 1, 1)
    parts = max(1, min(pairs, 2 * processors // tiles))
    run = 1 if rows == 1 else max(1, min(beside, STEPS // pairs, tiles // (4 * processors)))
    return BiasShare(-(-beside // run) * others * parts, parts, run)
