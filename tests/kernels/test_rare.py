"""What few calls have: scores far above 0, NaN where nothing is seen, odd strides, narrow V."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from flashtile import (
    MaskFunction,
    ScoreFunction,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)
from flashtile.kernels.masks import Range
from flashtile.testing import Case, fence
from flashtile.testing.allocations import assert_touches_nothing_else


@pytest.mark.parametrize(("dtype", "level"), [(torch.float16, 12.0), (torch.float32, 100.0)])
def test_biases_far_above_zero(dtype: torch.dtype, level: float) -> None:
    """Rows past the end of the queries score the bias, and exp(12) is infinite in fp16."""
    problem = Case("bias", 17, 20, 1, 2, 1, 8).draw(1, dtype)
    q, k, v = (x.requires_grad_() for x in problem.tensors.values())
    bias = torch.full((1, 1, 1, 20), level, requires_grad=True)
    out = flash_attn_func(q, k, v, bias=bias)
    golden = reference.attention(q, k, v, bias=bias).out
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v, bias), dout)
    expected = torch.autograd.grad(golden, (q, k, v, bias), dout.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-2, rtol=2e-2)


def test_negative_slopes_of_rows_out_of_use() -> None:
    q, k, v = (torch.randn(40, 2, 8, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
    used, slopes = torch.tensor([10, 13], dtype=torch.int32), torch.tensor([-8.0, -8.0])
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, seqused_q=used,
                                 alibi_slopes=slopes)  # fmt: skip
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("sink", [False, True])
def test_nan_gradients_of_lse_where_no_key_is_seen(sink: bool) -> None:
    """As torch.logaddexp has them where both sides are -inf."""
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (20, 12, 12))
    logits = torch.full((2,), -math.inf, requires_grad=True)
    more: dict[str, Any] = {"learnable_sink": logits} if sink else {}
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True, **more)
    dlse = torch.ones_like(lse).masked_fill(lse == -math.inf, math.nan)
    leaves = (q, k, v, logits) if sink else (q, k, v)
    for grad in torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), dlse)):
        assert grad.isfinite().all()


@triton.jit
def _even(at, args):
    return (at.k_idx + at.q_idx) % 2 == 0


@triton.jit
def _never_full(first, last, q, k, args):
    return Range(0, 2147483647, 2147483647, 2147483647)


def test_a_range_whose_full_part_begins_nowhere() -> None:
    mask = MaskFunction(_even, keys=_never_full, queries=_never_full,
                        eager=lambda at, _: (at.k_idx + at.q_idx) % 2 == 0)  # fmt: skip
    case = Case("range", 40, 40, 1, 2, 1, 8, features={"mask_mod": mask})
    assert_touches_nothing_else(case.draw(2))


@triton.jit
def _hotter(s, at, args):
    return s * tl.load(args[0] + at.q_idx) * tl.load(args[1] + at.k_idx)


@triton.jit
def _hotter_slope(before, after, at, args):
    return tl.load(args[0] + at.q_idx) * tl.load(args[1] + at.k_idx)


def test_functions_that_read_a_number_of_each_token() -> None:
    """Nothing is read past the last one."""
    args = tuple(fence(torch.rand(n) + 0.5).tensor for n in (20, 36))
    eager = (
        lambda s, at, args: s * args[0][at.q_idx].to(s.dtype) * args[1][at.k_idx].to(s.dtype),
        lambda before, after, at, args: (args[0][at.q_idx] * args[1][at.k_idx]).to(before.dtype),
    )
    score_mod = ScoreFunction(_hotter, _hotter_slope, args, eager)
    case = Case("tokens", 20, 36, 1, 2, 1, 8, features={"score_mod": score_mod})
    assert_touches_nothing_else(case.draw(3))


@pytest.mark.parametrize(("dim", "dim_v"), [(128, 64), (72, 8), (576, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_latent_values_narrower_than_padded_keys(dim: int, dim_v: int, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 1, 4, dim).half(), torch.randn(2, 300, 1, dim).to(dtype)
    with torch.no_grad():
        found = flash_attn_with_kvcache(q, k, k[..., :dim_v])
        golden, _, _ = reference.attention_with_kvcache(q, k, k[..., :dim_v])
    torch.testing.assert_close(found.double(), golden.out, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(("dim", "dim_v"), [(17, 17), (24, 17)])
def test_e4m3_at_odd_addresses(dim: int, dim_v: int) -> None:
    q = torch.randn(2, 1, 4, dim)
    caches = [torch.randn(2, 40, 1, d).to(torch.float8_e4m3fn) for d in (dim, dim_v)]
    found = flash_attn_with_kvcache(q, *caches, num_splits=2)
    golden, _, _ = reference.attention_with_kvcache(q, *caches)
    torch.testing.assert_close(found, golden.out.float(), atol=1e-5, rtol=1e-5)


def test_gradients_of_full_pages() -> None:
    q, k, v = (torch.randn(n, m, 2, 8, requires_grad=True) for n, m in ((2, 3), (6, 8), (6, 8)))
    table = torch.randperm(6)[:4].view(2, 2).int()
    out = flash_attn_with_kvcache(q, k, v, block_table=table)
    golden, _, _ = reference.attention_with_kvcache(q, k, v, block_table=table)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(golden.out, (q, k, v), dout.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
