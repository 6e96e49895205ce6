"""Standard attention is exact, in its plain way."""

from __future__ import annotations

import pytest
import torch

from flashtile import reference
from flashtile.testing.standard import standard_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [9, 13])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_equals_the_reference(causal: bool, seqlen_k: int, softmax_scale: float | None) -> None:
    q = torch.randn(2, 9, 6, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, seqlen_k, 2, 16, dtype=torch.float64)
    keywords = {"causal": causal, "softmax_scale": softmax_scale}

    actual = standard_attention(q, k, v, **keywords)

    assert actual.shape == q.shape
    torch.testing.assert_close(actual, reference.attention(q, k, v, **keywords).out)


def test_computes_in_its_inputs_dtype() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=torch.bfloat16) for _ in range(3))

    assert standard_attention(q, k, v, causal=True).dtype == torch.bfloat16
