"""What the best peers reached on a GPU of the same name, measured elsewhere.

FlashAttention-3 and 4 are not in torch and take hours to build, so that their figures are kept:
the highest of two runs of FlashAttention-2, 3 and 4, cuDNN and FlexAttention (November 2026), in
the setting of the suites `dense`, in TFLOP/s, and `decode`, in TB/s of K and V. Cards of one kind
agree to about 4%.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from flashtile.bench.record import slug

CELL = ("mode", "feature", "batch", "seqlen", "heads", "kv_heads", "head_dim")
"""What names a cell of a suite."""


def best_of_peers(row: dict[str, Any], gpu: str) -> float | None:
    """The rate of the fastest peer in a row of a suite, None where nobody measured."""
    return _figures(slug(gpu)).get(_cell(row))


def rate(result: dict[str, Any]) -> float | None:
    """What a provider's time in a row comes to: TB/s in the suite `decode`, else TFLOP/s."""
    return result.get("tb_s", result.get("tflops"))


def over_best_peer(row: dict[str, Any], gpu: str) -> float | None:
    """flashtile's speed in a row over that figure."""
    ours, best = rate(row["providers"].get("flashtile", {})), best_of_peers(row, gpu)
    return None if ours is None or best is None else ours / best


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in CELL)


@cache
def _figures(gpu: str) -> dict[tuple[Any, ...], float]:
    path = Path(__file__).with_name(f"peers-{gpu}.jsonl")
    if not path.exists():
        return {}
    cells = [_dense(json.loads(line)) for line in path.read_text().splitlines()]
    return {_cell(cell): cell["best"] for cell in cells}


def _dense(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with the sizes that those of the dense suite have in common."""
    heads = 2048 // cell["head_dim"]
    sizes = {"batch": 16384 // cell["seqlen"], "heads": heads, "kv_heads": heads}
    return sizes | cell
