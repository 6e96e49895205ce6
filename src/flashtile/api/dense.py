"""Attention over padded batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile import checks
from flashtile.api import warm
from flashtile.api.call import Documents, Window, attend, normalise
from flashtile.mods.functions import MaskFunction, ScoreFunction


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """softmax(mask(mods(q k^T * softmax_scale))) v, exact, in memory linear in seqlen.

    Differentiable in q, k, v, bias and learnable_sink, through out and lse.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64. Any strides.
        k: (batch, seqlen_k, kv_heads, head_dim), heads a multiple of kv_heads: query head h reads
            KV head h // (heads / kv_heads), so MQA and GQA need no copies.
        v: (batch, seqlen_k, kv_heads, head_dim_v); head_dim_v may differ from head_dim.
        dropout_p: probability in [0, 1) of dropping an element of the softmax; what is kept is
            scaled by 1 / (1 - dropout_p). 0 draws no random number.
        softmax_scale: factor of the scores, default 1 / sqrt(head_dim).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (aligned bottom-right).
        window_size: (left, right): query i sees keys from i + seqlen_k - seqlen_q - left to
            i + seqlen_k - seqlen_q + right, inclusive; -1 or None is unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: (heads,) or (batch, heads): -slope * |i + seqlen_k - seqlen_q - j| is added
            to scores. No gradient.
        deterministic: the gradients are bitwise reproducible. Forward always is.
        return_attn_probs: also return lse and S_dmask, for tests: (batch, heads, seqlen_q,
            seqlen_k) rounded up to 128, the softmax with dropped elements negative; (0,) without
            dropout. Quadratic in memory.
        return_lse: also return lse, fp32 (fp64 for fp64 inputs), natural units:
            (batch, heads, seqlen_q), -inf where a row sees no key.
        bias: floating, added to scores: (1|batch, 1|heads, 1|seqlen_q, seqlen_k), leading
            dimensions optional. Its gradient is summed over the broadcast ones.
        attn_mask: shaped as bias; bool keeps where True, floating is added. No gradient. Mask with
            False or -inf: where a finite sentinel such as finfo.min covers a whole row, lse is too
            large to recompute that row's probabilities from, and its gradients are not exact.
        learnable_sink: (heads,) logits of a key without a value: exp(sink) joins the softmax's
            denominator, and lse (Xiao et al., 2024; gpt-oss).
        document_ids: integers (batch, seqlen), or a pair for q and k: queries see only keys of
            their own document.
        score_mod: a `flashtile.ScoreFunction` of the user's own, applied after the other changes to
            scores: elementwise, in Triton, with its derivative.
        mask_mod: a `flashtile.MaskFunction`: keys are seen where it, too, is true.
        attention_chunk: query i sees, of the keys that other masks leave, those of its own chunk:
            j // attention_chunk == (i + seqlen_k - seqlen_q) // attention_chunk, the latter rounded
            down (Llama 4; FlashAttention-3). 0 is off.
        out: tensor of the result's shape, dtype and device to write into; no autograd.
        dropout_generator: generator of the dropout state, default torch's.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), or (out, lse), or (out, lse, S_dmask). Rows that
        see no key are 0 with zero gradients.

    Raises:
        TypeError: an argument that is not a tensor, or has a wrong dtype or mixed dtypes.
        ValueError: a wrong rank, shape, device or range; named with its value and limit.

    Source: Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1; Dao, "FlashAttention-2", 2023.

    >>> q = torch.randn(2, 1024, 8, 64)
    >>> out = flash_attn_func(q, q, q, causal=True)  # (2, 1024, 8, 64)
    """
    given, tensors = None, (q, k, v, bias, alibi_slopes, learnable_sink)
    plain = attn_mask is document_ids is score_mod is mask_mod is out is None
    if plain and dropout_p == 0.0 and not return_attn_probs:
        given = ("dense", softmax_scale, causal, window_size, attention_chunk, softcap,
                 deterministic, return_lse)  # fmt: skip
        if (found := warm.again(given, tensors)) is not None:
            return found
    call = normalise(
        q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, bias=bias, attn_mask=attn_mask,
        learnable_sink=learnable_sink, document_ids=document_ids, score_mod=score_mod,
        mask_mod=mask_mod, attention_chunk=attention_chunk, dropout_generator=dropout_generator,
    )  # fmt: skip
    found = attend(call, out=out, return_lse=return_lse, return_attn_probs=return_attn_probs)
    if given is not None:
        warm.remember(given, tensors, call, return_lse)
    return found


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """`flash_attn_func` of the three slices of one tensor; its gradient is one tensor too.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), float16, bfloat16, float32 or float64.

    The other arguments (units and shapes), the returns, the errors and the source are those of
    `flash_attn_func` with seqlen_q = seqlen_k = seqlen and kv_heads = heads.

    Raises:
        TypeError, ValueError: as `flash_attn_func`, and for a qkv that is not packed so.
    """
    checks.packed("qkv", qkv, 5, 3)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, return_lse=return_lse, bias=bias, attn_mask=attn_mask,
        learnable_sink=learnable_sink, document_ids=document_ids, score_mod=score_mod,
        mask_mod=mask_mod, attention_chunk=attention_chunk, out=out,
        dropout_generator=dropout_generator,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    document_ids: Documents | None = None,
    score_mod: ScoreFunction | None = None,
    mask_mod: MaskFunction | None = None,
    attention_chunk: int = 0,
    out: Tensor | None = None,
    dropout_generator: torch.Generator | None = None,
) -> Any:
    """`flash_attn_func` of q and the two slices of one tensor, whose gradient is one tensor.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64.
        kv: (batch, seqlen_k, 2, kv_heads, head_dim), q's dtype.

    The other arguments (units and shapes), the returns, the errors and the source are those of
    `flash_attn_func`.

    Raises:
        TypeError, ValueError: as `flash_attn_func`, and for a kv that is not packed so.
    """
    checks.packed("kv", kv, 5, 2)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, return_lse=return_lse, bias=bias, attn_mask=attn_mask,
        learnable_sink=learnable_sink, document_ids=document_ids, score_mod=score_mod,
        mask_mod=mask_mod, attention_chunk=attention_chunk, out=out,
        dropout_generator=dropout_generator,
    )  # fmt: skip
