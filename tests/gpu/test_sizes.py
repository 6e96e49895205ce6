"""Nothing, next to nothing and very much, on a GPU: emptiness, grids, 64-bit addresses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, reference
from flashtile.testing import Case, Problem, assert_matches_reference, poisoned_allocations, run

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    """Other workers share the GPU's memory."""
    yield
    torch.cuda.empty_cache()


def _needs(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def _randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _assert_close(found: Tensor, expected: Tensor, share: float = 0.02) -> None:
    """Every element within a share of the largest, or of 1e-3 where all are exactly 0."""
    error = (found.float() - expected.float()).abs().max()
    assert error <= share * expected.float().abs().max().clamp_min(1e-3), float(error)


STRIDES = {
    "batch": (2**31 + 128, 256, 64, 1),
    "token": (130 * (2**24 + 128), 2**24 + 128, 64, 1),
    "head": (130 * 64, 64, 2**30 + 128, 1),
}


@pytest.mark.parametrize("dimension", STRIDES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_beyond_32_bits(dimension: str, name: str) -> None:
    """Case 17: a stride of each dimension in turn reaches past 2^31 elements."""
    _needs(14)
    shape, stride = (2, 130, 4, 64), STRIDES[dimension]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    assert last > 2**31
    x = {n: _randn(*shape) for n in "qkv"}
    expected = run(Problem(x, {"causal": True}, False))
    memory = torch.empty(last + 1, dtype=BF16, device="cuda")
    far = memory.as_strided(shape, stride).copy_(x[name])
    found = run(Problem({**x, name: far}, {"causal": True}, False))
    assert torch.equal(found.out, expected.out)
    for grad, wanted in zip(found.grads.values(), expected.grads.values(), strict=True):
        _assert_close(grad, wanted)


def test_dout_beyond_32_bits() -> None:
    """FA #2611: the gradient of a slice of a very wide tensor."""
    _needs(12)
    q, k, v = (_randn(2, 130, h, 64).requires_grad_() for h in (4, 2, 2))
    out = flash_attn_func(q, k, v, causal=True)
    memory = torch.empty(2**31 + 2**20, dtype=BF16, device="cuda")
    dout = memory.as_strided(out.shape, (2**31, 256, 64, 1)).copy_(_randn(*out.shape))
    found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), dout.contiguous())
    for a, b in zip(found, expected, strict=True):
        _assert_close(a, b)


def test_tensors_beyond_32_bits() -> None:
    """Case 19: more than 2^31 elements in q, k, v, out and every gradient."""
    _needs(48)
    batch, tokens, heads, dim = 33_000, 64, 16, 64
    assert batch * tokens * heads * dim > 2**31
    q, k, v = (_randn(batch, tokens, heads, dim).requires_grad_() for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout := out.detach())
    for first in (0, batch // 2, batch - 2):
        part = slice(first, first + 2)
        some = [x.detach()[part].requires_grad_() for x in (q, k, v)]
        alone = flash_attn_func(*some, causal=True)
        assert torch.equal(alone, out[part])
        for a, b in zip(torch.autograd.grad(alone, some, dout[part]), grads, strict=True):
            assert torch.equal(a, b[part])
        exact = reference.attention(*(x.detach() for x in some), causal=True, dtype=torch.float32)
        _assert_close(alone, exact.out)


def test_packed_tokens_beyond_32_bits() -> None:
    """Case 19, packed: the last of many sequences lies past 2^31 elements."""
    _needs(30)
    sequences, tokens, heads, dim = 4_300, 64, 64, 128
    assert sequences * tokens * heads * dim > 2**31
    q, k, v = (_randn(sequences * tokens, heads, dim) for _ in range(3))
    cu = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * tokens
    out = flash_attn_varlen_func(q, k, v, cu, cu, tokens, tokens, causal=True)
    for first in (0, sequences // 2, sequences - 1):
        rows = slice(first * tokens, (first + 1) * tokens)
        alone = flash_attn_func(q[None, rows], k[None, rows], v[None, rows], causal=True)
        _assert_close(out[rows], alone[0])


def test_a_mask_beyond_32_bits() -> None:
    """2.4e9 elements: a lower triangle given as a tensor is the causal mask."""
    _needs(12)
    tokens = 49_152
    q, k, v = (_randn(1, tokens, 1, 64).requires_grad_() for _ in range(3))
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril_()
    out = flash_attn_func(q, k, v, attn_mask=mask)
    expected = flash_attn_func(q, k, v, causal=True)
    _assert_close(out, expected)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        _assert_close(a, b)


@pytest.mark.parametrize(("batch", "heads"), [(65_536, 1), (1, 70_000), (280, 250)])
@pytest.mark.parametrize("seqlen", [1, 5, 16])
def test_more_than_65535_heads(batch: int, heads: int, seqlen: int) -> None:
    """Case 15: every row is computed, none is left as it was allocated."""
    q, k, v = (_randn(batch, seqlen, heads, 16).requires_grad_() for _ in range(3))
    with poisoned_allocations():
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    one = [x.detach().transpose(0, 1).flatten(1, 2)[None].requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*one, causal=True, dtype=torch.float32)

    def unfold(x: Tensor) -> Tensor:
        return x[0].unflatten(1, (batch, heads)).transpose(0, 1)

    _assert_close(out, unfold(exact.out))
    torch.testing.assert_close(lse, exact.lse[0].unflatten(0, (batch, heads)), rtol=0, atol=1e-4)
    expected = torch.autograd.grad(exact.out.sum(), one)
    for grad, x in zip(grads, expected, strict=True):
        _assert_close(grad, unfold(x))


def test_ten_thousand_sequences_of_one_token() -> None:
    """Case 57: out is v, dv is dout, and nothing flows to q and k."""
    q, k, v = (_randn(10_000, 2, 64).requires_grad_() for _ in range(3))
    cu = torch.arange(10_001, dtype=torch.int32, device="cuda")
    with poisoned_allocations():
        out, lse = flash_attn_varlen_func(q, k, v, cu, cu, causal=True, return_lse=True)
        dout = torch.randn_like(out)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, ((q.float() * k.float()).sum(-1) / 8).T, rtol=0, atol=1e-4)
    _assert_close(dv, dout)
    for x in (dq, dk):
        assert x.abs().max() < 1e-1


def test_one_long_sequence_among_short_ones() -> None:
    """Case 57, imbalanced: 50,000 tokens beside 999 sequences of one."""
    long, short = 50_000, 999
    q, k, v = (_randn(long + short, 1, 64) for _ in range(3))
    cu = torch.cat((_ints(0), torch.arange(long, long + short + 1, device="cuda").int()))
    out = flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
    alone = flash_attn_func(q[None, :long], k[None, :long], v[None, :long], causal=True)
    _assert_close(out[:long], alone[0])
    assert torch.equal(out[long:], v[long:])


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_sequences_without_queries_or_keys(dtype: torch.dtype) -> None:
    """Cases 5 and 7: any of the lengths is 0, the first and the last included."""
    lengths = ((0, 0), (5, 0), (0, 9), (130, 257), (0, 0), (1, 0), (64, 64), (0, 130), (3, 0))
    for features in ({}, {"causal": True}):
        case = Case("zero", heads=6, lengths=lengths, head_dim=64, features=features)
        with poisoned_allocations():
            results = assert_matches_reference(case.draw(5, dtype, "cuda"))
        assert results.out[:5].eq(0).all()
        assert results.lse[:, :5].eq(-math.inf).all()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads", "kv_heads"),
    [(2, 0, 9, 4, 2), (2, 5, 0, 4, 2), (2, 0, 0, 4, 2), (0, 5, 5, 4, 2), (2, 5, 5, 0, 2),
     (2, 5, 5, 0, 0)],
)  # fmt: skip
def test_empty_dimensions(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, causal: bool, sink: bool
) -> None:
    """Cases 1 and 3: results and gradients of the right shapes, 0 where there is anything."""
    q, k, v = (_randn(batch, n, h, d).requires_grad_() for n, h, d in (
        (seqlen_q, heads, 64), (seqlen_k, kv_heads, 64), (seqlen_k, kv_heads, 32)))  # fmt: skip
    logits = _randn(heads).requires_grad_()
    with poisoned_allocations():
        out, lse = flash_attn_func(
            q, k, v, causal=causal, return_lse=True, learnable_sink=logits if sink else None
        )
        leaves = (q, k, v, logits) if sink else (q, k, v)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (batch, seqlen_q, heads, 32)
    assert out.eq(0).all()
    expected = logits.float() if sink else torch.full((heads,), -math.inf, device="cuda")
    torch.testing.assert_close(lse, expected[:, None].expand(batch, heads, seqlen_q))
    for grad, x in zip(grads, leaves, strict=True):
        assert grad.shape == x.shape
        assert grad.eq(0).all()


@pytest.mark.parametrize(("total", "cu"), [(0, (0,)), (0, (0, 0, 0)), (5, (0,)), (5, (0, 0))])
def test_packed_and_empty(total: int, cu: tuple[int, ...]) -> None:
    """No sequences, sequences of nothing, and rows that belong to none of them."""
    q, k, v = (_randn(total, h, 64).requires_grad_() for h in (4, 2, 2))
    with poisoned_allocations():
        out, lse = flash_attn_varlen_func(q, k, v, _ints(*cu), _ints(*cu), return_lse=True)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()
    assert all(grad.eq(0).all() for grad in grads)
