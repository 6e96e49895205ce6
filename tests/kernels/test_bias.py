"""The gradient of a bias where its tiles are shared out, and its head dims multiplied some at a
time."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch
import triton
import triton.language as tl
from torch.multiprocessing.reductions import StorageWeakRef

from flashtile import flash_attn_func, flash_attn_varlen_func
from flashtile.kernels.bias import BiasShape, open_pairs
from flashtile.kernels.forward import Heads
from flashtile.kernels.numbers import opaque
from flashtile.kernels.views import Sequences
from flashtile.testing import Case
from flashtile.testing.allocations import assert_touches_nothing_else
from flashtile.testing.functions import prefixed
from flashtile.testing.interpreter import interpreted

LENGTHS = ((5, 20), (0, 3), (18, 17), (2, 0), (1, 1))


@pytest.fixture(params=[1, 7, 1000])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    backend = importlib.import_module("flashtile.backends.triton")
    monkeypatch.setattr(backend, "processors", lambda device: request.param)
    monkeypatch.setattr(backend, "STEPS", 6)
    monkeypatch.setattr(importlib.import_module("flashtile.tiles"), "CHUNK", 16)
    count: int = request.param
    return count


@pytest.mark.parametrize(
    "shape", [(1, 1, 20), (1, 4, 20), (3, 1, 20), (1, 1, 1), (3, 4, 1)], ids=str
)
def test_shares(processors: int, shape: tuple[int, ...]) -> None:
    """Of one program for several tiles as of several programs for one."""
    dims = (40, 8) if shape[0] == 1 else (24, 40)
    features = {"window_size": (5, 3), "softcap": 2.0} if processors == 7 else {}
    problem = Case("bias", 20, 36, 3, 4, 2, *dims, features=features).draw(8)
    bias = torch.randn(*shape, 36, requires_grad=True)
    assert_touches_nothing_else(problem._replace(tensors=problem.tensors | {"bias": bias}))


@pytest.mark.parametrize("rows", [20, 1])
def test_shares_of_packed_sequences(processors: int, rows: int) -> None:
    features = {"causal": rows == 20, "dropout_p": 0.3}
    problem = Case("bias", batch=5, head_dim=24, lengths=LENGTHS, features=features).draw(9)
    bias = torch.randn(1, 1 if rows == 1 else 4, rows, 20, requires_grad=True)
    assert_touches_nothing_else(problem._replace(tensors=problem.tensors | {"bias": bias}))


def test_every_processor_has_two_programs_where_there_is_that_much_to_do() -> None:
    from flashtile.backends.triton import bias_share  # noqa: PLC0415, imports triton
    from flashtile.tiles import KernelConfig  # noqa: PLC0415

    config = KernelConfig(128, 64, 8, 2)
    for shape, pairs in (
        ((1, 16, 4096, 4096), 4), ((1, 1, 16384, 16384), 16), ((4, 16, 4096, 4096), 1),
        ((1, 16, 1, 4096), 4), ((1, 4, 64, 64), 4096), ((1, 1, 512, 512), 64), ((1, 1, 1, 128), 3),
    ):  # fmt: skip
        share = bias_share(shape, pairs, config, 132)
        batches, heads, rows, columns = shape
        tiles = -(-rows // 128) * -(-columns // 64) * heads * batches
        assert share.programs >= min(2 * 132, tiles * pairs) // 2, (shape, share)
        assert 1 <= share.parts <= pairs
        assert share.parts == 1 or share.run == 1
    assert bias_share((1, 4, 20, 0), 4, config, 132).programs == 0


@pytest.mark.parametrize("shape", [(1, 1, 20), (1, 2, 1), (3, 2, 20)], ids=str)
def test_ranges_of_a_function_that_differ_from_sequence_to_sequence(
    processors: int, shape: tuple[int, ...]
) -> None:
    counts = torch.tensor([0, 36, 19], dtype=torch.int32)
    features = {"mask_mod": prefixed(counts, ranges=True)}
    problem = Case("ranges", 20, 36, 3, 2, 1, 8, features=features).draw(10)
    bias = torch.randn(*shape, 36, requires_grad=True)
    assert_touches_nothing_else(problem._replace(tensors=problem.tensors | {"bias": bias}))


@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_of_no_sequence(rows: int) -> None:
    x = torch.randn(4, 2, 8, requires_grad=True)
    bias = torch.randn(1, 2, rows, 4, requires_grad=True)
    offsets = torch.zeros(1, dtype=torch.int32)
    out = flash_attn_varlen_func(x, x, x, offsets, offsets, 4, 4, bias=bias)
    for grad in torch.autograd.grad(out.sum(), (x, bias)):
        assert grad.eq(0).all()


def test_a_replay_keeps_no_bias(processors: int) -> None:
    q = torch.randn(3, 4, 2, 8)
    with interpreted(16, 16, capacity=16):
        bias = torch.randn(1, 2, 4, 4, requires_grad=True)
        memory = StorageWeakRef(bias.untyped_storage())
        torch.autograd.grad(flash_attn_func(q, q, q, bias=bias).sum(), bias)
        del bias
        gc.collect()
        assert memory.expired()


@triton.jit
def _parts(found, shape, q_seq, heads):
    part = tl.program_id(0)
    pairs = open_pairs(shape, 0, part, q_seq, heads)
    tl.store(found + 2 * part, pairs.begin)
    tl.store(found + 2 * part + 1, pairs.count)


@pytest.mark.parametrize("batch", [3, 2**17 + 1])
def test_parts_of_many_sequences(batch: int) -> None:
    """Together all pairs, none twice: of 2^23 pairs and more 264 parts as well."""
    parts, found = min(264, 64 * batch), torch.zeros(264, 2, dtype=torch.int32)
    shape = BiasShape(opaque(1), opaque(1), opaque(4), 4, opaque(parts), opaque(1))
    sequences, heads = Sequences(opaque(batch), opaque(4)), Heads(opaque(64), opaque(1))
    _parts[(parts,)](found, shape, sequences, heads)
    begin, count = found[:parts].long().unbind(1)
    assert torch.equal(begin, count.cumsum(0) - count)
    assert count.sum() == 64 * batch
    assert count.max() - count.min() <= 1
