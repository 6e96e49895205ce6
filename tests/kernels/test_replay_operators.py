"""Calls that take the operators and are no replay: tracers, modes, switches, arguments that are no
metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashtile import config, flash_attn_func, ops
from flashtile.api import warm
from flashtile.testing.interpreter import interpreted, refuse_long_way, small_qkv


@pytest.mark.parametrize("given", [
    {"window_size": [3, 0]}, {"softmax_scale": torch.tensor(0.5)}, {"dropout_p": 0.5},
    {"attn_mask": torch.ones(20, 20, dtype=torch.bool)}, {"out": torch.empty(2, 20, 2, 8)},
], ids=lambda given: next(iter(given)))  # fmt: skip
def test_what_is_no_metadata_takes_the_operator(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with interpreted(capacity=64), torch.no_grad():
        flash_attn_func(*small_qkv(), **given)
        monkeypatch.setattr(ops, "forward", refuse_long_way)
        with pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(*small_qkv(), **given)


class _Seen:
    """Names of what a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def see(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Dispatched(_Seen, TorchDispatchMode):
    __torch_dispatch__ = _Seen.see


class _Called(_Seen, TorchFunctionMode):
    __torch_function__ = _Seen.see


@pytest.mark.parametrize(
    ("mode", "operators"), [(_Dispatched, ("forward", "backward")), (_Called, ("forward",))]
)
def test_a_mode_sees_the_operators(mode: Any, operators: tuple[str, ...]) -> None:
    """Autograd runs below modes of functions, whoever calls it."""
    x = small_qkv(requires_grad=True)
    with interpreted(capacity=64):
        for _ in range(2):
            flash_attn_func(*x).sum().backward()
        with mode() as seen:
            flash_attn_func(*x).sum().backward()
    assert {f"flashtile.{name}.default" for name in operators} <= set(seen.names)


class _Graphs(list[Any]):
    """A backend of torch.compile that keeps what it is to compile, and does as it says."""

    def __call__(self, graph: Any, _: Any) -> Any:
        self.append(graph)
        return graph

    def count_of(self, operator: Any) -> int:
        return [node.target for graph in self for node in graph.graph.nodes].count(operator)


def test_tracers_see_the_operator() -> None:
    def attend(*x: Any) -> Tensor:
        return flash_attn_func(*x)

    graphs, x = _Graphs(), small_qkv()
    with interpreted(capacity=64):
        for _ in range(2):
            expected = attend(*x)
        torch.testing.assert_close(torch.compile(attend, backend=graphs)(*x), expected)
        graphs += [make_fx(attend, tracing_mode=mode)(*x) for mode in ("real", "fake")]
    assert graphs.count_of(torch.ops.flashtile.forward.default) == 3


def test_compiled_autograd_sees_the_operator() -> None:
    graphs, (q, k, v) = _Graphs(), small_qkv(requires_grad=True)
    with interpreted(capacity=64):
        for _ in range(2):
            expected = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), (q, k, v))
        with compiled_autograd._enable(torch.compile(backend=graphs)):
            flash_attn_func(q, k, v).square().sum().backward()
    torch.testing.assert_close((q.grad, k.grad, v.grad), expected)
    assert graphs.count_of(torch.ops.flashtile.backward.default) == 1


def test_a_default_device_is_no_reason_to_take_the_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though torch makes it a mode."""
    x = small_qkv(requires_grad=True)
    with interpreted(capacity=64), torch.device("cpu"):
        flash_attn_func(*x).sum().backward()
        monkeypatch.setattr(ops, "forward", refuse_long_way)
        monkeypatch.setattr(torch.ops.flashtile.backward, "default", refuse_long_way)
        flash_attn_func(*x).sum().backward()


def test_negated_views_are_negated_and_zeros_are_zero() -> None:
    """Where memory does not hold the values: imaginary parts may be negated, gradients missing."""
    with interpreted(capacity=64):
        q, k, v = small_qkv(requires_grad=True)
        for _ in range(2):
            out = flash_attn_func(torch._neg_view(q), k, v)
            torch.testing.assert_close(out, flash_attn_func(-q, k, v))
            dout = torch.randn_like(out)
            found, expected = (
                torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), x)
                for x in (torch._neg_view(dout), -dout)
            )
            torch.testing.assert_close(found, expected)
            (dq,) = torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape))
            assert dq.eq(0).all()


def test_what_a_transform_leaves_behind_takes_the_operator() -> None:
    """A tensor that wraps another and has no memory of its own."""
    q, k, v = small_qkv()
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(q)  # type: ignore[func-returns-value]
    with interpreted(capacity=64):
        expected = flash_attn_func(q, k, v)
        torch.testing.assert_close(flash_attn_func(left[0], k, v), expected)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("switch", [
    partial(patch.object, config, "checked", True), forward_ad.dual_level, _deterministic,
    partial(patch.object, config, "allow_tf32", True), partial(patch.object, ops, "plan", None),
], ids=["checked", "forward mode", "deterministic", "tf32", "planner"])  # fmt: skip
def test_switches_take_the_operator(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = small_qkv()
    with interpreted(capacity=64):
        flash_attn_func(*x)
        monkeypatch.setattr(ops, "forward", refuse_long_way)
        flash_attn_func(*x)
        with switch(), pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(*x)


def test_what_autocast_casts_takes_the_operator() -> None:
    """Though calls of the dtype before the cast were met too."""
    x = small_qkv()
    with interpreted(capacity=64):
        assert flash_attn_func(*x).dtype == torch.float32
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                assert flash_attn_func(*x).dtype == torch.float16


def test_without_guards_every_call_takes_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are torch's own business: another version may have none."""
    monkeypatch.setattr(warm, "_guards", None)
    with interpreted(capacity=64):
        for _ in range(2):
            flash_attn_func(*small_qkv())
        assert not warm._kept
