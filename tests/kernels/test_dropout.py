"""The dropout mask of the Triton kernels: bit for bit that of flashtile.random."""

# ruff: noqa: N803, compile-time constants of a kernel are upper case

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func
from flashtile.kernels.dropout import (
    Dropout,
    drop,
    drop_score_gradient,
    numbers_keys_by_queries,
    numbers_queries_by_keys,
    words_keys_by_queries,
    words_queries_by_keys,
)
from flashtile.kernels.masks import At
from flashtile.kernels.numbers import opaque
from flashtile.random import draw_rng_state, drop_threshold, keep_mask
from flashtile.testing.interpreter import interpreted

STATES = ((0, 0), (2**62 - 1, 2**62 - 2), (0x123456789ABCDEF, 0xFEDCBA987654321))


@triton.jit
def probe(dropped, rows_are_queries, rows_are_keys, dropout, batch, head, first_q, first_k,
          M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One tile of the mask, as the forward applies it and as both kernels of the backward do."""
    q, k = tl.arange(0, M), tl.arange(0, N)
    at = At(batch, head, first_q, first_k, q[:, None], k[None, :], None, None)
    where = q[:, None] * N + k[None, :]
    p = tl.load(dropped + where)
    numbers = numbers_queries_by_keys(words_queries_by_keys(dropout, at, M, N), M, N)
    tl.store(dropped + where, drop(dropout, p, numbers))
    one = tl.full([], 1.0, tl.float32)
    tl.store(rows_are_queries + where, drop_score_gradient(dropout, one, one, 0.0, numbers))
    numbers = numbers_keys_by_queries(dropout, words_keys_by_queries(dropout, at, M, N), M, N)
    kept = drop_score_gradient(dropout, one, one, 0.0, numbers)
    tl.store(rows_are_keys + k[:, None] * M + q[None, :], kept)


def _kept(state: Tensor, p: float, heads: int, at: tuple[int, int], q: Tensor, k: Tensor) -> Tensor:
    head = torch.tensor(at[0] * heads + at[1])
    return keep_mask(state, p, head, q[:, None], k)


PROBABILITIES = (0.0001, 0.17, 0.5, 0.9999, 1.0)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 16), (16, 64), (64, 32)])
def test_tiles_anywhere(p: float, m: int, n: int) -> None:
    """Every tile shape, far along both sequences, in a late batch and head; states rotate."""
    state = STATES[(PROBABILITIES.index(p) + (m + 2 * n) // 16) % 3]
    rng_state = torch.tensor(state)
    dropout = Dropout(rng_state, float(drop_threshold(p)), 1.0, opaque(7))
    late = (9000, 6, 2**20, 2**24)
    for batch, head, first_q, first_k in ((0, 0, 0, 0), (3, 5, 3 * m, 5 * n), late):
        by_rows, by_keys = torch.full((m, n), torch.nan), torch.full((n, m), torch.nan)
        dropped = torch.rand(m, n, dtype=torch.float16 if m == 64 else torch.float32) + 0.5
        given = dropped.clone()
        probe[(1,)](dropped, by_rows, by_keys, dropout, batch, head, first_q, first_k, m, n)
        q, k = first_q + torch.arange(m), first_k + torch.arange(n)
        expected = _kept(rng_state, p, 7, (batch, head), q, k)
        assert torch.equal(dropped, given * expected)
        assert torch.equal(by_rows, expected.float())
        assert torch.equal(by_keys, expected.float().T)


def _masks_of_a_call(
    p: float, tokens: int, heads: int, packed: bool
) -> list[tuple[Tensor, Tensor]]:
    """(forward's, dK/dV's) mask of each sequence: with the unit matrix as v, out is P, and with the
    unit matrix as dout, dV is P transposed; what is dropped is 0."""
    batch = 2
    q, k = (torch.randn(batch, tokens, heads, 8) for _ in range(2))
    unit = torch.eye(tokens)[None, :, None].repeat(batch, 1, heads, 1)
    leaves = [x.requires_grad_() for x in (q, k, unit.clone())]
    generator = torch.Generator().manual_seed(5)
    if packed:
        cu = torch.arange(batch + 1, dtype=torch.int32) * tokens
        out = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in leaves), cu, cu, dropout_p=p, dropout_generator=generator
        ).view_as(unit)
    else:
        out = flash_attn_func(*leaves, dropout_p=p, dropout_generator=generator)
    (dv,) = torch.autograd.grad(out, leaves[2], unit)
    return [(out[b].transpose(0, 1) != 0, dv[b].permute(1, 2, 0) != 0) for b in range(batch)]


@pytest.mark.parametrize(
    ("blocks", "packed"), [((16, 16), True), ((32, 16), False), ((16, 32), True)], ids=str
)
def test_masks_of_calls(blocks: tuple[int, int], packed: bool) -> None:
    """Whatever the blocks, dense or packed, forward and backward: the mask is the contract's."""
    tokens, heads, p = 40, 2, 0.3
    state = draw_rng_state(torch.device("cpu"), torch.Generator().manual_seed(5))
    at = torch.arange(tokens)
    with interpreted(*blocks):
        found = _masks_of_a_call(p, tokens, heads, packed)
    for b, masks in enumerate(found):
        for head in range(heads):
            expected = _kept(state, p, heads, (b, head), at, at)
            for mask in masks:
                assert torch.equal(mask[head], expected)


def test_everything_dropped() -> None:
    """A probability that rounds to 1 in 15 bits drops all: 0, not the reciprocal of nothing."""
    q, k, v = (torch.randn(1, 20, h, 8).requires_grad_() for h in (2, 1, 1))
    out, lse = flash_attn_func(q, k, v, dropout_p=1 - 1e-7, return_lse=True)
    assert out.eq(0).all()
    assert lse.isfinite().all()
    for grad in torch.autograd.grad(out, (q, k, v), torch.randn_like(out)):
        assert grad.eq(0).all()


def test_everything_dropped_leaves_lse() -> None:
    """The kernels' gradients are then those of lse alone."""
    q, k, v = (torch.randn(1, 20, h, 8).requires_grad_() for h in (2, 1, 1))
    dout, dlse = torch.randn(1, 20, 2, 8), torch.randn(1, 2, 20)
    _, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    expected = torch.autograd.grad(lse, (q, k), dlse)
    with interpreted(16, 16):
        out, lse = flash_attn_func(q, k, v, causal=True, dropout_p=1 - 1e-7, return_lse=True)
        found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    torch.testing.assert_close(found[:2], expected)
    assert found[2].eq(0).all()
