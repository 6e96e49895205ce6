"""A dozen small problems on a GPU, forward and backward, to be run under NVIDIA's memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Without torch's cache every tensor is an allocation of its own, and an access past its end an error
that the checker sees; within one large cached block it would go unnoticed. Arguments: names of
cases, default those below. TRITON_DISABLE_LINE_INFO=0 names the lines of kernels.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from flashtile.testing import CASES, Case, run

NAMES = (
    "causal_longer_keys", "odd_head_dim", "wide_values", "window", "softcap_window_causal",
    "alibi_causal_dropout", "bias", "mask", "sink_empty_rows", "documents", "varlen_cross_causal",
    "varlen_dropout", "varlen_bias_mask", "paged_by_one", "paged_window_sink",
)  # fmt: skip

WIDE = ("causal_longer_keys", "documents", "varlen_cross_causal", "varlen_bias_mask",
        "paged_window_sink")  # fmt: skip
"""Again with head dim 128 and pages of 16, which the kernels for Hopper do."""


def main(names: tuple[str, ...]) -> None:
    by_name = {case.name: case for case in CASES}
    wide = [_widened(by_name[name]) for name in WIDE if name in names]
    for case in (*(by_name[name] for name in names), *wide):
        results = run(case.draw(1, torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
        assert results.out.isfinite().all(), case.name
        print(case.name, case.head_dim, flush=True)
    _documents_of_sequences_without_keys()


def _widened(case: Case) -> Case:
    return replace(case, head_dim=128, page_size=16 if case.page_size else 0)


def _documents_of_sequences_without_keys() -> None:
    """The last sequence's keys begin where the tensor of their documents ends."""
    problem = Case("keyless", lengths=((17, 40), (9, 0)), head_dim=128).draw(
        1, torch.bfloat16, "cuda"
    )
    ids = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (26, 40)]
    problem.keywords["document_ids"] = tuple(ids)
    run(problem)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or NAMES)
