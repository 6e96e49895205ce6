"""What Gluon calls by different names in Triton 3.6 to 3.9; nothing else here imports either name.

3.7 renamed the barrier of a program's threads. 3.8 renamed the TMA copies and 3.9 keeps the old
names only to raise, so the new ones are asked for first. `aggregate` became public in 3.8.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = gluon.aggregate if hasattr(gluon, "aggregate") else core._aggregate

if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
