"""From e4m3, read two at a time, to the queries' dtype: not every GPU has the type, none converts
fast, and none transposes bytes on their way from shared memory, as a product with V needs.

An even and the odd dim after it are 16 bits, so that tiles of them are copied, swizzled and
transposed as bf16 is; a product is two, of the even dims and of the odd ones. Sign, exponent and
mantissa go to where the wider format has them, which leaves numbers, subnormal ones too, a power of
two too small: scores and results are multiplied by it, not keys and values. What is not a number
becomes 480.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.forward import V_SCALE_UNIT, Softmax, softmax_step

Q_UNIT = tl.constexpr(2.0**32)
"""Queries are multiplied by it, and probabilities by its square, where numbers are 2^-120 of
theirs: fp32 has 2^-126 and more in full. bf16 and fp32 have room for queries up to 2^96."""


@triton.jit
def widen(x, dtype: tl.constexpr):
    """(even, odd) dims in dtype, `shrunk` times what they are. x: int16."""
    x = x.to(tl.int32)
    if dtype == tl.float16:  # 1 bit to the right of the upper byte
        even = ((x << 8) & 0x8000) | ((x << 7) & 0x3F80)
        odd = (x & 0x8000) | ((x >> 1) & 0x3F80)
    else:  # 4 bits
        even = ((x << 8) & 0x8000) | ((x << 4) & 0x07F0)
        odd = (x & 0x8000) | ((x >> 4) & 0x07F0)
    if dtype == tl.float32:
        return (even << 16).to(dtype, bitcast=True), (odd << 16).to(dtype, bitcast=True)
    else:
        return even.to(tl.int16).to(dtype, bitcast=True), odd.to(tl.int16).to(dtype, bitcast=True)


EVEN = tl.constexpr(
    """
    {
    .reg .b32 s, t;
    shl.b32 t, $1, SHIFT;
    shl.b32 s, $1, 8;
    and.b32 t, t, MASK;
    lop3.b32 $0, s, 0x80008000, t, 0xea;
    }
    """
)
ODD = tl.constexpr(
    """
    {
    .reg .b32 t;
    shr.u32 t, $1, SHIFT;
    and.b32 t, t, MASK;
    lop3.b32 $0, $1, 0x80008000, t, 0xea;
    }
    """
)


def filled(asm: tl.constexpr, **words: str) -> tl.constexpr:
    """PTX with words in the places that have their names."""
    text = asm.value
    for name, word in words.items():
        text = text.replace(name, word)
    return tl.constexpr(text)


EVEN_BF16, ODD_BF16 = (filled(x, SHIFT="4", MASK="0x07f007f0") for x in (EVEN, ODD))
EVEN_FP16 = filled(EVEN, SHIFT="7", MASK="0x3f803f80")
ODD_FP16 = filled(ODD, SHIFT="1", MASK="0x3f803f80")


@triton.jit
def assemble(x, ASM: tl.constexpr, dtype: tl.constexpr):
    """Of dtype, what PTX makes of 16-bit elements, two in a register."""
    bits = tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int16, is_pure=True, pack=2)
    return bits.to(dtype, bitcast=True)


@triton.jit
def widen_at_once(x, dtype: tl.constexpr):
    """The same for 16 bits on NVIDIA's GPUs, four numbers in seven instructions. Each half is an
    assembly of its own: Triton 3.8 sends the second result of one through shared memory. The GPU's
    own instruction, which `hopper.columns` has, gives float16, and bfloat16 takes two more."""
    if dtype == tl.bfloat16:
        return assemble(x, EVEN_BF16, dtype), assemble(x, ODD_BF16, dtype)
    elif dtype == tl.float16:
        return assemble(x, EVEN_FP16, dtype), assemble(x, ODD_FP16, dtype)
    else:
        return widen(x, dtype)


@triton.jit
def shrunk(dtype: tl.constexpr):
    """How many times what numbers are the widened ones are: biases of exponents differ."""
    return 2.0**-8 if dtype == tl.float16 else 2.0**-120


@triton.jit
def query_unit(dtype: tl.constexpr):
    return 1.0 if dtype == tl.float16 else Q_UNIT


@triton.jit
def halves(x):
    """(even, odd) dims of (rows, dims) queries, in their unit."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
    even, odd = tl.split(pairs)
    unit: tl.constexpr = query_unit(x.dtype)
    return (even * unit).to(x.dtype), (odd * unit).to(x.dtype)


@triton.jit
def pointers_to_pairs(x):
    return x.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def nothing(BLOCK_M: tl.constexpr, PADDED_V: tl.constexpr):
    """The state before any key."""
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    return Softmax(m, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, PADDED_V], tl.float32))


@triton.jit
def start_state(TILE: tl.constexpr):
    """The state that `fold` takes: of e4m3 values, acc are the even dims and the odd ones."""
    if TILE.pairs:
        state = nothing(TILE.block_m, TILE.padded_v // 2)
        return Softmax(state.m, state.l, (state.acc, state.acc))
    else:
        return nothing(TILE.block_m, TILE.padded_v)


@triton.jit
def score_step(q, keys, s, work, TILE: tl.constexpr):
    """q K^T on top of s, which may be None. Of e4m3 keys, q are its `halves`."""
    if TILE.pairs:
        even, odd = work.widen(keys, q[0].dtype)
        s = tl.dot(q[0], even.T, s, input_precision=TILE.precision)
        return tl.dot(q[1], odd.T, s, input_precision=TILE.precision)
    else:
        return tl.dot(q, keys.T, s, input_precision=TILE.precision)


@triton.jit
def score_unit(dtype: tl.constexpr, TILE: tl.constexpr):
    """What makes scores of the sums of `score_step`."""
    return 1.0 / (shrunk(dtype) * query_unit(dtype)) if TILE.pairs else 1.0


@triton.jit
def value_unit(dtype: tl.constexpr, TILE: tl.constexpr):
    """What probabilities times e4m3 values are multiplied by on their way to the result: as far as
    float16 goes, what a scale of a token's own may be."""
    if dtype == tl.float16:
        return V_SCALE_UNIT if TILE.scaled_values else 1.0
    else:
        return query_unit(dtype) * query_unit(dtype)


@triton.jit
def fold(state, s, unit, v, at, v_scales, dtype: tl.constexpr, work, TILE: tl.constexpr):
    """`softmax_step`, with e4m3 values in two products."""
    if TILE.pairs:
        m = tl.maximum(state.m, tl.max(s, 1) * unit)
        anchor = tl.where(m == -float("inf"), 0.0, m)
        p = tl.math.exp2(s * unit - anchor[:, None])
        alpha = tl.math.exp2(state.m - anchor)
        l = state.l * alpha + tl.sum(p, 1)
        p *= value_unit(dtype, TILE)
        if v_scales is not None:
            p *= v_scales[None, :]
        p = p.to(dtype)
        even, odd = work.widen(v, dtype)
        even = tl.dot(p, even, state.acc[0] * alpha[:, None], input_precision=TILE.precision)
        odd = tl.dot(p, odd, state.acc[1] * alpha[:, None], input_precision=TILE.precision)
        return Softmax(m, l, (even, odd))
    else:
        return softmax_step(state, s, unit, v, at, (), TILE, v_scales)


@triton.jit
def finish_state(state, v_scale, dtype: tl.constexpr, TILE: tl.constexpr):
    """Values times the scale that they share."""
    if TILE.pairs:
        BLOCK_M: tl.constexpr = TILE.block_m
        PADDED_V: tl.constexpr = TILE.padded_v
        acc = tl.reshape(tl.join(state.acc[0], state.acc[1]), [BLOCK_M, PADDED_V])
        unit = 1.0 / (shrunk(dtype) * value_unit(dtype, TILE))
        if not TILE.scaled_values:
            unit *= v_scale
        return Softmax(state.m, state.l, acc * unit)
    else:
        return state
