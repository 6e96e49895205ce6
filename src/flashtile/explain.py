"""What flashtile will do with a problem, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashtile.decode_tiles import DecodeConfig, cannot_decode
from flashtile.hopper_backward_tiles import backward_tile, cannot_backward
from flashtile.hopper_decode_tiles import PROGRAMS_PER_SM, cannot_stream
from flashtile.plan import Device, Plan, plan
from flashtile.problem import UNBOUNDED, AttentionProblem, describe

RESULTS = {"return_lse", "return_attn_probs", "out"}
"""Keywords of a call that say nothing about its problem."""


@dataclass(frozen=True)
class Explanation:
    """A problem and its plan. `rows()` gives (name, value) pairs, `str()` the same as text."""

    problem: AttentionProblem
    plan: Plan
    deterministic: bool = False

    def rows(self) -> list[tuple[str, str]]:
        p, chosen = self.problem, self.plan
        tile = chosen.tile
        storage = f"paged by {p.page_size}" if p.page_size else p.layout
        rows = [
            (
                "problem",
                f"batch {p.batch}, {p.seqlen_q:,} queries x {p.seqlen_k:,} keys, {storage}",
            ),
            ("heads", f"{p.heads} query, {p.kv_heads} KV, head_dim {p.head_dim}/{p.head_dim_v}"),
            ("dtype", f"{p.dtype} on {p.device}"),
            ("mask", _mask_text(p)),
            ("features", ", ".join(sorted(p.features)) or "none"),
            ("backend", chosen.backend),
            ("tile", f"{tile.block_q} queries x {tile.block_k} keys, {tile.batches} sequences"),
            ("FLOPs", f"{chosen.flops_forward:.3g} forward, {chosen.flops_backward:.3g} backward"),
            ("bytes", f"{chosen.bytes_forward:.3g} forward, {chosen.bytes_backward:.3g} backward"),
        ]
        rows += _packing(chosen) + self._backward()
        if chosen.stream is not None:
            text = f"planned on the device, for {PROGRAMS_PER_SM} programs an SM, keys by TMA"
            rows.append(("splits", text))
        elif chosen.decode is not None:
            rows.append(("splits", _splits_text(p, chosen.decode)))
            if chosen.backend == "hopper" and (reason := cannot_stream(p)) is not None:
                rows.append(("not by TMA", reason))
        elif (reason := cannot_decode(p)) is not None and chosen.kernels is not None:
            rows.append(("not split", reason))
        return rows + [(f"not {name}", reason) for name, reason in chosen.passed_over]

    def _backward(self) -> list[tuple[str, str]]:
        """The tiles of the gradients' kernels, where they are not the torch backend's blocks."""
        p, kernels, rows = self.problem, self.plan.kernels, []
        if kernels is None:
            return []
        if self.plan.gradients == "hopper":
            reason = cannot_backward(p)
            if reason is None:
                tile = backward_tile(p, self.deterministic)
                text = f"{tile.block_m} queries x {tile.block_n} keys, dQ added {tile.adds}"
                return [("backward", f"{text}, as integers" if tile.integers else text)]
            rows.append(("not hopper", f"backward {reason}"))
        dq, dkdv = kernels.dq, kernels.dkdv
        text = (
            f"dQ {dq.block_q} queries x {dq.block_k} keys, "
            f"dK and dV {dkdv.block_q} queries x {dkdv.block_k} keys"
        )
        return [("backward", text), *rows]

    def __str__(self) -> str:
        return "\n".join(f"{name:>12}  {value}" for name, value in self.rows())


def _packing(chosen: Plan) -> list[tuple[str, str]]:
    if chosen.hopper is None or chosen.hopper.pack == 1 or chosen.decode is not None:
        return []
    pack, rows = chosen.hopper.pack, chosen.hopper.block_m
    return [("packing", f"{pack} query heads of a KV head x {rows // pack} queries are a tile")]


def _splits_text(p: AttentionProblem, config: DecodeConfig) -> str:
    if p.split_size:
        return f"every {p.split_size:,} keys"
    if p.num_splits:
        return f"at most {p.num_splits:,} a row"
    programs = config.programs_per_sm
    return f"planned on the device, for {programs} programs an SM"


def _mask_text(p: AttentionProblem) -> str:
    chunks = f", in chunks of {p.attention_chunk:,} keys" if p.attention_chunk else ""
    return _band_text(p) + chunks


def _band_text(p: AttentionProblem) -> str:
    if p.window_left == UNBOUNDED and p.window_right == UNBOUNDED:
        return "full"
    if p.window_left == UNBOUNDED and p.causal:
        return "causal"
    sides = ["unbounded" if x == UNBOUNDED else f"{x:,}" for x in (p.window_left, p.window_right)]
    return f"window, {sides[0]} to the left, {sides[1]} to the right"


def explain_problem(
    problem: AttentionProblem, device: Device, deterministic: bool = False
) -> Explanation:
    """The plan of a problem given by its metadata."""
    return Explanation(problem, plan(problem, device), deterministic)


def explain(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Explanation:
    """The plan of a call: backend, tile, splits, FLOPs, bytes, and why not a better backend.

    Validates like the call, computes nothing.

    Args:
        q, k, v: as for `flash_attn_func`; or with cu_seqlens_q among the keywords, packed, as for
            `flash_attn_varlen_func`. On the device that is asked about.
        keywords: the other arguments of that function, by name.

    Returns:
        An `Explanation`: `print` it, or take its `plan`, or its `rows()`.

    Raises:
        TypeError, ValueError: as the function itself.

    >>> print(flashtile.explain(q, k, v, causal=True))
    """
    from flashtile.api import normalise  # noqa: PLC0415, the arrow points from api to here

    problem = {name: x for name, x in keywords.items() if name not in RESULTS}
    call = normalise(q, k, v, **problem)
    return explain_problem(describe(call), Device.of(q.device), call.variant.deterministic)
