"""What the demo found, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from flashtile.demo.layer import Cost, Row, TensorError
from flashtile.demo.results import largest_difference
from flashtile.demo.settings import Settings
from flashtile.demo.train import Training
from flashtile.demo.units import of_bytes, of_ratio, of_seconds

ROWS = 5
"""Steps of a loss curve that the table shows."""


def training_table(flash: Training, standard: Training, settings: Settings) -> Table:
    table = _table("Loss, nats a byte", "step", "flashtile", "standard", "difference")
    last = len(flash.losses) - 1
    for step in sorted({round(last * i / (ROWS - 1)) for i in range(ROWS)}):
        a, b = flash.losses[step], standard.losses[step]
        table.add_row(f"{step + 1}", f"{a:.4f}", f"{b:.4f}", f"{abs(a - b):.1e}")
    tail = max(1, len(flash.losses) // 10)
    means = [statistics.fmean(each.losses[-tail:]) for each in (flash, standard)]
    table.add_section()
    table.add_row(f"last {tail}", *(f"{mean:.4f}" for mean in means))
    table.add_row("largest", "", "", f"{largest_difference(flash, standard):.1e}")
    table.add_row("a step", *(of_seconds(each.step_seconds) for each in (flash, standard)))
    return table


def error_table(errors: Sequence[TensorError], settings: Settings) -> Table:
    dtype = str(settings.layer_dtype).removeprefix("torch.")
    table = _table(
        f"Error against fp64, {settings.error_seqlen:,} tokens, {dtype}",
        *("result", "flashtile rms", "max", "standard rms", "max", "within budget"),
    )
    for e in errors:
        figures = (e.flash_rms, e.flash_max, e.standard_rms, e.standard_max)
        verdict = "[red]no[/red]" if e.failure else "yes"
        table.add_row(e.name, *(f"{x:.1e}" for x in figures), verdict)
    return table


def growth_table(rows: Sequence[Row], settings: Settings) -> Table:
    dtype = str(settings.layer_dtype).removeprefix("torch.")
    table = _table(
        f"Forward plus backward, {dtype}: time, peak memory above inputs",
        *("tokens", "flashtile", "memory", "standard", "memory", "speed", "memory"),
    )
    for row in rows:
        flash = row.flash
        cells = (f"{row.seqlen:,}", of_seconds(flash.seconds), of_bytes(flash.peak_bytes))
        table.add_row(*cells, *_standard_cells(flash, row.standard))
    table.caption = "\n".join(_why_stopped(row, settings) for row in rows if row.standard.skipped)
    table.caption_justify = "left"
    return table


def _standard_cells(flash: Cost, standard: Cost) -> tuple[str, ...]:
    if standard.skipped:
        return f"[yellow]{standard.skipped}[/yellow]", f"({of_bytes(standard.peak_bytes)})"
    return (
        of_seconds(standard.seconds),
        of_bytes(standard.peak_bytes),
        of_ratio(standard.seconds / flash.seconds),
        f"{flash.peak_bytes / standard.peak_bytes:.0%}",
    )


def _why_stopped(row: Row, settings: Settings) -> str:
    """The figures behind a measurement that was not made."""
    standard = row.standard
    why = f"would take about {of_seconds(standard.seconds)}, the demo waits up to "
    why += of_seconds(settings.standard_seconds)
    if standard.skipped == "out of memory":
        why = f"needs {of_bytes(standard.peak_bytes)}, of {of_bytes(row.free_bytes)} free"
    return f"Standard attention at {row.seqlen:,} tokens {why}."


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
