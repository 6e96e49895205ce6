"""Free memory is what the system and the container leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashtile.demo import machine

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8,000 KiB available and no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path / "limit", tmp_path / "used"),))
    return tmp_path


def test_what_the_system_says(files: Path) -> None:
    assert machine.available_bytes(CPU) == 8000 * 1024


def test_a_container_has_less(files: Path) -> None:
    (files / "limit").write_text("3000\n")
    (files / "used").write_text("1000\n")

    assert machine.available_bytes(CPU) == 2000


def test_a_container_without_a_limit(files: Path) -> None:
    (files / "limit").write_text("max\n")
    (files / "used").write_text("1000\n")

    assert machine.available_bytes(CPU) == 8000 * 1024


def test_a_system_that_says_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "meminfo").unlink()
    monkeypatch.delattr(machine.os, "sysconf")

    assert machine.available_bytes(CPU) == machine.UNKNOWN


def test_this_machine() -> None:
    assert 2**20 < machine.available_bytes(CPU) < 2**50


def test_what_a_container_can_give_up_is_left(files: Path) -> None:
    """Files that were read count as its use: most of an installation's gigabytes."""
    (files / "limit").write_text("3000\n")
    (files / "used").write_text("2900\n")
    (files / "memory.stat").write_text("anon 1200\ninactive_file 900\n")
    assert machine.available_bytes(CPU) == 1000
    (files / "memory.stat").unlink()
    (files / "used").write_text("4000\n")
    assert machine.available_bytes(CPU) == 0
