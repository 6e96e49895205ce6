"""The dropout contract on the device (`flashtile.random` is its definition): Philox-4x32-7.

A tile draws one Philox block for every eight elements, in a tensor of the blocks' own shape, and
spreads the words by joins and permutations, which a tensor core's accumulator layout gets for free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number


class Dropout(NamedTuple):
    rng_state: Any  # (2,) int64: seed, offset
    threshold: Any  # float, 65536 p: 16-bit numbers below are dropped
    rescale: Any  # 1 / (1 - p)
    heads: Any  # opaque


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7, uint32 words."""
    for _ in tl.static_range(7):
        low0, low2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high2 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
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
    return philox(q_groups + zero, head + zero, k_groups + zero, offset + zero, key_low, key_high)


@triton.jit
def keep_queries_by_keys(dropout, at, first_q, first_k, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr):  # fmt: skip
    """Where the tile at (first_q, first_k), multiples of 16, is kept: eight elements a block."""
    q_groups = (first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    k_groups = (first_k // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)  # 4 c + t
    w0, w1, w2, w3 = philox_words(dropout, at, q_groups[:, None], k_groups[None, :])
    threshold = tl.cast(dropout.threshold, tl.uint32)
    low = tl.join(tl.join(w0 & 0xFFFF, w1 & 0xFFFF), tl.join(w2 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w1 >> 16), tl.join(w2 >> 16, w3 >> 16))
    kept = tl.join(low >= threshold, high >= threshold)  # (8 a + r, 4 c + t, g, h, b)
    kept = tl.reshape(kept, [BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2])
    kept = tl.permute(kept, [0, 5, 1, 2, 4, 3, 6])  # a h r, c g t b
    return tl.reshape(kept, [BLOCK_M, BLOCK_N])


@triton.jit
def keep_keys_by_queries(dropout, at, first_q, first_k, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr):  # fmt: skip
    """The transpose. k and k + 1 are in different threads here, so that each draws the block and
    uses four of its numbers: half again the arithmetic, but no exchange through shared memory."""
    q_groups = (first_q // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)  # 8 a + r
    pairs = (first_k // 2 + tl.arange(0, BLOCK_N // 2)).to(tl.uint32)  # 8 c + 2 t + b
    words = philox_words(dropout, at, q_groups[None, :], (pairs // 2)[:, None])
    threshold = tl.cast(dropout.threshold, tl.uint32)
    shift = ((pairs & 1) * 16)[:, None]
    w0, w1, w2, w3 = words
    k0, k1 = ((w0 >> shift) & 0xFFFF) >= threshold, ((w1 >> shift) & 0xFFFF) >= threshold
    k2, k3 = ((w2 >> shift) & 0xFFFF) >= threshold, ((w3 >> shift) & 0xFFFF) >= threshold
    kept = tl.join(tl.join(k0, k1), tl.join(k2, k3))  # (8 c + 2 t + b, 8 a + r, g, h)
    kept = tl.reshape(kept, [BLOCK_N // 16, 8, BLOCK_M // 16, 8, 2, 2])
    kept = tl.permute(kept, [0, 4, 1, 2, 5, 3])  # c g t b, a h r
    return tl.reshape(kept, [BLOCK_N, BLOCK_M])
