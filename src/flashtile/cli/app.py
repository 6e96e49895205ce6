"""The commands and their options. What a command needs is imported when it runs."""

# ruff: noqa: PLC0415

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashtile.cli.bench import bench

app = typer.Typer(
    help="Exact attention for PyTorch: try it, see where it runs, what it does with a problem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="What to learn. Default: Python's own documentation.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The plot to write.")] = Path("flashtile-demo.png"),
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each model.")] = 200,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the best.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, a few seconds.")] = False,
) -> None:
    """Train a small GPT with flashtile and with standard attention, then measure a Llama-3 layer.

    A minute or two on two CPU cores. Exits with 1 if the two disagree.
    """
    from flashtile.cli.devices import torch_device
    from flashtile.demo import LONGEST, Settings, read_text, run

    where = torch_device(device)
    folder = output.absolute().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder", param_hint="--output")
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder", param_hint="--output")
    if text is not None and not text.is_file():
        raise typer.BadParameter(f"{text} is not a file", param_hint="--text")
    settings = Settings(where, output, text, steps, longest=LONGEST[where.type])
    settings = settings.quick() if quick else settings
    try:
        learned = read_text(settings)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint="--text") from wrong
    if run(settings, learned, Console()):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Versions, devices, backends with the reason each can or cannot run here, cache folders."""
    from flashtile.cli.info import info_table

    Console().print(info_table())


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="batch,seqlen_q,heads,head_dim")],
    kv_heads: Annotated[int | None, typer.Option(min=0, help="Default: as many as heads.")] = None,
    seqlen_k: Annotated[int | None, typer.Option(min=0, help="Default: as seqlen_q.")] = None,
    head_dim_v: Annotated[int | None, typer.Option(min=0, help="Default: as head_dim.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Aligned bottom-right.")] = False,
    window: Annotated[str, typer.Option(help="left,right keys a query sees; -1: all")] = "-1,-1",
    softcap: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Probability, in [0, 1).")] = 0.0,
    alibi: Annotated[bool, typer.Option("--alibi", help="With ALiBi slopes.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="With an additive bias.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="With a dense mask.")] = False,
    sink: Annotated[bool, typer.Option("--sink", help="With learnable sinks.")] = False,
    varlen: Annotated[bool, typer.Option("--varlen", help="Packed sequences.")] = False,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32, float64")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the best.")] = None,
    arch: Annotated[str, typer.Option(help="A GPU that is not here: sm_80, sm_90, ...")] = "",
) -> None:
    """The plan of a problem: backend, tile, FLOPs, bytes, and why not a better backend."""
    from flashtile.cli.devices import plan_device
    from flashtile.cli.explain import Request, plan_table

    where = plan_device(device, arch)
    batch, seqlen_q, heads, head_dim = _integers("--shape", shape, 4, 0)
    left, right = _integers("--window", window, 2, -1)
    request = Request(
        batch, seqlen_q, heads, head_dim, kv_heads, seqlen_k, head_dim_v, causal, (left, right),
        softcap, dropout, alibi, bias, mask, sink, varlen, dtype,
    )  # fmt: skip
    try:
        table = plan_table(request, where)
    except (TypeError, ValueError) as wrong:
        raise typer.BadParameter(str(wrong)) from wrong
    Console().print(table)


app.command()(bench)


@app.command("compile")
def compile_kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_90, gfx942, ... May be repeated. Default: five.")
    ] = None,
    for_device: Annotated[
        bool, typer.Option("--for-device", help="Into Triton's cache, for the GPU that is here.")
    ] = False,
    match: Annotated[str, typer.Option(help="Only kernels so named: paged, float32 64, ...")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes. Default: one a CPU.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Records instead of a table.")] = False,
) -> None:
    """Compile every kernel, with no GPU: registers, spills, shared memory, matrix instructions.

    Exits with 1 if a kernel does not compile, spills, does not fit, lacks matrix instructions or
    has a performance warning of ptxas.
    """
    from flashtile.cli import compile as compiling
    from flashtile.compiling.record import faults

    if for_device and arch:
        raise typer.BadParameter("--for-device chooses the architecture", param_hint="--arch")
    archs = [compiling.device_arch()] if for_device else arch or list(compiling.ARCHITECTURES)
    wanted = compiling.wanted_jobs(archs, match, for_device)
    records = compiling.compile_all(wanted, workers, keep=for_device)
    if json:
        typer.echo(compiling.as_json(records))
    elif for_device:
        typer.echo(compiling.summary(records))
    else:
        Console(width=max(Console().width, compiling.WIDTH)).print(compiling.as_table(records))
    if any(map(faults, records)):
        raise typer.Exit(1)


def _integers(option: str, text: str, count: int, least: int) -> list[int]:
    """Comma-separated integers."""
    parts = [part.strip() for part in text.split(",")]
    if all(part.removeprefix("-").isdecimal() for part in parts):
        integers = [int(part) for part in parts]
        if len(integers) == count and min(integers) >= least:
            return integers
    expected = f"{count} integers of at least {least}, separated by commas"
    raise typer.BadParameter(f"{text!r} is not {expected}", param_hint=option)
