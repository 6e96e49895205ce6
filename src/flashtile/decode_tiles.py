"""When the decode kernels take a call, and with which tiles: pure functions of metadata."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from flashtile.problem import AttentionProblem
from flashtile.tiles import LEAST_SHARED, SHARED_LIMIT, WIDEST, padded_dims

MOST_ROWS = 64
"""Queries times heads of a KV head that one tile holds."""

MOST_QUERIES = 16
"""Queries of a sequence with which it reads its keys once for each tile rather than not at all
split: speculative decoding with more heads of a KV head than a tile holds."""

LATENT_TAIL = 64
"""Dims of latent keys besides those that are values too: the rotated ones."""

LEAST_KEYS = 256
"""Shorter keys are two blocks of the general kernels."""

GENERAL = frozenset({
    "attn_mask", "bias", "document_ids", "dropout", "mask_mod", "odd_cache", "score_mod",
})  # fmt: skip
"""Features that only the general kernels have."""

SHARED_PER_SM = {
    "sm_80": 167_936,
    "sm_86": 102_400,
    "sm_89": 102_400,
    "sm_90": 233_472,
    "sm_100": 233_472,
    "sm_103": 233_472,
    "sm_120": 102_400,
    "gfx942": 65_536,
}
"""Bytes of shared memory of a multiprocessor; each block that runs on it takes 1,024 besides."""


REGISTERS_PER_SM = 65_536
"""Of NVIDIA's GPUs; a thread gets a multiple of 8."""


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernels are launched."""

    block_m: int  # queries times heads of a KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2  # all of them at the same time: two waves are 1% to 3% slower

    @property
    def max_registers(self) -> int | None:
        """Of a thread, for three programs to have room together; None: what it takes, which is no
        more than two of 128 threads have."""
        threads = 32 * self.num_warps * self.programs_per_sm
        return None if self.programs_per_sm < 3 else REGISTERS_PER_SM // threads // 8 * 8


_Numbers = tuple[int, int, int]  # programs_per_sm, block_n, num_stages

_HALF: tuple[_Numbers, ...] = (
    (2, 64, 4), (2, 64, 3), (2, 32, 4), (2, 32, 3), (1, 64, 4), (1, 64, 3), (1, 32, 3), (1, 32, 2),
    (1, 16, 2), (1, 16, 1),
)  # fmt: skip
"""Best first. Two blocks of K and V on their way to each of two programs of 64 keys of head dim 128
are 128 KiB a multiprocessor: three times what 4.8 TB/s times a latency of 0.9 us asks for."""

_E4M3: tuple[_Numbers, ...] = ((2, 128, 4), (2, 128, 3), *_HALF)
"""Twice the keys are as many bytes, and as much time for what there is once a block: 448 SASS
instructions for 64 keys of head dim 128 rather than 510. Tiles of 64 rows have no registers for it
(404 bytes of spills)."""

_E4M3_SHARED_SCALES: tuple[_Numbers, ...] = ((3, 128, 3), *_E4M3)
"""Half of the instructions widen, and a block's depend on one another: a third program, whose 168
registers a thread spill nothing in the loop over keys, fills the gaps. us at 32 x 16k, 32/8 heads
(H200), of two and of three: a head's scales 302, 296; page 16 322, 299; fp16 queries 326, 300. With
scales of tokens 312, 355."""

_FP32: tuple[_Numbers, ...] = ((2, 32, 3), (2, 32, 2), (1, 32, 2), (1, 16, 2), (1, 16, 1))


def shared_bytes(config: DecodeConfig, problem: AttentionProblem) -> int:
    """Of the blocks of K and V on their way, and what a tile's queries and probabilities pass
    through: registers where there are 64, whose products read a block while the next one waits."""
    p, tall = problem, config.block_m == MOST_ROWS
    dim, dim_v = padded_dims(min(p.head_dim, WIDEST), p.head_dim_v)
    tail = LATENT_TAIL if p.head_dim > WIDEST else 0
    buffers = config.num_stages if tall else max(1, config.num_stages - 1)
    streamed = buffers * config.block_n * (dim + tail + (0 if p.latent else dim_v))
    passed = config.block_m * (dim + tail + (0 if tall else config.block_n))
    return streamed * (1 if "fp8_cache" in p.features else p.element_bytes) + (
        passed * p.element_bytes
    )


def cannot_decode(problem: AttentionProblem) -> str | None:
    """Why the decode kernels do not take a problem, or None."""
    p, count, reason = problem, queries(problem), None
    wide = WIDEST + (LATENT_TAIL if p.latent and p.dtype != "float32" else 0)
    if general := sorted(p.features & GENERAL):
        reason = f"{general[0]} is for the general kernels"
    elif p.dtype == "float64":
        reason = "computes in float32"
    elif p.head_dim > wide or p.head_dim_v > WIDEST:
        reason = f"holds a head_dim up to {wide}, this one is {max(p.head_dim, p.head_dim_v)}"
    elif p.split_size or p.num_splits > 1:
        pass
    elif p.seqlen_k < LEAST_KEYS and p.head_dim <= WIDEST:
        reason = f"fewer than {LEAST_KEYS} keys"
    elif count * p.group > MOST_ROWS and count > MOST_QUERIES:
        reason = f"{count} queries of {p.group} heads are more than {MOST_ROWS} rows"
    return reason


def queries(problem: AttentionProblem) -> int:
    """Of a sequence, at most; on average where packed sequences may have any lengths."""
    p = problem
    return -(-p.total_q // max(1, p.batch)) if p.seqlen_q == p.total_q else p.seqlen_q


def decode_config(arch: str, problem: AttentionProblem) -> DecodeConfig:
    """The launch for a problem: of the best numbers that fit an architecture's shared memory."""
    p, half = problem, problem.dtype != "float32"
    wide = max(padded_dims(p.head_dim, p.head_dim_v))
    rows = queries(p) * p.group
    if p.layout == "varlen" and p.split_size:
        rows = MOST_ROWS  # the same tile whatever is in the batch
    block_m = next((m for m in (16, 32) if rows <= m), MOST_ROWS)
    if not half or (wide > 256 and not p.latent):
        block_m = min(block_m, 32 if wide <= 128 else 16)
    warps = 8 if not half or wide > 256 or block_m * wide >= 64 * 256 else 4
    limit = SHARED_LIMIT.get(arch, LEAST_SHARED)
    numbers = _HALF if half else _FP32
    if half and "fp8_cache" in p.features and block_m < MOST_ROWS:
        numbers = _E4M3 if "token_scales" in p.features else _E4M3_SHARED_SCALES
    for rows, (together, block_n, stages) in product((block_m, 16), numbers):
        config = DecodeConfig(rows, block_n, warps, stages, together)
        # 256 threads may have all registers of a multiprocessor.
        room = min(limit, SHARED_PER_SM.get(arch, LEAST_SHARED) // together - 1024)
        if shared_bytes(config, p) <= room and (together == 1 or warps == 4 or not half):
            break
    return config
