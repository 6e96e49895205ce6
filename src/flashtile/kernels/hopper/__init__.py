"""Kernels for NVIDIA Hopper (sm_90a), in Gluon: warp-specialised, fed by TMA, on wgmma.

They share masks, score mods, views and numbers with the portable kernels, as source.
"""
