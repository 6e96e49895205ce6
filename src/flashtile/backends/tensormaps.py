"""TMA descriptors of tensors, and which tensors TMA can address."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.replays import make
from flashtile.kernels.hopper import channels

END = channels.END.value
MOST = 0x7FFF0000
"""More than any number of rows."""


def mapped(x: Tensor, without_gaps: bool = False) -> Tensor:
    """x, or a copy where TMA cannot read it as it lies."""
    if maps(x) and not (without_gaps and has_gaps(x)):
        return x
    return make(_copy, x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def maps(x: Tensor) -> bool:
    """Whether TMA can address a tensor: rows in a piece, 16-byte aligned, and so are its strides,
    none of them 0."""
    steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in steps)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def has_gaps(x: Tensor) -> bool:
    """Whether the tokens of all sequences of a batch are more than one step apart somewhere."""
    return x.dim() == 4 and min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1)


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


def page_map(x: Tensor, rows: int) -> TensorDescriptor:
    """The same for rows of a (page, token, head, dim) pool without gaps, 64 columns at a time."""
    return ragged_map(x, rows, 64)


def ragged_map(x: Tensor, rows: int, padded: int) -> TensorDescriptor:
    """A TMA descriptor of a (token, head, dim) tensor, or (batch, token, head, dim) without gaps
    between the sequences, that reads and writes as far as a sequence goes (see `channels.END`)."""
    batch, per_token, per_head, _ = (
        padded if size == 1 else stride
        for size, stride in zip((1, *x.shape)[-4:], (0, *x.stride())[-4:], strict=True)
    )
    if x.shape[-3] == 1:
        per_token = batch  # one token a sequence: from one to the next
    # Where a head is as wide as the tile nothing is left to clip.
    columns = x.shape[-2] * padded if folds(x, padded) else x.shape[-1]
    shape = [x.shape[-2], MOST, MOST, END, columns]
    strides = [per_head, 2**34 - per_token, per_token, per_token, 1]
    block = [1, 1, 1, rows, padded]
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
