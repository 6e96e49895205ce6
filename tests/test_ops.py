"""The torch operators: opcheck, compile, export, autocast, gradients asked for, functorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashtile
from flashtile.api import normalise
from flashtile.backends import torch as backend
from flashtile.backends.cache import NewTokens
from flashtile.testing import CASES, Case


def _qkv(seqlen: int = 33, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, seqlen, h, 16, dtype=dtype).requires_grad_(grad) for h in (4, 2, 2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_forward(case: Case) -> None:
    problem = case.draw(0)
    leaves = {n: x.requires_grad_() for n, x in problem.tensors.items()}
    call = normalise(**leaves, **problem.keywords)
    torch.library.opcheck(torch.ops.flashtile.forward.default, call.flat())


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_opcheck_backward(case: Case) -> None:
    problem = case.draw(0)
    call = normalise(**problem.tensors, **problem.keywords)
    out, lse = torch.ops.flashtile.forward.default(*call.flat())
    needs = [name in problem.tensors for name in ("q", "k", "v", "bias", "learnable_sink")]
    arguments = (torch.randn_like(out), None, out, lse, *call.flat(), needs)
    torch.library.opcheck(torch.ops.flashtile.backward.default, arguments)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_opcheck_kvcache(paged: bool, rotary: bool) -> None:
    q, k, v = _qkv(3, grad=False)
    caches = [torch.randn(4, 16, 2, 16) for _ in range(2)] if paged else [
        torch.randn(2, 32, 2, 16) for _ in range(2)
    ]  # fmt: skip
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32) if paged else None
    lengths = torch.tensor([5, 14], dtype=torch.int32)
    call = normalise(q, *caches, causal=True, seqused_k=lengths, block_table=table)
    cos, sin = (torch.randn(40, 4), torch.randn(40, 4)) if rotary else (None, None)
    new = NewTokens(k, v, rotary_cos=cos, rotary_sin=sin)
    torch.library.opcheck(torch.ops.flashtile.with_kvcache.default, (*new, *call.flat()))


def _public(name: str, x: list[Tensor]) -> Any:
    """A call of each public function on dense tensors of any length."""
    q, k, v = x
    packed = [t.flatten(0, 1) for t in x]
    cu = torch.arange(3, dtype=torch.int32) * q.shape[1]
    calls: dict[str, Any] = {
        "flash_attn_func": lambda: flashtile.flash_attn_func(
            q, k, v, causal=True, softcap=3.0, return_lse=True
        ),
        "flash_attn_qkvpacked_func": lambda: flashtile.flash_attn_qkvpacked_func(
            torch.stack((q, q, q), 2), causal=True
        ),
        "flash_attn_kvpacked_func": lambda: flashtile.flash_attn_kvpacked_func(
            q, torch.stack((k, v), 2), window_size=(5, 0)
        ),
        "flash_attn_varlen_func": lambda: flashtile.flash_attn_varlen_func(
            *packed, cu, cu, causal=True
        ),
        "flash_attn_varlen_qkvpacked_func": lambda: flashtile.flash_attn_varlen_qkvpacked_func(
            torch.stack((packed[0],) * 3, 1), cu, causal=True
        ),
        "flash_attn_varlen_kvpacked_func": lambda: flashtile.flash_attn_varlen_kvpacked_func(
            packed[0], torch.stack(packed[1:], 1), cu, cu
        ),
        "flash_attn_with_kvcache": lambda: flashtile.flash_attn_with_kvcache(
            q[:, :2], k, v, cache_seqlens=q.shape[1] - 1, causal=True
        ),
        "flash_attn_combine": lambda: flashtile.flash_attn_combine(
            torch.stack((q, 2 * q)), torch.stack((q[..., 0], q[..., 1]))
        ),
    }
    return calls[name]()


PUBLIC = tuple(name for name in flashtile.__all__ if name.startswith("flash_attn"))


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_fullgraph_with_gradients(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_public, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = _qkv()
    expected, found = _flat(_public(name, x)), _flat(compiled(name, x))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    grads = [
        torch.autograd.grad(sum(r.square().sum() for r in result), x, allow_unused=True)
        for result in (expected, found)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_scalars_that_change_compile_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    x = _qkv()

    def attend(value: float) -> Tensor:
        return flashtile.flash_attn_func(*x, **{name: value})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for value in (0.3, 0.7, 1.1):
        torch.testing.assert_close(compiled(value), attend(value))
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            attend(value)


@pytest.mark.parametrize("name", PUBLIC)
def test_ten_lengths_recompile_at_most_three_times(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_public, fullgraph=True, backend=counter)
    for seqlen in range(20, 120, 10):
        compiled(name, _qkv(seqlen))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", PUBLIC)
def test_exports_with_a_dynamic_length(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return _public(name, [q, k, v])

    seqlen = torch.export.Dim("seqlen", min=4, max=4096)
    shapes = {n: {1: seqlen} for n in ("q", "k", "v")}
    exported = torch.export.export(Module(), tuple(_qkv(grad=False)), dynamic_shapes=shapes)
    x = _qkv(57, grad=False)
    for a, b in zip(_flat(exported.module()(*x)), _flat(_public(name, x)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_kvcache_append_mutates_the_cache() -> None:
    torch._dynamo.reset()
    q, k, v = _qkv(2, grad=False)
    caches = [torch.zeros(2, 8, 2, 16) for _ in range(2)]
    lengths = torch.tensor([3, 5], dtype=torch.int32)

    def step(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return flashtile.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True
        )

    eager = [x.clone() for x in caches]
    expected = step(*eager)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*caches)
    torch.testing.assert_close(found, expected)
    for a, b in zip(caches, eager, strict=True):
        assert torch.equal(a, b)


def test_dropout_compiles_and_is_replayed_in_backward() -> None:
    """With V the identity, out is the dropped P and dV its transpose: one mask in both."""
    torch._dynamo.reset()
    q, k = (torch.randn(1, 24, 1, 8) for _ in range(2))
    v = torch.eye(24)[None, :, None].clone().requires_grad_()
    step = torch.compile(
        lambda: flashtile.flash_attn_func(q, k, v, 0.4), fullgraph=True, backend="aot_eager"
    )
    out = step()
    dout = torch.eye(24)[None, :, None]
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv[0, :, 0], out.detach()[0, :, 0].T)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "bias", "sink", "qsink", ""])
def test_only_the_gradients_asked_for(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    original = backend.backward
    monkeypatch.setattr(
        backend,
        "backward",
        lambda *a: asked.append(a[-1]) or original(*a),  # type: ignore[func-returns-value]
    )
    names = ("q", "k", "v", "bias", "sink")
    picked = ("bias" in wanted, "sink" in wanted)
    letters = wanted.replace("bias", "").replace("sink", "")
    needs = (*(n in letters for n in "qkv"), *picked)
    q, k, v = _qkv(grad=False)
    tensors = [q, k, v, torch.randn(1, 4, 33, 33), torch.randn(4)]
    for x, need in zip(tensors, needs, strict=True):
        x.requires_grad_(need)
    out = flashtile.flash_attn_func(*tensors[:3], bias=tensors[3], learnable_sink=tensors[4])
    assert out.requires_grad == any(needs)
    if any(needs):
        out.square().sum().backward()
        assert asked == [needs]
    for name, x, need in zip(names, tensors, needs, strict=True):
        assert (x.grad is not None) == need, name


def test_lse_alone_is_differentiable() -> None:
    q, k, v = _qkv()
    _, lse = flashtile.flash_attn_func(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    exact = flashtile.reference.attention(q, k, v).lse.sum()
    expected = torch.autograd.grad(exact, (q, k))
    torch.testing.assert_close(dq, expected[0])
    torch.testing.assert_close(dk, expected[1])
    assert dv.eq(0).all()


def test_double_backward_says_so() -> None:
    q, k, v = _qkv()
    (dq,) = torch.autograd.grad(
        flashtile.flash_attn_func(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="flashtile has no second derivative"):
        dq.sum().backward()


def test_changed_inputs_are_noticed() -> None:
    q, k, v = _qkv()
    x = q * 1.0
    out = flashtile.flash_attn_func(x, k, v)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_casts_q_k_v() -> None:
    q, k, v = _qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashtile.flash_attn_func(q, k.to(torch.bfloat16), v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct = torch.ops.flashtile.forward.default(*normalise(q, k, v).flat())[0]
    assert direct.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"window_size": (4, 0)}, {"softcap": 5.0}], ids=str)
def test_a_backward_under_autocast(keywords: dict[str, Any], dtype: torch.dtype) -> None:
    """Of a forward that was outside as well: gradients are those of no autocast."""
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        leaves = _qkv(9)
        out, lse = flashtile.flash_attn_func(*leaves, return_lse=True, **keywords)
        with torch.autocast("cpu", dtype=dtype, enabled=inside):
            (out.sum() + lse.sum()).backward()
        found.append([x.grad for x in leaves])
    for without, within in zip(*found, strict=True):
        assert without is not None and within is not None
        assert torch.equal(without, within)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(dim: int) -> None:
    q, k, v = _qkv(9, grad=False)
    stacked = torch.stack((q, 2 * q), dim)
    attend = torch.func.vmap(lambda x: flashtile.flash_attn_func(x, k, v, causal=True), dim)
    for x, out in zip(stacked.unbind(dim), attend(stacked), strict=True):
        torch.testing.assert_close(out, flashtile.flash_attn_func(x, k, v, causal=True))


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_functorch_derivatives_say_no(transform: str) -> None:
    """torch.library's autograd has neither: an error, never a silent zero."""
    q, k, v = _qkv(9, grad=False)

    def loss(q: Tensor) -> Tensor:
        return flashtile.flash_attn_func(q, k, v, causal=True).square().sum()

    with pytest.raises((RuntimeError, NotImplementedError), match=r"functorch|forward-mode"):
        if transform == "grad":
            torch.func.grad(loss)(q)
        else:
            torch.func.jvp(loss, (q,), (q,))


def test_forward_mode_says_no() -> None:
    q, k, v = _qkv(9, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, torch.randn_like(k))
        with pytest.raises(NotImplementedError, match="k has a forward-mode tangent"):
            flashtile.flash_attn_func(q, dual, v)
        caches = torch.zeros(2, 2, 20, 2, 16)
        with pytest.raises(NotImplementedError, match="k has a forward-mode tangent"):
            flashtile.flash_attn_with_kvcache(q, *caches, dual, v, cache_seqlens=3)
        assert not caches.any()


def test_fake_tensors_of_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 33, 4, 16, device="cuda", dtype=torch.bfloat16)
        out, lse = torch.ops.flashtile.forward.default(*normalise(q, q, q).flat())
    assert out.device.type == "cuda"
    assert (out.shape, lse.shape) == ((2, 33, 4, 16), (2, 4, 33))
    assert lse.dtype == torch.float32
