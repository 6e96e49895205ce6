"""The dropout contract on the device (`flashtile.random` is its definition): Philox-4x32-7.

A tile draws one Philox block for every eight elements, in a tensor of the blocks' own shape, and
spreads the words by joins and permutations, which a tensor core's accumulator layout gets for free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number


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
def zero_below(x, words, least):
    """x where words >= least, 0 elsewhere."""
    return tl.where(words >= least, x, 0.0)


@triton.jit
def zero_below_at_once(x, words, least):
    """The same in two instructions: LLVM would select after rounding to 16 bits, which takes five
    for every two elements."""
    return tl.inline_asm_elementwise(
        "{.reg .pred p; setp.hs.u32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p;}",
        "=r,r,r,r",
        [x, words, least],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


class Dropout(NamedTuple):
    rng_state: Any  # (2,) int64: seed, offset
    threshold: Any  # float, 65536 p: 16-bit numbers below are dropped
    rescale: Any  # 1 / (1 - p); 0 where all are dropped, whose threshold does not fit 16 bits
    heads: Any  # opaque
    multiply: Any = multiply
    zero_below: Any = zero_below


@triton.jit
def philox(dropout, c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7, uint32 words."""
    for _ in tl.static_range(7):
        high0, low0 = dropout.multiply(c0, 0xD2511F53)
        high2, low2 = dropout.multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def philox_words(dropout, at, q_groups, k_groups):
    """The four words of the Philox blocks at (q_group, k_group), broadcast together."""
    seed = tl.load(dropout.rng_state).to(tl.uint64)
    offset = tl.load(dropout.rng_state + 1).to(tl.uint32)
    key_low, key_high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    zero = q_groups * 0 + k_groups * 0
    head = tl.cast(at.batch * number(dropout.heads) + at.head, tl.uint32)
    return philox(
        dropout, q_groups + zero, head + zero, k_groups + zero, offset + zero, key_low, key_high
    )


@triton.jit
def words_queries_by_keys(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The numbers of a tile, whose origin is a multiple of 16, in the upper halves of words: eight
    elements a Philox block."""
    q_groups = (at.first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    k_groups = (at.first_k // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)  # 4 c + t
    w0, w1, w2, w3 = philox_words(dropout, at, q_groups[:, None], k_groups[None, :])
    low = tl.join(tl.join(w0 << 16, w1 << 16), tl.join(w2 << 16, w3 << 16))
    high = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = tl.join(low, high)  # (8 a + r, 4 c + t, g, h, b)
    words = tl.reshape(words, [BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2])
    words = tl.permute(words, [0, 5, 1, 2, 4, 3, 6])  # a h r, c g t b
    return tl.reshape(words, [BLOCK_M, BLOCK_N])


@triton.jit
def words_keys_by_queries(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose. k and k + 1 are in different threads here, so that each draws the block and
    uses four of its numbers: twice the arithmetic, but no exchange through shared memory."""
    q_groups = (at.first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    pairs = (at.first_k // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)  # 8 c + 2 t + b
    w0, w1, w2, w3 = philox_words(dropout, at, q_groups[None, :], (pairs // 2)[:, None])
    shift = ((1 - (pairs & 1)) * 16)[:, None]
    words = tl.join(tl.join(w0 << shift, w1 << shift), tl.join(w2 << shift, w3 << shift))
    words = tl.reshape(words, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
    words = tl.permute(words, [0, 4, 1, 2, 5, 3])  # c g (2 t + b), a h r
    return tl.reshape(words, [BLOCK_N, BLOCK_M])


@triton.jit
def drop(dropout, x, words):
    """x where it is kept, 0 elsewhere. What lies below a number in its word cannot tell."""
    return dropout.zero_below(x, words, tl.cast(dropout.threshold, tl.uint32) << 16)
