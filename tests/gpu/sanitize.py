"""A dozen small problems on a GPU, forward and backward, to be run under NVIDIA's memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Without torch's cache every tensor is an allocation of its own, and an access past its end an error
that the checker sees; within one large cached block it would go unnoticed. Arguments: names of
cases, default those below. TRITON_DISABLE_LINE_INFO=0 names the lines of kernels.
"""

from __future__ import annotations

import sys

import torch

from flashtile.testing import CASES, run

NAMES = (
    "causal_longer_keys", "odd_head_dim", "wide_values", "window", "softcap_window_causal",
    "alibi_causal_dropout", "bias", "mask", "sink_empty_rows", "documents", "varlen_cross_causal",
    "varlen_dropout", "varlen_bias_mask", "paged_by_one", "paged_window_sink",
)  # fmt: skip


def main(names: tuple[str, ...]) -> None:
    by_name = {case.name: case for case in CASES}
    for name in names:
        results = run(by_name[name].draw(1, torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
        assert results.out.isfinite().all(), name
        print(name, flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or NAMES)
