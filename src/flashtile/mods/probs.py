"""Dropout on the probabilities, by the contract's counter-based mask (`flashtile.random`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.mods.tile import Tile
from flashtile.random import NUMBERS, draw_words, drop_threshold


class Dropout(NamedTuple):
    """Drop with probability p, scale what is kept by 1 / (1 - p)."""

    p: float
    rng_state: Tensor  # (2,) int64

    def factor(self, tile: Tile, like: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for each element of a tile: (batches, heads, rows, cols), like's dtype.

        Works on whole groups of 16 x 16 elements and cuts the tile out, one Philox block for
        eight elements; the first round's product sees rows alone, so it costs nothing.
        """
        row, col = tile.row // 16, tile.col // 16
        row_blocks = -(-(tile.row + tile.rows) // 16) - row
        col_blocks = -(-(tile.col + tile.cols) // 16) - col
        heads, device = like.shape[1], like.device
        head = torch.arange(tile.batch * heads, (tile.batch + tile.batches) * heads, device=device)
        q_group = torch.arange(8 * row, 8 * (row + row_blocks), device=device)
        k_group = torch.arange(4 * col, 4 * (col + col_blocks), device=device)
        words = draw_words(self.rng_state, head[:, None, None], q_group[:, None], k_group)

        scale = 1.0 / (1.0 - self.p)
        shape = (tile.batches * heads, row_blocks, 2, 8, col_blocks, 2, 4, 2)
        keep = torch.empty(shape, dtype=like.dtype, device=device)
        for i, word in enumerate(words):
            blocks = word.expand(len(head), -1, -1).unflatten(1, (-1, 8)).unflatten(3, (-1, 4))
            for half in range(2):
                number = (blocks >> 16 * half) & (NUMBERS - 1)
                keep[:, :, i // 2, :, :, i % 2, :, half] = number >= drop_threshold(self.p)
        keep = keep.mul_(scale).view(tile.batches, heads, row_blocks * 16, col_blocks * 16)
        first_row, first_col = tile.row - 16 * row, tile.col - 16 * col
        return keep[:, :, first_row : first_row + tile.rows, first_col : first_col + tile.cols]
