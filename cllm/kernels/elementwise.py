"""GELU and dropout."""

import math

from cllm._kernels import elementwise as _elementwise
from cllm.kernels import checks, threads

# GELU ------------------------------------------------------------------------------------------------


def _is_tanh(function, approximate):
    if approximate not in ("tanh", "none"):
        raise ValueError(f'{function}: approximate is {approximate!r}, it must be "tanh" or "none"')
    return approximate == "tanh"


def gelu_forward(x, approximate="tanh", out=None):
    """x Phi(x), with Phi the normal distribution function (Hendrycks & Gimpel 2016).

    Parameters
    ----------
    x : array of any shape
    approximate : {"tanh", "none"}
        "none" computes Phi by erf; "tanh" is their approximation
        0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which GPT-2 uses.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError
        When `approximate` is unknown or `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    tanh = _is_tanh("gelu_forward", approximate)
    inputs = (x,) = checks.floats("gelu_forward", x=x)
    out = checks.result("gelu_forward", out, x.shape, x.dtype, inputs)
    _elementwise.gelu_forward(x, out, tanh, threads.count)
    return out


def gelu_backward(dy, x, approximate="tanh", out=None):
    """dx = dy times the derivative of `gelu_forward` at x.

    Parameters
    ----------
    dy, x : arrays of one shape
    approximate : {"tanh", "none"}
        As in the forward pass.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError, TypeError
        As `gelu_forward`; also when shapes differ.
    """
    tanh = _is_tanh("gelu_backward", approximate)
    inputs = dy, x = checks.floats("gelu_backward", dy=dy, x=x)
    if dy.shape != x.shape:
        raise ValueError(f"gelu_backward: dy is {dy.shape}, x is {x.shape}; they must have one shape")
    out = checks.result("gelu_backward", out, x.shape, x.dtype, inputs)
    _elementwise.gelu_backward(dy, x, out, tanh, threads.count)
    return out


# Dropout ---------------------------------------------------------------------------------------------


def _dropout(function, name, x, p, key, out):
    inputs = (x,) = checks.floats(function, **{name: x})
    checks.real(function, p=p)
    if not 0 <= p <= 1:
        raise ValueError(f"{function}: p is {p}, it must be in [0, 1]")
    checks.key(function, key)
    out = checks.result(function, out, x.shape, x.dtype, inputs)
    limit = max(math.ceil((1 - p) * 2**32) - 1, 0)  # the largest hash that keeps an element
    _elementwise.dropout(x, out, key, limit, 1 / (1 - p) if p < 1 else 0.0, threads.count)
    return out


def dropout_forward(x, p, key, out=None):
    """x with each element made 0 with probability p, the others divided by 1 - p (Srivastava et al. 2014).

    Parameters
    ----------
    x : array of any shape
    p : float
        In [0, 1].
    key : int
        In [0, 2**64). Element i (in C order) is kept when hash(key, i) < (1 - p) 2**32: the same key
        draws the same mask, at any thread count.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape
        NaN where x is NaN, also where the element is dropped.

    Raises
    ------
    ValueError
        When p or key is out of range or `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    return _dropout("dropout_forward", "x", x, p, key, out)


def dropout_backward(dy, p, key, out=None):
    """The gradient of `dropout_forward` with the same p and key: dy under the same mask.

    Parameters
    ----------
    dy : array of any shape
    p, key
        As in the forward pass.
    out : array of dy's shape, optional

    Returns
    -------
    array of dy's shape

    Raises
    ------
    ValueError, TypeError
        As `dropout_forward`.
    """
    return _dropout("dropout_backward", "dy", dy, p, key, out)
