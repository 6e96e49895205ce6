"""Launches made for their like: other tensors in the places of the first ones, nothing else."""

from __future__ import annotations

import pytest
import torch

from flashtile.backends import replays
from flashtile.testing import Case, assert_matches_reference
from flashtile.testing.cases import Problem
from flashtile.testing.interpreter import interpreted

CASES = [
    Case("causal", 20, 33, head_dim=8, features={"causal": True}),
    Case("mods", 20, 20, head_dim=8, features={"softcap": 3.0, "window_size": (9, 2)},
         tensors=("alibi_slopes", "bias", "learnable_sink")),
    Case("dropout", 20, 20, head_dim=8, features={"dropout_p": 0.3}),
    Case("packed", head_dim=8, lengths=((17, 17), (0, 5), (9, 20)), features={"causal": True}),
    Case("paged", head_dim=8, lengths=((17, 17), (3, 20)), page_size=4),
]  # fmt: skip


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
        assert kept >= 4  # forward, prepare, dq, dkdv
        monkeypatch.setattr(replays, "run", None)  # nothing is built again
        for seed in (1, 2):
            assert_matches_reference(_same_shapes(case, seed), f"replay {seed}")
        assert len(replays._replays) == kept


def test_one_tensor_in_two_places_is_not_replayed() -> None:
    with interpreted(capacity=64):
        x = torch.randn(1, 20, 2, 8)
        twice = Problem({"q": x, "k": x, "v": x}, {"causal": True}, False)
        assert_matches_reference(twice)
        apart = Problem({n: torch.randn(1, 20, 2, 8) for n in "qkv"}, {"causal": True}, False)
        assert_matches_reference(apart)


def test_other_metadata_is_another_launch() -> None:
    with interpreted(capacity=64):
        for length in (20, 21):
            for causal in (False, True):
                case = Case("", length, length, head_dim=8, features={"causal": causal})
                assert_matches_reference(case.draw(length))
                assert_matches_reference(case.draw(length + 1))


def test_the_oldest_go_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with interpreted(capacity=4):
        for length in range(20, 24):
            assert_matches_reference(Case("", length, length, head_dim=8).draw(1))
            assert len(replays._replays) <= 4
