"""`flash_attn_interface`, FlashAttention-3's module: signatures, and what functions return."""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import flashtile
import flashtile.compat

REQUIRED = inspect.Parameter.empty
SCALES = {"q_descale": None, "k_descale": None, "v_descale": None}
BAND = {"window_size": (-1, -1), "attention_chunk": 0}
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


def test_cache_has_no_gradient(fa3: ModuleType) -> None:
    q, cache = draw(1, 1, 2, 16).requires_grad_(), draw(1, 8, 2, 16)
    out = fa3.flash_attn_with_kvcache(q, cache, cache)
    assert not out.requires_grad
    torch.testing.assert_close(out, flashtile.flash_attn_func(q, cache, cache).detach())


def test_combine(fa3: ModuleType) -> None:
    outs, lses = draw(3, 2, 5, 4, 16), draw(3, 2, 5, 4)
    found = fa3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    wanted = flashtile.flash_attn_combine(outs, lses)
    torch.testing.assert_close(found[0], wanted[0].bfloat16())
    torch.testing.assert_close(found[1], wanted[1])


def test_what_is_not_computed_is_refused(fa3: ModuleType) -> None:
    q = draw(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"attention_chunk is 2; it must be 0"):
        fa3.flash_attn_func(q, q, q, attention_chunk=2)
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        with pytest.raises(ValueError, match=f"{name} is given; it must be None"):
            fa3.flash_attn_func(q, q, q, **{name: q})
    with pytest.raises(ValueError, match="qv is given"):
        fa3.flash_attn_with_kvcache(q, q, q, qv=q)
    for heads in (None, 0, 2):
        with pytest.raises(ValueError, match=r"num_heads_q is|qkv has 2 heads"):
            fa3.flash_attn_qkvpacked_func(q, num_heads_q=heads)
    with pytest.raises(ValueError, match="qkv has 4 heads, 1 of q"):
        fa3.flash_attn_qkvpacked_func(draw(1, 4, 4, 16), num_heads_q=1)
