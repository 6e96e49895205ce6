"""The plan is a pure function of metadata: choices, reasons, and counts by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashtile import explain
from flashtile.explain import explain_problem
from flashtile.plan import BLOCK_ELEMENTS, Device, backends, plan, visible_pairs
from flashtile.problem import MASK_BLOCK, AttentionProblem
from flashtile.tiles import _HALF_BY_ARCH, KERNELS, SHARED_LIMIT, configs, shared_bytes

CPU = Device("cpu")
LLAMA = AttentionProblem("cpu", "float32", 1, 4096, 4096, 32, 8, 128, 128, window_right=0)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 9), (9, 5), (12, 12), (1, 30)])
@pytest.mark.parametrize("left", [-1, 0, 2, 50])
@pytest.mark.parametrize("right", [-1, 0, 3, 50])
@pytest.mark.parametrize("chunk", [0, 1, 4, 40])
def test_visible_pairs_by_counting(
    seqlen_q: int, seqlen_k: int, left: int, right: int, chunk: int
) -> None:
    problem = replace(
        LLAMA, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_left=left, window_right=right,
        attention_chunk=chunk,
    )  # fmt: skip
    count = 0
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            distance = j - (i + seqlen_k - seqlen_q)
            inside = chunk == 0 or j // chunk == (j - distance) // chunk
            banded = (left == -1 or distance >= -left) and (right == -1 or distance <= right)
            count += inside and banded
    assert visible_pairs(problem) == count


def test_flops_and_bytes_of_a_llama_layer() -> None:
    chosen = plan(LLAMA, CPU)
    pairs = 4096 * 4097 // 2 * 32
    assert chosen.flops_forward == 4 * pairs * 128
    assert chosen.flops_backward == 10 * pairs * 128
    tokens = 4 * 4096 * 128 * (32 + 8 + 8 + 32)
    assert chosen.bytes_forward == tokens + 4 * 4096 * 32


def test_blocks_stay_within_their_bound() -> None:
    for batch, seqlen_q, heads in (
        (1, 1, 1),
        (64, 1, 32),
        (1, 8192, 8),
        (256, 77, 4),
        (2, 300, 128),
    ):
        problem = replace(LLAMA, batch=batch, seqlen_q=seqlen_q, heads=heads, kv_heads=heads)
        tile = plan(problem, CPU).tile
        elements = tile.batches * heads * tile.block_q * tile.block_k
        assert tile.block_q <= seqlen_q
        assert tile.batches == 1 or elements <= BLOCK_ELEMENTS


@pytest.mark.parametrize(
    ("device", "name", "reason"),
    [
        (CPU, "hopper", "needs an NVIDIA Hopper GPU (sm_90), this device is cpu"),
        (CPU, "triton", "needs a GPU that Triton compiles for, this device is cpu"),
        (Device("cuda", "sm_80", True), "hopper", "(sm_90), this device is sm_80"),
        (Device("cuda", "sm_90", False), "triton", "needs triton, which is not installed"),
        (Device("cuda", "sm_90", False), "hopper", "needs triton, which is not installed"),
        (Device("cuda", "sm_75", True), "triton", "needs bfloat16 matrix instructions (sm_80)"),
        (Device("mps"), "triton", "this device is mps"),
    ],
)
def test_reasons(device: Device, name: str, reason: str) -> None:
    assert reason in (dict(backends(device))[name] or "")
    assert reason in dict(plan(LLAMA, device).passed_over)[name]


def test_the_best_of_those_that_may_be_chosen() -> None:
    gpu = Device("cuda", "sm_90", True)
    llama = replace(LLAMA, dtype="bfloat16")
    found = plan(llama, gpu)
    assert (found.backend, found.passed_over) == ("hopper", ())
    assert found.hopper is not None
    assert found.kernels is not None  # of the backward
    assert plan(llama, gpu, ("triton", "torch")).backend == "triton"
    wide = replace(llama, head_dim=320, head_dim_v=320)
    assert plan(wide, gpu).backend == "triton"
    assert "320" in dict(plan(wide, gpu).passed_over)["hopper"]
    with pytest.raises(LookupError, match=r"hopper .*320"):
        plan(wide, gpu, ("hopper",))


def test_gradients_of_what_another_backend_attends_with() -> None:
    gpu = Device("cuda", "sm_90", True)
    narrow = replace(LLAMA, dtype="bfloat16", head_dim=64, head_dim_v=64,
                     features=frozenset({"dropout"}))  # fmt: skip
    found = plan(narrow, gpu)
    assert (found.backend, found.gradients) == ("triton", "hopper")
    assert plan(narrow, gpu, ("triton", "torch")).gradients == "triton"
    assert plan(replace(narrow, dtype="float32"), gpu).gradients == "triton"
    assert plan(narrow, Device("cuda", "sm_80", True)).gradients == "triton"


def test_triton_does_what_its_accumulators_hold() -> None:
    gpu = Device("cuda", "sm_80", True)
    assert plan(LLAMA, gpu).backend == "triton"
    assert plan(LLAMA, gpu).kernels is not None
    for change, reason in (({"head_dim_v": 520}, "up to 512"), ({"dtype": "float64"}, "float64")):
        chosen = plan(replace(LLAMA, **change), gpu)  # type: ignore[arg-type]
        assert chosen.backend == "torch"
        assert reason in dict(chosen.passed_over)["triton"]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (96, 96), (192, 128), (256, 256), (64, 512),
                                  (512, 512)], ids=str)  # fmt: skip
def test_tiles_fit_shared_memory_or_the_plan_says_why(
    arch: str, dtype: str, dims: tuple[int, int]
) -> None:
    problem = replace(LLAMA, device="cuda", dtype=dtype, head_dim=dims[0], head_dim_v=dims[1])
    chosen = plan(problem, Device("cuda", arch, True))
    if chosen.kernels is None:
        assert max(dims) == 512 or arch == "gfx942"
        assert "bytes of shared memory" in dict(chosen.passed_over)["triton"]
        return
    for kind in ("", "banded", "scores", "masked scores", "dropout", "masked dropout"):
        tiles = configs(arch, dtype, *dims, kind)
        for kernel in KERNELS:
            config = getattr(tiles, kernel)
            needed = shared_bytes(kernel, config, *dims, problem.element_bytes)
            estimated = dtype == "float32" or arch not in _HALF_BY_ARCH  # others were compiled
            assert not estimated or needed <= SHARED_LIMIT[arch]
            assert MASK_BLOCK % config.block_q == MASK_BLOCK % config.block_k == 0
            assert min(config.block_q, config.block_k) >= 16


def test_explanation_names_the_choice_and_what_was_passed_over() -> None:
    q, k = torch.randn(2, 100, 8, 64), torch.randn(2, 300, 2, 64)
    text = str(explain(q, k, k, causal=True, softcap=3.0, window_size=(128, 0), attention_chunk=64))
    for part in ("100 queries x 300 keys", "8 query, 2 KV", "float32 on cpu", "softcap", "torch",
                 "128 to the left", "in chunks of 64", "not hopper", "not triton"):  # fmt: skip
        assert part in text
    cu = torch.tensor([0, 40, 100], dtype=torch.int32)
    packed = q[0], q[0], q[0]
    text = str(explain(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu))
    assert "batch 2" in text
    assert "varlen" in text
    for keywords in ({"return_lse": True}, {"return_attn_probs": True}, {"out": q}):
        assert explain(q, k, k, **keywords) == explain(q, k, k)


HOPPER_TILE = "64 queries x 128 keys, dQ added in any order"


@pytest.mark.parametrize(
    ("arch", "feature", "deterministic", "backward", "reason"),
    [
        ("sm_90", None, False, HOPPER_TILE, None),
        ("sm_90", None, True, f"{HOPPER_TILE}, as integers", None),
        ("sm_90", "bias", False, HOPPER_TILE, None),
        ("sm_90", "dropout", False, HOPPER_TILE, None),
        ("sm_90", "attn_mask", True, f"{HOPPER_TILE}, as integers", None),
        ("sm_90", "mask_mod", True, f"{HOPPER_TILE}, as integers", None),
        ("sm_80", None, False, "dQ 64 queries x 64 keys, dK", "needs an NVIDIA Hopper GPU"),
        ("", None, False, "", "needs an NVIDIA Hopper GPU"),
    ],
)
def test_explanation_of_the_backward(
    arch: str, feature: str | None, deterministic: bool, backward: str, reason: str | None
) -> None:
    kind, features = "cuda" if arch else "cpu", frozenset({feature} if feature else ())
    problem = replace(LLAMA, device=kind, dtype="bfloat16", features=features)
    rows = dict(explain_problem(problem, Device(kind, arch, True), deterministic).rows())
    assert rows.get("backward", "").startswith(backward)
    assert ("backward" in rows) == bool(backward)
    assert rows.get("not hopper", "").startswith(reason or "")
    assert ("not hopper" in rows) == (reason is not None)


def test_explaining_validates_like_the_call() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"dropout_p is 2.0; it must be in \[0, 1\)"):
        explain(q, q, q, dropout_p=2.0)
