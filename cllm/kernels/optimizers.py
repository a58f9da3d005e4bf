"""Optimizers' updates, in place."""

import numpy as np

from cllm._kernels import optimizers as _optimizers
from cllm.kernels import checks, threads


def _updated(function, param, grad, **state):
    """`grad` ready to be read; raises unless `param` and the state arrays can be changed in place."""
    _, grad = checks.floats(function, param=param, grad=grad)
    fits = grad.shape == np.shape(param)
    checks.require(fits, function, f"grad is {grad.shape}, param is {np.shape(param)}")
    seen = [grad]
    for name, array in {"param": param, **state}.items():
        if array is not None or name not in checks.OPTIONAL:
            checks.check_out(function, array, grad.shape, grad.dtype, seen, name)
            seen.append(array)
    return grad


def _check_scalars(function, fractions=(), **values):
    """Raise unless each value is finite and not negative, each of `fractions` below 1, and eps above 0."""
    checks.real(function, **values)
    for name, value in values.items():
        if not 0 <= value < np.inf:  # also catches NaN
            raise ValueError(f"{function}: {name} is {value}, it must be a finite number of at least 0")
        if name in fractions and value >= 1:
            raise ValueError(f"{function}: {name} is {value}, it must be below 1")
        if name == "eps" and value == 0:  # 0 / 0 where a gradient has always been zero
            raise ValueError(f"{function}: eps is {value}, it must be above 0")


def _check_eps(function, eps, dtype):
    """Raise when eps vanishes in the arrays' dtype, which would let 0 / 0 in."""
    tiny = np.finfo(dtype).tiny
    if eps < tiny:
        raise ValueError(f"{function}: eps is {eps}, it must be at least {tiny} in {dtype}")


def sgd_update(
    param, grad, momentum_buffer=None, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
    first=False, maximize=False,
):  # fmt: skip
    """Stochastic gradient descent: one step, in place.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        buffer = g                                         when first
        buffer = momentum * buffer + (1 - dampening) * g   otherwise
        param -= lr * (g + momentum * buffer)              when nesterov
        param -= lr * buffer                               otherwise; lr * g without momentum

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    momentum_buffer : ndarray like `param`, or None when momentum is 0
        Changed. Momenta that decay below the smallest normal number become 0.
    first : bool
        Whether this is the first step: the buffer's contents are then not read.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013, in the form that PyTorch uses.
    """
    _check_scalars("sgd_update", lr=lr, momentum=momentum, weight_decay=weight_decay)
    checks.real("sgd_update", dampening=dampening)
    checks.require(np.isfinite(dampening), "sgd_update", f"dampening is {dampening}, it must be finite")
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"sgd_update: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    checks.require(
        not nesterov or (momentum > 0 and dampening == 0),
        "sgd_update", "nesterov needs a momentum above 0 and a dampening of 0",
    )  # fmt: skip
    grad = _updated("sgd_update", param, grad, momentum_buffer=momentum_buffer)
    _optimizers.sgd(
        param, grad, momentum_buffer, -1.0 if maximize else 1.0, lr, weight_decay, momentum, 1 - dampening,
        nesterov, first, threads.count,
    )  # fmt: skip


def adam_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, v_max=None, maximize=False
):
    """Adam: one step, in place, with weight decay added to the gradient.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        param -= lr * m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    m, v : ndarray like `param`
        Running means of the gradient and of its square, zeros before the first step; changed. Values
        below the smallest normal number become 0.
    step : int
        Which step this is, from 1.
    v_max : ndarray like `param`, optional
        The largest `v` so far (AMSGrad), used in its place; changed.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015. Reddi, Kale and Kumar, "On
    the Convergence of Adam and Beyond", ICLR 2018 (`v_max`).
    """
    _adam("adam_update", param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, False)


def adamw_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, v_max=None,
    maximize=False,
):  # fmt: skip
    """AdamW: one step, in place. As `adam_update`, but the weights decay by themselves: the gradient is
    left alone and ``param *= 1 - lr * weight_decay`` comes first.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    _adam("adamw_update", param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, True)


def _adam(function, param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, decoupled):
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{function}: betas is {betas!r}, it must be a tuple of two numbers")
    beta1, beta2 = betas
    checks.real(function, step=step)
    _check_scalars(
        function, ("beta1", "beta2"), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
    checks.require(step >= 1, function, f"step is {step}, it must be at least 1")
    grad = _updated(function, param, grad, m=m, v=v, v_max=v_max)
    _check_eps(function, eps, grad.dtype)
    _optimizers.adam(
        param, grad, m, v, v_max, -1.0 if maximize else 1.0, lr / (1 - beta1**step), beta1, beta2,
        (1 - beta2**step) ** -0.5, eps, 1 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay, threads.count,
    )  # fmt: skip


def rmsprop_update(
    param, grad, v, *, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, momentum_buffer=None,
    grad_avg=None, maximize=False,
):  # fmt: skip
    """RMSprop: one step, in place.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        v = alpha * v + (1 - alpha) * g**2
        u = g / (sqrt(v) + eps)
        grad_avg = alpha * grad_avg + (1 - alpha) * g, and v - grad_avg**2 under the root     when given
        u = buffer = momentum * buffer + u                                                    with momentum
        param -= lr * u

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    v : ndarray like `param`
        Running mean of the squared gradient, zeros before the first step; changed.
    momentum_buffer : ndarray like `param`, or None when momentum is 0
        Zeros before the first step; changed.
    grad_avg : ndarray like `param`, optional
        Running mean of the gradient, zeros before the first step: gives the centred form; changed.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5: RMSprop", 2012. Graves, "Generating Sequences With Recurrent
    Neural Networks", 2013 (the centred form).
    """
    function = "rmsprop_update"
    _check_scalars(
        function, ("alpha",), lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"{function}: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    grad = _updated(function, param, grad, v=v, momentum_buffer=momentum_buffer, grad_avg=grad_avg)
    _check_eps(function, eps, grad.dtype)
    _optimizers.rmsprop(
        param, grad, v, grad_avg, momentum_buffer, -1.0 if maximize else 1.0, lr, alpha, eps, weight_decay,
        momentum, threads.count,
    )  # fmt: skip


def gap(a, b):
    """How many elements lie between the end of `a` and the start of `b` in memory, or -1.

    It is -1 unless both are contiguous views of one contiguous array of their dtype, `b` begins less than
    16 elements after `a` ends, and the elements between are zeros. A chain of such neighbours can be
    updated as one array: see `span`.
    """
    return _optimizers.gap(a, b)


def span(first, last):
    """The flat view from the start of `first` to the end of `last`, which a chain of neighbours joins."""
    if first is not last and (first.base is not last.base or not isinstance(first.base, np.ndarray)):
        raise ValueError("span: first and last must be views of one array")
    return _optimizers.span(first, last)


def sum_of_squares(x):
    """The sum of the squares of all elements, added up in float64, as a float.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64

    Raises
    ------
    TypeError
        For another dtype.
    """
    (x,) = checks.floats("sum_of_squares", x=x)
    return _optimizers.sum_of_squares(x, threads.count)


def scale_(x, factor):
    """Multiply all elements by a number, in place.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64
        Contiguous and writable; changed.
    factor : float

    Raises
    ------
    TypeError, ValueError
        When `x` cannot be changed in place.
    """
    checks.real("scale_", factor=factor)
    (checked,) = checks.floats("scale_", x=x)
    checks.check_out("scale_", x, checked.shape, checked.dtype, (), "x")
    _optimizers.scale(x, factor, threads.count)
