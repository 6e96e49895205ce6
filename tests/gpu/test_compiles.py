"""What a GPU call compiles: a new kernel for a new variant, none for new numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from flashtile.testing import Case, Problem, run


@contextmanager
def _compiles() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles, or loads from its disk cache, meanwhile."""
    from triton import knobs  # noqa: PLC0415, only where there is a GPU

    names: list[str] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, src, **_: names.append(src.name)
    try:
        yield names
    finally:
        knobs.compilation.listener = before


def _dense(**changes: Any) -> Problem:
    case = Case("compile", **{"seqlen_q": 100, "seqlen_k": 130, "head_dim": 64, **changes})
    return case.draw(1, torch.bfloat16, "cuda")


def _features(name: str, *values: Any, **others: Any) -> list[Problem]:
    return [_dense(features={name: value, **others}) for value in values]


def _packed(*lengths: tuple[tuple[int, int], ...], **changes: Any) -> list[Problem]:
    """Of any length up to 300: bounds of 16 queries or less would be decoded, by other kernels."""
    problems = [_dense(lengths=each, **changes) for each in lengths]
    for problem in problems:
        problem.keywords.update(max_seqlen_q=300, max_seqlen_k=300)
    return problems


LENGTHS = (
    ((100, 100), (7, 30)),
    ((1, 1),),
    ((16, 16), (0, 0), (64, 256)),
    ((128, 0), (0, 128)),
    tuple((1, n) for n in range(1, 40)),
)

VARIATIONS = {
    "seqlens": lambda: [  # one query over 256 keys would be decoded
        _dense(seqlen_q=n, seqlen_k=m)
        for n, m in ((100, 130), (1, 255), (128, 256), (257, 16), (1, 1), (64, 63))
    ],
    "batch": lambda: [_dense(batch=n) for n in (2, 1, 3, 16)],
    "heads": lambda: [
        _dense(heads=n, kv_heads=m) for n, m in ((4, 2), (6, 3), (1, 1), (8, 1), (16, 16))
    ],
    "window": lambda: _features("window_size", (5, 3), (0, 1), (16, 32), (1, 1), (500, 2**40)),
    "chunk": lambda: _features("attention_chunk", 7, 1, 16, 64, 500, 2**40),
    "softcap": lambda: _features("softcap", 3.0, 1.0, 16.0, 30.5, causal=True),
    "softmax_scale": lambda: _features("softmax_scale", 0.3, 1.0, 16.0, 1e-3, causal=True),
    "dropout_p": lambda: _features("dropout_p", 0.1, 0.5, 1 / 16),
    "packed_lengths": lambda: _packed(*LENGTHS),
    "pages": lambda: _packed(*LENGTHS[:3], ((200, 256), (3, 240)), page_size=16),
    "alibi_seqlens": lambda: [
        _dense(seqlen_q=n, seqlen_k=m, tensors=("alibi_slopes",)) for n, m in ((9, 30), (16, 128))
    ],
    "document_seqlens": lambda: [
        _dense(seqlen_q=n, seqlen_k=n, tensors=("document_ids",)) for n in (9, 16, 300)
    ],
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_numbers_compile_nothing(name: str) -> None:
    """Lengths, window sides, caps, probabilities: forward and backward of all but the first."""
    first, *others = VARIATIONS[name]()
    run(first)
    with _compiles() as compiled:
        for problem in others:
            run(problem)
    assert compiled == []


def test_a_new_variant_compiles_four_kernels_once(backend: str) -> None:
    """Forward, what backward prepares, dQ, dK and dV; the hook above does see them. TMA reads no
    rows of these head dims, and no other test has them."""
    problem = _dense(head_dim=28 if backend == "triton" else 36, features={"causal": True})
    with _compiles() as compiled:
        run(problem)
        run(problem)
    assert sorted(compiled) == [
        "attention_backward_dkdv", "attention_backward_dq", "attention_forward", "prepare_backward",
    ]  # fmt: skip
