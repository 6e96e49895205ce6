"""Numbers that a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.tiles import padded_dims


@dataclass(frozen=True)
class Tile:
    """Block edges and head dims. Triton's tiles are powers of two, so dims are padded to one."""

    block_m: int  # queries
    block_n: int  # keys
    dim: int
    dim_v: int
    precision: str = "ieee"  # of fp32 products: ieee or tf32

    @property
    def padded(self) -> int:
        return padded_dims(self.dim, self.dim_v)[0]

    @property
    def padded_v(self) -> int:
        return padded_dims(self.dim, self.dim_v)[1]
