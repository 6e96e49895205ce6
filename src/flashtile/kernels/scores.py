"""Score mods: what is done to a tile of scores before masking, beside its derivative.

`fn(s, at, args)` maps fp32 scores; `slope(s, args)` is the derivative, from the mapped scores. The
first mod of a call is `scaled` or `softcap`: it gets raw products and leaves natural units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.masks import load_matrix
from flashtile.kernels.numbers import LOG2E, number


@triton.jit
def slope_one(s, args):
    return 1.0


class ScoreMod(NamedTuple):
    fn: Any
    args: Any = ()
    slope: Any = slope_one


@triton.jit
def scaled(s, at, args):
    """s * softmax_scale. Alone it serves scales <= 0, where the maximum of scaled scores is not the
    scaled maximum."""
    return s * args[0]


@triton.jit
def softcap(s, at, args):
    """cap * tanh(s / cap), args (cap, softmax_scale / cap). Below |x| = 0.25 the series, error
    3e-7, since 1 - 2 / (e + 1) cancels there."""
    cap, scale = args
    x = s * scale
    e = tl.exp2(tl.minimum(tl.abs(x) * (2.0 * LOG2E), 126.0))
    y = 1.0 - 2.0 / (e + 1.0)
    y = tl.where(x < 0.0, -y, y)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return cap * tl.where(x2 < 0.0625, series, y)


@triton.jit
def softcap_approximate(s, at, args):
    """cap * tanh(s / cap) by NVIDIA's instruction: relative error 2^-11, a quarter of what rounding
    the scores to bfloat16 costs."""
    return args[0] * tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [s * args[1]], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softcap_slope(s, args):
    y = s * (1.0 / args[0])
    return 1.0 - y * y


@triton.jit
def alibi(s, at, args):
    """s - slope * |q + seqlen_k - seqlen_q - k|."""
    slopes, stride_batch = args
    slope = tl.load(slopes + at.batch * number(stride_batch) + at.head).to(tl.float32)
    diagonal = (at.q_idx + (at.k.length - at.q.length)).to(tl.float32)
    return s - slope * tl.abs(diagonal - at.k_idx.to(tl.float32))


@triton.jit
def add_matrix(s, at, args):
    """s + a broadcastable (batch, heads, seqlen_q, seqlen_k) tensor."""
    return s + load_matrix(args[0], at).to(tl.float32)


@triton.jit
def apply_score_mods(mods, s, at):
    for i in tl.static_range(len(mods)):
        s = mods[i].fn(s, at, mods[i].args)
    return s


@triton.jit
def apply_with_slope(mods, s, at):
    """The scores and the product of the mods' derivatives."""
    slope = 1.0
    for i in tl.static_range(len(mods)):
        s = mods[i].fn(s, at, mods[i].args)
        slope = slope * mods[i].slope(s, mods[i].args)
    return s, slope
