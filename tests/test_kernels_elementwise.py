"""GELU and dropout kernels against the float64 reference."""

import numpy as np
import pytest
from kernel_checks import (
    DTYPES,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_refuses_bad_out,
    assert_same_at_any_thread_count,
    same_bits,
    values,
)

from cllm import kernels, reference

FORMS = ["tanh", "none"]
SHAPES = [(1,), (7,), (3, 0, 2), (), (33, 129), (4097,), (2, 3, 1000)]
KEY = 0x9F3A_11C4_5D07_E2B6
LONG = 70_001  # beyond the serial threshold, divided by no block


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, form, dtype):
    x, dy = values(*shape, dtype=dtype, scale=3), values(*shape, dtype=dtype, seed=1)
    assert_close(kernels.gelu_forward(x, form), reference.gelu_forward(x, form), dtype)
    assert_close(kernels.gelu_backward(dy, x, form), reference.gelu_backward(dy, x, form), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gelu_at_the_ends(form, dtype):
    """Far from 0 GELU is 0 or x and its slope 0 or 1: no overflow, no 0 times infinity."""
    largest = np.finfo(dtype).max
    x = np.array([0, -0.0, 9, 20, 1e4, 1e20, largest, np.inf, -9, -20, -1e4, -1e20, -largest, -np.inf], dtype)
    y = kernels.gelu_forward(x, form)
    dx = kernels.gelu_backward(np.ones_like(x), x, form)
    assert np.array_equal(y[2:8], x[2:8])
    assert np.all(np.abs(y[8:]) < 2e-6)
    assert np.allclose(dx[2:8], 1, atol=1e-5)
    assert np.all(np.abs(dx[8:]) < 2e-6)
    assert np.array_equal(y[:2], [0, 0])
    assert np.array_equal(dx[:2], [0.5, 0.5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gelu_passes_nan_on_and_nothing_else(form, dtype):
    x, dy = values(100, dtype=dtype), values(100, dtype=dtype, seed=1)
    x[[3, 40, 99]] = np.nan
    assert np.array_equal(np.isnan(kernels.gelu_forward(x, form)), np.isnan(x))
    assert np.array_equal(np.isnan(kernels.gelu_backward(dy, x, form)), np.isnan(x))
    dy[7] = np.nan
    assert np.array_equal(np.isnan(kernels.gelu_backward(dy, x, form)), np.isnan(x) | np.isnan(dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gelu_gives_the_same_bits_at_any_thread_count(form, dtype):
    x, dy = values(LONG, dtype=dtype), values(LONG, dtype=dtype, seed=1)
    assert_same_at_any_thread_count(lambda: kernels.gelu_forward(x, form))
    assert_same_at_any_thread_count(lambda: kernels.gelu_backward(dy, x, form))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_inputs_and_out(dtype):
    x, dy = values(5, 12, dtype=dtype), values(5, 12, dtype=dtype, seed=1)
    assert_reads_any_array(kernels.gelu_forward, x)
    assert_reads_any_array(kernels.gelu_backward, dy, x)
    assert_refuses_bad_out(lambda out: kernels.gelu_forward(x, out=out), x, x)
    assert_refuses_bad_out(lambda out: kernels.gelu_backward(dy, x, out=out), x, dy)


def test_gelu_refuses_bad_arguments():
    x = np.zeros((2, 3), np.float32)
    assert_refuses(
        ValueError, "gelu_backward: dy is (2, 4), x is (2, 3); they must have one shape",
        kernels.gelu_backward, np.zeros((2, 4), np.float32), x,
    )  # fmt: skip
    assert_refuses(
        ValueError, "gelu_forward: approximate is 'erf', it must be \"tanh\" or \"none\"",
        kernels.gelu_forward, x, "erf",
    )  # fmt: skip
    assert_refuses(
        TypeError, "gelu_backward: x is float64 but dy is float32; all must have one dtype",
        kernels.gelu_backward, x, x.astype(np.float64),
    )  # fmt: skip
    assert_refuses(
        TypeError, "gelu_forward: x is int64, it must be float32 or float64",
        kernels.gelu_forward, np.zeros(3, np.int64),
    )  # fmt: skip


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
