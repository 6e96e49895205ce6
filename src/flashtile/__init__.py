"""flashtile: exact attention for PyTorch, memory linear in sequence length, written in Python."""

from flashtile import config, reference
from flashtile.api import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    quantize_kv,
)
from flashtile.explain import explain
from flashtile.mods import MaskFunction, ScoreFunction

__version__ = "0.1.0"

__all__ = [
    "MaskFunction",
    "ScoreFunction",
    "config",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "quantize_kv",
    "reference",
]
