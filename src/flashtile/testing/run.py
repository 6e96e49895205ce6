"""Run a problem through flashtile and through the reference, forward and all gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, reference
from flashtile.random import draw_rng_state
from flashtile.testing.budget import assert_within_budget
from flashtile.testing.cases import Problem


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def run(problem: Problem, dropout_seed: int = 0, cotangent_seed: int = 1) -> Results:
    """flashtile's results for a problem, gradients of q, k, v and what else is differentiable."""
    leaves = {n: x.detach().requires_grad_() for n, x in problem.tensors.items()}
    function = flash_attn_varlen_func if problem.varlen else flash_attn_func
    q = leaves["q"]
    generator = torch.Generator(q.device).manual_seed(dropout_seed)
    arguments: dict[str, Any] = {**leaves, **problem.keywords}
    out, lse = function(**arguments, return_lse=True, dropout_generator=generator)
    return _backward(out, lse, leaves, cotangent_seed)


_NOT_OF_THE_RESULT = ("max_seqlen_q", "max_seqlen_k", "deterministic")


def run_reference(
    problem: Problem,
    dtype: torch.dtype | None = torch.float64,
    dropout_seed: int = 0,
    cotangent_seed: int = 1,
) -> Results:
    """The reference's results; with dtype None eager attention in the problem's own dtype."""
    leaves = {n: x.detach().requires_grad_() for n, x in problem.tensors.items()}
    q = leaves["q"]
    if dtype is not None:
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in leaves.items()}
    keywords = {n: x for n, x in problem.keywords.items() if n not in _NOT_OF_THE_RESULT}
    generator = torch.Generator(q.device).manual_seed(dropout_seed)
    state = draw_rng_state(q.device, generator) if keywords.get("dropout_p") else None
    arguments: dict[str, Any] = {**leaves, **keywords, "rng_state": state, "dtype": dtype}
    out, lse = reference.attention(**arguments)
    return _backward(out, lse, leaves, cotangent_seed)


def _backward(out: Tensor, lse: Tensor, leaves: dict[str, Tensor], seed: int) -> Results:
    """Gradients of a random combination of out and of lse's finite entries."""
    g = torch.Generator().manual_seed(seed)
    dout, dlse = (torch.randn(x.shape, generator=g).to(x.device) for x in (out, lse))
    # Cotangents in q's dtype are exact in every dtype they are compared with.
    dout = dout.to(torch.bfloat16).to(out.dtype)
    finite = lse.detach().isfinite()
    dlse = torch.where(finite, dlse, 0.0).to(torch.bfloat16).to(lse.dtype)
    found = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout, dlse), allow_unused=True, materialize_grads=True
    )
    return Results(out.detach(), lse.detach(), dict(zip(leaves, found, strict=True)))


def assert_matches_reference(problem: Problem, what: str = "") -> Results:
    """Forward, lse and every gradient within the error budget. Returns flashtile's results."""
    actual, golden, eager = run(problem), run_reference(problem), run_reference(problem, None)
    assert_within_budget(actual.out, eager.out, golden.out, f"{what} out")
    assert_within_budget(actual.lse, eager.lse, golden.lse, f"{what} lse")
    for name, grad in actual.grads.items():
        base, exact = eager.grads[name], golden.grads[name]
        assert_within_budget(grad, base, exact, f"{what} d{name}", gradient=True)
    return actual
