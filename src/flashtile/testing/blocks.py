"""The torch backend in many small blocks, so that small problems meet every boundary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from flashtile import plan
from flashtile.backends import aten


@contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of 16 x 16, a few at a time, and never torch's own kernel."""
    plan.plan.cache_clear()
    with (
        patch.object(plan, "BLOCK", 16),
        patch.object(plan, "BLOCK_ELEMENTS", 16 * 16 * 4),
        patch.object(aten, "can", lambda call, segment: False),
    ):
        yield
    plan.plan.cache_clear()
