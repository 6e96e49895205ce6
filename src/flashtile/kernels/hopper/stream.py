"""What the Hopper decode kernel reads: keys and values by TMA, and what it asks for ahead.

With all multiprocessors streaming, a load waits behind what is under way: 17 MB, 4 us. Whatever is
read besides is asked for so much earlier.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper import layouts
from flashtile.kernels.hopper.channels import open_window
from flashtile.kernels.hopper.forward import load_block
from flashtile.kernels.hopper.parts import tile_rows
from flashtile.kernels.hopper.shares import find_segment, first_key
from flashtile.kernels.numbers import number
from flashtile.kernels.views import tokens

EARLY = gl.constexpr(512)
"""Keys before their pages are needed that the page table is asked for."""


class Sources(NamedTuple):
    """Where queries and keys are."""

    q: Any  # TokenView
    k: Any  # tensor map
    v: Any  # tensor map
    q_seq: Any
    k_seq: Any
    heads: Any
    kv_heads: Any  # opaque


class Cursor(NamedTuple):
    """How far a program has come with its loads."""

    unit: Any  # the next
    segment: Any  # that it is of, or the one before


@gluon.jit
def touch(pointer):
    """Have what is needed later in L2 by then."""
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.constexpr_function
def _lines(columns):
    """Layout of (64, lines of 128 bytes)."""
    lines = columns // 64
    return gl.BlockedLayout([1, 1], [32 // lines, lines], [4, 1], [1, 0])


@gluon.jit
def touch_queries(source, s, TILE: gl.constexpr):
    """The rows of a segment's tile."""
    LINES: gl.constexpr = TILE.padded // 64
    layout: gl.constexpr = _lines(TILE.padded)
    rows = tile_rows(gl.arange(0, layouts.ROWS, gl.SliceLayout(1, layout)), s.head, source.heads)
    token = gl.maximum(gl.minimum(rows.token, s.q.length - 1), 0).to(gl.int64)
    lines = gl.arange(0, LINES, gl.SliceLayout(0, layout)) * 64
    pointers = tokens(source.q, source.q_seq, s.q, rows.head) + token * source.q.stride_token
    touch(pointers[:, None] + lines[None, :])


@gluon.jit
def touch_pages(seq, s, first, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """The part of a segment's page table that has the key `first`. Smaller pages than a block are
    ROWS keys."""
    key = gl.maximum(gl.minimum(first, s.k.length - 1), 0)
    size = ROWS
    if ROWS == BLOCK_N:
        size = number(seq.page_size)
    touch(seq.table + s.k.batch * seq.table_stride + key // size)


@gluon.jit
def fill(ring, share, cursor, here, done, source, masks, TILE: gl.constexpr):
    """Load as many blocks as there is room for when those before the unit `done` were read, at most
    to the end of the segment after the one that ends `here`."""
    k_seq, unit, s = source.k_seq, cursor.unit, cursor.segment
    while (unit < gl.minimum(share.stop, done + TILE.pairs)) & ((unit < s.stop) | (s.stop == here)):
        if unit == s.stop:
            s = find_segment(unit, share, source.q_seq, k_seq, masks, source.kv_heads, TILE)
            touch_queries(source, s, TILE)
        i, first = 2 * (unit - share.start), first_key(s, unit, TILE)
        if k_seq.table is not None:
            touch_pages(k_seq, s, first + EARLY, source.k.block_type.shape[-2], TILE.block_n)
        window = open_window(source.k, k_seq, s.k, s.batch, s.k.length)
        place = k_seq, s.k, window, s.head
        load_block(place, ring, i, source.k, first, TILE.block_n, TILE.stored)
        load_block(place, ring, i + 1, source.v, first, TILE.block_n, TILE.stored)
        unit += 1
    return Cursor(unit, s)
