"""Write the tables of README.md from the results: they are never typed.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from measure import ROOT, read

README = ROOT / "README.md"


def speed_table() -> str:
    documents = [read("speed-float32"), read("speed-bfloat16")]
    lines = [
        "| forward + backward | fp32, 2,048 | fp32, 4,096 | bf16, 2,048 | bf16, 4,096 |",
        "|---|---|---|---|---|",
    ]
    rows = [row for document in documents for row in document["rows"]]
    for feature in dict.fromkeys(row["feature"] for row in rows):
        cells = [row for row in rows if row["feature"] == feature]
        against = "torch's flash kernel" if cells[0]["peer"] == "aten" else "eager"
        figures = " | ".join(
            f"{_time(row['flashtile']['median_ms'])}, {row['speedup']:.2f}x" for row in cells
        )
        lines.append(f"| {feature}, against {against} | {figures} |")
    return "\n".join((*lines, "", *(_source(document) for document in documents)))


def memory_table() -> str:
    document = read("memory")
    lines = ["| tokens | flashtile | standard attention | ratio |", "|---|---|---|---|"]
    for row in document["rows"]:
        if row["path"] == "causal":
            standard = row.get("standard_bytes")
            flash = row["flashtile_bytes"]
            ratio = f"{standard / flash:.0f}x" if standard else ""
            theirs = f"{standard / 2**20:.1f} MiB" if standard else "not run"
            lines.append(f"| {row['seqlen']:,} | {flash / 2**20:.1f} MiB | {theirs} | {ratio} |")
    return "\n".join(lines) + "\n\n" + _source(document)


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


def _source(document: dict[str, Any]) -> str:
    env = document["environment"]
    return (
        f"{env['cpu']} ({env['capability']}, {env['threads']} threads), torch {env['torch']}, "
        f"commit {env['commit'][:9]}, {env['date'][:10]}: "
        f"`benchmarks/results/cpu/{document['suite']}.json`."
    )


TABLES: dict[str, Callable[[], str]] = {"cpu-speed": speed_table, "cpu-memory": memory_table}


def fill(text: str) -> str:
    """README's text with every table drawn from the results."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, t=table: m[1] + t() + "\n" + m[2], text)
    return text
