"""The key/value cache: cached logits are the uncached ones, for every variant, length and order of calls."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import nn, rng
from cllm.errors import InputError

SMALL = cllm.GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=4, n_embd=16)
VARIANTS = [
    {},
    {"position": "rotary"},
    {"position": "sinusoidal"},
    {"position": "alibi"},
    {"position": "none"},
    {"position": "rotary", "n_kv_head": 2, "qk_norm": True, "norm": "rms", "activation": "swiglu"},
    {"position": "alibi", "n_kv_head": 1, "norm_position": "post"},
    {"position": "alibi", "attention": "plain", "n_kv_head": 2},
    {"position": "rotary", "attention": "plain"},
]
VARIANT = pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 12))


def model_of(fields=(), dtype=np.float32):
    """Logits that depend much on every position."""
    model = cllm.GPT(dataclasses.replace(SMALL, **dict(fields)), seed=1, dtype=dtype).eval()
    for name, p in model.named_parameters():
        p.data += 0.3 * rng.initial_generator(5, name).standard_normal(p.shape, np.float32)
    return model


def assert_same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@VARIANT
def test_cached_logits_are_the_uncached_ones(fields):
    model = model_of(fields)
    whole = model(TOKENS).data
    for parts in ([12], [1] * 12, [5, 1, 1, 5], [3, 0, 9]):
        cache = model.new_cache(3)
        end = 0
        for n in parts:
            logits = model(TOKENS[:, end : end + n], cache=cache)
            assert logits.shape == (3, n, 11)
            assert not logits.requires_grad
            assert_same(logits.data, whole[:, end : end + n])
            end += n
            assert (cache.lengths == end).all()


@VARIANT
def test_sequences_of_different_length_are_as_each_alone(fields):
    model = model_of(fields)
    lengths = np.array([4, 1, 7])
    prompts = np.full((3, 7), 10)
    for row, n in enumerate(lengths):
        prompts[row, :n] = TOKENS[row, :n]
    cache = model.new_cache(3)
    logits = model(prompts, cache=cache).data
    cache.rewind(7 - lengths)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for row, n in enumerate(lengths):
        assert_same(logits[row, :n], model(TOKENS[row : row + 1, :n]).data[0])
    for n_new in (1, 2, 2):  # all go on together
        ends = cache.lengths
        new = np.stack([TOKENS[row, end : end + n_new] for row, end in enumerate(ends)])
        logits = model(new, cache=cache).data
        for row, end in enumerate(ends):
            alone = model(TOKENS[row : row + 1, : end + n_new]).data[0, end:]
            assert_same(logits[row], alone)
    assert (cache.lengths == lengths + 5).all()


@settings(max_examples=20)
@given(
    st.sampled_from(VARIANTS),
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 6), min_size=2, max_size=2)), max_size=8),
)
def test_any_order_of_appending_and_rewinding(fields, calls):
    model = model_of(fields, np.float64)
    cache = model.new_cache(2)
    held = [[], []]
    generator = np.random.default_rng(1)
    for n, back in calls:
        new = generator.integers(0, 11, (2, n))
        if max(map(len, held)) + n > 12:
            with pytest.raises(InputError, match="do not fit the model's block_size of 12"):
                model(new, cache=cache)
        else:
            logits = model(new, cache=cache).data
            for row in range(2):
                held[row] += new[row].tolist()
                alone = model(np.array([held[row]], int)).data[0]
                np.testing.assert_allclose(logits[row], alone[len(alone) - n :], rtol=1e-9, atol=1e-11)
        back = [min(b, len(row)) for b, row in zip(back, held)]
        cache.rewind(np.array(back))
        held = [row[: len(row) - b] for b, row in zip(back, held)]
        np.testing.assert_array_equal(cache.lengths, [len(row) for row in held])


def test_what_was_rewound_leaves_no_trace():
    model = model_of({"position": "rotary"})
    cache = model.new_cache(3)
    first = model(TOKENS[:, :6], cache=cache).data
    cache.rewind(2)
    for layer in cache.layers:  # a NaN there must not come through either
        layer.keys[:, :, 4:] = layer.values[:, :, 4:] = np.nan
    again = model(TOKENS[:, 4:6], cache=cache).data
    assert_same(again, first[:, 4:])
    cache.rewind(cache.lengths)
    assert not cache.lengths.any()
    np.testing.assert_array_equal(model(TOKENS[:, :6], cache=cache).data, first)


def test_new_cache_holds_block_size_tokens_of_every_key_head():
    model = model_of({"n_kv_head": 2}, np.float64)
    cache = model.new_cache(5)
    assert isinstance(cache, nn.Cache) and len(cache.layers) == 2
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (5, 2, 12, 4)
        assert layer.keys.dtype == np.float64
    assert cache.lengths.tolist() == [0] * 5 and cache.lengths.dtype == np.int64
    cache.lengths[:] = 3  # a copy
    assert cache.lengths.tolist() == [0] * 5


def test_refusals_change_nothing():
    model, other = model_of(), model_of()
    cache = model.new_cache(3)
    model(TOKENS[:, :10], cache=cache)
    cache.rewind(np.array([0, 4, 10]))
    before = [layer.keys.copy() for layer in cache.layers], cache.lengths

    def refused(message, error=InputError, tokens=TOKENS[:, :1], model=model, cache=cache):
        with pytest.raises(error, match=message):
            model(tokens, cache=cache)

    refused("^the cache holds 10 tokens of sequence 0, and 3 more do not fit", tokens=TOKENS[:, :3])
    refused("^tokens are 2 sequences, the cache holds 3$", tokens=TOKENS[:2, :1])
    refused("^the cache belongs to another model", model=other)
    refused("11", error=ValueError, tokens=np.full((3, 1), 11))
    refused(r"float64 \(3, 1\), they must be integers", tokens=np.zeros((3, 1)))
    for n, message in [
        (11, "n is 11 for sequence 0, it must be between 0 and its 10 tokens"),
        (np.array([0, 7, 0]), "n is 7 for sequence 1, it must be between 0 and its 6 tokens"),
        (-1, "n is -1 for sequence 0"),
        (np.array([1, 1]), r"n is int64 \(2,\), it must be an integer or integers \(3,\)"),
        (1.0, "n is float64"),
    ]:
        with pytest.raises(InputError, match=f"^rewind: {message}"):
            cache.rewind(n)
    dropping = model_of({"dropout": 0.1}).train()
    refused("^a cache and dropout do not go together", model=dropping, cache=dropping.new_cache(3))
    for layer, keys in zip(cache.layers, before[0]):
        np.testing.assert_array_equal(layer.keys, keys)
    np.testing.assert_array_equal(cache.lengths, before[1])
    for batch_size in (0, -1, 2.0, True):
        with pytest.raises(InputError, match=r"^batch_size is .*, it must be an integer of at least 1"):
            model.new_cache(batch_size)


class Averaging(nn.Module):
    """Attention of a user's without a cache: the mean of all positions so far."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        n = np.arange(1, x.shape[1] + 1, dtype=np.float32)[:, None]
        return x.cumsum(1) / n


class Cached(nn.MultiHeadAttention):
    """And one that passes a cache on."""


def test_attention_of_a_users_with_and_without_a_cache():
    model = cllm.GPT(SMALL, attention=Averaging).eval()
    assert not model.takes_cache
    with pytest.raises(InputError, match=r"^Averaging[.]forward has no cache argument"):
        model.new_cache(1)
    model = cllm.GPT(SMALL, attention=Cached).eval()
    cache = model.new_cache(3)
    assert_same(model(TOKENS[:, :4], cache=cache).data, model(TOKENS[:, :4]).data)
