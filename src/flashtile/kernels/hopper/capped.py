"""Exponentials of capped scores, with polynomials for the tanh of those well below the cap.

The multi-function unit takes a tanh and an exponential of each score at 16 a clock, and the tensor
cores at head dim 128 as long for the products: neither hides the other. Of most blocks all scores
are small, and then a few FMAs, at 128 a clock, are as exact as the instruction. A warp takes one
way for all its scores of a block, by a vote without shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SMALL = (0.4, 0.8)
"""|x| up to which a polynomial stands for tanh(x)."""

TANH = ((0.99960171, -0.313172682), (0.999696728, -0.32457389, 0.0935748371))
"""x * (a + b x^2 + c x^4): minimax of the relative error, 4.0e-4 and 3.1e-4 where tanh.approx has
4.9e-4. A third one, up to 1.25, took 9 % more time than the second (H200, head dim 128)."""

LEAST_RATE, MOST_RATE = 2.0**-20, 2.0**20
"""Scores a unit whose fifth power, and squares of scores, are within fp32."""

CHAINS = 4
"""Sums of a thread's squares. Where one is at most a number's square, so is each of its scores; a
NaN, which a mask may hide, is not. The largest of all would say it of more blocks, at half the rate
of an FMA (head dim 256: 7 % more time; H200)."""


def polynomials(rate: float, unit_log2: float) -> tuple[float, ...]:
    """For each polynomial the square of the largest score and the coefficients of tanh(rate * s) *
    unit_log2 in s. Where there are none no score is small enough."""
    found: list[float] = []
    for small, terms in zip(SMALL, TANH, strict=True):
        if LEAST_RATE <= abs(rate) <= MOST_RATE:
            scaled = [a * unit_log2 * rate ** (2 * i + 1) for i, a in enumerate(terms)]
            found += [(small / rate) ** 2, *scaled]
        else:
            found += [-1.0, *(0.0 for _ in terms)]
    return tuple(found)


@gluon.constexpr_function
def _sums_of_squares(scores):
    lines = []
    for i in range(len(scores)):
        s, total = scores[i], f"sum{i % CHAINS}"
        first = f"mul.f32 {total}, {s}, {s};"
        lines.append(first if i < CHAINS else f"fma.rn.f32 {total}, {s}, {s}, {total};")
    return lines + [f"max.NaN.f32 sum0, sum0, sum{i};" for i in range(1, CHAINS)]


@gluon.constexpr_function
def _by_polynomial(p, s, addend, terms):
    lines = [f"mul.f32 x, {s}, {s};", f"mov.f32 y, {terms[-1]};"]
    lines += [f"fma.rn.f32 y, y, x, {term};" for term in terms[-2::-1]]
    return [*lines, f"fma.rn.f32 y, y, {s}, {addend};", f"ex2.approx.ftz.f32 {p}, y;"]


@gluon.constexpr_function
def _by_instruction(p, s, addend, rate, unit):
    return [f"mul.f32 x, {s}, {rate};", "tanh.approx.f32 y, x;",
            f"fma.rn.f32 y, y, {unit}, {addend};", f"ex2.approx.ftz.f32 {p}, y;"]  # fmt: skip


@gluon.constexpr_function
def _numbers():
    """Of a call, beside its scores: rate, unit and what `polynomials` gives."""
    return 2 + sum(1 + len(terms) for terms in TANH)


@gluon.constexpr_function
def _assembly(pack):
    """The operands: results, scores, addends, and of each number as many copies."""
    operands = [[f"${i * pack + j}" for j in range(pack)] for i in range(3 + _numbers())]
    results, scores, addends = operands[:3]
    numbers = [copies[0] for copies in operands[3:]]
    rate, unit, at = numbers[0], numbers[1], 2
    sums = ", ".join(f"sum{i}" for i in range(CHAINS))
    lines = [".reg .pred large;", f".reg .f32 x, y, {sums};", *_sums_of_squares(scores)]
    for n in range(len(TANH)):
        largest, terms = numbers[at], numbers[at + 1 : at + 1 + len(TANH[n])]
        at += 1 + len(terms)
        lines += [
            f"setp.gtu.f32 large, sum0, {largest};",
            "vote.sync.any.pred large, large, 0xffffffff;",
            f"@large bra.uni NOT{n};",
        ]
        for i in range(pack):
            lines += _by_polynomial(results[i], scores[i], addends[i], terms)
        lines += ["bra.uni DONE;", f"NOT{n}:"]
    for i in range(pack):
        lines += _by_instruction(results[i], scores[i], addends[i], rate, unit)
    return "\n".join(["{", *lines, "DONE:", "}"])


@gluon.constexpr_function
def _constraints(pack):
    """Results are written before all scores are read."""
    return ",".join(["=&f"] * pack + ["f"] * pack * (2 + _numbers()))


@gluon.jit
def capped_exponentials(s, m, args, unit):
    """exp2((tanh(rate * s) - m) * unit) of a (64, n) accumulator; args (rate, *polynomials)."""
    PACK: gl.constexpr = s.shape[1] // 2
    rate, largest, a, b, next_largest, next_a, next_b, next_c = args
    operands = [s, -(m * unit)[:, None], rate, unit, largest, a, b, next_largest, next_a, next_b,
                next_c]  # fmt: skip
    return gl.inline_asm_elementwise(
        _assembly(PACK), _constraints(PACK), operands, dtype=gl.float32, is_pure=False, pack=PACK
    )
