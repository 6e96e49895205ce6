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
from flashtile.kernels.hopper._compat import tma_store_wait
from flashtile.kernels.hopper.stages import DQ_FREE, DQ_FULL, WITH_WRITER
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
"""Elements of a warpgroup's share of a block's dQ, 64 x 64."""


@gluon.jit
def hand_over(places, dq, WARPGROUP: gl.constexpr):
    """Store a warpgroup's (64, 64) share for the writer, when the place is free.

    Row 16 w + 8 i + r and column 8 n + 2 c + j are thread 4 r + c of warp w; its order is
    (n, w, r, c, i, j).
    """
    barriers.sync(DQ_FREE + WARPGROUP, WITH_WRITER)
    flat = dq.reshape(4, 2, 8, 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(16, 256)
    places.index(WARPGROUP).store(flat)
    fence_async_shared()
    barriers.arrive(DQ_FULL + WARPGROUP, WITH_WRITER)


@gluon.jit
def open_places():
    """The writer's first word: both places are free."""
    for w in gl.static_range(2):
        barriers.arrive(DQ_FREE + w, WITH_WRITER)


@gluon.jit
def add_shares(acc, places, block, LAST):
    """Add both warpgroups' shares of a block's dQ, and free their places unless they are the
    LAST."""
    for w in gl.static_range(2):
        barriers.sync(DQ_FULL + w, WITH_WRITER)
        reduce_add(acc, [(2 * block + w) * (SHARE // 256), 0], places.index(w))
    if not LAST:
        tma_store_wait(1)
        barriers.arrive(DQ_FREE, WITH_WRITER)
        tma_store_wait(0)
        barriers.arrive(DQ_FREE + 1, WITH_WRITER)


@triton.jit
def finish_query_gradient(acc, dq, q_seq, scale, heads, TILE: tl.constexpr):
    """dQ of one block of queries, from the sums of its shares."""
    BLOCK_M: tl.constexpr = TILE.block_m
    PADDED: tl.constexpr = TILE.padded
    block = tl.program_id(0)
    batch, head, first = open_tile(q_seq, number(heads.count), block, False, BLOCK_M)
    span = open_sequence(q_seq, batch)
    flat = tl.load(acc + block.to(tl.int64) * (2 * SHARE) + tl.arange(0, 2 * SHARE))
    # (warpgroup g, n, w, r, c, i, j); warpgroups own halves of the columns, or of the rows.
    parts = (flat * scale.natural).reshape(2, 8, 4, 8, 4, 2, 2)
    if BLOCK_M == 64:
        parts = parts.permute(2, 5, 3, 0, 1, 4, 6)  # w i r, g n c j
    else:
        parts = parts.permute(0, 2, 5, 3, 1, 4, 6)  # g w i r, n c j
    store_tile(dq, parts.reshape(BLOCK_M, PADDED), tokens(dq, q_seq, span, head), q_seq, span,
               first, BLOCK_M, TILE.dim, PADDED)  # fmt: skip
