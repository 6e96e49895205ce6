"""The demo's figure: the loss curves, and what the layer costs as the sequence grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from flashtile.demo.layer import Cost, Row
from flashtile.demo.results import Results
from flashtile.demo.units import of_bytes, of_ratio, of_seconds

FLASH, STANDARD = "#0072B2", "#D55E00"
"""Blue and vermilion of Okabe and Ito, "Color Universal Design", 2008: apart in every kind of
colour blindness."""

STANDARD_NAME = "standard attention"

INK, QUIET, GRID = "#222222", "#707070", "#e8e8e8"


def draw(results: Results) -> None:
    """Write the PNG that the settings name."""
    figure = Figure(figsize=(14.0, 5.4), dpi=144, layout="constrained", facecolor="white")
    loss, seconds, memory = figure.subplots(1, 3)
    _style(loss, "Training", "loss of a small GPT, nats a byte")
    _style(seconds, "Time", "of one layer, forward plus backward")
    _style(memory, "Memory", "of one layer, peak above the inputs")
    _draw_losses(loss, results)
    _draw_costs(seconds, results, lambda cost: cost.seconds, of_seconds, 10)
    _draw_costs(memory, results, lambda cost: cost.peak_bytes, of_bytes, 4)
    seconds.legend(frameon=False, fontsize=12, labelcolor=INK, loc="upper left")
    _label_ratios(seconds, memory, results)
    _draw_limit(memory, results)
    figure.supxlabel(_caption(results), fontsize=10, color=QUIET)
    figure.savefig(results.settings.output, format="png")


def _caption(results: Results) -> str:
    shape, out = results.settings.layer, results.errors[0]
    dtype = str(results.settings.layer_dtype).removeprefix("torch.")
    return (
        f"\nLayer: {shape.heads} query heads, {shape.kv_heads} KV heads, "
        f"head_dim {shape.head_dim}, causal, {dtype}, on {results.hardware}. "
        f"Rms error against fp64: flashtile {out.flash_rms:.1e}, standard attention "
        f"{out.standard_rms:.1e}. Dashed: estimated."
    )


def _style(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=15, fontweight="bold", color=INK)
    axes.text(0.0, 1.03, subtitle, transform=axes.transAxes, fontsize=11, color=QUIET)
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """A pale grid behind two thin axes without ticks."""
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=QUIET, length=0)


def scale_tokens(axes: Axes, seqlens: list[int]) -> None:
    """Sequence lengths on a logarithmic x axis, 1k for 1,024."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(seqlens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:.0f}" if x < 1024 else f"{x / 1024:.0f}k")
    )


def _draw_losses(axes: Axes, results: Results) -> None:
    """The curves lie on each other: a wide one below, a thin one above."""
    steps = range(1, len(results.flash.losses) + 1)
    wide: dict[str, Any] = {
        "color": STANDARD,
        "linewidth": 6.0,
        "alpha": 0.4,
        "solid_capstyle": "round",
    }
    axes.plot(steps, results.standard.losses, label=STANDARD_NAME, **wide)
    axes.plot(steps, results.flash.losses, color=FLASH, linewidth=1.6, label="flashtile")
    axes.set_xlabel("training step", color=QUIET)
    axes.legend(frameon=False, fontsize=12, labelcolor=INK, loc="upper right")
    note = f"largest difference {results.difference:.1e} nats"
    axes.text(0.98, 0.76, note, transform=axes.transAxes, ha="right", color=QUIET, fontsize=11)


def _draw_costs(
    axes: Axes, results: Results, cost: Callable[[Cost], float], unit: Callable[[float], str],
    base: int,
) -> None:  # fmt: skip
    """Both attentions over the sequence length; estimates of what was not run are dashed."""
    lengths = [row.seqlen for row in results.rows]
    flash = [cost(row.flash) for row in results.rows]
    standard = [cost(row.standard) for row in results.rows]
    run = results.standard_runs
    start = max(run - 1, 0)
    _log_axes(axes, lengths, unit, base)
    solid: dict[str, Any] = {"markersize": 7, "linewidth": 2.4}
    axes.plot(lengths[start:], standard[start:], "x--", color=STANDARD, markersize=8, linewidth=1.2)
    axes.plot(lengths[:run], standard[:run], "s-", color=STANDARD, label=STANDARD_NAME, **solid)
    axes.plot(lengths, flash, "o-", color=FLASH, label="flashtile", **solid)
    _label(axes, lengths[-1], flash[-1], unit(flash[-1]), FLASH, (10, -4), "left")
    for row in _first_skipped(results.rows):
        _label(axes, row.seqlen, cost(row.standard), row.standard.skipped, STANDARD, (-12, 4))


def _first_skipped(rows: list[Row]) -> list[Row]:
    """The first row of each reason not to run standard attention."""
    reasons = {row.standard.skipped: row for row in reversed(rows)}
    return [row for reason, row in reasons.items() if reason]


def _label_ratios(seconds: Axes, memory: Axes, results: Results) -> None:
    """What flashtile gains at the longest sequence that both ran."""
    if not results.standard_runs:
        return
    seqlen, flash, standard, _ = results.rows[results.standard_runs - 1]
    ratio = of_ratio(standard.seconds / flash.seconds)
    slower = flash.seconds > standard.seconds
    place: tuple[Any, ...] = ((-10, 8), "right") if slower else ((8, -16), "left")
    _label(seconds, seqlen, flash.seconds, f"{ratio} the speed", INK, *place)
    share = f"{flash.peak_bytes / standard.peak_bytes:.0%} of the memory"
    _label(memory, seqlen, flash.peak_bytes, share, INK, (8, -16), "left")


def _log_axes(axes: Axes, lengths: list[int], unit: Callable[[float], str], base: int) -> None:
    scale_tokens(axes, lengths)
    axes.set_xlabel("tokens, 1k = 1,024", color=QUIET)
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: unit(y)))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_limit(axes: Axes, results: Results) -> None:
    """The memory that there is."""
    first = results.rows[0]
    axes.set_ylim(top=max(axes.get_ylim()[1], 3.0 * first.free_bytes))
    axes.axhline(first.free_bytes, color=INK, linewidth=1.0, linestyle=":")
    text = f"{of_bytes(first.free_bytes)} free"
    _label(axes, first.seqlen, first.free_bytes, text, QUIET, (0, 6), "left")


def _label(
    axes: Axes, x: float, y: float, text: str, color: str, offset: tuple[float, float],
    side: str = "right",
) -> None:  # fmt: skip
    """Text that ends (or begins, with side "left") at an offset in points from a point."""
    axes.annotate(
        text, (x, y), offset, textcoords="offset points", ha=side, color=color, fontsize=11
    )
