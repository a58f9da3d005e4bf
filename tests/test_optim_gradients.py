"""Gradients as a whole: norms and clipping against torch, averaging, statistics, update ratios."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import nn, optim
from cllm.errors import InputError
from cllm.tensor import Tensor

SHAPES = [(7, 5), (5,), (), (0, 3), (33,), (1,), (40, 3)]


class Bag(nn.Module):
    """Parameters of these shapes, in one block when flat."""

    def __init__(self, dtype=np.float32, flat=True, shapes=SHAPES):
        super().__init__()
        rng = np.random.default_rng(0)
        for i, shape in enumerate(shapes):
            setattr(self, f"p{i}", nn.Parameter(np.asarray(rng.standard_normal(shape), dtype)))
        if flat:
            self.flatten()


def gradient(i, shape, dtype):
    return np.asarray(np.random.default_rng([1, i]).standard_normal(shape), dtype)


def give_gradients(parameters, missing=()):
    for i, p in enumerate(parameters):
        p.grad = None if i in missing else gradient(i, p.shape, p.dtype)


# Clipping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm_type", [2.0, 1, 3.5, 0.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clip_grad_norm_against_torch(flat, dtype, norm_type, max_norm):
    torch = pytest.importorskip("torch")
    ours = list(Bag(dtype, flat).parameters())
    theirs = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in ours]
    give_gradients(ours, missing=(2,))
    for p, q in zip(ours, theirs):
        q.grad = None if p.grad is None else torch.tensor(p.grad.copy())
    expected = torch.nn.utils.clip_grad_norm_([q for q in theirs if q.numel()], max_norm, norm_type).item()
    norm = optim.clip_grad_norm_(parameters=(p for p in ours), max_norm=max_norm, norm_type=norm_type)
    assert isinstance(norm, float)
    assert norm == pytest.approx(expected, rel=3e-6)
    for p, q in zip(ours, theirs):
        if p.grad is not None:
            np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=3e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
def test_a_norm_that_is_not_finite_may_raise(value, norm_type):
    p = Tensor(np.ones(3), requires_grad=True)
    p.grad = np.array([1.0, value, 2.0])
    with pytest.raises(RuntimeError, match=f"the norm of the gradients is {value}, it must be finite"):
        optim.clip_grad_norm_(p, 1.0, norm_type, error_if_nonfinite=True)
    assert p.grad[[0, 2]].tolist() == [1, 2]
    np.testing.assert_equal(optim.clip_grad_norm_(p, math.inf, norm_type), value)


def test_clip_grad_norm_of_nan_leaves_the_padding_alone():
    model = Bag()
    parameters = list(model.parameters())
    give_gradients(parameters)
    parameters[1].grad[0] = np.nan
    assert math.isnan(optim.clip_grad_norm_(parameters, 1.0))
    assert all(np.isnan(p.grad).all() for p in parameters)
    assert np.isnan(model.flat_grad).sum() == sum(p.numel() for p in parameters)


def test_clip_grad_norm_only_measures_with_infinity_and_without_gradients():
    p = Tensor(np.ones(4), requires_grad=True)
    assert optim.clip_grad_norm_([p], 1.0) == 0.0
    p.grad = np.full(4, 3.0)
    assert optim.clip_grad_norm_(p, math.inf) == 6.0
    np.testing.assert_array_equal(p.grad, 3.0)


def test_clip_grad_value():
    parameters = list(Bag().parameters())
    give_gradients(parameters)
    optim.clip_grad_value_(parameters, 0.3)
    for i, p in enumerate(parameters):
        np.testing.assert_array_equal(p.grad, np.clip(gradient(i, p.shape, np.float32), -0.3, 0.3))


def test_clip_grad_value_against_torch_and_with_nan():
    torch = pytest.importorskip("torch")
    p, q = Tensor(np.ones(6), requires_grad=True), torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    grad = np.array([np.nan, np.inf, -np.inf, -0.2, 5, -5])
    p.grad, q.grad = grad, torch.tensor(grad)
    optim.clip_grad_value_(p, 0.5)
    torch.nn.utils.clip_grad_value_([q], 0.5)
    np.testing.assert_array_equal(p.grad, q.grad.numpy())
    np.testing.assert_array_equal(p.grad, [np.nan, 0.5, -0.5, -0.2, 0.5, -0.5])


def test_clipping_with_a_norm_that_is_known():
    one, two = list(Bag().parameters()), list(Bag().parameters())
    give_gradients(one)
    give_gradients(two)
    norm = optim.clip_grad_norm_(one, 0.5)
    optim.clip_grads_with_norm_(two, 0.5, norm)
    for p, q in zip(one, two):
        assert p.grad.tobytes() == q.grad.tobytes()


@pytest.mark.parametrize("value", [math.nan, -1.0, "1", None])
def test_bad_clipping(value):
    with pytest.raises(InputError, match="max_norm is"):
        optim.clip_grad_norm_([], value)
    with pytest.raises(InputError, match=r"norm_type is .*, it must be a number above 0"):
        optim.clip_grad_norm_([], 1.0, value)
    with pytest.raises(InputError, match="clip_value is"):
        optim.clip_grad_value_([], value)
    with pytest.raises(InputError, match="max_norm is"):
        optim.clip_grads_with_norm_([], value, 1.0)


# Accumulating and averaging --------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_accumulated_and_averaged_gradients_are_the_mean(flat):
    parameters = list(Bag(np.float64, flat).parameters())
    grads = [[gradient(10 * n + i, p.shape, np.float64) for i, p in enumerate(parameters)] for n in range(3)]
    for part in grads:
        optim.accumulate_grad_(parameters, part)
    optim.average_grad_(parameters, 3)
    for p, *parts in zip(parameters, *grads):
        np.testing.assert_allclose(p.grad, np.mean(parts, axis=0), rtol=1e-14, atol=1e-15)


def test_micro_batches_accumulate_to_the_gradient_of_the_whole():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((12, 3)), Tensor(np.ones(3), requires_grad=True)
    ((Tensor(x) @ w) ** 2).mean().backward()
    whole, w.grad = w.grad.copy(), None
    for part in (x[:5], x[5:6], x[6:]):
        ((Tensor(part) @ w) ** 2).sum().backward()
    optim.average_grad_([w], len(x))
    np.testing.assert_allclose(w.grad, whole, rtol=1e-14)


def test_accumulating_takes_a_copy_and_leaves_out_none():
    p, q = (Tensor(np.ones(2, np.float32), requires_grad=True) for _ in range(2))
    grad = np.full(2, 3.0)
    for _ in range(2):
        optim.accumulate_grad_([p, q], [grad, None])
    np.testing.assert_array_equal(p.grad, 6)
    assert p.grad.dtype == np.float32 and q.grad is None and grad[0] == 3
    optim.average_grad_([q], 2)
    assert q.grad is None


def test_bad_accumulation_changes_nothing():
    p, q = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    with pytest.raises(InputError, match="grads has 1 gradients, there are 2 parameters"):
        optim.accumulate_grad_([p, q], [np.ones(2)])
    with pytest.raises(InputError, match=r"grads\[1\] is of shape \(3,\), the parameter is of \(2,\)"):
        optim.accumulate_grad_([p, q], [np.ones(2), np.ones(3)])
    assert p.grad is None
    for n in (0, -1, math.nan, math.inf, "2", None):
        with pytest.raises(InputError, match=r"n is .*, it must be a finite number above 0"):
            optim.average_grad_([p], n)


# Statistics ------------------------------------------------------------------------------------------


def described(x):
    x = np.asarray(x, np.float64)
    n = max(x.size, 1)
    return {
        "norm": math.sqrt((x**2).sum()), "max": float(np.abs(x).max(initial=0)), "zeros": (x == 0).sum() / n,
        "nonfinite": (~np.isfinite(x)).sum() / n,
    }  # fmt: skip


def assert_same_description(ours, expected):
    assert list(ours) == list(expected)
    for key, value in expected.items():
        assert type(ours[key]) is float
        np.testing.assert_allclose(ours[key], value, rtol=1e-12, err_msg=key)  # NaN equals NaN


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=5), st.booleans(), st.integers(0, 999),
    st.sampled_from([0.0, 1.0, math.nan, math.inf]),
)  # fmt: skip
def test_gradient_statistics(shapes, flat, seed, special):
    model = Bag(np.float32, flat, [tuple(shape) for shape in shapes])
    rng = np.random.default_rng(seed)
    grads = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if i == 1:
            continue  # no gradient
        grad = np.asarray(rng.standard_normal(p.shape), np.float32)
        grad[rng.random(p.shape) < 0.3] = special
        p.grad = grads[name] = grad
    statistics = optim.gradient_statistics(model.named_parameters())
    assert list(statistics) == [*grads, "overall"]
    for name, grad in grads.items():
        assert_same_description(statistics[name], described(grad))
    everything = np.concatenate([np.zeros(0), *(grad.reshape(-1) for grad in grads.values())])
    assert_same_description(statistics["overall"], described(everything))


def test_gradient_statistics_know_the_norm_that_clipping_finds():
    model = Bag(np.float32)
    parameters = list(model.parameters())
    give_gradients(parameters)
    norm = optim.gradient_statistics(model.named_parameters())["overall"]["norm"]
    assert optim.clip_grad_norm_(parameters, math.inf) == pytest.approx(norm, rel=1e-14)


def test_statistics_of_nothing():
    none = {"norm": 0.0, "max": 0.0, "zeros": 0.0, "nonfinite": 0.0}
    assert optim.gradient_statistics([]) == {"overall": none}


@pytest.mark.parametrize("flat", [True, False])
def test_update_ratios(flat):
    model = Bag(np.float32, flat)
    parameters = list(model.parameters())
    model.p1.data[...] = 0  # a bias at its start
    model.p5.data[...] = 0
    give_gradients(parameters, missing=(4, 5))
    before = {name: p.data.astype(np.float64) for name, p in model.named_parameters()}
    optimizer = optim.SGD(parameters, lr=0.1)
    with optim.update_ratios(model.named_parameters()) as ratios:
        assert ratios == {}
        optimizer.step()
    after = {name: p.data.astype(np.float64) for name, p in model.named_parameters()}
    for name in ("p0", "p2", "p6"):
        expected = np.linalg.norm(after[name] - before[name]) / np.linalg.norm(before[name])
        assert ratios[name] == pytest.approx(expected, rel=1e-6)
    assert ratios["p4"] == 0 and ratios["p1"] == math.inf
    assert math.isnan(ratios["p5"]) and math.isnan(ratios["p3"])  # zero stayed zero; nothing there
    whole, change = (np.concatenate([x.reshape(-1) for x in arrays.values()]) for arrays in (
        before, {name: after[name] - before[name] for name in before}
    ))  # fmt: skip
    assert ratios["overall"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(whole), rel=1e-6)
    assert list(ratios) == [*before, "overall"] and all(type(value) is float for value in ratios.values())
