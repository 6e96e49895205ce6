"""Results of tiles, whole ones and those whose keys several programs had.

A part is a result of its own, normalised, beside its lse. The last program to leave one for a tile
merges all of them in the order of the programs, so that who comes last makes no difference; those
of more than 16 rows are merged by another launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper import layouts
from flashtile.kernels.hopper._compat import barrier
from flashtile.kernels.hopper.scheduler import quotient
from flashtile.kernels.hopper.softmax import LEAST
from flashtile.kernels.numbers import LN2, LOG2E, number
from flashtile.kernels.views import row_pointers, tokens


class Parts(NamedTuple):
    """Two of each program: of a tile that others began, and after all of these, of one that others
    end. The parts of a row follow each other, so that a merge loads them from one address on."""

    out: Any  # (rows, 2 * programs, PADDED_V) fp32
    lse: Any  # (rows, 2 * programs) fp32, log2 units
    rows: Any  # opaque
    counter: Any  # (programs,) int32, 0 before and after a launch: parts of its last tile


class Result(NamedTuple):
    out: Any  # (rows, PADDED_V) fp32
    lse: Any  # (rows,) log2 units, -inf where a row has seen nothing


class Rows(NamedTuple):
    """Rows of a tile: all query heads of a KV head for one query after another."""

    token: Any
    head: Any


@gluon.jit
def tile_rows(row, kv_head, heads):
    """Tokens and heads of rows."""
    group = number(heads.group)
    token = quotient(row, group)
    return Rows(token, kv_head * group + (row - token * group))


@gluon.jit
def store_result(out, lse, result, q_seq, span, rows, sink, DIM: gl.constexpr):
    """Write rows as far as the sequence has room, 0 and -inf past its end. A sink, a key without a
    value, joins here."""
    o, found = result
    columns: gl.constexpr = layouts.columns_of(o.type.layout)
    if sink is not None:
        logit = gl.load(sink + rows.head).to(gl.float32) * LOG2E
        top = gl.maximum(found, logit)
        top = gl.where(top == -float("inf"), 0.0, top)
        weight = gl.exp2(found - top)
        total = weight + gl.exp2(logit - top)
        o = o * (weight / gl.where(total == 0.0, 1.0, total))[:, None]
        found = top + gl.log2(total)
    used, there = rows.token < span.length, rows.token < span.room
    o = gl.where(used[:, None], o, 0.0)
    found = gl.where(used, found * LN2, -float("inf"))
    pointers = tokens(out, q_seq, span, rows.head) + rows.token.to(gl.int64) * out.stride_token
    dims = gl.arange(0, o.shape[1], columns)
    mask = there[:, None]
    if o.shape[1] != DIM:
        mask = mask & (dims < DIM)[None, :]
    gl.store(pointers[:, None] + dims[None, :], o.to(out.ptr.dtype.element_ty), mask=mask)
    gl.store(row_pointers(lse, span, rows.head, rows.token), found, mask=there)


@gluon.jit
def slot_of(program, place):
    """Where a program leaves its part of a tile; `place` is 0 for the first one that has any."""
    return program + gl.where(place == 0, gl.num_programs(0), 0)


@gluon.jit
def store_part(parts, slot, result):
    """Write the rows that a tile has."""
    o, found = result
    COLUMNS: gl.constexpr = o.shape[1]
    row = gl.arange(0, o.shape[0], layouts.rows_of(o.type.layout))
    dims = gl.arange(0, COLUMNS, layouts.columns_of(o.type.layout))
    there = row < number(parts.rows)
    at = row * (2 * gl.num_programs(0)) + slot
    gl.store(parts.lse + at, found, mask=there)
    gl.store(parts.out + (at * COLUMNS)[:, None] + dims[None, :], o, mask=there[:, None])


@gluon.jit
def last_to_arrive(parts, tile, several):
    """Whether the other programs with parts of a tile have left them. What is read afterwards is
    not older."""
    barrier()
    return gl.atomic_add(parts.counter + tile, 1) == several - 1


@gluon.constexpr_function
def _merging(parts, columns):
    """Layout of (parts, rows, columns): all parts of a row's four columns in one thread."""
    lanes, wide = min(32, columns // 4), max(1, columns // 128)
    return gl.BlockedLayout([parts, 1, 4], [1, 32 // lanes, lanes], [1, 4 // wide, wide], [2, 1, 0])


@gluon.jit
def merge_rows(parts, first, count, row, TILE: gl.constexpr):
    """The results of the rows from `row` on, as many as threads hold, from `count` parts: the last
    one of the program `first`, and the first ones of the programs after it."""
    PARTS: gl.constexpr = TILE.parts
    COLUMNS: gl.constexpr = TILE.padded_v
    ROWS: gl.constexpr = 512 // COLUMNS
    layout: gl.constexpr = _merging(PARTS, COLUMNS)
    merged: gl.constexpr = gl.SliceLayout(0, layout)
    of_rows: gl.constexpr = gl.SliceLayout(1, merged)
    own = gl.minimum(row + gl.arange(0, ROWS, of_rows), number(parts.rows) - 1)
    dims = gl.arange(0, COLUMNS, gl.SliceLayout(0, merged))
    idx = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    at = own * (2 * gl.num_programs(0))
    lse, out = parts.lse + at, parts.out + (at * COLUMNS)[:, None] + dims[None, :]
    slot = slot_of(first, 0)
    # On its way while the others are loaded; what comes first need not be added first.
    earliest = gl.load(lse + slot, cache_modifier=".cg")
    earliest_out = gl.load(out + slot * COLUMNS, cache_modifier=".cg")
    m = gl.full([ROWS], LEAST, gl.float32, of_rows)
    l = gl.zeros([ROWS], gl.float32, of_rows)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, merged)
    spread = gl.convert_layout(lse, gl.SliceLayout(0, gl.SliceLayout(2, layout)),
                               assert_trivial=True)  # fmt: skip
    for start in range(first + 1, first + count, PARTS):
        there = idx < first + count - start
        found = gl.load((spread + start)[None, :] + idx[:, None], mask=there[:, None],
                        other=-float("inf"), cache_modifier=".cg")  # fmt: skip
        o = gl.load((out + start * COLUMNS)[None, :, :] + (idx * COLUMNS)[:, None, None],
                    mask=there[:, None, None], other=0.0, cache_modifier=".cg")  # fmt: skip
        top = gl.maximum(m, gl.convert_layout(gl.max(found, 0), of_rows, assert_trivial=True))
        weight = gl.exp2(found - gl.convert_layout(top, spread.type.layout)[None, :])
        alpha = gl.exp2(m - top)
        l = l * alpha + gl.convert_layout(gl.sum(weight, 0), of_rows, assert_trivial=True)
        acc = acc * alpha[:, None] + gl.sum(o * weight[:, :, None], 0)
        m = top
    top = gl.maximum(m, earliest)
    alpha, weight = gl.exp2(m - top), gl.exp2(earliest - top)
    acc = acc * alpha[:, None] + earliest_out * weight[:, None]
    return finish(top, l * alpha + weight, acc)


@gluon.jit
def finish(m, l, acc):
    """The Result of a state whose maxima m are in log2 units and finite."""
    empty = l == 0.0
    factor = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l))
    return Result(acc * factor[:, None], gl.where(empty, -float("inf"), m + gl.log2(l)))


@gluon.jit
def merge_tile(out, lse, parts, s, q_seq, heads, sink, first, step, TILE: gl.constexpr):
    """Every step-th of the groups of rows of a segment's tile, from the group `first` on."""
    ROWS: gl.constexpr = 512 // TILE.padded_v
    for row in range(ROWS * first, number(parts.rows), ROWS * step):
        result = merge_rows(parts, s.first, s.several, row, TILE)
        idx = row + gl.arange(0, ROWS, result.lse.type.layout)
        rows = tile_rows(idx, s.head, heads)
        store_result(out, lse, result, q_seq, s.q, rows, sink, TILE.dim_v)


@gluon.jit
def clear_rows(out, lse, batch, done, q_seq, span, kv_heads, heads, sink, TILE: gl.constexpr):
    """Write the rows of a sequence from `done` on, which no tile with keys has."""
    layout: gl.constexpr = layouts.accumulator(TILE.padded_v)
    nothing = gl.full([layouts.ROWS], -float("inf"), gl.float32, layouts.rows_of(layout))
    PADDED: gl.constexpr = TILE.padded_v
    zeros = gl.zeros([layouts.ROWS, PADDED], gl.float32, layout)
    for first in range(done, span.room * number(heads.group), layouts.ROWS):
        row = first + gl.arange(0, layouts.ROWS, layouts.rows_of(layout))
        for kv_head in range(number(kv_heads)):
            rows = tile_rows(row, kv_head, heads)
            store_result(out, lse, Result(zeros, nothing), q_seq, span, rows, sink, TILE.dim_v)
