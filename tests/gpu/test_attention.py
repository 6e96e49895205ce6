"""The named cases on a GPU, by whichever backend the plan chooses there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashtile import flash_attn_func, flash_attn_with_kvcache, reference
from flashtile.api import normalise
from flashtile.problem import Call
from flashtile.random import draw_rng_state, keep_mask
from flashtile.testing import CASES, Case, assert_matches_reference, assert_within_budget, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _longer(case: Case) -> Case:
    """The case over several of the GPU's own tiles. Odd lengths stay odd, multiples of 16 remain
    what they are, and head dims do not change, so that the same compiled kernels serve it."""
    lengths = tuple((9 * q, 9 * k) for q, k in case.lengths)
    seqlens = (5 * n if n > 1 else n for n in (case.seqlen_q, case.seqlen_k))
    return replace(case, **dict(zip(("seqlen_q", "seqlen_k"), seqlens, strict=True)),
                   lengths=lengths)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(case.draw(11, dtype, "cuda"), case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_tiles_match_reference(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(_longer(case).draw(12, dtype, "cuda"), case.name)


@pytest.mark.parametrize("case", [c for c in CASES if "dropout_p" not in c.features], ids=str)
def test_agrees_with_the_cpu(case: Case) -> None:
    on_cpu, on_gpu = case.draw(13), case.draw(13, device="cuda")
    expected, found = run(on_cpu), run(on_gpu)
    torch.testing.assert_close(found.out.cpu(), expected.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lse.cpu(), expected.lse, rtol=1e-4, atol=1e-4)


def test_dropout_mask_is_the_cpus() -> None:
    """The same (seed, offset) drops the same elements; each device draws its own state."""
    call = normalise(*(torch.randn(2, 300, h, 32) for h in (4, 2, 2)), dropout_p=0.3, causal=True)
    there = Call.unflatten(tuple(x.cuda() if isinstance(x, torch.Tensor) else x
                                 for x in call.flat()))  # fmt: skip
    out, _ = torch.ops.flashtile.forward.default(*call.flat())
    found, _ = torch.ops.flashtile.forward.default(*there.flat())
    torch.testing.assert_close(found.cpu(), out, rtol=1e-4, atol=1e-4)


def _dropped_bits(q_tokens: int, k_tokens: int, head_dim: int, p: float) -> torch.Tensor:
    """(heads, q_tokens, k_tokens): 1 where 16-bit kernels keep, by the longer side's gradient or
    output: with the unit matrix as v, out is P, and with the unit matrix as dout, dV is its
    transpose."""
    q, k, v, dout = (
        torch.randn(1, n, 3, head_dim, device="cuda").bfloat16() / 4
        for n in (q_tokens, k_tokens, k_tokens, q_tokens)
    )
    unit = torch.eye(head_dim, device="cuda", dtype=torch.bfloat16)[None, :, None]
    generator = torch.Generator("cuda").manual_seed(3)
    if k_tokens == head_dim:
        v.copy_(unit)
    else:
        dout.copy_(unit)
    out = flash_attn_func(q, k, v.requires_grad_(), dropout_p=p, dropout_generator=generator)
    if k_tokens == head_dim:
        return out[0].transpose(0, 1).ne(0)
    (dv,) = torch.autograd.grad(out, v, dout)
    return dv[0].permute(1, 2, 0).ne(0)


@pytest.mark.parametrize("p", [0.003, 0.3, 0.98])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_16_bit_kernels_drop_the_contracts_elements(head_dim: int, p: float) -> None:
    """Bit for bit, in forward and backward, over several tiles. Probabilities above 0.969 take the
    functions of other vendors."""
    state = draw_rng_state(torch.device("cuda"), torch.Generator("cuda").manual_seed(3))
    for q_tokens, k_tokens in ((700, head_dim), (head_dim, 700)):
        head, q, k = (torch.arange(n, device="cuda") for n in (3, q_tokens, k_tokens))
        expected = keep_mask(state, p, head[:, None, None], q[:, None], k)
        assert torch.equal(_dropped_bits(q_tokens, k_tokens, head_dim, p), expected)


def test_appends_to_a_paged_cache() -> None:
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


def test_padded_and_remapped_cache_rows() -> None:
    """cache_leftpad and cache_batch_idx over several tiles; what is out of use is NaN."""
    q = torch.randn(3, 5, 6, 64, device="cuda").bfloat16()
    caches = [torch.randn(5, 700, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    lengths, pads, rows = ([140, 699, 3], [13, 0, 2], [4, 0, 3])
    for row, pad, length in zip(rows, pads, lengths, strict=True):
        for cache in caches:
            cache[row, :pad] = cache[row, length:] = float("nan")
    keywords = {
        name: torch.tensor(x, dtype=torch.int32, device="cuda")
        for name, x in (("cache_seqlens", lengths), ("cache_leftpad", pads),
                        ("cache_batch_idx", rows))
    }  # fmt: skip
    golden, _, _ = reference.attention_with_kvcache(q, *caches, causal=True, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, causal=True, **keywords, dtype=None)
    out = flash_attn_with_kvcache(q, *caches, causal=True, **keywords)
    assert_within_budget(out, eager.out, golden.out)


def test_autocast() -> None:
    q = torch.randn(1, 40, 2, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.float16):
        out = flash_attn_func(q, q, q, causal=True)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_compiles_in_full_graphs() -> None:
    """torch.compile with inductor, forward and backward: the same numbers as eagerly."""

    def block(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (2 * x).unflatten(-1, (3, 2, 64)).unbind(2)
        return torch.relu(flash_attn_func(q, k, v, causal=True, softcap=4.0))

    x = torch.randn(2, 130, 3 * 2 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = block(x)
    (wanted,) = torch.autograd.grad(expected.float().square().sum(), x)
    torch._dynamo.reset()
    found = torch.compile(block, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(found.float().square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad, wanted, rtol=2e-2, atol=2e-2)
