"""Calls made for their like: other tensors in the places of the first ones, nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia import driver as nvidia

import flashtile
from flashtile import config, flash_attn_func, flash_attn_varlen_func, ops
from flashtile.api import warm
from flashtile.backends import blocklists, driver, launch, packed, replays, triton
from flashtile.testing import Case, assert_matches_reference
from flashtile.testing.cases import Problem
from flashtile.testing.interpreter import interpreted

DENSE = Case("causal", 20, 33, head_dim=8, features={"causal": True})
PACKED = Case("packed", head_dim=8, lengths=((17, 17), (0, 5), (9, 20)), features={"causal": True})
CASES = [
    DENSE, PACKED,
    Case("mods", 20, 20, head_dim=8, features={"softcap": 3.0, "window_size": (9, 2)},
         tensors=("alibi_slopes", "bias", "learnable_sink")),
    Case("dropout", 20, 20, head_dim=8, features={"dropout_p": 0.3}),
]  # fmt: skip
PAGED = Case("paged", head_dim=8, lengths=((17, 17), (3, 20)), page_size=4)


def _same_shapes(case: Case, seed: int) -> Problem:
    """Other numbers where a launch may differ, the same storage where it may not."""
    problem = case.draw(1)
    g = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(x.shape, generator=g) for n, x in problem.tensors.items()}
    return problem._replace(tensors=tensors)


def _qkv(**options: Any) -> list[Tensor]:
    return [torch.randn(2, 20, 2, 8, **options) for _ in "qkv"]


def _refuse(*_: Any) -> None:
    raise AssertionError("the long way was taken")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_later_calls_are_replayed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with interpreted(capacity=64):
        assert_matches_reference(_same_shapes(case, 0), "first")
        assert None not in replays._replays.values()
        kept = len(replays._replays)
        monkeypatch.setattr(triton, "run", _refuse)
        if case.name != "dropout":  # whose state is a new tensor of the operator's
            monkeypatch.setattr(ops, "forward", _refuse)
            monkeypatch.setattr(torch.ops.flashtile.backward, "default", _refuse)
        for seed in (1, 2):
            assert_matches_reference(_same_shapes(case, seed), f"replay {seed}")
        assert len(replays._replays) == kept


@pytest.mark.parametrize("tensor", ["attn_mask", "document_ids"])
@pytest.mark.parametrize("lengths", [(), ((17, 17), (9, 9))], ids=bool)
def test_masks_given_as_tensors_are_replayed(
    tensor: str, lengths: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their classification, lists, forward and gradients; each with its own mask."""
    case = Case("masked", 40, 40, head_dim=8, lengths=lengths, tensors=(tensor,))
    with interpreted(list_block=32, capacity=64):
        assert_matches_reference(case.draw(1), "first")
        assert None not in replays._replays.values()
        monkeypatch.setattr(launch, "run", _refuse)
        for module in (triton, blocklists):
            monkeypatch.setattr(module, "run", _refuse)
        for seed in (2, 3):
            assert_matches_reference(case.draw(seed), f"replay {seed}")


def test_gradients_of_pages_are_not_replayed() -> None:
    with interpreted(capacity=64):
        for seed in range(3):
            assert_matches_reference(_same_shapes(PAGED, seed), f"call {seed}")
        assert list(replays._replays.values()).count(None) == 1


def test_lengths_may_change() -> None:
    """Contents of cu_seqlens are no metadata."""
    q, k, v = (torch.randn(20, 2, 8) for _ in "qkv")
    with interpreted(capacity=64), torch.no_grad():
        for offsets in ([0, 5, 20], [0, 20, 20], [0, 0, 13]):
            cu = torch.tensor(offsets, dtype=torch.int32)
            out = flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
            exact = flashtile.reference.attention(
                q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu
            ).out
            torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
        assert len(replays._replays) == len(warm._kept) == 1


def test_one_tensor_in_two_places_may_be_two_next_time() -> None:
    with interpreted(capacity=64):
        x = torch.randn(1, 20, 2, 8)
        twice = Problem({"q": x, "k": x, "v": x}, {"causal": True}, False)
        assert_matches_reference(twice)
        apart = Problem({n: torch.randn(1, 20, 2, 8) for n in "qkv"}, {"causal": True}, False)
        assert_matches_reference(apart)
        assert None not in replays._replays.values()


def test_other_metadata_is_another_launch() -> None:
    with interpreted(capacity=64):
        for length in (20, 21):
            for causal in (False, True):
                case = Case("", length, length, head_dim=8, features={"causal": causal})
                assert_matches_reference(case.draw(length))
                assert_matches_reference(case.draw(length + 1))


def test_everything_goes_when_it_is_full() -> None:
    with interpreted(capacity=4):
        for length in range(20, 24):
            assert_matches_reference(Case("", length, length, head_dim=8).draw(1))
            assert len(replays._replays) <= 4


@pytest.mark.parametrize("given", [
    {"window_size": [3, 0]}, {"softmax_scale": torch.tensor(0.5)}, {"dropout_p": 0.5},
    {"attn_mask": torch.ones(20, 20, dtype=torch.bool)}, {"out": torch.empty(2, 20, 2, 8)},
], ids=lambda given: next(iter(given)))  # fmt: skip
def test_what_is_no_metadata_takes_the_operator(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with interpreted(capacity=64), torch.no_grad():
        flash_attn_func(*_qkv(), **given)
        monkeypatch.setattr(ops, "forward", _refuse)
        with pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(*_qkv(), **given)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "operators"), [(_Dispatched, ("forward", "backward")), (_Called, ("forward",))]
)
def test_a_mode_sees_the_operators(mode: Any, operators: tuple[str, ...]) -> None:
    """Autograd runs below modes of functions, whoever calls it."""
    x = _qkv(requires_grad=True)
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

    graphs, x = _Graphs(), _qkv()
    with interpreted(capacity=64):
        for _ in range(2):
            expected = attend(*x)
        torch.testing.assert_close(torch.compile(attend, backend=graphs)(*x), expected)
        graphs += [make_fx(attend, tracing_mode=mode)(*x) for mode in ("real", "fake")]
    assert graphs.count_of(torch.ops.flashtile.forward.default) == 3


def test_compiled_autograd_sees_the_operator() -> None:
    graphs, (q, k, v) = _Graphs(), _qkv(requires_grad=True)
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
    x = _qkv(requires_grad=True)
    with interpreted(capacity=64), torch.device("cpu"):
        flash_attn_func(*x).sum().backward()
        monkeypatch.setattr(ops, "forward", _refuse)
        monkeypatch.setattr(torch.ops.flashtile.backward, "default", _refuse)
        flash_attn_func(*x).sum().backward()


def test_negated_views_are_negated_and_zeros_are_zero() -> None:
    """Where memory does not hold the values: imaginary parts may be negated, gradients missing."""
    with interpreted(capacity=64):
        q, k, v = _qkv(requires_grad=True)
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
    q, k, v = _qkv()
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(q)  # type: ignore[func-returns-value]
    with interpreted(capacity=64):
        expected = flash_attn_func(q, k, v)
        torch.testing.assert_close(flash_attn_func(left[0], k, v), expected)


def test_nothing_of_a_call_is_kept_alive() -> None:
    with interpreted(capacity=64):
        x = _qkv(requires_grad=True)
        out = flash_attn_func(*x, causal=True)
        out.sum().backward()
        gone = [weakref.ref(t) for t in (*x, out)]
        del x, out
        assert [t() for t in gone] == [None] * 4
        assert len(replays._replays) == 2
        assert len(warm._kept) == 1


def test_a_call_within_a_call_has_a_tape_of_its_own() -> None:
    kernel = _Kernel()

    def inner(tensors: Any) -> tuple[Tensor]:
        return (replays.make(torch.neg, tensors[0]),)

    def outer(tensors: Any) -> tuple[Tensor]:
        out = replays.empty((4,), tensors[0])
        replays.run("inner", tensors, inner)
        launch.run(launch.Launch(kernel, 1, (tensors[0], out)))
        return (out,)

    with interpreted(capacity=64):
        for x in (torch.zeros(4), torch.ones(4)):
            (out,) = replays.run("outer", (x,), outer)
            assert kernel.seen.pop() == (x, out)
        assert replays.taping() is None


def test_checked_mode_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(20, 2, 8) for _ in "qkv")
    good, bad = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 20], [0, 5, 4]))
    with interpreted(capacity=64):
        for _ in range(2):
            flash_attn_varlen_func(q, k, v, good, good)
        monkeypatch.setattr(config, "checked", True)
        with pytest.raises(ValueError, match="cu_seqlens_q decreases"):
            flash_attn_varlen_func(q, k, v, bad, good)


def _forms() -> dict[str, list[Tensor]]:
    """Calls of the same shapes."""
    apart = torch.randn(3, 2, 2, 20, 8).transpose(2, 3).unbind()
    shifted = [x[1:].view(2, 20, 2, 8) for x in torch.randn(3, 2 * 20 * 2 * 8 + 1).unbind()]
    x = torch.randn(2, 20, 2, 8)
    return {"packed": _qkv(), "apart": list(apart), "shifted": shifted, "one": [x, x, x]}


def test_calls_of_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides, alignment and a tensor in several places tell them apart."""
    with interpreted(capacity=64), torch.no_grad():
        for _ in range(3):
            for x in _forms().values():
                out = flash_attn_func(*x, causal=True)
                exact = flashtile.reference.attention(*x, causal=True).out
                torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
            monkeypatch.setattr(ops, "forward", _refuse)
        assert [len(kept) for kept in warm._kept.values()] == [4]


def test_only_so_many_calls_of_the_same_shapes_are_kept() -> None:
    with interpreted(capacity=64), torch.no_grad():
        for gap in range(2 * warm.ALIKE):
            flash_attn_func(*(torch.randn(2, 20, 2, 8 + 4 * gap)[..., :8] for _ in "qkv"))
        assert [len(kept) for kept in warm._kept.values()] == [warm.ALIKE]


def test_lengths_given_once_or_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(20, 2, 8) for _ in "qkv")
    first, second = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 20], [0, 12, 20]))
    with interpreted(capacity=64), torch.no_grad():
        for _ in range(2):
            for cu_q, cu_k in ((first, first), (first, second), (second, second)):
                out = flash_attn_varlen_func(q, k, v, cu_q, cu_k)
                exact = flashtile.reference.attention(
                    q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
                ).out
                torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
            with pytest.raises(TypeError, match="cu_seqlens_k"):
                flash_attn_varlen_func(q, k, v, first, first.long())
            monkeypatch.setattr(ops, "forward", _refuse)


def test_values_within_keys_or_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan may read what they share once."""
    with interpreted(capacity=64), torch.no_grad():
        q, k, other = torch.randn(3, 2, 20, 1, 16)
        flash_attn_func(q, k, k[..., :8])
        monkeypatch.setattr(ops, "forward", _refuse)
        flash_attn_func(q, k, k[..., :8])
        with pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(q, k, other[..., :8])


def test_another_autocast_dtype_casts() -> None:
    x = _qkv(dtype=torch.float16)
    with interpreted(capacity=64):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.float16):
                assert flash_attn_func(*x).dtype == torch.float16
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(TypeError, match="bfloat16; the interpreter"),
        ):
            flash_attn_func(*x)


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
    x = _qkv()
    with interpreted(capacity=64):
        flash_attn_func(*x)
        monkeypatch.setattr(ops, "forward", _refuse)
        flash_attn_func(*x)
        with switch(), pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(*x)


def test_what_autocast_casts_takes_the_operator() -> None:
    """Though calls of the dtype before the cast were met too."""
    x = _qkv()
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
            flash_attn_func(*_qkv())
        assert not warm._kept


def test_errors_are_raised_again() -> None:
    q, k, v = _qkv()
    with interpreted(capacity=64):
        for _ in range(2):
            flash_attn_func(q, k, v)
            with pytest.raises(ValueError, match="softcap is -1"):
                flash_attn_func(q, k, v, softcap=-1.0)
            with pytest.raises(TypeError, match="v is a NoneType"):
                flash_attn_func(q, k, None)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="v has shape"):
                flash_attn_func(q, k, v[:1])
            with pytest.raises(TypeError, match="dtypes"):
                flash_attn_func(q, k, v.half())


def test_autograd_of_a_replay() -> None:
    """What torch promises of saved tensors, and what flashtile says of second derivatives."""
    with interpreted(capacity=64):
        q, k, v = _qkv(requires_grad=True)
        for turn in range(2):
            x = q * 1.0
            out = flash_attn_func(x, k, v)
            x.mul_(2.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
            loss = flash_attn_func(q, k, v).square().sum()
            (dq,) = torch.autograd.grad(loss, q, create_graph=True)
            with pytest.raises(RuntimeError, match="flashtile has no second derivative"):
                dq.sum().backward()
            _, lse = flash_attn_func(q, k, v, return_lse=True)
            found = torch.autograd.grad(lse.sum(), (q, k, v))
            assert found[2].eq(0).all(), turn
            exact = flashtile.reference.attention(q, k, v).lse.sum()
            torch.testing.assert_close(found[:2], torch.autograd.grad(exact, (q, k)))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_recording_tells_calls_apart(
    return_lse: bool, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever was met first: the guards see what requires grad, not whether it is recorded."""
    q, k, v = _qkv(requires_grad=True)
    with interpreted(capacity=64):
        for turn in range(3):
            for recorded in (first, not first, not first, first):
                with torch.set_grad_enabled(recorded):
                    found = flash_attn_func(q, k, v, return_lse=return_lse)
                assert isinstance(found, tuple) == return_lse
                results = found if return_lse else (found,)
                assert [x.requires_grad for x in results] == [recorded] * len(results)
            assert flash_attn_func(q.detach(), k.detach(), v.detach()).requires_grad is False
            if turn == 0:
                monkeypatch.setattr(ops, "forward", _refuse)


def test_a_recorded_backward_is_no_replay_of_one_that_was_not() -> None:
    with interpreted(capacity=64):
        x, dout = _qkv(requires_grad=True), torch.randn(2, 20, 2, 8)
        for _ in range(2):
            torch.autograd.grad(flash_attn_func(*x), x, dout)
            (dq, *_) = torch.autograd.grad(flash_attn_func(*x), x, dout, create_graph=True)
            with pytest.raises(RuntimeError, match="flashtile has no second derivative"):
                dq.sum().backward()


def test_saved_tensors_may_come_back_with_other_strides() -> None:
    """As after torch.autograd.graph.save_on_cpu, which makes them contiguous."""
    with interpreted(capacity=64):
        q, k, v = (torch.randn(2, 2, 20, 8).transpose(1, 2).requires_grad_() for _ in "qkv")
        expected = None
        for hooked in (False, False, True, True):
            pack = (lambda x: x.contiguous()) if hooked else (lambda x: x)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = flash_attn_func(q, k, v, causal=True)
            found = torch.autograd.grad(out.square().sum(), (q, k, v))
            expected = expected or found
            torch.testing.assert_close(found, expected)


def test_only_the_gradients_asked_for() -> None:
    with interpreted(capacity=64):
        q, k, v = _qkv()
        sink = torch.nn.Parameter(torch.randn(2))
        for wanted in ([k], [q, v], [k], [sink], [q, sink], [q, sink]):
            for x in (q, k, v, sink):
                x.requires_grad_(any(x is y for y in wanted))
                x.grad = None
            flash_attn_func(q, k, v, learnable_sink=sink).square().sum().backward()
            for x in (q, k, v, sink):
                assert (x.grad is not None) == x.requires_grad


@dataclass
class _Descriptor:
    """Stands in for Triton's TensorDescriptor."""

    base: Tensor
    block_shape: list[int]

    def __post_init__(self) -> None:
        assert self.base is not None


class _Kernel:
    """Stands in for a kernel: compiled, or of the interpreter."""

    def __init__(self, compiled: Any = None) -> None:
        self.compiled, self.seen = compiled, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.seen.append(args) or self.compiled


def test_a_descriptor_is_rebuilt_around_another_tensor() -> None:
    kernel = _Kernel()
    with interpreted(capacity=64):
        for x in (torch.zeros(4), torch.ones(4)):

            def compute(tensors: Any) -> tuple[Tensor]:
                scratch = replays.empty((3,), tensors[0])
                described = _Descriptor(tensors[0], [2])
                launch.run(launch.Launch(kernel, 1, (described, (7, (scratch,)))))
                return (scratch,)

            (found,) = replays.run("test", (x,), compute)
            described, (seven, (scratch,)) = kernel.seen[-1]
            assert described.base is x
            assert described.block_shape == [2]
            assert seven == 7
            assert scratch is found
        assert len(kernel.seen) == 2
        assert None not in replays._replays.values()


def _workspace(tensors: Any, kernel: _Kernel) -> tuple[Tensor]:
    first, none, second = replays.workspace(
        tensors[0], ((3, 2), torch.float32), None, ((5,), torch.int32)
    )
    assert none is None
    launch.run(launch.Launch(kernel, 1, (first, (second, 7), tensors[0])))
    return (replays.make(torch.neg, tensors[0]),)


def test_a_workspace_is_allocated_at_once() -> None:
    kernel = _Kernel()
    with interpreted(capacity=64):
        for _ in range(2):
            replays.run("test", (torch.ones(4),), lambda x: _workspace(x, kernel))
        assert None not in replays._replays.values()
    assert len(kernel.seen) == 2
    for first, (second, _), _ in kernel.seen:
        assert (first.shape, first.dtype) == ((3, 2), torch.float32)
        assert (second.shape, second.dtype) == ((5,), torch.int32)
        assert first.is_contiguous()
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert second.data_ptr() == first.data_ptr() + replays.APART


def test_a_part_of_another_tensor_s_memory() -> None:
    kernel = _Kernel()

    def compute(tensors: Any) -> tuple[Tensor]:
        made = replays.empty((4, 3), tensors[0], torch.bfloat16)
        part = replays.within(made, (2, 1), torch.float32, place=8)
        launch.run(launch.Launch(kernel, 1, (part, made)))
        return (made,)

    with interpreted(capacity=64):
        for _ in range(2):
            (made,) = replays.run("test", (torch.ones(4),), compute)
            part, found = kernel.seen[-1]
            assert found is made
            assert (part.shape, part.dtype) == ((2, 1), torch.float32)
            assert part.data_ptr() == made.data_ptr() + 8
        assert None not in replays._replays.values()


def _compiled(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A kernel without scratch memory, and what its launcher in C got."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launches: list[Any] = []
    run = MagicMock(launch_cooperative_grid=False, launch_pdl=False)
    run.launch = MagicMock(side_effect=lambda *a: launches.append(a))
    run.global_scratch_size = run.profile_scratch_size = 0
    del run.arg_annotations
    compiled = SimpleNamespace(run=run, function=1, packed_metadata=2, launch_metadata=lambda *a: a)
    return compiled, launches


def test_the_driver_launches_and_triton_if_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread without a context, and where a profiler listens or has a hook of its own. Another
    error is raised."""
    compiled, launches = _compiled(monkeypatch)
    results, driven = iter((0, 201, 700)), []  # type: ignore[var-annotated]

    def start(*a: Any) -> int:
        driven.append(a)
        return next(results)

    monkeypatch.setattr(packed, "packing", lambda *_: (start, "how"))
    monkeypatch.setattr(packed, "packed", lambda *a: a)
    monkeypatch.setattr(driver, "_said", lambda by, result: f"{by} of {result}")
    kernel, x = _Kernel(compiled), torch.ones(4)

    def again() -> None:
        replays.run("test", (x,), lambda x: _workspace(x, kernel))

    with interpreted(capacity=64):
        for expected in (0, 0, 1):
            again()
            assert len(launches) == expected
        (arguments,) = launches
        first, (second, seven), last = arguments[13:]
        assert (second, seven, last) == (first + replays.APART, 7, x.data_ptr())
        assert [a[:1] + a[2:] for a in driven] == [("how", x.data_ptr(), 5)] * 2
        assert driven[1][1] == first
        with pytest.raises(RuntimeError, match="cuGetErrorName of 700"):
            again()
        assert (len(driven), len(launches)) == (3, 1)
        with patch.object(knobs.runtime.launch_exit_hook, "calls", [print]):
            again()
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
        again()
        assert len(driven) == 3
        compiled.run.assert_called()
        assert compiled.run.call_args.args[7] is print


@pytest.mark.parametrize("scratch", [0, 64, None], ids=["", "scratch memory", "another Triton"])
def test_a_compiled_kernel_takes_addresses(
    scratch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the launcher in C, where that has no more to do than launch. If a profiler listens, or if
    a kernel needs scratch memory, Triton's own is called, on the same stream."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launches, inner = [], []  # type: ignore[var-annotated]
    run = MagicMock(side_effect=lambda *a: launches.append(a), launch_cooperative_grid=False)
    run.launch, run.launch_pdl = MagicMock(side_effect=lambda *a: inner.append(a)), True
    run.global_scratch_size, run.profile_scratch_size = 0, scratch
    del run.arg_annotations
    compiled = SimpleNamespace(run=run, function=1, packed_metadata=2, launch_metadata=lambda *a: a)
    kernel = _Kernel(compiled)

    def compute(tensors: Any) -> tuple[Tensor]:
        launch.run(launch.Launch(kernel, 3, ((tensors[0], 4), None)))
        return (replays.make(torch.neg, tensors[0]),)

    with interpreted(capacity=64):
        for number in (1.0, 2.0):
            x = torch.full((4,), number)
            (found,) = replays.run("test", (x,), compute)
            assert found.eq(-number).all()
        head, arguments = (3, 1, 1, 5, 1), ((x.data_ptr(), 4), None)
        rest = (2, None, None, None, *arguments)
        direct = scratch == 0
        assert inner == ([(*head, False, True, None, None, *rest)] if direct else [])
        assert launches == ([] if direct else [(*head, *rest)])
        launches.clear()
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        monkeypatch.setattr(enter, "calls", [print])
        replays.run("test", (x,), compute)
    assert launches == [(*head, 2, ((3, 1, 1), 5), enter, leave, *arguments)]
    assert len(kernel.seen) == 1


@pytest.mark.parametrize("version", ["as known", "of another Triton"])
def test_maps_of_tensors_are_kept_by_address(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's launcher is the closure that we know; else it gets its descriptors."""
    known, encoded, launches = version == "as known", [], []  # type: ignore[var-annotated]

    def encode(descriptor: Any, metadata: Any) -> list[Any]:
        encoded.append(descriptor.base.data_ptr())
        return [("map", descriptor.base.data_ptr(), metadata), *descriptor.block_shape]

    def encode_later(descriptor: Any, metadata: Any, _: Any) -> list[Any]:
        return encode(descriptor, metadata)

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", encode if known else encode_later)
    signature = {0: "*fp32", 1: "tensordesc<fp32[2]>"}
    taking = nvidia.wrap_handle_tensordesc(lambda *a: launches.append(a), signature, ["meta"])
    run, arguments = launch._with_maps(
        SimpleNamespace(launch=taking), (x := torch.zeros(4), _Descriptor(torch.ones(4), [2]))
    )
    assert arguments[0] is x
    if not known:
        assert run.launch is taking
        assert isinstance(arguments[1], _Descriptor)
        return
    run.launch(7)
    assert launches == [(7,)]
    base, find = arguments[1].base, arguments[1].find
    assert [find(base.data_ptr()), find(64), find(64)] == [
        (("map", base.data_ptr(), "meta"), 2), *[(("map", 64, "meta"), 2)] * 2
    ]  # fmt: skip
    assert encoded == [base.data_ptr(), 64]
