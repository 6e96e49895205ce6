"""The backward kernel for Hopper: a producer warp, two consumer warpgroups, a warp that adds dQ.

Where blocks of dQ have locks ("after the first") one more warp sets them.

A tile is 64 keys of one KV head for each warpgroup or, at head dims above 128, for both. They walk
over the blocks of queries that see it, of every query head of the group. dK and dV stay in
registers; shares of dQ are added in global memory. Everything that is done to scores is the
portable kernels' own source.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flashtile.kernels.hopper import barriers, layouts
from flashtile.kernels.hopper._compat import tma_store_wait
from flashtile.kernels.hopper.channels import (
    bytes_of,
    load_rows,
    make_barriers,
    make_tiles,
    open_window,
    store_rows,
)
from flashtile.kernels.hopper.gradients import (
    Keys,
    finish_queries,
    first_step,
    gradient_step,
    start_keys,
    unseen_step,
)
from flashtile.kernels.hopper.key_tiles import (
    KeyTile,
    block_of,
    find_keys,
    first_block,
    first_number,
    following,
    go_on,
    hidden_steps,
    make_queue,
    row_of,
    start_walk,
)
from flashtile.kernels.hopper.locks import keep_locks, make_debts
from flashtile.kernels.hopper.query_gradients import add_shares, open_places
from flashtile.kernels.hopper.query_lists import (
    find_block,
    open_list,
    open_lists,
    place_of,
    row_there,
)
from flashtile.kernels.hopper.scheduler import pinned
from flashtile.kernels.hopper.stages import (
    EVERYBODY,
    TILE_DONE,
    Blocks,
    Inputs,
    KeySide,
)
from flashtile.kernels.hopper.walk import first_of, make_places
from flashtile.kernels.hopper.wide_gradients import (
    keep_keys,
    start_columns,
    store_columns,
    wide_step,
)
from flashtile.kernels.masks import At, query_range
from flashtile.kernels.views import open_sequence


class Outputs(NamedTuple):
    """Descriptors of what is written."""

    dq: Any  # fp32 or int32 sums, rows of 256 (see `query_gradients`)
    dk: Any  # rows of 64
    dv: Any


@gluon.jit
def produce(inputs, side, blocks, places, queue, q_seq, k_seq, masks, lists, work,
            TILE: gl.constexpr):  # fmt: skip
    """Find tiles; of each load keys and values once, and the blocks of queries."""
    tiles = pinned(work.key_tiles) * pinned(work.pairs)
    n, i, number = 0, 0, first_number(work, TILE)
    while number < tiles:
        tile = find_keys(work, number, q_seq, k_seq, masks, lists, TILE)
        if tile.key >= 0:
            queue.put(n, tile)
            i = load_tile(inputs, side, blocks, places, tile, n, i, q_seq, k_seq, lists, work,
                          TILE)  # fmt: skip
            n += 1
        # Two blocks before this one is done: CTAs that take tiles earlier end far apart. The slots
        # of packed sequences that are nobody's are the last ones.
        number = gl.where(tile.key >= 0, following(work, tiles, TILE), tiles)
    queue.put(n, KeyTile(0, 0, -1, 0, 0))


@gluon.jit
def fill_queries(inputs, blocks, places, i, window, head, place, block, lists):
    """Load the queries of a place as item i when its slot is free; with a list its place comes with
    them."""
    blocks.claim(i)
    if lists is not None:
        places.put(i, place)
    blocks.fill_queries(i, inputs, window.batch, head, window.row + first_of(lists, place), block)


@gluon.jit
def load_tile(inputs, side, blocks, places, tile, n, i, q_seq, k_seq, lists, work,
              TILE: gl.constexpr):  # fmt: skip
    """Load what the n-th tile takes, its queries as items i, i + 1, ...; the item after them."""
    q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
    q_window = open_window(inputs.q, q_seq, q_span, tile.batch, q_span.length)
    k_window = open_window(inputs.k, k_seq, k_span, tile.batch, k_span.length)
    base = first_block(work, q_seq, tile.batch, TILE)
    schedule = open_list(lists, tile, work, k_seq, TILE)
    walk = start_walk(tile, work, TILE)
    place = place_of(lists, schedule, tile, walk, q_span, TILE)
    block = block_of(row_there(lists, place, q_span, TILE), walk, base, work, TILE)
    steps = tile.blocks * pinned(work.heads.group)
    if n > 0:
        if steps > 0:  # while the tile before is worked on
            fill_queries(inputs, blocks, places, i, q_window, walk.head, place, block, lists)
        barriers.sync(TILE_DONE, EVERYBODY)
    PARTS: gl.constexpr = TILE.block_n // layouts.ROWS
    mbarrier.expect(side.full, PARTS * (bytes_of(inputs.k) + bytes_of(inputs.v)))
    kv_head, key = tile.kv_head // pinned(work.parts), k_window.row + tile.key
    for w in gl.static_range(PARTS):
        load_rows(inputs.k, k_window.batch, kv_head, key + w * layouts.ROWS, side.full,
                  side.k.index(w))  # fmt: skip
    if n == 0 and steps > 0:
        fill_queries(inputs, blocks, places, i, q_window, walk.head, place, block, lists)
    for w in gl.static_range(PARTS):
        load_rows(inputs.v, k_window.batch, kv_head, key + w * layouts.ROWS, side.full,
                  side.v.index(w))  # fmt: skip
    for j in range(steps):
        place = place_of(lists, schedule, tile, walk, q_span, TILE)
        block = block_of(row_there(lists, place, q_span, TILE), walk, base, work, TILE)
        if j > 0:
            fill_queries(inputs, blocks, places, i, q_window, walk.head, place, block, lists)
        row = q_window.row + first_of(lists, place)
        blocks.fill_dout(i, inputs, q_window.batch, walk.head, row, block)
        walk = go_on(walk, tile, work, TILE)
        i += 1
    return i


@gluon.jit
def add_queries(dq, side, queue, debts, q_seq, k_seq, masks, lists, work, TILE: gl.constexpr):
    """Add the shares of dQ that the consumers hand over."""
    n, owed = 0, 0
    tile = queue.get(n, 1)
    while tile.key >= 0:
        mbarrier.wait(side.full, n & 1)  # nobody is in the tile before
        base = first_block(work, q_seq, tile.batch, TILE)
        q_span, schedule = open_lists(lists, tile, work, q_seq, k_seq, TILE)
        walk = start_walk(tile, work, TILE)
        steps = tile.blocks * pinned(work.heads.group)
        if steps > 0:
            open_places()
        for j in range(steps):
            block, before = find_block(tile, walk, schedule, base, q_span, q_seq, k_seq, masks,
                                       lists, work, TILE)  # fmt: skip
            owed = add_shares(dq, side.dq, work.locks, debts, block, before, owed, j == steps - 1,
                              TILE)  # fmt: skip
            walk = go_on(walk, tile, work, TILE)
        tma_store_wait(0)
        barriers.arrive(TILE_DONE, EVERYBODY)
        n += 1
        tile = queue.get(n, 1)
    if TILE.locked:
        debts.put(owed, 0, 0)


@gluon.jit
def own_keys(tile, q_seq, k_seq, variant, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """A warpgroup's 64 keys."""
    first = tile.key + (0 if TILE.wide else WARPGROUP * layouts.ROWS)
    queries: gl.constexpr = TILE.block_m // (2 if TILE.wide else TILE.parts)
    layout: gl.constexpr = layouts.rows_of(layouts.accumulator(queries))
    q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
    k_idx = (first + gl.arange(0, layouts.ROWS, layout))[:, None]
    seen = query_range(variant.masks, first, first + (layouts.ROWS - 1), q_span, k_span)
    # Keys past the end are zeros whose probabilities may overflow: no block is full with them.
    full_hi = gl.where(first + layouts.ROWS > k_span.length, 0, seen.full_hi)
    if len(variant.tensors) > 0:  # apart from the masks, and has no ranges: lists may say more
        full_hi = 0
    at = At(tile.batch, tile.kv_head, 0, first, 0, k_idx, q_span, k_span)
    return Keys(at, seen.lo, seen.full_lo, full_hi, seen.hi)


@gluon.jit
def consume(outputs, side, blocks, places, queue, q_seq, k_seq, variant, scale, work,
            WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """dK and dV of 64 keys of each tile."""
    n, i = 0, 0
    tile = queue.get(n, 4)
    if TILE.persistent:
        while tile.key >= 0:
            i = consume_tile(outputs, side, blocks, places, queue, tile, n, i, q_seq, k_seq,
                             variant, scale, work, WARPGROUP, TILE)  # fmt: skip
            n += 1
            tile = queue.get(n, 4)
    elif tile.key >= 0:
        consume_tile(outputs, side, blocks, places, queue, tile, n, i, q_seq, k_seq, variant, scale,
                     work, WARPGROUP, TILE)  # fmt: skip


@gluon.jit
def place_now(blocks, places, i, tile, walk, variant, TILE: gl.constexpr):
    """Where item i's queries are: their first one, and with a list whether they need masks."""
    if variant.blocks is None:
        return row_of(tile, walk, TILE)
    else:
        blocks.wait_queries(i)
        return places.get(i)


@gluon.jit
def consume_tile(outputs, side, blocks, places, queue, tile, n, i, q_seq, k_seq, variant, scale,
                 work, WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """dK and dV of the n-th tile, whose queries are items i, i + 1, ...; the item after them."""
    keys = own_keys(tile, q_seq, k_seq, variant, WARPGROUP, TILE)
    walk = start_walk(tile, work, TILE)
    mbarrier.wait(side.full, n & 1)
    steps = tile.blocks * pinned(work.heads.group)
    if TILE.wide:
        kept = keep_keys(side, TILE) if TILE.kept > 0 else None
        grads = start_columns(side, kept, blocks, i, steps, WARPGROUP, TILE)
        for j in range(steps):
            place = place_now(blocks, places, i + j, tile, walk, variant, TILE)
            grads = wide_step(grads, side, kept, blocks, i + j, j + 1 < steps, keys, walk.head,
                              place, variant, scale.log2, WARPGROUP, TILE)  # fmt: skip
            walk = go_on(walk, tile, work, TILE)
    else:
        grads, opened = start_keys(TILE), 0
        if TILE.lags and steps > 0:
            place = place_now(blocks, places, i, tile, walk, variant, TILE)
            grads = first_step(grads, side, blocks, i, keys, walk.head, place, variant,
                               scale.log2, WARPGROUP, TILE)  # fmt: skip
            walk, opened = go_on(walk, tile, work, TILE), 1
        hidden = hidden_steps(tile, keys.lo, steps, work, TILE)
        for item in range(i + opened, i + steps - hidden):
            place = place_now(blocks, places, item, tile, walk, variant, TILE)
            grads = gradient_step(grads, side, blocks, item, keys, walk.head, place, variant,
                                  scale.log2, False, WARPGROUP, TILE)  # fmt: skip
            walk = go_on(walk, tile, work, TILE)
        for item in range(i + steps - hidden, i + steps):
            unseen_step(side, blocks, item, False, WARPGROUP, TILE)
    finish_queries(side, blocks, i + steps, steps, WARPGROUP, TILE)
    # Found again rather than kept: every register of the loop is taken.
    tile = queue.get(n, 4)
    k_span = open_sequence(k_seq, tile.batch)
    window = open_window(outputs.dk, k_seq, k_span, tile.batch, k_span.room)
    if TILE.wide:
        store_columns(outputs, side, grads, tile, window, scale.natural, WARPGROUP, TILE)
    else:
        store_gradients(outputs, side, grads, tile, window, scale.natural, WARPGROUP)
    barriers.arrive(TILE_DONE, EVERYBODY)
    return i + steps


@gluon.jit
def store_gradients(outputs, side, grads, tile, window, scale, WARPGROUP: gl.constexpr):
    """Write a warpgroup's dK and dV, through the places of its keys and values, which both
    warpgroups have read."""
    first = window.row + tile.key + WARPGROUP * layouts.ROWS
    side.values(WARPGROUP).store(grads.v.to(outputs.dv.dtype))
    fence_async_shared()
    store_rows(outputs.dv, window.batch, tile.kv_head, first, side.v.index(WARPGROUP))
    side.keys(WARPGROUP).store((grads.k * scale).to(outputs.dk.dtype))
    fence_async_shared()
    store_rows(outputs.dk, window.batch, tile.kv_head, first, side.k.index(WARPGROUP))
    tma_store_wait(0)


@gluon.jit
def make_blocks(inputs, TILE: gl.constexpr):
    SLOTS: gl.constexpr = TILE.slots
    DOUT_SLOTS: gl.constexpr = TILE.dout_slots
    lse = make_tiles(inputs.rows, SLOTS)
    units = make_tiles(inputs.rows, 2 * SLOTS) if TILE.integers else lse
    return Blocks(make_tiles(inputs.q, SLOTS), make_tiles(inputs.dout, DOUT_SLOTS), lse,
                  make_tiles(inputs.rows, DOUT_SLOTS), units, make_barriers(SLOTS),
                  make_barriers(DOUT_SLOTS), SLOTS, DOUT_SLOTS, TILE.row_numbers)  # fmt: skip


@gluon.jit
def make_side(inputs, dq, TILE: gl.constexpr):
    PARTS: gl.constexpr = TILE.block_n // layouts.ROWS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shape: gl.constexpr = [2 * PARTS, layouts.ROWS, TILE.block_m]
    ds = gl.allocate_shared_memory(inputs.q.dtype, shape, layout)
    p = gl.allocate_shared_memory(inputs.q.dtype, shape, layout) if TILE.wide else ds
    return KeySide(make_tiles(inputs.k, PARTS), make_tiles(inputs.v, PARTS), ds, make_tiles(dq, 2),
                   make_barriers(1).index(0), p)  # fmt: skip


@gluon.jit
def attention_backward(q, k, v, dout, rows, dq, dk, dv, sequences, variant, scale, work,
                       TILE: gl.constexpr):  # fmt: skip
    """dK and dV of tiles of keys of a KV head, or of a part of its group, and their part of dQ.

    Triton takes descriptors as arguments of their own only; sequences is those of (queries, keys).
    """
    inputs, outputs = Inputs(q, k, v, dout, rows), Outputs(dq, dk, dv)
    q_seq, k_seq = sequences[0], sequences[1]
    side = make_side(inputs, dq, TILE)
    blocks = make_blocks(inputs, TILE)
    queue = make_queue()
    places = ()
    if variant.blocks is not None:
        places = make_places(TILE.slots)
    debts = ()
    if TILE.locked:
        debts = make_debts()
    fence_async_shared()
    gl.warp_specialize([
        (consume, (outputs, side, blocks, places, queue, q_seq, k_seq, variant, scale, work, 0,
                   TILE)),
        (consume, (outputs, side, blocks, places, queue, q_seq, k_seq, variant, scale, work, 1,
                   TILE)),
        (produce, (inputs, side, blocks, places, queue, q_seq, k_seq, variant.masks, variant.blocks,
                   work, TILE)),
        (add_queries, (dq, side, queue, debts, q_seq, k_seq, variant.masks, variant.blocks, work,
                       TILE)),
    ] + ([(keep_locks, (debts, work.locks))] if TILE.locked else []),
        [4, 1, 1, 1] if TILE.locked else [4, 1, 1],
        [TILE.registers] + [TILE.producer_registers] * (3 if TILE.locked else 2))  # fmt: skip
