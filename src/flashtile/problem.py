"""The normal form of every attention call, and its metadata.

Dense, varlen, paged and cached calls all become one `Call`: tensors, where the sequences lie, and
the scalar variant, in the order of the operator's schema. `describe` reduces a call to an
`AttentionProblem`, the frozen metadata that `plan` chooses a backend and tiles from.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.strides import alike

UNBOUNDED = -1
"""A window side, or a max_seqlen, without a limit."""


class Operands(NamedTuple):
    """The tensors of a call. Absent features are None."""

    q: Tensor  # (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim)
    k: Tensor  # as q with kv_heads, or (pages, page_size, kv_heads, head_dim) with a block_table
    v: Tensor  # as k, with head_dim_v
    bias: Tensor | None = None  # (1|batch, 1|heads, 1|seqlen_q, seqlen_k), differentiable
    attn_mask: Tensor | None = None  # as bias; bool keeps where True, float is added
    alibi_slopes: Tensor | None = None  # (heads,) or (batch, heads)
    learnable_sink: Tensor | None = None  # (heads,), a logit in natural units, differentiable
    document_ids_q: Tensor | None = None  # (batch, seqlen_q) or (total_q,), integer
    document_ids_k: Tensor | None = None  # (batch, seqlen_k) or (total_k,), integer
    rng_state: Tensor | None = None  # (2,) int64: seed, offset; None without dropout
    mask_blocks: Tensor | None = None  # `mask_grid` uint8: tiles of the masks, see `mask_grid`
    tree_mask: Tensor | None = None  # (1|batch, n, n) bool among the last seqlen_q keys
    k_descale: Tensor | None = None  # fp32 scales of e4m3 k: see `quantize.scale_kind`
    v_descale: Tensor | None = None
    mod_0: Tensor | None = None  # what the user's functions read: score_mod's, then mask_mod's
    mod_1: Tensor | None = None
    mod_2: Tensor | None = None
    mod_3: Tensor | None = None


class Sequences(NamedTuple):
    """Where the sequences of a call lie. All int32 on the operands' device."""

    cu_seqlens_q: Tensor | None = None  # (batch + 1,)
    cu_seqlens_k: Tensor | None = None  # (batch + 1,)
    seqused_q: Tensor | None = None  # (batch,) rows in use
    seqused_k: Tensor | None = None  # (batch,) keys in use, counted from slot 0
    block_table: Tensor | None = None  # (batch, max_pages)
    cache_batch_idx: Tensor | None = None  # (batch,) row of k and v that a batch row reads
    cache_leftpad: Tensor | None = None  # (batch,) first slot in use
    max_seqlen_q: int = UNBOUNDED
    max_seqlen_k: int = UNBOUNDED


class Variant(NamedTuple):
    """The scalars of a call. Causal is window_right == 0."""

    softmax_scale: float
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    attention_chunk: int = 0  # keys of a chunk that queries see no other than, 0 is off
    softcap: float = 0.0  # 0 is off
    dropout_p: float = 0.0
    deterministic: bool = False
    score_mod: int = 0  # handles of the user's functions (see `mods.functions`), 0 is none
    mask_mod: int = 0
    num_splits: int = 0  # parts that a row's keys are cut into at most, 0 is planned
    split_size: int = 0  # tokens of a part, whatever else is in the batch; 0 is no such size
    latent: bool = False  # v is the first dims of k, in the same memory


def is_banded(x: Variant | AttentionProblem) -> bool:
    """Whether causality, a window or a chunk bounds the keys that a query sees."""
    return x.window_right != UNBOUNDED or is_windowed(x)


def is_windowed(x: Variant | AttentionProblem) -> bool:
    """Whether a query sees no keys that are long before it."""
    return x.window_left != UNBOUNDED or x.attention_chunk > 0


class Call(NamedTuple):
    """One attention call in normal form."""

    operands: Operands
    sequences: Sequences
    variant: Variant

    def flat(self) -> tuple[Any, ...]:
        """The operator's positional arguments."""
        return (*self.operands, *self.sequences, *self.variant)

    @staticmethod
    def unflatten(args: tuple[Any, ...]) -> Call:
        """The inverse of `flat`."""
        a = len(Operands._fields)
        b = a + len(Sequences._fields)
        return Call(Operands(*args[:a]), Sequences(*args[a:b]), Variant(*args[b:]))

    @property
    def varlen(self) -> bool:
        return self.sequences.cu_seqlens_q is not None

    @property
    def cached(self) -> bool:
        """Whether k is a cache or its pages, by `seqused_k` tokens of each row in use."""
        seqs = self.sequences
        return (
            seqs.cu_seqlens_k is None
            and seqs.seqused_k is not None
            and (seqs.block_table is not None or self.operands.k.dim() == 4)
        )

    @property
    def held(self) -> bool:
        """Whether keys are read from rows of a cache, or from pages, as far as each goes."""
        s, k = self.sequences, self.operands.k
        given = (s.cu_seqlens_k, s.seqused_k, s.cache_batch_idx, s.cache_leftpad, s.block_table)
        return k.dim() == 4 and any(x is not None for x in given)

    @property
    def banded(self) -> bool:
        """`is_banded`."""
        return is_banded(self.variant)

    @property
    def windowed(self) -> bool:
        """`is_windowed`."""
        return is_windowed(self.variant)

    @property
    def ragged(self) -> bool:
        """Whether sequences may differ in length or place."""
        return any(x is not None for x in self.sequences[:7])

    @property
    def bounded(self) -> bool:
        """Whether the longest sequence is known, as far as there are several in one tensor: a grid
        of each one's tiles would be quadratic in the tokens of all."""
        longest = self.sequences.max_seqlen_q, self.sequences.max_seqlen_k
        return not self.varlen or self.batch == 1 or UNBOUNDED not in longest

    @property
    def classified(self) -> bool:
        """Whether kernels get lists of blocks of masks that are given as tensors."""
        given = self.operands.attn_mask is not None or self.operands.document_ids_q is not None
        return given and self.bounded

    @property
    def quantized(self) -> bool:
        """Whether k and v are e4m3, times scales."""
        return self.operands.k.dtype == E4M3

    @property
    def batch(self) -> int:
        cu_seqlens_q = self.sequences.cu_seqlens_q
        return self.operands.q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1

    @property
    def seqlen_q(self) -> int:
        """The longest a query sequence can be."""
        longest, q = self.sequences.max_seqlen_q, self.operands.q
        if not self.varlen:
            return q.shape[1]
        return q.shape[0] if longest == UNBOUNDED else longest

    @property
    def seqlen_k(self) -> int:
        """The longest a key sequence can be."""
        k, table, longest = self.operands.k, self.sequences.block_table, self.sequences.max_seqlen_k
        if table is not None:
            return table.shape[1] * k.shape[1]
        if k.dim() == 4:
            return k.shape[1]
        return k.shape[0] if longest == UNBOUNDED else longest

    @property
    def lse_shape(self) -> tuple[int, ...]:
        q = self.operands.q
        return (q.shape[1], q.shape[0]) if self.varlen else (q.shape[0], q.shape[2], q.shape[1])


class Length(NamedTuple):
    length: int


class At(NamedTuple):
    """Where scores stand, for users' functions in PyTorch (`mods.functions`): all broadcast."""

    batch: Tensor | int
    head: Tensor
    q_idx: Tensor
    k_idx: Tensor
    q: Length
    k: Length


MASK_BLOCK = 128
"""Edge of the tiles that masks given as tensors are classified in."""


def mask_grid(call: Call) -> tuple[int, int, int, int]:
    """Shape of `mask_blocks`: (1|batch, 1|heads, tiles of queries, tiles of keys)."""
    operands = call.operands
    mask = operands.attn_mask
    same = mask is None or mask.shape[0] == 1
    alike = same and operands.document_ids_q is None and not call.ragged
    alike = alike and call.variant.mask_mod == 0  # whose ranges may differ
    heads = 1 if mask is None or mask.shape[1] == 1 else operands.q.shape[-2]
    tiles = ((n + MASK_BLOCK - 1) // MASK_BLOCK for n in (call.seqlen_q, call.seqlen_k))
    return (1 if alike else call.batch, heads, *tiles)  # type: ignore[return-value]


ELEMENTWISE = frozenset({
    "alibi_slopes", "attn_mask", "bias", "document_ids", "mask_mod", "score_mod", "softcap",
})  # fmt: skip
"""Features that do something to each score."""

COMPUTED = frozenset({"alibi_slopes", "mask_mod", "score_mod", "softcap"})
"""Those that compute it, without a matrix to read."""


@dataclass(frozen=True)
class AttentionProblem:
    """What a plan may depend on: metadata only, no tensor, no value that lives on a device."""

    device: str  # torch's device type: cpu, cuda, ...
    dtype: str  # float16, bfloat16, float32 or float64
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    attention_chunk: int = 0
    layout: str = "dense"  # dense or varlen
    page_size: int = 0  # 0 is not paged
    features: frozenset[str] = frozenset()  # names of the other features in use
    total_q: int = 0  # rows of packed queries
    num_splits: int = 0
    split_size: int = 0
    latent: bool = False

    @property
    def causal(self) -> bool:
        return self.window_right == 0

    @property
    def banded(self) -> bool:
        """`is_banded`."""
        return is_banded(self)

    @property
    def windowed(self) -> bool:
        """`is_windowed`."""
        return is_windowed(self)

    @property
    def kind(self) -> str:
        """What tiles depend on besides the head dims: "banded" where causality, a window or a chunk
        is all that happens to the scores, "scores" where softcap or ALiBi is, "dropout"; the
        latter two are "masked" where tensors are read for masks or biases besides; else ""."""
        elementwise = self.features & ELEMENTWISE
        masked = "" if elementwise <= COMPUTED else "masked "
        if "dropout" in self.features:
            return masked + "dropout"
        if elementwise:
            return masked + "scores" if elementwise & COMPUTED else ""
        return "banded" if self.banded else ""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def element_bytes(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)


def _features(call: Call) -> frozenset[str]:
    operands, sequences, variant = call
    names = {
        name
        for name in ("bias", "attn_mask", "alibi_slopes", "learnable_sink", "tree_mask")
        if getattr(operands, name) is not None
    }
    if operands.document_ids_q is not None:
        names.add("document_ids")
    if operands.attn_mask is not None and operands.attn_mask.is_floating_point():
        names.add("float_mask")  # beside "attn_mask"
    names |= {
        name
        for name in ("seqused_q", "seqused_k", "cache_batch_idx", "cache_leftpad")
        if getattr(sequences, name) is not None
    }
    if call.quantized:
        names.add("fp8_cache")
    if any(x is not None and x.dim() == 3 for x in (operands.k_descale, operands.v_descale)):
        names.add("token_scales")  # see `quantize.scale_kind`
    if call.held and not alike(operands.k, operands.v):
        names.add("scattered_cache")
    if call.quantized and any(
        n % 2 for x in (operands.k, operands.v) for n in (x.data_ptr(), *x.stride()[:-1])
    ):
        names.add("odd_cache")
    if variant.softcap > 0.0:
        names.add("softcap")
    if variant.dropout_p > 0.0:
        names.add("dropout")
    names |= {name for name in ("score_mod", "mask_mod") if getattr(variant, name)}
    return frozenset(names)


def describe(call: Call) -> AttentionProblem:
    """The metadata of a call."""
    operands, sequences, variant = call
    q, k, v = operands[:3]
    return AttentionProblem(
        device=q.device.type,
        dtype=str(q.dtype).removeprefix("torch."),
        batch=call.batch,
        seqlen_q=call.seqlen_q,
        seqlen_k=call.seqlen_k,
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        window_left=variant.window_left,
        window_right=variant.window_right,
        attention_chunk=variant.attention_chunk,
        layout="varlen" if call.varlen else "dense",
        page_size=k.shape[1] if sequences.block_table is not None else 0,
        features=_features(call),
        total_q=q.shape[0] if call.varlen else 0,
        num_splits=variant.num_splits,
        split_size=variant.split_size,
        latent=variant.latent,
    )


def window_sides(window_size: tuple[int | None, int | None], causal: bool) -> tuple[int, int]:
    """FlashAttention's `window_size` and `causal` as (left, right), -1 where unbounded."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size is {window_size!r}; it must be a pair (left, right)")
    try:
        left, right = (UNBOUNDED if side is None else index(side) for side in window_size)
    except TypeError:
        raise TypeError(f"window_size is {window_size!r}; its sides must be ints or None") from None
    return left, 0 if causal and right >= UNBOUNDED else right


def scale_or_default(softmax_scale: float | None, q: Tensor) -> float:
    """softmax_scale, or 1/sqrt(head_dim)."""
    if softmax_scale is None:
        return float(max(1, q.shape[-1])) ** -0.5
    return as_float("softmax_scale", softmax_scale)


def as_float(name: str, x: Any) -> float:
    """A scalar argument: a number, or a tensor that holds one."""
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {x!r}; it must be a number") from None


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that q, k and v may have."""

E4M3 = torch.float8_e4m3fn
"""The dtype that k and v may have besides, and what a quantised cache is of."""


def latent(k: Tensor, v: Tensor) -> bool:
    """Whether v is the first dims of k in the same memory: multi-head latent attention's cache
    (DeepSeek-V2, 2024). Whoever keeps what follows from it keeps the answer beside it."""
    if v.shape[-1] >= k.shape[-1] or type(k) is not Tensor or torch.compiler.is_compiling():
        return False
    return (
        k.shape[:-1] == v.shape[:-1]
        and k.stride() == v.stride()
        and k.dtype == v.dtype
        and k.data_ptr() == v.data_ptr()
    )
