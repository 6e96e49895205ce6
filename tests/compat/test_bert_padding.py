"""`flash_attn.bert_padding` against indexing with a bool mask."""

import pytest
import torch

MASK = torch.tensor(
    [[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["vectors", "heads"])
def test_round_trip_and_gradient(bert_padding, dtype, shape):
    x = torch.randn(4, 6, *shape, requires_grad=True)
    mask = MASK.to(dtype)
    packed, indices, cu_seqlens, max_seqlen, seqused = bert_padding.unpad_input(x, mask)
    assert torch.equal(packed, x[MASK.bool()])
    assert indices.tolist() == MASK.flatten().nonzero().flatten().tolist()
    assert cu_seqlens.tolist() == [0, 3, 6, 6, 12]
    assert seqused.tolist() == [3, 3, 0, 6]
    assert (cu_seqlens.dtype, seqused.dtype) == (torch.int32, torch.int32)
    assert max_seqlen == 6
    assert isinstance(max_seqlen, int)

    visible = MASK.bool().view(4, 6, *(1,) * len(shape))
    padded = bert_padding.pad_input(packed, indices, 4, 6)
    assert torch.equal(padded, x * visible)
    upstream = torch.randn_like(x)
    (dx,) = torch.autograd.grad(padded, x, upstream)
    assert torch.equal(dx, upstream * visible)


def test_unused_tokens_get_a_place_but_are_not_used(bert_padding):
    x = torch.randn(4, 6, 5)
    unused = torch.zeros_like(MASK)
    unused[0, 3] = unused[2, :2] = 1
    packed, _, cu_seqlens, max_seqlen, seqused = bert_padding.unpad_input(x, MASK, unused)
    assert torch.equal(packed, x[(MASK + unused).bool()])
    assert cu_seqlens.tolist() == [0, 4, 7, 9, 15]
    assert seqused.tolist() == [3, 3, 0, 6]
    assert max_seqlen == 6


def test_concatenated_sequences(bert_padding):
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 5)
    packed, indices, cu_seqlens, max_seqlen = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths
    )
    assert torch.equal(packed, torch.cat((x[0, :5], x[1], x[2])))
    assert indices.tolist() == [*range(5), *range(6, 18)]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 11, 17]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6


def test_index_first_axis_adds_the_gradients_of_repeats(bert_padding):
    x = torch.randn(4, 3, requires_grad=True)
    indices = torch.tensor([2, 0, 2])
    rows = bert_padding.index_first_axis(x, indices)
    assert torch.equal(rows, x[indices])
    upstream = torch.randn_like(rows)
    (dx,) = torch.autograd.grad(rows, x, upstream)
    torch.testing.assert_close(dx[2], upstream[0] + upstream[2])
    assert dx[[1, 3]].eq(0).all()


def test_index_put_first_axis(bert_padding):
    values, indices = torch.randn(3, 2, 2, requires_grad=True), torch.tensor([4, 0, 3])
    rows = bert_padding.index_put_first_axis(values, indices, 6)
    assert torch.equal(rows[indices], values)
    assert rows[[1, 2, 5]].eq(0).all()
    upstream = torch.randn_like(rows)
    assert torch.equal(torch.autograd.grad(rows, values, upstream)[0], upstream[indices])


def test_index_first_axis_residual(bert_padding):
    x = torch.randn(4, 3, requires_grad=True)
    indices = torch.tensor([3, 1])
    rows, residual = bert_padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices])
    assert torch.equal(residual, x)
    upstream = torch.randn_like(x)
    (dx,) = torch.autograd.grad((rows * 2).sum() + (residual * upstream).sum(), x)
    wanted = upstream.clone()
    wanted[indices] += 2
    torch.testing.assert_close(dx, wanted)
