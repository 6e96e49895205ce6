"""Who computes a cell: flashtile by each backend, PyTorch's kernels, flash-attention's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtile import flash_attn_func, flash_attn_varlen_func, ops
from flashtile.bench import flex
from flashtile.bench.features import Cell, Work
from flashtile.plan import Device, Plan, plan
from flashtile.problem import AttentionProblem

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> out, as flash_attn_func and, packed, as flash_attn_varlen_func have them."""


class CannotError(Exception):
    """A provider does not do a cell: why."""


def build(name: str, cell: Cell, work: Work, device: torch.device) -> Attend:
    """A provider's attention for a cell. Raises CannotError, or what its library raises."""
    if name.startswith("flashtile"):
        return _flashtile(work)
    if name == "flex":
        return _flex(cell, work, device)
    if name in SDPA:
        _refuse(work, "SDPA", ORDER)
    if name == "fa2" and (work.lengths or "window_size" in work.keywords):
        return _torch_varlen(cell, work, device)
    if name in SDPA:
        return _sdpa(name, cell, work)
    return _package(name, work)


def context(name: str) -> AbstractContextManager[None]:
    """What the calls of a provider, and of its backward, run in."""
    if name in SDPA:
        return sdpa_kernel(SDPA[name])
    prefix, _, backend = name.partition("-")
    return only(backend) if prefix == "flashtile" and backend else nullcontext()


@contextmanager
def only(backend: str) -> Iterator[None]:
    """Let every plan choose `backend`. A problem that it cannot do raises CannotError."""
    before = ops.plan
    ops.plan = _planner(backend)  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.plan = before


ORDER = {"deterministic": "argument for the order of its sums"}
"""What PyTorch's own functions lack: they look at a switch of the whole process."""


@lru_cache
def _planner(backend: str) -> Callable[[AttentionProblem, Device], Plan]:
    """One for each backend: calls are replayed by the planner that they were planned with."""

    def planned(problem: AttentionProblem, device: Device) -> Plan:
        try:
            return plan(problem, device, (backend,))
        except LookupError as wrong:
            raise CannotError(str(wrong)) from None

    return planned


def _flashtile(work: Work) -> Attend:
    function = flash_attn_varlen_func if work.packed else flash_attn_func
    return lambda q, k, v: function(q, k, v, **work.keywords)


def _flex(cell: Cell, work: Work, device: torch.device) -> Attend:
    _refuse(work, "FlexAttention", {"dropout_p": "dropout", "learnable_sink": "sink", **ORDER})
    return batched(flex.attention(cell, work, device), work)


def _refuse(work: Work, library: str, lacks: dict[str, str]) -> None:
    """Raise CannotError where a cell asks for what a library lacks, by flashtile's keywords: pages,
    which none of PyTorch's has, and what else it says."""
    for keyword, text in {"block_table": "pages", **lacks}.items():
        if keyword in work.keywords:
            raise CannotError(f"{library} has no {text}")


def batched(attend: Attend, work: Work) -> Attend:
    """For a library that takes packed sequences as a batch of one."""
    if not work.packed:
        return attend
    return lambda q, k, v: attend(q[None], k[None], v[None])[0]


SDPA = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""scaled_dot_product_attention's kernels. The flash kernel is a copy of FlashAttention-2."""


def _sdpa(name: str, cell: Cell, work: Work) -> Attend:
    """SDPA on (batch, heads, seqlen, head_dim) views of the same memory."""
    _refuse(work, "SDPA", {"softcap": "softcap", "learnable_sink": "sink"})
    if name == "fa2" and work.attn_mask is not None:
        raise CannotError("SDPA's flash kernel takes no mask")
    mask = None if work.attn_mask is None else work.attn_mask()
    options = {
        "attn_mask": mask,
        "is_causal": work.causal and mask is None,
        "dropout_p": work.keywords.get("dropout_p", 0.0),
        "enable_gqa": cell.heads != cell.kv_heads,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return batched(attend, work)


def _torch_varlen(cell: Cell, work: Work, device: torch.device) -> Attend:
    """PyTorch's FlashAttention-2 on packed sequences, which has windows too; torch >= 2.11."""
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    lengths = work.lengths or (cell.seqlen,) * cell.batch
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    sides = work.keywords.get("window_size", (-1, 0 if work.causal else -1))
    options = {"window_size": sides, "enable_gqa": True} if cell.heads != cell.kv_heads else {
        "window_size": sides}  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        out = varlen_attn(*rows, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **options)
        return out.view(*q.shape[:-1], -1)

    return attend


PACKAGES = {
    "flash-attn": (
        "flash_attn",
        {"dropout_p", "window_size", "softcap", "alibi_slopes", "deterministic"},
    ),
    "fa3": ("flash_attn_interface", {"window_size", "softcap", "deterministic"}),
    "fa4": ("flash_attn.cute", {"window_size", "softcap", "deterministic"}),
}
"""The flash-attention project's modules: 2, 3 (`hopper/`) and 4, and what they do besides causal
and varlen."""

PROVIDERS = ("flashtile", "flashtile-hopper", "flashtile-triton", "flashtile-torch", *SDPA, "flex",
             *PACKAGES)  # fmt: skip
"""Everyone: flashtile by the plan's choice of backend or by a given one, and the others."""

_VARLEN = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


def importable(name: str) -> bool:
    """Whether a provider is installed; PyTorch's own are."""
    if name not in PACKAGES:
        return True
    module = PACKAGES[name][0]
    return find_spec(module.partition(".")[0]) is not None and find_spec(module) is not None


def _package(name: str, work: Work) -> Attend:
    module, known = PACKAGES[name]
    unknown = set(work.keywords) - known - _VARLEN - {"causal"}
    if unknown:
        raise CannotError(f"{name} has no {', '.join(sorted(unknown))}")
    library = import_module(module)
    function = library.flash_attn_varlen_func if work.packed else library.flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q, k, v, **work.keywords)
        return found[0] if isinstance(found, tuple) else found

    return attend
