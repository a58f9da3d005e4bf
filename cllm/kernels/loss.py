"""Softmax cross-entropy, of logits and of an output layer; regression and binary cross-entropy."""

import math

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import gemm as _gemm
from cllm._kernels import loss as _loss
from cllm.kernels import threads
from cllm.kernels.linear import check_linear, row_chunks

# Checks ----------------------------------------------------------------------------------------------


def _floats(function, name, weight, /, **arrays):
    """The arrays from `checks.floats`, and behind them the weight of this name, which may be None."""
    if weight is None:
        return [*checks.floats(function, **arrays), None]
    return checks.floats(function, **arrays, **{name: weight})


def check_numbers(function, label_smoothing, z_loss):
    """The two as floats; raises when one is out of range."""
    numbers = checks.real(function, label_smoothing=label_smoothing, z_loss=z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing is {label_smoothing}, it must be in [0, 1]")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{function}: z_loss is {z_loss}, it must be at least 0 and finite")
    return numbers


def check_targets(function, name, targets, n_classes, ignore_index, label_smoothing, z_loss):
    """ignore_index as an int, the other two as floats; raises when one or a target is out of range."""
    label_smoothing, z_loss = check_numbers(function, label_smoothing, z_loss)
    allowed = "in [-2**63, 2**63)"
    ignore_index = checks.whole(function, "ignore_index", ignore_index, -(2**63), 2**63, allowed)
    checks.indices(function, name, targets, n_classes, ignore_index)
    return ignore_index, label_smoothing, z_loss


def check_class_weight(function, name, weight, n_classes):
    """Raise unless weight is None or an array of a weight for each class; returns the weights' mean."""
    if weight is None:
        return 1.0
    if weight.shape != (n_classes,):
        raise ValueError(f"{function}: {name} is {weight.shape}, it must be {(n_classes,)}")
    wrong = ~((weight >= 0) & (weight < math.inf))
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{function}: {name}[{at}] is {weight[at]}, it must be at least 0 and finite")
    return float(weight.mean(dtype=np.float64))


def _check_rows(function, n_rows, **arrays):
    for name, array in arrays.items():
        if array.shape != (n_rows,):
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {(n_rows,)}")


# Softmax cross-entropy -------------------------------------------------------------------------------


def _check_logits(function, logits, **targets):
    """Raise unless logits is (N, V) and the targets, (N,) or (N, V), fit it."""
    ((name, array),) = targets.items()
    fits = logits.shape if name == "probabilities" else logits.shape[:1]
    shapes = f"{function}: logits is {logits.shape}, {name} is {array.shape}"
    if logits.ndim != 2 or array.shape != fits:
        allowed = "(N, V), (N, V)" if name == "probabilities" else "(N, V), (N,)"
        raise ValueError(f"{shapes}; they must be {allowed}")
    if not logits.shape[1]:
        raise ValueError(f"{shapes}; V must be at least 1")


def cross_entropy_forward(
    logits, targets, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, out=None
):
    """Softmax cross-entropy of each row, as torch defines it: -log(softmax(logits)[target]).

    With class weights, label smoothing s (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022, PaLM):
    loss = weight[target] ((1 - s) (lse - logits[target]) + z_loss lse^2) + s mean(weight (lse - logits)).

    Parameters
    ----------
    logits : (N, V) array
        V is at least 1.
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    weight : (V,) array, optional
        A weight for each class, at least 0 and finite. (Torch also takes negative ones.)
    ignore_index : int
        Rows with this target have loss 0 and no gradient, whatever their logits are. The same holds for a
        class of weight 0, unless smoothing gives other classes a part in its loss.
    label_smoothing : float
        In [0, 1].
    z_loss : float
        At least 0; times the square of lse.
    out : tuple of two arrays, optional
        For losses and lse; None entries are allocated.

    Returns
    -------
    losses : (N,) array
        In nats, not averaged.
    lse : (N,) array
        The log of each row's sum of exponentials, which the backward pass needs.

    Raises
    ------
    ValueError
        When a target is out of range (named with its position), shapes do not match, weight,
        label_smoothing or z_loss is out of range or `out` is unsuitable.
    TypeError
        When targets are not integers, or logits and weight are not both float32 or both float64.
    """
    function = "cross_entropy_forward"
    logits, weight = _floats(function, "weight", weight, logits=logits)
    targets = checks.integers(function, "targets", targets)
    _check_logits(function, logits, targets=targets)
    ignore_index, label_smoothing, z_loss = check_targets(
        function, "targets", targets, logits.shape[1], ignore_index, label_smoothing, z_loss
    )
    mean_weight = check_class_weight(function, "weight", weight, logits.shape[1])
    shapes, inputs = (targets.shape, targets.shape), (logits, targets, weight)
    losses, lse = checks.results(function, out, ("losses", "lse"), shapes, logits.dtype, inputs)
    _loss.cross_entropy_forward(
        logits, targets, weight, mean_weight, ignore_index, label_smoothing, z_loss, losses, lse,
        threads.count,
    )  # fmt: skip
    return losses, lse


def cross_entropy_backward(
    dlosses, logits, targets, lse, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    out=None,
):  # fmt: skip
    """The gradient of `cross_entropy_forward`; 0 in ignored rows.

    With w = weight[target], dlogits = dloss ((w (1 - s + 2 z_loss lse) + s mean(weight)) softmax(logits)
    - w (1 - s) onehot(target) - s weight / V).

    Parameters
    ----------
    dlosses, lse : (N,) arrays
        The gradient of each row's loss; lse as the forward pass returned it.
    logits : (N, V) array
    targets : (N,) integer array
    weight, ignore_index, label_smoothing, z_loss
        As in the forward pass.
    out : (N, V) array, optional
        May be `logits` itself, which is then overwritten.

    Returns
    -------
    (N, V) array

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy_forward`; also when dtypes are mixed.
    """
    function = "cross_entropy_backward"
    in_place = out is not None and out is logits
    arrays = _floats(function, "weight", weight, dlosses=dlosses, logits=logits, lse=lse)
    dlosses, logits, lse, weight = arrays
    targets = checks.integers(function, "targets", targets)
    _check_logits(function, logits, targets=targets)
    ignore_index, label_smoothing, z_loss = check_targets(
        function, "targets", targets, logits.shape[1], ignore_index, label_smoothing, z_loss
    )
    _check_rows(function, len(targets), dlosses=dlosses, lse=lse)
    mean_weight = check_class_weight(function, "weight", weight, logits.shape[1])
    inputs = (dlosses, targets, lse, weight) if in_place else (*arrays, targets)
    out = checks.result(function, out, logits.shape, logits.dtype, inputs)
    _loss.cross_entropy_backward(
        dlosses, logits, targets, lse, weight, mean_weight, ignore_index, label_smoothing, z_loss, out,
        threads.count,
    )  # fmt: skip
    return out


def cross_entropy_both(
    dlosses, logits, targets, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, out=None
):
    """`cross_entropy_forward` and its gradient in one pass over the logits.

    Parameters
    ----------
    dlosses : (N,) array
        The gradient of each row's loss.
    logits, targets, weight, ignore_index, label_smoothing, z_loss
        As in the forward pass.
    out : (N, V) array, optional
        For dlogits; may be `logits` itself, which is then overwritten.

    Returns
    -------
    losses : (N,) array
        The bits of the forward pass alone.
    dlogits : (N, V) array
        As from `cross_entropy_backward`, but for rounding.

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy_forward`; also when dtypes are mixed.
    """
    function = "cross_entropy_both"
    in_place = out is not None and out is logits
    arrays = _floats(function, "weight", weight, dlosses=dlosses, logits=logits)
    dlosses, logits, weight = arrays
    targets = checks.integers(function, "targets", targets)
    _check_logits(function, logits, targets=targets)
    numbers = check_targets(
        function, "targets", targets, logits.shape[1], ignore_index, label_smoothing, z_loss
    )
    _check_rows(function, len(targets), dlosses=dlosses)
    mean_weight = check_class_weight(function, "weight", weight, logits.shape[1])
    inputs = (dlosses, targets, weight) if in_place else (*arrays, targets)
    out = checks.result(function, out, logits.shape, logits.dtype, inputs)
    losses = empty(targets.shape, logits.dtype)
    _loss.cross_entropy_both(
        dlosses, logits, targets, weight, mean_weight, *numbers, losses, out, threads.count
    )
    return losses, out


def _soft_options(function, logits, probabilities, weight, label_smoothing, z_loss, mask):
    """weight, its mean, mask and the two numbers as the kernels take them, after all checks."""
    n, n_classes = logits.shape if logits.ndim == 2 else (0, 0)
    _check_logits(function, logits, probabilities=probabilities)
    label_smoothing, z_loss = check_numbers(function, label_smoothing, z_loss)
    mean_weight = check_class_weight(function, "weight", weight, n_classes)
    if mask is not None:
        mask = checks.as_array(function, "mask", mask)
        if mask.dtype != bool:
            raise TypeError(f"{function}: mask is {mask.dtype}, it must be boolean")
        _check_rows(function, n, mask=mask)
        mask = np.ascontiguousarray(mask)
    weight = np.ones(n_classes, logits.dtype) if weight is None else weight
    return weight, mean_weight, mask, label_smoothing, z_loss


def soft_cross_entropy_forward(
    logits, probabilities, *, weight=None, label_smoothing=0.0, z_loss=0.0, mask=None, out=None
):
    """Softmax cross-entropy of each row against a row of probabilities, as torch defines it.

    With q = (1 - s) probabilities + s / V: loss = sum(weight q (lse - logits))
    + z_loss lse^2 sum(weight probabilities). Rows of one 1 and zeros give what `cross_entropy_forward` gives.

    Parameters
    ----------
    logits, probabilities : (N, V) arrays
        V is at least 1. The probabilities are taken as they are, as in torch: they need not add up to 1.
    weight : (V,) array, optional
        A weight for each class, at least 0 and finite.
    label_smoothing, z_loss : float
        As in `cross_entropy_forward`.
    mask : (N,) boolean array, optional
        Rows with False have loss 0 and no gradient, whatever their logits and probabilities are.
    out : tuple of two arrays, optional
        For losses and lse; None entries are allocated.

    Returns
    -------
    losses, lse : (N,) arrays
        As `cross_entropy_forward`. A class of share 0 adds nothing, also where its logit is minus infinity;
        a row where no class has a share has loss 0 and no gradient, whatever its logits are.

    Raises
    ------
    ValueError
        When shapes do not match, weight, label_smoothing or z_loss is out of range or `out` is unsuitable.
    TypeError
        When the arrays are not all float32 or all float64, or mask is not boolean.
    """
    function = "soft_cross_entropy_forward"
    arrays = _floats(function, "weight", weight, logits=logits, probabilities=probabilities)
    logits, probabilities, weight = arrays
    weight, mean_weight, mask, label_smoothing, z_loss = _soft_options(
        function, logits, probabilities, weight, label_smoothing, z_loss, mask
    )
    shapes, inputs = (logits.shape[:1], logits.shape[:1]), (logits, probabilities, weight, mask)
    losses, lse = checks.results(function, out, ("losses", "lse"), shapes, logits.dtype, inputs)
    _loss.soft_cross_entropy_forward(
        logits, probabilities, weight, mean_weight, mask, label_smoothing, z_loss, losses, lse, threads.count
    )
    return losses, lse


def soft_cross_entropy_backward(
    dlosses, logits, probabilities, lse, *, weight=None, label_smoothing=0.0, z_loss=0.0, mask=None, out=None
):
    """The gradient of `soft_cross_entropy_forward` with respect to the logits; 0 in masked rows.

    dlogits = dloss ((sum(weight q) + 2 z_loss lse sum(weight probabilities)) softmax(logits) - weight q).

    Parameters
    ----------
    dlosses, lse : (N,) arrays
        The gradient of each row's loss; lse as the forward pass returned it.
    logits, probabilities : (N, V) arrays
    weight, label_smoothing, z_loss, mask
        As in the forward pass.
    out : (N, V) array, optional
        May be `logits` itself, which is then overwritten.

    Returns
    -------
    (N, V) array

    Raises
    ------
    ValueError, TypeError
        As `soft_cross_entropy_forward`.
    """
    function = "soft_cross_entropy_backward"
    in_place = out is not None and out is logits
    dlosses, logits, probabilities, lse, weight = _floats(
        function, "weight", weight, dlosses=dlosses, logits=logits, probabilities=probabilities, lse=lse
    )
    weight, mean_weight, mask, label_smoothing, z_loss = _soft_options(
        function, logits, probabilities, weight, label_smoothing, z_loss, mask
    )
    _check_rows(function, len(logits), dlosses=dlosses, lse=lse)
    inputs = (dlosses, probabilities, lse, weight, mask, *(() if in_place else (logits,)))
    out = checks.result(function, out, logits.shape, logits.dtype, inputs)
    _loss.soft_cross_entropy_backward(
        dlosses, logits, probabilities, lse, weight, mean_weight, mask, label_smoothing, z_loss, out,
        threads.count,
    )  # fmt: skip
    return out


# Head and cross-entropy ------------------------------------------------------------------------------

# Logits in memory at a time: 2 M elements (8 MB in float32), 6 % of 4096 x 8192, or 256 rows. For each chunk
# the weight is read twice from memory, its gradient once and written: (1024, 50257, 768) takes 902 ms in
# chunks of 96 rows (9 % of the logits), 812 of 128, 743 of 192, 730 of 256.
_CHUNK_ELEMENTS, _CHUNK_ROWS = 2 << 20, 256


def _chunked(x, weight):
    """The chunks, and an array for the logits of one."""
    chunks = row_chunks(len(x), max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(len(weight), 1)))
    return chunks, empty((chunks[0].stop if chunks else 0, len(weight)), x.dtype)


def _logits(x, weight, rows, chunk):
    """The logits of some rows, in the first rows of the chunk."""
    logits = chunk[: rows.stop - rows.start]
    _gemm.linear_forward(x[rows], weight, None, logits, threads.count)
    return logits


def _check_head(function, x, weight, targets, class_weight, ignore_index, label_smoothing, z_loss):
    """The class weights' mean and the three numbers, after all checks."""
    check_linear(function, x, weight)
    if not len(weight):
        raise ValueError(f"{function}: weight is {weight.shape}, V must be at least 1")
    if x.ndim != 2 or targets.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: x is {x.shape}, targets is {targets.shape}; they must be (N, C) and (N,)"
        )
    # all targets, before the first chunk
    numbers = check_targets(function, "targets", targets, len(weight), ignore_index, label_smoothing, z_loss)
    return check_class_weight(function, "class_weight", class_weight, len(weight)), *numbers


def linear_cross_entropy_forward(
    x, weight, targets, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, out=None
):
    """Softmax cross-entropy of the logits x weight^T, of which only a chunk of rows is in memory at a time.

    Parameters
    ----------
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    class_weight : (V,) array, optional
        The `weight` of `cross_entropy_forward`.
    ignore_index, label_smoothing, z_loss
        As `cross_entropy_forward`.
    out : tuple of two arrays, optional
        For losses and lse; None entries are allocated.

    Returns
    -------
    losses, lse : (N,) arrays
        As `cross_entropy_forward`.

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy_forward`; also when x and weight do not fit.
    """
    function = "linear_cross_entropy_forward"
    x, weight, class_weight = _floats(function, "class_weight", class_weight, x=x, weight=weight)
    targets = checks.integers(function, "targets", targets)
    _check_head(function, x, weight, targets, class_weight, ignore_index, label_smoothing, z_loss)
    shapes, inputs = (targets.shape, targets.shape), (x, weight, targets, class_weight)
    losses, lse = checks.results(function, out, ("losses", "lse"), shapes, x.dtype, inputs)
    chunks, chunk = _chunked(x, weight)
    for rows in chunks:
        cross_entropy_forward(
            _logits(x, weight, rows, chunk), targets[rows], weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, out=(losses[rows], lse[rows]),
        )  # fmt: skip
    return losses, lse


def linear_cross_entropy_backward(
    dlosses, x, weight, targets, lse, *, class_weight=None, ignore_index=-100, label_smoothing=0.0,
    z_loss=0.0, out=None, accumulate=False,
):  # fmt: skip
    """Gradients of `linear_cross_entropy_forward`; each chunk's logits are computed again.

    Parameters
    ----------
    dlosses, lse : (N,) arrays
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
    class_weight, ignore_index, label_smoothing, z_loss
        As in the forward pass.
    out : tuple of two arrays, optional
        For dx and dweight; None entries are allocated.
    accumulate : bool
        Add dweight to the array given in `out` instead of assigning.

    Returns
    -------
    dx : (N, C) array
    dweight : (V, C) array

    Raises
    ------
    ValueError, TypeError
        As `linear_cross_entropy_forward`.
    """
    function = "linear_cross_entropy_backward"
    inputs = dlosses, x, weight, lse, class_weight = _floats(
        function, "class_weight", class_weight, dlosses=dlosses, x=x, weight=weight, lse=lse
    )
    targets = checks.integers(function, "targets", targets)
    _check_head(function, x, weight, targets, class_weight, ignore_index, label_smoothing, z_loss)
    _check_rows(function, len(targets), dlosses=dlosses, lse=lse)
    names, shapes, added = ("dx", "dweight"), (x.shape, weight.shape), ("dweight",) if accumulate else ()
    dx, dweight = checks.results(function, out, names, shapes, x.dtype, inputs, added)
    if not len(x) and not accumulate:
        dweight[...] = 0
    chunks, chunk = _chunked(x, weight)
    for rows in chunks:
        logits = _logits(x, weight, rows, chunk)
        dlogits = cross_entropy_backward(
            dlosses[rows], logits, targets[rows], lse[rows], weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, out=logits,
        )  # fmt: skip
        _gemm.linear_backward_input(dlogits, weight, dx[rows], threads.count)
        _gemm.linear_backward_weight(dlogits, x[rows], dweight, accumulate or rows.start > 0, threads.count)
    return dx, dweight


def linear_cross_entropy_both(
    dlosses, x, weight, targets, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    out=None, accumulate=False, needs=(True, True),
):  # fmt: skip
    """`linear_cross_entropy_forward` and its backward pass from one computation of each chunk's logits.

    Parameters
    ----------
    dlosses : (N,) array
    x, weight, targets, class_weight, ignore_index, label_smoothing, z_loss
        As in the forward pass.
    out : tuple of two arrays, optional
        For dx and dweight; None entries are allocated.
    accumulate : bool
        Add dweight to the array given in `out` instead of assigning.
    needs : two bools
        Whether dx, and whether dweight is wanted; None is returned for one that is not.

    Returns
    -------
    losses : (N,) array
        The bits of the forward pass alone.
    dx : (N, C) array
    dweight : (V, C) array

    Raises
    ------
    ValueError, TypeError
        As `linear_cross_entropy_forward`.
    """
    function = "linear_cross_entropy_both"
    inputs = x, weight, dlosses, class_weight = _floats(
        function, "class_weight", class_weight, x=x, weight=weight, dlosses=dlosses
    )
    targets = checks.integers(function, "targets", targets)
    numbers = _check_head(function, x, weight, targets, class_weight, ignore_index, label_smoothing, z_loss)
    _check_rows(function, len(targets), dlosses=dlosses)
    out = (None, None) if out is None else out
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"{function}: out must be a tuple of 2 arrays (dx, dweight)")
    names = [name for name, needed in zip(("dx", "dweight"), needs) if needed]
    shapes = [array.shape for array, needed in zip((x, weight), needs) if needed]
    out = [array for array, needed in zip(out, needs) if needed]
    found = checks.results(function, out, names, shapes, x.dtype, inputs, ("dweight",) if accumulate else ())
    found = dict(zip(names, found))
    dx, dweight = found.get("dx"), found.get("dweight")
    if not len(x) and not accumulate and needs[1]:
        dweight[...] = 0
    losses = empty(targets.shape, x.dtype)
    chunks, chunk = _chunked(x, weight)
    for rows in chunks:
        logits = _logits(x, weight, rows, chunk)
        _loss.cross_entropy_both(
            dlosses[rows], logits, targets[rows], class_weight, *numbers, losses[rows], logits, threads.count
        )
        if needs[0]:
            _gemm.linear_backward_input(logits, weight, dx[rows], threads.count)
        if needs[1]:
            add = accumulate or rows.start > 0
            _gemm.linear_backward_weight(logits, x[rows], dweight, add, threads.count)
    return losses, dx, dweight


# Regression ------------------------------------------------------------------------------------------
# Four losses in one loop: (curve, bend, slope) of |input - target|, see _kernels/loss.pyx.

_SQUARE = (1.0, math.inf, 1.0)
_ABSOLUTE = (0.0, 0.0, 1.0)


def _check_threshold(function, name, value, dtype):
    """Raise when a finite threshold would be infinite in the arrays' dtype."""
    if value < math.inf:
        checks.finite(function, name, value, dtype)


def _smooth_l1(function, beta, dtype):
    (number,) = checks.real(function, beta=beta)
    if not number >= 0:
        raise ValueError(f"{function}: beta is {beta}, it must be at least 0")
    beta = number
    _check_threshold(function, "beta", beta, dtype)
    # beta may be so small that its inverse is infinite, which times a difference of 0 would be NaN
    return (min(0.5 / beta, 0.5 * checks.LARGEST[dtype]), beta, 1.0) if beta else _ABSOLUTE


def _huber(function, delta, dtype):
    (number,) = checks.real(function, delta=delta)
    if not number > 0:
        raise ValueError(f"{function}: delta is {delta}, it must be above 0")
    delta = number
    _check_threshold(function, "delta", delta, dtype)
    return 0.5, delta, delta


def _elements(function, **arrays):
    """The arrays of an elementwise loss, all of one dtype and shape."""
    result = checks.floats(function, **arrays)
    (first, shape), *others = ((name, x.shape) for name, x in zip(arrays, result))
    for name, other in others:
        if other != shape:
            raise ValueError(f"{function}: {first} is {shape}, {name} is {other}; they must have one shape")
    return result


def _regression_forward(function, constants, arrays, out):
    input, target = arrays
    out = checks.result(function, out, input.shape, input.dtype, arrays)
    _loss.regression_forward(input, target, *constants, out, threads.count)
    return out


def _regression_backward(function, constants, arrays, out):
    dlosses, input, target = arrays
    out = checks.result(function, out, input.shape, input.dtype, arrays)
    _loss.regression_backward(dlosses, input, target, *constants, out, threads.count)
    return out


def mse_forward(input, target, out=None):
    """The squared error (input - target)^2 of each element.

    Parameters
    ----------
    input, target : arrays of one shape
    out : array of that shape, optional

    Returns
    -------
    array of that shape

    Raises
    ------
    ValueError
        When shapes differ or `out` is unsuitable.
    TypeError
        When the arrays are not both float32 or both float64.
    """
    arrays = _elements("mse_forward", input=input, target=target)
    return _regression_forward("mse_forward", _SQUARE, arrays, out)


def mse_backward(dlosses, input, target, out=None):
    """dinput = dloss 2 (input - target); the target's gradient is its negative."""
    arrays = _elements("mse_backward", dlosses=dlosses, input=input, target=target)
    return _regression_backward("mse_backward", _SQUARE, arrays, out)


def l1_forward(input, target, out=None):
    """The absolute error |input - target| of each element. Arguments and errors as `mse_forward`."""
    arrays = _elements("l1_forward", input=input, target=target)
    return _regression_forward("l1_forward", _ABSOLUTE, arrays, out)


def l1_backward(dlosses, input, target, out=None):
    """dinput = dloss sign(input - target), 0 at 0; the target's gradient is its negative."""
    arrays = _elements("l1_backward", dlosses=dlosses, input=input, target=target)
    return _regression_backward("l1_backward", _ABSOLUTE, arrays, out)


def smooth_l1_forward(input, target, beta=1.0, out=None):
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 from there on (Girshick 2015).

    beta is at least 0; with 0 this is `l1_forward`. Other arguments and errors as `mse_forward`.
    """
    function = "smooth_l1_forward"
    arrays = _elements(function, input=input, target=target)
    return _regression_forward(function, _smooth_l1(function, beta, arrays[0].dtype), arrays, out)


def smooth_l1_backward(dlosses, input, target, beta=1.0, out=None):
    """dinput = dloss (input - target) / beta, held within dloss [-1, 1]; the target's is its negative."""
    function = "smooth_l1_backward"
    arrays = _elements(function, dlosses=dlosses, input=input, target=target)
    return _regression_backward(function, _smooth_l1(function, beta, arrays[0].dtype), arrays, out)


def huber_forward(input, target, delta=1.0, out=None):
    """With d = |input - target|: d^2 / 2 up to delta, delta (d - delta / 2) beyond (Huber 1964).

    delta is above 0. Other arguments and errors as `mse_forward`.
    """
    arrays = _elements("huber_forward", input=input, target=target)
    constants = _huber("huber_forward", delta, arrays[0].dtype)
    return _regression_forward("huber_forward", constants, arrays, out)


def huber_backward(dlosses, input, target, delta=1.0, out=None):
    """dinput = dloss (input - target), held within dloss [-delta, delta]; the target's is its negative."""
    arrays = _elements("huber_backward", dlosses=dlosses, input=input, target=target)
    constants = _huber("huber_backward", delta, arrays[0].dtype)
    return _regression_backward("huber_backward", constants, arrays, out)


# Binary cross-entropy --------------------------------------------------------------------------------


def _bce_arrays(function, *, weight, pos_weight, **arrays):
    """The arrays, of one shape; behind them the weights broadcast to that of input, or None."""
    shape = checks.as_array(function, "input", arrays["input"]).shape
    for name, array in (("weight", weight), ("pos_weight", pos_weight)):
        if array is not None:
            array = checks.as_array(function, name, array)
            try:
                arrays[name] = np.broadcast_to(array, shape)
            except ValueError:
                raise ValueError(
                    f"{function}: {name} is {array.shape}, it must broadcast to {shape}"
                ) from None
    found = dict(zip(arrays, _elements(function, **arrays)))
    weight, pos_weight = found.pop("weight", None), found.pop("pos_weight", None)
    return *found.values(), weight, pos_weight


def bce_with_logits_forward(input, target, weight=None, pos_weight=None, out=None):
    """The binary cross-entropy of each logit.

    loss = -weight (pos_weight target log(sigmoid(input)) + (1 - target) log(1 - sigmoid(input))), with the
    logarithms taken without a sigmoid: exact at logits of any size.

    Parameters
    ----------
    input, target : arrays of one shape
        Targets are probabilities that the class holds: usually 0 or 1, taken as they are.
    weight, pos_weight : array, optional
        Broadcast to input's shape; None is 1.
    out : array of input's shape, optional

    Returns
    -------
    array of input's shape

    Raises
    ------
    ValueError
        When shapes do not fit or `out` is unsuitable.
    TypeError
        When the arrays are not all float32 or all float64.
    """
    function = "bce_with_logits_forward"
    arrays = input, *_ = _bce_arrays(
        function, weight=weight, pos_weight=pos_weight, input=input, target=target
    )
    out = checks.result(function, out, input.shape, input.dtype, arrays)
    _loss.bce_with_logits_forward(*arrays, out, threads.count)
    return out


def bce_with_logits_backward(dlosses, input, target, weight=None, pos_weight=None, out=None):
    """dinput = dloss weight ((1 - target) sigmoid(input) - pos_weight target sigmoid(-input)).

    Parameters
    ----------
    dlosses, input, target : arrays of one shape
    weight, pos_weight
        As in the forward pass.
    out : array of input's shape, optional

    Returns
    -------
    array of input's shape

    Raises
    ------
    ValueError, TypeError
        As `bce_with_logits_forward`.
    """
    function = "bce_with_logits_backward"
    arrays = _bce_arrays(
        function, weight=weight, pos_weight=pos_weight, dlosses=dlosses, input=input, target=target
    )
    out = checks.result(function, out, arrays[1].shape, arrays[1].dtype, arrays)
    _loss.bce_with_logits_backward(*arrays, out, threads.count)
    return out
