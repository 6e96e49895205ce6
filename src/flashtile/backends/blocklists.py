"""Block lists of masks given as tensors: classified once a call, listed for each direction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.backends import operands
from flashtile.backends.launch import Launch, run
from flashtile.backends.replays import empty
from flashtile.kernels import blocks as kernels
from flashtile.kernels.numbers import opaque
from flashtile.kernels.schedule import BlockList
from flashtile.problem import Call, mask_grid

CHUNK_CODES = 256


class _Shape(NamedTuple):
    batches: int
    heads: int
    q_tiles: int
    k_tiles: int


def classify(call: Call) -> Tensor:
    """Codes of the tiles of a call's mask tensors: `mask_grid(call)`, uint8."""
    shape = _Shape(*mask_grid(call))
    codes = empty(shape, call.operands.q, torch.uint8)
    run(Launch(
        kernels.classify_blocks, codes.numel(),
        (_grid(codes, shape), operands.query_sequences(call), operands.key_sequences(call),
         operands.tensor_masks(call, classifying=True)),
        num_warps=8,
    ))  # fmt: skip
    return codes


def by_queries(call: Call) -> BlockList | None:
    """For each tile of queries the blocks of keys that it sees."""
    return _lists(call, transposed=False)


def by_keys(call: Call) -> BlockList | None:
    """For each tile of keys the blocks of queries that see it."""
    return _lists(call, transposed=True)


def _grid(codes: Tensor, shape: _Shape) -> kernels.CodeGrid:
    return kernels.CodeGrid(codes, *map(opaque, shape[1:]))


def _lists(call: Call, transposed: bool) -> BlockList | None:
    q, codes = call.operands.q, call.operands.mask_blocks
    if codes is None:
        return None
    shape = _Shape(*codes.shape)
    own, other = shape.q_tiles, shape.k_tiles
    if transposed:
        own, other = other, own
    entries = empty((shape.batches, shape.heads, own, other), q, torch.int32)
    counts = empty((shape.batches, shape.heads, own, 4), q, torch.int32)
    run(Launch(
        kernels.list_blocks, shape.batches * shape.heads * own,
        (_grid(codes, shape), entries, counts, operands.query_sequences(call),
         operands.key_sequences(call), operands.band(call) + operands.mask_functions(call),
         transposed, CHUNK_CODES),
    ))  # fmt: skip
    return BlockList(
        entries, counts,
        opaque(shape.heads * own if shape.batches > 1 else 0),
        opaque(own if shape.heads > 1 else 0),
        opaque(other),
    )  # fmt: skip
