"""Optimizer kernels: float64 formulas, threads bitwise, odd and empty sizes, denormals, bad arguments."""

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_close, assert_refuses, misaligned, strided

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
    "adagrad": (
        "adagrad_update", {"lr": 0.1, "step": 3, "lr_decay": 0.2, "weight_decay": 0.1}, ("accumulator",)
    ),
    "lion": ("lion_update", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}, ("m",)),
}  # fmt: skip


def arrays_for(rng, shape, dtype, names):
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name in ("param", "grad", *names)}
    for name in ("v", "v_max", "accumulator"):
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


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.sampled_from(DTYPES), st.integers(0, 200), st.integers(0, 2**31))
def test_updates_match_the_reference_at_any_size(name, dtype, size, seed):
    function, arguments, state = VARIANTS[name]
    arrays = arrays_for(np.random.default_rng(seed), size, dtype, state)
    expected = copies(arrays, np.float64)
    if function == "sgd_update":
        expected.setdefault("momentum_buffer", None)
    getattr(kernels, function)(**arrays, **arguments)
    getattr(reference, function)(**expected, **arguments)
    for key in ("param", *state):
        assert_close(arrays[key], expected[key], dtype)


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
    m, matrix = np.full(100, tiny * 1.5, dtype), np.ones((10, 10), dtype)
    kernels.lion_update(param, grad, m, lr=1e-3, betas=(0.5, 0.5))
    total, small = np.zeros(100, dtype), np.full(100, np.sqrt(tiny) / 4, dtype)
    kernels.adagrad_update(param, small, total, step=1, lr=1e-3)
    assert not total.any()
    buffer, row, column = (np.full(shape, tiny * 1.5, dtype) for shape in ((10, 10), (10, 1), (1, 10)))
    kernels.muon_update(matrix, np.zeros_like(matrix), buffer, lr=1e-3, momentum=0.5)
    kernels.adafactor_update(matrix, np.zeros_like(matrix), row, column, step=3, lr=1e-3)
    assert not m.any() and not buffer.any() and not row.any() and not column.any()
    assert np.isfinite(matrix).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_subnormals_change_nothing_that_can_be_seen(dtype):
    """Their squares are zero, and no rule divides by the root of that alone."""
    size = np.finfo(dtype).tiny / dtype(8)
    for function, arguments, names in VARIANTS.values():
        arrays = {key: np.zeros(50, dtype) for key in names}
        param = np.ones(50, dtype)
        getattr(kernels, function)(param, np.full(50, size), **arrays, **{**arguments, "weight_decay": 0.0})
        step = arguments["lr"] if function == "lion_update" else 0  # of which the sign is all that counts
        np.testing.assert_allclose(param, 1 - step, rtol=1e-6)
        assert all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_nan_in_the_gradient_reaches_parameter_and_state(name):
    function, arguments, state = VARIANTS[name]
    arrays = arrays_for(np.random.default_rng(7), 40, np.float32, state)
    arrays["grad"][21] = np.nan
    getattr(kernels, function)(**arrays, **arguments)
    for key in ("param", *state):
        assert np.isnan(arrays[key][21]) and np.isnan(arrays[key]).sum() == 1


# Adafactor -------------------------------------------------------------------------------------------


def adafactor_arrays(shape, dtype, seed=0):
    """A parameter, and its state after some steps."""
    rng = np.random.default_rng(seed)
    arrays = {"param": rng.standard_normal(shape)}
    if len(shape) > 1:
        arrays["row_var"] = rng.standard_normal((*shape[:-1], 1)) ** 2
        arrays["col_var"] = rng.standard_normal((*shape[:-2], 1, shape[-1])) ** 2
    else:
        arrays["variance"] = np.square(rng.standard_normal(shape), out=np.empty(shape))
    return copies(arrays, dtype)


ADAFACTOR = {"step": 3, "lr": 0.6, "weight_decay": 0.1, "eps": (1e-7, 1e-3)}
# One row or column; more rows than blocks of them; long rows; matrices in a batch; vectors.
ADAFACTOR_SHAPES = [
    (1, 1), (1, 37), (37, 1), (33, 65), (2011, 3), (5, 9001), (130, 700), (3, 4, 5), (2, 0, 3), (0, 4),
    (4, 0), (), (1,), (0,), (31,), (9000,),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADAFACTOR_SHAPES, ids=str)
def test_adafactor_matches_the_reference(shape, dtype):
    arrays = adafactor_arrays(shape, dtype)
    expected = copies(arrays, np.float64)
    for step in (1, 2, 7):
        grad = np.random.default_rng([1, step]).standard_normal(shape).astype(dtype)
        arguments = {**ADAFACTOR, "step": step, "maximize": step == 2}
        kernels.adafactor_update(grad=grad, **arrays, **arguments)
        reference.adafactor_update(grad=grad.astype(np.float64), **expected, **arguments)
        for key in arrays:
            assert_close(arrays[key], expected[key], dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=0, max_size=3), st.sampled_from(DTYPES), st.integers(1, 50),
    st.floats(1, 3), st.sampled_from([None, 1e-7, 0.0]), st.sampled_from([1e-12, 1.0, 1e6]),
)  # fmt: skip
def test_adafactor_matches_the_reference_at_any_shape(shape, dtype, step, d, eps1, scale):
    arrays = adafactor_arrays(tuple(shape), dtype)
    expected = copies(arrays, np.float64)
    grad = (scale * np.random.default_rng(step).standard_normal(shape)).astype(dtype)
    eps = float(np.finfo(dtype).eps) if eps1 is None else eps1
    kernels.adafactor_update(grad=grad, **arrays, step=step, lr=0.1, d=d, eps=(eps1, 1e-3))
    reference.adafactor_update(
        grad=grad.astype(np.float64), **expected, step=step, lr=0.1, d=d, eps=(eps, 1e-3)
    )
    for key in arrays:
        assert_close(arrays[key], expected[key], dtype)


@pytest.mark.parametrize("shape", [(130, 700), (2011, 50), (10, 9001), (70001,)], ids=str)
def test_adafactor_is_the_same_bits_at_any_thread_count(shape, threads):
    grad = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    results = []
    for n in (1, 2, 3):
        threads(n)
        arrays = adafactor_arrays(shape, np.float32)
        kernels.adafactor_update(grad=grad, **arrays, **ADAFACTOR)
        results.append(b"".join(array.tobytes() for array in arrays.values()))
    assert results[0] == results[1] == results[2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_adafactor_of_wide_matrices_needs_less_memory_than_these():
    program = """
import re
import numpy as np
from cllm import kernels
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1]) * 1024
kernels.set_num_threads(2)
param, grad = np.ones((2, 64, 100_000), np.float32)
state = {"row_var": np.ones((64, 1), np.float32), "col_var": np.ones((1, 100_000), np.float32)}
before = peak()
kernels.adafactor_update(param=param, grad=grad, **state, step=1, lr=0.1)
assert peak() - before < param.nbytes, (peak() - before, param.nbytes)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_adafactor_of_zeros_and_huge_gradients():
    for dtype in DTYPES:
        arrays = adafactor_arrays((4, 5), dtype)
        for array in (arrays["row_var"], arrays["col_var"]):
            array[...] = 0
        before = arrays["param"].copy()
        kernels.adafactor_update(grad=np.zeros((4, 5), dtype), **arrays, step=1, lr=0.1, eps=(0.0, 0.0))
        np.testing.assert_array_equal(arrays["param"], before)  # not 0 / 0
        kernels.adafactor_update(grad=np.full((4, 5), 1e15, dtype), **arrays, step=1, lr=0.1)
        assert np.isfinite(arrays["param"]).all()


@pytest.mark.parametrize("shape", [(6, 40), (40,)], ids=str)
@pytest.mark.parametrize("bad", ["grad", "param"])
def test_nan_reaches_all_of_an_adafactor_parameter(shape, bad):
    """Its update is scaled by the root mean squares of the parameter and of the update."""
    arrays = {**adafactor_arrays(shape, np.float32), "grad": np.ones(shape, np.float32)}
    arrays[bad].reshape(-1)[7] = np.nan
    kernels.adafactor_update(**arrays, **ADAFACTOR)
    assert np.isnan(arrays["param"]).all()
    hit = {"row_var": 1, "col_var": 1, "variance": 1} if bad == "grad" else {}
    for key in ("row_var", "col_var", "variance"):  # the state depends on the gradient alone, place by place
        if key in arrays:
            assert np.isnan(arrays[key]).sum() == hit.get(key, 0)


# Muon ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": False, "weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
     {"adjust_lr_fn": "original", "momentum": 0.0}, {"ns_coefficients": (2, -1.5, 0.5), "ns_steps": 12}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 17), (17, 33), (64, 64), (200, 48)], ids=str)
def test_muon_matches_the_reference(shape, options, dtype):
    rng = np.random.default_rng(0)
    arrays = {"param": rng.standard_normal(shape), "momentum_buffer": 0.1 * rng.standard_normal(shape)}
    arrays = copies(arrays, dtype)
    expected = copies(arrays, np.float64)
    for _ in range(3):
        grad = rng.standard_normal(shape).astype(dtype)
        kernels.muon_update(grad=grad, **arrays, lr=0.1, **options)
        reference.muon_update(grad=grad.astype(np.float64), **expected, lr=0.1, **options)
    for key in arrays:
        assert_close(arrays[key], expected[key], dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 40), st.sampled_from(DTYPES), st.integers(0, 6),
    st.sampled_from([1e-9, 1.0, 1e6]),
)  # fmt: skip
def test_muon_matches_the_reference_at_any_shape(n_rows, n_columns, dtype, ns_steps, scale):
    rng = np.random.default_rng(n_rows)
    param, grad = rng.standard_normal((2, n_rows, n_columns)).astype(dtype)
    grad *= dtype(scale)
    buffer = np.zeros_like(param)
    expected, expected_buffer = param.astype(np.float64), np.zeros(param.shape)
    kernels.muon_update(param, grad, buffer, lr=0.1, ns_steps=ns_steps)
    reference.muon_update(expected, grad.astype(np.float64), expected_buffer, lr=0.1, ns_steps=ns_steps)
    assert_close(param, expected, dtype)
    assert_close(buffer, expected_buffer, dtype)


def test_muon_steps_along_an_orthogonal_matrix():
    """With coefficients that converge: U V^T of the gradient's singular value decomposition."""
    grad = np.random.default_rng(0).standard_normal((12, 7))
    param = np.zeros_like(grad)
    kernels.muon_update(
        param, grad, np.zeros_like(grad), lr=1.0, ns_coefficients=(1.875, -1.25, 0.375), ns_steps=40,
        weight_decay=0.0,
    )  # fmt: skip
    u, _, v = np.linalg.svd(grad, full_matrices=False)
    np.testing.assert_allclose(param, -math.sqrt(12 / 7) * u @ v, atol=1e-12)


def test_muon_is_the_same_bits_at_any_thread_count(threads):
    rng = np.random.default_rng(1)
    param, grad = rng.standard_normal((2, 300, 260)).astype(np.float32)
    results = []
    for n in (1, 2, 3):
        threads(n)
        p, buffer = param.copy(), np.zeros_like(param)
        kernels.muon_update(p, grad, buffer, lr=0.1)
        results.append(p.tobytes() + buffer.tobytes())
    assert results[0] == results[1] == results[2]


def test_muon_without_a_gradient_only_decays_and_nan_fills_the_matrix():
    param, grad, buffer = np.ones((5, 3)), np.zeros((5, 3)), np.zeros((5, 3))
    kernels.muon_update(param, grad, buffer, lr=0.5, weight_decay=0.1)
    np.testing.assert_allclose(param, 0.95, rtol=1e-15)
    grad[1, 2] = np.nan
    kernels.muon_update(param, grad, buffer, lr=0.5)
    assert np.isnan(param).all() and np.isnan(buffer).sum() == 1  # each singular vector depends on all


@pytest.mark.parametrize("name", ["adafactor", "muon", "adagrad", "lion"])
def test_the_gradient_may_be_strided_misaligned_and_read_only(name):
    grad = np.random.default_rng(2).standard_normal((6, 10)).astype(np.float32)
    results = []
    for view in (grad, strided(grad), misaligned(grad), np.asfortranarray(grad)):
        view.flags.writeable = False
        arrays = {"param": np.ones((6, 10), np.float32)}
        arguments = {"lr": 0.1}
        if name == "adafactor":
            arrays |= {"row_var": np.zeros((6, 1), np.float32), "col_var": np.zeros((1, 10), np.float32)}
        else:
            key = {"muon": "momentum_buffer", "adagrad": "accumulator", "lion": "m"}[name]
            arrays[key] = np.zeros((6, 10), np.float32)
        if name in ("adafactor", "adagrad"):
            arguments["step"] = 1
        getattr(kernels, f"{name}_update")(grad=view, **arrays, **arguments)
        results.append([array.tobytes() for array in arrays.values()])
    assert all(result == results[0] for result in results)


# Statistics, scaling, clipping -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9000), st.sampled_from(DTYPES)), max_size=5), st.integers(0, 2**31))
def test_array_statistics(sizes, seed):
    rng = np.random.default_rng(seed)
    arrays = []
    for size, dtype in sizes:
        x = rng.standard_normal(size).astype(dtype)
        x[rng.random(size) < 0.2] = 0
        if size:
            x[rng.integers(size)] = rng.choice([1.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e30])
        arrays.append(x)
    table = kernels.array_statistics(arrays)
    assert table.shape == (len(arrays), 4) and table.dtype == np.float64
    expected = reference.array_statistics(arrays)
    np.testing.assert_array_equal(table[:, 1:], expected[:, 1:])
    np.testing.assert_allclose(table[:, 0], expected[:, 0], rtol=1e-13)
    for x, row in zip(arrays, table):  # one by one or together: the same bits
        assert kernels.array_statistics([x]).tobytes() == row.tobytes()
        one = kernels.sum_of_squares(x)
        assert one == row[0] or np.isnan(one)


def test_array_statistics_of_strided_arrays_and_threads(threads):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((300, 701)).astype(np.float32).T, rng.standard_normal(5), np.float64(3)]
    threads(1)
    one = kernels.array_statistics(arrays)
    threads(3)
    assert kernels.array_statistics(arrays).tobytes() == one.tobytes()
    np.testing.assert_allclose(one, reference.array_statistics(arrays), rtol=1e-13)
    assert kernels.array_statistics([]).shape == (0, 4)


def test_array_statistics_of_large_values_do_not_overflow_in_float32():
    (row,) = kernels.array_statistics([np.full(64, -1e30, np.float32)])
    assert row[0] == pytest.approx(64e60, rel=1e-6) and row[1] == np.float32(1e30) and row[3] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(dtype, threads):
    for size in SIZES:
        x = np.random.default_rng(9).standard_normal(size).astype(dtype)
        if size > 5:
            x[:5] = np.nan, np.inf, -np.inf, -0.0, 0.37
        expected = np.clip(x, dtype(-0.37), dtype(0.37))
        unlimited = x.copy()
        threads(3)
        kernels.clip_(x, 0.37)
        np.testing.assert_array_equal(x, expected)
        kernels.clip_(unlimited, math.inf)
        np.testing.assert_array_equal(np.clip(unlimited, dtype(-0.37), dtype(0.37)), expected)


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


def call_adafactor(**changes):
    """Adafactor's step of a matrix (4, 3), with these arguments changed."""
    arguments = {
        "param": np.ones((4, 3)), "grad": np.ones((4, 3)), "row_var": np.zeros((4, 1)),
        "col_var": np.zeros((1, 3)), "step": 1, "lr": 0.1, **changes,
    }  # fmt: skip
    before = {name: np.array(value) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    try:
        kernels.adafactor_update(**arguments)
    finally:
        for name, value in before.items():
            np.testing.assert_array_equal(value, arguments[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": np.ones(4)}, "grad is (4,), param is (4, 3)"),
        ({"row_var": np.zeros(4)}, "row_var is (4,), it must be (4, 1)"),
        ({"col_var": np.zeros((3, 1))}, "col_var is (3, 1), it must be (1, 3)"),
        ({"variance": np.zeros((4, 3))}, "variance must be None, param has rows and columns"),
        ({"param": np.ones(3), "grad": np.ones(3)}, "row_var must be None, param lacks rows and columns"),
        ({"beta2_decay": 0.1}, "beta2_decay is 0.1, it must be a finite number of at most 0"),
        ({"d": 0.5}, "d is 0.5, it must be at least 1"),
        ({"eps": (-1.0, 1e-3)}, "eps1 is -1.0, it must be a finite number of at least 0"),
        ({"eps": (None, math.inf)}, "eps2 is inf, it must be a finite number of at least 0"),
        ({"step": 0}, "step is 0, it must be at least 1"),
        ({"lr": -0.1}, "lr is -0.1, it must be a finite number of at least 0"),
    ],
    ids=lambda value: "",
)
def test_bad_adafactor_arguments_change_nothing(changes, message):
    assert_refuses(ValueError, f"adafactor_update: {message}", call_adafactor, **changes)


def test_wrong_kinds_of_adafactor_arguments():
    for message, changes in (
        ("row_var is NoneType, it must be a NumPy array", {"row_var": None}),
        ("eps is 0.1, it must be a tuple of two numbers", {"eps": 0.1}),
        ("col_var is float32, it must be float64", {"col_var": np.zeros((1, 3), np.float32)}),
    ):
        assert_refuses(TypeError, f"adafactor_update: {message}", call_adafactor, **changes)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"param": np.ones(3), "grad": np.ones(3), "momentum_buffer": np.ones(3)}, ValueError,
         "param is (3,), it must have two dimensions"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0, it must be below 1"),
        ({"ns_steps": 100}, ValueError, "ns_steps is 100, it must be in [0, 100)"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps is 2.5, it must be an integer"),
        ({"ns_coefficients": (1, 2)}, TypeError, "ns_coefficients is (1, 2), it must be three numbers"),
        ({"ns_coefficients": (1, 2, math.nan)}, ValueError, "ns_coefficients has nan, it must be finite"),
        ({"adjust_lr_fn": "x"}, ValueError,
         'adjust_lr_fn is \'x\', it must be None, "original" or "match_rms_adamw"'),
        ({"adjust_lr_fn": ["original"]}, ValueError,
         'adjust_lr_fn is [\'original\'], it must be None, "original" or "match_rms_adamw"'),
        ({"eps": 0.0}, ValueError, "eps is 0.0, it must be above 0"),
        ({"param": None}, TypeError, "param is None, it must be float32 or float64"),
        ({"momentum_buffer": None}, TypeError, "momentum_buffer is NoneType, it must be a NumPy array"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_bad_muon_arguments(changes, kind, message):
    arrays = {name: np.ones((2, 3)) for name in ("param", "grad", "momentum_buffer")}
    arguments = {**arrays, "lr": 0.1, **changes}
    assert_refuses(kind, f"muon_update: {message}", kernels.muon_update, **arguments)
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], 1)


def test_bad_arguments_of_adagrad_lion_clip_and_statistics():
    x, y, z = np.ones(3), np.ones(3), np.ones(3)
    for message, function, options in (
        ("adagrad_update: lr_decay is -1, it must be a finite number of at least 0", kernels.adagrad_update,
         {"step": 1, "lr": 0.1, "lr_decay": -1}),
        ("adagrad_update: step is 0, it must be at least 1", kernels.adagrad_update, {"step": 0, "lr": 0.1}),
        ("lion_update: beta2 is 1.0, it must be below 1", kernels.lion_update, {"lr": 1, "betas": (0, 1.0)}),
        ("lion_update: weight_decay is nan, it must be a finite number of at least 0", kernels.lion_update,
         {"lr": 0.1, "weight_decay": math.nan}),
    ):  # fmt: skip
        assert_refuses(ValueError, message, function, x, y, z, **options)
    assert_refuses(ValueError, "clip_: limit is -1, it must be at least 0", kernels.clip_, x, -1)
    assert_refuses(ValueError, "clip_: limit is nan, it must be at least 0", kernels.clip_, x, math.nan)
    assert_refuses(TypeError, "clip_: limit is None, it must be a number", kernels.clip_, x, None)
    assert_refuses(TypeError, "array_statistics: arrays[1] is int64, it must be float32 or float64",
                   kernels.array_statistics, [x, np.arange(3)])  # fmt: skip


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


ALL_VARIANTS = {
    **VARIANTS,
    "adafactor": ("adafactor_update", {"lr": 0.01, "step": 3, "eps": (1e-3, 1e-3), "weight_decay": 0.1},
                  ("variance",)),
    "muon": ("muon_update", {"lr": 0.01, "ns_coefficients": (3.4445, -4.775, 2.0315)}, ("momentum_buffer",)),
}  # fmt: skip


def mapped(change, options):
    """The options, each float in them changed."""
    return {
        name: tuple(map(change, value)) if isinstance(value, tuple)
        else change(value) if isinstance(value, float) else value
        for name, value in options.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction])
@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_scalars_of_any_kind_are_used_as_floats(name, kind):
    """In float16 1 - lr * weight_decay is 1, and NumPy's float64 would turn float32 products into float64."""
    function, options, state = ALL_VARIANTS[name]
    shape = (3, 4) if name == "muon" else (12,)
    arrays = arrays_for(np.random.default_rng(0), shape, np.float32, state)
    other = copies(arrays)
    small = mapped(kind, options)
    getattr(kernels, function)(**arrays, **small)
    getattr(kernels, function)(**other, **mapped(float, mapped(kind, options)))
    for key, array in arrays.items():
        assert array.tobytes() == other[key].tobytes()


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_scalars_that_no_float_holds_are_refused_before_anything_is_written(name):
    function, options, state = ALL_VARIANTS[name]
    shape = (3, 4) if name == "muon" else (12,)
    arrays = arrays_for(np.random.default_rng(0), shape, np.float32, state)
    before = copies(arrays)
    for option in ("lr", "weight_decay", *(["step"] if "step" in options else [])):
        message = f"{function}: {option} is too large for a float"
        assert_refuses(
            ValueError, message, getattr(kernels, function), **arrays, **{**options, option: 10**400}
        )
    for key, array in arrays.items():
        assert array.tobytes() == before[key].tobytes()


def test_scaling_and_clipping_refuse_numbers_that_no_float_holds():
    x = np.ones(3, np.float32)
    assert_refuses(ValueError, "scale_: factor is too large for a float", kernels.scale_, x, 10**400)
    assert_refuses(ValueError, "clip_: limit is too large for a float", kernels.clip_, x, 10**400)
    assert (x == 1).all()


def test_subclasses_are_updated_in_place():
    arrays = arrays_for(np.random.default_rng(0), (3, 4), np.float32, ("momentum_buffer",))
    other = copies(arrays)
    kernels.muon_update(**{name: array.view(np.matrix) for name, array in arrays.items()}, lr=0.1)
    kernels.muon_update(**other, lr=0.1)
    for key, array in arrays.items():
        assert array.tobytes() == other[key].tobytes()


def test_neighbours_are_arrays():
    x = np.zeros(8, np.float32)
    for pair in ((None, x), (x, None)):
        with pytest.raises(TypeError, match=r"expected numpy\.ndarray, got NoneType"):
            kernels.gap(*pair)
    assert_refuses(TypeError, "span: first is int, it must be a NumPy array", kernels.span, 3, 4)
    assert_refuses(TypeError, "span: last is NoneType, it must be a NumPy array", kernels.span, x, None)
    matrix = np.zeros((2, 4)).view(np.matrix)
    rows = np.asarray(matrix)
    first, last = rows[0], rows[1]
    if first.base is matrix:
        assert kernels.span(first, last).shape == (8,)
