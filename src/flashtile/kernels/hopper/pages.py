"""Keys and values in pages: a block in shared memory is filled page by page, or part of a page."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper._compat import tma_load
from flashtile.kernels.hopper.channels import END, head_of
from flashtile.kernels.numbers import number


@gluon.constexpr_function
def _block_bytes(x, rows, columns):
    return rows * columns * x.block_type.element_ty.primitive_bitwidth // 8


@gluon.jit
def find_page(seq, span, page):
    """(the number of a sequence's page, rows in use from its first on). Past the sequence's end the
    table is not read."""
    table = seq.table + span.batch * seq.table_stride
    left = gl.maximum(span.length - page * number(seq.page_size), 0)
    return gl.load(table + page, mask=left > 0, other=0), left


@gluon.jit
def load_part(x, head, end, left, full, tile, ROW: gl.constexpr, COLUMNS: gl.constexpr):
    """Load `left` rows of a page up to row `end`, and zeros, to a tile's rows from ROW on.

    64 columns at a time: in part of a tile the planes of 64 columns do not follow each other, as
    one wider box would have them.
    """
    ROWS: gl.constexpr = x.block_type.shape[-2]
    rows = tile.slice(ROW, ROWS, dim=len(tile.shape) - 2)
    for plane in gl.static_range(COLUMNS // 64):
        place = rows.slice(plane * 64, 64, dim=len(tile.shape) - 1)
        tma_load(x, [head, END, end, END - left, plane * 64], full, place)


@gluon.jit
def load_pages(ring, i, x, seq, span, head, first, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr):
    """Load the block of keys from `first` on as item i, whose slot is claimed: from within a page,
    or whole pages of x's rows."""
    ROWS: gl.constexpr = x.block_type.shape[-2]
    slot = i % ring.SLOTS
    full, tile = ring.full.index(slot), ring.tiles.index(slot)
    mbarrier.expect(full, _block_bytes(x, BLOCK_N, COLUMNS))
    if ROWS == BLOCK_N:
        size = number(seq.page_size)
        page, _ = find_page(seq, span, first // size)
        left = gl.maximum(gl.minimum(span.length - first, ROWS), 0)
        load_part(x, head_of(seq, page, head), first % size + left, left, full, tile, 0, COLUMNS)
    else:
        # Two look-ups on their way at a time; more spill beside the producer's 24 registers.
        for part in gl.static_range(0, BLOCK_N // ROWS, 2):
            page, left = find_page(seq, span, first // ROWS + part)
            other, other_left = find_page(seq, span, first // ROWS + part + 1)
            left, other_left = gl.minimum(left, ROWS), gl.minimum(other_left, ROWS)
            load_part(x, head_of(seq, page, head), left, left, full, tile, part * ROWS, COLUMNS)
            load_part(x, head_of(seq, other, head), other_left, other_left, full, tile,
                      (part + 1) * ROWS, COLUMNS)  # fmt: skip
