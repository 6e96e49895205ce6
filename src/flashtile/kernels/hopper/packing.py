"""Query heads of one KV head as rows of one tile, where there are few queries.

Row r of a packed tile is query r // PACK of head r % PACK of the group; PACK is a power of two, at
least the group, and heads that the group does not have are zeros that are not stored. To the
scheduler such a call has KV heads of PACK times as many rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper.scheduler import pinned, quotient


@gluon.jit
def query_of(row, PACK: gl.constexpr):
    """The query of a row of a tile."""
    if PACK == 1:
        return row
    else:
        return row // PACK


@gluon.jit
def kv_head_of(head, group, PACK: gl.constexpr):
    """The KV head of a tile's head."""
    if PACK == 1:
        return quotient(head, pinned(group))
    else:
        return head


@gluon.jit
def head_of_rows(head, row, group, PACK: gl.constexpr):
    """(query heads of a tile's rows, whether the group has them): one for all, or one each."""
    if PACK == 1:
        return head, True
    else:
        count, member = pinned(group), row & (PACK - 1)
        return head * count + gl.minimum(member, count - 1), member < count
