"""What a mask tensor hides, of tensors whose rows lie in units of 16 bytes: a thread loads 16 keys
of a query at once.

They are all keys of a warp. The threads that have scores of a query get its bits by a shuffle;
until then those of 64 queries are one register.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper import layouts
from flashtile.kernels.hopper.matrices import plane_of, row_offsets


@gluon.jit
def load_rows(x, at, head, first_q, far, QUERIES: gl.constexpr):
    """(128, QUERIES / 64 or 1): thread t of a warp has queries t, t + 32, ... from a first one on.
    Of query t + 32 h, key 4 j + m of the warp's has bit 8 m + j + 4 (h % 2)."""
    layout: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [4, 1], [0, 1])
    unit = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]  # of four keys
    queries = gl.arange(0, QUERIES, gl.SliceLayout(0, layout))[None, :]
    base = plane_of(x, at.batch, head)
    rows = gl.minimum(layouts.opaque(first_q) + queries, at.q.length - 1)
    offsets = row_offsets(x, rows, far)
    last = (at.k.length - 1) & -16
    keys = gl.minimum(at.first_k + (unit & -4) * 4, last) + (unit & 3) * 4
    pointers = (base + offsets + keys).to(gl.pointer_type(gl.int32))
    words = gl.load(gl.max_contiguous(gl.multiple_of(pointers, [16, 1]), [4, 1]))
    shown = ((words & 0x7F7F7F7F) + 0x7F7F7F7F | words) >> 7
    bits = (~shown & 0x01010101) << ((unit & 3) + (queries // 32 & 1) * 4)
    bits = gl.sum(bits.reshape(4, 4, QUERIES), 1)
    if QUERIES > 32:
        bits = gl.sum(bits.reshape(4, QUERIES // 64, 2, 32), 2)
        bits = bits.permute(0, 2, 1)
    bits = bits.reshape(128, max(QUERIES // 64, 1))
    return gl.convert_layout(bits, threads(bits.shape[1]), assert_trivial=True)


@gluon.constexpr_function
def threads(registers):
    return gl.BlockedLayout([1, registers], [32, 1], [4, 1], [1, 0])


@gluon.jit
def halved(bits, QUERIES: gl.constexpr):
    """Those of the first QUERIES, and those of the next ones, half of all."""
    if QUERIES == 64:
        first, second = gl.split(bits)
        return _one(first), _one(second)
    else:
        return bits, bits >> 4


@gluon.jit
def _one(bits):
    return gl.convert_layout(bits.reshape(128, 1), threads(1), assert_trivial=True)


@gluon.jit
def hidden_queries(bits, QUERIES: gl.constexpr):
    """(64, QUERIES), as scores lie: what is hidden."""
    N: gl.constexpr = bits.shape[1]
    H: gl.constexpr = QUERIES // (32 * N)
    thread = gl.arange(0, 128, gl.SliceLayout(1, threads(8)))[:, None]
    n = gl.arange(0, 8, gl.SliceLayout(0, threads(8)))[None, :]
    source = (n >> 1) * 8 + (thread & 3) * 2 + (n & 1)
    key = (thread >> 2) & 7
    shift = (key & 3) * 8 + (key >> 2)
    if N == 2:
        first, second = gl.split(bits)
        x = gl.join(_of_queries(first, source, shift), _of_queries(second, source, shift))
    else:
        x = _of_queries(bits.reshape(128), source, shift)
    x = x.reshape(4, 8, 4, 4, 2, N)  # warp, key, pair of queries, eight, query, 64
    if H == 2:
        x = gl.join(x, x >> 4)
    x = gl.join(x, x >> 2).reshape(4, 8, 4, 4, 2, N, H, 2)  # with 32, 8 keys
    x = x.permute(0, 7, 1, 5, 6, 3, 2, 4).reshape(64, QUERIES)
    x = gl.convert_layout(x, layouts.accumulator(QUERIES), assert_trivial=True)
    return (x & 1) != 0


@gluon.jit
def _of_queries(bits, source, shift):
    """(128, 8): of eight queries each, from the threads that have them."""
    bits = gl.convert_layout(bits, gl.SliceLayout(1, threads(8)), assert_trivial=True)[:, None]
    found = gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [bits, source], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip
    return found >> shift
