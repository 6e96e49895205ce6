"""Process-wide switches, read at call time: `flashtile.config.checked = True`."""

checked: bool = False
"""Check the values of lengths and page tables on accelerators too, at the price of a host sync.

On the CPU they are always checked.
"""

allow_tf32: bool = False
"""Let the Triton kernels round fp32 inputs of matrix products to tf32 (10 bits of mantissa).

Its error is about 4e-3 of the largest result. Off, fp32 is IEEE fp32 on the CUDA cores, about ten
times slower.
"""
