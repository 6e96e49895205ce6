"""The forward kernel for Hopper: one producer warp, two or three consumer warpgroups a CTA.

The producer takes tiles of queries and loads their queries, keys and values; each consumer
warpgroup attends with 64 of the tile's queries. Everything that is done to scores is the portable
kernels' own source.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from flashtile.kernels.hopper import barriers, layouts
from flashtile.kernels.hopper._compat import tma_store_wait
from flashtile.kernels.hopper.block import Rows, compares_positions, narrow
from flashtile.kernels.hopper.channels import (
    Queries,
    Ring,
    head_of,
    make_barriers,
    make_blocks,
    make_tiles,
    open_window,
    store_rows,
)
from flashtile.kernels.hopper.packing import head_of_rows, kv_head_of, query_of
from flashtile.kernels.hopper.pages import load_pages
from flashtile.kernels.hopper.scheduler import (
    Tile,
    close,
    find_tile,
    first_order,
    make_queue,
    take_tile,
)
from flashtile.kernels.hopper.softmax import (
    finish_softmax,
    last_values,
    load_query,
    softmax_step,
    start_softmax,
)
from flashtile.kernels.hopper.walk import block_place, first_of, make_places, open_walk
from flashtile.kernels.masks import At, Range, key_range
from flashtile.kernels.views import Span, open_sequence, row_pointers


@gluon.jit
def seen_keys(masks, first, last, q, k):
    """`key_range`, but that a user's function is asked of queries that there are: the last one
    where a warpgroup has none, the first one past the last tile."""
    if compares_positions(masks):
        return key_range(masks, first, last, q, k)
    else:
        there, end = first < q.length, gl.maximum(q.length - 1, 0)
        first, last = gl.minimum(gl.maximum(first, 0), end), gl.minimum(last, end)
        r = key_range(masks, first, last, q, k)
        hi = gl.where(there, r.hi, 0)
        return Range(narrow(r.lo), narrow(r.full_lo), narrow(r.full_hi), narrow(hi))


@gluon.jit
def open_work(work, heads, order, index, q_seq, k_seq, variant, TILE: gl.constexpr):
    """(Order, the Tile of an index, its Walk)."""
    order, batch, head, row = find_tile(work, heads.count, q_seq, k_seq, order, index,
                                        TILE.block_m, TILE.block_n)  # fmt: skip
    batch = gl.where(row < 0, 0, batch)  # past the last tile there is nothing to read
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    seen = seen_keys(variant.masks, query_of(row, TILE.pack),
                     query_of(row + (TILE.block_m - 1), TILE.pack), q_span, k_span)  # fmt: skip
    walk = open_walk(variant.blocks, seen, batch, head, row, q_span.length, TILE.block_n)
    return order, Tile(batch, head, row, walk.key, walk.blocks), walk


@gluon.jit
def fill_keys(source, ring, places, i, k, place, blocks, TILE: gl.constexpr):
    """Load the block of keys at a place as item i, and leave the place beside it."""
    ring.claim(i)
    if blocks is not None:
        places.put(i, place)
    load_block(source, ring, i, k, first_of(blocks, place), TILE.block_n, TILE.padded)


@gluon.jit
def fill_values(source, ring, i, v, place, blocks, TILE: gl.constexpr):
    ring.claim(i)
    load_block(source, ring, i, v, first_of(blocks, place), TILE.block_n, TILE.padded_v)


@gluon.jit
def load_block(source, ring, i, x, first, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr):
    """Load BLOCK_N rows from `first` on as item i, whose slot is claimed."""
    seq, span, window, head = source
    if seq.table is None:
        ring.load(i, x, window.batch, head_of(seq, span.row, head), window.row + first)
    else:
        load_pages(ring, i, x, seq, span, head, first, BLOCK_N, COLUMNS)


@gluon.jit
def produce(q, k, v, ring, places, queries, queue, q_seq, k_seq, variant, heads, work,
            TILE: gl.constexpr):  # fmt: skip
    """Load what the consumers need, in the order in which they need it."""
    n, i = 0, 0
    order, tile, walk = open_work(work, heads, first_order(), gl.program_id(0), q_seq, k_seq,
                                  variant, TILE)  # fmt: skip
    queue.put(n, tile)
    while tile.row >= 0:
        q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
        q_window = open_window(q, q_seq, q_span, tile.batch, q_span.length, TILE.pack)
        window = open_window(k, k_seq, k_span, tile.batch, k_span.length)
        source = (k_seq, k_span, window, kv_head_of(tile.head, heads.group, TILE.pack))
        place = block_place(variant.blocks, walk, 0, TILE.block_n)
        fill_keys(source, ring, places, i, k, place, variant.blocks, TILE)
        queries.fill(n, q, q_window.batch, tile.head, q_window.row + tile.row, TILE.pack)
        i += 1
        for j in range(1, tile.blocks):
            following = block_place(variant.blocks, walk, j, TILE.block_n)
            fill_keys(source, ring, places, i, k, following, variant.blocks, TILE)
            fill_values(source, ring, i + 1, v, place, variant.blocks, TILE)
            place = following
            i += 2
        # As late as a tile can be taken without a wait: 1.202M -> 1.113M cycles of a causal forward
        # at head dim 256 (H200, 8k), whose CTAs otherwise end far apart.
        n += 1
        taken = take_tile(work.counter)
        order, tile, walk = open_work(work, heads, order, taken, q_seq, k_seq, variant, TILE)
        queue.put(n, tile)
        fill_values(source, ring, i, v, place, variant.blocks, TILE)
        i += 1
    close(work.counter)


@gluon.jit
def pass_over(ring, i):
    """Give an item back unread."""
    ring.wait(i)
    ring.release(i)


@gluon.jit
def skip_blocks(ring, i, skipped, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Give back the blocks after these queries, and return the items of the first that is not and
    of the second."""
    key, i = i, i + 1
    for _ in range(skipped):
        pass_over(ring, key)
        pass_over(ring, i + 1)
        barriers.wait_turn(WARPGROUP, TILE)
        barriers.pass_turn(WARPGROUP, TILE)
        key, i = i, i + 2
    return key, i


@gluon.jit
def readable(tile, first, q, k):
    """(batch, q, k) for what reads tensors by the places of queries and keys. A tile without
    queries, which may be of no sequence, or without keys, which may begin where a tensor ends,
    attends with a block as well."""
    batch = gl.where(first < q.length, tile.batch, 0)
    start = gl.where(k.length > 0, k.start, 0)
    queries = Span(q.batch, q.row, q.start, gl.maximum(q.length, 1), q.room, q.leftpad)
    return batch, queries, Span(k.batch, k.row, start, k.length, k.room, k.leftpad)


@gluon.jit
def open_rows(tile, first, group, q_span, k_span, masks, TILE: gl.constexpr):
    """(a warpgroup's queries, a key after all that they see)."""
    layout: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.block_n))
    # `visible` asks whether rows are negative: the compiler now knows that they are not.
    rows = (first + gl.arange(0, layouts.ROWS, layout)) & 0x7FFFFFFF
    row, last = query_of(first, TILE.pack), query_of(first + (layouts.ROWS - 1), TILE.pack)
    seen = seen_keys(masks, row, last, q_span, k_span)
    batch, queries, keys = readable(tile, query_of(tile.row, TILE.pack), q_span, k_span)
    head, _ = head_of_rows(tile.head, rows[:, None], group, TILE.pack)
    at = At(batch, head, row, 0, query_of(rows[:, None], TILE.pack), 0, queries, keys)
    return Rows(at, seen.full_lo, seen.full_hi), seen.hi


@gluon.jit
def consume(out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant, sink, scale,
            group, WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Attend with 64 queries of every tile that the producer takes."""
    BLOCK_N: gl.constexpr = TILE.block_n
    barriers.first_turn(WARPGROUP, TILE)
    n, i = 0, 0
    tile = queue.get(n)
    while tile.row >= 0:
        q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
        first = tile.row + WARPGROUP * layouts.ROWS
        rows, hi = open_rows(tile, first, group, q_span, k_span, variant.masks, TILE)
        query = load_query(queries.wait(n, WARPGROUP), TILE)
        if TILE.frees_queries == "loaded":
            fence_async_shared()
            queries.release()
        skipped = 0
        if TILE.skips and len(variant.masks) > 0 and variant.blocks is None:
            skipped = (tile.key - gl.maximum(hi - 1, 0) // BLOCK_N * BLOCK_N) // BLOCK_N
            # A user's bounds of a warpgroup's queries may be further than those of all.
            skipped = gl.maximum(gl.minimum(skipped, tile.blocks - 1), 0)
        # Without queries of its own a warpgroup leaves the tensor cores to the others.
        skipped = gl.where(rows.at.first_q < q_span.length, skipped, tile.blocks - 1)
        key = tile.key - skipped * BLOCK_N
        item, i = skip_blocks(ring, i, skipped, WARPGROUP, TILE)
        state = start_softmax(query, ring, places, item, i, key, rows, variant, scale.log2, TILE)
        for _ in range(skipped + 1, tile.blocks):
            key -= BLOCK_N
            state = softmax_step(state, query, ring, places, i, key, rows, variant, scale.log2,
                                 WARPGROUP, TILE)  # fmt: skip
            i += 2
        if TILE.frees_queries == "read":
            queries.release()
        acc_token = last_values(state, ring, i, TILE)
        row = first + gl.arange(0, layouts.ROWS, state.m.type.layout)
        idx = query_of(row, TILE.pack)
        head, there = head_of_rows(tile.head, row, group, TILE.pack)
        factor, row_lse = finish_softmax(state, sink, variant.dropouts, head, scale.log2)
        factor, row_lse = clear_padding(factor, row_lse, idx, q_seq, q_span)
        lse_rows = row_pointers(lse, q_span, head, idx)
        gl.store(lse_rows, row_lse, mask=(idx < q_span.room) & there)
        n += 1
        following = queue.get(n)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        ring.release(i)
        window = open_window(out, q_seq, q_span, tile.batch, q_span.room, TILE.pack)
        store_output(out, acc, factor, out_tiles.index(WARPGROUP), window, tile.head, first, TILE)
        if TILE.frees_queries == "stored":
            tma_store_wait(0)
            queries.release()
        i += 1
        tile = following
    tma_store_wait(0)


@gluon.jit
def clear_padding(factor, lse, idx, seq, span):
    """Rows past those in use are 0 and -inf."""
    if seq.cu_seqlens is not None or seq.used is not None:
        used = idx < span.length
        factor, lse = gl.where(used, factor, 0.0), gl.where(used, lse, -float("inf"))
    return factor, lse


@gluon.jit
def store_output(out, acc, factor, place, window, head, first, TILE: gl.constexpr):
    """Normalise and start to write; the place is free when the store before has ended."""
    PADDED: gl.constexpr = TILE.padded_v
    rows: gl.constexpr = layouts.rows_of(layouts.accumulator(PADDED))
    acc = acc * gl.convert_layout(factor, rows)[:, None]
    tma_store_wait(0)
    place.reshape((layouts.ROWS, PADDED)).store(acc.to(out.dtype))
    fence_async_shared()
    store_rows(out, window.batch, head, window.row + first, place, TILE.pack)


@gluon.jit
def attention_forward(q, k, v, out, lse, q_seq, k_seq, variant, sink, scale, heads, work,
                      TILE: gl.constexpr):  # fmt: skip
    """out and lse of all tiles of queries, in as many CTAs as the GPU holds at once."""
    WARPGROUPS: gl.constexpr = TILE.warpgroups
    SLOTS: gl.constexpr = TILE.slots
    THREADS: gl.constexpr = TILE.threads
    q_tiles = make_tiles(q, WARPGROUPS)
    kv_tiles = make_blocks(k, SLOTS, TILE.block_n, TILE.padded)
    out_tiles = q_tiles
    if TILE.frees_queries != "stored":
        out_tiles = make_tiles(out, WARPGROUPS)
    queries = Queries(q_tiles, make_barriers(WARPGROUPS), WARPGROUPS, THREADS)
    ring = Ring(kv_tiles, make_barriers(SLOTS), SLOTS, THREADS)
    queue = make_queue(make_barriers(2))
    places, group = (), None
    if TILE.pack > 1:
        group = heads.group
    if variant.blocks is not None:
        places = make_places(SLOTS)
    fence_async_shared()
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (consume, (out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant,
                       sink, scale, group, 0, TILE)),
            (consume, (out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant,
                       sink, scale, group, 1, TILE)),
            (produce, (q, k, v, ring, places, queries, queue, q_seq, k_seq, variant, heads, work,
                       TILE)),
        ], [4, 1], [TILE.registers, TILE.producer_registers])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant,
                       sink, scale, group, 0, TILE)),
            (consume, (out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant,
                       sink, scale, group, 1, TILE)),
            (consume, (out, lse, ring, places, queries, out_tiles, queue, q_seq, k_seq, variant,
                       sink, scale, group, 2, TILE)),
            (produce, (q, k, v, ring, places, queries, queue, q_seq, k_seq, variant, heads, work,
                       TILE)),
        ], [4, 4, 1], [TILE.registers, TILE.registers, TILE.producer_registers])  # fmt: skip
