"""The dropout contract's random numbers: a counter-based Philox on global indices.

An element of the attention matrix is kept or dropped by its global (batch, head, q, k) index and a
(seed, offset) pair alone, so the mask is the same whatever the tile, the backend or the number of
ranks. Generator: Philox-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011) with 6 rounds, the fewest of which its authors know no statistical flaw (philox.h of their
Random123; of Philox-4x32 they say the same from 8 rounds on).

One Philox block gives two words, which make eight 15-bit numbers. The eight elements they serve are

    q = 16 a + 8 h + r,   k = 16 c + 8 g + 2 t + b      with h, g, b in {0, 1}

for one (a, r, c, t): q and q + 8, k and k + 8, k and k + 1. A tensor-core accumulator (m16n8)
holds them all in one thread when queries are its rows, and two sets of four when keys are, so
neither forward nor backward needs an exchange between threads to draw the mask.

    u, v       = philox((low, high 32 bits of seed), low 32 bits of offset)
    start, key = philox((u xor (batch * heads + head), v), high 32 bits of offset)
    w0, w1     = philox((start + 8 a + r, 4 c + t), key)
    words      = w0,  w1,  257 w0 + w1,  255 w1 + w0       (all modulo 2**32)
    number     = lower 15 bits of 16-bit half b of word 2 h + g

An element is dropped where its number is below round(32768 p): each with the same probability,
within 2**-16 of p. Any two words are independent of each other, but for the last bit of the last
two. The eight numbers share 64 bits as follows: their upper 7 bits are independent, the lower 8
are sums of bits that others have used, but tell only where the upper 7 are the threshold's, in one
case of 128. Tests hold how often each of the 256 ways to drop eight elements comes against eight
coins.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 6
LOW32 = 0xFFFFFFFF
NUMBERS = 2**15
"""Numbers are below this."""

_MULTIPLIER = 0xD256D193
_WEYL = 0x9E3779B9


def draw_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh (seed, offset) from torch's generator: (2,) int64 on `device`, no host sync."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device, generator=generator)


def drop_threshold(dropout_p: float) -> int:
    """Numbers below this are dropped."""
    return round(dropout_p * NUMBERS)


def philox(counter: tuple[Tensor, Tensor], key: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox-2x32. Two counter words and a key to two random words, int64 tensors in [0, 2**32).

    The words may have different, broadcastable shapes: a round only widens what it has to.
    """
    c0, c1 = counter
    for _ in range(rounds):
        # A 32 x 32 bit product wraps in int64, its bits stay right; c1 carries its upper half
        # along, since it is only xored into a word that is masked here.
        product = c0 * _MULTIPLIER
        c0, c1 = ((product >> 32) ^ c1 ^ key) & LOW32, product
        key = (key + _WEYL) & LOW32
    return c0, c1 & LOW32


def draw_words(rng_state: Tensor, head: Tensor, q_group: Tensor, k_group: Tensor) -> list[Tensor]:
    """The four words of blocks: int64 tensors in [0, 2**32).

    head (batch * heads + head), q_group (8 a + r) and k_group (4 c + t) are int64 index tensors
    that broadcast to the result.
    """
    low, high = rng_state & LOW32, (rng_state >> 32) & LOW32
    u, v = philox((low[0], high[0]), low[1])
    start, key = philox((u ^ head, v), high[1])
    w0, w1 = philox(((start + q_group) & LOW32, k_group), key)
    return [w0, w1, (257 * w0 + w1) & LOW32, (255 * w1 + w0) & LOW32]


def keep_mask(rng_state: Tensor, dropout_p: float, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Where elements are kept, by the definition above, one Philox block an element: bool.

    head (batch * heads + head), q and k are int64 index tensors that broadcast to the result.
    """
    words = draw_words(rng_state, head, (q >> 4) * 8 + (q & 7), (k >> 4) * 4 + ((k >> 1) & 3))
    h, g, b = (q >> 3) & 1, (k >> 3) & 1, k & 1
    low = torch.where(g == 0, words[0], words[1])
    high = torch.where(g == 0, words[2], words[3])
    word = torch.where(h == 0, low, high)
    return ((word >> (16 * b)) & (NUMBERS - 1)) >= drop_threshold(dropout_p)
