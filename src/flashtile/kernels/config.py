"""Numbers that a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.tiles import WIDEST, padded_dims


class HeadDims:
    """Triton's tiles are powers of two, so dims are padded to one."""

    dim: int
    dim_v: int

    @property
    def padded(self) -> int:
        return padded_dims(self.dim, self.dim_v)[0]

    @property
    def padded_v(self) -> int:
        return padded_dims(self.dim, self.dim_v)[1]


@dataclass(frozen=True)
class Tile(HeadDims):
    """Block edges and head dims."""

    block_m: int  # queries
    block_n: int  # keys
    dim: int
    dim_v: int
    precision: str = "ieee"  # of fp32 products: ieee or tf32


@dataclass(frozen=True)
class BiasTile(Tile):
    """Of the kernels of dbias."""

    chunk: int = 0  # dims that are in shared memory at a time

    @property
    def chunks(self) -> int:
        return -(-max(self.dim, self.dim_v) // self.chunk)


@dataclass(frozen=True)
class DecodeTile(Tile):
    """Of the decode kernels. A pool's page size does not change, so division by it is compiled."""

    page_size: int = 0  # 0: not paged
    scan: int = 32  # sequences that a program looks at together
    parts: int = 16  # of a row that are merged together
    scaled_keys: bool = False  # each key has a scale of its own
    scaled_values: bool = False
    latent: bool = False  # V is the first dims of K, and read with them
    pairs: bool = False  # K and V are e4m3, read two dims at a time
    alone: bool = False  # the last program that leaves a part of a tile merges them

    @property
    def main(self) -> int:
        """Dims of q and K that one tile holds; those past it are a tile of their own, since the
        next power of two after 512 is beyond registers and shared memory."""
        return min(self.dim, WIDEST)

    @property
    def tail(self) -> int:
        return self.dim - self.main

    @property
    def padded(self) -> int:
        return max(self._least, padded_dims(self.main, self.dim_v)[0])

    @property
    def padded_v(self) -> int:
        if self.latent:
            return self.padded
        return max(self._least, padded_dims(self.main, self.dim_v)[1])

    @property
    def padded_tail(self) -> int:
        return max(self._least, padded_dims(self.tail, self.tail)[0])

    @property
    def _least(self) -> int:
        """Every second dim is as deep as a matrix instruction."""
        return 32 if self.pairs else 1
