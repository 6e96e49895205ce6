"""The reference itself, against independent formulas and torch's own attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile import reference


def _qkv(seqlen_q: int = 13, seqlen_k: int = 13, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    return [
        torch.randn(2, n, h, 8, dtype=torch.float64)
        for n, h in ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    ]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **keywords: object) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **keywords).transpose(1, 2)


@pytest.mark.parametrize("seqlen_k", [13, 29])
def test_agrees_with_sdpa(seqlen_k: int) -> None:
    q, k, v = _qkv(seqlen_k=seqlen_k)
    torch.testing.assert_close(reference.attention(q, k, v).out, _sdpa(q, k, v))
    mask = torch.ones(13, seqlen_k, dtype=torch.bool).tril(seqlen_k - 13)
    causal = reference.attention(q, k, v, causal=True).out
    torch.testing.assert_close(causal, _sdpa(q, k, v, attn_mask=mask))


def test_bias_and_masks_agree_with_sdpa() -> None:
    q, k, v = _qkv()
    bias = torch.randn(1, 4, 13, 13, dtype=torch.float64)
    expected = _sdpa(q, k, v, attn_mask=bias)
    torch.testing.assert_close(reference.attention(q, k, v, bias=bias).out, expected)
    torch.testing.assert_close(reference.attention(q, k, v, attn_mask=bias).out, expected)
    keep = torch.rand(2, 1, 13, 13) > 0.3
    keep[..., 0] = True
    expected = _sdpa(q, k, v, attn_mask=keep)
    torch.testing.assert_close(reference.attention(q, k, v, attn_mask=keep).out, expected)


@pytest.mark.parametrize(("left", "right"), [(3, 2), (0, 0), (-1, 4), (5, -1), (None, 0), (40, 40)])
@pytest.mark.parametrize("seqlen_q", [13, 30, 5])
def test_windows_by_definition(left: int | None, right: int | None, seqlen_q: int) -> None:
    """Key j is seen iff i + sk - sq - left <= j <= i + sk - sq + right; a row without any is 0."""
    q, k, v = _qkv(seqlen_q)
    out, lse = reference.attention(q, k, v, window_size=(left, right))
    for i in range(seqlen_q):
        at = i + 13 - seqlen_q
        lo = 0 if left in (None, -1) else max(0, at - left)
        hi = 13 if right in (None, -1) else min(13, at + right + 1)
        if lo >= hi:
            assert out[:, i].eq(0).all()
            assert lse[:, :, i].eq(-math.inf).all()
            continue
        keys = k[:, lo:hi].repeat_interleave(2, 2)
        s = torch.einsum("bhd,bkhd->bhk", q[:, i], keys) / math.sqrt(8)
        torch.testing.assert_close(lse[:, :, i], s.logsumexp(-1))
        values = v[:, lo:hi].repeat_interleave(2, 2)
        torch.testing.assert_close(out[:, i], torch.einsum("bhk,bkhd->bhd", s.softmax(-1), values))


def test_softcap_alibi_and_sink_by_definition() -> None:
    q, k, v = _qkv(kv_heads=4)
    slopes, sink = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    result = reference.attention(q, k, v, softcap=1.5, alibi_slopes=slopes, learnable_sink=sink)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    distance = (torch.arange(13)[:, None] - torch.arange(13)).abs()
    s = 1.5 * torch.tanh(s / 1.5) - slopes[:, None, None] * distance
    with_sink = torch.cat((s, sink.view(1, 4, 1, 1).expand(2, 4, 13, 1)), -1)
    torch.testing.assert_close(result.lse, with_sink.logsumexp(-1))
    p = with_sink.softmax(-1)[..., :-1]
    torch.testing.assert_close(result.out, torch.einsum("bhqk,bkhd->bqhd", p, v))


def test_empty_rows_and_sink() -> None:
    q, k, v = _qkv(seqlen_q=20)
    sink = torch.randn(4, dtype=torch.float64)
    result = reference.attention(q, k, v, causal=True, learnable_sink=sink)
    assert result.out[:, :7].eq(0).all()
    torch.testing.assert_close(result.lse[:, :, :7], sink.view(1, 4, 1).expand(2, 4, 7))


def test_varlen_equals_each_sequence_alone() -> None:
    lengths = ((5, 9), (0, 3), (7, 7), (4, 0))
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (16, 19, 19))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True))
    out, lse = reference.attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for b in range(4):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = reference.attention(q[None, rows], k[None, cols], v[None, cols], causal=True)
        torch.testing.assert_close(out[rows], alone.out[0])
        torch.testing.assert_close(lse[:, rows], alone.lse[0])


def test_pages_hold_the_same_keys() -> None:
    q, k, v = _qkv(seqlen_k=21)
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    pages = [torch.full((6, 8, 2, 8), math.nan, dtype=torch.float64) for _ in range(2)]
    for b in range(2):
        for slot in range(21):
            for pool, x in zip(pages, (k, v), strict=True):
                pool[table[b, slot // 8], slot % 8] = x[b, slot]
    used = torch.tensor([21, 21], dtype=torch.int32)
    paged = reference.attention(q, *pages, block_table=table, seqused_k=used, causal=True)
    plain = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(paged.out, plain.out)


def test_gradients_numerically() -> None:
    q, k, v = (x[:1, :4].clone().requires_grad_() for x in _qkv())
    bias = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    state = torch.tensor([1, 2])

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        result = reference.attention(
            *x[:3], bias=x[3], learnable_sink=x[4], softcap=2.0, causal=True, dropout_p=0.3,
            rng_state=state,
        )  # fmt: skip
        return result.out, result.lse

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, sink))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, bias, sink))


def test_dropout_scales_what_it_keeps() -> None:
    q, k, _ = _qkv(kv_heads=4)
    v = torch.eye(13, dtype=torch.float64)[:, None].expand(2, 13, 4, 13)  # out is P itself
    plain = reference.attention(q, k, v).out
    dropped = reference.attention(q, k, v, dropout_p=0.25, rng_state=torch.tensor([3, 4])).out
    kept = dropped != 0
    assert 0.6 < kept.double().mean() < 0.9
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)


def test_low_precision_is_eager_attention_in_it() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in _qkv())
    result = reference.attention(q, k, v, causal=True, dtype=None)
    assert result.out.dtype == torch.bfloat16
    assert result.lse.dtype == torch.float32
    exact = reference.attention(q, k, v, causal=True).out
    error = (result.out.double() - exact).abs().max()
    assert 1e-4 < error < 3e-2
