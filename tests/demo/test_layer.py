"""The layer's figures are true, and its measurements stop where they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.demo import layer
from flashtile.demo.settings import LayerShape, Settings
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention

SETTINGS = replace(
    Settings(torch.device("cpu")).quick(), layer=LayerShape(heads=4, kv_heads=2, head_dim=32)
)


def _rows(settings: Settings) -> list[layer.Row]:
    return list(layer.growth(settings, lambda seqlen, name: None))


def test_errors_are_within_the_budget() -> None:
    errors = layer.errors(SETTINGS)

    assert [error.name for error in errors] == ["out", "dq", "dk", "dv"]
    for error in errors:
        assert 0.0 < error.flash_rms < error.flash_max < 1e-4
        assert 0.0 < error.standard_rms < error.standard_max < 1e-4
        assert error.failure == ""


def test_an_inexact_attention_breaks_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return flash_attn_func(q, k, v, causal=causal) * (1.0 + 1e-5)

    monkeypatch.setattr(layer, "flash_attn_func", careless)
    failures = [error.failure for error in layer.errors(SETTINGS)]

    assert all("rms error is" in failure for failure in failures)
    assert failures[0].startswith("out: ")


@pytest.mark.parametrize("seqlen", [256, 512, 1024])
def test_standard_attention_needs_the_memory_it_is_expected_to(seqlen: int) -> None:
    inputs = layer.draw(seqlen, SETTINGS)
    measured = peak_bytes(lambda: layer.forward_and_backward(standard_attention, inputs))

    assert layer.standard_bytes(seqlen, SETTINGS) == pytest.approx(measured, rel=0.15)


def test_measures_every_length() -> None:
    seen: list[tuple[int, str]] = []
    rows = list(layer.growth(SETTINGS, lambda *what: seen.append(what)))

    assert [row.seqlen for row in rows] == [64, 128, 256] == SETTINGS.lengths
    assert seen == [(n, name) for n in SETTINGS.lengths for name in ("flashtile", "standard")]
    for row in rows:
        assert not row.standard.skipped
        assert min(row.flash.seconds, row.standard.seconds) > 0.0
    assert rows[2].standard.peak_bytes > 3 * rows[1].standard.peak_bytes
    assert rows[2].flash.peak_bytes < rows[2].standard.peak_bytes


def test_standard_attention_stops_when_memory_would_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = layer.standard_bytes(128, SETTINGS) * 2
    monkeypatch.setattr(layer, "available_bytes", lambda device: free)
    rows = _rows(SETTINGS)

    assert [row.standard.skipped for row in rows] == ["", "", "out of memory"]
    assert rows[2].standard.peak_bytes == layer.standard_bytes(256, SETTINGS)
    assert rows[2].free_bytes == free
    assert rows[2].flash.peak_bytes < free


def test_standard_attention_stops_when_it_would_take_too_long() -> None:
    rows = _rows(replace(SETTINGS, standard_seconds=1e-9))

    assert [row.standard.skipped for row in rows] == ["", "too slow", "too slow"]
    assert rows[2].standard.seconds == 4 * rows[1].standard.seconds


def test_flash_attention_stops_as_well() -> None:
    assert [row.seqlen for row in _rows(replace(SETTINGS, flash_seconds=1e-9))] == [64]
