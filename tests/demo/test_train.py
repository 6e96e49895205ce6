"""Training is the same every time, and with either attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtile import flash_attn_func
from flashtile.demo.settings import Settings
from flashtile.demo.train import Training, batches, read_text, write
from flashtile.models.gpt import Attention
from flashtile.testing.standard import standard_attention

SETTINGS = Settings(torch.device("cpu"), steps=12).quick()


def _train(attention: Attention) -> Training:
    training = Training(attention, SETTINGS)
    for batch in batches(read_text(SETTINGS), SETTINGS):
        assert training.step(batch) == training.losses[-1]
    assert len(training.losses) == SETTINGS.steps
    return training


def test_batches_are_pieces_of_the_text() -> None:
    text = read_text(SETTINGS)
    pieces = list(batches(text, SETTINGS))

    assert len(pieces) == SETTINGS.steps
    assert pieces[0].shape == (SETTINGS.batch, SETTINGS.model.seqlen + 1)
    assert not torch.equal(pieces[0], pieces[1])
    whole = bytes(text.tolist())
    assert all(bytes(row.tolist()) in whole for row in pieces[0])


def test_learns_the_same_every_time_and_with_either_attention() -> None:
    first, again, standard = (
        _train(each) for each in (flash_attn_func, flash_attn_func, standard_attention)
    )

    assert first.losses[0] > 5.0
    assert first.losses[-1] < 3.6
    assert first.losses == again.losses
    assert first.losses == pytest.approx(standard.losses, abs=1e-4)
    assert first.step_seconds > 0.0


def test_writes_after_its_prompt() -> None:
    model = Training(flash_attn_func, SETTINGS).model

    texts = [write(model, "The ", SETTINGS) for _ in range(2)]

    assert texts[0] == texts[1]
    assert texts[0].startswith("The ")
    # Bytes that are no text become one mark for up to three of them.
    assert SETTINGS.writes / 3 < len(texts[0]) - 4 <= SETTINGS.writes


def test_reads_pythons_documentation_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc" * 100)

    assert len(read_text(SETTINGS)) > 100_000
    assert read_text(replace(SETTINGS, text=path))[:4].tolist() == [97, 98, 99, 97]


def test_a_short_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" * 65)

    with pytest.raises(ValueError, match=r"text has 65 bytes; training needs more than 65"):
        read_text(replace(SETTINGS, text=path))
