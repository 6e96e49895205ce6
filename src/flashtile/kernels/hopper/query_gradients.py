"""dQ, the sum over all tiles of keys: how a share of it is stored, added and, at the end, read.

Shares are added in fp32, in global memory, by TMA. In 128-byte swizzled shared memory fp32 tiles
cost two wavefronts a store; here a 64 x 64 share is stored in the order in which a warpgroup holds
it, 16 bytes a thread side by side, and added as 16 KB in a row: +4% of the whole backward (H200,
head dim 128). `finish_query_gradient` undoes the order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flashtile.kernels.hopper import barriers
from flashtile.kernels.hopper._compat import tma_store, tma_store_wait
from flashtile.kernels.hopper.locks import wait_lock
from flashtile.kernels.hopper.stages import DQ_FREE, DQ_FULL, WITH_WRITER
from flashtile.kernels.hopper.units import is_nan, rows_of
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence, open_tile, store_tile, tokens

if hasattr(tma, "async_atomic_add"):
    reduce_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @_core.builtin
    def reduce_add(tensor_desc, coord, src, _semantic=None):
        """Add shared memory to a tile of global memory: in Gluon from Triton 3.8 on."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
        )


SHARE = gl.constexpr(4096)
"""Elements of a share of a block's dQ, 64 x 64: a warpgroup's, or one of two of its columns."""


@gluon.constexpr_function
def own_columns(dim, warpgroup):
    """How many columns of dK, dV or dQ are a warpgroup's where both have the same keys, 64 or 128.
    The second one's begin at 128 in head dims above, so that of 192 it has 64."""
    return min(128, (dim + 63) // 64 * 64 - 128 * warpgroup) if dim > 128 else 64


@gluon.jit
def to_integers(x):
    """To the nearest ones. By two sums, whose low bits they are, it is 5 instructions for 2, and
    the main kernel takes 1% to 3% longer (H200)."""
    return gl.inline_asm_elementwise(
        "cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def own_rows(numbers, WARPGROUP: gl.constexpr):
    """Those of a warpgroup's share, of a block's: half of them where the block has 128."""
    return numbers if numbers.shape[0] == 64 else numbers.slice(WARPGROUP * 64, 64, dim=0)


@gluon.jit
def hand_over(side, blocks, i, dq, WARPGROUP: gl.constexpr):
    """Store a warpgroup's (64, 64) share of item i for the writer, when the place is free.

    Row 16 w + 8 i + r and column 8 n + 2 c + j are thread 4 r + c of warp w; its order is
    (n, w, r, c, i, j).
    """
    if side.dq.dtype == gl.int32:
        ROWS: gl.constexpr = gl.SliceLayout(1, dq.type.layout)
        units = own_rows(blocks.units_of(i), WARPGROUP).load(ROWS)
        dq = to_integers(dq * units[:, None])
    barriers.sync(DQ_FREE + WARPGROUP, WITH_WRITER)
    flat = dq.reshape(4, 2, 8, 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(16, 256)
    side.dq.index(WARPGROUP).store(flat)
    fence_async_shared()
    barriers.arrive(DQ_FULL + WARPGROUP, WITH_WRITER)


@gluon.jit
def open_places():
    """The writer's first word: both places are free."""
    for w in gl.static_range(2):
        barriers.arrive(DQ_FREE + w, WITH_WRITER)


@gluon.jit
def add_shares(acc, places, locks, debts, block, before, owed, LAST, TILE: gl.constexpr):
    """Add all shares of a block's dQ to its sums, and free their places unless they are the LAST.
    Returns how many locks were given to be set so far, `owed` of them before.

    `before` tiles see the block before this one, and all of them are earlier tiles of the launch,
    so that nobody waits for a CTA that has not started. Where there are locks, the first tile
    stores, and the block's lock tells that it has.
    """
    if TILE.locked:
        wait_lock((locks + block).to(gl.int64), gl.minimum(before, 1))
    SHARES: gl.constexpr = TILE.block_m * TILE.padded // SHARE
    for n in gl.static_range(SHARES // 2):
        row = (SHARES * block + 2 * n) * (SHARE // 256)
        add_pair(acc, places, row, before, LAST, own_columns(TILE.dim, 0) // 64 - n,
                 own_columns(TILE.dim, 1) // 64 - n, TILE)  # fmt: skip
    if TILE.locked and before == 0:
        debts.put(owed, block, 1)
        owed += 1
    return owed


@gluon.jit
def add_pair(acc, places, row, before, LAST, LEFT_0: gl.constexpr, LEFT_1: gl.constexpr,
             TILE: gl.constexpr):  # fmt: skip
    """One share of each warpgroup that has any LEFT of a block's, this one included."""
    BOTH: gl.constexpr = LEFT_1 > 0
    add_share(acc, places, row, before, 0, TILE)
    if BOTH:
        add_share(acc, places, row + SHARE // 256, before, 1, TILE)
    free_place(0, 1 if BOTH else 0, LAST, LEFT_0 == 1)
    if BOTH:
        free_place(1, 0, LAST, LEFT_1 == 1)


@gluon.jit
def add_share(acc, places, row, before, WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    barriers.sync(DQ_FULL + WARPGROUP, WITH_WRITER)
    if TILE.locked and before == 0:
        tma_store(acc, [row, 0], places.index(WARPGROUP))
    else:
        reduce_add(acc, [row, 0], places.index(WARPGROUP))


@gluon.jit
def free_place(WARPGROUP: gl.constexpr, PENDING: gl.constexpr, LAST, OF_BLOCK: gl.constexpr):
    """Free a place when its share is read, behind which PENDING of the other warpgroup's are; not
    after a warpgroup's last share OF_BLOCK where the block is the LAST."""
    if not (LAST and OF_BLOCK):
        tma_store_wait(PENDING)
        barriers.arrive(DQ_FREE + WARPGROUP, WITH_WRITER)


@triton.jit
def finish_query_gradient(space, dq, q_seq, scale, least, heads, TILE: tl.constexpr):
    """dQ of one block of queries, from the sums of its shares. The last blocks come first: theirs
    were added last, and are in L2. Integers: where a row that is to have `least` units has less,
    `again` computes the block."""
    BLOCK_M: tl.constexpr = TILE.block_m
    PADDED: tl.constexpr = TILE.padded
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head, first = open_tile(q_seq, number(heads.count), block, False, BLOCK_M)
    span = open_sequence(q_seq, batch)
    SUMS: tl.constexpr = BLOCK_M * PADDED
    places = space.acc + block.to(tl.int64) * SUMS + tl.arange(0, SUMS)
    if space.locks is None:
        flat = tl.load(places)
    else:  # nobody has stored where no tile saw the block
        flat = tl.load(places, mask=tl.load(space.locks + block) > 0, other=0)
    # (share s, warpgroup g, n, w, r, c, i, j); warpgroups own halves of the columns, or of the
    # rows.
    parts = flat.reshape(SUMS // (2 * SHARE), 2, 8, 4, 8, 4, 2, 2)
    if BLOCK_M == 64:
        parts = parts.permute(3, 6, 4, 1, 0, 2, 5, 7)  # w i r, g s n c j
    else:
        parts = parts.permute(1, 3, 6, 4, 0, 2, 5, 7)  # g w i r, s n c j
    grad = parts.reshape(BLOCK_M, PADDED)
    if TILE.integers:
        units = tl.load(rows_of(space, block, TILE.row_numbers, BLOCK_M) + 2 * BLOCK_M)
        few = (units > 0.0) & (tl.max(tl.abs(grad), 1) < number(least))
        coarse = tl.max((few | is_nan(units)).to(tl.int32), 0)
        if space.steep is not None:
            coarse = tl.maximum(coarse, tl.load(space.steep))
        tl.store(space.coarse + block, coarse)
        grad = grad.to(tl.float32) * tl.where(units == 0.0, 0.0, 1.0 / units)[:, None]
    grad *= scale.natural
    store_tile(dq, grad, tokens(dq, q_seq, span, head), q_seq, span, first, BLOCK_M, TILE.dim,
               PADDED)  # fmt: skip
