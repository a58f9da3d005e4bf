"""Streaming metrics: batches update integer counts (and sums in double), the result is computed at the end.

All classes here have

.. code-block:: text

    update(outputs, targets, mask=None)    count a batch
    compute()                              the metric of all that was counted since the last reset
    reset()                                forget all
    merge(other)                           add what another metric of the same kind has counted

`outputs` are scores (logits, probabilities, their logs), an array or a Tensor (..., C) for C classes; metrics
of the predicted class also take integer predictions (...). `targets` are integers (...). A target counts
unless `mask`, a boolean array that broadcasts to targets' shape, is False there, or it is -100, the losses'
`ignore_index`. How the data is cut into batches changes no count, and sums by their rounding alone.

The predicted class is the first one with the largest score. Where a score of a row is NaN, no class is
predicted, and the row counts as wrong. What was never counted is missing: then `compute` raises.
"""

import math
from functools import partial
from numbers import Integral
from types import SimpleNamespace

import numpy as np

from cllm import kernels
from cllm.errors import InputError, nearest
from cllm.tensor import Tensor

__all__ = [
    "BY_NAME", "F1", "Accuracy", "BitsPerByte", "ConfusionMatrix", "Mean", "Perplexity", "Precision",
    "Recall", "TopK", "build",
]  # fmt: skip

IGNORE_INDEX = -100
MAX_CONFUSION_CLASSES = 1024  # 8 MB of counts
_BLOCK = 1 << 22  # scores that TopK compares at a time, to keep what it allocates small


class _Metric:
    """Sums that add up over batches: the attributes named in `_sums`. `_fixed` ones must agree to merge."""

    _sums = ()
    _fixed = ()

    def __init__(self):
        self.reset()

    def reset(self):
        """Forget all that was counted."""
        for name in self._sums:
            setattr(self, name, 0)

    def merge(self, other):
        """Add what `other`, a metric of the same kind, has counted.

        Raises
        ------
        InputError
            When it is of another kind, or was made with other arguments.
        """
        if type(other) is not type(self):
            raise InputError(f"a {type(self).__name__} cannot be merged with a {type(other).__name__}")
        for name in self._fixed:
            mine, others = getattr(self, name), getattr(other, name)
            if not np.array_equal(mine, others):
                raise InputError(f"a metric with {name} = {mine} cannot be merged with one with {others}")
        for name in self._sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _ratio(self, total, count):
        if not count:
            raise InputError(f"{type(self).__name__} has counted nothing, so there is no value to compute")
        return float(total / count)


class Accuracy(_Metric):
    """The share of targets that are the predicted class.

    Of equal largest scores the first is the prediction, so that a model whose scores are all the same is
    right where the target is class 0. One pass over the scores: as fast as `numpy.argmax`.
    """

    _sums = ("correct", "count")

    def update(self, outputs, targets, mask=None):
        """Count a batch.

        Parameters
        ----------
        outputs : (..., C) floats or (...) integers
            Scores or predictions.
        targets : (...) integers
        mask : boolean array, optional
            Broadcasts to targets' shape; False does not count.

        Raises
        ------
        InputError
            When shapes or types do not fit, or a target is out of range (named with its position).
        """
        predictions, targets, _ = _predictions(outputs, targets, mask)
        self.correct += int(np.count_nonzero(predictions == targets))
        self.count += targets.size

    def compute(self):
        """The accuracy, a float in [0, 1]. Raises an InputError when nothing was counted."""
        return self._ratio(self.correct, self.count)


class TopK(_Metric):
    """The share of targets that are among the k classes with the largest scores.

    A target is so when fewer than k scores are strictly larger than its own: ties count in its favour,
    whereas torch.topk takes some k of them. A model whose scores are all the same thus has 1.

    Parameters
    ----------
    k : int
        At least 1, and at most the number of classes.
    """

    _sums = ("correct", "count")
    _fixed = ("k",)

    def __init__(self, k):
        if not _is_count(k):
            raise InputError(f"k is {k}, it must be an integer of at least 1")
        self.k = int(k)
        super().__init__()

    def update(self, outputs, targets, mask=None):
        """Count a batch of scores (..., C); parameters and errors are those of `Accuracy.update`."""
        scores, targets, counted = _scores(outputs, targets, mask, "TopK")
        n_classes = scores.shape[1]
        if self.k > n_classes:
            raise InputError(f"k is {self.k}, it must be at most the number of classes ({n_classes})")
        safe = np.where(counted, targets, 0)
        block = max(_BLOCK // n_classes, 1)
        for begin in range(0, len(scores), block):
            rows = slice(begin, begin + block)
            own = np.take_along_axis(scores[rows], safe[rows, None], axis=1)
            larger = np.count_nonzero(scores[rows] > own, axis=1)
            numbers = ~np.isnan(scores[rows].max(axis=1))  # a row's NaN is its maximum
            correct = (larger < self.k) & numbers & counted[rows]
            self.correct += int(np.count_nonzero(correct))
        self.count += int(np.count_nonzero(counted))

    def compute(self):
        """The top-k accuracy, a float in [0, 1]. Raises an InputError when nothing was counted."""
        return self._ratio(self.correct, self.count)


class _NatsPer(_Metric):
    """Negative log-likelihoods over a number of units."""

    _sums = ("nats", "count")

    def update(self, outputs, targets, mask=None):
        """Count a batch of logits (..., C); parameters and errors are those of `Accuracy.update`."""
        logits, targets, counted = _scores(outputs, targets, mask, type(self).__name__)
        units = self._units(targets[counted], logits.shape[1])
        if logits.dtype not in (np.float32, np.float64):
            logits = logits.astype(np.float64)
        losses, _ = kernels.cross_entropy_forward(logits, np.where(counted, targets, IGNORE_INDEX))
        self.add(losses.sum(dtype=np.float64), units)

    def add(self, nats, count):
        """Count losses that are known already: their sum in nats, and of how many tokens or bytes it is."""
        self.nats += float(nats)
        self.count += int(count)


class Perplexity(_NatsPer):
    """exp(mean negative log-likelihood), of logits (or log-probabilities). NaN outputs make it NaN.

    .. code-block:: text

        exp(sum of -log(softmax(logits)[target]) / number of targets)

    Sum and count are kept apart: it is the perplexity of all targets, not a mean of batches' perplexities.
    """

    def _units(self, targets, n_classes):
        return targets.size

    def compute(self):
        """The perplexity, a float of at least 1. Raises an InputError when nothing was counted."""
        nats = self._ratio(self.nats, self.count)
        return math.exp(nats) if nats < 709 else math.inf if nats == nats else math.nan


class BitsPerByte(_NatsPer):
    """The bits that a byte of text costs: a language model's loss in a unit that no tokenizer changes.

    .. code-block:: text

        sum of -log2(softmax(logits)[target]) / sum of byte_lengths[target]

    Parameters
    ----------
    byte_lengths : (C,) integer array
        How many bytes of UTF-8 each token stands for: a tokenizer's ``byte_lengths()``.
    """

    _fixed = ("byte_lengths",)

    def __init__(self, byte_lengths):
        if byte_lengths is None:
            raise InputError("byte_lengths is None: this tokenizer does not know how long its tokens are")
        lengths = np.asarray(byte_lengths)
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or lengths.min() < 0:
            raise InputError("byte_lengths must be one integer of at least 0 for each token")
        self.byte_lengths = lengths.astype(np.int64)
        super().__init__()

    def _units(self, targets, n_classes):
        if n_classes != len(self.byte_lengths):
            raise InputError(f"byte_lengths has {len(self.byte_lengths)} tokens, outputs have {n_classes}")
        return self.byte_lengths[targets].sum()

    def compute(self):
        """The bits per byte, a float. Raises an InputError when no byte was counted."""
        return self._ratio(self.nats / math.log(2), self.count)


class _OfClasses(_Metric):
    """What precision, recall and F1 share: each class's counts of true positives, predictions, targets."""

    _sums = ("counts",)
    _fixed = ("average",)

    def __init__(self, average="macro", n_classes=None):
        if average not in _AVERAGES:
            hint = f"{average}{nearest(average, _AVERAGES)}"
            raise InputError(f"average is {hint}, it must be one of {', '.join(map(str, _AVERAGES))}")
        if n_classes is not None and not _is_count(n_classes):
            raise InputError(f"n_classes is {n_classes}, it must be an integer of at least 1")
        self.average = average
        self._given = n_classes
        super().__init__()

    def reset(self):
        """Forget all that was counted."""
        super().reset()
        self.n_classes = self._given

    def update(self, outputs, targets, mask=None):
        """Count a batch; parameters and errors are those of `Accuracy.update`.

        Integer predictions do not tell how many classes there are: they need `n_classes`.
        """
        predictions, targets, n_classes = _predictions(outputs, targets, mask, self.n_classes)
        if n_classes is None:
            name = type(self).__name__
            raise InputError(f"integer predictions do not tell the number of classes: {name}(n_classes=...)")
        kept = (targets[predictions == targets], predictions[predictions >= 0], targets)
        self.counts = self.counts + np.stack([np.bincount(part, minlength=n_classes) for part in kept])
        self.n_classes = n_classes

    def merge(self, other):
        """Add what `other`, a metric of the same kind and as many classes, has counted."""
        n_classes = getattr(other, "n_classes", None)
        if None not in (n_classes, self.n_classes) and n_classes != self.n_classes:
            raise InputError(f"a metric of {self.n_classes} classes cannot be merged with one of {n_classes}")
        super().merge(other)
        self.n_classes = self.n_classes or n_classes

    def compute(self):
        """The metric.

        Returns
        -------
        float or dict
            With average = None a dict: class -> value, for each class that is a target or was predicted.

        Raises
        ------
        InputError
            When nothing was counted.
        """
        if not np.any(self.counts):
            return self._ratio(0, 0)
        if self.average == "micro":
            part, whole = self._shares(*self.counts.sum(axis=1))
            return float(part / whole) if whole else 0.0
        _, predicted, actual = self.counts
        present = np.flatnonzero(predicted + actual)
        part, whole = self._shares(*self.counts[:, present])
        values = np.divide(part, whole, out=np.zeros(len(present)), where=whole > 0)
        if self.average is None:
            return dict(zip(present.tolist(), values.tolist()))
        weights = None if self.average == "macro" else actual[present]
        return float(np.average(values, weights=weights))


_AVERAGES = ("macro", "micro", "weighted", None)


class Precision(_OfClasses):
    """The share of a class's predictions that are right: true positives / predictions.

    Parameters
    ----------
    average : {"macro", "micro", "weighted", None}
        "macro": the mean over classes. "weighted": that mean, weighted by each class's number of targets.
        "micro": from the sums over classes. None: a dict of each class's value. As in scikit-learn, classes
        that are neither a target nor predicted do not take part, and 0 / 0 is 0.
    n_classes : int, optional
        Needed for integer predictions alone.
    """

    @staticmethod
    def _shares(true_positives, predicted, actual):
        return true_positives, predicted


class Recall(_OfClasses):
    """The share of a class's targets that are found: true positives / targets.

    Parameters as of `Precision`.
    """

    @staticmethod
    def _shares(true_positives, predicted, actual):
        return true_positives, actual


class F1(_OfClasses):
    """The harmonic mean of precision and recall: 2 true positives / (predictions + targets).

    Parameters as of `Precision`. "macro" is the mean of the classes' F1.
    """

    @staticmethod
    def _shares(true_positives, predicted, actual):
        return 2 * true_positives, predicted + actual


class ConfusionMatrix(_Metric):
    """How often each class (row) was taken for which (column).

    Parameters
    ----------
    n_classes : int
        At most 1,024.

    Attributes
    ----------
    unpredicted : int
        Rows with NaN scores, which stand in no column.
    """

    _sums = ("counts", "unpredicted")
    _fixed = ("n_classes",)

    def __init__(self, n_classes):
        if not _is_count(n_classes):
            raise InputError(f"n_classes is {n_classes}, it must be an integer of at least 1")
        if n_classes > MAX_CONFUSION_CLASSES:
            most = f"a confusion matrix has at most {MAX_CONFUSION_CLASSES:,}"
            raise InputError(f"n_classes is {n_classes}, {most}")
        self.n_classes = int(n_classes)
        super().__init__()

    def reset(self):
        """Forget all that was counted."""
        super().reset()
        self.counts = np.zeros((self.n_classes, self.n_classes), np.int64)

    def update(self, outputs, targets, mask=None):
        """Count a batch; parameters and errors are those of `Accuracy.update`."""
        predictions, targets, _ = _predictions(outputs, targets, mask, self.n_classes)
        seen = predictions >= 0
        cells = targets[seen] * self.n_classes + predictions[seen]
        self.counts = self.counts + np.bincount(cells, minlength=self.counts.size).reshape(self.counts.shape)
        self.unpredicted += int(np.count_nonzero(~seen))

    def compute(self):
        """The counts, int64 (n_classes, n_classes): targets are rows, predictions columns; 0 at first."""
        return self.counts.copy()


class Mean(_Metric):
    """The mean that a function of outputs and batch gives as sum and count.

    Parameters
    ----------
    function : callable
        (outputs, batch) -> (sum, count); batch has `targets` and `mask`. A `cllm.Task` takes such a function
        as it is.
    """

    _sums = ("sum", "count")
    _fixed = ("function",)

    def __init__(self, function):
        if not callable(function):
            raise InputError(f"function is {function!r}, it must be a function: outputs, batch -> sum, count")
        self.function = function
        super().__init__()

    def update(self, outputs, batch, mask=None):
        """Count a batch.

        Parameters
        ----------
        outputs
            Handed to the function.
        batch : cllm.Batch or array
            Targets alone (with their mask) stand for a batch that has no `inputs`.

        Raises
        ------
        InputError
            When the function does not return a sum and a count.
        """
        if not hasattr(batch, "targets"):
            batch = SimpleNamespace(targets=batch, mask=mask)
        result = self.function(outputs, batch)
        try:
            total, count = result
            total, count = one_number(total), a_count(count)
        except (TypeError, ValueError):
            name = getattr(self.function, "__name__", "function")
            given = " ".join(repr(result).split())
            given = given if len(given) <= 60 else f"a {type(result).__name__}"
            raise InputError(f"{name} returned {given}, it must return (sum, count): two numbers") from None
        self.sum += total
        self.count += count

    def compute(self):
        """sum / count, a float. Raises an InputError when nothing was counted."""
        return self._ratio(self.sum, self.count)


#: What ``[train] metrics`` may name, and how each is made; "bits_per_byte" needs a tokenizer's byte lengths.
BY_NAME = {
    "accuracy": Accuracy, "top5": partial(TopK, 5), "perplexity": Perplexity, "bits_per_byte": BitsPerByte,
    "precision": Precision, "recall": Recall, "f1": F1,
}  # fmt: skip


def build(name, tokenizer=None):
    """The metric of a name in `BY_NAME`.

    Parameters
    ----------
    name : str
    tokenizer : object, optional
        "bits_per_byte" asks its ``byte_lengths()``.

    Raises
    ------
    InputError
        For an unknown name, or bits per byte of a tokenizer that does not know its tokens' bytes.
    """
    if name not in BY_NAME:
        allowed = ", ".join(BY_NAME)
        raise InputError(f'"{name}" is no metric{nearest(name, BY_NAME)}, it must be one of {allowed}')
    if name == "bits_per_byte":
        return BitsPerByte(tokenizer.byte_lengths() if hasattr(tokenizer, "byte_lengths") else None)
    return BY_NAME[name]()


def _is_count(value):
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def one_number(value):
    """A number, or an array or Tensor of no axes, as a float; a ValueError for anything else."""
    array = _array(value)
    if array.ndim or array.dtype.kind not in "biuf":
        raise ValueError(f"{value!r} is not one number")
    return float(array)


def a_count(value):
    """`one_number` that is finite and at least 0, as a count is."""
    count = one_number(value)
    if not 0 <= count < math.inf:
        raise ValueError(f"{value!r} is not a count")
    return count


def _array(values):
    return values.data if isinstance(values, Tensor) else np.asarray(values)


def _targets(targets, mask):
    """Targets as an int64 array, and which of them count."""
    targets = np.asarray(targets)
    if targets.dtype.kind not in "iub":
        raise InputError(f"targets are {targets.dtype}, they must be integers")
    if targets.dtype == np.uint64 and targets.max(initial=0) >= 2**63:  # which would wrap, perhaps to -100
        raise InputError(f"targets have {targets.max()}, they must be below 2**63")
    targets = targets.astype(np.int64, copy=False)
    counted = targets != IGNORE_INDEX
    if mask is None:
        return targets, counted
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise InputError(f"mask is {mask.dtype}, it must be boolean: True counts")
    try:
        return targets, counted & np.broadcast_to(mask, targets.shape)
    except ValueError:
        raise InputError(f"mask is {mask.shape}, it must broadcast to targets' {targets.shape}") from None


def _check_range(name, classes, counted, n_classes):
    """Raise for the first class that counts and is not one of n_classes."""
    wrong = counted & ((classes < 0) | (classes >= n_classes))
    if wrong.any():
        place = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
        position = f"[{', '.join(map(str, place))}]" if place else ""
        raise InputError(f"{name}{position} is {classes[place]}, it must be in 0 to {n_classes - 1}")


def _checked_scores(outputs, targets, counted):
    """The number of classes of scores (..., C) that fit the targets."""
    if outputs.dtype.kind != "f" or outputs.shape[:-1] != targets.shape or outputs.ndim == targets.ndim:
        raise InputError(
            f"outputs are {outputs.dtype} {outputs.shape} and targets {targets.shape}, "
            "outputs must be scores with one more axis, the classes, last"
        )
    if not outputs.shape[-1]:
        raise InputError(f"outputs are {outputs.shape}, they must have at least one class")
    _check_range("targets", targets, counted, outputs.shape[-1])
    return outputs.shape[-1]


def _scores(outputs, targets, mask, metric):
    """Scores as (N, C), targets and which of them count as (N,)."""
    outputs = _array(outputs)
    targets, counted = _targets(targets, mask)
    if outputs.dtype.kind in "iub":
        raise InputError(f"outputs are {outputs.dtype}, {metric} needs all classes' scores: floats (..., C)")
    n_classes = _checked_scores(outputs, targets, counted)
    return outputs.reshape(-1, n_classes), targets.reshape(-1), counted.reshape(-1)


def _predictions(outputs, targets, mask, n_classes=None):
    """Predicted classes (-1 where a score is NaN) and targets of all that counts, and the number of classes.

    Parameters
    ----------
    outputs : (..., C) floats or (...) integers
    targets : (...) integers
    mask : boolean array or None
    n_classes : int, optional
        What the metric has; None takes C, and stays None for integer predictions.
    """
    outputs = _array(outputs)
    targets, counted = _targets(targets, mask)
    if outputs.dtype.kind in "iub":
        if outputs.shape != targets.shape:
            shapes = f"predictions are {outputs.shape} and targets {targets.shape}"
            raise InputError(f"{shapes}, they must have the same shape")
        predictions = outputs.astype(np.int64, copy=False)
        if n_classes is not None:
            _check_range("outputs", predictions, counted, n_classes)
            _check_range("targets", targets, counted, n_classes)
        return predictions[counted], targets[counted], n_classes
    found = _checked_scores(outputs, targets, counted)
    if n_classes not in (None, found):
        raise InputError(f"outputs have {found} classes, the metric has {n_classes}")
    # NaN counts as the largest value in argmax: it is there that a row with NaN can be told.
    predictions = outputs.argmax(axis=-1)
    largest = np.take_along_axis(outputs, predictions[..., None], axis=-1)[..., 0]
    return np.where(np.isnan(largest), -1, predictions)[counted], targets[counted], found
