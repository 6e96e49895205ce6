"""When the Hopper decode kernel takes a call, and with which tiles: pure functions of metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashtile.decode_tiles import MOST_ROWS, cannot_decode
from flashtile.hopper_tiles import cannot, padded_dim
from flashtile.problem import AttentionProblem

MOST_ALONE = 16
"""Queries times heads of a KV head whose parts one program merges, 4 rows of 16 parts at a time,
each as long as it takes to come from L2. Those of 64 rows (1 MB) all merge, in a second launch."""

SCANS = (32, 128, 1024)
"""Sequences that a program looks at together: the first that holds the batch, or the last."""

PAIR_BYTES = 32_768
"""Of a block of keys and one of values."""

E4M3_DIM, MOST_COLUMNS = 128, 16
"""The head dim whose pairs fill 128 bytes of shared memory, and the most rows beside e4m3."""

MOST_BLOCKS = 2**30
"""Of keys in a launch, of which each program's share is rounded up."""

PROGRAMS_PER_SM = 2
"""One computes while the other waits."""


@dataclass(frozen=True)
class HopperDecodeTile:
    """What the kernel is compiled for."""

    dim: int
    dim_v: int
    padded: int  # head dim of the tiles
    block_n: int  # keys of a block
    scan: int  # sequences that are looked at together
    pairs: int = 2  # blocks of keys and of values on their way to a program
    parts: int = 16  # of a tile that are merged together
    alone: bool = True  # by the last program that leaves one
    e4m3: bool = False  # K and V are, and read two dims at a time
    block_m: int = MOST_ROWS  # queries times heads of a KV head
    scaled_keys: bool = False  # each key has a scale of its own
    scaled_values: bool = False

    @property
    def padded_v(self) -> int:
        return self.padded

    @property
    def stored(self) -> int:
        """16-bit elements of a row of a block of keys or values."""
        return self.padded // 2 if self.e4m3 else self.padded

    @property
    def widths(self) -> tuple[int, int]:
        """Elements of a row of keys, and of values, that are loaded at once."""
        return self.stored, self.stored

    @property
    def shared_bytes(self) -> int:
        """Of 16-bit tiles."""
        return 4 * self.pairs * self.block_n * self.stored


def cannot_stream(problem: AttentionProblem) -> str | None:
    """Why the Hopper decode kernel does not take a problem, or None."""
    p = problem
    reason = cannot_decode(p) or cannot(replace(p, features=p.features - {"fp8_cache"}))
    if reason is not None:
        return reason
    if p.split_size or p.num_splits:
        reason = "deals out keys by itself, here their parts are given"
    elif p.seqlen_q * p.group > MOST_ROWS:
        reason = f"has {MOST_ROWS} queries times heads of a KV head at a time, these are more"
    elif p.page_size and p.page_size % 16:
        reason = f"needs pages of a multiple of 16 tokens, these are of {p.page_size}"
    elif p.latent:
        reason = "has no latent cache"
    elif p.batch * p.kv_heads * (p.seqlen_k // decode_tile(p).block_n + 2) >= MOST_BLOCKS:
        reason = "counts blocks of keys in 32 bits"
    elif "fp8_cache" in p.features:
        reason = _cannot_widen(p)
    return reason


def _cannot_widen(problem: AttentionProblem) -> str | None:
    """Why it does not read a problem's e4m3 cache, or None."""
    p, reason, rows = problem, None, problem.seqlen_q * problem.group
    if p.head_dim != E4M3_DIM or p.head_dim_v != E4M3_DIM:
        other = p.head_dim if p.head_dim != E4M3_DIM else p.head_dim_v
        reason = f"reads e4m3 of head dim {E4M3_DIM}, not {other}"
    elif rows > MOST_COLUMNS:
        reason = f"reads e4m3 for {MOST_COLUMNS} queries times heads of a KV head, these are {rows}"
    elif "token_scales" in p.features and p.dtype != "bfloat16":
        reason = f"reads scales of tokens for bfloat16 queries, these are {p.dtype}"
    elif "token_scales" in p.features and p.page_size:
        reason = "reads scales of tokens in rows of a cache, not in pages"
    return reason


def decode_tile(problem: AttentionProblem) -> HopperDecodeTile:
    p = problem
    padded = padded_dim(p.head_dim, p.head_dim_v) or 0
    e4m3, rows = "fp8_cache" in p.features, p.seqlen_q * p.group
    return HopperDecodeTile(
        p.head_dim, p.head_dim_v, padded, PAIR_BYTES // ((2 if e4m3 else 4) * padded),
        next((n for n in SCANS if p.batch <= n), SCANS[-1]),
        alone=rows <= MOST_ALONE, e4m3=e4m3,
        block_m=MOST_ROWS if not e4m3 else 8 if rows <= 8 else MOST_COLUMNS,
    )  # fmt: skip
