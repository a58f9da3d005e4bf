"""Softmax cross-entropy, of logits and of an output layer."""

from cllm._core.pool import empty
from cllm._kernels import gemm as _gemm
from cllm._kernels import loss as _loss
from cllm.kernels import checks, threads
from cllm.kernels.linear import check_linear, linear_forward

# Softmax cross-entropy -------------------------------------------------------------------------------


def _check_losses(function, logits, targets, ignore_index, label_smoothing):
    shapes = f"{function}: logits is {logits.shape}, targets is {targets.shape}"
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"{shapes}; they must be (N, V), (N,)")
    if not logits.shape[1]:
        raise ValueError(f"{shapes}; V must be at least 1")
    _check_targets(function, targets, logits.shape[1], ignore_index, label_smoothing)


def _check_targets(function, targets, n_classes, ignore_index, label_smoothing):
    checks.real(function, label_smoothing=label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing is {label_smoothing}, it must be in [0, 1]")
    checks.whole(function, "ignore_index", ignore_index, -(2**63), 2**63, "in [-2**63, 2**63)")
    checks.indices(function, "targets", targets, n_classes, ignore_index)


def cross_entropy_forward(logits, targets, *, ignore_index=-100, label_smoothing=0.0, out=None):
    """Softmax cross-entropy of each row, as torch defines it: -log(softmax(logits)[target]).

    With smoothing s: loss = lse - (1 - s) logits[target] - s mean(logits) (Szegedy et al. 2016).

    Parameters
    ----------
    logits : (N, V) array
        V is at least 1.
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    ignore_index : int
        Rows with this target have loss 0 and no gradient.
    label_smoothing : float
        In [0, 1].
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
        When a target is out of range (named with its position), shapes do not match, label_smoothing is
        out of range or `out` is unsuitable.
    TypeError
        When targets are not integers or logits are not float32 or float64.
    """
    function = "cross_entropy_forward"
    (logits,) = checks.floats(function, logits=logits)
    targets = checks.integers(function, "targets", targets)
    _check_losses(function, logits, targets, ignore_index, label_smoothing)
    shapes = targets.shape, targets.shape
    losses, lse = checks.results(function, out, ("losses", "lse"), shapes, logits.dtype, (logits, targets))
    _loss.cross_entropy_forward(logits, targets, ignore_index, label_smoothing, losses, lse, threads.count)
    return losses, lse


def cross_entropy_backward(
    dlosses, logits, targets, lse, *, ignore_index=-100, label_smoothing=0.0, out=None
):
    """dlogits = dloss (softmax(logits) - (1 - s) onehot(target) - s / V); 0 in ignored rows.

    Parameters
    ----------
    dlosses, lse : (N,) arrays
        The gradient of each row's loss; lse as the forward pass returned it.
    logits : (N, V) array
    targets : (N,) integer array
    ignore_index, label_smoothing
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
    dlosses, logits, lse = checks.floats(function, dlosses=dlosses, logits=logits, lse=lse)
    targets = checks.integers(function, "targets", targets)
    _check_losses(function, logits, targets, ignore_index, label_smoothing)
    for name, array in (("dlosses", dlosses), ("lse", lse)):
        if array.shape != targets.shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {targets.shape}")
    inputs = (dlosses, targets, lse) if in_place else (dlosses, targets, lse, logits)
    out = checks.result(function, out, logits.shape, logits.dtype, inputs)
    _loss.cross_entropy_backward(
        dlosses, logits, targets, lse, ignore_index, label_smoothing, out, threads.count
    )  # fmt: skip
    return out


# Head and cross-entropy ------------------------------------------------------------------------------

# Logits in memory at a time: 4 M elements (16 MB in float32), but at least 128 rows, since the weight is
# packed again for each chunk.
_CHUNK_ELEMENTS, _CHUNK_ROWS = 1 << 22, 128


def _chunks(n_rows, n_classes):
    """Slices of rows whose logits fit in a chunk."""
    step = max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(n_classes, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _check_head(function, x, weight, targets, ignore_index, label_smoothing):
    check_linear(function, x, weight)
    if not len(weight):
        raise ValueError(f"{function}: weight is {weight.shape}, V must be at least 1")
    if x.ndim != 2 or targets.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: x is {x.shape}, targets is {targets.shape}; they must be (N, C) and (N,)"
        )
    # all targets, before the first chunk
    _check_targets(function, targets, len(weight), ignore_index, label_smoothing)


def linear_cross_entropy_forward(x, weight, targets, *, ignore_index=-100, label_smoothing=0.0):
    """Softmax cross-entropy of the logits x weight^T, of which only a chunk of rows is in memory at a time.

    Parameters
    ----------
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    ignore_index, label_smoothing
        As `cross_entropy_forward`.

    Returns
    -------
    losses, lse : (N,) arrays
        As `cross_entropy_forward`.
    """
    function = "linear_cross_entropy_forward"
    x, weight = checks.floats(function, x=x, weight=weight)
    targets = checks.integers(function, "targets", targets)
    _check_head(function, x, weight, targets, ignore_index, label_smoothing)
    losses, lse = empty(targets.shape, x.dtype), empty(targets.shape, x.dtype)
    for rows in _chunks(len(x), len(weight)):
        cross_entropy_forward(
            linear_forward(x[rows], weight), targets[rows], ignore_index=ignore_index,
            label_smoothing=label_smoothing, out=(losses[rows], lse[rows]),
        )  # fmt: skip
    return losses, lse


def linear_cross_entropy_backward(
    dlosses, x, weight, targets, lse, *, ignore_index=-100, label_smoothing=0.0, out=None, accumulate=False
):
    """Gradients of `linear_cross_entropy_forward`; each chunk's logits are computed again.

    Parameters
    ----------
    dlosses, lse : (N,) arrays
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
    ignore_index, label_smoothing
        As in the forward pass.
    out : tuple of two arrays, optional
        For dx and dweight; None entries are allocated.
    accumulate : bool
        Add dweight to the array given in `out` instead of assigning.

    Returns
    -------
    dx : (N, C) array
    dweight : (V, C) array
    """
    function = "linear_cross_entropy_backward"
    inputs = dlosses, x, weight, lse = checks.floats(function, dlosses=dlosses, x=x, weight=weight, lse=lse)
    targets = checks.integers(function, "targets", targets)
    _check_head(function, x, weight, targets, ignore_index, label_smoothing)
    for name, array in (("dlosses", dlosses), ("lse", lse)):
        if array.shape != targets.shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {targets.shape}")
    names, shapes, added = ("dx", "dweight"), (x.shape, weight.shape), ("dweight",) if accumulate else ()
    dx, dweight = checks.results(function, out, names, shapes, x.dtype, inputs, added)
    if not len(x) and not accumulate:
        dweight[...] = 0
    for rows in _chunks(len(x), len(weight)):
        logits = linear_forward(x[rows], weight)
        dlogits = cross_entropy_backward(
            dlosses[rows], logits, targets[rows], lse[rows], ignore_index=ignore_index,
            label_smoothing=label_smoothing, out=logits,
        )  # fmt: skip
        _gemm.linear_backward_input(dlogits, weight, dx[rows], threads.count)
        _gemm.linear_backward_weight(dlogits, x[rows], dweight, accumulate or rows.start > 0, threads.count)
    return dx, dweight
