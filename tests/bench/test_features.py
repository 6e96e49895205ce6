"""Every feature is the same attention in the terms of every library."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from flashtile.bench import flex, providers
from flashtile.bench.features import (
    FEATURES,
    SAME_BITS,
    Cell,
    Work,
    document_lengths,
    flops,
    lognormal_lengths,
)
from flashtile.bench.gate import draw

CPU = torch.device("cpu")

PAGED = ("page 16", "page 256")


def _cell(feature: str) -> Cell:
    batch = 1 if feature in ("documents", "varlen", *PAGED) else 2
    return Cell(feature, batch, 256, 4, 2 if feature == "gqa" else 4, 32)


def _difference(work: Work, cell: Cell, attend: providers.Attend) -> float:
    q, k, v = (x.detach() for x in draw(cell, work, CPU).leaves)
    with torch.no_grad():
        ours = providers.build("flashtile", cell, work, CPU)(q, k, v).double()
        return float((attend(q, k, v).double() - ours).norm() / ours.norm())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("feature", sorted(FEATURES.keys() - {"dropout", "sink", *PAGED}))
def test_flex_attention_computes_the_same(feature: str) -> None:
    cell = _cell(feature)
    work = FEATURES[feature](cell, CPU)
    attend = flex.attention(cell, work, CPU, torch_flex.flex_attention)
    assert _difference(work, cell, providers.batched(attend, work)) < 0.005


@pytest.mark.parametrize(
    "feature",
    [f for f in FEATURES if f not in ("dropout", "sink", "softcap", *SAME_BITS, *PAGED)],
)
def test_sdpa_computes_the_same(feature: str) -> None:
    cell = _cell(feature)
    work = FEATURES[feature](cell, CPU)
    with providers.context("math"):
        assert _difference(work, cell, providers.build("math", cell, work, CPU)) < 0.005


def test_flops_count_what_is_seen() -> None:
    def of(feature: str, mode: str = "fwd") -> float:
        cell = _cell(feature)
        return flops(cell, FEATURES[feature](cell, CPU), mode)

    assert of("full") == 4.0 * 2 * 4 * 256**2 * 32
    assert of("causal") == of("softcap") == of("full") / 2
    assert of("causal", "bwd") == 2.5 * of("causal")
    assert of("window full") == of("window")
    assert of("window") == 4.0 * 2 * 4 * 32 * sum(min(i + 1, 17) for i in range(256))
    assert of("documents") == 4.0 * 4 * 32 * sum(n * n for n in document_lengths(256))


def test_lengths_add_up() -> None:
    documents, packed = document_lengths(16384), lognormal_lengths(16384)

    assert (len(documents), sum(documents), sum(packed)) == (16, 16384, 16384)
    assert min(documents) >= 400 and max(documents) <= 1700
    assert 10 <= len(packed) <= 40


def test_packed_sequences_are_compared_at_about_equal_work() -> None:
    cell = Cell("varlen", 1, 16384, 16, 16, 128)
    work = FEATURES["varlen"](cell, CPU)
    equal = FEATURES["causal"](work.baseline, CPU)

    assert 0.9 < equal.pairs / work.pairs < 1.1
    assert 0.9 < work.baseline.batch * work.baseline.seqlen / 16384 < 1.1


@pytest.mark.parametrize("feature", PAGED)
def test_pages_hold_the_keys_of_plain_attention(feature: str) -> None:
    cell = Cell(feature, 1, 300, 4, 2, 32)
    work = FEATURES[feature](cell, CPU)
    q, k, v = (x.detach() for x in draw(cell, work, CPU).leaves)
    table = work.keywords["block_table"]
    paged = providers.build("flashtile", cell, work, CPU)(q, k, v)
    k, v = (x[table[0].long()].flatten(0, 1)[: cell.seqlen] for x in (k, v))
    dense = providers.build("flashtile", cell, FEATURES["causal"](cell, CPU), CPU)(
        q[None], k[None], v[None]
    )

    assert work.page_size * table.numel() >= 300 > work.page_size * (table.numel() - 1)
    assert float((paged - dense[0]).norm() / dense.norm()) < 0.005
    with pytest.raises(providers.CannotError, match="no pages"):
        providers.build("math", cell, work, CPU)
