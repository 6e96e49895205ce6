"""Which tile a CTA works on next: from a counter in global memory, longest first.

Against a fixed assignment of tiles the counter is worth 9 to 20% of a causal forward (H200, head
dim 128). Only the producer knows the order; consumers are told where a tile lies.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper._compat import aggregate
from flashtile.kernels.hopper.channels import get_number, make_numbers, put_number
from flashtile.kernels.numbers import number


class Work(NamedTuple):
    """All tiles of a launch and the order in which they are taken."""

    counter: Any  # (2,) int32, 0 before and after a launch: tiles taken, CTAs done
    row_tiles: Any  # opaque, tiles of queries of a head
    pairs: Any  # opaque, batch * heads
    together: Any  # opaque, pairs whose tiles are taken row by row: their K and V stay in L2


class Tile(NamedTuple):
    """Queries of one head, and the Walk along the keys that they may see."""

    batch: Any
    head: Any
    row: Any  # first query, or -1 past the last tile
    key: Any  # first key of the first block, unless there is a list
    blocks: Any


@gluon.jit
def pin(n):
    """n, which the compiler cannot read before this place. It would do the arithmetic of arguments
    where the kernel starts, for all partitions, and spill (40 bytes at head dim 256)."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pinned(n):
    """The integer behind an `opaque` argument."""
    return number(pin(n))


@gluon.jit
def dense_tile(work, heads, tile, BLOCK_M: gl.constexpr):
    """`find_tile` of sequences of equal length.

    The last queries of a head come first: under a causal mask they see most keys.
    """
    row_tiles, pairs, together = pinned(work.row_tiles), pinned(work.pairs), pinned(work.together)
    heads = pinned(heads)
    group = tile // (row_tiles * together)
    rest = tile - group * row_tiles * together
    width = gl.maximum(gl.minimum(together, pairs - group * together), 1)
    row = rest // width
    pair = group * together + rest - row * width
    batch = pair // heads
    first = gl.where(tile < row_tiles * pairs, (row_tiles - 1 - row) * BLOCK_M, -1)
    return batch, pair - batch * heads, first


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def packed_tile(seq, slot, BLOCK_M: gl.constexpr):
    """(sequence, first query, tiles of all sequences) of the slot-th tile of a head of packed
    sequences, the last of each sequence first. Rows past the last sequence are one more."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    batches, length = pinned(seq.batch), pinned(seq.length)
    batch, stop, total = 0, 2147483647, 0
    for first in range(0, batches + 1, 256):
        idx = first + gl.arange(0, 256, layout)
        start = gl.load(seq.cu_seqlens + idx, mask=idx <= batches, other=length)
        following = gl.load(seq.cu_seqlens + idx + 1, mask=idx < batches, other=length)
        tiles = (following - start + (BLOCK_M - 1)) // BLOCK_M
        stops = total + gl.associative_scan(tiles, 0, _add)
        passed = stops <= slot
        batch += gl.sum(passed.to(gl.int32), 0)
        stop = gl.minimum(stop, gl.min(gl.where(passed, 2147483647, stops), 0))
        total += gl.sum(tiles, 0)
    return batch, (stop - 1 - slot) * BLOCK_M, total


@gluon.jit
def count_tiles(work, seq, BLOCK_M: gl.constexpr):
    """Of a head where sequences are packed; of all heads, otherwise."""
    if seq.cu_seqlens is None:
        return pinned(work.row_tiles) * pinned(work.pairs)
    else:
        _, _, total = packed_tile(seq, 0, BLOCK_M)
        return total


@gluon.jit
def find_tile(work, heads, seq, tiles, tile, BLOCK_M: gl.constexpr):
    """(batch, head, first query) of a tile, -1 as the query past the last one. tiles: their count.

    Packed sequences are taken head by head: a head's K and V stay in L2.
    """
    if seq.cu_seqlens is None:
        return dense_tile(work, heads, tile, BLOCK_M)
    else:
        head = tile // gl.maximum(tiles, 1)
        batch, row, _ = packed_tile(seq, tile - head * tiles, BLOCK_M)
        return batch, head, gl.where(head < pinned(heads), row, -1)


@gluon.jit
def take_tile(counter):
    """The next tile of this CTA; its first is its program id."""
    return gl.atomic_add(counter, 1) + gl.num_programs(0)


@gluon.jit
def close(counter):
    """The last CTA to finish leaves the counter as it was found, for the next launch."""
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@aggregate
class Queue:
    """Hands tiles to the consumers, through two slots: the producer writes tile n + 1 when the
    queries of n - 1 were read, and so its place was."""

    tiles: gl.shared_memory_descriptor  # (10, 1) int32: two tiles of five numbers
    full: gl.shared_memory_descriptor  # (2, 1)

    @gluon.constexpr_function
    def __init__(self, tiles, full):
        self.tiles = tiles
        self.full = full

    @gluon.jit
    def put(self, n, tile):
        place = 5 * (n & 1)
        for field in gl.static_range(5):
            put_number(self.tiles, place + field, tile[field])
        mbarrier.arrive(self.full.index(n & 1), count=1)

    @gluon.jit
    def get(self, n):
        mbarrier.wait(self.full.index(n & 1), (n >> 1) & 1)
        t, at = self.tiles, 5 * (n & 1)
        return Tile(get_number(t, at), get_number(t, at + 1), get_number(t, at + 2),
                    get_number(t, at + 3), get_number(t, at + 4))  # fmt: skip


@gluon.jit
def make_queue(full):
    return Queue(make_numbers(10), full)
