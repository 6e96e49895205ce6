"""Numbers as people read them."""

from __future__ import annotations


def of_bytes(count: float) -> str:
    return f"{_short(count / 2**20)} MiB" if count < 2**30 else f"{_short(count / 2**30)} GiB"


def of_seconds(seconds: float) -> str:
    return f"{_short(seconds * 1e3)} ms" if seconds < 1.0 else f"{_short(seconds)} s"


def of_ratio(ratio: float) -> str:
    return f"{_short(ratio, digits=2)}x"


def _short(x: float, digits: int = 3) -> str:
    """Three digits, or all those of the integer part."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"
