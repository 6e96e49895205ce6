"""Gradients of paged K and V: gather the pages, take dense gradients, add them back.

Pages may be shared between sequences, so their gradients are sums; `index_put_` with accumulate
sorts its indices, which makes the sums deterministic. Entries of the table past a sequence's end
are never read: their slots gather page 0 and are not in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashtile.backends.torch import Gradients
from flashtile.plan import Plan
from flashtile.problem import Call


def backward(
    call: Call,
    plan: Plan,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
    dense_backward: Callable[..., Gradients],
) -> Gradients:
    """The gradients asked for, with dK and dV in the pool's shape."""
    k, v = call.operands.k, call.operands.v
    pages, slots = _places(call)
    dense = call._replace(
        operands=call.operands._replace(k=k[pages, slots], v=v[pages, slots]),
        sequences=call.sequences._replace(
            block_table=None, cache_batch_idx=None, cu_seqlens_k=None, seqused_k=_lengths(call)
        ),
    )
    found = dense_backward(dense, plan, dout, dlse, out, lse, needs)
    return found._replace(
        k=_scatter(found.k, k, pages, slots), v=_scatter(found.v, v, pages, slots)
    )


def _lengths(call: Call) -> Tensor:
    seqs = call.sequences
    if seqs.seqused_k is not None:
        return seqs.seqused_k
    if seqs.cu_seqlens_k is not None:
        return seqs.cu_seqlens_k.diff()
    return call.operands.q.new_full((call.batch,), call.seqlen_k, dtype=torch.int32)


def _places(call: Call) -> tuple[Tensor, Tensor]:
    """Page and slot of every token up to capacity: (batch, capacity), page 0 past the end."""
    table, page_size = call.sequences.block_table, call.operands.k.shape[1]
    if table is None:  # a row of the cache is a page
        assert call.sequences.cache_batch_idx is not None
        table = call.sequences.cache_batch_idx[:, None]
    position = torch.arange(table.shape[1] * page_size, device=table.device)
    pages = table.long()[:, position // page_size]
    used = position < _lengths(call)[:, None]
    return torch.where(used, pages, 0), (position % page_size).expand_as(pages)


def _scatter(grad: Tensor | None, pool: Tensor, pages: Tensor, slots: Tensor) -> Tensor | None:
    if grad is None:
        return None
    total = torch.zeros(pool.shape, dtype=torch.float32, device=pool.device)
    return total.index_put_((pages, slots), grad.float(), accumulate=True).to(pool.dtype)
