"""Process-wide switches, read at call time: `flashtile.config.checked = True`."""

checked: bool = False
"""Check the values of lengths and page tables on accelerators too, at the price of a host sync.

On the CPU they are always checked.
"""
