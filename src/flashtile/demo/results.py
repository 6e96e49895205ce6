"""Everything the demo measured, and whether it is as it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashtile.demo.layer import Row, TensorError
from flashtile.demo.settings import Settings
from flashtile.demo.train import Training


@dataclass(frozen=True)
class Results:
    settings: Settings
    hardware: str
    flash: Training
    standard: Training
    errors: list[TensorError]
    rows: list[Row]

    def failures(self) -> list[str]:
        """What is not as the contract has it, in words."""
        broken = [error.failure for error in self.errors if error.failure]
        difference, tolerance = self.difference, self.settings.curve_tolerance
        if not difference <= tolerance:
            broken.append(f"the loss curves differ by {difference:.1e}, more than {tolerance:.0e}")
        return broken

    @property
    def standard_runs(self) -> int:
        """Rows, counted from the first, that standard attention ran."""
        return sum(not row.standard.skipped for row in self.rows)

    @property
    def difference(self) -> float:
        """Between the loss curves, at their worst step, in nats."""
        return largest_difference(self.flash, self.standard)


def largest_difference(flash: Training, standard: Training) -> float:
    """Not a number where a loss is none: `max` alone would pass over it."""
    pairs = zip(flash.losses, standard.losses, strict=True)
    return max((abs(a - b) for a, b in pairs), key=lambda x: (math.isnan(x), x))
