"""The project's claims, and whether a suite's figures bear them out.

Pure functions of a suite's document, so that anyone can have them from the JSON.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import NamedTuple

from flashtile.bench.features import SAME_BITS
from flashtile.bench.peers import best_of_peers, over_best_peer
from flashtile.bench.summary import (
    Document,
    Row,
    against_plain,
    cell_text,
    milliseconds,
    own,
    ratio,
    speedup,
)

SPEEDUPS = {
    ("triton", "fwd"): {"window": 5.0, "documents": 6.0},
    ("triton", "bwd"): {"window": 5.0, "documents": 6.0},
    ("hopper", "fwd"): {"window full": 8.0},
}
"""The least that masks must gain over the plain attention that they cut, at 16,384 tokens."""

_TRITON = {"dropout": 1.25, "softcap": 1.25, "alibi": 1.25, "mask": 1.30, "varlen": 1.10}

OVERHEADS = {
    ("triton", "fwd"): _TRITON,
    ("triton", "bwd"): _TRITON,
    ("hopper", "fwd"): {"softcap": 1.12, "alibi": 1.12, "sink": 1.12, "varlen": 1.05, "gqa": 1.03,
                        "mqa": 1.03, "lengths": 1.06, "page 16": 1.10, "page 256": 1.03},
    ("hopper", "bwd"): {"varlen": 1.06, "gqa": 1.05, **dict.fromkeys(SAME_BITS, 1.15)},
}  # fmt: skip
"""The most time that features may take, for the same work, in units of plain attention's."""

OVER_FA2 = {"fwd": 1.30, "bwd": 1.15}
"""The least geometric mean of the portable kernels' dense speed over FlashAttention-2's, at head
dims 64 and 128."""

OF_FLEX = 0.95
"""The least dense speed over FlexAttention's, in any cell."""

OVER_PEERS = {"fwd": (1.02, 0.96), "bwd": (1.00, 0.93)}
"""The least speed of the Hopper kernels over the best peer's figure: geometric mean, any cell."""

OVER_CUDNN = 1.12
"""The least geometric mean of the Hopper backward over cuDNN's at head dim 256, where no other peer
was measured."""

LAYER = {"cudnn": 1.15, "fa2": 1.90}
"""The least speed of forward plus backward of a layer's attention over others'."""

HOST_US = {"no_grad": 15.0, "autograd": 25.0}
"""The most that one eager call may take of the host."""

DECODE_OVERHEADS = {
    "page 16": 1.05, "page 1": 1.15, "queries 4": 1.15, "queries 16": 1.15, "empty rows": 1.10,
}  # fmt: skip
"""The most time that a call over a cache may take, in units of the plain one's."""

DECODE_SPEEDUPS = {"e4m3 head": 1.70, "long row": 0.80}
"""The least speed of others, in units of the plain one's."""

APPEND_US = 3.0
"""The most that appending a token to each row, turned, may add to the time of attention alone."""

LINEAR = 2.05
"""The most that twice the tokens may take of memory."""

MEMORY_OF_FA2 = 1.0
"""The most memory, in units of FlashAttention-2's."""


class Claim(NamedTuple):
    """Something that the project promises, and what was measured."""

    what: str
    measured: float
    limit: float
    at_least: bool  # or at most

    @property
    def holds(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        verdict = "pass" if self.holds else "FAIL"
        side = "at least" if self.at_least else "at most"
        return f"{verdict}  {self.what}: {self.measured:.2f}, {side} {self.limit:.2f}"


def claims(document: Document) -> list[Claim]:
    """Those that a suite's rows decide."""
    by_suite = {"dense": dense_claims, "features": feature_claims, "memory": memory_claims,
                "host": host_claims, "decode": decode_claims}  # fmt: skip
    suite, gpu = document["suite"], document["environment"].get("gpu")
    if gpu is None or suite not in by_suite:
        return []
    found = by_suite[suite](document["rows"])
    if suite == "dense":
        found += peer_claims(document["rows"], gpu)
    elif suite == "decode":
        found = bandwidth_claims(document["rows"], gpu) + found
    return found


def dense_claims(rows: list[Row]) -> list[Claim]:
    found = []
    for mode, least in OVER_FA2.items():
        gains = [
            gain for row in rows if row["mode"] == mode and row["head_dim"] <= 128
            for name, backend in own(row)
            if backend == "triton" and (gain := ratio(row, "fa2", name)) is not None
        ]  # fmt: skip
        if gains:
            what = f"triton, {mode} over FlashAttention-2, geometric mean of {len(gains)} cells"
            found.append(Claim(what, geometric_mean(gains), least, True))
    flexes = [(g, r) for r in rows for name, _ in own(r) if (g := ratio(r, "flex", name))]
    if flexes:
        least, row = min(flexes, key=lambda pair: pair[0])
        found.append(Claim(f"worst over FlexAttention, {cell_text(row)}", least, OF_FLEX, True))
    return found


def peer_claims(rows: list[Row], gpu: str) -> list[Claim]:
    """The Hopper kernels over the best figure of any peer; backward at head dim 256 over cuDNN."""
    found = []
    for mode, (mean, least) in OVER_PEERS.items():
        part = [row for row in rows if (row["mode"], row["backend"]) == (mode, "hopper")]
        gains = [(g, r) for r in part if (g := over_best_peer(r, gpu)) is not None]
        if gains:
            worst, row = min(gains, key=lambda pair: pair[0])
            what = f"hopper, {mode} over the best peer's figure"
            found += [
                Claim(f"{what}, geometric mean of {len(gains)} cells",
                      geometric_mean(g for g, _ in gains), mean, True),
                Claim(f"{what}, worst cell, {cell_text(row)}", worst, least, True),
            ]  # fmt: skip
        wide = [
            g for r in part if r["head_dim"] == 256 and mode == "bwd" and (g := ratio(r, "cudnn"))
        ]
        if wide:
            what = f"hopper, bwd over cuDNN at head dim 256, geometric mean of {len(wide)} cells"
            found.append(Claim(what, geometric_mean(wide), OVER_CUDNN, True))
    return found


def feature_claims(rows: list[Row]) -> list[Claim]:
    """Of each backend over its own plain attention; a layer's over others."""
    found = [
        claim for row in rows for name, backend in own(row)
        if name != "flashtile" or row["plain"].get("backend", backend) == backend
        for claim in _row_claims(row, name, backend)
    ]  # fmt: skip
    return found + [
        Claim(f"forward and backward of a layer over {other}", gain, least, True)
        for other, least in LAYER.items() if (gain := layer_gain(rows, other)) is not None
    ]  # fmt: skip


def layer_gain(rows: list[Row], other: str) -> float | None:
    """Speed over another's of a layer's attention, forward and backward together."""
    pair = [row for row in rows if row["feature"] == "layer"]
    ours, theirs = ([milliseconds(row, name) for row in pair] for name in ("flashtile", other))
    if len(pair) != 2 or None in (*ours, *theirs):
        return None
    return sum(theirs) / sum(ours)  # type: ignore[arg-type]


def _row_claims(row: Row, name: str, backend: str) -> list[Claim]:
    feature, plain = row["feature"], row["plain"]["feature"]
    gain, cost = speedup(row, name), against_plain(row, name)
    least = SPEEDUPS.get((backend, row["mode"]), {}).get(feature)
    most = OVERHEADS.get((backend, row["mode"]), {}).get(feature)
    if gain is not None and least is not None:
        return [Claim(f"{backend}, {cell_text(row)}, faster than {plain}", gain, least, True)]
    if cost is not None and most is not None:
        return [Claim(f"{backend}, {cell_text(row)}, time over {plain}", cost, most, False)]
    return []


def memory_claims(rows: list[Row]) -> list[Claim]:
    """Growth over the last doubling, by when what is constant no longer counts; the most of any
    length in units of FlashAttention-2's."""
    found = []
    for path in dict.fromkeys(row["path"] for row in rows):
        part = [row for row in rows if row["path"] == path]
        sizes = {r["seqlen"]: r["flashtile_bytes"] for r in part}
        longest = max(sizes)
        if longest // 2 in sizes:
            growth = sizes[longest] / sizes[longest // 2]
            what = f"{path}, memory of {longest:,} tokens over that of half of them"
            found.append(Claim(what, growth, LINEAR, False))
        beside = [r for r in part if "fa2_bytes" in r]
        if beside:
            most, seqlen = max((sizes[r["seqlen"]] / r["fa2_bytes"], r["seqlen"]) for r in beside)
            what = f"{path}, memory of {seqlen:,} tokens over FlashAttention-2's, most"
            found.append(Claim(what, most, MEMORY_OF_FA2, False))
    return found


def host_claims(rows: list[Row]) -> list[Claim]:
    return [
        Claim(f"microseconds of a call, {row['mode']}", us, HOST_US[row["mode"]], False)
        for row in rows
        if (us := row["providers"].get("flashtile", {}).get("median_us")) is not None
    ]


def bandwidth_claims(rows: list[Row], gpu: str) -> list[Claim]:
    """Decoding at the best figure of any peer."""
    return [
        Claim(f"TB/s, {cell_text(row)}", ours, best, True)
        for row in rows
        if (best := best_of_peers(row, gpu)) is not None
        and (ours := row["providers"].get("flashtile", {}).get("tb_s")) is not None
    ]


def decode_claims(rows: list[Row]) -> list[Claim]:
    """Calls over a cache beside the plain ones that took turns with them."""
    return [claim for row in rows for claim in _decode_claims(row)]


def _decode_claims(row: Row) -> list[Claim]:
    feature, gain = row["feature"], speedup(row)
    ours, alone = milliseconds(row, "flashtile"), milliseconds(row, "plain")
    if gain is None or ours is None or alone is None:
        return []
    text, plain = cell_text(row), row["plain"]["feature"]
    if feature.startswith("append"):
        added = 1e3 * (ours - alone)
        return [Claim(f"{text}, microseconds over {plain}", added, APPEND_US, False)]
    if feature in DECODE_SPEEDUPS:
        least = DECODE_SPEEDUPS[feature]
        return [Claim(f"{text}, speed over {plain}", gain, least, True)]
    if feature in DECODE_OVERHEADS:
        most = DECODE_OVERHEADS[feature]
        return [Claim(f"{text}, time over {plain}", 1.0 / gain, most, False)]
    return []
