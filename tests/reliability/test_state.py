"""Reliability, state: random numbers, autograd, threads, modes, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, plan
from flashtile.api import normalise
from flashtile.testing import CASES, Case, Results, run


def _same(a: Results, b: Results) -> bool:
    return (
        torch.equal(a.out, b.out)
        and torch.equal(a.lse, b.lse)
        and all(torch.equal(grad, b.grads[name]) for name, grad in a.grads.items())
    )


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_each_result_may_have_no_gradient(softcap: float) -> None:
    """Without dout or without dlse; their gradients add up to those of both."""
    x = [torch.randn(2, 33, h, 16).requires_grad_() for h in (4, 2, 2)]
    out, lse = flash_attn_func(*x, causal=True, softcap=softcap, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    by_out = torch.autograd.grad(out, x, dout, retain_graph=True)
    by_lse = torch.autograd.grad(lse, x, dlse, retain_graph=True)
    both = torch.autograd.grad((out, lse), x, (dout, dlse))
    for a, b, c in zip(by_out, by_lse, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-4, atol=1e-5)
    assert by_lse[0].abs().max() > 0.1


def test_dropout_draws_only_when_there_is_some() -> None:
    """A dropout_p of 0 leaves the generator alone, any other moves it; a seed fixes the mask."""
    x = [torch.randn(1, 40, 2, 16) for _ in range(3)]
    before = torch.get_rng_state()
    flash_attn_func(*x)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (flash_attn_func(*x, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(before)
    assert torch.equal(flash_attn_func(*x, dropout_p=0.3), first)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.usefixtures("small_blocks")
def test_keep_rate_within_four_sigma(p: float) -> None:
    """Through the public function: with the unit matrix as v, out is P after dropout."""
    seqlen, heads = 200, 4
    q, k = (torch.randn(1, seqlen, heads, 8) for _ in range(2))
    v = torch.eye(seqlen)[None, :, None].repeat(1, 1, heads, 1)
    kept = (flash_attn_func(q, k, v, dropout_p=p) != 0).double()
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * sigma
    rows = kept.mean(-1)  # no row or head is treated apart: 6 sigma for 800 of them
    assert (rows - (1 - p)).abs().max() < 6 * (p * (1 - p) / seqlen) ** 0.5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_numerically(dropout_p: float) -> None:
    """Backward draws forward's mask, or finite differences would disagree."""
    shapes = ((1, 5, 2, 4), (1, 18, 1, 4), (1, 18, 1, 3))
    x = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(75)
        return flash_attn_func(
            *x, dropout_p=dropout_p, causal=True, return_lse=True, dropout_generator=generator
        )

    assert torch.autograd.gradcheck(attend, x)


def test_threads_make_the_same_bits() -> None:
    """Eight threads, first calls together, same and different shapes, repeats."""
    problems = [case.draw(79) for case in CASES[::4]]
    expected = [run(problem) for problem in problems]
    plan.plan.cache_clear()
    start = threading.Barrier(8)

    def work(thread: int) -> list[str]:
        start.wait()
        wrong = []
        for turn in range(2 * len(problems)):
            at = (turn + thread % 4) % len(problems)
            if not _same(run(problems[at]), expected[at]):
                wrong.append(CASES[4 * at].name)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_repeats_under_small_blocks(case: Case, small_blocks: None) -> None:
    """Twenty repeats, every result and gradient, bit for bit."""
    problem = case.draw(80)
    first = run(problem)
    assert all(_same(run(problem), first) for _ in range(20))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_algorithms(case: Case) -> None:
    """Asked for globally, it is switched on, nothing refuses, nothing changes."""
    problem = case.draw(81)
    plain = run(problem)
    assert not normalise(**problem.tensors, **problem.keywords).variant.deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert normalise(**problem.tensors, **problem.keywords).variant.deterministic
        assert _same(run(problem), plain)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_of_packed_sequences() -> None:
    """All of q, k and v are cast, sinks and offsets are not; gradients come back in fp32."""
    cu = torch.tensor([0, 9, 30], dtype=torch.int32)
    x = [torch.randn(30, h, 16).requires_grad_() for h in (4, 2, 2)]
    sink = torch.randn(4).requires_grad_()
    cast = [t.bfloat16() for t in x]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(x[0], cast[1], x[2], cu, cu, learnable_sink=sink)
    expected = flash_attn_varlen_func(*cast, cu, cu, learnable_sink=sink)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().square().sum(), (*x, sink))
    wanted = torch.autograd.grad(expected.float().square().sum(), (*x, sink))
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


BARE = """
import sys, warnings
sys.modules["triton"] = None  # an import of it raises
import torch
warnings.simplefilter("error")
import flashtile
torch.manual_seed(0)
q = torch.randn(1, 33, 4, 16, dtype=torch.{dtype}, requires_grad=True)
out = flashtile.flash_attn_func(q, q, q, causal=True)
exact = flashtile.reference.attention(q, q, q, causal=True).out
assert (out - exact).abs().max() < {bound}, (out - exact).abs().max()
out.sum().backward()
assert q.grad.abs().max() > 0
text = str(flashtile.explain(q, q, q))
assert "backend  torch" in text and "not triton" in text, text
"""


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_without_gpu_and_triton(dtype: str, bound: float) -> None:
    """Right, and `explain` says why nothing faster ran."""
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(dtype=dtype, bound=bound)], capture_output=True,
        text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
