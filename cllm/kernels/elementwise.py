"""Activations and dropout."""

import math

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import elementwise as _elementwise
from cllm.kernels import threads

_CODES = {name: code for code, name in enumerate(_elementwise.ACTIVATIONS)}

#: What a feed-forward block can have between its two matrices.
ACTIVATIONS = (*_CODES, "swiglu")

# Activations -----------------------------------------------------------------------------------------


def _forward(function, activation, x, out):
    inputs = (x,) = checks.floats(function, x=x)
    out = checks.result(function, out, x.shape, x.dtype, inputs)
    _elementwise.activation_forward(_CODES[activation], x, out, threads.count)
    return out


def _same_shapes(function, **arrays):
    """Raise unless all arrays have the shape of the first."""
    (first, shape), *others = ((name, array.shape) for name, array in arrays.items())
    for name, other in others:
        if other != shape:
            raise ValueError(f"{function}: {first} is {shape}, {name} is {other}; they must have one shape")


def _backward(function, activation, out, **arrays):
    """arrays: dy, and the input or the output of the forward pass."""
    inputs = dy, saved = checks.floats(function, **arrays)
    _same_shapes(function, **dict(zip(arrays, inputs)))
    out = checks.result(function, out, dy.shape, dy.dtype, inputs)
    _elementwise.activation_backward(_CODES[activation], dy, saved, out, threads.count)
    return out


def _gelu_form(function, approximate):
    if approximate not in ("tanh", "none"):
        raise ValueError(f'{function}: approximate is {approximate!r}, it must be "tanh" or "none"')
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def gelu_forward(x, approximate="none", out=None):
    """x Phi(x), with Phi the normal distribution function (Hendrycks & Gimpel 2016).

    Parameters
    ----------
    x : array of any shape
    approximate : {"none", "tanh"}
        "none" computes Phi by erf; "tanh" is their approximation
        0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which GPT-2 uses.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape
        0 where x is -inf.

    Raises
    ------
    ValueError
        When `approximate` is unknown or `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    return _forward("gelu_forward", _gelu_form("gelu_forward", approximate), x, out)


def gelu_backward(dy, x, approximate="none", out=None):
    """dx = dy times the derivative of `gelu_forward` at x.

    Parameters
    ----------
    dy, x : arrays of one shape
    approximate : {"none", "tanh"}
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
    return _backward("gelu_backward", _gelu_form("gelu_backward", approximate), out, dy=dy, x=x)


def relu_forward(x, out=None):
    """max(x, 0); NaN where x is NaN.

    Parameters
    ----------
    x : array of any shape
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError
        When `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    return _forward("relu_forward", "relu", x, out)


def relu_backward(dy, x, out=None):
    """dy where x > 0, 0 where x <= 0 whatever dy is, NaN where x is NaN.

    Parameters
    ----------
    dy, x : arrays of one shape
        The result of `relu_forward` may stand for x.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError, TypeError
        As `relu_forward`; also when shapes differ.
    """
    return _backward("relu_backward", "relu", out, dy=dy, x=x)


def relu_squared_forward(x, out=None):
    """max(x, 0)^2 (So et al. 2021); NaN where x is NaN.

    Parameters and errors as `relu_forward`.
    """
    return _forward("relu_squared_forward", "relu_squared", x, out)


def relu_squared_backward(dy, x, out=None):
    """dy 2 x where x > 0, 0 where x <= 0 whatever dy is, NaN where x is NaN.

    Parameters and errors as `relu_backward`; x is the input of the forward pass.
    """
    return _backward("relu_squared_backward", "relu_squared", out, dy=dy, x=x)


def silu_forward(x, out=None):
    """x sigmoid(x) (Hendrycks & Gimpel 2016; Elfwing et al. 2018).

    Parameters and errors as `relu_forward`. The limits at the ends are kept: 0 at -inf, where
    -inf * 0 would give NaN, and inf at inf.
    """
    return _forward("silu_forward", "silu", x, out)


def silu_backward(dy, x, out=None):
    """dy s (1 + x (1 - s)), with s = sigmoid(x).

    Parameters and errors as `relu_backward`; x is the input of the forward pass.
    """
    return _backward("silu_backward", "silu", out, dy=dy, x=x)


def tanh_forward(x, out=None):
    """tanh(x), to a relative error under 3e-7 in float32 also where x is tiny.

    Parameters and errors as `relu_forward`.
    """
    return _forward("tanh_forward", "tanh", x, out)


def tanh_backward(dy, y, out=None):
    """dy (1 - y^2), with y the result of `tanh_forward`.

    Parameters and errors as `relu_backward`.
    """
    return _backward("tanh_backward", "tanh", out, dy=dy, y=y)


def sigmoid_forward(x, out=None):
    """1 / (1 + exp(-x)), without overflow.

    Parameters and errors as `relu_forward`.
    """
    return _forward("sigmoid_forward", "sigmoid", x, out)


def sigmoid_backward(dy, y, out=None):
    """dy y (1 - y), with y the result of `sigmoid_forward`.

    Parameters and errors as `relu_backward`.
    """
    return _backward("sigmoid_backward", "sigmoid", out, dy=dy, y=y)


def swiglu_forward(gate, up, out=None):
    """silu(gate) up (Shazeer 2020).

    Parameters
    ----------
    gate, up : arrays of one shape
    out : array of their shape, optional

    Returns
    -------
    array of their shape

    Raises
    ------
    ValueError
        When shapes differ or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    inputs = gate, up = checks.floats("swiglu_forward", gate=gate, up=up)
    _same_shapes("swiglu_forward", gate=gate, up=up)
    out = checks.result("swiglu_forward", out, gate.shape, gate.dtype, inputs)
    _elementwise.swiglu_forward(*(x.reshape(1, -1) for x in (gate, up, out)), threads.count)
    return out


def swiglu_backward(dy, gate, up, out=None):
    """Gradients of `swiglu_forward`: dgate = dy up silu'(gate), dup = dy silu(gate).

    Parameters
    ----------
    dy, gate, up : arrays of one shape
    out : tuple of two arrays, optional
        For dgate and dup; None entries are allocated.

    Returns
    -------
    dgate, dup : arrays of their shape

    Raises
    ------
    ValueError, TypeError
        As `swiglu_forward`.
    """
    function = "swiglu_backward"
    inputs = dy, gate, up = checks.floats(function, dy=dy, gate=gate, up=up)
    _same_shapes(function, dy=dy, gate=gate, up=up)
    shapes = gate.shape, gate.shape
    dgate, dup = checks.results(function, out, ("dgate", "dup"), shapes, gate.dtype, inputs)
    rows = (x.reshape(1, -1) for x in (dy, gate, up, dgate, dup))
    _elementwise.swiglu_backward(*rows, threads.count)
    return dgate, dup


# What a feed-forward block calls on contiguous arrays of fitting shapes.


def _halves(pre, n_rows):
    """The gates and the others of pre (..., 2 F), as views (n_rows, F)."""
    n = pre.shape[-1] // 2
    rows = pre.reshape(n_rows, 2 * n)
    return rows[:, :n], rows[:, n:]


def activate(pre, activation):
    """The activation of pre (..., F); of pre (..., 2 F) for swiglu, whose gates come first."""
    if activation == "swiglu":
        n_rows, n = checks.n_rows(pre), pre.shape[-1] // 2
        hidden = empty((*pre.shape[:-1], n), pre.dtype)
        _elementwise.swiglu_forward(*_halves(pre, n_rows), hidden.reshape(n_rows, n), threads.count)
    else:
        hidden = empty(pre.shape, pre.dtype)
        _elementwise.activation_forward(_CODES[activation], pre, hidden, threads.count)
    return hidden


def activate_backward(dhidden, pre, hidden, activation):
    """dpre of `activate`, with hidden its result, which may be overwritten."""
    if activation == "swiglu":
        n_rows, dpre = checks.n_rows(pre), empty(pre.shape, pre.dtype)
        rows = dhidden.reshape(n_rows, dhidden.shape[-1])
        _elementwise.swiglu_backward(rows, *_halves(pre, n_rows), *_halves(dpre, n_rows), threads.count)
        return dpre
    saved, dpre = pre, hidden
    if activation in ("tanh", "sigmoid"):
        saved, dpre = hidden, empty(pre.shape, pre.dtype)
    _elementwise.activation_backward(_CODES[activation], dhidden, saved, dpre, threads.count)
    return dpre


# Dropout ---------------------------------------------------------------------------------------------


def _dropout(function, name, x, p, key, out):
    inputs = (x,) = checks.floats(function, **{name: x})
    (p,) = checks.real(function, p=p)
    if not 0 <= p <= 1:
        raise ValueError(f"{function}: p is {p}, it must be in [0, 1]")
    key = checks.key(function, key)
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
