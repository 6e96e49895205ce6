"""Which tile of keys a CTA of the backward works on, and the queries that see it.

The producer finds tiles and tells the other warps where they lie: the divisions are done once, and
nobody else looks up which packed sequence a tile is of.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper._compat import aggregate
from flashtile.kernels.hopper.block import compares_positions, narrow
from flashtile.kernels.hopper.channels import (
    get_number,
    make_barriers,
    make_numbers,
    put_tile,
)
from flashtile.kernels.hopper.scheduler import pinned, split_tile
from flashtile.kernels.masks import key_range, query_range
from flashtile.kernels.schedule import schedule_list
from flashtile.kernels.views import open_sequence


class KeyWork(NamedTuple):
    """All tiles of a launch and their order."""

    key_tiles: Any  # opaque, tiles of keys of a head
    query_blocks: Any  # opaque, blocks of queries of a head
    pairs: Any  # opaque, KV heads, as many times as parts: of all batches, or of packed sequences
    together: Any  # opaque, pairs whose tiles follow each other tile by tile
    heads: Any  # Heads, the group a part of a KV head's
    parts: Any  # opaque, of the query heads of a KV head, each with tiles of its own
    counter: Any = None  # (1,) int32: tiles taken, where CTAs take several
    locks: Any = None  # int32 of each block of queries: see `locks`
    order: Any = None  # int32 (sequence, its tile) of each of packed sequences' tiles of a head


class KeyTile(NamedTuple):
    """Keys of one head, and the queries that may see them."""

    batch: Any
    kv_head: Any  # counted with each of its parts
    key: Any  # first key, or -1 past the last tile
    row: Any  # first query of the first block
    blocks: Any  # of each query head; may be 0


class Walk(NamedTuple):
    """Where a partition is on its way over the blocks of all query heads of a group."""

    head: Any
    n: Any  # which of the tile's blocks of this head
    heads: Any  # to come with this block, where that is the same one of all heads


@gluon.jit
def _blocks_of(masks, key, q_span, k_span, TILE: gl.constexpr):
    """(the first, how many) blocks of queries that see a tile of keys."""
    seen = query_range(masks, key, key + (TILE.block_n - 1), q_span, k_span)
    lo, hi = seen.lo, seen.hi
    if not compares_positions(masks):  # a user's may be of 64 bits
        lo, hi = narrow(lo), narrow(hi)
    first = lo // TILE.block_m
    return first, gl.maximum(gl.cdiv(hi, TILE.block_m) - first, 0)


@gluon.jit
def tiles_before(row, tile, q_seq, k_seq, masks, TILE: gl.constexpr):
    """How many tiles see the block of queries from a row on before this one."""
    q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
    seen = key_range(masks, row, row + (TILE.block_m - 1), q_span, k_span)
    return tile.key // TILE.block_n - seen.lo // TILE.block_n


@gluon.jit
def find_keys(work, tile, q_seq, k_seq, masks, lists, TILE: gl.constexpr):
    """The KeyTile of a number, with key -1 where a slot of packed sequences is nobody's.

    The first keys of a head come first: under a causal mask most queries see them.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    tiles, pairs = pinned(work.key_tiles), pinned(work.pairs)
    index, pair = split_tile(tile, tiles, pairs, pinned(work.together))
    if k_seq.cu_seqlens is None:
        kv_heads = pinned(work.heads.count) // pinned(work.heads.group)
        batch, kv_head = pair // kv_heads, pair % kv_heads
    else:
        batch, kv_head = gl.load(work.order + 2 * index), pair
        index = gl.load(work.order + 2 * index + 1)
    key, k_span = index * BLOCK_N, open_sequence(k_seq, batch)
    if lists is None and k_seq.cu_seqlens is None:
        first, blocks = _blocks_of(masks, key, open_sequence(q_seq, batch), k_span, TILE)
    elif lists is None:
        first, blocks = 0, 0
        if key < k_span.length:  # else the sequence may be one more than there are
            first, blocks = _blocks_of(masks, key, open_sequence(q_seq, batch), k_span, TILE)
    else:
        head, first = kv_head * pinned(work.heads.group), 0
        s = schedule_list(lists, batch, head, key, k_span.length, BLOCK_M)
        blocks = s.partial + s.run + s.scattered
    return KeyTile(batch, kv_head, gl.where(key < k_span.room, key, -1), first * BLOCK_M, blocks)


@gluon.jit
def first_number(work, TILE: gl.constexpr):
    """The number of this CTA's first tile. Where CTAs take several it comes from the counter too:
    tiles wait for those with lower numbers, whose CTAs have started then, however few there are at
    a time."""
    if TILE.persistent:
        return following(work, 0, TILE)
    else:
        return gl.program_id(0)


@gluon.jit
def following(work, tiles, TILE: gl.constexpr):
    """The number of this CTA's next tile: past the last where a CTA takes one. By a relaxed atomic,
    as `scheduler.take_tile`."""
    if TILE.persistent:
        return gl.atomic_add(work.counter, 1, sem="relaxed")
    else:
        return tiles


@gluon.jit
def first_block(work, q_seq, batch, TILE: gl.constexpr):
    """The number of a sequence's first block of queries among all blocks of all heads, but for
    its head's."""
    if q_seq.cu_seqlens is None:
        return batch * pinned(work.heads.count) * pinned(work.query_blocks)
    else:
        return gl.load(q_seq.cu_seqlens + batch) // TILE.block_m + batch


@gluon.jit
def start_walk(tile, work, TILE: gl.constexpr):
    """From the first block on; where tiles wait for others before they add to dQ from the last one
    back, which all tiles see: each is a step behind the one before it. From the first one on tiles
    that start together would end together, however much less the later ones have to do."""
    group = pinned(work.heads.group)
    return Walk(tile.kv_head * group, 0 if TILE.adds == "in any order" else tile.blocks - 1, group)


@gluon.jit
def go_on(walk, tile, work, TILE: gl.constexpr):
    """The next block, of the next head after the last one. Where tiles wait for others the same
    block of all heads comes first: head by head, tiles of few blocks would come to the second head
    early, and wait there for those of many (32/8 heads, causal, 8k: a third longer)."""
    if TILE.adds == "in any order":
        ends = walk.n + 1 == tile.blocks
        n = gl.where(ends, 0, walk.n + 1)
        return Walk(walk.head + ends.to(gl.int32), n, walk.heads)
    else:
        group, last = pinned(work.heads.group), walk.heads == 1
        heads = gl.where(last, group, walk.heads - 1)
        return Walk(walk.head + gl.where(last, 1 - group, 1), walk.n - last.to(gl.int32), heads)


@gluon.jit
def hidden_steps(tile, lo, steps, work, TILE: gl.constexpr):
    """How many of a walk's last steps, never all, are of blocks before `lo`, from where on queries
    see a warpgroup's keys, where it passes over them."""
    if TILE.skips_last:
        blocks = gl.maximum(lo - tile.row, 0) // TILE.block_m
        return gl.minimum(blocks * pinned(work.heads.group), gl.maximum(steps - 1, 0))
    else:
        return 0


@gluon.jit
def row_of(tile, walk, TILE: gl.constexpr):
    """The first query of a block."""
    return tile.row + walk.n * TILE.block_m


@gluon.jit
def block_of(row, walk, base, work, TILE: gl.constexpr):
    """The number among all blocks of queries of the one from `row` on; base: `first_block`."""
    return base + walk.head * pinned(work.query_blocks) + row // TILE.block_m


@aggregate
class Queue:
    """Tells where tiles lie, through two places: `stages.TILE_DONE` says when they were read."""

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
    def get(self, n, WARPS: gl.constexpr):
        """The n-th tile, for a partition of WARPS warps."""
        mbarrier.wait(self.full.index(n & 1), (n >> 1) & 1)
        t, at = self.tiles, 5 * (n & 1)
        return KeyTile(get_number(t, at, WARPS), get_number(t, at + 1, WARPS),
                       get_number(t, at + 2, WARPS), get_number(t, at + 3, WARPS),
                       get_number(t, at + 4, WARPS))  # fmt: skip


@gluon.jit
def make_queue():
    return Queue(make_numbers(10), make_barriers(2))
