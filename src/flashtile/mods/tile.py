"""One rectangle of the attention matrix, in the indices that variants are written in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Scores (batches, heads, rows, cols) of `batches` sequences of equal lengths."""

    batch: int  # first sequence
    batches: int
    row: int  # first query, counted in its sequence
    rows: int
    col: int  # first key, counted in its sequence
    cols: int
    seqlen_q: int
    seqlen_k: int
    q_start: int = 0  # row of q's token dimension where the sequence starts
    k_start: int = 0  # slot of k's token dimension where the sequence starts
    leftpad: int = 0  # unused slots before the first key

    @property
    def offset(self) -> int:
        """What is added to a query index to align the diagonal bottom-right."""
        return self.seqlen_k - self.seqlen_q

    def q_idx(self, device: torch.device) -> Tensor:
        return torch.arange(self.row, self.row + self.rows, device=device)

    def k_idx(self, device: torch.device) -> Tensor:
        return torch.arange(self.col, self.col + self.cols, device=device)

    def batches_of(self, x: Tensor) -> Tensor:
        """The sequences of this tile in a tensor whose first dimension is 1 or batch."""
        return x if x.shape[0] == 1 else x[self.batch : self.batch + self.batches]

    def part_of(self, x: Tensor) -> Tensor:
        """This tile's part of a (1|batch, 1|heads, 1|seqlen_q, seqlen_k) tensor: a view."""
        x = self.batches_of(x)
        if x.shape[-2] != 1:
            x = x[..., self.row : self.row + self.rows, :]
        first = self.leftpad + self.col
        return x[..., first : first + self.cols]
