"""Constants, and integers that compile nothing.

Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16, and inside a
NamedTuple `do_not_specialize` does not reach it. Lengths and window sides therefore travel as
2 n + 3, which is neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def opaque(n: int) -> int:
    """An integer >= 0 as a kernel argument whose value compiles nothing."""
    return 2 * n + 3


@triton.jit
def number(n):
    """The integer behind an `opaque` argument."""
    return (n - 3) // 2
