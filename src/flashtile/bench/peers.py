"""What the best peers reached in the dense suite on a GPU of the same name, measured elsewhere.

FlashAttention-3 and 4 are not in torch and take hours to build, so that their figures are kept:
TFLOP/s, the highest of two runs of FlashAttention-2, 3 and 4, cuDNN and FlexAttention in the
suite's own setting (November 2026). Cards of one kind agree to about 4%.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from flashtile.bench.record import slug


def best_of_peers(row: dict[str, Any], gpu: str) -> float | None:
    """TFLOP/s of the fastest peer in a row of the dense suite, None where nobody measured."""
    if row["batch"] * row["seqlen"] != 16384 or row["heads"] * row["head_dim"] != 2048:
        return None
    return _figures(slug(gpu)).get(_cell(row))


def over_best_peer(row: dict[str, Any], gpu: str) -> float | None:
    """flashtile's speed in a row over that figure."""
    ours, best = row["providers"].get("flashtile", {}).get("tflops"), best_of_peers(row, gpu)
    return None if ours is None or best is None else float(ours) / best


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["feature"], row["head_dim"], row["seqlen"]


@cache
def _figures(gpu: str) -> dict[tuple[Any, ...], float]:
    path = Path(__file__).with_name(f"peers-{gpu}.jsonl")
    if not path.exists():
        return {}
    cells = [json.loads(line) for line in path.read_text().splitlines()]
    return {_cell(cell): cell["best"] for cell in cells}
