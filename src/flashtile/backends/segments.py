"""Runs of sequences with equal lengths: what the torch backend loops over, and where they lie.

A segment hides dense, varlen, leftpadded, remapped and paged storage behind four functions that
hand out a block of rows: q's and k's tokens as (batches, rows, heads, head_dim), and lse's rows as
(batches, heads, rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.mods import Tile
from flashtile.problem import E4M3, Call
from flashtile.quantize import scale_kind


class Segment(NamedTuple):
    batch: int  # first sequence
    batches: int
    seqlen_q: int
    seqlen_k: int
    q_start: int | None = None  # first row in a packed token dimension; None if q is dense
    k_start: int | None = None
    k_row: int = 0  # first row of k's batch dimension
    leftpad: int = 0  # unused slots before the first key
    pages: Tensor | None = None  # (seqlen_k,) page of each key
    slots: Tensor | None = None  # (seqlen_k,) its slot in the page

    def tile(self, row: int, rows: int, col: int, cols: int) -> Tile:
        return Tile(
            self.batch, self.batches, row, rows, col, cols, self.seqlen_q, self.seqlen_k,
            self.q_start or 0, self.k_start or 0, self.leftpad,
        )  # fmt: skip

    def q_rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Queries [lo, hi) of a q-shaped tensor: (batches, hi - lo, heads, head_dim), a view."""
        if self.q_start is not None:
            return x[self.q_start + lo : self.q_start + hi].unsqueeze(0)
        return x[self.batch : self.batch + self.batches, lo:hi]

    def lse_rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Queries [lo, hi) of an lse-shaped tensor: (batches, heads, hi - lo), a view."""
        if self.q_start is not None:
            return x[:, self.q_start + lo : self.q_start + hi].unsqueeze(0)
        return x[self.batch : self.batch + self.batches, :, lo:hi]

    def k_rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Keys [lo, hi) of a k-shaped tensor: (batches, hi - lo, kv_heads, head_dim)."""
        if self.pages is not None and self.slots is not None:
            at = self.pages[lo:hi], self.slots[lo:hi]
            if x.dtype == E4M3:  # torch does not index it
                return x.view(torch.uint8)[at].view(E4M3).unsqueeze(0)
            return x[at].unsqueeze(0)
        return self._k_view(x, lo, hi)

    def scales(self, scale: Tensor, x: Tensor, lo: int, hi: int) -> Tensor:
        """Scales of keys [lo, hi) of a k-shaped tensor, (batches, rows, kv_heads, 1) or fewer."""
        if scale_kind(scale, x, -1) == "token":
            return self.k_rows(scale.unsqueeze(-1), lo, hi)
        if scale.dim() == 2:  # a batch row's
            return scale[self.batch : self.batch + self.batches, None, :, None]
        return scale.unsqueeze(-1)

    def add_k_rows(self, x: Tensor, lo: int, hi: int, rows: Tensor) -> None:
        """Add to keys [lo, hi); pages and cache rows may be shared between sequences."""
        if self.pages is not None and self.slots is not None:
            x.index_put_((self.pages[lo:hi], self.slots[lo:hi]), rows[0], accumulate=True)
        else:
            self._k_view(x, lo, hi).add_(rows)

    def _k_view(self, x: Tensor, lo: int, hi: int) -> Tensor:
        lo, hi = lo + self.leftpad, hi + self.leftpad
        if self.k_start is not None:
            return x[self.k_start + lo : self.k_start + hi].unsqueeze(0)
        return x[self.k_row : self.k_row + self.batches, lo:hi]


def segments(call: Call, batches: int) -> Iterator[Segment]:
    """Cut a call into segments, of at most `batches` sequences where their lengths are equal.

    Lengths are read on the host: free on the CPU, a sync elsewhere.
    """
    seqs, (q, k, _) = call.sequences, call.operands[:3]
    if q.shape[-2] == 0:
        return
    if not call.ragged:
        for first in range(0, call.batch, batches):
            count = min(batches, call.batch - first)
            yield Segment(first, count, q.shape[1], k.shape[1], k_row=first)
        return
    q_spans = _query_spans(call)
    k_spans = _key_spans(call)
    rows = _host(seqs.cache_batch_idx) or range(call.batch)
    for b, ((q_start, seqlen_q), (k_start, pad, seqlen_k)) in enumerate(
        zip(q_spans, k_spans, strict=True)
    ):
        pages = slots = None
        if seqs.block_table is not None:
            page_size = k.shape[1]
            at = torch.arange(pad, pad + seqlen_k, device=k.device)
            pages, slots = seqs.block_table[b].long()[at // page_size], at % page_size
        packed = k_start if k.dim() == 3 else None
        yield Segment(b, 1, seqlen_q, seqlen_k, q_start, packed, rows[b], pad, pages, slots)


def _host(x: Tensor | None) -> list[int]:
    return [] if x is None else x.tolist()


def _query_spans(call: Call) -> list[tuple[int | None, int]]:
    """(first row or None, length) of each query sequence."""
    seqs = call.sequences
    cu, used = _host(seqs.cu_seqlens_q), _host(seqs.seqused_q)
    spans: list[tuple[int | None, int]] = []
    for b in range(call.batch):
        start, length = (cu[b], cu[b + 1] - cu[b]) if cu else (None, call.operands.q.shape[1])
        spans.append((start, used[b] if used else length))
    return spans


def _key_spans(call: Call) -> list[tuple[int, int, int]]:
    """(first row, leftpad, length) of each key sequence."""
    seqs = call.sequences
    cu, used, pads = _host(seqs.cu_seqlens_k), _host(seqs.seqused_k), _host(seqs.cache_leftpad)
    spans = []
    for b in range(call.batch):
        start, length = (cu[b], cu[b + 1] - cu[b]) if cu else (0, call.operands.k.shape[1])
        length, pad = used[b] if used else length, pads[b] if pads else 0
        spans.append((start, pad, max(0, length - pad)))
    return spans
