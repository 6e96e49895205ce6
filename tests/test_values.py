"""Checks of values: always on the CPU, elsewhere only when asked, since they are a host sync."""

from __future__ import annotations

import pytest
import torch

from flashtile import config, values
from flashtile.api import normalise


def test_accelerators_are_read_in_checked_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.empty(2, device="meta")
    assert values._reads(torch.empty(2))
    assert not values._reads(there)
    monkeypatch.setattr(config, "checked", True)
    assert values._reads(there)


def test_no_value_is_read_elsewhere() -> None:
    """On a device without data every read raises; the checks pass, so they read nothing."""
    q = torch.empty(9, 2, 8, device="meta")
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    used = torch.empty(2, dtype=torch.int32, device="meta")
    values.check(normalise(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=used))
    out, lse = torch.ops.flashtile.forward.default(
        *normalise(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=used).flat()
    )
    assert (out.shape, lse.shape) == (q.shape, (2, 9))
