"""The float64 reference: its backward functions against finite differences, its definitions against torch."""

import inspect

import numpy as np
import pytest
from kernel_checks import check_gradients, error, values

from cllm import kernels, reference

KEY = 0x1234_5678_9ABC_DEF0
TARGETS = np.array([3, -100, 0, 4, 3])
TOKENS = np.array([[1, 0, 2], [2, 2, 0]])


def test_every_kernel_of_the_door_has_its_twin():
    """The same names, and the same arguments in the same order, but for out, results and accumulate."""
    ours = {name for name in vars(reference) if name.endswith(("_forward", "_backward", "_update"))}
    theirs = {name for name in vars(kernels) if name.endswith(("_forward", "_backward", "_update"))}
    assert ours == theirs
    for name in [*sorted(ours), "matmul", "sum_of_squares", "scale_", "clip_", "array_statistics"]:
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


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations_and_feed_forward(activation):
    x, w1, b1 = values(3, 4), values(6, 4, seed=1), values(6, seed=2)
    w2, b2 = values(4, 3 if activation == "swiglu" else 6, seed=3), values(4, seed=4)
    check_gradients(
        lambda *arrays: reference.feed_forward_forward(*arrays, activation)[0],
        lambda dy, x, w1, b1, w2, b2: reference.feed_forward_backward(
            dy, x, reference.linear_forward(x, w1, b1), w1, w2, activation=activation
        ),
        x, w1, b1, w2, b2,
    )  # fmt: skip
    hidden = reference.linear_forward(x, w1, b1)
    if activation == "swiglu":
        check_gradients(reference.swiglu_forward, reference.swiglu_backward, hidden[:, :3], hidden[:, 3:])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name):
    forward, backward = getattr(reference, f"{name}_forward"), getattr(reference, f"{name}_backward")
    check_gradients(forward, lambda dy, x: backward(dy, forward(x)), values(2, 3, 5, scale=2))
    ones = forward(values(4, 1))
    assert np.array_equal(ones, np.zeros((4, 1)) if name == "log_softmax" else np.ones((4, 1)))


@pytest.mark.parametrize("offset", [0, 7, np.array([5, 0])])
def test_rotary(offset):
    x = values(2, 3, 4, 6)
    options = {"offset": offset, "base": 100.0}
    check_gradients(
        lambda x: reference.rotary_forward(x, **options),
        lambda dy, x: reference.rotary_backward(dy, **options),
        x,
    )
    # A pair as a complex number: a rotation of position p and frequency i is exp(i p base^(-2i/D)).
    positions = np.broadcast_to(offset, 2)[:, None, None] + np.arange(4)[:, None]
    turns = np.exp(1j * positions * 100.0 ** (-2 * np.arange(3) / 6))[:, None]
    z = (x[..., :3] + 1j * x[..., 3:]) * turns
    assert error(reference.rotary_forward(x, **options), np.concatenate([z.real, z.imag], -1)) < 1e-14


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


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(weighted):
    def backward(dy, x, weight=None):
        _, rstd = reference.rms_norm_forward(x, weight)
        gradients = reference.rms_norm_backward(dy, x, weight, rstd)
        return gradients if weighted else gradients[:1]

    def forward(x, weight=None):
        return reference.rms_norm_forward(x, weight)[0]

    check_gradients(forward, backward, values(2, 3, 6), *([values(6, seed=1)] if weighted else []))


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
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted, ignore_index, smoothing):
    targets = np.where(TARGETS == -100, ignore_index, TARGETS)
    weight = np.array([0.5, 2, 1, 0, 1.5, 1]) if weighted else None
    common = {"label_smoothing": smoothing, "z_loss": 0.1}
    options = {"weight": weight, "ignore_index": ignore_index, **common}

    def backward(dlosses, logits):
        _, lse = reference.cross_entropy_forward(logits, targets, **options)
        return reference.cross_entropy_backward(dlosses, logits, targets, lse, **options)

    check_gradients(
        lambda logits: reference.cross_entropy_forward(logits, targets, **options)[0], backward, values(5, 6)
    )
    probabilities = np.abs(values(5, 6, seed=2))
    soft = {"weight": weight, "mask": targets != ignore_index, **common}

    def soft_backward(dlosses, logits):
        _, lse = reference.soft_cross_entropy_forward(logits, probabilities, **soft)
        return reference.soft_cross_entropy_backward(dlosses, logits, probabilities, lse, **soft)

    check_gradients(
        lambda logits: reference.soft_cross_entropy_forward(logits, probabilities, **soft)[0],
        soft_backward, values(5, 6),
    )  # fmt: skip
    options["class_weight"] = options.pop("weight")

    def linear_backward(dlosses, x, weight):
        _, lse = reference.linear_cross_entropy_forward(x, weight, targets, **options)
        return reference.linear_cross_entropy_backward(dlosses, x, weight, targets, lse, **options)

    check_gradients(
        lambda x, weight: reference.linear_cross_entropy_forward(x, weight, targets, **options)[0],
        linear_backward, values(5, 3), values(6, 3, seed=1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, options",
    [
        ("mse", {}), ("l1", {}), ("smooth_l1", {"beta": 0.7}), ("smooth_l1", {"beta": 0}),
        ("huber", {"delta": 0.7}), ("bce_with_logits", {}),
        ("bce_with_logits", {"weight": np.array([0.5, 2]), "pos_weight": np.array([[3], [1], [0.5]])}),
    ],
)  # fmt: skip
def test_elementwise_losses(name, options):
    target = np.abs(values(3, 2, seed=1))
    forward, backward = getattr(reference, f"{name}_forward"), getattr(reference, f"{name}_backward")
    check_gradients(
        lambda x: forward(x, target, **options),
        lambda dlosses, x: backward(dlosses, x, target, **options), values(3, 2),
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
    y = F.rms_norm(tensor(x), (6,), tensor(weight))
    assert error(reference.rms_norm_forward(x, weight)[0], y) < 1e-14
    for name, y in {
        "relu": F.relu(tensor(x)),
        "relu_squared": F.relu(tensor(x)).square(),
        "silu": F.silu(tensor(x)),
        "tanh": torch.tanh(tensor(x)),
        "sigmoid": torch.sigmoid(tensor(x)),
        "softmax": F.softmax(tensor(x), -1),
        "log_softmax": F.log_softmax(tensor(x), -1),
    }.items():
        assert error(getattr(reference, f"{name}_forward")(x), y) < 1e-14
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
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.02}, ["accumulator"]),
    "adafactor": ("Adafactor", {"lr": 0.6, "weight_decay": 0.3, "d": 1.2}, ["row_var", "col_var"]),
    "muon": ("Muon", {"lr": 0.1, "nesterov": False, "ns_steps": 4}, ["momentum_buffer"]),
    "muon wide": ("Muon", {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw"}, ["momentum_buffer"]),
}
STATE_SHAPES = {"row_var": (4, 1), "col_var": (1, 3)}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizers_are_torchs(case, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # Muon's products, here in float64
    name, options, state_names = OPTIMIZERS[case]
    shape = (3, 5) if case == "muon wide" else (4, 3)
    param = values(*shape)
    state = {key: np.zeros(STATE_SHAPES.get(key, shape)) for key in state_names}
    theirs = torch.nn.Parameter(torch.from_numpy(param.copy()))
    flags = {"v_max": "amsgrad", "grad_avg": "centered"}
    extra = {flags[key]: True for key in state_names if key in flags}
    optimizer = getattr(torch.optim, name)([theirs], **options, **extra)
    update = getattr(reference, f"{name.lower()}_update")
    for step in range(1, 6):
        grad = values(*shape, seed=step)
        counted = {"step": step} if name.startswith("Ada") else {}
        if name == "SGD":
            counted = {"first": step == 1}
        update(param, grad, **state, **options, **counted)
        theirs.grad = torch.from_numpy(grad)
        optimizer.step()
        assert error(param, theirs.detach()) < 1e-13
