"""cllm.capture: names, values, and that looking changes nothing but the path taken."""

import copy

import numpy as np
import pytest

import cllm
from cllm import functional as F
from cllm import nn
from cllm.errors import InputError

CONFIG = cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=3, n_head=2, n_embd=8, position="rotary")
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 6))


@pytest.fixture(scope="module")
def model():
    return cllm.GPT(CONFIG, dtype=np.float64).eval()


def test_attention_weights_of_all_layers(model):
    expected = model(TOKENS).data
    with cllm.capture(model, "h.*.attn.weights") as seen:
        assert seen == {}
        found = model(TOKENS).data
        assert list(seen) == [f"h.{i}.attn.weights" for i in range(3)]
        for weights in seen.values():
            assert type(weights) is np.ndarray and weights.shape == (2, 2, 6, 6)
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
            assert not np.triu(weights, 1).any()
        first = dict(seen)
        model(TOKENS[:, ::-1])  # each forward pass overwrites
        assert (seen["h.2.attn.weights"] != first["h.2.attn.weights"]).any()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(model(TOKENS).data, expected)  # the fused path again
    assert list(seen) == list(first)


def test_weights_are_those_that_make_the_output(model):
    attn = model.transformer.h[1].attn
    with cllm.capture(model, "h.1.attn.*", "h.1.attn", "h.1.ln_1", "h.1.attn.c_attn") as seen:
        model(TOKENS)
    v = seen["h.1.attn.c_attn"][..., 16:].reshape(2, 6, 2, 4).transpose(0, 2, 1, 3)
    y = (seen["h.1.attn.weights"] @ v).transpose(0, 2, 1, 3).reshape(2, 6, 8)
    np.testing.assert_allclose(attn.c_proj(y).data, seen["h.1.attn"], rtol=1e-12)
    np.testing.assert_allclose(attn.c_proj(y).data, seen["h.1.attn.c_proj"], rtol=1e-12)
    np.testing.assert_allclose(attn(seen["h.1.ln_1"]).data, seen["h.1.attn"], rtol=1e-12)


def test_every_modules_output_can_be_seen():
    config = cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, qk_norm=True)
    model = cllm.GPT(config, dtype=np.float64)
    names = [name for name, _ in model.named_modules() if name not in ("", "transformer", "transformer.h")]
    with cllm.capture(model, *names, "mlp.hidden") as seen:
        logits = model(TOKENS)
    assert sorted(seen) == sorted([*names, "mlp.hidden"])
    np.testing.assert_array_equal(seen["lm_head"], logits.data)
    table = model.transformer.wte.weight.data
    np.testing.assert_array_equal(seen["transformer.wte"], table[TOKENS])
    pre = seen["transformer.h.0.mlp.c_fc"]
    np.testing.assert_allclose(seen["mlp.hidden"], F.gelu(cllm.Tensor(pre), "tanh").data, rtol=1e-12)
    assert seen["transformer.h.0.attn.q_norm"].shape == (2, 6, 2, 4)


@pytest.mark.parametrize("pattern", ["h.0.attn.weights", "wte", "h.1.mlp.c_fc", "h.2.mlp.hidden", "lm_head"])
def test_loss_and_gradients_stay_the_same(model, pattern):
    def gradient():
        model.zero_grad()
        loss = model.loss(TOKENS, TOKENS)
        loss.backward()
        return loss.item(), model.flat_grad.copy()

    loss, expected = gradient()
    with cllm.capture(model, pattern) as seen:
        watched, found = gradient()
    assert list(seen) == [pattern]
    assert watched == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_with_a_cache_and_in_training(model):
    with cllm.capture(model, "h.0.attn.weights") as seen:
        model(TOKENS)
        whole = seen["h.0.attn.weights"]
        cache = model.new_cache(2)
        model(TOKENS[:, :4], cache=cache)
        model(TOKENS[:, 4:], cache=cache)
    np.testing.assert_allclose(seen["h.0.attn.weights"], whole[:, :, 4:], rtol=1e-10)
    dropping = cllm.GPT(cllm.GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, dropout=0.5))
    with cllm.capture(dropping, "attn.weights") as seen:
        dropping(TOKENS)
    np.testing.assert_allclose(seen["attn.weights"].sum(-1), 1, rtol=1e-5)  # before dropout


class Inner(nn.Module):
    def forward(self, x):
        self.observe("half", x * 0.5)
        if self.observed("square"):
            self.observe("square", x * x)
        return x + 1, None


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Inner(), Inner()

    def forward(self, x):
        self.observe("input", x.data)
        return self.b(self.a(x)[0])[0]


def test_modules_of_a_users_offer_values():
    net, x = Outer(), cllm.Tensor(np.ones((1, 2), np.float32))
    with cllm.capture(net, "?.half", "b.square", "a", "input") as seen:
        net(x)
    assert {name: array[0, 0] for name, array in seen.items()} == {
        "input": 1, "a.half": 0.5, "a": 2, "b.half": 1, "b.square": 4,
    }  # fmt: skip
    assert not net.a.observed("square") and not net.a.observed()
    with cllm.capture(net, "a.*") as outer:
        with cllm.capture(net, "b.h*") as inner:  # several at once
            net(x)
            assert net.b.observed("half") and not net.b.observed("square") and not net.b.observed()
        assert list(outer) == ["a.half", "a.square"] and list(inner) == ["b.half"]
        net(x * 3)
    assert outer["a.half"][0, 0] == 1.5 and inner["b.half"][0, 0] == 1
    x.data[:] = 5
    assert seen["input"][0, 0] == 1  # a copy


def test_it_ends_when_the_context_does_whatever_happens():
    net = Outer()
    with pytest.raises(KeyError), cllm.capture(net, "a.half"):  # and no error of its own on top
        raise KeyError
    assert not net.a.observed("half")
    with cllm.capture(net, "a.half") as seen:
        twin = copy.deepcopy(net)
    assert seen == {}  # nothing ran: nothing to complain of
    assert not twin.a.observed("half")


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["h.*.attention.weights"], '^capture: "h.*.attention.weights" fits no module'),
        (["h.3.attn"], r'^capture: "h.3.attn" fits no module \(did you mean "h.\d.attn"\?\)$'),
        (["attn.weights"], '^capture: "attn.weights" fits transformer.h.0.attn and transformer.h.1.attn '),
        (["mlp"], 'with one name, "mlp"; write more of it'),
        ([], "^capture: there is no pattern"),
        ([3], "^capture: a pattern is 3, it must be a dotted name"),
        ([""], "^capture: a pattern is ''"),
    ],
)
def test_bad_patterns_are_refused_on_entry(model, patterns, message):
    with pytest.raises(InputError, match=message), cllm.capture(model, *patterns):
        raise AssertionError


def test_what_is_no_module_has_nothing_to_capture():
    message = r"^capture: model is a int, it must be a Module$"
    with pytest.raises(InputError, match=message), cllm.capture(3, "a"):
        raise AssertionError


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("h.*.attn.wieghts", r'nothing has been seen for "h.\*.attn.wieghts" \(did you mean "weights"\?\)$'),
        ("h.0.mlp.xyz", r'nothing has been seen for "h.0.mlp.xyz"; there is hidden$'),
        ("transformer.h", 'nothing has been seen for "transformer.h"$'),
    ],
)
def test_a_pattern_that_meets_nothing_is_an_error_on_leaving(model, pattern, message):
    with pytest.raises(InputError, match=message), cllm.capture(model, pattern, "ln_f") as seen:
        model(TOKENS)
    assert list(seen) == ["ln_f"]
