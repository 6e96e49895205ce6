"""From a public function's arguments to a `Call`, and from a `Call` to its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import checks, ops, reference
from flashtile.backends.cache import NewTokens
from flashtile.mods import functions
from flashtile.mods.functions import MaskFunction, ScoreFunction, mod_operands
from flashtile.problem import (
    UNBOUNDED,
    Call,
    Operands,
    Sequences,
    Variant,
    as_float,
    latent,
    scale_or_default,
    window_sides,
)
from flashtile.random import draw_rng_state

Window = tuple[int | None, int | None]
Documents = Tensor | tuple[Tensor, Tensor]


def normalise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (UNBOUNDED, UNBOUNDED),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    tree_mask: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    num_splits: int = 0,
    split_size: int = 0,
    **sequences: Tensor | None,
) -> Call:
    """Validate a call and put it in normal form; draws the dropout state if there is dropout."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.is_tensor(name, x)
        if x.dim() == 0:
            raise ValueError(f"{name} has shape (); it must have dimensions")
    left, right = window_sides(window_size, causal)
    ids_q, ids_k = _document_pair(document_ids)
    operands = Operands(
        _unit_stride(q), _unit_stride(k), _unit_stride(v), _four_dims(bias), _four_dims(attn_mask),
        alibi_slopes, _unit_stride(learnable_sink), ids_q, ids_k,
        tree_mask=_three_dims(tree_mask), k_descale=k_descale, v_descale=v_descale,
        **mod_operands(score_mod, mask_mod, q),
    )  # fmt: skip
    where: dict[str, Any] = {name: _unit_stride(x) for name, x in sequences.items()}
    longest = host_int(max_seqlen_q), host_int(max_seqlen_k)
    call = Call(
        operands,
        Sequences(max_seqlen_q=longest[0], max_seqlen_k=longest[1], **where),
        Variant(
            scale_or_default(softmax_scale, q), left, right, attention_chunk,
            as_float("softcap", softcap), as_float("dropout_p", dropout_p),
            bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
            0 if score_mod is None else score_mod.handle,
            0 if mask_mod is None else mask_mod.handle,
            num_splits, split_size, latent(k, v),
        ),
    )  # fmt: skip
    checks.check_call(call)
    if dropout_p > 0.0:
        state = draw_rng_state(q.device, dropout_generator)
        call = call._replace(operands=operands._replace(rng_state=state))
    return call


def attend(
    call: Call, *, out: Tensor | None, return_lse: bool, return_attn_probs: bool = False
) -> Any:
    """Run a call: out, (out, lse), or (out, lse, S_dmask)."""
    if out is not None:
        checks.check_out(out, call)
    refuse_forward_mode(call.operands)
    result, lse = ops.forward(*ops.with_mask_blocks(call).flat())
    result = result if out is None else out.copy_(result)
    if return_attn_probs:
        return result, lse, signed_probabilities(call)
    return (result, lse) if return_lse else result


def signed_probabilities(call: Call) -> Tensor:
    """FlashAttention-2's S_dmask: the probabilities, negative where dropped, for tests only.

    (batch, heads, seqlen_q, seqlen_k) rounded up to multiples of 128, in q's dtype, zero beyond
    the true lengths; of shape (0,) without dropout. Quadratic in memory.
    """
    if call.variant.dropout_p == 0.0:
        return call.operands.q.new_empty((0,))
    with torch.no_grad():
        return reference.signed_probabilities(
            call, functions.score_function(call), functions.mask_function(call)
        )


def refuse_forward_mode(*given: Operands | NewTokens) -> None:
    """torch.library's operators drop tangents in silence; raise instead of returning zeros."""
    if forward_ad._current_level < 0:
        return
    for name, x in ((n, x) for some in given for n, x in zip(some._fields, some, strict=True)):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} has a forward-mode tangent; flashtile has no jvp. "
                "flashtile.reference.attention has."
            )


def _unit_stride(x: Any) -> Any:
    """x, or a copy of a tensor whose last dimension has gaps: kernels ask for no such stride."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def _four_dims(x: Tensor | None) -> Tensor | None:
    """Give a mask of fewer dimensions its leading ones."""
    if not isinstance(x, Tensor) or x.dim() >= 4:
        return x
    return x[(None,) * (4 - x.dim())]


def _three_dims(x: Tensor | None) -> Tensor | None:
    """Give one tree for all sequences its batch dimension."""
    return x[None] if isinstance(x, Tensor) and x.dim() == 2 else x


def _document_pair(ids: Documents | None) -> tuple[Tensor | None, Tensor | None]:
    if ids is None or isinstance(ids, Tensor):
        return ids, ids
    if not isinstance(ids, tuple | list):
        raise TypeError(f"document_ids is a {type(ids).__name__}; it must be a tensor or a pair")
    if len(ids) != 2:
        raise ValueError(f"document_ids has {len(ids)} entries; it must be a tensor or a pair")
    return ids[0], ids[1]


def host_int(longest: int | Tensor | None) -> int:
    """max_seqlen as an int. A tensor would need a host sync to read, so it counts as unknown."""
    return UNBOUNDED if longest is None or isinstance(longest, Tensor) else longest
