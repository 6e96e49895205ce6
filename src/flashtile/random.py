"""The dropout contract's random numbers: a counter-based Philox on global indices.

An element of the attention matrix is kept or dropped by its global (batch, head, q, k) index and a
(seed, offset) pair alone, so the mask is the same whatever the tile, the backend or the number of
ranks. Generator: Philox-4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2).

One Philox block gives eight 16-bit numbers. The eight elements they serve are

    q = 16 a + 8 h + r,   k = 16 c + 8 g + 2 t + b      with h, g, b in {0, 1}

for one (a, r, c, t): q and q + 8, k and k + 8, k and k + 1. A tensor-core accumulator (m16n8)
holds them all in one thread when queries are its rows, and two sets of four when keys are, so
neither forward nor backward needs an exchange between threads to draw the mask.

    counter = (8 a + r,  batch * heads + head,  4 c + t,  low 32 bits of offset)
    key     = (low, high 32 bits of seed)
    number  = 16-bit half b of word 2 h + g

An element is dropped where its number is below round(65536 p).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh (seed, offset) from torch's generator: (2,) int64 on `device`, no host sync."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device, generator=generator)


def drop_threshold(dropout_p: float) -> int:
    """16-bit numbers below this are dropped."""
    return round(dropout_p * 65536)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-7. Four counter words to four random words, int64 tensors in [0, 2**32).

    The words may have different, broadcastable shapes: a round only widens what it has to.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A 32 x 32 bit product wraps in int64, its bits stay right; c1 and c3 carry their upper
        # halves along, since they are only xored into words that are masked here.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & LOW32, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & LOW32, p0
        k0, k1 = (k0 + _WEYL[0]) & LOW32, (k1 + _WEYL[1]) & LOW32
    return c0, c1 & LOW32, c2, c3 & LOW32


def split_state(rng_state: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(key words, counter word) of an rng_state."""
    seed, offset = rng_state[0], rng_state[1]
    return (seed & LOW32, (seed >> 32) & LOW32), offset & LOW32


def keep_mask(rng_state: Tensor, dropout_p: float, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Where elements are kept, by the definition above, one Philox block an element: bool.

    head (batch * heads + head), q and k are int64 index tensors that broadcast to the result.
    """
    key, offset = split_state(rng_state)
    q_group = (q >> 4) * 8 + (q & 7)
    k_group = (k >> 4) * 4 + ((k >> 1) & 3)
    words = philox((q_group, head, k_group, offset), key)
    h, g, b = (q >> 3) & 1, (k >> 3) & 1, k & 1
    low = torch.where(g == 0, words[0], words[1])
    high = torch.where(g == 0, words[2], words[3])
    word = torch.where(h == 0, low, high)
    return ((word >> (16 * b)) & 0xFFFF) >= drop_threshold(dropout_p)
