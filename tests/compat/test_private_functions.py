"""The halves that ring attention and context parallelism join, and the extension below them."""

import math

import pytest
import torch

from flashtile.compat.flash_attn.conventions import lse_from_flash_attn, lse_to_flash_attn

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, DIM = 2, 29, 41, 4, 2, 16
SCALE = 0.3
SLOPES = torch.tensor([0.3, 0.1, 0.05, 0.2])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def variant(causal=False, left=-1, right=-1, softcap=0.0, slopes=None):
    """(public keywords, private positions) of one variant."""
    public = {
        "softmax_scale": SCALE, "causal": causal, "window_size": (left, right),
        "softcap": softcap, "alibi_slopes": slopes,
    }  # fmt: skip
    return public, (SCALE, causal, left, right, softcap, slopes)


VARIANTS = {
    "plain": variant(),
    "causal": variant(causal=True),
    "window": variant(left=9, right=4),
    "softcap": variant(softcap=1.5),
    "alibi": variant(slopes=SLOPES),
}


def dense():
    q = torch.randn(BATCH, SEQLEN_Q, HEADS, DIM, requires_grad=True)
    k, v = (torch.randn(BATCH, SEQLEN_K, KV_HEADS, DIM, requires_grad=True) for _ in range(2))
    return q, k, v


def packed():
    """Sequences of 3 queries and 11 keys, none and 5, 26 and 25."""
    q = torch.randn(29, HEADS, DIM, requires_grad=True)
    k, v = (torch.randn(41, KV_HEADS, DIM, requires_grad=True) for _ in range(2))
    cu_seqlens_q = torch.tensor([0, 3, 3, 29], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 11, 16, 41], dtype=torch.int32)
    return (q, k, v), (cu_seqlens_q, cu_seqlens_k, 26, 25)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", VARIANTS)
def test_dense_halves_are_the_whole(interface, name, dropout_p):
    q, k, v = dense()
    public, private = VARIANTS[name]
    torch.manual_seed(7)
    whole, lse_whole, dmask_whole = interface.flash_attn_func(
        q, k, v, dropout_p, return_attn_probs=True, **public
    )
    torch.manual_seed(7)
    out, lse, s_dmask, rng_state = interface._flash_attn_forward(
        q, k, v, dropout_p, *private, dropout_p > 0
    )
    assert not out.requires_grad
    assert torch.equal(out, whole)
    assert torch.equal(lse, lse_whole)
    assert torch.equal(s_dmask, dmask_whole)
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)

    dout = torch.randn_like(out)
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    interface._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, dropout_p, *private, False, rng_state
    )
    expected = torch.autograd.grad(whole, (q, k, v), dout)
    for actual, wanted in zip((dq, dk, dv), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", VARIANTS)
def test_varlen_halves_are_the_whole(interface, name, dropout_p):
    (q, k, v), lengths = packed()
    public, private = VARIANTS[name]
    torch.manual_seed(7)
    whole, lse_whole, dmask_whole = interface.flash_attn_varlen_func(
        q, k, v, *lengths, dropout_p, return_attn_probs=True, **public
    )
    torch.manual_seed(7)
    out, lse, s_dmask, rng_state = interface._flash_attn_varlen_forward(
        q, k, v, *lengths, dropout_p, *private, dropout_p > 0
    )
    assert torch.equal(out, whole)
    assert torch.equal(lse, lse_whole)
    assert torch.equal(s_dmask, dmask_whole)

    dout = torch.randn_like(out)
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, *lengths, dropout_p, *private, False,
        rng_state=rng_state,
    )  # fmt: skip
    expected = torch.autograd.grad(whole, (q, k, v), dout)
    for actual, wanted in zip((dq, dk, dv), expected, strict=True):
        close(actual, wanted)


def test_gradients_into_views_of_a_packed_tensor(interface):
    qkv = torch.randn(BATCH, SEQLEN_Q, 3, HEADS, DIM, requires_grad=True)
    whole = interface.flash_attn_qkvpacked_func(qkv, softmax_scale=SCALE, causal=True)
    dout = torch.randn_like(whole)
    private = VARIANTS["causal"][1]
    out, lse, _, rng_state = interface._flash_attn_forward(*qkv.unbind(2), 0.0, *private, False)
    dqkv = torch.full_like(qkv, math.nan)
    interface._flash_attn_backward(
        dout, *qkv.unbind(2), out, lse, *dqkv.unbind(2), 0.0, *private, False, rng_state
    )
    close(dqkv, torch.autograd.grad(whole, qkv, dout)[0])


def test_gradients_that_are_not_given_a_place(interface):
    q, k, v = dense()
    private = VARIANTS["plain"][1]
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, 0.0, *private, False)
    dout, dk = torch.randn_like(out), torch.full_like(k, math.nan)
    interface._flash_attn_backward(dout, q, k, v, out, lse, None, dk, None, 0.0, *private, False)
    full = interface.flash_attn_gpu.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, *private[:-1], False, None, None
    )
    assert torch.equal(dk, full[1])
    assert [x.shape for x in full[:3]] == [q.shape, k.shape, v.shape]
    with pytest.raises(RuntimeError, match=r"dq has shape \(1, 29, 4, 16\)"):
        interface._flash_attn_backward(
            dout, q, k, v, out, lse, torch.empty_like(q[:1]), None, None, 0.0, *private, False
        )


def test_softmax_d_is_the_row_product_of_dout_and_out(interface):
    private = VARIANTS["plain"][1]
    q, k, v = dense()
    out, lse, _, rng_state = interface._flash_attn_forward(q, k, v, 0.25, *private, False)
    dout = torch.randn_like(out)
    softmax_d = interface._flash_attn_backward(
        dout, q, k, v, out, lse, None, None, None, 0.25, *private, False, rng_state
    )
    assert softmax_d.shape == (BATCH, HEADS, 128)
    close(softmax_d[..., :SEQLEN_Q], 0.75 * (dout * out).sum(-1).transpose(1, 2))
    assert softmax_d[..., SEQLEN_Q:].eq(0).all()


def test_softmax_d_of_varlen_keeps_sequences_128_rows_apart(interface):
    private = VARIANTS["plain"][1]
    (q, k, v), lengths = packed()
    out, lse, _, _ = interface._flash_attn_varlen_forward(q, k, v, *lengths, 0.0, *private)
    dout = torch.randn_like(out)
    softmax_d = interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, None, None, None, *lengths, 0.0, *private, False
    )
    rows = (dout * out).sum(-1).T
    assert softmax_d.shape == (HEADS, 29 + 3 * 128)
    close(softmax_d[:, :3], rows[:, :3])
    close(softmax_d[:, 3 + 256 : 29 + 256], rows[:, 3:])


def merge(parts):
    """(out, lse) of attention over the union of disjoint keys, as ring attention merges them."""
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse).transpose(-1, -2).unsqueeze(-1)
    return (weights * torch.stack([out for out, _ in parts])).sum(0), lse


def test_parts_of_the_keys_join_to_the_whole(interface):
    """Backward of a part takes the whole's out and lse, transposed views as ring attention has."""
    q, k, v = dense()
    whole = interface.flash_attn_func(q, k, v, softmax_scale=SCALE)
    dout = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (q, k, v), dout)
    private = VARIANTS["plain"][1]
    cuts = [(k[:, a:b], v[:, a:b]) for a, b in ((0, 16), (16, SEQLEN_K))]
    parts = [interface._flash_attn_forward(q, *kv, 0.0, *private, False)[:2] for kv in cuts]
    out, lse = merge(parts)
    close(out, whole)

    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    dq_sum, dks, dvs = torch.zeros_like(q), [], []
    for k_part, v_part in cuts:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k_part, v_part))
        interface._flash_attn_backward(
            dout, q, k_part, v_part, out, lse, dq, dk, dv, 0.0, *private, False
        )
        dq_sum += dq
        dks.append(dk)
        dvs.append(dv)
    for actual, wanted in zip(
        (dq_sum, torch.cat(dks, 1), torch.cat(dvs, 1)), expected, strict=True
    ):
        close(actual, wanted)


def test_backward_takes_the_lse_plus_inf_of_empty_rows(interface):
    q, k, v = torch.randn(1, 12, 2, 8), torch.randn(1, 7, 2, 8), torch.randn(1, 7, 2, 8)
    private = VARIANTS["causal"][1]
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, 0.0, *private, False)
    assert torch.equal(lse == math.inf, torch.arange(12).expand_as(lse) < 5)
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    interface._flash_attn_backward(
        torch.randn_like(out), q, k, v, out, lse, *grads, 0.0, *private, False
    )
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, :5].eq(0).all()


def test_varlen_forward_with_leftpad_and_seqused(interface):
    (q, k, v), lengths = packed()
    leftpad = torch.tensor([2, 0, 5], dtype=torch.int32)
    seqused = torch.tensor([9, 5, 20], dtype=torch.int32)
    private = VARIANTS["causal"][1]
    out = interface._flash_attn_varlen_forward(
        q, k, v, *lengths, 0.0, *private, leftpad_k=leftpad, seqused_k=seqused
    )[0]
    for rows, keys in ((slice(0, 3), slice(2, 9)), (slice(3, 29), slice(21, 36))):
        one = (x[at][None] for x, at in ((q, rows), (k, keys), (v, keys)))
        expected = interface.flash_attn_func(*one, softmax_scale=SCALE, causal=True)
        close(out[rows], expected[0].detach())


def test_paged_varlen_forward_has_one_split(interface):
    pages = torch.randn(2, 4, 256, KV_HEADS, DIM)
    q = torch.randn(2, HEADS, DIM)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    lengths = torch.tensor([300, 257], dtype=torch.int32)
    cu_seqlens = torch.arange(3, dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 300, 557], dtype=torch.int32)
    arguments = (q, *pages, cu_seqlens, cu_seqlens_k, 1, 300, 0.0, SCALE, False)
    paged = {"block_table": table, "seqused_k": lengths}
    out = interface._flash_attn_varlen_forward(*arguments, **paged)[0]
    for num_splits in (0, 1):
        again = interface._flash_attn_varlen_forward(*arguments, **paged, num_splits=num_splits)
        assert torch.equal(again[0], out)
    for b, length in enumerate(lengths.tolist()):
        k, v = (x[table[b].long()].flatten(0, 1)[None, :length] for x in pages)
        close(out[b], interface.flash_attn_func(q[None, b : b + 1], k, v, 0.0, SCALE)[0, 0])
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported"):
        interface._flash_attn_varlen_forward(*arguments, **paged, num_splits=2)


def test_extension_writes_into_out(interface):
    q, k, v = (x.detach() for x in dense())
    out = torch.full_like(q, math.nan)
    result = interface.flash_attn_gpu.fwd(
        q, k, v, out, None, 0.0, SCALE, False, -1, -1, 0.0, False, None
    )
    assert result[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, interface.flash_attn_func(q, k, v, softmax_scale=SCALE))
    assert result[2].shape == (0,)


def test_extension_refuses_a_generator(interface):
    gpu, bad, match = interface.flash_attn_gpu, torch.randn(1), "generator` argument is no longer"
    q, k, v = (x.detach() for x in dense())
    (q_rows, k_rows, v_rows), lengths = packed()
    lse = torch.randn(BATCH, HEADS, SEQLEN_Q)
    variant = (0.0, SCALE, True, -1, -1, 0.0, False)
    with pytest.raises(RuntimeError, match=match):
        gpu.fwd(q, k, v, None, None, *variant, bad)
    with pytest.raises(RuntimeError, match=match):
        gpu.bwd(q, q, k, v, q, lse, None, None, None, None, *variant, bad, None)
    variant = (0.0, SCALE, False, True, -1, -1, 0.0, False)
    with pytest.raises(RuntimeError, match=match):
        gpu.varlen_fwd(
            q_rows, k_rows, v_rows, None, *lengths[:2], None, None, None, None, *lengths[2:],
            *variant, bad, 0,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        gpu.varlen_bwd(
            q_rows, q_rows, k_rows, v_rows, q_rows, lse, None, None, None, *lengths[:2], None,
            *lengths[2:], *variant, bad, None,
        )  # fmt: skip


@pytest.mark.parametrize(
    "head_dim, kept, dropped",
    [(32, 128, 128), (40, 128, 64), (64, 128, 64), (96, 64, 64), (128, 64, 32), (256, 64, 64)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_block_sizes_without_cuda(interface, head_dim, kept, dropped, causal):
    assert interface._get_block_size_n("cpu", head_dim, False, causal) == kept
    assert interface._get_block_size_n(torch.device("cpu"), head_dim, True, causal) == dropped


@pytest.mark.parametrize(
    "capability, causal, size", [((8, 6), False, 32), ((8, 9), True, 64), ((9, 0), False, 64)]
)
def test_block_size_of_a_gpu(interface, monkeypatch, capability, causal, size):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert interface._get_block_size_n("cuda", 128, False, causal) == size


def test_lse_goes_there_and_back():
    lse = torch.randn(5)
    lse[[1, 3]] = -math.inf
    there = lse_to_flash_attn(lse)
    assert torch.equal(there, torch.where(lse.isinf(), math.inf, lse))
    assert torch.equal(lse_from_flash_attn(there), lse)


def test_small_helpers(interface):
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x) is x
    assert torch.equal(interface.maybe_contiguous(x.T), x.T)
    assert interface.maybe_contiguous(x.T).stride(-1) == 1
    assert [interface.round_multiple(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert interface.USE_TRITON_ROCM is False
