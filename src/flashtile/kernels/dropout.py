"""The dropout contract on the device (`flashtile.random` is its definition).

A tile draws one Philox block for every eight elements, in a tensor of the blocks' own shape, and
spreads the words by joins and permutations, which a tensor core's accumulator layout gets for free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number

INFINITY = 0x7C00
"""Of fp16, as bits: the largest threshold of the functions that are NVIDIA's own."""


@triton.jit
def multiply(a, FACTOR: tl.constexpr):
    """(high, low) words of a 32 x 32 bit product."""
    return tl.umulhi(a, FACTOR), a * FACTOR


@triton.jit
def multiply_wide(a, FACTOR: tl.constexpr):
    """The same by NVIDIA's one wide multiplication. As 64-bit integers the compiler would find it
    too, but then moves the words through shared memory instead of drawing them where they go."""
    return tl.inline_asm_elementwise(
        "{.reg .u64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t;}",
        "=r,=r,r,r",
        [a, tl.full([], FACTOR, tl.uint32)],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def factors(words, least):
    """1 where the number in the upper half of a word is at least `least`, 0 elsewhere. Its first
    bit, and what lies below it, cannot tell."""
    return tl.where((words & 0x7FFFFFFF) >= (least << 16), 1.0, 0.0)


@triton.jit
def factors_at_once(words, least):
    """The same in one instruction, by the magnitudes of floats, which are ordered as their bits
    are."""
    return tl.inline_asm_elementwise(
        "{.reg .f32 x; mov.b32 x, $1; abs.f32 x, x; set.geu.f32.f32 $0, x, $2;}",
        "=r,r,r",
        [words, least << 16],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def zero_below(p, numbers, least):
    """p where 15-bit numbers, whose first bit cannot tell, are at least `least`, 0 elsewhere."""
    return tl.where((numbers & 0x7FFF) >= least, p, 0.0)


@triton.jit
def zero_below_in_pairs(p, numbers, least):
    """The same for 16-bit p, two in two instructions, by the magnitudes of fp16 numbers."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 n; abs.f16x2 n, $2; set.geu.u32.f16x2 n, n, $3; and.b32 $0, $1, n;}",
        "=r,r,r,r",
        [p, numbers, least],
        dtype=p.dtype,
        is_pure=True,
        pack=2,
    )


class Dropout(NamedTuple):
    rng_state: Any  # (2,) int64: seed, offset
    threshold: Any  # float, 32768 p: numbers below are dropped
    rescale: Any  # 1 / (1 - p); 1 where all are dropped
    heads: Any  # opaque
    multiply: Any = multiply
    factors: Any = factors
    zero_below: Any = zero_below


@triton.jit
def philox(multiply, c0, c1, key):
    """Philox-2x32-6, uint32 words."""
    for _ in tl.static_range(6):
        high, low = multiply(c0, 0xD256D193)
        c0, c1 = high ^ c1 ^ key, low
        key += 0x9E3779B9
    return c0, c1


@triton.jit
def draw_words(dropout, at, q_groups, k_groups, left=None):
    """The four words of the Philox blocks at (q_group, k_group), broadcast together; shifted to the
    left by `left` bits, which two of them need be for all four to be."""
    seed = tl.load(dropout.rng_state).to(tl.uint64)
    offset = tl.load(dropout.rng_state + 1).to(tl.uint64)
    head = tl.cast(at.batch * number(dropout.heads) + at.head, tl.uint32)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    u, v = philox(multiply, low, high, (offset & 0xFFFFFFFF).to(tl.uint32))
    start, key = philox(multiply, u ^ head, v, (offset >> 32).to(tl.uint32))
    zero = q_groups * 0 + k_groups * 0
    w0, w1 = philox(dropout.multiply, q_groups + start + zero, k_groups + zero, key)
    if left is not None:
        w0, w1 = w0 << left, w1 << left
    return w0, w1, w0 * 257 + w1, w1 * 255 + w0


@triton.jit
def to_upper_half(k):
    """By how many bits the number of an even or odd k is below its word's upper half."""
    return (16 - k % 2 * 16).to(tl.uint32)


@triton.jit
def words_queries_by_keys(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The words of a tile whose origin is a multiple of 16: an element's number is in the half that
    its k is even or odd by."""
    q_groups = (at.first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    k_groups = (at.first_k // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)  # 4 c + t
    w0, w1, w2, w3 = draw_words(dropout, at, q_groups[:, None], k_groups[None, :])
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = tl.join(words, words)  # (8 a + r, 4 c + t, g, h, b)
    words = tl.reshape(words, [BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2])
    words = tl.permute(words, [0, 5, 1, 2, 4, 3, 6])  # a h r, c g t b
    return tl.reshape(words, [BLOCK_M, BLOCK_N])


@triton.jit
def kept_queries_by_keys(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 where elements of a tile are kept, 0 where they are dropped: fp32."""
    words = words_queries_by_keys(dropout, at, BLOCK_M, BLOCK_N)
    words = words << to_upper_half(tl.arange(0, BLOCK_N))[None, :]
    return dropout.factors(words, tl.cast(dropout.threshold, tl.uint32))


@triton.jit
def kept_keys_by_queries(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose. k and k + 1 are in different threads here, so that each draws the block and
    uses four of its numbers: twice the arithmetic, but no exchange through shared memory."""
    q_groups = (at.first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    pairs = (at.first_k // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)  # 8 c + 2 t + b
    w0, w1, w2, w3 = draw_words(dropout, at, q_groups[None, :], (pairs // 2)[:, None],
                                to_upper_half(pairs)[:, None])  # fmt: skip
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = tl.reshape(words, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
    words = tl.permute(words, [0, 4, 1, 2, 5, 3])  # c g (2 t + b), a h r
    words = tl.reshape(words, [BLOCK_N, BLOCK_M])
    return dropout.factors(words, tl.cast(dropout.threshold, tl.uint32))


@triton.jit
def drop_queries_by_keys(dropout, p, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """p where it is kept, 0 elsewhere."""
    words = words_queries_by_keys(dropout, at, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_N)[None, :]
    return drop(dropout, p, (words >> (k % 2 * 16).to(tl.uint32)).to(tl.uint16))


@triton.jit
def drop(dropout, p, numbers):
    least = tl.cast(dropout.threshold, tl.uint32).to(tl.uint16)
    if p.dtype.primitive_bitwidth == 16:
        return dropout.zero_below(p, numbers, least)
    else:
        return zero_below(p, numbers, least)
