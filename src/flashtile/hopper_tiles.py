"""Tiles of the Hopper forward kernel: pure functions of metadata, each choice with its figure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashtile.problem import ELEMENTWISE, AttentionProblem
from flashtile.tiles import power_of_two

DIMS = (64, 128, 256)
"""Head dims that the kernel is compiled for; others are padded up by TMA's zero fill."""

LEAST_DIM = 33
"""Below it padding to 64 at least doubles the products, and the portable kernel is faster."""

SLOWER = frozenset({
    (64, "attn_mask"), (64, "bias"), (64, "dropout"), (256, "bias"),
})  # fmt: skip
"""Tiles and features with which the portable kernel is faster. H200, TFLOP/s, this one's first: at
head dim 64 a random mask 155 / 206, a bias 167 / 227, dropout 285 / 298; a bias at 256 343 / 393.
"""

MATRICES = frozenset({"attn_mask", "bias"})
"""Features that read an element of global memory for every score."""


@dataclass(frozen=True)
class HopperTile:
    """What the kernel is compiled for."""

    padded: int  # head dim of the tiles
    block_n: int  # keys of a block
    slots: int  # blocks of K or V in shared memory
    warpgroups: int  # that attend, with 64 queries each
    q_registers: int  # columns of Q that stay in registers
    registers: int = 240  # of each consumer thread
    producer_registers: int = 24
    turns: bool = False  # warpgroups take turns at the tensor cores
    lazy_rescale: bool = False
    bounded: bool = False  # scores, by a cap: maxima are the first block's
    own_output: bool = True  # the output has shared memory of its own, not the queries'
    values: int = 0  # head dim of V's and the output's tiles, where it is not K's
    pack: int = 1  # query heads of a KV head that take turns as rows of a tile

    @property
    def padded_v(self) -> int:
        return self.values or self.padded

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of a row of keys, and of values, that are loaded at once."""
        return self.padded, self.padded_v

    @property
    def block_m(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Of all consumers and the producer."""
        return 128 * self.warpgroups + 32

    @property
    def skips(self) -> bool:
        """Whether there may be blocks in a tile that a warpgroup's queries do not see."""
        return self.block_m > self.block_n

    @property
    def frees_queries(self) -> str:
        """When the queries' shared memory can take the next tile's: once they are "loaded" to
        registers, when the last scores have "read" them, when the output in their place is
        "stored"."""
        if not self.own_output:
            return "stored"
        return "loaded" if self.q_registers == self.padded else "read"

    @property
    def shared_bytes(self) -> int:
        """Of 16-bit tiles; barriers and the tiles' numbers take less than 256 bytes more."""
        rows = self.slots * self.block_n + self.block_m
        own = self.block_m * self.padded_v if self.own_output else 0
        return 2 * (self.padded * rows + own)


def padded_dim(head_dim: int, head_dim_v: int) -> int | None:
    """The head dim of the tiles that hold both, or None where there is none."""
    return next((d for d in DIMS if d >= max(head_dim, head_dim_v)), None)


# TFLOP/s of the prototype (H200, bf16) are in the comments; the figures of each choice are where
# the kernel makes it.
_D64_SHORT = HopperTile(64, 128, 8, 2, 64)  # causal 512 / 1k / 2k: 269 / 368 / 431
_D64_NARROW = HopperTile(64, 64, 8, 3, 64, 160)
_D64_LONG = HopperTile(64, 128, 4, 3, 0, 160, turns=True)  # causal 8k / 16k: 492 / 507
_D128 = HopperTile(128, 128, 5, 2, 128)  # causal 1k / 4k / 16k: 496 / 631 / 681
_D256 = HopperTile(256, 64, 5, 2, 128, lazy_rescale=True, own_output=False)  # 505 / 656 / 735

# A thread's part of a matrix is loaded at once: 64 elements for a block of 128 keys spilled 2.7 KB
# beside the output of head dim 128, 32 spill nothing; of head dim 256 it is 32 and 0.4 to 1.6 KB,
# and 16.
_D128_MATRIX = HopperTile(128, 64, 8, 2, 128)
_D256_MATRIX = HopperTile(256, 32, 8, 2, 128, lazy_rescale=True, own_output=False)

# Head dim 192 with 128 of V: K as of 256, the output half as wide.
_D192 = HopperTile(256, 64, 4, 2, 128, values=128)
_D192_MATRIX = HopperTile(256, 32, 8, 2, 128, values=128)

TILES = (
    _D64_SHORT, _D64_NARROW, _D64_LONG, _D128, _D256, _D128_MATRIX, _D256_MATRIX, _D192,
    _D192_MATRIX,
)  # fmt: skip


MOST_CAP = 50.0
"""Scores of at most this size, 2^72 and its inverse, need no maximum but the first block's in
bfloat16: 2^96 above it, times the sums of 2^24 keys, is within fp32."""

MOST_PACKED = 64
"""Rows of a warpgroup: a packed query has all of its heads in one."""

PROCESSORS = 132
"""Of an H100 or H200. Fewer tiles than these leave some idle, and packed ones more: 40 queries of
4 x 32 heads on 65,536 keys take 0.78 ms packed and 0.63 apart, of 8 x 32 on 8,192 0.12 and 0.16."""

PACKS = frozenset({
    "alibi_slopes", "cache_batch_idx", "cache_leftpad", "learnable_sink", "seqused_k", "softcap",
})  # fmt: skip
"""Features of packed tiles: those that know one head for a tile have none of them."""

CACHE_ONLY = frozenset({"fp8_cache", "tree_mask"})
"""Features of calls over a cache, whose few queries are not what this kernel is for."""

LEAST_PAGE = 8
"""Rows that shared memory is swizzled over: no part of a block is smaller."""

MOST_KEYS = 128
"""The largest block_n, which a page holds whole blocks of or is a part of."""


def pages_fit(size: int) -> bool:
    """Whether blocks are whole pages or lie in one."""
    return size % MOST_KEYS == 0 or LEAST_PAGE <= size == power_of_two(size)


def cannot(problem: AttentionProblem) -> str | None:
    """Why another kernel is to do a problem's forward, or None."""
    reason = impossible(problem)
    if reason is None:
        padded = padded_dim(problem.head_dim, problem.head_dim_v)
        slower = [f for f in sorted(problem.features) if (padded, f) in SLOWER]
        if slower:
            reason = f"is slower than the portable kernel with {slower[0]} at this head dim"
    return reason


def impossible(problem: AttentionProblem) -> str | None:
    """Why the kernel cannot do a problem, or None."""
    p, reason = problem, None
    if p.dtype not in ("float16", "bfloat16"):
        reason = f"computes with float16 and bfloat16 inputs, these are {p.dtype}"
    elif not all(LEAST_DIM <= n <= DIMS[-1] for n in (p.head_dim, p.head_dim_v)):
        dims = f"{p.head_dim} and {p.head_dim_v}" if p.head_dim != p.head_dim_v else p.head_dim
        reason = f"does head dims from {LEAST_DIM} to {DIMS[-1]}, not {dims}"
    elif p.head_dim % 8 or p.head_dim_v % 8:
        dim = p.head_dim if p.head_dim % 8 else p.head_dim_v
        reason = f"TMA needs head dims that are multiples of 8, this one is {dim}"
    elif p.page_size and not pages_fit(p.page_size):
        reason = (
            f"needs pages of a power of two from {LEAST_PAGE}, or a multiple of {MOST_KEYS} "
            f"tokens, these are of {p.page_size}"
        )
    elif 0 in (p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.kv_heads):
        reason = "TMA has no empty tensors"
    elif "scattered_cache" in p.features:
        reason = (
            "reads caches by TMA: strides in whole 16 bytes, none of them 0, k and v laid out alike"
        )
    elif found := sorted(p.features & CACHE_ONLY):
        reason = f"has no {found[0]}"
    return reason


def forward_tile(problem: AttentionProblem) -> HopperTile:
    """The tile for a problem whose head dims have one."""
    tile = _tile(problem)
    return replace(tile, pack=packed_heads(problem, tile.block_m))


def packed_heads(problem: AttentionProblem, block_m: int) -> int:
    """Heads of a KV head that share tiles of block_m rows: the group, rounded up to a power of two,
    if that saves an eighth of more tiles than run at the same time; else 1."""
    p, pack = problem, power_of_two(problem.group)
    if p.layout != "dense" or pack > MOST_PACKED or p.features - PACKS:
        return 1
    apart = -(-p.seqlen_q // block_m) * p.heads
    packed = -(-p.seqlen_q * pack // block_m) * p.kv_heads
    return pack if p.batch * apart > PROCESSORS and 8 * packed <= 7 * apart else 1


_MANY_REGISTERS = (ELEMENTWISE | {"dropout"}) - {"alibi_slopes", "softcap"}
"""For which three warpgroups of 160 a thread are too few."""


def _tile(problem: AttentionProblem) -> HopperTile:
    p, padded = problem, padded_dim(problem.head_dim, problem.head_dim_v)
    matrix = bool(p.features & MATRICES)
    if padded == 64:
        return _tile_of_64(problem)
    if padded == 128:
        return _D128_MATRIX if matrix else _D128
    # Ids and dropout are 0.1 and 0.3 KB of spills with 64 keys.
    narrow = matrix or bool(p.features & {"document_ids", "dropout"})
    if p.head_dim_v <= 128:
        return _D192_MATRIX if narrow else _D192
    return _D256_MATRIX if narrow else _D256


def _tile_of_64(problem: AttentionProblem) -> HopperTile:
    """us of the short, narrow and long one at 16k tokens and 32 heads (H200): causal 512 127, 121,
    144; 1k 191, 201, 210; 2k 322, 318, 316; 4k 627, 625, 581; 8k 1204, 1178, 1068; a window of 1k
    381, 368, 374; ALiBi 2707, -, 2312; softcap -, 2741, 2370, with maxima 3149, 2986, 3202."""
    p, causal = problem, problem.window_right >= 0
    dense, capped = p.layout == "dense", "softcap" in p.features
    if p.features & _MANY_REGISTERS or (dense and p.seqlen_q <= _D64_SHORT.block_m):
        return _D64_SHORT
    # Of packed sequences only the longest one's length is known.
    long = p.seqlen_k >= (2048 if dense or not causal else 8192)
    if capped:
        bounded = p.dtype == "bfloat16" and "alibi_slopes" not in p.features
        return _D64_LONG if long and bounded else _D64_NARROW
    if p.windowed or (dense and causal and p.seqlen_k <= 512):
        return _D64_NARROW
    return _D64_LONG if long else _D64_SHORT
