"""The functions of flash_attn's C++ extension, in its positional order.

They have no gradients of their own: `fwd` and `bwd` are the halves that callers join.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flashtile
from flashtile.api.call import attend, normalise, signed_probabilities
from flashtile.compat.flash_attn.conventions import (
    dmask_to_flash_attn,
    lse_from_flash_attn,
    lse_to_flash_attn,
)
from flashtile.problem import Call
from flashtile.random import draw_rng_state


class Forward(NamedTuple):
    """What `fwd` and `varlen_fwd` return."""

    out: Tensor
    softmax_lse: Tensor
    s_dmask: Tensor  # (0,) unless asked for
    rng_state: Tensor  # (2,) int64


class Backward(NamedTuple):
    """What `bwd` and `varlen_bwd` return."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    softmax_d: Tensor  # rowsum(dout * out) * (1 - p_dropout), fp32


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
    /,
) -> Forward:
    """Attention of a padded batch."""
    _no_generator(generator)
    call = normalise(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=window(window_size_left, window_size_right), softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return _forward(call, out, return_softmax)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
    num_splits: int = 0,
    /,
) -> Forward:
    """Attention of packed sequences. Rows of no sequence are zero, whatever zero_tensors says."""
    _no_generator(generator)
    if block_table is not None and num_splits > 1:
        raise RuntimeError(f"num_splits > 1 is not supported for varlen paged KV: {num_splits=}")
    call = normalise(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=window(window_size_left, window_size_right), softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        block_table=block_table, cache_leftpad=leftpad_k,
    )  # fmt: skip
    return _forward(call, out, return_softmax)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: Tensor | None,
    /,
) -> Backward:
    """Gradients of a padded batch, written into dq, dk and dv where those are given."""
    _no_generator(generator)
    call = normalise(
        q, k, v, softmax_scale=softmax_scale, causal=is_causal,
        window_size=window(window_size_left, window_size_right), softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    call = _with_dropout(call, p_dropout, rng_state)
    return gradients(call, dout, out, softmax_lse, (dq, dk, dv))


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: Tensor | None,
    /,
) -> Backward:
    """Gradients of packed sequences, written into dq, dk and dv where those are given."""
    _no_generator(generator)
    call = normalise(
        q, k, v, softmax_scale=softmax_scale, causal=is_causal,
        window_size=window(window_size_left, window_size_right), softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes, deterministic=deterministic,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    call = _with_dropout(call, p_dropout, rng_state)
    return gradients(call, dout, out, softmax_lse, (dq, dk, dv))


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: int | Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
    /,
) -> tuple[Tensor, Tensor]:
    """Append to the cache and attend to it: (out, softmax_lse)."""
    with torch.no_grad():
        try:
            result, lse = flashtile.flash_attn_with_kvcache(
                q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx,
                leftpad_k, block_table, softmax_scale, is_causal,
                window(window_size_left, window_size_right), max(softcap, 0.0),
                is_rotary_interleaved, alibi_slopes, num_splits, True, out=out,
            )  # fmt: skip
        except ValueError as error:
            if block_table is None:
                raise
            # Where lengths run past the pages of block_table, flash_attn's type and word.
            raise RuntimeError(f"paged KV cache (block_table): {error}") from error
        return result, lse_to_flash_attn(lse)


def window(left: Any, right: Any) -> tuple[int, int]:
    """Window sides as ints. To flash_attn every negative side is unbounded."""
    return max(int(left), -1), max(int(right), -1)


def _no_generator(generator: None) -> None:
    if generator is not None:
        raise RuntimeError(
            "flash-attn: the RNG `generator` argument is no longer supported and must be None; "
            "dropout uses torch's default generator"
        )


def _forward(call: Call, out: Tensor | None, return_softmax: bool) -> Forward:
    q, rng_state = call.operands.q, call.operands.rng_state
    with torch.no_grad():
        result, lse = attend(call, out=out, return_lse=True)
        s_dmask = q.new_empty((0,))
        if return_softmax:
            causal = call.variant.window_right == 0
            s_dmask = dmask_to_flash_attn(signed_probabilities(call), q.shape[-1], causal)
    if rng_state is None:
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return Forward(result, lse_to_flash_attn(lse), s_dmask, rng_state)


def _with_dropout(call: Call, p_dropout: float, rng_state: Tensor | None) -> Call:
    """The call with forward's dropout. Without its rng_state, the one torch's generator is at."""
    if p_dropout == 0.0:
        return call
    if rng_state is None:
        rng_state = draw_rng_state(call.operands.q.device)
    return call._replace(
        operands=call.operands._replace(rng_state=rng_state),
        variant=call.variant._replace(dropout_p=p_dropout),
    )


def gradients(
    call: Call, dout: Tensor, out: Tensor, lse: Tensor, into: tuple[Tensor | None, ...]
) -> Backward:
    """The gradients of a call, in the given tensors where there are any."""
    dq, dk, dv = _backward(call, dout, out, lse, into)
    dots = (dout.float() * out.float()).sum(-1) * (1.0 - call.variant.dropout_p)
    if (cu_seqlens_q := call.sequences.cu_seqlens_q) is not None:
        return Backward(dq, dk, dv, _varlen_softmax_d(dots, cu_seqlens_q))
    softmax_d = dots.transpose(1, 2)
    return Backward(dq, dk, dv, F.pad(softmax_d, (0, -softmax_d.shape[-1] % 128)))


def _backward(
    call: Call, dout: Tensor, out: Tensor, lse: Tensor, into: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """dq, dk and dv, in the given tensors where there are any."""
    needs = [True, True, True, False, False]
    with torch.no_grad():
        grads = torch.ops.flashtile.backward.default(
            dout, None, out, lse_from_flash_attn(lse), *call.flat(), needs
        )
        for name, grad, given in zip(("dq", "dk", "dv"), grads, into, strict=True):
            if given is not None and given.shape != grad.shape:
                raise RuntimeError(
                    f"{name} has shape {tuple(given.shape)}; it must be {tuple(grad.shape)}"
                )
        return [
            grad if given is None else given.copy_(grad)
            for grad, given in zip(grads, into, strict=True)
        ]


def _varlen_softmax_d(dots: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """(heads, total_q + 128 * batch): flash_attn keeps sequences 128 rows apart."""
    (total, heads), batch = dots.shape, cu_seqlens_q.shape[0] - 1
    rows = torch.arange(total, device=dots.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens_q[1:], rows, right=True).clamp(max=batch - 1)
    softmax_d = dots.new_zeros(heads, total + 128 * batch)
    softmax_d[:, rows + 128 * sequence] = dots.T
    return softmax_d
