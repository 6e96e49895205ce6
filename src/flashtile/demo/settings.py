"""What a run of the demo does, and how large."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashtile.models.gpt import GPTConfig

LONGEST = {"cpu": 8192, "cuda": 65536}
"""Tokens that the layer is measured up to: seconds on a laptop's CPU, and on a GPU."""


@dataclass(frozen=True)
class LayerShape:
    """An attention layer; the defaults are Llama-3-8B's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True)
class Settings:
    device: torch.device
    output: Path = Path("flashtile-demo.png")
    text: Path | None = None  # None is Python's own documentation
    steps: int = 200
    batch: int = 8
    model: GPTConfig = field(default_factory=lambda: GPTConfig(layers=2))
    writes: int = 320  # bytes of text that the trained model writes
    layer: LayerShape = LayerShape()
    error_seqlen: int = 512
    shortest: int = 512  # the lengths double from here
    longest: int = LONGEST["cpu"]
    flash_seconds: float = 40.0  # the longest forward plus backward to wait for
    standard_seconds: float = 10.0  # the same for standard attention, which is only the baseline

    @property
    def lengths(self) -> list[int]:
        doublings = (self.longest // self.shortest).bit_length()
        return [self.shortest << i for i in range(doublings)]

    @property
    def layer_dtype(self) -> torch.dtype:
        """CPUs without matrix instructions for it are 100 times slower in bf16."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def curve_tolerance(self) -> float:
        """Nats by which two loss curves that agree may differ at a step.

        Both attentions round differently and training carries that along: 200 steps left 2e-6 in
        fp32 on a CPU and 2e-3 in bf16 on an H200.
        """
        return 1e-3 if self.device.type == "cpu" else 2e-2

    def quick(self) -> Settings:
        """The same in a few seconds, for tests of the demo itself."""
        return replace(
            self,
            steps=min(self.steps, 20),
            model=replace(self.model, seqlen=64),
            writes=40,
            error_seqlen=64,
            shortest=64,
            longest=256,
        )
