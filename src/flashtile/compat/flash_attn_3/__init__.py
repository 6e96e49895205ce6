"""`flash_attn_3`: the package that FlashAttention-3's functions lie in under a second name."""

from flashtile.compat.flash_attn_interface import *  # noqa: F403

__version__ = "3.0.0"
"""The release of FlashAttention-3 whose behaviour this is."""
