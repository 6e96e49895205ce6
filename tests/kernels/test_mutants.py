"""The tests of the Triton kernels tested: each small breakage must be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from flashtile import ops
from flashtile.backends import blocklists, operands
from flashtile.backends import triton as backend
from flashtile.kernels import scores
from flashtile.kernels.masks import Range, not_later_keys
from flashtile.kernels.numbers import opaque
from flashtile.testing import Case, assert_matches_reference

SHAPE: dict[str, Any] = {"batch": 2, "heads": 2, "kv_heads": 2, "head_dim": 8}
SEQLENS: dict[str, Any] = {"seqlen_q": 20, "seqlen_k": 20}
PACKED: dict[str, Any] = {"lengths": ((18, 18), (5, 20), (3, 3))}


@triton.jit
def not_much_later(at, args):
    """One key too many."""
    return at.k_idx <= at.q_idx + tl.maximum(at.k.length - at.q.length + 1, 0)


@triton.jit
def all_but_the_last_keys(first, last, q, k, args):
    """A range that ends a block early."""
    r = not_later_keys(first, last, q, k, args)
    return Range(r.lo, r.full_lo, tl.maximum(r.full_hi - 16, 0), tl.maximum(r.hi - 16, 0))


@triton.jit
def full_up_to_the_end(first, last, q, k, args):
    """A range that calls the diagonal's block full."""
    r = not_later_keys(first, last, q, k, args)
    return Range(r.lo, r.full_lo, tl.minimum(r.hi + 15, k.length), r.hi)


class Mutant(NamedTuple):
    """A change of one function: `make` gets what is there and returns what takes its place."""

    name: str
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    case: Case

    def __str__(self) -> str:
        return self.name


def _case(*tensors: str, **features: Any) -> Case:
    return Case("mutant", **SHAPE, **SEQLENS, features=features, tensors=tensors)


def _band(**changes: Any) -> Callable[[Any], Any]:
    return lambda f: lambda call: tuple(m._replace(**changes) for m in f(call))


def _arguments(change: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    return lambda f: lambda call: f(call)._replace(**change(f(call)))


def _mods(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda f: lambda *a: tuple(change(mod) for mod in f(*a))


def _fewer(lists: Any) -> Any:
    return lists._replace(counts=(lists.counts - 1).clamp_min(0))


CAUSAL = _case(causal=True)
MUTANTS = (
    Mutant("causal_off_by_one", operands, "band", _band(fn=not_much_later), CAUSAL),
    Mutant("last_blocks_skipped", operands, "band", _band(keys=all_but_the_last_keys), CAUSAL),
    Mutant("diagonal_unmasked", operands, "band", _band(keys=full_up_to_the_end), CAUSAL),
    Mutant("scale_of_another_base", operands, "arguments",
           _arguments(lambda a: {"scale": a.scale._replace(log2=a.scale.natural)}), CAUSAL),
    Mutant("gradients_unscaled", operands, "arguments",
           _arguments(lambda a: {"scale": a.scale._replace(natural=1.0)}), CAUSAL),
    Mutant("heads_of_another_group", operands, "arguments",
           _arguments(lambda a: {"k": a.k._replace(stride_head=0)}), CAUSAL),
    Mutant("sequences_shifted", operands, "arguments",
           _arguments(lambda a: {"k_seq": a.k_seq._replace(
               cu_seqlens=(a.k_seq.cu_seqlens - 1).clamp_min(0))}),
           Case("mutant", **SHAPE, **PACKED)),
    Mutant("pages_in_order", operands, "arguments",
           _arguments(lambda a: {"k_seq": a.k_seq if a.k_seq.table is None else a.k_seq._replace(
               table=a.k_seq.table.sort().values)}),
           Case("mutant", **SHAPE, **PACKED, page_size=7)),
    Mutant("softcap_without_slope", operands, "score_mods",
           _mods(lambda mod: mod._replace(slope=scores.slope_one)), _case(softcap=2.0)),
    Mutant("alibi_of_another_head", operands, "score_mods",
           _mods(lambda mod: mod if mod.fn is not scores.alibi else mod._replace(
               args=(mod.args[0].roll(1, -1), *mod.args[1:]))), _case("alibi_slopes")),
    Mutant("mask_ignored", operands, "tensor_masks", lambda f: lambda *a, **k: (),
           _case("attn_mask")),
    Mutant("masks_called_full", blocklists, "classify",
           lambda f: lambda call: torch.full_like(f(call), 2),
           Case("mutant", 40, 40, 1, 1, 1, 8, tensors=("attn_mask",))),
    Mutant("a_listed_block_skipped", blocklists, "_lists",
           lambda f: lambda *a, **k: _fewer(f(*a, **k)), _case("attn_mask")),
    Mutant("documents_ignored", operands, "tensor_masks", lambda f: lambda *a, **k: (),
           _case("document_ids")),
    Mutant("dropout_of_another_head", operands, "dropouts",
           lambda f: lambda *a: tuple(d._replace(heads=opaque(5)) for d in f(*a)),
           _case(dropout_p=0.3)),
    Mutant("dropout_unscaled", operands, "dropouts",
           lambda f: lambda *a: tuple(d._replace(rescale=1.0) for d in f(*a)),
           _case(dropout_p=0.3)),
    Mutant("dlse_forgotten", backend, "_prepare",
           lambda f: lambda c, dlse, *a: f(c, None, *a), CAUSAL),
    Mutant("delta_forgotten", backend, "_prepare",
           lambda f: lambda c, dlse, out, *a: f(c, dlse, 0 * out, *a), CAUSAL),
    Mutant("bias_gradient_of_one_tile", backend, "_bias_gradient",
           lambda f: lambda *a: torch.where(torch.arange(20) < 16, f(*a), 0.0), _case("bias")),
    Mutant("sink_not_in_the_sum", ops, "_run_forward",
           lambda f: lambda call: f(call._replace(
               operands=call.operands._replace(learnable_sink=None))), _case("learnable_sink")),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mutant.case.draw(101)
    original = getattr(mutant.owner, mutant.attribute)
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.make(original))
    with pytest.raises(AssertionError):
        assert_matches_reference(problem)
