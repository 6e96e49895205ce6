"""Users' functions on the CPU: their counterparts in PyTorch, and what is said of wrong ones."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import MaskFunction, ScoreFunction, flash_attn_func
from flashtile.api import normalise
from flashtile.mods import functions
from flashtile.testing import Case, assert_matches_reference


def _score(s: Tensor, at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return s + args[0][at.head].to(s.dtype) * s * s - 0.1 * (at.q_idx - at.k_idx + at.batch)


def _slope(before: Tensor, after: Tensor, at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return 1.0 + 2.0 * args[0][at.head].to(before.dtype) * before


def _mask(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    ends = at.q.length - at.q_idx + at.k.length - at.k_idx
    return (at.k_idx < args[0][at.batch]) | (ends % 3 == 0)


def _score_mod(heads: int = 4) -> ScoreFunction:
    return ScoreFunction(None, None, (torch.linspace(-0.3, 0.5, heads),), (_score, _slope))


def _mask_mod(batch: int = 5) -> MaskFunction:
    return MaskFunction(None, (torch.tensor([4, 17, 0, 60, 2])[:batch],), eager=_mask)


CASES = [
    Case("score", 300, 61, features={"score_mod": _score_mod()}),
    Case("mask", 61, 300, features={"mask_mod": _mask_mod()}),
    Case("both", 90, 270, features={"score_mod": _score_mod(), "mask_mod": _mask_mod(),
         "softcap": 3.0, "causal": True, "dropout_p": 0.2}),
    Case("bias", features={"score_mod": _score_mod(), "softcap": 3.0}, tensors=("bias",)),
    Case("varlen", lengths=((17, 40), (0, 5), (33, 20), (1, 64), (8, 0)),
         features={"score_mod": _score_mod(), "mask_mod": _mask_mod()}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case) -> None:
    assert_matches_reference(case.draw(1))
    assert_matches_reference(case.draw(2, torch.float64))


def _parity(at: Any, args: tuple[Tensor, ...]) -> Tensor:
    return (at.q_idx + at.k_idx + args[0][0]) % 2 == 0


def test_pickle_means_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    q, mask_mod = torch.randn(2, 20, 4, 16), _mask_mod()
    wanted = flash_attn_func(q, q, q, mask_mod=mask_mod)
    data = pickle.dumps(mask_mod)
    monkeypatch.setattr(functions, "_known", [])
    monkeypatch.setattr(functions, "_handles", {})
    while len(functions._known) < mask_mod.handle:  # the last has the handle of the other process
        other = MaskFunction(object(), mask_mod.args, eager=_parity)
    assert other.handle == mask_mod.handle
    found = flash_attn_func(q, q, q, mask_mod=pickle.loads(data))
    torch.testing.assert_close(found, wanted)


def test_deep_copy_shares_functions_and_copies_tensors() -> None:
    # A module can be copied no more than Triton's functions can.
    score_mod = ScoreFunction(torch, torch, (torch.ones(4),), (_score, _slope))
    copied = deepcopy(score_mod)
    assert copied.fn is score_mod.fn
    assert copied.handle == score_mod.handle
    assert copied.args[0] is not score_mod.args[0]
    torch.testing.assert_close(copied.args[0], score_mod.args[0])


def test_compiles_in_one_graph() -> None:
    q, score_mod, mask_mod = torch.randn(2, 20, 4, 16), _score_mod(), _mask_mod()

    def attend(q: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(q, q, q, score_mod=score_mod, mask_mod=mask_mod)
        return out

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attend(q))


def test_the_same_functions_have_the_same_handle() -> None:
    """Whatever they read: it is the tensors' part to differ."""
    first, again = _score_mod(), _score_mod()
    assert first.handle == again.handle != _mask_mod().handle
    assert ScoreFunction(None, None, (), first.eager).handle != first.handle


def test_wrong_functions_are_named() -> None:
    q = torch.randn(1, 20, 4, 16)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"score_mod": _score}, TypeError, "score_mod is a function; it must be a flashtile.Score"),
        ({"mask_mod": _score_mod()}, TypeError, "mask_mod is a ScoreFunction"),
        ({"score_mod": ScoreFunction(None, None, (1.0,))},  # type: ignore[arg-type]
         TypeError, r"score_mod.args\[0\] is a float"),
        ({"score_mod": ScoreFunction(None, None, (torch.ones(4, requires_grad=True),))},
         ValueError, r"score_mod.args\[0\] requires grad"),
        ({"mask_mod": MaskFunction(None, (torch.ones(4, device="meta"),))}, ValueError,
         r"mask_mod.args\[0\] is on meta; q is on cpu"),
        ({"score_mod": ScoreFunction(None, None, (q, q)), "mask_mod": MaskFunction(None, (q,) * 3)},
         ValueError, "have 5 args; they may have 4 together"),
        ({"score_mod": ScoreFunction(None, None)}, ValueError, "score_mod.eager is None"),
        ({"mask_mod": MaskFunction(None)}, ValueError, "mask_mod.eager is None"),
    ]  # fmt: skip
    for keywords, kind, message in wrong:
        with pytest.raises(kind, match=message):
            flash_attn_func(q, q, q, **keywords)


def test_a_handle_of_another_process_is_refused() -> None:
    q = torch.randn(1, 20, 4, 16)
    call = normalise(q, q, q)
    call = call._replace(variant=call.variant._replace(score_mod=10**6))
    with pytest.raises(LookupError, match="handle 1000000, of another process"):
        torch.ops.flashtile.forward(*call.flat())
