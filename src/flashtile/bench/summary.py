"""What results come to: ratios and their geometric means, as text and as numbers.

Pure functions of a suite's document, so that anyone can have them from the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import geometric_mean
from typing import Any

from flashtile.bench.peers import over_best_peer

Row = dict[str, Any]
Document = dict[str, Any]


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


def lines(document: Document) -> list[str]:
    """Geometric means of flashtile's speed over each provider's and over the best peer's figure,
    and the worst cell of each."""
    if document["suite"] not in ("dense", "decode"):
        return []
    rows, found, gpu = document["rows"], [], document["environment"].get("gpu", "")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for head_dim in sorted({row["head_dim"] for row in rows}):
            part = [r for r in rows if (r["mode"], r["head_dim"]) == (mode, head_dim)]
            gains = {name: [ratio(row, name) for row in part] for name in _others(part)}
            gains["the best peer"] = [over_best_peer(row, gpu) for row in part]
            found += [
                f"{mode} head dim {head_dim:3} over {name:16} {text}"
                for name, ratios in gains.items()
                if (text := _geomean_text(part, ratios))
            ]
    return found


def _geomean_text(rows: list[Row], ratios: list[float | None]) -> str:
    gains = [(g, r) for g, r in zip(ratios, rows, strict=True) if g is not None]
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
    text = f"{cell_text(row):44} {row['backend']:7} {_own_text(row)}"
    return f"{text}; {others}" if others else text


def _own_text(row: Row) -> str:
    ours = row["providers"].get("flashtile", {})
    if "median_ms" not in ours:
        return f"no: {ours.get('reason', 'not asked')}"
    ms = ours["median_ms"]
    time = f"{1e3 * ms:8.1f} us" if "tb_s" in ours else f"{ms:8.3f} ms"
    return f"{time} {_rate_text(ours):>12}"


def _rate_text(result: dict[str, Any]) -> str:
    if "tb_s" in result:
        return f"{result['tb_s']:.2f} TB/s"
    return f"{result['tflops']:.0f} TFLOP/s"


def _gain_text(row: Row, name: str) -> str:
    result, gain = row["providers"][name], ratio(row, name)
    if "reason" in result:
        return f"no: {result['reason'][:48]}"
    return _rate_text(result) if gain is None else f"{gain:.2f}x"


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
