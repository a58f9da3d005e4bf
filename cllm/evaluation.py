"""Evaluation: the loss and the metrics of a model over all of a split or dataset."""

import math

import numpy as np

from cllm import metrics
from cllm import task as tasks
from cllm.data.batch import feed
from cllm.errors import InputError
from cllm.tensor import no_grad

__all__ = ["batch_size_for", "evaluate", "measure"]

# Sequences of an evaluation's batch hold about this many tokens: enough for the kernels to run at full
# speed, and no more memory than a training step.
TOKENS = 1024


def evaluate(model, data, batch_size=None, *, loss=None, metrics=None):
    """The loss on all of a split, in fixed windows of the model's block size, or of a dataset.

    Parameters
    ----------
    model : nn.Module
        It is evaluated in eval mode and left as it was.
    data : cllm.data.Tokens or dataset
        A dataset has ``len(d)`` and ``d[indices] -> cllm.Batch``.
    batch_size : int, optional
        Windows or examples in a batch; the result depends on it only by rounding.
    loss, metrics
        As of a `cllm.Task`.

    Returns
    -------
    dict
        loss (nats a token), perplexity (without a loss of one's own), the metrics, tokens (how many
        targets counted).

    Raises
    ------
    InputError
        When the split is shorter than one window, or nothing in it counts.
    """
    batches = feed(data, "the data to evaluate", getattr(getattr(model, "config", None), "block_size", None))
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}, it must be an integer of at least 1")
    for name, metric in (metrics or {}).items():
        tasks.check_metric(name, metric)
    result, count = measure(model, batches.batches(batch_size or batch_size_for(batches)), loss, metrics)
    if not count:
        raise InputError("nothing to evaluate counts: all targets are masked")
    return {**result, "tokens": count}


def batch_size_for(source, training=1):
    """How many examples of a feed are evaluated at once, where training takes `training`."""
    return max(1, TOKENS // source.size) if source.unit == "token" else max(training, 256)


def measure(model, batches, loss=None, measured=None):
    """Loss, perplexity and metrics over batches as a dict, and how many losses counted."""
    streaming = {name: metric for name, metric in (measured or {}).items() if tasks.is_streaming(metric)}
    means = {name: metrics.Mean(f) for name, f in (measured or {}).items() if name not in streaming}
    for metric in streaming.values():
        metric.reset()
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with no_grad():
            for batch in batches:
                if loss is None:
                    losses, n = tasks.language_loss(model, batch, "none")
                    total += float(losses.data.sum(dtype=np.float64))
                else:
                    part, n = tasks.checked_loss(loss(model, batch))
                    total += part.item()
                count += n
                if measured:
                    outputs = model(batch.inputs)
                for metric in streaming.values():
                    metric.update(outputs, batch.targets, tasks.counted(batch))
                for mean in means.values():
                    mean.update(outputs, batch)
    finally:
        model.train(training)
    if not count:
        return {}, 0
    mean = total / count
    result = {"loss": mean}
    if loss is None:
        result["perplexity"] = math.exp(mean) if mean < 700 else math.inf
    for name in measured or ():
        if name in streaming:
            value = streaming[name].compute()
            several = isinstance(value, dict)
            result |= {f"{name}.{part}": v for part, v in value.items()} if several else {name: value}
        elif means[name].count:  # what was not measured has no key
            result[name] = means[name].compute()
    return result, count
