"""Segments that torch's own CPU flash kernel can do.

`aten::_scaled_dot_product_flash_attention_for_cpu` is as fast as blocks of matrix products, and
less Python. Its causal mask is aligned top-left, so it serves causal problems only where both
alignments agree.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flashtile.backends.segments import Segment
from flashtile.problem import UNBOUNDED, Call, Variant

UNDERSTOOD = frozenset({"softmax_scale", "window_left", "window_right", "deterministic",
                        "num_splits", "split_size", "latent"})  # fmt: skip
"""Scalars that `can` looks at, or that change no result here. Any other must be its default."""

_DEFAULTS = tuple((n, x) for n, x in Variant._field_defaults.items() if n not in UNDERSTOOD)


def can(call: Call, segment: Segment) -> bool:
    """Whether the kernel computes exactly this segment."""
    (q, k, v, *features), _, variant = call
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype
        and all(x is None for x in features)
        and all(getattr(variant, name) == default for name, default in _DEFAULTS)
        and variant.softmax_scale > 0.0  # it scales masked scores too: -inf * 0 is NaN
        and variant.window_left == UNBOUNDED
        and (variant.window_right == UNBOUNDED or _causal_square(variant.window_right, segment))
        and q.shape[-1] == v.shape[-1]
        and segment.pages is None
        and q.shape[-2] > 0
        and min(segment.batches, segment.seqlen_q, segment.seqlen_k) > 0
        and all(x.stride(-1) == 1 for x in (q, k, v))
    )


def whole(call: Call) -> Segment | None:
    """The call as one segment, if that is all it is and the kernel can do it."""
    q, k = call.operands.q, call.operands.k
    if call.ragged:
        return None
    segment = Segment(0, call.batch, q.shape[1], k.shape[1])
    return segment if can(call, segment) else None


def _causal_square(right: int, segment: Segment) -> bool:
    return right == 0 and segment.seqlen_q == segment.seqlen_k


def attend(call: Call, segment: Segment) -> tuple[Tensor, Tensor]:
    """The segment's out (batches, seqlen_q, heads, head_dim) and lse (batches, heads, seqlen_q)."""
    q, k, v = _heads_first(call, segment)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.variant.window_right == 0, scale=call.variant.softmax_scale
    )
    return out.transpose(1, 2), lse


def gradients(
    call: Call, segment: Segment, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """The segment's dq, dk and dv, (batches, seqlen, heads, head_dim).

    Without matrix instructions for 16-bit types the kernel's backward is ten times slower in
    bf16 than in fp32 (1,323 against 133 ms, 8 heads x 64, 2,048 causal tokens, AVX2), so it then
    runs on widened copies.
    """
    dtype = call.operands.q.dtype
    if dtype.itemsize == 2 and not _fast_16_bit():
        dtype = torch.float32
    q, k, v = (x.to(dtype) for x in _heads_first(call, segment))
    do, o = (segment.q_rows(x, 0, segment.seqlen_q).transpose(1, 2).to(dtype) for x in (dout, out))
    if do.stride(-1) != 1:
        do = do.contiguous()
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, segment.lse_rows(lse, 0, segment.seqlen_q), 0.0,
        call.variant.window_right == 0, scale=call.variant.softmax_scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in found)


def _heads_first(call: Call, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """The segment's q, k and v as (batches, heads, seqlen, head_dim) views."""
    q, k, v = call.operands[:3]
    return (
        segment.q_rows(q, 0, segment.seqlen_q).transpose(1, 2),
        segment.k_rows(k, 0, segment.seqlen_k).transpose(1, 2),
        segment.k_rows(v, 0, segment.seqlen_k).transpose(1, 2),
    )


@cache
def _fast_16_bit() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
