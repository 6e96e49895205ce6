"""Named problems: every feature and the pairs that have broken other libraries.

A case is a shape and the features it uses. `Case.draw` makes its tensors; they are random, of no
special size, and different for every seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Arguments of a public function."""

    tensors: dict[str, Tensor]  # q, k, v, and what else is differentiable
    keywords: dict[str, Any]
    varlen: bool


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int = 61
    seqlen_k: int = 61
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    lengths: tuple[tuple[int, int], ...] = ()  # (seqlen_q, seqlen_k) of packed sequences
    page_size: int = 0
    features: dict[str, Any] = field(default_factory=dict)  # plain keywords
    tensors: tuple[str, ...] = ()  # bias, attn_mask, alibi_slopes, ... to draw

    def __str__(self) -> str:
        return self.name

    def draw(self, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
        """Random tensors for the case: the same for the same seed, on any device."""
        g = torch.Generator().manual_seed(seed)
        d, dv = self.head_dim, self.head_dim_v or self.head_dim
        shape_q: tuple[int, ...] = (self.batch, self.seqlen_q)
        shape_k: tuple[int, ...] = (self.batch, self.seqlen_k)
        keywords: dict[str, Any] = dict(self.features)
        if self.lengths:
            shape_q, shape_k = ((sum(n),) for n in zip(*self.lengths, strict=True))
            keywords |= self._packing(g)
        if self.page_size:
            shape_k = (keywords["block_table"].max().item() + 2, self.page_size)
        tensors = {
            "q": torch.randn(*shape_q, self.heads, d, generator=g),
            "k": torch.randn(*shape_k, self.kv_heads, d, generator=g),
            "v": torch.randn(*shape_k, self.kv_heads, dv, generator=g),
        }
        for name in self.tensors:
            x = self._draw(name, g)
            (tensors if name in ("bias", "learnable_sink") else keywords)[name] = x
        tensors = {n: x.to(device, dtype) for n, x in tensors.items()}
        keywords = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in keywords.items()}
        return Problem(tensors, keywords, bool(self.lengths))

    def _packing(self, g: torch.Generator) -> dict[str, Any]:
        columns = zip(*self.lengths, strict=True)
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in columns)
        packing: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        if self.page_size:
            per_row = max(-(-n // self.page_size) for _, n in self.lengths) + 1
            pages = torch.randperm(per_row * len(self.lengths), generator=g)
            packing["block_table"] = pages.view(len(self.lengths), per_row).to(torch.int32)
        return packing

    def _draw(self, name: str, g: torch.Generator) -> Tensor:
        batch = len(self.lengths) or self.batch
        longest_q = max((n for n, _ in self.lengths), default=self.seqlen_q)
        longest_k = max((n for _, n in self.lengths), default=self.seqlen_k)
        full = (batch, self.heads, longest_q, longest_k)
        if name == "bias":
            return torch.randn(1, *full[1:], generator=g)
        if name == "attn_mask":
            return torch.rand(batch, 1, *full[2:], generator=g) > 0.4
        if name == "alibi_slopes":
            return torch.rand(self.heads, generator=g) * 0.3
        if name == "learnable_sink":
            return torch.randn(self.heads, generator=g)
        if name == "document_ids":
            tokens = (sum(n for n, _ in self.lengths),) if self.lengths else full[:1] + full[2:3]
            return torch.randint(0, 3, tokens, generator=g).sort(-1).values
        raise ValueError(f"{name=} is no drawable tensor")


RAGGED = ((17, 17), (0, 5), (33, 33), (1, 1), (8, 0), (40, 40))
CROSS = ((17, 40), (0, 5), (33, 20), (1, 64), (8, 0))

CASES = (
    Case("full"),
    Case("causal", features={"causal": True}),
    Case("causal_longer_keys", seqlen_k=133, features={"causal": True}),
    Case("causal_longer_queries", seqlen_q=90, seqlen_k=37, features={"causal": True}),
    Case("one_query", seqlen_q=1, seqlen_k=300, features={"causal": True}),
    Case("mqa", heads=6, kv_heads=1, features={"causal": True}),
    Case("odd_head_dim", head_dim=46, features={"causal": True}),
    Case("wide_values", head_dim=24, head_dim_v=64, features={"causal": True}),
    Case("narrow_values", head_dim=48, head_dim_v=8),
    Case("window", seqlen_k=90, features={"window_size": (11, 5)}),
    Case("window_left", features={"window_size": (7, -1)}),
    Case("window_left_longer_queries", seqlen_q=37, seqlen_k=20, features={"window_size": (9, -1)}),
    Case("window_right", features={"window_size": (None, 3)}),
    Case("window_causal", seqlen_q=130, seqlen_k=130, features={"window_size": (16, 0)}),
    Case("window_none_visible", seqlen_q=90, seqlen_k=20, features={"window_size": (4, 4)}),
    Case("window_wider_than_keys", features={"window_size": (500, 500)}),
    Case("chunk", features={"attention_chunk": 16}),
    Case("chunk_causal_longer_keys", seqlen_k=133,
         features={"attention_chunk": 37, "causal": True}),
    Case("chunk_window_longer_queries", seqlen_q=90, seqlen_k=37,
         features={"attention_chunk": 13, "window_size": (9, 3)}),
    Case("chunk_of_one", features={"attention_chunk": 1}),
    Case("chunk_longer_than_keys", features={"attention_chunk": 500}),
    Case("softcap", features={"softcap": 2.0}),
    Case("softcap_window_causal", features={"softcap": 5.0, "window_size": (9, 0)}),
    Case("alibi", seqlen_k=75, tensors=("alibi_slopes",)),
    Case("alibi_causal_dropout", features={"causal": True, "dropout_p": 0.2},
         tensors=("alibi_slopes",)),
    Case("bias", tensors=("bias",)),
    Case("bias_softcap_causal", features={"softcap": 3.0, "causal": True}, tensors=("bias",)),
    Case("mask", tensors=("attn_mask",)),
    Case("mask_bias_dropout", features={"dropout_p": 0.3}, tensors=("attn_mask", "bias")),
    Case("sink", tensors=("learnable_sink",)),
    Case("sink_window", features={"window_size": (9, 0)}, tensors=("learnable_sink",)),
    Case("sink_empty_rows", seqlen_q=50, seqlen_k=20, features={"causal": True},
         tensors=("learnable_sink",)),
    Case("documents", tensors=("document_ids",)),
    Case("documents_causal", features={"causal": True}, tensors=("document_ids",)),
    Case("dropout", features={"dropout_p": 0.17}),
    Case("dropout_causal", seqlen_k=83, features={"dropout_p": 0.5, "causal": True}),
    Case("scale", features={"softmax_scale": 0.3}),
    Case("varlen", lengths=RAGGED),
    Case("varlen_causal", lengths=RAGGED, features={"causal": True}),
    Case("varlen_cross_causal", lengths=CROSS, features={"causal": True}),
    Case("varlen_window_softcap", lengths=CROSS, features={"window_size": (6, 2), "softcap": 4.0}),
    Case("varlen_dropout", lengths=CROSS, features={"dropout_p": 0.25}),
    Case("varlen_alibi_sink", lengths=CROSS, features={"causal": True},
         tensors=("alibi_slopes", "learnable_sink")),
    Case("varlen_bias_mask", lengths=CROSS, tensors=("bias", "attn_mask")),
    Case("varlen_documents", lengths=RAGGED[2:4], kv_heads=4, tensors=("document_ids",)),
    Case("varlen_chunk_dropout", lengths=CROSS,
         features={"attention_chunk": 7, "causal": True, "dropout_p": 0.25}),
    Case("varlen_chunk_documents", lengths=RAGGED[2:4], kv_heads=4,
         features={"attention_chunk": 9, "softcap": 4.0}, tensors=("document_ids",)),
    Case("paged", lengths=CROSS, page_size=16, features={"causal": True}),
    Case("paged_by_one", lengths=CROSS, page_size=1),
    Case("paged_chunk_sink", lengths=CROSS, page_size=16,
         features={"attention_chunk": 11, "causal": True}, tensors=("learnable_sink",)),
    Case("paged_window_sink", lengths=CROSS, page_size=7, features={"window_size": (9, 0)},
         tensors=("learnable_sink",)),
)  # fmt: skip
"""One case for each feature, and combinations."""
