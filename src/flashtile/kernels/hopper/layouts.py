"""Where the elements of a warpgroup's tiles are: 64 queries, 16 for each of its four warps."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)
"""Queries of a warpgroup: the height of a wgmma."""


@gluon.constexpr_function
def accumulator(columns):
    """Of a (64, columns) wgmma result: thread t of a warp has columns 8 i + 2 (t % 4) + {0, 1} of
    the rows t // 4 and t // 4 + 8."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def operand(result):
    """Of the left operand, in registers, of a wgmma whose result is laid out as `result`. A (64, n)
    accumulator becomes the operand of a product over n without a move between threads."""
    return gl.DotOperandLayout(0, result, 2)


@gluon.constexpr_function
def rows_of(result):
    return gl.SliceLayout(1, result)


@gluon.constexpr_function
def columns_of(result):
    return gl.SliceLayout(0, result)


@gluon.jit
def partial_row_sums(p):
    """(64, 4): of each thread's own columns. The four meet once, after the last block."""
    pairs = gl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 4, 2), 3)
    return gl.sum(pairs, 1)


@gluon.jit
def partial_row_maxima(x):
    """(64, 4): of each thread's own columns."""
    pairs = gl.max(x.reshape(x.shape[0], x.shape[1] // 8, 4, 2), 3)
    return gl.max(pairs, 1)


@gluon.jit
def halves(x):
    """The left and the right columns of an accumulator, as accumulators."""
    COLUMNS: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(x.reshape(x.shape[0], 2, COLUMNS).permute(0, 2, 1))
    half: gl.constexpr = accumulator(COLUMNS)
    return (gl.convert_layout(left, half, assert_trivial=True),
            gl.convert_layout(right, half, assert_trivial=True))  # fmt: skip


@gluon.jit
def whole(left, right):
    """The inverse of `halves`."""
    COLUMNS: gl.constexpr = 2 * left.shape[1]
    both = gl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], COLUMNS)
    return gl.convert_layout(both, accumulator(COLUMNS), assert_trivial=True)


@gluon.jit
def as_operand(x, dtype: gl.constexpr, COLUMNS: gl.constexpr):
    """An accumulator, rounded, as the left operand of a product with COLUMNS columns."""
    return gl.convert_layout(x.to(dtype), operand(accumulator(COLUMNS)), assert_trivial=True)


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing more."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )
