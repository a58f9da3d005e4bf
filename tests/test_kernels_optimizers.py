"""Optimizer kernels: float64 formulas, threads bitwise, odd and empty sizes, denormals, bad arguments."""

import numpy as np
import pytest

from cllm import kernels, reference

# 1 and 0; one vector more or less than a register; around the block of 4096; far into threaded work.
SIZES = [0, 1, 15, 17, 33, 4095, 4097, 70001, 131072 + 5]
TOLERANCE = {np.float32: 3e-6, np.float64: 1e-14}

# name -> (function, arguments, the names of its state arrays)
VARIANTS = {
    "sgd": ("sgd_update", {"lr": 0.1, "weight_decay": 0.01}, ()),
    "sgd momentum": (
        "sgd_update",
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        ("momentum_buffer",),
    ),
    "sgd nesterov": ("sgd_update", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ("momentum_buffer",)),
    "sgd first": ("sgd_update", {"lr": 0.1, "momentum": 0.9, "first": True}, ("momentum_buffer",)),
    "adam": ("adam_update", {"lr": 0.01, "step": 3, "betas": (0.9, 0.99), "weight_decay": 0.1}, ("m", "v")),
    "adamw": ("adamw_update", {"lr": 0.01, "step": 3, "betas": (0.8, 0.95), "weight_decay": 0.1}, ("m", "v")),
    "rmsprop": ("rmsprop_update", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}, ("v",)),
    "rmsprop momentum": (
        "rmsprop_update", {"lr": 0.01, "alpha": 0.9, "momentum": 0.8}, ("v", "momentum_buffer")
    ),
}  # fmt: skip


def arrays_for(rng, shape, dtype, names):
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("param", "grad", *names)}
    for name in ("v", "v_max"):
        if name in arrays:
            arrays[name] = arrays[name] ** 2
    return arrays


def copies(arrays, dtype=None):
    return {name: array.astype(dtype or array.dtype) for name, array in arrays.items()}


@pytest.fixture
def threads():
    before = kernels.get_num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_updates_match_float64_reference(name, dtype):
    function, arguments, state = VARIANTS[name]
    rng = np.random.default_rng(0)
    for size in SIZES:
        arrays = arrays_for(rng, size, dtype, state)
        expected = copies(arrays, np.float64)
        if function == "sgd_update":
            expected.setdefault("momentum_buffer", None)
        getattr(kernels, function)(**arrays, **arguments)
        getattr(reference, function)(**expected, **arguments)
        for key in arrays:
            np.testing.assert_allclose(
                arrays[key], expected[key], TOLERANCE[dtype], TOLERANCE[dtype], err_msg=f"{key} {size}"
            )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_centred_rmsprop_against_its_formula(dtype):
    arrays = arrays_for(np.random.default_rng(1), 5003, dtype, ("v", "grad_avg", "momentum_buffer"))
    arrays["v"] += arrays["grad_avg"] ** 2 + dtype(0.1)  # else the variance is a difference of equals
    p, g, v, mean, buffer = (array.astype(np.float64) for array in arrays.values())
    g = g + 0.1 * p
    v = 0.9 * v + 0.1 * g**2
    mean = 0.9 * mean + 0.1 * g
    buffer = 0.8 * buffer + g / (np.sqrt(v - mean**2) + 1e-3)
    p = p - 0.01 * buffer
    kernels.rmsprop_update(**arrays, lr=0.01, alpha=0.9, eps=1e-3, weight_decay=0.1, momentum=0.8)
    for name, expected in (
        ("param", p), ("v", v), ("grad_avg", mean), ("momentum_buffer", buffer)
    ):  # fmt: skip
        np.testing.assert_allclose(arrays[name], expected, rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_centred_rmsprop_of_a_constant_gradient_stays_finite():
    # v - grad_avg**2 is exactly zero here, and rounds to below zero without the limit.
    param, grad = np.ones(1000, np.float32), np.linspace(0.1, 3, 1000, dtype=np.float32)
    v, mean = np.zeros_like(param), np.zeros_like(param)
    for _ in range(400):
        kernels.rmsprop_update(param, grad, v, lr=1e-9, alpha=0.9, grad_avg=mean)
    assert np.isfinite(param).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["adam_update", "adamw_update"])
def test_amsgrad_against_its_formula(function, dtype):
    arrays = arrays_for(np.random.default_rng(2), 4099, dtype, ("m", "v", "v_max"))
    p, g, m, v, v_max = (array.astype(np.float64) for array in arrays.values())
    if function == "adam_update":
        g = g + 0.1 * p
    else:
        p = p * (1 - 0.01 * 0.1)
    m = 0.9 * m + (1 - 0.9) * g
    v = 0.99 * v + (1 - 0.99) * g**2
    v_max = np.maximum(v_max, v)
    p = p - 0.01 * m / (1 - 0.9**5) / (np.sqrt(v_max / (1 - 0.99**5)) + 1e-8)
    getattr(kernels, function)(**arrays, step=5, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for name, expected in (("param", p), ("m", m), ("v", v), ("v_max", v_max)):
        np.testing.assert_allclose(arrays[name], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", VARIANTS)
def test_maximize_is_a_step_along_minus_the_gradient(name):
    function, arguments, state = VARIANTS[name]
    up = arrays_for(np.random.default_rng(3), 1001, np.float32, state)
    down = copies(up)
    down["grad"] *= -1
    getattr(kernels, function)(**up, **arguments, maximize=True)
    getattr(kernels, function)(**down, **arguments)
    for key in ("param", *state):
        np.testing.assert_array_equal(up[key], down[key])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_updates_are_the_same_bits_at_any_thread_count(name, dtype, threads):
    function, arguments, state = VARIANTS[name]
    one = arrays_for(np.random.default_rng(4), 200003, dtype, state)
    three = copies(one)
    threads(1)
    getattr(kernels, function)(**one, **arguments)
    threads(3)
    getattr(kernels, function)(**three, **arguments)
    for key in one:
        assert one[key].tobytes() == three[key].tobytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_an_update_is_the_same_bits_wherever_an_element_lies(name):
    # Vectors and the rest of a loop run the same arithmetic: joined and single parameters agree.
    function, arguments, state = VARIANTS[name]
    whole = arrays_for(np.random.default_rng(5), 5000, np.float32, state)
    parts = copies(whole)
    getattr(kernels, function)(**whole, **arguments)
    for start, stop in ((0, 7), (7, 1024), (1024, 4999), (4999, 5000)):
        getattr(kernels, function)(**{key: array[start:stop] for key, array in parts.items()}, **arguments)
    for key in whole:
        assert whole[key].tobytes() == parts[key].tobytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_any_shape_and_a_strided_read_only_gradient(name):
    function, arguments, state = VARIANTS[name]
    arrays = arrays_for(np.random.default_rng(6), (6, 5), np.float32, state)
    expected = copies(arrays)
    arrays["grad"] = np.asfortranarray(arrays["grad"])
    arrays["grad"].flags.writeable = False
    getattr(kernels, function)(**arrays, **arguments)
    getattr(kernels, function)(**expected, **arguments)
    for key in expected:
        np.testing.assert_array_equal(arrays[key], expected[key])


def test_sgd_first_does_not_read_the_buffer():
    param, grad, buffer = np.ones(50), np.arange(50.0), np.full(50, np.nan)
    kernels.sgd_update(param, grad, buffer, lr=0.5, momentum=0.9, dampening=0.5, first=True)
    np.testing.assert_array_equal(buffer, grad)
    np.testing.assert_array_equal(param, 1 - 0.5 * grad)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_do_not_stay_denormal(dtype):
    tiny = np.finfo(dtype).tiny
    param, grad = np.ones(100, dtype), np.zeros(100, dtype)
    m, v, buffer = (np.full(100, tiny * 1.5, dtype) for _ in range(3))
    for step in range(1, 6):
        kernels.adam_update(param, grad, m, v, step=step, lr=1e-3, betas=(0.5, 0.5))
        kernels.sgd_update(param, grad, buffer, lr=1e-3, momentum=0.5)
    assert not m.any() and not v.any() and not buffer.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_nan_in_the_gradient_reaches_parameter_and_state(name):
    function, arguments, state = VARIANTS[name]
    arrays = arrays_for(np.random.default_rng(7), 40, np.float32, state)
    arrays["grad"][21] = np.nan
    getattr(kernels, function)(**arrays, **arguments)
    for key in ("param", *state):
        assert np.isnan(arrays[key][21]) and np.isnan(arrays[key]).sum() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_of_squares(dtype, threads):
    rng = np.random.default_rng(8)
    for size in SIZES:
        x = rng.standard_normal(size).astype(dtype)
        expected = (x.astype(np.float64) ** 2).sum()
        threads(1)
        one = kernels.sum_of_squares(x)
        assert one == pytest.approx(expected, rel=1e-13)
        assert isinstance(one, float)
        threads(3)
        assert kernels.sum_of_squares(x) == one


def test_sum_of_squares_is_taken_in_double():
    assert kernels.sum_of_squares(np.full(3, 1e30, np.float32)) == pytest.approx(3e60, rel=1e-6)
    x = np.full(2**20, 0.1, np.float32)
    assert kernels.sum_of_squares(x) == pytest.approx(2**20 * float(x[0]) ** 2, rel=1e-13)
    assert kernels.sum_of_squares(x.reshape(1024, 1024)[::2, ::2]) == pytest.approx(2**18 * float(x[0]) ** 2)
    assert np.isnan(kernels.sum_of_squares(np.array([1, np.nan, 2], np.float32)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale(dtype, threads):
    for size in SIZES:
        x = np.random.default_rng(9).standard_normal(size).astype(dtype)
        expected = x * dtype(0.37)
        threads(3)
        kernels.scale_(x, 0.37)
        np.testing.assert_array_equal(x, expected)


def test_gap_and_span():
    block = np.zeros(100, np.float32)
    a, b, c = block[:5].reshape(5, 1), block[5:20], block[32:40]
    assert kernels.gap(a, b) == 0
    assert kernels.gap(b, c) == 12
    assert kernels.gap(a, c) == -1  # 27 elements apart
    assert kernels.gap(b, a) == -1
    whole = kernels.span(a, c)
    assert whole.shape == (40,) and whole.base is block
    assert kernels.span(a, a) is a
    assert kernels.gap(a, b.copy()) == -1
    block[25] = 1  # padding that is in use
    assert kernels.gap(b, c) == -1
    assert kernels.gap(block.reshape(10, 10)[:, 0], b) == -1


def bad(**changes):
    arguments = {
        "param": np.ones(4, np.float32), "grad": np.ones(4, np.float32), "m": np.zeros(4, np.float32),
        "v": np.zeros(4, np.float32), "step": 1, "lr": 1e-3,
    }  # fmt: skip
    return {**arguments, **changes}


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad": np.ones(5, np.float32)}, ValueError, r"adamw_update: grad is \(5,\), param is \(4,\)"),
        ({"m": np.ones((2, 2), np.float32)}, ValueError, r"adamw_update: m is \(2, 2\), it must be \(4,\)"),
        ({"grad": np.ones(4)}, TypeError, "adamw_update: grad is float64 but param is float32"),
        ({"v": np.ones(4)}, TypeError, "adamw_update: v is float64, it must be float32"),
        ({"param": np.ones(4, np.int32)}, TypeError, "param is int32, it must be float32 or float64"),
        ({"param": np.ones(8, np.float32)[::2]}, ValueError, "param is strided, it must be C-contiguous"),
        ({"m": read_only(np.ones(4, np.float32))}, ValueError, "m is read-only, it must be writable"),
        ({"v_max": [1.0] * 4}, TypeError, "v_max is list, it must be a NumPy array"),
        ({"lr": float("nan")}, ValueError, "lr is nan, it must be a finite number of at least 0"),
        ({"lr": -1.0}, ValueError, r"lr is -1\.0"),
        ({"eps": -1e-8}, ValueError, "eps is -1e-08"),
        ({"eps": 0.0}, ValueError, r"eps is 0\.0, it must be above 0"),
        ({"betas": (1.0, 0.9)}, ValueError, r"beta1 is 1\.0, it must be below 1"),
        ({"betas": (0.9, -0.1)}, ValueError, r"beta2 is -0\.1"),
        ({"step": 0}, ValueError, "step is 0, it must be at least 1"),
    ],
)
def test_bad_adamw_arguments_change_nothing(changes, error, message):
    arguments = bad(**changes)
    before = {name: np.array(value) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kernels.adamw_update(**arguments)
    for name, value in before.items():
        np.testing.assert_array_equal(value, arguments[name])


def test_overlapping_arrays_are_refused():
    block = np.ones(10, np.float32)
    with pytest.raises(ValueError, match="adamw_update: v overlaps"):
        kernels.adamw_update(**bad(m=block[:4], v=block[3:7]))
    with pytest.raises(ValueError, match="adamw_update: param overlaps"):
        kernels.adamw_update(**bad(param=block[:4], grad=block[2:6]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.sgd_update(x, x.copy(), lr=0.1, momentum=0.9), "momentum_buffer must be an array"),
        (lambda x: kernels.sgd_update(x, x.copy(), x.copy(), lr=0.1), "momentum_buffer must be None"),
        (lambda x: kernels.sgd_update(x, x.copy(), lr=0.1, nesterov=True), "nesterov needs a momentum"),
        (lambda x: kernels.sgd_update(x, x.copy(), lr=0.1, dampening=np.nan), "dampening is nan"),
        (lambda x: kernels.rmsprop_update(x, x.copy(), x.copy(), lr=0.1, alpha=1.0), r"alpha is 1\.0"),
        (lambda x: kernels.rmsprop_update(x, x.copy(), x.copy(), lr=1, momentum=0.5), "momentum_buffer must"),
        (lambda x: kernels.scale_(x[::2], 2.0), "scale_: x is strided"),
        (lambda x: kernels.scale_(read_only(x), 2.0), "scale_: x is read-only"),
    ],
)
def test_bad_arguments_of_the_others(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones(4))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="sum_of_squares: x is int64, it must be float32 or float64"):
        kernels.sum_of_squares(np.arange(3))
    with pytest.raises(TypeError, match="scale_: x is int64"):
        kernels.scale_(np.arange(3), 2.0)


def test_what_must_be_given_is_named():
    x = np.zeros(3, np.float32)
    a, b, c = (x.copy() for _ in range(3))
    with pytest.raises(TypeError, match="adam_update: m is NoneType, it must be a NumPy array"):
        kernels.adam_update(a, x, None, b, step=1, lr=0.1)
    with pytest.raises(TypeError, match="rmsprop_update: v is NoneType, it must be a NumPy array"):
        kernels.rmsprop_update(a, x, None, lr=0.1)
    with pytest.raises(TypeError, match="adam_update: grad is None, it must be float32 or float64"):
        kernels.adam_update(a, None, b, c, step=1, lr=0.1)
    with pytest.raises(TypeError, match=r"adam_update: betas is \(0.9,\), it must be a tuple of two numbers"):
        kernels.adam_update(a, x, b, c, step=1, lr=0.1, betas=(0.9,))
    with pytest.raises(TypeError, match="sgd_update: lr is None, it must be a number"):
        kernels.sgd_update(a, x, lr=None)
    with pytest.raises(TypeError, match="scale_: factor is None, it must be a number"):
        kernels.scale_(a, None)
    with pytest.raises(TypeError, match="sum_of_squares: x is None"):
        kernels.sum_of_squares(None)
    with pytest.raises(ValueError, match="span: first and last must be views of one array"):
        kernels.span(a, b)


def test_an_eps_that_float32_cannot_hold_is_refused():
    """It would become 0, and 0 / 0 where the gradient is 0."""
    x = np.zeros(3, np.float32)
    a, b, c = (x.copy() for _ in range(3))
    with pytest.raises(ValueError, match=r"eps is 1e-50, it must be at least 1\.17[0-9]*e-38 in float32"):
        kernels.adam_update(a, x, b, c, step=1, lr=0.1, eps=1e-50)
    with pytest.raises(ValueError, match=r"eps is 1e-50, it must be at least 1\.17[0-9]*e-38 in float32"):
        kernels.rmsprop_update(a, x, b, lr=0.1, eps=1e-50)
    assert not a.any()
