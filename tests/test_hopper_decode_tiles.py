"""When the Hopper decode kernel takes a call, and with which tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashtile.decode_tiles import SHARED_PER_SM
from flashtile.explain import explain_problem
from flashtile.hopper_decode_tiles import PROGRAMS_PER_SM, cannot_stream, decode_tile
from flashtile.plan import Device, plan
from flashtile.testing.problems import LLAMA_DECODE, SM_90

STREAMED = frozenset({"seqused_k", "softcap", "alibi_slopes"})
E4M3 = frozenset({"fp8_cache"})


def _named(value: Any) -> str:
    """The same in every process, where a set's order is not."""
    if isinstance(value, dict) and "features" in value:
        value = value | {"features": sorted(value["features"])}
    return str(value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"seqlen_q": 16}, None),
        ({"seqlen_q": 16, "heads": 40}, "has 64 queries times heads of a KV head at a time"),
        ({"seqlen_q": 17}, "more than 64 rows"),
        ({"layout": "varlen", "seqlen_q": 4, "total_q": 64}, None),
        ({"dtype": "float32"}, "float16 and bfloat16"),
        ({"head_dim": 32}, "head dims from 33 to 256"),
        ({"page_size": 16}, None),
        ({"page_size": 384}, None),
        ({"page_size": 8}, "pages of a multiple of 16 tokens, these are of 8"),
        ({"page_size": 1}, "these are of 1"),
        ({"num_splits": 3}, "their parts are given"),
        ({"split_size": 512}, "their parts are given"),
        ({"features": STREAMED}, None),
        ({"features": E4M3}, None),
        ({"features": E4M3, "head_dim": 64, "head_dim_v": 64}, "head dim 128, not 64"),
        ({"features": E4M3, "head_dim_v": 96}, "reads e4m3 of head dim 128, not 96"),
        ({"features": E4M3, "seqlen_q": 4}, None),
        ({"features": E4M3, "seqlen_q": 5}, "16 queries times heads of a KV head, these are 20"),
        ({"features": E4M3, "split_size": 512}, "their parts are given"),
        ({"features": E4M3 | {"token_scales"}}, None),
        ({"features": E4M3 | {"token_scales"}, "dtype": "float16"}, "these are float16"),
        ({"features": E4M3 | {"token_scales"}, "page_size": 16}, "not in pages"),
        ({"features": frozenset({"tree_mask"})}, "has no tree_mask"),
        ({"features": frozenset({"scattered_cache"})}, "reads caches by TMA"),
        ({"seqlen_k": 255}, "fewer than 256 keys"),
        ({"batch": 8192, "seqlen_k": 2**20, "page_size": 16}, "blocks of keys in 32 bits"),
    ],
    ids=_named,
)
def test_what_keys_are_streamed_for(changes: dict[str, Any], reason: str | None) -> None:
    problem = replace(LLAMA_DECODE, **changes)
    found = cannot_stream(problem)

    assert (reason in (found or "")) if reason else found is None
    assert (plan(problem, SM_90).stream is None) == (reason is not None)


def test_the_portable_kernel_has_it_elsewhere() -> None:
    assert plan(LLAMA_DECODE, Device("cuda", "sm_80", True)).stream is None
    assert plan(LLAMA_DECODE, SM_90, ("triton",)).stream is None


def test_an_explanation_says_why_not() -> None:
    rows = dict(explain_problem(replace(LLAMA_DECODE, num_splits=2), SM_90).rows())
    assert rows["not by TMA"] == "deals out keys by itself, here their parts are given"


def test_an_explanation_of_e4m3_names_the_kernel_that_reads_it() -> None:
    """Streamed, it is Hopper's, with its tile; else the portable one's, and Hopper's reason."""
    streamed = explain_problem(replace(LLAMA_DECODE, features=E4M3), SM_90)
    rows = dict(streamed.rows())
    assert rows["backend"] == "hopper"
    assert rows["tile"].startswith("8 queries x 128 keys")
    assert rows["splits"].endswith("keys by TMA")
    assert "not hopper" not in rows
    assert streamed.plan.gradients == "triton"
    portable = explain_problem(replace(LLAMA_DECODE, features=E4M3, head_dim_v=96), SM_90)
    config, rows = portable.plan.decode, dict(portable.rows())
    assert config is not None
    assert rows["backend"] == "triton"
    assert rows["tile"].startswith(f"{config.block_m} queries x {config.block_n} keys")
    assert rows["not hopper"] == "reads e4m3 of head dim 128, not 96"
    prefill = explain_problem(replace(LLAMA_DECODE, features=E4M3, seqlen_q=512), SM_90)
    assert dict(prefill.rows())["not hopper"] == "has no fp8_cache"


@pytest.mark.parametrize(("seqlen_q", "rows"), [(1, 8), (2, 8), (3, 16), (4, 16)])
def test_tiles_of_e4m3_have_as_many_bytes(seqlen_q: int, rows: int) -> None:
    wide, tile = (decode_tile(replace(LLAMA_DECODE, seqlen_q=seqlen_q, features=x))
                  for x in (frozenset[str](), E4M3))  # fmt: skip
    assert (wide.block_m, tile.block_m) == (64, rows)
    assert tile.block_n == 2 * wide.block_n
    assert tile.shared_bytes == wide.shared_bytes


@pytest.mark.parametrize("dim", [40, 64, 96, 128, 192, 256])
def test_tiles_fit_together(dim: int) -> None:
    tile = decode_tile(replace(LLAMA_DECODE, head_dim=dim, head_dim_v=dim))
    assert PROGRAMS_PER_SM * (tile.shared_bytes + 1024 + 512) <= SHARED_PER_SM["sm_90"]
    assert tile.padded >= dim
    assert tile.block_n * tile.padded == 8192


@pytest.mark.parametrize(
    ("batch", "scan"), [(1, 32), (32, 32), (33, 128), (129, 1024), (5000, 1024)]
)
def test_sequences_are_looked_at_together(batch: int, scan: int) -> None:
    assert decode_tile(replace(LLAMA_DECODE, batch=batch)).scan == scan


def test_many_rows_are_merged_by_all_programs() -> None:
    assert decode_tile(replace(LLAMA_DECODE, seqlen_q=4)).alone
    assert not decode_tile(replace(LLAMA_DECODE, seqlen_q=5)).alone
