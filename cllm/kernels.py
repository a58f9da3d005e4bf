"""The one door to the compiled kernels: checks, allocates, picks threads; NumPy arrays in and out.

Inputs are float32 or float64 arrays, not mixed; they may be strided or read-only (copied when needed).
``out=`` takes an array, or a tuple where there are several outputs: each must have the result's shape
and dtype, be C-contiguous and writable, and must not overlap an input unless a docstring allows it.
Nothing is written before all arguments have passed their checks. Results are the same bits at any
thread count. Letters: B batch size, T sequence length, C channels, H heads, D head size, V vocabulary.
"""

import math
import os

import numpy as np

from cllm._core.pool import empty
from cllm._kernels import gemm as _gemm
from cllm._kernels import isa

__all__ = ["get_num_threads", "isa", "set_num_threads"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


# Threads ---------------------------------------------------------------------------------------------


def _cores():
    """The cores that this process may use: its affinity mask, limited by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 limit to read
    return cores


_n_threads = _cores()


def set_num_threads(n):
    """Set the number of threads that kernels called from this process may use.

    Parameters
    ----------
    n : int
        At least 1. Results do not depend on it.
    """
    global _n_threads
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"set_num_threads: n is {n!r}, it must be an integer of at least 1")
    _n_threads = int(n)


def get_num_threads():
    """The number of threads that kernels use; at first the cores that this process may use."""
    return _n_threads


if hasattr(os, "register_at_fork"):
    # libgomp's pool does not survive a fork: a forked child runs the kernels serially.
    os.register_at_fork(after_in_child=lambda: set_num_threads(1))


# Checks ----------------------------------------------------------------------------------------------


def _inputs(function, **arrays):
    """The arrays, C-contiguous and of one float dtype; None stays None.

    Raises
    ------
    TypeError
        When an array is not float32 or float64, or two of them differ.
    """
    first = None
    result = []
    for name, array in arrays.items():
        if array is None:
            result.append(None)
            continue
        if type(array) is not np.ndarray:
            array = np.asarray(array)
        dtype = array.dtype
        if dtype not in _FLOATS:
            raise TypeError(f"{function}: {name} is {dtype}, it must be float32 or float64")
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            raise TypeError(
                f"{function}: {name} is {dtype} but {first[0]} is {first[1]}; all must have one dtype"
            )
        flags = array.flags
        result.append(array if flags.c_contiguous and flags.aligned else np.array(array, order="C"))
    return result


def _integers(function, name, array):
    """The array as C-contiguous int64."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name} is {array.dtype}, it must be an integer array")
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_out(function, out, shape, dtype, inputs, name="out"):
    """Raise unless `out` can take a result of this shape and dtype."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{function}: {name} is {type(out).__name__}, it must be a NumPy array")
    if out.shape != tuple(shape):
        raise ValueError(f"{function}: {name} is {out.shape}, it must be {tuple(shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{function}: {name} is {out.dtype}, it must be {dtype}")
    if not out.flags.c_contiguous:
        raise ValueError(f"{function}: {name} is strided, it must be C-contiguous")
    if not out.flags.writeable:
        raise ValueError(f"{function}: {name} is read-only, it must be writable")
    for array in inputs:
        if array is not None and np.may_share_memory(out, array):
            raise ValueError(f"{function}: {name} overlaps an input, it must have its own memory")


def _out(function, out, shape, dtype, inputs, name="out"):
    """`out` after its checks, or a new array from the pool when it is None."""
    if out is None:
        return empty(shape, dtype)
    _check_out(function, out, shape, dtype, inputs, name)
    return out


def _outs(function, out, names, shapes, dtype, inputs):
    """As `_out` for several results: `out` is None or a tuple with an array or None for each."""
    if out is None:
        out = (None,) * len(names)
    elif not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"{function}: out must be a tuple of {len(names)} arrays ({', '.join(names)})")
    for i, array in enumerate(out):
        if array is not None:
            others = [other for other in out[:i] if other is not None]
            _check_out(function, array, shapes[i], dtype, [*inputs, *others], f"out[{i}] ({names[i]})")
    return [empty(shape, dtype) if array is None else array for array, shape in zip(out, shapes)]


def _require(condition, function, message):
    if not condition:
        raise ValueError(f"{function}: {message}")


# Linear and matrix products --------------------------------------------------------------------------


def _rows(x):
    """How many rows x (..., C) has."""
    return math.prod(x.shape[:-1])


def _check_linear(function, x, weight):
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; they must be (..., I) and (O, I)")


def linear_forward(x, weight, bias=None, out=None):
    """y = x weight^T + bias.

    Parameters
    ----------
    x : (..., I) array
    weight : (O, I) array
    bias : (O,) array, optional
    out : (..., O) array, optional

    Returns
    -------
    (..., O) array

    Raises
    ------
    ValueError
        When shapes do not match or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    inputs = x, weight, bias = _inputs("linear_forward", x=x, weight=weight, bias=bias)
    _check_linear("linear_forward", x, weight)
    n_out, n_in = weight.shape
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"linear_forward: bias is {bias.shape}, it must be {(n_out,)}")
    out = _out("linear_forward", out, (*x.shape[:-1], n_out), x.dtype, inputs)
    n = _rows(x)
    _gemm.linear_forward(x.reshape(n, n_in), weight, bias, out.reshape(n, n_out), _n_threads)
    return out


def linear_backward(dy, x, weight, *, bias=True, out=None, accumulate=False):
    """Gradients of `linear_forward`: dx = dy weight, dweight = dy^T x, dbias = the sum of dy's rows.

    Parameters
    ----------
    dy : (..., O) array
    x : (..., I) array
    weight : (O, I) array
    bias : bool
        Whether there is a bias; without it dbias is None.
    out : tuple of three arrays, optional
        For dx, dweight and dbias; None entries are allocated.
    accumulate : bool
        Add dweight and dbias to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., I) array
    dweight : (O, I) array
    dbias : (O,) array or None

    Raises
    ------
    ValueError, TypeError
        As `linear_forward`.
    """
    inputs = dy, x, weight = _inputs("linear_backward", dy=dy, x=x, weight=weight)
    _check_linear("linear_backward", x, weight)
    n_out, n_in = weight.shape
    if dy.shape != (*x.shape[:-1], n_out):
        raise ValueError(f"linear_backward: dy is {dy.shape}, it must be {(*x.shape[:-1], n_out)}")
    if accumulate and (out is None or out[1] is None or (bias and out[2] is None)):
        raise ValueError("linear_backward: accumulate=True needs arrays for dweight and dbias in out")
    names, shapes = ("dx", "dweight", "dbias"), (x.shape, weight.shape, (n_out,))
    dx, dweight, dbias = _outs("linear_backward", out, names, shapes, x.dtype, inputs)
    n = _rows(x)
    dy, x = dy.reshape(n, n_out), x.reshape(n, n_in)
    _gemm.linear_backward_input(dy, weight, dx.reshape(n, n_in), _n_threads)
    _gemm.linear_backward_weight(dy, x, dweight, accumulate, _n_threads)
    if not bias:
        return dx, dweight, None
    _gemm.column_sums(dy, dbias, accumulate, _n_threads)
    return dx, dweight, dbias


def _strided_matrices(x, batch):
    """x (..., M, K) for the batched product: the array (copied when neither stride is 1), where each matrix of the
    broadcast batch starts, and the two strides, counted in elements."""
    size = x.itemsize
    steps = [1 if n == 1 else stride // size for n, stride in zip(x.shape[-2:], x.strides[-2:])]
    if 1 not in steps or min(steps) < 1 or not x.flags.aligned:
        x = np.array(x, order="C")
        steps = [x.shape[-1], 1]
    starts = np.zeros((), np.intp)
    for n, stride in zip(batch, np.broadcast_to(x, (*batch, *x.shape[-2:])).strides):
        starts = np.add.outer(starts, np.arange(n, dtype=np.intp) * (stride // size))
    return x, starts.reshape(-1), steps


def matmul(a, b, out=None):
    """Matrix product over the last two dimensions; the leading ones broadcast.

    Parameters
    ----------
    a : (..., M, K) array
    b : (..., K, N) array
        Transposed views are read in place.
    out : (..., M, N) array, optional

    Returns
    -------
    (..., M, N) array

    Raises
    ------
    ValueError
        When K differs, the leading dimensions do not broadcast or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype not in _FLOATS or a.dtype != b.dtype:
        raise TypeError(f"matmul: a is {a.dtype}, b is {b.dtype}; both must be float32 or both float64")
    wrong = f"matmul: a is {a.shape}, b is {b.shape}; they must be (..., M, K) and (..., K, N)"
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(wrong)
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"{wrong}, with leading dimensions that broadcast") from None
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    out = _out("matmul", out, (*batch, M, N), a.dtype, (a, b))
    if out.size == 0:
        return out
    if K == 0:
        out[...] = 0
        return out
    a, a_starts, (ars, acs) = _strided_matrices(a, batch)
    b, b_starts, (brs, bcs) = _strided_matrices(b, batch)
    result = out.reshape(a_starts.size, M, N)
    _gemm.matmul(a, a_starts, ars, acs, b, b_starts, brs, bcs, K, result, _n_threads)
    return out


# GELU feed-forward -----------------------------------------------------------------------------------


def feed_forward_forward(x, w1, b1, w2, b2, approximate="tanh"):
    """y = GELU(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, section 3.3, with GELU).

    Parameters
    ----------
    x : (..., C) array
    w1 : (F, C) array
    b1 : (F,) array or None
    w2 : (O, F) array
    b2 : (O,) array or None
    approximate : {"tanh", "none"}
        As `gelu_forward`.

    Returns
    -------
    y : (..., O) array
    pre : (..., F) array
        x w1^T + b1, which the backward pass needs; GELU's output is computed again there.
    """
    pre = linear_forward(x, w1, b1)
    return linear_forward(gelu_forward(pre, approximate), w2, b2), pre


def feed_forward_backward(dy, x, pre, w1, w2, *, approximate="tanh", bias=True, out=None, accumulate=False):
    """Gradients of `feed_forward_forward`.

    Parameters
    ----------
    dy : (..., O) array
    x, pre, w1, w2
        As given to and returned by the forward pass.
    bias : bool
        Whether there are biases; without them db1 and db2 are None.
    out : tuple of five arrays, optional
        For dx, dw1, db1, dw2 and db2; None entries are allocated.
    accumulate : bool
        Add the parameters' gradients to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., C) array
    dw1, db1, dw2, db2 : arrays of the parameters' shapes
    """
    out = (None,) * 5 if out is None else out
    hidden = gelu_forward(pre, approximate)
    dhidden, dw2, db2 = linear_backward(
        dy, hidden, w2, bias=bias, out=(None, out[3], out[4]), accumulate=accumulate
    )
    dpre = gelu_backward(dhidden, pre, approximate, out=hidden)
    dx, dw1, db1 = linear_backward(dpre, x, w1, bias=bias, out=(out[0], out[1], out[2]), accumulate=accumulate)
    return dx, dw1, db1, dw2, db2


