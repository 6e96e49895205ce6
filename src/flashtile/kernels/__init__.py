"""Device code in Triton: one forward mainloop, one backward each for dQ and for dK/dV.

Variants compose: views (`views`) say where rows lie, masks (`masks`) carry the ranges they imply,
score mods (`scores`) and dropout (`dropout`) are plain functions with runtime operands. Nothing
here imports torch, and nothing imports this before a kernel is launched.
"""
