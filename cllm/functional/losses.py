"""Losses: cross-entropy of logits and of an output layer, regression, binary cross-entropy."""

import warnings

import numpy as np

from cllm import kernels
from cllm.functional.elementwise import softplus
from cllm.functional.gradients import data_of, targets_of, written
from cllm.tensor import as_tensor, record, where


def _check_reduction(function, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{function}: reduction is {reduction!r}, it must be "mean", "sum" or "none"')


def _reduce(function, losses, reduction):
    _check_reduction(function, reduction)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _integer_targets(function, target, shape):
    target = np.asarray(target)
    if target.dtype.kind not in "iu":
        raise TypeError(f"{function}: target is {target.dtype}, it must be an integer array")
    if target.shape != shape:
        raise ValueError(f"{function}: target is {target.shape}, it must be {shape}")
    return target.reshape(-1)


def _reduced_rows(losses, targets, shape, ignore_index, reduction):
    """The rows' losses reduced, and the function from the result's gradient to the rows' gradients."""
    if reduction == "none":
        return losses.reshape(shape), lambda grad: grad.reshape(-1)
    total = losses.sum(dtype=np.float64)
    count = np.count_nonzero(targets != ignore_index) if reduction == "mean" else 1
    with np.errstate(all="ignore"):
        out = np.asarray(total / count, losses.dtype)  # nan without a target, as in torch
    n = losses.shape
    return out, lambda grad: np.full(n, grad / max(count, 1), losses.dtype)


def cross_entropy(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """The negative log-likelihood of target under softmax(input).

    Parameters
    ----------
    input : (N, V), (V,) or (N, V, ...) Tensor
        Logits; the classes lie in dimension 1.
    target : (N,), () or (N, ...) integer array
    weight : (V,) array, optional
        A weight for each class; "mean" divides by the targets' sum of weights.
    ignore_index : int
        Rows with this target have no loss.
    reduction : {"mean", "sum", "none"}
    label_smoothing : float in [0, 1]
        The share of the target distribution that is uniform over the classes.
    """
    _check_reduction("cross_entropy", reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, it must be between 0 and 1")
    x = as_tensor(input)
    if not x.ndim:
        raise ValueError("cross_entropy: input is a single number, it must be (N, V), (V,) or (N, V, ...)")
    V = x.shape[0 if x.ndim == 1 else 1]
    shape = x.shape[:-1] if x.ndim < 3 else (x.shape[0], *x.shape[2:])
    targets = _integer_targets("cross_entropy", target, shape)
    if x.ndim > 2:
        x = x.permute(0, *range(2, x.ndim), 1)
    x = x.reshape(targets.size, V)
    if weight is not None:
        return _weighted_cross_entropy(x, targets, weight, ignore_index, reduction, label_smoothing, shape)
    logits = x.data
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses, lse = kernels.cross_entropy_forward(logits, targets, **options)
    out, rows = _reduced_rows(losses, targets, shape, ignore_index, reduction)

    def backward(grad):
        return (kernels.cross_entropy_backward(rows(grad), logits, targets, lse, **options),)

    return record(out, (x,), backward)


def _weighted_cross_entropy(x, targets, weight, ignore_index, reduction, label_smoothing, shape):
    V = x.shape[1]
    weight = np.asarray(data_of(weight) if not isinstance(weight, np.ndarray) else weight, x.dtype)
    if weight.shape != (V,):
        raise ValueError(f"cross_entropy: weight is {weight.shape}, it must be {(V,)}")
    valid = targets != ignore_index
    targets = np.where(valid, targets, 0)
    row_weight = np.where(valid, weight[targets], 0)
    log_p = x.log_softmax(-1)
    losses = log_p.gather(1, targets[:, None]).squeeze(1) * (-(1 - label_smoothing) * row_weight)
    if label_smoothing > 0:
        losses = losses + (log_p * weight).sum(-1) * valid * (-label_smoothing / V)
    if reduction == "mean":
        return losses.sum() / float(row_weight.sum(dtype=np.float64))
    return losses.sum() if reduction == "sum" else losses.reshape(shape)


def linear_cross_entropy(input, weight, target, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """cross_entropy(linear(input, weight), target) in chunks of rows: the logits never exist as a whole.

    Parameters
    ----------
    input : (..., C) Tensor
    weight : (V, C) Tensor
    target : (...) integer array
    ignore_index, reduction, label_smoothing
        As in `cross_entropy`.
    """
    _check_reduction("linear_cross_entropy", reduction)
    input = as_tensor(input)
    shape = input.shape[:-1]
    targets = _integer_targets("linear_cross_entropy", target, shape)
    x, w = input.data.reshape(targets.size, -1), weight.data
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses, lse = kernels.linear_cross_entropy_forward(x, w, targets, **options)
    out, rows = _reduced_rows(losses, targets, shape, ignore_index, reduction)

    def backward(grad):
        (dw,), add = targets_of(weight)
        dx, dw = kernels.linear_cross_entropy_backward(
            rows(grad), x, w, targets, lse, out=(None, dw), accumulate=add, **options
        )
        return dx.reshape(*shape, -1), *written((weight,), (dw,))

    return record(out, (input, weight), backward)


def _difference(function, input, target):
    x = as_tensor(input)
    shape = target.shape if hasattr(target, "shape") else np.shape(target)
    if shape != x.shape:
        warnings.warn(
            f"{function}: input is {x.shape} and target is {shape}; they broadcast, which may not be meant",
            stacklevel=3,
        )
    return x - target


def mse_loss(input, target, reduction="mean"):
    """(input - target)^2."""
    return _reduce("mse_loss", _difference("mse_loss", input, target) ** 2, reduction)


def l1_loss(input, target, reduction="mean"):
    """|input - target|."""
    return _reduce("l1_loss", _difference("l1_loss", input, target).abs(), reduction)


def smooth_l1_loss(input, target, reduction="mean", beta=1.0):
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 from there on (Girshick 2015)."""
    if not beta >= 0:
        raise ValueError(f"smooth_l1_loss: beta is {beta}, it must be at least 0")
    if beta == 0:
        return l1_loss(input, target, reduction)
    d = _difference("smooth_l1_loss", input, target).abs()
    return _reduce("smooth_l1_loss", where(d.data < beta, d * d * (0.5 / beta), d - 0.5 * beta), reduction)


def huber_loss(input, target, reduction="mean", delta=1.0):
    """With d = |input - target|: d^2 / 2 up to delta, delta (d - delta / 2) beyond (Huber 1964)."""
    if not delta > 0:
        raise ValueError(f"huber_loss: delta is {delta}, it must be above 0")
    d = _difference("huber_loss", input, target).abs()
    return _reduce("huber_loss", where(d.data <= delta, d * d * 0.5, (d - 0.5 * delta) * delta), reduction)


def binary_cross_entropy_with_logits(input, target, weight=None, reduction="mean", pos_weight=None):
    """-(pos_weight target log(sigmoid(input)) + (1 - target) log(1 - sigmoid(input))) * weight.

    weight and pos_weight are arrays that broadcast, or None for 1.
    """
    x = as_tensor(input)
    shape = target.shape if hasattr(target, "shape") else np.shape(target)
    if shape != x.shape:
        raise ValueError(f"binary_cross_entropy_with_logits: input is {x.shape}, target is {shape}")
    # log(sigmoid(x)) = -softplus(-x), and log(1 - sigmoid(x)) = -x - softplus(-x)
    positive = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    losses = x * (1 - target) + softplus(-x) * positive
    if weight is not None:
        losses = losses * weight
    return _reduce("binary_cross_entropy_with_logits", losses, reduction)
