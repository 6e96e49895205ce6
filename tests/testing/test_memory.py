"""Peak memory is counted to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention

KIB = 1024


def test_counts_what_is_alive_together() -> None:
    def call() -> Tensor:
        a = torch.empty(3 * KIB, dtype=torch.uint8)
        b = torch.empty(5 * KIB, dtype=torch.uint8)
        del a
        c = torch.empty(2 * KIB, dtype=torch.uint8)
        del b
        return c

    assert peak_bytes(call) == 8 * KIB


def test_counts_from_the_level_at_the_start() -> None:
    before = torch.empty(64 * KIB, dtype=torch.uint8)

    assert peak_bytes(before.clone) == 64 * KIB
    assert peak_bytes(before.zero_) == 0


def test_counts_temporaries_inside_an_operator() -> None:
    x = torch.ones(KIB)

    # The exponentials need memory as x does; the result is one number.
    assert 4 * KIB < peak_bytes(lambda: torch.logsumexp(x, 0)) < 4 * KIB + 64


def test_counts_the_backward_pass() -> None:
    x, factor, gradient = (torch.ones(KIB) for _ in range(3))
    x.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x * factor, (x,), gradient)

    assert peak_bytes(call) == 2 * 4 * KIB


def test_another_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="device='meta' must be cpu or cuda"):
        peak_bytes(lambda: None, "meta")


def _forward_and_backward(attention: object, seqlen: int) -> int:
    generator = torch.Generator().manual_seed(seqlen)
    q, k, v, dout = (torch.randn(1, seqlen, 1, 64, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call() -> tuple[Tensor, ...]:
        assert callable(attention)
        return torch.autograd.grad(attention(*leaves, causal=True), leaves, dout)

    return peak_bytes(call)


def test_standard_attention_is_quadratic_and_flash_attention_linear() -> None:
    standard = [_forward_and_backward(standard_attention, n) for n in (1024, 2048)]
    flash = [_forward_and_backward(flash_attn_func, n) for n in (1024, 2048, 4096)]

    assert standard[1] / standard[0] == pytest.approx(4.0, rel=0.05)
    assert flash[2] - flash[1] == pytest.approx(2 * (flash[1] - flash[0]), rel=0.01)
