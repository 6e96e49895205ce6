"""How the backward's warps meet: a ring of queries, and the ways that dS and dQ take.

Queries and dO of a block come with mbarriers that TMA completes; everything else goes through
hardware barriers (see `barriers`). Blocks are counted from the kernel's start, and the count gives
slot and phase.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.kernels.hopper import barriers
from flashtile.kernels.hopper._compat import aggregate, tma_load
from flashtile.kernels.hopper.channels import bytes_of, load_rows, slot_of
from flashtile.kernels.hopper.scheduler import pin

TILE_DONE = gl.constexpr(5)
"""Consumers and writer are done with a tile: its keys and values may be overwritten."""

DQ_FREE = gl.constexpr(6)
"""Of warpgroup w, 6 + w: the writer has read its share of dQ."""

DQ_FULL = gl.constexpr(8)
"""Of warpgroup w, 8 + w: its share of dQ is in shared memory."""

BLOCK_READ = gl.constexpr(10)
"""Of ring slot i, 10 + i: both warpgroups have read the block."""

DS_WRITTEN = gl.constexpr(12)
"""dS of both warpgroups is in shared memory; both have read that of two blocks before."""

DOUT_READ = gl.constexpr(13)
"""Both warpgroups have read dO, where it has one slot: no shares lag there."""

DS_GIVEN = gl.constexpr(12)
"""Instead, where shares of dQ lag. To warpgroup w, in steps of parity p, 12 + 2 p + w: dS of the
other one's last step is in shared memory, and it has read that of the step before."""

OWED = gl.constexpr(4)
"""A block's lock is to be set. Triton's 4 and 5 are of partitions of one warp, which need none."""

WITH_KEEPER = gl.constexpr(64)
"""Threads of the writer's warp and of the one that sets locks."""

WITH_WRITER = gl.constexpr(160)
"""Threads of a warpgroup and of the writer's warp."""

CONSUMERS = gl.constexpr(256)

WITH_PRODUCER = gl.constexpr(288)

EVERYBODY = gl.constexpr(320)


class Inputs(NamedTuple):
    """Descriptors of what is read."""

    q: Any  # rows of block_m
    k: Any  # rows of 64
    v: Any
    dout: Any  # rows of block_m
    rows: Any  # rows of block_m fp32: lse in log2 units, delta, perhaps units, lse, ...


@aggregate
class Blocks:
    """Blocks of queries in the order in which they are needed. Q comes with lse, dO with delta:
    what the scores need, and what their gradient does."""

    q: gl.shared_memory_descriptor  # (SLOTS, ..., BLOCK_M, PADDED)
    dout: gl.shared_memory_descriptor  # (DOUT_SLOTS, ..., BLOCK_M, PADDED_V)
    lse: gl.shared_memory_descriptor  # (SLOTS, 1, BLOCK_M)
    delta: gl.shared_memory_descriptor  # (DOUT_SLOTS, 1, BLOCK_M)
    units: gl.shared_memory_descriptor  # (2 * SLOTS, 1, BLOCK_M), where sums of dQ are integers
    q_full: gl.shared_memory_descriptor  # (SLOTS, 1)
    dout_full: gl.shared_memory_descriptor  # (DOUT_SLOTS, 1)
    SLOTS: gl.constexpr
    DOUT_SLOTS: gl.constexpr  # SLOTS, or 1
    NUMBERS: gl.constexpr  # of a row of queries: 2, or 3 with units

    @gluon.constexpr_function
    def __init__(self, q, dout, lse, delta, units, q_full, dout_full, SLOTS, DOUT_SLOTS, NUMBERS):
        self.q = q
        self.dout = dout
        self.lse = lse
        self.delta = delta
        self.q_full = q_full
        self.dout_full = dout_full
        self.units = units
        self.SLOTS = gl.constexpr(SLOTS)
        self.DOUT_SLOTS = gl.constexpr(DOUT_SLOTS)
        self.NUMBERS = gl.constexpr(NUMBERS)

    @gluon.jit
    def claim(self, i):
        """Wait until the slot of item i's queries is free."""
        slot = i % self.SLOTS
        if i >= self.SLOTS:
            barriers.sync(BLOCK_READ + slot, WITH_PRODUCER)

    @gluon.jit
    def fill_queries(self, i, x, batch, head, row, block):
        """Load Q from row on, and lse of the block-th block of all, as item i, whose slot is
        claimed."""
        slot = i % self.SLOTS
        full = self.q_full.index(slot)
        mbarrier.expect(full, bytes_of(x.q) + (self.NUMBERS - 1) * bytes_of(x.rows))
        load_rows(x.q, batch, head, row, full, self.q.index(slot))
        tma_load(x.rows, [self.NUMBERS * block, 0], full, self.lse.index(slot))
        if self.NUMBERS > 2:
            place = self.units.index(slot_of(i, 2 * self.SLOTS))
            tma_load(x.rows, [self.NUMBERS * block + 2, 0], full, place)

    @gluon.jit
    def fill_dout(self, i, x, batch, head, row, block):
        """Load dO and delta of item i, after its queries."""
        slot = i % self.DOUT_SLOTS
        if self.DOUT_SLOTS < self.SLOTS and i > 0:
            barriers.sync(DOUT_READ, WITH_PRODUCER)
        full = self.dout_full.index(slot)
        mbarrier.expect(full, bytes_of(x.dout) + bytes_of(x.rows))
        load_rows(x.dout, batch, head, row, full, self.dout.index(slot))
        tma_load(x.rows, [self.NUMBERS * block + 1, 0], full, self.delta.index(slot))

    @gluon.jit
    def wait_queries(self, i):
        """(BLOCK_M, PADDED) Q of item i, when it has come."""
        mbarrier.wait(self.q_full.index(i % self.SLOTS), (i // self.SLOTS) & 1)
        return self.queries_of(i)

    @gluon.jit
    def queries_of(self, i):
        """(BLOCK_M, PADDED) Q of item i, which has come."""
        tile = self.q.index(i % self.SLOTS)
        return tile.reshape((tile.shape[-2], tile.shape[-1]))

    @gluon.jit
    def wait_dout(self, i):
        """(BLOCK_M, PADDED_V) dO of item i, when it has come."""
        slot = i % self.DOUT_SLOTS
        mbarrier.wait(self.dout_full.index(slot), (i // self.DOUT_SLOTS) & 1)
        tile = self.dout.index(pin(slot))
        return tile.reshape((tile.shape[-2], tile.shape[-1]))

    @gluon.jit
    def lse_of(self, i):
        """(BLOCK_M,), of an item whose queries have come."""
        row = self.lse.index(i % self.SLOTS)
        return row.reshape((row.shape[-1],))

    @gluon.jit
    def delta_of(self, i):
        """(BLOCK_M,), of an item whose dO has come."""
        row = self.delta.index(i % self.DOUT_SLOTS)
        return row.reshape((row.shape[-1],))

    @gluon.jit
    def units_of(self, i):
        """(BLOCK_M,) how many units of dQ are 1, of an item whose queries have come. They stay for
        two blocks more: a share of dQ may be handed over after its queries were released."""
        row = self.units.index(slot_of(i, 2 * self.SLOTS))
        return row.reshape((row.shape[-1],))

    @gluon.jit
    def release(self, i):
        """The calling warpgroup has read item i; but for dO, where that has one slot."""
        barriers.arrive(BLOCK_READ + i % self.SLOTS, WITH_PRODUCER)

    @gluon.jit
    def release_dout(self):
        """The calling warpgroup has read dO and delta of an item, which have one slot."""
        barriers.arrive(DOUT_READ, WITH_PRODUCER)


@aggregate
class KeySide:
    """What stays of a tile of keys, and the places where dS and dQ of a block pass through."""

    k: gl.shared_memory_descriptor  # (1 | 2, ..., 64, PADDED): of both or each
    v: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # (2 | 4, 64, BLOCK_M) 16 bits: of two blocks
    dq: gl.shared_memory_descriptor  # (2, 16, 256) fp32: 64 x 64 of each warpgroup
    full: gl.shared_memory_descriptor  # (1, 1)
    p: gl.shared_memory_descriptor  # (2, 64, BLOCK_M) 16 bits, where both have the same keys

    @gluon.constexpr_function
    def __init__(self, k, v, ds, dq, full, p):
        self.k = k
        self.v = v
        self.ds = ds
        self.dq = dq
        self.full = full
        self.p = p

    @gluon.jit
    def keys(self, WARPGROUP: gl.constexpr):
        """(64, PADDED)"""
        tile = self.k.index(pin(WARPGROUP))
        return tile.reshape((tile.shape[-2], tile.shape[-1]))

    @gluon.jit
    def values(self, WARPGROUP: gl.constexpr):
        """(64, PADDED)"""
        tile = self.v.index(pin(WARPGROUP))
        return tile.reshape((tile.shape[-2], tile.shape[-1]))

    @gluon.jit
    def ds_of(self, i, WARPGROUP: gl.constexpr):
        """(64, BLOCK_M) dS of block i, keys by queries."""
        return self.ds.index(2 * (i & 1) + WARPGROUP)
