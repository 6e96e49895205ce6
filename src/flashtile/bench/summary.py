"""What results come to: ratios, their geometric means, and the project's claims with pass or fail.

Pure functions of a suite's document, so that anyone can have them from the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import geometric_mean
from typing import Any, NamedTuple

Row = dict[str, Any]
Document = dict[str, Any]

SPEEDUPS = {"triton": {"window": 5.0, "documents": 6.0}, "hopper": {"window": 8.0}}
"""The least that masks must gain over the plain attention that they cut, at 16,384 tokens, by
backend."""

OVERHEADS = {
    "triton": {"dropout": 1.25, "softcap": 1.25, "alibi": 1.25, "mask": 1.30, "varlen": 1.10},
    "hopper": {"softcap": 1.12, "alibi": 1.12, "varlen": 1.05},
}
"""The most time that features may take, for the same work, in units of plain attention's."""

OVER_FA2 = {"fwd": 1.30, "bwd": 1.15}
"""The least geometric mean of the portable kernels' dense speed over FlashAttention-2's, at head
dims 64 and 128."""

OF_FLEX = 0.95
"""The least dense speed over FlexAttention's, in any cell."""

HOST_US = 15.0
LINEAR = 2.05
"""The most that twice the tokens may take of memory."""


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


def milliseconds(row: Row, provider: str) -> float | None:
    """A provider's median in a row, None where it has none."""
    found = row["providers"].get(provider, {}).get("median_ms")
    return None if found is None else float(found)


def ratio(row: Row, over: str, ours: str = "flashtile") -> float | None:
    """flashtile's speed over another's in a row: above 1 flashtile is faster."""
    own, theirs = milliseconds(row, ours), milliseconds(row, over)
    return None if own is None or theirs is None else theirs / own


def against_plain(row: Row, ours: str = "flashtile") -> float | None:
    """Time for the same work in units of plain attention's: rates of FLOPs compared."""
    gain = speedup(row, ours)
    return None if gain is None else row["plain"]["flops"] / row["flops"] / gain


def speedup(row: Row, ours: str = "flashtile") -> float | None:
    """Plain attention's time over the feature's, whatever the work."""
    return ratio(row, ours.replace("flashtile", "plain"), ours)


def own(row: Row) -> list[tuple[str, str]]:
    """(provider, backend) of everything in a row that is flashtile's."""
    names = [name for name in row["providers"] if name.partition("-")[0] == "flashtile"]
    return [(name, name.partition("-")[2] or row["backend"]) for name in names]


def claims(document: Document) -> list[Claim]:
    """Those that a suite's rows decide."""
    by_suite = {"dense": dense_claims, "features": feature_claims, "memory": memory_claims,
                "host": host_claims}  # fmt: skip
    suite = document["suite"]
    on_gpu = "gpu" in document["environment"]
    return by_suite[suite](document["rows"]) if on_gpu and suite in by_suite else []


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
    flexes = [(g, r) for r in rows if (g := ratio(r, "flex")) is not None]
    if flexes:
        least, row = min(flexes, key=lambda pair: pair[0])
        found.append(Claim(f"worst over FlexAttention, {cell_text(row)}", least, OF_FLEX, True))
    return found


def feature_claims(rows: list[Row]) -> list[Claim]:
    return [claim for row in rows for pair in own(row) for claim in _row_claims(row, *pair)]


def _row_claims(row: Row, name: str, backend: str) -> list[Claim]:
    feature, plain = row["feature"], row["plain"]["feature"]
    gain, cost = speedup(row, name), against_plain(row, name)
    least = SPEEDUPS.get(backend, {}).get(feature)
    most = OVERHEADS.get(backend, {}).get(feature)
    if gain is not None and least is not None:
        return [Claim(f"{backend}, {cell_text(row)}, faster than {plain}", gain, least, True)]
    if cost is not None and most is not None:
        return [Claim(f"{backend}, {cell_text(row)}, time over {plain}", cost, most, False)]
    return []


def memory_claims(rows: list[Row]) -> list[Claim]:
    """Growth over the last doubling, by when what is constant no longer counts."""
    found = []
    for path in dict.fromkeys(row["path"] for row in rows):
        sizes = {r["seqlen"]: r["flashtile_bytes"] for r in rows if r["path"] == path}
        longest = max(sizes)
        if longest // 2 in sizes:
            growth = sizes[longest] / sizes[longest // 2]
            what = f"{path}, memory of {longest:,} tokens over that of half of them"
            found.append(Claim(what, growth, LINEAR, False))
    return found


def host_claims(rows: list[Row]) -> list[Claim]:
    return [
        Claim(f"microseconds of a call, {row['mode']}", us, HOST_US, False)
        for row in rows
        if (us := row["providers"].get("flashtile", {}).get("median_us")) is not None
    ]


def lines(document: Document) -> list[str]:
    """Geometric means of flashtile's speed over each provider's, and the worst cell of each."""
    if document["suite"] != "dense":
        return []
    rows, found = document["rows"], []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for head_dim in sorted({row["head_dim"] for row in rows}):
            part = [r for r in rows if (r["mode"], r["head_dim"]) == (mode, head_dim)]
            found += [
                f"{mode} head dim {head_dim:3} over {name:16} {text}"
                for name in _others(part)
                if (text := _geomean_text(part, name))
            ]
    return found


def _geomean_text(rows: list[Row], over: str) -> str:
    gains = [(g, r) for r in rows if (g := ratio(r, over)) is not None]
    if not gains:
        return ""
    mean, (least, worst) = geometric_mean(g for g, _ in gains), min(gains, key=lambda g: g[0])
    return f"{mean:5.2f}x of {len(gains):2} cells, worst {least:5.2f}x: {cell_text(worst)}"


def _others(rows: Iterable[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row["providers"])
    return [name for name in names if name != "flashtile" and not name.startswith("plain")]


def cell_text(row: Row) -> str:
    heads = f"{row['heads']}" + (f"/{row['kv_heads']}" if row["kv_heads"] != row["heads"] else "")
    shape = f"{row['batch']} x {row['seqlen']:,} x {heads} x {row['head_dim']}"
    return f"{row['mode']} {row['feature']} {shape}"


def speed_line(row: Row) -> str:
    """A cell: flashtile's time and rate, and its speed over everyone else's."""
    others = ", ".join(f"{n} {_gain_text(row, n)}" for n in row["providers"] if n != "flashtile")
    return f"{cell_text(row):44} {row['backend']:7} {_own_text(row)}; {others}"


def _own_text(row: Row) -> str:
    ours = row["providers"].get("flashtile", {})
    if "tflops" not in ours:
        return f"no: {ours.get('reason', 'not asked')}"
    return f"{ours['median_ms']:8.3f} ms {ours['tflops']:4.0f} TFLOP/s"


def _gain_text(row: Row, name: str) -> str:
    result, gain = row["providers"][name], ratio(row, name)
    if "reason" in result:
        return f"no: {result['reason'][:48]}"
    return f"{result['tflops']:.0f} TFLOP/s" if gain is None else f"{gain:.2f}x"


def memory_line(row: Row) -> str:
    sizes = (f"{n.removesuffix('_bytes')} {b / 2**20:.1f} MiB" for n, b in row.items()
             if n.endswith("_bytes"))  # fmt: skip
    return f"{row['path']:8} {row['seqlen']:>7,}  " + ", ".join(sizes)


def host_line(row: Row) -> str:
    costs = (f"{n} {r['median_us']:.1f} us" if "median_us" in r else f"{n} no: {r['reason'][:48]}"
             for n, r in row["providers"].items())  # fmt: skip
    return f"{row['mode']:8}  " + ", ".join(costs)


def cpu_line(row: Row) -> str:
    return (
        f"{row['dtype']:>9} {row['seqlen']:>6} {row['feature']:<12} "
        f"{row['flashtile']['median_ms']:9.1f} ms  {row['speedup']:6.2f}x {row['peer']}"
    )
