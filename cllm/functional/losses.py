"""Losses: cross-entropy of logits and of an output layer, regression, binary cross-entropy.

Sums run in double. A mean is a sum over a count that `cross_entropy_count` gives by itself: the sums of the
parts of a batch over the count of the whole are the loss, and have the gradients, of the whole.
"""

import math
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np

from cllm import kernels
from cllm._core import checks
from cllm.errors import InputError
from cllm.functional.gradients import claimed, delivered, taken, targets_of, written
from cllm.kernels.loss import check_class_weight, check_numbers, check_targets
from cllm.tensor import Tensor, _operands, _unbroadcast, as_tensor, is_grad_enabled, record

# Arguments and reductions ----------------------------------------------------------------------------


@contextmanager
def _input_errors():
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_reduction(function, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f'{function}: reduction is {reduction!r}, it must be "mean", "sum" or "none"')


def _constant(function, name, value, dtype):
    """A weight, an array or a Tensor without gradient, as an array of this dtype; None stays None."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise InputError(f"{function}: {name} requires a gradient, but a loss has none for it: detach it")
        value = value.data
    return None if value is None else np.asarray(value, dtype)


def _mask(function, mask, shape):
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{function}: mask is {mask.dtype}, it must be boolean")
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise InputError(f"{function}: mask is {mask.shape}, it must broadcast to {shape}") from None


def _reduced(losses, shape, reduction, count):
    """The losses reduced, and the function from the result's gradient to the losses' gradients."""
    if reduction == "none":
        return losses.reshape(shape), lambda grad: grad.reshape(losses.shape)
    divisor = count if reduction == "mean" else 1
    with np.errstate(all="ignore"):
        out = np.asarray(losses.sum(dtype=np.float64) / divisor, losses.dtype)
    return out, lambda grad: np.full(losses.shape, grad / divisor, losses.dtype)


# Softmax cross-entropy -------------------------------------------------------------------------------


def _classes(function, target, shape, mask, ignore_index):
    """Integer targets as int64, those that do not count made ignore_index."""
    try:
        allowed = "in [-2**63, 2**63)"
        ignore_index = checks.whole(function, "ignore_index", ignore_index, -(2**63), 2**63, allowed)
        target = checks.integers(function, "target", target)
    except ValueError as error:
        raise InputError(str(error)) from None
    if target.shape != shape:
        raise InputError(f"{function}: target is {target.shape}, it must be {shape}")
    return target if mask is None else np.where(mask, target, ignore_index)


def _count(target, weight, ignore_index):
    """What a mean over integer targets divides by."""
    counted = target != ignore_index
    return np.count_nonzero(counted) if weight is None else weight[target[counted]].sum(dtype=np.float64)


def _is_soft(target):
    return isinstance(target, Tensor) or np.asarray(target).dtype.kind == "f"


def _as_rows(x, n_classes):
    """(N, V), (V,) or (N, V, ...) as rows of logits."""
    if x.ndim == 2:
        return x
    if x.ndim > 2:
        x = x.permute(0, *range(2, x.ndim), 1)
    return x.reshape(math.prod(x.shape) // n_classes, n_classes)


def cross_entropy(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, *, mask=None,
    z_loss=0.0,
):  # fmt: skip
    """The negative log-likelihood of target under softmax(input).

    Where a gradient will be wanted, "mean" and "sum" of integer targets compute it along with the losses,
    while a row of logits is in a cache; `backward` only scales it.

    When nothing counts ("mean" would divide by 0: every target ignored or masked, or of weight 0) the mean
    is 0 and so are the gradients. That is the one difference from torch, which returns NaN.

    Parameters
    ----------
    input : (N, V), (V,) or (N, V, ...) Tensor
        Logits; the classes lie in dimension 1.
    target : (N,), () or (N, ...) integer array; or an array or Tensor of floats of input's shape
        Classes in [0, V); or a probability for each class, taken as it is (it need not add up to 1). A Tensor
        of probabilities may require a gradient.
    weight : (V,) array, optional
        A weight for each class, at least 0 and finite (torch takes negative ones, too). "mean" divides by
        the sum of the targets' weights; with probabilities, by the number of rows, as torch does.
    ignore_index : int
        Rows with this target have no loss and no gradient. With probabilities, use `mask`.
    reduction : {"mean", "sum", "none"}
        "none" gives an array of the shape of integer targets.
    label_smoothing : float in [0, 1]
        The share of the target distribution that is uniform over the classes (Szegedy et al. 2016).
    mask : boolean array that broadcasts to the shape of integer targets, optional
        Rows with False do not count: no loss and no gradient, whatever their logits and targets are.
    z_loss : float
        At least 0: adds weight[target] z_loss log(Z)^2 to a row's loss, Z the sum of exp(logits)
        (Chowdhery et al. 2022, PaLM, with 1e-4). Probabilities count with their sum of weights.

    Returns
    -------
    Tensor
        () or, for "none", (N,), () or (N, ...); in nats.

    Raises
    ------
    InputError
        When a shape does not fit, a target lies outside [0, V) (named with its position), or a number, a
        weight or the reduction is not allowed.
    TypeError
        When targets are neither integers nor floats of input's shape, or mask is not boolean.
    """
    function = "cross_entropy"
    _check_reduction(function, reduction)
    x = as_tensor(input)
    if not x.ndim:
        raise InputError(f"{function}: input is a single number, it must be (N, V), (V,) or (N, V, ...)")
    n_classes = x.shape[0 if x.ndim == 1 else 1]
    if not n_classes:
        raise InputError(f"{function}: input is {x.shape}, it must have at least one class")
    shape = x.shape[:-1] if x.ndim < 3 else (x.shape[0], *x.shape[2:])
    options = {
        "weight": _constant(function, "weight", weight, x.dtype),
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    if _is_soft(target):
        if np.shape(target.data if isinstance(target, Tensor) else target) != x.shape:
            raise TypeError(
                f"{function}: target holds floats, it must be an integer array of shape {shape}, or "
                f"probabilities of input's shape {x.shape}"
            )
        return _soft_cross_entropy(x, target, shape, reduction, mask, ignore_index, options)
    target = _classes(function, target, shape, _mask(function, mask, shape), ignore_index)
    options["ignore_index"] = ignore_index
    x = _as_rows(x, n_classes)
    logits, targets = x.data, target.reshape(-1)
    with _input_errors():  # of the kernels' errors a target's position is not that in the caller's shape
        check_targets(function, "target", target, n_classes, ignore_index, label_smoothing, z_loss)
        check_class_weight(function, "weight", options["weight"], n_classes)
    count = _count(target, options["weight"], ignore_index) if reduction == "mean" else 1
    if not count > 0:  # as if each row were ignored: no NaN comes to loss or gradient
        targets, count = np.full_like(targets, ignore_index), 1
    ready = None
    if reduction != "none" and is_grad_enabled() and x.requires_grad:
        ones = np.full(len(targets), 1 / count, x.dtype)  # the losses' gradients when the result's is 1
        losses, ready = kernels.cross_entropy_both(ones, logits, targets, **options)
    else:
        losses, _ = kernels.cross_entropy_forward(logits, targets, **options)
    out, rows = _reduced(losses, shape, reduction, count)

    def backward(grad):
        nonlocal ready
        dlogits, ready = ready, None
        if dlogits is None:  # a second time over the same graph, or a gradient for each loss
            dlosses = rows(grad) if reduction == "none" else np.full(len(targets), 1 / count, logits.dtype)
            _, dlogits = kernels.cross_entropy_both(dlosses, logits, targets, **options)
        if reduction != "none" and grad != 1:
            kernels.scale_(dlogits, float(grad))
        return (dlogits,)

    return record(out, (x,), backward)


def _soft_cross_entropy(x, target, shape, reduction, mask, ignore_index, options):
    function = "cross_entropy"
    q = target if isinstance(target, Tensor) else Tensor(np.asarray(target, x.dtype))
    q = q if q.dtype == x.dtype else q.to(x.dtype)
    weight, smoothing, z_loss = options["weight"], options["label_smoothing"], options["z_loss"]
    n_classes = x.shape[0 if x.ndim == 1 else 1]
    allowed = "negative where targets are probabilities: mask leaves out rows of them"
    with _input_errors():
        checks.whole(function, "ignore_index", ignore_index, -(2**63), 0, allowed)
        smoothing, z_loss = check_numbers(function, smoothing, z_loss)
        check_class_weight(function, "weight", weight, n_classes)
    mask = _mask(function, mask, shape)
    mask = None if mask is None else mask.reshape(-1)
    x, q = _as_rows(x, n_classes), _as_rows(q, n_classes)
    logits, probabilities, wanted = x.data, q.data, q.requires_grad
    losses, lse = kernels.soft_cross_entropy_forward(logits, probabilities, mask=mask, **options)
    count = len(losses) if mask is None else np.count_nonzero(mask)
    out, rows = _reduced(losses, shape, reduction, count or 1)

    def backward(grad):
        dlosses = rows(grad)
        dlogits = kernels.soft_cross_entropy_backward(
            dlosses, logits, probabilities, lse, mask=mask, **options
        )
        if not wanted:
            return dlogits, None
        total = lse[:, None]
        dq = dlosses[:, None] * ((1 - smoothing) * (total - logits) + z_loss * total * total)
        dq = dq if weight is None else dq * weight
        return dlogits, dq if mask is None else np.where(mask[:, None], dq, 0)

    return record(out, (x, q), backward)


def cross_entropy_count(target, weight=None, ignore_index=-100, mask=None):
    """What the "mean" of `cross_entropy` divides by.

    The "sum" of the losses of all parts of a batch, over the count of the whole batch, is the "mean" of the
    whole, and so are the gradients, however the batch is split.

    Parameters
    ----------
    target, weight, ignore_index, mask
        As in `cross_entropy`.

    Returns
    -------
    float
        The number of targets that count; with class weights, the sum of their weights. Of probabilities,
        the number of rows that count, whatever the weights (as in torch).
    """
    function = "cross_entropy_count"
    if _is_soft(target):
        shape = target.shape if isinstance(target, Tensor) else np.shape(target)
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        mask = _mask(function, mask, rows)
        return float(math.prod(rows) if mask is None else np.count_nonzero(mask))
    shape = np.shape(target)
    weight = _constant(function, "weight", weight, np.float64)
    target = _classes(function, target, shape, _mask(function, mask, shape), ignore_index)
    if weight is not None:
        with _input_errors():
            check_class_weight(function, "weight", weight, weight.size)
            checks.indices(function, "target", target, weight.size, ignore_index)
    return float(_count(target, weight, ignore_index))


def linear_cross_entropy(
    input, weight, target, ignore_index=-100, reduction="mean", label_smoothing=0.0, *, class_weight=None,
    mask=None, z_loss=0.0,
):  # fmt: skip
    """cross_entropy(linear(input, weight), target) in chunks of rows: the logits never exist as a whole.

    Where gradients will be wanted, "mean" and "sum" compute them along with the losses, while a chunk's
    logits are there; `backward` only scales them. The weight's wait where its `grad` will be. Should anything
    else be put there in between, or is there a gradient to add to, each chunk's logits are computed again in
    the backward pass.

    When nothing counts the mean is 0 and so are the gradients, as in `cross_entropy`.

    Parameters
    ----------
    input : (..., C) Tensor
    weight : (V, C) Tensor
    target : (...) integer array
    class_weight : (V,) array, optional
        The `weight` of `cross_entropy`.
    ignore_index, reduction, label_smoothing, mask, z_loss
        As in `cross_entropy`.

    Returns
    -------
    Tensor
        () or, for "none", (...); in nats.

    Raises
    ------
    InputError, TypeError
        As `cross_entropy`.
    """
    function = "linear_cross_entropy"
    _check_reduction(function, reduction)
    input, weight = as_tensor(input), as_tensor(weight)
    if not input.ndim or weight.ndim != 2 or input.shape[-1] != weight.shape[1] or not len(weight.data):
        raise InputError(
            f"{function}: input is {input.shape}, weight is {weight.shape}; they must be (..., C) and (V, C) "
            "with V at least 1"
        )
    shape = input.shape[:-1]
    class_weight = _constant(function, "class_weight", class_weight, input.dtype)
    target = _classes(function, target, shape, _mask(function, mask, shape), ignore_index)
    x, w, targets = input.data.reshape(target.size, input.shape[-1]), weight.data, target.reshape(-1)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    with _input_errors():
        options.update(zip(options, check_targets(function, "target", target, len(w), **options)))
        check_class_weight(function, "class_weight", class_weight, len(w))
    options["class_weight"] = class_weight
    count = _count(targets, class_weight, ignore_index) if reduction == "mean" else 1
    if not count > 0:  # as if each row were ignored: no NaN comes to loss or gradient
        targets, count = np.full_like(targets, ignore_index), 1
    needs = [is_grad_enabled() and y.requires_grad for y in (input, weight)]
    ready = None
    with claimed(weight) if needs[1] and reduction != "none" else nullcontext() as dw:
        if reduction != "none" and any(needs) and (dw is not None or not needs[1]):
            ones = np.full(len(targets), 1 / count, x.dtype)  # the losses' gradients when the result's is 1
            losses, *ready = kernels.linear_cross_entropy_both(
                ones, x, w, targets, out=(None, dw), needs=needs, **options
            )
    if ready is None:
        losses, _ = kernels.linear_cross_entropy_forward(x, w, targets, **options)
    out, rows = _reduced(losses, shape, reduction, count)
    shape = input.shape

    def backward(grad):
        nonlocal ready
        (dx, dw), add = ready or (None, None), False
        early, ready = ready is not None, None
        if early and needs[1]:
            dw = taken(weight, dw)
            early = dw is not None
        if not early:
            (dw,), add = targets_of(weight) if needs[1] else ((None,), False)
            # the bits of the early gradients, unless there are others to add to
            dlosses = rows(grad) if add or reduction == "none" else np.full(len(targets), 1 / count, x.dtype)
            _, dx, dw = kernels.linear_cross_entropy_both(
                dlosses, x, w, targets, out=(None, dw), accumulate=add, needs=needs, **options
            )
        if not add and reduction != "none" and grad != 1:
            for array in (dx, dw):
                if array is not None:
                    kernels.scale_(array, float(grad))
        dx = None if dx is None else dx.reshape(shape)
        if not needs[1]:
            return dx, None
        return dx, delivered(weight, dw) if early else written((weight,), (dw,))[0]

    return record(out, (input, weight), backward)


# Element by element ----------------------------------------------------------------------------------


def _pair(function, input, target):
    """input and target as Tensors of one dtype; warns when they broadcast."""
    x, y = _operands(as_tensor(input), target if isinstance(target, Tensor) else np.asarray(target))
    if y is NotImplemented:
        raise TypeError(f"{function}: target is a {type(target).__name__}, it must be a Tensor or an array")
    y = y if isinstance(y, Tensor) else Tensor(np.full((), y, x.dtype))
    if x.shape != y.shape:
        try:
            np.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            shapes = f"input is {x.shape}, target is {y.shape}"
            raise InputError(f"{function}: {shapes}; they must broadcast") from None
        warnings.warn(
            f"{function}: input is {x.shape} and target is {y.shape}; they broadcast, which may not be meant",
            stacklevel=4,
        )
    return x, y


def _regression(
    function, input, target, reduction, forward, backward, *constant, weight=None, by_weight=True
):
    """by_weight: whether a mean with a weight divides by its sum; otherwise by the number of elements."""
    _check_reduction(function, reduction)
    x, y = _pair(function, input, target)
    a, b = np.broadcast_arrays(x.data, y.data)
    with _input_errors():
        losses = forward(a, b, *constant)
    count = losses.size
    weight = _constant(function, "weight", weight, losses.dtype)
    if weight is not None:
        if weight.shape != x.shape:
            raise InputError(f"{function}: weight is {weight.shape}, it must be input's shape, {x.shape}")
        losses = losses * weight
        if by_weight:
            count = weight.sum(dtype=np.float64)
    out, elements = _reduced(losses, losses.shape, reduction, count)
    shape_x, shape_y, wanted = x.shape, y.shape, y.requires_grad

    def gradients(grad):
        dlosses = elements(grad)
        dx = backward(dlosses if weight is None else dlosses * weight, a, b, *constant)
        return _unbroadcast(dx, shape_x), _unbroadcast(-dx, shape_y) if wanted else None

    return record(out, (x, y), gradients)


def mse_loss(input, target, reduction="mean", weight=None):
    """(input - target)^2.

    Parameters
    ----------
    input : Tensor of any shape
    target : Tensor or array of input's shape
        May require a gradient. Other shapes broadcast, with a warning.
    reduction : {"mean", "sum", "none"}
        Of no elements the mean is NaN, as in torch. With a weight it divides by the sum of the weights.
    weight : array or Tensor of input's shape, optional
        What each element's loss is multiplied with; as it has no gradient, it must not require one.
    """
    forward, backward = kernels.mse_forward, kernels.mse_backward
    return _regression("mse_loss", input, target, reduction, forward, backward, weight=weight)


def l1_loss(input, target, reduction="mean", weight=None):
    """|input - target|, the mean absolute error.  Arguments as `mse_loss`."""
    forward, backward = kernels.l1_forward, kernels.l1_backward
    return _regression("l1_loss", input, target, reduction, forward, backward, weight=weight)


def smooth_l1_loss(input, target, reduction="mean", beta=1.0):
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 from there on (Girshick 2015).

    beta is at least 0; at 0 this is `l1_loss`. Other arguments as `mse_loss`, without its weight.
    """
    with _input_errors():
        checks.real("smooth_l1_loss", beta=beta)
    if not beta >= 0:
        raise InputError(f"smooth_l1_loss: beta is {beta}, it must be at least 0")
    forward, backward = kernels.smooth_l1_forward, kernels.smooth_l1_backward
    return _regression("smooth_l1_loss", input, target, reduction, forward, backward, beta)


def huber_loss(input, target, reduction="mean", delta=1.0, weight=None):
    """With d = |input - target|: d^2 / 2 up to delta, delta (d - delta / 2) beyond (Huber 1964).

    delta is above 0. Other arguments as `mse_loss`, but a mean divides by the number of elements also with
    a weight, as in torch.
    """
    with _input_errors():
        checks.real("huber_loss", delta=delta)
    if not delta > 0:
        raise InputError(f"huber_loss: delta is {delta}, it must be above 0")
    forward, backward = kernels.huber_forward, kernels.huber_backward
    return _regression(
        "huber_loss", input, target, reduction, forward, backward, delta, weight=weight, by_weight=False
    )


def binary_cross_entropy_with_logits(input, target, weight=None, reduction="mean", pos_weight=None):
    """-weight (pos_weight target log(sigmoid(input)) + (1 - target) log(1 - sigmoid(input))).

    Parameters
    ----------
    input : Tensor of any shape
        Logits, of any size: nothing overflows or cancels.
    target : Tensor or array of input's shape
        Probabilities that a class holds; a Tensor may require a gradient.
    weight, pos_weight : array or Tensor, optional
        Broadcast to input's shape; None is 1. As in torch they have no gradient.
    reduction : {"mean", "sum", "none"}
        The mean divides by the number of elements.
    """
    function = "binary_cross_entropy_with_logits"
    _check_reduction(function, reduction)
    x = as_tensor(input)
    y = target if isinstance(target, Tensor) else Tensor(np.asarray(target, x.dtype))
    if y.shape != x.shape:
        raise InputError(f"{function}: target is {y.shape}, it must be input's shape, {x.shape}")
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    a, b, wanted = x.data, y.data, y.requires_grad
    weights = [
        _constant(function, "weight", weight, x.dtype),
        _constant(function, "pos_weight", pos_weight, x.dtype),
    ]
    with _input_errors():
        losses = kernels.bce_with_logits_forward(a, b, *weights)
    out, elements = _reduced(losses, losses.shape, reduction, losses.size)

    def backward(grad):
        dlosses = elements(grad)
        dx = kernels.bce_with_logits_backward(dlosses, a, b, *weights)
        if not wanted:
            return dx, None
        w, pos = (a.dtype.type(1) if array is None else array for array in weights)
        zero = a.dtype.type(0)
        return dx, dlosses * w * (pos * np.logaddexp(zero, -a) - np.logaddexp(zero, a))

    return record(out, (x, y), backward)
