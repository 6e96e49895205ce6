"""The Hopper backend's host side: which tensors TMA can address, how, and with which tiles."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import hopper_tiles
from flashtile.api import normalise
from flashtile.backends import hopper, tensormaps
from flashtile.hopper_backward_tiles import backward_tile, cannot_backward
from flashtile.hopper_tiles import TILES, cannot, forward_tile, padded_dim
from flashtile.plan import Device, plan
from flashtile.problem import AttentionProblem, describe

LLAMA = AttentionProblem("cuda", "bfloat16", 1, 4096, 4096, 32, 8, 128, 128, -1, 0)
SM_90 = Device("cuda", "sm_90", True)


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("dims", "padded"),
    [((64, 64), 64), ((40, 40), 64), ((96, 96), 128), ((128, 128), 128), ((192, 192), 256),
     ((256, 256), 256), ((264, 264), None)],
    ids=str,
)  # fmt: skip
def test_head_dims_are_padded_to_the_next_tile(dims: tuple[int, int], padded: int | None) -> None:
    assert padded_dim(*dims) == padded


def test_what_the_kernel_cannot_do_is_said() -> None:
    assert cannot(LLAMA) is None
    for changes, reason in (
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 320, "head_dim_v": 320}, "320"),
        ({"head_dim": 16, "head_dim_v": 16}, "not 16"),
        ({"head_dim": 100, "head_dim_v": 100}, "multiples of 8, this one is 100"),
        ({"seqlen_k": 0}, "empty"),
        ({"page_size": 24}, "pages of a power of two from 8, or a multiple of 128"),
        ({"head_dim": 64, "head_dim_v": 64, "features": frozenset({"bias"})}, "slower"),
    ):
        problem = replace(LLAMA, **changes)  # type: ignore[arg-type]
        assert reason in (cannot(problem) or "")
        assert plan(problem, SM_90).backend == "triton"


def test_what_the_backward_leaves_to_the_portable_kernels() -> None:
    assert cannot_backward(LLAMA, deterministic=False) is None
    assert "any order" in (cannot_backward(LLAMA, deterministic=True) or "")
    for changes, reason in (
        ({"head_dim": 256, "head_dim_v": 256}, "not 256 and 256"),
        ({"layout": "varlen"}, "packed"),
        ({"features": frozenset({"dropout"})}, "dropout"),
        ({"head_dim": 64, "head_dim_v": 64, "features": frozenset({"softcap"})}, "registers"),
    ):
        problem = replace(LLAMA, **changes)  # type: ignore[arg-type]
        assert reason in (cannot_backward(problem, deterministic=False) or "")


def test_tiles_fit_and_do_not_depend_on_lengths_alone() -> None:
    """Named barriers: six are Triton's, one is the queries', the others serve slots and turns."""
    for tile in TILES:
        assert tile.shared_bytes + 256 <= 232_448
        assert tile.slots + (tile.warpgroups if tile.turns else 0) <= 9
        assert tile.frees_queries in ("loaded", "read", "stored")
    for dim in (64, 128):
        tile = backward_tile(replace(LLAMA, head_dim=dim, head_dim_v=dim))
        assert tile.shared_bytes + 256 <= 232_448
    short = replace(LLAMA, head_dim=64, head_dim_v=64, seqlen_q=512, seqlen_k=512)
    long = replace(short, seqlen_q=16384, seqlen_k=16384)
    assert (forward_tile(short).warpgroups, forward_tile(long).warpgroups) == (2, 3)
    softcapped = replace(long, features=frozenset({"softcap"}))
    assert forward_tile(softcapped).warpgroups == 2  # score mods need registers
    assert hopper_tiles.forward_tile(LLAMA).block_m == 128


def test_which_tensors_tma_can_address() -> None:
    x = _half(2, 20, 4, 64)
    assert tensormaps.maps(x)
    assert tensormaps.maps(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert tensormaps.maps(_half(2, 20, 3, 4, 64)[:, :, 1])
    assert tensormaps.maps(x[:1].expand(1, 20, 4, 64))
    assert not tensormaps.maps(x[:1].expand(2, 20, 4, 64))  # a stride of 0
    assert not tensormaps.maps(_half(2, 20, 4, 65)[..., :64])  # strides of 130 bytes
    assert not tensormaps.maps(_half(2 * 20 * 4 * 64 + 1)[1:].view(2, 20, 4, 64))  # 2 bytes off


def test_heads_are_folded_where_they_follow_each_other() -> None:
    x = _half(2, 20, 4, 64)
    assert tensormaps.folds(x, 64)
    assert not tensormaps.folds(_half(2, 4, 20, 64).transpose(1, 2), 64)
    assert not tensormaps.folds(_half(2, 20, 4, 48), 64)  # the next head would fill the padding
    folded, apart = (tensormaps.tensor_map(x, 64, 64, fold) for fold in (True, False))
    assert (list(folded.shape), list(folded.strides)) == ([2, 20, 256], [5120, 256, 1])
    assert (list(apart.shape), list(apart.strides)) == ([2, 4, 20, 64], [5120, 64, 256, 1])
    assert list(folded.block_shape) == [1, 64, 64]
    assert list(apart.block_shape) == [1, 1, 64, 64]


def test_a_dense_call_is_planned_for_hopper() -> None:
    q, k = (torch.empty(1, 200, h, 96, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    problem = replace(describe(normalise(q, k, k, causal=True)), device="cuda")
    chosen = plan(problem, SM_90)
    assert (chosen.backend, chosen.hopper) == ("hopper", forward_tile(problem))
    assert (chosen.tile.block_q, chosen.tile.block_k) == (128, 128)


def test_tile_counters_belong_to_a_stream_or_to_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made by another thread: where this one allocates, in the pool of a graph that
    torch.compile warms up for, nothing may stay."""
    hopper = pytest.importorskip("flashtile.backends.hopper")
    spare, late = [torch.zeros(4) for _ in range(4)], torch.zeros(2)
    now, makers = {"capturing": True, "stream": 5}, []

    def clear(device: int) -> list[Tensor]:
        makers.append(threading.get_ident())
        return list(spare)

    def counter(**changes: Any) -> int:
        now.update(changes)
        return int(hopper._counter("cuda", 0).data_ptr())

    for name, new in (("_cleared_counters", clear), ("_counters", {}), ("_spare", {})):
        monkeypatch.setattr(hopper, name, new)
    for name, key in (("isCurrentStreamCapturing", "capturing"), ("getCurrentRawStream", "stream")):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *_, key=key: now[key], raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: late)

    assert counter() == late.data_ptr()  # a graph before any launch clears its own
    first = counter(capturing=False)
    assert counter() == first
    found = {first, counter(stream=6), counter(capturing=True), counter()}
    assert found == {x.data_ptr() for x in spare}
    assert counter() == late.data_ptr()
    assert counter(capturing=False, stream=5) == first
    assert len(makers) == 1
    assert makers[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("keywords", "portable"),
    [({}, False), ({"softmax_scale": 2.0**27}, False), ({"softmax_scale": 1e9}, True),
     ({"softmax_scale": -1e9}, False), ({"softcap": 1e9}, True),
     ({"seqused_k": torch.tensor([3, 20], dtype=torch.int32)}, True)],
    ids=str,
)  # fmt: skip
def test_what_goes_to_the_portable_kernel(
    keywords: dict[str, Any], portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores whose unit times -1e30 is infinite; a cache with gaps between its rows."""
    asked: list[str] = []
    monkeypatch.setattr(hopper.triton, "forward", lambda call, plan: asked.append("portable"))
    monkeypatch.setattr(hopper, "run", lambda launch: asked.append("hopper"))
    x = _half(2, 30, 4, 128)[:, :20]
    call = normalise(x, x, x, **keywords)
    hopper.forward(call, plan(replace(describe(call), device="cuda"), SM_90))
    assert asked == ["portable" if portable else "hopper"]
