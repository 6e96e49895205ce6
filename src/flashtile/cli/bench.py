"""`flashtile bench`: the options of the benchmark suites."""

# ruff: noqa: PLC0415

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path("benchmarks/results")


def bench(
    suites: Annotated[
        list[str],
        typer.Argument(
            help="dense, features, memory, host, decode; on a CPU speed-float32, ...-bfloat16"
        ),
    ],
    output: Annotated[Path, typer.Option(help="Writes OUTPUT/<device>/<suite>.json.")] = RESULTS,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the best.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each provider in a cell.")] = 10,
    head_dim: Annotated[list[int] | None, typer.Option(help="Only these cells.")] = None,
    seqlen: Annotated[list[int] | None, typer.Option(help="Only these cells.")] = None,
    feature: Annotated[list[str] | None, typer.Option(help="Only these: window, ...")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd or bwd. Default: both.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only these: flashtile, fa2, cudnn, flex, ...")
    ] = None,
    flex_all: Annotated[
        bool, typer.Option("--flex-all", help="FlexAttention in every cell: 10 to 40 s each.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes, to see that it runs.")] = False,
    commit: Annotated[
        str, typer.Option(help="Of a tree without .git; ends with -dirty if it was changed.")
    ] = "",
) -> None:
    """Measure attention beside its peers; every cell is checked before it is timed.

    Providers take turns in rounds. Writes JSON after every cell, and says which of the project's
    claims the figures bear out.
    """
    from flashtile.bench import decode
    from flashtile.bench.features import FEATURES
    from flashtile.bench.options import HEAD_DIMS, MODES, Options
    from flashtile.bench.providers import PROVIDERS
    from flashtile.bench.run import SUITES, run
    from flashtile.cli.devices import torch_device

    where = torch_device(device)
    for option, given, known in (
        ("SUITES", suites, SUITES), ("--mode", mode, MODES), ("--provider", provider, PROVIDERS),
        ("--feature", feature, (*FEATURES, *decode.FEATURES)),
    ):  # fmt: skip
        for name in given or ():
            if name not in known:
                raise typer.BadParameter(
                    f"{name!r} is none of {', '.join(known)}", param_hint=option
                )
    options = Options(
        output, where, rounds, head_dims=tuple(head_dim or HEAD_DIMS), seqlens=tuple(seqlen or ()),
        modes=tuple(mode or MODES), features=tuple(feature or ()),
        providers=tuple(provider or ()), flex_all=flex_all, commit=commit,
    )  # fmt: skip
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise typer.BadParameter(f"{output}: {wrong.strerror}", param_hint="--output") from wrong
    for name in suites:
        if SUITES[name].device not in ("", where.type):
            raise typer.BadParameter(f"{name} is measured on a CPU: --device cpu")
        run(name, options.quick() if quick else options)
