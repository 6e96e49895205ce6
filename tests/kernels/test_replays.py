"""Calls made for their like: other tensors in the places of the first ones, nothing else."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import config, flash_attn_func, flash_attn_varlen_func, ops
from flashtile.api import warm
from flashtile.backends import blocklists, launch, replays, triton
from flashtile.testing import Case, assert_matches_reference
from flashtile.testing.cases import Problem
from flashtile.testing.interpreter import interpreted, refuse_long_way, small_qkv

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_later_calls_are_replayed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with interpreted(capacity=64):
        assert_matches_reference(_same_shapes(case, 0), "first")
        assert None not in replays._replays.values()
        kept = len(replays._replays)
        monkeypatch.setattr(triton, "run", refuse_long_way)
        if case.name != "dropout":  # whose state is a new tensor of the operator's
            monkeypatch.setattr(ops, "forward", refuse_long_way)
            monkeypatch.setattr(torch.ops.flashtile.backward, "default", refuse_long_way)
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
        monkeypatch.setattr(launch, "run", refuse_long_way)
        for module in (triton, blocklists):
            monkeypatch.setattr(module, "run", refuse_long_way)
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


def test_nothing_of_a_call_is_kept_alive() -> None:
    with interpreted(capacity=64):
        x = small_qkv(requires_grad=True)
        out = flash_attn_func(*x, causal=True)
        out.sum().backward()
        gone = [weakref.ref(t) for t in (*x, out)]
        del x, out
        assert [t() for t in gone] == [None] * 4
        assert len(replays._replays) == 2
        assert len(warm._kept) == 1


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
    return {"packed": small_qkv(), "apart": list(apart), "shifted": shifted, "one": [x, x, x]}


def test_calls_of_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides, alignment and a tensor in several places tell them apart."""
    with interpreted(capacity=64), torch.no_grad():
        for _ in range(3):
            for x in _forms().values():
                out = flash_attn_func(*x, causal=True)
                exact = flashtile.reference.attention(*x, causal=True).out
                torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
            monkeypatch.setattr(ops, "forward", refuse_long_way)
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
            monkeypatch.setattr(ops, "forward", refuse_long_way)


def test_values_within_keys_or_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan may read what they share once."""
    with interpreted(capacity=64), torch.no_grad():
        q, k, other = torch.randn(3, 2, 20, 1, 16)
        flash_attn_func(q, k, k[..., :8])
        monkeypatch.setattr(ops, "forward", refuse_long_way)
        flash_attn_func(q, k, k[..., :8])
        with pytest.raises(AssertionError, match="the long way"):
            flash_attn_func(q, k, other[..., :8])


def test_another_autocast_dtype_casts() -> None:
    x = small_qkv(dtype=torch.float16)
    with interpreted(capacity=64):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.float16):
                assert flash_attn_func(*x).dtype == torch.float16
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(TypeError, match="bfloat16; the interpreter"),
        ):
            flash_attn_func(*x)


def test_errors_are_raised_again() -> None:
    q, k, v = small_qkv()
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
        q, k, v = small_qkv(requires_grad=True)
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
    q, k, v = small_qkv(requires_grad=True)
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
                monkeypatch.setattr(ops, "forward", refuse_long_way)


def test_a_recorded_backward_is_no_replay_of_one_that_was_not() -> None:
    with interpreted(capacity=64):
        x, dout = small_qkv(requires_grad=True), torch.randn(2, 20, 2, 8)
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
        q, k, v = small_qkv()
        sink = torch.nn.Parameter(torch.randn(2))
        for wanted in ([k], [q, v], [k], [sink], [q, sink], [q, sink]):
            for x in (q, k, v, sink):
                x.requires_grad_(any(x is y for y in wanted))
                x.grad = None
            flash_attn_func(q, k, v, learnable_sink=sink).square().sum().backward()
            for x in (q, k, v, sink):
                assert (x.grad is not None) == x.requires_grad
