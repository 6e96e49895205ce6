"""What a compiled kernel needs of a GPU, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.tiles import LEAST_SHARED, SHARED_LIMIT

SPILL_LIMIT = 520
"""Bytes a thread may spill: dK/dV at head_dim 192 with a bias, in Triton 3.6 (500 in 3.7). What is
live across a mainloop and not in it costs little: the fastest dK/dV tile at head_dim 128 on an H200
spills 280 bytes with a bias. Tiles that do not fit spill thousands."""

HARMLESS = {"C7519"}
"""Messages of ptxas that cost nothing to speak of. C7519 puts a warpgroup.arrive before products of
registers that other instructions wrote: dK/dV with a softcap at head_dim 128 has three of them more
than with ALiBi, and as many products and waits (48 and 6). C7510, C7514 and C7515 say that products
are serialized, C7517 that one is waited for."""

TENSOR_COLUMNS = 512
"""Columns of Blackwell's tensor memory, 128 lanes of 4 bytes each."""


@dataclass(frozen=True)
class Record:
    """One kernel, compiled for one architecture."""

    arch: str  # sm_90, gfx942, ...
    kernel: str  # the name of the function
    case: str  # the first call that launches it
    dtype: str
    block_q: int  # 0 for kernels without tiles
    block_k: int
    num_warps: int
    num_stages: int
    seconds: float = 0.0
    registers: int = 0  # of a thread
    spill_bytes: int = 0  # of a thread
    shared_bytes: int = 0  # of a block
    tensor_columns: int = 0  # of a block, in Blackwell's tensor memory
    matrix: str = ""  # its matrix instructions: HMMA, HGMMA, UTCMMA or MFMA
    warnings: tuple[str, ...] = ()  # ptxas's on Hopper's matrix instructions, C75xx
    error: str = ""  # why it does not compile
    also: tuple[str, ...] = ()  # architectures that get the same code

    @property
    def multiplies(self) -> bool:
        """Whether it must have matrix instructions: fp32 is computed on ordinary cores."""
        return self.kernel.startswith("attention_") and self.dtype != "float32"


def faults(record: Record) -> list[str]:
    """What keeps a kernel from being fast, or from running."""
    if record.error:
        return [f"does not compile: {record.error}"]
    found = []
    limit = min(SHARED_LIMIT.get(arch, LEAST_SHARED) for arch in (record.arch, *record.also))
    if record.spill_bytes > SPILL_LIMIT:
        found.append(f"spills {record.spill_bytes:,} bytes, the limit is {SPILL_LIMIT}")
    if record.shared_bytes > limit:
        found.append(f"needs {record.shared_bytes:,} bytes of shared memory, there are {limit:,}")
    if record.tensor_columns > TENSOR_COLUMNS:
        columns = f"{record.tensor_columns} columns of tensor memory"
        found.append(f"needs {columns}, there are {TENSOR_COLUMNS}")
    if record.multiplies and not record.matrix:
        found.append("has no matrix instructions")
    slow = sorted(set(record.warnings) - HARMLESS)
    return found + [f"ptxas warns: {warning}" for warning in slow]
