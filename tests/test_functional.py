"""Functional: the fused operations' gradients, parity with torch, and where parameters' gradients go."""

from functools import partial

import numpy as np
import pytest

import cllm
from cllm import Tensor, kernels, rng
from cllm import functional as F
from cllm.tensor import Parameter


def values(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def inputs_of(*shapes):
    return [Tensor(values(*shape, seed=i), requires_grad=True) for i, shape in enumerate(shapes)]


TOKENS = np.array([[0, 3, 3], [1, 4, 0]])
TARGETS = np.array([2, 0, -100, 4, 1])
WEIGHT = np.array([0.5, 1.0, 2.0, 0.1, 1.5])

FUSED = {
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear no bias": (F.linear, [(3, 4), (5, 4)]),
    "linear one row": (F.linear, [(4,), (5, 4)]),
    "embedding": (lambda w: F.embedding(TOKENS, w), [(5, 4)]),
    "token_position": (lambda w, p: F.token_position_embedding(TOKENS, w, p), [(5, 4), (6, 4)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, 5, w, b), [(2, 3, 5), (5,), (5,)]),
    "layer_norm no bias": (lambda x, w: F.layer_norm(x, (5,), w), [(3, 5), (5,)]),
    "layer_norm bare": (lambda x: F.layer_norm(x, 5, eps=0.1), [(3, 5)]),
    "layer_norm two": (lambda x, w, b: F.layer_norm(x, (3, 5), w, b), [(2, 3, 5), (3, 5), (3, 5)]),
    "layer_norm only bias": (lambda x, b: F.layer_norm(x, 5, None, b), [(3, 5), (5,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, 5, w), [(2, 5), (5,)]),
    "rms_norm bare": (lambda x: F.rms_norm(x, 5, eps=0.1), [(2, 3, 5)]),
    "rms_norm two": (lambda x, w: F.rms_norm(x, (3, 5), w), [(2, 3, 5), (3, 5)]),
    "feed_forward": (F.feed_forward, [(2, 3), (4, 3), (4,), (3, 4), (3,)]),
    **{
        f"feed_forward {name}": (
            lambda *x, name=name: F.feed_forward(*x, activation=name),
            [(2, 3), *([(8, 3), (8,)] if name == "swiglu" else [(4, 3), (4,)]), (3, 4), (3,)],
        )
        for name in kernels.ACTIVATIONS
    },
    "feed_forward no bias": (lambda x, w, v: F.feed_forward(x, w, None, v, None), [(2, 3), (4, 3), (3, 4)]),
    **{
        f"feed_forward {name} one bias": (
            lambda x, w, b, v, name=name: F.feed_forward(x, w, b, v, None, name),
            [(2, 3), (8, 3), (8,), (3, 4 if name == "swiglu" else 8)],
        )
        for name in kernels.ACTIVATIONS
    },
    "feed_forward shared": (lambda x, w: F.feed_forward(x, w, None, w, None), [(2, 3), (3, 3)]),
    "relu_squared": (F.relu_squared, [(3, 4)]),
    "swiglu": (F.swiglu, [(3, 4), (3, 4)]),
    "rotary": (F.rotary, [(2, 1, 3, 4)]),
    "rotary places": (lambda x: F.rotary(x, np.array([4, 0]), 10.0), [(2, 1, 3, 4)]),
    "causal_self_attention": (lambda x: F.causal_self_attention(x, 2), [(2, 3, 12)]),
    "attention": (F.scaled_dot_product_attention, [(1, 2, 3, 4)] * 3),
    "attention causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(1, 2, 3, 4)] * 3,
    ),
    "attention masked": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=np.eye(3, 4, dtype=bool), scale=0.3
        ),
        [(1, 2, 3, 4), (1, 2, 4, 4), (1, 2, 4, 5)],
    ),
    "attention bias": (F.scaled_dot_product_attention, [(2, 1, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4), (3, 5)]),
    "attention groups": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        [(1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)],
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, TARGETS), [(5, 5)]),
    "cross_entropy none": (lambda x: F.cross_entropy(x, TARGETS, reduction="none"), [(5, 5)]),
    "cross_entropy smooth": (
        lambda x: F.cross_entropy(x, TARGETS, reduction="sum", label_smoothing=0.2),
        [(5, 5)],
    ),
    "cross_entropy weight": (
        lambda x: F.cross_entropy(x, TARGETS, weight=WEIGHT, label_smoothing=0.1),
        [(5, 5)],
    ),
    "cross_entropy images": (lambda x: F.cross_entropy(x, TOKENS, reduction="none"), [(2, 5, 3)]),
    "linear_cross_entropy": (lambda x, w: F.linear_cross_entropy(x, w, TARGETS), [(5, 3), (5, 3)]),
    "linear_cross_entropy none": (
        lambda x, w: F.linear_cross_entropy(x, w, TOKENS, reduction="none", label_smoothing=0.1),
        [(2, 3, 4), (5, 4)],
    ),
    "mse_loss": (F.mse_loss, [(3, 4), (3, 4)]),
    "l1_loss": (F.l1_loss, [(3, 4), (3, 4)]),
    "smooth_l1_loss": (lambda x, y: F.smooth_l1_loss(x, y, beta=0.7), [(3, 4), (3, 4)]),
    "huber_loss": (lambda x, y: F.huber_loss(x, y, delta=0.7, reduction="none"), [(3, 4), (3, 4)]),
    "softplus": (F.softplus, [(3, 4)]),
    "bce": (lambda x: F.binary_cross_entropy_with_logits(x, np.eye(3, 4)), [(3, 4)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_those_of_finite_differences(name):
    function, shapes = FUSED[name]
    assert cllm.gradcheck(function, inputs_of(*shapes))


@pytest.mark.parametrize("name", FUSED)
def test_parameters_get_the_same_gradients_added_up_over_two_passes(name):
    function, shapes = FUSED[name]
    tensors = inputs_of(*shapes)
    parameters = [Parameter(x.data) for x in tensors]
    for x in (tensors, parameters):
        for factor in (1.0, 2.0):
            y = function(*x) * factor
            y.backward(np.ones(y.shape))
    for x, p in zip(tensors, parameters):
        np.testing.assert_allclose(p.grad, x.grad, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_a_gradient_beside_one_that_has_one():
    x, w, b = Tensor(values(3, 4), requires_grad=True), Parameter(values(5, 4)), Parameter(values(5))
    (w * 2).sum().backward()  # w has a gradient to add to, b has none yet
    b_target = np.full(5, np.nan)
    b.place(b.data, b_target)
    F.linear(x, w, b).sum().backward()
    np.testing.assert_allclose(w.grad, 2 + np.ones((5, 3)) @ x.data)
    assert b.grad is b_target and b.grad.tolist() == [3] * 5


def test_frozen_parameters_get_none_and_pass_the_gradient_on():
    x = Tensor(values(3, 4), requires_grad=True)
    w, b = Parameter(values(4, 4), requires_grad=False), Parameter(values(4), requires_grad=False)
    F.layer_norm(F.linear(x, w, b), 4, b, b).sum().backward()
    assert w.grad is None and b.grad is None and x.grad.shape == (3, 4)
    y = F.linear(x, w, Parameter(values(4)))
    y.sum().backward()
    assert w.grad is None


def test_weights_that_were_computed():
    w = Parameter(values(5, 4))
    mask = values(5, 4, seed=1) > 0
    x = values(3, 4, seed=2)
    F.linear(x, w * mask).sum().backward()
    np.testing.assert_allclose(w.grad, mask * x.sum(0))


def test_large_results_do_not_change_while_others_use_them():
    x = Tensor(values(64, 512, dtype=np.float32), requires_grad=True)
    w = Parameter(values(512, 512, dtype=np.float32))
    y = F.linear(x, w)
    before = y.data.copy()
    F.linear(F.linear(y, w), w).sum().backward()
    np.testing.assert_array_equal(y.data, before)


def torch_pair(arrays, dtype):
    torch = pytest.importorskip("torch")
    return (
        [Tensor(x.astype(dtype), requires_grad=True) for x in arrays],
        [torch.tensor(x.astype(dtype), requires_grad=True) for x in arrays],
    )


def assert_same(y, z, ours, theirs, dtype):
    torch = pytest.importorskip("torch")
    assert tuple(y.shape) == tuple(z.shape) and y.dtype == dtype
    weights = values(*y.shape, seed=9, dtype=dtype)
    y.backward(weights)
    z.backward(torch.tensor(weights))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(y.data, z.detach().numpy(), **tolerance)
    for x, t in zip(ours, theirs):
        np.testing.assert_allclose(x.grad, t.grad.numpy(), **tolerance)


# Functions called alike in both, F being cllm's or torch's; name: (call, shapes).
ALIKE = {
    "linear": (lambda F, x, w, b: F.linear(x, w, b), [(2, 3, 4), (5, 4), (5,)]),
    "layer_norm": (lambda F, x, w, b: F.layer_norm(x, (5,), w, b, eps=1e-4), [(2, 3, 5), (5,), (5,)]),
    "layer_norm bare": (lambda F, x: F.layer_norm(x, (3, 5)), [(2, 3, 5)]),
    "rms_norm": (lambda F, x, w: F.rms_norm(x, (5,), w), [(2, 3, 5), (5,)]),
    "rms_norm two": (lambda F, x, w: F.rms_norm(x, (3, 5), w, eps=1e-3), [(2, 3, 5), (3, 5)]),
    "rms_norm bare": (lambda F, x: F.rms_norm(x, (5,)), [(2, 3, 5)]),
    "relu": (lambda F, x: F.relu(x), [(3, 4)]),
    "gelu": (lambda F, x: F.gelu(x), [(3, 4)]),
    "gelu tanh": (lambda F, x: F.gelu(x, approximate="tanh"), [(3, 4)]),
    "silu": (lambda F, x: F.silu(x), [(3, 4)]),
    "tanh": (lambda F, x: F.tanh(x), [(3, 4)]),
    "sigmoid": (lambda F, x: F.sigmoid(x), [(3, 4)]),
    "softplus": (lambda F, x: F.softplus(x), [(3, 4)]),
    "softmax": (lambda F, x: F.softmax(x, dim=0), [(3, 4)]),
    "softmax between": (lambda F, x: F.softmax(x, dim=1), [(2, 5, 4)]),
    "softmax last": (lambda F, x: F.softmax(x, dim=-1), [(2, 5, 4)]),
    "softmax number": (lambda F, x: F.softmax(x, dim=0), [()]),
    "log_softmax": (lambda F, x: F.log_softmax(x, dim=-1), [(3, 4)]),
    "log_softmax between": (lambda F, x: F.log_softmax(x, dim=-2), [(2, 5, 4)]),
    "mse_loss": (lambda F, x, y: F.mse_loss(x, y), [(3, 4), (3, 4)]),
    "l1_loss": (lambda F, x, y: F.l1_loss(x, y, reduction="sum"), [(3, 4), (3, 4)]),
    "smooth_l1_loss": (lambda F, x, y: F.smooth_l1_loss(x, y, beta=0.5), [(3, 4), (3, 4)]),
    "smooth_l1_loss 0": (lambda F, x, y: F.smooth_l1_loss(x, y, beta=0.0), [(3, 4), (3, 4)]),
    "huber_loss": (lambda F, x, y: F.huber_loss(x, y, reduction="none", delta=0.5), [(3, 4), (3, 4)]),
    "bce": (lambda F, x, y: F.binary_cross_entropy_with_logits(x, y), [(3, 4), (3, 4)]),
    "bce weights": (
        lambda F, x, y, w, p: F.binary_cross_entropy_with_logits(
            x, y, weight=w.detach(), pos_weight=p.detach()
        ),
        [(3, 4), (3, 4), (4,), (4,)],
    ),
    "attention": (lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v), [(2, 3, 5, 4)] * 3),
    "attention causal": (
        lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
        [(2, 3, 5, 4)] * 3,
    ),
    "attention longer keys": (
        lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v),
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    ),
    "attention causal, longer keys": (
        lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(2, 1, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)],
    ),
    "attention other value size": (
        lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 6)],
    ),
    "attention 3-d": (lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v), [(3, 5, 4)] * 3),
    "attention bias": (
        lambda F, q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        [*[(2, 3, 5, 4)] * 3, (5, 5)],
    ),
    "attention groups": (
        lambda F, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALIKE)
def test_values_and_gradients_are_torchs(name, dtype):
    torch = pytest.importorskip("torch")
    call, shapes = ALIKE[name]
    ours, theirs = torch_pair([values(*shape, seed=i) for i, shape in enumerate(shapes)], dtype)
    y, z = call(F, *ours), call(torch.nn.functional, *theirs)
    with_grad = [t.grad_fn is None and t.requires_grad for t in theirs]
    used = len(ours) - 2 if name == "bce weights" else len(ours)
    assert all(with_grad)
    assert_same(y, z, ours[:used], theirs[:used], dtype)


def test_a_row_that_sees_no_key_gives_zero_and_no_nan():
    q, k, v = inputs_of(*[(1, 1, 2, 3)] * 3)
    mask = np.array([[True, False], [False, False]])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert not out.data[0, 0, 1].any()
    out.sum().backward()
    assert all(np.isfinite(x.grad).all() for x in (q, k, v))


def test_a_nan_behind_the_causal_mask_stays_there():
    q, k, v = inputs_of(*[(1, 1, 3, 4)] * 3)
    v.data[0, 0, 2] = np.nan
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert np.isfinite(out.data[0, 0, :2]).all()


# Dropout


def test_dropout_scales_what_it_keeps_and_repeats_its_mask_in_backward():
    cllm.manual_seed(3)
    x = Tensor(np.ones((100, 100)), requires_grad=True)
    y = F.dropout(x, 0.3)
    assert set(np.unique(y.data)) == {0.0, 1 / 0.7} and 0.67 < (y.data > 0).mean() < 0.73
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)


def test_dropout_follows_the_seed_and_not_the_threads():
    x = Tensor(np.ones((64, 1000), np.float32))
    before = cllm.get_num_threads()
    masks = []
    try:
        for threads in (1, 2, 5):
            cllm.set_num_threads(threads)
            cllm.manual_seed(1)
            masks.append([F.dropout(x).data for _ in range(2)])
    finally:
        cllm.set_num_threads(before)
    for first, second in masks[1:]:
        np.testing.assert_array_equal(first, masks[0][0])
        np.testing.assert_array_equal(second, masks[0][1])
    assert (masks[0][0] != masks[0][1]).any()
    cllm.manual_seed(2)
    assert (F.dropout(x).data != masks[0][0]).any()


def test_dropout_keys_belong_to_their_seed_step_and_micro_batch():
    keys = []
    for stream in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (0, 1, 0), (1, 0, 0)]:
        rng.set_stream(*stream)
        keys.append((rng.next_key(), rng.next_key()))
    assert keys[0] == keys[-1] and len({key for pair in keys[:-1] for key in pair}) == 10
    assert all(0 <= key < 2**64 for pair in keys for key in pair)


def test_dropout_edges():
    x = Tensor(values(3), requires_grad=True)
    assert F.dropout(x, 0.0) is x and F.dropout(x, 0.5, training=False) is x
    assert not F.dropout(x, 1.0).data.any()
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout(x, p)


def test_attention_dropout_is_undone_by_its_expectation_and_checked_by_its_seed():
    q, k, v = inputs_of(*[(1, 2, 4, 3)] * 3)

    def attention(q, k, v):
        cllm.manual_seed(5)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True)

    assert cllm.gradcheck(attention, [q, k, v])
    cllm.manual_seed(5)
    packed = F.causal_self_attention(Tensor(values(2, 3, 12)), 2, 0.5)
    assert (packed.data != F.causal_self_attention(Tensor(values(2, 3, 12)), 2, 0.5).data).any()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: F.linear(Tensor(values(3, 4)), Tensor(values(5, 3))), ValueError, r"\(3, 4\).*\(5, 3\)"),
        (
            lambda: F.linear(Tensor(values(3, 4)), Tensor(values(5, 4, dtype=np.float32))),
            TypeError,
            "one dtype",
        ),
        (lambda: F.embedding(np.array([9]), Tensor(values(5, 2))), ValueError, "9"),
        (lambda: F.embedding(np.array([0.5]), Tensor(values(5, 2))), TypeError, "integer"),
        (lambda: F.layer_norm(Tensor(values(3, 4)), 5), ValueError, "normalized_shape"),
        (lambda: F.layer_norm(values(3, 4), 4.0), ValueError, "normalized_shape is 4.0, it must be of int"),
        (
            lambda: F.layer_norm(values(2, 3, 4), (3, 4), values(4, 3)),
            ValueError,
            r"layer_norm: weight is \(4, 3\), it must be \(3, 4\)",
        ),
        (
            lambda: F.layer_norm(values(2, 3, 4), (3, 4), None, values(12)),
            ValueError,
            r"layer_norm: bias is \(12,\), it must be \(3, 4\)",
        ),
        (
            lambda: F.rms_norm(values(2, 3, 4), (3, 4), values(12)),
            ValueError,
            r"rms_norm: weight is \(12,\), it must be \(3, 4\)",
        ),
        (lambda: F.embedding(np.array([0]), values()), ValueError, r"weight is \(\), it must be \(V, C\)"),
        (lambda: F.dropout(values(3), "a"), ValueError, "dropout: p is 'a', it must be a number between"),
        (
            lambda: F.linear(values(3, 4), values(3)),
            ValueError,
            r"linear: input is \(3, 4\), weight is \(3,\)",
        ),
        (lambda: F.cross_entropy(Tensor(values(3, 4)), np.array([0, 1])), ValueError, r"target is \(2,\)"),
        (lambda: F.cross_entropy(Tensor(values(3, 4)), values(3)), TypeError, "integer array"),
        (lambda: F.cross_entropy(Tensor(values(3, 4)), np.array([0, 4, 1])), ValueError, "4"),
        (lambda: F.cross_entropy(Tensor(values(1, 4)), np.array([0]), reduction="max"), ValueError, "mean"),
        (
            lambda: F.cross_entropy(Tensor(values(1, 4)), np.array([0]), label_smoothing=2),
            ValueError,
            "label",
        ),
        (
            lambda: F.cross_entropy(Tensor(values(1, 4)), np.array([0]), weight=np.ones(3)),
            ValueError,
            "weight",
        ),
        (lambda: F.mse_loss(Tensor(values(2)), values(2), reduction="x"), ValueError, "reduction"),
        (lambda: F.smooth_l1_loss(Tensor(values(2)), values(2), beta=-1), ValueError, "beta"),
        (lambda: F.huber_loss(Tensor(values(2)), values(2), delta=0), ValueError, "delta"),
        (lambda: F.binary_cross_entropy_with_logits(Tensor(values(2)), values(3)), ValueError, "target"),
        (lambda: F.gelu(Tensor(values(2)), approximate="fast"), ValueError, "approximate"),
        (lambda: F.swiglu(Tensor(values(2)), Tensor(values(3))), ValueError, r"\(2,\), up is \(3,\)"),
        (lambda: F.rotary(Tensor(values(1, 1, 2, 3))), ValueError, "even D"),
        (lambda: F.softmax(Tensor(values(2, 3)), dim=2), ValueError, "out of bounds"),
        (lambda: F.log_softmax(Tensor(values(2, 3)), dim=-3), ValueError, "out of bounds"),
        (lambda: F.rms_norm(Tensor(values(2, 3)), 4), ValueError, "normalized_shape"),
        (lambda: F.rms_norm(Tensor(values(2, 3)), 3, Tensor(values(4))), ValueError, r"weight is \(4,\)"),
        (
            lambda: F.feed_forward(*inputs_of((2, 3), (4, 3), (4,), (3, 4), (3,)), "elu"),
            ValueError,
            "activation is 'elu', it must be one of gelu_tanh, gelu, relu",
        ),
        (lambda: F.token_position_embedding(TOKENS, *inputs_of((5, 2), (2, 2))), ValueError, "3 positions"),
        (
            lambda: F.token_position_embedding(TOKENS, *inputs_of((5, 2), (3, 1))),
            ValueError,
            r"position_weight is \(3, 1\) float64; they must be \(\.\.\., T\) and \(P, 2\) float64",
        ),
        (
            lambda: F.token_position_embedding(2, *inputs_of((5, 2), (3, 2))),
            ValueError,
            r"tokens are \(\), position_weight",
        ),
        (
            lambda: F.scaled_dot_product_attention(
                *inputs_of(*[(1, 2, 3, 4)] * 3), np.ones((3, 3), bool), 0.0, True
            ),
            ValueError,
            "not both",
        ),
        (
            lambda: F.scaled_dot_product_attention(
                *inputs_of((1, 4, 3, 2), *[(1, 3, 3, 2)] * 2), enable_gqa=True
            ),
            ValueError,
            "do not divide",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "function, shapes",
    [
        (F.linear, [(2, 4), (3, 4), (3,)]),
        (F.linear, [(2, 4), (4,)]),
        (partial(F.layer_norm, normalized_shape=(2, 4)), [(3, 2, 4), (2, 4), (2, 4)]),
        (partial(F.rms_norm, normalized_shape=4), [(2, 4), (4,)]),
        (lambda w: F.embedding(TOKENS, w), [(5, 2)]),
        (lambda *w: F.token_position_embedding(TOKENS, *w), [(5, 2), (3, 2)]),
        (F.feed_forward, [(2, 4), (3, 4), (3,), (4, 3), (4,)]),
        (lambda x, w: F.linear_cross_entropy(x, w, [0, 2]), [(2, 4), (3, 4)]),
    ],
)
def test_weights_may_be_arrays_and_lists(function, shapes):
    names = {3: ("weight", "bias"), 2: ("weight",)}.get(len(shapes), ())
    arrays = [values(*shape, seed=i, dtype=np.float32) for i, shape in enumerate(shapes)]
    if isinstance(function, partial):
        function = lambda x, *more, f=function: f(x, **dict(zip(names, more)))  # noqa: E731
    expected = function(*map(Tensor, arrays)).data
    np.testing.assert_array_equal(function(*arrays).data, expected)
    np.testing.assert_array_equal(function(*(array.tolist() for array in arrays)).data, expected)


@pytest.mark.parametrize(
    "shape, bias", [((4,), False), ((4,), True), ((2, 4), False), ((2, 3, 4), False), ((2, 3, 4), True)]
)
def test_linear_with_one_row_is_torchs(shape, bias):
    torch = pytest.importorskip("torch")
    arrays = [values(*s, seed=i) for i, s in enumerate([shape, (4,), ()][: 2 + bias])]
    ours = [Tensor(x, requires_grad=True) for x in arrays]
    theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    y, z = F.linear(*ours), torch.nn.functional.linear(*theirs)
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-12)
    y.sum().backward()
    z.sum().backward()
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-12)


def test_rotary_keeps_the_offsets_of_the_forward_pass():
    """A cache moves its lengths on before the backward pass runs."""
    x, offsets = Tensor(values(2, 1, 3, 4), requires_grad=True), np.array([4, 0])
    y = F.rotary(x, offsets)
    offsets += 10
    y.backward(y.data)  # turned back: x itself
    np.testing.assert_allclose(x.grad, x.data, rtol=1e-12)


def test_a_frozen_weight_of_rms_norm_gets_no_gradient():
    x, w = Tensor(values(3, 4), requires_grad=True), Parameter(values(4), requires_grad=False)
    F.rms_norm(x, 4, w).sum().backward()
    assert w.grad is None and x.grad.shape == (3, 4)
