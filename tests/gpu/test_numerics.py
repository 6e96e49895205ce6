"""Numbers on a GPU: fp32 that is fp32, tf32 that is asked for, extremes, NaN."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from flashtile import config, flash_attn_func
from flashtile.testing import Case, Problem, assert_matches_reference, run, run_reference

BF16 = torch.bfloat16


def _relative_errors(problem: Problem) -> dict[str, float]:
    """The largest error of out and of each gradient, in units of the largest exact value."""
    found, exact = run(problem), run_reference(problem)
    pairs = {"out": (found.out, exact.out)}
    pairs |= {n: (grad, exact.grads[n]) for n, grad in found.grads.items()}
    return {n: float((a - b).abs().max() / b.abs().max()) for n, (a, b) in pairs.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Case 47: errors of 1e-5 by default; with allow_tf32 larger ones, up to 1e-2."""
    problem = Case("fp32", 200, 300, head_dim=64, features={"causal": causal}).draw(
        47, torch.float32, "cuda"
    )
    exact = _relative_errors(problem)
    monkeypatch.setattr(config, "allow_tf32", True)
    rounded = _relative_errors(problem)
    for name, error in exact.items():
        assert error < 1e-5, name
        assert error < rounded[name] < 1e-2, name


def test_one_logit_far_above_the_others() -> None:
    """Case 35: one at 1e4, the others at -1e4: one-hot, gradients finite."""
    direction = torch.nn.functional.one_hot(torch.tensor(3), 64).float()
    q = 100 * direction + 0.01 * torch.randn(1, 133, 2, 64)
    k = -100 * direction + 0.01 * torch.randn(1, 200, 2, 64)
    k[:, 121] *= -1
    v = torch.randn(1, 200, 2, 64)
    x = {n: t.to("cuda", BF16) for n, t in zip("qkv", (q, k, v), strict=True)}
    found = run(Problem(x, {"softmax_scale": 1.0}, False))
    assert torch.equal(found.out, x["v"][:, 121:122].expand_as(found.out))
    assert all(grad.isfinite().all() for grad in found.grads.values())


@pytest.mark.parametrize("where", [0, 77, 132])
def test_one_nan_key(where: int) -> None:
    """Case 37: only its batch row, its heads and the queries that see it turn NaN."""
    q, k, v = (torch.randn(2, 133, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2))
    clean = flash_attn_func(q, k, v, causal=True)
    k[1, where, 0, 5] = math.nan
    out = flash_attn_func(q, k, v, causal=True)
    hit = torch.zeros(2, 133, 4, dtype=torch.bool, device="cuda")
    hit[1, where:, :2] = True
    assert out[hit].isnan().all()
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_hidden_nan_key_beside_a_large_score(dim: int) -> None:
    """Case 37, with a cap: whether a polynomial may stand for the tanh is asked of all scores of a
    block, of those as well that masks hide."""
    q, k, v = (torch.randn(1, 512, 2, dim, device="cuda", dtype=BF16) for _ in range(3))
    row, hidden = 270, 200
    k[:, hidden + 8] = q[:, row] * (34 / dim**0.5)
    call = partial(flash_attn_func, window_size=(64, 0), softcap=50.0)
    clean = call(q, k, v)
    k[:, hidden, :, 0] = math.nan
    out = call(q, k, v)
    seen = torch.zeros(512, dtype=torch.bool, device="cuda")
    seen[hidden : hidden + 65] = True
    assert out[:, seen].isnan().all()
    torch.testing.assert_close(out[:, ~seen], clean[:, ~seen], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-30])
@pytest.mark.parametrize("causal", [False, True])
def test_any_finite_scale(scale: float, causal: bool) -> None:
    """Masked scores stay masked whatever the scale: -inf * 0 is NaN, -inf * -1 is +inf."""
    case = Case("scale", 133, 133, features={"softmax_scale": scale, "causal": causal})
    assert_matches_reference(case.draw(46, BF16, "cuda"))


@pytest.mark.parametrize("softcap", [0.05, 1000.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_extreme_softcaps(softcap: float, dtype: torch.dtype) -> None:
    """Case 41: a cap that flattens everything and one that changes nothing."""
    features = {"softcap": softcap, "window_size": (70, 0)}
    assert_matches_reference(Case("cap", 137, 150, features=features).draw(41, dtype, "cuda"))


def test_constant_values_come_back() -> None:
    """Case 45: rows of P sum to 1, within 1 ulp."""
    q, k = (torch.randn(2, 300, h, 64, device="cuda", dtype=BF16) for h in (4, 2))
    v = torch.randn(2, 1, 2, 64, device="cuda", dtype=BF16).expand(2, 300, 2, 64)
    out = flash_attn_func(q, k, v, causal=True, window_size=(250, 0))
    expected = v.repeat_interleave(2, 2).double()
    assert ((out.double() - expected).abs() <= torch.finfo(BF16).eps * expected.abs()).all()


def test_fully_masked_rows() -> None:
    """Case 39: 0, -inf and no gradient, whole tiles of them and single rows."""
    q, k, v = (torch.randn(2, 400, h, 64, device="cuda", dtype=BF16).requires_grad_()
               for h in (4, 2, 2))  # fmt: skip
    seen = torch.rand(2, 1, 400, 400, device="cuda") > 0.3
    empty = torch.zeros(2, 400, dtype=torch.bool, device="cuda")
    empty[0, ::3], empty[1, 128:256] = True, True
    seen[empty[:, None]] = False
    out, lse = flash_attn_func(q, k, v, attn_mask=seen, return_lse=True)
    (dq, dk, dv) = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert out[empty].eq(0).all()
    assert lse.transpose(1, 2)[empty].eq(-math.inf).all()
    assert dq[empty].eq(0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert lse.transpose(1, 2)[~empty].isfinite().all()
