"""Masks: which keys a query sees, and the range of keys that this implies for a run of queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, Protocol

from torch import Tensor

from flashtile.mods.functions import place
from flashtile.mods.tile import Tile
from flashtile.problem import UNBOUNDED


class Mask(Protocol):
    """An element predicate, evaluated a tile at a time."""

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        """True where seen, broadcastable to the tile, on `like`'s device; None: all are."""


class Band(NamedTuple):
    """Keys from `left` before to `right` after the bottom-right diagonal; causal is right == 0.
    Of those, with chunks, the ones of the diagonal's own."""

    left: int
    right: int
    chunk: int = 0

    def key_range(self, tile: Tile) -> tuple[int, int]:
        """Keys [lo, hi) that some query of the tile's rows sees."""
        first, last = tile.row + tile.offset, tile.row + tile.rows - 1 + tile.offset
        lo = 0 if self.left == UNBOUNDED else max(0, first - self.left)
        hi = tile.seqlen_k if self.right == UNBOUNDED else last + self.right + 1
        if self.chunk:
            lo, hi = max(lo, self._start(first)), min(hi, self._end(last))
        return min(lo, tile.seqlen_k), max(0, min(hi, tile.seqlen_k))

    def query_range(self, tile: Tile) -> tuple[int, int]:
        """Queries [lo, hi) that see some key of the tile's columns: the transpose."""
        first, last = tile.col - tile.offset, tile.col + tile.cols - 1 - tile.offset
        lo = 0 if self.right == UNBOUNDED else max(0, first - self.right)
        hi = tile.seqlen_q if self.left == UNBOUNDED else last + self.left + 1
        if self.chunk:
            lo = max(lo, self._start(tile.col) - tile.offset)
            hi = min(hi, self._end(tile.col + tile.cols - 1) - tile.offset)
        return min(lo, tile.seqlen_q), max(0, min(hi, tile.seqlen_q))

    def _start(self, position: int) -> int:
        """Where the chunk of a position begins."""
        return position - position % self.chunk

    def _end(self, position: int) -> int:
        return self._start(position) + self.chunk

    def _full(self, tile: Tile) -> bool:
        first, last = tile.row + tile.offset, tile.row + tile.rows - 1 + tile.offset
        left_ok = self.left == UNBOUNDED or tile.col >= last - self.left
        right_ok = self.right == UNBOUNDED or tile.col + tile.cols - 1 <= first + self.right
        if self.chunk:
            left_ok = left_ok and tile.col >= self._start(last)
            right_ok = right_ok and tile.col + tile.cols <= self._end(first)
        return left_ok and right_ok

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        if self._full(tile):
            return None
        q, k = tile.q_idx(like.device)[:, None] + tile.offset, tile.k_idx(like.device)
        # No two tokens are further apart, so that a side of 2**63 - 1 cannot overflow.
        far = tile.seqlen_q + tile.seqlen_k
        seen = []
        if self.right != UNBOUNDED:
            seen.append(k <= q + min(self.right, far))
        if self.left != UNBOUNDED:
            seen.append(k >= q - min(self.left, far))
        if self.chunk:
            chunk = min(self.chunk, far)
            seen.append(k // chunk == q // chunk)
        return reduce(Tensor.logical_and_, seen)


class Documents(NamedTuple):
    """Queries see the keys of their own document."""

    q_ids: Tensor  # (batch, seqlen_q) or (total_q,)
    k_ids: Tensor  # (batch, seqlen_k) or (total_k,)

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        row, col = tile.q_start + tile.row, tile.k_start + tile.leftpad + tile.col
        q = self.q_ids if self.q_ids.dim() == 1 else tile.batches_of(self.q_ids)
        k = self.k_ids if self.k_ids.dim() == 1 else tile.batches_of(self.k_ids)
        q, k = q[..., row : row + tile.rows], k[..., col : col + tile.cols]
        seen = q[..., :, None] == k[..., None, :]
        return seen if seen.dim() == 2 else seen[:, None]


class Tree(NamedTuple):
    """Which of the last n keys, one for each query, each of the first n queries sees. Keys before
    them, and all beyond the mask's edge, are seen."""

    mask: Tensor  # (1 | batch, n, n)

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        if tile.col + tile.cols <= tile.offset:
            return None
        q, k = tile.q_idx(like.device)[:, None], tile.k_idx(like.device) - tile.offset
        edge = self.mask.shape[-1]
        named = (q < edge) & (k >= 0) & (k < edge)
        if edge == 0:
            return None
        seen = tile.batches_of(self.mask)[:, q.clamp(max=edge - 1), k.clamp(0, edge - 1)]
        return (seen | ~named)[:, None]


class MaskTensor(NamedTuple):
    """A bool tensor, True where seen."""

    mask: Tensor  # (1 | batch, 1 | heads, 1 | seqlen_q, seqlen_k)

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        return tile.part_of(self.mask)


class MaskByFunction(NamedTuple):
    """A user's function (see `mods.functions`)."""

    function: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    heads: int

    def visible(self, tile: Tile, like: Tensor) -> Tensor | None:
        return self.function(place(tile, self.heads, like.device), self.args)
