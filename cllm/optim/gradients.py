"""Gradients as a whole: norms, clipping, averaging, and statistics of each parameter.

All of them walk over the joined gradients: for a model in one block that is one pass over one array.
"""

import math
from contextlib import contextmanager

import numpy as np

from cllm import kernels
from cllm.errors import InputError
from cllm.optim import spans
from cllm.optim.base import above_zero, is_number


def _gradients(params):
    """The gradients of the parameters that have one."""
    params = [params] if hasattr(params, "grad") else params
    return [p.grad for p in params if p.grad is not None]


def _check_limit(name, value):
    if not is_number(value) or not value >= 0:
        raise InputError(f"{name} is {value!r}, it must be a number of at least 0")


# Clipping --------------------------------------------------------------------------------------------


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False):
    """Scale all gradients by one factor, in place, so that their norm is at most `max_norm`.

    Parameters
    ----------
    parameters : iterable of Tensor
        Those without a gradient are skipped.
    max_norm : float
        Infinity only measures.
    norm_type : float
        The p of the p-norm, above 0; infinity is the largest magnitude.
    error_if_nonfinite : bool
        Whether a norm that is NaN or infinite raises, and leaves the gradients as they are.

    Returns
    -------
    float
        The norm of all gradients together, before clipping, summed in double. Where it is NaN or infinite
        the gradients are of no use and become NaN or 0, as in torch.

    Raises
    ------
    InputError
        When `max_norm` is negative or NaN, or `norm_type` not above 0.
    RuntimeError
        With `error_if_nonfinite`, as in torch.
    """
    _check_limit("max_norm", max_norm)
    grads = _gradients(parameters)
    joined = spans.joined(grads)
    if norm_type == 2:
        norm = math.sqrt(sum(map(kernels.sum_of_squares, joined)))
    else:
        norm = _norm(joined, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the norm of the gradients is {norm}, it must be finite")
    _scale_to_norm(grads, joined, max_norm, norm)
    return norm


def _norm(grads, p):
    """The p-norm of all arrays together; of their magnitudes over the largest, so that no power overflows."""
    if not is_number(p) or not p > 0:
        raise InputError(f"norm_type is {p!r}, it must be a number above 0")
    sizes = [np.abs(grad, dtype=np.float64) for grad in grads]
    largest = float(np.max([size.max(initial=0) for size in sizes], initial=0))
    if p == math.inf or largest == 0 or not math.isfinite(largest):
        return largest
    return largest * sum(float(((size / largest) ** p).sum()) for size in sizes) ** (1 / p)


def clip_grads_with_norm_(parameters, max_norm, total_norm):
    """`clip_grad_norm_` with a norm that is known already, such as from `gradient_statistics`.

    Raises
    ------
    InputError
        When `max_norm` is negative or NaN.
    """
    _check_limit("max_norm", max_norm)
    grads = _gradients(parameters)
    _scale_to_norm(grads, spans.joined(grads), max_norm, total_norm)


def _scale_to_norm(grads, joined, max_norm, norm):
    """Scale the gradients, which `joined` holds in fewer arrays."""
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1 and max_norm < math.inf:
        # A NaN must not reach the zeros between neighbours.
        for grad in grads if math.isnan(factor) else joined:
            kernels.scale_(grad, factor)


def clip_grad_value_(parameters, clip_value):
    """Limit every element of the gradients to [-clip_value, clip_value], in place; NaN stays NaN.

    Raises
    ------
    InputError
        When `clip_value` is negative or NaN.
    """
    _check_limit("clip_value", clip_value)
    for grad in spans.joined(_gradients(parameters)):
        kernels.clip_(grad, clip_value)


# Accumulating and averaging --------------------------------------------------------------------------


def accumulate_grad_(params, grads):
    """Add gradients from elsewhere, such as another process, to the parameters' own, in place.

    Further backward passes add up by themselves; see `average_grad_`.

    Parameters
    ----------
    params : iterable of Tensor
    grads : iterable of ndarray
        One for each parameter, or None. A parameter without a gradient takes a copy.

    Raises
    ------
    InputError
        For another number of gradients or another shape; nothing has changed then.
    """
    params = [params] if hasattr(params, "grad") else list(params)
    grads = [None if grad is None else np.asarray(grad) for grad in grads]
    if len(params) != len(grads):
        raise InputError(f"grads has {len(grads)} gradients, there are {len(params)} parameters")
    for i, (p, grad) in enumerate(zip(params, grads)):
        if grad is not None and grad.shape != p.data.shape:
            raise InputError(f"grads[{i}] is of shape {grad.shape}, the parameter is of {p.data.shape}")
    for p, grad in zip(params, grads):
        if p.grad is None:
            p.grad = grad
        elif grad is not None:
            np.add(p.grad, grad, out=p.grad, casting="same_kind")


def average_grad_(params, n):
    """Divide all gradients by `n`, in place: the mean of n accumulated ones.

    Parameters
    ----------
    params : iterable of Tensor
    n : float
        Above 0: micro-batches, or what their losses' sums counted.

    Raises
    ------
    InputError
        When `n` is not a finite number above 0.
    """
    if not above_zero(n):
        raise InputError(f"n is {n!r}, it must be a finite number above 0")
    for grad in spans.joined(_gradients(params)):
        kernels.scale_(grad, 1 / n)


# Statistics ------------------------------------------------------------------------------------------


def gradient_statistics(named_parameters):
    """What the gradients look like, parameter by parameter and overall, in one pass over them.

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor)
        Such as ``model.named_parameters()``. Those without a gradient are left out.

    Returns
    -------
    dict of str to dict
        For each name, and for "overall": "norm", the 2-norm, summed in double; "max", the largest magnitude;
        "zeros" and "nonfinite", the shares (0 to 1) of elements that are zero, and that are infinite or
        NaN. A NaN makes norm and max NaN.
    """
    grads = {name: p.grad for name, p in named_parameters if p.grad is not None}
    table = kernels.array_statistics(list(grads.values()))
    sizes = [grad.size for grad in grads.values()]
    result = {name: _described(row, size) for name, row, size in zip(grads, table, sizes)}
    squares, _, zeros, nonfinite = table.sum(0)
    result["overall"] = _described((squares, table[:, 1].max(initial=0), zeros, nonfinite), sum(sizes))
    return result


def _described(row, size):
    squares, largest, zeros, nonfinite = map(float, row)
    share = 1 / max(size, 1)
    return {
        "norm": math.sqrt(squares), "max": largest, "zeros": zeros * share, "nonfinite": nonfinite * share
    }  # fmt: skip


@contextmanager
def update_ratios(named_parameters):
    """How large an update is, relative to the weights: ``|w after - w before| / |w before|``.

    ::

        with optim.update_ratios(model.named_parameters()) as ratios:
            optimizer.step()
        print(ratios["transformer.wte.weight"], ratios["overall"])

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor)
        They are copied at the beginning, so measure now and then rather than at each step.

    Yields
    ------
    dict of str to float
        Empty at first; at the end the ratio of norms of each name, and of all together as "overall".
        Infinity for weights that were all zero, NaN when they also stayed so.
    """
    parameters = dict(named_parameters)
    before = {name: p.data.copy() for name, p in parameters.items()}
    ratios = {}
    yield ratios
    weights = kernels.array_statistics(list(before.values()))[:, 0]
    changes = kernels.array_statistics([p.data - before[name] for name, p in parameters.items()])[:, 0]
    names = [*parameters, "overall"]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.sqrt(np.append(changes, changes.sum()) / np.append(weights, weights.sum()))
    ratios.update(zip(names, values.tolist()))
