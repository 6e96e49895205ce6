"""Every pair of lengths around the edges of tiles, on a GPU, with gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_varlen_func
from flashtile.testing import Case, assert_matches_reference, assert_within_budget, run

LONGEST, DIM = 130, 64


class _Sequences(NamedTuple):
    """One query length against every key length: keys padded to the longest."""

    q: Tensor  # (LONGEST, seqlen_q, DIM)
    k: Tensor  # (LONGEST, LONGEST, DIM)
    v: Tensor
    dout: Tensor
    there: Tensor  # (LONGEST, LONGEST) bool: sequence i has i + 1 keys
    seen: Tensor  # (LONGEST, seqlen_q, LONGEST)


def _sequences(seqlen_q: int, causal: bool, dtype: torch.dtype) -> _Sequences:
    g = torch.Generator("cuda").manual_seed(seqlen_q)
    q, k, v, dout = (
        torch.randn(LONGEST, n, DIM, device="cuda", generator=g).to(dtype)
        for n in (seqlen_q, LONGEST, LONGEST, seqlen_q)
    )
    slot = torch.arange(LONGEST, device="cuda")
    there = slot <= slot[:, None]
    seen = there[:, None, :].expand(-1, seqlen_q, -1)
    if causal:
        row = torch.arange(seqlen_q, device="cuda")[:, None]
        seen = seen & (slot <= row + (slot + 1 - seqlen_q)[:, None, None])
    return _Sequences(q, k, v, dout, there, seen)


def _eager(x: _Sequences, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of padded attention in a dtype, its softmax in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(dtype).requires_grad_() for t in x[:3])
    s = ((q * DIM**-0.5) @ k.transpose(1, 2)).to(wide).masked_fill(~x.seen, -math.inf)
    empty = ~x.seen.any(-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = p.to(dtype) @ v
    grads = torch.autograd.grad(out, (q, k, v), x.dout.to(dtype))
    return out.detach(), s.detach().logsumexp(-1), *grads


def _pack(all_of_them: list[_Sequences]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """q, k, v with one head; dout; and the offsets of every (query length, key length) pair."""
    q = torch.cat([x.q.flatten(0, 1) for x in all_of_them])
    dout = torch.cat([x.dout.flatten(0, 1) for x in all_of_them])
    k, v = (torch.cat([t[x.there] for x, t in pairs]) for pairs in (
        [(x, x.k) for x in all_of_them], [(x, x.v) for x in all_of_them]))  # fmt: skip
    lengths_q = torch.cat([torch.full((LONGEST,), x.q.shape[1]) for x in all_of_them])
    lengths_k = torch.arange(1, LONGEST + 1).repeat(len(all_of_them))
    cu_q, cu_k = (
        torch.cat((torch.zeros(1), n.cumsum(0))).to("cuda", torch.int32)
        for n in (lengths_q, lengths_k)
    )
    leaves = [t[:, None].detach().requires_grad_() for t in (q, k, v)]
    return leaves, dout[:, None], cu_q, cu_k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_pair_of_lengths(causal: bool, dtype: torch.dtype) -> None:
    """Case 9: 1 to 130 queries against 1 to 130 keys, 16,900 sequences in one call, the worst row
    of each query length judged by itself."""
    by_length = [_sequences(n, causal, dtype) for n in range(1, LONGEST + 1)]
    leaves, dout, cu_q, cu_k = _pack(by_length)
    out, lse = flash_attn_varlen_func(
        *leaves, cu_q, cu_k, LONGEST, LONGEST, causal=causal, return_lse=True
    )
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    row = key = 0
    for x in by_length:
        rows, seqlen_q = LONGEST * x.q.shape[1], x.q.shape[1]
        keys = int(x.there.sum())
        exact, eager = _eager(x, torch.float64), _eager(x, dtype)
        found = [t[row : row + rows, 0].view_as(x.q) for t in (out, dq)]
        found += [torch.zeros_like(x.k) for _ in range(2)]
        for padded, packed in zip(found[2:], (dk, dv), strict=True):
            padded[x.there] = packed[key : key + keys, 0]
        found.insert(1, lse[0, row : row + rows].view(LONGEST, seqlen_q))
        names = ("out", "lse", "dq", "dk", "dv")
        for name, a, e, g in zip(names, found, eager, exact, strict=True):
            assert_within_budget(a, e, g, f"{seqlen_q} queries: {name}", name in ("dq", "dk", "dv"))
        row, key = row + rows, key + keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_far_below_zero_beside_padding(
    packed: bool, causal: bool, dtype: torch.dtype
) -> None:
    """Lengths that leave 1, 63, 64, 65 and 127 rows in a tile of 128, all logits near -120: what
    a tile pads with scores 0, and exp(0 + 120) is infinite (pytorch#196678, trl#7181)."""
    for length in (129, 191, 192, 193, 255):
        lengths = ((length, length), (length - 64, length)) if packed else ()
        case = Case("far", length, length, head_dim=64, lengths=lengths,
                    features={"softmax_scale": 1.0, "causal": causal})  # fmt: skip
        problem = case.draw(length, torch.float32, "cuda")
        q, k = (problem.tensors[n].mul_(0.1) for n in "qk")
        q[..., 0], k[..., 0] = 8.0, -15.0
        tensors = {n: x.to(dtype) for n, x in problem.tensors.items()}
        found = run(problem._replace(tensors=tensors))
        seen = found.lse.isfinite()
        assert found.lse[seen].max() < -100
        for name, x in (("out", found.out), *found.grads.items()):
            assert x.isfinite().all(), name
            assert x.abs().max() < 1000, name
        if dtype != torch.float32:
            assert_matches_reference(problem._replace(tensors=tensors), f"{length}")


@pytest.mark.parametrize("longest", [17, 300, None], ids=str)
def test_any_bound_of_the_lengths(longest: int | None) -> None:
    """Case 53: a max_seqlen that is too large, or absent, changes no bit."""
    lengths = ((17, 12), (0, 8), (13, 17))
    problem = Case("bound", lengths=lengths, head_dim=64, features={"causal": True}).draw(
        1, torch.bfloat16, "cuda"
    )
    expected = run(problem)
    bounds = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    found = run(problem._replace(keywords=problem.keywords | bounds))
    assert torch.equal(found.out, expected.out)
    for a, b in zip(found.grads.values(), expected.grads.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_out_of_use(dtype: torch.dtype) -> None:
    """seqused: rows past it, and past the last offset, are NaN and never read; results there are 0
    and -inf, gradients 0."""
    case = Case("used", lengths=((150, 200), (9, 300), (70, 5)), head_dim=64,
                features={"causal": True})  # fmt: skip
    problem = case.draw(2, dtype, "cuda")
    used = {"q": (130, 0, 70), "k": (129, 300, 0)}
    there = {}
    for side, counts in used.items():
        cu = problem.keywords[f"cu_seqlens_{side}"].tolist()
        there[side] = torch.zeros(cu[-1] + 7, dtype=torch.bool, device="cuda")
        for start, count in zip(cu, counts, strict=False):
            there[side][start : start + count] = True
        problem.keywords[f"seqused_{side}"] = torch.tensor(counts, dtype=torch.int32, device="cuda")
    for name, x in problem.tensors.items():
        longer = torch.cat((x, x[:7]))
        longer[~there["q" if name == "q" else "k"]] = math.nan
        problem.tensors[name] = longer
    results = assert_matches_reference(problem)
    assert results.out[~there["q"]].eq(0).all()
    assert results.lse[:, ~there["q"]].eq(-math.inf).all()
    for name, grad in results.grads.items():
        assert grad[~there["q" if name == "q" else "k"]].eq(0).all()
