"""Nothing here runs without a CUDA GPU. With one, every test runs on each backend that it has: the
portable kernels serve a Hopper GPU too, wherever those for Hopper cannot."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from flashtile import ops
from flashtile.plan import BACKENDS, Device, backends, plan


def _usable() -> list[str]:
    """The backends of this GPU, best first, without the last resort."""
    if not torch.cuda.is_available():
        return ["triton"]
    here = backends(Device.of(torch.device("cuda", 0)))
    return [name for name, reason in here if reason is None and name != "torch"]


_PLANNERS = {name: partial(plan, among=BACKENDS[BACKENDS.index(name) :]) for name in BACKENDS}
"""One for each backend: calls are replayed by the planner that they were planned with."""


@pytest.fixture(params=_usable(), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The best backend that plans may choose."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    call = getattr(request.node, "callspec", None)
    if request.param == "hopper" and call and call.params.get("dtype") is torch.float32:
        pytest.skip("fp32 has no kernels for Hopper: the portable ones' run is the same")
    if request.param != _usable()[0] and request.node.get_closest_marker("own_process"):
        pytest.skip("a process of its own takes the best backend: it has run")
    before, ops.plan = ops.plan, _PLANNERS[request.param]  # type: ignore[assignment]
    yield request.param
    ops.plan = before
