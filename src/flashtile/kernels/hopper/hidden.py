"""What a mask tensor hides of a block of keys by queries, as bits.

They are loaded before the scores are waited for, and take few registers, where what is loaded would
take one for each score.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.kernels.hopper import layouts, mask_rows
from flashtile.kernels.hopper.matrices import load_within
from flashtile.kernels.hopper.walk import first_of, needs_masks
from flashtile.kernels.masks import At


class MaskTensor(NamedTuple):
    view: Any  # MatrixView of bytes, 0 where hidden
    far: Any  # (), or not where rows lie 2^31 elements apart or more
    by_rows: Any  # (), or not where `mask_rows` loads them


@gluon.jit
def load_hidden(variant, keys, head, place, QUERIES: gl.constexpr):
    """What the mask tensor hides of a place's queries, nothing where the block needs no masks; 0
    without a tensor."""
    if len(variant.tensors) > 0:
        x, first_q = variant.tensors[0], first_of(variant.blocks, place)
        hidden = _none_hidden(x, QUERIES)
        if needs_masks(keys, place, first_q, variant.blocks, QUERIES):
            if len(x.by_rows) > 0:
                hidden = mask_rows.load_rows(x.view, keys.at, head, first_q, x.far, QUERIES)
            else:
                hidden = _load_elements(x.view, keys.at, head, first_q, x.far, QUERIES)
        return hidden
    else:
        return 0


@gluon.jit
def _none_hidden(x, QUERIES: gl.constexpr):
    if len(x.by_rows) > 0:
        registers: gl.constexpr = max(QUERIES // 64, 1)
        return gl.zeros([128, registers], gl.int32, mask_rows.threads(registers))
    else:
        zeros = gl.zeros([layouts.ROWS, QUERIES], gl.int32, layouts.accumulator(QUERIES))
        return _words(zeros)


@gluon.jit
def _load_elements(x, at, head, first_q, far, QUERIES: gl.constexpr):
    """(64, 4): a thread's first query of a key has bit 0, its next one bit 1, and so on."""
    scores: gl.constexpr = layouts.accumulator(QUERIES)
    columns = gl.arange(0, QUERIES, layouts.columns_of(scores))[None, :]
    q_idx = layouts.opaque(first_q + (columns & 6)) + (columns & -7)
    k_idx = gl.convert_layout(at.k_idx, scores, assert_trivial=True)
    here = At(at.batch, head, first_q, at.first_k, q_idx, k_idx, at.q, at.k)
    return _words((load_within(x, here, far) == 0).to(gl.int32) << _bit(QUERIES))


@gluon.jit
def _bit(COLUMNS: gl.constexpr):
    columns = gl.arange(0, COLUMNS, layouts.columns_of(layouts.accumulator(COLUMNS)))[None, :]
    constants = columns & -7
    return (constants >> 2) + (constants & 1)


@gluon.jit
def _words(bits):
    """The sum of each thread's own columns of a row (`layouts.partial_row_sums`)."""
    pairs = gl.sum(bits.reshape(bits.shape[0], bits.shape[1] // 8, 4, 2), 3)
    return gl.sum(pairs, 1)


@gluon.jit
def halved(hidden, variant, QUERIES: gl.constexpr):
    """(of the first QUERIES, of those after them), together all."""
    if len(variant.tensors) == 0:
        return hidden, hidden
    elif len(variant.tensors[0].by_rows) > 0:
        return mask_rows.halved(hidden, QUERIES)
    else:
        return hidden, hidden >> (QUERIES // 4)


@gluon.jit
def hide(p, hidden, variant):
    """Probabilities, 0 where a mask tensor hides; the bits opaque, or the compiler would test them
    of blocks without masks as well."""
    if len(variant.tensors) > 0:
        QUERIES: gl.constexpr = p.shape[1]
        if len(variant.tensors[0].by_rows) > 0:
            hides = mask_rows.hidden_queries(layouts.opaque(hidden), QUERIES)
        else:
            hides = _hidden_elements(layouts.opaque(hidden), QUERIES)
        p = gl.where(hides, 0.0, p)
    return p


@gluon.jit
def _hidden_elements(words, QUERIES: gl.constexpr):
    """(64, QUERIES): what the first bits hide."""
    ROWS: gl.constexpr = layouts.ROWS
    spread = words.expand_dims(1).expand_dims(3).broadcast_to(ROWS, QUERIES // 8, 4, 2)
    spread = gl.convert_layout(spread.reshape(ROWS, QUERIES), layouts.accumulator(QUERIES),
                               assert_trivial=True)  # fmt: skip
    return (spread >> _bit(QUERIES) & 1) != 0
