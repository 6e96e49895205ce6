"""Where rows lie: tensors by their strides, sequences dense, packed, padded, cached or paged.

The mainloops see logical row numbers of one sequence; only this file knows storage. All addresses
are computed in 64 bits. Absent (None) fields vanish at compile time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number

NEIGHBOURS = tl.constexpr(4)
"""Tiles of one head of packed sequences that are next to each other in a grid."""

ROWS = tl.constexpr(16)
"""Rows that a program loads at once where a thread loads 16 bytes: of head dim 64 with four warps,
of 128 with eight."""


class TokenView(NamedTuple):
    """A (batch, token, head, dim) operand, or (token, head, dim) with stride_batch 0."""

    ptr: Any
    stride_batch: Any  # of pages when the sequence is paged
    stride_token: Any
    stride_head: Any
    far: Any = None  # present where a block of rows spans 2^31 elements: offsets in 64 bits


class RowView(NamedTuple):
    """fp32 of each row and head: (batch, heads, length), or (heads, total) when packed."""

    ptr: Any
    stride_batch: Any  # opaque, in rows
    stride_head: Any  # opaque, in rows


class Sequences(NamedTuple):
    """Where the sequences of q, or of k and v, lie."""

    batch: Any  # opaque, how many
    length: Any  # opaque, tokens of each; of all together when packed; slots when paged
    cu_seqlens: Any = None  # (batch + 1,)
    used: Any = None  # (batch,) tokens in use, counted from slot 0
    leftpad: Any = None  # (batch,) unused slots before the first token
    batch_row: Any = None  # (batch,) row of the tensor that holds the sequence
    table: Any = None  # (batch, max_pages)
    table_stride: Any = None
    page_size: Any = None  # opaque
    pages: Any = None  # opaque, of the pool, or rows of the cache: where batch_row or table points
    steps: Any = None  # (of a row or page, of a head), opaque: units that a TMA map counts them in


class ScaleView(NamedTuple):
    """fp32 scales of a quantised k or v; strides opaque, 0 where a scale is shared."""

    ptr: Any
    stride_batch: Any  # of batch rows
    stride_row: Any  # of pages, or of the tensor's rows
    stride_token: Any
    stride_head: Any


class Span(NamedTuple):
    """One sequence, opened."""

    batch: Any  # int64
    row: Any  # int64, index of the batch dimension of a TokenView
    start: Any  # int64, first token in the token dimension
    length: Any  # rows in use
    room: Any  # rows allotted: those past `length` are padding
    leftpad: Any  # slots before the first token


@triton.jit
def inside(row, seq):
    """A row or page that a table names, or where there is none such, the nearest: a table's values
    are not checked before a launch, and nothing may be read past a cache's end."""
    return tl.minimum(tl.maximum(row, 0), number(seq.pages) - 1)


@triton.jit
def open_sequence(seq, batch):
    """Read what there is to know of one sequence. `batch` may be the number of sequences: the
    rows past the last offset of a packed tensor, all of them padding."""
    leftpad = 0
    row = tl.cast(batch, tl.int64)
    if seq.cu_seqlens is None:
        start = 0
        room = number(seq.length)
        if seq.leftpad is not None:
            leftpad = tl.load(seq.leftpad + batch, mask=batch < number(seq.batch), other=0)
            leftpad = tl.maximum(leftpad, 0)
        if seq.batch_row is not None:
            row = tl.load(seq.batch_row + batch, mask=batch < number(seq.batch), other=0)
            row = inside(row, seq).to(tl.int64)
        length = room
    else:
        row = row * 0
        start = tl.load(seq.cu_seqlens + batch)
        last = batch == number(seq.batch)
        stop = tl.load(seq.cu_seqlens + batch + 1, mask=batch < number(seq.batch), other=0)
        room = tl.where(last, number(seq.length), stop) - start
        length = tl.where(last, 0, room)
    if seq.table is not None:
        start = 0
        length = tl.minimum(length, number(seq.length))
    if seq.used is not None:
        used = tl.load(seq.used + batch, mask=batch < number(seq.batch), other=0)
        length = tl.minimum(used, number(seq.length) if seq.table is not None else room)
    length = tl.maximum(length - leftpad, 0)
    start = tl.cast(start, tl.int64) + leftpad
    if seq.cu_seqlens is not None:  # users' functions read by it what they have for each sequence
        batch = tl.minimum(batch, tl.maximum(number(seq.batch) - 1, 0))
    return Span(tl.cast(batch, tl.int64), row, start, length, room - leftpad, leftpad)


@triton.jit
def find_sequence(cu_seqlens, batches, slot, BLOCK: tl.constexpr):
    """The last sequence whose slots begin at or before `slot`: by counting, 256 at a time. A binary
    search is a chain of loads: 3 us a tile of 16 sequences, a fifth of the forward at 1k tokens."""
    found = slot * 0
    for start in range(0, batches + 1, 256):
        idx = start + tl.arange(0, 256)
        offsets = tl.load(cu_seqlens + idx, mask=idx <= batches, other=2147483647)
        found += tl.sum((offsets // BLOCK + idx <= slot).to(tl.int32), 0)
    return found - 1


@triton.jit
def open_tile(seq, heads, tile, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head, first row) of a tile; heads outermost, so that neighbours share K and V.

    Packed sequence b owns the slots from cu_seqlens[b] // BLOCK + b on, at least as many as it has
    tiles, so a grid of total // BLOCK + batch + 1 covers any lengths without knowing them.
    """
    length, batches = number(seq.length), number(seq.batch)
    if seq.cu_seqlens is None:
        tiles = tl.cdiv(length, BLOCK)
        head, batch = tile // tiles % heads, tile // tiles // heads
        index = tile % tiles
    else:
        tiles = length // BLOCK + batches + 1
        head, slot = tile // tiles, tile % tiles
        batch = find_sequence(seq.cu_seqlens, batches, slot, BLOCK)
        index = slot - (tl.load(seq.cu_seqlens + batch) // BLOCK + batch)
        if REVERSED:
            next_start = tl.load(seq.cu_seqlens + batch + 1, mask=batch < batches, other=0)
            next_start = tl.where(batch < batches, next_start, length)
            tiles = tl.cdiv(next_start - tl.load(seq.cu_seqlens + batch), BLOCK)
    if REVERSED:
        index = tiles - 1 - index
    return batch, head, index * BLOCK


@triton.jit
def interleave_heads(seq, heads, program, BLOCK: tl.constexpr):
    """The tile that a program takes on, as `open_tile` counts them.

    Packed sequences differ in length. With heads outermost the last programs to start are those of
    a whole head, its longest sequence among them, and most multiprocessors wait: 10% of a forward
    of 16k tokens of lognormal lengths at head dim 128, by a simulation of 132 of them. Where heads
    take turns it is 3%, with enough tiles at a time to share the keys and values that they read.
    """
    if seq.cu_seqlens is None:
        return program
    else:
        tiles = number(seq.length) // BLOCK + number(seq.batch) + 1
        first = program // (heads * NEIGHBOURS) * NEIGHBOURS
        turn = tl.minimum(tiles - first, NEIGHBOURS)
        rest = program - first * heads
        return rest // turn * tiles + first + rest % turn


@triton.jit
def tokens(x, seq, span, head):
    """The address of a sequence's first row, or of the pool of pages."""
    base = x.ptr + tl.cast(head, tl.int64) * x.stride_head
    if seq.table is None:
        base += span.row * x.stride_batch + span.start * x.stride_token
    return base


@triton.jit
def tile_pointers(x, base, seq, span, first, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """(BLOCK, PADDED) addresses of rows first, first + 1, ... of a sequence."""
    idx, dims = tl.arange(0, BLOCK), tl.arange(0, PADDED)
    if seq.table is None:
        rows = idx if x.far is None else idx.to(tl.int64)
        if PADDED > 128:
            # As below, dK and dV spilled 744 bytes with a bias at head dim 192, 500 like this.
            offsets = (rows * x.stride_token)[:, None] + dims[None, :]
            return base + tl.cast(first, tl.int64) * x.stride_token + offsets
        # In the order of how often they change: a thread's own address, which a mainloop keeps in
        # two registers, then the block's, then that of its rows 16 apart, which all threads share,
        # in two steps, of which four rows have three sums. With an offset for each row a thread of
        # dK and dV at head dim 128 kept sixteen registers.
        pointers = base + ((rows % ROWS * x.stride_token)[:, None] + dims[None, :])
        pointers += tl.cast(first, tl.int64) * x.stride_token
        pointers += (rows // ROWS % 2 * ROWS * x.stride_token)[:, None]
        return pointers + (rows // (2 * ROWS) * (2 * ROWS) * x.stride_token)[:, None]
    else:
        size = number(seq.page_size)
        idx = first + idx
        table = seq.table + span.batch * seq.table_stride
        page = tl.load(table + idx // size, mask=idx < span.length, other=0)
        page = inside(page, seq).to(tl.int64)
        rows = page * x.stride_batch + (idx % size).to(tl.int64) * x.stride_token
        return base + rows[:, None] + dims[None, :]


@triton.jit
def load_tile(x, base, seq, span, first, INSIDE: tl.constexpr, BLOCK: tl.constexpr,
              DIM: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """(BLOCK, PADDED) rows, 0 past the sequence's end and past DIM. INSIDE: all rows are valid."""
    dims = tl.arange(0, PADDED)
    pointers = tile_pointers(x, base, seq, span, first, BLOCK, PADDED)
    if INSIDE and DIM == PADDED:
        return tl.load(pointers)
    elif INSIDE:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    else:
        valid = (first + tl.arange(0, BLOCK) < span.length)[:, None]
        if DIM != PADDED:
            valid = valid & (dims < DIM)[None, :]
        return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def load_scales(x, seq, span, head, first, BLOCK: tl.constexpr):
    """(BLOCK,) scales of rows first, first + 1, ... of a sequence, 0 past its end."""
    idx = first + tl.arange(0, BLOCK)
    valid = idx < span.length
    if seq.table is None:
        row, token = span.row, span.start + idx
    else:
        size = number(seq.page_size)
        page = tl.load(seq.table + span.batch * seq.table_stride + idx // size, mask=valid, other=0)
        row, token = inside(page, seq).to(tl.int64), idx % size
    return scales_at(x, span, head, row, token, valid)


@triton.jit
def shared_scale(x, span, head):
    """The address of the scale that all rows of a head share, or of the first one."""
    head = tl.cast(head, tl.int64) * number(x.stride_head)
    return x.ptr + span.batch * number(x.stride_batch) + head


@triton.jit
def scales_at(x, span, head, row, token, valid):
    """Scales of slots of a cache's rows or pages, 0 where there are none."""
    return tl.load(scale_pointers(x, span, head, row, token), mask=valid, other=0.0)


@triton.jit
def scale_pointers(x, span, head, row, token):
    """Their addresses."""
    offsets = row * number(x.stride_row) + token.to(tl.int64) * number(x.stride_token)
    return shared_scale(x, span, head) + offsets


@triton.jit
def store_tile(x, tile, base, seq, span, first, BLOCK: tl.constexpr, DIM: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """Write rows as far as the sequence has room, padding included."""
    dims = tl.arange(0, PADDED)
    pointers = tile_pointers(x, base, seq, span, first, BLOCK, PADDED)
    valid = (first + tl.arange(0, BLOCK) < span.room)[:, None]
    if DIM != PADDED:
        valid = valid & (dims < DIM)[None, :]
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=valid)


@triton.jit
def row_pointers(x, span, head, idx, WIDTH: tl.constexpr = 1):
    """Addresses of a RowView's entries for rows `idx` of a sequence."""
    row = span.row * number(x.stride_batch) + tl.cast(head, tl.int64) * number(x.stride_head)
    return x.ptr + WIDTH * (row + span.start) + WIDTH * idx


@triton.jit
def load_pairs(x, span, head, first, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The two numbers of rows first, first + 1, ... of a RowView whose rows are four floats wide;
    (0, 0) past the sequence's end.

    A vector of fewer elements than threads would be loaded by every thread for itself, element by
    element: 32 of 40 loads in the loop of dK and dV at head dim 128. 16 bytes a row are one load.
    """
    return first_two(load_fours(x, span, head, first, INSIDE, BLOCK))


@triton.jit
def load_fours(x, span, head, first, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, 4)"""
    idx = tl.arange(0, BLOCK)
    pointers = row_pointers(x, span, head, idx, 4)[:, None] + tl.arange(0, 4)[None, :]
    pointers += 4 * tl.cast(first, tl.int64)
    if INSIDE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(first + idx < span.length)[:, None], other=0.0)


@triton.jit
def first_two(fours):
    even, odd = tl.split(tl.reshape(fours, [fours.shape[0], 2, 2]))
    first_number, _ = tl.split(even)
    second_number, _ = tl.split(odd)
    return first_number, second_number
