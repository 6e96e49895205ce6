"""Which blocks of keys a tile of queries is attended with, and how consumers learn it.

Without a block list they lie side by side and both sides count down from the last. With one the
producer looks each block up and leaves its place beside the keys in the ring.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper._compat import aggregate
from flashtile.kernels.hopper.channels import get_number, make_numbers, put_number
from flashtile.kernels.schedule import PARTIAL, RUN, SCATTERED, block_start, schedule_list


class Walk(NamedTuple):
    """Blocks from the last to the first, or those of a schedule."""

    key: Any  # first key of the last block
    blocks: Any  # at least one, even where nothing is seen: no other code deals with that
    schedule: Any = 0  # of a block list


@gluon.jit
def walk_range(seen, BLOCK: gl.constexpr):
    """The blocks of a Range."""
    stop = gl.cdiv(gl.maximum(seen.hi, 1), BLOCK)
    start = gl.minimum(seen.lo // BLOCK, stop - 1)
    return Walk((stop - 1) * BLOCK, stop - start)


@gluon.jit
def open_walk(blocks, seen, batch, head, first, length, BLOCK: gl.constexpr):
    """The blocks of the tile of queries that begins at `first`."""
    if blocks is None:
        return walk_range(seen, BLOCK)
    else:
        s = schedule_list(blocks, batch, head, first, length, BLOCK)
        return Walk(0, gl.maximum(s.partial + s.run + s.scattered, 1), s)


@gluon.jit
def block_place(blocks, walk, i, BLOCK: gl.constexpr):
    """The first key of the i-th block; with a list one more, where the block needs masks."""
    if blocks is None:
        return walk.key - i * BLOCK
    else:
        return listed_place(blocks, walk.schedule, i, BLOCK)


@gluon.jit
def listed_place(blocks, s, i, BLOCK: gl.constexpr):
    """The first key, or query, of the i-th block of a list, and one more where it needs masks."""
    place = 1  # the masks hide all of the first block where the list has none
    if i < s.partial:
        place = block_start(blocks, s, i, PARTIAL, BLOCK) | 1
    elif i < s.partial + s.run:
        place = block_start(blocks, s, i - s.partial, RUN, BLOCK)
    elif i < s.partial + s.run + s.scattered:
        place = block_start(blocks, s, i - s.partial - s.run, SCATTERED, BLOCK)
    return place


@gluon.jit
def first_of(blocks, place):
    """The first key, or query, of a block's place."""
    if blocks is None:
        return place
    else:
        return place & -2


@gluon.jit
def needs_masks(rows, place, first, blocks, BLOCK: gl.constexpr):
    """Whether a block, whose place it is, is not seen as a whole by all rows."""
    if blocks is None:
        return (first < rows.full_lo) | (first + BLOCK > rows.full_hi)
    else:
        return (place & 1) != 0


@aggregate
class Places:
    """Where the keys in the ring's slots lie. What is loaded after a place was left there tells
    that it was; the slot is free when the ring's is."""

    slots: gl.shared_memory_descriptor  # (SLOTS, 1) int32
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, slots, SLOTS):
        self.slots = slots
        self.SLOTS = gl.constexpr(SLOTS)

    @gluon.jit
    def put(self, i, place):
        put_number(self.slots, i % self.SLOTS, place)

    @gluon.jit
    def get(self, i):
        return get_number(self.slots, i % self.SLOTS)


@gluon.jit
def make_places(SLOTS: gl.constexpr):
    return Places(make_numbers(SLOTS), SLOTS)
