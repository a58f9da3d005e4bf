"""The float64 reference: its backward functions against finite differences, its definitions against torch."""

import inspect

import numpy as np
import pytest
from kernel_checks import error, values

from cllm import kernels, reference

KEY = 0x1234_5678_9ABC_DEF0
TARGETS = np.array([3, -100, 0, 4, 3])
TOKENS = np.array([[1, 0, 2], [2, 2, 0]])


def numeric_gradient(function, arrays, i, dout, step=1e-6):
    """d sum(function(*arrays) dout) / d arrays[i] by central differences."""
    gradient = np.empty_like(arrays[i])
    for at in np.ndindex(arrays[i].shape):
        shifted = []
        for sign in (1, -1):
            copies = [array.copy() for array in arrays]
            copies[i][at] += sign * step
            shifted.append(np.sum(function(*copies) * dout))
        gradient[at] = (shifted[0] - shifted[1]) / (2 * step)
    return gradient


def check_gradients(function, backward, *arrays):
    """backward(dout, *arrays) gives the gradient of function(*arrays) for each of the arrays."""
    dout = values(*np.shape(function(*arrays)), seed=99)
    gradients = backward(dout, *arrays)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(arrays)
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == np.float64
        assert gradient.shape == arrays[i].shape
        assert error(gradient, numeric_gradient(function, arrays, i, dout)) < 1e-8


def test_every_kernel_of_the_door_has_its_twin():
    """The same names, and the same arguments in the same order, but for out, results and accumulate."""
    ours = {name for name in vars(reference) if name.endswith(("_forward", "_backward", "_update"))}
    theirs = {name for name in vars(kernels) if name.endswith(("_forward", "_backward", "_update"))}
    assert ours == theirs
    for name in [*sorted(ours), "matmul", "sum_of_squares", "scale_"]:
        ours, theirs = (
            [
                (parameter.name, parameter.default)
                for parameter in inspect.signature(getattr(module, name)).parameters.values()
                if parameter.name not in ("out", "results", "accumulate") or name.startswith("attention")
            ]
            for module in (reference, kernels)
        )
        if name.startswith("attention"):  # out is an input of its backward
            theirs = [one for one in theirs if one[0] != "results" and one != ("out", None)]
        assert ours == theirs, name


def test_linear():
    x, weight, bias = values(2, 3, 4), values(5, 4, seed=1), values(5, seed=2)
    check_gradients(
        reference.linear_forward, lambda dy, x, w, b: reference.linear_backward(dy, x, w), x, weight, bias
    )
    assert reference.linear_backward(values(2, 3, 5), x, weight, bias=False)[2] is None
    assert error(reference.linear_forward(x, weight), x @ weight.T) == 0
    assert error(reference.matmul(x, weight.T), x @ weight.T) == 0


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_and_feed_forward(form):
    check_gradients(
        lambda x: reference.gelu_forward(x, form),
        lambda dy, x: reference.gelu_backward(dy, x, form),
        values(4, 5, scale=2),
    )
    check_gradients(
        lambda *arrays: reference.feed_forward_forward(*arrays, form)[0],
        lambda dy, x, w1, b1, w2, b2: reference.feed_forward_backward(
            dy, x, reference.linear_forward(x, w1, b1), w1, w2, approximate=form
        ),
        values(3, 4), values(6, 4, seed=1), values(6, seed=2), values(4, 6, seed=3), values(4, seed=4),
    )  # fmt: skip


def test_dropout():
    check_gradients(
        lambda x: reference.dropout_forward(x, 0.4, KEY),
        lambda dy, x: reference.dropout_backward(dy, 0.4, KEY),
        values(6, 7),
    )
    scale = reference.dropout_scale((100, 100), 0.4, KEY)
    assert set(np.unique(scale)) == {0.0, 1 / 0.6}
    assert abs(np.mean(scale > 0) - 0.6) < 0.02
    assert not reference.dropout_scale((10,), 1.0, KEY).any()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias):
    x, weight, b = values(2, 3, 6), values(6, seed=1), values(6, seed=2)

    def backward(dy, x, weight, *rest):
        _, mean, rstd = reference.layer_norm_forward(x, weight, None)
        gradients = reference.layer_norm_backward(dy, x, weight, mean, rstd, bias=bias)
        return gradients if bias else gradients[:2]

    def forward(x, weight, bias=None):
        return reference.layer_norm_forward(x, weight, bias)[0]

    check_gradients(forward, backward, x, weight, *([b] if bias else []))


@pytest.mark.parametrize("n_keys", [3, 5, 7])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal, dropout_p, n_keys):
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "key": KEY}
    q, k, v = values(2, 2, 5, 3), values(2, 2, n_keys, 3, seed=1), values(2, 2, n_keys, 3, seed=2)

    def backward(dout, q, k, v):
        out, lse = reference.attention_forward(q, k, v, **options)
        return reference.attention_backward(dout, q, k, v, out, lse, **options)

    check_gradients(lambda q, k, v: reference.attention_forward(q, k, v, **options)[0], backward, q, k, v)
    out, lse = reference.attention_forward(q, k, v, scale=0.0)
    assert error(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape)) < 1e-14
    assert error(lse, np.full(lse.shape, np.log(n_keys))) < 1e-14


def test_packed_attention():
    def backward(dout, qkv):
        out, lse = reference.packed_attention_forward(qkv, 2)
        return reference.packed_attention_backward(dout, qkv, out, lse, 2)

    qkv = values(2, 4, 12)
    check_gradients(lambda qkv: reference.packed_attention_forward(qkv, 2)[0], backward, qkv)
    q, k, v = (part.reshape(2, 4, 2, 2).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, axis=-1))
    out, _ = reference.attention_forward(q, k, v, True)
    assert np.array_equal(
        reference.packed_attention_forward(qkv, 2)[0], out.transpose(0, 2, 1, 3).reshape(2, 4, 4)
    )


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_causal_attention_passes_nan_only_to_what_depends_on_it(row, argument):
    """NaN in row i of q reaches row i; of k or v, the rows from i on. Going back, likewise."""
    arrays = [values(1, 1, 5, 3, seed=seed) for seed in range(3)]
    arrays[argument][..., row, 0] = np.nan
    out, lse = reference.attention_forward(*arrays, True)
    rows = np.arange(5)
    reached = rows == row if argument == 0 else rows >= row
    assert np.array_equal(np.isnan(out[0, 0]).any(1), reached)
    assert np.array_equal(np.isnan(lse[0, 0]), reached & (argument != 2))
    dq, dk, dv = reference.attention_backward(np.ones_like(out), *arrays, out, lse, True)
    assert np.array_equal(np.isnan(dq[0, 0]).any(1), reached)
    # Keys that a spoilt query sees; of v's gradient, only through the softmax, which v does not enter.
    seen = rows <= (row if argument == 0 else 4)
    assert np.array_equal(np.isnan(dk[0, 0]).any(1), seen)
    assert np.array_equal(np.isnan(dv[0, 0]).any(1), seen & (argument != 2))


def test_embedding():
    check_gradients(
        lambda weight: reference.embedding_forward(TOKENS, weight),
        lambda dy, weight: reference.embedding_backward(dy, TOKENS, 4),
        values(4, 3),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy(ignore_index, smoothing):
    targets = np.where(TARGETS == -100, ignore_index, TARGETS)
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing}

    def backward(dlosses, logits):
        _, lse = reference.cross_entropy_forward(logits, targets, **options)
        return reference.cross_entropy_backward(dlosses, logits, targets, lse, **options)

    check_gradients(
        lambda logits: reference.cross_entropy_forward(logits, targets, **options)[0], backward, values(5, 6)
    )

    def linear_backward(dlosses, x, weight):
        _, lse = reference.linear_cross_entropy_forward(x, weight, targets, **options)
        return reference.linear_cross_entropy_backward(dlosses, x, weight, targets, lse, **options)

    check_gradients(
        lambda x, weight: reference.linear_cross_entropy_forward(x, weight, targets, **options)[0],
        linear_backward, values(5, 3), values(6, 3, seed=1),
    )  # fmt: skip


def test_sums():
    x = values(3, 4)
    assert abs(reference.sum_of_squares(x) - np.sum(x * x)) < 1e-14
    doubled = x.copy()
    reference.scale_(doubled, 2)
    assert np.array_equal(doubled, 2 * x)


def test_definitions_are_torchs():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x, weight, bias = values(5, 6, scale=2), values(6, seed=1), values(6, seed=2)
    tensor = torch.from_numpy
    for form in ("tanh", "none"):
        assert error(reference.gelu_forward(x, form), F.gelu(tensor(x), approximate=form)) < 1e-14
    y = F.layer_norm(tensor(x), (6,), tensor(weight), tensor(bias))
    assert error(reference.layer_norm_forward(x, weight, bias)[0], y) < 1e-14
    for smoothing in (0.0, 0.2):
        options = {"ignore_index": -100, "label_smoothing": smoothing}
        losses = F.cross_entropy(tensor(x), tensor(TARGETS), reduction="none", **options)
        assert error(reference.cross_entropy_forward(x, TARGETS, **options)[0], losses) < 1e-14
    q, k, v = values(2, 3, 5, 4), values(2, 3, 7, 4, seed=1), values(2, 3, 7, 4, seed=2)
    for causal in (False, True):
        out = F.scaled_dot_product_attention(tensor(q), tensor(k), tensor(v), is_causal=causal)
        assert error(reference.attention_forward(q, k, v, causal)[0], out) < 1e-14


OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.02}, []),
    "sgd momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, ["momentum_buffer"]),
    "sgd nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ["momentum_buffer"]),
    "adam": ("Adam", {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.02}, ["m", "v"]),
    "adam amsgrad": ("Adam", {"lr": 0.1, "betas": (0.8, 0.5)}, ["m", "v", "v_max"]),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.3, "maximize": True}, ["m", "v"]),
    "rmsprop": ("RMSprop", {"lr": 0.1, "alpha": 0.9, "weight_decay": 0.02}, ["v"]),
    "rmsprop centred": ("RMSprop", {"lr": 0.1, "momentum": 0.7}, ["v", "momentum_buffer", "grad_avg"]),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizers_are_torchs(case):
    torch = pytest.importorskip("torch")
    name, options, state_names = OPTIMIZERS[case]
    param = values(4, 3)
    state = {key: np.zeros((4, 3)) for key in state_names}
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    flags = {"v_max": "amsgrad", "grad_avg": "centered"}
    extra = {flags[key]: True for key in state_names if key in flags}
    optimizer = getattr(torch.optim, name)([theirs], **options, **extra)
    update = getattr(reference, f"{name.lower()}_update")
    for step in range(1, 6):
        grad = values(4, 3, seed=step)
        counted = {"step": step} if name.startswith("Adam") else {}
        if name == "SGD":
            counted = {"first": step == 1}
        update(param, grad, **state, **options, **counted)
        theirs.grad = torch.from_numpy(grad)
        optimizer.step()
        assert error(param, theirs.detach()) < 1e-13
