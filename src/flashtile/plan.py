"""Which backend computes a problem, and with which tiles: a pure function, no torch calls.

A backend that cannot do a problem says why; the next one is taken. `explain` prints the choice.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from flashtile.decode_tiles import DecodeConfig, cannot_decode, decode_config
from flashtile.hopper_decode_tiles import HopperDecodeTile, cannot_stream, decode_tile
from flashtile.hopper_tiles import HopperTile, cannot, forward_tile, impossible
from flashtile.problem import UNBOUNDED, AttentionProblem
from flashtile.tiles import KernelConfigs, configs, shortage

if TYPE_CHECKING:
    import torch

BACKENDS = ("hopper", "triton", "torch")
"""Best first."""

MAX_HEAD_DIM = 512
"""The widest head dim that the Triton kernels' accumulators hold."""

BLOCK = 256
"""Edge of the torch backend's blocks. On two AVX2 cores with 1 MiB of L2 (8 heads x 64, 2,048
causal tokens, fp32) 256 x 256 took 173 ms forward plus backward, 128 x 128 244, 512 x 512 203."""

BLOCK_ELEMENTS = 2**21
"""Scores of the torch backend's blocks over all heads: 8 MiB in fp32, a quarter of an L3 cache."""


@dataclass(frozen=True)
class Device:
    """What a plan may know of a device."""

    type: str  # torch's device type
    arch: str = ""  # sm_90, gfx942, ...; empty on a CPU
    has_triton: bool = False

    @staticmethod
    def of(device: torch.device) -> Device:
        """The device that a tensor lives on."""
        return _device(device.type, device.index)


@lru_cache
def _device(kind: str, index: int | None) -> Device:
    arch = ""
    if kind == "cuda":
        import torch  # noqa: PLC0415, planning itself needs no torch

        properties = torch.cuda.get_device_properties(index)
        hip = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        arch = hip.split(":")[0] or f"sm_{properties.major}{properties.minor}"
    return Device(kind, arch, importlib.util.find_spec("triton") is not None)


@dataclass(frozen=True)
class TileConfig:
    """The block of the attention matrix that a backend works on at a time."""

    block_q: int  # queries
    block_k: int  # keys
    batches: int = 1  # sequences of equal lengths worked on together (torch backend)


@dataclass(frozen=True)
class Plan:
    backend: str
    tile: TileConfig
    flops_forward: int
    flops_backward: int
    bytes_forward: int  # each input read once, each output written once
    bytes_backward: int
    passed_over: tuple[tuple[str, str], ...] = ()  # better backends and why not
    kernels: KernelConfigs | None = None  # launches of the Triton backend
    nvidia: bool = False  # kernels may use PTX
    hopper: HopperTile | None = None  # forward of the Hopper backend
    decode: DecodeConfig | None = None  # forward by the decode kernels, whose keys are split
    stream: HopperDecodeTile | None = None  # that forward by the Hopper decode kernel
    gradients: str = ""  # backend of the backward


def backends(device: Device) -> list[tuple[str, str | None]]:
    """(name, why it cannot run on this device or None), best first."""
    return [(name, _why_not(name, device)) for name in BACKENDS]


def _why_not(name: str, device: Device) -> str | None:
    here, reason = device.arch or device.type, None
    if name == "hopper":
        if device.arch != "sm_90":
            reason = f"needs an NVIDIA Hopper GPU (sm_90), this device is {here}"
        elif not device.has_triton:
            reason = "needs triton, which is not installed"
    elif name == "triton":
        if device.type != "cuda":
            reason = f"needs a GPU that Triton compiles for, this device is {here}"
        elif not device.has_triton:
            reason = "needs triton, which is not installed"
        elif device.arch.startswith("sm_") and int(device.arch[3:]) < 80:
            reason = f"needs bfloat16 matrix instructions (sm_80), this device is {here}"
    return reason


def _cannot(name: str, problem: AttentionProblem, device: Device) -> str | None:
    """Why a backend that runs on the device cannot do this problem."""
    if name == "hopper":
        decodes_e4m3 = "fp8_cache" in problem.features and cannot_decode(problem) is None
        return cannot_stream(problem) if decodes_e4m3 else cannot(problem)
    if name != "triton":
        return None
    if problem.dtype == "float64":
        return "computes in float32, the inputs are float64"
    if "fp8_cache" in problem.features and device.arch in ("sm_80", "sm_86", "sm_87"):
        return f"needs instructions that convert e4m3 (sm_89), this device is {device.arch}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        wide = max(problem.head_dim, problem.head_dim_v)
        return f"holds a head_dim up to {MAX_HEAD_DIM} in registers, this one is {wide}"
    return shortage(device.arch, problem.dtype, problem.head_dim, problem.head_dim_v)


@lru_cache(maxsize=4096)
def plan(problem: AttentionProblem, device: Device, among: tuple[str, ...] = BACKENDS) -> Plan:
    """Choose the backend, the first of `among` that can do the problem, and its tile.

    Raises LookupError where none of them can.
    """
    reasons = [(n, _why_not(n, device) or _cannot(n, problem, device)) for n in among]
    chosen = next((name for name, reason in reasons if reason is None), None)
    if chosen is None:
        raise LookupError("; ".join(f"{name} {reason}" for name, reason in reasons))
    passed = tuple((n, r) for n, r in reasons[: among.index(chosen)] if r is not None)
    pairs = visible_pairs(problem) * problem.batch * problem.heads
    d, dv = problem.head_dim, problem.head_dim_v
    read, written = _traffic(problem)
    kernels, hopper, decode, stream, tile = None, None, None, None, torch_tile(problem)
    if chosen in ("hopper", "triton"):
        kernels = configs(device.arch, problem.dtype, d, dv, problem.kind)
        tile = TileConfig(kernels.forward.block_q, kernels.forward.block_k)
    if chosen == "hopper":
        hopper = forward_tile(problem)
        tile = TileConfig(hopper.block_m, hopper.block_n)
    # Latent keys are wider than the general kernels hold: only a backward is PyTorch's operators'.
    wide = problem.latent and "triton" in among and _why_not("triton", device) is None
    if (chosen in ("hopper", "triton") or wide) and cannot_decode(problem) is None:
        decode = decode_config(device.arch, problem)
        tile = TileConfig(decode.block_m, decode.block_n)
        if chosen == "hopper" and cannot_stream(problem) is None:
            stream = decode_tile(problem)
            tile = TileConfig(stream.block_m, stream.block_n)
    return Plan(
        backend=chosen,
        tile=tile,
        flops_forward=2 * pairs * (d + dv),
        flops_backward=2 * pairs * (3 * d + 2 * dv),
        bytes_forward=read + written,
        bytes_backward=2 * (read + written),
        passed_over=passed,
        kernels=kernels,
        nvidia=device.arch.startswith("sm_"),
        hopper=hopper,
        decode=decode,
        stream=stream,
        gradients=_gradients(chosen, problem, device, among),
    )


def _gradients(
    chosen: str, problem: AttentionProblem, device: Device, among: tuple[str, ...]
) -> str:
    """The backend of the backward: where the Hopper kernels could do the forward, but slower than
    the portable one, they may be the faster ones here. Of what they only decode they have none."""
    if chosen == "torch":
        return chosen
    able = "hopper" in among and _why_not("hopper", device) is None and impossible(problem) is None
    return "hopper" if able else "triton"


def torch_tile(problem: AttentionProblem) -> TileConfig:
    """Blocks of the torch backend: square while there are queries, wider for a few of them."""
    block_q = max(1, min(BLOCK, problem.seqlen_q))
    per_key = max(1, problem.heads * block_q)
    wide = BLOCK_ELEMENTS // per_key // BLOCK * BLOCK if block_q < BLOCK // 4 else BLOCK
    block_k = max(BLOCK, min(wide, 4096))
    batches = max(1, BLOCK_ELEMENTS // (per_key * min(block_k, max(1, problem.seqlen_k))))
    return TileConfig(block_q, block_k, batches)


def visible_pairs(problem: AttentionProblem) -> int:
    """(query, key) pairs of one sequence and head that causality, window and chunks leave."""
    p, chunk = problem, problem.attention_chunk
    if chunk == 0:
        return _pairs(p, p.seqlen_q, p.seqlen_k)
    queries = min(p.seqlen_q, p.seqlen_k)  # those before the first key see none
    keys = p.seqlen_k - max(0, p.seqlen_k - 1) // chunk * chunk  # of the last chunk
    whole, rest = divmod(max(0, queries - keys), chunk)
    of_last, of_whole = _pairs(p, min(queries, keys), keys), whole * _pairs(p, chunk, chunk)
    return of_last + of_whole + _pairs(p, rest, chunk)


def _pairs(problem: AttentionProblem, seqlen_q: int, seqlen_k: int) -> int:
    """`visible_pairs` of so many queries and keys, without chunks."""
    offset, left, right = seqlen_k - seqlen_q, problem.window_left, problem.window_right
    above = seqlen_q * seqlen_k
    if right != UNBOUNDED:
        above = _sum_clamped(offset + right + 1, seqlen_q, seqlen_k)
    below = 0 if left == UNBOUNDED else _sum_clamped(offset - left, seqlen_q, seqlen_k)
    return above - below


def _sum_clamped(start: int, count: int, top: int) -> int:
    """Sum of min(max(start + i, 0), top) for i in range(count)."""
    first = min(max(0, -start), count)  # terms before are 0
    full = min(max(top - start, first), count)  # terms from here are top
    ramp = full - first
    return ramp * (start + first) + ramp * (ramp - 1) // 2 + (count - full) * top


def _traffic(problem: AttentionProblem) -> tuple[int, int]:
    """Bytes of q, k, v, and of out and lse."""
    size, p = problem.element_bytes, problem
    rows = p.batch * p.seqlen_q * p.heads
    keys = p.batch * p.seqlen_k * p.kv_heads
    stored = 1 if "fp8_cache" in p.features else size
    read = size * rows * p.head_dim + stored * keys * (p.head_dim + p.head_dim_v)
    return read, size * rows * p.head_dim_v + 4 * rows
