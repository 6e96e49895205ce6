"""Dropout's random numbers in the accumulator's layout (`kernels.dropout` has the contract)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.dropout import draw_two_words, draw_words, two_more_words
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
def dropped_queries(dropout, at, BLOCK_M: gl.constexpr):
    """(64, BLOCK_M), keys by queries: what is dropped. k and k + 1 are in different threads here,
    so that each draws the block and uses four of its numbers.

    A number is in the 15 highest bits of its word, above what cannot tell: words are even, and so
    never the limit where all are dropped."""
    ROWS: gl.constexpr = layouts.ROWS
    q_groups = gl.arange(0, BLOCK_M // 2, gl.AutoLayout()).to(gl.uint32)
    pairs = gl.arange(0, ROWS // 2, gl.AutoLayout()).to(gl.uint32)
    left = (17 - pairs % 2 * 16)[:, None]
    w0, w1 = draw_two_words(dropout, at, q_groups[None, :], (pairs // 2)[:, None])
    w0, w1 = w0 << left, w1 << left
    w2, w3 = two_more_words(w0, w1)
    words = gl.join(gl.join(w0, w1), gl.join(w2, w3))  # 8 c + 2 t + b, 8 a + r, g, h
    words = words.reshape(ROWS // 16, 8, BLOCK_M // 16, 8, 2, 2)
    words = words.permute(0, 4, 1, 2, 5, 3).reshape(ROWS, BLOCK_M)  # c g t b, a h r
    words = gl.set_auto_layout(words, layouts.accumulator(BLOCK_M))
    least = dropout.threshold.to(gl.uint32)
    limit = gl.where(least > 0x7FFF, 0xFFFFFFFF, least << 17).to(gl.uint32)
    return words < limit


@gluon.jit
def accumulator_numbers(dropout, at, BLOCK_N: gl.constexpr):
    """(64, BLOCK_N) uint16: 15-bit numbers, whose first bit cannot tell. The eight elements of a
    Philox block belong to the thread that draws it."""
    ROWS: gl.constexpr = layouts.ROWS
    q_groups = gl.arange(0, ROWS // 2, gl.AutoLayout()).to(gl.uint32)
    k_groups = gl.arange(0, BLOCK_N // 4, gl.AutoLayout()).to(gl.uint32)
    w0, w1, w2, w3 = draw_words(dropout, at, q_groups[:, None], k_groups[None, :])
    words = gl.join(gl.join(w0, w1), gl.join(w2, w3))
    numbers = gl.join(words.to(gl.uint16), (words >> 16).to(gl.uint16))  # 8 a + r, 4 c + t, g, h, b
    numbers = numbers.reshape(ROWS // 16, 8, BLOCK_N // 16, 4, 2, 2, 2)
    numbers = numbers.permute(0, 5, 1, 2, 4, 3, 6)  # a h r, c g t b
    return gl.set_auto_layout(numbers.reshape(ROWS, BLOCK_N), layouts.accumulator(BLOCK_N))
