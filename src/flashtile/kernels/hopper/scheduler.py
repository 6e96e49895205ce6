"""Which tile a CTA works on next: from a counter in global memory, longest first.

Against a fixed assignment of tiles the counter is worth 9 to 20% of a causal forward (H200, head
dim 128). Only the producer knows the order; consumers are told where a tile lies.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper._compat import aggregate
from flashtile.kernels.hopper.channels import get_number, make_numbers, put_tile
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence


class Work(NamedTuple):
    """All tiles of a launch and the order in which they are taken."""

    counter: Any  # (2,) int32, 0 before and after a launch: tiles taken, CTAs done
    row_tiles: Any  # opaque, tiles of queries of a head, unless sequences are packed
    pairs: Any  # opaque, batch * heads; heads, where sequences are packed
    together: Any  # opaque, pairs whose tiles are taken row by row: their K and V stay in L2


class Order(NamedTuple):
    """How far a CTA has come among packed sequences, whose longest are taken first: to those of
    more than longest / 2 and at most `longest` keys."""

    longest: Any  # 0 or less past the last
    shorter: Any  # the longest of the others, as far as they have been seen
    first: Any  # sequence from which on they are looked at, `SEQUENCES` at a time
    before: Any  # tiles of all sequences that were passed


SEQUENCES = gl.constexpr(64)
"""That the producer, which has 24 registers, looks at together: 256 would spill 240 bytes."""


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
def quotient(n, divisor):
    """n // divisor, both at least 0. Signs would be nine more dependent instructions, which the
    producer takes four times a tile."""
    return (n.to(gl.uint32) // divisor.to(gl.uint32)).to(gl.int32)


@gluon.jit
def split_tile(n, tiles, pairs, together):
    """(index of its `tiles`, pair) of the n-th tile of some pairs, of which `together` have their
    tiles taken by turns."""
    group = quotient(n, tiles * together)
    rest = n - group * tiles * together
    width = gl.maximum(gl.minimum(together, pairs - group * together), 1)
    index = quotient(rest, width)
    return index, group * together + rest - index * width


@gluon.jit
def split_rows(n, row_tiles, pairs, together):
    """(tile of queries, pair): the last queries of a pair come first, since under a causal mask
    they see most keys."""
    index, pair = split_tile(n, row_tiles, pairs, together)
    return row_tiles - 1 - index, pair


@gluon.jit
def dense_tile(work, heads, tile, BLOCK_M: gl.constexpr):
    """(batch, head, first query) of sequences of equal length."""
    row_tiles, pairs, together = pinned(work.row_tiles), pinned(work.pairs), pinned(work.together)
    heads = pinned(heads)
    row, pair = split_rows(tile, row_tiles, pairs, together)
    batch = quotient(pair, heads)
    return batch, pair - batch * heads, gl.where(tile < row_tiles * pairs, row * BLOCK_M, -1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def count_keys(seq, idx, batches):
    """Of sequences `idx`, as long as they may be."""
    if seq.used is not None:
        return gl.load(seq.used + idx, mask=idx < batches, other=0)
    elif seq.cu_seqlens is not None:
        start = gl.load(seq.cu_seqlens + idx, mask=idx < batches, other=0)
        return gl.load(seq.cu_seqlens + idx + 1, mask=idx < batches, other=0) - start
    else:
        return gl.where(idx < batches, pinned(seq.length), 0)


@gluon.jit
def find_sequence(q_seq, k_seq, heads, longest, first, n, BLOCK_M: gl.constexpr,
                  BLOCK_N: gl.constexpr):  # fmt: skip
    """Of the sequences from `first` on that an Order with `longest` is at: (the one that their n-th
    tile is of, tiles up to its end, all their tiles, the longest of the shorter ones or -1).

    Rows past the last sequence are one more. Less than a block of keys counts as one.
    """
    layout: gl.constexpr = gl.BlockedLayout([SEQUENCES // 32], [32], [1], [0])
    batches, length = pinned(q_seq.batch), pinned(q_seq.length)
    idx = first + gl.arange(0, SEQUENCES, layout)
    start = gl.load(q_seq.cu_seqlens + idx, mask=idx <= batches, other=length)
    following = gl.load(q_seq.cu_seqlens + idx + 1, mask=idx < batches, other=length)
    keys = gl.maximum(count_keys(k_seq, idx, batches), BLOCK_N)
    tiles = gl.maximum(following - start + (BLOCK_M - 1), 0) // BLOCK_M * heads
    half = longest // 2
    shorter = gl.max(gl.where((keys <= half) & (tiles > 0), keys, -1), 0)
    tiles = gl.where((keys > half) & (keys <= longest), tiles, 0)
    stops = gl.associative_scan(tiles, 0, _add)
    passed = stops <= n
    batch = first + gl.sum(passed.to(gl.int32), 0)
    stop = gl.min(gl.where(passed, 2147483647, stops), 0)
    return batch, stop, gl.max(stops, 0), shorter


@gluon.jit
def packed_tile(work, q_seq, k_seq, order, tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(Order, batch, head, first query) of packed sequences.

    One sequence after the other leaves K and V in L2; a long one at the end would leave most CTAs
    without work. In a model of 16k tokens of lognormal lengths one head after the other, sequences
    as they come, is 5, 10 and 19% of a causal forward at head dims 64, 128 and 256, this is 1%.
    """
    heads, together = pinned(work.pairs), pinned(work.together)
    batches = pinned(q_seq.batch)
    longest, shorter, first, n = order.longest, order.shorter, order.first, tile - order.before
    batch, stop, total, step = 0, 0, 0, 0
    while (n >= total) & (longest > 0):
        n -= total
        first += step
        step = SEQUENCES
        if first > batches:
            longest, shorter, first = shorter, -1, 0
        batch, stop, total, found = find_sequence(q_seq, k_seq, heads, longest, first, n, BLOCK_M,
                                                  BLOCK_N)  # fmt: skip
        shorter = gl.maximum(shorter, found)
    batch = gl.where(n < total, batch, 0)
    row_tiles = gl.maximum(gl.cdiv(open_sequence(q_seq, batch).room, BLOCK_M), 1)
    own = gl.where(n < total, n - (stop - row_tiles * heads), 0)
    row, head = split_rows(own, row_tiles, heads, together)
    row = gl.where(n < total, row * BLOCK_M, -1)
    return Order(longest, shorter, first, tile - n), batch, head, row


@gluon.jit
def first_order():
    return Order(2147483647, -1, 0, 0)


@gluon.jit
def find_tile(work, heads, q_seq, k_seq, order, tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(Order, batch, head, first query) of a tile, -1 as the query past the last one."""
    if q_seq.cu_seqlens is None:
        batch, head, row = dense_tile(work, heads, tile, BLOCK_M)
        return order, batch, head, row
    else:
        return packed_tile(work, q_seq, k_seq, order, tile, BLOCK_M, BLOCK_N)


@gluon.jit
def take_tile(counter):
    """The next tile of this CTA; its first is its program id. Nothing else is read or written by
    this order: an acquire and a release would empty the L1 cache and wait for all stores."""
    return gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)


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
        put_tile(self.tiles, self.full, n, tile)

    @gluon.jit
    def get(self, n):
        mbarrier.wait(self.full.index(n & 1), (n >> 1) & 1)
        t, at = self.tiles, 5 * (n & 1)
        return Tile(get_number(t, at), get_number(t, at + 1), get_number(t, at + 2),
                    get_number(t, at + 3), get_number(t, at + 4))  # fmt: skip


@gluon.jit
def make_queue(full):
    return Queue(make_numbers(10), full)
