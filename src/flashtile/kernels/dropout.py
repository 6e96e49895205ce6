"""The dropout contract on the device (`flashtile.random` is its definition).

A tile draws one Philox block for every eight elements, in a tensor of the blocks' own shape, and
spreads the words by joins and permutations, which a tensor core's accumulator layout gets for free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import At
from flashtile.kernels.numbers import number
from flashtile.kernels.schedule import block_start

PHILOX = tl.constexpr(0xD256D193)
WEYL = tl.constexpr(0x9E3779B9)
"""What Philox-2x32 multiplies by, and what its key grows by."""

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
def zero_below(p, numbers, least):
    """p where 15-bit numbers, whose first bit cannot tell, are at least `least`, 0 elsewhere."""
    return tl.where((numbers & 0x7FFF) >= least, p, 0.0)


@triton.jit
def zero_below_in_pairs(p, numbers, least):
    """The same by the magnitudes of fp16 numbers: one comparison for two, and for two of 16-bit p
    one instruction more."""
    if p.dtype.primitive_bitwidth == 32:
        return select_in_pairs(p, numbers, least)
    return tl.inline_asm_elementwise(
        "{.reg .b32 n; abs.f16x2 n, $2; set.geu.u32.f16x2 n, n, $3; and.b32 $0, $1, n;}",
        "=r,r,r,r",
        [p, numbers, least],
        dtype=p.dtype,
        is_pure=True,
        pack=2,
    )


@triton.jit
def select_in_pairs(p, numbers, least):
    """zero_below for fp32 p."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred k, l; .reg .b32 n;
        abs.f16x2 n, $4; setp.geu.f16x2 k|l, n, $5;
        selp.f32 $0, $2, 0f00000000, k; selp.f32 $1, $3, 0f00000000, l;
        }""",
        "=&r,=&r,r,r,r,r",
        [p, numbers, least],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def score_gradient(p, dp, delta, numbers, least):
    """p * (dp - delta), with dp 0 where numbers are below `least`."""
    return p * (tl.where((numbers & 0x7FFF) >= least, dp, 0.0) - delta)


@triton.jit
def score_gradient_in_pairs(p, dp, delta, numbers, least):
    """The same: one comparison for two elements makes the predicates that p * dp is added under."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred k, l; .reg .b32 n; .reg .f32 x, y;
        abs.f16x2 n, $8; setp.geu.f16x2 k|l, n, $9;
        neg.f32 x, $6; mul.f32 x, $2, x; @k fma.rn.f32 x, $2, $4, x;
        neg.f32 y, $7; mul.f32 y, $3, y; @l fma.rn.f32 y, $3, $5, y;
        mov.b32 $0, x; mov.b32 $1, y;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r",
        [p, dp, delta, numbers, least],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def own_halves(own, other, odd):
    """Of two words the halves of a key that is odd or not, the word of an even query below that of
    an odd one. `own` is the word of the query that is as odd as the key."""
    even = (own & 0xFFFF) | (other << 16)
    return tl.where(odd != 0, (other >> 16) | (own & 0xFFFF0000), even)


@triton.jit
def own_halves_at_once(own, other, odd):
    """The same in one instruction."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [own, other, tl.where(odd != 0, 0x3276, 0x5410)],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


class Dropout(NamedTuple):
    rng_state: Any  # (2,) int64: seed, offset
    threshold: Any  # float, 32768 p: numbers below are dropped
    rescale: Any  # 1 / (1 - p); 1 where all are dropped
    heads: Any  # opaque
    multiply: Any = multiply
    zero_below: Any = zero_below
    score_gradient: Any = score_gradient
    own_halves: Any = own_halves


@triton.jit
def philox(multiply, c0, c1, key, ROUNDS: tl.constexpr = 6):
    """Philox-2x32-6, uint32 words."""
    for _ in tl.static_range(ROUNDS):
        high, low = multiply(c0, PHILOX)
        c0, c1 = high ^ c1 ^ key, low
        key += WEYL
    return c0, c1


@triton.jit
def draw_two_words(dropout, at, q_groups, k_groups):
    """The words of the Philox blocks at (q_group, k_group) of a tile, broadcast together.

    Counters are put together in the order of how often their parts change: what a thread has of
    its own first, which mainloops do once, what its blocks differ by, which are constants, last.
    """
    seed = tl.load(dropout.rng_state).to(tl.uint64)
    offset = tl.load(dropout.rng_state + 1).to(tl.uint64)
    head = tl.cast(at.batch * number(dropout.heads) + at.head, tl.uint32)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    u, v = philox(multiply, low, high, (offset & 0xFFFFFFFF).to(tl.uint32))
    start, key = philox(multiply, u ^ head, v, (offset >> 32).to(tl.uint32))
    first_q, first_k = tl.cast(at.first_q // 2, tl.uint32), tl.cast(at.first_k // 4, tl.uint32)
    c0 = q_groups % 8 + (start + first_q) + q_groups // 8 * 8
    # A sum without carries, since the tile's first key is a multiple of its keys: the first round
    # takes the exclusive or of this word, and what blocks differ by comes behind the product, or
    # dQ's loop would put each block's word together.
    c1 = k_groups % 4 ^ first_k
    zero = q_groups * 0 + k_groups * 0
    high, low = dropout.multiply(c0 + zero, PHILOX)
    c0 = high ^ c1 ^ key ^ k_groups // 4 * 4
    return philox(dropout.multiply, c0, low, key + WEYL, 5)


@triton.jit
def two_more_words(w0, w1):
    return w0 * 257 + w1, w1 * 255 + w0


@triton.jit
def draw_words(dropout, at, q_groups, k_groups):
    """The four words of the Philox blocks at (q_group, k_group), broadcast together."""
    w0, w1 = draw_two_words(dropout, at, q_groups, k_groups)
    w2, w3 = two_more_words(w0, w1)
    return w0, w1, w2, w3


@triton.jit
def split_words(words):
    """The halves of four words by (word % 2, word // 2, half), behind their own dimensions."""
    w0, w1, w2, w3 = words
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))


@triton.jit
def words_queries_by_keys(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Two words of a tile whose origin is a multiple of its edges, (8 a + r, 4 c + t) each."""
    q_groups = tl.arange(0, BLOCK_M // 2).to(tl.uint32)
    k_groups = tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    return draw_two_words(dropout, at, q_groups[:, None], k_groups[None, :])


@triton.jit
def numbers_queries_by_keys(words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's numbers: uint16, whose first bit is no part of them."""
    w0, w1 = words
    w2, w3 = two_more_words(w0, w1)
    numbers = split_words((w0, w1, w2, w3))  # 8 a + r, 4 c + t, g, h, b
    numbers = tl.reshape(numbers, [BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2])
    numbers = tl.permute(numbers, [0, 5, 1, 2, 4, 3, 6])  # a h r, c g t b
    return tl.reshape(numbers, [BLOCK_M, BLOCK_N])


@triton.jit
def neighbours(words):
    """What the next row has, or of an odd row the one before: a sum of both, less one's own. Where
    they are in two threads, Triton sums by a shuffle, and that is all that is left of it."""
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    pairs = tl.reshape(words, [ROWS // 2, 2, COLUMNS])
    return tl.reshape(tl.sum(pairs, 1)[:, None, :] - pairs, [ROWS, COLUMNS])


@triton.jit
def words_keys_by_queries(dropout, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose: two words of q = 2 u + b, (8 c + 2 t + b, 4 a + u) each.

    k and k + 1 are in different threads here, and need the blocks of both q: each draws one.
    """
    keys = tl.arange(0, BLOCK_N // 2).to(tl.uint32)[:, None]
    queries = (2 * tl.arange(0, BLOCK_M // 4)).to(tl.uint32)[None, :]
    return draw_two_words(dropout, at, queries + keys % 2, keys // 2)


@triton.jit
def numbers_keys_by_queries(dropout, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose, of words that two threads exchange."""
    w0, w1 = words
    v0, v1 = neighbours(w0), neighbours(w1)
    w2, w3 = two_more_words(w0, w1)
    v2, v3 = two_more_words(v0, v1)
    b = (tl.arange(0, BLOCK_N // 2) % 2)[:, None]
    words = (dropout.own_halves(w0, v0, b), dropout.own_halves(w1, v1, b),
             dropout.own_halves(w2, v2, b), dropout.own_halves(w3, v3, b))  # fmt: skip
    numbers = split_words(words)  # 8 c + 2 t + b, 4 a + u, g, h, r % 2
    numbers = tl.reshape(numbers, [BLOCK_N // 16, 8, BLOCK_M // 16, 4, 2, 2, 2])
    numbers = tl.permute(numbers, [0, 4, 1, 2, 5, 3, 6])  # c g (2 t + b), a h r
    return tl.reshape(numbers, [BLOCK_N, BLOCK_M])


@triton.jit
def draw_queries_by_keys(variant, schedule, i, at, PART: tl.constexpr, TILE: tl.constexpr):
    """The words of the i-th block of keys of a part, or () without dropout.

    Mainloops draw a block ahead, behind their last product: the tensor cores are at it for longer
    than Philox takes, and nothing else waits for them there. What they carry is two words: four
    take 8 registers more of a thread, which at head dim 128 dK and dV do not have.
    """
    if len(variant.dropouts) == 0:
        return ()
    else:
        first = block_start(variant.blocks, schedule, i, PART, TILE.block_n)
        here = At(at.batch, at.head, at.first_q, first, at.q_idx, at.k_idx, at.q, at.k)
        return words_queries_by_keys(variant.dropouts[0], here, TILE.block_m, TILE.block_n)


@triton.jit
def draw_keys_by_queries(variant, schedule, i, at, PART: tl.constexpr, TILE: tl.constexpr):
    """The same for a block of queries, where keys are the rows."""
    if len(variant.dropouts) == 0:
        return ()
    else:
        first = block_start(variant.blocks, schedule, i, PART, TILE.block_m)
        here = At(at.batch, at.head, first, at.first_k, at.q_idx, at.k_idx, at.q, at.k)
        return words_keys_by_queries(variant.dropouts[0], here, TILE.block_m, TILE.block_n)


@triton.jit
def least_number(dropout):
    return tl.cast(dropout.threshold, tl.uint32).to(tl.uint16)


@triton.jit
def drop(dropout, p, numbers):
    """p where it is kept, 0 elsewhere."""
    return dropout.zero_below(p, numbers, least_number(dropout))


@triton.jit
def drop_score_gradient(dropout, p, dp, delta, numbers):
    """p * (dp - delta), with dp 0 where p is dropped; delta broadcasts to the block."""
    return dropout.score_gradient(p, dp, delta, numbers, least_number(dropout))


@triton.jit
def drop_queries_by_keys(dropout, p, at, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    words = words_queries_by_keys(dropout, at, BLOCK_M, BLOCK_N)
    return drop(dropout, p, numbers_queries_by_keys(words, BLOCK_M, BLOCK_N))
