"""Numbers and memory in the Triton kernels: extremes, empty rows, empty tensors, any strides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flashtile import flash_attn_func, flash_attn_varlen_func
from flashtile.testing import Case, Problem, assert_matches_reference, run
from flashtile.testing.allocations import assert_touches_nothing_else, fenced_allocations
from flashtile.testing.layouts import LAYOUTS, lay_out

FP32, FP16 = torch.float32, torch.float16


def _case(seqlen_q: int, seqlen_k: int, **features: Any) -> Case:
    return Case("numbers", seqlen_q, seqlen_k, 1, 2, 1, 8, features=features)


@pytest.mark.parametrize("seqlen", [15, 17, 31])
@pytest.mark.parametrize("level", [-120.0, -1e4, 1e4])
def test_all_logits_far_from_zero(level: float, seqlen: int) -> None:
    """What a tile is padded with scores 0, and exp(0 + 120) is infinite in fp32."""
    problem = _case(seqlen, seqlen, softmax_scale=1.0, causal=True).draw(1)
    q, k = (problem.tensors[n].mul_(0.1) for n in "qk")
    q[..., 0], k[..., 0] = 8.0, level / 8.0
    found = run(problem)
    for name, x in (("out", found.out), *found.grads.items()):
        assert x.isfinite().all(), name
        assert x.abs().max() < abs(level), name


@pytest.mark.parametrize("where", [0, 17, 19])
def test_one_nan_key(where: int) -> None:
    """Only the queries that see it turn NaN."""
    q, k, v = _case(20, 20).draw(2).tensors.values()
    clean = flash_attn_func(q, k, v, causal=True)
    k[0, where, 0, 5] = math.nan
    out = flash_attn_func(q, k, v, causal=True)
    assert out[:, where:].isnan().all()
    assert torch.equal(out[:, :where], clean[:, :where])


@pytest.mark.parametrize("kind", ["bool", "float", "documents"])
def test_rows_that_see_no_key(kind: str) -> None:
    """0, -inf and no gradient, one row alone and a whole block of them."""
    empty = torch.zeros(40, dtype=torch.bool)
    empty[3], empty[16:32] = True, True
    seen = (torch.rand(1, 1, 40, 40) > 0.3) & ~empty[:, None]
    keywords: dict[str, Any] = {"attn_mask": seen}
    if kind == "float":
        keywords = {"attn_mask": torch.zeros(seen.shape).masked_fill(~seen, -math.inf)}
    if kind == "documents":
        ids = torch.arange(40)[None] // 11
        keywords = {"document_ids": (ids.masked_fill(empty, 7), ids)}
    results = assert_touches_nothing_else(_case(40, 40, **keywords).draw(3))
    assert results.out[:, empty].eq(0).all()
    assert results.lse[:, :, empty].eq(-math.inf).all()
    assert results.grads["q"][:, empty].eq(0).all()


@pytest.mark.parametrize("softcap", [0.05, 1000.0])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_extreme_softcaps(softcap: float, dtype: torch.dtype) -> None:
    """A cap that flattens everything and one that changes nothing."""
    problem = _case(20, 36, softcap=softcap, window_size=(7, 0)).draw(4, dtype)
    assert_matches_reference(problem)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    """Also on rows that see no key: its weight is 0, and so is its gradient."""
    problem = _case(36, 20, causal=True).draw(5)
    expected = run(problem)
    problem.tensors["learnable_sink"] = torch.full((2,), -math.inf)
    found = run(problem)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name], grad)
    assert found.grads["learnable_sink"].eq(0).all()


@pytest.mark.parametrize("which", ["out", "lse"])
def test_each_result_may_have_no_gradient(which: str) -> None:
    """dout or dlse is None; what is asked for is all that is returned."""
    x = [t.requires_grad_() for t in _case(18, 20, softcap=3.0).draw(6).tensors.values()]
    out, lse = flash_attn_func(*x, causal=True, return_lse=True)
    result = out if which == "out" else lse
    other = lse if which == "out" else out
    weights = torch.randn_like(result)
    alone = torch.autograd.grad(result, x, weights, retain_graph=True)
    both = torch.autograd.grad((result, other), x, (weights, torch.zeros_like(other)))
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_that_are_asked_for(needed: tuple[int, ...]) -> None:
    x = list(_case(18, 20).draw(7).tensors.values())
    leaves = [t.clone().requires_grad_(at in needed) for at, t in enumerate(x)]
    out = flash_attn_func(*leaves, causal=True)
    dout = torch.randn_like(out)
    out.backward(dout)
    every = [t.requires_grad_() for t in x]
    wanted = torch.autograd.grad(flash_attn_func(*every, causal=True), every, dout)
    for at, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (at in needed)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, wanted[at])


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
def test_every_layout(layout: str) -> None:
    """NaN between the elements; the same bits as from contiguous tensors."""
    problem = Case("layout", 18, 20, 2, 4, 2, 8, features={"causal": True}).draw(8)
    moved = {n: lay_out(x, layout) for n, x in problem.tensors.items()}
    plain = {n: x.contiguous() for n, x in moved.items()}
    found, expected = (run(problem._replace(tensors=x)) for x in (moved, plain))
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)
    for name, grad in found.grads.items():
        assert torch.equal(grad, expected.grads[name])
        assert grad.is_contiguous()


@pytest.mark.parametrize("layout", ["heads_first", "every_other_head", "strided", "broadcast"])
def test_every_layout_of_dout(layout: str) -> None:
    x = [t.requires_grad_() for t in _case(18, 20, causal=True).draw(9).tensors.values()]
    out = flash_attn_func(*x, causal=True)
    dout = torch.randn_like(out)
    moved = dout[:1, :1, :1, :1].expand(out.shape) if layout == "broadcast" else None
    moved = lay_out(dout, layout) if moved is None else moved
    found = torch.autograd.grad(out, x, moved, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(out, x, moved.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads", "kv_heads"),
    [(2, 0, 9, 4, 2), (2, 5, 0, 4, 2), (2, 0, 0, 4, 2), (0, 5, 5, 4, 2), (2, 5, 5, 0, 2),
     (2, 5, 5, 0, 0)],
)  # fmt: skip
def test_empty_dimensions(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, sink: bool
) -> None:
    """Results and gradients of the right shapes, 0 where there is anything."""
    shapes = ((seqlen_q, heads, 8), (seqlen_k, kv_heads, 8), (seqlen_k, kv_heads, 6))
    leaves = [torch.randn(batch, *shape).requires_grad_() for shape in shapes]
    keywords: dict[str, Any] = {}
    if sink:
        leaves.append(torch.randn(heads).requires_grad_())
        keywords["learnable_sink"] = leaves[-1]
    with fenced_allocations():
        out, lse = flash_attn_func(*leaves[:3], causal=True, return_lse=True, **keywords)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (batch, seqlen_q, heads, 6)
    assert out.eq(0).all()
    expected = leaves[3] if sink else torch.full((heads,), -math.inf)
    assert torch.equal(lse, expected[:, None].expand(batch, heads, seqlen_q))
    for grad, x in zip(grads, leaves, strict=True):
        assert grad.shape == x.shape
        assert grad.eq(0).all()


@pytest.mark.parametrize(("total", "cu"), [(0, (0,)), (0, (0, 0)), (5, (0,)), (21, (0, 0, 0))])
def test_packed_and_empty(total: int, cu: tuple[int, ...]) -> None:
    """No sequences, sequences of nothing, and rows that belong to none of them."""
    offsets = torch.tensor(cu, dtype=torch.int32)
    leaves = [torch.randn(total, h, 8).requires_grad_() for h in (2, 1, 1)]
    with fenced_allocations():
        out, lse = flash_attn_varlen_func(*leaves, offsets, offsets, return_lse=True)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()
    assert all(grad.eq(0).all() for grad in grads)


def test_other_dtypes_are_refused() -> None:
    """The interpreter computes bfloat16 wrongly without a word."""
    x = {n: torch.randn(1, 4, 1, 8, dtype=torch.bfloat16) for n in "qkv"}
    with pytest.raises(TypeError, match="the interpreter knows fp32 and fp16"):
        run(Problem(x, {}, False))
