"""`flash_attn_3.flash_attn_interface`: the names of `flash_attn_interface`."""

from flashtile.compat.flash_attn_interface import *  # noqa: F403
