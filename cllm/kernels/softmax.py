"""Softmax and log-softmax over the last axis."""

from cllm._core import checks
from cllm._kernels import softmax as _softmax
from cllm.kernels import threads


def _row_length(x):
    """The last axis; a 0-d array is one row of one element."""
    return x.shape[-1] if x.ndim else 1


def _forward(function, x, out, logs):
    inputs = (x,) = checks.floats(function, x=x)
    out = checks.result(function, out, x.shape, x.dtype, inputs)
    if x.size:
        _softmax.softmax_forward(x, out, _row_length(x), logs, threads.count)
    return out


def _backward(function, dy, y, out, logs):
    inputs = dy, y = checks.floats(function, dy=dy, y=y)
    if dy.shape != y.shape:
        raise ValueError(f"{function}: dy is {dy.shape}, y is {y.shape}; they must have one shape")
    out = checks.result(function, out, y.shape, y.dtype, inputs)
    if y.size:
        _softmax.softmax_backward(dy, y, out, _row_length(y), logs, threads.count)
    return out


def softmax_forward(x, out=None):
    """exp(x) over its sum along the last axis.

    Parameters
    ----------
    x : (..., V) array
    out : (..., V) array, optional

    Returns
    -------
    (..., V) array
        The row's largest element is subtracted first, so nothing overflows. As in torch, a row with a NaN or
        +inf, and one of -inf alone, is NaN throughout; beside finite elements -inf gives 0.

    Raises
    ------
    ValueError
        When `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    return _forward("softmax_forward", x, out, False)


def softmax_backward(dy, y, out=None):
    """dx = y (dy - sum(dy y)), with y the result of `softmax_forward`.

    Parameters
    ----------
    dy, y : (..., V) arrays
    out : (..., V) array, optional

    Returns
    -------
    (..., V) array

    Raises
    ------
    ValueError, TypeError
        As `softmax_forward`; also when shapes differ.
    """
    return _backward("softmax_backward", dy, y, out, False)


def log_softmax_forward(x, out=None):
    """log(softmax(x)) along the last axis, without taking the log of a rounded 0.

    Parameters
    ----------
    x : (..., V) array
    out : (..., V) array, optional

    Returns
    -------
    (..., V) array
        NaN in the rows where `softmax_forward` gives it.

    Raises
    ------
    ValueError, TypeError
        As `softmax_forward`.
    """
    return _forward("log_softmax_forward", x, out, True)


def log_softmax_backward(dy, y, out=None):
    """dx = dy - exp(y) sum(dy), with y the result of `log_softmax_forward`.

    Parameters
    ----------
    dy, y : (..., V) arrays
    out : (..., V) array, optional

    Returns
    -------
    (..., V) array

    Raises
    ------
    ValueError, TypeError
        As `softmax_forward`; also when shapes differ.
    """
    return _backward("log_softmax_backward", dy, y, out, True)
