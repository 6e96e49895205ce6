"""Suites `dense` and `features`: forward and backward of named cells, each on its own.

Forward is timed as in training, with autograd recording. Backward is timed over one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashtile.bench import providers
from flashtile.bench.features import FEATURES, SAME_BITS, Cell, Work, flops
from flashtile.bench.gate import Gate, Inputs, draw
from flashtile.bench.measure import Function
from flashtile.bench.options import Options
from flashtile.explain import explain

DENSE = ("flashtile", "flashtile-triton", "fa2", "cudnn", "flex", "flash-attn", "fa3", "fa4")
FEATURE = ("flashtile", "flashtile-triton", "fa2", "efficient", "flex", "flash-attn", "fa3", "fa4")

OTHER_DIMS = {64: ("window", "softcap", "dropout", "documents", *SAME_BITS), 256: SAME_BITS}
"""The features that are measured at other head dims than 128."""

UNEVEN = ((1000, 16), (3000, 16), (5000, 16), (12345, 16), (4096, 12), (4096, 20))
"""(tokens, heads) of cells off the grid of powers of two."""

SHORTER = {"bias": 4096, "learned bias": 4096, "mqa": 4096, "layer": 8192}
"""Tokens of a row that is not the longest: with a bias of its own for every pair, 0.5 GB at 16
heads and 8.6 GB at 16,384 tokens; whose KV head 32 query heads have, which are checked together,
4.3 GB of fp64 scores; of a layer of Llama 3 8B."""


def dense_cells(options: Options) -> Iterator[Cell]:
    """Batch = tokens / seqlen, heads = hidden / head_dim."""
    for head_dim in options.head_dims:
        for feature in ("full", "causal"):
            seqlen = min(512, options.tokens)
            while seqlen <= options.tokens:
                heads = options.hidden // head_dim
                batch = options.tokens // seqlen
                yield Cell(feature, batch, seqlen, heads, heads, head_dim)
                seqlen *= 2


def feature_cells(options: Options) -> Iterator[Cell]:
    for head_dim in (128, *OTHER_DIMS):
        heads = options.hidden // head_dim
        plain = Cell("causal", 1, options.tokens, heads, heads, head_dim)
        for feature in OTHER_DIMS.get(head_dim, FEATURES):
            if feature not in ("full", "causal"):
                yield from _of_feature(replace(plain, feature=feature), options)


def _of_feature(cell: Cell, options: Options) -> Iterator[Cell]:
    """The cell, with the heads and the length that its feature is about."""
    feature, heads, tokens = cell.feature, cell.heads, options.tokens
    if feature == "lengths":
        for seqlen, count in UNEVEN:
            if seqlen <= tokens:
                yield replace(cell, batch=tokens // seqlen, seqlen=seqlen, heads=count,
                              kv_heads=count)  # fmt: skip
        return
    if feature in SAME_BITS:
        for seqlen in sorted({min(tokens, 4096), tokens}):
            yield replace(cell, batch=tokens // seqlen, seqlen=seqlen)
        return
    if feature in ("gqa", "mqa", "layer"):
        shared = 1 if feature == "mqa" else max(1, heads // 2)
        cell = replace(cell, heads=2 * heads, kv_heads=shared)
    seqlen = min(SHORTER.get(feature, tokens), tokens)
    yield replace(cell, batch=tokens // seqlen if "bias" in feature else 1, seqlen=seqlen)


def measure_dense(options: Options) -> Iterator[dict[str, Any]]:
    for cell in filter(options.wants, dense_cells(options)):
        flexes = cell.seqlen == options.tokens and cell.head_dim <= 128
        yield from measure(cell, _names(DENSE, options, flexes), options)


def measure_features(options: Options) -> Iterator[dict[str, Any]]:
    for cell in filter(options.wants, feature_cells(options)):
        default = (*FEATURE, "cudnn") if cell.feature == "layer" else FEATURE
        yield from measure(cell, _names(default, options, cell.head_dim == 128), options, True)


def _names(default: tuple[str, ...], options: Options, flexes: bool) -> list[str]:
    """A configuration of FlexAttention takes 10 to 40 s to compile: not all have it."""
    names = options.providers or default
    skipped = set() if flexes or options.flex_all or options.providers else {"flex"}
    return [name for name in names if name not in skipped and providers.importable(name)]


def measure(
    cell: Cell, names: list[str], options: Options, against_plain: bool = False
) -> Iterator[dict[str, Any]]:
    """A row a mode: each provider's timing, or the reason that it has none.

    With `against_plain`, flashtile's time of the cell's baseline joins the turns as "plain", and as
    "plain-triton" that of a backend which takes part besides the default one, or which is not the
    baseline's default.
    """
    prepared = Prepared(cell, options)
    plain = Prepared(prepared.work.baseline, options) if against_plain else None
    ours = prepared.backends(options.modes)
    theirs = ours if plain is None else plain.backends(options.modes)
    twice = {f"flashtile-{backend}" for backend in ours.values()} if ours == theirs else set()
    tried = {name: prepared.functions(name, options.modes) for name in names if twice != {name}}
    if plain is not None:
        for name in [n for n in tried if n.partition("-")[0] == "flashtile"]:
            baseline = name.replace("flashtile", "plain")
            tried[baseline] = plain.functions(name, options.modes)
    prepared.forget_references()
    for mode in options.modes:
        found = {name: functions[mode] for name, functions in tried.items()}
        times = options.time({n: f for n, f in found.items() if not isinstance(f, str)})
        results: dict[str, Any] = {n: {"reason": f} for n, f in found.items() if isinstance(f, str)}
        for name, timing in times.items():
            of = plain if plain is not None and name.startswith("plain") else prepared
            rate = of.flops(mode) / timing.median_ms / 1e9
            results[name] = {**timing.row(), "tflops": rate}
        row = {**cell.row(), "mode": mode, "backend": ours[mode], "flops": prepared.flops(mode)}
        if plain is not None:
            row["plain"] = {**plain.row(mode), "backend": theirs[mode]}
        yield {**row, "providers": {name: results[name] for name in tried}}


class Prepared:
    """A cell with its operands, ready to be computed by anyone."""

    def __init__(self, cell: Cell, options: Options) -> None:
        self._cell, self._device = cell, options.device
        self.work: Work = FEATURES[cell.feature](cell, options.device)
        self._inputs: Inputs = draw(cell, self.work, options.device)
        self._gate = Gate(cell, self.work, self._inputs)

    def backends(self, modes: tuple[str, ...]) -> dict[str, str]:
        """Of each mode: whose the output is, or the gradients of q, k and v."""
        chosen = explain(*self._inputs.leaves, **self.work.keywords).plan
        return {mode: chosen.backend if mode == "fwd" else chosen.gradients for mode in modes}

    def flops(self, mode: str) -> float:
        return flops(self._cell, self.work, mode)

    def row(self, mode: str) -> dict[str, Any]:
        return {**self._cell.row(), "flops": self.flops(mode)}

    def forget_references(self) -> None:
        """Give the memory of the checks back."""
        self._gate = Gate(self._cell, self.work, self._inputs)

    def attend(self, name: str) -> Callable[[], Tensor]:
        """A provider's attention on the cell's operands."""
        attend = providers.build(name, self._cell, self.work, self._device)
        return lambda: attend(*self._inputs.leaves)

    def functions(self, name: str, modes: tuple[str, ...]) -> dict[str, Function | str]:
        """What to time in each mode, once it has been checked, or the reason not to."""
        try:
            attend = providers.build(name, self._cell, self.work, self._device)
        except Exception as error:
            return dict.fromkeys(modes, reason(error))
        found: dict[str, Function | str] = {}
        for mode in modes:
            try:
                found[mode] = self._checked(name, mode, attend)
            except Exception as error:
                found[mode] = reason(error)
        return found

    def _checked(self, name: str, mode: str, attend: providers.Attend) -> Function:
        def forward() -> Tensor:
            with providers.context(name):
                return attend(*self._inputs.leaves)

        self._gate.seed()
        if mode == "fwd":
            self._gate.check(name, [forward()])
            return forward
        out, leaves = forward(), (*self._inputs.leaves, *self.work.learned)

        def backward() -> tuple[Tensor, ...]:
            with providers.context(name):
                return torch.autograd.grad(out, leaves, self._inputs.dout, retain_graph=True)

        self._gate.check(name, backward())
        return backward


def reason(error: Exception) -> str:
    """Its first line, as short as a table wants it."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
