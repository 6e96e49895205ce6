"""What the suites ask of attention, each feature in the terms of every library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Mod = Callable[..., Tensor]

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Cell:
    """One problem of a suite. `feature` is a key of `FEATURES`."""

    feature: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


class Work(NamedTuple):
    """A cell's attention. None stands for plain attention."""

    keywords: dict[str, Any]  # of flash_attn_func, or of flash_attn_varlen_func
    pairs: float  # (query, key) pairs that one head computes, over the batch; causal counts half
    baseline: Cell  # the plain attention that the feature is compared with
    mask_mod: Mod | None = None  # FlexAttention's: (batch, head, q, k) -> seen
    score_mod: Mod | None = None  # FlexAttention's: (score, batch, head, q, k) -> score
    attn_mask: Callable[[], Tensor] | None = None  # SDPA's, where is_causal does not say it
    lengths: tuple[int, ...] = ()  # of the sequences that are packed in one row of tokens
    learned: tuple[Tensor, ...] = ()  # operands with a gradient, besides q, k and v
    page_size: int = 0  # k and v are (pages, page_size, kv_heads, head_dim) where it is not 0

    @property
    def causal(self) -> bool:
        return bool(self.keywords.get("causal", False))

    @property
    def packed(self) -> bool:
        """Whether q, k and v are (tokens, heads, head_dim)."""
        return "cu_seqlens_q" in self.keywords


def flops(cell: Cell, work: Work, mode: str) -> float:
    """Of two matrix products forward, five backward: 4 and 10 a pair and element of a head."""
    return 4.0 * work.pairs * cell.heads * cell.head_dim * (1.0 if mode == "fwd" else 2.5)


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def full(cell: Cell, device: torch.device) -> Work:
    return Work({}, cell.batch * float(cell.seqlen) ** 2, cell)


def causal(cell: Cell, device: torch.device) -> Work:
    pairs = cell.batch * cell.seqlen**2 / 2
    return Work({"causal": True}, pairs, replace(cell, feature="causal"), causal_mod)


def window(cell: Cell, device: torch.device) -> Work:
    left = window_left(cell)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k <= left)

    return _masked(cell, device, "causal", sees, {"causal": True, "window_size": (left, 0)})


def window_full(cell: Cell, device: torch.device) -> Work:
    """Against attention that sees everything, where causal attention has dropped half of it."""
    return window(cell, device)._replace(baseline=replace(cell, feature="full"))


def window_left(cell: Cell) -> int:
    """A sixteenth of the sequence: 1,024 keys to the left at 16,384 tokens."""
    return cell.seqlen // 16


def softcap(cell: Cell, device: torch.device) -> Work:
    cap = 30.0

    def squashed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    plain = causal(cell, device)
    return plain._replace(keywords={"causal": True, "softcap": cap}, score_mod=squashed)


def alibi(cell: Cell, device: torch.device) -> Work:
    slopes = torch.logspace(-8 / cell.heads, -8, cell.heads, base=2.0, device=device)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (q - k).abs()

    def attn_mask() -> Tensor:
        """A head at a time: the whole of it is 8.6 GB in bf16, 17 GB before it is rounded."""
        index = torch.arange(cell.seqlen, device=device)
        distance = (index[:, None] - index).float()
        seen = -distance.masked_fill(distance < 0, torch.inf)
        return torch.stack([(slope * seen).to(DTYPE) for slope in slopes])[None]

    plain = causal(cell, device)
    keywords = {"causal": True, "alibi_slopes": slopes}
    return plain._replace(keywords=keywords, score_mod=biased, attn_mask=attn_mask)


def dropout(cell: Cell, device: torch.device) -> Work:
    return causal(cell, device)._replace(keywords={"causal": True, "dropout_p": 0.1})


def documents(cell: Cell, device: torch.device) -> Work:
    """Sixteen of them, half to one and a half times a sixteenth of the row long."""
    lengths = document_lengths(cell.seqlen)
    ids = _ids(lengths, device).expand(cell.batch, -1)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ids[0, q] == ids[0, k]

    return _masked(cell, device, "full", sees, {"document_ids": ids})._replace(lengths=lengths)


def document_lengths(tokens: int, count: int = 16) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(count, generator=generator) + 0.5
    ends = (shares.cumsum(0) / shares.sum() * tokens).round().int().tolist()
    return tuple(b - a for a, b in zip([0, *ends], ends, strict=False))


def prefix(cell: Cell, device: torch.device) -> Work:
    """A user's function: causality but for the first eighth of the keys, which all queries see."""
    from flashtile.testing.functions import prefixed  # noqa: PLC0415, which imports triton

    seen = cell.seqlen // 8
    counts = torch.full((cell.batch,), seen, dtype=torch.int32, device=device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < seen) | (k <= q)

    return _masked(cell, device, "causal", sees, {"mask_mod": prefixed(counts, ranges=True)})


def blocks(cell: Cell, device: torch.device) -> Work:
    """A bool tensor of blocks of 128 x 128: a quarter of them at random, and the diagonal."""
    count = -(-cell.seqlen // 128)
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(count, count, generator=generator) < 0.25) | torch.eye(count).bool()
    kept = kept.repeat_interleave(128, 0).repeat_interleave(128, 1).to(device)
    mask = kept[: cell.seqlen, : cell.seqlen].contiguous()
    return _tensor_mask(cell, device, "full", mask)


def mask(cell: Cell, device: torch.device) -> Work:
    """A bool tensor that says what causal says."""
    ones = torch.ones(cell.seqlen, cell.seqlen, dtype=torch.bool, device=device)
    return _tensor_mask(cell, device, "causal", ones.tril_())


def bias(cell: Cell, device: torch.device) -> Work:
    return _biased(cell, device, learned=False)


def learned_bias(cell: Cell, device: torch.device) -> Work:
    return _biased(cell, device, learned=True)


def _biased(cell: Cell, device: torch.device, learned: bool) -> Work:
    shape = (1, cell.heads, cell.seqlen, cell.seqlen)
    generator = torch.Generator(device).manual_seed(0)
    tensor = torch.randn(shape, dtype=DTYPE, device=device, generator=generator)
    tensor.requires_grad_(learned)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + tensor[0, h, q, k]

    plain = full(replace(cell, feature="full"), device)
    return plain._replace(
        keywords={"bias": tensor}, score_mod=biased, attn_mask=lambda: tensor,
        learned=(tensor,) if learned else (),
    )  # fmt: skip


def gqa(cell: Cell, device: torch.device) -> Work:
    """Against as many KV heads as query heads."""
    plain = causal(cell, device)
    return plain._replace(baseline=replace(plain.baseline, kv_heads=cell.heads))


def sink(cell: Cell, device: torch.device) -> Work:
    """A logit of each head that takes its share of every row."""
    logits = torch.linspace(-2.0, 2.0, cell.heads, device=device)
    return causal(cell, device)._replace(keywords={"causal": True, "learnable_sink": logits})


def deterministic(cell: Cell, device: torch.device) -> Work:
    """Gradients that are the same bits, under causality or the mask that the name says, against the
    same by default."""
    mask = cell.feature.removeprefix("deterministic").strip() or "causal"
    plain, baseline = FEATURES[mask](cell, device), replace(cell, feature=mask)
    keywords = {**plain.keywords, "deterministic": True}
    return plain._replace(keywords=keywords, baseline=baseline, lengths=())


def lengths(cell: Cell, device: torch.device) -> Work:
    """Any length or number of heads, against the nearest power of two and 16 heads."""
    plain = causal(cell, device)
    near = min((2**i for i in range(20)), key=lambda n: abs(n - cell.seqlen))
    batch = max(1, cell.batch * cell.seqlen // near)
    equal = replace(plain.baseline, batch=batch, seqlen=near, heads=16, kv_heads=16)
    return plain._replace(baseline=equal)


def varlen(cell: Cell, device: torch.device) -> Work:
    """Packed sequences of lognormal lengths, against a batch of equal ones of about equal work."""
    lengths = lognormal_lengths(cell.seqlen)
    squares = sum(n * n for n in lengths)
    ids, seqlen = _ids(lengths, device), max(1, round(squares / cell.seqlen / 128)) * 128

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[q] == ids[k]) & (q >= k)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    keywords = {"causal": True, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}  # fmt: skip
    equal = replace(
        cell, feature="causal", batch=max(1, round(cell.seqlen / seqlen)), seqlen=seqlen
    )
    return Work(
        keywords, squares / 2, equal, sees, attn_mask=lambda: _dense(sees, cell.seqlen, device),
        lengths=lengths,
    )  # fmt: skip


def pages(cell: Cell, device: torch.device) -> Work:
    """K and V in the pages of a pool, in random order: a prefill of one row, against dense keys."""
    size = int(cell.feature.removeprefix("page "))
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(-(-cell.seqlen // size), generator=generator).int()[None]
    cu_seqlens = torch.tensor([0, cell.seqlen], dtype=torch.int32, device=device)
    plain = causal(cell, device)
    keywords = {"causal": True, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                "max_seqlen_q": cell.seqlen, "max_seqlen_k": cell.seqlen,
                "block_table": table.to(device)}  # fmt: skip
    return plain._replace(keywords=keywords, page_size=size)


def lognormal_lengths(tokens: int) -> tuple[int, ...]:
    """Lengths of median tokens / 32 and sigma 1 that add up to `tokens`, the last cut short."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = tokens / 32 * float(torch.randn((), generator=generator).exp())
        lengths.append(min(max(1, round(drawn)), tokens - sum(lengths)))
    return tuple(lengths)


def _ids(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The sequence that each token of a row belongs to, int32."""
    index = torch.arange(len(lengths), dtype=torch.int32)
    return index.repeat_interleave(torch.tensor(lengths)).to(device)


def _tensor_mask(cell: Cell, device: torch.device, baseline: str, tensor: Tensor) -> Work:
    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return tensor[q, k]

    return _masked(cell, device, baseline, sees, {"attn_mask": tensor})


def _masked(
    cell: Cell, device: torch.device, baseline: str, sees: Mod, keywords: dict[str, Any]
) -> Work:
    dense = _dense(sees, cell.seqlen, device)
    pairs = cell.batch * float(dense.sum())
    plain = replace(cell, feature=baseline)
    return Work(keywords, pairs, plain, sees, attn_mask=lambda: _dense(sees, cell.seqlen, device))


def _dense(sees: Mod, seqlen: int, device: torch.device) -> Tensor:
    """A mask mod as a bool tensor (seqlen, seqlen)."""
    index = torch.arange(seqlen, device=device)
    zero = index.new_zeros(())
    return sees(zero, zero, index[:, None], index[None, :])


FEATURES: dict[str, Callable[[Cell, torch.device], Work]] = {
    "full": full,
    "causal": causal,
    "window": window,
    "window full": window_full,
    "softcap": softcap,
    "alibi": alibi,
    "dropout": dropout,
    "documents": documents,
    "prefix": prefix,
    "blocks": blocks,
    "mask": mask,
    "bias": bias,
    "learned bias": learned_bias,
    "gqa": gqa,
    "mqa": gqa,
    "layer": gqa,
    "sink": sink,
    "deterministic": deterministic,
    "deterministic full": deterministic,
    "deterministic documents": deterministic,
    "deterministic prefix": deterministic,
    "deterministic blocks": deterministic,
    "deterministic mask": deterministic,
    "lengths": lengths,
    "varlen": varlen,
    "page 16": pages,
    "page 256": pages,
}

SAME_BITS = tuple(name for name in FEATURES if name.startswith("deterministic"))
"""Features of which only the gradients are of interest."""
