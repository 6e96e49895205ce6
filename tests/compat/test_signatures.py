"""Parameter names, order and defaults are those of flash_attn 2.8."""

import importlib
import inspect

import pytest

REQUIRED = inspect.Parameter.empty

VARIANT = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
PRIVATE = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
]
GRADIENTS = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


def required(names):
    return dict.fromkeys(names, REQUIRED)


SIGNATURES = {
    "flash_attn_interface.flash_attn_func": {**required("qkv"), **VARIANT},
    "flash_attn_interface.flash_attn_qkvpacked_func": {**required(["qkv"]), **VARIANT},
    "flash_attn_interface.flash_attn_kvpacked_func": {**required(["q", "kv"]), **VARIANT},
    "flash_attn_interface.flash_attn_varlen_func": {
        **required([*"qkv", *LENGTHS]), **VARIANT, "block_table": None,
    },
    "flash_attn_interface.flash_attn_varlen_qkvpacked_func": {
        **required(["qkv", "cu_seqlens", "max_seqlen"]), **VARIANT,
    },
    "flash_attn_interface.flash_attn_varlen_kvpacked_func": {
        **required(["q", "kv", *LENGTHS]), **VARIANT,
    },
    "flash_attn_interface.flash_attn_with_kvcache": {
        **required(["q", "k_cache", "v_cache"]), "k": None, "v": None, "rotary_cos": None,
        "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None,
        "block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
        "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0,
        "return_softmax_lse": False,
    },
    "flash_attn_interface._flash_attn_forward": required([*"qkv", *PRIVATE, "return_softmax"]),
    "flash_attn_interface._flash_attn_varlen_forward": {
        **required([*"qkv", *LENGTHS, "dropout_p", "softmax_scale", "causal"]),
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
        "return_softmax": False, "block_table": None, "leftpad_k": None, "seqused_k": None,
        "zero_tensors": False, "num_splits": 0,
    },
    "flash_attn_interface._flash_attn_backward": {
        **required([*GRADIENTS, *PRIVATE, "deterministic"]), "rng_state": None,
    },
    "flash_attn_interface._flash_attn_varlen_backward": {
        **required([*GRADIENTS, *LENGTHS, *PRIVATE, "deterministic"]), "rng_state": None,
        "zero_tensors": False,
    },
    "flash_attn_interface._get_block_size_n": required(
        ["device", "head_dim", "is_dropout", "is_causal"]
    ),
    "flash_attn_interface.maybe_contiguous": required("x"),
    "flash_attn_interface.round_multiple": required("xm"),
    "bert_padding.index_first_axis": required(["input", "indices"]),
    "bert_padding.index_put_first_axis": required(["values", "indices", "first_axis_dim"]),
    "bert_padding.index_first_axis_residual": required(["input", "indices"]),
    "bert_padding.unpad_input": {
        **required(["hidden_states", "attention_mask"]), "unused_mask": None,
    },
    "bert_padding.unpad_input_for_concatenated_sequences": required(
        ["hidden_states", "attention_mask_in_length"]
    ),
    "bert_padding.pad_input": required(["hidden_states", "indices", "batch", "seqlen"]),
    "layers.rotary.rotate_half": {**required("x"), "interleaved": False},
    "layers.rotary.apply_rotary_emb_torch": {
        **required(["x", "cos", "sin"]), "interleaved": False,
    },
    "layers.rotary.apply_rotary_emb": {
        **required(["x", "cos", "sin"]), "interleaved": False, "inplace": False,
        "seqlen_offsets": 0, "cu_seqlens": None, "max_seqlen": None,
    },
    "layers.rotary.apply_rotary_emb_qkv_": {
        **required(["qkv", "cos", "sin"]), "cos_k": None, "sin_k": None, "interleaved": False,
        "seqlen_offsets": 0, "num_heads_q": None,
    },
    "layers.rotary.apply_rotary_emb_kv_": {
        **required(["kv", "cos", "sin"]), "interleaved": False, "seqlen_offsets": 0,
    },
    "layers.rotary.RotaryEmbedding": {
        **required(["dim"]), "base": 10000.0, "interleaved": False, "scale_base": None,
        "device": None,
    },
    "layers.rotary.RotaryEmbedding.forward": {
        **required(["self", "qkv"]), "kv": None, "seqlen_offset": 0, "max_seqlen": None,
        "num_heads_q": None,
    },
}  # fmt: skip

ALIASES = {
    "flash_attn_interface._wrapped_flash_attn_forward": "_flash_attn_forward",
    "flash_attn_interface._wrapped_flash_attn_varlen_forward": "_flash_attn_varlen_forward",
    "flash_attn_interface._wrapped_flash_attn_backward": "_flash_attn_backward",
    "flash_attn_interface._wrapped_flash_attn_varlen_backward": "_flash_attn_varlen_backward",
    "layers.rotary.apply_rotary_emb_func": "apply_rotary_emb",
}

# The C++ extension takes positional arguments only: how many, of which how many may be left out.
EXTENSION = {"fwd": (13, 0), "varlen_fwd": (22, 1), "bwd": (19, 0), "varlen_bwd": (24, 0),
             "fwd_kvcache": (20, 0)}  # fmt: skip


def find(path):
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(f"flash_attn.{module}"), name)
    except ModuleNotFoundError:
        return getattr(find(module), name)


@pytest.mark.parametrize("path", SIGNATURES)
def test_names_order_and_defaults(flash_attn, path):
    parameters = inspect.signature(find(path)).parameters
    assert list(parameters) == list(SIGNATURES[path])
    assert {name: p.default for name, p in parameters.items()} == SIGNATURES[path]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("path", ALIASES)
def test_aliases(flash_attn, path):
    module, _, _ = path.rpartition(".")
    assert find(path) is find(f"{module}.{ALIASES[path]}")


@pytest.mark.parametrize("name", EXTENSION)
def test_extension_is_positional(interface, name):
    parameters = inspect.signature(getattr(interface.flash_attn_gpu, name)).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_ONLY}
    optional = sum(p.default is not REQUIRED for p in parameters)
    assert (len(parameters), optional) == EXTENSION[name]


def test_package_exports_the_public_functions(flash_attn, interface):
    public = [path.split(".")[1] for path in SIGNATURES if ".flash_attn_" in path]
    assert len(public) == 7
    assert sorted(flash_attn.__all__) == sorted(public)
    assert all(getattr(flash_attn, name) is getattr(interface, name) for name in public)
