"""Memory as callers have it, on a GPU: any strides, any base address, canaries around it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flashtile.testing import (
    CASES,
    Case,
    Problem,
    assert_matches_reference,
    fence,
    poisoned_allocations,
    run,
)
from flashtile.testing.layouts import LAYOUTS, lay_out

BF16 = torch.bfloat16


def _problem(seed: int, head_dim: int = 64) -> Problem:
    case = Case("layout", 150, 203, heads=4, head_dim=head_dim, features={"causal": True})
    return case.draw(seed, BF16, "cuda")


def _assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Every element within 2% of the largest: another order of sums, rounded to bfloat16."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def _moved(problem: Problem, layout: str, names: tuple[str, ...] = ("q", "k", "v")) -> Problem:
    """The problem with tensors laid out otherwise, NaN between their elements."""
    moved = {n: lay_out(x, layout) if n in names else x for n, x in problem.tensors.items()}
    return problem._replace(tensors=moved)


@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("q", "k", "v")], ids="".join)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
def test_every_layout(layout: str, names: tuple[str, ...]) -> None:
    """Case 25: the result does not depend on strides, to the bit; gradients are in the budget."""
    moved = _moved(_problem(1), layout, names)
    plain = {n: x.contiguous() for n, x in moved.tensors.items()}
    expected, found = run(moved._replace(tensors=plain)), assert_matches_reference(moved)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)
    assert all(grad.is_contiguous() for grad in found.grads.values())


@pytest.mark.parametrize("layout", ["heads_first", "packed", "every_other_head", "strided"])
def test_every_layout_of_dout(layout: str) -> None:
    """Case 27: the incoming gradient has its own strides."""
    q, k, v = (x.requires_grad_() for x in _problem(2).tensors.values())
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    found = torch.autograd.grad(out, (q, k, v), lay_out(dout, layout))
    _assert_close(found, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_broadcast_dout(packed: bool) -> None:
    """Case 27: .sum().backward() hands over one number with strides 0."""
    x = [t.requires_grad_() for t in _problem(3).tensors.values()]
    if packed:
        x = [t.detach().flatten(0, 1).requires_grad_() for t in x]
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device="cuda")
                      for n in (150, 203))  # fmt: skip
        out = flash_attn_varlen_func(*x, cu_q, cu_k, causal=True)
    else:
        out = flash_attn_func(*x, causal=True)
    found = torch.autograd.grad(out.sum(), x, retain_graph=True)
    expected = torch.autograd.grad(out, x, torch.ones_like(out))
    _assert_close(found, expected)


def test_slices_of_one_projection() -> None:
    """q, k and v as slices of one matrix product, and their gradient as one tensor."""
    qkv = torch.randn(2, 203, 3, 4, 64, device="cuda", dtype=BF16, requires_grad=True)
    apart = [x.contiguous() for x in qkv.unbind(2)]
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(out, flash_attn_func(*apart, causal=True))
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == qkv.shape
    assert grad.isfinite().all()


def _misaligned(x: Tensor, offset: int) -> Tensor:
    """x at a base address `offset` elements past a multiple of 16 bytes, NaN around it."""
    memory = torch.full((x.numel() + 16,), math.nan, dtype=x.dtype, device=x.device)
    start = -(memory.data_ptr() // x.element_size()) % 8 + offset
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7])
def test_misaligned_bases(offset: int) -> None:
    """Case 31: base addresses of 2, 4, 6, 8 and 14 bytes past a multiple of 16."""

    problem = _problem(4)
    run(problem)  # an aligned call first: what it compiled must not serve the others
    moved = {n: _misaligned(x, offset) for n, x in problem.tensors.items()}
    assert all(x.data_ptr() % 16 == 2 * offset for x in moved.values())
    found, expected = assert_matches_reference(problem._replace(tensors=moved)), run(problem)
    assert torch.equal(found.out, expected.out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_calls_of_a_kind(layout: str) -> None:
    """Without autograd they go a shorter way to the launch: other values, the same layout."""
    for seed in range(7, 10):
        problem = _moved(_problem(seed), layout)
        found, lse = flash_attn_func(**problem.tensors, causal=True, return_lse=True)
        expected = run(problem)  # with autograd, the long way
        assert torch.equal(found, expected.out)
        assert torch.equal(lse, expected.lse)


def test_second_calls_of_any_alignment() -> None:
    """A kernel compiled for an aligned q must not serve a misaligned one, nor k's serve q."""
    expected = run(problem := _problem(10)).out
    for names in ("", "q", "k", "v", "qk", "kv", "qv", "qkv", ""):
        moved = {n: _misaligned(x, 1) if n in names else x for n, x in problem.tensors.items()}
        for _ in range(2):
            assert torch.equal(flash_attn_func(**moved, causal=True), expected), names


def test_second_calls_with_other_scalars() -> None:
    """Each combination twice, interleaved."""
    problem = _problem(11)
    scalars = ({}, {"causal": True}, {"softcap": 2.0}, {"window_size": (9, 0)},
               {"window_size": (9, 1)}, {"softmax_scale": 0.3}, {"softmax_scale": 1})  # fmt: skip
    for _ in range(2):
        for keywords in scalars:
            found = flash_attn_func(**problem.tensors, **keywords)
            assert torch.equal(found, run(problem._replace(keywords=keywords)).out)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "paged" not in c.name][::3], ids=str)
def test_canaries_and_poison(case: Case, dtype: torch.dtype) -> None:
    """NaN around and between the rows of every input and in every fresh allocation."""
    problem = case.draw(5, dtype, "cuda")
    guards = {n: fence(x) for n, x in problem.tensors.items()}
    with poisoned_allocations():
        assert_matches_reference(
            problem._replace(tensors={n: guard.tensor for n, guard in guards.items()})
        )
    for name, guard in guards.items():
        guard.assert_unchanged(name)


def test_out_of_any_strides() -> None:
    """Case 33: the result lands in `out`, and nowhere else."""
    q, k, v = _problem(6).tensors.values()
    expected = flash_attn_func(q, k, v, causal=True)
    out = lay_out(torch.randn_like(expected), "every_other_head")
    memory = torch.empty(0, dtype=BF16, device="cuda").set_(out.untyped_storage())
    holes = memory.isnan()
    assert flash_attn_func(q, k, v, causal=True, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(memory.isnan(), holes)
