"""The named cases on a GPU, by whichever backend the plan chooses there."""

from __future__ import annotations

import pytest
import torch

from flashtile import flash_attn_func, flash_attn_with_kvcache, reference
from flashtile.api import normalise
from flashtile.problem import Call
from flashtile.testing import CASES, Case, assert_matches_reference, assert_within_budget, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case.draw(11, dtype, "cuda"), case.name)


@pytest.mark.parametrize("case", [c for c in CASES if "dropout_p" not in c.features], ids=str)
def test_agrees_with_the_cpu(case: Case) -> None:
    on_cpu, on_gpu = case.draw(13), case.draw(13, device="cuda")
    expected, found = run(on_cpu), run(on_gpu)
    torch.testing.assert_close(found.out.cpu(), expected.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lse.cpu(), expected.lse, rtol=1e-4, atol=1e-4)


def test_dropout_mask_is_the_cpus() -> None:
    """The same (seed, offset) drops the same elements; each device draws its own state."""
    call = normalise(*(torch.randn(2, 70, h, 16) for h in (4, 2, 2)), dropout_p=0.3, causal=True)
    there = Call.unflatten(tuple(x.cuda() if isinstance(x, torch.Tensor) else x
                                 for x in call.flat()))  # fmt: skip
    out, _ = torch.ops.flashtile.forward.default(*call.flat())
    found, _ = torch.ops.flashtile.forward.default(*there.flat())
    torch.testing.assert_close(found.cpu(), out, rtol=1e-4, atol=1e-4)


def test_appends_to_a_paged_cache() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, h, 64, device="cuda").bfloat16() for h in (8, 2, 2))
    caches = [torch.randn(12, 16, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    table = torch.randperm(12, device="cuda").view(2, 6).int()
    lengths = torch.tensor([30, 61], dtype=torch.int32, device="cuda")
    keywords = {"cache_seqlens": lengths, "block_table": table, "causal": True}
    golden, k_after, _ = reference.attention_with_kvcache(q, *caches, k, v, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, k, v, **keywords, dtype=None)
    out = flash_attn_with_kvcache(q, *caches, k, v, **keywords)
    assert_within_budget(out, eager.out, golden.out)
    assert torch.equal(caches[0], k_after)


def test_autocast() -> None:
    q = torch.randn(1, 40, 2, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.float16):
        out = flash_attn_func(q, q, q, causal=True)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
