"""Softmax and log-softmax kernels against the float64 reference, finite differences and torch."""

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
    error,
    same_bits,
    values,
)

from cllm import kernels, reference

NAMES = ["softmax", "log_softmax"]
# No elements, no rows; one element; fewer than the lanes; one more than whole lanes; several chunks of lanes.
SHAPES = [(3, 0), (0, 3), (1,), (5, 1), (7, 31), (2, 3, 65), (3, 128), (2, 5000)]
NAN, INF = np.nan, np.inf


def doors(name, module=kernels):
    return getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@np.errstate(divide="ignore")  # the reference, where rows are empty
def test_softmax(shape, name, dtype):
    (forward, backward), (wanted, wanted_backward) = doors(name), doors(name, reference)
    x, dy = values(*shape, dtype=dtype, scale=3), values(*shape, dtype=dtype, seed=1)
    y = forward(x)
    assert_close(y, wanted(x), dtype)
    assert_close(backward(dy, y), wanted_backward(dy, wanted(x)), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    forward, backward = doors(name)
    for shape in ((3, 7), (2, 40)):
        check_gradients(forward, lambda dy, x: backward(dy, forward(x)), values(*shape, scale=2))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    shape=array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    transposed=st.booleans(),
)
def test_softmax_is_torchs(name, shape, dtype, seed, scale, transposed):
    torch = pytest.importorskip("torch")
    forward, backward = doors(name)
    x, dy = values(*shape, dtype=dtype, seed=seed, scale=scale), values(*shape, dtype=dtype, seed=seed + 1)
    x, dy = (x.T, dy.T) if transposed else (x, dy)
    z = torch.tensor(x, requires_grad=True)
    expected = getattr(torch, name)(z, -1)
    expected.backward(torch.tensor(dy))
    y = forward(x)
    assert_torchs(y, expected)
    assert_torchs(backward(dy, y), z.grad)


# Infinities and NaN of a row, and what the row's softmax is.
HARD_ROWS = [
    ([1e4, -1e4, 0.0], [1.0, 0.0, 0.0]),
    ([1e4, 1e4, -1e4], [0.5, 0.5, 0.0]),
    ([3e38, -3e38, 3e38], [0.5, 0.0, 0.5]),
    ([1e-40, -1e-40, 0.0], [1 / 3] * 3),
    ([-INF, 2.0, 2.0], [0.0, 0.5, 0.5]),
    ([-INF, -INF, 5.0], [0.0, 0.0, 1.0]),
    ([-INF, -INF, -INF], [NAN] * 3),
    ([INF, 1.0, 2.0], [NAN] * 3),
    ([INF, -INF, INF], [NAN] * 3),
    ([1.0, NAN, 2.0], [NAN] * 3),
    ([INF, NAN, -INF], [NAN] * 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 29, 61])  # where in the lanes the numbers stand
def test_hard_rows(padding, dtype):
    """Each row has its limit or NaN, as in torch, and no row sees another."""
    x = np.full((len(HARD_ROWS), 3 + padding), -INF, dtype)
    x[:, padding:] = [row for row, _ in HARD_ROWS]
    wanted = np.array([row for _, row in HARD_ROWS])
    broken = np.isnan(wanted[:, 0])
    y, logs = kernels.softmax_forward(x), kernels.log_softmax_forward(x)
    np.testing.assert_allclose(y[:, padding:], wanted, rtol=1e-6)
    assert np.array_equal(np.isnan(y).all(1), broken)
    assert np.array_equal(np.isnan(logs), np.isnan(y))
    # log_softmax does not round small probabilities to 0: these are the logits' own distances.
    assert logs[0, padding:].tolist() == [0, -20_000, -10_000]
    assert logs[4, padding] == -INF
    dy = values(*x.shape, dtype=dtype)
    for dx in (kernels.softmax_backward(dy, y), kernels.log_softmax_backward(dy, logs)):
        assert np.array_equal(np.isnan(dx).all(1), broken)
        assert np.array_equal(np.isnan(dx).any(1), broken)


@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_are_torchs(name):
    torch = pytest.importorskip("torch")
    x = np.array([row for row, _ in HARD_ROWS], np.float32)
    np.testing.assert_allclose(doors(name)[0](x), getattr(torch, name)(torch.tensor(x), -1), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_the_gradient_stays_in_its_row(name, dtype):
    forward, backward = doors(name)
    y, dy = forward(values(9, 40, dtype=dtype)), values(9, 40, dtype=dtype, seed=1)
    dy[4, 39] = NAN
    assert np.array_equal(np.isnan(backward(dy, y)), np.broadcast_to(np.arange(9)[:, None] == 4, y.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_sum_to_one(dtype):
    """A million terms: the sum goes on in double, and one plain element keeps its digits."""
    x = values(1_000_003, dtype=dtype)
    y = kernels.softmax_forward(x)
    assert abs(y.sum(dtype=np.float64) - 1) < (3e-7 if dtype == np.float32 else 1e-14)
    assert error(kernels.log_softmax_forward(x), reference.log_softmax_forward(x)) < 1e-7
    flat = kernels.softmax_forward(np.zeros(1_000_003, dtype))
    assert np.allclose(flat, 1 / 1_000_003, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_threads_inputs_and_out(name, dtype):
    forward, backward = doors(name)
    x, dy = values(501, 67, dtype=dtype), values(501, 67, dtype=dtype, seed=1)
    assert_same_at_any_thread_count(lambda: forward(x))
    y = forward(x)
    assert_same_at_any_thread_count(lambda: backward(dy, y))
    assert same_bits(forward(x[17:18]), y[17:18])  # a row's bits do not depend on the others
    x, dy, y = x[:5], dy[:5], y[:5].copy()
    assert_reads_any_array(forward, x)
    assert_reads_any_array(backward, dy, y)
    assert_refuses_bad_out(lambda out: forward(x, out=out), x, x)
    assert_refuses_bad_out(lambda out: backward(dy, y, out=out), x, y)


def test_a_number_is_a_row_of_one():
    assert kernels.softmax_forward(np.float32(3)) == 1
    assert kernels.log_softmax_forward(np.array(-7.0)) == 0
    assert kernels.softmax_backward(np.array(2.0), np.array(1.0)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_refuses_bad_arguments(name):
    forward, backward = doors(name)
    x = np.zeros((2, 3), np.float32)
    message = f"{name}_backward: dy is (2, 2), y is (2, 3); they must have one shape"
    assert_refuses(ValueError, message, backward, x[:, :2], x)
    message = f"{name}_backward: y is float64 but dy is float32; all must have one dtype"
    assert_refuses(TypeError, message, backward, x, x.astype(np.float64))
    message = f"{name}_forward: x is int64, it must be float32 or float64"
    assert_refuses(TypeError, message, forward, np.zeros(3, np.int64))
