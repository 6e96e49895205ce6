"""How the producer and the consumers meet: the ring of keys and values, and the queries.

Data come with an mbarrier that TMA completes; places come back through a hardware barrier that
consumers pass without stopping. Items are counted from the kernel's start, and the count gives slot
and phase, so that a channel has no state.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper import barriers
from flashtile.kernels.hopper._compat import aggregate, tma_load, tma_store
from flashtile.kernels.hopper.layouts import ROWS
from flashtile.kernels.numbers import number

END = gl.constexpr(1 << 30)
"""Rows of a ragged tensor map, of which a sequence takes the last ones: what lies past a sequence's
end is then past the end of the map, which reads as 0 and is not written.

Such a map is [head, 2^30, row, row, column] with strides of s elements for either row and 2^34 - s
for the second dimension: at [h, 2^30, end, 2^30 - length + i, 0] the products of 2^30 cancel but
for 2^65 bytes, which addresses of 64 bits do not have, and leave row end - length + i. The idea is
that of triton/tools/ragged_tma.py.
"""


class Window(NamedTuple):
    """Rows of one sequence in a tensor map: what `load_rows` and `store_rows` call batch, and what
    they call row for the sequence's first."""

    batch: Any
    row: Any


@gluon.jit
def open_window(x, seq, span, batch, length, PACK: gl.constexpr = 1):
    """The first `length` rows of a sequence."""
    if len(x.block_type.shape) == 5 and PACK == 1:
        end = span.start + length
        if seq.steps is None:
            end += span.row * number(seq.length)
        return Window(end.to(gl.int32), END - length)
    else:
        return Window(batch, 0)


@gluon.jit
def head_of(seq, row, head):
    """What `load_rows` calls head, of a row of a cache, or a page."""
    if seq.steps is None:
        return head
    else:
        return row.to(gl.int32) * number(seq.steps[0]) + head * number(seq.steps[1])


@gluon.jit
def load_rows(x, batch, head, row, barrier, place, PACK: gl.constexpr = 1):
    """Copy the rows of one head to shared memory; 0 past the end of the sequence and of the head.
    PACK query heads of a KV head take turns as rows where it is not 1 (see `packing`).

    With the heads folded into the last dimension, TMA reads 18% fewer sectors of L2 (H200, head dim
    128) than with heads as a dimension of their own.
    """
    if PACK > 1:
        tma_load(x, [batch, head, row // PACK, 0, 0], barrier, place)
    elif len(x.block_type.shape) == 3:
        tma_load(x, [batch, row, head * x.block_type.shape[2]], barrier, place)
    elif len(x.block_type.shape) == 5:
        tma_load(x, [head, END, batch, row, 0], barrier, place)
    else:
        tma_load(x, [batch, head, row, 0], barrier, place)


@gluon.jit
def store_rows(x, batch, head, row, place, PACK: gl.constexpr = 1):
    """Copy shared memory to the rows of one head, as far as the sequence and the head go."""
    if PACK > 1:
        tma_store(x, [batch, head, row // PACK, 0, 0], place)
    elif len(x.block_type.shape) == 3:
        tma_store(x, [batch, row, head * x.block_type.shape[2]], place)
    elif len(x.block_type.shape) == 5:
        tma_store(x, [head, END, batch, row, 0], place)
    else:
        tma_store(x, [batch, head, row, 0], place)


@gluon.jit
def left_columns(tile, COUNT: gl.constexpr):
    """The first columns of a tile in shared memory, a multiple of 64: whole swizzled planes."""
    if tile.shape[-1] == COUNT:
        return tile
    else:
        return tile.slice(0, COUNT, dim=len(tile.shape) - 1)


@gluon.constexpr_function
def bytes_of(x):
    count = x.block_type.element_ty.primitive_bitwidth // 8
    for edge in x.block_type.shape:
        count *= edge
    return count


@gluon.constexpr_function
def _several(x, count):
    return [count, *x.block_type.shape]


@gluon.jit
def make_tiles(x, COUNT: gl.constexpr):
    """Shared memory for COUNT blocks of a descriptor."""
    return gl.allocate_shared_memory(x.dtype, _several(x, COUNT), x.layout)


@gluon.constexpr_function
def _blocks(x, count, rows, columns):
    return [count, *x.block_type.shape[:-2], rows, columns]


@gluon.jit
def make_blocks(x, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for COUNT tiles that a descriptor's blocks are parts of."""
    return gl.allocate_shared_memory(x.dtype, _blocks(x, COUNT, ROWS, COLUMNS), x.layout)


@gluon.jit
def make_barriers(COUNT: gl.constexpr):
    """(COUNT, 1) mbarriers of one arrival each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=1)
    return made


@gluon.jit
def make_numbers(COUNT: gl.constexpr):
    """Shared memory for COUNT integers."""
    return gl.allocate_shared_memory(
        gl.int32, [COUNT, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )  # fmt: skip


@gluon.jit
def put_number(numbers, i, n):
    """Store an integer, from one warp."""
    alone: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(i).store(gl.full([1], 0, gl.int32, alone) + n)


@gluon.jit
def get_number(numbers, i, WARPS: gl.constexpr = 4):
    """Load an integer, for a partition of so many warps."""
    return gl.max(numbers.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def put_tile(tiles, full, n, tile):
    """Tell where a CTA's n-th tile lies: five numbers, to one of two places."""
    for field in gl.static_range(5):
        put_number(tiles, 5 * (n & 1) + field, tile[field])
    mbarrier.arrive(full.index(n & 1), count=1)


@gluon.jit
def slot_of(i, SLOTS: gl.constexpr):
    """Of item i: its lowest bits where they say it, since a signed remainder is four instructions
    more, ahead of each product."""
    return i & (SLOTS - 1) if SLOTS & (SLOTS - 1) == 0 else i % SLOTS


@gluon.jit
def phase_of(i, SLOTS: gl.constexpr):
    return (i & SLOTS) // SLOTS if SLOTS & (SLOTS - 1) == 0 else (i // SLOTS) & 1


@aggregate
class Ring:
    """Blocks of keys and of values, which may be narrower, in the order in which they are needed:
    K0, K1, V0, K2, V1, ... Five slots are 1.357M -> 1.249M cycles of two rings of two (H200, head
    dim 128, causal, 8k)."""

    tiles: gl.shared_memory_descriptor  # (SLOTS, ..., BLOCK_N, PADDED)
    full: gl.shared_memory_descriptor  # (SLOTS, 1)
    SLOTS: gl.constexpr
    THREADS: gl.constexpr  # of the producer and all consumers

    @gluon.constexpr_function
    def __init__(self, tiles, full, SLOTS, THREADS):
        self.tiles = tiles
        self.full = full
        self.SLOTS = gl.constexpr(SLOTS)
        self.THREADS = gl.constexpr(THREADS)

    @gluon.jit
    def fill(self, i, x, batch, head, row):
        """Load rows of x as item i, when the slot is free."""
        self.claim(i)
        self.load(i, x, batch, head, row)

    @gluon.jit
    def claim(self, i):
        """Wait until item i's slot is free."""
        if i >= self.SLOTS:
            barriers.sync(barriers.RING + slot_of(i, self.SLOTS), self.THREADS)

    @gluon.jit
    def load(self, i, x, batch, head, row):
        """Load rows of x as item i, whose slot is claimed."""
        slot = slot_of(i, self.SLOTS)
        full = self.full.index(slot)
        mbarrier.expect(full, bytes_of(x))
        COLUMNS: gl.constexpr = x.block_type.shape[-1]
        load_rows(x, batch, head, row, full, left_columns(self.tiles.index(slot), COLUMNS))

    @gluon.jit
    def wait(self, i):
        """Item i, when it has come."""
        mbarrier.wait(self.full.index(slot_of(i, self.SLOTS)), phase_of(i, self.SLOTS))
        return self.tile(i)

    @gluon.jit
    def tile(self, i):
        """Item i, which has come, a (BLOCK_N, PADDED) tile."""
        tile = self.tiles.index(slot_of(i, self.SLOTS))
        return tile.reshape((tile.shape[-2], tile.shape[-1]))

    @gluon.jit
    def release(self, i):
        """The calling warpgroup has read item i."""
        barriers.arrive(barriers.RING + slot_of(i, self.SLOTS), self.THREADS)


@aggregate
class Queries:
    """The queries of one tile of work, 64 for each warpgroup."""

    tiles: gl.shared_memory_descriptor  # (WARPGROUPS, ..., 64, PADDED)
    full: gl.shared_memory_descriptor  # (WARPGROUPS, 1)
    WARPGROUPS: gl.constexpr
    THREADS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, WARPGROUPS, THREADS):
        self.tiles = tiles
        self.full = full
        self.WARPGROUPS = gl.constexpr(WARPGROUPS)
        self.THREADS = gl.constexpr(THREADS)

    @gluon.jit
    def fill(self, n, x, batch, head, row, PACK: gl.constexpr):
        """Load the n-th tile's, when those of the one before have been read."""
        if n > 0:
            barriers.sync(barriers.QUERIES, self.THREADS)
        for w in gl.static_range(self.WARPGROUPS):
            full = self.full.index(w)
            mbarrier.expect(full, bytes_of(x))
            load_rows(x, batch, head, row + w * ROWS, full, self.tiles.index(w), PACK)

    @gluon.jit
    def wait(self, n, WARPGROUP: gl.constexpr):
        """The n-th tile's for one warpgroup, (64, PADDED)."""
        mbarrier.wait(self.full.index(WARPGROUP), n & 1)
        tile = self.tiles.index(WARPGROUP)
        return tile.reshape((ROWS, tile.shape[-1]))

    @gluon.jit
    def release(self):
        barriers.arrive(barriers.QUERIES, self.THREADS)
