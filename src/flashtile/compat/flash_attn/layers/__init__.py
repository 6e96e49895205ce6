"""`flash_attn.layers`: the rotary embedding that flash_attn's own functions go with."""
