"""What the Hopper backward adds to scores, in the portable kernels in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends import hopper_backward, operands
from flashtile.kernels.hopper.matrices import add_matrix_within
from flashtile.kernels.scores import ScoreMod, add_matrix
from flashtile.testing import Case
from flashtile.testing.allocations import assert_touches_nothing_else

SHAPES = ((2, 4, 20, 36), (1, 4, 20, 36), (2, 1, 20, 36), (1, 1, 1, 36))


@pytest.fixture(params=[2**31, 1], ids=["near", "far"], autouse=True)
def _within(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Every matrix is added as there, but for dbias, which is the portable kernels' own; "far": as
    one whose rows are."""
    added, around = operands._added, operands.around_bias

    def within(matrix: Tensor | None, unit: float) -> Any:
        mod = added(matrix, unit)
        return None if mod is None else hopper_backward.added_within(mod)

    def plainly(mod: ScoreMod) -> ScoreMod:
        ours = mod.fn is add_matrix_within
        return mod._replace(fn=add_matrix, args=mod.args[:2]) if ours else mod

    monkeypatch.setattr(operands, "around_bias", lambda mods: around(tuple(map(plainly, mods))))
    monkeypatch.setattr(hopper_backward, "FAR_ROWS", request.param)
    monkeypatch.setattr(operands, "_added", within)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_biases_end_where_queries_and_keys_do(shape: tuple[int, ...]) -> None:
    """Ends in the middle of a tile, at which nothing past them is read."""
    case = Case("bias", 20, 36, 2, 4, 2, 8, features={"causal": True})
    problem = case.draw(5)
    for dtype in (torch.float32, torch.float16):
        bias = torch.randn(shape).to(dtype)
        assert_touches_nothing_else(problem._replace(tensors=problem.tensors | {"bias": bias}))


def test_biases_of_packed_sequences_and_of_other_strides() -> None:
    lengths = ((17, 17), (0, 5), (18, 20), (1, 1))
    problem = Case("bias", head_dim=8, lengths=lengths).draw(6)
    for bias in (torch.randn(1, 4, 18, 20), torch.randn(20, 4, 18).permute(1, 2, 0)[None]):
        assert_touches_nothing_else(problem._replace(tensors=problem.tensors | {"bias": bias}))


def test_float_masks_that_hide() -> None:
    mask = torch.randn(2, 1, 20, 36)
    mask[:, :, 3], mask[1, :, :, 20:] = -torch.inf, -torch.inf
    problem = Case("mask", 20, 36, 2, 4, 2, 8).draw(7)
    assert_touches_nothing_else(problem._replace(keywords=problem.keywords | {"attn_mask": mask}))
