"""Reliability, numbers: extremes, NaN, empty rows, precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, reference
from flashtile.testing import (
    Case,
    Problem,
    assert_matches_reference,
    assert_within_budget,
    run,
    run_reference,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["whole", "small_blocks"], autouse=True)
def _blocks(request: pytest.FixtureRequest) -> None:
    """Every test, with torch's own kernel where it can, and in small blocks."""
    if request.param == "small_blocks":
        request.getfixturevalue("small_blocks")


def _assert_close_by_lse(problem: Problem) -> None:
    """Forward within the budget; gradients to a rounding of lse, which backward reads p from.

    p = exp(s - lse), and lse of 30,000 in fp32 is known to 2e-3: the price of saving one number a
    row, which eager attention does not pay.
    """
    found, exact, eager = run(problem), run_reference(problem), run_reference(problem, None)
    assert_within_budget(found.out, eager.out, exact.out, "out")
    assert_within_budget(found.lse, eager.lse, exact.lse, "lse")
    rounding = 1e-5 + torch.finfo(torch.float32).eps * exact.lse.abs().max()
    for name, grad in found.grads.items():
        golden = exact.grads[name]
        assert (grad - golden).abs().max() <= rounding * golden.abs().max(), name


@HALVES
def test_one_logit_far_above_the_others(dtype: torch.dtype) -> None:
    """One at 1e4, the others at -1e4: one-hot, gradients finite and right."""
    direction = torch.nn.functional.one_hot(torch.tensor(3), 16).float()
    q = 100 * direction + 0.01 * torch.randn(1, 33, 2, 16)
    k = -100 * direction + 0.01 * torch.randn(1, 40, 2, 16)
    k[:, 21] *= -1
    v = torch.randn(1, 40, 2, 16)
    x = {n: t.to(dtype) for n, t in zip("qkv", (q, k, v), strict=True)}
    problem = Problem(x, {"softmax_scale": 1.0}, False)
    found = run(problem)
    assert torch.equal(found.out, x["v"][:, 21:22].expand_as(found.out))
    assert torch.equal(found.grads["v"][:, :21], torch.zeros_like(x["v"][:, :21]))
    exact = run_reference(problem)
    for name in "qkv":
        assert found.grads[name].isfinite().all()
    torch.testing.assert_close(found.grads["v"].double(), exact.grads["v"], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("level", [-1e4, -100.0, 1e4])
@pytest.mark.parametrize("seqlen_k", [31, 64, 65])
def test_all_logits_far_from_zero(level: float, seqlen_k: int) -> None:
    """lse below -88 next to the padding of a tile: exp of a padded score must not overflow."""
    q, k, v = (torch.randn(1, n, 2, 16) for n in (33, seqlen_k, seqlen_k))
    q[..., 0], k[..., 0] = 8.0, level / 8.0
    problem = Problem({"q": q, "k": k, "v": v}, {"softmax_scale": 1.0, "causal": True}, False)
    _assert_close_by_lse(problem)


@pytest.mark.parametrize("where", [0, 17, 32])
def test_one_nan_key(where: int) -> None:
    """Only its batch row, its heads and the queries that see it turn NaN."""
    q, k, v = (torch.randn(2, 33, h, 16) for h in (4, 2, 2))
    clean, clean_lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    k[1, where, 0, 5] = math.nan
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    hit = torch.zeros(2, 33, 4, dtype=torch.bool)
    hit[1, where:, :2] = True
    assert out[hit].isnan().all()
    assert lse.transpose(1, 2)[hit].isnan().all()
    torch.testing.assert_close(out[~hit], clean[~hit])
    torch.testing.assert_close(lse.transpose(1, 2)[~hit], clean_lse.transpose(1, 2)[~hit])


@pytest.mark.parametrize("kind", ["bool", "float", "documents"])
def test_fully_masked_rows(kind: str) -> None:
    """0, -inf and no gradient; the other rows as if those were not masked."""
    q, k, v = (torch.randn(2, 33, h, 16).requires_grad_() for h in (4, 2, 2))
    empty = torch.zeros(2, 33, dtype=torch.bool)
    empty[0, ::3], empty[1, 15:18] = True, True
    seen = torch.rand(2, 1, 33, 33) > 0.3
    closed = seen & ~empty[:, None, :, None]

    def attend(seen: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        keywords: dict[str, Any] = {"attn_mask": seen}
        if kind == "float":
            keywords = {"attn_mask": torch.zeros(seen.shape).masked_fill(~seen, -math.inf)}
        if kind == "documents":
            ids = torch.arange(33).div(11, rounding_mode="floor").expand(2, 33)
            keywords = {"document_ids": (torch.where(empty, 7, ids), ids)}
        return flash_attn_func(q, k, v, return_lse=True, **keywords)

    out, lse = attend(closed, empty)
    assert out[empty].eq(0).all()
    assert lse.transpose(1, 2)[empty].eq(-math.inf).all()
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert dq[empty].eq(0).all()
    plain, plain_lse = attend(seen, torch.zeros_like(empty))
    torch.testing.assert_close(out[~empty], plain[~empty])
    torch.testing.assert_close(lse.transpose(1, 2)[~empty], plain_lse.transpose(1, 2)[~empty])
    dout = dout.masked_fill(empty[..., None, None], 0.0)
    for a, b in zip((dq, dk, dv), torch.autograd.grad(plain, (q, k, v), dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@HALVES
@pytest.mark.parametrize("softcap", [0.05, 1000.0])
@pytest.mark.parametrize("window", [(-1, -1), (7, 0)])
def test_extreme_softcaps(softcap: float, window: tuple[int, int], dtype: torch.dtype) -> None:
    """A cap that flattens everything and one that changes nothing."""
    features = {"softcap": softcap, "window_size": window, "causal": True}
    assert_matches_reference(Case("cap", 37, 50, features=features).draw(41, dtype))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(24, 4096), (4096, 24)])
def test_steep_alibi_over_long_distances(seqlen_q: int, seqlen_k: int) -> None:
    """Slopes up to 8 over 4,000 tokens: scores down to -32,000."""
    case = Case("alibi", seqlen_q, seqlen_k, batch=1, heads=2, kv_heads=1, head_dim=8)
    problem = case.draw(43)
    problem.keywords["alibi_slopes"] = torch.tensor([8.0, 0.3])
    _assert_close_by_lse(problem)


@HALVES
def test_constant_values_come_back(dtype: torch.dtype) -> None:
    """Rows of P sum to 1: within 1 ulp in 16 bits, 8 in fp32 (a sum of 300 terms)."""
    q, k = (torch.randn(2, 300, h, 32).to(dtype) for h in (4, 2))
    v = torch.randn(2, 1, 2, 32).to(dtype).expand(2, 300, 2, 32)
    out = flash_attn_func(q, k, v, causal=True, window_size=(250, 0))
    expected = v.repeat_interleave(2, 2)
    ulps = 1 if dtype.itemsize == 2 else 8
    error = (out.double() - expected.double()).abs()
    assert (error <= ulps * torch.finfo(dtype).eps * expected.abs()).all()


def test_probabilities_sum_to_one() -> None:
    """With the unit matrix as v, out is P itself: rows sum to 1, masked ones are 0."""
    q, k = (torch.randn(1, 40, 2, 16) for _ in range(2))
    out = flash_attn_func(q, k, torch.eye(40)[None, :, None].repeat(1, 1, 2, 1), causal=True)
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 40, 2))
    assert out.transpose(1, 2).triu(1).eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-30])
def test_any_finite_scale(scale: float, causal: bool) -> None:
    """Masked scores stay masked whatever the scale: -inf * 0 is NaN, -inf * -1 is +inf."""
    case = Case("scale", 33, 33, features={"softmax_scale": scale, "causal": causal})
    assert_matches_reference(case.draw(46))


@pytest.mark.parametrize("causal", [False, True])
def test_fp32_is_fp32(causal: bool) -> None:
    """No shortcut through a shorter format: errors of 1e-6, where TF32 makes 1e-3."""
    problem = Case("fp32", 200, 300, features={"causal": causal}).draw(47)
    found, exact = run(problem), run_reference(problem)
    assert (found.out - exact.out).abs().max() < 2e-6
    assert (found.lse - exact.lse).abs().max() < 2e-6
    for name, grad in found.grads.items():
        assert (grad - exact.grads[name]).abs().max() < 2e-5, name


SIDES = (None, 0, 3, 20, 100, 2**63 - 1)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(37, 37), (20, 53), (53, 20)])
def test_every_window(seqlen_q: int, seqlen_k: int) -> None:
    """Every pair of sides, none and infinite ones among them, with gradients."""
    for left in SIDES:
        for right in SIDES:
            case = Case("window", seqlen_q, seqlen_k, heads=2, kv_heads=1, head_dim=8,
                        features={"window_size": (left, right)})  # fmt: skip
            problem = case.draw(49)
            results = assert_matches_reference(problem, f"window {left, right}:")
            sides = tuple(-1 if side is None else side for side in (left, right))
            problem.keywords["window_size"] = sides
            assert torch.equal(run(problem).out, results.out)


@pytest.mark.parametrize("window", [(2, 1), (0, 0), (4, 0)])
def test_rows_outside_every_window(window: tuple[int, int]) -> None:
    """Queries far before the first key: 0, -inf, no gradient, exactly."""
    q, k, v = (torch.randn(2, n, 2, 16).requires_grad_() for n in (50, 20, 20))
    out, lse = flash_attn_func(q, k, v, window_size=window, return_lse=True)
    first = 30 - window[1]
    assert out[:, :first].eq(0).all()
    assert lse[:, :, :first].eq(-math.inf).all()
    assert lse[:, :, first:].isfinite().all()
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert dq[:, :first].eq(0).all()
    assert dq[:, first:].isfinite().all()


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    """Also on rows that see no key: its weight exp(-inf) is 0, and so is its gradient."""
    q, k, v = (torch.randn(2, n, 2, 16).requires_grad_() for n in (50, 20, 20))
    sink = torch.tensor([-math.inf, 0.5], requires_grad=True)
    out, lse = flash_attn_func(q, k, v, causal=True, learnable_sink=sink, return_lse=True)
    plain, plain_lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out[:, :, 0], plain[:, :, 0])
    torch.testing.assert_close(lse[:, 0], plain_lse[:, 0])
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, sink), dout)
    exact = reference.attention(q, k, v, causal=True, learnable_sink=sink).out
    for a, b in zip(found, torch.autograd.grad(exact, (q, k, v, sink), dout.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
