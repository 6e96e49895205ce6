"""What the Hopper backward launches for the gradients that are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.api import normalise
from flashtile.backends import hopper_backward, triton
from flashtile.backends.launch import Launch
from flashtile.backends.torch import Gradients
from flashtile.plan import Device, plan
from flashtile.problem import describe

LEFT = Gradients(*(torch.zeros(1) for _ in Gradients._fields))
"""What the portable kernels are asked for."""

KERNELS = ["prepare_backward", "attention_backward", "finish_query_gradient"]


def _half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("needs", "launched", "asked"),
    [("q k v", KERNELS, []), ("q k", KERNELS, []), ("q v", KERNELS, []), ("q", [], ["q"]),
     ("k v", [], ["k v"]), ("q k v bias", KERNELS, ["bias"]), ("bias", [], ["bias"])],
)  # fmt: skip
def test_gradients_asked_for_in_part(
    needs: str, launched: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dQ alone, or without it, is one portable kernel, and so is a bias's gradient."""
    found: list[Launch] = []
    left: list[str] = []

    def portable(*arguments: Any) -> Gradients:
        wanted = zip(Gradients._fields, arguments[-1], strict=True)
        left.append(" ".join(name for name, need in wanted if need))
        return LEFT

    monkeypatch.setattr(hopper_backward, "run", found.append)
    monkeypatch.setattr(triton, "backward", portable)
    q = _half(1, 256, 2, 128)
    call = normalise(q, q, q, bias=_half(1, 2, 256, 256) if "bias" in needs else None)
    asking = tuple(name in needs.split() for name in Gradients._fields)
    chosen = plan(describe(call), Device("cuda", "sm_90", True), ("triton",))
    lse = torch.zeros(1, 2, 256)
    grads = hopper_backward.backward(call, chosen, q, None, q, lse, asking)

    assert [x.kernel.__name__ for x in found] == launched
    assert left == asked
    if launched:
        assert [name for name, x in grads._asdict().items() if x is not None] == needs.split()
