"""The demo from start to end, on a console."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from torch import Tensor

from flashtile import __version__, flash_attn_func
from flashtile.demo import layer, report
from flashtile.demo.layer import Row, TensorError
from flashtile.demo.results import Results
from flashtile.demo.settings import Settings
from flashtile.demo.train import Training, batches, write
from flashtile.testing.standard import standard_attention

PROMPT = "The "


def run(settings: Settings, text: Tensor, console: Console) -> list[str]:
    """Learn the text's bytes, measure the layer, show it all. Returns what failed, in words."""
    hardware = f"{torch.get_num_threads()} CPU threads"
    if settings.device.type == "cuda":
        hardware = torch.cuda.get_device_name(settings.device)
    console.print(f"flashtile {__version__}, torch {torch.__version__}, {hardware}")
    flash, standard = _learn(settings, text, console)
    errors, rows = _measure(settings, console)
    results = Results(settings, hardware, flash, standard, errors, rows)
    failures = results.failures()
    for failure in failures:
        console.print(f"[red]failed:[/red] {escape(failure)}")
    drawn = _draw(results)
    console.print(f"{drawn}; {_backend(settings)}", soft_wrap=True, highlight=False, markup=False)
    return failures


def _learn(settings: Settings, text: Tensor, console: Console) -> tuple[Training, Training]:
    """Train the same model with both attentions, and let the first one write.

    They take turns at every batch, so that whatever else the machine does slows both.
    """
    source = escape(str(settings.text or "pydoc_data.topics"))
    console.print(f"\n[bold]1. A small GPT learns {source}, {len(text):,} bytes of text[/bold]")
    flash = Training(flash_attn_func, settings)
    standard = Training(standard_attention, settings)
    names = {"flashtile": flash, "standard attention": standard}
    with _progress(console) as progress:
        tasks = {name: progress.add_task(name, total=settings.steps) for name in names}
        for batch in batches(text, settings):
            for name, training in names.items():
                loss = training.step(batch)
                progress.update(tasks[name], advance=1, description=f"{name}, loss {loss:.3f}")
    console.print(report.training_table(flash, standard, settings))
    written = write(flash.model, PROMPT, settings)
    console.print(Panel(Text(written), title="what it then writes", title_align="left"))
    return flash, standard


def _measure(settings: Settings, console: Console) -> tuple[list[TensorError], list[Row]]:
    """The layer's errors, and its costs at each length."""
    shape = settings.layer
    console.print(
        f"\n[bold]2. One attention layer of Llama-3-8B's shape[/bold]: {shape.heads} query heads, "
        f"{shape.kv_heads} KV heads, head_dim {shape.head_dim}, causal"
    )
    with _progress(console) as progress:
        task = progress.add_task("error against fp64", total=1 + 2 * len(settings.lengths))
        errors = layer.errors(settings)

        def on_start(seqlen: int, name: str) -> None:
            progress.update(task, advance=1, description=f"{seqlen:,} tokens, {name}")

        rows = list(layer.growth(settings, on_start))
        progress.update(task, description="measured", completed=1 + 2 * len(settings.lengths))
    console.print(report.error_table(errors, settings))
    console.print(report.growth_table(rows, settings))
    return errors, rows


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _draw(results: Results) -> str:
    """Write the plot where matplotlib is installed, and say so."""
    if find_spec("matplotlib") is None:
        return "no plot drawn, pip install 'flashtile[plot]' for one"
    from flashtile.demo.plot import draw  # noqa: PLC0415  matplotlib is optional

    draw(results)
    return f"wrote {results.settings.output}"


def _backend(settings: Settings) -> str:
    """The backend used, and why not a better one."""
    plan = layer.plan_of(settings).plan
    return "; ".join([f"backend: {plan.backend}", *(f"not {n}: {r}" for n, r in plan.passed_over)])
