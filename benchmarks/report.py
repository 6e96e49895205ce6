"""Plots, the claims' verdicts and README's tables from the results: `python benchmarks/report.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; it is never typed.
"""

from __future__ import annotations

import re
from pathlib import Path

from flashtile.bench import plots, summary, tables
from flashtile.bench.claims import claims
from flashtile.bench.record import read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def fill(text: str) -> str:
    """README's text with every table drawn from the results."""
    for name, table in tables.fill_in(RESULTS).items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, t=table: m[1] + (t + "\n" if t else "") + m[2], text)
    return text


def main() -> None:
    for path in sorted(RESULTS.glob("*/*.json")):
        document = read(path)
        for line in (*summary.lines(document), *claims(document)):
            print(line)
    for folder in sorted(RESULTS.iterdir()):
        if folder.name != "cpu":
            plots.draw(folder)
    README.write_text(fill(README.read_text()))


if __name__ == "__main__":
    main()
