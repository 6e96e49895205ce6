"""dQ of blocks of queries whose sums as integers say too little (see `units`), by the portable
kernels' mainloop."""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.backward import QueryTile, load_queries, query_tile_gradient
from flashtile.kernels.hopper.units import rows_of
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence, open_tile

TOGETHER = tl.constexpr(8)
"""Blocks of a program. Nearly always none is to be computed, and a program of each would take 9 us
to see that, as many as 4 x 4k tokens of 16 heads have (H200)."""


@triton.jit
def block_of(program, programs, turn):
    """A program's block, each turn in another eighth of all, and elsewhere in it: neighbours are
    likely to be computed both, and so are the same blocks of several heads, 1/2 to 1/64 of all
    apart."""
    return turn * programs + (program + turn * programs * 19 // 31) % programs


@triton.jit
def query_gradients_again(q, k, v, dout, dq, space, blocks, q_seq, k_seq, variant, scale, heads,
                          TILE: tl.constexpr):  # fmt: skip
    """dQ of those of `blocks` blocks of queries that are to be computed again."""
    program, programs, end = tl.program_id(0), tl.num_programs(0), number(blocks)
    idx = block_of(program, programs, tl.arange(0, TOGETHER))
    if tl.max(tl.load(space.coarse + idx, mask=idx < end, other=0), 0) > 0:
        for turn in range(TOGETHER):
            block = block_of(program, programs, turn)
            if tl.load(space.coarse + block, mask=block < end, other=0) > 0:
                query_gradient_again(q, k, v, dout, dq, space, block, q_seq, k_seq, variant, scale,
                                     heads, TILE)  # fmt: skip


@triton.jit
def query_gradient_again(q, k, v, dout, dq, space, block, q_seq, k_seq, variant, scale, heads,
                         TILE: tl.constexpr):  # fmt: skip
    """dQ of one block of queries."""
    BLOCK_M: tl.constexpr = TILE.block_m
    batch, head, first = open_tile(q_seq, number(heads.count), block, False, BLOCK_M)
    span = open_sequence(q_seq, batch)
    queries, do = load_queries(q, dout, q_seq, span, head, first, TILE)
    rows = rows_of(space, block, 3, BLOCK_M)
    lse2, delta = tl.load(rows), tl.load(rows + BLOCK_M)
    if len(variant.dropouts) > 0:  # there probabilities have the factor
        lse2 += tl.log2(variant.dropouts[0].rescale)
    own = QueryTile(queries, do, lse2, delta)
    query_tile_gradient(own, k, v, dq, batch, head, first, q_seq, k_seq, variant, scale, heads,
                        TILE)  # fmt: skip
