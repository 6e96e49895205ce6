"""What is done to a block of scores before the softmax, and of probabilities after it: score mods
and masks, the portable kernels' own functions, with keys counted as suits a thread; dropout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.dropout import drop
from flashtile.kernels.hopper import layouts
from flashtile.kernels.hopper.walk import first_of, needs_masks
from flashtile.kernels.hopper.words import accumulator_numbers
from flashtile.kernels.masks import (
    At,
    allowed,
    key_range,
    mask_tensor,
    not_earlier,
    not_earlier_keys,
    not_later,
    not_later_keys,
    same_chunk,
    same_chunk_keys,
    same_document,
)
from flashtile.kernels.scores import (
    add_matrix,
    alibi,
    alibi_columns,
    alibi_slope,
    apply_score_mods,
    scaled,
    softcap,
    softcap_approximate,
)
from flashtile.kernels.views import Span


class Rows(NamedTuple):
    """A warpgroup's queries."""

    at: Any  # At, without keys
    full_lo: Any  # keys [full_lo, full_hi) are seen by all of them
    full_hi: Any


@gluon.constexpr_function
def compares_positions(masks):
    """Whether all masks only compare where queries and keys stand, and have the ranges for it."""
    keys = {
        not_later: not_later_keys, not_earlier: not_earlier_keys, same_chunk: same_chunk_keys,
    }  # fmt: skip
    return all(mask[0] in keys and mask[2] is keys[mask[0]] for mask in masks)


@gluon.constexpr_function
def in_chunks(masks):
    """Whether positions are compared with the bounds of a chunk."""
    return compares_positions(masks) and any(mask[0] is same_chunk for mask in masks)


@gluon.jit
def narrow(bound):
    """A bound, that may be of 64 bits, as a tile's numbers are."""
    return gl.minimum(gl.maximum(bound, -1), 2147483647).to(gl.int32)


@gluon.constexpr_function
def _bounds_below(masks):
    return any(mask[0] is not_earlier or mask[0] is same_chunk for mask in masks)


@gluon.constexpr_function
def _reads_tensors(masks):
    return any(mask[0] is mask_tensor for mask in masks)


@gluon.constexpr_function
def _moves_along(masks):
    """Whether masks give the same with keys counted from any of them, where their start lies as
    well."""
    own = (not_later, not_earlier, same_document)
    return all(any(mask[0] is fn for fn in own) for mask in masks)


@gluon.constexpr_function
def _reads_matrix(mods):
    return any(mod[0] is add_matrix for mod in mods)


@gluon.constexpr_function
def _takes_distances(mods):
    """Whether no score mod asks where a key stands but for its distance from the query."""
    own = (scaled, softcap, softcap_approximate, alibi, alibi_columns)
    return all(any(mod[0] is fn for fn in own) for mod in mods)


@gluon.constexpr_function
def by_columns(mods):
    """Whether the last score mod leaves something to be added to all scores of a thread."""
    return len(mods) > 0 and mods[-1][0] is alibi_columns


@gluon.jit
def block_columns(first_k, BLOCK_N: gl.constexpr):
    """(1, BLOCK_N) keys of a block, as a thread's own first one and constants.

    Without `opaque` the compiler would keep them all in registers from block to block: 72 bytes of
    spills at head dim 64 with three warpgroups.
    """
    columns = gl.arange(0, BLOCK_N, layouts.columns_of(layouts.accumulator(BLOCK_N)))[None, :]
    return layouts.opaque(first_k + (columns & 6)), columns & -7


@gluon.jit
def block_at(at, first_k, BLOCK_N: gl.constexpr):
    """`at` with the keys of a block, which the compiler knows to lie side by side."""
    first_k = gl.multiple_of(layouts.opaque(first_k), BLOCK_N)
    columns = gl.arange(0, BLOCK_N, layouts.columns_of(layouts.accumulator(BLOCK_N)))[None, :]
    k_idx = first_k.to(gl.int64) + columns.to(gl.int64)
    return At(at.batch, at.head, at.first_q, first_k, at.q_idx, k_idx, at.q, at.k)


@gluon.jit
def modify(s, variant, rows, place, LAST: gl.constexpr, TILE: gl.constexpr):
    """Score mods and masks of the block of keys at a place. Without masks or a list (a float mask
    has one, and is no mask here) only the LAST block, which comes first, may be partial."""
    BLOCK_N: gl.constexpr = TILE.block_n
    first_k = first_of(variant.blocks, place)
    own, constants = block_columns(first_k, BLOCK_N)
    if len(variant.score_mods) > 0:
        here = _at_scores(variant, rows.at, first_k, own, constants, BLOCK_N)
        s = apply_score_mods(variant.score_mods, s, here)
    if LAST or len(variant.masks) > 0 or variant.blocks is not None:
        s = mask_block(s, -float("inf"), variant, rows, place, own, constants, BLOCK_N)
    return s


@gluon.jit
def hide(p, variant, rows, place, TILE: gl.constexpr):
    """Probabilities of a block that is not the last, 0 where masks hide the key."""
    if len(variant.masks) > 0 or variant.blocks is not None:
        own, constants = block_columns(first_of(variant.blocks, place), TILE.block_n)
        p = mask_block(p, 0.0, variant, rows, place, own, constants, TILE.block_n)
    return p


@gluon.jit
def column_shift(variant, rows, place, TILE: gl.constexpr):
    """What `alibi_columns`, which counts keys from a thread's first column, leaves to be added to a
    block's scores: one number for each row of a thread."""
    at, first_k = rows.at, first_of(variant.blocks, place)
    own, _ = block_columns(first_k, TILE.block_n)
    diagonal = at.q_idx + (at.k.length - at.q.length)
    return alibi_slope(at, variant.score_mods[-1].args) * (own - diagonal).to(gl.float32)


@gluon.jit
def mask_block(x, hidden, variant, rows, place, own, constants, BLOCK_N: gl.constexpr):
    """x with what is hidden for it, where the block is not seen as a whole by all rows."""
    first_k = first_of(variant.blocks, place)
    if needs_masks(rows, place, first_k, variant.blocks, BLOCK_N):
        if compares_positions(variant.masks):
            seen = _seen_between(variant.masks, rows.at, own, constants)
        else:
            here = _at_masks(variant, rows.at, first_k, own, constants, BLOCK_N)
            # Apart and opaque, or ptxas packs comparisons with the end into words for the masks.
            if first_k + BLOCK_N > rows.at.k.length:
                end = layouts.opaque(rows.at.k.length)
                x = gl.where(constants < end - own, x, hidden)
            seen = allowed(variant.masks, here, rows.at.q_idx >= 0)
        x = gl.where(seen, x, hidden)
    return x


@gluon.jit
def _seen_between(masks, at, own, constants):
    """The keys of a row that sees those of a range: one comparison with a constant where no mask
    bounds them below, instead of one for each mask and one for the end of the keys."""
    keys = key_range(masks, at.q_idx, at.q_idx, at.q, at.k)
    seen = constants < keys.hi - own
    if _bounds_below(masks):
        seen = seen & (constants >= keys.lo - own)
    return seen


@gluon.jit
def _at_scores(variant, at, first_k, own, constants, BLOCK_N: gl.constexpr):
    if _reads_matrix(variant.score_mods):
        return block_at(at, first_k, BLOCK_N)
    elif _takes_distances(variant.score_mods):
        return _count_keys_from(at, own, constants)
    else:
        return At(at.batch, at.head, at.first_q, first_k, at.q_idx, own + constants, at.q, at.k)


@gluon.jit
def _at_masks(variant, at, first_k, own, constants, BLOCK_N: gl.constexpr):
    if _moves_along(variant.masks):
        return _count_keys_from(at, own, constants)
    elif _reads_tensors(variant.masks):
        return block_at(at, first_k, BLOCK_N)
    else:
        return At(at.batch, at.head, at.first_q, first_k, at.q_idx, own + constants, at.q, at.k)


@gluon.jit
def _count_keys_from(at, own, constants):
    """`at` with keys counted from each thread's own first column, the end of the keys included.
    A distance is then one addition of a constant, exact as long as fp32 has the row's from `own`:
    up to 2^24. What is loaded by their start as well is never past the end, which a thread's own
    first column may be."""
    start = at.k.start + gl.minimum(own, gl.maximum(at.k.length - 1, 0))
    k = Span(at.k.batch, at.k.row, start, at.k.length - own, at.k.room, at.k.leftpad)
    return At(at.batch, at.head, at.first_q, 0, at.q_idx, constants, at.q, k)


@gluon.jit
def drop_block(p, dtype: gl.constexpr, variant, rows, place, TILE: gl.constexpr):
    """Dropout of a block's probabilities, after their sums, as the product takes them."""
    if len(variant.dropouts) > 0:
        at, first_k = rows.at, layouts.opaque(first_of(variant.blocks, place))
        here = At(at.batch, at.head, at.first_q, first_k, at.q_idx, 0, at.q, at.k)
        numbers = accumulator_numbers(variant.dropouts[0], here, TILE.block_n)
        p = drop(variant.dropouts[0], p.to(dtype), numbers)
    return p
