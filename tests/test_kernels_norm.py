"""Layer norm kernels against the float64 reference."""

import numpy as np
import pytest
from kernel_checks import (
    DTYPES,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_refuses_bad_out,
    assert_same_at_any_thread_count,
    error,
    same_bits,
    values,
)

from cllm import kernels, reference

# One channel; fewer channels than lanes; one more than whole lanes; rows that no block divides; no rows.
SHAPES = [(1,), (64,), (3, 1), (5, 7), (33, 65), (2, 31, 384), (4, 0, 8), (1, 1, 1000)]


def problem(shape, dtype, bias=True):
    """dy, x, weight, bias of a layer norm."""
    C = shape[-1]
    return (
        values(*shape, dtype=dtype),
        values(*shape, dtype=dtype, seed=1, scale=2) + dtype(0.5),
        values(C, dtype=dtype, seed=2) + dtype(1),
        values(C, dtype=dtype, seed=3) if bias else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, bias, dtype):
    dy, x, weight, b = problem(shape, dtype, bias)
    y, mean, rstd = kernels.layer_norm_forward(x, weight, b)
    expected = reference.layer_norm_forward(x, weight, b)
    assert_close((y, mean, rstd), expected, dtype)
    results = kernels.layer_norm_backward(dy, x, weight, mean, rstd, bias=bias)
    wanted = reference.layer_norm_backward(dy, x, weight, *expected[1:], bias=bias)
    if shape[-1] == 1:  # one channel: all but dbias is 0 up to rounding, which rstd = 316 enlarges
        assert np.abs(results[0]).max(initial=0) < 1e-3
        results, wanted = results[2:], wanted[2:]
    assert_close(results, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_stay_exact(dtype):
    """4096 rows of one sign: a plain float32 sum over the rows loses 3.5e-4."""
    dy, x, weight, bias = problem((4096, 40), dtype)
    dy = np.abs(dy)
    _, *statistics = kernels.layer_norm_forward(x, weight, bias)
    _, dweight, dbias = kernels.layer_norm_backward(dy, x, weight, *statistics)
    _, *statistics = reference.layer_norm_forward(x, weight, bias)
    _, dweight64, dbias64 = reference.layer_norm_backward(dy, x, weight, *statistics)
    assert error(dbias, dbias64) < (2e-7 if dtype == np.float32 else 1e-14)
    assert error(dweight, dweight64) < (2e-6 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_far_from_zero_does_not_cancel(dtype):
    """mean(x^2) - mean(x)^2 would lose all digits of the variance here."""
    x = values(9, 384, dtype=dtype) + dtype(1000)
    weight, bias = np.ones(384, dtype), np.zeros(384, dtype)
    y, _, rstd = kernels.layer_norm_forward(x, weight, bias)
    y64, _, rstd64 = reference.layer_norm_forward(x, weight, bias)
    assert error(rstd, rstd64) < (1e-6 if dtype == np.float32 else 1e-13)
    assert error(y, y64) < (5e-5 if dtype == np.float32 else 1e-12)  # the mean itself is rounded to dtype


def test_constant_rows_give_the_bias():
    bias = values(10, dtype=np.float32)
    x = np.full((3, 10), 5, np.float32)
    y, mean, rstd = kernels.layer_norm_forward(x, np.ones(10, np.float32), bias)
    assert np.array_equal(y, np.tile(bias, (3, 1)))
    assert np.array_equal(mean, [5, 5, 5])
    assert np.allclose(rstd, 1e-5**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_reaches_the_sums(dtype):
    dy, x, weight, bias = problem((40, 65), dtype)
    x[[2, 39], [64, 0]] = np.nan
    y, mean, rstd = kernels.layer_norm_forward(x, weight, bias)
    wrong = np.isin(np.arange(40), [2, 39])
    for statistic in (mean, rstd):
        assert np.array_equal(np.isnan(statistic), wrong)
    assert np.array_equal(np.isnan(y), np.broadcast_to(wrong[:, None], y.shape))
    dx, dweight, dbias = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    assert np.array_equal(np.isnan(dx), np.broadcast_to(wrong[:, None], y.shape))
    assert np.isnan(dweight).all()
    assert not np.isnan(dbias).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits_at_any_thread_count(bias, dtype):
    dy, x, weight, b = problem((1001, 130), dtype, bias)
    assert_same_at_any_thread_count(lambda: kernels.layer_norm_forward(x, weight, b))
    _, mean, rstd = kernels.layer_norm_forward(x, weight, b)
    assert_same_at_any_thread_count(lambda: kernels.layer_norm_backward(dy, x, weight, mean, rstd, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [0, 1, 70])
def test_accumulate_adds_to_the_parameters_gradients_alone(n_rows, dtype):
    dy, x, weight, bias = problem((n_rows, 20), dtype)
    _, mean, rstd = kernels.layer_norm_forward(x, weight, bias)
    fresh = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    before = values(20, dtype=dtype, seed=7), values(20, dtype=dtype, seed=8)
    out = (np.full_like(x, 9), before[0].copy(), before[1].copy())
    dx, dweight, dbias = kernels.layer_norm_backward(dy, x, weight, mean, rstd, out=out, accumulate=True)
    assert dx is out[0]
    assert dweight is out[1]
    assert dbias is out[2]
    assert same_bits(dx, fresh[0])
    assert_close((dweight, dbias), (before[0] + fresh[1], before[1] + fresh[2]), dtype)
    again = kernels.layer_norm_backward(dy, x, weight, mean, rstd, out=(None, dweight, dbias))
    assert same_bits(again, fresh)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_out(dtype):
    dy, x, weight, bias = problem((5, 12), dtype)
    assert_reads_any_array(kernels.layer_norm_forward, x, weight, bias)
    _, mean, rstd = kernels.layer_norm_forward(x, weight, bias)
    assert_reads_any_array(kernels.layer_norm_backward, dy, x, weight, mean, rstd)
    for i, (good, overlapping) in enumerate([(x, x), (mean, x[0, :5]), (rstd, bias[:5])]):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.layer_norm_forward(
                x, weight, bias, out=tuple(out if i == j else None for j in range(3))
            )[i],
            good, overlapping,
        )  # fmt: skip
    for i, (good, overlapping) in enumerate([(x, dy), (weight, weight), (bias, weight)]):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.layer_norm_backward(
                dy, x, weight, mean, rstd, out=tuple(out if i == j else None for j in range(3))
            )[i],
            good, overlapping,
        )  # fmt: skip
    both = np.empty(12, dtype)
    with pytest.raises(ValueError, match=r"out\[2\] \(dbias\) overlaps an input"):
        kernels.layer_norm_backward(dy, x, weight, mean, rstd, out=(None, both, both))


def test_refuses_bad_arguments():
    x, w = np.zeros((2, 3), np.float32), np.ones(3, np.float32)
    forward, backward = kernels.layer_norm_forward, kernels.layer_norm_backward
    message = "layer_norm_forward: x is (2, 3), weight is (4,); they must be (..., C), (C,)"
    assert_refuses(ValueError, message, forward, x, np.ones(4, np.float32), None)
    message = "layer_norm_forward: x is (2, 0), weight is (0,); C must be at least 1"
    assert_refuses(ValueError, message, forward, x[:, :0], w[:0], None)
    message = "layer_norm_forward: bias is (4,), it must be (3,)"
    assert_refuses(ValueError, message, forward, x, w, np.ones(4, np.float32))
    message = "layer_norm_forward: eps is nan, it must be at least 0"
    assert_refuses(ValueError, message, forward, x, w, None, float("nan"))
    message = "layer_norm_forward: weight is float64 but x is float32; all must have one dtype"
    assert_refuses(TypeError, message, forward, x, w.astype(np.float64), None)
    _, mean, rstd = forward(x, w, None)
    message = "layer_norm_backward: mean is (1,), it must be (2,)"
    assert_refuses(ValueError, message, backward, x, x, w, mean[:1], rstd)
    message = "layer_norm_backward: dy is (1, 3), it must be (2, 3)"
    assert_refuses(ValueError, message, backward, x[:1], x, w, mean, rstd)
    message = "layer_norm_backward: accumulate=True needs arrays for dweight and dbias in out"
    assert_refuses(ValueError, message, backward, x, x, w, mean, rstd, accumulate=True)
    message = "layer_norm_backward: out must be a tuple of 3 arrays (dx, dweight, dbias)"
    assert_refuses(TypeError, message, backward, x, x, w, mean, rstd, out=x)
    message = "layer_norm_backward: out must be a tuple of 3 arrays (dx, dweight, dbias)"
    assert_refuses(TypeError, message, backward, x, x, w, mean, rstd, out=(), accumulate=True)
    message = "layer_norm_forward: eps is None, it must be a number"
    assert_refuses(TypeError, message, forward, x, w, None, None)
    message = "layer_norm_forward: weight is None, it must be float32 or float64"
    assert_refuses(TypeError, message, forward, x, None, None)
