"""Compiling the kernels before a call needs them, for GPUs that need not be here.

`cases` names the calls, `launches` asks the backends what they would launch for them, `offline`
compiles a launch for an architecture, `pool` does so in parallel, and `record` judges what came
out: registers, spills, shared memory, matrix instructions, ptxas warnings.
"""
