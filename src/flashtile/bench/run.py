"""The driver: run suites, write what they measure, say what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flashtile.bench import cpu, decode, host, memory, record, speed, summary
from flashtile.bench.claims import Claim, claims
from flashtile.bench.options import Options

Row = dict[str, Any]


class Suite(NamedTuple):
    measure: Callable[[Options], Iterator[Row]]
    line: Callable[[Row], str]  # a row as text, while the suite runs
    device: str = ""  # of torch's types the only one that it runs on; "" is any


SUITES = {
    "dense": Suite(speed.measure_dense, summary.speed_line),
    "features": Suite(speed.measure_features, summary.speed_line),
    "memory": Suite(memory.measure, summary.memory_line),
    "host": Suite(host.measure, summary.host_line),
    "decode": Suite(decode.measure, summary.speed_line),
    "speed-float32": Suite(cpu.measure_float32, summary.cpu_line, "cpu"),
    "speed-bfloat16": Suite(cpu.measure_bfloat16, summary.cpu_line, "cpu"),
}


def run(name: str, options: Options) -> list[Claim]:
    """Run a suite, written after every row so that what was measured outlives a time limit."""
    suite = SUITES[name]
    environment = record.environment(options.device, options.commit)
    path = options.output / record.folder(options.device) / f"{name}.json"
    rows: list[Row] = []
    for row in suite.measure(options):
        rows.append(row)
        record.write(path, rows, environment)
        options.show(suite.line(row))
    document = record.read(path) if rows else None
    if document is None:
        options.show(f"{name}: no cell matches")
        return []
    found = claims(document)
    for line in (*summary.lines(document), *map(str, found), str(path)):
        options.show(line)
    return found
