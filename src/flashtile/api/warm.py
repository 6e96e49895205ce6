"""The second call of a kind: straight from metadata to the launch.

An eager call without autograd, whose shapes, strides, alignment and scalars were met before, needs
no checks, no plan and no operator: everything they depend on is in the key. What is left is to
allocate the results and to launch, 10 us instead of 100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import config, ops
from flashtile.problem import Call

Replay = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_CAPACITY = 4096
_replays: dict[tuple[Any, ...], Replay | None] = {}


def key_of(q: Tensor, k: Tensor, v: Tensor, scalars: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that a plain dense call depends on, or None for a call that has to take the long way."""
    plain = type(q) is type(k) is type(v) is Tensor and q.dim() == k.dim() == v.dim() == 4
    if not (plain and q.is_cuda) or _intercepted(q, k, v):
        return None
    strides = q.stride(), k.stride(), v.stride()
    if not strides[0][-1] == strides[1][-1] == strides[2][-1] == 1:
        return None  # the long way copies it
    return (
        q.shape, k.shape, v.shape, strides, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, scalars, config.allow_tf32,
    )  # fmt: skip


def _intercepted(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether something must see the operator: autograd, autocast, a mode, a tracer."""
    if torch.compiler.is_compiling() or config.checked:
        return True
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cuda")
        or q.get_device() != torch.cuda.current_device()
    )


def find(key: tuple[Any, ...] | None) -> Replay | None:
    return None if key is None else _replays.get(key)


def remember(key: tuple[Any, ...] | None, call: Call) -> None:
    """Keep how a call that has just succeeded is launched. None: its backend has no short way."""
    if key is None or key in _replays:
        return
    if len(_replays) >= _CAPACITY:
        _replays.clear()
    _replays[key] = ops.replay(call)
