"""Tables of results in Markdown. Where a suite has not been run, its table is empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashtile.bench.claims import layer_gain
from flashtile.bench.features import SAME_BITS
from flashtile.bench.headline import headline
from flashtile.bench.peers import over_best_peer
from flashtile.bench.record import read
from flashtile.bench.summary import Document, Row, against_plain, milliseconds, ratio, speedup

GPU = "h200"
"""The GPU whose figures README shows."""

FEATURES = {
    "window": "causal, a window of a sixteenth to the left",
    "window full": "the same window, over full attention",
    "softcap": "causal, softcap",
    "alibi": "causal, ALiBi",
    "dropout": "causal, dropout 0.1",
    "documents": "16 documents in a row",
    "prefix": "a mask function: causal, and a prefix that all see",
    "blocks": "bool tensor, random blocks of 128 x 128",
    "mask": "bool tensor that is causal",
    "bias": "bias of every pair",
    "learned bias": "bias of every pair, with its gradient",
    "gqa": "causal, 32 heads on 8 KV heads",
    "mqa": "causal, 32 heads on one KV head",
    "sink": "causal, a learned sink",
    "varlen": "causal, packed lognormal lengths",
    "page 16": "causal, K and V in pages of 16 tokens",
    "page 256": "causal, K and V in pages of 256 tokens",
}

CUTTING = ("window", "window full", "documents", "blocks")
"""Those that leave out blocks, whose gain is worth a sentence."""

DECODE = {
    "page 16": "pages of 16 tokens",
    "page 1": "pages of a token",
    "e4m3 head": "e4m3, a scale for each head",
    "e4m3 token": "e4m3, a scale for each token and head",
    "e4m3 page 16": "e4m3, a scale for each head, pages of 16",
    "append": "a token appended, rotary embedding",
    "append page 16": "a token appended, rotary embedding, pages of 16",
    "queries 4": "4 queries, causal",
    "queries 16": "16 queries, causal",
    "empty rows": "one row, the others empty, pages of 16",
    "long row": "one row, the others of 1,024, pages of 16",
    "latent": "MLA 576/512, pages of 64",
}

PEERS = {"fa2": "FlashAttention-2", "efficient": "SDPA with a mask", "flex": "FlexAttention"}
NAMES = {**PEERS, "cudnn": "cuDNN", "fa3": "FA3"}


def fill_in(results: Path) -> dict[str, str]:
    """Every table of README by name."""
    makers: dict[str, Callable[[Path], str]] = {
        "cpu-speed": cpu_speed,
        "cpu-memory": cpu_memory,
        f"{GPU}-headline": lambda results: headline(results / GPU),
        f"{GPU}-dense": dense,
        f"{GPU}-portable": portable,
        f"{GPU}-features": features,
        f"{GPU}-deterministic": deterministic,
        f"{GPU}-memory": memory,
        f"{GPU}-host": host,
        f"{GPU}-decode": decode,
    }
    return {name: make(results) for name, make in makers.items()}


def dense(results: Path) -> str:
    """TFLOP/s by sequence length, and how many times the best peer's speed that is."""
    document = read(results / GPU / "dense.json")
    if document is None:
        return ""
    gpu = document["environment"]["gpu"]
    gains = [over_best_peer(row, gpu) for row in document["rows"]]
    return "\n".join((
        f"bf16 on an {gpu}, 16,384 tokens, hidden size 2,048: TFLOP/s of "
        f"{_kernels(document['rows'])}, and that over the best",
        "figure of any peer in the same setting: FlashAttention-2, 3 and 4, cuDNN, FlexAttention.",
        "",
        f"![speed by sequence length](benchmarks/results/{GPU}/dense-causal.png)",
        "",
        *_rates(document, "flashtile", gains),
        "",
        _source(document, GPU),
    ))  # fmt: skip


def portable(results: Path) -> str:
    """The same of the portable kernels, over FlashAttention-2."""
    document = read(results / GPU / "dense.json")
    name = "flashtile-triton"
    if document is None or not any(name in row["providers"] for row in document["rows"]):
        return ""
    gains = [ratio(row, "fa2", name) for row in document["rows"]]
    return "\n".join((
        "The portable kernels, which any GPU has, in the same run: TFLOP/s, and that over "
        "PyTorch's FlashAttention-2.",
        "",
        *_rates(document, name, gains),
        "",
        _source(document, GPU),
    ))  # fmt: skip


def _rates(document: Document, name: str, gains: list[float | None]) -> list[str]:
    """A line for each mode, mask and head dim, a column a sequence length."""
    rows = [row | {"gain": gain} for row, gain in zip(document["rows"], gains, strict=True)]
    seqlens = sorted({row["seqlen"] for row in rows})
    lines = [_header("mode, mask, head dim", *(f"{n:,}" for n in seqlens))]
    for backward, head_dim, feature in sorted(
        {(r["mode"] != "fwd", r["head_dim"], r["feature"]) for r in rows}
    ):
        mode = "bwd" if backward else "fwd"
        kind = (mode, head_dim, feature)
        part = {r["seqlen"]: r for r in rows if (r["mode"], r["head_dim"], r["feature"]) == kind}
        text = f"{'backward' if backward else 'forward'}, {feature}, {head_dim}"
        lines.append(_line(text, *(_rate(part.get(n), name) for n in seqlens)))
    return lines


def _kernels(rows: list[Row]) -> str:
    """Whose figures are shown, in words."""
    names = {"triton": "the portable kernels", "hopper": "the Hopper kernels"}
    backends = dict.fromkeys(str(row["backend"]) for row in rows)
    return " and ".join(names.get(name, name) for name in backends)


def _rate(row: Row | None, name: str) -> str:
    ours = {} if row is None else row["providers"].get(name, {})
    if row is None or "tflops" not in ours:
        return ""
    gain = row["gain"]
    return f"{ours['tflops']:.0f}" + ("" if gain is None else f", {gain:.2f}x")


def features(results: Path) -> str:
    """Times, in units of plain attention's and over the peers."""
    document = read(results / GPU / "features.json")
    if document is None:
        return ""
    lines = [
        f"Features at head dim 128, forward / backward, by {_kernels(document['rows'])}: time, "
        "that in units of plain attention's for",
        "the same FLOPs, and how many times faster than the peers that can do it.",
        "",
        _header("", "ms", "over plain", *PEERS.values()),
    ]
    for feature, text in FEATURES.items():
        pair = [r for mode in ("fwd", "bwd") for r in document["rows"]
                if (r["mode"], r["feature"], r["head_dim"]) == (mode, feature, 128)]  # fmt: skip
        if any(milliseconds(r, "flashtile") is not None for r in pair):
            lines.append(_line(
                text, _both(milliseconds(r, "flashtile") for r in pair),
                _both((against_plain(r) for r in pair), "x"),
                *(_both((ratio(r, name) for r in pair), "x") for name in PEERS),
            ))  # fmt: skip
    sentences = [*_gains(document), *_layer(document), *_lengths(document)]
    return "\n".join((*lines, "", *sentences, "", _source(document, GPU)))


def _gains(document: Document) -> list[str]:
    """What masks save, in a sentence a mask."""
    found = []
    for row in document["rows"]:
        gain = speedup(row)
        if row["feature"] in CUTTING and row["head_dim"] == 128 and gain:
            mode = "forward" if row["mode"] == "fwd" else "backward"
            found.append(f"- {FEATURES[row['feature']]}, {mode}: {gain:.1f}x the speed of "
                         f"{row['plain']['feature']} attention.")  # fmt: skip
    return found


def _layer(document: Document) -> list[str]:
    gains = [
        f"{gain:.2f}x {NAMES[name]}" for name in ("fa2", "cudnn")
        if (gain := layer_gain(document["rows"], name)) is not None
    ]  # fmt: skip
    if not gains:
        return []
    return [f"- A Llama 3 8B layer of 8,192 tokens, causal, forward and backward: "
            f"{' and '.join(gains)}."]  # fmt: skip


def _lengths(document: Document) -> list[str]:
    """How cells off the grid of powers of two do."""
    found = [
        f"{row['batch']} x {row['seqlen']:,} x {row['heads']} {1 / cost:.2f}x"
        for row in document["rows"]
        if (row["feature"], row["mode"]) == ("lengths", "fwd") and (cost := against_plain(row))
    ]  # fmt: skip
    if not found:
        return []
    return [f"- Batch x tokens x heads off the grid, forward, the rate of the nearest cell on it: "
            f"{', '.join(found)}."]  # fmt: skip


def deterministic(results: Path) -> str:
    """What gradients cost that are the same bits."""
    document = read(results / GPU / "features.json")
    if document is None:
        return ""
    costs = {
        (row["plain"]["feature"], row["head_dim"], row["seqlen"]): cost
        for row in document["rows"]
        if row["feature"] in SAME_BITS and row["mode"] == "bwd" and (cost := against_plain(row))
    }
    if not costs:
        return ""
    dims, lengths = (sorted({cell[i] for cell in costs}) for i in (1, 2))
    lines = [
        "`deterministic=True`: time of the backward over the default's, "
        f"{' / '.join(f'{n:,}' for n in lengths)} tokens.",
        "",
        _header("mask", *(f"head dim {dim}" for dim in dims)),
    ]
    for mask in dict.fromkeys(mask for mask, _, _ in costs):
        cells = (_both((costs.get((mask, dim, n)) for n in lengths), "x") for dim in dims)
        lines.append(_line(FEATURES.get(mask, mask), *cells))
    return "\n".join((*lines, "", _source(document, GPU)))


def _both(values: Any, unit: str = "") -> str:
    """One / other, a dash for what there is not; nothing where there is neither."""
    found = ["-" if x is None else f"{x:.2f}{unit}" for x in values]
    return "" if set(found) == {"-"} else " / ".join(found)


def memory(results: Path) -> str:
    document = read(results / GPU / "memory.json")
    if document is None:
        return ""
    names = {"flashtile": "flashtile", "fa2": "FlashAttention-2", "math": "SDPA math"}
    lines = ["Peak memory of forward plus backward above the inputs, bf16, causal, one head x 128.",
             "", _header("tokens", *names.values())]  # fmt: skip
    for row in document["rows"]:
        if row["path"] == "causal":
            lines.append(_line(f"{row['seqlen']:,}", *(_mib(row, name) for name in names)))
    return "\n".join((*lines, "", _source(document, GPU)))


def _mib(row: Row, name: str) -> str:
    size = row.get(f"{name}_bytes")
    return "not run" if size is None else f"{size / 2**20:,.0f} MiB"


def host(results: Path) -> str:
    document = read(results / GPU / "host.json")
    if document is None:
        return ""
    rows = {row["mode"]: row["providers"] for row in document["rows"]}
    lines = ["What one eager call costs the host, 1 x 128 tokens x 8 heads x 128.", "",
             _header("microseconds", "without autograd", "with autograd")]  # fmt: skip
    for name in dict.fromkeys(name for providers in rows.values() for name in providers):
        costs = [rows[mode].get(name, {}).get("median_us") for mode in ("no_grad", "autograd")]
        if any(cost is not None for cost in costs):
            text = NAMES.get(name, name)
            lines.append(_line(text, *("" if us is None else f"{us:.1f}" for us in costs)))
    return "\n".join((*lines, "", _source(document, GPU)))


def decode(results: Path) -> str:
    """TB/s of full rows over the peers', and what else a cache may be beside the plain one."""
    document = read(results / GPU / "decode.json")
    if document is None:
        return ""
    rows, gpu = document["rows"], document["environment"]["gpu"]
    dense = [row for row in rows if row["feature"] == "dense"]
    known = ("fa2", "cudnn", "flash-attn", "fa3")
    peers = [name for name in known if any(ratio(row, name) for row in dense)]
    lines = [
        "A decoded token, bf16, 32 heads on 8 KV heads of dim 128, by CUDA graphs with a cold L2 "
        "cache: time, TB/s of K and V,",
        "that over the best figure of any peer, and how many times faster than the peers in the "
        "same run.",
        "",
        _header(
            "batch x tokens", "us", "TB/s", "best peer", *(NAMES.get(name, name) for name in peers)
        ),
    ]
    for row in dense:
        gains = over_best_peer(row, gpu), *(ratio(row, name) for name in peers)
        lines.append(_line(_size(row), *_decoded(row), *(_both([x], "x") for x in gains)))
    return "\n".join((*lines, "", *_other_caches(rows), "", _source(document, GPU)))


def _other_caches(rows: list[Row]) -> list[str]:
    header = _header("", "batch x tokens", "us", "TB/s", "time over the other's")
    lines = ["Other caches and calls, beside the one in the last column.", "", header]
    for row in rows:
        if row["feature"] in DECODE:
            heads = f", {row['heads']} heads" if row["feature"] == "latent" else ""
            text = DECODE[row["feature"]] + heads
            lines.append(_line(text, _size(row), *_decoded(row), _beside(row)))
    return lines


def _size(row: Row) -> str:
    return f"{row['batch']:,} x {row['seqlen']:,}"


def _decoded(row: Row) -> tuple[str, str]:
    """Microseconds and TB/s."""
    ours = row["providers"].get("flashtile", {})
    if "tb_s" not in ours:
        return "", ""
    return f"{1e3 * ours['median_ms']:.1f}", f"{ours['tb_s']:.2f}"


def _beside(row: Row) -> str:
    """The time in units of the plain call's, and what it is more or less."""
    ours, plain = milliseconds(row, "flashtile"), milliseconds(row, "plain")
    if ours is None or plain is None:
        return ""
    other = row["plain"]["feature"]
    return f"{ours / plain:.2f}x, {1e3 * (ours - plain):+.1f} us: {DECODE.get(other, other)}"


def cpu_speed(results: Path) -> str:
    documents = [
        document for suite in ("speed-float32", "speed-bfloat16")
        if (document := read(results / "cpu" / f"{suite}.json")) is not None
    ]  # fmt: skip
    if not documents:
        return ""
    columns = [
        (dtype, n, f"{short}, {n:,}")
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")) for n in (2048, 4096)
    ]  # fmt: skip
    lines = [_header("forward + backward", *(heading for *_, heading in columns))]
    rows = [row for document in documents for row in document["rows"]]
    for feature in dict.fromkeys(row["feature"] for row in rows):
        cells = [row for row in rows if row["feature"] == feature]
        against = "torch's flash kernel" if cells[0]["peer"] == "aten" else "eager"
        by_column = {(row["dtype"], row["seqlen"]): row for row in cells}
        figures = (
            f"{_time(row['flashtile']['median_ms'])}, {row['speedup']:.2f}x" if row else ""
            for row in (by_column.get((dtype, n)) for dtype, n, _ in columns)
        )
        lines.append(_line(f"{feature}, against {against}", *figures))
    return "\n".join((*lines, "", *(_source(document, "cpu") for document in documents)))


def cpu_memory(results: Path) -> str:
    document = read(results / "cpu" / "memory.json")
    if document is None:
        return ""
    lines = [_header("tokens", "flashtile", "standard attention", "ratio")]
    for row in document["rows"]:
        if row["path"] == "causal":
            standard, flash = row.get("standard_bytes"), row["flashtile_bytes"]
            ratio_text = f"{standard / flash:.0f}x" if standard else ""
            theirs = f"{standard / 2**20:.1f} MiB" if standard else "not run"
            lines.append(
                _line(f"{row['seqlen']:,}", f"{flash / 2**20:.1f} MiB", theirs, ratio_text)
            )
    return "\n".join(lines) + "\n\n" + _source(document, "cpu")


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _header(*names: str) -> str:
    return _line(*names) + "\n" + "|" + "---|" * len(names)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _source(document: Document, device: str) -> str:
    """Where figures come from: machine, versions, commit, file."""
    env = document["environment"]
    where = (
        f"{env['gpu']} (driver {env['driver']}, CUDA {env['cuda']}, Triton {env['triton']})"
        if "gpu" in env
        else f"{env['cpu']} ({env['capability']}, {env['threads']} threads)"
    )
    return (
        f"{where}, torch {env['torch']}, commit {env['commit'][:9]}, {env['date'][:10]}: "
        f"`benchmarks/results/{device}/{document['suite']}.json`."
    )
