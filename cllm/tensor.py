"""Tensor: a NumPy array, its gradient, and the tape that leads back.

An operation computes its array and calls ``record(array, inputs, backward)``. When an input requires a
gradient, the result gets a Node: where its inputs came from, and a function from the result's gradient
to the inputs' gradients. `Tensor.backward` runs the nodes from the newest to the oldest. Both halves of the
tape are compiled: `cllm._core.tape`.

Names, arguments and behaviour follow PyTorch. The operations here are NumPy, one array at a time, but
for the matrix product; those that train a GPT fast are in `cllm.functional`.
"""

import math
import threading
from collections import namedtuple
from contextlib import ContextDecorator
from itertools import accumulate

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from cllm import kernels
from cllm._core.pool import empty
from cllm._core.tape import WRITTEN, Fields, is_grad_enabled, record, results_are, run, set_grad_enabled

__all__ = [
    "WRITTEN", "GradcheckError", "Parameter", "Tensor", "as_tensor", "cat", "einsum", "enable_grad",
    "gradcheck", "is_grad_enabled", "no_grad", "record", "stack", "where",
]  # fmt: skip

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# Below this many elements malloc is as fast as the pool: there are no pages to fault in.
_POOL_FROM = 16384

# Float32 sums over more elements than this are taken in double: a running sum of n terms loses n/2 ulp.
_DOUBLE_FROM = 1024

MaxResult = namedtuple("MaxResult", "values indices")
MinResult = namedtuple("MinResult", "values indices")


# The tape --------------------------------------------------------------------------------------------


class no_grad(ContextDecorator):
    """Within this context, or in a function that it decorates, nothing is recorded."""

    _grad = False

    def __enter__(self):
        self._before = is_grad_enabled()
        set_grad_enabled(self._grad)
        return self

    def __exit__(self, *error):
        set_grad_enabled(self._before)

    def _recreate_cm(self):
        return type(self)()  # one for each call, so that a decorated function may call itself


class enable_grad(no_grad):
    """Within this context operations are recorded, also inside `no_grad`."""

    _grad = True


# Helpers ---------------------------------------------------------------------------------------------


def _identity(grad):
    return (grad,)


def _both(grad):
    return grad, grad


def _ufunc(ufunc, a, b):
    """ufunc(a, b) of an array and an array or number; a large result comes from the pool."""
    shape, shape_b = a.shape, b.shape if b.__class__ is np.ndarray else ()
    if a.size < _POOL_FROM and (not shape_b or b.size < _POOL_FROM):
        return ufunc(a, b)
    if shape_b and shape_b != shape:
        shape = np.broadcast_shapes(shape, shape_b)
    return ufunc(a, b, out=empty(shape, a.dtype))


def _buffer(a):
    """`out=` for an elementwise result of a's shape: from the pool when it is large, else NumPy's own."""
    return empty(a.shape, a.dtype) if a.size >= _POOL_FROM else None


def _zeros(shape, dtype):
    array = empty(shape, dtype)
    array.fill(0)
    return array


def _sum(a, axes, keepdims=False):
    """a summed over axes, in double where the sum is long."""
    if a.size < _DOUBLE_FROM or a.dtype == np.float64:
        return np.add.reduce(a, axis=axes, keepdims=keepdims)
    return np.add.reduce(a, axis=axes, keepdims=keepdims, dtype=np.float64).astype(a.dtype)


def _unbroadcast(grad, shape):
    """The gradient of an array of `shape` that was broadcast to grad's shape."""
    if grad.shape == shape:
        return grad
    lead = grad.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape) if n == 1 and grad.shape[lead + i] != 1
    )
    return _sum(grad, axes, True).reshape(shape)


def _operands(x, y):
    """x and y made fit for one ufunc: y becomes a Python number, or both become Tensors of one dtype.

    A number, and a 0-d operand beside one with dimensions, do not widen float32, as in torch. y comes back as
    NotImplemented when it is nothing to calculate with.
    """
    if not isinstance(y, Tensor):
        if isinstance(y, (np.generic, np.ndarray)) and y.ndim == 0:
            y = y.item()
        if isinstance(y, float):
            return x, float(y)
        if isinstance(y, int):
            return x, int(y)
        if not isinstance(y, np.ndarray):
            return x, NotImplemented
        y = Tensor(y if y.dtype.kind not in "biu" else y.astype(x.data.dtype))
    if x.data.dtype != y.data.dtype:
        if y.ndim == 0 and x.ndim > 0:
            y = y.to(x.data.dtype)
        elif x.ndim == 0 and y.ndim > 0:
            x = x.to(y.data.dtype)
        else:
            x, y = x.to(np.float64), y.to(np.float64)
    return x, y


def _dims(dim, ndim):
    """The dimensions to reduce as a tuple of axes from 0; None and () mean all.

    A 0-d tensor may be asked for its dimension 0 or -1, as in torch.
    """
    if dim is None or (dim.__class__ is tuple and not dim):
        return tuple(range(ndim))
    return normalize_axis_tuple(dim, ndim) if ndim else normalize_axis_tuple(dim, 1)[:0]


def _sizes(args, named=None):
    """The arguments of reshape and its like: (2, 3) or ((2, 3),), or that tuple by its name."""
    args = args if named is None else (*args, named)
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _keep(grad, shape, axes):
    """A reduction's gradient with the reduced axes put back as 1."""
    return grad.reshape([1 if i in axes else n for i, n in enumerate(shape)])


def _along(function, dim, *arrays):
    """A function over the last axis of arrays, along dim instead."""
    ndim = arrays[0].ndim
    axis = normalize_axis_index(dim, max(ndim, 1))
    if not ndim:
        return function(*(array.reshape(1) for array in arrays)).reshape(())
    if axis == ndim - 1:
        return function(*arrays)
    return np.moveaxis(function(*(np.moveaxis(array, axis, -1) for array in arrays)), -1, axis)


def _index(item):
    """A part of an index; an array is copied, since the caller may change it before the backward pass."""
    if item is None or item is ... or isinstance(item, (int, slice, np.integer)):
        return item
    if isinstance(item, (np.ndarray, list)):
        array = np.array(item, dtype=np.intp if isinstance(item, list) and not np.size(item) else None)
        if array.dtype.kind in "biu":
            return int(array) if not array.ndim and array.dtype != bool else array
    raise TypeError("an index of a tensor must be of integers, booleans, slices, None and ...")


def _is_integer(item):
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)


def _split(index):
    """An index of integers and arrays as two: all but the arrays, then the arrays."""
    whole = slice(None)
    first, then = [], []
    for item in index:
        if isinstance(item, np.ndarray):
            first += [whole] * (item.ndim if item.dtype == bool else 1)
            then.append(item)
        else:
            first.append(item)
            if not _is_integer(item):
                then.append(item if item is ... else whole)
    return tuple(first), tuple(then)


def _mask(function, mask):
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{function}: the mask is {mask.dtype}, it must be boolean")
    return mask


def _compare(ufunc):
    def compare(self, other):
        x, y = _operands(self, other)
        if y is NotImplemented:
            return y
        return ufunc(x.data, y.data if isinstance(y, Tensor) else y)

    return compare


def as_tensor(x):
    """x itself when it is a Tensor, else a Tensor over the array."""
    return x if isinstance(x, Tensor) else Tensor(x)


# Tensor ----------------------------------------------------------------------------------------------


class Tensor(Fields):
    """A NumPy array that remembers how it was computed.

    Parameters
    ----------
    data : array of float32 or float64, Tensor, number or list of floats
        An array is used as it is, not copied. Python numbers become float32.
    requires_grad : bool
        Whether `backward` should leave a gradient in `grad`.

    Attributes
    ----------
    data : ndarray
        Assign another array to change a result: one of a norm is read-only from 1 MB on, since the backward
        pass computes it again instead of keeping it.
    grad : ndarray or None
        None until `backward` has written it; later backward passes add to it. Assigning copies in.

    Raises
    ------
    TypeError
        For any other dtype. Integer and boolean arrays are indices, masks and constants, not Tensors.
    """

    __slots__ = ()  # those of Fields
    __array_ufunc__ = None  # so that `array * tensor` comes to __rmul__

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            data = data.data
        array = np.asarray(data)
        if array.dtype not in _FLOATS:
            raise TypeError(f"a Tensor holds float32 or float64, got {array.dtype}: convert with .astype()")
        if not isinstance(data, (np.ndarray, np.generic)):
            array = array.astype(np.float32)
        self.data = array
        self.requires_grad = bool(requires_grad)
        self._grad = None
        self._node = None

    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def is_leaf(self):
        return self._node is None

    def size(self, dim=None):
        """The shape, or one of its entries."""
        return self.data.shape if dim is None else self.data.shape[dim]

    def numel(self):
        """The number of elements."""
        return self.data.size

    def numpy(self):
        """The array itself, not a copy."""
        return self.data

    def item(self):
        """The only element, as a Python float."""
        return self.data.item()

    def detach(self):
        """A Tensor over the same array that no gradient passes."""
        return Tensor(self.data)

    def to(self, dtype):
        """This tensor as float32 or float64; itself when it is that already."""
        before, dtype = self.data.dtype, np.dtype(dtype)
        if dtype == before:
            return self
        if dtype not in _FLOATS:
            raise TypeError(f"a Tensor holds float32 or float64, got {dtype}")
        return record(self.data.astype(dtype), (self,), lambda grad: (grad.astype(before),))

    def __repr__(self):
        text = np.array2string(self.data, separator=", ", prefix="Tensor(")
        dtype = "" if self.data.dtype == np.float32 else f", dtype={self.data.dtype}"
        return f"{type(self).__name__}({text}{dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self):
        if not self.data.ndim:
            raise TypeError("len() of a 0-d tensor")
        return self.data.shape[0]

    def __bool__(self):
        if self.data.size != 1:
            raise ValueError(f"the truth value of a tensor of shape {self.data.shape} is ambiguous")
        return bool(self.data.item())

    def __float__(self):
        return float(self.data.item())

    def __int__(self):
        return int(self.data.item())

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError(
                "NumPy would take this tensor off the tape: use .data for its array, or cllm.cat, cllm.stack "
                "and cllm.where to stay on it"
            )
        return np.array(self.data, dtype=dtype, copy=copy)

    # Gradients ---------------------------------------------------------------------------------------

    @property
    def grad(self):
        return self._grad

    @grad.setter
    def grad(self, value):
        if value is None or value is self._grad:
            _set_grad(self, value)
            return
        value = np.asarray(value.data if isinstance(value, Tensor) else value)
        if value.shape != self.data.shape:
            raise ValueError(f"grad: got shape {value.shape}, the tensor is {self.data.shape}")
        target = self.grad_target()[0]
        target[...] = value
        self.grad_written(target)

    def grad_target(self):
        """The array to write this leaf's gradient to, and whether to add to what it holds."""
        if self._grad is not None:
            return self._grad, True
        return empty(self.data.shape, self.data.dtype), False

    def grad_written(self, array):
        """Say that the array that `grad_target` gave now holds the gradient."""
        _set_grad(self, array)

    def _accumulate(self, grad):
        """Add a gradient that others may still use."""
        target, add = self.grad_target()
        if add:
            np.add(target, grad, out=target)
        else:
            target[...] = grad
            self.grad_written(target)

    def backward(self, gradient=None, retain_graph=False):
        """Write the gradient of this tensor with respect to each leaf that requires it into its `grad`.

        Parameters
        ----------
        gradient : array or Tensor of this tensor's shape, optional
            The gradient to start from; 1 when this tensor has a single element.
        retain_graph : bool
            Whether another backward pass may follow; otherwise the tape is freed as it is read.

        Raises
        ------
        RuntimeError
            When there is no graph, when an earlier backward has freed a part of it, or when `gradient` is
            missing.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor does not require a gradient")
        data = self.data
        if gradient is None:
            if data.size != 1:
                raise RuntimeError(f"backward: a tensor of shape {data.shape} needs the gradient argument")
            gradient = np.ones(data.shape, data.dtype)
        else:
            gradient = gradient.data if isinstance(gradient, Tensor) else np.asarray(gradient)
            if gradient.shape != data.shape:
                raise ValueError(f"backward: gradient is {gradient.shape}, the tensor is {data.shape}")
            gradient = gradient.astype(data.dtype, copy=False)
        if self._node is None:
            self._accumulate(gradient)
        else:
            run(self._node, gradient, retain_graph)

    # Arithmetic --------------------------------------------------------------------------------------

    def __add__(self, other):
        x, y = _operands(self, other)
        if not isinstance(y, Tensor):
            return y if y is NotImplemented else record(_ufunc(np.add, x.data, y), (x,), _identity)
        out = _ufunc(np.add, x.data, y.data)
        shape_x, shape_y = x.data.shape, y.data.shape
        if shape_x == shape_y:
            return record(out, (x, y), _both)
        need_x, need_y = x.requires_grad, y.requires_grad

        def backward(grad):
            return (
                _unbroadcast(grad, shape_x) if need_x else None,
                _unbroadcast(grad, shape_y) if need_y else None,
            )

        return record(out, (x, y), backward)

    __radd__ = __add__

    def __neg__(self):
        return record(-self.data, (self,), lambda grad: (-grad,))

    def __sub__(self, other):
        x, y = _operands(self, other)
        if not isinstance(y, Tensor):
            return y if y is NotImplemented else record(_ufunc(np.subtract, x.data, y), (x,), _identity)
        shape_x, shape_y = x.data.shape, y.data.shape
        need_x, need_y = x.requires_grad, y.requires_grad

        def backward(grad):
            return (
                _unbroadcast(grad, shape_x) if need_x else None,
                -_unbroadcast(grad, shape_y) if need_y else None,
            )

        return record(_ufunc(np.subtract, x.data, y.data), (x, y), backward)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        x, y = _operands(self, other)
        if not isinstance(y, Tensor):
            if y is NotImplemented:
                return y
            return record(_ufunc(np.multiply, x.data, y), (x,), lambda grad: (_ufunc(np.multiply, grad, y),))
        out = _ufunc(np.multiply, x.data, y.data)
        shape_x, shape_y = x.data.shape, y.data.shape
        a = x.data if y.requires_grad else None
        b = y.data if x.requires_grad else None

        def backward(grad):
            return (
                None if b is None else _unbroadcast(_ufunc(np.multiply, grad, b), shape_x),
                None if a is None else _unbroadcast(_ufunc(np.multiply, grad, a), shape_y),
            )

        return record(out, (x, y), backward)

    __rmul__ = __mul__

    def __truediv__(self, other):
        x, y = _operands(self, other)
        if y is NotImplemented:
            return y
        with np.errstate(all="ignore"):
            if not isinstance(y, Tensor):
                return record(_ufunc(np.divide, x.data, y), (x,), lambda grad: (_ufunc(np.divide, grad, y),))
            b = y.data
            out = _ufunc(np.divide, x.data, b)
        shape_x, shape_y = x.data.shape, b.shape
        need_x, need_y = x.requires_grad, y.requires_grad
        quotient = out if need_y else None

        def backward(grad):
            dx = grad / b
            return (
                _unbroadcast(dx, shape_x) if need_x else None,
                _unbroadcast(-dx * quotient, shape_y) if need_y else None,
            )

        return record(out, (x, y), backward)

    def __rtruediv__(self, other):
        x, y = _operands(self, other)
        if y is NotImplemented:
            return y
        if isinstance(y, Tensor):
            return y / x
        a = x.data
        with np.errstate(all="ignore"):
            out = np.divide(y, a)
        return record(out, (x,), lambda grad: (-grad * out / a,))

    def __pow__(self, other):
        x, y = _operands(self, other)
        if y is NotImplemented:
            return y
        a = x.data
        if isinstance(y, Tensor):
            return _power(x, y)
        with np.errstate(all="ignore"):
            out = a**y
        if y == 0:
            return record(out, (x,), lambda grad: (np.zeros_like(grad),))
        return record(out, (x,), lambda grad: (grad * (y * a ** (y - 1)),))

    def __rpow__(self, other):
        x, y = _operands(self, other)
        if y is NotImplemented:
            return y
        return _power(y if isinstance(y, Tensor) else Tensor(np.full((), y, x.data.dtype)), x)

    def __matmul__(self, other):
        x, y = _operands(self, other)
        if not isinstance(y, Tensor):
            return NotImplemented
        a, b = x.data, y.data
        if a.ndim < 2 or b.ndim < 2:
            return _vector_product(x, y)
        need_x, need_y = x.requires_grad, y.requires_grad

        def backward(grad):
            da = db = None
            if need_x:
                da = _unbroadcast(kernels.matmul(grad, b.swapaxes(-1, -2)), a.shape)
            if need_y:
                if b.ndim == 2:  # one product over all rows instead of one for each leading index and a sum
                    n = math.prod(a.shape[:-1])
                    db = kernels.matmul(a.reshape(n, a.shape[-1]).T, grad.reshape(n, grad.shape[-1]))
                else:
                    db = _unbroadcast(kernels.matmul(a.swapaxes(-1, -2), grad), b.shape)
            return da, db

        return record(kernels.matmul(a, b), (x, y), backward)

    def __rmatmul__(self, other):
        return NotImplemented if not isinstance(other, np.ndarray) else Tensor(other) @ self

    __eq__ = _compare(np.equal)
    __ne__ = _compare(np.not_equal)
    __lt__ = _compare(np.less)
    __le__ = _compare(np.less_equal)
    __gt__ = _compare(np.greater)
    __ge__ = _compare(np.greater_equal)
    __hash__ = object.__hash__

    # Elementwise functions ---------------------------------------------------------------------------

    def exp(self):
        with np.errstate(all="ignore"):
            out = np.exp(self.data, out=_buffer(self.data))
        return record(out, (self,), lambda grad: (grad * out,))

    def log(self):
        a = self.data
        with np.errstate(all="ignore"):
            out = np.log(a)
        return record(out, (self,), lambda grad: (grad / a,))

    def sqrt(self):
        with np.errstate(all="ignore"):
            out = np.sqrt(self.data)
        return record(out, (self,), lambda grad: (grad / (2 * out),))

    def rsqrt(self):
        with np.errstate(all="ignore"):
            out = 1 / np.sqrt(self.data)
        return record(out, (self,), lambda grad: (-0.5 * grad * (out * out * out),))

    def sin(self):
        a = self.data
        return record(np.sin(a), (self,), lambda grad: (grad * np.cos(a),))

    def cos(self):
        a = self.data
        return record(np.cos(a), (self,), lambda grad: (-grad * np.sin(a),))

    def tanh(self):
        out = kernels.tanh_forward(self.data)
        return record(out, (self,), lambda grad: (kernels.tanh_backward(grad, out),))

    def sigmoid(self):
        out = kernels.sigmoid_forward(self.data)
        return record(out, (self,), lambda grad: (kernels.sigmoid_backward(grad, out),))

    def relu(self):
        out = kernels.relu_forward(self.data)
        return record(out, (self,), lambda grad: (kernels.relu_backward(grad, out),))

    def gelu(self, approximate="none"):
        """x Phi(x), Phi the normal distribution function; approximate: "none" (erf) or "tanh"."""
        a = self.data
        out = kernels.gelu_forward(a, approximate)
        return record(out, (self,), lambda grad: (kernels.gelu_backward(grad, a, approximate),))

    def silu(self):
        a = self.data
        return record(kernels.silu_forward(a), (self,), lambda grad: (kernels.silu_backward(grad, a),))

    def abs(self):
        a = self.data
        return record(np.abs(a), (self,), lambda grad: (grad * np.sign(a),))

    __abs__ = abs

    def clamp(self, min=None, max=None):
        """Elements below min become min, then those above max become max; the gradient passes at the bounds.

        min, max : numbers, or arrays or Tensors that broadcast, of any dtype; at least one of them. Where a
            Tensor takes an element's place it gets its gradient.
        """
        if min is None and max is None:
            raise ValueError("clamp: min and max are both None, at least one must be given")
        a = self.data
        low, high = (_bound(bound, a.dtype) for bound in (min, max))
        inputs = (self, *(bound for bound in (low, high) if bound is not None))
        low, high = (None if bound is None else bound.data for bound in (low, high))
        out = a if low is None else np.maximum(a, low)
        out = out if high is None else np.minimum(out, high)

        def backward(grad):
            below = np.False_ if low is None else a < low
            above = np.False_ if high is None else a > high
            inside = (np.True_ if low is None else a >= low) & (np.True_ if high is None else a <= high)
            if low is not None and high is not None:  # max wins where it is below min
                below, above = below & (low < high), above | (high < low)
            masks = (inside, *([] if low is None else [below]), *([] if high is None else [above]))
            return tuple(
                _unbroadcast(grad * mask, x.data.shape) if x.requires_grad else None
                for x, mask in zip(inputs, masks)
            )

        return record(out, inputs, backward)

    def softmax(self, dim):
        """exp(x) over its sum along dim."""
        out = _along(kernels.softmax_forward, dim, self.data)
        return record(out, (self,), lambda grad: (_along(kernels.softmax_backward, dim, grad, out),))

    def log_softmax(self, dim):
        """log(softmax(x)) along dim, without taking the log of a rounded 0."""
        out = _along(kernels.log_softmax_forward, dim, self.data)
        return record(out, (self,), lambda grad: (_along(kernels.log_softmax_backward, dim, grad, out),))

    # Reductions --------------------------------------------------------------------------------------

    def sum(self, dim=None, keepdim=False, *, dtype=None):
        """The sum over dim, a dimension or several; dtype is what to convert to before."""
        if dtype is not None:
            return self.to(dtype).sum(dim, keepdim)
        shape = self.data.shape
        axes = _dims(dim, len(shape))
        out = _sum(self.data, axes, keepdim)
        return record(out, (self,), lambda grad: (np.broadcast_to(_keep(grad, shape, axes), shape),))

    def mean(self, dim=None, keepdim=False, *, dtype=None):
        """The mean over dim, a dimension or several; dtype is what to convert to before."""
        if dtype is not None:
            return self.to(dtype).mean(dim, keepdim)
        shape = self.data.shape
        axes = _dims(dim, len(shape))
        n = math.prod(shape[axis] for axis in axes)
        with np.errstate(all="ignore"):
            out = np.divide(_sum(self.data, axes, keepdim), n)
        return record(out, (self,), lambda grad: (np.broadcast_to(_keep(grad, shape, axes) / n, shape),))

    def var(self, dim=None, unbiased=None, keepdim=False, *, correction=None):
        """The variance; divided by n - correction, which is n - 1 unless told otherwise."""
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased is None or unbiased else 0
        a = self.data
        axes = _dims(dim, a.ndim)
        n = math.prod(a.shape[axis] for axis in axes)
        with np.errstate(all="ignore"):
            centred = a - np.divide(_sum(a, axes, True), n)
            divisor = a.dtype.type(max(n - correction, 0))
            out = _sum(centred * centred, axes, keepdim) / divisor

        def backward(grad):
            return (_keep(grad, a.shape, axes) * (2 / divisor) * centred,)

        return record(out, (self,), backward)

    def max(self, dim=None, keepdim=False, *, other=None):
        """The largest element, ties sharing its gradient; with dim, (values, indices) of the first ones.

        x.max(other) with a Tensor or array: the larger of the two, element by element.
        """
        if other is not None or isinstance(dim, (Tensor, np.ndarray)):
            return _of_two(self, dim if other is None else other, np.maximum, np.less)
        return _extremum(self, dim, keepdim, np.maximum, np.argmax, MaxResult)

    def min(self, dim=None, keepdim=False, *, other=None):
        """The smallest element, ties sharing its gradient; with dim, (values, indices) of the first ones.

        x.min(other) with a Tensor or array: the smaller of the two, element by element.
        """
        if other is not None or isinstance(dim, (Tensor, np.ndarray)):
            return _of_two(self, dim if other is None else other, np.minimum, np.greater)
        return _extremum(self, dim, keepdim, np.minimum, np.argmin, MinResult)

    def argmax(self, dim=None, keepdim=False):
        """The index of the largest element: an int64 array, not on the tape."""
        if not self.data.ndim:
            _dims(dim, 0)
            return np.argmax(self.data)
        return np.argmax(self.data, axis=dim, keepdims=keepdim)

    def cumsum(self, dim):
        if not self.data.ndim:
            return self.reshape(1).cumsum(dim).reshape(())
        dim = normalize_axis_index(dim, self.data.ndim)
        dtype = self.data.dtype
        out = np.cumsum(self.data, axis=dim, dtype=np.float64).astype(dtype, copy=False)

        def backward(grad):
            total = np.flip(np.cumsum(np.flip(grad, dim), axis=dim, dtype=np.float64), dim)
            return (total.astype(dtype, copy=False),)

        return record(out, (self,), backward)

    # Shapes ------------------------------------------------------------------------------------------

    def reshape(self, *sizes, shape=None):
        """The elements in C order under another shape: sizes, or one tuple of them; one may be -1."""
        before = self.data.shape
        sizes = _sizes(sizes, shape)
        return record(self.data.reshape(sizes), (self,), lambda grad: (grad.reshape(before),))

    def view(self, *sizes, size=None):
        """As `reshape`, but an error where that would have to copy."""
        result = self.reshape(*_sizes(sizes, size))
        if not np.may_share_memory(result.data, self.data) and self.data.size:
            raise RuntimeError("view: this tensor's strides do not allow it without a copy: use reshape")
        return result

    def flatten(self, start_dim=0, end_dim=-1):
        shape = self.data.shape
        if not shape:
            return self.reshape(1)
        start, end = normalize_axis_index(start_dim, len(shape)), normalize_axis_index(end_dim, len(shape))
        return self.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def contiguous(self):
        """This tensor in C order; itself when it is so already."""
        if self.data.flags.c_contiguous:
            return self
        return record(np.ascontiguousarray(self.data), (self,), _identity)

    def permute(self, *order, dims=None):
        """The dimensions in another order: their numbers, or one tuple of them."""
        dims = normalize_axis_tuple(_sizes(order, dims), self.data.ndim)
        inverse = [0] * len(dims)
        for i, dim in enumerate(dims):
            inverse[dim] = i
        return record(self.data.transpose(dims), (self,), lambda grad: (grad.transpose(inverse),))

    def transpose(self, dim0, dim1):
        return record(self.data.swapaxes(dim0, dim1), (self,), lambda grad: (grad.swapaxes(dim0, dim1),))

    @property
    def T(self):
        """The transpose of a matrix."""
        if self.data.ndim != 2:
            raise ValueError(f"T: a tensor of shape {self.data.shape} is no matrix: use transpose(-1, -2)")
        return self.transpose(0, 1)

    def unsqueeze(self, dim):
        before = self.data.shape
        dim = normalize_axis_index(dim, len(before) + 1)
        shape = (*before[:dim], 1, *before[dim:])
        return record(self.data.reshape(shape), (self,), lambda grad: (grad.reshape(before),))

    def squeeze(self, dim=None):
        """Without the dimensions of size 1, or only without those named that are of size 1."""
        before = self.data.shape
        axes = _dims(dim, len(before))
        shape = tuple(n for i, n in enumerate(before) if n != 1 or i not in axes)
        return record(self.data.reshape(shape), (self,), lambda grad: (grad.reshape(before),))

    def expand(self, *sizes, size=None):
        """Broadcast to sizes; -1 keeps a dimension. The result is a read-only view."""
        sizes, before = _sizes(sizes, size), self.data.shape
        lead = len(sizes) - len(before)
        if lead < 0 or any(n == -1 for n in sizes[:lead]):
            raise ValueError(f"expand: {tuple(sizes)} does not fit a tensor of shape {before}")
        shape = tuple(before[i - lead] if n == -1 else n for i, n in enumerate(sizes))
        return record(np.broadcast_to(self.data, shape), (self,), lambda grad: (_unbroadcast(grad, before),))

    def unbind(self, dim=0):
        """The slices along dim, without it, as a tuple."""
        dim = normalize_axis_index(dim, self.data.ndim)
        lead = (slice(None),) * dim
        return _parts(self, [(*lead, i) for i in range(self.data.shape[dim])])

    def __iter__(self):
        if not self.data.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return iter(self.unbind(0))

    def split(self, split_size, dim=0):
        """Parts of one size along dim, the last perhaps smaller, or of the given sizes; a tuple."""
        dim = normalize_axis_index(dim, self.data.ndim)
        length = self.data.shape[dim]
        if isinstance(split_size, (int, np.integer)):
            size = int(split_size)
            if size < 1:
                raise ValueError(f"split: the size is {size}, it must be at least 1")
            ends = [min(start + size, length) for start in range(0, length, size)] or [0]
        else:
            sections = list(split_size)
            if sum(sections) != length or any(n < 0 for n in sections):
                raise ValueError(f"split: sizes {sections} must sum to {length}, the size of dimension {dim}")
            ends = list(accumulate(sections))
        lead = (slice(None),) * dim
        return _parts(self, [(*lead, slice(a, b)) for a, b in zip([0, *ends], ends)])

    def chunk(self, chunks, dim=0):
        """At most `chunks` parts of equal size along dim, the last perhaps smaller; a tuple."""
        if chunks < 1:
            raise ValueError(f"chunk: chunks is {chunks}, it must be at least 1")
        length = self.data.shape[normalize_axis_index(dim, self.data.ndim)]
        return self.split(max(1, -(-length // chunks)), dim)

    # Selection ---------------------------------------------------------------------------------------

    def __getitem__(self, index):
        """Slices, integers, None and ... give views; integer and boolean arrays give copies.

        As in torch, integers count as slices: x[0, :, [1, 2]] is x[0][:, [1, 2]], where NumPy has the array's
        dimension first.
        """
        data = self.data
        index = tuple(_index(item) for item in (index if isinstance(index, tuple) else (index,)))
        arrays = [item for item in index if isinstance(item, np.ndarray)]
        if arrays and any(_is_integer(item) for item in index):
            first, then = _split(index)
            return self[first][then]
        # Only integer arrays can name an element twice.
        repeats = any(item.dtype != bool for item in arrays)
        out = data[index]
        shape, dtype = data.shape, data.dtype

        def backward(grad):
            whole = _zeros(shape, dtype)
            if repeats:
                np.add.at(whole, index, grad)
            else:
                whole[index] = grad
            return (whole,)

        return record(out, (self,), backward)

    def gather(self, dim, index):
        """out[i][j] = self[index[i][j]][j] for dim 0, and so on.

        Parameters
        ----------
        dim : int
        index : integer array with as many dimensions; no longer than this tensor in those other than dim
        """
        data = self.data
        dim = normalize_axis_index(dim, data.ndim)
        index = np.array(index)
        if index.dtype.kind not in "iu":
            raise TypeError(f"gather: the index is {index.dtype}, it must be an integer array")
        if index.ndim != data.ndim or any(
            n > m for i, (n, m) in enumerate(zip(index.shape, data.shape)) if i != dim
        ):
            raise ValueError(f"gather: the index is {index.shape}, the tensor is {data.shape}")
        if index.size and (index.min() < 0 or index.max() >= data.shape[dim]):
            raise IndexError(
                f"gather: the index goes from {index.min()} to {index.max()}, "
                f"it must be in [0, {data.shape[dim]})"
            )
        where = list(np.indices(index.shape, sparse=True))
        where[dim] = index
        where = tuple(where)
        shape, dtype = data.shape, data.dtype

        def backward(grad):
            whole = _zeros(shape, dtype)
            np.add.at(whole, where, grad)
            return (whole,)

        return record(data[where], (self,), backward)

    def where(self, condition, other):
        """This tensor where condition holds, other elsewhere."""
        return where(condition, self, other)

    def masked_fill(self, mask, value):
        """`value`, a number, where the boolean mask holds; the mask broadcasts."""
        mask = _mask("masked_fill", mask)
        a = self.data
        shape = a.shape
        out = np.where(mask, a.dtype.type(value), a)
        return record(out, (self,), lambda grad: (_unbroadcast(np.where(mask, 0, grad), shape),))


results_are(Tensor)
_set_grad = Tensor._grad.__set__  # past Parameter.__setattr__, which is for users
_TAKEN = object()


class Parameter(Tensor):
    """A Tensor that a Module trains.

    Parameters
    ----------
    data : array, Tensor
        Used as it is when it is contiguous and writable. A model's `flatten` moves it into the model's
        block; `data` and `grad` are then views into blocks, and assigning to `data` copies in.
    requires_grad : bool
    """

    __slots__ = ("_buffer", "_claim", "claiming")

    def __init__(self, data, requires_grad=True):
        super().__init__(data, requires_grad)
        self.data = np.require(self.data, requirements="CAW")
        self._buffer = None  # this parameter's place in the model's block of gradients
        self._claim = None  # what `claim_grad` gave last; _TAKEN while a backward pass fills that place
        self.claiming = threading.RLock()

    def __setattr__(self, name, value):
        if name == "data" and getattr(self, "_buffer", None) is not None:
            if np.shape(value) != self.data.shape:
                raise ValueError(f"data: got shape {np.shape(value)}, the parameter is {self.data.shape}")
            if value is not self.data:
                self.data[...] = value
        else:
            object.__setattr__(self, name, value)

    def __reduce__(self):
        return Parameter, (self.data, self.requires_grad)  # copies and pickles stand alone

    def place(self, data, buffer):
        """Move to `data` and let gradients go to `buffer`, both views of this parameter's shape."""
        data[...] = self.data
        grad = self._grad
        object.__setattr__(self, "data", data)
        self._buffer, self._grad, self._claim = buffer, None, None
        self.grad = grad

    def grad_target(self):
        if self._grad is not None:
            _set_claim(self, None)
            return self._grad, True
        if self._buffer is None:
            return empty(self.data.shape, self.data.dtype), False
        with self.claiming:
            _set_claim(self, _TAKEN)
        return self._buffer, False

    def grad_written(self, array):
        _set_grad(self, array)
        _set_claim(self, None)

    def claim_grad(self):
        """An array for a gradient that is computed before `backward`; None while this parameter holds one.

        Where gradients have a place of their own, the array is that place: what is in it counts only if
        `take_claim` says so. The next claim, and whatever asks for `grad_target`, ends it. It must be filled
        under the lock `claiming`, for which a backward pass in another thread waits.
        """
        if self._grad is not None or self._claim is _TAKEN:
            return None
        if self._buffer is None:
            return empty(self.data.shape, self.data.dtype)
        self._claim = self._buffer.view()  # known by its identity
        return self._claim

    def take_claim(self, array):
        """The `grad_target` that holds what the claimant of the array left there; None if it was ended."""
        if self._buffer is None:
            return array
        with self.claiming:
            if array is not self._claim:
                return None
            self._claim = _TAKEN
        return self._buffer


_set_claim = Parameter._claim.__set__


# Operations on several tensors, and parts of methods -------------------------------------------------


def _power(x, y):
    """x ** y for two tensors of one dtype."""
    a, b = x.data, y.data
    with np.errstate(all="ignore"):
        out = a**b
    need_x, need_y = x.requires_grad, y.requires_grad

    def backward(grad):
        da = db = None
        if need_x:
            da = _unbroadcast(np.where(b == 0, 0, grad * (b * a ** (b - 1))), a.shape)
        if need_y:
            db = _unbroadcast(np.where((a == 0) & (b >= 0), 0, grad * (out * np.log(a))), b.shape)
        return da, db

    return record(out, (x, y), backward)


def _vector_product(x, y):
    """x @ y where one of them has fewer than two dimensions."""
    if x.ndim == 0 or y.ndim == 0:
        raise ValueError(f"matmul: a is {x.shape}, b is {y.shape}; both must have at least one dimension")
    if x.ndim == 1 and y.ndim == 1:
        if x.shape != y.shape:
            raise ValueError(f"matmul: a is {x.shape}, b is {y.shape}")
        return (x * y).sum()
    if x.ndim == 1:
        return (x.unsqueeze(0) @ y).squeeze(-2)
    return (x @ y.unsqueeze(-1)).squeeze(-1)


def _extremum(x, dim, keepdim, ufunc, arg, result):
    a = x.data
    if dim is None:
        out = ufunc.reduce(a, axis=None)

        def backward(grad):
            ties = np.isnan(a) if np.isnan(out) else a == out
            return (grad / np.count_nonzero(ties) * ties,)

        return record(out, (x,), backward)
    if not a.ndim:
        return _extremum(x.reshape(1), dim, False, ufunc, arg, result)
    dim = normalize_axis_index(dim, a.ndim)
    indices = np.expand_dims(arg(a, axis=dim), dim)

    def backward(grad):
        whole = _zeros(a.shape, a.dtype)
        np.put_along_axis(whole, indices, grad.reshape(indices.shape), dim)
        return (whole,)

    values = np.take_along_axis(a, indices, dim)
    if keepdim:
        return result(record(values, (x,), backward), indices)
    return result(record(values.squeeze(dim), (x,), backward), indices.squeeze(dim))


def _bound(bound, dtype):
    """A bound of clamp as a Tensor of this dtype; None stays None."""
    if bound is None or isinstance(bound, Tensor):
        return bound if bound is None else bound.to(dtype)
    return Tensor(np.asarray(bound, dtype))


def _of_two(x, y, ufunc, loses):
    """ufunc(x, y), the larger or the smaller of two; `loses` says where it is not the first."""
    got = type(y).__name__
    x, y = _operands(x, y)
    if y is NotImplemented:
        raise TypeError(f"{ufunc.__name__}: got {got}, it must be a Tensor or an array")
    y = y if isinstance(y, Tensor) else Tensor(np.full((), y, x.data.dtype))
    a, b, need_x, need_y = x.data, y.data, x.requires_grad, y.requires_grad

    def share(grad, lost, shape):
        return _unbroadcast(np.where(a == b, grad / 2, np.where(lost, 0, grad)), shape)

    def backward(grad):
        return (
            share(grad, loses(a, b), a.shape) if need_x else None,
            share(grad, loses(b, a), b.shape) if need_y else None,
        )

    return record(ufunc(a, b), (x, y), backward)


def _parts(x, indices):
    """The views x[index] that do not overlap; in backward they fill one array together, not one each."""
    data = x.data
    if not (is_grad_enabled() and x.requires_grad):
        return tuple(record(data[index], (), None) for index in indices)
    shape, dtype = data.shape, data.dtype
    whole = None

    def whole_backward(grad):
        nonlocal whole
        whole = None
        return (grad,)

    def part_backward(index):
        def backward(grad):
            nonlocal whole
            if whole is not None:
                whole[index] = grad
                return (WRITTEN,)
            whole = _zeros(shape, dtype)
            whole[index] = grad
            return (whole,)

        return backward

    # All parts run before this node, and only they know its gradient until then.
    base = record(data, (x,), whole_backward)
    return tuple(record(data[index], (base,), part_backward(index)) for index in indices)


def cat(tensors, dim=0):
    """The tensors joined along dim; arrays among them are constants."""
    tensors = [as_tensor(x) for x in tensors]
    if not tensors:
        raise ValueError("cat: there must be at least one tensor")
    dim = normalize_axis_index(dim, tensors[0].ndim)
    out = np.concatenate([x.data for x in tensors], axis=dim)
    dtypes = [x.data.dtype for x in tensors]
    ends = list(accumulate(x.data.shape[dim] for x in tensors))
    lead = (slice(None),) * dim
    indices = [(*lead, slice(a, b)) for a, b in zip([0, *ends], ends)]

    def backward(grad):
        return tuple(grad[index].astype(dtype, copy=False) for index, dtype in zip(indices, dtypes))

    return record(out, tuple(tensors), backward)


def stack(tensors, dim=0):
    """The tensors, all of one shape, joined along a new dimension."""
    tensors = [as_tensor(x) for x in tensors]
    if len({x.data.shape for x in tensors}) > 1:
        shapes = ", ".join(str(x.data.shape) for x in tensors)
        raise ValueError(f"stack: the tensors are {shapes}; all must have one shape")
    return cat([x.unsqueeze(dim) for x in tensors], dim)


def where(condition, input, other):
    """input where the boolean array condition holds, other elsewhere; all three broadcast.

    input, other : Tensor, array or number, at least one of them a Tensor.
    """
    condition = _mask("where", condition)
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        raise TypeError("where: neither input nor other is a Tensor: use numpy.where")
    swapped = not isinstance(input, Tensor)
    x, y = _operands(other, input) if swapped else _operands(input, other)
    if y is NotImplemented:
        got = type(input if swapped else other).__name__
        raise TypeError(f"where: got {got}, it must be a Tensor, an array or a number")
    if not isinstance(y, Tensor):
        y = Tensor(np.full((), y, x.data.dtype))
    if swapped:
        x, y = y, x
    shape_x, shape_y = x.data.shape, y.data.shape
    need_x, need_y = x.requires_grad, y.requires_grad

    def backward(grad):
        return (
            _unbroadcast(np.where(condition, grad, 0), shape_x) if need_x else None,
            _unbroadcast(np.where(condition, 0, grad), shape_y) if need_y else None,
        )

    return record(np.where(condition, x.data, y.data), (x, y), backward)


def einsum(equation, *operands):
    """Sums of products after Einstein's convention, as torch.einsum: letters, ``...`` and an optional output.

    Operands are contracted from left to right, each pair by one matrix product.

    Parameters
    ----------
    equation : str
        ``"bhtd,bhsd->bhts"``; without ``->`` the output is the letters that occur once, in ASCII order.
    *operands : Tensor

    Raises
    ------
    ValueError
        When the equation does not fit the operands.
    """
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    operands = [as_tensor(x) for x in operands]
    inputs, output = _einsum_labels(equation, operands)
    sizes = {}
    for x, labels in zip(operands, inputs):
        for label, n in zip(labels, x.shape):
            if n != sizes.setdefault(label, n) and n != 1:
                if sizes[label] != 1:
                    raise ValueError(f"einsum: {equation!r} gives {label} the sizes {sizes[label]} and {n}")
                sizes[label] = n
    terms = []
    for x, labels in zip(operands, inputs):
        x, labels = _einsum_diagonal(x, labels)
        ones = [i for i, label in enumerate(labels) if x.shape[i] != sizes[label]]
        if ones:  # size 1 broadcasts
            x, labels = x.squeeze(ones), [label for i, label in enumerate(labels) if i not in ones]
        terms.append((x, labels))
    x, labels = terms[0]
    for i, (y, others) in enumerate(terms[1:], 1):
        later = {label for _, rest in terms[i + 1 :] for label in rest}
        x, labels = _einsum_pair(x, labels, y, others, later | set(output), sizes)
    x, labels = _einsum_reduce(x, labels, set(output))
    return x.permute(*(labels.index(label) for label in output)) if labels != output else x


def _einsum_labels(equation, operands):
    """The labels of each operand and of the output; those under an ellipsis are numbers."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise ValueError(f"einsum: {equation!r} names {len(terms)} operands, got {len(operands)}")
    inputs, n_ellipsis = [], 0
    for term, x in zip(terms, operands):
        head, dots, tail = term.partition("...")
        if not (head + tail).isalpha() and head + tail:
            raise ValueError(f"einsum: {term!r} in {equation!r} must be letters, with at most one '...'")
        n = x.ndim - len(head) - len(tail)
        if n < 0 or (n > 0 and not dots):
            raise ValueError(f"einsum: {term!r} in {equation!r} does not fit a tensor of shape {x.shape}")
        inputs.append([*head, *range(-n, 0), *tail])
        n_ellipsis = max(n_ellipsis, n)
    letters = [label for labels in inputs for label in labels if isinstance(label, str)]
    if arrow:
        head, dots, tail = right.partition("...")
        output = [*head, *(range(-n_ellipsis, 0) if dots else ()), *tail]
        if len(set(output)) < len(output) or not set(head + tail) <= set(letters):
            raise ValueError(f"einsum: the output of {equation!r} must name letters of its inputs, each once")
    else:
        once = sorted(label for label in set(letters) if letters.count(label) == 1)
        output = [*range(-n_ellipsis, 0), *once]
    return inputs, output


def _einsum_diagonal(x, labels):
    """Without letters that occur twice in one operand."""
    labels = list(labels)
    for label in set(labels):
        while labels.count(label) > 1:
            i = labels.index(label)
            j = labels.index(label, i + 1)
            rest = [k for k in range(len(labels)) if k not in (i, j)]
            n = np.arange(x.shape[i])
            x = x.permute(i, j, *rest)[n, n]
            labels = [label, *(labels[k] for k in rest)]
    return x, labels


def _einsum_reduce(x, labels, keep):
    """Summed over the labels that are not in keep."""
    dims = [i for i, label in enumerate(labels) if label not in keep]
    return (x.sum(dims) if dims else x), [label for label in labels if label in keep]


def _einsum_pair(x, labels_x, y, labels_y, keep, sizes):
    """x and y multiplied, summed over the labels that both have and keep lacks."""
    x, labels_x = _einsum_reduce(x, labels_x, keep | set(labels_y))
    y, labels_y = _einsum_reduce(y, labels_y, keep | set(labels_x))
    batch = [label for label in labels_x if label in labels_y and label in keep]
    inner = [label for label in labels_x if label in labels_y and label not in keep]
    free_x = [label for label in labels_x if label not in labels_y]
    free_y = [label for label in labels_y if label not in labels_x]

    def arranged(x, labels, order, *groups):
        x = x.permute(*(labels.index(label) for label in order))
        return x.reshape(*(math.prod(sizes[label] for label in group) for group in groups))

    if inner:
        x = arranged(x, labels_x, batch + free_x + inner, batch, free_x, inner)
        y = arranged(y, labels_y, batch + inner + free_y, batch, inner, free_y)
        out = x @ y
    else:
        x = arranged(x, labels_x, batch + free_x, batch, free_x, [])
        y = arranged(y, labels_y, batch + free_y, batch, [], free_y)
        out = x * y
    labels = batch + free_x + free_y
    return out.reshape(*(sizes[label] for label in labels)), labels


# Checking gradients ----------------------------------------------------------------------------------


class GradcheckError(RuntimeError):
    """A gradient that differs from finite differences."""


def gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, raise_exception=True):
    """Compare the gradients of `function` with central differences in float64.

    The outputs are weighted with fixed irregular numbers and summed; each element of each input is
    moved by eps both ways.

    Parameters
    ----------
    function : callable
        Takes the inputs, returns a Tensor or several.
    inputs : Tensor or sequence of Tensors
        Those that require a gradient are checked. A float64 input is itself moved, and moved back, so that it
        may be a parameter that the function uses on its own; a float32 input goes in as a float64 copy.
    eps, atol, rtol : float
        The step, and the tolerance |analytic - numeric| <= atol + rtol |numeric|.
    raise_exception : bool
        Whether a failure raises or returns False.

    Returns
    -------
    bool

    Raises
    ------
    GradcheckError
        Names the input and the element that differs most.
    ValueError
        When no input or no output requires a gradient.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and (x.data.dtype != np.float64 or not x.data.flags.writeable):
            inputs[i] = Tensor(x.data.astype(np.float64), x.requires_grad)
    checked = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not checked:
        raise ValueError("gradcheck: no input is a Tensor that requires a gradient")

    def outputs():
        result = function(*inputs)
        return [y for y in ([result] if isinstance(result, Tensor) else result) if isinstance(y, Tensor)]

    def weights(shape):
        n = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
        return (0.5 + np.sin(12.9898 * n) ** 2).reshape(shape)

    def value():
        with no_grad():
            return sum(float((y.data * weights(y.shape)).sum()) for y in outputs())

    grads = [x.grad for _, x in checked]
    for _, x in checked:
        x._grad = None
    try:
        total = 0.0
        for y in outputs():
            if y.requires_grad:
                total = (y * weights(y.shape)).sum() + total
        if not isinstance(total, Tensor):
            raise ValueError("gradcheck: no output of the function requires a gradient")
        total.backward()
        analytic = [np.zeros_like(x.data) if x.grad is None else np.array(x.grad) for _, x in checked]
    finally:
        for (_, x), grad in zip(checked, grads):
            x._grad = grad
    if value() != value():
        raise GradcheckError("gradcheck: two calls of the function differ; is there dropout in it?")
    for (i, x), expected in zip(checked, analytic):
        numeric = np.empty_like(x.data)
        for element in np.ndindex(x.shape):
            before = x.data[element]
            x.data[element] = before + eps
            above = value()
            x.data[element] = before - eps
            below = value()
            x.data[element] = before
            numeric[element] = (above - below) / (2 * eps)
        excess = np.asarray(np.abs(expected - numeric) - (atol + rtol * np.abs(numeric)))
        excess[np.isnan(excess)] = np.inf
        if x.data.size and excess.max() > 0:
            if not raise_exception:
                return False
            worst = tuple(int(k) for k in np.unravel_index(excess.argmax(), excess.shape))
            raise GradcheckError(
                f"gradcheck: input {i}, element {worst}: backward gives {expected[worst]:.6g}, "
                f"finite differences give {numeric[worst]:.6g}"
            )
    return True
