"""FlexAttention, compiled once for every shape and mod."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashtile.bench.features import Cell, Work


@cache
def compiled() -> Any:
    """torch.compile'd, with room for as many variants as the suites have."""
    # Each shape and mod is one compilation; the default of 8 would fall back to eager attention.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, 1024)
    # Backward is timed again and again over one forward: it must not reuse what that has saved.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def attention(
    cell: Cell, work: Work, device: torch.device, function: Any = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(q, k, v) -> out, all (batch, seqlen, heads, head_dim). The block mask is made beforehand."""
    function = function or compiled()
    options = {
        "score_mod": work.score_mod,
        "block_mask": None
        if work.mask_mod is None
        else create_block_mask(work.mask_mod, None, None, cell.seqlen, cell.seqlen, device),
        "enable_gqa": cell.heads != cell.kv_heads,
    }
    return lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(
        1, 2
    )
