"""The contract's error budget: an error is judged by the one that eager attention makes itself."""

from __future__ import annotations

import torch
from torch import Tensor

RMS_FACTOR = 1.1
MAX_FACTOR = 2.0
GRADIENT_MAX_FACTOR = 2.5

ULPS = {2: 1, 4: 8, 8: 32}
"""Slack by bytes of the dtype, in units of its rounding, relative to the result's own size. fp32
accumulators are no wider than fp32 inputs: the order of the sums and p = exp(s - lse) cost every
flash kernel a few roundings that eager attention does not make. In fp64 golden itself has them."""

CANCELLING = {2: 0.0, 4: 1.0, 8: 1.0}
"""The least size that slack is relative to: dP - delta cancels to nothing where a row sees one key,
and keeps the rounding of products of the inputs' size. 16-bit results round more than that."""


def assert_within_budget(
    actual: Tensor, eager: Tensor, golden: Tensor, what: str = "out", gradient: bool = False
) -> None:
    """Raise AssertionError unless `actual` is as good as eager attention in its own dtype.

    golden: the fp64 result on the same (rounded) inputs; eager: eager attention computed in the
    dtype of `actual`. `actual` is finite wherever golden is and equals it where it is infinite; its
    rms error is at most 1.1x eager's; its max error, and the rms error of its worst row, at most 2x
    eager's (gradients 2.5x). The slack of a few ulps covers results that eager has exactly.
    """
    if actual.shape != golden.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, not {tuple(golden.shape)}")
    if golden.numel() == 0:
        return
    bytes_each = actual.dtype.itemsize
    slack = ULPS[bytes_each] * torch.finfo(actual.dtype).eps
    actual, eager, golden = (x.detach().double() for x in (actual, eager, golden))
    finite = golden.isfinite()
    same = torch.where(finite, actual.isfinite(), actual == golden)
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"{what}{list(at)} is {actual[at]:.4g}, golden {golden[at]:.4g}")
    golden = golden.where(finite, 0.0)
    error, base = ((x - golden).where(finite, 0.0).abs() for x in (actual, eager))
    factor = GRADIENT_MAX_FACTOR if gradient else MAX_FACTOR
    scale_rms, scale_max = (
        x.clamp_min(CANCELLING[bytes_each]) for x in (_rms(golden), golden.abs().max())
    )
    for name, measured, allowed in (
        ("rms error", _rms(error), RMS_FACTOR * _rms(base) + slack * scale_rms),
        ("max error", error.max(), factor * base.max() + slack * scale_max),
        ("worst row's rms error", _worst_row(error), factor * _worst_row(base) + slack * scale_max),
    ):
        if not measured <= allowed:
            raise AssertionError(f"{what}: {name} is {measured:.3g}, the budget {allowed:.3g}")


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _worst_row(x: Tensor) -> Tensor:
    return x.square().mean(-1).max().sqrt()
