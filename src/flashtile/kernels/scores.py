"""Score mods: what is done to a tile of scores before masking, beside its derivative.

`fn(s, at, args)` maps fp32 scores; `slope(before, after, at, args)` is the derivative.
Scores are counted in a unit of the call's own, which the exponential's FMA turns into log2 units
for nothing: softmax_scale, so that products need no multiplication, or the cap, so that a tanh
needs none. What is added to them is divided by that unit on the way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import as_it_is, load_matrix
from flashtile.kernels.numbers import LOG2E, number


@triton.jit
def slope_one(before, after, at, args):
    return 1.0


class ScoreMod(NamedTuple):
    fn: Any
    args: Any = ()
    slope: Any = slope_one
    place: Any = as_it_is  # or within_ends


@triton.jit
def scaled(s, at, args):
    """s * softmax_scale, for scales that are no unit: with one <= 0 the maximum of scaled scores is
    not the scaled maximum, by one near 0 nothing can be divided."""
    return s * args[0]


@triton.jit
def softcap(s, at, args):
    """tanh(s * softmax_scale / cap), the score in units of cap; args (softmax_scale / cap,). Below
    |x| = 0.25 the series, error 3e-7, since 1 - 2 / (e + 1) cancels there."""
    x = s * args[0]
    e = tl.exp2(tl.minimum(tl.abs(x) * (2.0 * LOG2E), 126.0))
    y = 1.0 - 2.0 / (e + 1.0)
    y = tl.where(x < 0.0, -y, y)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(x2 < 0.0625, series, y)


@triton.jit
def softcap_approximate(s, at, args):
    """The same by NVIDIA's instruction: relative error 2^-11, a quarter of what rounding the scores
    to bfloat16 costs."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [s * args[0]], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softcap_slope(before, after, at, args):
    return 1.0 - after * after


@triton.jit
def alibi(s, at, args):
    """s - slope * |q + seqlen_k - seqlen_q - k|; args (slopes, their batch stride, 1 / unit)."""
    diagonal = (at.q_idx + (at.k.length - at.q.length)).to(tl.float32)
    return s - alibi_slope(at, args) * tl.abs(diagonal - at.k_idx.to(tl.float32))


@triton.jit
def alibi_slope(at, args):
    """A head's, for scores in their unit."""
    slopes, stride_batch, per_unit = args
    return tl.load(slopes + at.batch * number(stride_batch) + at.head).to(tl.float32) * per_unit


@triton.jit
def alibi_columns(s, at, args):
    """`alibi` of keys that are not after their queries, but for what is the same for all keys of a
    row: s + slope * k, with keys counted from anywhere."""
    return s + alibi_slope(at, args) * at.k_idx.to(tl.float32)


@triton.jit
def add_matrix(s, at, args):
    """s + a broadcastable (batch, heads, seqlen_q, seqlen_k) tensor; args (its view, 1 / unit)."""
    return s + load_matrix(args[0], at).to(tl.float32) * args[1]


@triton.jit
def apply_score_mods(mods, s, at):
    for i in tl.static_range(len(mods)):
        s = mods[i].fn(s, mods[i].place(at), mods[i].args)
    return s


@triton.jit
def apply_with_slope(mods, s, at):
    """The scores and the product of the mods' derivatives."""
    slope = 1.0
    for i in tl.static_range(len(mods)):
        before = s
        here = mods[i].place(at)
        s = mods[i].fn(before, here, mods[i].args)
        slope = slope * mods[i].slope(before, s, here, mods[i].args)
    return s, slope
