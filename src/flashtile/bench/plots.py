"""Results as PNG figures, beside their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flashtile.bench.record import read
from flashtile.bench.summary import Document, Row, against_plain
from flashtile.demo.plot import INK, QUIET, scale_tokens, style_axes

STYLES = {
    "flashtile": ("#0072B2", "flashtile"),
    "flashtile-triton": ("#56B4E9", "flashtile, portable kernels"),
    "fa2": ("#D55E00", "FlashAttention-2 (torch)"),
    "cudnn": ("#009E73", "cuDNN (torch)"),
    "flex": ("#CC79A7", "FlexAttention"),
    "efficient": ("#E69F00", "SDPA with a mask"),
    "math": ("#E69F00", "SDPA math"),
    "fa3": ("#7A4B00", "FlashAttention-3"),
    "fa4": ("#000000", "FlashAttention-4"),
}
"""Colours of Okabe and Ito, "Color Universal Design", 2008: apart in every kind of colour
blindness."""

MODES = {"fwd": "forward", "bwd": "backward"}


def draw(folder: Path) -> list[Path]:
    """A figure of every suite in a folder that has one."""
    written = []
    dense, features, memory = (
        read(folder / f"{suite}.json") for suite in ("dense", "features", "memory")
    )
    if dense is not None:
        for mask in ("causal", "full"):
            written.append(_save(draw_dense(dense, mask), folder / f"dense-{mask}.png"))
    if features is not None:
        written.append(_save(draw_features(features), folder / "features.png"))
    if memory is not None:
        written.append(_save(draw_memory(memory), folder / "memory.png"))
    return written


def draw_dense(document: Document, mask: str) -> Figure:
    """TFLOP/s over sequence length: a row of axes a mode, a column a head dim."""
    rows = [row for row in document["rows"] if row["feature"] == mask]
    head_dims = sorted({row["head_dim"] for row in rows})
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    figure = _figure(4.4 * max(1, len(head_dims)), 3.6 * max(1, len(modes)))
    for i, mode in enumerate(modes):
        for j, head_dim in enumerate(head_dims):
            axes = figure.add_subplot(len(modes), len(head_dims), i * len(head_dims) + j + 1)
            part = [r for r in rows if (r["mode"], r["head_dim"]) == (mode, head_dim)]
            _style(axes, f"{MODES[mode]}, head dim {head_dim}")
            _draw_rates(axes, sorted(part, key=lambda row: row["seqlen"]))
            if j == 0:
                axes.set_ylabel("TFLOP/s", color=QUIET)
    _legend(figure)
    _caption(figure, document, f"{mask}, bf16, 16,384 tokens, hidden size 2,048")
    return figure


def _draw_rates(axes: Axes, rows: list[Row]) -> None:
    for name, (color, label) in STYLES.items():
        points = [(r["seqlen"], result["tflops"]) for r in rows
                  if "tflops" in (result := r["providers"].get(name, {}))]  # fmt: skip
        if points:
            ours = name == "flashtile"
            width: dict[str, Any] = {"linewidth": 2.6 if ours else 1.6, "zorder": 3 if ours else 2}
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, **width)
    scale_tokens(axes, [row["seqlen"] for row in rows])
    axes.set_ylim(bottom=0)


def draw_features(document: Document) -> Figure:
    """Time for the same FLOPs in units of plain attention's, a pair of bars a feature."""
    rows = [row for row in document["rows"] if row["head_dim"] == 128]
    names = list(dict.fromkeys(_cell_name(row, rows) for row in rows))
    figure = _figure(9.0, 0.45 * len(names) + 1.8)
    axes = figure.add_subplot()
    _style(axes, "Time for the same FLOPs, in units of plain attention's")
    for offset, mode, color in ((0.2, "fwd", "#0072B2"), (-0.2, "bwd", "#56B4E9")):
        costs = {_cell_name(r, rows): cost for r in rows
                 if r["mode"] == mode and (cost := against_plain(r)) is not None}  # fmt: skip
        heights = [len(names) - 1 - names.index(name) + offset for name in costs]
        bars = axes.barh(heights, list(costs.values()), 0.38, color=color, label=MODES[mode])
        axes.bar_label(bars, fmt="%.2f", padding=3, color=QUIET, fontsize=9)
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=":")
    axes.set_yticks(range(len(names)), reversed(names))
    axes.legend(frameon=False)
    _caption(figure, document, "head dim 128, bf16")
    return figure


def _cell_name(row: Row, rows: list[Row]) -> str:
    """Of a row's cell: the feature, and its tokens and heads where it has several cells."""
    sizes = {(r["seqlen"], r["heads"]) for r in rows if r["feature"] == row["feature"]}
    return row["feature"] + (f", {row['seqlen']:,} x {row['heads']}" if len(sizes) > 1 else "")


def draw_memory(document: Document) -> Figure:
    """Peak memory over sequence length."""
    rows = [row for row in document["rows"] if row["path"] == "causal"]
    figure = _figure(6.0, 4.2)
    axes = figure.add_subplot()
    _style(axes, "Peak memory of forward plus backward, GiB")
    for name, (color, label) in STYLES.items():
        points = [(r["seqlen"], r[f"{name}_bytes"] / 2**30) for r in rows if f"{name}_bytes" in r]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    scale_tokens(axes, [row["seqlen"] for row in rows])
    axes.legend(frameon=False)
    _caption(figure, document, "causal")
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    style_axes(axes)


def _legend(figure: Figure) -> None:
    """One for all axes."""
    labels = {label: line for axes in figure.axes
              for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(list(labels.values()), list(labels), loc="outside upper center",
                  ncols=max(1, len(labels)), frameon=False)  # fmt: skip


def _caption(figure: Figure, document: Document, what: str) -> None:
    env = document["environment"]
    where = env.get("gpu") or env["cpu"]
    figure.supxlabel(f"{what}; {where}, torch {env['torch']}, commit {env['commit'][:9]}",
                     fontsize=9, color=QUIET)  # fmt: skip


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="png")
    return path
