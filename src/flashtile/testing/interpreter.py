"""The Triton kernels on the CPU: in Triton's interpreter, in small blocks.

Set TRITON_INTERPRET=1 before anything imports triton. The interpreter knows fp32 and fp16; it
computes bfloat16 wrongly without a word, so a bfloat16 problem is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from flashtile import ops, plan, problem
from flashtile.tiles import KernelConfig, KernelConfigs


def _convert(triton_own: Any, x: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Triton's own rounds ties to e4m3 away from 0, and drops the carry."""
    if str(target) != "fp8e4nv":
        return triton_own(x, source, target, rounding)
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _patching_once(interpreter: Any) -> Callable[..., Any]:
    """Triton's own call of a device function patches its language every time: half the time. The
    launch has done it for our kernels, the first call does for each of Triton's modules."""
    patch_and_call, patched = interpreter.InterpretedFunction.__call__, set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if module.startswith("flashtile.") or module in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(module)
        return patch_and_call(function, *args, **kwargs)

    return call


def _dtype_table(triton_own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's own builds a table of all dtypes at every call: 7% of the time."""
    known: dict[str, Any] = {}

    def numpy_dtype(x: Any) -> Any:
        if x.name not in known:
            known[x.name] = triton_own(x)
        return known[x.name]

    return numpy_dtype


def _shapes_once(triton_own: Callable[..., None]) -> Callable[..., None]:
    """How tensors begin. Triton's own wraps every dim of every tensor in types of its language: 12%
    of the time. No kernel changes a shape."""
    known: dict[str, tuple[Any, Any]] = {}

    def begin(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            triton_own(self, handle, type)
            known[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known[type.name]

    return begin


def _block_types_once(triton_own: Callable[..., None]) -> Callable[..., None]:
    """How types of blocks begin. Triton's own checks every dim, and writes a name down: 15% of the
    time."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def begin(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([getattr(n, "value", n) for n in shape])
        if key not in known:
            triton_own(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return begin


def refuse_long_way(*_: Any) -> None:
    """Stands in for what a replayed call must not get to."""
    raise AssertionError("the long way was taken")


def small_qkv(**options: Any) -> list[torch.Tensor]:
    return [torch.randn(2, 20, 2, 8, **options) for _ in "qkv"]


def _why_not(name: str, _: plan.Device) -> str | None:
    return "not interpreted" if name == "hopper" else None


def _cannot(name: str, what: problem.AttentionProblem, _: plan.Device) -> str | None:
    if name == "triton" and what.dtype not in ("float32", "float16"):
        raise TypeError(f"q has dtype {what.dtype}; the interpreter knows fp32 and fp16")
    return None


@contextmanager
def interpreted(
    block_q: int = 32, block_k: int = 16, list_block: int = 128, capacity: int = 0
) -> Iterator[None]:
    """Run calls on CPU tensors through the Triton backend, in blocks of block_q x block_k.

    list_block is the edge of the tiles that masks given as tensors are classified in, 128 on a GPU;
    a smaller one makes several of them out of a few tokens. capacity is how many launches are kept
    for their like: none, so that whoever patches the host side is heard.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET is not 1; set it before triton is imported")
    row = KernelConfig(block_q, block_k, 1, 1)
    column = KernelConfig(block_k, block_q, 1, 1)

    # Only here: whoever imports flashtile.testing has not asked for triton.
    from numpy import errstate  # noqa: PLC0415
    from triton.language import block_type, constexpr, tensor  # noqa: PLC0415
    from triton.runtime import interpreter  # noqa: PLC0415

    from flashtile.api import warm  # noqa: PLC0415
    from flashtile.backends import replays  # noqa: PLC0415
    from flashtile.kernels import blocks, schedule  # noqa: PLC0415

    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    def small(*_: Any) -> KernelConfigs:
        return KernelConfigs(row, row, column, row)

    plan.plan.cache_clear()
    with (
        patch.object(problem, "MASK_BLOCK", list_block),
        patch.object(blocks, "LIST_BLOCK", constexpr(list_block)),
        patch.object(schedule, "LIST_BLOCK", constexpr(list_block)),
        patch.object(plan, "_why_not", _why_not),
        patch.object(plan, "_cannot", _cannot),
        patch.object(plan, "configs", small),
        patch.object(replays, "CAPACITY", capacity),
        patch.object(replays, "_replays", {}),
        patch.object(warm, "_kept", {}),
        patch.object(warm, "_latest", {}),
        patch.object(ops, "classifies", lambda device_type: True),
        patch.object(interpreter.InterpretedFunction, "__call__", _patching_once(interpreter)),
        patch.object(interpreter.interpreter_builder, "options", options),
        patch.object(interpreter, "_get_np_dtype", _dtype_table(interpreter._get_np_dtype)),
        patch.object(tensor, "__init__", _shapes_once(tensor.__init__)),
        patch.object(block_type, "__init__", _block_types_once(block_type.__init__)),
        patch.object(interpreter, "_convert_float", partial(_convert, interpreter._convert_float)),
        errstate(divide="ignore", invalid="ignore", over="ignore"),  # as a GPU does
    ):
        yield
    plan.plan.cache_clear()
