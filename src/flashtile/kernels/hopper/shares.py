"""How the blocks of keys of all sequences are dealt out to the programs of a decode launch.

A unit is a block of keys of a KV head of a sequence; each program has an equal number of units that
follow each other, whatever the lengths, as long as there are any. The blocks of one KV head that a
program has are a segment. Programs with equal parts of a head take its blocks by turns: all of them
read one stretch of memory, not one each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper.scheduler import quotient
from flashtile.kernels.masks import key_range
from flashtile.kernels.numbers import number
from flashtile.kernels.views import open_sequence


class Share(NamedTuple):
    """The units of a program, [start, stop), and how many a program has."""

    start: Any
    stop: Any
    size: Any


class Segment(NamedTuple):
    """Blocks of keys of one KV head of a sequence, as far as a program has them."""

    stop: Any  # the unit after the last
    batch: Any
    head: Any
    base: Any  # unit u is block base + u * step, counted from the first key
    step: Any
    first: Any  # program that has blocks of the head
    several: Any  # programs that have
    q: Any  # Span
    k: Any  # Span


@gluon.jit
def blocks_seen(q_span, k_span, masks, BLOCK_N: gl.constexpr):
    """(first block of keys that a sequence's queries see, how many), of one or of a vector."""
    seen = key_range(masks, 0, q_span.length - 1, q_span, k_span)
    first = seen.lo // BLOCK_N
    return first, gl.maximum((gl.maximum(seen.hi, 0) + (BLOCK_N - 1)) // BLOCK_N - first, 0)


@gluon.jit
def blocks_from(first, q_seq, k_seq, masks, TILE: gl.constexpr):
    """Blocks that the sequences first, first + 1, ... see; 0 past the last. Each warp has all of
    them, so that none waits for another."""
    layout: gl.constexpr = gl.BlockedLayout([TILE.scan // 32], [32], [4], [0])
    batches = number(q_seq.batch)
    idx = first + gl.arange(0, TILE.scan, layout)
    batch = gl.minimum(idx, batches - 1)
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    _, blocks = blocks_seen(q_span, k_span, masks, TILE.block_n)
    return gl.where(idx < batches, blocks, 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def rounded(size, blocks):
    """The size of a share, a sixteenth more at most, if that makes it whole KV heads of so many
    blocks, or a part of one of which all are alike: fewer results are left to merge. Programs that
    get nothing are not missed, since it is memory that is short."""
    more, fewer = gl.maximum(size, blocks), gl.maximum(gl.minimum(size, blocks), 1)
    times = quotient(more, fewer)
    heads = gl.where(times * fewer < more, times + 1, times) * blocks
    times = gl.maximum(times, 1)
    part = quotient(blocks + times - 1, times)
    wide = gl.where(blocks < size, heads, part)
    return gl.where(wide <= size + size // 16, gl.maximum(wide, size), size)


@gluon.jit
def open_share(q_seq, k_seq, masks, kv_heads, TILE: gl.constexpr):
    """The calling program's share of all units."""
    total, longest = 0, 0
    for first in range(0, number(q_seq.batch), TILE.scan):
        blocks = blocks_from(first, q_seq, k_seq, masks, TILE)
        total += gl.sum(blocks, 0)
        longest = gl.maximum(longest, gl.max(blocks, 0))
    total *= number(kv_heads)
    programs = gl.num_programs(0)
    size = gl.maximum(rounded(quotient(total + programs - 1, programs), longest), 1)
    start = gl.program_id(0) * size
    return Share(start, gl.minimum(start + size, total), size)


@gluon.jit
def find_segment(unit, share, q_seq, k_seq, masks, kv_heads, TILE: gl.constexpr):
    """The segment that begins with a unit: the sequences that end at or before it are counted."""
    batch, start, before = 0, 0, 0
    for first in range(0, number(q_seq.batch), TILE.scan):
        units = blocks_from(first, q_seq, k_seq, masks, TILE) * number(kv_heads)
        ends = before + gl.associative_scan(units, 0, _add)
        passed = ends <= unit
        batch += gl.sum(passed.to(gl.int32), 0)
        start = gl.maximum(start, gl.max(gl.where(passed, ends, 0), 0))
        before += gl.sum(units, 0)
    batch = gl.minimum(batch, number(q_seq.batch) - 1)  # a program without units asks as well
    q_span, k_span = open_sequence(q_seq, batch), open_sequence(k_seq, batch)
    first_block, blocks = blocks_seen(q_span, k_span, masks, TILE.block_n)
    blocks = gl.maximum(blocks, 1)
    head = gl.minimum(quotient(unit - start, blocks), number(kv_heads) - 1)
    part = unit - start - head * blocks
    stop = gl.minimum(unit - part + blocks, share.stop)
    first = quotient(unit - part, share.size)
    several = quotient(unit - part + blocks - 1, share.size) - first + 1
    place, step = part, 1
    if k_seq.table is None:  # neighbours in a table are in one line
        alike = (several * share.size == blocks) & (first * share.size == unit - part)
        place = gl.where(alike, gl.program_id(0) - first, part)
        step = gl.where(alike, several, 1)
    base = first_block + place - unit * step
    return Segment(stop, batch, head, base, step, first, several, q_span, k_span)


@gluon.jit
def first_key(s, unit, TILE: gl.constexpr):
    """Of a segment's unit."""
    return (s.base + unit * s.step) * TILE.block_n
