"""Checks of metadata: ranks, shapes, dtypes, devices, scalars. No value on a device is read.

Every error names the argument, its value and the limit. They are traceable by torch.compile.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from flashtile.problem import E4M3, FLOATING, UNBOUNDED, Call
from flashtile.quantize import scale_kind


def check_call(call: Call) -> None:
    """Raise ValueError or TypeError for a call that no backend could do."""
    _check_types(call)
    _check_shapes(call)
    _check_sequences(call)
    _check_features(call)
    _check_tree(call)
    _check_scales(call)
    _check_scalars(call)


def is_tensor(name: str, x: object, rank: int | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; it must be torch.strided")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {rank} dimensions")


def offsets(name: str, x: object) -> None:
    """Check the rank and size of cumulative lengths: (batch + 1,)."""
    is_tensor(name, x, 1)
    assert isinstance(x, Tensor)
    if x.shape[0] == 0:
        raise ValueError(f"{name} has 0 entries; it must have batch + 1")


def is_writable(name: str, x: Tensor) -> None:
    """Check that no dimension was made by `expand`."""
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; to be written to, no "
            "two of its elements may be one in memory"
        )


def packed(name: str, x: object, rank: int, parts: int) -> None:
    """Check a qkv or kv tensor: (..., parts, heads, head_dim)."""
    is_tensor(name, x, rank)
    assert isinstance(x, Tensor)
    if x.shape[-3] != parts:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; dimension {rank - 3} must be {parts}")


def same_device(name: str, x: Tensor, other: Tensor, whose: str = "q") -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}; {whose} is on {other.device}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; on some devices, such as meta, there is none."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def int32(name: str, x: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    """Check an optional index tensor. -1 in `shape` is any size."""
    if x is None:
        return
    is_tensor(name, x, len(shape))
    if x.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be torch.int32")
    same_device(name, x, q)
    for size, wanted in zip(x.shape, shape, strict=True):
        if wanted not in (-1, size):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")


def _check_types(call: Call) -> None:
    q, k, v = call.operands[:3]
    for name, x in (("q", q), ("k", k), ("v", v)):
        is_tensor(name, x)
        if x.dtype not in FLOATING and (name == "q" or x.dtype != E4M3):
            raise TypeError(
                f"{name} has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64"
            )
        same_device(name, x, q)
    if k.dtype == v.dtype == E4M3 and q.dtype != torch.float64:
        return
    if not (q.dtype == k.dtype == v.dtype) and not autocasts(q):
        raise TypeError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must agree"
        )


def _check_shapes(call: Call) -> None:
    q, k, v = call.operands[:3]
    paged = call.sequences.block_table is not None
    is_tensor("q", q, 3 if call.varlen else 4)
    k_rank = 3 if call.varlen and not paged and not call.cached else 4
    is_tensor("k", k, k_rank)
    is_tensor("v", v, k_rank)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; all but head_dim must be k's {tuple(k.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k has head_dim {k.shape[-1]}; q has {q.shape[-1]}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has head_dim 0; it must be at least 1")
    remapped = paged or call.sequences.cache_batch_idx is not None
    if k_rank == 4 and not remapped and k.shape[0] != call.batch:
        raise ValueError(f"k has batch {k.shape[0]}; q has {call.batch}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 and heads > 0:
        raise ValueError(f"k has 0 heads; q has {heads}")
    if kv_heads > 0 and heads % kv_heads != 0:
        raise ValueError(f"q has {heads} heads; they must be a multiple of k's {kv_heads}")


def _check_sequences(call: Call) -> None:
    seqs, q = call.sequences, call.operands.q
    if call.varlen:
        offsets("cu_seqlens_q", seqs.cu_seqlens_q)
        int32("cu_seqlens_q", seqs.cu_seqlens_q, q, (-1,))
        if seqs.cu_seqlens_k is None and not call.cached:
            raise ValueError(
                "cu_seqlens_k is None; only block_table with seqused_k can do without it"
            )
    int32("cu_seqlens_k", seqs.cu_seqlens_k, q, (call.batch + 1,))
    for name in ("seqused_q", "seqused_k", "cache_batch_idx", "cache_leftpad"):
        int32(name, getattr(seqs, name), q, (call.batch,))
    int32("block_table", seqs.block_table, q, (call.batch, -1))
    if seqs.block_table is not None:
        if call.operands.k.shape[1] == 0:
            raise ValueError("k has page_size 0; it must be at least 1")
        for name in ("cache_batch_idx", "cache_leftpad"):
            if getattr(seqs, name) is not None:
                raise ValueError(f"{name} and block_table are given; they exclude each other")
    for name in ("max_seqlen_q", "max_seqlen_k"):
        longest = getattr(seqs, name)
        if not isinstance(longest, Integral | torch.SymInt):
            raise TypeError(f"{name} is a {type(longest).__name__}; it must be an int")
        if longest < UNBOUNDED:
            raise ValueError(f"{name} is {longest}; it must be at least 0")


def _check_features(call: Call) -> None:
    operands = call.operands
    q, heads = operands.q, operands.q.shape[-2]
    for name in ("bias", "attn_mask"):
        _check_broadcastable(name, getattr(operands, name), call)
    mask = operands.attn_mask
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask requires grad; pass it as bias, which has a gradient")
    if operands.bias is not None and operands.bias.dtype not in FLOATING:
        raise TypeError(
            f"bias has dtype {operands.bias.dtype}; it must be floating (see attn_mask)"
        )
    slopes = operands.alibi_slopes
    if slopes is not None:
        is_tensor("alibi_slopes", slopes)
        same_device("alibi_slopes", slopes, q)
        if slopes.dtype not in FLOATING:
            raise TypeError(f"alibi_slopes has dtype {slopes.dtype}; it must be floating")
        if tuple(slopes.shape) not in ((heads,), (call.batch, heads)):
            raise ValueError(
                f"alibi_slopes has shape {tuple(slopes.shape)}; it must be ({heads},) or "
                f"({call.batch}, {heads})"
            )
    sink = operands.learnable_sink
    if sink is not None:
        is_tensor("learnable_sink", sink, 1)
        same_device("learnable_sink", sink, q)
        if sink.dtype not in FLOATING:
            raise TypeError(f"learnable_sink has dtype {sink.dtype}; it must be floating")
        if sink.shape[0] != heads:
            raise ValueError(f"learnable_sink has shape {tuple(sink.shape)}; it must be ({heads},)")
    _check_documents(call)


def _check_broadcastable(name: str, x: Tensor | None, call: Call) -> None:
    """bias and attn_mask: (1|batch, 1|heads, 1|seqlen_q, seqlen_k)."""
    if x is None:
        return
    is_tensor(name, x, 4)
    same_device(name, x, call.operands.q)
    if x.dtype != torch.bool and x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be bool or floating")
    full = (call.batch, call.operands.q.shape[-2], call.seqlen_q, call.seqlen_k)
    if call.varlen:  # packed sequences are indexed from their own start: at least the longest
        longest_q, longest_k = call.sequences.max_seqlen_q, call.sequences.max_seqlen_k
        fits_q = x.shape[2] == 1 or longest_q == UNBOUNDED or x.shape[2] >= longest_q
        fits_k = longest_k == UNBOUNDED or x.shape[3] >= longest_k
    else:
        fits_q, fits_k = x.shape[2] in (1, full[2]), x.shape[3] == full[3]
    if x.shape[0] not in (1, full[0]) or x.shape[1] not in (1, full[1]) or not (fits_q and fits_k):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must broadcast to {full}")


def _check_documents(call: Call) -> None:
    q, k = call.operands.q, call.operands.k
    if call.operands.document_ids_q is not None and call.sequences.block_table is not None:
        raise ValueError("document_ids and block_table are given; they exclude each other")
    for name, ids, tokens in (
        ("q", call.operands.document_ids_q, q.shape[:-2]),
        ("k", call.operands.document_ids_k, k.shape[:-2]),
    ):
        if ids is None:
            continue
        is_tensor("document_ids", ids)
        same_device("document_ids", ids, q)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"document_ids has dtype {ids.dtype}; it must be an integer dtype")
        if ids.shape != tokens:
            raise ValueError(
                f"document_ids of {name} has shape {tuple(ids.shape)}; it must be {tuple(tokens)}"
            )


def _check_tree(call: Call) -> None:
    tree = call.operands.tree_mask
    if tree is None:
        return
    is_tensor("tree_mask", tree, 3)
    same_device("tree_mask", tree, call.operands.q)
    if tree.dtype != torch.bool:
        raise TypeError(f"tree_mask has dtype {tree.dtype}; it must be torch.bool")
    if tree.shape[0] not in (1, call.batch) or tree.shape[1] != tree.shape[2]:
        raise ValueError(
            f"tree_mask has shape {tuple(tree.shape)}; it must be (n, n) or (1|{call.batch}, n, n)"
        )


def _check_scales(call: Call) -> None:
    operands, batch = call.operands, call.batch
    for name, x in (("k", operands.k), ("v", operands.v)):
        scale = getattr(operands, f"{name}_descale")
        if scale is None:
            continue
        is_tensor(f"{name}_descale", scale)
        same_device(f"{name}_descale", scale, operands.q)
        if not call.quantized:
            raise ValueError(f"{name}_descale is given and {name} has dtype {x.dtype}, not {E4M3}")
        if scale.dtype != torch.float32:
            raise TypeError(f"{name}_descale has dtype {scale.dtype}; it must be torch.float32")
        if scale_kind(scale, x, batch) is None:
            cached = f" or {tuple(x.shape[:-1])}" if x.dim() == 4 else ""
            raise ValueError(
                f"{name}_descale has shape {tuple(scale.shape)}; it must be (), "
                f"({x.shape[-2]},), ({batch}, {x.shape[-2]}){cached}"
            )
    if call.quantized and torch.is_grad_enabled():
        for name, grown in zip(operands._fields, operands, strict=True):
            if grown is not None and grown.requires_grad:
                raise ValueError(f"{name} requires grad; attention over e4m3 k has no backward")


def _check_scalars(call: Call) -> None:
    variant = call.variant
    if not 0.0 <= variant.dropout_p < 1.0:
        raise ValueError(f"dropout_p is {variant.dropout_p}; it must be in [0, 1)")
    if not 0.0 <= variant.softcap < math.inf:
        raise ValueError(f"softcap is {variant.softcap}; it must be finite and at least 0 (0: off)")
    if not -math.inf < variant.softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {variant.softmax_scale}; it must be finite")
    for name, zero in (
        ("num_splits", "planned"), ("split_size", "planned"), ("attention_chunk", "off")
    ):  # fmt: skip
        count = getattr(variant, name)
        if not isinstance(count, int | torch.SymInt):
            raise TypeError(f"{name} is a {type(count).__name__}; it must be an int")
        if count < 0:
            raise ValueError(f"{name} is {count}; it must be at least 0 (0: {zero})")
    for side, size in (("left", variant.window_left), ("right", variant.window_right)):
        if size < UNBOUNDED:
            raise ValueError(
                f"window_size {side} is {size}; it must be at least 0, or -1 or None (unbounded)"
            )


def check_out(out: Tensor, call: Call) -> None:
    """A tensor that the result is written into."""
    q, v = call.operands.q, call.operands.v
    is_tensor("out", out)
    shape = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {tuple(shape)}")
    if out.dtype != q.dtype:
        raise TypeError(f"out has dtype {out.dtype}; it must be {q.dtype}")
    same_device("out", out, q)
    is_writable("out", out)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (*call.operands, out)
    ):
        raise ValueError("out is given and an input requires grad; use torch.no_grad()")
    if torch.compiler.is_compiling():
        return
    for name, x in zip(call.operands._fields, call.operands, strict=True):
        if x is not None and _share_memory(out, x):
            raise ValueError(f"out overlaps {name} in memory; give it memory of its own")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors meet."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_lo, a_hi), (b_lo, b_hi) = _addresses(a), _addresses(b)
    return a_lo < b_hi and b_lo < a_hi


def _addresses(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
