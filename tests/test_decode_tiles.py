"""When a plan decodes, and with which tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashtile.decode_tiles import (
    REGISTERS_PER_SM,
    SHARED_PER_SM,
    cannot_decode,
    decode_config,
    shared_bytes,
)
from flashtile.explain import explain_problem
from flashtile.plan import Device, plan
from flashtile.testing.problems import LLAMA_DECODE, SM_90
from flashtile.tiles import SHARED_LIMIT, shortage


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"seqlen_q": 16}, None),
        ({"seqlen_q": 17}, "17 queries of 4 heads are more than 64 rows"),
        ({"seqlen_q": 64, "heads": 8}, None),
        ({"seqlen_q": 4, "kv_heads": 1}, None),
        ({"seqlen_k": 255}, "fewer than 256 keys"),
        ({"seqlen_k": 16, "split_size": 64}, None),
        ({"features": frozenset({"bias"})}, "bias is for the general kernels"),
        ({"features": frozenset({"softcap"})}, None),
        ({"features": frozenset({"learnable_sink"})}, None),
        ({"features": frozenset({"cache_leftpad"})}, None),
        ({"dtype": "float64"}, "float32"),
        ({"head_dim": 576, "head_dim_v": 512, "latent": True}, None),
        ({"head_dim": 576, "head_dim_v": 512}, "up to 512, this one is 576"),
        ({"head_dim": 640, "head_dim_v": 512, "latent": True}, "up to 576, this one is 640"),
        ({"layout": "varlen", "seqlen_q": 32, "total_q": 32}, None),
        ({"layout": "varlen", "seqlen_q": 4096, "total_q": 4096}, "128 queries of 4 heads"),
        ({"layout": "varlen", "seqlen_q": 8, "total_q": 4096}, None),
    ],
    ids=str,
)
def test_few_queries_over_long_keys_are_decoded(
    changes: dict[str, Any], reason: str | None
) -> None:
    found = cannot_decode(replace(LLAMA_DECODE, **changes))

    assert (reason in (found or "")) if reason else found is None


def test_a_plan_says_how_keys_are_split() -> None:
    for changes, text in (
        ({}, "planned on the device, for 2 programs an SM, keys by TMA"),
        ({"page_size": 1}, "planned on the device, for 2 programs an SM"),
        ({"num_splits": 3}, "at most 3 a row"),
        ({"split_size": 1024}, "every 1,024 keys"),
    ):
        problem = replace(LLAMA_DECODE, **changes)  # type: ignore[arg-type]
        assert dict(explain_problem(problem, SM_90).rows())["splits"] == text
    prefill = dict(explain_problem(replace(LLAMA_DECODE, seqlen_q=512), SM_90).rows())
    assert prefill["not split"] == "512 queries of 4 heads are more than 64 rows"
    assert plan(LLAMA_DECODE, Device("cpu")).decode is None


@pytest.mark.parametrize("features", [frozenset(), frozenset({"fp8_cache"})], ids=["", "e4m3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
def test_tiles_fit_together(arch: str, dtype: str, features: frozenset[str]) -> None:
    """As many programs as run together have shared memory and registers for it."""
    for dim in (8, 64, 96, 128, 192, 256, 512):
        for seqlen_q in (1, 8, 16):
            problem = replace(LLAMA_DECODE, dtype=dtype, head_dim=dim, head_dim_v=dim,
                              seqlen_q=seqlen_q, features=features)  # fmt: skip
            if shortage(arch, dtype, dim, dim):  # no plan has kernels
                continue
            config = decode_config(arch, problem)
            need = shared_bytes(config, problem)
            assert need <= SHARED_LIMIT[arch], (dim, seqlen_q, config)
            assert config.programs_per_sm * (need + 1024) <= SHARED_PER_SM[arch] or (
                config.programs_per_sm == 1
            )
            threads = 32 * config.num_warps * config.programs_per_sm
            assert (config.max_registers or 0) * threads <= REGISTERS_PER_SM
            assert config.block_m >= min(16, seqlen_q * 4)


def test_a_limit_of_registers_is_for_three_programs_together() -> None:
    e4m3 = frozenset({"fp8_cache"})
    three = decode_config("sm_90", replace(LLAMA_DECODE, features=e4m3))
    two = decode_config("sm_90", replace(LLAMA_DECODE, features=e4m3 | {"token_scales"}))

    assert (three.programs_per_sm, three.max_registers) == (3, 168)
    assert (two.programs_per_sm, two.max_registers) == (2, None)
    assert decode_config("sm_90", LLAMA_DECODE).max_registers is None


def test_split_size_has_one_tile_whatever_the_longest_queries() -> None:
    packed = replace(LLAMA_DECODE, layout="varlen", total_q=512, split_size=1024)
    tiles = {decode_config("sm_90", replace(packed, seqlen_q=n)) for n in (1, 4, 16, 512)}

    assert len(tiles) == 1
    assert decode_config("sm_90", LLAMA_DECODE).block_m == 16
