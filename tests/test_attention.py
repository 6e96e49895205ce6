"""Every named case against the reference: forward, lse and all gradients within budget."""

from __future__ import annotations

import pytest
import torch

from flashtile.testing import (
    CASES,
    Case,
    assert_matches_reference,
    fence,
    poisoned_allocations,
    run,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case) -> None:
    with poisoned_allocations():
        assert_matches_reference(case.draw(3), case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_matches_reference_in_small_blocks(case: Case, dtype: torch.dtype) -> None:
    with poisoned_allocations():
        assert_matches_reference(case.draw(5, dtype), case.name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_and_writes_only_its_tensors(case: Case) -> None:
    """Inputs between canaries: nothing is written, no canary (NaN) reaches a result."""
    problem = case.draw(7)
    plain = run(problem)
    fences = {name: fence(x) for name, x in problem.tensors.items()}
    fenced = problem._replace(tensors={name: f.tensor for name, f in fences.items()})
    result = run(fenced)
    for name, guard in fences.items():
        guard.assert_unchanged(name)
    torch.testing.assert_close(result.out, plain.out, rtol=1e-5, atol=1e-5)
    for name, grad in plain.grads.items():
        torch.testing.assert_close(result.grads[name], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_bitwise(case: Case) -> None:
    problem = case.draw(9)
    first, second = run(problem), run(problem)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
    assert all(torch.equal(first.grads[n], second.grads[n]) for n in first.grads)


@pytest.mark.parametrize("seqlen_q", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_every_key_length(seqlen_q: int, causal: bool) -> None:
    for seqlen_k in (*range(1, 36), 63, 64, 65, 127, 128, 129, 130):
        case = Case(
            "ragged", seqlen_q, seqlen_k, batch=1, heads=2, kv_heads=1, head_dim=16,
            features={"causal": causal},
        )  # fmt: skip
        assert_matches_reference(case.draw(seqlen_k), f"{seqlen_k=}")


@pytest.mark.parametrize("head_dim", [1, 8, 16, 24, 40, 46, 72, 80, 96, 100, 112, 160, 192, 256])
def test_every_head_dim(head_dim: int) -> None:
    case = Case("head_dim", 33, 41, head_dim=head_dim, features={"causal": True})
    assert_matches_reference(case.draw(head_dim))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (6, 2), (5, 5), (7, 1), (24, 2)])
@pytest.mark.usefixtures("small_blocks")
def test_every_group(heads: int, kv_heads: int) -> None:
    case = Case("group", 33, 41, heads=heads, kv_heads=kv_heads, features={"causal": True})
    assert_matches_reference(case.draw(heads))


def test_seventy_one_heads_share_one() -> None:
    case = Case("falcon", 9, 9, heads=71, kv_heads=1, head_dim=8, features={"causal": True})
    assert_matches_reference(case.draw(0))
