"""The few lines of README that say how fast it is; the tables further down have every cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

from flashtile.bench.peers import over_best_peer, rate
from flashtile.bench.record import read
from flashtile.bench.summary import Document, Row, ratio

Gain = Callable[[Row], float | None]


def headline(folder: Path) -> str:
    """A bullet for each mode of the suites `dense` and `decode` in a GPU's folder of results."""
    dense, decode = (read(folder / f"{suite}.json") for suite in ("dense", "decode"))
    if dense is None or decode is None:
        return ""
    rows = dense["rows"]
    forward, backward = ([r for r in rows if r["mode"] == mode] for mode in ("fwd", "bwd"))
    cached = [row for row in decode["rows"] if row["feature"] == "dense"]
    return "\n".join((
        _bullet("Forward", forward, "TFLOP/s", _over_best(dense)),
        _bullet("Backward", backward, "TFLOP/s", _over_best(dense)),
        _bullet("A decoded token", cached, "TB/s of K and V", _over_best(decode)),
        _portable("Forward", forward),
        _portable("Backward", backward),
    ))  # fmt: skip


def _over_best(document: Document) -> Gain:
    gpu = document["environment"]["gpu"]
    return lambda row: over_best_peer(row, gpu)


def _bullet(what: str, rows: list[Row], unit: str, gain: Gain) -> str:
    """Least and greatest rate of rows, and their speed over the best peer's where that is known."""
    rates = [found for row in rows if (found := rate(row["providers"].get("flashtile", {})))]
    digits = 0 if unit == "TFLOP/s" else 2
    text = f"- {what}: {min(rates):.{digits}f} to {max(rates):.{digits}f} {unit}"
    known = [row for row in rows if gain(row) is not None]
    return f"{text}, {_range(known, gain)} the best peer's{_dims(known, rows)}."


def _portable(what: str, rows: list[Row]) -> str:
    """The portable kernels over FlashAttention-2, a range for each head dim."""
    known = [row for row in rows if _over_fa2(row) is not None]
    ranges = [
        f"{_range([r for r in known if r['head_dim'] == dim], _over_fa2)} at head dim {dim}"
        for dim in sorted({row["head_dim"] for row in known})
    ]
    return f"- {what}, portable kernels over FlashAttention-2: {', '.join(ranges) or 'not run'}."


def _over_fa2(row: Row) -> float | None:
    return ratio(row, "fa2", "flashtile-triton")


def _range(rows: list[Row], gain: Gain) -> str:
    gains = [found for row in rows if (found := gain(row)) is not None]
    return f"{min(gains):.2f}x to {max(gains):.2f}x (mean {geometric_mean(gains):.2f}x)"


def _dims(known: list[Row], rows: list[Row]) -> str:
    """Which head dims a comparison is of, where not of all."""
    dims = sorted({row["head_dim"] for row in known})
    if dims == sorted({row["head_dim"] for row in rows}):
        return ""
    return f" at head dims {' and '.join(map(str, dims))}"
