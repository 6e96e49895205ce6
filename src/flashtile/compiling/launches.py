"""What the backends would launch for a call: their own host code, on tensors without memory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashtile.backends import append, blocklists, replays
from flashtile.backends import launch as launching
from flashtile.backends.cache import NewTokens
from flashtile.backends.launch import Launch
from flashtile.compiling.cases import Case, build
from flashtile.kernels.config import Tile
from flashtile.plan import Device, plan
from flashtile.problem import Call, describe


def launches(case: Case, arch: str) -> list[Launch]:
    """Every launch of a call and of its backward on a GPU of that architecture, in order; none
    where the plan leaves the call to PyTorch's operators. The portable kernels are among them where
    the plan has better ones: with one feature more a call of the same tile gets them."""
    call = build(case)
    chosen = plan(replace(describe(call), device="cuda"), Device("cuda", arch, True))
    if chosen.decode is not None:
        decode = importlib.import_module("flashtile.backends.decode")
        with _recorded() as found:
            decode.forward(call, chosen)
            if chosen.stream is not None:
                decode.forward(call, replace(chosen, stream=None))
            if call.sequences.block_table is not None or call.quantized:
                append.append(call, _new_tokens(call))
        return found
    if chosen.kernels is None:
        return []
    portable, backend, gradients = (
        importlib.import_module(f"flashtile.backends.{name}")
        for name in ("triton", chosen.backend, chosen.gradients)
    )
    with _recorded() as found:
        if call.classified:
            codes = blocklists.classify(call)
            call = call._replace(operands=call.operands._replace(mask_blocks=codes))
        for module in dict.fromkeys((portable, backend)):
            out, lse = module.forward(call, chosen)
        for module in dict.fromkeys((portable, gradients)):
            module.backward(call, chosen, torch.empty_like(out), None, out, lse, (True,) * 5)
    return found


def _new_tokens(call: Call) -> NewTokens:
    """As many as there are queries, to be turned."""
    q, k, v = call.operands[:3]
    k_new, v_new = (q.new_empty((*q.shape[:-2], *x.shape[-2:])) for x in (k, v))
    angles = q.new_empty((call.seqlen_k, q.shape[-1] // 2))
    return NewTokens(k_new, v_new, call.sequences.cu_seqlens_q, angles, angles)


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """Launches of the backends land in the list instead of on a GPU."""
    found: list[Launch] = []
    run = launching.run
    backends = [m for name, m in sys.modules.items() if name.startswith("flashtile.backends.")]
    with ExitStack() as stack:
        for module in backends:
            if getattr(module, "run", None) is run:
                stack.enter_context(patch.object(module, "run", found.append))
        stack.enter_context(patch.object(replays, "CAPACITY", 0))
        yield found


def tile_of(launch: Launch) -> Any:
    """The tile that a kernel is compiled for, of whichever backend; lists of blocks have none."""
    return next((x for x in launch.arguments if hasattr(x, "block_m")), None)


def _name(kernel: Any) -> str:
    return f"{kernel.__module__}.{kernel.__name__}"


def tiling(launch: Launch) -> tuple[tuple[Any, ...], int]:
    """(how the plan tiles a kernel, the head dims it is compiled for where that does not say)."""
    kernel, _, _, *options = launch
    tile, edges, dims = tile_of(launch), None, 0
    if isinstance(tile, Tile):
        edges, dims = (tile.block_m, tile.block_n), tile.padded + tile.padded_v
    return (_name(kernel), edges or tile, *options), dims


def signature(launch: Launch) -> str:
    """What Triton compiles a launch for: equal for launches that share a kernel."""
    kernel, _, arguments, *options = launch
    return repr((_name(kernel), _traits(arguments), options))


def _traits(x: Any) -> Any:
    """A tensor's dtype, a tensor map's block, an integer's width and divisibility, a function's
    identity."""
    if isinstance(x, tuple):
        return type(x).__name__, tuple(map(_traits, x))
    if isinstance(x, Tensor):
        return x.dtype
    if hasattr(x, "block_shape"):  # a tensor map
        return x.base.dtype, x.block_shape, x.layout
    if isinstance(x, float):
        return float
    if isinstance(x, int) and not isinstance(x, bool):
        return "one" if x == 1 else (x % 16 == 0, abs(x) >= 2**31)
    return getattr(x, "__qualname__", x)
