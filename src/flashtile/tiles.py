"""Tiles of the Triton kernels: block edges, warps and pipeline stages, by architecture.

Pure functions of metadata. Shared memory is estimated from the same description that the kernels
allocate by, so that a tile which does not fit an architecture is shrunk before anything compiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
"""Bytes of shared memory that one block may use (CUDA C++ Programming Guide, table "Technical
Specifications per Compute Capability"; AMD CDNA 3 ISA, section 1)."""

LEAST_SHARED = 65_536
"""The limit assumed of an architecture that is not listed."""

CHUNK = 128
"""Head dims that the kernel of dbias has in shared memory at a time. Where there are more, a step
is 360 instructions and the last one 550 more; of head dim 128 in one 860 (sm_90, 128 x 64)."""

WIDEST = 512
"""The head dim that accumulators hold."""

KERNELS = ("forward", "dq", "dkdv", "dbias")


@dataclass(frozen=True)
class KernelConfig:
    """How one kernel is launched."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None: as many as the compiler likes


@dataclass(frozen=True)
class KernelConfigs:
    """The kernels of the Triton backend."""

    forward: KernelConfig
    dq: KernelConfig
    dkdv: KernelConfig
    dbias: KernelConfig


def power_of_two(n: int) -> int:
    """The least from n on, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def padded_dims(dim: int, dim_v: int) -> tuple[int, int]:
    """The powers of two that hold the head dims; a matrix instruction is at least 16 deep.

    Both are 32 at least where one is, and values 64 beside wider keys: Triton 3.6 compiles a
    forward of 32 by 16 that reads shared memory past its end (H200, compute-sanitizer), and of
    keys of 64 by 32 that come through registers, as those of 40 dims do, one with wrong results.
    """
    least = 16 if max(dim, dim_v) <= 16 else 32
    padded, padded_v = (max(least, power_of_two(n)) for n in (dim, dim_v))
    return padded, max(padded_v, min(padded, 64))


def chunk(dim: int, dim_v: int) -> int:
    """Head dims that the kernel of dbias has at a time."""
    return min(CHUNK, max(padded_dims(dim, dim_v)))


def shared_bytes(kernel: str, config: KernelConfig, dim: int, dim_v: int, element: int) -> int:
    """Shared memory of a kernel: what stays for its whole run, and `num_stages` of what streams."""
    padded = padded_dims(dim, dim_v)
    both = element * sum(padded)
    m, n, stages = config.block_q, config.block_k, config.num_stages
    # fp32 products read a block into registers before the next one overwrites it.
    held = max(1, stages - 1) if element == 4 else stages
    if kernel == "forward":
        # With one stage K's place is free again when V is loaded.
        streamed = stages * n * both if stages > 1 else n * max(padded) * element
        return m * padded[0] * element + streamed
    if kernel == "dq":
        return m * both + held * n * both + m * n * element
    if kernel == "dkdv":
        return n * both + m * (held * both + stages * 8) + m * n * element
    return stages * (m + n) * 2 * chunk(dim, dim_v) * element


def shortage(arch: str, dtype: str, head_dim: int, head_dim_v: int) -> str | None:
    """Why no tile of these head dims fits an architecture, or None."""
    element = 4 if dtype == "float32" else 2
    if element == 2 and arch in _HALF_BY_ARCH:
        return None
    limit = SHARED_LIMIT.get(arch, LEAST_SHARED)
    chosen = configs(arch, dtype, head_dim, head_dim_v, "")
    need = max(
        shared_bytes(name, getattr(chosen, name), head_dim, head_dim_v, element) for name in KERNELS
    )
    if need <= limit:
        return None
    return f"needs {need:,} bytes of shared memory for the least tile, {arch} has {limit:,}"


def configs(arch: str, dtype: str, head_dim: int, head_dim_v: int, kind: str) -> KernelConfigs:
    """The launch of every kernel for a head dim, dtype and architecture.

    kind: that of the problem (`AttentionProblem.kind`).
    """
    element = 4 if dtype == "float32" else 2
    limit = SHARED_LIMIT.get(arch, LEAST_SHARED)
    tables = _tables(arch, element)
    column = next(i for i, top in enumerate(_DIMS) if max(padded_dims(head_dim, head_dim_v)) <= top)
    found = {}
    for name in KERNELS:
        numbers = tables[name][column]
        if element == 2:
            numbers = _BETTER.get((arch, name, column, kind), numbers)
        found[name] = KernelConfig(*numbers)
        if tables is not _HALF_BY_ARCH.get(arch):
            found[name] = _fit(name, found[name], head_dim, head_dim_v, element, limit)
    return KernelConfigs(**found)


def _tables(arch: str, element: int) -> _Table:
    if element == 4:
        return _FP32
    return _HALF_BY_ARCH.get(arch, _HALF)


def _fit(
    kernel: str, config: KernelConfig, dim: int, dim_v: int, element: int, limit: int
) -> KernelConfig:
    """Shrink stages, then the streamed edge, then the other, until shared memory suffices."""
    while shared_bytes(kernel, config, dim, dim_v, element) > limit:
        streamed, kept = ("block_k", "block_q") if kernel != "dkdv" else ("block_q", "block_k")
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif getattr(config, streamed) > 32:
            config = replace(config, **{streamed: getattr(config, streamed) // 2})
        elif getattr(config, kept) > 32:
            config = replace(config, **{kept: getattr(config, kept) // 2})
        elif config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, **{streamed: 16})
            break
    return config


_Numbers = tuple[int, ...]  # block_q, block_k, num_warps, num_stages, and max_registers or not
_Table = dict[str, tuple[_Numbers, ...]]

_DIMS = (64, 128, 256, 512)
"""Columns of the tables: head dims up to these."""

_HALF: _Table = {
    "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
    "dkdv": ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
    "dbias": ((64, 64, 4, 1), (64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
}

# Measured on an H200 (bf16, 16,384 tokens, hidden size 2,048; TFLOP/s at seqlen 2k / 16k, the next
# best tile in brackets): forward d128 446 / 501 (443 / 474 with four stages), d256 479 / 498 (446 /
# 465 with 32 keys); dq d64 618 / 623 (566 / 579), d128 610 / 632 (551 / 602), d256 566 / 609 (431 /
# 448); dkdv d64 495 / 508 (472 / 508), d128 576 / 607 (498 / 518), d256 276 / 286 (251 / 245).
_SM_90: _Table = {
    "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    "dq": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2), (32, 16, 8, 1)),
    "dkdv": ((64, 64, 4, 3), (64, 128, 8, 3), (64, 64, 8, 2), (16, 32, 8, 1)),
    "dbias": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
}

# Chosen by compiling, not by measuring: the largest tiles that spill least and fit, which the
# estimate of shared memory is too high to tell (sm_80 keeps q in registers, gfx942 a buffer less).
# Worst spills: sm_80 460 bytes (dkdv 64, dropout beside a bias), sm_86 192 (the same), sm_100 112
# (forward 256), gfx942 160 (dkdv 128, dropout).
_SM_80: _Table = {
    "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2), (64, 16, 8, 2)),
    "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
    "dkdv": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    "dbias": ((64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 16, 4, 1)),
}
_SM_86: _Table = {
    "forward": ((128, 64, 4, 3), (128, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (32, 16, 8, 2)),
    "dkdv": ((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    "dbias": ((64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (16, 16, 4, 1)),
}
_SM_100: _Table = {
    "forward": ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 16, 8, 2)),
    "dq": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    "dkdv": ((64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (16, 16, 8, 2)),
    "dbias": ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1), (16, 16, 4, 1)),
}
_GFX942: _Table = {
    "forward": ((128, 64, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2), (64, 16, 8, 2)),
    "dq": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 16, 4, 2)),
    "dkdv": ((32, 64, 4, 2), (32, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
    "dbias": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1)),
}

_HALF_BY_ARCH = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "gfx942": _GFX942,
}

# fp32 products are fused multiply-adds here, which hold whole rows of their operands in registers:
# small tiles and many warps spill least (forward d128 32 x 32: 0 bytes, 1,864 with four warps), and
# so do two stages, which keep operands in shared memory: bytes at d256 / d512, with one stage in
# brackets, dq 0 (484) / 0 (5,496), dkdv 20 (720) / 0 (4,412). Forward d128 608 (8): not there.
_FP32: _Table = {
    "forward": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "dq": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 2)),
    "dkdv": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 16, 8, 2)),
    "dbias": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}

_BETTER: dict[tuple[str, str, int, str], _Numbers] = {
    # TFLOP/s on an H200. Causal at 16k: 520, 479 with 64 keys; a feature more would spill.
    ("sm_90", "forward", 1, "banded"): (128, 128, 8, 3),
    # Causal at 2k / 16k: 474 / 560, 430 / 543 with 128 queries.
    ("sm_90", "dq", 0, "banded"): (64, 64, 4, 2),
    # A bias beside three stages takes 5 KiB more shared memory than there are.
    ("sm_90", "dq", 2, "banded"): (128, 32, 8, 3),
    # 225 KiB of shared memory, 233 beside a bias, and there are 227.
    ("sm_100", "dq", 2, "banded"): (64, 64, 8, 2),
    # Softcap / ALiBi, causal at 16k, ms: forward d64 3.35 / 2.86 (3.66 / 3.13), d128 2.61 / 2.36
    # (2.68 / 2.59); dq d64 3.74 / 2.99 (4.11 / 5.59); dkdv d64 4.74 / 4.46 (4.79 / 4.62).
    ("sm_90", "forward", 0, "scores"): (64, 64, 4, 3),
    ("sm_90", "forward", 1, "scores"): (64, 64, 4, 3),
    # At 168 registers three blocks of dq fit on a multiprocessor, two at the 196 to 209 of softcap
    # or dropout without the bound; dq spills 28 bytes with dropout.
    ("sm_90", "dq", 0, "scores"): (64, 64, 4, 3, 168),
    ("sm_90", "dkdv", 0, "scores"): (64, 64, 4, 2),
    # Three loops with documents, softcap and ALiBi: 372 bytes of spills, 596 with three stages.
    ("sm_90", "dkdv", 1, "masked scores"): (64, 128, 8, 2),
    # Causal at 16k, dropout 0.1, ms: forward d64 3.13 (3.30 with 128 x 128 and eight warps), d128
    # 2.41 (2.48 with 64 keys); dq d64 3.87 (4.0 with 32 or 128 keys, 4.1 with 128 queries and eight
    # warps); dkdv d64 5.62 (5.71 with three stages, 5.88 with 32 queries at 168 registers), d128
    # 4.28 (4.41 with two stages). Tiles of 128 x 128 leave no shared memory to read a mask through.
    ("sm_90", "forward", 0, "dropout"): (64, 128, 4, 3),
    ("sm_90", "forward", 1, "dropout"): (128, 128, 8, 3),
    ("sm_90", "dq", 0, "dropout"): (64, 64, 4, 2, 168),
    ("sm_90", "dkdv", 0, "dropout"): (64, 64, 4, 2),
    ("sm_90", "dkdv", 1, "dropout"): (64, 128, 8, 3),
    ("sm_90", "forward", 0, "masked dropout"): (64, 64, 4, 3),
    ("sm_90", "dq", 0, "masked dropout"): (64, 32, 4, 3),
    ("sm_90", "dkdv", 0, "masked dropout"): (32, 64, 4, 3),
    ("sm_90", "dkdv", 1, "masked dropout"): (32, 64, 4, 3),
}
"""Tiles that are better for a kind of call, by column of _DIMS; 16-bit dtypes only."""
