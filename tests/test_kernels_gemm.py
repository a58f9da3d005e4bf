"""Matrix products, linear layers, the feed-forward part and the head against the float64 reference."""

import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_reads_any_array,
    assert_refuses,
    assert_refuses_bad_out,
    assert_same_at_any_thread_count,
    check_gradients,
    error,
    same_bits,
    values,
    with_threads,
)

from cllm import kernels, reference
from cllm.kernels import loss

# (rows, outputs, inputs): ones; a vocabulary of 65; no multiple of a tile; several blocks of each. Of threads
# shares of dW's inputs; and of rows when dW's operand is a packed panel (float32, float64); common packing.
# For tiles of bfloat16: one row and one column more than groups; slices and blocks of K; common packing.
SHAPES = [
    (1, 1, 1),
    (3, 65, 5),
    (7, 6, 64),
    (50, 130, 97),
    (400, 70, 33),
    (9, 65, 1700),
    (1700, 13, 9),
    (2, 4200, 3),
    (300, 48, 256),
    (300, 96, 64),
    (300, 96, 32),
    (400, 400, 700),
    (33, 513, 65),
    (600, 97, 1000),
    (300, 600, 130),
]


def problem(shape, dtype):
    n, o, i = shape
    return (
        values(n, o, dtype=dtype),
        values(n, i, dtype=dtype, seed=1),
        values(o, i, dtype=dtype, seed=2),
        values(o, dtype=dtype, seed=3),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, dtype):
    dy, x, weight, bias = problem(shape, dtype)
    assert_close(kernels.linear_forward(x, weight, bias), reference.linear_forward(x, weight, bias), dtype)
    assert_close(kernels.linear_forward(x, weight), reference.linear_forward(x, weight), dtype)
    assert_close(kernels.linear_backward(dy, x, weight), reference.linear_backward(dy, x, weight), dtype)
    assert kernels.linear_backward(dy, x, weight, bias=False)[2] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_gives_the_same_bits_at_any_thread_count(shape, dtype):
    dy, x, weight, bias = problem(shape, dtype)
    assert_same_at_any_thread_count(lambda: kernels.linear_forward(x, weight, bias))
    assert_same_at_any_thread_count(lambda: kernels.linear_backward(dy, x, weight))

    def accumulated():
        out = np.empty_like(x), weight.copy(), bias.copy()
        return kernels.linear_backward(dy, x, weight, out=out, accumulate=True)

    assert_same_at_any_thread_count(accumulated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    _, x, weight, bias = problem((101, 130, 900), dtype)
    whole = kernels.linear_forward(x, weight, bias)
    for start, stop in ((0, 1), (5, 18), (40, 101)):
        assert same_bits(kernels.linear_forward(x[start:stop], weight, bias), whole[start:stop].copy())
    assert same_bits(kernels.linear_forward(x, weight[60:99], bias[60:99]), whole[:, 60:99].copy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_accumulates(dtype):
    dy, x, weight, _ = problem((50, 13, 97), dtype)
    dx = np.full(x.shape, np.nan, dtype)
    start = values(*weight.shape, dtype=dtype, seed=5), values(13, dtype=dtype, seed=6)
    dweight, dbias = start[0].copy(), start[1].copy()
    results = kernels.linear_backward(dy, x, weight, out=(dx, dweight, dbias), accumulate=True)
    assert all(a is b for a, b in zip(results, (dx, dweight, dbias)))
    expected = reference.linear_backward(dy, x, weight)
    assert_close((dx, dweight, dbias), (expected[0], expected[1] + start[0], expected[2] + start[1]), dtype)
    with pytest.raises(ValueError, match="accumulate=True needs arrays for dweight and dbias in out"):
        kernels.linear_backward(dy, x, weight, accumulate=True)


def test_linear_keeps_leading_dimensions_and_takes_empty_ones():
    weight, bias = values(5, 4, dtype=np.float32), values(5, dtype=np.float32)
    assert kernels.linear_forward(values(2, 3, 4, dtype=np.float32), weight, bias).shape == (2, 3, 5)
    assert kernels.linear_forward(values(4, dtype=np.float32), weight, bias).shape == (5,)
    assert kernels.linear_forward(np.zeros((0, 4), np.float32), weight, bias).shape == (0, 5)
    nothing = kernels.linear_forward(np.zeros((3, 0), np.float32), np.zeros((5, 0), np.float32), bias)
    assert np.array_equal(nothing, np.tile(bias, (3, 1)))
    dx, dweight, dbias = kernels.linear_backward(
        np.zeros((0, 5), np.float32), np.zeros((0, 4), np.float32), weight
    )
    assert dx.shape == (0, 4)
    assert not dweight.any()
    assert not dbias.any()


def test_linear_reads_any_array():
    dy, x, weight, bias = problem((9, 65, 70), np.float32)
    assert_reads_any_array(kernels.linear_forward, x, weight, bias)
    assert_reads_any_array(kernels.linear_backward, dy, x, weight)


def test_linear_refuses_bad_arguments():
    dy, x, weight, bias = problem((9, 6, 7), np.float32)
    forward, backward = kernels.linear_forward, kernels.linear_backward
    message = "linear_forward: x is (9, 6), weight is (6, 7); they must be (..., I) and (O, I)"
    assert_refuses(ValueError, message, forward, dy, weight)
    assert_refuses(ValueError, "linear_forward: bias is (9, 7), it must be (6,)", forward, x, weight, x)
    assert_refuses(ValueError, "linear_backward: dy is (9, 7), it must be (9, 6)", backward, x, x, weight)
    message = "linear_forward: weight is float64 but x is float32; all must have one dtype"
    assert_refuses(TypeError, message, forward, x, weight.astype(np.float64))
    message = "linear_forward: x is int64, it must be float32 or float64"
    assert_refuses(TypeError, message, forward, np.ones((9, 7), int), weight)
    block = np.zeros(9 * 7 + 9 * 6, np.float32)
    inside, overlapping = block[: 9 * 7].reshape(9, 7), block[9 * 7 - 1 : -1].reshape(9, 6)
    assert_refuses_bad_out(lambda out: forward(inside, weight, bias, out=out), dy, overlapping)


# Any shapes ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(0, 70)] * 3),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from(DTYPES),
    st.tuples(*[st.sampled_from(["plain", "transposed", "every second", "backwards"])] * 2),
    st.tuples(st.booleans(), st.booleans()),
)
def test_matmul(shape, batch, dtype, layouts, single):
    M, K, N = shape

    def operand(rows, columns, layout, one, seed):
        leading = [1 if one else n for n in batch]
        if layout == "transposed":
            return values(*leading, columns, rows, dtype=dtype, seed=seed).swapaxes(-1, -2)
        if layout == "every second":
            return values(*leading, rows, 2 * columns, dtype=dtype, seed=seed)[..., ::2]
        if layout == "backwards":
            return values(*leading, rows, columns, dtype=dtype, seed=seed)[..., ::-1, :]
        return values(*leading, rows, columns, dtype=dtype, seed=seed)

    a = operand(M, K, layouts[0], single[0], 1)
    b = operand(K, N, layouts[1], single[1], 2)
    results = [with_threads(n, lambda: kernels.matmul(a, b)) for n in (1, 3)]
    assert same_bits(*results)
    assert_close(results[0], reference.matmul(a, b), dtype)


def test_matmul_refuses_bad_arguments():
    a, b = values(2, 3, 4, dtype=np.float32), values(3, 4, 5, dtype=np.float32)
    message = (
        "matmul: a is (2, 3, 4), b is (3, 4, 5); they must be (..., M, K) and (..., K, N), "
        "with leading dimensions that broadcast"
    )
    assert_refuses(ValueError, message, kernels.matmul, a, b)
    message = "matmul: a is (2, 3, 4), b is (3, 5); they must be (..., M, K) and (..., K, N)"
    assert_refuses(ValueError, message, kernels.matmul, a, b[0, :3])
    message = "matmul: a is float32, b is float64; both must be float32 or both float64"
    assert_refuses(TypeError, message, kernels.matmul, a, b.astype(np.float64))


@pytest.mark.parametrize("outputs", [90, 900])
def test_not_a_number_reaches_its_own_row_and_column_only(outputs):
    x, weight = values(40, 70, dtype=np.float32), values(outputs, 70, dtype=np.float32)
    x[17, 3] = np.nan
    weight[65, 5] = np.inf
    bad = ~np.isfinite(kernels.linear_forward(x, weight))
    expected = np.zeros((40, outputs), bool)
    expected[17] = expected[:, 65] = True
    assert np.array_equal(bad, expected)


def test_sums_are_exact_to_a_few_roundings():
    """Of sum |a||b|; a rounding is 2^-24."""
    rng = np.random.default_rng(0)
    for M, N, K in ((70, 40, 900), (40, 900, 70), (300, 300, 2000)):
        a, b = (np.float32(rng.lognormal(0, 1, s) * rng.choice([-1, 1], s)) for s in ((M, K), (K, N)))
        exact, scale = np.float64(a) @ b, np.abs(np.float64(a)) @ np.abs(b)
        for x in (a, a.T.copy().T):
            for y in (b, b.T.copy().T):
                assert np.max(np.abs(kernels.matmul(x, y) - exact) / scale) < 2.0**-20


def test_products_of_two_numbers_are_exact_to_a_rounding():
    """Of a diagonal matrix each sum has one term: none of the mantissa's 24 bits is missing."""
    rng = np.random.default_rng(0)
    diagonal, b = np.float32(rng.uniform(1, 2, 200)), np.float32(rng.uniform(-2, -1, (200, 300)))
    exact = np.float64(diagonal)[:, None] * b
    for y in (b, b.T.copy().T):
        assert np.max(np.abs(kernels.matmul(np.diag(diagonal), y) / exact - 1)) < 2.0**-23
    assert np.max(np.abs(kernels.matmul(b.T.copy(), np.diag(diagonal)) / exact.T - 1)) < 2.0**-23


def test_small_numbers_among_large_ones():
    """As behind an activation: denormal numbers and zeros beside ones, in the same rows and columns."""
    rng = np.random.default_rng(0)
    shapes = (200, 500), (500, 200)
    with np.errstate(under="ignore"):
        a, b = (np.float32(rng.normal(size=s) * 10 ** rng.uniform(-46, 1, s)) for s in shapes)
    a[:, ::40], b[::40] = 1, -1
    exact, scale = np.float64(a) @ b, np.abs(np.float64(a)) @ np.abs(b)
    for x in (a, a.T.copy().T):
        for y in (b, b.T.copy().T):
            assert np.max(np.abs(kernels.matmul(x, y) - exact) / scale) < 2.0**-20


def test_products_of_any_magnitude():
    """Also where parts in bfloat16 would be flushed to zero or overflow: 32 rows, columns of each scale."""
    rows = [0, 1e-42, 1e-36, 1e-31, 1e-20, 1, 1e10, 1e18, 1e20, 1e30, 1e37]
    columns = [0, 1e-41, 1e-33, 1e-18, 1e-12, 1, 1e12, 1e20, 1e35]
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore", under="ignore"):
        a = np.float32(rng.uniform(0.5, 1, (32 * len(rows), 200)) * np.repeat(rows, 32)[:, None])
        b = np.float32(rng.uniform(-1, -0.5, (200, 32 * len(columns))) * np.repeat(columns, 32))
        exact = np.float64(a) @ np.float64(b)
    result = kernels.matmul(a, b)
    fits = np.abs(exact) < 3e38
    assert np.array_equal(np.isneginf(result), ~fits)
    error = np.abs(np.where(fits, result, 0) - np.where(fits, exact, 0)) - 200 * 2.0**-149
    assert np.all(error <= 2.0**-19 * np.abs(exact))  # flushed parts would be 2^-8 and more


def scattered(rows, columns, seed):
    """Rows of which some hold a NaN, an infinity or are far above or below the others, in no order."""
    rng = np.random.default_rng(seed)
    x = np.float32(rng.uniform(0.5, 1, (rows, columns)))
    scales = rng.choice([1, 1, 1, 1e-38, 1e-34, 1e-25, 1e-16, 1e10, 1e19, 1e25], rows)
    x = np.float32(x * scales[:, None])
    x[rows // 2, columns // 3], x[rows // 3, columns - 1] = np.nan, np.inf
    return x


@pytest.mark.parametrize("inputs", [100, 900])
def test_each_row_and_column_is_as_exact_as_if_it_were_alone(inputs):
    """Whatever the others that tiles multiply with it hold; forward with a bias, and added gradients."""
    x, weight = scattered(70, inputs, 0), scattered(400, inputs, 1)
    bias = np.float32(np.geomspace(1e-42, 1e30, 400))

    def assert_exact(result, a, b, add):
        with np.errstate(invalid="ignore"):
            exact = np.float64(a) @ np.float64(b) + add
        fits = np.abs(exact) < 3e38
        assert np.array_equal(np.isnan(result), np.isnan(exact))
        assert not np.isfinite(result[~fits]).any()
        error = np.abs(np.where(fits, result, 0) - np.where(fits, exact, 0)) - a.shape[1] * 2.0**-149
        assert np.all(error <= np.where(fits, 2.0**-18 * np.abs(exact), 0))

    with np.errstate(over="ignore"):
        result = kernels.linear_forward(x, weight, bias)
        assert_exact(result, x, weight.T, np.float64(bias))
        for row in range(70):
            assert same_bits(kernels.linear_forward(x[row : row + 1], weight, bias), result[row : row + 1])
        dy, rows = scattered(300, inputs, 2).T.copy(), scattered(200, inputs, 3).T.copy()
        before = np.float32(np.geomspace(1e-42, 1e30, 300 * 200)).reshape(300, 200)
        out = None, before.copy(), None
        dweight = kernels.linear_backward(dy, rows, before, bias=False, out=out, accumulate=True)[1]
        assert_exact(dweight, dy.T, rows, np.float64(before))


def test_what_is_added_costs_a_long_sum_no_bits():
    """A bias or a gradient that outweighs the sum: its own rounding for each block, not for each step."""
    rng = np.random.default_rng(0)
    x, weight = (np.float32(rng.uniform(0, s, (100, 5000))) for s in (1, 0.06))
    bias = np.full(100, 2.0**24, np.float32)
    exact = np.float64(x) @ weight.T + bias
    assert np.max(np.abs(kernels.linear_forward(x, weight, bias) / exact - 1)) < 2.0**-23
    dweight = np.full((100, 5000), 2.0**24, np.float32)
    dy, rows = np.float32(rng.uniform(0, 1, (3000, 100))), np.float32(rng.uniform(0, 0.06, (3000, 5000)))
    exact = np.float64(dy).T @ rows + dweight
    kernels.linear_backward(dy, rows, weight, bias=False, out=(None, dweight, None), accumulate=True)
    assert np.max(np.abs(dweight / exact - 1)) < 2.0**-21  # eight blocks


def test_no_rows_with_a_large_weight():
    weight = values(200, 200, dtype=np.float32)
    nothing = np.zeros((0, 200), np.float32)
    dweight = np.full_like(weight, np.nan)
    kernels.linear_backward(nothing, nothing, weight, bias=False, out=(None, dweight, None))
    assert not dweight.any()
    dweight = weight.copy()
    kernels.linear_backward(nothing, nothing, weight, bias=False, out=(None, dweight, None), accumulate=True)
    assert same_bits(dweight, weight)


@pytest.mark.parametrize(("rows", "outputs"), [(4150, 4100), (4100, 4150)])
def test_more_rows_and_columns_than_are_packed_at_a_time(rows, outputs):
    x, weight = values(rows, 16, dtype=np.float32), values(outputs, 16, dtype=np.float32, seed=1)
    bias = values(outputs, dtype=np.float32, seed=2)
    expected = reference.linear_forward(x, weight, bias)
    assert_close(kernels.linear_forward(x, weight, bias), expected, np.float32)
    assert_same_at_any_thread_count(lambda: kernels.linear_forward(x, weight, bias))


# Feed-forward and head -------------------------------------------------------------------------------


def feed_forward_problem(activation, dtype, rows=(5, 7)):
    """dy, x, w1, b1, w2, b2."""
    n_pre = 60 if activation == "swiglu" else 30
    shapes = (*rows, 10), (*rows, 12), (n_pre, 12), (n_pre,), (10, 30), (10,)
    return [values(*shape, dtype=dtype, seed=seed, scale=0.5) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("rows", [(5, 7), (), (0, 3), (400,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(dtype, rows, activation):
    dy, x, w1, b1, w2, b2 = feed_forward_problem(activation, dtype, rows)
    y, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2, activation)
    expected = reference.feed_forward_forward(x, w1, b1, w2, b2, activation)
    assert_close((y, pre), expected, dtype)
    call = kernels.feed_forward_backward
    results = call(dy, x, pre, w1, w2, activation=activation)
    wanted = reference.feed_forward_backward(dy, x, expected[1], w1, w2, activation=activation)
    assert_close(results, wanted, dtype)
    out = (None, *[r.copy() for r in results[1:]])
    twice = call(dy, x, pre, w1, w2, activation=activation, out=out, accumulate=True)
    assert_close(twice, (wanted[0], *[2 * w for w in wanted[1:]]), dtype)
    bare = call(dy, x, pre, w1, w2, activation=activation, bias=False)
    assert same_bits(bare, (*results[:2], None, results[3], None))


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_feed_forward_gradients_are_those_of_finite_differences(activation):
    _, x, w1, b1, w2, b2 = feed_forward_problem(activation, np.float64, (3,))

    def backward(dy, x, w1, b1, w2, b2):
        _, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2, activation)
        return kernels.feed_forward_backward(dy, x, pre, w1, w2, activation=activation)

    check_gradients(
        lambda *arrays: kernels.feed_forward_forward(*arrays, activation)[0], backward, x, w1, b1, w2, b2
    )


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_feed_forward_gives_the_same_bits_at_any_thread_count(activation):
    dy, x, w1, b1, w2, b2 = feed_forward_problem(activation, np.float32, (1200,))

    def passes():
        y, pre = kernels.feed_forward_forward(x, w1, b1, w2, b2, activation)
        return y, pre, *kernels.feed_forward_backward(dy, x, pre, w1, w2, activation=activation)

    assert_same_at_any_thread_count(passes)


def test_feed_forward_refuses_bad_arguments():
    dy, x, w1, b1, w2, b2 = feed_forward_problem("swiglu", np.float32)
    forward, backward = kernels.feed_forward_forward, kernels.feed_forward_backward
    allowed = "gelu_tanh, gelu, relu, relu_squared, silu, tanh, sigmoid, swiglu"
    message = f"feed_forward_forward: activation is 'elu', it must be one of {allowed}"
    assert_refuses(ValueError, message, forward, x, w1, b1, w2, b2, "elu")
    message = "feed_forward_forward: x is (5, 7, 12), w1 is (60, 12), w2 is (10, 30); they must be (..., C), "
    assert_refuses(ValueError, f"{message}(F, C) and (O, F)", forward, x, w1, b1, w2, b2)
    message = "feed_forward_forward: x is (5, 7, 12), w1 is (30, 12), w2 is (10, 30); they must be (..., C), "
    assert_refuses(ValueError, f"{message}(2 F, C) and (O, F)", forward, x, w1[:30], b1, w2, b2, "swiglu")
    message = "feed_forward_backward: pre is (5, 7, 30), it must be (5, 7, 60)"
    pre = values(5, 7, 30, dtype=np.float32)
    assert_refuses(ValueError, message, backward, dy, x, pre, w1, w2, activation="swiglu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 65, 20), (300, 400, 3)])
def test_linear_cross_entropy(shape, dtype, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss, "_CHUNK_ROWS", 128)  # the last shape takes three
    n, n_classes, channels = shape
    x, weight = values(n, channels, dtype=dtype), values(n_classes, channels, dtype=dtype, seed=1)
    targets = np.random.default_rng(2).integers(0, n_classes, n)
    targets[n // 3] = -100
    dlosses = values(n, dtype=dtype, seed=3)
    losses, lse = kernels.linear_cross_entropy_forward(x, weight, targets, label_smoothing=0.1)
    expected = reference.linear_cross_entropy_forward(x, weight, targets, label_smoothing=0.1)
    assert_close((losses, lse), expected, dtype)
    call = kernels.linear_cross_entropy_backward
    results = call(dlosses, x, weight, targets, lse, label_smoothing=0.1)
    wanted = reference.linear_cross_entropy_backward(
        dlosses, x, weight, targets, expected[1], label_smoothing=0.1
    )
    floor = TOLERANCE[np.dtype(dtype)] * np.linalg.norm(dlosses)  # one class: the gradients are exactly 0
    for result, want in zip(results, wanted):
        assert np.linalg.norm(result - want) < max(floor, TOLERANCE[np.dtype(dtype)] * np.linalg.norm(want))
    again = call(
        dlosses, x, weight, targets, lse, label_smoothing=0.1, out=(None, results[1].copy()), accumulate=True
    )
    assert error(again[1], 2 * results[1]) < TOLERANCE[np.dtype(dtype)]
    assert_same_at_any_thread_count(lambda: call(dlosses, x, weight, targets, lse))


def test_linear_cross_entropy_refuses_bad_targets():
    x, weight = values(3, 4, dtype=np.float32), values(5, 4, dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"x is \(3, 4\), targets is \(2,\); they must be \(N, C\) and \(N,\)"
    ):
        kernels.linear_cross_entropy_forward(x, weight, [0, 1])
    message = "linear_cross_entropy_forward: targets[1] is 5, it must be in [0, 5) or ignore_index, -100"
    assert_refuses(ValueError, message, kernels.linear_cross_entropy_forward, x, weight, [0, 5, 1])
    message = "linear_cross_entropy_forward: label_smoothing is 2.0, it must be in [0, 1]"
    call = kernels.linear_cross_entropy_forward
    assert_refuses(ValueError, message, call, x[:0], weight, np.zeros(0, int), label_smoothing=2.0)
    message = "linear_cross_entropy_forward: weight is (0, 4), V must be at least 1"
    assert_refuses(ValueError, message, call, x, weight[:0], [-100] * 3)


@pytest.mark.parametrize("out", [(), (None,), 5, {1: 2}, np.zeros((5, 5), np.float32)])
def test_an_out_that_is_no_tuple_of_arrays_is_named(out):
    x, weight = values(5, 5, dtype=np.float32), values(5, 5, dtype=np.float32, seed=1)
    for accumulate in (True, False):
        message = "linear_backward: out must be a tuple of 3 arrays (dx, dweight, dbias)"
        call = kernels.linear_backward
        assert_refuses(TypeError, message, call, x, x, weight, out=out, accumulate=accumulate)
        message = "feed_forward_backward: out must be a tuple of 5 arrays (dx, dw1, db1, dw2, db2)"
        call = kernels.feed_forward_backward
        assert_refuses(TypeError, message, call, x, x, x, weight, weight, out=out, accumulate=accumulate)


def test_feed_forward_refuses_bad_arguments_before_it_writes():
    x, w = values(4, 5, dtype=np.float32), values(5, 5, dtype=np.float32, seed=1)
    forward, backward = kernels.feed_forward_forward, kernels.feed_forward_backward
    message = "feed_forward_forward: b2 is (4,), it must be (5,)"
    assert_refuses(ValueError, message, forward, x, w, None, w, w[0, :4])
    message = (
        "feed_forward_backward: x is (4, 5), w1 is (5, 5), w2 is (5, 4); "
        "they must be (..., C), (F, C) and (O, F)"
    )
    assert_refuses(ValueError, message, backward, x, x, x, w, w[:, :4])
    message = "feed_forward_backward: pre is (2, 5), it must be (4, 5)"
    assert_refuses(ValueError, message, backward, x, x, x[:2], w, w)
    good = np.full((5, 5), 9, np.float32)
    for bad, match in ((x, r"out\[1\] \(dw1\) is \(4, 5\)"), (good, r"out\[3\] \(dw2\) overlaps")):
        with pytest.raises(ValueError, match=match):
            backward(x, x, x, w, w, out=(None, bad, None, good, None))
        assert (good == 9).all()
    with pytest.raises(ValueError, match="accumulate=True needs arrays for dw1 and dw2 in out"):
        backward(x, x, x, w, w, bias=False, out=(None, None, None, good, None), accumulate=True)


# Threads ---------------------------------------------------------------------------------------------


def test_python_threads_at_once_and_a_forked_child():
    a = values(300, 300, dtype=np.float32)
    expected = with_threads(2, lambda: kernels.matmul(a, a))
    results = []

    def work():
        results.extend(same_bits(kernels.matmul(a, a), expected) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        kernels.set_num_threads(2)  # waiting for libgomp's threads, which stayed behind, would hang
        right = kernels.get_num_threads() == 1 and same_bits(kernels.matmul(a, a), expected)
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_writes_through_subclasses(tmp_path):
    """An np.matrix stays 2-D when it is reshaped: as it was, memory behind it was overwritten."""
    a, b = values(3, 4), values(4, 2)
    x, weight, bias = values(5, 4), values(1, 4), values(1)
    on_disk = np.memmap(tmp_path / "out", np.float64, "w+", shape=(3, 2))
    for out in (np.zeros((3, 2)).view(np.matrix), on_disk):
        result = kernels.matmul(a, b, out=out)
        assert type(result) is np.ndarray
        assert np.shares_memory(result, out)
        assert same_bits(np.asarray(out), kernels.matmul(a, b))
    out = np.zeros((3, 2)).view(np.matrix)
    assert same_bits(kernels.matmul(a.view(np.matrix), b.view(np.matrix), out=out), kernels.matmul(a, b))
    dy = values(5, 1)
    out = [np.zeros((5, 4)).view(np.matrix), np.zeros((1, 4)).view(np.matrix), None]
    gradients = kernels.linear_backward(dy, x.view(np.matrix), weight.view(np.matrix), out=tuple(out))
    assert same_bits(gradients, kernels.linear_backward(dy, x, weight))
    assert same_bits(kernels.linear_forward(x.view(np.matrix), weight, bias),
                     kernels.linear_forward(x, weight, bias))  # fmt: skip
