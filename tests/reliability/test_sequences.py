"""Reliability, metadata: lengths, pages, masks of packed sequences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _pool(x: Tensor, table: Tensor, page_size: int, pages: int) -> Tensor:
    """Pages that hold x (batch, seqlen, heads, dim) by a table, NaN elsewhere."""
    pool = x.new_full((pages, page_size, *x.shape[2:]), math.nan)
    for b in range(x.shape[0]):
        for slot in range(x.shape[1]):
            pool[table[b, slot // page_size], slot % page_size] = x[b, slot]
    return pool


@pytest.mark.parametrize("longest", [17, 18, 4000, None, torch.tensor(3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_any_bound_of_the_lengths(longest: int | None, causal: bool) -> None:
    """Too large, absent or on the device: the same bits."""
    cu_q, cu_k = _ints(0, 17, 17, 30), _ints(0, 12, 20, 37)
    q, k, v = (torch.randn(n, h, 16) for n, h in ((30, 4), (37, 2), (37, 2)))
    exact = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 17, causal=causal)
    found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, longest, causal=causal)
    assert torch.equal(found, exact)


def test_a_bound_that_is_too_small() -> None:
    """An error that names both numbers, and `out` keeps every bit."""
    q = torch.randn(30, 2, 16)
    out = torch.randn_like(q)
    before = out.clone()
    with pytest.raises(ValueError, match="max_seqlen_q is 16; the longest sequence has 17 tokens"):
        flash_attn_varlen_func(q, q, q, _ints(0, 17, 30), _ints(0, 17, 30), 16, 17, out=out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("name", ["bias", "attn_mask"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 39), (39, 40), (33, 40)])
@pytest.mark.usefixtures("small_blocks")
def test_masks_smaller_than_the_longest_sequence(name: str, shape: tuple[int, int]) -> None:
    """An error that names it; a row or a column that is left over must not be broadcast."""
    q = torch.randn(47, 2, 16)
    cu = _ints(0, 40, 47)
    mask = torch.randn(1, 1, *shape)
    with pytest.raises(ValueError, match=name):
        flash_attn_varlen_func(q, q, q, cu, cu, **{name: mask})


def test_documents_of_paged_keys() -> None:
    """Pages have no token order of their own to give document ids in: an error says so."""
    q, pool = torch.randn(10, 2, 16), torch.randn(3, 16, 2, 16)
    ids = torch.randint(0, 2, (10,)), torch.randint(0, 2, (3, 16))
    with pytest.raises(ValueError, match="document_ids"):
        flash_attn_varlen_func(
            q, pool, pool, _ints(0, 10), None, block_table=_ints(2, 0)[None],
            seqused_k=_ints(20), document_ids=ids,
        )  # fmt: skip


def test_shared_permuted_and_reused_pages() -> None:
    """A shared prefix gets the sum of its readers' gradients; order does not matter."""
    k, v = torch.randn(2, 20, 2, 16), torch.randn(2, 20, 2, 16)
    for x in (k, v):
        x[1, :8] = x[0, :8]
    q = torch.randn(2, 6, 4, 16)
    shared = torch.tensor([[4, 0, 5], [4, 3, 1]], dtype=torch.int32)
    private = torch.tensor([[2, 0, 5], [4, 3, 1]], dtype=torch.int32)
    cu_q, used = _ints(0, 6, 12), _ints(20, 20)
    results = []
    for table in (shared, private):
        pools = [_pool(x, table, 8, 7).requires_grad_() for x in (k, v)]
        out = flash_attn_varlen_func(
            q.flatten(0, 1), *pools, cu_q, None, seqused_k=used, block_table=table, causal=True
        )
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out.detach(), *torch.autograd.grad(out, pools, weights)))
    (out, *grads), (expected, *parts) = results
    assert torch.equal(out, expected)
    plain = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out.view_as(plain), plain)
    for grad, part in zip(grads, parts, strict=True):
        torch.testing.assert_close(grad[4], part[4] + part[2])
        assert torch.equal(grad[[0, 5, 3, 1]], part[[0, 5, 3, 1]])
        assert grad[[2, 6]].eq(0).all()


def test_a_page_is_reused_after_its_sequence_ended() -> None:
    """What the last owner left behind it is overwritten or out of reach."""
    pools = [torch.randn(4, 4, 2, 8) for _ in range(2)]
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    for table in (_ints(2, 0)[None], _ints(3, 2)[None]):
        out = flash_attn_with_kvcache(
            q, *pools, k, v, cache_seqlens=0, block_table=table, causal=True
        )
        torch.testing.assert_close(out, flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("page_size", [1, 16, 17, 64, 128, 256, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_page_sizes(page_size: int, causal: bool) -> None:
    """Any size; the last page is partly NaN."""
    seqlen = 300
    per_row = -(-seqlen // page_size)
    table = torch.randperm(2 * per_row + 1)[: 2 * per_row].view(2, per_row).to(torch.int32)
    k, v = torch.randn(2, seqlen, 2, 16), torch.randn(2, seqlen, 2, 16)
    q = torch.randn(2, 9, 4, 16)
    pools = [_pool(x, table, page_size, 2 * per_row + 1) for x in (k, v)]
    out = flash_attn_with_kvcache(
        q, *pools, cache_seqlens=_ints(seqlen, 77), block_table=table, causal=causal
    )
    for b, length in enumerate((seqlen, 77)):
        at = slice(b, b + 1)
        alone = flash_attn_func(q[at], k[at, :length], v[at, :length], causal=causal)
        torch.testing.assert_close(out[at], alone)
