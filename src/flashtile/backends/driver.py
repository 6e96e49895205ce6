"""The CUDA driver, and the context that it wants the calling thread to have."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: also that of a thread that has none


@cache
def library() -> Any:
    """Its functions by name, which return 0 for success.

    Other threads of Python run meanwhile (CDLL, not PyDLL, which would be 0.3 us sooner): a launch
    waits where the stream's queue is full, and what that waits for may be a callback in Python.
    """
    return ctypes.CDLL("libcuda.so.1")


def enter() -> None:
    """Give this thread the current device's primary context if it has none.

    CUDA's runtime does so in most of its calls, but a thread whose tensors come from PyTorch's
    cache may not have made any. Neither can TMA maps be encoded without, nor kernels launched.
    """
    if torch.version.cuda is None or not torch.cuda.is_initialized():
        return
    context, device, driver = ctypes.c_void_p(), ctypes.c_int(), library()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if context.value is None:
        _check(driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(driver.cuCtxSetCurrent(context))


def refused(result: int) -> bool:
    """What becomes of a launch that the driver has answered like that, which is not success. True:
    nothing but a context was missing, and it may be tried again."""
    if result != _INVALID_CONTEXT:
        _check(result)
    enter()
    return True


def _check(result: int) -> None:
    if result != 0:
        name, reason = (_said(by, result) for by in ("cuGetErrorName", "cuGetErrorString"))
        raise RuntimeError(f"CUDA driver: {name or result}: {reason or 'unknown'}")


def _said(by: str, result: int) -> str:
    found = ctypes.c_char_p()
    getattr(library(), by)(result, ctypes.byref(found))
    return (found.value or b"").decode()
