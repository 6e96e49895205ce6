"""Bad calls over a cache: an error that names the argument, its value and the limit, and a cache
that is bit for bit what it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_with_kvcache

E4M3 = torch.float8_e4m3fn


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def given(**changes: Any) -> dict[str, Any]:
    """A call that appends 3 tokens to each of 2 rows of 16, and what is changed of it."""
    q, k, v = (torch.randn(2, 3, heads, 16) for heads in (4, 2, 2))
    caches = {name: torch.randn(2, 16, 2, 16) for name in ("k_cache", "v_cache")}
    return {"q": q, **caches, "k": k, "v": v, "cache_seqlens": ints(5, 2), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    """The same, packed."""
    flat = {"q": torch.randn(6, 4, 16), "k": torch.randn(6, 2, 16), "v": torch.randn(6, 2, 16)}
    offsets = {"cu_seqlens_q": ints(0, 3, 6), "cu_seqlens_k_new": ints(0, 3, 6)}
    return given(**{**flat, **offsets, **changes})


def quantised(**changes: Any) -> dict[str, Any]:
    caches = {name: torch.randn(2, 16, 2, 16).to(E4M3) for name in ("k_cache", "v_cache")}
    return given(**{**caches, **changes})


ROTARY = {"rotary_cos": torch.rand(16, 4), "rotary_sin": torch.rand(16, 4)}
PREFIX = torch.randn(5, 2, 16), torch.randn(5, 2, 16)
PAGES = {"k_cache": torch.randn(4, 8, 2, 16), "v_cache": torch.randn(4, 8, 2, 16)}

ONE_SCALE = torch.ones(2, 16, 2)

VALUES: list[tuple[dict[str, Any], str]] = [
    (
        quantised(k_descale=torch.ones(2, 1, 2).expand(2, 16, 2), v_descale=torch.ones(2, 16, 2)),
        "k_descale has shape (2, 16, 2) and strides (2, 0, 1); to be written to, no two of",
    ),
    (
        quantised(k_descale=ONE_SCALE, v_descale=ONE_SCALE),
        "k_descale and v_descale are one tensor; tokens have two scales",
    ),
    (
        given(cache_seqlens=ints(1, 2**31 - 1)),
        "cache_seqlens plus 3 new tokens reaches 2147483650; k_cache holds 16",
    ),
    (
        given(rotary_cos=torch.rand(16, 4), rotary_sin=torch.rand(16, 4),
              rotary_seqlens=ints(1, 2**31 - 1)),
        "rotary_cos has 16 positions; rotary_seqlens plus the new tokens needs 2147483650",
    ),
    (
        given(k_cache=torch.randn(1, 16, 2, 16).expand(2, -1, -1, -1)),
        "k_cache has shape (2, 16, 2, 16) and strides (0, 32, 16, 1); to be written to, no two of",
    ),
    (
        given(out=torch.randn(2, 3, 1, 16).expand(-1, -1, 4, -1)),
        "out has shape (2, 3, 4, 16) and strides (48, 16, 0, 1); to be written to",
    ),
    (given(cache_seqlens=14), "cache_seqlens is 14 with 3 new tokens; the cache holds 16"),
    (given(cache_seqlens=-1), "cache_seqlens is -1 with 3 new tokens; the cache holds 16"),
    (given(cache_seqlens=ints(5)), "cache_seqlens has shape (1,); it must be (2,)"),
    (
        given(k=None, v=None, cache_seqlens=ints(5, 17)),
        "cache_seqlens[1] is 17; it must be in [0, 16], what k_cache holds",
    ),
    (
        packed(k=None, v=None, cu_seqlens_k_new=None, cache_seqlens=ints(5, 17)),
        "cache_seqlens[1] is 17; it must be in [0, 16], what k_cache holds",
    ),
    (given(k=None, v=None, cache_seqlens=17), "cache_seqlens is 17; the cache holds 16"),
    (given(cache_seqlens=-(2**40)), "cache_seqlens is -1099511627776; it must be at least 0"),
    (given(cache_seqlens=2**40), "cache_seqlens is 1099511627776; it must be less than 2^31"),
    (
        packed(cu_seqlens_q=ints(), k=None, v=None, cu_seqlens_k_new=None, cache_seqlens=None),
        "cu_seqlens_q has 0 entries; it must have batch + 1",
    ),
    (
        packed(cache_seqlens=ints(5, 14)),
        "cache_seqlens plus 3 new tokens reaches 17; k_cache holds 16",
    ),
    (packed(cu_seqlens_k_new=ints(0, 3, 9)), "cu_seqlens_k_new ends at 9; there are 6 tokens"),
    (packed(cu_seqlens_k_new=ints(0, 4, 3)), "cu_seqlens_k_new decreases after entry 1: [4, 3]"),
    (packed(cu_seqlens_q=ints(1, 3, 6)), "cu_seqlens_q starts at 1; it must start at 0"),
    (packed(max_seqlen_q=2), "max_seqlen_q is 2; the longest sequence has 3 tokens"),
    (
        packed(cu_seqlens_k_new=ints(0, 3)),
        "cu_seqlens_k_new has shape (2,); it must be (3,)",
    ),
    (
        given(k=None, v=None, cu_seqlens_k_new=ints(0, 3, 6)),
        "cu_seqlens_k_new is given and k is None",
    ),
    (given(k=None, v=None, rotary_seqlens=ints(1, 2)), "rotary_seqlens is given and k is None"),
    (given(rotary_seqlens=ints(1, 2)), "rotary_seqlens is given and rotary_cos is None"),
    (
        given(**ROTARY, rotary_seqlens=ints(1, 14)),
        "rotary_cos has 16 positions; rotary_seqlens plus the new tokens needs 17",
    ),
    (given(**ROTARY, rotary_seqlens=ints(-2, 1)), "rotary_seqlens holds -2; positions are at lea"),
    (
        given(rotary_cos=torch.rand(0, 4), rotary_sin=torch.rand(0, 4)),
        "rotary_cos has 0 positions; it must have at least 1",
    ),
    (
        given(**PAGES, block_table=ints(0, 7, 1, 2).view(2, 2), cache_seqlens=ints(7, 2)),
        "block_table holds page 7; the pool has 4",
    ),
    (
        given(**PAGES, block_table=ints(0, 3, -1, 2).view(2, 2)),
        "block_table holds page -1; the pool has 4",
    ),
    (
        given(**PAGES, block_table=ints(0, 3, 1, 2).view(2, 2), cache_seqlens=ints(14, 2)),
        "cache_seqlens plus 3 new tokens reaches 17; block_table holds 16",
    ),
    (given(cache_batch_idx=ints(0, 2)), "cache_batch_idx holds 2; the cache has 2 rows"),
    (given(cache_leftpad=ints(0, -1)), "cache_leftpad[1] is -1; it must be in [0, 16]"),
    (given(tree_mask=torch.ones(2, 3, 4).bool()), "tree_mask has shape (2, 3, 4); it must be (n,"),
    (given(tree_mask=torch.ones(3, 3, 3).bool()), "tree_mask has shape (3, 3, 3); it must be (n,"),
    (given(k_descale=torch.ones(2)), "k_descale is given and k has dtype torch.float32, not"),
    (
        quantised(v_descale=torch.ones(3)),
        "v_descale has shape (3,); it must be (), (2,), (2, 2) or (2, 16, 2)",
    ),
    (
        given(prefix=(PREFIX[0], PREFIX[1][:4])), "prefix V has 4 tokens; K has 5",
    ),
    (
        given(prefix=(PREFIX[0][:, :1], PREFIX[1])),
        "prefix K has shape (5, 1, 16); it must be (any, 2, 16)",
    ),
    (given(prefix=PREFIX, window_size=(4, 0)), "window_size left is 4 and prefix is given"),
    (given(prefix=PREFIX, attention_chunk=4), "attention_chunk is 4 and prefix is given"),
    (given(prefix=PREFIX, alibi_slopes=torch.ones(4)), "alibi_slopes and prefix are given"),
    (
        given(k=None, v=None, prefix=(PREFIX[0].clone().requires_grad_(), PREFIX[1])),
        "an input requires grad; a prefix has no backward",
    ),
    (
        quantised(k=None, v=None, q=torch.randn(2, 3, 4, 16, requires_grad=True)),
        "q requires grad; attention over e4m3 k has no backward",
    ),
]  # fmt: skip

TYPES: list[tuple[dict[str, Any], str]] = [
    (packed(cu_seqlens_k_new=ints(0, 3, 6).long()), "cu_seqlens_k_new has dtype torch.int64; it"),
    (given(cache_seqlens=ints(5, 2).long()), "cache_seqlens has dtype torch.int64; it must be"),
    (
        given(**PAGES, block_table=ints(0, 3, 1, 2).view(2, 2).long()),
        "block_table has dtype torch.int64; it must be torch.int32",
    ),
    (given(**ROTARY, rotary_seqlens=ints(1, 2).long()), "rotary_seqlens has dtype torch.int64; it"),
    (given(rotary_cos=3, rotary_sin=torch.rand(16, 4)), "rotary_cos is a int; it must be"),
    (given(**ROTARY, rotary_seqlens=[1, 2]), "rotary_seqlens is a list; it must be a torch.Tensor"),
    (given(tree_mask=torch.ones(3, 3)), "tree_mask has dtype torch.float32; it must be torch.bool"),
    (quantised(k_descale=torch.ones(2).double()), "k_descale has dtype torch.float64; it must be"),
    (quantised(k=torch.randn(2, 3, 2, 16).half()), "k has dtype torch.float16; q has"),
    (quantised(q=torch.randn(2, 3, 4, 16).double()), "q, k and v have dtypes torch.float64"),
    (given(prefix=PREFIX[0]), "prefix is a Tensor; it must be a pair of tensors"),
    (given(prefix=(PREFIX[0].half(), PREFIX[1])), "prefix K has dtype torch.float16; q has"),
]  # fmt: skip


def test_shapes_are_inferred_on_meta_tensors() -> None:
    """Where there is no autocast to ask for."""
    keywords = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in given().items()}
    out, lse = flash_attn_with_kvcache(**keywords, causal=True, return_softmax_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 3, 4, 16), (2, 4, 3))


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [(x, ValueError, m) for x, m in VALUES] + [(x, TypeError, m) for x, m in TYPES],
    ids=[m for _, m in VALUES + TYPES],
)
def test_errors(keywords: dict[str, Any], kind: type[Exception], message: str) -> None:
    before = [keywords[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(kind, match=re.escape(message)):
        flash_attn_with_kvcache(**keywords)
    for name, x in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(keywords[name].view(torch.uint8), x.view(torch.uint8))
