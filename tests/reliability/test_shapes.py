"""Reliability, shapes: nothing, next to nothing, and very many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, reference
from flashtile.testing import Case, assert_matches_reference, poisoned_allocations


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
def test_no_queries(causal: bool) -> None:
    """Empty out and lse; the gradients of keys and values are exactly 0."""
    q, k, v, bias = _leaf(2, 0, 4, 16), _leaf(2, 9, 2, 16), _leaf(2, 9, 2, 8), _leaf(1, 4, 0, 9)
    out, lse = flash_attn_func(q, k, v, causal=causal, bias=bias, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 4, 8), (2, 4, 0))
    (out.sum() + lse.sum()).backward()
    for x in (q, k, v, bias):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("sink", [False, True])
def test_no_keys(sink: bool) -> None:
    """Without keys: 0 and -inf, or the sink's logit."""
    q, k, v = _leaf(2, 5, 4, 16), _leaf(2, 0, 2, 16), _leaf(2, 0, 2, 8)
    logit = _leaf(4) if sink else None
    out, lse = flash_attn_func(q, k, v, learnable_sink=logit, return_lse=True)
    expected = torch.full((4,), -math.inf) if logit is None else logit
    assert out.shape == (2, 5, 4, 8)
    assert out.eq(0).all()
    assert torch.equal(lse, expected[:, None].expand(2, 4, 5))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.eq(0).all()


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(0, 4, 2), (2, 0, 2), (2, 0, 0)])
@pytest.mark.parametrize("varlen", [False, True])
def test_empty_dimensions(varlen: bool, batch: int, heads: int, kv_heads: int) -> None:
    """No batch, no heads: results and gradients of that shape."""
    q, k, v = (_leaf(batch, 5, h, d) for h, d in ((heads, 8), (kv_heads, 8), (kv_heads, 6)))
    if varlen:
        cu = _ints([5 * b for b in range(batch + 1)])
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = flash_attn_varlen_func(*packed, cu, cu, causal=True, return_lse=True)
        assert (out.shape, lse.shape) == ((5 * batch, heads, 6), (heads, 5 * batch))
    else:
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
        assert (out.shape, lse.shape) == ((batch, 5, heads, 6), (batch, heads, 5))
    (out.sum() + lse.sum()).backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_values_without_dimensions() -> None:
    """No head_dim_v is an error, as no head_dim is."""
    q, k, v = (torch.randn(2, 5, 2, dim) for dim in (8, 8, 0))
    with pytest.raises(ValueError, match="v has head_dim 0; it must be at least 1"):
        flash_attn_func(q, k, v)


def test_some_sequences_have_no_keys() -> None:
    """Their rows are 0, -inf and without gradient; their neighbours are untouched."""
    lengths = ((3, 0), (4, 6), (2, 0), (5, 5), (1, 0))
    cu_q, cu_k = (_ints([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True))
    q, k, v = _leaf(15, 4, 16), _leaf(11, 2, 16), _leaf(11, 2, 16)
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    empty = torch.zeros(15, dtype=torch.bool)
    for b in (0, 2, 4):
        empty[cu_q[b] : cu_q[b + 1]] = True
    assert out[empty].eq(0).all()
    assert lse[:, empty].eq(-math.inf).all()
    assert dq[empty].eq(0).all()
    kept_q, kept_k = _ints([0, 4, 9]), _ints([0, 6, 11])
    rest = q.detach()[~empty].requires_grad_()
    alone, alone_lse = flash_attn_varlen_func(
        rest, k, v, kept_q, kept_k, causal=True, return_lse=True
    )
    assert torch.equal(out[~empty], alone)
    assert torch.equal(lse[:, ~empty], alone_lse)
    grads = torch.autograd.grad(alone, (rest, k, v), dout[~empty])
    for a, b in zip((dq[~empty], dk, dv), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_with_idle_sequences(dtype: torch.dtype) -> None:
    """Of at most one query: some sequences have no query, 3 heads share one (FA #1537)."""
    lengths = ((1, 33), (0, 7), (1, 1), (0, 0), (1, 129), (0, 64))
    case = Case("idle", heads=6, kv_heads=2, head_dim=64, lengths=lengths)
    problem = case.draw(7, dtype)
    problem.keywords["max_seqlen_q"] = 1
    assert_matches_reference(problem)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_every_pair_of_lengths(causal: bool) -> None:
    """1 to 17 queries against 1 to 130 keys, row by row against padded fp64 attention."""
    keys = torch.arange(1, 131)
    k, v = (torch.randn(130, 130, 64) for _ in range(2))
    there = keys[None, :] - 1 < keys[:, None]  # (sequence, slot)
    cu_k = _ints([0, *keys.tolist()]).cumsum(0).int()
    for seqlen_q in range(1, 18):
        q = torch.randn(130, seqlen_q, 64)
        s = torch.einsum("bqd,bkd->bqk", q.double() / 8, k.double())
        seen = there[:, None, :].expand_as(s)
        if causal:
            row = torch.arange(seqlen_q)[None, :, None] + keys[:, None, None] - seqlen_q
            seen = seen & (keys - 1 <= row)
        s = s.masked_fill(~seen, -math.inf)
        expected = s.softmax(-1).nan_to_num() @ v.double()
        cu_q = torch.arange(131, dtype=torch.int32) * seqlen_q
        out, lse = flash_attn_varlen_func(
            q.reshape(-1, 1, 64), k[there][:, None], v[there][:, None], cu_q, cu_k,
            causal=causal, return_lse=True,
        )  # fmt: skip
        assert (out.view_as(expected) - expected).abs().max() < 2e-6
        torch.testing.assert_close(lse.view(130, -1).double(), s.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 1), (8, 1), (15, 3), (24, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_more_groups(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Ratios 5 and 8, with one and several KV heads."""
    case = Case("group", 19, 35, heads=heads, kv_heads=kv_heads, features={"causal": True})
    assert_matches_reference(case.draw(heads, dtype))


@pytest.mark.parametrize(("batch", "heads"), [(65535, 1), (65536, 1), (1, 70000), (280, 250)])
@pytest.mark.parametrize("seqlen", [1, 5])
def test_more_than_65535_heads(batch: int, heads: int, seqlen: int) -> None:
    """Every row is computed, none is left as it was allocated."""
    q, k, v = (_leaf(batch, seqlen, heads, 4) for _ in range(3))
    with poisoned_allocations():
        out, lse = flash_attn_func(q, k, v, causal=True, softcap=5.0, return_lse=True)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    one = [x.detach().transpose(0, 1).flatten(1, 2)[None].requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*one, causal=True, softcap=5.0, dtype=torch.float32)

    def unfold(x: Tensor) -> Tensor:
        return x[0].unflatten(1, (batch, heads)).transpose(0, 1)

    torch.testing.assert_close(out, unfold(exact.out))
    torch.testing.assert_close(lse, exact.lse[0].unflatten(0, (batch, heads)))
    expected = torch.autograd.grad(unfold(exact.out), one, dout)
    for grad, x in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, unfold(x), rtol=1e-4, atol=1e-5)


def test_ten_thousand_sequences_of_one_token() -> None:
    """Out is v, lse the one score, dv is dout and nothing flows to q and k."""
    q, k, v = (_leaf(10_000, 2, 8) for _ in range(3))
    cu = torch.arange(10_001, dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, cu, cu, causal=True, return_lse=True)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, ((q * k).sum(-1) / math.sqrt(8)).T)
    torch.testing.assert_close(dv, dout)
    for x in (dq, dk):
        assert x.abs().max() < 1e-5


def test_one_long_sequence_among_short_ones() -> None:
    """3,000 tokens among 999 of one each: the long one as if alone, the short ones their value."""
    long, short = 3000, 999
    q, k, v = (torch.randn(long + short, 1, 8) for _ in range(3))
    cu = torch.cat((_ints([0]), torch.arange(long, long + short + 1).int()))
    out = flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
    alone = flash_attn_func(q[None, :long], k[None, :long], v[None, :long], causal=True)
    assert torch.equal(out[:long], alone[0])
    assert torch.equal(out[long:], v[long:])
