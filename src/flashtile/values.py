"""Checks of values that live on a device: lengths, offsets, page tables.

On the CPU they always run; on an accelerator only with `flashtile.config.checked`, since reading
them is a host sync. They run before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile import config
from flashtile.backends.cache import NewTokens
from flashtile.problem import UNBOUNDED, Call


def _reads(x: Tensor) -> bool:
    return x.device.type == "cpu" or config.checked


def check(call: Call) -> None:
    """Lengths and tables of a call that only reads."""
    if not _reads(call.operands.q):
        return
    seqs, operands = call.sequences, call.operands
    _check_offsets("cu_seqlens_q", seqs.cu_seqlens_q, operands.q.shape[0])
    paged = seqs.block_table is not None
    _check_offsets("cu_seqlens_k", seqs.cu_seqlens_k, None if paged else operands.k.shape[0])
    _check_longest("max_seqlen_q", seqs.max_seqlen_q, seqs.cu_seqlens_q)
    _check_longest("max_seqlen_k", seqs.max_seqlen_k, seqs.cu_seqlens_k)
    keys = seqs.seqused_k if seqs.cu_seqlens_k is None else seqs.cu_seqlens_k.diff()
    _check_masks(call, keys)
    _check_used("seqused_q", seqs.seqused_q, seqs.cu_seqlens_q, call.seqlen_q)
    room = seqs.cu_seqlens_k if not paged else None
    rows = operands.k.dim() == 4 and not paged  # of a cache, whatever the queries are
    name = "cache_seqlens" if rows or not call.varlen else "seqused_k"
    holder = "k_cache" if rows else "block_table" if paged else "k"
    _check_used(name, seqs.seqused_k, room, call.seqlen_k, holder)
    _check_used("cache_leftpad", seqs.cache_leftpad, None, call.seqlen_k)
    _check_rows(call)
    if paged:
        lengths = seqs.seqused_k
        if lengths is None and seqs.cu_seqlens_k is not None:
            lengths = seqs.cu_seqlens_k.diff()
            if (longest := _largest(lengths)) > call.seqlen_k:
                raise ValueError(
                    f"cu_seqlens_k has a sequence of {longest} keys; block_table holds at most "
                    f"{call.seqlen_k} a row"
                )
        _check_pages(call, lengths)


def check_append(call: Call, new: NewTokens) -> None:
    """Lengths and tables of a call over a cache that may append: nothing has been written yet."""
    if not _reads(call.operands.q):
        return
    if new.k is None:
        check(call)
        return
    capacity, seqs = call.seqlen_k, call.sequences
    if seqs.seqused_k is None or seqs.seqused_k.numel() == 0:
        return
    lengths = seqs.seqused_k.long()  # int32 would wrap at the top
    _check_offsets("cu_seqlens_q", seqs.cu_seqlens_q, call.operands.q.shape[0])
    _check_offsets("cu_seqlens_k_new", new.cu_seqlens, new.k.shape[0])
    _check_longest("max_seqlen_q", seqs.max_seqlen_q, seqs.cu_seqlens_q)
    if int(lengths.min()) < 0:
        raise ValueError(f"cache_seqlens holds {int(lengths.min())}; lengths are at least 0")
    counts = lengths * 0 + new.k.shape[1] if new.cu_seqlens is None else new.cu_seqlens.diff()
    after = lengths + counts
    if (most := _largest(after)) > capacity:
        where = "block_table" if seqs.block_table is not None else "k_cache"
        tokens = int(counts[int(after.argmax())])
        raise ValueError(
            f"cache_seqlens plus {tokens} new tokens reaches {most}; {where} holds {capacity}"
        )
    _check_masks(call, after)
    if new.rotary_cos is not None:
        _check_positions(call, new, counts, new.rotary_cos.shape[0])
    _check_used("cache_leftpad", seqs.cache_leftpad, None, call.seqlen_k)
    _check_rows(call)
    _check_pages(call, after)


def _check_positions(call: Call, new: NewTokens, counts: Tensor, positions: int) -> None:
    """Every token has a rotary position."""
    lengths, cu_seqlens_q = call.sequences.seqused_k, call.sequences.cu_seqlens_q
    given = lengths if new.rotary_seqlens is None else new.rotary_seqlens
    assert given is not None
    start = given.long()
    queries = counts * 0 + call.seqlen_q if cu_seqlens_q is None else cu_seqlens_q.diff()
    steps = torch.maximum(counts, queries if call.banded else queries.clamp(max=1))
    name = "cache_seqlens" if new.rotary_seqlens is None else "rotary_seqlens"
    if int(start.min()) < 0:
        raise ValueError(f"{name} holds {int(start.min())}; positions are at least 0")
    if (last := _largest(start + steps)) > positions:
        raise ValueError(
            f"rotary_cos has {positions} positions; {name} plus the new tokens needs {last}"
        )


def _largest(x: Tensor) -> int:
    return int(x.max()) if x.numel() else 0


def _check_offsets(name: str, cu_seqlens: Tensor | None, total: int | None) -> None:
    if cu_seqlens is None:
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{name} starts at {int(cu_seqlens[0])}; it must start at 0")
    steps = cu_seqlens.diff()
    if steps.numel() and int(steps.min()) < 0:
        at = int(steps.argmin())
        raise ValueError(f"{name} decreases after entry {at}: {cu_seqlens.tolist()[at : at + 2]}")
    if total is not None and int(cu_seqlens[-1]) > total:
        raise ValueError(f"{name} ends at {int(cu_seqlens[-1])}; there are {total} tokens")


def _check_longest(name: str, longest: int, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None or longest == UNBOUNDED or cu_seqlens.numel() < 2:
        return
    actual = _largest(cu_seqlens.diff())
    if actual > longest:
        raise ValueError(f"{name} is {longest}; the longest sequence has {actual} tokens")


def _check_masks(call: Call, keys: Tensor | None) -> None:
    """bias and attn_mask of packed sequences reach to the end of the longest."""
    seqs = call.sequences
    if seqs.cu_seqlens_q is None:
        return
    queries, slots = (0 if n is None else _largest(n) for n in (seqs.cu_seqlens_q.diff(), keys))
    for name in ("bias", "attn_mask"):
        x = getattr(call.operands, name)
        if x is not None and ((x.shape[2] != 1 and x.shape[2] < queries) or x.shape[3] < slots):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; the longest sequences have {queries} "
                f"queries and {slots} keys"
            )


def _check_used(
    name: str,
    used: Tensor | None,
    cu_seqlens: Tensor | None,
    capacity: int,
    holder: str = "the sequence",
) -> None:
    if used is None or used.numel() == 0:
        return
    room = cu_seqlens.diff() if cu_seqlens is not None else used.new_full(used.shape, capacity)
    wrong = (used < 0) | (used > room)
    if bool(wrong.any()):
        at = int(wrong.long().argmax())
        raise ValueError(
            f"{name}[{at}] is {int(used[at])}; it must be in [0, {int(room[at])}], "
            f"what {holder} holds"
        )


def _check_rows(call: Call) -> None:
    rows = call.sequences.cache_batch_idx
    if rows is not None and rows.numel():
        low, high, count = int(rows.min()), int(rows.max()), call.operands.k.shape[0]
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"cache_batch_idx holds {wrong}; the cache has {count} rows")


def _check_pages(call: Call, lengths: Tensor | None) -> None:
    """Page numbers in use; entries past the last page of a row are never read."""
    table = call.sequences.block_table
    if table is None:
        return
    pages, page_size = call.operands.k.shape[:2]
    in_use = torch.ones_like(table, dtype=torch.bool)
    if lengths is not None:
        columns = torch.arange(table.shape[1], device=table.device)
        in_use = columns < -(-lengths[:, None] // page_size)
    wrong = ((table < 0) | (table >= pages)) & in_use
    if bool(wrong.any()):
        raise ValueError(f"block_table holds page {int(table[wrong][0])}; the pool has {pages}")
