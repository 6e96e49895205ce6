"""Metadata of calls on an H200, for whoever asks what is planned and launched for them."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.plan import Device
from flashtile.problem import AttentionProblem

SM_90 = Device("cuda", "sm_90", True)

LLAMA = AttentionProblem("cuda", "bfloat16", 1, 4096, 4096, 32, 8, 128, 128, -1, 0)
"""Causal attention of a layer of Llama 3 8B."""

LLAMA_DECODE = AttentionProblem("cuda", "bfloat16", 32, 1, 8192, 32, 8, 128, 128)
"""A token of each of 32 rows over 8,192 keys of the same layer."""


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)
