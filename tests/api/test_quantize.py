"""quantize_kv: scales that make what they are of fit, and what is stored times them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func, flash_attn_with_kvcache, quantize_kv

E4M3 = torch.float8_e4m3fn
SHAPE = (3, 20, 2, 16)
SHARED = {"tensor": (), "head": (2,), "row": (3, 2), "token": SHAPE[:-1]}
"""Shapes of scales, by who shares one."""


def _filled(k: Tensor, v: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """k_cache, v_cache, k_descale, v_descale."""
    caches = [torch.full(x.shape, 7.0).to(E4M3) for x in (k, v)]
    scales = [torch.full(shape, torch.nan) for _ in range(2)]
    quantize_kv(k, v, *caches, *scales)
    return [*caches, *scales]


def _expanded(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    if shape == (3, 2):
        scale = scale[:, None]
    return scale.expand(SHAPE[:-1])[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("who", SHARED)
def test_values_come_back(who: str, dtype: torch.dtype) -> None:
    """Within half a step of e4m3: 2^-4 of a value, or of its smallest normal number."""
    k, v = (torch.randn(SHAPE).mul(size).to(dtype) for size in (0.003, 700.0))
    k_cache, v_cache, k_descale, v_descale = _filled(k, v, SHARED[who])
    for x, cache, scale in ((k, k_cache, k_descale), (v, v_cache, v_descale)):
        wide = _expanded(scale, SHARED[who])
        error = (cache.float() * wide - x.float()).abs()
        assert (error <= x.float().abs() / 16 + wide * 2.0**-10).all()


@pytest.mark.parametrize("who", SHARED)
def test_the_largest_is_448(who: str) -> None:
    """Of everything that shares a scale."""
    k, v = torch.randn(SHAPE), torch.randn(SHAPE)
    k_cache, *_ = _filled(k, v, SHARED[who])
    dims = {"tensor": (0, 1, 2, 3), "head": (0, 1, 3), "row": (1, 3), "token": (3,)}[who]
    assert k_cache.float().abs().amax(dims).eq(448).all()


def test_zeros_and_extremes() -> None:
    k, v = torch.zeros(SHAPE), torch.randn(SHAPE)
    v[0, 0] = 3e38
    v[0, 1] = 1e-40
    k_cache, v_cache, k_descale, v_descale = _filled(k, v, SHARED["token"])
    for x in (k_cache.float(), v_cache.float(), k_descale, v_descale):
        assert x.isfinite().all()
    assert k_cache.float().eq(0).all()
    assert k_descale.gt(0).all()
    torch.testing.assert_close(v_cache[0, 0].float() * v_descale[0, 0, :, None], v[0, 0])


@pytest.mark.parametrize("who", SHARED)
def test_attention_over_what_was_filled(who: str) -> None:
    """Close to attention over the numbers before: rounding to e4m3 costs 2^-4 a value at most."""
    k, v = torch.randn(SHAPE), torch.randn(SHAPE)
    q = torch.randn(3, 4, 6, 16)
    k_cache, v_cache, k_descale, v_descale = _filled(k, v, SHARED[who])
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k_descale=k_descale, v_descale=v_descale)
    expected = flash_attn_func(q, k, v)
    assert (out - expected).abs().max() < 0.15
    assert (out - expected).pow(2).mean().sqrt() < 0.03


ONE = torch.ones(2)


def _call(**changes: Any) -> Callable[[], None]:
    def call() -> None:
        given: dict[str, Any] = {
            "k": torch.randn(SHAPE), "v": torch.randn(SHAPE),
            "k_cache": torch.ones(SHAPE).to(E4M3), "v_cache": torch.ones(SHAPE).to(E4M3),
            "k_descale": torch.ones(2), "v_descale": torch.ones(2), **changes,
        }  # fmt: skip
        try:
            quantize_kv(**given)
        finally:
            for name in ("k_cache", "v_cache", "k_descale", "v_descale"):
                if isinstance(given[name], Tensor):
                    assert given[name].float().eq(1).all()

    return call


ERRORS = [
    (_call(k=torch.randn(3, 20, 16)), ValueError, "k has shape (3, 20, 16); it must have 4 dim"),
    (_call(k=torch.ones(SHAPE, dtype=torch.int32)), TypeError, "k has dtype torch.int32"),
    (_call(v=3.0), TypeError, "v is a float; it must be a torch.Tensor"),
    (_call(v_cache=torch.ones(SHAPE)), TypeError, "v_cache has dtype torch.float32; it must be"),
    (
        _call(k_cache=torch.ones(3, 21, 2, 16).to(E4M3)), ValueError,
        "k_cache has shape (3, 21, 2, 16); it must be k's (3, 20, 2, 16)",
    ),
    (
        _call(v_cache=torch.ones(1, 20, 2, 16).to(E4M3).expand(SHAPE)), ValueError,
        "v_cache has shape (3, 20, 2, 16) and strides (0, 32, 16, 1); to be written to",
    ),
    (
        _call(v_descale=torch.ones(1).expand(2)), ValueError,
        "v_descale has shape (2,) and strides (0,); to be written to",
    ),
    (_call(v=torch.randn(SHAPE, device="meta")), ValueError, "v is on meta"),
    (_call(k_descale=ONE, v_descale=ONE), ValueError, "K and V are to be written to one tensor"),
    (
        _call(v_descale=torch.ones(3)), ValueError,
        "v_descale has shape (3,); it must be (), (2,), (3, 2) or (3, 20, 2)",
    ),
    (
        _call(k_descale=torch.ones(2).half()), TypeError,
        "k_descale has dtype torch.float16; it must be torch.float32",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[x[2] for x in ERRORS])
def test_errors(call: Callable[[], None], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()
