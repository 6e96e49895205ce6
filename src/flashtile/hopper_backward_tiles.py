"""Tiles of the Hopper backward kernel: pure functions of metadata."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.hopper_tiles import LEAST_DIM
from flashtile.problem import AttentionProblem

DIMS = (64, 128)
"""Head dims that the kernel is compiled for; others are padded up by TMA's zero fill."""

MISSING = frozenset({
    "attn_mask", "bias", "cache_batch_idx", "cache_leftpad", "document_ids", "dropout", "seqused_k",
    "seqused_q",
})  # fmt: skip
"""Features that the kernel does not do yet."""


@dataclass(frozen=True)
class HopperBackwardTile:
    """What the kernel is compiled for."""

    dim: int  # of the tensors
    padded: int  # head dim of the tiles
    block_m: int  # queries of a block
    slots: int  # blocks of Q and dO in shared memory
    block_n: int = 128  # keys of a tile, 64 for each of two warpgroups
    registers: int = 240  # of each consumer thread
    producer_registers: int = 24

    @property
    def shared_bytes(self) -> int:
        """Barriers take less than 256 bytes more."""
        keys = 2 * 2 * self.padded * self.block_n
        queries = 2 * 2 * self.padded * self.block_m + 2 * 4 * self.block_m
        ds, dq = 2 * 2 * self.block_m * self.block_n, 4 * self.block_m * self.padded
        return keys + self.slots * queries + ds + dq


def cannot_backward(problem: AttentionProblem, deterministic: bool) -> str | None:
    """Why the kernel cannot do a problem whose forward the Hopper backend does, or None."""
    missing, reason = sorted(problem.features & MISSING), None
    head_dim = max(problem.head_dim, problem.head_dim_v)
    if problem.head_dim != problem.head_dim_v or not LEAST_DIM <= head_dim <= DIMS[-1]:
        dims = f"{problem.head_dim} and {problem.head_dim_v}"
        reason = f"does head dims from {LEAST_DIM} to {DIMS[-1]}, of k as of v, not {dims}"
    elif problem.layout == "varlen" or problem.page_size:
        reason = "does not do packed or paged sequences yet"
    elif missing:
        reason = f"does not do {missing[0]} yet"
    elif "softcap" in problem.features and head_dim <= DIMS[0]:
        # 680 bytes of spills; 8.4 ms on an H200 at 16k where the portable kernels take 8.5.
        reason = f"has no registers for a softcap at head dims up to {DIMS[0]}"
    elif deterministic:
        reason = "adds the shares of dQ in any order"
    elif 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k, problem.heads, problem.kv_heads):
        reason = "TMA has no empty tensors"
    return reason


def backward_tile(problem: AttentionProblem) -> HopperBackwardTile:
    """The tile for a problem that the kernel can do. A warpgroup's share of dQ is 64 x 64."""
    if problem.head_dim <= DIMS[0]:
        return HopperBackwardTile(problem.head_dim, 64, 128, 2)
    return HopperBackwardTile(problem.head_dim, 128, 64, 2)
