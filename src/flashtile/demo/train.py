"""A byte-level GPT, trained on text with a given attention function."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

from flashtile.demo.settings import Settings
from flashtile.models.gpt import GPT, Attention

SEED = 0
LEARNING_RATE = 6e-3
WARMUP_STEPS = 10
FINAL_FRACTION = 0.1
"""The learning rate rises for WARMUP_STEPS and falls in a line to this fraction of it."""


class Training:
    """A model that learns, from SEED, with a given attention."""

    def __init__(self, attention: Attention, settings: Settings) -> None:
        torch.manual_seed(SEED)
        self.model = GPT(settings.model, attention).to(settings.device)
        self.losses: list[float] = []  # nats a byte, one for each step
        self.seconds: list[float] = []  # one for each step
        self.steps = settings.steps
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1
        )

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    def step(self, batch: Tensor) -> float:
        """Learn from a batch (batch, seqlen + 1). Returns the loss before."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(len(self.losses), self.steps)
        with _autocast(batch.device):
            loss = self.model.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        return self.losses[-1]


def read_text(settings: Settings) -> Tensor:
    """The bytes to learn, uint8: a file's, or those of the documentation within Python."""
    path: Path | None = settings.text
    text = "\n\n".join(topics.topics.values()).encode() if path is None else path.read_bytes()
    needed = settings.model.seqlen + 1
    if len(text) <= needed:
        raise ValueError(f"{path} has {len(text)} bytes; training needs more than {needed}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, settings: Settings) -> Iterator[Tensor]:
    """(batch, seqlen + 1) int64 windows of the text, the same ones every time."""
    generator = torch.Generator().manual_seed(SEED)
    window = torch.arange(settings.model.seqlen + 1)
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - len(window), (settings.batch, 1), generator=generator)
        yield text[starts + window].long().to(settings.device)


def write(model: GPT, prompt: str, settings: Settings) -> str:
    """Text that the model continues the prompt with, the prompt included."""
    tokens = torch.tensor([list(prompt.encode())], device=settings.device)
    generator = torch.Generator(settings.device).manual_seed(SEED)
    with _autocast(settings.device):
        written = model.generate(tokens, settings.writes, temperature=0.7, generator=generator)
    return bytes(written[0].tolist()).decode(errors="replace")


def _schedule(step: int, steps: int) -> float:
    decay = 1.0 - (1.0 - FINAL_FRACTION) * step / steps
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


def _autocast(device: torch.device) -> torch.autocast:
    """Mixed precision on GPUs; CPUs compute in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
