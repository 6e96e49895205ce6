"""What a run of suites is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashtile.bench.features import Cell
from flashtile.bench.measure import (
    LEAST_CALLS,
    CudaClock,
    Function,
    Timing,
    host_clock,
    interleaved,
)

HEAD_DIMS = (64, 128, 256)
MODES = ("fwd", "bwd")


@dataclass(frozen=True)
class Options:
    output: Path
    device: torch.device
    rounds: int = 10
    tokens: int = 16384  # of a batch in all
    hidden: int = 2048  # heads x head_dim
    head_dims: tuple[int, ...] = HEAD_DIMS
    seqlens: tuple[int, ...] = ()  # () is all
    modes: tuple[str, ...] = MODES
    features: tuple[str, ...] = ()  # () is all
    providers: tuple[str, ...] = ()  # () is the suite's choice
    flex_all: bool = False
    commit: str = ""
    show: Callable[[str], None] = field(default=print)

    def quick(self) -> Options:
        """Toy sizes, in a folder of their own: they say that a suite runs, and nothing else."""
        tokens, hidden = (2048, 2048) if self.device.type == "cuda" else (256, 256)
        return replace(self, output=self.output / "quick", rounds=2, tokens=tokens, hidden=hidden)

    def wants(self, cell: Cell) -> bool:
        return (
            (cell.head_dim in self.head_dims or self.head_dims == HEAD_DIMS)
            and (not self.seqlens or cell.seqlen in self.seqlens)
            and (not self.features or cell.feature in self.features)
        )

    def time(self, functions: dict[str, Function]) -> dict[str, Timing]:
        if self.device.type != "cuda":
            return interleaved(functions, self.rounds, clock=host_clock)
        return interleaved(functions, self.rounds, clock=CudaClock(), least_calls=LEAST_CALLS)
