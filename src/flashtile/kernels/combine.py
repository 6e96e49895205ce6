"""What `attention_decode` left over: rows without keys, and tiles whose keys several programs had,
where their parts are many.

A kernel of its own, rather than the last program to arrive: that one would merge up to all parts by
itself (264 of them, 2 MiB, where one KV head has one long sequence), a row at a time spreads them
over the GPU. Also where parts are given, and on GPUs that are not NVIDIA's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.numbers import number
from flashtile.kernels.parts import clear_rest, merge_rows, place_rows, store_rows
from flashtile.kernels.views import open_sequence


@triton.jit
def combine_parts(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE: tl.constexpr):
    """What `attention_decode` left: rows without keys, and a row of a tile at a time its parts."""
    clear_rest(out, lse, q_seq, k_seq, masks, sink, heads, work, TILE)
    rows = number(work.rows)
    items = tl.load(work.parts.count) * rows
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        record = item // rows
        row = (item % rows).to(tl.int32)
        count = tl.load(work.parts.tiles + 4 * record + 2)
        if count > 0:
            batch = tl.load(work.parts.tiles + 4 * record)
            tile = tl.load(work.parts.tiles + 4 * record + 1)
            q_span = open_sequence(q_seq, batch)
            q_tiles = tl.cdiv(q_span.length * number(heads.group), TILE.block_m)
            place = tile % q_tiles * TILE.block_m + row + tl.arange(0, 1)
            those = place_rows(place, tile // q_tiles, heads)
            state = merge_rows(work.parts, record, count, rows, row, 1, work.cut is None, TILE)
            store_rows(out, lse, state, q_seq, q_span, those, sink, work.prefix, TILE)
