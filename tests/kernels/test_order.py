"""The order in which programs take on the tiles of packed sequences."""

# ruff: noqa: N803, compile-time constants of a kernel are upper case

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import NEIGHBOURS, Sequences, interleave_heads

BLOCK = 16


@triton.jit
def probe(found, seq, heads, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(found + program, interleave_heads(seq, heads, program, BLOCK))


def _order(lengths: tuple[int, ...], heads: int, slots: int, packed: bool = True) -> Tensor:
    """The tiles of a grid's programs."""
    offsets = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    seq = Sequences(opaque(len(lengths)), opaque(sum(lengths)), offsets if packed else None)
    found = torch.full((slots * heads,), -1, dtype=torch.int32)
    probe[(slots * heads,)](found, seq, heads, BLOCK)
    return found


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("lengths", [(1,), (16, 0, 5), (70, 33, 1, 18), (300,)], ids=str)
def test_heads_take_turns(lengths: tuple[int, ...], heads: int) -> None:
    """Every tile once; a head's next tiles only when all heads had as many."""
    slots = sum(lengths) // BLOCK + len(lengths) + 1
    found = _order(lengths, heads, slots)
    assert found.sort().values.equal(torch.arange(slots * heads, dtype=torch.int32))
    turn = NEIGHBOURS.value
    for first in range(0, slots, turn):
        those = torch.arange(first, min(first + turn, slots))
        expected = (torch.arange(heads)[:, None] * slots + those).flatten()
        taken = found[first * heads : first * heads + len(expected)]
        assert taken.long().equal(expected)


def test_sequences_of_one_length_keep_their_order() -> None:
    assert _order((40, 40), 3, 6, packed=False).equal(torch.arange(18, dtype=torch.int32))
