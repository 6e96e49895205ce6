"""Tiles of the Hopper backward kernel: pure functions of metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flashtile.hopper_tiles import LEAST_DIM
from flashtile.problem import COMPUTED, ELEMENTWISE, AttentionProblem

DIMS = (64, 128, 256)
"""Head dims that the kernel is compiled for; others are padded up by TMA's zero fill."""

SHORT = 512
"""Keys up to which causal tiles have so little to do that clearing the sums of dQ counts."""

MEDIUM = 2048
"""Keys up to which it counts at head dim 128 as well, where tiles wait longer for the first; twice
as many of the longest of packed sequences, of which most are shorter."""

STEEPEST = 8.0
"""Slope of a user's score function for which sums of dQ as integers have room."""

MISSING = frozenset({"cache_batch_idx", "cache_leftpad", "fp8_cache", "tree_mask"})
"""Features that the kernel does not do."""

ADDED = frozenset({"bias", "float_mask"})
"""Matrices that are added to the scores."""

CROWDED = frozenset({"bias", "dropout", "float_mask", "softcap"})
"""Features of which there are registers for one up to the least of DIMS: two spill 390 to 950
bytes in four parts. One alone gains (H200, 16k tokens, portable / these, ms): softcap 8.43 /
6.33, dropout 9.67 / 8.05."""

LISTED = frozenset({"attn_mask", "document_ids"})
"""Masks that lists of blocks come of."""

SCATTERED = LISTED | {"mask_mod"}
"""Masks whose blocks are not those of a band: nobody waits for the first tile that sees a block. A
user's `keys` and `queries` are bounds that need not agree, and what waits for a tile of one could
wait for a tile that the other skips.
"""


@dataclass(frozen=True)
class HopperBackwardTile:
    """What the kernel is compiled for."""

    dim: int  # of q and k
    dim_v: int
    padded: int  # head dims of the tiles
    padded_v: int
    block_m: int  # queries of a block
    slots: int = 2  # blocks of Q in shared memory
    dout_slots: int = 2  # as many of dO, or one
    block_n: int = 128  # keys of a tile, 64 for each of two warpgroups, or 64 for both
    kept: int = 0  # columns of K in registers
    adds: str = "in any order"  # shares of dQ; or "after the first"
    lags: bool = False  # a step's share of dQ is that of the block before
    skips: bool = False  # a warpgroup passes over blocks that see none of its keys
    skips_last: bool = False  # those at the end of a walk from the last queries
    halves: bool = False  # a walk's first block may be done for the first half of its queries
    persistent: bool = False  # a CTA takes tile after tile
    integers: bool = False  # sums of dQ, in whatever order, are the same bits: see `hopper.units`
    steepest: float = 1.0  # slope of the scores for which they have room
    parts: int = 1  # in which scores become gradients, where these need many registers
    registers: int = 240  # of each consumer thread
    producer_registers: int = 24

    @property
    def wide(self) -> bool:
        """Whether both warpgroups have the same keys, and each has some columns of dK and dV."""
        return self.block_n == 64

    @property
    def locked(self) -> bool:
        """Whether tiles wait for others before they add to a block's dQ."""
        return self.adds != "in any order"

    @property
    def row_numbers(self) -> int:
        """How many the main kernel gets of each query: lse, delta, perhaps its units."""
        return 3 if self.integers else 2

    @property
    def shared_bytes(self) -> int:
        """Barriers take less than 512 bytes more."""
        keys = 2 * (self.padded + self.padded_v) * self.block_n
        queries = (2 * self.padded + 4) * self.block_m * self.slots
        douts = (2 * self.padded_v + 4) * self.block_m * self.dout_slots
        units = 8 * self.block_m * self.slots if self.integers else 0
        ds, dq = 4 * 2 * 64 * self.block_m, 2 * 4 * 64 * 64
        return keys + queries + douts + units + ds + dq


def cannot_backward(problem: AttentionProblem) -> str | None:
    """Why the kernel cannot do a problem whose forward the Hopper backend does, or None."""
    missing, reason = sorted(problem.features & MISSING), None
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    dims = f"not {head_dim} and {head_dim_v}"
    if not all(LEAST_DIM <= n <= DIMS[-1] for n in (head_dim, head_dim_v)):
        reason = f"does head dims from {LEAST_DIM} to {DIMS[-1]}, {dims}"
    elif head_dim != head_dim_v and head_dim <= DIMS[1]:
        reason = f"does values of another head dim than keys above {DIMS[1]}, {dims}"
    elif problem.page_size:
        reason = "does not do paged sequences yet"
    elif missing:
        reason = f"does not do {missing[0]} yet"
    elif problem.features >= {"dropout", "score_mod"}:
        reason = "does dropout only with slopes that are not below 0"
    elif head_dim <= DIMS[0] and len(crowded := sorted(problem.features & CROWDED)) > 1:
        reason = f"has no registers for {' and '.join(crowded)} at head dims up to {DIMS[0]}"
    elif 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.heads, problem.kv_heads):
        reason = "TMA has no empty tensors"
    return reason


def backward_tile(problem: AttentionProblem, deterministic: bool = False) -> HopperBackwardTile:
    """The tile for a problem that the kernel can do. A share of dQ is 64 x 64."""
    dim, dim_v = problem.head_dim, problem.head_dim_v
    if dim > DIMS[1]:
        padded_v = 128 if dim_v <= DIMS[1] else 256
        tile = HopperBackwardTile(dim, dim_v, 256, padded_v, 64, dout_slots=1, block_n=64, kept=64)
        if _short(problem) and problem.group == 1 and problem.window_right >= 0:
            tile = replace(tile, adds="after the first")  # 5.8% at 512, -7% at 4k (H200)
    else:
        padded, block_m = (64, 128) if dim <= DIMS[0] else (128, 64)
        tile = HopperBackwardTile(dim, dim_v, padded, padded, block_m, persistent=True)
        tile = replace(tile, parts=_parts(problem), **_schedule(problem, padded))
    if deterministic:
        steepest = STEEPEST if "score_mod" in problem.features else 1.0
        tile = replace(tile, integers=True, steepest=steepest)
    return tile


def _parts(problem: AttentionProblem) -> int:
    """Of the scores that become gradients: several where ptxas would spill in every step.

    A matrix that is added, bytes of spills in 1, 2, 4 parts: alone at head dim 128 176, 16, 24, at
    64 0, 244, 176, and 284, 432, 180 where a band is masked besides; beside ALiBi at 128 104 in 2
    and 24 in 4.

    A bool tensor whose rows are units of 16 bytes, instructions of a step and spilled registers
    that it reads, in 1, 2 parts: alone at 128 603, 0 and 624, 0; causal 688, 0 and 704, 0; with
    documents 856, 1 and 915, 0; dropout 928, 0 and 935, 0; a softcap 785, 7 and 753, 0; a bias
    876, 8 and 858, 0. At 64 alone 975, 11 and 979, 0; causal 1156, 38 and 1145, 4; with documents
    1518, 41 and 1678, 6; in 2, 4 parts a bias 1514, 10 and 1528, 3, a softcap 1310, 22 and 1337,
    10, dropout 1538, 3 and 1646, 5. Other rows take 130 to 300 instructions more.
    """
    features, narrow = problem.features, problem.head_dim <= DIMS[0]
    added = features & ADDED
    if "attn_mask" in features and "float_mask" not in features:
        if narrow:
            return 4 if features & {"bias", "score_mod", "softcap"} else 2
        return 2 if added or features & COMPUTED else 1
    alone = len(features & (ELEMENTWISE | {"dropout"})) == 1
    if added and alone and not (narrow and problem.banded):
        return 1 if narrow else 2
    heavy = added or ("document_ids" in features and features & COMPUTED)
    if narrow:
        heavy = heavy or features & {"document_ids", "dropout", "score_mod", "softcap"}
    return 4 if heavy else 1


def _schedule(problem: AttentionProblem, padded: int) -> dict[str, Any]:
    """What pays for a problem (H200, time of the main kernel over one without).

    lags: full 1.9% to 6% at head dim 128 and 4% to 14% at 64, causal 2% to 16% from 1,024 on.
    persistent: full 3% to 5% more. Under a causal mask it loses as much where CTAs take the next
    tile early; taken late, and with first and last steps of their own, the whole backward takes
    0.91 to 0.95 for packed sequences and 1k, 0.97 to 1.01 at 16k.
    "after the first", which clears no sums: causal at head dim 64, TFLOP/s over sums in any order,
    512 184 / 176, 1k 286 / 277, 2k 395 / 372, 4k 466 / 441, 8k 501 / 481, 16k 525 / 517. With skips
    instead of lags 512 is 192 (d64) and 230 / 214 (d128). With both, head dim 128, ms over those in
    any order: 1k 0.501 / 0.519, 2k 0.750 / 0.767, 4k the same, 16k 4.50 / 4.21, and 0.70 / 0.63
    where 32 heads share a KV head, at 4k. Packed lognormal lengths of 16k tokens: 0.787 / 0.830 at
    64, 0.566 / 0.593 at 128; with skips that ask in each step 0.808 and 0.572.
    """
    dense = problem.layout == "dense"
    if problem.features & LISTED or not problem.banded:
        return {"lags": True}
    if _short(problem):
        return {"skips": True, "adds": "after the first"}
    narrow, longest = padded == DIMS[0], MEDIUM if dense else 2 * MEDIUM
    # A step of dense ALiBi at head dim 128 reads 20 spilled registers where CTAs take several
    # tiles, and none where they take one: 16k 4.49 -> 5.01 ms.
    spills = dense and not narrow and "alibi_slopes" in problem.features
    gains = narrow or (problem.group == 1 and problem.seqlen_k <= longest)
    if gains and not problem.windowed and not problem.features & SCATTERED:
        return {
            "lags": True,
            "skips_last": not narrow,
            "halves": not dense,
            "adds": "after the first",
            "persistent": not spills,
        }
    # Of packed windows it would be 8 to 18 more loads of spilled registers a step.
    return {"lags": True, "skips": narrow, "persistent": not spills and (dense or not narrow)}


def _short(problem: AttentionProblem) -> bool:
    """Whether so few keys are seen that clearing counts, by a mask that a tile may wait under."""
    few = problem.layout == "dense" and problem.seqlen_k <= SHORT
    return few and not problem.features & SCATTERED
