"""The decode kernels: how keys are shared out among programs, and where tiles of several heads and
queries lie. Here a tile is 16 rows, a block 16 keys, and up to six programs share the work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flashtile import decode_tiles, flash_attn_varlen_func, flash_attn_with_kvcache, plan, reference
from flashtile.backends import cached, decode
from flashtile.decode_tiles import DecodeConfig
from flashtile.testing import assert_within_budget, fence

CONFIG = DecodeConfig(16, 16, 1, 1, programs_per_sm=6)
HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decode_tiles, "LEAST_KEYS", 0)
    monkeypatch.setattr(decode, "SCANS", (2, 4))
    with _dealt_to(CONFIG):
        yield


def _dealt_to(config: DecodeConfig) -> Any:
    plan.plan.cache_clear()
    return patch.object(plan, "decode_config", lambda *_: config)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cache(lengths: tuple[int, ...], capacity: int, page: int = 0, **changes: Any) -> Any:
    """(caches, keywords): whatever no row uses is NaN, and table entries past its end are wild."""
    rows = len(lengths)
    per_row = -(-capacity // page) if page else 1
    shape = (rows * per_row + 1, page) if page else (rows, capacity)
    caches = [torch.randn(*shape, KV_HEADS, DIM, dtype=changes.get("dtype")) for _ in "kv"]
    there = torch.zeros(shape, dtype=torch.bool)
    keywords: dict[str, Any] = {"cache_seqlens": _ints(*lengths)}
    table = torch.randperm(shape[0])[: rows * per_row].view(rows, per_row).to(torch.int32)
    for row, length in enumerate(lengths):
        slots = torch.arange(length)
        if page:
            there[table[row, slots // page].long(), slots % page] = True
            table[row, -(-length // page) :] = 2**30
        else:
            there[row, :length] = True
    if page:
        keywords["block_table"] = table
    for cache in caches:
        cache[~there] = math.nan
    return caches, keywords


def _assert_right(
    q: Tensor, caches: list[Tensor], keywords: dict[str, Any], launches: int = 2
) -> Tensor:
    fences = [fence(x) for x in caches]
    with patch.object(decode, "run", wraps=decode.run) as launched:
        out, lse = flash_attn_with_kvcache(
            q, *(guard.tensor for guard in fences), **keywords, return_softmax_lse=True
        )
    assert launched.call_count == launches
    ignored = {n: x for n, x in keywords.items() if n not in ("num_splits", "split_size")}
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **ignored)
    eager, _, _ = reference.attention_with_kvcache(q, *caches, **ignored, dtype=None)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
    return out


FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "chunk": {"attention_chunk": 23, "causal": True},
    "mods": {"causal": True, "softcap": 5.0, "alibi_slopes": torch.tensor([0.1, 0.4, 0.2, 0.9])},
    "sink": {"learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window_size": (None, 0)},
}


PAGES, QUERIES = (0, 1, 3, 32), (1, 5, 9)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("page", PAGES)
def test_lengths_pages_and_features(page: int, features: str) -> None:
    """Rows of nothing, of one key, of part of a block and of many; one to two tiles of queries,
    whose number rotates: each meets every page size and every feature."""
    seqlen_q = QUERIES[(PAGES.index(page) + list(FEATURES).index(features)) % 3]
    torch.manual_seed(seqlen_q + page)
    dtype = torch.float16 if page == 3 else torch.float32
    caches, keywords = _cache((0, 70, 1, 37), 72, page, dtype=dtype)
    q = torch.randn(4, seqlen_q, HEADS, DIM, dtype=dtype)
    _assert_right(q, caches, keywords | FEATURES[features])


@pytest.mark.parametrize("config", [
    DecodeConfig(16, 16, 1, 1, programs_per_sm=1),
    DecodeConfig(16, 16, 1, 1, programs_per_sm=21),
    DecodeConfig(16, 16, 1, 1, programs_per_sm=16),
], ids=lambda c: str(c.programs_per_sm))  # fmt: skip
@pytest.mark.parametrize("lengths", [(150,), (90, 0, 0, 0, 0, 0, 17), (0, 0, 0), (16, 32, 48, 1)])
def test_any_number_of_programs(config: DecodeConfig, lengths: tuple[int, ...]) -> None:
    """One that has all keys, more than there are blocks, one long row among empty ones."""
    torch.manual_seed(len(lengths))
    caches, keywords = _cache(lengths, 150)
    with _dealt_to(config):
        _assert_right(torch.randn(len(lengths), 3, HEADS, DIM), caches, keywords | {"causal": True})


@pytest.mark.parametrize("programs", [1, 7, 21])
@pytest.mark.parametrize("lengths", [(150,), (90, 0, 0, 0, 0, 0, 17), (0, 0, 0), (16, 32, 48, 1)])
def test_the_last_part_of_a_tile_merges(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], programs: int
) -> None:
    """In the same launch, which leaves its counters cleared for the next one."""
    counter = torch.zeros(programs, dtype=torch.int32)
    tile = decode._tile
    monkeypatch.setattr(decode, "_tile", lambda *given: replace(tile(*given), alone=True))
    monkeypatch.setattr(decode, "counters_beside", lambda *_: counter)
    torch.manual_seed(len(lengths))
    caches, keywords = _cache(lengths, 150)
    keywords |= {"causal": True, "learnable_sink": torch.randn(HEADS)}
    q = torch.randn(len(lengths), 9, HEADS, DIM)
    with _dealt_to(replace(CONFIG, programs_per_sm=programs)):
        first = _assert_right(q, caches, keywords, launches=1)
        assert not counter.any()
        assert torch.equal(first, _assert_right(q, caches, keywords, launches=1))


@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_parts_that_the_caller_asks_for(splits: int) -> None:
    caches, keywords = _cache((70, 3, 0, 33), 72)
    _assert_right(torch.randn(4, 2, HEADS, DIM), caches, keywords | {"num_splits": splits})


@pytest.mark.parametrize(("size", "page"), [(16, 5), (40, 0), (40, 5), (1000, 0)])
def test_split_size_gives_the_same_bits_in_any_batch(size: int, page: int) -> None:
    """Alone, among others, and with other numbers of programs."""
    lengths = (70, 0, 95, 33)
    caches, keywords = _cache(lengths, 96, page)
    q = torch.randn(4, 3, HEADS, DIM)
    features = {"split_size": size, "causal": True, "window_size": (60, 0)}
    together = _assert_right(q, caches, keywords | features)
    for row in range(len(lengths)):
        alone = {n: x[row : row + 1] for n, x in keywords.items()}
        own = caches if page else [cache[row : row + 1] for cache in caches]
        with _dealt_to(replace(CONFIG, programs_per_sm=row + 1)):
            found = flash_attn_with_kvcache(q[row : row + 1], *own, **alone, **features)
        assert torch.equal(found[0], together[row])


@pytest.mark.parametrize("page", [0, 7])
@pytest.mark.parametrize("longest", [9, None])
def test_ragged_queries(longest: int | None, page: int) -> None:
    """A prefill and single tokens in one call; rows out of use and padding rows are cleared."""
    lengths, queries, used = (70, 12, 0, 41), (1, 9, 2, 3), (1, 7, 2, 3)
    q = torch.randn(sum(queries) + 4, HEADS, DIM)
    offsets = _ints(0, *torch.tensor(queries).cumsum(0).tolist())
    if page:
        caches, keywords = _cache(lengths, 77, page)
        k, v = caches
        keywords["seqused_k"] = keywords.pop("cache_seqlens")
        keywords["cu_seqlens_k"] = None
    else:
        k, v = (torch.randn(sum(lengths), KV_HEADS, DIM) for _ in "kv")
        keywords = {"cu_seqlens_k": _ints(0, *torch.tensor(lengths).cumsum(0).tolist())}
    keywords |= {"cu_seqlens_q": offsets, "seqused_q": _ints(*used), "causal": True,
                 "learnable_sink": torch.randn(HEADS)}  # fmt: skip
    there = torch.zeros(len(q), dtype=torch.bool)
    for start, count in zip(offsets.tolist(), used, strict=False):
        there[start : start + count] = True
    q[~there] = math.nan
    with patch.object(decode, "run", wraps=decode.run) as launched:
        out, lse = flash_attn_varlen_func(
            q, k, v, **keywords, max_seqlen_q=longest, return_lse=True
        )
    assert launched.call_count == 2
    golden = reference.attention(q, k, v, **keywords)
    eager = reference.attention(q, k, v, **keywords, dtype=None)
    assert_within_budget(out, eager.out, golden.out, "out")
    assert_within_budget(lse, eager.lse, golden.lse, "lse")
    assert out[~there].eq(0).all()
    assert lse[:, ~there].eq(-math.inf).all()


@pytest.mark.parametrize("features", [
    {}, {"causal": True, "learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"num_splits": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ragged", [False, True])
def test_a_prefix_joins_in_the_last_launches(ragged: bool, features: dict[str, Any]) -> None:
    """Where it is a row's only key, where one program had the others, where several had."""
    torch.manual_seed(1)
    lengths = (70, 5, 33) if "causal" in features else (70, 0, 1)
    caches, keywords = _cache(lengths, 72)
    for cache in caches:
        cache.nan_to_num_(1.0)
    prefix = torch.randn(2, 40, KV_HEADS, DIM)
    q = torch.randn(3, 4, HEADS, DIM)
    counts = (4, 4, 2) if ragged else (4, 4, 4)
    given = torch.cat([x[:n] for x, n in zip(q, counts, strict=True)]) if ragged else q
    offsets = {"cu_seqlens_q": _ints(0, 4, 8, 10)} if ragged else {}
    with (
        patch.object(decode, "run", wraps=decode.run) as launched,
        patch.object(cached, "_merge") as merged,
    ):
        out, lse = flash_attn_with_kvcache(
            given, *caches, **keywords, **features, **offsets, prefix=tuple(prefix),
            return_softmax_lse=True,
        )  # fmt: skip
    assert launched.call_count == 4
    merged.assert_not_called()
    longer = [torch.cat((p.expand(3, -1, -1, -1), x), 1)
              for p, x in zip(prefix, caches, strict=True)]  # fmt: skip
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        place = slice(4 * row, 4 * row + count)
        exact, _, _ = reference.attention_with_kvcache(
            q[row : row + 1, :count], *(x[row : row + 1] for x in longer),
            cache_seqlens=length + 40, **{n: x for n, x in features.items() if n != "num_splits"},
        )  # fmt: skip
        found = (out[place], lse[:, place]) if ragged else (out[row], lse[row])
        torch.testing.assert_close(found[0], exact.out[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], exact.lse[0].float(), rtol=1e-5, atol=1e-5)


def test_a_prefix_that_many_queries_see_is_split() -> None:
    """72 rows of 16 keys each, where tiles have 64 rows."""
    caches, keywords = _cache((40,) * 36, 40)
    q, prefix = torch.randn(36, 1, HEADS, DIM), torch.randn(2, 70, KV_HEADS, DIM)
    with (
        patch.object(cached, "PART", 16),
        patch.object(decode, "launches", wraps=decode.launches) as launches,
    ):
        out = flash_attn_with_kvcache(q, *caches, **keywords, prefix=tuple(prefix))
    assert [x.args[0].variant.num_splits for x in launches.call_args_list] == [4, 0]
    longer = [torch.cat((p.expand(36, -1, -1, -1), x), 1)
              for p, x in zip(prefix, caches, strict=True)]  # fmt: skip
    exact, _, _ = reference.attention_with_kvcache(q, *longer)
    torch.testing.assert_close(out, exact.out.float(), rtol=1e-5, atol=1e-5)


def test_rows_of_a_cache_in_another_order_and_padded() -> None:
    caches = [torch.randn(6, 80, KV_HEADS, DIM) for _ in "kv"]
    keywords = {
        "cache_seqlens": _ints(9, 80, 3, 64), "cache_batch_idx": _ints(5, 0, 3, 1),
        "cache_leftpad": _ints(2, 35, 3, 0),
    }  # fmt: skip
    _assert_right(torch.randn(4, 2, HEADS, DIM), caches, keywords | {"causal": True})


@pytest.mark.parametrize("page", [0, 3])
def test_a_tree_of_new_tokens(page: int) -> None:
    caches, keywords = _cache((70, 9, 33), 72, page)
    tree = torch.rand(3, 5, 5) > 0.5
    tree.diagonal(dim1=1, dim2=2).fill_(True)
    _assert_right(torch.randn(3, 5, HEADS, DIM), caches, keywords | {"tree_mask": tree})


@pytest.mark.parametrize("page", [0, 3])
@pytest.mark.parametrize("owner", ["tensor", "head", "row", "token"])
def test_e4m3(owner: str, page: int) -> None:
    """Scales of everything, of KV heads, of batch rows, of tokens."""
    caches, keywords = _cache((70, 9, 33), 72, page)
    shape = {"tensor": (), "head": (KV_HEADS,), "row": (3, KV_HEADS), "token": caches[0].shape[:3]}
    for name, x in zip("kv", caches, strict=True):
        keywords[f"{name}_descale"] = torch.rand(shape[owner]) + 0.5
        x.nan_to_num_(3.0)
    caches = [x.to(torch.float8_e4m3fn) for x in caches]
    q = torch.randn(3, 2, HEADS, DIM)
    found = flash_attn_with_kvcache(q, *caches, **keywords, causal=True)
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **keywords, causal=True)
    torch.testing.assert_close(found, golden.out.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "dim_v"), [(24, 40), (9, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("owner", ["tensor", "token"])
def test_all_numbers_of_e4m3(owner: str, dtype: torch.dtype, dim: int, dim_v: int) -> None:
    """Subnormal ones too, which alone are tokens of the second row; queries from 1e-4 to 1e4; an
    odd count of dims, whose second rows begin at odd addresses."""
    codes = [torch.randint(0, 0x7F, (2, 70, KV_HEADS, d), dtype=torch.uint8) for d in (dim, dim_v)]
    for x in codes:
        x[1] &= 7
        x.bitwise_or_(torch.randint(0, 2, x.shape, dtype=torch.uint8) << 7)
    caches = [x.view(torch.float8_e4m3fn) for x in codes]
    shape = {"tensor": (), "token": caches[0].shape[:3]}[owner]
    scales = {f"{name}_descale": torch.rand(shape) / 4 + 0.5 for name in "kv"}
    size = torch.tensor([1e-4, 1e-1, 1e1, 1e4])[:, None, None]
    q = (torch.randn(2, 4, HEADS, dim) * size).to(dtype)
    keywords: dict[str, Any] = {"cache_seqlens": _ints(70, 53), "softmax_scale": 1e-3, **scales}
    found = flash_attn_with_kvcache(q, *caches, **keywords)
    golden, _, _ = reference.attention_with_kvcache(q, *caches, **keywords)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3}[dtype]
    error = (found.double() - golden.out.double()).norm(dim=-1) / golden.out.double().norm(dim=-1)
    assert error.max() < tolerance


@pytest.mark.parametrize(("dim", "dim_v"), [(8, 8), (24, 40), (64, 16)])
def test_head_dims(dim: int, dim_v: int) -> None:
    q, k, v = torch.randn(2, 1, 6, dim), torch.randn(2, 50, 1, dim), torch.randn(2, 50, 1, dim_v)
    _assert_right(q, [k, v], {"cache_seqlens": _ints(50, 21)})


@pytest.mark.parametrize("page", [0, 3])
@pytest.mark.parametrize(("dim", "dim_v"), [(24, 16), (576, 512)])
def test_latent_keys_that_hold_the_values(dim: int, dim_v: int, page: int) -> None:
    """V is the first dims of K, in the same memory; then the same numbers in memory of their own,
    where no kernel may take them for that."""
    shape = (9, page) if page else (2, 26)
    k = torch.randn(*shape, 1, dim, dtype=torch.float16)
    keywords: dict[str, Any] = {"cache_seqlens": _ints(26, 13), "causal": True}
    if page:
        keywords["block_table"] = torch.randint(0, 9, (2, 9), dtype=torch.int32)
    q = torch.randn(2, 2, 6, dim, dtype=torch.float16)
    with patch.object(decode, "run", wraps=decode.run) as launched:
        found = flash_attn_with_kvcache(q, k, k[..., :dim_v], **keywords)
    golden, _, _ = reference.attention_with_kvcache(q, k, k[..., :dim_v], **keywords)
    eager, _, _ = reference.attention_with_kvcache(q, k, k[..., :dim_v], **keywords, dtype=None)
    assert_within_budget(found, eager.out, golden.out, "out")
    assert launched.call_args.args[0].arguments[-1].latent
    if dim < 512:
        other = torch.randn_like(k)[..., :dim_v]
        found = flash_attn_with_kvcache(q, k, other, **keywords)
        golden, _, _ = reference.attention_with_kvcache(q, k, other, **keywords)
        torch.testing.assert_close(found, golden.out.half(), rtol=1e-2, atol=1e-2)


def test_strided_operands_and_any_scale() -> None:
    """Heads before tokens, a query with gaps; scales for which scores have no unit."""
    q = torch.randn(2, HEADS, 3, 2 * DIM)[..., :DIM].transpose(1, 2)
    caches = [torch.randn(2, KV_HEADS, 60, DIM).transpose(1, 2) for _ in "kv"]
    for scale in (-0.5, 0.0, 3.0):
        found = flash_attn_with_kvcache(q, *caches, softmax_scale=scale, causal=True)
        golden, _, _ = reference.attention_with_kvcache(
            q, *caches, softmax_scale=scale, causal=True
        )
        torch.testing.assert_close(found, golden.out.float(), rtol=1e-5, atol=1e-5)
