"""The public functions: FlashAttention-2's names, order and defaults, extras keyword-only."""

from flashtile.api.cache import flash_attn_combine, flash_attn_with_kvcache
from flashtile.api.call import normalise
from flashtile.api.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from flashtile.api.quantize import quantize_kv
from flashtile.api.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "normalise",
    "quantize_kv",
]
