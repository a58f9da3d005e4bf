"""Optimizers' updates, in place; statistics, scaling and clipping of gradients."""

import math

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import optimizers as _optimizers
from cllm.kernels import threads
from cllm.kernels.linear import matmul


def _updated(function, param, grad, optional=(), **state):
    """`grad` ready to be read; raises unless `param` and the state arrays can be changed in place.

    optional : names of the state arrays that may be None
    """
    _, grad = checks.floats(function, param=param, grad=grad)
    fits = grad.shape == np.shape(param)
    checks.require(fits, function, f"grad is {grad.shape}, param is {np.shape(param)}")
    seen = [grad]
    for name, array in {"param": param, **state}.items():
        if array is not None or name not in optional:
            checks.check_out(function, array, grad.shape, grad.dtype, seen, name)
            seen.append(array)
    return grad


def _scalars(function, fractions=(), **values):
    """The values as floats: all finite and not negative, each of `fractions` below 1, and eps above 0."""
    floats = checks.real(function, **values)
    for (name, value), number in zip(values.items(), floats):
        if not 0 <= number < np.inf:  # also catches NaN
            raise ValueError(f"{function}: {name} is {value}, it must be a finite number of at least 0")
        if name in fractions and number >= 1:
            raise ValueError(f"{function}: {name} is {value}, it must be below 1")
        if name == "eps" and number == 0:  # 0 / 0 where a gradient has always been zero
            raise ValueError(f"{function}: eps is {value}, it must be above 0")
    return floats


def _pair(function, name, pair):
    """The two numbers of a hyperparameter such as betas."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{function}: {name} is {pair!r}, it must be a tuple of two numbers")
    return pair


def _step(function, step):
    """The step as a float of at least 1."""
    (number,) = checks.real(function, step=step)
    checks.require(number >= 1, function, f"step is {step}, it must be at least 1")
    return number


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
    lr, momentum, weight_decay = _scalars("sgd_update", lr=lr, momentum=momentum, weight_decay=weight_decay)
    (dampening,) = checks.real("sgd_update", dampening=dampening)
    checks.require(math.isfinite(dampening), "sgd_update", f"dampening is {dampening}, it must be finite")
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"sgd_update: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    checks.require(
        not nesterov or (momentum > 0 and dampening == 0),
        "sgd_update", "nesterov needs a momentum above 0 and a dampening of 0",
    )  # fmt: skip
    grad = _updated("sgd_update", param, grad, ("momentum_buffer",), momentum_buffer=momentum_buffer)
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
    beta1, beta2 = _pair(function, "betas", betas)
    step = _step(function, step)
    lr, beta1, beta2, eps, weight_decay = _scalars(
        function, ("beta1", "beta2"), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
    grad = _updated(function, param, grad, ("v_max",), m=m, v=v, v_max=v_max)
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
    lr, alpha, eps, weight_decay, momentum = _scalars(
        function, ("alpha",), lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"{function}: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    optional = {"momentum_buffer": momentum_buffer, "grad_avg": grad_avg}
    grad = _updated(function, param, grad, optional, v=v, **optional)
    _check_eps(function, eps, grad.dtype)
    _optimizers.rmsprop(
        param, grad, v, grad_avg, momentum_buffer, -1.0 if maximize else 1.0, lr, alpha, eps, weight_decay,
        momentum, threads.count,
    )  # fmt: skip


def adagrad_update(
    param, grad, accumulator, *, step, lr, lr_decay=0.0, weight_decay=0.0, eps=1e-10, maximize=False
):
    """Adagrad: one step, in place.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        accumulator = accumulator + g**2
        param -= lr / (1 + (step - 1) * lr_decay) * g / (sqrt(accumulator) + eps)

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    accumulator : ndarray like `param`
        The sum of the squared gradients, a constant of at least 0 before the first step; changed.
    step : int
        Which step this is, from 1.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 2011.
    """
    function = "adagrad_update"
    step = _step(function, step)
    lr, lr_decay, weight_decay, eps = _scalars(
        function, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps
    )
    grad = _updated(function, param, grad, accumulator=accumulator)
    _check_eps(function, eps, grad.dtype)
    _optimizers.adagrad(
        param, grad, accumulator, -1.0 if maximize else 1.0, lr / (1 + (step - 1) * lr_decay), eps,
        weight_decay, threads.count,
    )  # fmt: skip


def lion_update(param, grad, m, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Lion: one step, in place; every weight moves by `lr`, along the sign of a mean gradient.

    .. code-block:: text

        param *= 1 - lr * weight_decay
        param -= lr * sign(beta1 * m + (1 - beta1) * grad)         (-grad when maximize)
        m = beta2 * m + (1 - beta2) * grad

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    m : ndarray like `param`
        Running mean of the gradient, zeros before the first step; changed. Values below the smallest normal
        number become 0.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023.
    """
    beta1, beta2 = _pair("lion_update", "betas", betas)
    lr, beta1, beta2, weight_decay = _scalars(
        "lion_update", ("beta1", "beta2"), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay
    )
    grad = _updated("lion_update", param, grad, m=m)
    sign, decay = -1.0 if maximize else 1.0, 1 - lr * weight_decay
    _optimizers.lion(param, grad, m, sign, lr, beta1, beta2, decay, threads.count)


def adafactor_update(
    param, grad, row_var=None, col_var=None, variance=None, *, step, lr, beta2_decay=-0.8, eps=(None, 1e-3),
    d=1.0, weight_decay=0.0, maximize=False,
):  # fmt: skip
    """Adafactor: one step, in place; of a matrix's second moments, those of rows and columns are kept.

    .. code-block:: text

        rest = step**beta2_decay                           1 - beta2 of this step
        size = max(eps2, RMS(param)) * min(lr, 1 / sqrt(step))
        param *= 1 - lr * weight_decay
        row_var = (1 - rest) * row_var + rest * mean of grad**2 over a row
        col_var = (1 - rest) * col_var + rest * mean of grad**2 over a column
        v = row_var * col_var / max(mean of row_var, eps1)
        v = variance = (1 - rest) * variance + rest * grad**2      instead, of a vector
        u = grad / sqrt(max(v, eps1**2))                   (-grad when maximize)
        param -= size / max(1, RMS(u) / d) * u

    This is torch's form, where `lr` limits the relative step size. The means are needed before the first
    weight can change: a matrix takes three passes over its gradient, a vector two.

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only. Of more than two dimensions the last two are
        the matrices, the others count these.
    row_var, col_var : (..., R, 1) and (..., 1, C) arrays, for a `param` (..., R, C)
        Zeros before the first step; changed.
    variance : ndarray like `param`, for a `param` of fewer than two dimensions
        Zeros before the first step; changed.
    step : int
        Which step this is, from 1.
    beta2_decay : float
        At most 0.
    eps : (float or None, float)
        eps1, by default the machine epsilon of the dtype, and eps2.
    d : float
        Updates of a greater root mean square than this are scaled down to it; at least 1.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range, a
        state that does not belong to the shape.

    References
    ----------
    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018.
    """
    function = "adafactor_update"
    eps1, eps2 = _pair(function, "eps", eps)
    step = _step(function, step)
    has_eps1 = eps1 is not None
    lr, weight_decay, eps1, eps2, d = _scalars(
        function, lr=lr, weight_decay=weight_decay, eps1=eps1 if has_eps1 else 0.0, eps2=eps2, d=d
    )
    (beta2_decay,) = checks.real(function, beta2_decay=beta2_decay)
    if not -math.inf < beta2_decay <= 0:
        raise ValueError(f"{function}: beta2_decay is {beta2_decay}, it must be a finite number of at most 0")
    checks.require(d >= 1, function, f"d is {d}, it must be at least 1")
    factored = np.ndim(param) > 1
    state = {"row_var": row_var, "col_var": col_var} if factored else {"variance": variance}
    given = {"row_var": row_var, "col_var": col_var, "variance": variance}
    for name, array in given.items():
        if array is not None and name not in state:
            kind = "has" if factored else "lacks"
            raise ValueError(f"{function}: {name} must be None, param {kind} rows and columns")
    grad = _updated(function, param, grad)
    shapes = {"row_var": (*grad.shape[:-1], 1), "variance": grad.shape}
    shapes["col_var"] = (*grad.shape[:-2], 1, *grad.shape[-1:])
    seen = [grad, param]
    for name, array in state.items():
        checks.check_out(function, array, shapes[name], grad.dtype, seen, name)
        seen.append(array)
    limits = np.finfo(grad.dtype)
    tiny = float(limits.tiny)  # at least this, or 0 / 0 where all gradients were zero
    eps1 = max(eps1, tiny) if has_eps1 else float(limits.eps)
    _optimizers.adafactor(
        param, grad, row_var, col_var, variance, -1.0 if maximize else 1.0, step**beta2_decay,
        min(lr, step**-0.5), eps1, max(eps1 * eps1, tiny), eps2, d, 1 - lr * weight_decay,
        threads.count,
    )  # fmt: skip


def muon_update(
    param, grad, momentum_buffer, *, lr, weight_decay=0.1, momentum=0.95, nesterov=True,
    ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5, adjust_lr_fn=None,
):  # fmt: skip
    """Muon: one step of a matrix, in place, along its momentum with the singular values brought near 1.

    .. code-block:: text

        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
        u = momentum * momentum_buffer + (1 - momentum) * grad     when nesterov, else momentum_buffer
        x = u / max(|u|, eps), transposed when R > C               Newton, Schulz; a, b, c = ns_coefficients
        x = a x + (b A + c A A) x with A = x x^T                   ns_steps times
        param *= 1 - lr * weight_decay
        param -= lr * f * x                                        transposed back

    f is sqrt(max(1, R / C)) by default and as "original", and 0.2 sqrt(max(R, C)) as "match_rms_adamw". The
    products are `matmul`'s, in the parameter's dtype, where torch runs them in bfloat16.

    Parameters
    ----------
    param, grad : (R, C) arrays, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    momentum_buffer : (R, C) array
        Running mean of the gradient, zeros before the first step; changed. Values below the smallest normal
        number become 0.
    momentum : float
        In [0, 1).
    ns_coefficients : three floats
    ns_steps : int
        From 0 to 99.
    adjust_lr_fn : {None, "original", "match_rms_adamw"}

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For a `param` that is no matrix, unequal shapes, a strided, read-only or overlapping array to be
        changed, a scalar out of range.

    References
    ----------
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Liu et al., "Muon is
    Scalable for LLM Training", 2025 ("match_rms_adamw").
    """
    function = "muon_update"
    lr, weight_decay, momentum, eps = _scalars(
        function, ("momentum",), lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps
    )
    ns_steps = checks.whole(function, "ns_steps", ns_steps, 0, 100, "in [0, 100)")
    if not isinstance(ns_coefficients, (tuple, list)) or len(ns_coefficients) != 3:
        raise TypeError(f"{function}: ns_coefficients is {ns_coefficients!r}, it must be three numbers")
    ns_coefficients = [checks.real(function, ns_coefficients=value)[0] for value in ns_coefficients]
    for value in ns_coefficients:
        checks.require(math.isfinite(value), function, f"ns_coefficients has {value}, it must be finite")
    if not (adjust_lr_fn is None or isinstance(adjust_lr_fn, str)) or adjust_lr_fn not in ADJUST_LR:
        raise ValueError(
            f'{function}: adjust_lr_fn is {adjust_lr_fn!r}, it must be None, "original" or "match_rms_adamw"'
        )
    grad = _updated(function, param, grad, momentum_buffer=momentum_buffer)
    checks.require(grad.ndim == 2, function, f"param is {grad.shape}, it must have two dimensions")
    _check_eps(function, eps, grad.dtype)
    if grad.size == 0:
        return
    mixed = empty(grad.shape, grad.dtype)
    _optimizers.muon_momentum(grad, momentum_buffer, mixed, momentum, nesterov, threads.count)
    factor = ADJUST_LR[adjust_lr_fn](*grad.shape)
    update = _orthogonal(mixed, ns_coefficients, eps, ns_steps)
    # SGD's step with its weight decay: lr f (update + weight_decay / f param).
    _optimizers.sgd(
        param, update, None, 1.0, lr * factor, weight_decay / factor, 0.0, 1.0, False, False, threads.count
    )


#: How Muon's learning rate depends on a matrix's rows and columns.
ADJUST_LR = {
    None: lambda n_rows, n_columns: math.sqrt(max(1, n_rows / n_columns)),
    "original": lambda n_rows, n_columns: math.sqrt(max(1, n_rows / n_columns)),
    "match_rms_adamw": lambda n_rows, n_columns: 0.2 * math.sqrt(max(n_rows, n_columns)),
}


def _orthogonal(x, coefficients, eps, n_steps):
    """Newton and Schulz' iteration for the nearest orthogonal matrix (see `muon_update`); overwrites x.

    a x + (b A + c A A) x is (a I + A (b I + c A)) x: the sums fall on diagonals, and three products a step
    remain.
    """
    a, b, c = coefficients
    norm = math.sqrt(_optimizers.sum_of_squares(x, threads.count))
    _optimizers.scale(x, 1 / (eps if norm < eps else norm), threads.count)  # a NaN is not below eps
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x  # the smaller of the two squares
    diagonal = slice(None, None, len(x) + 1)
    for _ in range(n_steps):
        square = matmul(x, x.T)
        inner = c * square
        inner.reshape(-1)[diagonal] += b
        outer = matmul(square, inner)
        outer.reshape(-1)[diagonal] += a
        x = matmul(outer, x)
    return np.ascontiguousarray(x.T if is_tall else x)


def gap(a, b):
    """How many elements lie between the end of `a` and the start of `b` in memory, or -1.

    It is -1 unless both are contiguous views of one contiguous array of their dtype, `b` begins less than
    16 elements after `a` ends, and the elements between are zeros. A chain of such neighbours can be
    updated as one array: see `span`.
    """
    return _optimizers.gap(a, b)


def span(first, last):
    """The flat view from the start of `first` to the end of `last`, which a chain of neighbours joins."""
    for name, array in (("first", first), ("last", last)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"span: {name} is {type(array).__name__}, it must be a NumPy array")
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
    (factor,) = checks.real("scale_", factor=factor)
    (checked,) = checks.floats("scale_", x=x)
    checks.check_out("scale_", x, checked.shape, checked.dtype, (), "x")
    _optimizers.scale(x, factor, threads.count)


def clip_(x, limit):
    """Limit all elements to [-limit, limit], in place; NaN stays NaN.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64
        Contiguous and writable; changed.
    limit : float
        At least 0.

    Raises
    ------
    TypeError, ValueError
        When `x` cannot be changed in place, or for a negative or NaN limit.
    """
    (number,) = checks.real("clip_", limit=limit)
    checks.require(number >= 0, "clip_", f"limit is {limit}, it must be at least 0")
    (checked,) = checks.floats("clip_", x=x)
    checks.check_out("clip_", x, checked.shape, checked.dtype, (), "x")
    _optimizers.clip(x, number, threads.count)


def array_statistics(arrays):
    """Four numbers about each of several arrays, in one pass over all of them.

    Parameters
    ----------
    arrays : sequence of ndarray, of any shapes, float32 or float64

    Returns
    -------
    (n, 4) float64 array
        For each array the sum of the squares, added up in float64; the largest magnitude, NaN when there is
        a NaN; the number of zeros; the number of infinite and NaN elements. All are 0 of an empty array.

    Raises
    ------
    TypeError
        For another dtype.
    """
    arrays = [
        x
        if type(x) is np.ndarray and x.dtype in checks.FLOATS and x.flags.c_contiguous and x.flags.aligned
        else checks.floats("array_statistics", **{f"arrays[{i}]": x})[0]
        for i, x in enumerate(arrays)
    ]
    table = np.empty((len(arrays), 4))
    _optimizers.statistics(arrays, table, threads.count)
    return table
