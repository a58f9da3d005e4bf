"""nn.init: torch's names, arguments and formulas; and a GPT's initial weights by each of them."""

import dataclasses
import hashlib
import inspect
import math

import numpy as np
import pytest

import cllm
from cllm import nn
from cllm.errors import InputError

init = nn.init
SMALL = cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)
SHAPE = (120, 200, 3)  # fan_in 600, fan_out 360


def drawn(function, *args, shape=SHAPE, dtype=np.float32, seed=0, **options):
    array = np.full(shape, np.nan, dtype)
    assert function(array, *args, generator=np.random.default_rng(seed), **options) is array
    return array


@pytest.mark.parametrize(
    "function, options, std",
    [
        (init.normal_, {"mean": 2.0, "std": 0.5}, 0.5),
        (init.xavier_normal_, {}, math.sqrt(2 / 960)),
        (init.xavier_normal_, {"gain": 3.0}, 3 * math.sqrt(2 / 960)),
        (init.kaiming_normal_, {}, math.sqrt(2 / 600)),
        (init.kaiming_normal_, {"mode": "fan_out"}, math.sqrt(2 / 360)),
        (init.kaiming_normal_, {"a": 1.0}, math.sqrt(1 / 600)),
        (init.kaiming_normal_, {"nonlinearity": "tanh"}, 5 / 3 / math.sqrt(600)),
        (init.kaiming_normal_, {"nonlinearity": "relu", "a": 9}, math.sqrt(2 / 600)),
    ],
)
def test_normal_moments(function, options, std):
    x = drawn(function, **options).astype(np.float64)
    mean = options.get("mean", 0)
    n = x.size
    assert abs(x.mean() - mean) < 4 * std / math.sqrt(n)
    assert x.std() == pytest.approx(std, rel=4 / math.sqrt(2 * n))
    assert np.mean(np.abs(x - mean) < std) == pytest.approx(0.6827, abs=0.008)
    assert np.abs(x - mean).max() > 3.5 * std


@pytest.mark.parametrize(
    "function, options, low, high",
    [
        (init.uniform_, {}, 0, 1),
        (init.uniform_, {"a": -3, "b": 0.5}, -3, 0.5),
        (init.xavier_uniform_, {"gain": 2.0}, -2 * math.sqrt(6 / 960), 2 * math.sqrt(6 / 960)),
        (init.kaiming_uniform_, {}, -math.sqrt(6 / 600), math.sqrt(6 / 600)),
        (init.kaiming_uniform_, {"a": math.sqrt(5)}, -1 / math.sqrt(600), 1 / math.sqrt(600)),  # as nn.Linear
        (init.kaiming_uniform_, {"mode": "fan_out"}, -math.sqrt(6 / 360), math.sqrt(6 / 360)),
    ],
)
def test_uniform_bounds_and_moments(function, options, low, high):
    x = drawn(function, **options).astype(np.float64)
    width, middle = high - low, (high + low) / 2
    assert x.min() == pytest.approx(low, abs=1e-3 * width)
    assert x.max() == pytest.approx(high, abs=1e-3 * width)
    assert low - 1e-6 * width <= x.min() and x.max() <= high + 1e-6 * width
    assert x.mean() == pytest.approx(middle, abs=4 * width / math.sqrt(12 * x.size))
    assert x.std() == pytest.approx(width / math.sqrt(12), rel=0.01)


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8), (4, 3, 2), (2, 3, 5), (1, 1), (1, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_orthogonal(shape, dtype):
    x = drawn(init.orthogonal_, 1.5, shape=shape, dtype=dtype).reshape(shape[0], -1).astype(np.float64) / 1.5
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6 if dtype == np.float32 else 1e-14)


def test_orthogonal_is_uniform():
    # Entries of a uniform orthogonal n x n matrix have mean 0 and variance 1/n; qr alone biases the signs.
    xs = np.stack([drawn(init.orthogonal_, shape=(3, 3), seed=seed) for seed in range(3000)])
    np.testing.assert_allclose(xs.mean(0), 0, atol=4 * math.sqrt(1 / 3 / 3000))
    np.testing.assert_allclose((xs**2).mean(0), 1 / 3, atol=0.03)
    assert np.linalg.det(xs).round().mean() == pytest.approx(0, abs=0.08)


def test_constants_and_tensors():
    linear = nn.Linear(3, 4)
    assert init.ones_(linear.weight) is linear.weight and (linear.weight.data == 1).all()
    assert not init.zeros_(linear.weight).data.any()
    linear.flatten()
    data = linear.weight.data
    init.xavier_uniform_(linear.weight)
    assert linear.weight.data is data and np.shares_memory(data, linear.flat_data) and data.all()
    empty = np.zeros((0, 3), np.float32)
    for function in (init.orthogonal_, init.xavier_uniform_, init.kaiming_normal_, init.normal_):
        assert function(empty) is empty


def test_numbers_follow_from_the_generator_or_manual_seed():
    np.testing.assert_array_equal(drawn(init.normal_), drawn(init.normal_))
    assert (drawn(init.normal_) != drawn(init.normal_, seed=1)).any()
    results = []
    for _ in range(2):
        cllm.manual_seed(7)
        results.append([init.kaiming_uniform_(np.zeros((3, 2))) for _ in range(2)])
    np.testing.assert_array_equal(*results)
    assert (results[0][0] != results[0][1]).any()
    for function in (init.normal_, init.uniform_, init.xavier_normal_, init.orthogonal_):
        np.testing.assert_array_equal(drawn(function), drawn(function, dtype=np.float64).astype(np.float32))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: init.xavier_normal_(np.zeros(3)), r"^xavier_normal_: tensor is \(3,\), it must have"),
        (lambda: init.kaiming_uniform_(np.zeros(())), r"^kaiming_uniform_: tensor is \(\), it must have"),
        (lambda: init.orthogonal_(np.zeros(3)), r"^orthogonal_: tensor is \(3,\)"),
        (lambda: init.zeros_([0.0]), "^zeros_: tensor is list, it must be a Tensor or an array of floats"),
        (lambda: init.normal_(np.zeros(3, int)), "^normal_: tensor is int64, it must be"),
        (lambda: init.normal_(np.zeros(3), std=-1), "^normal_: std is -1, it must be at least 0"),
        (lambda: init.normal_(np.zeros(3), mean=np.nan), "^normal_: mean is nan, it must be a finite number"),
        (lambda: init.uniform_(np.zeros(3), 1, 0), r"^uniform_: a is 1, it must be at most b \(0\)"),
        (lambda: init.xavier_uniform_(np.zeros((2, 2)), gain="2"), "gain is '2', it must be a finite number"),
        (lambda: init.kaiming_normal_(np.zeros((2, 2)), mode="in"), "mode is 'in', it must be \"fan_in\" or"),
        (lambda: init.kaiming_normal_(np.zeros((2, 2)), nonlinearity="rely"), r'\(did you mean "relu"\?\)'),
        (lambda: init.normal_(np.zeros(3), generator=3), "generator is int, it must be a numpy"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_torch_has_the_same_names_arguments_and_gains():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.init
    for name in init.__all__:
        ours, other = (
            [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (init, theirs)
        )
        assert ours == other, name
    for nonlinearity in ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"):
        for param in (None, 0.3):
            assert init.calculate_gain(nonlinearity, param) == theirs.calculate_gain(nonlinearity, param)


@pytest.mark.parametrize(
    "name", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_"]
)
def test_deviation_is_torchs(name):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    theirs = getattr(torch.nn.init, name)(torch.empty(SHAPE), generator=generator).numpy()
    assert drawn(getattr(init, name)).std() == pytest.approx(theirs.std(), rel=0.01)


# In a GPT


def fingerprint(config):
    digest = hashlib.sha256()
    for name, array in cllm.GPT(config, seed=3).state_dict().items():
        digest.update(name.encode() + array.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def test_the_default_weights_stay_what_they_are():
    # Runs of earlier versions must be repeatable: these values change only with a new name for what changed.
    assert fingerprint(SMALL) == "650046312de317bb"
    assert fingerprint(cllm.GPTConfig()) == "90bce4d2efc04b21"


def test_each_initialisation_in_a_gpt():
    shape = {"vocab_size": 300, "n_layer": 8, "n_head": 4, "n_embd": 64, "tied": False}
    std = {
        "gpt2": lambda out, n: 0.02, "normal": lambda out, n: 0.02,
        "xavier_uniform": lambda out, n: math.sqrt(2 / (out + n)),
        "xavier_normal": lambda out, n: math.sqrt(2 / (out + n)),
        "kaiming_uniform": lambda out, n: math.sqrt(2 / n), "kaiming_normal": lambda out, n: math.sqrt(2 / n),
        "orthogonal": lambda out, n: math.sqrt(1 / max(out, n)),
    }  # fmt: skip
    for name, expected in std.items():
        model = cllm.GPT(cllm.GPTConfig(**shape, init=name))
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                deviation = expected(*weight.shape)
                if name == "gpt2" and path.endswith("c_proj"):
                    deviation /= 4
                assert weight.data.std() == pytest.approx(deviation, rel=0.05), (name, path)
                assert module.bias is None or not module.bias.data.any()
            elif isinstance(module, nn.Embedding):
                assert weight.data.std() == pytest.approx(0.02, rel=0.05)
            elif weight is not None:
                assert (weight.data == 1).all()


@pytest.mark.parametrize("name", ["gpt2", "xavier_uniform", "kaiming_normal", "normal", "orthogonal"])
def test_values_come_from_seed_and_name(name):
    config = dataclasses.replace(SMALL, init=name)
    one = cllm.GPT(config, seed=3).state_dict()
    cllm.manual_seed(99)
    deeper = cllm.GPT(dataclasses.replace(config, n_layer=3), seed=3).state_dict()
    double = cllm.GPT(config, seed=3, dtype=np.float64).state_dict()
    other = cllm.GPT(config, seed=4).state_dict()
    for key, array in one.items():
        np.testing.assert_array_equal(array, double[key].astype(np.float32))
        if not (name == "gpt2" and key.endswith("c_proj.weight")):  # scaled by the depth
            np.testing.assert_array_equal(array, deeper[key])
        assert key.endswith("bias") or ".ln_" in key or (array != other[key]).any()
    first, second = (one[f"transformer.h.{i}.attn.c_attn.weight"] for i in (0, 1))
    assert (first != second).any()
