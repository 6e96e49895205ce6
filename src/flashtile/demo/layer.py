"""One attention layer: its error against fp64, and what it costs as the sequence grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import flash_attn_func, reference
from flashtile.demo.machine import available_bytes
from flashtile.demo.settings import Settings
from flashtile.explain import Explanation, explain
from flashtile.models.gpt import Attention
from flashtile.testing.budget import assert_within_budget
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention

ENOUGH_SECONDS = 1.0
"""A call this long is timed once, a shorter one until its repetitions last as long."""

MOST_REPEATS = 20

HEADROOM = 0.9
"""Share of the free memory that a call may take: allocators fragment, other programs live."""


class Inputs(NamedTuple):
    q: Tensor  # (1, seqlen, heads, head_dim)
    k: Tensor  # (1, seqlen, kv_heads, head_dim)
    v: Tensor
    dout: Tensor  # as q


class TensorError(NamedTuple):
    """Error of one result against fp64, beside eager attention's own."""

    name: str  # out, dq, dk or dv
    flash_rms: float
    flash_max: float
    standard_rms: float
    standard_max: float
    failure: str  # which budget it breaks, or nothing


class Cost(NamedTuple):
    """Forward plus backward; an estimate where it was not run."""

    seconds: float
    peak_bytes: int
    skipped: str = ""  # "out of memory", "too slow", or nothing where it was run


class Row(NamedTuple):
    seqlen: int
    flash: Cost
    standard: Cost
    free_bytes: int  # memory that there was


def draw(seqlen: int, settings: Settings) -> Inputs:
    """Random inputs of the layer."""
    layer, device = settings.layer, settings.device
    generator = torch.Generator(device).manual_seed(seqlen)

    def tensor(heads: int) -> Tensor:
        shape = (1, seqlen, heads, layer.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=settings.layer_dtype)

    q, k, v, dout = (tensor(n) for n in (layer.heads, layer.kv_heads, layer.kv_heads, layer.heads))
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def plan_of(settings: Settings) -> Explanation:
    """What flashtile does with this layer."""
    q, k, v, _ = draw(settings.shortest, settings)
    return explain(q, k, v, causal=True)


def forward_and_backward(attention: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    q, k, v, dout = inputs
    out = attention(q, k, v, causal=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def errors(settings: Settings) -> list[TensorError]:
    """Both attentions against fp64 on the same inputs, under the contract's budget."""
    inputs = draw(settings.error_seqlen, settings)
    wide = Inputs(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))
    results = zip(
        ("out", "dq", "dk", "dv"),
        forward_and_backward(flash_attn_func, inputs),
        forward_and_backward(standard_attention, inputs),
        forward_and_backward(_golden, wide),
        strict=True,
    )
    return [_error(*result) for result in results]


def growth(settings: Settings, on_start: Callable[[int, str], None]) -> Iterator[Row]:
    """Measure longer and longer sequences, as long as each attention fits memory and patience.

    on_start is called with a length and a name before each measurement.
    """
    flash, standard = Cost(0.0, 0), Cost(0.0, 0)
    for seqlen in settings.lengths:
        free = available_bytes(settings.device)
        larger = Cost(4 * flash.seconds, 4 * flash.peak_bytes)  # with inputs of twice the size
        if _why_not(larger, free, settings.flash_seconds):
            break
        inputs = draw(seqlen, settings)
        if seqlen == settings.shortest:  # libraries load and kernels compile at their first use
            forward_and_backward(flash_attn_func, inputs)
            forward_and_backward(standard_attention, inputs)
        on_start(seqlen, "flashtile")
        flash = _cost(flash_attn_func, inputs)
        on_start(seqlen, "standard")
        free = available_bytes(settings.device)
        estimate = Cost(4 * standard.seconds, standard_bytes(seqlen, settings))
        skipped = _why_not(estimate, free, settings.standard_seconds)
        standard = estimate if skipped else _cost(standard_attention, inputs)
        yield Row(seqlen, flash, standard._replace(skipped=skipped), free)


def standard_bytes(seqlen: int, settings: Settings) -> int:
    """Peak memory of standard attention, forward plus backward, before running it.

    Three score matrices live together, the probabilities, their gradient and that of the scores;
    the expanded K and V, the output and a gradient are four tensors like q.
    """
    layer, size = settings.layer, settings.layer_dtype.itemsize
    return size * layer.heads * seqlen * (3 * seqlen + 4 * layer.head_dim)


def _golden(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return reference.attention(q, k, v, causal=causal).out


def _error(name: str, flash: Tensor, standard: Tensor, golden: Tensor) -> TensorError:
    failure = ""
    try:
        assert_within_budget(flash, standard, golden, name, gradient=name != "out")
    except AssertionError as broken:
        failure = str(broken)
    by_flash, by_standard = ((x.double() - golden).abs() for x in (flash, standard))
    return TensorError(
        name,
        *(by_flash.square().mean().sqrt().item(), by_flash.max().item()),
        *(by_standard.square().mean().sqrt().item(), by_standard.max().item()),
        failure,
    )


def _why_not(estimate: Cost, free_bytes: int, patience_seconds: float) -> str:
    """Why a call of this cost is not run, or nothing."""
    if estimate.peak_bytes > HEADROOM * free_bytes:
        return "out of memory"
    return "too slow" if estimate.seconds > patience_seconds else ""


def _cost(attention: Attention, inputs: Inputs) -> Cost:
    def call() -> None:
        forward_and_backward(attention, inputs)

    def seconds(measured: Callable[[], object]) -> float:
        start = time.perf_counter()
        measured()
        if inputs.q.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    peaks: list[int] = []
    times = [seconds(lambda: peaks.append(peak_bytes(call, inputs.q.device)))]
    if times[0] < ENOUGH_SECONDS:
        times = [seconds(call)]
        while sum(times) < ENOUGH_SECONDS and len(times) < MOST_REPEATS:
            times.append(seconds(call))
    return Cost(statistics.median(times), peaks[0])
