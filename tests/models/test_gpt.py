"""The GPT learns, is causal, and does not care which exact attention it is given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtile import flash_attn_func
from flashtile.models.gpt import GPT, Attention, GPTConfig, sample
from flashtile.testing.standard import standard_attention

CONFIG = GPTConfig(vocab_size=32, seqlen=24, layers=2, heads=4, kv_heads=2, head_dim=8)
ATTENTIONS = [flash_attn_func, standard_attention]


def _model(attention: Attention = flash_attn_func, trained: bool = True) -> GPT:
    """A model whose weights are all random; blocks of an untrained one add nothing."""
    torch.manual_seed(1)
    model = GPT(CONFIG, attention)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _tokens(count: int = CONFIG.seqlen) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (3, count), generator=torch.Generator().manual_seed(2))


def test_shapes_and_parameters() -> None:
    model = _model()

    assert model(_tokens()).shape == (3, CONFIG.seqlen, CONFIG.vocab_size)
    attention = CONFIG.width * (2 * CONFIG.width + 2 * CONFIG.kv_heads * CONFIG.head_dim)
    perceptron = 8 * CONFIG.width**2
    expected = CONFIG.vocab_size * CONFIG.width + CONFIG.layers * (attention + perceptron)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_of_the_meta_device_is_the_one_it_loads(assign: bool) -> None:
    """All that it computes with is in its state, or made from its configuration."""
    model = _model()
    with torch.device("meta"):
        empty = GPT(CONFIG)
    empty = empty if assign else empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)

    assert torch.equal(empty(_tokens()), model(_tokens()))


def test_positions_are_exact_in_fp64() -> None:
    """Queries and keys turn by position / base ** (2 i / head_dim), in the model's own dtype."""
    model = _model().double()
    cos, sin = model._rotary_tables()
    for position in range(CONFIG.seqlen):
        for i in range(CONFIG.head_dim // 2):
            angle = position / CONFIG.rotary_base ** (2 * i / CONFIG.head_dim)
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-14)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-14)


def test_starts_at_the_loss_of_a_guess() -> None:
    loss = _model(trained=False).loss(_tokens(CONFIG.seqlen + 1))

    assert loss.item() == pytest.approx(torch.tensor(CONFIG.vocab_size).log().item(), rel=0.1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_learns_a_repeating_text(attention: Attention) -> None:
    model = _model(attention, trained=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(CONFIG.seqlen + 1).remainder(7).expand(3, -1)
    losses = []
    for _ in range(30):
        loss = model.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[0] > 3.0
    assert losses[-1] < 0.1
    written = model.generate(tokens[:1, :9], 8, temperature=0.0)
    assert written[0].tolist() == [i % 7 for i in range(17)]


def test_logits_and_gradients_agree_between_attentions() -> None:
    tokens = _tokens(CONFIG.seqlen + 1)
    results = []
    for attention in ATTENTIONS:
        model = _model(attention)
        model.loss(tokens).backward()
        results.append((model(tokens[:, :-1]), [p.grad for p in model.parameters()]))
    (flash, flash_grads), (standard, standard_grads) = results

    torch.testing.assert_close(flash, standard, rtol=1e-5, atol=1e-5)
    assert all(grad is not None and grad.abs().max() > 0 for grad in flash_grads)
    torch.testing.assert_close(flash_grads, standard_grads, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model, tokens = _model(), _tokens()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % CONFIG.vocab_size

    before, after = model(tokens), model(changed)

    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(-1).all()


def test_a_temperature_may_be_a_number_of_numpy() -> None:
    model, prompt = _model(), _tokens(4)
    written = [
        model.generate(prompt, 5, temperature, torch.Generator().manual_seed(1))
        for temperature in (0.5, np.float32(0.5))
    ]

    assert torch.equal(*written)


def test_generates_beyond_its_context() -> None:
    model, prompt = _model(), _tokens(4)
    sampled = [
        model.generate(prompt, 30, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]

    assert sampled[0].shape == (3, 34)
    assert torch.equal(sampled[0][:, :4], prompt)
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-50])
def test_the_coldest_samples_are_the_likeliest(temperature: float) -> None:
    """Where a logit over it is infinite in fp32, or it is 0 there."""
    logits = torch.tensor([[1.0, 5.0, 2.0], [-7.0, -9.0, -8.0]])
    assert sample(logits, temperature, torch.Generator()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5; it must be an int"),
        ({"head_dim": 7}, "head_dim is 7; rotary pairs need an even number"),
        ({"heads": 4, "kv_heads": 3}, "heads is 4; it must be a multiple of 3, kv_heads"),
        ({"rotary_base": 0.0}, "rotary_base is 0.0; it must be finite and above 0"),
    ],
)
def test_sizes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 25), "tokens has seqlen 25; it must be at most 24, the context"),
        ((5,), r"tokens has shape \(5,\); it must be \(batch, seqlen\)"),
    ],
)
def test_tokens_are_checked(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model()(torch.zeros(shape, dtype=torch.int64))


def test_what_is_generated_is_checked() -> None:
    model = _model()
    with pytest.raises(ValueError, match="tokens has seqlen 0; it must be at least 1"):
        model.generate(_tokens(0), 1)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="it must be finite and at least 0"):
            model.generate(_tokens(3), 1, temperature)
