"""What is made of results: verdicts, tables and plots, from documents as a GPU would have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flashtile.bench import plots, summary, tables
from flashtile.bench.claims import claims

ENVIRONMENT = {
    "date": "2026-11-21 12:00 UTC", "commit": "a" * 40, "dirty": False, "torch": "2.11.0+cu130",
    "cpu": "EPYC", "gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "cudnn": 91900,
    "triton": "3.6.0",
}  # fmt: skip


def timed(ms: float, flops: float = 1e12) -> dict[str, Any]:
    return {"median_ms": ms, "fastest_ms": ms, "slowest_ms": ms, "tflops": flops / ms / 1e9}


def row(feature: str, mode: str, seqlen: int = 16384, head_dim: int = 128, **providers: Any) -> Any:
    return {
        "feature": feature, "mode": mode, "batch": 16384 // seqlen, "seqlen": seqlen,
        "heads": 2048 // head_dim, "kv_heads": 2048 // head_dim, "head_dim": head_dim,
        "backend": "triton", "flops": 1e12, "providers": providers,
    }  # fmt: skip


def document(suite: str, rows: list[Any]) -> dict[str, Any]:
    return {"suite": suite, "environment": ENVIRONMENT, "rows": rows}


def dense(forward_ms: float = 1.0, flex_ms: float = 1.2, **portable: Any) -> dict[str, Any]:
    """FlashAttention-2 takes 2 ms everywhere, cuDNN fails."""
    return document("dense", [
        row(mask, mode, seqlen, head_dim, flashtile=timed(ms), fa2=timed(2.0), **portable,
            cudnn={"reason": "out has a relative error of 0.5"},
            **({"flex": timed(flex_ms)} if seqlen == 16384 else {}))
        for mode, ms in (("fwd", forward_ms), ("bwd", 1.6))
        for mask in ("full", "causal") for head_dim in (64, 128) for seqlen in (4096, 16384)
    ])  # fmt: skip


def features(**milliseconds: float) -> dict[str, Any]:
    """Each feature's time against a plain one of 10 ms; masks see a tenth."""
    rows = []
    for feature, ms in milliseconds.items():
        found = row(feature, "fwd", flashtile=timed(ms), plain=timed(10.0), flex=timed(20.0),
                    fa2={"reason": "no"})  # fmt: skip
        masked = feature in ("window", "documents")
        found["plain"] = {"feature": "full" if feature == "documents" else "causal",
                          "flops": 1e13 if masked else 1e12}  # fmt: skip
        rows.append(found)
    return document("features", rows)


def ordered(ms: float = 11.5, seqlen: int = 4096, head_dim: int = 128) -> list[Any]:
    found = row("deterministic", "bwd", seqlen, flashtile=timed(ms), plain=timed(10.0))
    found["head_dim"] = head_dim
    return [found | {"backend": "hopper", "plain": {"feature": "causal", "flops": 1e12}}]


def memory(last: float = 2.0) -> dict[str, Any]:
    return document("memory", [
        {"path": "causal", "seqlen": 1024, "flashtile_bytes": 2**20, "math_bytes": 2**24},
        {"path": "causal", "seqlen": 2048, "flashtile_bytes": int(last * 2**20)},
    ])  # fmt: skip


def host(us: float = 10.0) -> dict[str, Any]:
    return document("host", [
        {**row("full", mode, 128), "providers": {"flashtile": {"median_us": us},
                                                 "fa3": {"reason": "absent"}}}
        for mode in ("no_grad", "autograd")
    ])  # fmt: skip


def cached(feature: str, batch: int, seqlen: int, heads: int = 32, **us: float) -> Any:
    """A row of the suite decode; providers by their microseconds, for 1e8 bytes."""
    latent = feature == "latent"
    found = {
        "feature": feature, "batch": batch, "seqlen": seqlen, "heads": heads,
        "kv_heads": 1 if latent else 8, "head_dim": 576 if latent else 128, "bytes": 10**8,
        "mode": "decode", "backend": "decode", "providers": {
            name: {"median_ms": x / 1e3, "tb_s": 1e8 / x / 1e6} for name, x in us.items()},
    }  # fmt: skip
    return found | ({"plain": {"feature": "dense"}} if "plain" in us else {})


def decode(**plain: float) -> dict[str, Any]:
    """Two full rows, one beside cuDNN; calls of 100 us by the microseconds of the plain one."""
    return document("decode", [
        cached("dense", 32, 4096, flashtile=20.0, cudnn=25.0),
        cached("dense", 1, 524288, flashtile=25.0),
        *(cached(name.replace("_", " "), 32, 4096, flashtile=100.0, plain=us)
          for name, us in plain.items()),
        cached("latent", 32, 4096, 128, flashtile=40.0),
    ])  # fmt: skip


def _verdicts(document: dict[str, Any]) -> dict[str, bool]:
    return {claim.what: claim.holds for claim in claims(document)}


def test_dense_claims() -> None:
    found = claims(dense())
    assert [(round(c.measured, 3), c.limit, c.holds) for c in found] == [
        (2.0, 1.30, True), (1.25, 1.15, True), (0.75, 0.95, False),
    ]  # fmt: skip
    assert "bwd full" in found[2].what
    assert str(found[0]).startswith("pass  triton, fwd over FlashAttention-2")
    assert str(found[2]).startswith("FAIL")
    assert not claims(dense(forward_ms=1.6))[0].holds


def test_features_claims() -> None:
    assert all(_verdicts(features(window=1.9, documents=1.6, softcap=12.4, mask=12.9)).values())
    assert not any(_verdicts(features(window=2.1, documents=1.7, softcap=12.6, mask=13.1)).values())
    assert _verdicts(features(bias=99.0)) == {}
    [wide] = features(**{"window full": 1.2})["rows"]
    for backend, verdicts in (("triton", []), ("hopper", [True])):
        found = claims(document("features", [wide | {"backend": backend}]))
        assert [c.holds for c in found] == verdicts
    [claim] = claims(document("features", ordered()))
    assert (claim.measured, claim.limit) == (pytest.approx(1.15), 1.15)


def layer(backward: float = 20.0) -> list[Any]:
    """Forward and backward of a layer: 10 ms and `backward`, others twice and three times 15."""
    return [
        row("layer", mode, 8192, flashtile=timed(ms), cudnn=timed(30.0), fa2=timed(45.0))
        | {"plain": {"feature": "causal", "flops": 1e12}}
        for mode, ms in (("fwd", 10.0), ("bwd", backward))
    ]  # fmt: skip


def test_a_layers_claims_are_over_others() -> None:
    """Of forward and backward together, or none."""
    found = claims(document("features", layer()))
    assert [(c.measured, c.limit, c.holds) for c in found] == [(2.0, 1.15, True), (3.0, 1.9, True)]
    assert not any(c.holds for c in claims(document("features", layer(50.0))))
    assert claims(document("features", layer()[:1])) == []


def test_each_backend_has_claims_of_its_own() -> None:
    """The portable kernels, beside those of the GPU, against their own plain attention."""
    document = features(window=1.5, softcap=11.5)
    for found in document["rows"]:
        found["backend"] = "hopper"
        found["providers"] |= {"flashtile-triton": timed(12.0), "plain-triton": timed(10.0)}
    assert [(c.what.partition(",")[0], c.holds) for c in claims(document)] == [
        ("triton", False), ("hopper", False), ("triton", True),
    ]  # fmt: skip
    assert summary.speedup(document["rows"][0], "flashtile-triton") == pytest.approx(10 / 12)


def test_claims_are_not_over_another_backends_plain_attention() -> None:
    """Where the plan takes the portable kernels for a feature and Hopper's without it."""
    document = features(softcap=12.0)
    for found in document["rows"]:
        found["plain"]["backend"] = "hopper"
        found["providers"] |= {"flashtile-triton": timed(12.0), "plain-triton": timed(10.0)}
    assert [(c.measured, c.holds) for c in claims(document)] == [(1.2, True)]


def test_claims_over_the_best_peer() -> None:
    """Figures of other libraries are for the suite's own setting, on a GPU of that name."""
    rows = [row("full", "fwd", seqlen, flashtile=timed(1.0, flops)) for seqlen, flops in
            ((512, 1.1 * 516.1e9), (16384, 0.95 * 691.1e9))]  # fmt: skip
    wide = row("causal", "bwd", 512, 256, flashtile=timed(1.0), cudnn=timed(1.2))
    for found in (*rows, wide):
        found["backend"] = "hopper"
    mean, worst, over_cudnn = claims(document("dense", [*rows, wide]))
    assert (round(mean.measured, 2), mean.holds) == (1.02, True)
    assert (round(worst.measured, 2), worst.holds) == (0.95, False)
    assert "16,384" in worst.what
    assert (round(over_cudnn.measured, 2), over_cudnn.holds) == (1.2, True)
    other = document("dense", [{**rows[0], "batch": 1}])
    assert claims(other) == []
    elsewhere = document("dense", rows)
    elsewhere["environment"] = ENVIRONMENT | {"gpu": "NVIDIA H100"}
    assert claims(elsewhere) == []


def test_a_masks_overhead_is_for_the_same_work() -> None:
    [row] = features(window=2.0)["rows"]
    assert summary.speedup(row) == pytest.approx(5.0)
    assert summary.against_plain(row) == pytest.approx(2.0)


def test_memory_and_host_claims() -> None:
    assert [c.holds for c in claims(memory())] == [True]
    assert [c.holds for c in claims(memory(last=3.5))] == [False]
    for size, holds in ((2.0, True), (1.99, False)):
        beside = memory()
        for row in beside["rows"]:
            row["fa2_bytes"] = size * row["seqlen"] * 2**9
        assert [c.holds for c in claims(beside)] == [True, holds]
    assert [c.holds for c in claims(host())] == [True, True]
    assert [c.holds for c in claims(host(us=15.1))] == [False, True]
    assert [c.holds for c in claims(host(us=25.1))] == [False, False]


def test_decode_claims() -> None:
    """Full rows by the peers' figures of 4.02 and 4.42 TB/s, the others by the plain call."""
    first, second, *others = claims(decode())
    assert [(c.what, c.measured, c.limit, c.holds) for c in (first, second)] == [
        ("TB/s, decode dense 32 x 4,096 x 32/8 x 128", pytest.approx(5.0), 4.02, True),
        ("TB/s, decode dense 1 x 524,288 x 32/8 x 128", pytest.approx(4.0), 4.42, False),
    ]
    assert others == []
    good = decode(page_16=96.0, page_1=88.0, e4m3_head=171.0, append=97.1, append_page_16=97.1,
                  queries_4=88.0, queries_16=88.0, empty_rows=92.0, long_row=81.0)  # fmt: skip
    assert [c.holds for c in claims(good)[2:]] == [True] * 9
    bad = decode(page_16=94.0, page_1=86.0, e4m3_head=169.0, append=96.9, append_page_16=96.9,
                 queries_4=86.0, queries_16=86.0, empty_rows=90.0, long_row=79.0)  # fmt: skip
    assert [c.holds for c in claims(bad)[2:]] == [False] * 9
    [appended] = claims(decode(append=98.0))[2:]
    assert (appended.measured, appended.limit) == (pytest.approx(2.0), 3.0)
    assert claims(decode(e4m3_token=100.0, e4m3_page_16=100.0))[2:] == []


def test_decode_claims_over_peers_are_of_their_gpu() -> None:
    elsewhere = decode(page_16=99.0)
    elsewhere["environment"] = ENVIRONMENT | {"gpu": "NVIDIA H100"}
    assert [c.what.partition(",")[0] for c in claims(elsewhere)] == ["decode page 16 32 x 4"]


def test_a_call_that_failed_has_no_claims() -> None:
    document = decode(page_16=99.0)
    for found in document["rows"]:
        found["providers"]["flashtile"] = {"reason": "out of row 0: rms error"}
    assert claims(document) == []


def test_geometric_means_and_worst_cells() -> None:
    found = summary.lines(dense())
    assert len(found) == 2 * 2 * 3  # modes, head dims, three peers: cudnn has no time
    assert "fwd head dim  64 over fa2               2.00x of  4 cells, worst  2.00x" in found[0]


def test_claims_are_a_gpus() -> None:
    document = dense()
    document["environment"] = {"cpu": "EPYC"}
    assert claims(document) == []


def test_lines_of_rows() -> None:
    line = summary.speed_line(dense()["rows"][0])
    assert "1000 TFLOP/s; fa2 2.00x, cudnn no: out has a relative error" in line
    assert "flashtile 10.0 us, fa3 no: absent" in summary.host_line(host()["rows"][0])
    assert "flashtile 1.0 MiB, math 16.0 MiB" in summary.memory_line(memory()["rows"][0])
    assert "10/2" not in line
    first, *_, last = decode()["rows"]
    assert "x 32/8 x 128         decode      20.0 us    5.00 TB/s; cudnn 1.25x" in (
        summary.speed_line(first)
    )
    assert summary.speed_line(last).endswith(" 2.50 TB/s")
    [over_cudnn, over_best] = summary.lines(decode())
    assert "decode head dim 128 over cudnn             1.25x of  1 cells" in over_cudnn
    assert "worst  0.90x: decode dense 1 x 524,288" in over_best


def _folder(root: Path) -> Path:
    """Results of every suite."""
    folder = root / tables.GPU
    folder.mkdir()
    measured = dense(**{"flashtile-triton": timed(2.0)})
    cached = decode(page_1=96.0, append=98.0)
    kinds = features(window=2.0, softcap=12.0, lengths=12.5)
    kinds["rows"] += [*layer(), *ordered(), *ordered(11.0, 16384), *ordered(12.0, 16384, 64)]
    for found in (measured, kinds, memory(), host(), cached):
        (folder / f"{found['suite']}.json").write_text(json.dumps(found))
    return folder


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    _folder(tmp_path)
    found = tables.fill_in(tmp_path)

    assert "| forward, causal, 128 | 1000, 1.59x | 1000, 1.48x |" in found["h200-dense"]
    assert "| forward, causal, 128 | 500, 1.00x | 500, 1.00x |" in found["h200-portable"]
    assert "dense-causal.png" in found["h200-dense"]
    assert "TFLOP/s of the portable kernels" in found["h200-dense"]
    assert "| 2.00 | 2.00x |  |  | 10.00x |" in found["h200-features"]
    assert "forward: 5.0x the speed of causal attention" in found["h200-features"]
    assert "forward and backward: 3.00x FlashAttention-2 and 2.00x cuDNN." in found["h200-features"]
    assert "1 x 16,384 x 16 0.80x." in found["h200-features"]
    assert "default's, 4,096 / 16,384 tokens." in found["h200-deterministic"]
    assert "| causal | - / 1.20x | 1.15x / 1.10x |" in found["h200-deterministic"]
    assert "| 2,048 | 2 MiB | not run | not run |" in found["h200-memory"]
    assert "| flashtile | 10.0 | 10.0 |" in found["h200-host"] and "fa3" not in found["h200-host"]
    forward, _, decoded, portable, _ = found["h200-headline"].splitlines()
    assert forward.startswith("- Forward: 1000 to 1000 TFLOP/s, ")
    assert "1.00x to 1.00x (mean 1.00x) at head dim 64" in portable
    assert decoded.startswith("- A decoded token: 4.00 to 5.00 TB/s of K and V, 0.90x to 1.24x (")
    full, others = found["h200-decode"].split("Other caches")
    assert "| 32 x 4,096 | 20.0 | 5.00 | 1.24x | 1.25x |" in full
    assert "| 1 x 524,288 | 25.0 | 4.00 | 0.90x |  |" in full and "FlashAttention-2" not in full
    assert "| pages of a token | 32 x 4,096 | 100.0 | 1.00 | 1.04x, +4.0 us: dense |" in others
    assert "| MLA 576/512, pages of 64, 128 heads | 32 x 4,096 | 40.0 | 2.50 |  |" in others
    for name in ("dense", "portable", "features", "deterministic", "memory", "host"):
        lines = found[f"h200-{name}"].splitlines()
        assert "NVIDIA H200 (driver 580.1, CUDA 13.0, Triton 3.6.0), torch 2.11.0" in lines[-1]
        widths = {len(re.findall(r"\|", line)) for line in lines if line.startswith("|")}
        assert len(widths) == 1


def test_tables_of_no_results_are_empty(tmp_path: Path) -> None:
    assert set(tables.fill_in(tmp_path).values()) == {""}


def test_plots(tmp_path: Path) -> None:
    written = plots.draw(_folder(tmp_path))

    names = ["dense-causal.png", "dense-full.png", "features.png", "memory.png"]
    assert [path.name for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_every_cell_of_a_feature_is_drawn() -> None:
    """Those off the grid differ in tokens and heads; the last one stood for all."""
    cells = [("lengths", 1000, 16), ("lengths", 4096, 12), ("gqa", 4096, 32)]
    times = {name: {"median_ms": 2.0} for name in ("flashtile", "plain")}
    rows = [{"feature": feature, "seqlen": seqlen, "heads": heads, "head_dim": 128, "mode": mode,
             "batch": 1, "kv_heads": heads, "backend": "hopper", "flops": 1e9, "providers": times,
             "plain": {"flops": 1e9, "backend": "hopper"}}
            for feature, seqlen, heads in cells for mode in ("fwd", "bwd")]  # fmt: skip
    figure = plots.draw_features({"suite": "features", "environment": ENVIRONMENT, "rows": rows})
    [axes] = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["gqa", "lengths, 4,096 x 12", "lengths, 1,000 x 16"]
    assert [len(bars) for bars in axes.containers] == [3, 3]


def test_no_results_draw_no_plots(tmp_path: Path) -> None:
    assert plots.draw(tmp_path) == []
