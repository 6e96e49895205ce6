"""Dropout's random numbers in the accumulator's layout (`kernels.dropout` has the contract)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.dropout import philox_words
from flashtile.kernels.hopper import layouts


@gluon.constexpr_function
def _product(factor):
    return f"{{.reg .u64 t; mul.wide.u32 t, $2, {factor}; mov.b64 {{$1, $0}}, t;}}"


@gluon.jit
def multiply(a, FACTOR: gl.constexpr):
    """(high, low) words of a product: `kernels.dropout.multiply_wide`, where a scalar cannot be
    made without a layout."""
    return gl.inline_asm_elementwise(
        _product(FACTOR), "=r,=r,r", [a], dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1
    )


@gluon.jit
def accumulator_words(dropout, at, BLOCK_N: gl.constexpr):
    """(64, BLOCK_N) numbers in the upper halves of words, as `words_queries_by_keys` has them. The
    eight elements of a Philox block belong to the thread that draws it."""
    ROWS: gl.constexpr = layouts.ROWS
    q_groups = (at.first_q // 2 + gl.arange(0, ROWS // 2, gl.AutoLayout())).to(gl.uint32)
    k_groups = (at.first_k // 4 + gl.arange(0, BLOCK_N // 4, gl.AutoLayout())).to(gl.uint32)
    w0, w1, w2, w3 = philox_words(dropout, at, q_groups[:, None], k_groups[None, :])
    low = gl.join(gl.join(w0 << 16, w1 << 16), gl.join(w2 << 16, w3 << 16))
    high = gl.join(gl.join(w0, w1), gl.join(w2, w3))
    words = gl.join(low, high)  # (8 a + r, 4 c + t, g, h, b)
    words = words.reshape(ROWS // 16, 8, BLOCK_N // 16, 4, 2, 2, 2)
    words = words.permute(0, 5, 1, 2, 4, 3, 6)  # a h r, c g t b
    return gl.set_auto_layout(words.reshape(ROWS, BLOCK_N), layouts.accumulator(BLOCK_N))
