"""TMA descriptors of tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.replays import make
from flashtile.kernels.hopper import channels
from flashtile.strides import ALIGNED, MOST, Steps, has_gaps, maps

END = channels.END.value


def mapped(x: Tensor, without_gaps: bool = False) -> Tensor:
    """x, or a copy where TMA cannot read it as it lies."""
    if maps(x) and not (without_gaps and has_gaps(x)):
        return x
    return make(_copy, x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def folds(x: Tensor, padded: int) -> bool:
    """Whether a (batch, token, head, dim) tensor's heads follow each other, unpadded."""
    return x.shape[-1] == padded and (x.stride(-2) == padded or x.shape[-2] == 1)


def tensor_map(x: Tensor, rows: int, padded: int, folded: bool) -> TensorDescriptor:
    """A TMA descriptor of `rows` rows of one head of a (batch, token, head, dim) tensor; `folded`
    with the heads as part of the last dimension, as `folds` allows."""
    batch, tokens, heads, dim = x.shape
    per_batch, per_token, per_head, _ = (
        # The stride of a dimension of one element may be anything; TMA wants multiples of 16 bytes.
        padded if size == 1 else stride
        for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    if folded:
        shape, strides = [batch, tokens, heads * dim], [per_batch, per_token, 1]
    else:
        shape, strides = [batch, heads, tokens, dim], [per_batch, per_head, per_token, 1]
    block = [1] * (len(shape) - 2) + [rows, padded]
    return TensorDescriptor(x, shape, strides, block, _shared(tuple(block), x.dtype))


def slot_map(x: Tensor, rows: int, columns: int, padded: int, steps: Steps) -> TensorDescriptor:
    """A ragged map of a (batch, token, head, dim) tensor of any strides, a cache or a pool of
    pages: the coordinate of a head counts units, and that of a row is in its sequence or page.
    `columns` of a tile's `padded` ones are read at once."""
    per_token = x.stride(1) if x.shape[1] > 1 else ALIGNED
    unclipped = columns == padded and folds(x, padded)
    return _ragged(x, rows, columns, steps.count(x), steps.unit(x), per_token, unclipped)


def ragged_map(x: Tensor, rows: int, padded: int) -> TensorDescriptor:
    """A TMA descriptor of a (token, head, dim) tensor, or (batch, token, head, dim) without gaps
    between the sequences, that reads and writes as far as a sequence goes (see `channels.END`)."""
    batch, per_token, per_head, _ = (
        padded if size == 1 else stride
        for size, stride in zip((1, *x.shape)[-4:], (0, *x.stride())[-4:], strict=True)
    )
    if x.shape[-3] == 1:
        per_token = batch  # one token a sequence: from one to the next
    return _ragged(x, rows, padded, x.shape[-2], per_head, per_token, folds(x, padded))


def _ragged(
    x: Tensor, rows: int, columns: int, heads: int, per_head: int, per_token: int, unclipped: bool
) -> TensorDescriptor:
    """unclipped: a head is as wide as the tile, and nothing behind it is read."""
    width = x.shape[-2] * columns if unclipped else x.shape[-1]
    shape = [heads, MOST, MOST, END, width]
    strides = [per_head, 2**34 - per_token, per_token, per_token, 1]
    block = [1, 1, 1, rows, columns]
    return TensorDescriptor(x, shape, strides, block, _shared(tuple(block), x.dtype))


def packed_map(x: Tensor, kv_heads: int, pack: int, rows: int, padded: int) -> TensorDescriptor:
    """A TMA descriptor of rows of a (batch, token, head, dim) tensor that are heads of one KV
    head, `pack` of each token: those that the group does not have read as 0 and are not written."""
    batch, tokens, heads, dim = x.shape
    per_batch, per_token, per_head, _ = (
        padded if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    group = heads // kv_heads
    shape = [batch, kv_heads, tokens, group, dim]
    strides = [per_batch, group * per_head, per_token, per_head, 1]
    block = [1, 1, rows // pack, pack, padded]
    return TensorDescriptor(x, shape, strides, block, _shared(tuple(block), x.dtype))


@lru_cache
def _shared(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


def numbers_map(x: Tensor, rows: int) -> TensorDescriptor:
    """`rows` whole rows of a contiguous fp32 matrix, as they lie in memory."""
    count, width = x.shape
    return TensorDescriptor(x, [count, width], [width, 1], [rows, width], _plain())


@lru_cache
def _plain() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 32, 2)
