"""dQ in sums of integers, of numbers of many sizes: as good as in sums of floats, and what is not
finite there is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile import ScoreFunction, flash_attn_func

BF16, FP16 = torch.bfloat16, torch.float16
TOKENS = 700


@pytest.fixture(autouse=True)
def _only_hopper(backend: str) -> None:
    if backend != "hopper":
        pytest.skip("the portable kernels sum dQ in one program")


@triton.jit
def gain(s, at, args):
    return s * tl.load(args[0] + at.head)


@triton.jit
def gain_slope(before, after, at, args):
    return tl.load(args[0] + at.head)


class Inputs(NamedTuple):
    q: Tensor  # (2, TOKENS, 4 or 2 heads, dim)
    k: Tensor
    v: Tensor
    dout: Tensor


def _times(name: str, index: Any, factor: float) -> Callable[[Inputs], None]:
    """Multiply a part of one of the inputs."""

    def change(x: Inputs) -> None:
        part = getattr(x, name)[index]
        getattr(x, name)[index] = (part.float() * factor).to(part.dtype)

    return change


def _is(name: str, index: Any, value: float) -> Callable[[Inputs], None]:
    def change(x: Inputs) -> None:
        getattr(x, name)[index] = value

    return change


def _hidden(*keys: int) -> Tensor:
    seen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    seen[..., keys[0] : keys[-1] + 1] = False
    return seen


ALL = slice(None)
CAUSAL = {"causal": True}
CASES: dict[str, tuple[list[Callable[[Inputs], None]], dict[str, Any]]] = {
    "normal": ([], CAUSAL),
    "a value of 1e3": ([_times("v", (ALL, 350), 1e3)], {}),
    "a value of 1e5 that some rows see": ([_times("v", (ALL, 350), 1e5)], CAUSAL),
    "a key and a value": ([_times("v", (ALL, 350), 3e3), _times("k", (ALL, 350), 30)], CAUSAL),
    "a channel of 100": (
        [_times("k", (..., 3), 100.0), _times("q", (..., 3), 0.01)], CAUSAL,
    ),
    "rows of dO": ([_times("dout", (ALL, slice(0, 700, 77)), 1e4)], {}),
    "dO of 0": ([_times("dout", (ALL, slice(0, 600)), 0.0)], {}),
    "dO of 1e-20": ([_times("dout", ALL, 1e-20)], {}),
    "dO of 1e20": ([_times("dout", ALL, 1e20)], {}),
    "values of 1e-25": ([_times("v", ALL, 1e-25)], {}),
    "no values": ([_times("v", ALL, 0.0)], {}),
    "no keys": ([_times("k", ALL, 0.0)], {}),
    "sharp": ([_times("q", ALL, 30.0)], {}),
    "hidden values of 1e30": ([_is("v", (ALL, 77), 1e30)], {"attn_mask": _hidden(77)}),
    "hidden keys of 1e20": ([_is("k", (ALL, 77), 1e20)], {"attn_mask": _hidden(77)}),
    "tiles that are hidden": (
        [_is("v", (ALL, slice(256, 512)), math.nan)], {"attn_mask": _hidden(256, 511)},
    ),
    "NaN in a value": ([_is("v", (ALL, 500, 0), math.nan)], CAUSAL),
    "inf in a key": ([_is("k", (ALL, 500, 0, 3), math.inf)], CAUSAL),
    "NaN in a query": ([_is("q", (0, 300, 1), math.nan)], {}),
    "NaN in dO": ([_is("dout", (0, 300, 1, 5), math.nan)], {}),
    "slopes": ([], {"score_mod": (0.5, 1.5)}),
    "steep slopes": ([], {"score_mod": (9.0, 30.0)}),
}  # fmt: skip


def _dq(x: Inputs, keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    """The gradients, which are the same bits in five more runs where they should be."""
    leaves = [t.requires_grad_() for t in x[:3]]
    out = flash_attn_func(*leaves, **keywords)
    first = torch.autograd.grad(out, leaves, x.dout, retain_graph=True)
    for _ in range(5 if keywords["deterministic"] else 0):
        again = torch.autograd.grad(out, leaves, x.dout, retain_graph=True)
        for a, b in zip(again, first, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    return first


def _exact(x: Inputs, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(dQ in fp64, what errors of rows of it are measured by: of a row that sees one key it is 0,
    and its error that of delta)."""
    q, k, v, dout = (t.detach().double().transpose(1, 2) for t in x)
    q.requires_grad_()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    if (gains := keywords.get("score_mod")) is not None:
        s = s * torch.linspace(*gains, 4, device=s.device, dtype=s.dtype)[:, None, None]
    seen = keywords.get("attn_mask", torch.ones_like(s, dtype=torch.bool)).to(s.device)
    seen = seen.tril() if keywords.get("causal") else seen
    out = torch.softmax(s.masked_fill(~seen, -math.inf), -1) @ v.masked_fill(v.isnan(), 0.0)
    (dq,) = torch.autograd.grad(out, q, dout)
    size = 4.0 * out.detach().norm(dim=-1) * dout.norm(dim=-1) * k.nan_to_num().abs().median()
    return dq.transpose(1, 2), size.transpose(1, 2) * q.shape[-1] ** -0.5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_are_as_good_as_in_sums_of_floats(dim: int, name: str) -> None:
    generator = torch.Generator("cuda").manual_seed(dim)
    shapes = [(2, TOKENS, heads, dim) for heads in (4, 2, 2, 4)]
    x = Inputs(*(
        torch.randn(shape, generator=generator, device="cuda", dtype=BF16) for shape in shapes
    ))  # fmt: skip
    changes, keywords = CASES[name]
    for change in changes:
        change(x)
    given = dict(keywords)
    if "attn_mask" in given:
        given["attn_mask"] = given["attn_mask"].cuda()
    if "score_mod" in given:
        given["score_mod"] = ScoreFunction(
            gain, gain_slope, (torch.linspace(*given["score_mod"], 4, device="cuda"),)
        )
    same, default = (_dq(x, {**given, "deterministic": n}) for n in (True, False))
    for got, wanted in zip(same[1:], default[1:], strict=True):
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
    # By default rows of the tiles that a key is hidden from may have NaN of it: 0 times inf.
    finite = default[0].isfinite()
    assert bool(same[0].isfinite()[finite].all())
    for rows in (slice(300, 301), slice(512, TOKENS)):
        assert torch.equal(same[0].isnan()[:, rows], default[0].isnan()[:, rows])
    exact, size = _exact(x, keywords)
    errors = [
        ((dq.double() - exact) * finite).nan_to_num().norm(dim=-1) for dq in (same[0], default[0])
    ]
    allowed = 2.0 * errors[1] + 1e-3 * exact.nan_to_num().norm(dim=-1) + 1e-6 * size.nan_to_num()
    assert bool((errors[0] <= allowed).all())


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_is_too_large_for_fp16_is_infinite(dim: int) -> None:
    """dS is, and dQ of one key more than of the other."""
    q = torch.zeros(1, 64, 1, dim, device="cuda", dtype=FP16)
    k, v = (torch.full((1, 2, 1, dim), n, device="cuda", dtype=FP16) for n in (0.5, 30.0))
    k[:, 1], v[:, 1] = -0.5, -30.0
    x = Inputs(q, k, v, torch.full_like(q, 100.0))
    same, default = (_dq(x, {"deterministic": n})[0] for n in (True, False))
    assert default.isinf().any()
    assert torch.equal(same, default)


def test_probabilities_of_huge_scores_may_sum_to_more_than_two() -> None:
    """Those of scores of 8.7e6, where fp32 has steps of 1: the sign of dQ is that of their sum."""
    q, k, v = (torch.zeros(1, 256, 1, 128, device="cuda", dtype=BF16) for _ in range(3))
    q[..., :127] = 880.0
    k[:, (0, 128)] = 880.0
    k[:, 128, :, 127] = -880.0
    v[:, 0], v[:, 128] = 1.0, -1.0
    x = Inputs(q, k, v, torch.ones_like(q))
    same, default = (_dq(x, {"deterministic": n})[0] for n in (True, False))
    torch.testing.assert_close(same.float(), default.float(), rtol=0.02, atol=1e-3)
