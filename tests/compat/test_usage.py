"""flash-attention's own usage, unmodified, against attention written out in fp64."""

import math

import pytest
import torch

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, DIM = 2, 37, 53, 4, 2, 16
SLOPES = torch.tensor([0.3, 0.1, 0.05, 0.2])

VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "left window": {"window_size": (9, -1)},
    "causal window": {"causal": True, "window_size": (7, 3)},
    "window as a tensor": {"window_size": torch.tensor([5, 2])},
    "any negative side": {"window_size": (-3, 6)},
    "softcap": {"softcap": 2.0},
    "softcap off": {"softcap": -1.0},
    "alibi": {"alibi_slopes": SLOPES},
    "scale": {"softmax_scale": 0.7},
    "all": {"causal": True, "window_size": (20, 0), "softcap": 3.0, "alibi_slopes": SLOPES},
}


def standard(
    q, k, v, keep=None, dropout_p=0.0, *, softmax_scale=None, causal=False, window_size=(-1, -1),
    softcap=0.0, alibi_slopes=None,
):  # fmt: skip
    """(out, lse, probabilities) of one padded batch in fp64, the whole matrix at once."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    distance = columns - rows - (k.shape[1] - q.shape[1])
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * distance.abs()
    left, right = int(window_size[0]), 0 if causal else int(window_size[1])
    hidden = ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))
    s = s.masked_fill(hidden, -math.inf)
    p = s.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    kept = p if keep is None else p * keep / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", kept, v), s.logsumexp(-1), p


def random_qkv(batch=BATCH, seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, dim=DIM):
    q = torch.randn(batch, seqlen_q, HEADS, dim, requires_grad=True)
    k, v = (torch.randn(batch, seqlen_k, KV_HEADS, dim, requires_grad=True) for _ in range(2))
    return q, k, v


def close(actual, expected):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=2e-5)


def close_with_gradients(actual, expected, inputs):
    close(actual, expected)
    upstream = torch.randn_like(actual)
    found = torch.autograd.grad(actual, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream.to(expected.dtype))
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense(flash_attn, variant):
    q, k, v = random_qkv()
    out, lse, s_dmask = flash_attn.flash_attn_func(
        q, k, v, return_attn_probs=True, **VARIANTS[variant]
    )
    expected, expected_lse, _ = standard(q, k, v, **VARIANTS[variant])
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, **VARIANTS[variant]))
    assert s_dmask.shape == (0,)
    close(lse, expected_lse)
    close_with_gradients(out, expected, (q, k, v))


@pytest.mark.parametrize("variant", ["plain", "causal", "all"])
def test_packed(flash_attn, variant):
    qkv = torch.randn(BATCH, SEQLEN_Q, 3, HEADS, DIM, requires_grad=True)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, **VARIANTS[variant])
    close_with_gradients(out, standard(*qkv.unbind(2), **VARIANTS[variant])[0], qkv)

    q = torch.randn(BATCH, SEQLEN_Q, HEADS, DIM, requires_grad=True)
    kv = torch.randn(BATCH, SEQLEN_K, 2, KV_HEADS, DIM, requires_grad=True)
    out = flash_attn.flash_attn_kvpacked_func(q, kv, **VARIANTS[variant])
    close_with_gradients(out, standard(q, *kv.unbind(2), **VARIANTS[variant])[0], (q, kv))


@pytest.fixture
def ragged(bert_padding):
    """Padded inputs, and the masks of random lengths that unpad_input gets."""
    q, k, v = random_qkv(batch=3)
    q_lengths, k_lengths = torch.tensor([37, 1, 22]), torch.tensor([20, 53, 5])
    q_mask = torch.arange(SEQLEN_Q) < q_lengths[:, None]
    k_mask = torch.arange(SEQLEN_K) < k_lengths[:, None]
    return (q, k, v), (q_mask, k_mask), (q_lengths.tolist(), k_lengths.tolist())


def standard_ragged(q, k, v, lengths, **variant):
    out = torch.zeros_like(q, dtype=torch.float64)
    for b, (m, n) in enumerate(zip(*lengths, strict=True)):
        at = slice(b, b + 1)
        out[at, :m] = standard(q[at, :m], k[at, :n], v[at, :n], **variant)[0]
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_varlen_through_unpad_and_pad(flash_attn, bert_padding, ragged, variant):
    (q, k, v), (q_mask, k_mask), lengths = ragged
    q_rows, indices, cu_seqlens_q, max_seqlen_q, _ = bert_padding.unpad_input(q, q_mask)
    k_rows, _, cu_seqlens_k, max_seqlen_k, _ = bert_padding.unpad_input(k, k_mask)
    v_rows, _, _, _, _ = bert_padding.unpad_input(v, k_mask)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rows, lse, _ = flash_attn.flash_attn_varlen_func(
        q_rows, k_rows, v_rows, *sequences, return_attn_probs=True, **VARIANTS[variant]
    )
    out = bert_padding.pad_input(rows, indices, 3, SEQLEN_Q)
    assert lse.shape == (HEADS, len(rows))
    close_with_gradients(out, standard_ragged(q, k, v, lengths, **VARIANTS[variant]), (q, k, v))

    kv_rows = torch.stack((k_rows, v_rows), 1)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(
        q_rows, kv_rows, *sequences, **VARIANTS[variant]
    )
    assert torch.equal(packed, rows)


def test_varlen_qkvpacked(flash_attn, bert_padding, ragged):
    _, (mask, _), (lengths, _) = ragged
    qkv = torch.randn(3, SEQLEN_Q, 3, HEADS, DIM, requires_grad=True)
    rows, indices, cu_seqlens, max_seqlen, _ = bert_padding.unpad_input(qkv, mask)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, max_seqlen, causal=True)
    out = bert_padding.pad_input(out, indices, 3, SEQLEN_Q)
    expected = standard_ragged(*qkv.unbind(2), (lengths, lengths), causal=True)
    close_with_gradients(out, expected, qkv)


def test_varlen_paged(flash_attn):
    lengths, page_size = [300, 45], 256
    q = torch.randn(5, HEADS, DIM)
    pages_k, pages_v = (torch.randn(6, page_size, KV_HEADS, DIM) for _ in range(2))
    block_table = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_func(
        q, pages_k, pages_v, torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.tensor([0, 300, 345], dtype=torch.int32), 3, 300, causal=True,
        block_table=block_table,
    )  # fmt: skip
    for b, rows in enumerate((slice(0, 2), slice(2, 5))):
        k, v = (x[block_table[b]].flatten(0, 1)[None, : lengths[b]] for x in (pages_k, pages_v))
        close(out[rows][None], standard(q[rows][None], k, v, causal=True)[0])


def test_rows_without_keys_are_zero_with_lse_plus_inf(flash_attn):
    q, k, v = random_qkv(seqlen_q=12, seqlen_k=7)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :5], torch.zeros(BATCH, 5, HEADS, DIM))
    assert torch.equal(lse == math.inf, torch.arange(12).expand_as(lse) < 5)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[0][:, :5], torch.zeros(BATCH, 5, HEADS, DIM))


def test_lse_of_empty_rows_has_no_gradient(flash_attn):
    q, k, v = random_qkv(seqlen_q=12, seqlen_k=7)
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    (dq,) = torch.autograd.grad(lse.masked_fill(lse == math.inf, 0.0).sum(), q)
    assert dq.isfinite().all()
    assert dq[:, 5:].ne(0).any(-1).all()


def normalise_dmask(s_dmask, scores, block):
    """What flash-attention's tests do: (keep, probabilities) of an S_dmask cut to its lengths.

    A block holds exp(s - m) with the largest score in it and to its right.
    """
    lse = scores.logsumexp(-1, keepdim=True)
    probabilities = s_dmask.abs().double()
    for start in range(0, scores.shape[-1], block):
        top = scores[..., start:].amax(-1, keepdim=True)
        factor = torch.exp(top - lse).nan_to_num(0.0)
        probabilities[..., start : start + block] *= factor
    return s_dmask >= 0, probabilities


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [16, 40, 104], ids="head_dim={}".format)
def test_dmask_gives_the_dropout_mask_and_the_probabilities(flash_attn, interface, dim, causal):
    seqlen_q, seqlen_k, p = 150, 200, 0.3
    q, k, v = random_qkv(1, seqlen_q, seqlen_k, dim)
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, p, causal=causal, return_attn_probs=True)
    assert s_dmask.shape == (1, HEADS, 256, 256)
    assert s_dmask[..., seqlen_q:, :].eq(0).all()
    assert s_dmask[..., seqlen_k:].eq(0).all()

    hidden = torch.ones(seqlen_q, seqlen_k).tril(seqlen_k - seqlen_q) == 0
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)).double() * dim**-0.5
    scores = scores.masked_fill(hidden & causal, -math.inf).detach()
    block = interface._get_block_size_n("cpu", dim, True, causal)
    keep, probabilities = normalise_dmask(s_dmask[..., :seqlen_q, :seqlen_k], scores, block)
    close(probabilities, scores.softmax(-1))
    dropped = 1 - keep.double().mean(-1) if not causal else torch.tensor(p).double()
    assert abs(dropped.mean() - p) < 0.01
    close_with_gradients(out, standard(q, k, v, keep, p, causal=causal)[0], (q, k, v))


def test_dmask_of_varlen(flash_attn):
    lengths, p = (30, 140), 0.2
    q, k, v = (torch.randn(170, 2, 16) for _ in range(3))
    cu_seqlens = torch.tensor([0, 30, 170], dtype=torch.int32)
    out, _, s_dmask = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, 140, 140, p, causal=True, return_attn_probs=True
    )
    assert s_dmask.shape == (2, 2, 256, 256)
    for b, length in enumerate(lengths):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        keep = s_dmask[b, :, :length, :length] >= 0
        sequence = (x[rows][None] for x in (q, k, v))
        close(out[rows][None], standard(*sequence, keep, p, causal=True)[0])


def test_dropout_follows_torchs_seed(flash_attn):
    q, k, v = random_qkv()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(flash_attn.flash_attn_func(q, k, v, 0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
