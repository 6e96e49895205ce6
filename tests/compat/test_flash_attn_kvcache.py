"""`flash_attn_with_kvcache` as flash-attention's tests and README use it."""

import math

import pytest
import torch

from flashtile import reference

BATCH, SLOTS, HEADS, KV_HEADS, DIM = 3, 48, 4, 2, 32
LENGTHS = torch.tensor([5, 31, 0], dtype=torch.int32)


def close(actual, expected):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=2e-5)


def random_cache(rows=BATCH, slots=SLOTS):
    return torch.randn(rows, slots, KV_HEADS, DIM), torch.randn(rows, slots, KV_HEADS, DIM)


def random_new(seqlen_q=3, seqlen_new=3):
    q = torch.randn(BATCH, seqlen_q, HEADS, DIM)
    return q, *(torch.randn(BATCH, seqlen_new, KV_HEADS, DIM) for _ in range(2))


def tables(rotary_dim):
    angle = torch.rand(SLOTS, rotary_dim // 2) * 2 * math.pi
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("cache_seqlens", [None, 17, LENGTHS], ids=["full", "int", "tensor"])
def test_attends_to_the_tokens_in_use(flash_attn, cache_seqlens):
    q, _, _ = random_new()
    k_cache, v_cache = random_cache()
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, return_softmax_lse=True
    )
    lengths = torch.tensor(SLOTS) if cache_seqlens is None else torch.as_tensor(cache_seqlens)
    for b, length in enumerate(lengths.expand(BATCH).tolist()):
        at = slice(b, b + 1)
        used = (q[at], k_cache[at, :length], v_cache[at, :length])
        expected = reference.attention(*used)
        close(out[at], expected.out)
        close(lse[at], expected.lse.masked_fill(expected.lse == -math.inf, math.inf))


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window_size": (6, 2)}], ids=["full", "causal", "window"]
)
def test_append_with_rotary(flash_attn, rotary, mask, rotary_dim, interleaved):
    """q turns with its own position under a mask, else all of q with the first new one."""
    q, k, v = random_new()
    k_cache, v_cache = random_cache()
    cos, sin = tables(rotary_dim)
    turn = {"interleaved": interleaved, "seqlen_offsets": LENGTHS}
    k_turned = rotary.apply_rotary_emb(k, cos, sin, **turn)
    q_turned = rotary.apply_rotary_emb(q if mask else q.flatten(1, 2)[:, None], cos, sin, **turn)
    k_wanted, v_wanted = k_cache.clone(), v_cache.clone()
    for b, length in enumerate(LENGTHS.tolist()):
        k_wanted[b, length : length + 3], v_wanted[b, length : length + 3] = k_turned[b], v[b]

    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=LENGTHS,
        rotary_interleaved=interleaved, **mask,
    )  # fmt: skip
    close(k_cache, k_wanted)
    assert torch.equal(v_cache, v_wanted)
    expected = reference.attention(
        q_turned.view_as(q), k_wanted, v_wanted, seqused_k=LENGTHS + 3, **mask
    )
    close(out, expected.out)


def test_pairs_are_the_default(flash_attn):
    q, k, v = random_new()
    cache, (cos, sin) = random_cache(), tables(32)
    outs = [
        flash_attn.flash_attn_with_kvcache(
            q, *(x.clone() for x in cache), k, v, cos, sin, LENGTHS, causal=True, **keywords
        )
        for keywords in ({}, {"rotary_interleaved": True}, {"rotary_interleaved": False})
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_batch_idx_and_leftpad(flash_attn):
    q, k, v = random_new(1, 1)
    k_cache, v_cache = random_cache(rows=5)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    leftpad = torch.tensor([2, 30, 0], dtype=torch.int32)
    untouched = k_cache[[1, 3]].clone()
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, cache_batch_idx=rows,
        cache_leftpad=leftpad, causal=True,
    )  # fmt: skip
    assert torch.equal(k_cache[[1, 3]], untouched)
    for b, (row, pad, length) in enumerate(zip(rows, leftpad, LENGTHS, strict=True)):
        assert torch.equal(k_cache[row, length], k[b, 0])
        keys, values = (x[row, pad : length + 1][None] for x in (k_cache, v_cache))
        close(out[b : b + 1], reference.attention(q[b : b + 1], keys, values).out)


@pytest.fixture
def pages():
    """A pool of pages and a table of two to each row: 512 slots."""
    pool = torch.randn(7, 256, KV_HEADS, DIM), torch.randn(7, 256, KV_HEADS, DIM)
    return *pool, torch.tensor([[3, 5], [0, 6], [2, 4]], dtype=torch.int32)


@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
def test_paged(flash_attn, pages, append):
    q, k, v = random_new()
    k_pages, v_pages, block_table = pages
    lengths = torch.tensor([254, 500, 7], dtype=torch.int32)
    dense = [x[block_table.long()].flatten(1, 2) for x in (k_pages, v_pages)]
    new = (k, v) if append else (None, None)
    keywords = {"cache_seqlens": lengths, "causal": True}
    out = flash_attn.flash_attn_with_kvcache(
        q, k_pages, v_pages, *new, block_table=block_table, **keywords
    )
    close(out, flash_attn.flash_attn_with_kvcache(q, *dense, *new, **keywords))
    assert torch.equal(k_pages[block_table.long()].flatten(1, 2), dense[0])
    assert torch.equal(v_pages[block_table.long()].flatten(1, 2), dense[1])


@pytest.mark.parametrize("append", [False, True], ids=["read", "append"])
def test_lengths_past_the_pages_are_a_runtime_error(flash_attn, pages, append):
    q, k, v = random_new(1, 1)
    k_pages, v_pages, block_table = pages
    before = k_pages.clone()
    lengths = torch.tensor([3, 512 if append else 513, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block_table"):
        flash_attn.flash_attn_with_kvcache(
            q, k_pages, v_pages, *((k, v) if append else (None, None)), cache_seqlens=lengths,
            block_table=block_table,
        )  # fmt: skip
    assert torch.equal(k_pages, before)


def test_no_backward_even_if_an_input_asks_for_one(flash_attn):
    q, k, v = (x.requires_grad_() for x in random_new())
    k_cache, v_cache = random_cache()
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS)
    assert not out.requires_grad
    assert not k_cache.requires_grad
    assert torch.equal(k_cache[1, 31:34], k[1])


@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_num_splits_changes_rounding_only(flash_attn, num_splits):
    q, _, _ = random_new()
    k_cache, v_cache = random_cache()
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=LENGTHS + 1, num_splits=num_splits
    )
    close(out, reference.attention(q, k_cache, v_cache, seqused_k=LENGTHS + 1).out)
