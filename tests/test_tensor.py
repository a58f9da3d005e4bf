"""Tensor: values and gradients of every operation, against finite differences and torch; the tape."""

import gc
import threading

import numpy as np
import pytest

import cllm
from cllm import Tensor, tensor
from cllm.tensor import GradcheckError, Parameter


def values(*shape, seed=0, low=-2.0, high=2.0):
    return np.random.default_rng(seed).uniform(low, high, shape)


MASK = np.arange(12).reshape(3, 4) % 3 == 0
ROWS = np.array([2, 0, 2, 1])
GATHER = np.array([[0, 3, 3], [1, 1, 0]])

# name: (function of tensors alike in cllm and torch, shapes of its inputs, lowest value of an input)
OPERATIONS = {
    "add": (lambda x, y: x + y, [(3, 4), (3, 4)]),
    "add broadcast": (lambda x, y: x + y, [(2, 3, 4), (3, 1)]),
    "add number": (lambda x: 2 + x + 1.5, [(3, 4)]),
    "sub": (lambda x, y: x - y, [(3, 1), (1, 4)]),
    "rsub": (lambda x: 1.5 - x, [(3, 4)]),
    "neg": (lambda x: -x, [(3,)]),
    "mul": (lambda x, y: x * y, [(3, 4), (4,)]),
    "mul itself": (lambda x: x * x, [(3, 4)]),
    "div": (lambda x, y: x / y, [(3, 4), (3, 1)], 0.5),
    "div number": (lambda x: x / 3, [(3, 4)]),
    "rdiv": (lambda x: 2 / x, [(3, 4)], 0.5),
    "pow": (lambda x: x**3, [(3, 4)]),
    "pow fraction": (lambda x: x**1.7, [(3, 4)], 0.2),
    "pow zero": (lambda x: x**0, [(3, 4)]),
    "pow negative": (lambda x: x**-2, [(3, 4)], 0.5),
    "pow tensor": (lambda x, y: x**y, [(3, 4), (4,)], 0.3),
    "rpow": (lambda x: 2.5**x, [(3, 4)]),
    "matmul": (lambda x, y: x @ y, [(3, 5), (5, 4)]),
    "matmul batch": (lambda x, y: x @ y, [(2, 3, 5), (2, 5, 4)]),
    "matmul fold": (lambda x, y: x @ y, [(2, 3, 5), (5, 4)]),
    "matmul broadcast": (lambda x, y: x @ y, [(2, 1, 3, 5), (4, 5, 2)]),
    "matmul left 2-d": (lambda x, y: x @ y, [(3, 5), (2, 5, 4)]),
    "matmul transposed": (lambda x, y: x @ y.transpose(-1, -2), [(2, 3, 5), (2, 4, 5)]),
    "matmul vectors": (lambda x, y: x @ y, [(5,), (5,)]),
    "matmul vector left": (lambda x, y: x @ y, [(5,), (2, 5, 3)]),
    "matmul vector right": (lambda x, y: x @ y, [(2, 3, 5), (5,)]),
    "exp": (lambda x: x.exp(), [(3, 4)]),
    "log": (lambda x: x.log(), [(3, 4)], 0.1),
    "sqrt": (lambda x: x.sqrt(), [(3, 4)], 0.1),
    "rsqrt": (lambda x: x.rsqrt(), [(3, 4)], 0.1),
    "sin": (lambda x: x.sin(), [(3, 4)]),
    "cos": (lambda x: x.cos(), [(3, 4)]),
    "tanh": (lambda x: x.tanh(), [(3, 4)]),
    "sigmoid": (lambda x: x.sigmoid(), [(3, 4)]),
    "relu": (lambda x: x.relu(), [(3, 4)]),
    "abs": (lambda x: x.abs(), [(3, 4)]),
    "clamp": (lambda x: x.clamp(-0.5, 1.0), [(5, 6)]),
    "clamp low": (lambda x: x.clamp(min=0.1), [(5, 6)]),
    "clamp high": (lambda x: x.clamp(max=0.1), [(5, 6)]),
    "clamp tensors": (lambda x, y, z: x.clamp(y, z), [(5, 6), (6,), (5, 1)]),
    "clamp tensor low": (lambda x, y: x.clamp(min=y), [(5, 6), (5, 6)]),
    "clamp tensor high": (lambda x, y: x.clamp(max=y), [(6,), (5, 6)]),
    "softmax": (lambda x: x.softmax(dim=-1), [(3, 4)]),
    "softmax first": (lambda x: x.softmax(0), [(3, 4)]),
    "log_softmax": (lambda x: x.log_softmax(dim=1), [(3, 4, 2)]),
    "sum": (lambda x: x.sum(), [(3, 4)]),
    "sum dim": (lambda x: x.sum(dim=(0, -1), keepdim=True), [(2, 3, 4)]),
    "mean": (lambda x: x.mean(), [(3, 4)]),
    "mean dim": (lambda x: x.mean(-1, keepdim=True), [(3, 4)]),
    "max": (lambda x: x.max(), [(3, 4)]),
    "max dim": (lambda x: x.max(dim=1)[0], [(3, 4)]),
    "max keepdim": (lambda x: x.max(0, keepdim=True).values, [(3, 4)]),
    "max of two": (lambda x, y: x.max(y), [(3, 4), (4,)]),
    "min of two": (lambda x, y: x.min(other=y), [(3, 1), (3, 4)]),
    "min": (lambda x: x.min(), [(3, 4)]),
    "min dim": (lambda x: x.min(-1).values, [(3, 4)]),
    "var": (lambda x: x.var(), [(3, 4)]),
    "var dim": (lambda x: x.var(dim=-1, keepdim=True), [(3, 4)]),
    "var biased": (lambda x: x.var(1, unbiased=False), [(3, 4)]),
    "var correction": (lambda x: x.var(0, correction=2), [(4, 3)]),
    "cumsum": (lambda x: x.cumsum(1), [(3, 4)]),
    "reshape": (lambda x: x.reshape(2, -1) * 2, [(3, 4)]),
    "view": (lambda x: x.view((4, 3)), [(3, 4)]),
    "reshape shape": (lambda x: x.reshape(shape=(2, 6)), [(3, 4)]),
    "view size": (lambda x: x.view(size=(2, 6)), [(3, 4)]),
    "permute dims": (lambda x: x.permute(dims=(2, 0, 1)), [(2, 3, 4)]),
    "expand size": (lambda x: x.expand(size=(2, 3, 4)), [(3, 1)]),
    "split size": (lambda x: x.split(split_size=3, dim=1)[0], [(2, 7)]),
    "0-d sum": (lambda x: x.sum(0), [()]),
    "0-d mean": (lambda x: x.mean(-1, keepdim=True), [()]),
    "0-d max": (lambda x: x.max(0).values, [()]),
    "0-d min": (lambda x: x.min(-1, keepdim=True).values, [()]),
    "0-d cumsum": (lambda x: x.cumsum(0), [()]),
    "0-d squeeze": (lambda x: x.squeeze(-1), [()]),
    "0-d softmax": (lambda x: x.softmax(0), [()]),
    "0-d log_softmax": (lambda x: x.log_softmax(-1), [()]),
    "flatten": (lambda x: x.flatten(1), [(2, 3, 4)]),
    "contiguous": (lambda x: x.transpose(0, 1).contiguous().view(-1), [(3, 4)]),
    "permute": (lambda x: x.permute(2, 0, 1), [(2, 3, 4)]),
    "transpose": (lambda x: x.transpose(-1, 0), [(2, 3, 4)]),
    "T": (lambda x: x.T, [(2, 3)]),
    "unsqueeze": (lambda x: x.unsqueeze(-1), [(2, 3)]),
    "squeeze": (lambda x: x.squeeze(), [(2, 1, 3, 1)]),
    "squeeze dim": (lambda x: x.squeeze(1), [(2, 1, 3, 1)]),
    "squeeze not one": (lambda x: x.squeeze(0), [(2, 1)]),
    "expand": (lambda x: x.expand(2, -1, 4), [(3, 1)]),
    "split": (lambda x: x.split(3, dim=1)[1] * 2, [(2, 7)]),
    "split sections": (lambda x: x.split([2, 5], dim=-1)[1].exp(), [(2, 7)]),
    "unbind": (lambda x: x.unbind(1)[0] * x.unbind(1)[2], [(2, 3)]),
    "iteration": (lambda x: sum(part * i for i, part in enumerate(x)), [(3, 2)]),
    "chunk": (lambda x: x.chunk(3, dim=-1)[2], [(2, 7)]),
    "slice": (lambda x: x[1:, None, ..., ::2], [(3, 2, 5)]),
    "integer index": (lambda x: x[:, -1], [(3, 4)]),
    "array index": (lambda x: x[ROWS], [(3, 4)]),
    "array and slice": (lambda x: x[1:, ROWS], [(3, 4)]),
    "two arrays": (lambda x: x[ROWS, ROWS], [(3, 4)]),
    "list index": (lambda x: x[[0, 0, 1]], [(3, 4)]),
    "integer and array": (lambda x: x[-1, :, [0, 1, 1]], [(2, 3, 4)]),
    "array and integer": (lambda x: x[[0, 2, 2], ..., 1:, -1], [(3, 2, 4, 2)]),
    "integer between arrays": (lambda x: x[[1, 0], None, 1, :, [0, 2]], [(2, 2, 3, 4)]),
    "nothing to add up": (lambda x, y: x @ y, [(2, 3, 0), (0, 4)]),
}  # fmt: skip


def cllm_only(function, *shapes, low=-2.0):
    return function, list(shapes), low


# Where torch wants its own tensors as arguments, or has another name: value against NumPy below.
OTHERS = {
    "gelu": cllm_only(lambda x: x.gelu(), (3, 4)),
    "gelu tanh": cllm_only(lambda x: x.gelu("tanh"), (3, 4)),
    "silu": cllm_only(lambda x: x.silu(), (3, 4)),
    "cat": cllm_only(lambda x, y: tensor.cat([x, y, x], dim=-1), (2, 3), (2, 1)),
    "stack": cllm_only(lambda x, y: tensor.stack([x, y], dim=1), (2, 3), (2, 3)),
    "where": cllm_only(lambda x, y: tensor.where(MASK, x, y), (3, 4), (4,)),
    "where number": cllm_only(lambda x: tensor.where(MASK, 1.0, x), (3, 1)),
    "masked_fill": cllm_only(lambda x: x.masked_fill(MASK, -3.0), (2, 3, 4)),
    "gather": cllm_only(lambda x: x.gather(1, GATHER), (3, 4)),
    "mask index": cllm_only(lambda x: x[MASK], (3, 4)),
}
EINSUMS = [
    ("bhtd,bhsd->bhts", [(2, 2, 3, 4), (2, 2, 5, 4)]),
    ("ij,jk", [(2, 3), (3, 4)]),
    ("i,j->ij", [(2,), (3,)]),
    ("ij->ji", [(2, 3)]),
    ("ii->i", [(3, 3)]),
    ("ii", [(3, 3)]),
    ("ij,ij->", [(2, 3), (2, 3)]),
    ("...ij,...jk->...ik", [(2, 2, 3), (2, 3, 4)]),
    ("...i,i->...", [(2, 2, 3), (3,)]),
    ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]),
    ("bi,bj->b", [(2, 3), (2, 4)]),
    ("ij,ij->ij", [(2, 3), (1, 3)]),
    ("b i, b j -> b j i", [(2, 3), (2, 4)]),
]


def arrays_of(case):
    _, shapes, *rest = case
    low = rest[0] if rest else -2.0
    return [values(*shape, seed=i, low=low) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", [*OPERATIONS, *OTHERS])
def test_gradients_are_those_of_finite_differences(name):
    case = {**OPERATIONS, **OTHERS}[name]
    assert cllm.gradcheck(case[0], [Tensor(x, requires_grad=True) for x in arrays_of(case)])


@pytest.mark.parametrize("equation, shapes", EINSUMS)
def test_einsum(equation, shapes):
    arrays = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs = [Tensor(x, requires_grad=True) for x in arrays]
    np.testing.assert_allclose(
        tensor.einsum(equation, *inputs).data, np.einsum(equation, *arrays), rtol=1e-12
    )
    assert cllm.gradcheck(lambda *x: tensor.einsum(equation, *x), inputs)


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("ij,jk", [(2, 3)]),
        ("ijk", [(2, 3)]),
        ("ij,jk->ik", [(2, 3), (4, 5)]),
        ("ij->ijj", [(2, 3)]),
        ("i1", [(2, 3)]),
    ],
)
def test_einsum_refuses(equation, shapes):
    with pytest.raises(ValueError, match="einsum"):
        tensor.einsum(equation, *[Tensor(np.ones(shape)) for shape in shapes])


def both(function, arrays, dtype):
    """Values and gradients of a function in cllm and in torch."""
    torch = pytest.importorskip("torch")
    ours = [Tensor(x.astype(dtype), requires_grad=True) for x in arrays]
    theirs = [torch.tensor(x.astype(dtype), requires_grad=True) for x in arrays]
    y, z = function(*ours), function(*theirs)
    assert tuple(y.shape) == tuple(z.shape) and str(y.dtype) == str(z.dtype).removeprefix("torch.")
    weights = values(*y.shape, seed=9).astype(y.dtype)
    y.backward(weights)
    z.backward(torch.tensor(weights))
    return y, z, ours, theirs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_torchs(name, dtype):
    y, z, ours, theirs = both(OPERATIONS[name][0], arrays_of(OPERATIONS[name]), dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == np.float32 else {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(y.data, z.detach().numpy(), **tolerance)
    for x, t in zip(ours, theirs):
        np.testing.assert_allclose(x.grad, t.grad.numpy(), **tolerance)
        assert x.grad.dtype == dtype and x.grad.shape == x.shape


TIES = np.array([[1.0, 3.0, 3.0], [0.0, -1.0, 3.0], [-2.0, -2.0, 0.0]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.max(),
        lambda x: x.min(),
        lambda x: x.max(1).values,
        lambda x: x.min(dim=-1).values,
        lambda x: x.relu(),
        lambda x: x.abs(),
        lambda x: x.clamp(-1.0, 3.0),
        lambda x: x.clamp(min=0.0),
        lambda x: x.clamp(x * 1, x.max()),
        lambda x: x.clamp(x[0], x[2]),
        lambda x: x.max(x.T),
        lambda x: x.min(x[0]),
        lambda x: x.max((x - 3).log()),
        lambda x: x.sqrt(),
        lambda x: x.log(),
        lambda x: 1 / x,
        lambda x: x**0.5,
        lambda x: x**0,
        lambda x: x**x,
        lambda x: 0.0**x,
        lambda x: x.softmax(0),
        lambda x: (x * 1000).sigmoid(),
        lambda x: x[0].var(),
        lambda x: x[:1, 0].var(),
    ],
)
@pytest.mark.filterwarnings("ignore:var")
def test_ties_and_edges_are_torchs(function, recwarn):
    y, z, ours, theirs = both(function, [TIES], np.float64)
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours[0].grad, theirs[0].grad.numpy(), rtol=1e-12)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_argmax_and_dtype_are_torchs():
    torch = pytest.importorskip("torch")
    x, t = Tensor(TIES.astype(np.float32)), torch.tensor(TIES.astype(np.float32))
    for options in ({}, {"dim": 1}, {"dim": -2, "keepdim": True}, {"keepdim": True}):
        np.testing.assert_array_equal(x.argmax(**options), t.argmax(**options).numpy())
    for dim in (None, 0, -1):
        assert Tensor(2.0).argmax(dim, keepdim=True).shape == torch.tensor(2.0).argmax(dim, True).shape == ()
    assert x.sum(dtype=np.float64).dtype == x.mean(0, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="out of bounds"):
        Tensor(2.0).argmax(1)


def test_indices_of_max_are_of_the_first():
    result = Tensor(TIES).max(dim=1)
    assert result.indices.tolist() == [1, 2, 2] and Tensor(TIES).min(dim=1).indices.tolist() == [0, 1, 0]
    assert Tensor(TIES).argmax(-1).tolist() == [1, 2, 2]


def test_softmax_of_a_row_without_finite_values_is_nan_and_silent(recwarn):
    x = Tensor(np.full((2, 3), -np.inf), requires_grad=True)
    assert np.isnan(x.softmax(-1).data).all() and np.isnan(x.log_softmax(-1).data).all() and not recwarn.list


@pytest.mark.parametrize(
    "shape, index", [((3, 4), GATHER), ((3, 4), np.zeros((0, 4), int)), ((3,), np.array([2, 2]))]
)
def test_gather_is_torchs(shape, index):
    torch = pytest.importorskip("torch")
    x = Tensor(values(*shape), requires_grad=True)
    t = torch.tensor(values(*shape), requires_grad=True)
    dim = len(shape) - 1 if index.size else 0
    y, z = x.gather(dim, index), t.gather(dim, torch.tensor(index))
    np.testing.assert_array_equal(y.data, z.detach().numpy())
    y.sum().backward()
    z.sum().backward()
    np.testing.assert_array_equal(x.grad, t.grad.numpy())
    with pytest.raises(IndexError, match=r"must be in \[0, "):
        x.gather(dim, np.full(index.shape if index.size else shape, -1))


def test_repeated_indices_add_their_gradients():
    x = Tensor(np.zeros((4, 2)), requires_grad=True)
    index = np.array([1, 1, 3, 1, -1])
    y = x[index]
    index[:] = 0  # what the caller does with it later must not matter
    y.backward(np.arange(10.0).reshape(5, 2))
    assert x.grad.tolist() == [[0, 0], [8, 11], [0, 0], [12, 14]]


def test_an_integer_array_of_no_axes_is_an_integer_and_an_empty_mask_a_mask():
    x = Tensor(values(2, 3, 4), requires_grad=True)
    assert np.array_equal(x[np.array(1), :, [0, 2]].data, x.data[1][:, [0, 2]])
    empty = Tensor(np.zeros((0, 4)))
    assert empty[empty > 0].shape == (0,) and empty[[]].shape == (0, 4)


def test_split_and_chunk_have_torchs_sizes():
    torch = pytest.importorskip("torch")
    for n in (1, 5, 6, 7):
        x, t = Tensor(np.zeros((n, 2))), torch.zeros(n, 2)
        for k in (1, 2, 3, 4):
            assert [p.shape for p in x.chunk(k)] == [tuple(p.shape) for p in t.chunk(k)]
            assert [p.shape for p in x.split(k)] == [tuple(p.shape) for p in t.split(k)]


# dtypes and operands


def test_numbers_do_not_widen_float32():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    results = [x + 1, 1.5 * x, x / 3, x**2, 2**x, x - np.float64(2), np.sqrt(2.0) * x, x * np.float32(2)]
    results += [x * np.array(2.0), x.mean(), x.sum(), x.var(), x.max(), x.clamp(0, 0.3), x * True]
    for y in [*results, x.masked_fill(x > 0, -np.inf)]:
        assert y.dtype == np.float32 and isinstance(y.data, np.ndarray)
    zero_d = Tensor(np.array(2.0), requires_grad=True)
    (x * zero_d).sum().backward()
    assert (x * zero_d).dtype == np.float32 and zero_d.grad.dtype == np.float64 and zero_d.grad == 4


def test_a_float64_operand_widens_and_each_gradient_has_its_tensors_dtype():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    y = Tensor(np.full(2, 3.0), requires_grad=True)
    z = x * y
    assert z.dtype == np.float64
    z.sum().backward()
    assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64
    assert x.grad.tolist() == [[3, 3], [3, 3]] and y.grad.tolist() == [2, 2]


def test_arrays_are_constants_on_either_side():
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    integers, mask = np.arange(3), np.array([True, False, True])
    for y in (
        integers * x,
        x * integers,
        mask * x,
        integers + x,
        integers - x,
        integers / x,
        np.eye(2, dtype=np.float32) @ x,
    ):
        assert isinstance(y, Tensor) and y.requires_grad and y.dtype == np.float32
    np.testing.assert_array_equal((integers - x).data, [[-1, 0, 1]] * 2)
    (integers * x).sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 1, 2]] * 2)


def test_comparisons_give_boolean_arrays():
    x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
    twos = np.array([2, 2, 2])
    above, equal = [(x > 2), (twos < x), (x > x.mean())], [(x == 2), (twos == x)]
    for masks, expected in ((above, [False, False, True]), (equal, [False, True, False])):
        assert all(isinstance(mask, np.ndarray) and mask.tolist() == expected for mask in masks)
    assert (x >= 2).tolist() == (~(x < 2)).tolist() == [False, True, True]
    assert (x <= 2).tolist() == [True, True, False] and (x != 2).tolist() == [True, False, True]
    assert (x == None) is False and x != "text" and x in {x}  # noqa: E711


@pytest.mark.parametrize(
    "data",
    [
        np.arange(3),
        np.array([True]),
        np.array([1j]),
        np.array(["a"]),
        np.zeros(2, np.float16),
        [1, 2],
        None,
        "x",
    ],
)
def test_other_dtypes_are_refused(data):
    with pytest.raises(TypeError, match="float32 or float64"):
        Tensor(data)


def test_lists_and_numbers_become_float32_and_arrays_are_not_copied():
    assert Tensor([1.0, 2.0]).dtype == np.float32 and Tensor(0.5).shape == ()
    array = np.zeros(3)
    assert Tensor(array).data is array and Tensor(np.float64(2)).dtype == np.float64


@pytest.mark.parametrize(
    "operation, error, message",
    [
        (lambda x: x + np.array(["a"]), TypeError, "float32 or float64"),
        (lambda x: x / [1.0], TypeError, "unsupported operand"),
        (lambda x: x * 1j, TypeError, "unsupported operand"),
        (lambda x: x + np.ones((4, 5)), ValueError, "broadcast"),
        (lambda x: x @ np.ones((2, 2)), ValueError, r"\(2, 3\)"),
        (lambda x: x @ 2.0, TypeError, "unsupported operand"),
        (lambda x: x @ x.sum(), ValueError, "at least one dimension"),
        (lambda x: x.sum(2), IndexError, "out of bounds"),
        (lambda x: x.mean((0, 0)), ValueError, "repeated"),
        (lambda x: x.reshape(4, 2), ValueError, "reshape"),
        (lambda x: x.T.view(6), RuntimeError, "use reshape"),
        (lambda x: x.permute(0), ValueError, "axes"),
        (lambda x: x.expand(4, 3), ValueError, "broadcast"),
        (lambda x: x.split([1, 1], 1), ValueError, "must sum to 3"),
        (lambda x: x.split(0), ValueError, "at least 1"),
        (lambda x: x.chunk(0), ValueError, "at least 1"),
        (lambda x: x.masked_fill(np.ones((2, 3)), 0.0), TypeError, "must be boolean"),
        (lambda x: tensor.where(x > 0, 1.0, 2.0), TypeError, "numpy.where"),
        (lambda x: x.clamp(), ValueError, "at least one"),
        (lambda x: x.max(other="a"), TypeError, "got str, it must be a Tensor or an array"),
        (lambda x: x.sum().sum(1), IndexError, "out of bounds"),
        (lambda x: x.sum().max(1), IndexError, "out of bounds"),
        (lambda x: x.gather(0, np.array([[0.5]])), TypeError, "integer array"),
        (lambda x: x.gather(0, np.array([0])), ValueError, r"the index is \(1,\)"),
        (lambda x: x[np.array([0.5])], TypeError, "index of a tensor"),
        (lambda x: x[x], TypeError, "index of a tensor"),
        (lambda x: x[5], IndexError, "out of bounds"),
        (lambda x: x["a"], TypeError, "index of a tensor"),
        (lambda x: tensor.cat([]), ValueError, "at least one"),
        (lambda x: tensor.stack([x, x.T]), ValueError, "one shape"),
        (lambda x: bool(x), ValueError, "ambiguous"),
        (lambda x: x.item(), ValueError, "size 1"),
        (lambda x: iter(x.sum()), TypeError, "0-d"),
        (lambda x: np.asarray(x), RuntimeError, "off the tape"),
        (lambda x: np.exp(x), TypeError, "ufunc"),
        (lambda x: x.to(np.int64), TypeError, "float32 or float64"),
        (lambda x: x.sum(0).T, ValueError, "no matrix"),
    ],
)
def test_errors(operation, error, message):
    with pytest.raises(error, match=message):
        operation(Tensor(np.ones((2, 3)), requires_grad=True))


def test_small_things():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    assert len(x) == 2 and x.size() == (2, 3) and x.size(-1) == 3 and x.numel() == 6 and x.ndim == 2
    assert x.numpy() is x.data and x.detach().data is x.data and not x.detach().requires_grad
    assert float(x.sum()) == 15.0 and int(x.sum()) == 15 and bool(x.sum())
    assert x.is_leaf and not (x * 2).is_leaf and np.asarray(x.detach()).shape == (2, 3)
    assert "requires_grad=True" in repr(x) and "float64" in repr(x)
    assert np.shares_memory(x.transpose(0, 1).data, x.data) and x.contiguous() is x


# The tape


def test_a_reused_tensor_and_a_diamond():
    x = Tensor(np.array([2.0, 3.0]), requires_grad=True)
    y = x * x
    z = y + y * x + y.exp() * 0 + x
    z.sum().backward()
    np.testing.assert_allclose(x.grad, 2 * x.data + 3 * x.data**2 + 1)


def test_gradients_add_up_over_backward_passes_and_start_from_none():
    x = Tensor(np.ones(3), requires_grad=True)
    assert x.grad is None
    (x * 2).sum().backward()
    (x * 3).sum().backward()
    assert x.grad.tolist() == [5, 5, 5]
    x.grad = None
    (x * 3).sum().backward()
    assert x.grad.tolist() == [3, 3, 3]


def test_the_engine_never_changes_an_array_that_others_see():
    x = Tensor(np.ones((2, 2)), requires_grad=True)
    y = x * 1.0
    seed = np.ones((2, 2))
    # The same gradient array reaches y four times, twice by reference through adds and a view.
    (y + y + y.reshape(2, 2) + y.T.T).backward(seed)
    assert seed.tolist() == [[1, 1], [1, 1]] and x.grad.tolist() == [[4, 4], [4, 4]]
    z = Tensor(np.ones((2, 2)), requires_grad=True)
    w = Tensor(np.ones((2, 2)), requires_grad=True)
    (z + w).backward(seed)
    assert (
        z.grad is not w.grad and not np.shares_memory(z.grad, w.grad) and not np.shares_memory(z.grad, seed)
    )
    z.grad += 1
    assert seed.tolist() == [[1, 1], [1, 1]]


def test_saved_arrays_survive_what_is_added_later():
    x = Tensor(values(20000), requires_grad=True)  # large: results come from the pool
    y = x.exp()
    before = y.data.copy()
    z = (y * y).sum() + (y + y).sum() + y.sum()
    z.backward()
    np.testing.assert_array_equal(y.data, before)
    np.testing.assert_allclose(x.grad, (2 * before + 3) * before)


def test_an_array_kept_by_the_user_is_not_recycled():
    x = Tensor(np.ones(50000), requires_grad=True)
    kept = [(x * float(i)).data for i in range(5)]
    gc.collect()
    for _ in range(10):
        (x * 7.0).sum().backward()
    assert [array[0] for array in kept] == [0, 1, 2, 3, 4]


def test_parts_fill_one_gradient_also_when_some_are_unused():
    x = Tensor(values(4, 3), requires_grad=True)
    a, b, c, d = x
    (a * 2 + c * d).sum().backward()
    np.testing.assert_allclose(x.grad, [[2, 2, 2], [0, 0, 0], x.data[3], x.data[2]])
    x.grad = None
    p, q = x.split(2)
    (p + p * q + q[0]).sum().backward()
    np.testing.assert_allclose(x.grad, np.concatenate([1 + x.data[2:], x.data[:2] + np.array([[2], [0]])]))
    with pytest.raises(RuntimeError, match="freed"):
        b.sum().backward()


def test_a_second_backward_raises_and_leaves_gradients_alone():
    x = Tensor(np.ones(2), requires_grad=True)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="freed by an earlier"):
        y.backward()
    shared = x * 3
    one, other = shared.sum(), (shared * 2).sum()
    one.backward()
    grad = x.grad.copy()
    with pytest.raises(RuntimeError, match="freed"):
        other.backward()
    assert x.grad.tolist() == grad.tolist()


def test_a_retained_graph_may_be_run_again():
    x = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
    a, b = x.split([1, 2])
    y = (a * b * b).sum() + (x * x).softmax(0)[0]
    y.backward(retain_graph=True)
    once = x.grad.copy()
    y.backward()
    np.testing.assert_allclose(x.grad, 2 * once, rtol=1e-14)
    with pytest.raises(RuntimeError, match="freed by an earlier"):
        y.backward()


def test_backward_needs_a_scalar_or_a_gradient():
    x = Tensor(np.ones((2, 1)), requires_grad=True)
    with pytest.raises(RuntimeError, match="needs the gradient"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"gradient is \(3,\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="does not require"):
        Tensor(np.ones(())).backward()
    x[:1].backward()  # one element, as in torch
    x.backward(Tensor(np.ones((2, 1))))
    assert x.grad.tolist() == [[2], [1]]


def test_a_chain_of_ten_thousand_operations():
    x = Tensor(np.ones(2), requires_grad=True)
    y = x
    for _ in range(10_000):
        y = y + 0.001
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]
    for _ in range(100_000):
        y = y * 1.0
    del y  # freeing it must not recurse either


def test_enable_grad():
    x = Tensor(np.ones(2), requires_grad=True)
    with tensor.no_grad():
        with tensor.enable_grad():
            assert (x * 2).requires_grad
        assert not (x * 2).requires_grad


def test_no_grad():
    x = Tensor(np.ones(2), requires_grad=True)
    with cllm.no_grad():
        y = x * 2
        with cllm.no_grad():
            pass
        assert not y.requires_grad and not tensor.is_grad_enabled() and not x[0].requires_grad
        assert not any(part.requires_grad for part in x)
        seen = []
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
        assert seen == [True]  # the mode is the thread's own
    assert (x * 2).requires_grad

    @cllm.no_grad()
    def nested(n):
        assert not tensor.is_grad_enabled()
        return nested(n - 1) if n else x * 2

    assert not nested(3).requires_grad and tensor.is_grad_enabled()
    with pytest.raises(KeyError), cllm.no_grad():
        raise KeyError
    assert tensor.is_grad_enabled()


def test_constants_get_no_gradient():
    x, c = Tensor(np.ones(2), requires_grad=True), Tensor(np.ones(2))
    ((x * c + c) / c @ c).backward()
    assert c.grad is None and x.grad.tolist() == [1, 1]


def test_grad_is_copied_in():
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    array = np.array([1, 2])
    x.grad = array
    array[0] = 9
    assert x.grad.dtype == np.float32 and x.grad.tolist() == [1, 2]
    x.grad *= 2
    assert x.grad.tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        x.grad = np.ones(3)


def test_parameter():
    array = np.ones((2, 2), np.float32)
    p = Parameter(array)
    assert p.requires_grad and p.data is array
    read_only = np.ones(2)
    read_only.flags.writeable = False
    assert Parameter(read_only).data.flags.writeable and Parameter(np.ones((2, 3)).T).data.flags.c_contiguous
    (p * 3).sum().backward()
    kept = p.grad
    (p * 2).sum().backward()
    assert p.grad is kept and p.grad.tolist() == [[5, 5], [5, 5]]


def test_gradcheck_names_the_input_and_the_element():
    def wrong(x, y):
        out = tensor.record(
            x.data * y.data, (x, y), lambda grad: (grad * y.data, grad * x.data * [1, 1, 1.5])
        )
        return out

    inputs = [Tensor(values(3, seed=i, low=0.5), requires_grad=True) for i in range(2)]
    with pytest.raises(GradcheckError, match=r"input 1, element \(2,\): backward gives .* differences give"):
        cllm.gradcheck(wrong, inputs)
    assert cllm.gradcheck(wrong, inputs, raise_exception=False) is False
    with pytest.raises(ValueError, match="no input"):
        cllm.gradcheck(lambda x: x, Tensor(np.ones(2)))
    with pytest.raises(ValueError, match="no output"):
        cllm.gradcheck(lambda x: x.detach(), inputs[0])


def test_gradcheck_leaves_its_inputs_as_they_were_and_widens_float32():
    x = Tensor(values(3), requires_grad=True)
    x.grad = np.full(3, 7.0)
    before = x.data.copy()
    assert cllm.gradcheck(lambda x: (x.sin(), x * 2), x)
    assert x.data.tolist() == before.tolist() and x.grad.tolist() == [7, 7, 7]
    narrow = Tensor(values(3).astype(np.float32), requires_grad=True)
    assert cllm.gradcheck(lambda x: x.exp(), narrow) and narrow.grad is None


def test_long_float32_sums_are_accurate():
    x = np.full((100_000, 3), 0.1, np.float32)
    np.testing.assert_allclose(Tensor(x).sum(0).data, 100_000 * np.float64(np.float32(0.1)), rtol=1e-7)
    bias = Tensor(np.zeros(3, np.float32), requires_grad=True)
    ((Tensor(x) + bias) * 0.1).sum().backward()
    np.testing.assert_allclose(bias.grad, 100_000 * np.float64(np.float32(0.1)), rtol=1e-6)


def test_public_names():
    for name in cllm.__all__:
        if name in ("Trainer", "evaluate", "load") or name in cllm._MODULES:
            continue
        assert getattr(cllm, name) is not None
    assert cllm.__version__ == "0.1.0" and "Tensor" in dir(cllm)
    with pytest.raises(AttributeError, match="no_such"):
        _ = cllm.no_such
