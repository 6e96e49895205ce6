"""The torch backend as a machine: memory linear in sequence length, no work for unseen blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile import flash_attn_func, flash_attn_varlen_func
from flashtile.api import normalise
from flashtile.backends import aten
from flashtile.backends import torch as backend
from flashtile.problem import Variant
from flashtile.testing.blocks import small_blocks
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention

PATHS: list[dict[str, Any]] = [{}, {"softcap": 5.0}, {"window_size": (256, 0)}, {"dropout_p": 0.1}]


def _peak(attention: Any, seqlen: int, heads: int = 1, **keywords: Any) -> int:
    """Bytes of forward plus backward, causal, one KV head of dim 64, fp32."""
    q, k, v = (torch.randn(1, seqlen, h, 64).requires_grad_() for h in (heads, 1, 1))
    dout = torch.randn(1, seqlen, heads, 64)
    return peak_bytes(
        lambda: torch.autograd.grad(attention(q, k, v, causal=True, **keywords), (q, k, v), dout)
    )


@pytest.mark.parametrize("keywords", PATHS, ids=lambda k: "-".join(k) or "plain")
def test_memory_is_linear_in_sequence_length(keywords: dict[str, Any]) -> None:
    """R^2 > 0.999 from 1k to 4k tokens (16k and standard attention's curve: benchmarks). A square
    has 0.98."""
    seqlens = torch.tensor([1024.0, 2048.0, 4096.0], dtype=torch.float64)
    peaks = [_peak(flash_attn_func, int(n), **keywords) for n in seqlens]
    y = torch.tensor(peaks, dtype=torch.float64)
    assert torch.corrcoef(torch.stack((seqlens, y)))[0, 1] ** 2 > 0.999, peaks


@pytest.mark.parametrize("keywords", PATHS, ids=lambda k: "-".join(k) or "plain")
@pytest.mark.parametrize(("seqlen", "factor"), [(2048, 10), (4096, 20)])
def test_memory_against_standard_attention(
    seqlen: int, factor: int, keywords: dict[str, Any]
) -> None:
    ours, standard = _peak(flash_attn_func, seqlen, **keywords), _peak(standard_attention, seqlen)
    assert standard >= factor * ours, (standard, ours)


def test_kv_heads_are_not_expanded() -> None:
    """Sixteen query heads on one KV head cost q-sized tensors, not sixteen copies of K and V."""
    q_bytes = 2048 * 16 * 64 * 4
    blocks = 6 * 16 * 256 * 256 * 4
    assert _peak(flash_attn_func, 2048, heads=16, softcap=5.0) < 5 * q_bytes + blocks


def _blocks(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> tuple[int, int]:
    """Blocks of scores that forward, and forward plus backward, compute for 64 tokens by 16."""
    count = 0
    original = backend._scores

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(backend, "_scores", counting)
    q = torch.randn(1, 64, 1, 8, requires_grad=True)
    with small_blocks():
        out = flash_attn_func(q, q, q, **keywords)
        forward = count
        out.sum().backward()
    return forward, count


@pytest.mark.parametrize(
    ("keywords", "blocks"),
    [
        ({}, 16),
        ({"causal": True}, 10),
        ({"window_size": (16, 0)}, 7),
        ({"window_size": (0, 0)}, 4),
        ({"document_ids": torch.arange(64)[None] // 32}, 8),
        ({"attn_mask": torch.ones(64, 64).tril().bool()}, 10),
    ],
)
def test_blocks_that_no_row_sees_are_skipped(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any], blocks: int
) -> None:
    assert _blocks(monkeypatch, **keywords) == (blocks, 2 * blocks)


@pytest.mark.parametrize(
    ("keywords", "used"),
    [
        ({}, True),
        ({"causal": True}, True),
        ({"softmax_scale": 0.3}, True),
        ({"causal": True, "window_size": (5, 0)}, False),
        ({"softcap": 1.0}, False),
        ({"dropout_p": 0.1}, False),
        ({"alibi_slopes": torch.rand(2)}, False),
        ({"learnable_sink": torch.rand(2)}, False),
    ],
)
def test_torchs_kernel_is_called_where_it_can(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any], used: bool
) -> None:
    calls: list[str] = []
    for name in ("attend", "gradients"):
        original = getattr(aten, name)
        monkeypatch.setattr(aten, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    q = torch.randn(1, 32, 2, 8, requires_grad=True)
    flash_attn_func(q, q, q, **keywords).sum().backward()
    assert calls == (["attend", "gradients"] if used else [])


def test_packed_sequences_use_it_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal and longer keys is not its alignment; a square or maskless sequence is."""
    lengths: list[tuple[int, int]] = []
    original = aten.attend
    monkeypatch.setattr(
        aten, "attend", lambda c, s: (lengths.append((s.seqlen_q, s.seqlen_k)), original(c, s))[1]
    )
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 8, 8], [0, 5, 12, 13]))
    q, k = torch.randn(8, 2, 8), torch.randn(13, 2, 8)
    flash_attn_varlen_func(q, k, k, cu_q, cu_k, causal=True)
    assert lengths == [(5, 5)]


@pytest.mark.parametrize("name", [n for n in Variant._fields if n not in aten.UNDERSTOOD])
def test_torchs_kernel_takes_no_scalar_that_it_does_not_know(name: str) -> None:
    call = normalise(*(torch.randn(1, 8, 2, 16) for _ in range(3)))
    assert aten.whole(call) is not None
    changed = call.variant._replace(**{name: 1})
    assert aten.whole(call._replace(variant=changed)) is None
