"""`flash_attn_interface`, FlashAttention-3's module: signatures, and what functions return."""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import flashtile
import flashtile.compat

REQUIRED = inspect.Parameter.empty
SCALES = {"q_descale": None, "k_descale": None, "v_descale": None}
BAND = {"window_size": (-1, -1), "attention_chunk": 0}
SIDES = {"window_size_left": -1, "window_size_right": -1}
TUNING = {"num_splits": 1, "pack_gqa": None, "deterministic": False, "sm_margin": 0}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def named(names: tuple[str, ...] | str, default: object = REQUIRED) -> dict[str, object]:
    return dict.fromkeys(names, default)


SIGNATURES = {
    "flash_attn_func": {
        **named("qkv"), "softmax_scale": None, "causal": False, "qv": None, **SCALES, **BAND,
        "softcap": 0.0, **TUNING, "return_attn_probs": False,
    },
    "flash_attn_qkvpacked_func": {
        **named(("qkv",)), "softmax_scale": None, "causal": False, **SCALES, **BAND, "softcap": 0.0,
        "deterministic": False, "num_heads_q": None, "sm_margin": 0, "return_attn_probs": False,
    },
    "flash_attn_varlen_func": {
        **named((*"qkv", *LENGTHS)), "seqused_q": None, "seqused_k": None, "softmax_scale": None,
        "causal": False, "qv": None, **SCALES, **BAND, "softcap": 0.0, **TUNING,
        "return_attn_probs": False,
    },
    "_flash_attn_forward": {
        **named("qkv"),
        **named(("k_new", "v_new", "qv", "out_", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new",
                 "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table",
                 "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"), None),
        **SCALES, "softmax_scale": None, "causal": False, **SIDES, "attention_chunk": 0,
        "softcap": 0.0, "rotary_interleaved": True, "scheduler_metadata": None, "num_splits": 1,
        "pack_gqa": None, "sm_margin": 0,
    },
    "_flash_attn_backward": {
        **named(("dout", *"qkv", "out", "softmax_lse")),
        **named(("cu_seqlens_q", "cu_seqlens_k", "sequed_q", "sequed_k", "max_seqlen_q",
                 "max_seqlen_k", "dq", "dk", "dv", "softmax_scale"), None),
        "is_causal": False, **SIDES, "softcap": 0.0, "deterministic": False, "sm_margin": 0,
    },
    "flash_attn_combine": {
        **named(("out_partial", "lse_partial")), "out": None, "out_dtype": None,
    },
    "flash_attn_with_kvcache": {
        **named(("q", "k_cache", "v_cache")),
        **named(("k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
                 "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q",
                 "rotary_seqlens"), None),
        **SCALES, "softmax_scale": None, "causal": False, **BAND, "softcap": 0.0,
        "rotary_interleaved": True, "scheduler_metadata": None, **TUNING, "num_splits": 0,
        "return_softmax_lse": False,
    },
    "get_scheduler_metadata": {
        **named(("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv",
                 "headdim", "cache_seqlens")),
        "qkv_dtype": torch.bfloat16,
        **named(("headdim_v", "cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad", "page_size"),
                None),
        "max_seqlen_k_new": 0, "causal": False, **BAND, "has_softcap": False, "num_splits": 0,
        "pack_gqa": None, "sm_margin": 0,
    },
}  # fmt: skip
del SIGNATURES["flash_attn_with_kvcache"]["deterministic"]


@pytest.fixture
def fa3() -> Iterator[ModuleType]:
    flashtile.compat.install()
    yield importlib.import_module("flash_attn_interface")
    flashtile.compat.uninstall()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(fa3: ModuleType, name: str) -> None:
    found = inspect.signature(getattr(fa3, name)).parameters
    assert {n: p.default for n, p in found.items()} == SIGNATURES[name]
    assert list(found) == list(SIGNATURES[name])


def test_dense(fa3: ModuleType) -> None:
    q, k, v = draw(2, 9, 4, 16), draw(2, 7, 2, 16), draw(2, 7, 2, 16)
    variant = {"causal": True, "window_size": (3, 0), "softcap": 5.0}
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True, num_splits=3, **variant)
    exact, exact_lse = flashtile.flash_attn_func(q, k, v, return_lse=True, **variant)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    assert lse[:, :, :2].eq(-torch.inf).all()  # 9 queries, 7 keys: two rows see none
    assert fa3.flash_attn_func(q, k, v, **variant).equal(out)


def test_packed_heads_and_their_gradient(fa3: ModuleType) -> None:
    qkv = draw(2, 6, 8, 16).requires_grad_()
    q, k, v = qkv.split([4, 2, 2], 2)
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    exact = flashtile.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out, exact)
    dout = draw(2, 6, 4, 16)
    [found], [wanted] = (torch.autograd.grad(x, qkv, dout) for x in (out, exact))
    torch.testing.assert_close(found, wanted)
    stacked = torch.stack((q[:, :, :2], k, v), 2)
    whole = fa3.flash_attn_qkvpacked_func(stacked)
    torch.testing.assert_close(whole, flashtile.flash_attn_func(q[:, :, :2], k, v))


def test_packed_sequences(fa3: ModuleType) -> None:
    cu, used = ints(0, 4, 4, 9), ints(3, 0, 5)
    q, k, v = draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 16)
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, cu, cu, 5, 5, seqused_k=used, causal=True, return_attn_probs=True
    )
    exact, exact_lse = flashtile.flash_attn_varlen_func(
        q, k, v, cu, cu, 5, 5, seqused_k=used, causal=True, return_lse=True
    )
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)


def test_chunks(fa3: ModuleType) -> None:
    """`attention_chunk`, wherever FlashAttention-3 has it."""
    q, k, v = draw(2, 9, 4, 16), draw(2, 13, 2, 16), draw(2, 13, 2, 16)
    key, query = torch.arange(13), torch.arange(9)[:, None] + 4
    seen = (key // 5 == query // 5) & (key <= query)
    wanted = flashtile.flash_attn_func(q, k, v, attn_mask=seen)
    chunk: dict[str, Any] = {"causal": True, "attention_chunk": 5}
    found = [fa3.flash_attn_func(q, k, v, **chunk), fa3._flash_attn_forward(q, k, v, **chunk)[0]]
    cu_q, cu_k = ints(0, 9, 18), ints(0, 13, 26)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found.append(fa3.flash_attn_varlen_func(*flat, cu_q, cu_k, 9, 13, **chunk).view_as(q))
    lengths = ints(13, 13)
    found.append(fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **chunk))
    caches = k.clone(), v.clone()  # of which the call writes the last 9 again
    new, before = (k[:, 4:], v[:, 4:]), ints(4, 4)
    found.append(fa3._flash_attn_forward(q, *caches, *new, seqused_k=before, **chunk)[0])
    for x in found:
        torch.testing.assert_close(x, wanted)
    qkv = torch.stack((q, q, q), 2)
    packed = fa3.flash_attn_qkvpacked_func(qkv, **chunk)
    torch.testing.assert_close(packed, flashtile.flash_attn_func(q, q, q, **chunk))


def test_cache(fa3: ModuleType) -> None:
    """Pages, an append with rotary embedding, and packed queries of several lengths."""
    caches = [draw(6, 4, 2, 16), draw(6, 4, 2, 16) + 1.0]
    ours = [x.clone() for x in caches]
    q, k, v = (draw(5, heads, 16) for heads in (4, 2, 2))
    lengths, table, cu = ints(3, 6), ints(4, 0, 2, 1).view(2, 2), ints(0, 4, 5)
    angles = draw(16, 4)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k_new": cu, "max_seqlen_q": 4}
    plan = fa3.get_scheduler_metadata(2, 4, 8, 4, 2, 16, lengths)
    out, lse, *rest = fa3.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, page_table=table, causal=True,
        scheduler_metadata=plan, return_softmax_lse=True, **rotary, **packed,
    )  # fmt: skip
    exact, exact_lse = flashtile.flash_attn_with_kvcache(
        q, *ours, k, v, cache_seqlens=lengths, block_table=table, causal=True,
        return_softmax_lse=True, **rotary, **packed,
    )  # fmt: skip
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    assert caches[0].equal(ours[0])
    assert caches[1].equal(ours[1])
    assert [x.numel() for x in rest] == [0, 0]


def test_rows_of_a_page_table(fa3: ModuleType) -> None:
    """`cache_batch_idx` beside pages chooses the table's rows; rotary_seqlens without a rotary
    embedding says nothing; window sides may come as a tensor."""
    q, k_cache, v_cache = draw(2, 1, 4, 16), draw(6, 4, 2, 16), draw(6, 4, 2, 16)
    table, idx, lengths = ints(5, 0, 1, 2, 3, 4).view(3, 2), ints(2, 0), ints(5, 7)
    found = fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, cache_batch_idx=idx,
        rotary_seqlens=lengths, window_size=torch.tensor([3, -1]),
    )  # fmt: skip
    wanted = flashtile.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, block_table=table[[2, 0]], window_size=(3, -1)
    )
    torch.testing.assert_close(found, wanted)


def test_what_serving_engines_pass_beside_a_cache(fa3: ModuleType) -> None:
    """Scales of 16 bits and more, offsets of no new tokens, splits that are planned."""
    q, cache, lengths = draw(2, 1, 4, 16), draw(2, 8, 2, 16), ints(5, 7)
    scales = dict.fromkeys(SCALES, torch.full((2, 2), 3.0))
    found = fa3.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths, cu_seqlens_k_new=ints(0, 5, 12), num_splits=-1,
        **scales,
    )  # fmt: skip
    wanted = flashtile.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
    torch.testing.assert_close(found, wanted)
    again, *_ = fa3._flash_attn_forward(q, cache, cache, seqused_k=lengths, **scales)
    torch.testing.assert_close(again, wanted)
    dense = fa3.flash_attn_func(q, cache, cache, **scales)
    torch.testing.assert_close(dense, flashtile.flash_attn_func(q, cache, cache))


def test_cache_has_no_gradient(fa3: ModuleType) -> None:
    q, cache = draw(1, 1, 2, 16).requires_grad_(), draw(1, 8, 2, 16)
    out = fa3.flash_attn_with_kvcache(q, cache, cache)
    assert not out.requires_grad
    torch.testing.assert_close(out, flashtile.flash_attn_func(q, cache, cache).detach())


SEQUENCES = {
    "dense": ((2, 9), (2, 7), {}),
    "dense in part": ((2, 9), (2, 7), {"used_k": (5, 7)}),
    "packed": ((9,), (11,), {"cu_q": (0, 4, 4, 9), "cu_k": (0, 6, 6, 11)}),
    "packed in part": (
        (9,), (11,),
        {"cu_q": (0, 4, 4, 9), "cu_k": (0, 6, 6, 11), "used_q": (3, 0, 4), "used_k": (3, 0, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_halves_are_the_whole(fa3: ModuleType, name: str) -> None:
    """Forward and backward apart, as ring attention and context parallelism join them."""
    rows_q, rows_k, lengths = SEQUENCES[name]
    q = draw(*rows_q, 4, 16).requires_grad_()
    k, v = (draw(*rows_k, 2, dim).requires_grad_() for dim in (16, 8))
    cu_q, cu_k, used_q, used_k = (
        ints(*lengths[x]) if x in lengths else None for x in ("cu_q", "cu_k", "used_q", "used_k")
    )
    longest = (5, 6) if cu_q is not None else (None, None)
    where = (cu_q, cu_k, used_q, used_k, *longest)
    band = {"softmax_scale": 0.3, "window_size_left": 4, "window_size_right": 0, "softcap": 5.0}
    out, lse, *rest = fa3._flash_attn_forward(
        q, k, v, None, None, None, None, cu_q, cu_k, None, *where[2:], causal=True, **band
    )
    assert [x.numel() for x in rest] == [0, 0]
    into = torch.empty_like(out)
    with torch.no_grad():
        fa3._flash_attn_forward(
            q, k, v, None, None, None, into, cu_q, cu_k, None, *where[2:], causal=True, **band
        )
    assert into.equal(out)
    dout = draw(*out.shape)
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    softmax_d = fa3._flash_attn_backward(
        dout, q, k, v, out.detach(), lse.detach(), *where, *found, is_causal=True, **band
    )
    assert softmax_d.shape == ((2, 4, 128) if cu_q is None else (4, 9 + 3 * 128))
    for x, wanted in zip(found, torch.autograd.grad(out, (q, k, v), dout), strict=True):
        torch.testing.assert_close(x, wanted)
    if "part" not in name:
        public = fa3.flash_attn_func if cu_q is None else fa3.flash_attn_varlen_func
        extra = () if cu_q is None else (cu_q, cu_k, *longest)
        whole = public(
            q, k, v, *extra, softmax_scale=0.3, causal=True, window_size=(4, 0), softcap=5.0
        )
        torch.testing.assert_close(out, whole)


def test_forward_half_appends(fa3: ModuleType) -> None:
    """Pages of packed queries, then an append: Megatron's calls."""
    pages, q, lengths = draw(6, 4, 2, 16), draw(5, 4, 16), ints(3, 6)
    table, cu = ints(4, 0, 2, 1).view(2, 2), ints(0, 3, 5)
    found, *_ = fa3._flash_attn_forward(
        q, pages, pages, None, None, None, None, cu, None, None, None, lengths, 3, 8,
        page_table=table, causal=True,
    )  # fmt: skip
    wanted = flashtile.flash_attn_with_kvcache(
        q, pages, pages, cache_seqlens=lengths, block_table=table, causal=True, cu_seqlens_q=cu
    )
    torch.testing.assert_close(found, wanted)
    caches = [draw(2, 8, 2, 16), draw(2, 8, 2, 16) + 1.0]
    ours = [x.clone() for x in caches]
    q, new = draw(2, 1, 4, 16), draw(2, 1, 2, 16)
    found, lse, *_ = fa3._flash_attn_forward(q, *caches, new, new, seqused_k=lengths)
    wanted, exact_lse = flashtile.flash_attn_with_kvcache(
        q, *ours, new, new, cache_seqlens=lengths, return_softmax_lse=True
    )
    for x, y in zip((found, lse, *caches), (wanted, exact_lse, *ours), strict=True):
        torch.testing.assert_close(x, y)


def test_second_name(fa3: ModuleType) -> None:
    """`flash_attn_3`, which Megatron and TransformerEngine import and transformers looks for."""
    package = importlib.import_module("flash_attn_3")
    assert int(package.__version__.split(".")[0]) == 3
    again = importlib.import_module("flash_attn_3.flash_attn_interface")
    for name in SIGNATURES:
        assert getattr(package, name) is getattr(again, name) is getattr(fa3, name)


def test_combine(fa3: ModuleType) -> None:
    outs, lses = draw(3, 2, 5, 4, 16), draw(3, 2, 5, 4)
    found = fa3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    wanted = flashtile.flash_attn_combine(outs, lses)
    torch.testing.assert_close(found[0], wanted[0].bfloat16())
    torch.testing.assert_close(found[1], wanted[1])


def test_what_is_not_computed_is_refused(fa3: ModuleType) -> None:
    q = draw(1, 4, 2, 16)
    with pytest.raises(ValueError, match="qv is given; it must be None"):
        fa3.flash_attn_func(q, q, q, qv=q)
    with pytest.raises(ValueError, match="k_descale is given; it must be None"):
        fa3.flash_attn_func(q, *[q.to(torch.float8_e4m3fn)] * 2, k_descale=torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"q has dtype torch\.float8_e4m3fn"):
        fa3.flash_attn_func(*[q.to(torch.float8_e4m3fn)] * 3, q_descale=torch.ones(1, 2))
    with pytest.raises(ValueError, match="qv is given"):
        fa3.flash_attn_with_kvcache(q, q, q, qv=q)
    with pytest.raises(ValueError, match="seqused_q is given"):
        fa3._flash_attn_forward(q, q, q, seqused_q=ints(3))
    with pytest.raises(ValueError, match="sequed_q is given"):
        fa3._flash_attn_backward(q, q, q, q, q, q[..., 0], sequed_q=ints(3))
    for heads in (None, 0, 2):
        with pytest.raises(ValueError, match=r"num_heads_q is|qkv has 2 heads"):
            fa3.flash_attn_qkvpacked_func(q, num_heads_q=heads)
    with pytest.raises(ValueError, match="qkv has 4 heads, 1 of q"):
        fa3.flash_attn_qkvpacked_func(draw(1, 4, 4, 16), num_heads_q=1)
