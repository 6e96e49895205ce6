"""The benchmark driver: `python benchmarks/run.py speed-float32 memory report`.

Suites write JSON, `report` writes README's tables from it.

Every cell passes a correctness check before it is timed; providers are timed in turns.
"""

from __future__ import annotations

from typing import Annotated

import cpu
import memory
import report
import torch
import typer
from measure import environment, write
from rich import print as show

SUITES = "speed-float32, speed-bfloat16, memory, report"


def main(
    suites: Annotated[list[str], typer.Argument(help=SUITES)],
    rounds: Annotated[int, typer.Option(help="timed rounds of a cell")] = 7,
) -> None:
    """Run benchmark suites."""
    here = environment()
    for suite in suites:
        if suite.startswith("speed-"):
            rows = cpu.run(getattr(torch, suite.removeprefix("speed-")), rounds)
            for row in rows:
                show(
                    f"{row['dtype']:>9} {row['seqlen']:>6} {row['feature']:<12} "
                    f"{row['flashtile']['median_ms']:9.1f} ms  {row['speedup']:6.2f}x {row['peer']}"
                )
            show(write(suite, rows, here))
        elif suite == "memory":
            show(write("memory", memory.run(), here))
        elif suite == "report":
            report.README.write_text(report.fill(report.README.read_text()))
        else:
            raise typer.BadParameter(f"{suite!r} is none of {SUITES}")


if __name__ == "__main__":
    typer.run(main)
