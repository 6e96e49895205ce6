"""Matrices that are added to scores which lie keys by queries: biases, and masks of floats."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_matrix_within(s, at, args):
    """`scores.add_matrix`, where the last query and the last key stand for those past the ends: no
    branch is between loads, and ptxas starts them all under the products before.

    args: the matrix, 1 / unit, and (), or not where its rows lie 2^31 elements apart or more.
    """
    x, per_unit, far = args
    return s + load_within(x, at, far).to(tl.float32) * per_unit


@triton.jit
def load_within(x, at, far):
    """A tile of a MatrixView."""
    keys = tl.minimum(at.k_idx, at.k.length - 1) + at.k.leftpad
    columns = plane_of(x, at.batch, at.head) + keys.to(tl.int64) * x.stride_k
    offsets = row_offsets(x, tl.minimum(at.q_idx, at.q.length - 1), far)
    return tl.load((columns.to(tl.pointer_type(tl.int8)) + offsets).to(x.ptr.dtype))


@triton.jit
def plane_of(x, batch, head):
    """Where a head's matrix begins."""
    base = x.ptr + tl.cast(batch, tl.int64) * x.stride_batch
    return base + tl.cast(head, tl.int64) * x.stride_head


@triton.jit
def row_offsets(x, rows, far):
    """Bytes from a matrix's beginning to its rows. Products of 32 bits by 32 are one instruction,
    of 64 bits six."""
    BYTES: tl.constexpr = x.ptr.dtype.element_ty.primitive_bitwidth // 8
    if len(far) > 0:
        return rows.to(tl.int64) * x.stride_q * BYTES
    else:
        stride = tl.cast(tl.cast(x.stride_q, tl.uint32), tl.int64)
        return (rows * BYTES).to(tl.uint32).to(tl.int64) * stride
