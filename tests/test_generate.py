"""Sampling: continuation, draws, the window, and that a cache changes nothing."""

import dataclasses

import numpy as np
import pytest

import cllm
from cllm import nn, rng
from cllm.errors import InputError
from cllm.generate import generate

SMALL = cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


def test_generate_continues_and_repeats_under_a_seed():
    model = cllm.GPT(SMALL)
    model.train()
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    out = generate(model, prompt, 12, seed=1)  # beyond block_size
    assert out.shape == (2, 15) and out.dtype == np.int64 and (out[:, :3] == prompt).all() and model.training
    assert (out >= 0).all() and (out < 11).all()
    np.testing.assert_array_equal(out, generate(model, prompt, 12, seed=1))
    assert (out != generate(model, prompt, 12, seed=2)).any()
    assert generate(model, prompt[0], 2).shape == (5,) and generate(model, prompt, 0).shape == (2, 3)
    dropping = cllm.GPT(dataclasses.replace(SMALL, dropout=0.9))
    np.testing.assert_array_equal(out, generate(dropping, prompt, 12, seed=1))  # in eval mode


def test_generate_greedily_and_from_the_top_k():
    model = cllm.GPT(SMALL)
    for p in model.parameters():
        p.data *= 10
    sequence = generate(model, np.array([3]), 14, temperature=0)
    for i in range(1, 15):
        start = 0 if i <= 8 else 5 if i <= 13 else 10  # a full window of 8 goes on from its last 4 tokens
        assert sequence[i] == model(sequence[None, start:i]).data[0, -1].argmax()
    np.testing.assert_array_equal(sequence, generate(model, np.array([3]), 14, top_k=1, seed=5))
    logits = model(np.array([[3]])).data[0, -1]
    drawn = {
        int(generate(model, np.array([3]), 1, top_k=3, temperature=5.0, seed=seed)[1]) for seed in range(60)
    }
    assert drawn == set(np.argsort(logits)[-3:].tolist())


def test_generate_draws_by_probability():
    model = cllm.GPT(dataclasses.replace(SMALL, vocab_size=3))
    model.lm_head.weight.data *= 40
    logits = model(np.array([[1]])).data[0, -1].astype(np.float64) / 2
    p = np.exp(logits - logits.max())
    p /= p.sum()
    out = generate(model, np.ones((4000, 1), int), 1, temperature=2.0)
    np.testing.assert_allclose(np.bincount(out[:, 1], minlength=3) / 4000, p, atol=0.03)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (np.zeros(0, int), {}, "T at least 1"),
        (np.zeros(2), {}, "must be integers"),
        (np.zeros(2, int), {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (np.zeros(2, int), {"temperature": -0.5}, "temperature is -0.5"),
        (np.zeros(2, int), {"temperature": float("nan")}, "temperature is nan"),
        (np.zeros(2, int), {"top_k": 0}, "top_k is 0"),
    ],
)
def test_generate_refuses(tokens, options, message):
    with pytest.raises(InputError, match=message):
        generate(cllm.GPT(SMALL), tokens, **{"max_new_tokens": 1, **options})


class Uncached(nn.MultiHeadAttention):
    """The built-in attention, without the argument that makes generate use a cache."""

    def forward(self, x):
        return super().forward(x)


def peaked(config, attention=None):
    """A model whose draws depend much on what came before."""
    model = cllm.GPT(config, attention=attention, seed=2)
    for name, p in model.named_parameters():
        p.data += 0.4 * rng.initial_generator(5, name).standard_normal(p.shape, np.float32)
    return model


@pytest.mark.parametrize("fields", [{}, {"position": "rotary", "n_kv_head": 1}, {"position": "alibi"}])
@pytest.mark.parametrize("n_given", [1, 7, 8, 9, 20])
def test_a_cache_changes_no_token(fields, n_given):
    config = dataclasses.replace(SMALL, **fields)
    prompt = np.random.default_rng(0).integers(0, 11, (3, n_given))
    cached, whole = (generate(peaked(config, a), prompt, 25, seed=4) for a in (None, Uncached))
    np.testing.assert_array_equal(cached, whole)
    assert len(np.unique(cached[:, n_given:])) > 4


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_window_may_be_tiny(block_size):
    config = dataclasses.replace(SMALL, block_size=block_size)
    cached, whole = (generate(peaked(config, a), np.array([1, 2]), 9, seed=1) for a in (None, Uncached))
    np.testing.assert_array_equal(cached, whole)
