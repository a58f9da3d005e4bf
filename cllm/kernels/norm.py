"""Layer norm."""

from cllm._core.pool import empty
from cllm._kernels import norm as _norm
from cllm.kernels import checks, threads


def _check_norm(function, x, weight, bias):
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; they must be (..., C), (C,)")
    if not weight.size:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; C must be at least 1")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{function}: bias is {bias.shape}, it must be {weight.shape}")


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
    checks.real(function, eps=eps)
    if not eps >= 0:
        raise ValueError(f"{function}: eps is {eps}, it must be at least 0")
    shapes = x.shape, x.shape[:-1], x.shape[:-1]
    y, mean, rstd = checks.results(function, out, ("y", "mean", "rstd"), shapes, x.dtype, inputs)
    _norm.layer_norm_forward(x, weight, bias, eps, y, mean, rstd, threads.count)
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
    _norm.layer_norm_backward(
        dy, x, weight, mean, rstd, dx, dweight, dbias, partials, accumulate, threads.count
    )  # fmt: skip
    return dx, dweight, dbias
