"""Which blocks of queries see a tile of keys, where masks are given as tensors.

Without a list they lie side by side (`key_tiles`). With one the producer looks each block up and
leaves its place beside the queries in the ring; the writer, which may be behind the ring, looks it
up itself. A tile's query heads have one list together, or there is one of them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper.key_tiles import block_of, row_of, tiles_before
from flashtile.kernels.hopper.scheduler import pinned
from flashtile.kernels.hopper.walk import listed_place
from flashtile.kernels.schedule import schedule_list
from flashtile.kernels.views import open_sequence


@gluon.jit
def open_list(lists, tile, work, k_seq, TILE: gl.constexpr):
    """The schedule of a tile."""
    if lists is None:
        return 0
    else:
        span = open_sequence(k_seq, tile.batch)
        head = tile.kv_head * pinned(work.heads.group)
        return schedule_list(lists, tile.batch, head, tile.key, span.length, TILE.block_m)


@gluon.jit
def open_lists(lists, tile, work, q_seq, k_seq, TILE: gl.constexpr):
    """(the queries' Span, the schedule) of a tile, for what needs neither without a list."""
    if lists is None:
        return 0, 0
    else:
        return open_sequence(q_seq, tile.batch), open_list(lists, tile, work, k_seq, TILE)


@gluon.jit
def place_of(lists, schedule, tile, walk, q_span, TILE: gl.constexpr):
    """The first query of a block; with a list one more, where the block needs masks.

    A list counts in 128 queries: of two blocks the second may begin past the end, and is masked.
    """
    if lists is None:
        return row_of(tile, walk, TILE)
    else:
        place = listed_place(lists, schedule, walk.n, TILE.block_m)
        if TILE.block_m == 64:
            place = place | (place >= q_span.length).to(gl.int32)
        return place


@gluon.jit
def row_there(lists, place, q_span, TILE: gl.constexpr):
    """The first query of a place's block, or where it begins past the end one of the last block:
    the next one's sums of dQ are another sequence's."""
    if lists is None:
        return place
    elif TILE.block_m == 64:
        return gl.minimum(place & -2, gl.maximum(q_span.length - 1, 0))
    else:
        return place & -2


@gluon.jit
def find_block(tile, walk, schedule, base, q_span, q_seq, k_seq, masks, lists, work,
              TILE: gl.constexpr):  # fmt: skip
    """(the number of the block that a place is in, how many tiles see it before this one)."""
    place, before = place_of(lists, schedule, tile, walk, q_span, TILE), 0
    row = row_there(lists, place, q_span, TILE)
    if TILE.locked:
        gl.static_assert(lists is None)
        before = tiles_before(row, tile, q_seq, k_seq, masks, TILE)
    return block_of(row, walk, base, work, TILE), before
