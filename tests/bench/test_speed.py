"""Cells are checked, timed, and recorded with a figure or a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.bench import providers, run, speed
from flashtile.bench.features import FEATURES, SAME_BITS, Cell
from flashtile.bench.gate import Gate, draw
from flashtile.bench.options import Options

CPU = torch.device("cpu")
Make = Callable[..., Options]


def test_dense_cells_are_those_of_the_anchors(options: Make) -> None:
    whole = options(tokens=16384, hidden=2048, head_dims=(64, 128, 256))
    cells = list(speed.dense_cells(whole))

    assert len(cells) == 3 * 2 * 6
    assert {cell.batch * cell.seqlen for cell in cells} == {16384}
    assert {cell.heads * cell.head_dim for cell in cells} == {2048}
    assert {cell.seqlen for cell in cells} == {512, 1024, 2048, 4096, 8192, 16384}


def test_flex_attention_is_compiled_where_it_is_asked_for(options: Make) -> None:
    default = options(providers=())
    assert "flex" in speed._names(speed.DENSE, default, True)
    assert "flex" not in speed._names(speed.DENSE, default, False)
    assert "flex" in speed._names(speed.DENSE, replace(default, flex_all=True), False)


def test_dense_suite(options: Make, lines: list[str]) -> None:
    asked = options(providers=("flashtile", "flashtile-torch", "math", "efficient"))
    run.run("dense", asked)

    document = json.loads((asked.output / "cpu" / "dense.json").read_text())
    rows = document["rows"]
    assert [(row["feature"], row["mode"]) for row in rows] == [
        (mask, mode) for mask in ("full", "causal") for mode in ("fwd", "bwd")
    ]
    assert (document["environment"]["commit"], document["environment"]["dirty"]) == (
        "a" * 40,
        False,
    )
    for row in rows:
        found = row["providers"]
        # The plan's own choice is not measured a second time.
        assert (row["backend"], list(found)) == ("torch", ["flashtile", "math", "efficient"])
        assert found["flashtile"]["median_ms"] > 0.0 and found["flashtile"]["rounds"] == 1
        expected = row["flops"] / found["math"]["median_ms"] / 1e9
        assert found["math"]["tflops"] == pytest.approx(expected)
        assert "backend" in found["efficient"]["reason"]
    assert lines[-1].endswith("dense.json")


def test_gradients_may_be_another_backends(options: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend is then asked in both modes, besides the plan's own choice."""
    chosen = SimpleNamespace(plan=SimpleNamespace(backend="torch", gradients="hopper"))
    monkeypatch.setattr(speed, "explain", lambda *_, **__: chosen)
    asked = options(providers=("flashtile", "flashtile-torch"))
    rows = list(speed.measure(Cell("causal", 1, 64, 2, 2, 16), [*asked.providers], asked))
    assert [(row["mode"], row["backend"]) for row in rows] == [("fwd", "torch"), ("bwd", "hopper")]
    assert all(list(row["providers"]) == ["flashtile", "flashtile-torch"] for row in rows)


@pytest.mark.parametrize(
    "feature", [name for name in FEATURES if name not in ("full", "causal", "lengths")]
)
def test_every_feature_runs_against_plain_attention(feature: str, options: Make) -> None:
    rows = list(speed.measure_features(options(features=(feature,), head_dims=(128,), hidden=256)))

    assert [row["mode"] for row in rows] == ["fwd", "bwd"]
    for row in rows:
        found = row["providers"]
        assert "tflops" in found["flashtile"] and "tflops" in found["plain"], found
        lacks = ("softcap", "sink", *SAME_BITS)
        refused = feature in lacks or feature.startswith("page")
        assert ("reason" in found["math"]) == refused, found
        masks = ("documents", "prefix", "blocks", "mask")
        assert row["plain"]["feature"] in ("full", "causal", *masks)


def test_cells_of_features(options: Make) -> None:
    asked = options(tokens=16384, hidden=2048)
    cells: dict[str, list[Cell]] = {}
    every = list(speed.feature_cells(asked))
    for cell in every:
        if cell.head_dim == 128:
            cells.setdefault(cell.feature, []).append(cell)

    assert cells["layer"] == [Cell("layer", 1, 8192, 32, 8, 128)]
    assert cells["gqa"] == [Cell("gqa", 1, 16384, 32, 8, 128)]
    assert cells["mqa"] == [Cell("mqa", 1, 4096, 32, 1, 128)]
    assert cells["bias"] == [Cell("bias", 4, 4096, 16, 16, 128)]
    for feature in SAME_BITS:
        sizes = [(c.batch, c.seqlen, c.head_dim) for c in every if c.feature == feature]
        assert sizes == [(b, n, d) for d in (128, 64, 256) for b, n in ((4, 4096), (1, 16384))]
    baselines = [FEATURES["lengths"](c, torch.device("cpu")).baseline for c in cells["lengths"]]
    assert [(c.batch, c.seqlen, c.heads) for c in cells["lengths"]] == [
        (16, 1000, 16), (5, 3000, 16), (3, 5000, 16), (1, 12345, 16), (4, 4096, 12), (4, 4096, 20)
    ]  # fmt: skip
    assert [(c.batch, c.seqlen, c.heads) for c in baselines] == [
        (15, 1024, 16), (7, 2048, 16), (3, 4096, 16), (1, 16384, 16), (4, 4096, 16), (4, 4096, 16)
    ]  # fmt: skip


def test_selections(options: Make) -> None:
    asked = options(tokens=1024, seqlens=(512,), modes=("bwd",), features=("causal",))
    [row] = speed.measure_dense(asked)
    assert (row["seqlen"], row["batch"], row["mode"], row["feature"]) == (512, 2, "bwd", "causal")


def _prepared(feature: str = "causal") -> tuple[Cell, Gate, tuple[Tensor, ...], Tensor]:
    cell = Cell(feature, 2, 48, 4, 2, 32)
    work = FEATURES[feature](cell, CPU)
    inputs = draw(cell, work, CPU)
    return cell, Gate(cell, work, inputs), inputs.leaves, inputs.dout


@pytest.mark.parametrize("name", ["flashtile", "fa2"])
def test_gate_catches_a_wrong_result(name: str) -> None:
    _, gate, leaves, dout = _prepared()
    out = flash_attn_func(*leaves, causal=True)
    grads = torch.autograd.grad(out, leaves, dout)
    gate.check(name, [out])
    gate.check(name, grads)

    with pytest.raises(AssertionError, match="out"):
        gate.check(name, [flash_attn_func(*leaves)])
    with pytest.raises(AssertionError, match="dv"):
        gate.check(name, [*grads[:2], grads[2] * 1.05])
    with pytest.raises(AssertionError, match="out"):
        gate.check(name, [out * float("nan")])


def test_a_wrong_provider_has_a_reason_and_no_time(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = providers.build

    def wrong(name: str, *arguments: object) -> providers.Attend:
        attend = build(name, *arguments)  # type: ignore[arg-type]
        return (lambda q, k, v: attend(q, k, v) * 1.1) if name == "math" else attend

    monkeypatch.setattr(providers, "build", wrong)
    [forward, backward] = speed.measure_dense(options(features=("full",)))

    for row, label in ((forward, "out"), (backward, "dq")):
        assert row["providers"]["math"].keys() == {"reason"}
        assert label in row["providers"]["math"]["reason"]
        assert "median_ms" in row["providers"]["flashtile"]


def test_a_forced_backend_is_asked_alone() -> None:
    q = torch.randn(1, 8, 2, 16)
    flash_attn_func(q, q, q)  # what is cached by now must not answer for the other backend
    with providers.only("torch"):
        flash_attn_func(q, q, q)
    with pytest.raises(providers.CannotError, match="triton"), providers.only("triton"):
        flash_attn_func(q, q, q)
    flash_attn_func(q, q, q)


def test_reasons_are_one_short_line() -> None:
    assert speed.reason(ValueError("first\nsecond")) == "first"
    assert speed.reason(KeyError()) == "KeyError"
    assert len(speed.reason(ValueError("x" * 500))) == 160
