"""What `flashtile compile` calls a fault."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashtile.compiling.record import SPILL_LIMIT, Record, faults

GOOD = Record(
    "sm_90", "attention_forward", "causal bfloat16 128", "bfloat16", 128, 64, 8, 3,
    registers=255, spill_bytes=SPILL_LIMIT, shared_bytes=232_448, tensor_columns=512,
    matrix="HGMMA",
)  # fmt: skip


def test_limits_may_be_reached() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"spill_bytes": SPILL_LIMIT + 4},
            f"spills {SPILL_LIMIT + 4} bytes, the limit is {SPILL_LIMIT}",
        ),
        ({"shared_bytes": 232_449}, "needs 232,449 bytes of shared memory, there are 232,448"),
        ({"arch": "gfx942"}, "needs 232,448 bytes of shared memory, there are 65,536"),
        ({"arch": "sm_999"}, "needs 232,448 bytes of shared memory, there are 65,536"),
        ({"also": ("sm_80", "sm_86")}, "needs 232,448 bytes of shared memory, there are 101,376"),
        ({"tensor_columns": 513}, "needs 513 columns of tensor memory, there are 512"),
        ({"matrix": ""}, "has no matrix instructions"),
        ({"warnings": ("C7510", "C7510")}, "ptxas warns: C7510"),
        ({"error": "out of registers"}, "does not compile: out of registers"),
    ],
)
def test_faults_are_named(change: dict[str, object], fault: str) -> None:
    assert faults(replace(GOOD, **change)) == [fault]  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"kernel": "prepare_backward"}])
def test_what_does_not_multiply_needs_no_matrix_instructions(change: dict[str, str]) -> None:
    assert faults(replace(GOOD, matrix="", **change)) == []  # type: ignore[arg-type]


def test_an_injected_arrive_is_no_fault() -> None:
    assert faults(replace(GOOD, warnings=("C7519", "C7519"))) == []


def test_faults_add_up() -> None:
    worst = replace(GOOD, spill_bytes=4_000, matrix="", warnings=("C7517", "C7510"))

    assert faults(worst) == [
        f"spills 4,000 bytes, the limit is {SPILL_LIMIT}",
        "has no matrix instructions",
        "ptxas warns: C7510",
        "ptxas warns: C7517",
    ]
