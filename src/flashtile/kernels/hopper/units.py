"""Sums of dQ whose order does not matter: integers, multiples of a unit of each query's.

Shares of dQ are added by whoever comes first, and sums of floats depend on who that is. Integers'
do not, wrap around or not, as long as the sum itself fits. No entry of row i of dQ is above

    (|dO_i| max |V_j| + |delta_i|) max |K_jd|

of all keys j, since the row's probabilities sum to 1, or what a sink leaves of that, and dS = P (dP
- delta); a unit is 2^-30 of that. A share is rounded to a multiple of it: of normal data rows of dQ
have entries of up to 2^20 units at 16k keys. Where outliers among the keys leave a row few, or a
bound is no number, `again` computes the row's block once more, by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile import hopper_backward_tiles
from flashtile.kernels.numbers import number
from flashtile.kernels.views import load_tile, open_sequence, open_tile, tokens

STEEPEST = tl.constexpr(hopper_backward_tiles.STEEPEST)

LOOSE = tl.constexpr(256.0)
"""How far max |V_j| max |K_jd| may be above |O_i| and the largest |K_jd| of any tile of keys for a
row of few units to be as it is. An entry's error is then 2^-20 of |dO_i| |O_i| max |K_jd| at 16k
keys, where rounding O costs delta 2^-13 of |dO_i| |O_i| in bf16 and 2^-16 in fp16 at head dim 128.
Rows of so few units see one key, nearly: what they have of dQ is small, and mostly that error,
unless that key has a short K."""

MOST_LSE = tl.constexpr(2.0**20)
"""Of larger ones so few bits are behind the point that probabilities may sum to more than 2."""

MOST_DS = tl.constexpr(30000.0)
"""In fp16, which has no larger ones than 65,504: infinite shares would be the largest integer."""

TOGETHER = tl.constexpr(256)
"""Tiles of keys whose bounds are looked at together."""


@triton.jit
def size_bits(x):
    """|x| as integers of the same order, NaN above everything: Triton's maximum ignores it."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_nan(x):
    return size_bits(x) > 0x7F800000


@triton.jit
def rows_of(space, block, NUMBERS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where lse of a block's queries lies, before delta and, of three NUMBERS, their units."""
    return space.rows + tl.cast(block, tl.int64) * (NUMBERS * BLOCK_M) + tl.arange(0, BLOCK_M)


@triton.jit
def squares(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def lengths(x):
    """Bounds of the lengths of rows, NaN where one has any."""
    sums = squares(x)
    # Of numbers below 2^-63 squares are less than the least float. Maxima would take twice as many
    # instructions as sums.
    sizes = tl.sum(tl.abs(x.to(tl.float32)), 1)
    return tl.where(sums < 2.0**-100, sizes, tl.sqrt(sums)) * 1.001


@triton.jit
def largest(x):
    return from_bits(tl.max(size_bits(x), 0))


@triton.jit
def bound_keys(k, v, bounds, k_seq, heads, TILE: tl.constexpr):
    """Of one tile of keys: a bound of the length of its values, and the largest number in a key."""
    BLOCK: tl.constexpr = TILE.block_n
    tile, kv_heads = tl.program_id(0), number(heads.count) // number(heads.group)
    batch, head, first = open_tile(k_seq, kv_heads, tile, False, BLOCK)
    span = open_sequence(k_seq, batch)
    keys = load_tile(k, tokens(k, k_seq, span, head), k_seq, span, first, False, BLOCK, TILE.dim,
                     TILE.padded)  # fmt: skip
    values = load_tile(v, tokens(v, k_seq, span, head), k_seq, span, first, False, BLOCK,
                       TILE.dim_v, TILE.padded_v)  # fmt: skip
    tl.store(bounds + 2 * tile, largest(lengths(values)))
    tl.store(bounds + 2 * tile + 1, largest(from_bits(tl.max(size_bits(keys), 1))))


@triton.jit
def bounds_of_keys(bounds, k_seq, batch, kv_head, kv_heads, BLOCK: tl.constexpr):
    """(length of values, largest number in a key, that of the tile that has the least) of all keys
    of a head of a sequence."""
    if k_seq.cu_seqlens is None:
        first = (batch * kv_heads + kv_head) * tl.cdiv(number(k_seq.length), BLOCK)
    else:
        slots = number(k_seq.length) // BLOCK + number(k_seq.batch) + 1
        first = kv_head * slots + tl.load(k_seq.cu_seqlens + batch) // BLOCK + batch
    tiles = tl.cdiv(open_sequence(k_seq, batch).length, BLOCK)
    longest = tl.zeros([TOGETHER], tl.int32)
    most = tl.zeros([TOGETHER], tl.int32)
    least = tl.full([TOGETHER], 0x7F800000, tl.int32)
    for start in range(0, tiles, TOGETHER):
        idx = start + tl.arange(0, TOGETHER)
        pair = bounds + 2 * (first + idx)
        longest = tl.maximum(longest, size_bits(tl.load(pair, mask=idx < tiles, other=0.0)))
        own = size_bits(tl.load(pair + 1, mask=idx < tiles, other=0.0))
        most = tl.maximum(most, own)
        least = tl.minimum(least, tl.where(idx < tiles, own, least))
    return from_bits(tl.max(longest, 0)), from_bits(tl.max(most, 0)), from_bits(tl.min(least, 0))


@triton.jit
def mass_beside(weight, lse):
    """At least what is left of a row's probabilities, and little more than lse's rounding may add
    to it: there are twice as many integers as a sum has room for."""
    return tl.maximum(1.0 - weight, 0.0) + 2.0**-14 + tl.abs(lse) * 2.0**-21


@triton.jit
def units_in_one(length, out_length, mass, lse, delta, keys, HALF: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    """How many units of a row's dQ are 1; negative where they may be few (see LOOSE). 0 where dQ is
    0, and NaN where the bound is no number, or one whose inverse would be none. Of rows of dO, with
    dropout's factor, and of O the lengths; mass: what a row's probabilities sum to, which a sink
    takes its part of; keys: `bounds_of_keys`; HALF: in fp16. Rows that saw no key have lse +inf."""
    delta = tl.abs(delta)
    most_ds = (length * keys[0] + delta) * TILE.steepest
    bound = most_ds * keys[1] * mass
    fits = (bound > 2.0**-90) & (bound < 2.0**90) & (tl.abs(lse) < MOST_LSE)
    if HALF:
        fits &= most_ds < MOST_DS
    units = tl.where(fits, 2.0**30 / bound, float("nan"))
    units = tl.where(keys[0] / out_length * (keys[1] / keys[2]) * mass <= LOOSE, -units, units)
    # A factor that is 0, not a product of small ones.
    least = tl.minimum(tl.maximum(tl.minimum(length, keys[0]), delta), keys[1])
    nothing = (least == 0.0) & (bound < float("inf"))
    return tl.where((lse == float("inf")) | nothing, 0.0, units)


@gluon.jit
def report_steep(p, slope, steep):
    """Tell where a user's function has slopes for which sums of dQ as integers have no room, unless
    p is 0 there: without dropout, which no such function has beside it here."""
    steeper = gl.max((gl.abs(p * slope) <= STEEPEST * p).to(gl.int32) ^ 1, 1)
    gl.store(steep + steeper * 0, 1, mask=steeper > 0)
