"""Activations, SwiGLU and dropout against the float64 reference, finite differences and torch."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from kernel_checks import (
    DTYPES,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_refuses_bad_out,
    assert_same_at_any_thread_count,
    assert_torchs,
    check_gradients,
    same_bits,
    values,
)

from cllm import kernels, reference

SHAPES = [(1,), (7,), (3, 0, 2), (), (33, 129), (4097,), (2, 3, 1000)]
KEY = 0x9F3A_11C4_5D07_E2B6
LONG = 70_001  # beyond the serial threshold, divided by no block


class Operation(NamedTuple):
    """An elementwise operation: its name in `kernels` and `reference`, and what its tests must know."""

    name: str
    torch: object  # (torch, *inputs) -> output
    approximate: str | None = None
    n_inputs: int = 1
    saves_output: bool = False  # whether backward takes the output in place of the inputs

    def forward(self, module=kernels):
        return partial(getattr(module, f"{self.name}_forward"), **self._options())

    def backward(self, module=kernels):
        return partial(getattr(module, f"{self.name}_backward"), **self._options())

    def _options(self):
        return {} if self.approximate is None else {"approximate": self.approximate}

    def saved(self, inputs, module=kernels):
        return (self.forward(module)(*inputs),) if self.saves_output else inputs

    def gradients(self, dy, *inputs, module=kernels):
        """The gradients at these inputs, as a tuple."""
        found = self.backward(module)(dy, *self.saved(inputs, module))
        return found if self.n_inputs > 1 else (found,)

    def arrays(self, *shape, dtype):
        """dy and the inputs."""
        return [values(*shape, dtype=dtype, seed=i, scale=3 if i else 1) for i in range(1 + self.n_inputs)]


OPERATIONS = {
    "gelu tanh": Operation("gelu", lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"), "tanh"),
    "gelu": Operation("gelu", lambda torch, x: torch.nn.functional.gelu(x)),
    "relu": Operation("relu", lambda torch, x: torch.relu(x)),
    "relu_squared": Operation("relu_squared", lambda torch, x: torch.relu(x).square()),
    "silu": Operation("silu", lambda torch, x: torch.nn.functional.silu(x)),
    "tanh": Operation("tanh", lambda torch, x: torch.tanh(x), saves_output=True),
    "sigmoid": Operation("sigmoid", lambda torch, x: torch.sigmoid(x), saves_output=True),
    "swiglu": Operation("swiglu", lambda torch, g, u: torch.nn.functional.silu(g) * u, n_inputs=2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise(shape, name, dtype):
    operation = OPERATIONS[name]
    dy, *inputs = operation.arrays(*shape, dtype=dtype)
    assert_close(operation.forward()(*inputs), operation.forward(reference)(*inputs), dtype)
    wanted = operation.gradients(dy, *inputs, module=reference)
    assert_close(operation.gradients(dy, *inputs), wanted, dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_gradients_are_those_of_finite_differences(name):
    operation = OPERATIONS[name]
    _, *inputs = operation.arrays(5, 9, dtype=np.float64)
    check_gradients(operation.forward(), operation.gradients, *inputs)


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25)
@given(
    shape=array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1.0, 30.0]),
    transposed=st.booleans(),
)
def test_elementwise_is_torchs(name, shape, dtype, seed, scale, transposed):
    torch = pytest.importorskip("torch")
    operation = OPERATIONS[name]
    seeds = range(seed, seed + 1 + operation.n_inputs)
    dy, *inputs = (values(*shape, dtype=dtype, seed=seed, scale=scale) for seed in seeds)
    if transposed:
        dy, *inputs = (x.T for x in (dy, *inputs))
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    y = operation.torch(torch, *tensors)
    y.backward(torch.tensor(dy))
    results = operation.forward()(*inputs), *operation.gradients(dy, *inputs)
    for result, theirs in zip(results, (y, *(x.grad for x in tensors)), strict=True):
        assert_torchs(result, theirs, unit=max(scale, 1) ** (1 + operation.n_inputs))


def same(x):
    return x


def twice(x):
    return 2 * x


# Value at -infinity; value and slope at large x; value and slope at 0.
LIMITS = {
    "gelu tanh": (0, same, np.ones_like, 0, 0.5),
    "gelu": (0, same, np.ones_like, 0, 0.5),
    "relu": (0, same, np.ones_like, 0, 0),
    "relu_squared": (0, np.square, twice, 0, 0),
    "silu": (0, same, np.ones_like, 0, 0.5),
    "tanh": (-1, np.ones_like, np.zeros_like, 0, 1),
    "sigmoid": (0, np.ones_like, np.zeros_like, 0.5, 0.25),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIMITS)
@np.errstate(over="ignore")
def test_activations_at_the_ends(name, dtype):
    """Far from 0 each is at its limit, and so is its slope: no overflow, no 0 times infinity."""
    low, high, slope, at_zero, slope_at_zero = LIMITS[name]
    ends = np.array([25, 100, 1e4, 1e20, np.finfo(dtype).max, np.inf], dtype)
    x = np.concatenate([ends, -ends, np.array([0.0, -0.0], dtype)])
    y = OPERATIONS[name].forward()(x)
    (dx,) = OPERATIONS[name].gradients(np.ones_like(x), x)
    assert np.allclose(y[:6], high(ends), rtol=1e-7 if dtype == np.float32 else 1e-9)
    assert np.allclose(dx[:6], slope(ends), rtol=1e-7 if dtype == np.float32 else 1e-9, atol=1e-9)
    assert np.allclose(y[6:12], low, atol=1e-9)
    assert np.allclose(dx[6:12], 0, atol=1e-9)
    assert np.allclose(y[8:12], low, rtol=0, atol=1e-20)  # gelu is bounded at -10, where its slope is -8e-22
    assert np.allclose(dx[8:12], 0, atol=1e-20)
    assert np.array_equal(y[12:], [at_zero] * 2)
    assert np.array_equal(dx[12:], [slope_at_zero] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_passes_nan_on_and_nothing_else(name, dtype):
    """A NaN in one input, or in dy, reaches its own element; but the slope 0 of relu does not ask for dy."""
    operation = OPERATIONS[name]
    dy, *inputs = operation.arrays(100, dtype=dtype)
    at = [3, 40, 99]
    spoilt = np.isin(np.arange(100), at)
    for i in range(operation.n_inputs):
        broken = [x.copy() for x in inputs]
        broken[i][at] = np.nan
        assert np.array_equal(np.isnan(operation.forward()(*broken)), spoilt)
        for gradient in operation.gradients(dy, *broken):
            assert not np.isnan(gradient[~spoilt]).any()
        gradients = operation.gradients(dy, *broken)
        # Of a product, the gradient for one factor holds the other.
        assert np.array_equal(np.isnan(gradients[1 - i if operation.n_inputs > 1 else 0]), spoilt)
    dy[at] = np.nan
    asked = inputs[0] > 0 if name.startswith("relu") else True
    for gradient in operation.gradients(dy, *inputs):
        assert np.array_equal(np.isnan(gradient), spoilt & asked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_of_the_smallest_numbers(name, dtype):
    """Subnormal inputs are not flushed: each gives its value times the slope at 0, or the value at 0."""
    operation = OPERATIONS[name]
    tiny = np.finfo(dtype).smallest_subnormal * np.array([64, -64, 4096], dtype)
    dy, *inputs = [tiny] * (1 + operation.n_inputs)
    assert_close(operation.forward()(*inputs), operation.forward(reference)(*inputs), dtype)
    assert_close(operation.gradients(dy, *inputs), operation.gradients(dy, *inputs, module=reference), dtype)
    if name in ("relu", "silu", "tanh"):
        assert np.array_equal(operation.forward()(tiny), operation.forward(reference)(tiny).astype(dtype))


def test_tanh_and_sigmoid_keep_their_digits_over_the_whole_range():
    """Relative errors: of tanh at tiny x, where 1 - 2 / (e^2x + 1) has no digits; of sigmoid down to -87."""
    x = np.concatenate([np.logspace(-37, 2, 20_001), np.linspace(0.5, 1, 20_001)]).astype(np.float32)
    y = kernels.tanh_forward(x)
    wanted = np.tanh(x.astype(np.float64))
    assert np.max(np.abs(y / wanted - 1)) < 3e-7
    assert same_bits(kernels.tanh_forward(-x), -y)
    x = np.linspace(-87, 30, 40_001).astype(np.float32)
    wanted = reference.sigmoid_forward(x)
    assert np.max(np.abs(kernels.sigmoid_forward(x) / wanted - 1)) < 3e-7
    assert np.max(np.abs(kernels.silu_forward(x) - wanted * x) / np.maximum(np.abs(wanted * x), 1e-30)) < 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_gives_the_same_bits_at_any_thread_count(name, dtype):
    operation = OPERATIONS[name]
    dy, *inputs = operation.arrays(LONG, dtype=dtype)
    assert_same_at_any_thread_count(lambda: operation.forward()(*inputs))
    assert_same_at_any_thread_count(lambda: operation.gradients(dy, *inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_inputs_and_out(name, dtype):
    operation = OPERATIONS[name]
    dy, *inputs = operation.arrays(5, 12, dtype=dtype)
    forward, backward, saved = operation.forward(), operation.backward(), operation.saved(inputs)
    assert_reads_any_array(forward, *inputs)
    assert_reads_any_array(backward, dy, *saved)
    for x in inputs:
        assert_refuses_bad_out(lambda out: forward(*inputs, out=out), x, x)
    if operation.n_inputs == 1:
        for x in (dy, *saved):
            assert_refuses_bad_out(lambda out: backward(dy, *saved, out=out), x, x)
        return
    for i, x in enumerate(inputs):
        assert_refuses_bad_out(
            lambda out, i=i: backward(dy, *saved, out=tuple(out if i == j else None for j in range(2)))[i],
            x, dy,
        )  # fmt: skip
    both = np.empty_like(dy)
    with pytest.raises(ValueError, match=r"out\[1\] \(dup\) overlaps an input or another output"):
        backward(dy, *saved, out=(both, both))


@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_refuses_bad_arguments(name):
    operation = OPERATIONS[name]
    x = np.zeros((2, 3), np.float32)
    rest = [x] * (operation.n_inputs - 1)
    backward, door = operation.backward(), f"{operation.name}_backward"
    saved = ["gate", "up"] if rest else ["y"] if operation.saves_output else ["x"]
    other = np.zeros((2, 4), np.float32)
    message = f"{door}: dy is (2, 4), {saved[0]} is (2, 3); they must have one shape"
    assert_refuses(ValueError, message, backward, other, x, *rest)
    message = f"{door}: {saved[-1]} is float64 but dy is float32; all must have one dtype"
    assert_refuses(TypeError, message, backward, x, *rest, x.astype(np.float64))
    first = "gate" if rest else "x"
    message = f"{operation.name}_forward: {first} is int64, it must be float32 or float64"
    assert_refuses(TypeError, message, operation.forward(), np.zeros((2, 3), np.int64), *rest)
    if rest:
        message = "swiglu_forward: gate is (2, 3), up is (2, 4); they must have one shape"
        assert_refuses(ValueError, message, kernels.swiglu_forward, x, other)
    if operation.name == "gelu":
        message = 'gelu_forward: approximate is \'erf\', it must be "tanh" or "none"'
        assert_refuses(ValueError, message, kernels.gelu_forward, x, "erf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(shape, p, dtype):
    x = values(*shape, dtype=dtype)
    assert_close(kernels.dropout_forward(x, p, KEY), reference.dropout_forward(x, p, KEY), dtype)
    assert_close(kernels.dropout_backward(x, p, KEY), reference.dropout_backward(x, p, KEY), dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_independently(p):
    """Shares of kept elements, of kept neighbours, and of elements kept under two keys: 5 standard errors."""
    n = 1 << 20
    kept = kernels.dropout_forward(np.ones(n, np.float32), p, KEY) > 0
    q = 1 - p
    for other in (np.ones(n, bool), np.roll(kept, 1), np.roll(kept, 4096)):
        share = q if other.all() else q * q
        assert abs(np.mean(kept & other) - share) < 5 * np.sqrt(share * (1 - share) / n)
    for key in (KEY + 1, KEY ^ (1 << 32), 0, 1, 2**64 - 1):
        other = kernels.dropout_forward(np.ones(n, np.float32), p, key) > 0
        assert abs(np.mean(kept & other) - q * q) < 5 * np.sqrt(q * q * (1 - q * q) / n)


def test_dropout_scales_what_it_keeps_and_zeroes_the_rest():
    y = kernels.dropout_forward(np.full(1000, 3.0), 0.25, KEY)
    assert set(np.unique(y)) == {0.0, 4.0}
    assert np.array_equal(kernels.dropout_forward(np.full(1000, 3.0), 0.0, KEY), np.full(1000, 3.0))
    assert np.array_equal(kernels.dropout_forward(np.full(1000, 3.0), 1.0, KEY), np.zeros(1000))


def test_dropout_draws_the_same_mask_for_both_dtypes_and_passes():
    ones = np.ones(10_000)
    masks = [kernels.dropout_forward(ones, 0.3, KEY) > 0, kernels.dropout_backward(ones, 0.3, KEY) > 0]
    masks.append(kernels.dropout_forward(ones.astype(np.float32), 0.3, KEY) > 0)
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_keeps_nan(dtype):
    x = values(100, dtype=dtype)
    x[::3] = np.nan
    assert np.array_equal(np.isnan(kernels.dropout_forward(x, 0.5, KEY)), np.isnan(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_threads_inputs_and_out(dtype):
    x = values(LONG, dtype=dtype)
    assert_same_at_any_thread_count(lambda: kernels.dropout_forward(x, 0.2, KEY))
    assert same_bits(kernels.dropout_backward(x, 0.2, KEY), kernels.dropout_forward(x, 0.2, KEY))
    x = values(5, 12, dtype=dtype)
    assert_reads_any_array(lambda x: kernels.dropout_forward(x, 0.2, KEY), x)
    assert_refuses_bad_out(lambda out: kernels.dropout_forward(x, 0.2, KEY, out=out), x, x)
    assert_refuses_bad_out(lambda out: kernels.dropout_backward(x, 0.2, KEY, out=out), x, x)


def test_dropout_refuses_bad_arguments():
    x = np.zeros(3)
    for p in (-0.1, 1.5, float("nan")):
        message = f"dropout_forward: p is {p}, it must be in [0, 1]"
        assert_refuses(ValueError, message, kernels.dropout_forward, x, p, KEY)
    message = "dropout_backward: key is -1, it must be in [0, 2**64)"
    assert_refuses(ValueError, message, kernels.dropout_backward, x, 0.5, -1)
    message = "dropout_backward: dy is float16, it must be float32 or float64"
    assert_refuses(TypeError, message, kernels.dropout_backward, x.astype(np.float16), 0.5, KEY)
    message = "dropout_forward: key is 1.5, it must be an integer"
    assert_refuses(TypeError, message, kernels.dropout_forward, x, 0.5, 1.5)
    message = "dropout_forward: p is None, it must be a number"
    assert_refuses(TypeError, message, kernels.dropout_forward, x, None, KEY)


@pytest.mark.parametrize("p", [1e-17, 1e-10, 1 - 1e-7, 1 - 1e-16])
@pytest.mark.parametrize("key", [0, 2**32, 2**64 - 1])
def test_dropout_close_to_its_limits(key, p):
    x = values(5000)
    assert_close(kernels.dropout_forward(x, p, key), reference.dropout_forward(x, p, key), np.float64)


def test_odd_inputs():
    """Lists, NumPy scalars and as many dimensions as NumPy has are arrays; None and ragged lists are not."""
    x = values(3)
    assert same_bits(kernels.gelu_forward(x.tolist()), kernels.gelu_forward(x))
    assert kernels.gelu_forward(np.float32(1)).shape == ()
    assert kernels.gelu_forward(np.ones((1,) * 64)).shape == (1,) * 64
    message = "gelu_forward: x is a ragged list, its rows must have one length"
    assert_refuses(ValueError, message, kernels.gelu_forward, [[1.0], [2.0, 3.0]])
    message = "gelu_forward: x is None, it must be float32 or float64"
    assert_refuses(TypeError, message, kernels.gelu_forward, None)
    message = "gelu_forward: x is >f4, it must be float32 or float64"
    assert_refuses(TypeError, message, kernels.gelu_forward, np.zeros(3, ">f4"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_is_0_at_minus_infinity(form, dtype):
    y = kernels.gelu_forward(np.array([-np.inf, -11, np.nan, np.inf] * 5, dtype), form).reshape(5, 4)
    assert (y[:, :2] == 0).all()
    assert np.isnan(y[:, 2]).all()
    assert (y[:, 3] == np.inf).all()


def test_dropout_takes_scalars_of_any_float_dtype():
    """In float16 2**32 is infinite."""
    x, p = values(1000), np.float16(0.1)
    assert same_bits(kernels.dropout_forward(x, p, np.uint8(3)), kernels.dropout_forward(x, float(p), 3))
