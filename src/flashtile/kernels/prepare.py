"""What backward needs of the forward, row by row, in one pass over out and dout."""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.numbers import LOG2E, number
from flashtile.kernels.views import load_tile, open_sequence, open_tile, row_pointers, tokens


@triton.jit
def row_numbers(o, do, lse, dlse, span, head, rows):
    """(lse, delta = rowsum(dout * out) - dlse) of rows; (+inf, 0) of those that saw no key, whose
    dlse may be NaN, and of those past the end."""
    valid = rows < span.length
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(row_pointers(dlse, span, head, rows), mask=valid, other=0.0)
    row_lse = tl.load(row_pointers(lse, span, head, rows), mask=valid, other=-float("inf"))
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
    return row_lse, tl.where(row_lse == float("inf"), 0.0, row_delta)


@triton.jit
def sink_weights(sink, head, lse):
    """What a head's sink takes of each row's probabilities."""
    return tl.math.exp2((tl.load(sink + head).to(tl.float32) - lse) * LOG2E)


@triton.jit
def prepare_backward(out, dout, lse, dlse, saved, sink, dsink, q_seq, heads, rescale,
                     TILE: tl.constexpr):  # fmt: skip
    """delta = rowsum(dout * out) - dlse, lse in log2 units with +inf for rows that saw no key, and
    this tile's share of dsink = -sum(exp(sink - lse) * delta). rescale: dropout's, by which the
    delta that is saved is divided, or None."""
    BLOCK_M: tl.constexpr = TILE.block_m
    tile = tl.program_id(0)
    batch, head, first = open_tile(q_seq, number(heads.count), tile, False, BLOCK_M)
    span = open_sequence(q_seq, batch)
    rows = first + tl.arange(0, BLOCK_M)
    valid = rows < span.length
    o = load_tile(out, tokens(out, q_seq, span, head), q_seq, span, first, False, BLOCK_M,
                  TILE.dim_v, TILE.padded_v)  # fmt: skip
    do = load_tile(dout, tokens(dout, q_seq, span, head), q_seq, span, first, False, BLOCK_M,
                   TILE.dim_v, TILE.padded_v)  # fmt: skip
    row_lse, row_delta = row_numbers(o, do, lse, dlse, span, head, rows)
    pair = row_pointers(saved, span, head, rows, 4)
    tl.store(pair, row_lse * LOG2E, mask=valid)
    saved_delta = row_delta if rescale is None else row_delta / rescale
    tl.store(pair + 1, saved_delta, mask=valid)
    if sink is not None:
        tl.store(dsink + tile, -tl.sum(sink_weights(sink, head, row_lse) * row_delta, 0))
