"""The backward kernel for Hopper: a producer warp, two consumer warpgroups, a warp that adds dQ.

A CTA owns a tile of 128 keys of one KV head, 64 for each warpgroup, and walks over the blocks of
queries that see it, of every query head of the group. dK and dV stay in registers; shares of dQ are
added in global memory. Everything that is done to scores is the portable kernels' own source.
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
    store_rows,
)
from flashtile.kernels.hopper.gradients import KeyGradients, Keys, gradient_step
from flashtile.kernels.hopper.query_gradients import add_shares, open_places
from flashtile.kernels.hopper.scheduler import pinned
from flashtile.kernels.hopper.stages import (
    CONSUMERS,
    DS_WRITTEN,
    Blocks,
    Inputs,
    KeySide,
)
from flashtile.kernels.masks import At, query_range
from flashtile.kernels.views import open_sequence


class Outputs(NamedTuple):
    """Descriptors of what is written."""

    dq: Any  # fp32 sums, rows of 256 (see `query_gradients`)
    dk: Any  # rows of 64
    dv: Any


class KeyWork(NamedTuple):
    """All tiles of a launch, one for each CTA, and their order."""

    key_tiles: Any  # opaque, tiles of keys of a head
    query_blocks: Any  # opaque, blocks of queries of a head
    pairs: Any  # opaque, batch * KV heads
    together: Any  # opaque, pairs whose tiles follow each other tile by tile: dQ stays in L2
    heads: Any  # Heads


class KeyTile(NamedTuple):
    """Keys of one head, and the queries that may see them."""

    batch: Any
    kv_head: Any
    key: Any  # first key
    row: Any  # first query of the first block
    blocks: Any  # of each query head; may be 0


class Walk(NamedTuple):
    """Where a partition is on its way over the blocks of all query heads of a group."""

    head: Any
    n: Any  # blocks of this head gone by


@gluon.jit
def open_keys(work, heads, q_seq, k_seq, masks, TILE: gl.constexpr):
    """The KeyTile of this CTA. The first keys of a head come first: under a causal mask most
    queries see them."""
    BLOCK_M: gl.constexpr = TILE.block_m
    tiles, pairs = pinned(work.key_tiles), pinned(work.pairs)
    together = pinned(work.together)
    kv_heads = pinned(heads.count) // pinned(heads.group)
    group = gl.program_id(0) // (tiles * together)
    rest = gl.program_id(0) - group * tiles * together
    width = gl.minimum(together, pairs - group * together)
    index = rest // width
    pair = group * together + rest - index * width
    batch = pair // kv_heads
    key = index * TILE.block_n
    seen = query_range(masks, key, key + (TILE.block_n - 1), open_sequence(q_seq, batch),
                       open_sequence(k_seq, batch))  # fmt: skip
    first = seen.lo // BLOCK_M
    blocks = gl.maximum(gl.cdiv(seen.hi, BLOCK_M) - first, 0)
    return KeyTile(batch, pair - batch * kv_heads, key, first * BLOCK_M, blocks)


@gluon.jit
def start_walk(tile, heads):
    return Walk(tile.kv_head * pinned(heads.group), 0)


@gluon.jit
def go_on(walk, tile):
    """The next block, of the next head after the last one."""
    ends = walk.n + 1 == tile.blocks
    return Walk(walk.head + ends.to(gl.int32), gl.where(ends, 0, walk.n + 1))


@gluon.jit
def block_of(tile, walk, work, heads, TILE: gl.constexpr):
    """The number of a block of queries among all blocks of all heads."""
    head = tile.batch * pinned(heads.count) + walk.head
    return head * pinned(work.query_blocks) + tile.row // TILE.block_m + walk.n


@gluon.jit
def produce(inputs, side, blocks, q_seq, k_seq, masks, heads, work, TILE: gl.constexpr):
    """Load keys and values once, then the blocks of queries."""
    BLOCK_M: gl.constexpr = TILE.block_m
    tile = open_keys(work, heads, q_seq, k_seq, masks, TILE)
    mbarrier.expect(side.full, 2 * (bytes_of(inputs.k) + bytes_of(inputs.v)))
    for w in gl.static_range(2):
        load_rows(inputs.k, tile.batch, tile.kv_head, tile.key + w * layouts.ROWS, side.full,
                  side.k.index(w))  # fmt: skip
    walk = start_walk(tile, heads)
    steps = tile.blocks * pinned(heads.group)
    if steps > 0:
        block = block_of(tile, walk, work, heads, TILE)
        blocks.fill_queries(0, inputs, tile.batch, walk.head, tile.row, block)
    for w in gl.static_range(2):
        load_rows(inputs.v, tile.batch, tile.kv_head, tile.key + w * layouts.ROWS, side.full,
                  side.v.index(w))  # fmt: skip
    for i in range(steps):
        row = tile.row + walk.n * BLOCK_M
        block = block_of(tile, walk, work, heads, TILE)
        if i > 0:
            blocks.fill_queries(i, inputs, tile.batch, walk.head, row, block)
        blocks.fill_dout(i, inputs, tile.batch, walk.head, row, block)
        walk = go_on(walk, tile)


@gluon.jit
def add_queries(dq, places, q_seq, k_seq, masks, heads, work, TILE: gl.constexpr):
    """Add the shares of dQ that the consumers hand over."""
    tile = open_keys(work, heads, q_seq, k_seq, masks, TILE)
    walk = start_walk(tile, heads)
    steps = tile.blocks * pinned(heads.group)
    if steps > 0:
        open_places()
    for i in range(steps):
        add_shares(dq, places, block_of(tile, walk, work, heads, TILE), i == steps - 1)
        walk = go_on(walk, tile)
    tma_store_wait(0)


@gluon.jit
def own_keys(tile, q_seq, k_seq, masks, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """A warpgroup's 64 keys."""
    first = tile.key + WARPGROUP * layouts.ROWS
    layout: gl.constexpr = layouts.rows_of(layouts.accumulator(TILE.block_m))
    q_span, k_span = open_sequence(q_seq, tile.batch), open_sequence(k_seq, tile.batch)
    k_idx = (first + gl.arange(0, layouts.ROWS, layout))[:, None]
    seen = query_range(masks, first, first + (layouts.ROWS - 1), q_span, k_span)
    # Keys past the end are zeros whose probabilities may overflow: no block is full with them.
    full_hi = gl.where(first + layouts.ROWS > k_span.length, 0, seen.full_hi)
    at = At(tile.batch, tile.kv_head, 0, first, 0, k_idx, q_span, k_span)
    return Keys(at, seen.full_lo, full_hi)


@gluon.jit
def consume(outputs, side, blocks, q_seq, k_seq, variant, scale, heads, work,
            WARPGROUP: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """dK and dV of 64 keys."""
    PADDED: gl.constexpr = TILE.padded
    BLOCK_M: gl.constexpr = TILE.block_m
    result: gl.constexpr = layouts.accumulator(PADDED)
    tile = open_keys(work, heads, q_seq, k_seq, variant.masks, TILE)
    keys = own_keys(tile, q_seq, k_seq, variant.masks, WARPGROUP, TILE)
    walk = start_walk(tile, heads)
    grads = KeyGradients(gl.zeros([layouts.ROWS, PADDED], gl.float32, result),
                         gl.zeros([layouts.ROWS, PADDED], gl.float32, result))  # fmt: skip
    mbarrier.wait(side.full, 0)
    for i in range(tile.blocks * pinned(heads.group)):
        grads = gradient_step(grads, side, blocks, i, keys, walk.head,
                              tile.row + walk.n * BLOCK_M, variant, scale.log2, WARPGROUP,
                              TILE)  # fmt: skip
        walk = go_on(walk, tile)
    # Found again rather than kept: every register of the loop is taken.
    tile = open_keys(work, heads, q_seq, k_seq, variant.masks, TILE)
    store_gradients(outputs, side, grads, tile, scale.natural, WARPGROUP)


@gluon.jit
def store_gradients(outputs, side, grads, tile, scale, WARPGROUP: gl.constexpr):
    """Write a warpgroup's dK and dV, through the places of its keys and values."""
    first = tile.key + WARPGROUP * layouts.ROWS
    side.values(WARPGROUP).store(grads.v.to(outputs.dv.dtype))
    fence_async_shared()
    store_rows(outputs.dv, tile.batch, tile.kv_head, first, side.v.index(WARPGROUP))
    barriers.sync(DS_WRITTEN, CONSUMERS)  # both have read all keys
    side.keys(WARPGROUP).store((grads.k * scale).to(outputs.dk.dtype))
    fence_async_shared()
    store_rows(outputs.dk, tile.batch, tile.kv_head, first, side.k.index(WARPGROUP))
    tma_store_wait(0)


@gluon.jit
def make_blocks(inputs, SLOTS: gl.constexpr):
    return Blocks(make_tiles(inputs.q, SLOTS), make_tiles(inputs.dout, SLOTS),
                  make_tiles(inputs.rows, SLOTS), make_tiles(inputs.rows, SLOTS),
                  make_barriers(SLOTS), make_barriers(SLOTS), SLOTS)  # fmt: skip


@gluon.jit
def attention_backward(q, k, v, dout, rows, dq, dk, dv, sequences, variant, scale, work,
                       TILE: gl.constexpr):  # fmt: skip
    """dK and dV of one tile of keys of a KV head, and its part of dQ: one CTA for each tile.

    Triton takes descriptors as arguments of their own only; sequences is those of (queries, keys).
    """
    inputs, outputs = Inputs(q, k, v, dout, rows), Outputs(dq, dk, dv)
    q_seq, k_seq = sequences[0], sequences[1]
    heads = work.heads
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ds = gl.allocate_shared_memory(q.dtype, [4, layouts.ROWS, TILE.block_m], ds_layout)
    side = KeySide(make_tiles(k, 2), make_tiles(v, 2), ds, make_tiles(dq, 2),
                   make_barriers(1).index(0))  # fmt: skip
    blocks = make_blocks(inputs, TILE.slots)
    fence_async_shared()
    gl.warp_specialize([
        (consume, (outputs, side, blocks, q_seq, k_seq, variant, scale, heads, work, 0, TILE)),
        (consume, (outputs, side, blocks, q_seq, k_seq, variant, scale, heads, work, 1, TILE)),
        (produce, (inputs, side, blocks, q_seq, k_seq, variant.masks, heads, work, TILE)),
        (add_queries, (dq, side.dq, q_seq, k_seq, variant.masks, heads, work, TILE)),
    ], [4, 1, 1], [TILE.registers, TILE.producer_registers, TILE.producer_registers])  # fmt: skip
