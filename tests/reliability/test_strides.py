"""Reliability, memory: strides, offsets, padding, `out`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashtile.api import normalise
from flashtile.testing import Case, Problem, assert_matches_reference, fence, run
from flashtile.testing.layouts import LAYOUTS, lay_out

VARIANTS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"causal": True, "softcap": 3.0}, {"window_size": (9, 3)},
]  # fmt: skip
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def test_strides_beyond_int32(tmp_path: Path) -> None:
    """Batch strides of more than 2**31 elements, over a sparse file that costs nothing."""
    stride = 2**31 + 40
    q, k, v = (torch.randn(2, 7, h, 8, dtype=torch.bfloat16) for h in (4, 2, 2))
    far = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        size = stride + x[0].numel()
        path = tmp_path / name
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
        far.append(memory.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x))
    near, distant = (
        run(Problem(dict(zip("qkv", x, strict=True)), {"causal": True}, False))
        for x in ((q, k, v), far)
    )
    assert torch.equal(near.out, distant.out)
    assert all(torch.equal(near.grads[n], distant.grads[n]) for n in "qkv")


def test_padding_rows_are_never_read() -> None:
    """NaN past the last offset; 0 and -inf in the results, 0 in the gradients."""
    cu_q, cu_k = (torch.tensor(n, dtype=torch.int32) for n in ([0, 9, 9, 30], [0, 4, 20, 37]))
    q, k, v = (torch.randn(n, h, 16) for n, h in ((36, 4), (41, 2), (41, 2)))
    for x, end in ((q, 30), (k, 37), (v, 37)):
        x[end:] = math.nan
        x.requires_grad_()
    out, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    assert out[30:].eq(0).all()
    assert lse[:, 30:].eq(-math.inf).all()
    dout = torch.randn_like(out)
    dout[30:] = math.nan
    grads = torch.autograd.grad(out, (q, k, v), dout)
    cut = [x.detach()[:end].requires_grad_() for x, end in ((q, 30), (k, 37), (v, 37))]
    plain = flash_attn_varlen_func(*cut, cu_q, cu_k, causal=True)
    assert torch.equal(out[:30], plain)
    for x, y in zip(grads, torch.autograd.grad(plain, cut, dout[:30]), strict=True):
        assert torch.equal(x[: len(y)], y)
        assert x[len(y) :].eq(0).all()


@TYPES
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_strides_change_no_bit(variant: dict[str, Any], dtype: torch.dtype) -> None:
    """Every layout of each of q, k and v, against contiguous tensors."""
    x = {n: torch.randn(2, 33, h, 16).to(dtype) for n, h in (("q", 4), ("k", 2), ("v", 2))}
    for layout in LAYOUTS:
        source = {n: lay_out(t, layout) for n, t in x.items()}
        plain = {n: t.contiguous() for n, t in source.items()}
        expected = run(Problem(plain, variant, False))
        for mixed in ({n: source[n]} for n in "qkv"):
            found = run(Problem({**plain, **mixed}, variant, False))
            assert torch.equal(found.out, expected.out), (layout, *mixed)
            assert torch.equal(found.lse, expected.lse), (layout, *mixed)
            for name in "qkv":
                assert torch.equal(found.grads[name], expected.grads[name]), (layout, *mixed)


@TYPES
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_gradient_of_a_sum(variant: dict[str, Any], dtype: torch.dtype) -> None:
    """Autograd hands `sum` an expanded dout, all of whose strides are 0."""
    x = [torch.randn(2, 33, h, 16).to(dtype).requires_grad_() for h in (4, 2, 2)]
    strides = []
    out = flash_attn_func(*x, **variant)
    out.register_hook(lambda dout: strides.append(dout.stride()))
    expanded = torch.autograd.grad(out.sum(), x)
    assert strides == [(0, 0, 0, 0)]
    out = flash_attn_func(*x, **variant)
    contiguous = torch.autograd.grad(out, x, torch.ones_like(out))
    transposed = torch.autograd.grad(
        flash_attn_func(*x, **variant), x, lay_out(torch.ones_like(out), "heads_first")
    )
    assert expanded[2].float().abs().max() > 0.5
    for a, b, c in zip(expanded, contiguous, transposed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("layouts", [("contiguous", "heads_first"), ("strided", "packed")])
def test_fakes_know_the_strides(layouts: tuple[str, str]) -> None:
    """K and v of different strides; results and gradients are as the fakes say."""
    q, k, v = (torch.randn(2, 9, h, 16) for h in (4, 2, 2))
    k, v = (lay_out(x, layout) for x, layout in zip((k, v), layouts, strict=True))
    call = normalise(*(x.requires_grad_() for x in (q, k, v)), causal=True)
    torch.library.opcheck(torch.ops.flashtile.forward.default, call.flat())
    out, lse = torch.ops.flashtile.forward.default(*call.flat())
    arguments = (lay_out(out.detach(), "heads_first"), lse.detach(), out.detach(), lse.detach())
    detached = (x.detach() if isinstance(x, Tensor) else x for x in call.flat())
    needs = [True, True, True, False, False]
    torch.library.opcheck(torch.ops.flashtile.backward.default, (*arguments, *detached, needs))


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_unaligned_tensors(offset: int, compiled: bool) -> None:
    """Base addresses that are no multiple of 16 bytes."""

    def unaligned(x: Tensor) -> Tensor:
        memory = torch.full((x.numel() + 16,), math.nan, dtype=x.dtype)
        start = -(memory.data_ptr() // x.element_size()) % 8 + offset
        return memory[start : start + x.numel()].view(x.shape).copy_(x)

    x = [torch.randn(1, 21, h, 8, dtype=torch.bfloat16) for h in (4, 2, 2)]
    moved = [unaligned(t) for t in x]
    assert all(t.data_ptr() % 16 == 2 * offset for t in moved)
    function = flash_attn_func
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(*moved, causal=True), flash_attn_func(*x, causal=True))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "one_head"])
def test_out_of_any_strides(layout: str) -> None:
    """The result lands in `out`, and nowhere else."""
    q, k, v = (torch.randn(2, 9, h, 16) for h in (4, 2, 2))
    expected = flash_attn_func(q, k, v, causal=True)
    out = lay_out(torch.randn_like(q), layout)
    memory = torch.empty(0).set_(out.untyped_storage())
    holes = memory.isnan()
    assert flash_attn_func(q, k, v, causal=True, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(memory.isnan(), holes)


def test_out_overlapping_a_part_of_an_input() -> None:
    """One shared row is enough, and nothing is written; a neighbour is welcome."""
    memory = torch.randn(3, 9, 4, 16)
    before = memory.clone()
    k = v = memory[:2]
    for name, out in (("k", memory[1:]), ("q", memory.flatten(0, 1)[8:26].view(2, 9, 4, 16))):
        q = memory[:2] if name == "q" else torch.randn(2, 9, 4, 16)
        with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
            flash_attn_func(q, k, v, out=out)
        assert torch.equal(memory, before)
    q = torch.randn(1, 9, 4, 16)
    expected = flash_attn_func(q, memory[:1], memory[1:2])
    flash_attn_func(q, memory[:1], memory[1:2], out=memory[2:])
    assert torch.equal(memory[2:], expected)
    assert torch.equal(memory[:2], before[:2])


@pytest.mark.parametrize("which", [0, 1])
def test_appending_to_a_cache_whose_last_dimension_is_strided(which: int) -> None:
    """The cache is written where it lies, or the call says that it cannot; never lost."""
    caches = [torch.randn(2, 16, 2, 8) for _ in range(2)]
    caches[which] = lay_out(caches[which], "strided")
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    try:
        flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=5)
    except ValueError as error:
        assert f"{'kv'[which]}_cache" in str(error)
    else:
        assert torch.equal(caches[0][:, 5:6], k)
        assert torch.equal(caches[1][:, 5:6], v)


@pytest.mark.parametrize("gap", [1, 3, 8])
def test_rows_with_canaries_between_them(gap: int) -> None:
    """Rows of odd strides with NaN between them: right, and nothing is written."""
    problem = Case("gap", 33, 47, features={"causal": True}).draw(gap)
    guards = {n: fence(x, gap) for n, x in problem.tensors.items()}
    assert_matches_reference(problem._replace(tensors={n: g.tensor for n, g in guards.items()}))
    for name, guard in guards.items():
        guard.assert_unchanged(name)
