"""`flash_attn.layers.rotary` against rotation as complex multiplication."""

import math

import pytest
import torch

BATCH, SEQLEN, HEADS, DIM, REACH = 3, 7, 2, 12, 40
OFFSETS = {"none": 0, "int": 5, "tensor": torch.tensor([4, 0, 21], dtype=torch.int32)}
LENGTHS = torch.tensor([7, 0, 4])


def tables(rotary_dim, dtype=torch.float32):
    angle = torch.rand(REACH, rotary_dim // 2) * 2 * math.pi
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x, cos, sin, interleaved, offsets=0):
    """(x1 + i x2) (cos + i sin) in fp64."""
    half = cos.shape[-1]
    positions = torch.arange(x.shape[1]) + torch.as_tensor(offsets).view(-1, 1)
    turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(2)
    turning, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    if interleaved:
        z = torch.complex(turning[..., ::2], turning[..., 1::2]) * turn
        pairs = torch.stack((z.real, z.imag), -1).flatten(-2)
    else:
        z = torch.complex(turning[..., :half], turning[..., half:]) * turn
        pairs = torch.cat((z.real, z.imag), -1)
    return torch.cat((pairs, rest), -1)


def close(actual, expected):
    bits = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bits, atol=bits)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("rotary_dim", [4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradient(rotary, dtype, rotary_dim, offsets, interleaved, inplace):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM, dtype=dtype, requires_grad=True)
    before = x.detach().clone().requires_grad_()
    cos, sin = tables(rotary_dim, dtype)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace, OFFSETS[offsets])
    expected = turned(before, cos, sin, interleaved, OFFSETS[offsets])
    close(out, expected)
    assert out.dtype == dtype
    assert torch.equal(x, out if inplace else before)
    upstream = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, upstream)
    close(dx, torch.autograd.grad(expected, before, upstream.double())[0])


def test_inplace_without_gradient_returns_x(rotary):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM)
    expected = turned(x, *(both := tables(DIM)), False)
    assert rotary.apply_rotary_emb(x, *both, inplace=True) is x
    close(x, expected)


def test_rows_of_no_sequence_stay(rotary):
    x, cu_seqlens = torch.ones(6, 1, 4), torch.tensor([0, 2, 4], dtype=torch.int32)
    cos, sin = torch.zeros(8, 2), torch.ones(8, 2)
    rotary.apply_rotary_emb(x, cos, sin, inplace=True, cu_seqlens=cu_seqlens, max_seqlen=2)
    assert x[:4, 0].eq(torch.tensor([-1.0, -1.0, 1.0, 1.0])).all()
    assert x[4:].eq(1).all()


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_varlen(rotary, bert_padding, offsets, inplace):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM)
    mask = torch.arange(SEQLEN) < LENGTHS[:, None]
    rows, indices, cu_seqlens, max_seqlen, _ = bert_padding.unpad_input(x, mask)
    rows.requires_grad_()
    cos, sin = tables(8)
    out = rotary.apply_rotary_emb(
        rows, cos, sin, inplace=inplace, seqlen_offsets=OFFSETS[offsets], cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )  # fmt: skip
    expected = turned(x, cos, sin, False, OFFSETS[offsets])
    close(bert_padding.pad_input(out, indices, BATCH, SEQLEN), expected * mask[..., None, None])
    upstream = torch.randn_like(x)
    (dx,) = torch.autograd.grad(out, rows, upstream[mask])
    back = turned(upstream, cos, -sin, False, OFFSETS[offsets])
    close(dx, back[mask])


def test_tokens_past_the_tables_stay(rotary):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM)
    cos, sin = tables(DIM)
    offsets = torch.tensor([0, REACH - 2, REACH + 9])
    out = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    close(out[0], turned(x[:1], cos, sin, False)[0])
    close(out[1, :2], turned(x[1:2, :2], cos, sin, False, REACH - 2)[0])
    assert torch.equal(out[1, 2:], x[1, 2:])
    assert torch.equal(out[2], x[2])


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kv_heads", [None, 1], ids=["three", "gqa"])
@pytest.mark.parametrize("own_k_tables", [False, True])
def test_qkv_and_kv_in_place(rotary, own_k_tables, kv_heads, grad):
    (cos, sin), (cos_k, sin_k) = tables(8), tables(8)
    shape = (3, HEADS) if kv_heads is None else (HEADS + 2,)
    qkv = torch.randn(BATCH, SEQLEN, *shape, DIM, requires_grad=grad)
    before = qkv.detach().clone().requires_grad_()
    num_heads_q = None if kv_heads is None else HEADS
    k_tables = (cos_k, sin_k) if own_k_tables else (None, None)
    out = rotary.apply_rotary_emb_qkv_(
        qkv, cos, sin, *k_tables, seqlen_offsets=OFFSETS["tensor"], num_heads_q=num_heads_q
    )
    assert torch.equal(out, qkv)
    assert (out is qkv) is not grad
    q, k, v = before.unbind(2) if kv_heads is None else before.split([HEADS, 1, 1], 2)
    q = turned(q, cos, sin, False, OFFSETS["tensor"])
    k = turned(k, *(k_tables if own_k_tables else (cos, sin)), False, OFFSETS["tensor"])
    join = torch.stack if kv_heads is None else torch.cat
    expected = join((q, k, v.double()), 2)
    close(out, expected)
    if grad:
        upstream = torch.randn_like(out)
        (dqkv,) = torch.autograd.grad(out, qkv, upstream)
        close(dqkv, torch.autograd.grad(expected, before, upstream.double())[0])


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_kv_in_place(rotary, grad):
    cos, sin = tables(8)
    kv = torch.randn(BATCH, SEQLEN, 2, HEADS, DIM, requires_grad=grad)
    before = kv.detach().clone().requires_grad_()
    out = rotary.apply_rotary_emb_kv_(kv, cos, sin, interleaved=True, seqlen_offsets=3)
    k, v = before.unbind(2)
    expected = torch.stack((turned(k, cos, sin, True, 3), v.double()), 2)
    assert torch.equal(out, kv)
    close(out, expected)
    if grad:
        upstream = torch.randn_like(out)
        (dkv,) = torch.autograd.grad(out, kv, upstream)
        close(dkv, torch.autograd.grad(expected, before, upstream.double())[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_plain_formula(rotary, interleaved):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM)
    cos, sin = tables(8)
    out = rotary.apply_rotary_emb_torch(x, cos[:SEQLEN], sin[:SEQLEN], interleaved)
    close(out, turned(x, cos, sin, interleaved))
    positions = torch.arange(SEQLEN) + OFFSETS["tensor"][:, None]
    out = rotary.apply_rotary_emb_torch(x, cos[positions], sin[positions], interleaved)
    close(out, turned(x, cos, sin, interleaved, OFFSETS["tensor"]))
    quarter = rotary.rotate_half(rotary.rotate_half(x, interleaved), interleaved)
    assert torch.equal(quarter, -x)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("scale_base", [None, 64], ids=["rope", "xpos"])
def test_embedding_makes_scores_depend_on_distance_only(rotary, scale_base, interleaved):
    layer = rotary.RotaryEmbedding(DIM, interleaved=interleaved, scale_base=scale_base)
    q, k = torch.randn(2, 1, 1, 1, DIM).expand(2, 1, 9, 1, DIM)
    q_turned, kv = layer(q.clone(), torch.stack((k, k), 2))
    scores = q_turned[0, :, 0] @ kv[0, :, 0, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert torch.equal(kv[:, :, 1], k)

    packed = torch.stack((q, k, k), 2)
    out = layer(packed)
    assert torch.equal(out[:, :, 0], q_turned)
    assert torch.equal(out[:, :, 1:], kv)


def test_embedding_angles_are_those_of_the_paper(rotary):
    layer = rotary.RotaryEmbedding(8, base=100.0)
    x = torch.randn(1, 5, 3, 1, 8)
    angle = torch.arange(5.0)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = turned(x[:, :, 0], angle.cos(), angle.sin(), False)
    close(layer(x)[:, :, 0], expected)


def test_xpos_scales_are_one_in_the_middle_of_the_table(rotary):
    layer = rotary.RotaryEmbedding(DIM, scale_base=16)
    layer(torch.randn(1, 9, 3, HEADS, DIM))
    both = (
        layer._cos_cached**2 + layer._sin_cached**2,
        layer._cos_k_cached**2 + layer._sin_k_cached**2,
    )
    dims = (torch.arange(0, DIM, 2) + 0.4 * DIM) / (1.4 * DIM)
    q_scales = dims ** ((torch.arange(9) - 4)[:, None] / 16)
    close(both[0], q_scales**2)
    close(both[1], q_scales**-2)


def test_embedding_tables_grow_and_follow_dtype(rotary):
    layer = rotary.RotaryEmbedding(DIM)
    layer(torch.randn(1, 5, 3, HEADS, DIM))
    short = layer._cos_cached
    layer(torch.randn(1, 4, 3, HEADS, DIM), seqlen_offset=1)
    assert layer._cos_cached is short
    layer(torch.randn(1, 4, 3, HEADS, DIM), seqlen_offset=OFFSETS["tensor"][:1], max_seqlen=30)
    assert layer._cos_cached.shape == (30, DIM // 2)
    assert torch.equal(layer._cos_cached[:5], short)
    layer.to(torch.bfloat16)(torch.randn(1, 5, 3, HEADS, DIM, dtype=torch.bfloat16))
    assert torch.equal(layer._cos_cached, short.to(torch.bfloat16))


def test_embedding_trains_with_tables_from_inference_mode(rotary):
    layer = rotary.RotaryEmbedding(DIM)
    with torch.inference_mode():
        layer(torch.randn(1, 5, 3, HEADS, DIM))
    qkv = torch.randn(1, 5, 3, HEADS, DIM, requires_grad=True)
    layer(qkv).sum().backward()
    assert qkv.grad.isfinite().all()


def test_errors(rotary):
    x = torch.randn(BATCH, SEQLEN, HEADS, DIM)
    cos, sin = tables(DIM)
    with pytest.raises(ValueError, match="rotary_dim=14 of cos must not exceed x's head_dim 12"):
        rotary.apply_rotary_emb(x, *tables(14))
    with pytest.raises(ValueError, match="cos has 40 positions, seqlen_offsets=34 \\+ 7"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=34)
    with pytest.raises(ValueError, match=r"seqlen_offsets.shape=\(2,\) must be \(batch=3,\)"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="max_seqlen is None"):
        cu_seqlens = torch.tensor([0, 7], dtype=torch.int32)
        rotary.apply_rotary_emb(x[0], cos, sin, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"sin has shape \(3, 6\); it must be cos's"):
        rotary.apply_rotary_emb(x, cos, sin[:3])
    with pytest.raises(ValueError, match="dimension 2 must be 3"):
        rotary.apply_rotary_emb_qkv_(torch.randn(1, 3, 4, HEADS, DIM), cos, sin)
    with pytest.raises(ValueError, match="dimension 2 must be 2"):
        rotary.apply_rotary_emb_kv_(torch.randn(1, 3, 3, HEADS, DIM), cos, sin)
    with pytest.raises(ValueError, match="num_heads_q is 4; qkv has 7 heads"):
        rotary.apply_rotary_emb_qkv_(torch.randn(1, 3, 7, DIM), cos, sin, num_heads_q=4)
    with pytest.raises(ValueError, match="num_heads_q is None"):
        rotary.apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(ValueError, match="max_seqlen is None"):
        layer = rotary.RotaryEmbedding(DIM)
        layer(torch.randn(1, 4, 3, HEADS, DIM), seqlen_offset=torch.tensor([1]))
