"""Locks of blocks of queries: they tell that the first tile has stored its share of dQ, to which
others add theirs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper import barriers
from flashtile.kernels.hopper._compat import aggregate
from flashtile.kernels.hopper.channels import get_number, make_numbers, put_number
from flashtile.kernels.hopper.stages import OWED, WITH_KEEPER


@gluon.jit
def wait_lock(lock, count):
    """Wait until a lock stands at `count` or more; what TMA is told to do then comes after what was
    written before it did. The fence is of global memory alone: the one of all is a membar.gpu."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred early;
        again:
        ld.acquire.gpu.global.b32 $0, [$1];
        setp.lt.s32 early, $0, $2;
        @early bra again;
        bar.warp.sync 0xffffffff;
        fence.proxy.async.global;
        }""", "=&r,l,r", [lock, count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@aggregate
class Debts:
    """Locks to set, from the writer's warp to another one, through two places: the fence, a
    membar.gpu, takes as long as most of a step, in which the writer already adds the next block."""

    numbers: gl.shared_memory_descriptor  # (4, 1) int32: a block and what its lock is set to, twice

    @gluon.constexpr_function
    def __init__(self, numbers):
        self.numbers = numbers

    @gluon.jit
    def put(self, n, block, count):
        """The n-th of the kernel, when what was added is in global memory; count 0 is the last."""
        put_number(self.numbers, 2 * (n & 1), block)
        put_number(self.numbers, 2 * (n & 1) + 1, count)
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [n],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        barriers.sync(OWED, WITH_KEEPER)

    @gluon.jit
    def get(self, n):
        """(block, count) of the n-th."""
        barriers.sync(OWED, WITH_KEEPER)
        at = 2 * (n & 1)
        return get_number(self.numbers, at, 1), get_number(self.numbers, at + 1, 1)


@gluon.jit
def keep_locks(debts, locks):
    """Set the locks that are owed. The barrier passes on what the writer's warp has seen written,
    and the fence, which is cumulative, on to whoever finds the lock set."""
    n = 0
    block, count = debts.get(n)
    while count > 0:
        gl.inline_asm_elementwise(
            "fence.acq_rel.gpu; st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, $2;", "=r,l,r",
            [(locks + block).to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        n += 1
        block, count = debts.get(n)


@gluon.jit
def make_debts():
    return Debts(make_numbers(4))
