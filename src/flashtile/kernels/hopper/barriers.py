"""Hardware barriers by number, which Gluon does not expose.

An mbarrier's arrival is one thread behind a barrier of its whole partition; `bar.arrive` is one
instruction and no wait: 501 -> 597 TFLOP/s, together with the dynamic scheduler (H200, head dim
128, causal, 4k). Triton uses the barriers 0, 1 and, from 2 on, one for each worker partition of
more than one warp.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

RING = gl.constexpr(6)
"""Of ring slot i, 6 + i: consumers have read it. Then come the turns of warpgroups, 8 in all."""

QUERIES = gl.constexpr(14)
"""Consumers have read the queries, or stored the output that takes their place."""


@gluon.constexpr_function
def _instruction(kind, threads):
    return f"bar.{kind} $1, {threads}; mov.b32 $0, 0;"


@gluon.jit
def sync(barrier, THREADS: gl.constexpr):
    """Wait until THREADS threads, these included, have come to the barrier."""
    gl.inline_asm_elementwise(_instruction("sync", THREADS), "=r,r", [barrier], dtype=gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def arrive(barrier, THREADS: gl.constexpr):
    """Come to the barrier and go on."""
    gl.inline_asm_elementwise(_instruction("arrive", THREADS), "=r,r", [barrier], dtype=gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def wait_turn(WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Let the scores of one warpgroup after the other into the tensor cores (ping-pong): helps at
    head dim 64 with three warpgroups, nowhere else. All must take equally many turns."""
    if TILE.turns:
        sync(RING + TILE.slots + WARPGROUP, 256)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """The next warpgroup's turn."""
    if TILE.turns:
        arrive(RING + TILE.slots + (WARPGROUP + 1) % TILE.warpgroups, 256)


@gluon.jit
def first_turn(WARPGROUP: gl.constexpr, TILE: gl.constexpr):
    """Once, before any turn: the last warpgroup passes it to the first."""
    if TILE.turns and TILE.warpgroups - 1 == WARPGROUP:
        arrive(RING + TILE.slots, 256)
