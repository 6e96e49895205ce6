"""A GPT in one file: rotary positions, RMS norm, grouped-query attention, tied embeddings.

The attention function is an argument: anything that takes q (batch, seqlen, heads, head_dim), k and
v with kv_heads, and `causal=True`. Two models that differ in nothing else show whether two
attention functions agree. With a `KVCache` it is `flash_attn_with_kvcache`, which also rotates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtile.api import flash_attn_func, flash_attn_with_kvcache
from flashtile.rotary import rotate

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 256  # a byte each
    seqlen: int = 256  # the longest context
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "rotary_base":
                check_size(name, value)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of {self.kv_heads}, kv_heads"
            )
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 0.0):
            raise ValueError(f"rotary_base is {self.rotary_base}; it must be finite and above 0")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in pages that block_table finds."""

    k: Tensor  # (layers, pages, page_size, kv_heads, head_dim), of one layer without the first
    v: Tensor
    block_table: Tensor  # (batch, max_pages) int32 page numbers
    seqlens: Tensor  # (batch,) int32 tokens so far

    def layer(self, index: int) -> KVCache:
        return self._replace(k=self.k[index], v=self.v[index])


class SelfAttention(nn.Module):
    """Causal self-attention with fewer KV heads than query heads."""

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        kv_width = config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: (batch, seqlen, width); cos, sin: (positions, head_dim / 2); cache: this layer's."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v)
        )
        # Normalised queries and keys keep the scores small, so that high learning rates are stable.
        q, k = (_norm(each) for each in (q, k))
        if cache is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            q, k = (rotate(each, cos, sin, positions, interleaved=False) for each in (q, k))
            seen = self.attention(q, k, v, causal=True)
        else:
            seen = flash_attn_with_kvcache(
                q, cache.k, cache.v, k, v, cos, sin, cache.seqlens, block_table=cache.block_table,
                causal=True, rotary_interleaved=False,
            )  # fmt: skip
        return self.out(seen.flatten(-2))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to the stream."""

    def __init__(self, config: GPTConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = SelfAttention(config, attention)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(_norm(x), cos, sin, cache)
        return x + self.down(F.relu(self.up(_norm(x))).square())


class GPT(nn.Module):
    """Next-token logits of a sequence: (batch, seqlen) int64 to (batch, seqlen, vocab_size)."""

    def __init__(self, config: GPTConfig, attention: Attention = flash_attn_func) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self._initialise()

    def _initialise(self) -> None:
        """Blocks start as the identity: what they add to the stream starts at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.width**-0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """With a cache, tokens follow those in it, and their keys and values are appended to it."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be (batch, seqlen)")
        if tokens.shape[1] > self.config.seqlen:
            raise ValueError(
                f"tokens has seqlen {tokens.shape[1]}; it must be at most {self.config.seqlen}, "
                "the context"
            )
        x = _norm(self.embedding(tokens))
        cos, sin = self._rotary_tables()
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if cache is None else cache.layer(i))
        return F.linear(_norm(x), self.embedding.weight)

    def _rotary_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (config.seqlen, head_dim / 2), fp32 or wider.

        Not buffers: a model of the meta device that is then loaded would have none in them.
        """
        config, weight = self.config, self.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dims = torch.arange(0, config.head_dim, 2, device=weight.device, dtype=dtype)
        positions = torch.arange(config.seqlen, device=weight.device, dtype=dtype)
        angles = torch.outer(positions, config.rotary_base ** -(dims / config.head_dim))
        return angles.cos(), angles.sin()

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of each of tokens (batch, seqlen + 1) but the first."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens (batch, seqlen), and after them `count` sampled ones, or likeliest at 0."""
        check_temperature(temperature)
        if tokens.shape[-1] == 0:
            raise ValueError("tokens has seqlen 0; it must be at least 1")
        for _ in range(count):
            logits = self(tokens[:, -self.config.seqlen :])[:, -1]
            following = sample(logits, temperature, generator)
            tokens = torch.cat((tokens, following[:, None]), dim=1)
        return tokens


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Tokens (batch,) drawn from logits (batch, vocab_size), or the likeliest at 0."""
    if temperature == 0.0:
        return logits.argmax(-1)
    below = logits.float() - logits.float().amax(-1, keepdim=True)  # finite at any temperature
    p = (below / max(temperature, 1e-30)).softmax(-1)
    # The smallest of exponential times with rates p; torch.multinomial would wait for the device.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def check_size(name: str, size: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError(f"{name} is {size}; it must be an int")
    if size < 1:
        raise ValueError(f"{name} is {size}; it must be at least 1")


def check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature >= 0.0):
        raise ValueError(f"temperature is {temperature}; it must be finite and at least 0")


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
