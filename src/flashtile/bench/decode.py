"""Suite `decode`: a few query tokens over a KV cache, replayed from CUDA graphs.

A graph is captured while all lengths are 0, and told a cell's lengths on the device: what is timed
is what a serving engine replays, whatever it serves. The L2 cache is cold in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flashtile.bench import providers
from flashtile.bench.caches import LATENT, Cache, CacheCell, Turn
from flashtile.bench.measure import Clock, CudaClock, Function, host_clock, interleaved
from flashtile.bench.options import Options
from flashtile.bench.speed import reason

NAMES = ("flashtile", "fa2", "cudnn", "flash-attn", "fa3")

FEATURES = ("dense", "page 16", "page 1", "e4m3 head", "e4m3 token", "e4m3 page 16", "append",
            "append page 16", "queries 4", "queries 16", "empty rows", "long row",
            "latent")  # fmt: skip

DENSE = ((1, 4096), (1, 65536), (1, 524288), (8, 8192), (32, 4096), (64, 16384), (128, 2048))
"""Batch and tokens of a row that the best peers were measured at."""

HEAD_DIM = 128

Pair = tuple[CacheCell, CacheCell | None]


def cells(options: Options) -> Iterator[Pair]:
    """Each cell, and the one that its time is compared with. Heads and tokens of full size are
    those of 2,048 and 16,384 in `options`."""

    def cell(feature: str, batch: int, seqlen: int, **changes: Any) -> CacheCell:
        heads = options.hidden // 64
        of_all = scaled(seqlen, options), heads, max(1, heads // 4), HEAD_DIM
        return CacheCell(feature, batch, *of_all, **changes)

    yield from ((cell("dense", *size), None) for size in DENSE)
    for size in ((32, 4096), (64, 16384)):
        for page in (16, 1):
            yield cell(f"page {page}", *size, page_size=page), cell("dense", *size)
    dense = cell("dense", 32, 16384)
    for name in ("head", "token"):
        yield replace(dense, feature=f"e4m3 {name}", scales=name), dense
    yield replace(dense, feature="e4m3 page 16", scales="head", page_size=16), dense
    dense = cell("dense", 32, 4096)
    yield replace(dense, feature="append", append=True), dense
    paged = replace(dense, feature="page 16", page_size=16)
    yield replace(paged, feature="append page 16", append=True), paged
    dense = cell("dense", 1, 65536)
    for queries in (4, 16):
        yield replace(dense, feature=f"queries {queries}", queries=queries), dense
    alone = cell("page 16", 1, 500_000, page_size=16)
    lengths = (alone.seqlen, *[0] * 1023)
    yield replace(alone, feature="empty rows", batch=1024, lengths=lengths), alone
    yield _long_row(cell("long row", 128, 131072, page_size=16), scaled(1024, options))
    for heads in (options.hidden // 128, options.hidden // 16):
        seqlen = scaled(4096, options)
        yield CacheCell("latent", 32, seqlen, heads, 1, LATENT, page_size=64), None


def scaled(tokens: int, options: Options) -> int:
    """Of a row, in a suite of other sizes."""
    return max(1, tokens * options.tokens // 16384)


def _long_row(cell: CacheCell, short: int) -> Pair:
    """One row among short ones, and as many tokens in equal rows."""
    lengths = (cell.seqlen, *[short] * (cell.batch - 1))
    equal = (sum(lengths) // cell.batch,) * cell.batch
    cell = replace(cell, lengths=lengths)
    return cell, replace(cell, feature="equal rows", lengths=equal)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row a cell: each provider's timing, or the reason that it has none; "plain" is flashtile in
    the cell that it is compared with."""
    cuda = options.device.type == "cuda"
    clock = _Told(CudaClock(options.device) if cuda else host_clock)
    for cell, plain in cells(options):
        if options.wants(cell):
            yield _measure(cell, plain, options, clock)


class _Told:
    """A clock that tells a call its lengths before it starts."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, function: Function, calls: int) -> list[float]:
        if isinstance(function, Turn):
            function.prepare()
        return self._clock(function, calls)


def _measure(
    cell: CacheCell, plain: CacheCell | None, options: Options, clock: Clock
) -> dict[str, Any]:
    shared = plain is not None and _but_lengths(plain) == _but_lengths(cell)
    both = (cell.rows, plain.rows) if plain is not None and shared else (cell.rows,)
    cache = Cache(cell, tuple(map(max, zip(*both, strict=True))), options.device)
    tasks = {name: (name, cell, cache) for name in _names(cell, options)}
    if plain is not None and "flashtile" in tasks:
        other = cache if shared else Cache(plain, plain.rows, options.device)
        tasks["plain"] = "flashtile", plain, other
    turns: dict[str, Function] = {}
    results: dict[str, Any] = {}
    for name, (provider, of, operands) in tasks.items():
        try:
            turns[name] = operands.checked(provider, of.rows)
        except Exception as error:
            results[name] = {"reason": reason(error)}
    for name, timing in interleaved(turns, options.rounds, clock=clock).items():
        rate = tasks[name][1].bytes / timing.median_ms / 1e9
        results[name] = {**timing.row(), "tb_s": rate}
    row = {**cell.row(), "mode": "decode", "backend": cache.backend()}
    if plain is not None:
        row["plain"] = plain.row()
    return {**row, "providers": {name: results[name] for name in tasks}}


def _but_lengths(cell: CacheCell) -> CacheCell:
    """What is captured: cells that differ in lengths alone have one graph."""
    return replace(cell, feature="", lengths=())


def _names(cell: CacheCell, options: Options) -> list[str]:
    """SDPA has neither lengths nor pages, and masks more queries from the top left."""
    names = [name for name in options.providers or NAMES if providers.importable(name)]
    return [name for name in names if cell.feature == "dense" or name not in providers.SDPA]
