"""Suite `memory`: peak allocation of forward plus backward, as the sequence grows.

One causal head: on a CPU of dim 64 in fp32, on a GPU of dim 128 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtile import flash_attn_func
from flashtile.bench.options import Options
from flashtile.testing.memory import peak_bytes
from flashtile.testing.standard import standard_attention


class Setting(NamedTuple):
    dtype: torch.dtype
    heads: int
    head_dim: int
    seqlens: tuple[int, ...]
    longest_quadratic: int  # what keeps the whole score matrix is not run beyond


SETTINGS = {
    # Standard attention needs 0.9 GB at 8,192 tokens, and 3.5 GB at twice the length.
    "cpu": Setting(torch.float32, 1, 64, (1024, 2048, 4096, 8192, 16384), 8192),
    "cuda": Setting(torch.bfloat16, 1, 128, tuple(2**i for i in range(10, 20)), 16384),
}

PATHS: dict[str, dict[str, Any]] = {"causal": {}, "softcap": {"softcap": 30.0}}
"""Plain causal (on a CPU that is torch's kernel), and our own blocks everywhere."""

QUADRATIC = ("standard", "math")


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row a path and length: `NAME_bytes` of everyone who can, above the inputs."""
    setting = SETTINGS[options.device.type]
    for path, keywords in PATHS.items():
        for seqlen in options.seqlens or setting.seqlens:
            row: dict[str, Any] = {"path": path, "seqlen": seqlen}
            for name, attend in _providers(path, keywords, options.device).items():
                if name not in QUADRATIC or seqlen <= setting.longest_quadratic:
                    row[f"{name}_bytes"] = _peak(attend, seqlen, setting, options.device)
            yield row


def _providers(
    path: str, keywords: dict[str, Any], device: torch.device
) -> dict[str, Callable[..., Tensor]]:
    ours: dict[str, Callable[..., Tensor]] = {
        "flashtile": lambda q, k, v: flash_attn_func(q, k, v, causal=True, **keywords),
        "standard": lambda q, k, v: standard_attention(q, k, v, causal=True, **keywords),
    }
    if device.type != "cuda" or path != "causal":
        return ours
    return ours | {"fa2": _sdpa(SDPBackend.FLASH_ATTENTION), "math": _sdpa(SDPBackend.MATH)}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def _peak(
    attend: Callable[..., Tensor], seqlen: int, setting: Setting, device: torch.device
) -> int:
    torch.manual_seed(0)
    shape = (1, seqlen, setting.heads, setting.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=setting.dtype, device=device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    if device.type == "cuda":
        step()  # libraries take their workspaces
    return peak_bytes(step, device)
