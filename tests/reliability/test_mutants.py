"""Reliability of the tests: each small breakage of the backend must be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from flashtile.api import call as api_call
from flashtile.backends import aten
from flashtile.backends import torch as backend
from flashtile.backends.segments import Segment
from flashtile.mods import Alibi, Band, Bias, Documents, Dropout, MaskTensor, Softcap, Tile
from flashtile.testing import CASES, assert_matches_reference

BY_NAME = {case.name: case for case in CASES}


class Mutant(NamedTuple):
    """A change of one function: `make` gets what is there and returns what takes its place."""

    name: str
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    case: str

    def __str__(self) -> str:
        return self.name


def _variant(call: Any, **changes: Any) -> Any:
    return call._replace(variant=call.variant._replace(**changes))


def _operands(call: Any, **changes: Any) -> Any:
    return call._replace(operands=call.operands._replace(**changes))


def _results(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """Change (out, lse) of the backend's forward."""
    return lambda f: lambda *a: change(*f(*a))


def _one_row(out: torch.Tensor, lse: torch.Tensor) -> Any:
    out[0, 7] *= 1.00001
    return out, lse


MUTANTS = (
    Mutant("last_key_tile_skipped", Band, "key_range",
           lambda f: lambda s, t: (f(s, t)[0], max(0, f(s, t)[1] - 16)), "full"),
    Mutant("first_key_skipped", Band, "key_range",
           lambda f: lambda s, t: (f(s, t)[0] + 1, f(s, t)[1]), "window"),
    Mutant("last_query_skipped_in_backward", Band, "query_range",
           lambda f: lambda s, t: (f(s, t)[0], f(s, t)[1] - 1), "full"),
    Mutant("scale_dropped", api_call, "scale_or_default",
           lambda f: lambda scale, q: 1.0, "full"),
    Mutant("causal_off_by_one", Band, "visible",
           lambda f: lambda s, *a: f(s._replace(right=s.right + 1), *a), "causal"),
    Mutant("window_off_by_one", Band, "visible",
           lambda f: lambda s, *a: f(s._replace(left=s.left - 1), *a), "window"),
    Mutant("causal_aligned_top_left", Tile, "offset",
           lambda f: property(lambda s: 0), "causal_longer_keys"),
    Mutant("full_tiles_assumed", Band, "_full", lambda f: lambda s, t: True, "causal"),
    Mutant("lse_wrong", backend, "forward",
           _results(lambda out, lse: (out, lse + 1e-4)), "full"),
    Mutant("out_through_bf16", backend, "forward",
           _results(lambda out, lse: (out.bfloat16().float(), lse)), "full"),
    Mutant("one_row_wrong_by_1e-5", backend, "forward", _results(_one_row), "full"),
    Mutant("dlse_forgotten", backend, "backward",
           lambda f: lambda c, p, do, dlse, *a: f(c, p, do, None, *a), "full"),
    Mutant("delta_forgotten", backend, "backward",
           lambda f: lambda c, p, do, dlse, out, *a: f(c, p, do, dlse, 0 * out, *a), "full"),
    Mutant("dropout_forgotten_in_backward", backend, "backward",
           lambda f: lambda c, *a: f(_variant(c, dropout_p=0.0), *a), "dropout"),
    Mutant("dropout_unscaled", Dropout, "factor",
           lambda f: lambda s, *a: f(s, *a) * (1 - s.p), "dropout"),
    Mutant("dropout_redrawn_in_backward", backend, "backward",
           lambda f: lambda c, *a: f(
               _operands(c, rng_state=c.operands.rng_state + 1), *a), "dropout"),
    Mutant("softcap_without_derivative", Softcap, "derivative",
           lambda f: lambda s, *a: None, "softcap"),
    Mutant("alibi_of_another_head", Alibi, "apply",
           lambda f: lambda s, *a: f(Alibi(s.slopes.roll(1, -1)), *a), "alibi"),
    Mutant("bias_gradient_of_one_tile", Bias, "accumulate",
           lambda f: lambda s, ds, t: f(s, ds, t) if t.row == 0 else None, "bias"),
    Mutant("mask_ignored", MaskTensor, "visible", lambda f: lambda s, *a: None, "mask"),
    Mutant("documents_ignored", Documents, "visible", lambda f: lambda s, *a: None, "documents"),
    Mutant("sink_without_gradient", backend, "_add_sink_gradient",
           lambda f: lambda *a: None, "sink"),
    Mutant("sink_not_in_the_sum", backend, "forward",
           lambda f: lambda c, p: f(_operands(c, learnable_sink=None), p), "sink"),
    Mutant("heads_of_another_group", Segment, "k_rows",
           lambda f: lambda s, x, *a: f(s, x, *a).roll(1, 2), "full"),
    Mutant("sequences_shifted_by_a_row", Segment, "q_rows",
           lambda f: lambda s, x, lo, hi: f(
               s._replace(q_start=max(0, s.q_start - 1)), x, lo, hi), "varlen_causal"),
    Mutant("pages_in_order", Segment, "k_rows",
           lambda f: lambda s, x, *a: f(s._replace(pages=s.pages.sort().values), x, *a), "paged"),
    Mutant("gradients_of_pages_overwritten", Segment, "add_k_rows",
           lambda f: lambda s, x, lo, hi, rows: x.index_put_(
               (s.pages[lo:hi], s.slots[lo:hi]), rows[0] * (lo == 0)), "paged"),
    Mutant("kernel_of_torch_aligned_top_left", aten, "_causal_square",
           lambda f: lambda right, segment: right == 0, "causal_longer_keys"),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if mutant.owner is not aten:
        request.getfixturevalue("small_blocks")
    problem = BY_NAME[mutant.case].draw(101)
    assert_matches_reference(problem)
    original = getattr(mutant.owner, mutant.attribute)
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.make(original))
    with pytest.raises(AssertionError):
        assert_matches_reference(problem)
