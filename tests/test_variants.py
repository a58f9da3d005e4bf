"""Every variant of GPTConfig: fused against plain attention, and against a GPT written out in torch.

The torch GPT reads the same config and state_dict and shares nothing else with CLLM.
"""

import dataclasses
import math

import numpy as np
import pytest
from kernel_checks import error, same_bits, with_threads

import cllm
from cllm import kernels, rng

SMALL = cllm.GPTConfig(vocab_size=11, block_size=9, n_layer=2, n_head=4, n_embd=16)

VARIANTS = {
    "gpt2": {},
    "rotary": {"position": "rotary"},
    "rotary base": {"position": "rotary", "rotary_base": 100.0},
    "sinusoidal": {"position": "sinusoidal"},
    "alibi": {"position": "alibi"},
    "alibi, three heads": {"position": "alibi", "n_head": 3, "n_embd": 15},
    "no position": {"position": "none"},
    "two key heads": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1, "bias": False},
    "alibi, grouped": {"position": "alibi", "n_kv_head": 2},
    "qk norm": {"qk_norm": True},
    "qk norm, rotary, grouped": {"qk_norm": True, "position": "rotary", "n_kv_head": 1},
    "qk norm, alibi": {"qk_norm": True, "position": "alibi"},
    "rms": {"norm": "rms"},
    "post": {"norm_position": "post"},
    "vaswani": {"norm_position": "post", "position": "sinusoidal", "activation": "relu"},
    "post, rms": {"norm_position": "post", "norm": "rms", "tied": False},
    "untied, no bias": {"tied": False, "bias": False},
    "llama": {
        "position": "rotary", "norm": "rms", "activation": "swiglu", "n_kv_head": 2, "bias": False,
        "tied": False,
    },
    **{name: {"activation": name} for name in kernels.ACTIVATIONS},
    "swiglu, narrow": {"activation": "swiglu", "d_ff": 5, "bias": False},
}  # fmt: skip
VARIANT = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def config_of(fields, **more):
    return dataclasses.replace(SMALL, **{**fields, **more})


def model_of(config, dtype):
    """A model far from the symmetric start, where no gradient is small and no norm or bias does nothing."""
    model = cllm.GPT(config, seed=1, dtype=dtype)
    for name, p in model.named_parameters():
        p.data += 0.25 * rng.initial_generator(5, name).standard_normal(p.shape, np.float32)
    return model


def batch(T=9, B=2):
    tokens = np.random.default_rng(3).integers(0, 11, (B, T + 1))
    targets = tokens[:, 1:].copy()
    targets[0, :2] = -100
    return tokens[:, :-1], targets


def results_of(model):
    """Logits and the gradient of every parameter."""
    tokens, targets = batch()
    model.zero_grad()
    model.loss(tokens, targets, label_smoothing=0.1).backward()
    return {"logits": model(tokens).data, **{name: p.grad.copy() for name, p in model.named_parameters()}}


def assert_agree(results, expected, tolerance):
    assert results.keys() == expected.keys()
    for name, array in expected.items():
        assert results[name].shape == array.shape, name
        assert error(results[name], array) < tolerance, name


# Fused against plain


@DTYPE
@VARIANT
def test_plain_attention_is_fused_attention(fields, dtype):
    config = config_of(fields)
    fused = model_of(config, dtype)
    plain = model_of(dataclasses.replace(config, attention="plain"), dtype)
    assert_agree(results_of(plain), results_of(fused), 1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "qk norm, rotary, grouped", "alibi, three heads"])
def test_plain_attention_drops_the_same_weights(name):
    config = config_of(VARIANTS[name], dropout=0.3)
    results = []
    for attention in ("fused", "plain"):
        model = model_of(dataclasses.replace(config, attention=attention), np.float64)
        model.train()
        cllm.manual_seed(4)
        results.append(results_of(model))
    assert_agree(*results, 1e-12)


@pytest.mark.parametrize("name", ["llama", "qk norm, alibi", "vaswani"])
def test_the_same_bits_at_any_thread_count(name):
    config = config_of(VARIANTS[name], block_size=64, n_embd=64)
    tokens = np.random.default_rng(0).integers(0, 11, (8, 64))

    def gradient():
        model = cllm.GPT(config)
        model.loss(tokens, tokens).backward()
        return model.flat_grad.copy()

    one = with_threads(1, gradient)
    assert same_bits(with_threads(3, gradient), one)


# Against torch


def torch_logits(torch, config, state, tokens):
    """Logits of the GPT that the config describes, in plain torch operations."""
    F = torch.nn.functional
    B, T = tokens.shape
    C, H = config.n_embd, config.n_head
    D, G = C // H, config.n_kv_head or H
    places = torch.arange(T, dtype=torch.float64)
    dtype = state["transformer.wte.weight"].dtype

    def norm(x, name):
        if config.norm == "rms":
            return F.rms_norm(x, (C,), state[f"{name}.weight"], 1e-5)
        return F.layer_norm(x, (C,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def turned(x):  # a complex number for each pair (i, i + D/2)
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
        angles = places[:, None] * config.rotary_base ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
        return torch.cat([pairs.real, pairs.imag], -1)

    def slopes(n):
        if n & (n - 1) == 0:
            return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
        m = 2 ** math.floor(math.log2(n))
        return slopes(m) + slopes(2 * m)[0::2][: n - m]

    def attention(x, name):
        q, k, v = linear(x, f"{name}.c_attn").split((H * D, G * D, G * D), -1)
        q, k, v = (y.view(B, T, -1, D) for y in (q, k, v))
        if config.qk_norm:
            q = F.rms_norm(q, (D,), state[f"{name}.q_norm.weight"], 1e-5)
            k = F.rms_norm(k, (D,), state[f"{name}.k_norm.weight"], 1e-5)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if config.position == "rotary":
            q, k = turned(q), turned(k)
        k, v = (y.repeat_interleave(H // G, 1) for y in (k, v))
        scores = q @ k.mT / math.sqrt(D)
        if config.position == "alibi":
            slope = torch.tensor(slopes(H), dtype=torch.float64)[:, None, None]
            scores = scores - (slope * (places[:, None] - places)).to(dtype)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), f"{name}.c_proj")

    def feed_forward(x, name):
        return linear(activation(linear(x, f"{name}.c_fc")), f"{name}.c_proj")

    def swiglu(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    activation = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu,
        "relu_squared": lambda x: F.relu(x) ** 2, "silu": F.silu, "tanh": torch.tanh,
        "sigmoid": torch.sigmoid, "swiglu": swiglu,
    }[config.activation]  # fmt: skip
    x = state["transformer.wte.weight"][tokens]
    if config.position == "learned":
        x = x + state["transformer.wpe.weight"][:T]
    elif config.position == "sinusoidal":
        x = x * math.sqrt(C)
        for channel in range(C):
            angle = places / 10000 ** ((channel - channel % 2) / C)
            wave = torch.cos(angle) if channel % 2 else torch.sin(angle)
            x = x + F.one_hot(torch.tensor(channel), C).to(dtype) * wave.to(dtype)[:, None]
    for i in range(config.n_layer):
        for f, name, ln in ((attention, "attn", "ln_1"), (feed_forward, "mlp", "ln_2")):
            name, ln = f"transformer.h.{i}.{name}", f"transformer.h.{i}.{ln}"
            x = norm(x + f(x, name), ln) if config.norm_position == "post" else x + f(norm(x, ln), name)
    if config.norm_position == "pre":
        x = norm(x, "transformer.ln_f")
    return x @ state["lm_head.weight"].T


@DTYPE
@VARIANT
def test_logits_and_gradients_are_torchs(fields, dtype):
    torch = pytest.importorskip("torch")
    config = config_of(fields)
    model = model_of(config, dtype)
    leaves = {name: torch.tensor(p.data, requires_grad=True) for name, p in model.named_parameters()}
    state = dict(leaves)
    if config.tied:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    assert state.keys() == model.state_dict().keys()
    tokens, targets = (torch.from_numpy(array.copy()) for array in batch())
    logits = torch_logits(torch, config, state, tokens)
    flat = logits.flatten(0, 1), targets.flatten()
    torch.nn.functional.cross_entropy(*flat, label_smoothing=0.1).backward()
    expected = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    expected = {"logits": logits.detach().numpy(), **expected}
    assert_agree(results_of(model), expected, 2e-5 if dtype == np.float32 else 1e-12)
