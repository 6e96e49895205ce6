"""Whether anybody would see the operator that a call makes: tracers, modes, transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from flashtile import config

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def unseen(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody is there to see the operator that computes with these tensors: no tracer, no
    mode, no transform, no subclass; whether they have memory and it holds their values, which the
    dispatcher sees to elsewhere; and whether they are on the current device."""
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return False
    q = tensors[0]
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not hears_functions()
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and not config.checked
        and True not in [_virtual(x) for x in tensors if x is not None]
        and q is not None
        and (not q.is_cuda or q.get_device() == torch.cuda.current_device())
    )


def _virtual(x: Tensor) -> bool:
    """Whether its memory is not what it holds: negated, all zero, left behind by a transform."""
    wraps = torch._C._functorch.is_functorch_wrapped_tensor
    return x.is_neg() or x._is_zerotensor() or wraps(x)


def hears_functions() -> bool:
    """Whether there is a function mode besides torch.set_default_device's, which has no use for
    operators."""
    return torch._C._len_torch_function_stack() != 0 and not all(
        isinstance(x, DeviceContext) for x in _get_current_function_mode_stack()
    )
