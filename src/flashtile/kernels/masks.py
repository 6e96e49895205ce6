"""Masks: which keys a query sees, and the block ranges that this implies, in both directions.

`fn(at, args)` is the element predicate. `keys(first, last, at, args)` gives the keys that the
queries first..last may see ([lo, hi)) and those that all of them see ([full_lo, full_hi));
`queries` is its transpose. A mask without ranges says `anywhere`: nothing skipped, nothing full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.kernels.numbers import number


class At(NamedTuple):
    """Where a tile of the attention matrix lies. Shapes broadcast to the tile, either way round."""

    batch: Any
    head: Any
    first_q: Any  # the tile's origin
    first_k: Any
    q_idx: Any  # (BLOCK_M, 1), or (1, BLOCK_M) where keys are the rows
    k_idx: Any  # (1, BLOCK_N), or (BLOCK_N, 1)
    q: Any  # Span of the queries
    k: Any  # Span of the keys


@triton.jit
def as_it_is(at):
    return at


@triton.jit
def within_ends(at):
    """Where a user's function is asked, which reads tensors of its own: the last query and the last
    key stand for those past the ends."""
    q_idx = tl.minimum(at.q_idx, tl.maximum(at.q.length - 1, 0))
    k_idx = tl.minimum(at.k_idx, tl.maximum(at.k.length - 1, 0))
    return At(at.batch, at.head, at.first_q, at.first_k, q_idx, k_idx, at.q, at.k)


class Range(NamedTuple):
    """Columns [lo, hi) may be seen by some row of a block, [full_lo, full_hi) are by all."""

    lo: Any
    full_lo: Any
    full_hi: Any
    hi: Any


@triton.jit
def anywhere(first, last, q, k, args):
    """The range of an unknown mask: it may see everything, and surely nothing."""
    return Range(0, 0, 0, 2147483647)


@triton.jit
def unknown_tile(at, args):
    """(may something be seen, is surely all seen) of a tile of an unknown mask."""
    return 1, 0


class Mask(NamedTuple):
    fn: Any
    args: Any = ()
    keys: Any = anywhere
    queries: Any = anywhere
    tile: Any = unknown_tile  # of masks given as tensors
    place: Any = as_it_is  # or within_ends


@triton.jit
def not_later(at, args):
    """Keys at most `right` after the bottom-right diagonal; causal is right == 0."""
    return at.k_idx <= at.q_idx + (at.k.length - at.q.length + number(args[0]))


@triton.jit
def not_later_keys(first, last, q, k, args):
    right = k.length - q.length + number(args[0])
    return Range(0, 0, first + right + 1, last + right + 1)


@triton.jit
def not_later_queries(first, last, q, k, args):
    right = k.length - q.length + number(args[0])
    return Range(first - right, last - right, 2147483647, 2147483647)


@triton.jit
def not_earlier(at, args):
    """Keys at most `left` before the bottom-right diagonal."""
    return at.k_idx >= at.q_idx + (at.k.length - at.q.length - number(args[0]))


@triton.jit
def not_earlier_keys(first, last, q, k, args):
    left = k.length - q.length - number(args[0])
    return Range(first + left, last + left, 2147483647, 2147483647)


@triton.jit
def not_earlier_queries(first, last, q, k, args):
    left = k.length - q.length - number(args[0])
    return Range(0, 0, first - left + 1, last - left + 1)


@triton.jit
def chunk_start(position, chunk):
    """Where the chunk of a position begins; those before the first key are of one without keys."""
    return (tl.maximum(position, -chunk) + chunk) // chunk * chunk - chunk


@triton.jit
def same_chunk(at, args):
    """Keys of the chunk that the bottom-right diagonal is in. Divided are the rows of the tile, of
    which a thread has fewer than columns."""
    chunk = number(args[0])
    rows, columns = at.q_idx + (at.k.length - at.q.length), at.k_idx
    if at.q_idx.shape[0] == 1:
        rows, columns = columns, rows
    start = chunk_start(rows, chunk)
    return (columns >= start) & (columns < start + chunk)


@triton.jit
def same_chunk_keys(first, last, q, k, args):
    chunk, diagonal = number(args[0]), k.length - q.length
    of_first, of_last = chunk_start(first + diagonal, chunk), chunk_start(last + diagonal, chunk)
    return Range(of_first, of_last, of_first + chunk, of_last + chunk)


@triton.jit
def same_chunk_queries(first, last, q, k, args):
    chunk, diagonal = number(args[0]), k.length - q.length
    of_first, of_last = chunk_start(first, chunk) - diagonal, chunk_start(last, chunk) - diagonal
    return Range(of_first, of_last, of_first + chunk, of_last + chunk)


class TreeView(NamedTuple):
    """A (1 | batch, n, n) bool operand as uint8; stride_batch is 0 where it is shared."""

    ptr: Any
    edge: Any  # opaque, n
    stride_batch: Any  # opaque
    stride_q: Any  # opaque
    stride_k: Any  # opaque


@triton.jit
def in_tree(at, args):
    """Of the last n keys, one for each query, those that the tree shows; all keys before them, and
    all that lies beyond its edge."""
    tree = args[0]
    k_idx = at.k_idx - (at.k.length - at.q.length)
    named = (k_idx >= 0) & (k_idx < number(tree.edge)) & (at.q_idx < number(tree.edge))
    offsets = at.q_idx * number(tree.stride_q) + k_idx * number(tree.stride_k)
    base = tree.ptr + tl.cast(at.batch, tl.int64) * number(tree.stride_batch)
    return tl.load(base + offsets, mask=named, other=1) != 0


@triton.jit
def in_tree_keys(first, last, q, k, args):
    return Range(0, 0, k.length - q.length, 2147483647)


@triton.jit
def in_tree_queries(first, last, q, k, args):
    return Range(0, 0, tl.where(last < k.length - q.length, 2147483647, 0), 2147483647)


class MatrixView(NamedTuple):
    """A (1 | batch, 1 | heads, 1 | seqlen_q, seqlen_k) operand; strides of broadcast dims are 0."""

    ptr: Any
    stride_batch: Any
    stride_head: Any
    stride_q: Any
    stride_k: Any


class IdsView(NamedTuple):
    """Integers of tokens: (batch, token), or (token,) with stride_batch 0."""

    ptr: Any
    stride_batch: Any  # opaque


@triton.jit
def load_matrix(x, at):
    """A tile of a MatrixView, 0 past the end of the keys.

    Rows past the end of the queries read the last one: without a mask on rows, and where the keys
    do not end in the tile without any, loads are as wide as alignment allows.
    """
    base = x.ptr + tl.cast(at.batch, tl.int64) * x.stride_batch
    base += tl.cast(at.head, tl.int64) * x.stride_head
    rows = tl.minimum(at.q_idx, at.q.length - 1).to(tl.int64) * x.stride_q
    pointers = base + rows + (at.k_idx + at.k.leftpad).to(tl.int64) * x.stride_k
    if at.first_k + at.k_idx.numel <= at.k.length:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=at.k_idx < at.k.length, other=0)
    return tile


@triton.jit
def some_and_every(seen):
    """Whether any, and whether all, of a tile are seen: int32 scalars."""
    return tl.max(tl.max(seen.to(tl.int32), 1), 0), tl.min(tl.min(seen.to(tl.int32), 1), 0)


@triton.jit
def mask_tensor(at, args):
    """A bool tensor (as bytes), true where seen."""
    return load_matrix(args[0], at) != 0


@triton.jit
def mask_tensor_tile(at, args):
    return some_and_every(mask_tensor(at, args))


@triton.jit
def finite_mask(at, args):
    """A float tensor that is added to the scores hides what it sets to -inf."""
    return load_matrix(args[0], at) != -float("inf")


@triton.jit
def finite_mask_tile(at, args):
    return some_and_every(finite_mask(at, args))


@triton.jit
def load_ids(x, span, idx):
    """Document ids of a sequence's tokens; past its end those of the last one."""
    idx = tl.minimum(idx, tl.maximum(span.length - 1, 0))
    return tl.load(x.ptr + span.batch * number(x.stride_batch) + span.start + idx)


@triton.jit
def same_document(at, args):
    return load_ids(args[0], at.q, at.q_idx) == load_ids(args[1], at.k, at.k_idx)


@triton.jit
def same_document_tile(at, args):
    """By the least and greatest id of either side: exact where ids are sorted."""
    q_ids, k_ids = load_ids(args[0], at.q, at.q_idx), load_ids(args[1], at.k, at.k_idx)
    q_least, q_most = tl.min(tl.min(q_ids, 1), 0), tl.max(tl.max(q_ids, 1), 0)
    k_least, k_most = tl.min(tl.min(k_ids, 1), 0), tl.max(tl.max(k_ids, 1), 0)
    overlap = (q_least <= k_most) & (k_least <= q_most)
    one = (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    return overlap.to(tl.int32), one.to(tl.int32)


@triton.jit
def visible(masks, at):
    """The conjunction of all masks and of the end of the keys."""
    return allowed(masks, at, (at.k_idx < at.k.length) & (at.q_idx >= 0))


@triton.jit
def allowed(masks, at, seen):
    """`seen`, and by all masks."""
    for i in tl.static_range(len(masks)):
        seen = seen & masks[i].fn(masks[i].place(at), masks[i].args)
    return seen


@triton.jit
def key_range(masks, first, last, q, k):
    """Fold the masks' ranges for the queries first..last; empty where there are no queries."""
    lo, full_lo = 0, 0
    hi = tl.where(first < q.length, k.length, 0)
    full_hi = hi
    for i in tl.static_range(len(masks)):
        r = masks[i].keys(first, last, q, k, masks[i].args)
        lo, full_lo = tl.maximum(lo, r.lo), tl.maximum(full_lo, r.full_lo)
        full_hi, hi = tl.minimum(full_hi, r.full_hi), tl.minimum(hi, r.hi)
    return Range(lo, full_lo, full_hi, hi)


@triton.jit
def query_range(masks, first, last, q, k):
    """Fold the masks' ranges for the keys first..last; empty where there are no keys."""
    lo, full_lo = 0, 0
    hi = tl.where(first < k.length, q.length, 0)
    full_hi = hi
    for i in tl.static_range(len(masks)):
        r = masks[i].queries(first, last, q, k, masks[i].args)
        lo, full_lo = tl.maximum(lo, r.lo), tl.maximum(full_lo, r.full_lo)
        full_hi, hi = tl.minimum(full_hi, r.full_hi), tl.minimum(hi, r.hi)
    return Range(lo, full_lo, full_hi, hi)
