"""Calls over a cache: what is measured, that it is checked, and that one graph has all lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_with_kvcache
from flashtile.bench import caches, decode
from flashtile.bench.caches import Cache, CacheCell, Turn
from flashtile.bench.options import HEAD_DIMS, Options
from flashtile.bench.peers import best_of_peers

CPU = torch.device("cpu")
Make = Callable[..., Options]


@pytest.fixture
def whole(options: Make) -> list[decode.Pair]:
    """The cells of full size."""
    return list(decode.cells(options(tokens=16384, hidden=2048)))


def _measure(options: Make, feature: str, **changes: object) -> list[dict[str, Any]]:
    asked = options(features=(feature,), head_dims=HEAD_DIMS, **changes)
    return list(decode.measure(asked))


def test_full_rows_are_those_of_the_peers(whole: list[decode.Pair]) -> None:
    rows = [cell.row() | {"mode": "decode"} for cell, _ in whole if cell.feature == "dense"]
    best = [best_of_peers(row, "NVIDIA H200") for row in rows]

    assert best == [1.04, 3.41, 4.42, 3.44, 4.02, 4.50, 4.21]
    assert rows[0]["bytes"] == 4096 * 8 * (128 + 128) * 2
    assert best_of_peers(rows[0] | {"heads": 16}, "NVIDIA H200") is None


def test_cells_have_names_and_plain_ones(whole: list[decode.Pair]) -> None:
    assert tuple(dict.fromkeys(cell.feature for cell, _ in whole)) == decode.FEATURES
    for cell, plain in whole:
        assert (plain is None) == (cell.feature in ("dense", "latent"))
        # The plain cell has as many tokens in use: times say what bandwidths would.
        assert plain is None or sum(plain.rows) == sum(cell.rows)
        halves = 2 if cell.scales else 1
        assert plain is None or plain.bytes == halves * cell.bytes
    identities = [tuple(cell.row()[n] for n in ("feature", "batch", "seqlen", "heads"))
                  for cell, _ in whole]  # fmt: skip
    assert len(set(identities)) == len(identities)


def test_lengths_of_unequal_rows(whole: list[decode.Pair]) -> None:
    pairs = {cell.feature: (cell, plain) for cell, plain in whole}
    one, alone = pairs["empty rows"]
    mixed, equal = pairs["long row"]

    assert one.rows == (500_000, *[0] * 1023) and alone is not None and alone.rows == (500_000,)
    assert mixed.rows == (131072, *[1024] * 127) and equal is not None
    assert equal.rows == (2040,) * 128
    assert "lengths" not in mixed.row() and mixed.row()["tokens"] == 128 * 2040


@pytest.mark.parametrize("feature", [f for f in decode.FEATURES if f != "empty rows"])
def test_every_cell_runs_beside_its_plain_one(feature: str, options: Make) -> None:
    rows = _measure(options, feature, seqlens=() if feature != "dense" else (16, 32))

    assert rows
    for row in rows:
        found = row["providers"]
        names = {"dense": ["flashtile", "math"], "latent": ["flashtile"]}
        assert list(found) == names.get(feature, ["flashtile", "plain"])
        for name, result in found.items():
            size = row["plain"]["bytes"] if name == "plain" else row["bytes"]
            assert result["tb_s"] == pytest.approx(size / result["median_ms"] / 1e9), result
        assert (row["feature"], row["mode"], row["backend"]) == (feature, "decode", "torch")


def test_head_dims_may_be_chosen(options: Make) -> None:
    assert list(decode.measure(options(features=("latent",), head_dims=(128,)))) == []


def _cell(**changes: Any) -> CacheCell:
    return CacheCell("any", 3, 40, 4, 2, 32, **changes)


CELLS = {
    "dense": _cell(),
    "pages": _cell(page_size=16),
    "e4m3": _cell(scales="token", page_size=1),
    "append": _cell(append=True, page_size=7),
    "queries": _cell(queries=5),
    "lengths": _cell(lengths=(40, 0, 3), page_size=4),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_gate_passes_what_is_right_and_catches_what_is_not(
    cell: CacheCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Cache(cell, cell.rows, CPU).checked("flashtile", cell.rows)
    assert right().shape == (3, cell.queries, 4, 32)

    def wrong(*operands: Tensor, **keywords: Any) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(*operands, **keywords)
        out[0, :, 1] *= 1.05  # one head of the first KV head
        return out

    monkeypatch.setattr(caches, "flash_attn_with_kvcache", wrong)
    with pytest.raises(AssertionError, match="out of row 0: rms error"):
        Cache(cell, cell.rows, CPU).checked("flashtile", cell.rows)


def test_gate_looks_at_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*operands: Tensor, **keywords: Any) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(*operands, **keywords)
        operands[2][2, int(keywords["cache_seqlens"][2])] += 1.0
        return out

    monkeypatch.setattr(caches, "flash_attn_with_kvcache", wrong)
    cell = _cell(append=True)
    with pytest.raises(AssertionError, match="appended to row 2"):
        Cache(cell, cell.rows, CPU).checked("flashtile", cell.rows)


def test_gate_looks_at_rows_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        caches,
        "flash_attn_with_kvcache",
        lambda *operands, **keywords: flash_attn_with_kvcache(*operands, **keywords).masked_fill(
            (keywords["cache_seqlens"] == 0)[:, None, None, None], 1.0
        ),
    )
    cell = CELLS["lengths"]
    with pytest.raises(AssertionError, match="without tokens"):
        Cache(cell, cell.rows, CPU).checked("flashtile", cell.rows)


def test_a_wrong_call_has_a_reason_and_no_time(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignorant(*operands: Tensor, cache_seqlens: Tensor, **keywords: Any) -> Any:
        return flash_attn_with_kvcache(*operands, **keywords)

    monkeypatch.setattr(caches, "flash_attn_with_kvcache", ignorant)
    [row] = _measure(options, "long row")
    assert "out of row 0: rms error" in row["providers"]["flashtile"]["reason"]
    assert row["providers"].keys() == {"flashtile", "plain"}


def test_one_capture_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []
    capture = Cache._captured

    def counted(self: Cache, name: str) -> Callable[[], Tensor]:
        captured.append(name)
        return capture(self, name)

    monkeypatch.setattr(Cache, "_captured", counted)
    cell = CELLS["lengths"]
    cache = Cache(cell, (40, 9, 9), CPU)
    unequal, equal = (cache.checked("flashtile", rows) for rows in (cell.rows, (9, 9, 9)))
    assert captured == ["flashtile"]

    heard: list[list[int]] = []
    clock = decode._Told(lambda function, calls: [float(function() is None)] * calls)
    for turn in (unequal, equal, unequal):
        told = Turn(lambda turn=turn: heard.append(turn.lengths.tolist()),  # type: ignore[misc]
                    turn.lengths, turn.wanted)  # fmt: skip
        assert clock(told, 2) == [1.0, 1.0]
    assert heard == [[40, 0, 3], [9, 9, 9], [40, 0, 3]]


def test_a_cell_and_its_equal_rows_are_one_capture(
    options: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CacheCell] = []
    draw = Cache.__init__

    def noted(self: Cache, cell: CacheCell, *others: Any) -> None:
        made.append(cell)
        draw(self, cell, *others)

    monkeypatch.setattr(Cache, "__init__", noted)
    _measure(options, "long row")
    assert [cell.feature for cell in made] == ["long row"]
    _measure(options, "append page 16")
    assert [cell.feature for cell in made] == ["long row", "append page 16", "page 16"]


def test_other_libraries_get_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3 calls the block table by another name."""
    heard: dict[str, set[str]] = {}

    class Library:
        def __init__(self, module: str) -> None:
            self._module = module

        def flash_attn_with_kvcache(self, *operands: Tensor, **keywords: Any) -> tuple[Tensor]:
            heard[self._module] = set(keywords)
            keywords["block_table"] = keywords.pop("page_table", keywords.get("block_table"))
            return (flash_attn_with_kvcache(*operands, **keywords),)

    monkeypatch.setattr(caches, "import_module", Library)
    cell = CELLS["append"]
    for name in ("fa3", "flash-attn"):
        Cache(cell, cell.rows, CPU).checked(name, cell.rows)
    new = {"k", "v", "rotary_cos", "rotary_sin", "rotary_interleaved"}
    assert heard == {
        "flash_attn_interface": new | {"cache_seqlens", "causal", "page_table"},
        "flash_attn": new | {"cache_seqlens", "causal", "block_table"},
    }


def test_a_library_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    math = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *x, **y: 1.1 * math(*x, **y)
    )
    with pytest.raises(AssertionError, match=r"row 0 has a relative error of 0\.1"):
        Cache(_cell(), _cell().rows, CPU).checked("math", _cell().rows)


def test_flex_attention_is_not_measured() -> None:
    with pytest.raises(caches.providers.CannotError, match="flex is not measured"):
        Cache(_cell(), _cell().rows, CPU).checked("flex", _cell().rows)


def test_page_tables_have_no_page_twice() -> None:
    table, pages = caches._page_table((33, 0, 16, 1), 16)

    assert (table.shape, pages) == ((4, 16), 5)
    used = [*table[0, :3].tolist(), table[2, 0].item(), table[3, 0].item()]
    assert sorted(used) == [0, 1, 2, 3, 4]
