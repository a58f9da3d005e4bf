"""Layer norm and RMS norm kernels against the float64 reference, finite differences and torch."""

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
    if shape[-1] == 1:  # one channel: no rounding, which rstd = 316 would enlarge
        assert not results[0].any() and not results[1].any()
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


# RMS norm, and what both share -----------------------------------------------------------------------


def rms_passes(module, dy, x, weight, eps=None):
    """y, rstd, dx, dweight."""
    y, rstd = module.rms_norm_forward(x, weight, eps)
    return y, rstd, *module.rms_norm_backward(dy, x, weight, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, weighted, dtype):
    dy, x, weight, _ = problem(shape, dtype)
    weight = weight if weighted else None
    results, wanted = (rms_passes(module, dy, x, weight) for module in (kernels, reference))
    if shape[-1] == 1:  # one channel: dx is 0 up to rounding, which rstd enlarges
        assert np.all(np.abs(results[2]) < 1e-5 * np.abs(results[1])[..., None])
        results, wanted = (*results[:2], results[3]), (*wanted[:2], wanted[3])
    assert_close(results, wanted, dtype)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_gradients_are_those_of_finite_differences(name, weighted):
    x, weight, bias = values(3, 37), values(37, seed=1), values(37, seed=2)
    if name == "rms":

        def backward(dy, x, weight=None):
            return rms_passes(kernels, dy, x, weight)[2 : 4 if weighted else 3]

        check_gradients(
            lambda *a: kernels.rms_norm_forward(*a)[0], backward, x, *([weight] if weighted else [])
        )
    else:

        def backward(dy, x, weight, *bias):
            _, mean, rstd = kernels.layer_norm_forward(x, weight, None)
            gradients = kernels.layer_norm_backward(dy, x, weight, mean, rstd, bias=bool(bias))
            return gradients if bias else gradients[:2]

        check_gradients(
            lambda x, w, b=None: kernels.layer_norm_forward(x, w, b)[0],
            backward, x, weight, *([bias] if weighted else []),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["layer", "rms"])
@settings(max_examples=25)
@given(
    shape=array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40),
    channels=st.integers(2, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    eps=st.sampled_from([1e-3, 1e-5]),
)
def test_norms_are_torchs(name, shape, channels, dtype, seed, eps):
    """Errors of gradients count against the terms that they sum: in dx of 2 channels these cancel."""
    torch = pytest.importorskip("torch")
    shape = (*shape[:-1], channels)
    arrays = [values(*n, dtype=dtype, seed=seed + i) for i, n in enumerate((shape, (channels,), (channels,)))]
    dy = values(*shape, dtype=dtype, seed=seed + 3)
    x, weight, bias = arrays
    if name == "layer":
        y, mean, rstd = kernels.layer_norm_forward(x, weight, bias, eps)
        results = y, *kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    else:
        arrays = arrays[:2]
        y, rstd, *gradients = rms_passes(kernels, dy, x, weight, eps)
        results = y, *gradients
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    z = getattr(torch.nn.functional, f"{name}_norm")(tensors[0], (channels,), *tensors[1:], eps=eps)
    z.backward(torch.tensor(dy))
    sizes = 0, np.linalg.norm(dy * weight * rstd[..., None]), np.linalg.norm(dy), np.linalg.norm(dy)
    for result, theirs, size in zip(results, (z, *(t.grad for t in tensors)), sizes):
        assert_torchs(result, theirs, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_hard_inputs(dtype):
    """Rows of zeros and of subnormals are divided by sqrt(eps); rows of 1e4 by their size; one axis."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.stack([np.zeros(40), np.full(40, 64 * tiny), np.full(40, 1e4), -np.full(40, 1e-4)]).astype(dtype)
    y, rstd = kernels.rms_norm_forward(x, None, 1e-6)
    assert np.allclose(rstd, [1e3, 1e3, 1e-4, (1e-8 + 1e-6) ** -0.5], rtol=1e-6)
    assert_close(y, reference.rms_norm_forward(x, None, 1e-6)[0], dtype)
    assert not y[0].any()
    assert np.allclose(y[2], 1, rtol=1e-6)
    eps = np.finfo(dtype).eps
    assert np.allclose(kernels.rms_norm_forward(x)[1][0], eps**-0.5)
    assert kernels.rms_norm_forward(x[2])[1].shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_reaches_dweight(bad, dtype):
    """Infinity makes rstd 0, and 0 times infinity NaN at its own place, as in torch; the others become 0."""
    dy, x, weight, _ = problem((40, 65), dtype)
    x[[2, 39], [64, 0]] = bad
    y, rstd, dx, dweight = rms_passes(kernels, dy, x, weight)
    wrong = np.isin(np.arange(40), [2, 39])
    assert np.isfinite(y[~wrong]).all()
    assert np.isfinite(dx[~wrong]).all()
    assert np.isnan(dweight[[0, 64]]).all()
    if np.isnan(bad):
        assert np.isnan(y[wrong]).all()
        assert np.isnan(dx[wrong]).all()
        assert np.isnan(rstd[wrong]).all()
    else:
        assert np.argwhere(np.isnan(y)).tolist() == [[2, 64], [39, 0]]
        assert not rstd[wrong].any()
        assert np.isfinite(dweight[1:64]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_gives_the_same_bits_at_any_thread_count(weighted, dtype):
    dy, x, weight, _ = problem((1001, 130), dtype)
    weight = weight if weighted else None
    assert_same_at_any_thread_count(lambda: rms_passes(kernels, dy, x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_long_sums_stay_exact(dtype):
    dy, x, weight, _ = problem((4096, 40), dtype)
    results = rms_passes(kernels, np.abs(dy), np.abs(x), weight)
    wanted = rms_passes(reference, np.abs(dy), np.abs(x), weight)
    assert error(results[3], wanted[3]) < (3e-7 if dtype == np.float32 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [0, 1, 70])
def test_rms_norm_accumulates_dweight_alone(n_rows, dtype):
    dy, x, weight, _ = problem((n_rows, 20), dtype)
    _, rstd, dx, dweight = rms_passes(kernels, dy, x, weight)
    before = values(20, dtype=dtype, seed=7)
    out = np.full_like(x, 9), before.copy()
    found = kernels.rms_norm_backward(dy, x, weight, rstd, out=out, accumulate=True)
    assert found[0] is out[0]
    assert found[1] is out[1]
    assert same_bits(found[0], dx)
    assert_close(found[1], before.astype(np.float64) + dweight, dtype)
    assert kernels.rms_norm_backward(dy, x, None, rstd, accumulate=True)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_inputs_and_out(dtype):
    dy, x, weight, _ = problem((5, 12), dtype)
    assert_reads_any_array(lambda x, w: tuple(kernels.rms_norm_forward(x, w)), x, weight)
    assert_reads_any_array(lambda x: tuple(kernels.rms_norm_forward(x)), x)
    _, rstd = kernels.rms_norm_forward(x, weight)
    assert_reads_any_array(kernels.rms_norm_backward, dy, x, weight, rstd)
    for i, (good, overlapping) in enumerate([(x, x), (rstd, x[0, :5])]):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.rms_norm_forward(
                x, weight, out=tuple(out if i == j else None for j in range(2))
            )[i],
            good, overlapping,
        )  # fmt: skip
    for i, (good, overlapping) in enumerate([(x, dy), (weight, weight)]):
        assert_refuses_bad_out(
            lambda out, i=i: kernels.rms_norm_backward(
                dy, x, weight, rstd, out=tuple(out if i == j else None for j in range(2))
            )[i],
            good, overlapping,
        )  # fmt: skip


def test_rms_norm_refuses_bad_arguments():
    x, w = np.zeros((2, 3), np.float32), np.ones(3, np.float32)
    forward, backward = kernels.rms_norm_forward, kernels.rms_norm_backward
    message = "rms_norm_forward: x is (2, 3), weight is (4,); they must be (..., C), (C,)"
    assert_refuses(ValueError, message, forward, x, np.ones(4, np.float32))
    for shape in ((2, 0), ()):
        message = f"rms_norm_forward: x is {shape}, it must be (..., C) with C at least 1"
        assert_refuses(ValueError, message, forward, np.zeros(shape))
    message = "rms_norm_forward: eps is -1.0, it must be at least 0"
    assert_refuses(ValueError, message, forward, x, w, -1.0)
    message = "rms_norm_forward: weight is float64 but x is float32; all must have one dtype"
    assert_refuses(TypeError, message, forward, x, w.astype(np.float64))
    _, rstd = forward(x, w)
    message = "rms_norm_backward: rstd is (1,), it must be (2,)"
    assert_refuses(ValueError, message, backward, x, x, w, rstd[:1])
    message = "rms_norm_backward: dy is (1, 3), it must be (2, 3)"
    assert_refuses(ValueError, message, backward, x[:1], x, w, rstd)
    message = "rms_norm_backward: accumulate=True needs an array for dweight in out"
    assert_refuses(ValueError, message, backward, x, x, w, rstd, accumulate=True)
    message = "rms_norm_backward: out must be a tuple of 2 arrays (dx, dweight)"
    assert_refuses(TypeError, message, backward, x, x, w, rstd, out=x)


def test_eps_is_a_number_that_a_float_holds():
    x, weight = values(2, 3), np.ones(3)
    message = "layer_norm_forward: eps is too large for a float"
    assert_refuses(ValueError, message, kernels.layer_norm_forward, x, weight, None, 10**400)
    eps = np.float16(1e-3)
    assert same_bits(kernels.rms_norm_forward(x, eps=eps), kernels.rms_norm_forward(x, eps=float(eps)))
