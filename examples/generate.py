"""Continuous batching: a small GPT writes text for requests that come and go.

`python examples/generate.py --requests 8` on a CPU or a GPU, with flashtile's `cli` extra. The GPT
learns Python's own documentation for some seconds, byte by byte, or is loaded from a checkpoint.
Then requests arrive over time and `flashtile.models.engine` serves them: each prompt is the start
of a sentence of the text, and the model writes on to the next full stop.
"""

from __future__ import annotations

import math
import pickle
import random
import re
import statistics
import struct
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.cli.devices import describe, torch_device
from flashtile.demo.settings import Settings
from flashtile.demo.train import Training, batches, read_text
from flashtile.models.engine import Engine, Generation, Request
from flashtile.models.gpt import GPT, GPTConfig

LONGEST_PROMPT = 32
FULL_STOP = ord(".")
ROWS = 12
"""Requests that the live table shows."""


class Arrival(NamedTuple):
    step: int  # of the engine; a clock that runs alike on every machine
    request: Request


@dataclass
class Served:
    """A request that has arrived, with the seconds at which it did, wrote and ended."""

    generation: Generation
    arrived: float
    first: float | None = None
    ended: float | None = None


def learn(text: Tensor, settings: Settings, console: Console) -> GPT:
    """A model trained on text, uint8."""
    training = Training(flash_attn_func, settings)
    console.print(f"learning {len(text):,} bytes of text")
    for batch in track(batches(text, settings), "training", settings.steps, console=console):
        training.step(batch)
    console.print(f"loss {statistics.fmean(training.losses[-10:]):.2f} nats a byte")
    return training.model


def load(path: Path, device: torch.device) -> GPT:
    """The model of a file that `save` wrote."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["config"])).to(device)
        model.load_state_dict(saved["model"])
    except (pickle.UnpicklingError, struct.error, OSError, EOFError, RuntimeError, LookupError,
            AttributeError, TypeError, ValueError) as wrong:  # fmt: skip
        reason = f"{path} is no file that this option wrote"
        raise typer.BadParameter(reason, param_hint="--checkpoint") from wrong
    return model


def save(model: GPT, path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, partial)
    partial.replace(path)


def check_fits(limit: int, pages: int, page_size: int, context: int) -> None:
    """Before anything is learnt or served: the longest request that may arrive has room."""
    size = f"a prompt has up to {LONGEST_PROMPT} tokens and limit is {limit}"
    if LONGEST_PROMPT + limit > context:
        reason = f"{size}; together they must be at most {context}, the context"
        raise typer.BadParameter(reason, param_hint="--limit")
    needed = -(-(LONGEST_PROMPT + limit - 1) // page_size)  # the last token is never computed
    if needed > pages:
        reason = f"{size}; they may need {needed} pages of {page_size}, the pool has {pages}"
        raise typer.BadParameter(reason, param_hint="--pages")


def schedule(
    text: Tensor, count: int, gap: float, limit: int, temperature: float, seed: int
) -> deque[Arrival]:
    """Requests that arrive `gap` steps after each other on average, the same for the same seed."""
    draw, learned = random.Random(seed), bytes(text.tolist())
    sentences = [match.end() for match in re.finditer(rb"\. (?=[A-Z])", learned)]
    arrivals: deque[Arrival] = deque()
    step = 0.0
    for number in range(count):
        start, length = draw.choice(sentences), draw.randint(1, LONGEST_PROMPT)
        prompt = tuple(learned[start : start + length])
        request = Request(prompt, limit, FULL_STOP, temperature, seed=seed + number)
        arrivals.append(Arrival(int(step), request))
        step += draw.expovariate(1.0 / gap)
    return arrivals


def serve(engine: Engine, arrivals: deque[Arrival], console: Console) -> list[Served]:
    """Submit requests as they arrive and step until all have ended."""
    served: list[Served] = []
    start, step = time.perf_counter(), 0
    with Live(console=console, transient=True) as live:
        while arrivals or engine.busy:
            if not engine.busy:  # nothing to do before the next one comes
                step = max(step, arrivals[0].step)
            while arrivals and arrivals[0].step <= step:
                generation = engine.submit(arrivals.popleft().request)
                served.append(Served(generation, time.perf_counter() - start))
            engine.step()
            step, now = step + 1, time.perf_counter() - start
            for each in served:
                if each.first is None and each.generation.written:
                    each.first = now
                if each.ended is None and each.generation.ended:
                    each.ended = now
            live.update(view(engine, served, step, now))
    console.print(view(engine, served, step, now, whole=True))
    return served


def view(
    engine: Engine, served: list[Served], step: int, seconds: float, *, whole: bool = False
) -> Group:
    """The state of the engine, and of the requests that are under way or ended last.

    A request's text is cut to one line, or whole.
    """
    written = sum(len(each.generation.written) for each in served)
    state = (
        f"step {step}, {len(engine.running)} running, {len(engine.waiting)} waiting, "
        f"{engine.pool.in_use} of {engine.pool.pages} pages in use, "
        f"{written / seconds:,.0f} tokens a second"
    )
    table = Table(expand=True)
    for name in ("request", "state", "tokens", "pages"):
        table.add_column(name, justify="right")
    table.add_column("text", ratio=1, no_wrap=not whole)
    by_end = sorted(enumerate(served), key=lambda pair: pair[1].ended or math.inf)
    for number, each in sorted(by_end[-ROWS:], key=lambda pair: pair[0]):
        generation = each.generation
        sizes = f"{len(generation.tokens)}", f"{len(generation.pages)}"
        table.add_row(f"{number + 1}", state_of(generation, engine), *sizes, text_of(generation))
    return Group(Text(state), table)


def state_of(generation: Generation, engine: Engine) -> str:
    if generation.ended:
        return "ended"
    if generation not in engine.running:
        return "waiting"
    return "writing" if generation.written else "reading"


def text_of(generation: Generation) -> Text:
    """The prompt, dimmed, and what is written, on one line."""
    prompt, written = (
        re.sub(r"\s+", " ", bytes(tokens).decode(errors="replace"))
        for tokens in (generation.request.prompt, generation.written)
    )
    return Text.assemble((prompt, "dim"), written)


def summary(engine: Engine, served: list[Served]) -> str:
    seconds = max(each.ended or 0.0 for each in served)
    written = sum(len(each.generation.written) for each in served)
    waits = [each.first - each.arrived for each in served if each.first is not None]
    stopped = sum(each.generation.tokens[-1] == FULL_STOP for each in served)
    return (
        f"{len(served)} requests, {written:,} tokens in {seconds:.1f} s: "
        f"{written / seconds:,.0f} tokens a second, median time to the first "
        f"{1e3 * statistics.median(waits):.0f} ms; {stopped} ended with a full stop, "
        f"{engine.preemptions} times a request gave its pages back, "
        f"{engine.pool.in_use} pages still in use"
    )


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many arrive.")] = 8,
    gap: Annotated[
        float, typer.Option(min=0.01, max=1e9, help="Steps between them, on average.")
    ] = 8.0,
    limit: Annotated[int, typer.Option(min=1, help="Tokens that each may write.")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.7,
    pages: Annotated[int, typer.Option(min=1, help="Pages of the cache.")] = 32,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens in a page.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Requests running at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Load the model from here, or train it and save it here.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of prompts, arrivals and texts.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the best.")] = None,
) -> None:
    """A small GPT writes text for requests that come and go, over a paged KV cache."""
    console, where = Console(), torch_device(device)
    settings = Settings(where, steps=steps, model=GPTConfig(layers=2))
    check_fits(limit, pages, page_size, settings.model.seqlen)
    if not math.isfinite(temperature):
        raise typer.BadParameter(f"{temperature} is not finite", param_hint="--temperature")
    console.print(f"on {describe(where)}")
    if checkpoint is not None and not checkpoint.absolute().parent.is_dir():
        raise typer.BadParameter(f"{checkpoint.parent} is not a folder", param_hint="--checkpoint")
    text = read_text(settings)
    if checkpoint is not None and checkpoint.exists():
        model = load(checkpoint, where)
    else:
        model = learn(text, settings, console)
        if checkpoint is not None:
            save(model, checkpoint)
    arrivals = schedule(text, requests, gap, limit, temperature, seed)
    mixed = where.type == "cuda"  # a GPU computes in bfloat16, and keeps its cache in it
    dtype = torch.bfloat16 if mixed else None
    try:
        with torch.autocast(where.type, torch.bfloat16, enabled=mixed):
            engine = Engine(model, pages=pages, page_size=page_size, batch=batch, dtype=dtype)
            served = serve(engine, arrivals, console)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong)) from wrong
    console.print(summary(engine, served))


if __name__ == "__main__":
    typer.run(main)
