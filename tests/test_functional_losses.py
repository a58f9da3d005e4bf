"""Losses of cllm.functional: gradients, parity with torch, masks, counts and splits, errors."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_refuses, error, values

import cllm
from cllm import Tensor, nn
from cllm import functional as F
from cllm.errors import InputError
from cllm.tensor import Parameter

TOKENS = np.array([[0, 3, 3], [1, 4, 0]])
TARGETS = np.array([2, 0, -100, 4, 1])
MASK = np.array([True, True, True, False, True])
WEIGHT = np.array([0.5, 1.0, 2.0, 0.1, 1.5])
ALL = {"label_smoothing": 0.2, "z_loss": 0.1, "weight": WEIGHT}
DTYPES = [np.float32, np.float64]


def inputs_of(*shapes):
    return [Tensor(values(*shape, seed=i), requires_grad=True) for i, shape in enumerate(shapes)]


def linear_options(**options):
    if "weight" in options:
        options["class_weight"] = options.pop("weight")
    return options


GRADIENTS = {
    "classes": (lambda x: F.cross_entropy(x, TARGETS, mask=MASK, **ALL), [(5, 5)]),
    "classes sum": (lambda x: F.cross_entropy(x, TARGETS, reduction="sum", z_loss=0.5), [(5, 5)]),
    "classes none": (lambda x: F.cross_entropy(x, TARGETS, reduction="none", **ALL), [(5, 5)]),
    "classes of images": (lambda x: F.cross_entropy(x, TOKENS, mask=TOKENS > 0, **ALL), [(2, 5, 3)]),
    "one class": (lambda x: F.cross_entropy(x, [0, 0, 0], z_loss=0.1), [(3, 1)]),
    "one row": (lambda x: F.cross_entropy(x, np.array(3), **ALL), [(5,)]),
    "probabilities": (F.cross_entropy, [(4, 5), (4, 5)]),
    "probabilities all": (lambda x, q: F.cross_entropy(x, q, mask=MASK[:4], **ALL), [(4, 5), (4, 5)]),
    "probabilities sum": (lambda x, q: F.cross_entropy(x, q, reduction="sum", **ALL), [(4, 5), (4, 5)]),
    "probabilities of images": (
        lambda x, q: F.cross_entropy(x, q, reduction="none", mask=TOKENS > 0, **ALL),
        [(2, 5, 3), (2, 5, 3)],
    ),
    "probabilities of one row": (lambda x, q: F.cross_entropy(x, q, **ALL), [(5,), (5,)]),
    "linear": (
        lambda x, w: F.linear_cross_entropy(x, w, TOKENS, mask=TOKENS != 3, **linear_options(**ALL)),
        [(2, 3, 4), (5, 4)],
    ),
    "linear none": (
        lambda x, w: F.linear_cross_entropy(x, w, TARGETS, reduction="none", **linear_options(**ALL)),
        [(5, 4), (5, 4)],
    ),
    "mse": (F.mse_loss, [(3, 4), (3, 4)]),
    "l1": (lambda x, y: F.l1_loss(x, y, "sum"), [(3, 4), (3, 4)]),
    "smooth l1": (lambda x, y: F.smooth_l1_loss(x, y, "none", beta=0.7), [(3, 4), (3, 4)]),
    "huber": (lambda x, y: F.huber_loss(x, y, delta=0.7), [(3, 4), (3, 4)]),
    "binary": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, WEIGHT[:4], pos_weight=WEIGHT[1:]),
        [(3, 4), (3, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name):
    call, shapes = GRADIENTS[name]
    assert cllm.gradcheck(call, inputs_of(*shapes))


# Against torch ---------------------------------------------------------------------------------------


def torch_pair(dtype, *arrays):
    """The arrays as Tensors of ours and of torch's, all of which require gradients."""
    torch = pytest.importorskip("torch")
    arrays = [array.astype(dtype) for array in arrays]
    return (
        [Tensor(array, requires_grad=True) for array in arrays],
        [torch.tensor(array, requires_grad=True) for array in arrays],
    )


def assert_same(y, z, ours, theirs, dtype):
    """Value, shape and gradients."""
    torch = pytest.importorskip("torch")
    limit = 2e-5 if dtype == np.float32 else 1e-12
    assert tuple(y.shape) == tuple(z.shape)
    assert y.dtype == dtype
    dy = values(*y.shape, seed=9, dtype=dtype)
    y.backward(dy)
    z.backward(torch.tensor(dy))
    assert error(y.data, z.detach().numpy()) < limit
    for x, t in zip(ours, theirs):
        assert x.grad.dtype == dtype
        assert error(x.grad, t.grad.numpy()) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (5,), (2, 5, 3, 2)])
def test_cross_entropy_is_torchs(shape, weight, label_smoothing, reduction, dtype):
    torch = pytest.importorskip("torch")
    rows = shape[:-1] if len(shape) < 3 else (shape[0], *shape[2:])
    target = np.random.default_rng(1).integers(0, 5, rows)
    if target.ndim:
        target.reshape(-1)[1] = 7
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    w = None if weight is None else torch.tensor(weight.astype(dtype))
    ours, theirs = torch_pair(dtype, values(*shape))
    y = F.cross_entropy(ours[0], target, weight=weight, ignore_index=7, **options)
    z = torch.nn.functional.cross_entropy(
        theirs[0], torch.tensor(target), weight=w, ignore_index=7, **options
    )
    assert_same(y, z, ours, theirs, dtype)
    q = np.abs(values(*shape, seed=2))  # probabilities need not add up to 1
    ours, theirs = torch_pair(dtype, values(*shape), q)
    y = F.cross_entropy(*ours, weight=weight, **options)
    z = torch.nn.functional.cross_entropy(*theirs, weight=w, **options)
    assert_same(y, z, ours, theirs, dtype)
    array = F.cross_entropy(ours[0], q.astype(dtype), weight=weight, **options)
    assert array.data.tobytes() == y.data.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shapes", [[(3, 4), (3, 4)], [(3, 4), (4,)], [(3, 1), (2, 1, 4)], [(0, 4), (0, 4)]])
@pytest.mark.parametrize("name, more", [
    ("mse_loss", {}), ("l1_loss", {}), ("smooth_l1_loss", {"beta": 0.5}), ("smooth_l1_loss", {"beta": 0.0}),
    ("huber_loss", {"delta": 0.5}), ("binary_cross_entropy_with_logits", {}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*broadcast", "ignore:.*target size")
def test_elementwise_losses_are_torchs(name, more, shapes, reduction, dtype):
    torch = pytest.importorskip("torch")
    if name.startswith("binary"):
        shapes = [shapes[0]] * 2
    ours, theirs = torch_pair(dtype, *[values(*shape, seed=i) for i, shape in enumerate(shapes)])
    y = getattr(F, name)(*ours, reduction=reduction, **more)
    z = getattr(torch.nn.functional, name)(*theirs, reduction=reduction, **more)
    if y.shape == () and 0 in shapes[0]:
        assert np.isnan(y.item()) == np.isnan(z.item()) == (reduction == "mean")
    else:
        assert_same(y, z, ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_elementwise_losses_take_torchs_weights(name, reduction, dtype):
    torch = pytest.importorskip("torch")
    weight = np.abs(values(3, 4, seed=5)).astype(dtype)
    ours, theirs = torch_pair(dtype, values(3, 4, seed=1), values(3, 4, seed=2))
    y = getattr(F, name)(*ours, reduction=reduction, weight=weight)
    z = getattr(torch.nn.functional, name)(*theirs, reduction=reduction, weight=torch.tensor(weight))
    assert_same(y, z, ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((4,), (3, 1)), ((), (1, 4))])
def test_binary_cross_entropy_takes_torchs_weights(shapes, dtype):
    torch = pytest.importorskip("torch")
    weights = [np.abs(values(*shape, seed=5 + i)).astype(dtype) for i, shape in enumerate(shapes)]
    ours, theirs = torch_pair(dtype, values(3, 4, seed=1), values(3, 4, seed=2))
    y = F.binary_cross_entropy_with_logits(*ours, weights[0], pos_weight=Tensor(weights[1]))
    tensors = [torch.tensor(weight) for weight in weights]
    z = torch.nn.functional.binary_cross_entropy_with_logits(*theirs, tensors[0], pos_weight=tensors[1])
    assert_same(y, z, ours, theirs, dtype)


def test_targets_of_other_kinds():
    """Numbers, integers and mixed float types are what torch makes of them: the wider type."""
    x = Tensor(np.float32([1, 2, 4]), requires_grad=True)
    assert F.mse_loss(x, np.float64([0, 0, 1])).dtype == np.float64
    assert F.mse_loss(x, Tensor(np.float64([0, 0, 1]))).dtype == np.float64
    for target in (np.array([0, 0, 1]), [0, 0, 1], np.array([False, False, True])):
        loss = F.mse_loss(x, target)
        assert loss.dtype == np.float32
        assert abs(loss.item() - 14 / 3) < 1e-6
    with pytest.warns(UserWarning, match=r"mse_loss: input is \(3,\) and target is \(\); they b") as seen:
        assert abs(F.mse_loss(x, 1).item() - 10 / 3) < 1e-6
    assert seen[0].filename == __file__
    frozen, target = Tensor(np.zeros(3)), Tensor(np.ones(3), requires_grad=True)
    F.huber_loss(frozen, target).backward()
    assert error(target.grad, np.full(3, 1 / 3)) < 1e-15


# What counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_when_nothing_counts_the_mean_is_0_with_zero_gradients(smoothing, dtype, recwarn):
    none = np.zeros(3, bool)
    no_weight = np.array([0, 0, 1, 0.5])
    cases = [
        (np.full(3, -100), {}),
        (np.array([1, 0, 3]), {"mask": none}),
        (np.array([1, 0, 1]), {"weight": no_weight}),
        (np.array([1, 3, 1]), {"weight": no_weight, "mask": np.array([True, False, True])}),
        (np.zeros((0,), int), {}),
    ]
    for target, options in cases:
        options = {"label_smoothing": smoothing, "z_loss": 0.1, **options}
        assert F.cross_entropy_count(target, options.get("weight"), mask=options.get("mask")) == 0
        for logits in (values(len(target), 4, dtype=dtype), np.full((len(target), 4), np.nan, dtype)):
            x = Tensor(logits, requires_grad=True)
            loss = F.cross_entropy(x, target, **options)
            loss.backward()
            assert loss.item() == 0
            assert x.grad.shape == x.shape
            assert not x.grad.any()
        x = Tensor(values(len(target), 3, dtype=dtype), requires_grad=True)
        w = Parameter(values(4, 3, dtype=dtype, seed=1))
        loss = F.linear_cross_entropy(x, w, target, **linear_options(**options))
        loss.backward()
        assert loss.item() == 0
        assert x.grad.shape == x.shape
        assert not x.grad.any()
        assert not w.grad.any()
    x = Tensor(np.full((3, 4), np.nan, dtype), requires_grad=True)
    loss = F.cross_entropy(x, np.full((3, 4), 0.25), mask=none)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not recwarn.list


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_comes_from_a_masked_row(reduction, dtype):
    """The same bits whatever the logits and targets of masked rows are; targets may be out of range there."""
    mask = np.array([[True, False, True], [False, True, True]])
    options = {"reduction": reduction, "mask": mask, **ALL}
    logits, q = values(2, 5, 3, dtype=dtype), np.abs(values(2, 5, 3, dtype=dtype, seed=1))
    spoilt, spoilt_q = logits.copy(), q.copy()
    spoilt.transpose(0, 2, 1)[~mask] = np.nan
    spoilt_q.transpose(0, 2, 1)[~mask] = np.inf
    results = []
    for z, probabilities, target in ((logits, q, TOKENS), (spoilt, spoilt_q, np.where(mask, TOKENS, 99))):
        x, y, p = (Tensor(array, requires_grad=True) for array in (z, z, probabilities))
        hard, soft = F.cross_entropy(x, target, **options), F.cross_entropy(y, p, **options)
        hard.backward(np.ones_like(hard.data))
        soft.backward(np.ones_like(soft.data))
        results.append((hard.data, x.grad, soft.data, y.grad, p.grad))
        if reduction == "none":
            assert not hard.data[~mask].any()
            assert not soft.data[~mask].any()
    for before, after in zip(*results):
        assert np.isfinite(after).all()
        assert before.tobytes() == after.tobytes()
    x = values(2, 3, 4, dtype=dtype)
    w = Tensor(values(5, 4, dtype=dtype, seed=1))
    plain = F.linear_cross_entropy(Tensor(x), w, TOKENS, **linear_options(**options))
    x[~mask] = np.nan
    spoilt = F.linear_cross_entropy(Tensor(x), w, np.where(mask, TOKENS, -7), **linear_options(**options))
    assert spoilt.data.tobytes() == plain.data.tobytes()


def test_a_mask_is_an_ignore_index():
    x = values(5, 5)
    for ignore_index in (-100, 3, 0):
        masked = F.cross_entropy(Tensor(x), TARGETS, ignore_index=-100, mask=MASK, **ALL)
        target = np.where((TARGETS == -100) | ~MASK, -100, TARGETS)
        assert masked.item() == F.cross_entropy(Tensor(x), target, **ALL).item()
        target = np.where(target == ignore_index, -100, target)
        ignored = F.cross_entropy(Tensor(x), TARGETS % 5, ignore_index=ignore_index, mask=target >= 0, **ALL)
        assert ignored.item() == F.cross_entropy(Tensor(x), target, **ALL).item()
    small = np.array([0, 1, 2, 3, 4], np.uint8)  # an integer type that does not hold the ignore_index
    assert (
        F.cross_entropy(Tensor(x), small, mask=MASK).item()
        == F.cross_entropy(Tensor(x), np.where(MASK, small.astype(int), -100)).item()
    )


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3)])
def test_a_mask_broadcasts_to_the_targets(shape):
    """Of classes, of probabilities, in the count and in front of an output layer."""
    mask = np.asarray(values(*shape, seed=3) > -0.3)
    whole = np.broadcast_to(mask, TOKENS.shape).copy()
    logits, q, w = values(2, 5, 3), np.abs(values(2, 5, 3, seed=1)), values(5, 4)
    for call in (
        lambda mask, x: F.cross_entropy(x, TOKENS, mask=mask, **ALL),
        lambda mask, x: F.cross_entropy(x, q, mask=mask, **ALL),
        lambda mask, x: F.linear_cross_entropy(x[:, :4].transpose(1, 2), Tensor(w), TOKENS, mask=mask),
    ):
        x, y = Tensor(logits, requires_grad=True), Tensor(logits, requires_grad=True)
        found, expected = call(mask, x), call(whole, y)
        assert found.item() == expected.item()
        found.backward()
        expected.backward()
        assert np.array_equal(x.grad, y.grad)
    assert F.cross_entropy_count(TOKENS, mask=mask) == F.cross_entropy_count(TOKENS, mask=whole)


def test_counts():
    assert F.cross_entropy_count(TARGETS) == 4
    assert F.cross_entropy_count(TARGETS, mask=MASK) == 3
    assert F.cross_entropy_count(TARGETS, ignore_index=4, mask=TARGETS >= 0) == 3
    assert abs(F.cross_entropy_count(TARGETS, WEIGHT) - 5) < 1e-15
    assert abs(F.cross_entropy_count(TARGETS, Tensor(WEIGHT), mask=MASK) - 3.5) < 1e-15
    assert F.cross_entropy_count(np.array(3)) == 1
    assert F.cross_entropy_count(np.ones((2, 5, 3)), WEIGHT) == 6
    assert F.cross_entropy_count(Tensor(np.ones((2, 5, 3))), mask=TOKENS == 3) == 2
    assert F.cross_entropy_count(np.ones(5)) == 1
    assert F.cross_entropy_count(np.ones((0, 5))) == 0
    assert isinstance(F.cross_entropy_count(TARGETS), float)
    assert isinstance(F.cross_entropy_count(TARGETS, WEIGHT), float)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_of_a_batch_gives_its_loss_and_gradients(data):
    """Sums of parts over the count of the whole: of classes, of probabilities and of an output layer."""
    n, V = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ignore_index = data.draw(st.sampled_from([-100, 0]))
    target = np.where(rng.random(n) < 0.2, ignore_index, rng.integers(0, V, n))
    mask = data.draw(st.sampled_from([None, rng.random(n) < 0.6]))
    weight = data.draw(st.sampled_from([None, rng.uniform(0, 2, V), np.arange(V) % 2]))
    options = {"label_smoothing": data.draw(st.sampled_from([0.0, 0.1])), "weight": weight}
    options["z_loss"] = data.draw(st.sampled_from([0.0, 1e-2]))
    cuts = np.sort(rng.integers(0, n + 1, data.draw(st.integers(0, 5))))
    parts = np.split(rng.permutation(n), cuts)  # some may be empty
    logits, q = (2 * rng.standard_normal((n, V))).astype(dtype), rng.random((n, V)).astype(dtype)
    x, w = rng.standard_normal((n, 3)).astype(dtype), rng.standard_normal((V, 3)).astype(dtype)
    hard = {"ignore_index": ignore_index}

    def run(rows, reduction, count, table):
        """The losses of these rows over count, and the gradients of what belongs to the rows."""
        part = {"mask": None if mask is None else mask[rows], "reduction": reduction}
        inputs = [Tensor(array[rows], requires_grad=True) for array in (logits, logits, x)]
        losses = [
            F.cross_entropy(inputs[0], target[rows], **part, **hard, **options) * (1 / count[0]),
            F.cross_entropy(inputs[1], q[rows], **part, **options) * (1 / count[1]),
            F.linear_cross_entropy(
                inputs[2], table, target[rows], **part, **hard, **linear_options(**options)
            ) * (1 / count[0]),
        ]  # fmt: skip
        for loss in losses:
            loss.backward()
        return [loss.item() for loss in losses], [tensor.grad for tensor in inputs]

    counts = [
        F.cross_entropy_count(target, weight, ignore_index, mask), F.cross_entropy_count(q, weight, mask=mask)
    ]  # fmt: skip
    wholes, tables = np.zeros((2, 3)), [Parameter(w), Parameter(w.copy())]
    wholes[0], gradients = run(slice(None), "mean", [1, 1], tables[0])
    if 0 in counts:  # nothing to divide by; the mean is 0
        assert not any(np.any(g) for g, count in zip(gradients, (*counts, counts[0])) if count == 0)
        return
    for rows in parts:
        losses, found = run(rows, "sum", counts, tables[1])
        wholes[1] += losses
        for gradient, part in zip(gradients, found):
            gradient[rows] -= part
    limit = 1e-5 if dtype == np.float32 else 1e-12
    assert np.abs(wholes[0] - wholes[1]).max() < limit * max(np.abs(wholes[0]).max(), 1)
    for gradient in gradients:
        assert np.abs(gradient).max(initial=0) < limit
    assert np.abs(tables[0].grad - tables[1].grad).max() < limit


def test_losses_are_summed_in_double():
    """1e8 and 20000 ones: in float32, which steps by 8 there, most of the ones would be lost."""
    x = np.ones(20_001, np.float32)
    x[0] = 1e8
    assert F.l1_loss(Tensor(x), np.zeros_like(x), "sum").item() == np.float32(1e8 + 20_000)
    logits = np.zeros((20_001, 2), np.float32)
    logits[0, 1] = 1e8
    loss = F.cross_entropy(Tensor(logits), np.zeros(20_001, int), reduction="sum").item()
    assert loss == np.float32(1e8 + 20_000 * np.log(2))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_of_logits_is_the_same_each_time(reduction):
    """It is made along with the loss; a second backward pass, and one of a multiple, make it again."""
    found = []
    for factor in (1, 1, 3):
        (x,) = inputs_of((5, 5))
        loss = F.cross_entropy(x, TARGETS, reduction=reduction, mask=MASK, **ALL)
        total = loss if reduction != "none" else loss.sum()
        (total * factor if factor > 1 else total).backward(retain_graph=True)
        found.append(x.grad.copy())
        total.backward()
    first, again, thrice = found
    assert np.array_equal(first, again) and error(thrice, 3 * first) < 1e-14
    assert np.array_equal(x.grad, thrice + first)
    with cllm.no_grad():
        without = F.cross_entropy(x, TARGETS, reduction=reduction, mask=MASK, **ALL)
    assert np.array_equal(without.data, loss.data)


def test_linear_cross_entropy_is_cross_entropy_of_linear():
    x, w = inputs_of((2, 3, 4), (5, 4))
    target = np.array([[0, 1, -100], [4, 4, 2]])
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "mask": target != 1, **ALL}
        fused = F.linear_cross_entropy(x, w, target, **linear_options(**options))
        plain = F.cross_entropy(F.linear(x, w).permute(0, 2, 1), target, **options)
        assert error(fused.data, plain.data) < 1e-12
        grads = []
        for loss in (fused, plain):
            loss.backward(np.ones(loss.shape))
            grads.append((x.grad, w.grad))
            x.grad = w.grad = None
        for a, b in zip(*grads):
            assert error(a, b) < 1e-12


# Gradients of the output layer that are computed with the losses -------------------------------------


class Head(nn.Module):
    """A table and an output layer that share one weight."""

    def __init__(self, channels=4, n_classes=5):
        super().__init__()
        self.weight = Parameter(values(n_classes, channels, dtype=np.float32))
        self.other = Parameter(values(3, dtype=np.float32))
        self.flatten()


def losses_of(head, seed=0, reduction="mean", x=None):
    x = Tensor(values(2, 3, 4, dtype=np.float32, seed=seed)) if x is None else x
    return F.linear_cross_entropy(x, head.weight, TOKENS, reduction=reduction)


def expected_grad(head, *seeds):
    """The sum of the weight's gradients of these losses, by the plain operations."""
    weight = Tensor(head.weight.data.astype(np.float64), requires_grad=True)
    for seed in seeds:
        x = values(6, 4, dtype=np.float32, seed=seed).astype(np.float64)
        F.cross_entropy(F.linear(Tensor(x), weight), TOKENS.reshape(-1)).backward()
    return weight.grad


def close(head, *seeds):
    return error(head.weight.grad, expected_grad(head, *seeds)) < 1e-6


def test_a_parameters_gradient_is_none_until_backward():
    head = Head()
    loss = losses_of(head)
    assert head.weight.grad is None
    loss.backward()
    assert close(head, 0)
    assert head.weight.grad is head.weight._buffer  # where an optimizer looks for it each time
    assert np.shares_memory(head.weight.grad, head.flat_grad)


@pytest.mark.parametrize("interruption", [
    lambda head: losses_of(head, 1),
    lambda head: losses_of(head, 1).backward() or head.zero_grad(),
    lambda head: setattr(head.weight, "grad", np.ones((5, 4))) or head.zero_grad(),
    lambda head: (head.weight * 2.0).sum().backward() or head.zero_grad(),
    lambda head: head.flatten(),
    lambda head: head.zero_grad(),
    lambda head: F.embedding(TOKENS, head.weight).sum().backward() or head.zero_grad(),
    lambda head: F.linear(Tensor(values(3, 4, dtype=np.float32)), head.weight).sum(),
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_comes_between_a_loss_and_its_backward(interruption, reduction):
    """The gradient has the bits of an undisturbed one, whether it was kept or computed again."""
    head, alone = Head(), Head()
    for model, disturb in ((head, interruption), (alone, lambda head: None)):
        x = Tensor(values(2, 3, 4, dtype=np.float32), requires_grad=True)
        loss = losses_of(model, reduction=reduction, x=x) * 0.3
        disturb(model)
        loss.backward()
        model.input_grad = x.grad
    assert np.array_equal(head.weight.grad, alone.weight.grad)
    assert np.array_equal(head.input_grad, alone.input_grad)


def test_losses_that_share_a_head_add_up():
    for order in ((0, 1), (1, 0)):
        head = Head()
        losses = [losses_of(head, seed) for seed in (0, 1)]
        for i in order:
            losses[i].backward()
        assert close(head, 0, 1)
    head = Head()
    (losses_of(head, 0) + losses_of(head, 1)).backward()
    assert close(head, 0, 1)
    head = Head()
    for seed in (0, 1, 2):  # accumulation
        losses_of(head, seed).backward()
    assert close(head, 0, 1, 2)
    head = Head()
    first = losses_of(head, 0)
    head.weight.grad = expected_grad(head, 1)
    first.backward()
    assert close(head, 0, 1)


def test_another_threads_loss_leaves_the_gradient_alone(monkeypatch):
    """Its forward pass may last until after this one's backward pass, which writes to the same place."""
    head = Head()
    both, started, over = cllm.kernels.linear_cross_entropy_both, threading.Event(), threading.Event()

    def slow(*args, **options):
        if threading.current_thread() is other:
            started.set()
            over.wait(0.3)
        return both(*args, **options)

    monkeypatch.setattr(cllm.kernels, "linear_cross_entropy_both", slow)
    other = threading.Thread(target=losses_of, args=(head, 1))
    other.start()
    started.wait(10)
    losses_of(head, 0).backward()
    over.set()
    other.join()
    assert close(head, 0)


@pytest.mark.parametrize("kernel", ["embedding_backward", "scale_"])
def test_a_loss_during_a_backward_pass_leaves_the_gradient_alone(kernel, monkeypatch):
    """As of another thread while a kernel of this one runs."""
    head, alone, original = Head(), Head(), getattr(cllm.kernels, kernel)

    def disturbed(*args, **options):
        result = original(*args, **options)
        losses_of(head, 1)
        return result

    def backward(model):
        loss = F.embedding(TOKENS, model.weight).sum() if kernel != "scale_" else losses_of(model, 0) * 0.3
        loss.backward()

    backward(alone)
    monkeypatch.setattr(cllm.kernels, kernel, disturbed)
    backward(head)
    assert np.array_equal(head.weight.grad, alone.weight.grad)


def test_a_tied_table_adds_to_the_heads_gradient():
    head, plain = Head(), Tensor(Head().weight.data.astype(np.float64), requires_grad=True)
    losses_of(head, x=F.embedding(TOKENS, head.weight)).backward()
    F.cross_entropy(F.linear(F.embedding(TOKENS, plain), plain).reshape(6, 5), TOKENS.reshape(-1)).backward()
    assert error(head.weight.grad, plain.grad) < 1e-6


@pytest.mark.parametrize("make", [Head, lambda: Tensor(values(5, 4, dtype=np.float32), requires_grad=True)])
def test_a_graph_may_be_run_twice(make):
    head = make()
    weight = head.weight if isinstance(head, Head) else head
    for reduction in ("mean", "sum"):
        x = Tensor(values(6, 4, dtype=np.float32), requires_grad=True)
        loss = F.linear_cross_entropy(x, weight, TOKENS.reshape(-1), reduction=reduction)
        loss.backward(retain_graph=True)
        once = x.grad.copy(), weight.grad.copy()
        loss.backward(np.array(2.0, np.float32))
        assert error(x.grad, 3 * once[0]) < 1e-6
        assert error(weight.grad, 3 * once[1]) < 1e-6
        weight.grad = None


def test_a_parameter_without_a_place_and_a_result_as_the_weight():
    x = values(6, 4, dtype=np.float32)
    weight = Parameter(Head().weight.data.copy())
    first, second = (F.linear_cross_entropy(Tensor(x), weight, TOKENS.reshape(-1)) for _ in range(2))
    first.backward()
    once = weight.grad.copy()
    second.backward()  # adds
    assert error(weight.grad, 2 * once) < 1e-6
    leaf = Tensor(weight.data, requires_grad=True)
    F.linear_cross_entropy(Tensor(x), leaf * 1.0, TOKENS.reshape(-1)).backward()
    assert np.array_equal(leaf.grad, once)


def test_frozen_parts_of_the_output_layer():
    head = Head()
    x = Tensor(values(6, 4, dtype=np.float32), requires_grad=True)
    losses_of(head, x=x.reshape(2, 3, 4)).backward()
    dx, dw = x.grad.copy(), head.weight.grad.copy()
    x.grad = None
    head.zero_grad()
    head.flat_grad.fill(7)
    head.weight.requires_grad = False
    losses_of(head, x=x.reshape(2, 3, 4)).backward()
    assert np.array_equal(x.grad, dx)
    assert head.weight.grad is None
    with cllm.no_grad():
        losses_of(head, x=x.reshape(2, 3, 4))
    losses_of(head)
    assert (head.flat_grad == 7).all()
    head.weight.requires_grad = True
    with cllm.no_grad():
        losses_of(head)
    assert (head.flat_grad == 7).all()
    losses_of(head).backward()
    assert np.array_equal(head.weight.grad, dw)
    loss = losses_of(head, x=x.reshape(2, 3, 4))
    head.weight.requires_grad = False
    loss.backward()  # the graph was made before: as everywhere, it still brings the gradient
    assert close(head, 0, 0)


def test_a_loss_has_one_value_with_and_without_gradients():
    x, w = Tensor(values(300, 24, dtype=np.float32), requires_grad=True), values(70, 24, dtype=np.float32)
    target = np.arange(300) % 70
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"class_weight": np.arange(70) % 3}):
        loss = F.linear_cross_entropy(x, w, target, **options)
        with cllm.no_grad():
            assert loss.item() == F.linear_cross_entropy(x, w, target, **options).item()


# Bad input -------------------------------------------------------------------------------------------


def test_errors():
    x, one = Tensor(values(2, 4, 3), requires_grad=True), Tensor(values(1, 4))
    target = np.array([[0, 1, 2], [3, 4, -100]])
    cases = [
        (InputError, "target[1, 1] is 4, it must be in [0, 4) or ignore_index, -100", (x, target), {}),
        (InputError, "target is (3, 2), it must be (2, 3)", (x, target.T), {}),
        (InputError, "target[1, 2] is -100, it must be in [0, 4) or ignore_index, 4", (x, target),
         {"ignore_index": 4}),
        (TypeError, "ignore_index is None, it must be an integer", (x, target), {"ignore_index": None}),
        (InputError, "input is a single number, it must be (N, V), (V,) or (N, V, ...)",
         (Tensor(values()), 0), {}),
        (InputError, "input is (2, 0), it must have at least one class", (Tensor(values(2, 0)), [0, 0]), {}),
        (InputError, 'reduction is "max"', (one, [0]), {"reduction": "max"}),
        (InputError, "label_smoothing is 1.5, it must be in [0, 1]", (one, [0]), {"label_smoothing": 1.5}),
        (TypeError, "label_smoothing is '1', it must be a number", (one, [0]), {"label_smoothing": "1"}),
        (InputError, "z_loss is -1, it must be at least 0 and finite", (one, [0]), {"z_loss": -1}),
        (InputError, "weight is (3,), it must be (4,)", (one, [0]), {"weight": np.ones(3)}),
        (InputError, "weight[1] is -1.0, it must be at least 0 and finite", (one, [0]),
         {"weight": [1, -1, 1, 1]}),
        (InputError, "weight requires a gradient, but a loss has none for it: detach it", (one, [0]),
         {"weight": Parameter(np.ones(4))}),
        (InputError, "mask is (2,), it must broadcast to (1,)", (one, [0]), {"mask": [True, False]}),
        (TypeError, "mask is int64, it must be boolean", (one, [0]), {"mask": [1]}),
        (TypeError, "target is bool, it must be an integer array", (one, [True]), {}),
        (TypeError, "target holds floats, it must be an integer array of shape (1,), or probabilities "
         "of input's shape (1, 4)", (one, [0.5]), {}),
        (InputError, "ignore_index is 2, it must be negative where targets are probabilities: mask "
         "leaves out rows of them", (one, np.ones((1, 4))), {"ignore_index": 2}),
        (InputError, "z_loss is -1, it must be at least 0 and finite", (one, np.ones((1, 4))),
         {"z_loss": -1}),
        (InputError, "weight is (3,), it must be (4,)", (one, np.ones((1, 4))), {"weight": np.ones(3)}),
        (InputError, "mask is (2,), it must broadcast to (1,)", (one, np.ones((1, 4))),
         {"mask": [True, False]}),
    ]  # fmt: skip
    for kind, message, arguments, options in cases:
        message = message.replace('"max"', '\'max\', it must be "mean", "sum" or "none"')
        assert_refuses(kind, f"cross_entropy: {message}", F.cross_entropy, *arguments, **options)
    message = "cross_entropy_count: target[1, 1] is 4, it must be in [0, 4) or ignore_index, -100"
    assert_refuses(InputError, message, F.cross_entropy_count, target, np.ones(4))
    message = "cross_entropy_count: weight[0] is nan, it must be at least 0 and finite"
    assert_refuses(InputError, message, F.cross_entropy_count, target, [np.nan, 1])
    message = "cross_entropy_count: mask is (2,), it must broadcast to (2, 3)"
    assert_refuses(InputError, message, F.cross_entropy_count, target, mask=[True] * 2)


def test_errors_of_the_output_layer():
    x, w = Tensor(values(2, 3, 4)), Parameter(values(5, 4))
    call = F.linear_cross_entropy
    message = "linear_cross_entropy: target[0, 2] is -1, it must be in [0, 5) or ignore_index, -100"
    assert_refuses(InputError, message, call, x, w, [[0, 1, -1], [0, 0, 5]])
    message = "linear_cross_entropy: class_weight is (4,), it must be (5,)"
    assert_refuses(InputError, message, call, x, w, TOKENS, class_weight=np.ones(4))
    message = (
        "linear_cross_entropy: input is (2, 3, 4), weight is (5, 3); they must be (..., C) and (V, C) "
        "with V at least 1"
    )
    assert_refuses(InputError, message, call, x, Tensor(values(5, 3)), TOKENS)
    message = "linear_cross_entropy: mask is (3, 2), it must broadcast to (2, 3)"
    assert_refuses(InputError, message, call, x, w, TOKENS, mask=np.ones((3, 2), bool))
    message = "linear_cross_entropy: target is float64, it must be an integer array"
    assert_refuses(TypeError, message, call, x, w, TOKENS.astype(float))


def test_errors_of_elementwise_losses():
    x, y = Tensor(values(3, 4)), values(3, 4)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
        message = f"{name}: input is (3, 4), target is (5,); they must broadcast"
        assert_refuses(InputError, message, getattr(F, name), x, values(5))
        message = f'{name}: reduction is \'x\', it must be "mean", "sum" or "none"'
        assert_refuses(InputError, message, getattr(F, name), x, y, reduction="x")
    message = "mse_loss: target is a NoneType, it must be a Tensor or an array"
    assert_refuses(TypeError, message, F.mse_loss, x, None)
    message = "mse_loss: weight is (4,), it must be input's shape, (3, 4)"
    assert_refuses(InputError, message, F.mse_loss, x, y, weight=np.ones(4))
    message = "smooth_l1_loss: beta is -1, it must be at least 0"
    assert_refuses(InputError, message, F.smooth_l1_loss, x, y, beta=-1)
    message = "huber_loss: delta is None, it must be a number"
    assert_refuses(TypeError, message, F.huber_loss, x, y, delta=None)
    assert_refuses(InputError, "huber_loss: delta is 0, it must be above 0", F.huber_loss, x, y, delta=0)
    name, call = "binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits
    message = f"{name}: target is (4,), it must be input's shape, (3, 4)"
    assert_refuses(InputError, message, call, x, values(4))
    message = f"{name}: pos_weight requires a gradient, but a loss has none for it: detach it"
    assert_refuses(InputError, message, call, x, y, pos_weight=Parameter(np.ones(4)))
    message = "bce_with_logits_forward: weight is (3,), it must broadcast to (3, 4)"
    assert_refuses(InputError, message, call, x, y, weight=np.ones(3))
    for name, option in (("smooth_l1_loss", "beta"), ("huber_loss", "delta")):
        message = f"{name}: {option} is too large for a float"
        assert_refuses(InputError, message, getattr(F, name), x, y, **{option: 10**400})


def test_soft_targets_gradient_takes_scalars_of_any_float_dtype():
    x = Tensor(values(3, 5))
    gradients = []
    for kind in (float, np.float16):
        q = Tensor(np.abs(values(3, 5, seed=1)), requires_grad=True)
        smoothing, z_loss = kind(np.float16(0.1)), kind(np.float16(0.3))
        F.cross_entropy(x, q, label_smoothing=smoothing, z_loss=z_loss).backward()
        gradients.append(q.grad)
    np.testing.assert_array_equal(*gradients)
