"""Optimizers: against torch, joined against single parameters, state, skipped parameters, bad arguments."""

import copy
import functools
import inspect
import math

import numpy as np
import pytest

from cllm import kernels, nn, optim
from cllm.errors import InputError
from cllm.tensor import Tensor, is_grad_enabled, no_grad

SHAPES = [(7, 5), (5,), (), (0, 3), (33,), (1,), (40, 3)]
SHAPES_OF = {
    "Adafactor": [(7, 5), (5,), (), (2, 4, 3), (33,), (1,), (40, 3)],  # torch's divides by the size
    "Muon": [(7, 5), (5, 7), (1, 4), (6, 1), (16, 16), (1, 1), (40, 3)],
}

VARIANTS = {
    "SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        {"momentum": 0.8, "nesterov": True, "maximize": True},
    ],
    "Adam": [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}, {"amsgrad": True}],
    "AdamW": [{}, {"weight_decay": 0.3, "amsgrad": True}, {"maximize": True}],
    "RMSprop": [
        {},
        {"alpha": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "eps": 1e-3},
        {"momentum": 0.5, "centered": True, "eps": 1e-2, "maximize": True},
    ],
    "Adagrad": [
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3},
        {"initial_accumulator_value": 0.5, "maximize": True},
    ],
    "Lion": [{}, {"betas": (0.8, 0.9), "weight_decay": 0.2}, {"maximize": True}],
    "Adafactor": [
        {},
        {"weight_decay": 0.1, "beta2_decay": -0.5},
        {"eps": (1e-3, 0.1), "d": 1.5, "maximize": True},
    ],
    "Muon": [
        {},
        {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-4},
    ],
}
CASES = [(name, arguments) for name, variants in VARIANTS.items() for arguments in variants]


class Bag(nn.Module):
    """Parameters of the optimizer's shapes, in one block when flat."""

    def __init__(self, dtype, flat, empty=True, name=None):
        super().__init__()
        rng = np.random.default_rng(0)
        for i, shape in enumerate(SHAPES_OF.get(name, SHAPES)):
            if not empty and 0 in shape:
                continue  # an empty view has no place in a block, so it is never joined
            setattr(self, f"p{i}", nn.Parameter(rng.standard_normal(shape).astype(dtype)))
        if flat:
            self.flatten()


@functools.cache
def gradient(step, i, shape, dtype):
    return np.asarray(np.random.default_rng([step, i]).standard_normal(shape), dtype)


def skipped(step, i):
    return (step * 3 + i) % 7 == 0


def give_gradients(parameters, step, skip=skipped):
    for i, p in enumerate(parameters):
        p.grad = None if skip(step, i) else gradient(step, i, p.shape, p.dtype)


def no_skip(step, i):
    return False


def trained(name, arguments, dtype=np.float32, flat=True, steps=20, skip=skipped):
    parameters = list(Bag(dtype, flat, name=name).parameters())
    optimizer = getattr(optim, name)(parameters, **arguments)
    for step in range(steps):
        give_gradients(parameters, step, skip)
        optimizer.step()
    return parameters, optimizer


def assert_same_bits(parameters, others):
    for p, q in zip(parameters, others, strict=True):
        assert p.data.tobytes() == q.data.tobytes()


def torch_lion(torch):
    """Lion for torch, which has none: program 1 of the paper (Chen et al. 2023), with `maximize`."""

    class Lion(torch.optim.Optimizer):
        def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
            super().__init__(
                params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
            )

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                (beta1, beta2), lr = group["betas"], group["lr"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    g = -p.grad if group["maximize"] else p.grad
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    update = (m * beta1 + g * (1 - beta1)).sign()
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update * lr)
                    m.mul_(beta2).add_(g, alpha=1 - beta2)

    return Lion


def largest_difference_to_torch(torch, name, arguments, dtype, module):
    """Over 200 steps with a decaying lr, two groups, clipping and missing gradients: the largest error of a
    parameter or state array, norm of the difference over norm of torch's."""
    ours = list(Bag(dtype, flat=True, name=name).parameters())
    theirs = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in ours]
    optimizers = []
    for parameters, cls in ((ours, getattr(optim, name)), (theirs, module)):
        groups = [
            {"params": parameters[:4], "lr": 3e-3},
            {"params": parameters[4:], "weight_decay": 0.02},
        ]
        optimizers.append(cls(groups, lr=1e-2, **arguments))
    for step in range(200):
        give_gradients(ours, step)
        for p, q in zip(ours, theirs):
            q.grad = None if p.grad is None else torch.tensor(p.grad)
        optim.clip_grad_norm_(ours, 5.0)
        torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        for optimizer in optimizers:
            for group, lr in zip(optimizer.param_groups, (3e-3, 1e-2)):
                group["lr"] = lr * (1 - step / 250)
            optimizer.step()
    pairs = [(p.data, q.detach().numpy()) for p, q in zip(ours, theirs)]
    state, torch_state = (optimizer.state_dict() for optimizer in optimizers)
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in torch_state["param_groups"]]
    for i, values in torch_state["state"].items():
        # torch's SGD without momentum has a buffer that is None.
        pairs += [(state["state"][i][key], np.asarray(x)) for key, x in values.items() if x is not None]
    assert all(np.shape(a) == np.shape(b) for a, b in pairs)
    return max(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-3) for a, b in pairs)


@pytest.fixture
def torch():
    """torch on one thread: its threads take seconds to meet over products as small as these."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_200_steps_match_torch_with_schedule_groups_clipping_and_skipped_parameters(
    name, arguments, dtype, torch, monkeypatch
):
    if name == "Muon":  # torch runs Newton-Schulz in bfloat16; here it runs in the parameters' own dtype
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    module = torch_lion(torch) if name == "Lion" else getattr(torch.optim, name)
    difference = largest_difference_to_torch(torch, name, arguments, dtype, module)
    assert difference < (2e-5 if dtype == np.float32 else 1e-11)


def test_muon_is_as_close_to_torchs_bfloat16_as_that_allows(torch):
    """bfloat16 has 8 bits: each of the 15 products rounds by up to 0.4 %, and the iteration more than triples
    small singular values, errors included. Seen: 1.8 % of a step; 0.4 % of the weights after 200 steps."""
    rng = np.random.default_rng(0)
    for shape in ((64, 64), (100, 30)):
        start, grad = rng.standard_normal((2, *shape)).astype(np.float32)
        p, q = Tensor(start.copy(), requires_grad=True), torch.nn.Parameter(torch.tensor(start))
        p.grad, q.grad = grad, torch.tensor(grad)
        optim.Muon([p], lr=0.1, weight_decay=0.0).step()
        torch.optim.Muon([q], lr=0.1, weight_decay=0.0).step()
        step = q.detach().numpy() - start
        assert np.linalg.norm(p.data - start - step) < 0.03 * np.linalg.norm(step)
    assert largest_difference_to_torch(torch, "Muon", {}, np.float32, torch.optim.Muon) < 0.01


@pytest.mark.parametrize("name", VARIANTS)
def test_constructors_have_torchs_arguments_and_defaults(name, torch):
    if name == "Lion":
        pytest.skip("torch has none")
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    own = {"betas"} if name == "Muon" else set()  # of its groups for AdamW
    for key in ours.keys() - own:
        assert ours[key].default == theirs[key].default, key
    positional = [key for key, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_joined_and_loose_parameters_get_the_same_bits(name, arguments, dtype):
    flat, _ = trained(name, arguments, dtype, flat=True)
    loose, _ = trained(name, arguments, dtype, flat=False)
    assert_same_bits(flat, loose)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_threads_do_not_change_bits(name, arguments):
    rng = np.random.default_rng(1)
    shape = (401, 375) if name in SHAPES_OF else (150001,)
    data, grads = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((3, *shape))
    before, results = kernels.get_num_threads(), []
    try:
        for n in (1, 3):
            kernels.set_num_threads(n)
            p = Tensor(data.copy(), requires_grad=True)
            optimizer = getattr(optim, name)([p], **arguments)
            for grad in grads.astype(np.float32):
                p.grad = grad
                optim.clip_grad_norm_([p], 1.0)
                optimizer.step()
            results.append(p)
    finally:
        kernels.set_num_threads(before)
    assert_same_bits(results[:1], results[1:])


def count_calls(monkeypatch, name):
    calls, kernel = [], getattr(kernels, name)

    def counted(param, *args, **kwargs):
        calls.append(param.size)
        kernel(param, *args, **kwargs)

    monkeypatch.setattr(kernels, name, counted)
    return calls


def test_a_flat_model_is_one_kernel_call(monkeypatch):
    calls = count_calls(monkeypatch, "rmsprop_update")
    model = Bag(np.float32, flat=True, empty=False)
    parameters = list(model.parameters())
    optimizer = optim.RMSprop(parameters)
    for step in range(3):
        for p in parameters:
            p.grad = np.full(p.shape, step + 1, np.float32)
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 3 and calls[0] >= sum(p.numel() for p in parameters)
    ends = calls[0]
    np.testing.assert_array_equal(model.flat_data[ends:], 0)
    # Padding stays zero, so that norms over the whole block are right.
    used = np.zeros(model.flat_data.size, bool)
    start = 0
    for p in parameters:
        used[start : start + p.numel()] = True
        start += -(-p.numel() // 16) * 16
    assert not model.flat_data[~used].any()


def test_calls_split_where_a_gradient_is_missing_and_join_again(monkeypatch):
    calls = count_calls(monkeypatch, "sgd_update")
    parameters = list(Bag(np.float32, flat=True, empty=False).parameters())
    optimizer = optim.SGD(parameters, momentum=0.9)
    counts = []
    # The third time parameter 4 lags behind by a step and needs a call of its own.
    for missing in (None, 4, None):
        for i, p in enumerate(parameters):
            p.grad = None if i == missing else np.ones(p.shape, np.float32)
        optimizer.step()
        counts.append(len(calls))
    assert counts == [1, 3, 6]
    assert optimizer.steps == [3, 3, 3, 3, 2, 3]


def test_adagrads_initial_value_leaves_the_padding_alone(monkeypatch):
    calls = count_calls(monkeypatch, "adagrad_update")
    parameters = list(Bag(np.float32, flat=True, empty=False).parameters())
    optimizer = optim.Adagrad(parameters, initial_accumulator_value=0.5)
    for step in range(2):
        give_gradients(parameters, step, no_skip)
        optimizer.step()
        optimizer._seen = None  # find out again what joins
    assert len(calls) == 2


def test_factored_parameters_and_muons_matrices_come_one_by_one_and_the_rest_joined(monkeypatch):
    calls = count_calls(monkeypatch, "adafactor_update")
    parameters = list(Bag(np.float32, flat=True, name="Adafactor").parameters())
    give_gradients(parameters, 0, no_skip)
    optimizer = optim.Adafactor(parameters)
    optimizer.step()
    assert calls == [p.numel() for p in parameters]
    shapes = {key: array.shape for key, array in optimizer.arrays().items()}
    assert (shapes["row_var.0"], shapes["col_var.0"], shapes["variance.1"]) == ((7, 1), (1, 5), (5,))
    assert (shapes["row_var.3"], shapes["col_var.3"]) == ((2, 4, 1), (2, 1, 3))
    assert "variance.0" not in shapes and "row_var.1" not in shapes
    muon, adamw = count_calls(monkeypatch, "muon_update"), count_calls(monkeypatch, "adamw_update")
    parameters = list(Bag(np.float32, flat=True, name="Muon").parameters())
    give_gradients(parameters, 0, no_skip)
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "muon": False, "eps": 1e-8}]
    optim.Muon(groups).step()
    assert muon == [35, 35, 4] and len(adamw) == 1


def test_muons_other_group_is_adamw():
    ours, theirs = (list(Bag(np.float32, flat=True).parameters()) for _ in range(2))
    arguments = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    muon = optim.Muon([{"params": ours, "muon": False, **arguments}])
    adamw = optim.AdamW(theirs, **arguments)
    for step in range(5):
        for parameters, optimizer in ((ours, muon), (theirs, adamw)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_same_bits(ours, theirs)
    assert muon.arrays().keys() == adamw.arrays().keys()


def test_muon_refuses_what_is_no_matrix_by_its_position():
    p, q = (Tensor(np.ones(shape), requires_grad=True) for shape in ((3, 2), (3,)))
    with pytest.raises(InputError, match=r"params\[1\] is of shape \(3,\), Muon takes matrices; others"):
        optim.Muon([p, q])
    optimizer = optim.Muon([{"params": [p]}, {"params": [q], "muon": False}])
    with pytest.raises(InputError, match=r"params\[0\] is of shape \(3,\)"):
        optimizer.param_groups[1]["muon"] = True
        optimizer.step()
    with pytest.raises(InputError, match="muon is 1, it must be True or False"):
        optim.Muon([{"params": [p], "muon": 1}])


def test_neighbours_whose_padding_is_in_use_are_not_joined():
    block, grads = np.ones(30, np.float32), np.ones(30, np.float32)
    a, b = (Tensor(block[s], requires_grad=True) for s in (slice(0, 10), slice(12, 30)))
    a._grad, b._grad = grads[:10], grads[12:]
    optimizer = optim.SGD([a, b], lr=0.5)
    optimizer.step()
    np.testing.assert_array_equal(block, [0.5] * 10 + [1, 1] + [0.5] * 18)
    optim.clip_grad_norm_([a, b], 0.1)
    assert grads[10] == grads[11] == 1 and grads[0] < 1


def test_a_strided_parameter_stays_where_it_is():
    array = np.arange(12.0).reshape(3, 4)
    p = Tensor(array.T, requires_grad=True)
    q = Tensor(array.T.copy(), requires_grad=True)
    grad = np.random.default_rng(0).standard_normal((4, 3))
    optimizer = optim.AdamW([p, q], lr=0.1)
    for _ in range(3):
        p.grad, q.grad = grad, grad
        optimizer.step()
    np.testing.assert_array_equal(p.data, q.data)
    np.testing.assert_array_equal(array, q.data.T)


def test_new_data_and_mixed_dtypes_are_followed():
    p = Tensor(np.ones(4, np.float32), requires_grad=True)
    q = Tensor(np.ones(4), requires_grad=True)
    optimizer = optim.SGD([p, q], lr=0.5)
    for _ in range(2):
        p.grad, q.grad = np.ones(4), np.ones(4)
        optimizer.step()
    p.data = np.full(4, 9, np.float32)
    optimizer.step()
    np.testing.assert_array_equal(p.data, 8.5)
    np.testing.assert_array_equal(q.data, -0.5)


def test_step_without_any_gradient_changes_nothing():
    parameters = list(Bag(np.float32, flat=True).parameters())
    optimizer = optim.Adam(parameters)
    optimizer.step()
    assert optimizer.steps == [0] * len(SHAPES)
    assert optimizer.state_dict()["state"] == {}
    assert_same_bits(parameters, list(Bag(np.float32, flat=True).parameters()))


def test_zero_grad_forgets():
    p = Tensor(np.ones(4), requires_grad=True)
    p.grad = np.ones(4)
    optim.SGD([p]).zero_grad()
    assert p.grad is None


# Optimizers of one's own -----------------------------------------------------------------------------


class SignSGD(optim.Optimizer):
    """As `Optimizer`'s docstring has it."""

    elementwise = True

    def __init__(self, params, lr=1e-4, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def state_names(self, group):
        return ("momentum_buffer",)

    def update(self, group, param, grad, step, state):
        mean = state["momentum_buffer"]
        mean += (1 - group["momentum"]) * (grad - mean)
        param -= group["lr"] * np.sign(mean)


class NormSGD(optim.Optimizer):
    """Steps of one length for each parameter; state of its own shape; a rule and a check of its own."""

    rules = {**optim.Optimizer.rules, "floor": (lambda value: value > 0, "above 0")}  # noqa: RUF012

    def __init__(self, params, lr=0.1, floor=1e-8):
        super().__init__(params, locals())

    def state_names(self, group):
        return ("norm", "start")

    def new_state(self, group, param):
        return {"norm": np.full((), 5.0, param.dtype), "start": param.copy()}

    def update(self, group, param, grad, step, state):
        state["norm"][...] = max(np.linalg.norm(grad), group["floor"])
        param -= group["lr"] * grad / state["norm"]


def test_an_elementwise_optimizer_of_ones_own_gets_one_flat_array_and_the_same_bits_as_loose():
    results = []
    for flat in (True, False):
        seen = []

        class Seen(SignSGD):
            def update(self, group, param, grad, step, state, seen=seen):
                seen.append((param.ndim, step))
                super().update(group, param, grad, step, state)

        parameters = list(Bag(np.float32, flat, empty=False).parameters())
        optimizer = Seen(parameters, lr=0.01)
        for step in range(3):
            give_gradients(parameters, step, no_skip)
            optimizer.step()
        results.append(parameters)
        assert len(seen) == (3 if flat else 18) and seen[-1][1] == 3
    assert_same_bits(*results)


@pytest.mark.parametrize("cls", [SignSGD, NormSGD])
def test_an_optimizer_of_ones_own_is_restored(cls):
    parameters = list(Bag(np.float32, flat=True).parameters())
    optimizer = cls(parameters)
    for step in range(6):
        if step == 3:
            others = twin_of(parameters, False)
            other = cls(others)
            other.load_arrays({key: array.copy() for key, array in optimizer.arrays().items()})
        give_gradients(parameters, step, no_skip)
        optimizer.step()
        if step >= 3:
            give_gradients(others, step, no_skip)
            other.step()
    assert_same_bits(parameters, others)
    for key, array in optimizer.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[key])


def test_an_optimizer_of_ones_own_comes_parameter_by_parameter_unless_it_says_elementwise():
    start = list(Bag(np.float64, flat=True).parameters())
    parameters = list(Bag(np.float64, flat=True).parameters())
    optimizer = NormSGD(parameters, lr=0.25)
    assert optimizer.defaults == {"lr": 0.25, "floor": 1e-8}
    give_gradients(parameters, 0, no_skip)
    optimizer.step()
    for i, (p, q) in enumerate(zip(parameters, start)):
        if p.numel():
            assert np.linalg.norm(p.data - q.data) == pytest.approx(0.25)
        state = optimizer.state_dict()["state"][i]
        assert state["norm"] == pytest.approx(max(np.linalg.norm(p.grad), 1e-8))
        np.testing.assert_array_equal(state["start"], q.data)
    with pytest.raises(InputError, match="floor is 0, it must be above 0"):
        NormSGD(parameters, floor=0)
    with pytest.raises(InputError, match="lr is -1, it must be a finite number of at least 0"):
        NormSGD(parameters, lr=-1)
    with pytest.raises(InputError, match="NormSGD has no argument beta, it takes lr, floor"):
        NormSGD([{"params": parameters, "beta": 1}])


def test_an_optimizer_without_a_rule():
    p = Tensor(np.ones(3), requires_grad=True)
    optimizer = optim.Optimizer([p], {"lr": 0.1})
    p.grad = np.ones(3)
    with pytest.raises(NotImplementedError, match=r"Optimizer must define update\(group, param, grad"):
        optimizer.step()


# State -----------------------------------------------------------------------------------------------


def twin_of(parameters, flat, name=None):
    others = list(Bag(np.float32, flat, name=name).parameters())
    for p, q in zip(parameters, others):
        q.data[...] = p.data
    return others


@pytest.mark.parametrize("way", ["state_dict", "arrays"])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_restored_optimizer_continues_with_the_same_bits(name, arguments, flat, way):
    # Parameter 6 has never had a gradient when the state is taken.
    def skip(step, i):
        return skipped(step, i) or (i == 6 and step < 12)

    parameters, optimizer = trained(name, arguments, steps=10, skip=skip)
    others = twin_of(parameters, flat, name)
    other = getattr(optim, name)(others, **arguments)
    if way == "arrays":
        arrays = {key: array.copy() for key, array in optimizer.arrays().items()}
        assert "step" in arrays and not any(key.endswith(".6") for key in arrays)
        assert all(array.flags.c_contiguous for array in arrays.values())
        other.load_arrays(arrays)
    else:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.steps == optimizer.steps
    for step in range(10, 20):
        give_gradients(parameters, step, skip)
        give_gradients(others, step, skip)
        optimizer.step()
        other.step()
    assert_same_bits(parameters, others)


def test_an_option_switched_on_and_off_brings_and_keeps_its_state():
    p = Tensor(np.ones(3), requires_grad=True)
    optimizer = optim.Adam([p])
    for amsgrad in (False, True, False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        p.grad = np.ones(3)
        optimizer.step()
        assert ("max_exp_avg_sq.0" in optimizer.arrays()) == amsgrad
    assert optimizer.steps == [4]


def test_loading_brings_hyperparameters_and_copies():
    parameters, optimizer = trained("AdamW", {"lr": 0.25, "betas": (0.5, 0.6), "amsgrad": True})
    other = optim.AdamW(twin_of(parameters, True))
    state = optimizer.state_dict()
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["amsgrad"]) == (0.25, (0.5, 0.6), True)
    assert group["params"][0] is not parameters[0]
    mine = other.state_dict()["state"][0]["exp_avg"]
    np.testing.assert_array_equal(mine, state["state"][0]["exp_avg"])
    assert not np.shares_memory(mine, state["state"][0]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())  # its own state
    np.testing.assert_array_equal(optimizer.state_dict()["state"][0]["exp_avg"], mine)


def test_state_of_another_kind_is_refused_and_changes_nothing():
    parameters, optimizer = trained("AdamW", {})
    before = copy.deepcopy(optimizer.arrays())
    arrays = optimizer.arrays()
    short = optim.AdamW(parameters[:2])
    sgd = optim.SGD(parameters, momentum=0.9)
    for call, message in (
        (lambda: short.load_arrays(arrays), "the state is of 7 parameters, the optimizer has 2"),
        (lambda: short.load_state_dict(optimizer.state_dict()), r"groups of \[7\] parameters.*has \[2\]"),
        (lambda: sgd.load_arrays(arrays), "the state of parameter 0 is exp_avg, exp_avg_sq, SGD needs mom"),
        (
            lambda: optimizer.load_arrays({k: v for k, v in arrays.items() if k != "exp_avg.1"}),
            "the state of parameter 1 is exp_avg_sq, AdamW needs exp_avg, exp_avg_sq",
        ),
        (
            lambda: optimizer.load_arrays({**arrays, "exp_avg.1": np.zeros(4, np.float32)}),
            r"exp_avg.1 is float32 of shape \(4,\), it must be float32 of shape \(5,\)",
        ),
        (lambda: optimizer.load_arrays({**arrays, "exp_avg.9": np.zeros(4)}), "exp_avg.9, which belongs"),
        (lambda: optimizer.load_arrays({}), "the state is of 0 parameters"),
        (lambda: optimizer.load_state_dict({}), 'the state has no "state", it must be what state_dict'),
        (lambda: optimizer.load_state_dict({"state": {}}), 'the state has no "param_groups"'),
        (lambda: optimizer.load_state_dict(None), 'the state has no "state"'),
    ):
        with pytest.raises(InputError, match=message):
            call()
    after = optimizer.arrays()
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(array, after[key])


# Arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SGD", {"lr": math.nan}, "lr is nan, it must be a finite number of at least 0"),
        ("SGD", {"lr": -1.0}, r"lr is -1\.0"),
        ("SGD", {"lr": "fast"}, "lr is 'fast'"),
        ("SGD", {"lr": True}, "lr is True"),
        ("SGD", {"lr": math.inf}, "lr is inf"),
        ("SGD", {"momentum": -0.1}, r"momentum is -0\.1"),
        ("SGD", {"dampening": math.nan}, "dampening is nan, it must be a finite number"),
        ("SGD", {"nesterov": True}, "nesterov needs a momentum above 0 and a dampening of 0, got momentum 0"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"and dampening 0\.1"),
        ("SGD", {"nesterov": 1, "momentum": 0.9}, "nesterov is 1, it must be True or False"),
        ("Adam", {"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\), it must be two numbers in \[0, 1\)"),
        ("Adam", {"betas": (-0.1, 0.9)}, "betas is"),
        ("Adam", {"betas": (math.nan, 0.9)}, "betas is"),
        ("Adam", {"betas": 0.9}, r"betas is 0\.9, it must be two numbers"),
        ("Adam", {"eps": 0.0}, r"eps is 0\.0, it must be a finite number above 0"),
        ("AdamW", {"eps": -1e-8}, "eps is -1e-08"),
        ("AdamW", {"weight_decay": math.nan}, "weight_decay is nan"),
        ("RMSprop", {"alpha": 1.0}, r"alpha is 1\.0, it must be a number in \[0, 1\)"),
        ("RMSprop", {"centered": None}, "centered is None"),
        ("Adagrad", {"lr_decay": -1}, "lr_decay is -1, it must be a finite number of at least 0"),
        ("Adagrad", {"initial_accumulator_value": -0.1}, r"initial_accumulator_value is -0\.1"),
        ("Lion", {"betas": (0.9, 1)}, r"betas is \(0\.9, 1\), it must be two numbers in \[0, 1\)"),
        ("Adafactor", {"beta2_decay": 0.8}, r"beta2_decay is 0\.8, it must be a finite number of at most 0"),
        ("Adafactor", {"d": 0.5}, r"d is 0\.5, it must be a finite number of at least 1"),
        ("Adafactor", {"eps": 1e-3}, r"eps is 0\.001, it must be two finite numbers of at least 0, of which"),
        ("Adafactor", {"eps": (1e-3, None)}, r"eps is \(0\.001, None\)"),
        ("Muon", {"momentum": 1.0}, r"momentum is 1\.0, it must be a number in \[0, 1\)"),
        ("Muon", {"ns_coefficients": (1, 2)}, r"ns_coefficients is \(1, 2\), it must be three finite numb"),
        ("Muon", {"ns_steps": 2.5}, r"ns_steps is 2\.5, it must be an integer from 0 to 99"),
        ("Muon", {"ns_steps": math.nan}, "ns_steps is nan"),
        ("Muon", {"ns_steps": 100}, "ns_steps is 100"),
        ("Muon", {"adjust_lr_fn": "rms"}, 'adjust_lr_fn is \'rms\', it must be None, "original" or "match_r'),
    ],
)
def test_bad_hyperparameters(name, arguments, message):
    shape = (3, 3) if name == "Muon" else 3
    p = Tensor(np.ones(shape), requires_grad=True)
    with pytest.raises(InputError, match=message):
        getattr(optim, name)([p], **arguments)
    with pytest.raises(InputError, match=message):
        getattr(optim, name)([{"params": [p], **arguments}])
    optimizer = getattr(optim, name)([p])
    optimizer.param_groups[0].update(arguments)
    p.grad = np.ones(shape)
    with pytest.raises(InputError, match=message):
        optimizer.step()
    np.testing.assert_array_equal(p.data, 1)


def test_zero_grad_may_fill_with_zeros():
    p, q = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([p, q])
    p.grad = np.ones(3)
    before = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is before and p.grad.tolist() == [0, 0, 0] and q.grad is None
    optimizer.zero_grad(set_to_none=True)
    assert p.grad is None


def test_a_closure_runs_with_gradients_on_and_gives_the_loss():
    p = Tensor(np.full(2, 3.0), requires_grad=True)
    optimizer = optim.SGD([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with no_grad():
        assert optimizer.step(closure).item() == 18.0 and not is_grad_enabled()
    assert p.data.tolist() == [0, 0] and optimizer.step() is None


def test_named_parameters_and_the_state_of_each_are_torchs():
    torch = pytest.importorskip("torch")
    layer, twin = nn.Linear(2, 3), torch.nn.Linear(2, 3)
    ours, theirs = optim.AdamW(layer.named_parameters()), torch.optim.AdamW(twin.named_parameters())
    names = ours.param_groups[0]["param_names"]
    assert names == theirs.param_groups[0]["param_names"] == ["weight", "bias"]
    assert len(ours.state) == len(theirs.state) == 0
    layer(np.ones((1, 2), np.float32)).sum().backward()
    twin(torch.ones(1, 2)).sum().backward()
    ours.step()
    theirs.step()
    assert list(ours.state) == list(layer.parameters()) and ours.state[layer.bias]["step"] == 1
    for name in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_allclose(ours.state[layer.weight][name], theirs.state[twin.weight][name], rtol=1e-6)
    with pytest.raises(TypeError):
        ours.state[layer.bias] = {}
    again = optim.AdamW([{"params": layer.named_parameters()}])
    again.load_state_dict(ours.state_dict())
    assert again.state[layer.bias]["step"] == 1


def test_bad_parameters():
    p = Tensor(np.ones(3), requires_grad=True)
    for params, message in (
        ([], "params is empty"),
        ([p, p], r"params\[1\] of shape \(3,\) is given twice"),
        ([{"params": [p]}, {"params": [p]}], r"params\[0\] of shape \(3,\) is given twice"),
        ([np.ones(3)], r"params\[0\] is a ndarray, it must be a cllm.Tensor"),
        ([("weight", p, p)], r"params\[0\] is a tuple"),
        ([("weight", p), Tensor(np.ones(2))], "1 of 2 parameters are named, it must be all or none"),
        ([p * 2], r"params\[0\] is the result of an operation, it must be a leaf"),
        ([{"params": [p], "momentun": 0.9}], r'SGD has no argument momentun \(did you mean "momentum"\?\)'),
        ([{"lr": 0.1}], 'a parameter group must be a dict with the key "params"'),
    ):
        with pytest.raises(InputError, match=message):
            optim.SGD(params)


def test_one_tensor_and_a_generator_are_accepted():
    p, q = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    for params in (p, (x for x in (p, q)), [{"params": p}, {"params": iter([q])}]):
        optimizer = optim.SGD(params, lr=0.5)
        p.data[...], q.data[...] = 1, 1
        p.grad = np.ones(3)
        optimizer.step()
        np.testing.assert_array_equal(p.data, 0.5)


def test_a_group_added_later_trains():
    p, q = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    optimizer = optim.Adam([p], lr=0.1)
    p.grad, q.grad = np.ones(3), np.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 0.2})
    optimizer.step()
    assert optimizer.steps == [2, 1]
    np.testing.assert_allclose(p.data, 0.8, rtol=1e-6)
    np.testing.assert_allclose(q.data, 0.8, rtol=1e-6)
