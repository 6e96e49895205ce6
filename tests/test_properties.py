"""Whole problems drawn by hypothesis, against the reference: out, lse and every gradient.

Continuous integration draws the same problems each time; FLASHTILE_HYPOTHESIS=nightly draws ten
thousand new ones.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtile import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)
from flashtile.mods import Band, Tile
from flashtile.random import draw_rng_state
from flashtile.testing import Results, assert_within_budget, poisoned_allocations
from flashtile.testing.blocks import small_blocks
from flashtile.testing.drawing import SIDES, Drawn, cache_calls, problems

COMMON: dict[str, Any] = {
    "deadline": None, "database": None, "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip
settings.register_profile("ci", max_examples=250, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=10_000, **COMMON)
settings.load_profile(os.environ.get("FLASHTILE_HYPOTHESIS", "ci"))

LSE_SLACK = 0.1
"""Roundings of q's dtype that lse may be wrong by: torch's kernel takes exp of 16-bit problems to
5e-6, while eager attention, if the scores are small, may be lucky."""


def evaluate(drawn: Drawn, dtype: torch.dtype | None, reference_too: bool) -> Results:
    """flashtile's results, or the reference's in `dtype` (None: the problem's own)."""
    leaves = {n: x.detach() for n, x in drawn.leaves.items()}
    if dtype is not None:
        leaves = {n: x.to(dtype) for n, x in leaves.items()}
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    generator = torch.Generator().manual_seed(drawn.seed)
    arguments = {**leaves, **drawn.keywords}
    if reference_too:
        state = draw_rng_state(torch.device("cpu"), generator)
        out, lse = reference.attention(**arguments, rng_state=state, dtype=dtype)
    else:
        function = flash_attn_varlen_func if drawn.varlen else flash_attn_func
        out, lse = function(
            **arguments, **drawn.plain, return_lse=True, dropout_generator=generator
        )
    g = torch.Generator().manual_seed(drawn.seed + 1)
    dout, dlse = (torch.randn(x.shape, generator=g).bfloat16() for x in (out, lse))
    dout = dout.to(out.dtype)
    if drawn.broadcast_dout and dout.numel():
        dout = dout.flatten()[0].expand(dout.shape)
    dlse = torch.where(lse.detach().isfinite(), dlse, 0.0).to(lse.dtype)
    if not out.requires_grad:  # the reference of no sequence at all
        return Results(out, lse, {n: torch.zeros_like(x) for n, x in leaves.items()})
    grads = torch.autograd.grad(
        (out, lse), list(leaves.values()), (dout, dlse), allow_unused=True, materialize_grads=True
    )
    return Results(out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True)))


def rounding(drawn: Drawn, name: str) -> float:
    """A size for one rounding of the intermediate results behind a result.

    The budget compares with the error that eager attention happens to make, which for a handful of
    numbers may be none; dP - delta cancels, so that a gradient's own size is no measure either.
    In 30,000 draws no error over the budget was more than 0.6 of this.
    """
    if name == "out":
        return 0.0
    if name == "lse":
        return LSE_SLACK * torch.finfo(drawn.leaves["q"].dtype).eps
    q, k, v = (x.detach()[x.detach().isfinite()].double().abs() for x in
               (drawn.leaves[n] for n in "qkv"))  # fmt: skip
    dim, dim_v = (drawn.leaves[n].shape[-1] for n in "qv")
    largest_q, largest_k, largest_v = (float(x.max()) if len(x) else 0.0 for x in (q, k, v))
    scale = drawn.keywords["softmax_scale"]
    scale = dim**-0.5 if scale is None else abs(scale)
    spread = 1.0 + scale * largest_q * largest_k * dim**0.5 / 8  # p = exp(s - lse) has s's error
    dout = spread * 3.0 / (1.0 - drawn.keywords["dropout_p"])
    dp = dout * largest_v * dim_v**0.5 + spread * 3.0
    many = (len(q) / dim) ** 0.5
    size = {
        "dq": scale * dp * largest_k, "dk": scale * dp * largest_q * many,
        "dv": 8 * dout * many, "dbias": dp * many, "dlearnable_sink": dp * many,
    }  # fmt: skip
    return torch.finfo(drawn.leaves["q"].dtype).eps * size[name]


def assert_close(actual: Tensor, eager: Tensor, golden: Tensor, name: str, slack: float) -> None:
    """Within the budget or, where that measures luck, within `slack` of golden."""
    try:
        assert_within_budget(actual, eager, golden, name, gradient=name.startswith("d"))
    except AssertionError as over_budget:
        finite = golden.isfinite()
        if not torch.equal(actual[~finite].double(), golden[~finite]):
            raise
        error = (actual[finite].double() - golden[finite]).abs().max()
        if not error <= slack:
            raise AssertionError(f"{over_budget}; max error is {error:.3g}") from over_budget


def run_as_drawn(drawn: Drawn) -> contextlib.ExitStack:
    """The blocks and the memory that a problem asks for."""
    stack = contextlib.ExitStack()
    if drawn.small_blocks:
        stack.enter_context(small_blocks())
    if drawn.poisoned:
        stack.enter_context(poisoned_allocations())
    return stack


def storage(x: Tensor) -> Tensor:
    """Every byte of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@given(problems())
def test_whole_problems(drawn: Drawn) -> None:
    inputs = [storage(x) for x in (*drawn.leaves.values(), *drawn.keywords.values())
              if isinstance(x, Tensor)]  # fmt: skip
    before = [x.clone() for x in inputs]
    with run_as_drawn(drawn):
        actual = evaluate(drawn, None, False)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    golden, eager = evaluate(drawn, torch.float64, True), evaluate(drawn, None, True)
    assert all(grad.is_contiguous() for grad in actual.grads.values())
    found, base, exact = (
        {"out": x.out, "lse": x.lse, **{f"d{n}": grad for n, grad in x.grads.items()}}
        for x in (actual, eager, golden)
    )
    for name, x in found.items():
        assert_close(x, base[name], exact[name], name, rounding(drawn, name))


@given(cache_calls())
def test_whole_cache_calls(drawn: Any) -> None:
    """Also: memory around the written slots keeps every bit."""
    q, caches, keywords, blocks = drawn
    golden, *after = reference.attention_with_kvcache(q, *caches, **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, dtype=None)
    expected = [storage(x).clone() for x in caches]
    for cache, memory, x in zip(caches, expected, after, strict=True):
        view = torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage())
        view.as_strided(cache.shape, cache.stride(), cache.storage_offset()).copy_(x)
    with small_blocks() if blocks else contextlib.nullcontext(), poisoned_allocations():
        out, lse = flash_attn_with_kvcache(q, *caches, **keywords, return_softmax_lse=True)
    for cache, memory in zip(caches, expected, strict=True):
        assert torch.equal(storage(cache), memory)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_close(lse, eager.lse, golden.lse, "lse", LSE_SLACK * torch.finfo(q.dtype).eps)


@given(st.data())
def test_a_band_with_bounds_equals_itself_without(data: Any) -> None:
    """Elements of a tile, and the exact ranges that it implies, by brute force."""
    seqlen_q, seqlen_k = (data.draw(st.integers(1, 70)) for _ in range(2))
    left, right = (-1 if side is None else side
                   for side in (data.draw(st.sampled_from(SIDES)) for _ in range(2)))  # fmt: skip
    row, col = data.draw(st.integers(0, seqlen_q - 1)), data.draw(st.integers(0, seqlen_k - 1))
    rows = data.draw(st.integers(1, seqlen_q - row))
    cols = data.draw(st.integers(1, seqlen_k - col))
    seen = torch.tensor([
        [(left < 0 or j >= at - left) and (right < 0 or j <= at + right) for j in range(seqlen_k)]
        for at in range(seqlen_k - seqlen_q, seqlen_k)
    ])  # fmt: skip
    band, tile = Band(left, right), Tile(0, 1, row, rows, col, cols, seqlen_q, seqlen_k)
    part = seen[row : row + rows, col : col + cols]
    visible = band.visible(tile, part)
    assert torch.equal(part, torch.ones_like(part) if visible is None else visible.expand_as(part))
    for (lo, hi), line in (
        (band.key_range(tile), seen[row : row + rows].any(0)),
        (band.query_range(tile), seen[:, col : col + cols].any(1)),
    ):
        inside = torch.zeros_like(line)
        inside[lo : max(lo, hi)] = True
        assert not (line & ~inside).any()
        assert not (line.any() and lo >= hi)
