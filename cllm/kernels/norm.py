"""Layer norm and RMS norm."""

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import norm as _norm
from cllm.kernels import threads


def _check_norm(function, x, weight, bias):
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; they must be (..., C), (C,)")
    if not weight.size:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; C must be at least 1")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{function}: bias is {bias.shape}, it must be {weight.shape}")


def _check_eps(function, eps):
    """eps as a float of at least 0."""
    (number,) = checks.real(function, eps=eps)
    if not number >= 0:
        raise ValueError(f"{function}: eps is {eps}, it must be at least 0")
    return number


def layer_norm_forward(x, weight, bias, eps=1e-5, out=None):
    """y = (x - mean) rstd weight + bias over the last axis (Ba, Kiros & Hinton 2016).

    Parameters
    ----------
    x : (..., C) array
        C is at least 1.
    weight : (C,) array
    bias : (C,) array or None
    eps : float
        Added to the variance (which divides by C); at least 0.
    out : tuple of three arrays, optional
        For y, mean and rstd; None entries are allocated.

    Returns
    -------
    y : (..., C) array
    mean, rstd : (...) arrays
        Each row's mean and 1 / sqrt(variance + eps), which the backward pass needs.

    Raises
    ------
    ValueError
        When shapes do not match, eps is negative or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    function = "layer_norm_forward"
    inputs = x, weight, bias = checks.floats(function, x=x, weight=weight, bias=bias)
    _check_norm(function, x, weight, bias)
    eps = _check_eps(function, eps)
    shapes = x.shape, x.shape[:-1], x.shape[:-1]
    y, mean, rstd = checks.results(function, out, ("y", "mean", "rstd"), shapes, x.dtype, inputs)
    _norm.norm_forward(x, weight, bias, eps, y, mean, rstd, threads.count)
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd, *, bias=True, out=None, accumulate=False):
    """Gradients of `layer_norm_forward`.

    With n = (x - mean) rstd and g = dy weight, the means over the last axis and the sums over all rows:
    dx = rstd (g - mean(g) - n mean(g n)), dweight = sum(dy n), dbias = sum(dy).

    Parameters
    ----------
    dy, x : (..., C) arrays
    weight : (C,) array
    mean, rstd : (...) arrays
        As the forward pass returned them.
    bias : bool
        Whether there is a bias; without it dbias is None.
    out : tuple of three arrays, optional
        For dx, dweight and dbias; None entries are allocated.
    accumulate : bool
        Add dweight and dbias to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., C) array
    dweight : (C,) array
    dbias : (C,) array or None

    Raises
    ------
    ValueError, TypeError
        As `layer_norm_forward`.
    """
    function = "layer_norm_backward"
    inputs = dy, x, weight, mean, rstd = checks.floats(
        function, dy=dy, x=x, weight=weight, mean=mean, rstd=rstd
    )
    _check_norm(function, x, weight, None)
    rows = x.shape[:-1]
    for name, array, shape in (("dy", dy, x.shape), ("mean", mean, rows), ("rstd", rstd, rows)):
        if array.shape != shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {shape}")
    names, shapes = ("dx", "dweight", "dbias"), (x.shape, weight.shape, weight.shape)
    added = () if not accumulate else names[1:] if bias else names[1:2]
    dx, dweight, dbias = checks.results(function, out, names, shapes, x.dtype, inputs, added)
    dbias = dbias if bias else None
    partials = empty(_norm.partials_shape(mean.size, weight.size), x.dtype)
    _norm.norm_backward(
        dy, x, weight, True, mean, rstd, dx, dweight, dbias, partials, accumulate, threads.count
    )  # fmt: skip
    if weight.size == 1:  # its own mean: 0 (or NaN), of which a fused product leaves its rounding times rstd
        dx *= 0
    return dx, dweight, dbias


# RMS norm --------------------------------------------------------------------------------------------


def _rms_norm_inputs(function, weight, **arrays):
    """The arrays and weight as a kernel reads them; weight may be None, and is then ones."""
    given = {} if weight is None else {"weight": weight}
    found = dict(zip([*arrays, *given], checks.floats(function, **arrays, **given)))
    x = found["x"]
    if weight is not None:
        _check_norm(function, x, found["weight"], None)
        return list(found.values())
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{function}: x is {x.shape}, it must be (..., C) with C at least 1")
    return [*found.values(), np.ones(x.shape[-1], x.dtype)]


def rms_norm_forward(x, weight=None, eps=None, out=None):
    """y = x rstd weight over the last axis (Zhang & Sennrich 2019).

    Parameters
    ----------
    x : (..., C) array
        C is at least 1.
    weight : (C,) array, optional
    eps : float, optional
        Added to the mean of x^2; at least 0. None is the dtype's machine epsilon.
    out : tuple of two arrays, optional
        For y and rstd; None entries are allocated.

    Returns
    -------
    y : (..., C) array
    rstd : (...) array
        1 / sqrt(mean(x^2) + eps) of each row, which the backward pass needs.

    Raises
    ------
    ValueError
        When shapes do not match, eps is negative or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    function = "rms_norm_forward"
    inputs = x, weight = _rms_norm_inputs(function, weight, x=x)
    eps = float(np.finfo(x.dtype).eps) if eps is None else _check_eps(function, eps)
    y, rstd = checks.results(function, out, ("y", "rstd"), (x.shape, x.shape[:-1]), x.dtype, inputs)
    _norm.norm_forward(x, weight, None, eps, y, None, rstd, threads.count)
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd, *, out=None, accumulate=False):
    """Gradients of `rms_norm_forward`.

    With n = x rstd and g = dy weight, the mean over the last axis and the sum over all rows:
    dx = rstd (g - n mean(g n)), dweight = sum(dy n).

    Parameters
    ----------
    dy, x : (..., C) arrays
    weight : (C,) array or None
        Without it dweight is None.
    rstd : (...) array
        As the forward pass returned it.
    out : tuple of two arrays, optional
        For dx and dweight; None entries are allocated.
    accumulate : bool
        Add dweight to the array given in `out` instead of assigning.

    Returns
    -------
    dx : (..., C) array
    dweight : (C,) array or None

    Raises
    ------
    ValueError, TypeError
        As `rms_norm_forward`.
    """
    function, weighted = "rms_norm_backward", weight is not None
    inputs = dy, x, rstd, weight = _rms_norm_inputs(function, weight, dy=dy, x=x, rstd=rstd)
    for name, array, shape in (("dy", dy, x.shape), ("rstd", rstd, x.shape[:-1])):
        if array.shape != shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {shape}")
    added = ("dweight",) if accumulate and weighted else ()
    shapes = x.shape, weight.shape
    dx, dweight = checks.results(function, out, ("dx", "dweight"), shapes, x.dtype, inputs, added)
    dweight = dweight if weighted else None
    partials = empty(_norm.partials_shape(rstd.size, weight.size), x.dtype)
    mean = np.zeros(rstd.shape, x.dtype)
    _norm.norm_backward(
        dy, x, weight, False, mean, rstd, dx, dweight, None, partials, accumulate, threads.count
    )  # fmt: skip
    return dx, dweight
