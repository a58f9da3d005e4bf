"""What a run trains: a model, its data, its loss and its metrics; language modelling unless said otherwise.

A user's own comes from a file: ``[task] build = "my.py:build"`` names a function that returns a `Task`, and
``[task] run = "my.py:train"`` one that is the whole loop, given a `LoopRun` by the Trainer. The section's
other keys are that function's keyword arguments.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from cllm import data, rng, userfile
from cllm import functional as F
from cllm.data.batch import feed
from cllm.errors import InputError
from cllm.gpt import GPT
from cllm.metrics import Perplexity, a_count
from cllm.records import is_timing
from cllm.tensor import Tensor

__all__ = [
    "GIVEN", "LossConfig", "Task", "TaskConfig", "arguments", "build", "for_config", "language_loss",
    "load_text", "takes_any", "target_count",
]  # fmt: skip

#: What [task] build says in a run whose task was given to the Trainer in Python.
GIVEN = "given in Python"
IGNORED = -100  # the target that cross-entropy leaves out
# What records, and what `evaluate` returns, hold besides: a metric cannot have such a name.
RESERVED = {"step", "split", "loss", "lr", "grad_norm", "perplexity", "tokens"}


@dataclass(frozen=True)
class LossConfig:
    """[loss]: additions to the cross-entropy of language modelling, in training only.

    Evaluations are of the plain cross-entropy, so that they compare across these settings.

    Parameters
    ----------
    label_smoothing : float
        From 0 to 1: the share of each target's weight that is spread over all classes (Szegedy et al. 2016).
    z_loss : float
        Weight of the squared logarithm of the softmax's denominator (Chowdhery et al. 2022).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing <= 1:
            raise InputError(f"label_smoothing is {self.label_smoothing:g}, it must be from 0 to 1")
        if not self.z_loss >= 0:
            raise InputError(f"z_loss is {self.z_loss:g}, it must be 0 or more")


@dataclass(frozen=True)
class TaskConfig:
    """[task]: a task of one's own, by the name of a function in a file, and the arguments that it gets.

    Parameters
    ----------
    build : str, optional
        "my.py:build": build(config, **arguments) -> Task.
    run : str, optional
        "my.py:train": train(config, run, **arguments) does everything itself; `run` is a `LoopRun`.
    arguments : dict
        The function's keyword arguments; its defaults fill in what is left out.
    """

    build: str | None = None
    run: str | None = None
    arguments: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.build is not None and self.run is not None:
            raise InputError("task.build and task.run are both set, a run has one of them: build or run")

    @property
    def key(self):
        """Which of the two is set: "build", "run", or None."""
        return "build" if self.build is not None else "run" if self.run is not None else None

    @property
    def reference(self):
        """The "file.py:name" that is set, or None."""
        return self.build if self.build is not None else self.run


def function(key, reference):
    """The function that [task] `key` = `reference` names.

    Raises
    ------
    InputError
        When there is none, or it is no function.
    """
    found = userfile.load(reference, f"task.{key}")
    if not callable(found):
        raise InputError(f"task.{key} is {reference!r}, which is a {type(found).__name__}, not a function")
    return found


def arguments(key, reference):
    """The keyword arguments of a task's function, from its signature.

    Returns
    -------
    dict
        Name -> default, `inspect.Parameter.empty` where there is none. ``**kwargs`` is not in it, see
        `takes_any`.
    """
    parameters = _parameters(key, reference)
    given = {"build": ("config",), "run": ("config", "run")}[key]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(given) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise InputError(f"task.{key}: {reference} must take {' and '.join(given)} before its own arguments")
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [p for p in parameters if p.kind not in starred and p not in positional[: len(given)]]
    return {p.name: p.default for p in own}


def takes_any(key, reference):
    """Whether a task's function takes keyword arguments of any name (``**kwargs``)."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(key, reference))


def _parameters(key, reference):
    found = function(key, reference)
    try:
        return list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):  # of classes that are not written in Python, such as dict
        raise InputError(
            f"task.{key}: the arguments of {reference} cannot be found out, it must be a function (def)"
        ) from None


class Task:
    """What a Trainer trains and evaluates.

    Parameters
    ----------
    model : nn.Module
    train : dataset or cllm.data.Tokens
        ``len(d)`` and ``d[indices] -> cllm.Batch``; tokens are cut into windows of model.config.block_size.
    evals : dict of str to dataset or Tokens
        What is evaluated, by the name that the records give it as their split. The checkpoint "best" is that
        with the lowest loss on "val" or, without one, on the first.
    loss : callable, optional
        (model, batch) -> (sum Tensor, count): the losses' sum, and how many losses that were; it decides
        itself what batch.mask means. None is language modelling, or any classification: the cross-entropy of
        ``model(inputs)`` and integer targets, without those that the mask leaves out or that are -100.
    metrics : dict of str to callable or object
        By the name in the records. Either (outputs, batch) -> (sum, count), where outputs is
        ``model(batch.inputs)``, or an object with reset(), update(outputs, targets, mask) and
        compute() -> float or dict of floats.
    callbacks : iterable of callables
        As a Trainer's, and called before those.
    tokenizer : object, optional
        With encode and decode, for `cllm sample`.

    Raises
    ------
    InputError
        Names what is wrong and what is allowed.
    """

    def __init__(self, model, train, evals=None, loss=None, metrics=None, callbacks=(), tokenizer=None):
        of_modules = "parameters named_parameters modules state_dict load_state_dict train eval"
        for name in of_modules.split():
            if not callable(getattr(model, name, None)):
                raise InputError(f"a task's model is a {type(model).__name__}, it must be a cllm.nn.Module")
        if loss is not None and not callable(loss):
            raise InputError(f"a task's loss is {loss!r}, it must be a function: model, batch -> sum, count")
        block_size = getattr(getattr(model, "config", None), "block_size", None)
        self.model = model
        self.train = feed(train, "a task's train", block_size)
        self.evals = {}
        for name, dataset in _named("evals", evals).items():
            if not isinstance(name, str) or not name or name == "train" or "." in name:
                raise InputError(f'an eval\'s name is {name!r}, it must be a word without a dot, not "train"')
            self.evals[name] = feed(dataset, f"the eval {name!r}", block_size)
        self.loss = loss
        self.metrics = _named("metrics", metrics)
        for name, metric in self.metrics.items():
            check_metric(name, metric)
        self.callbacks = checked_callbacks(callbacks)
        self.tokenizer = tokenizer

    @property
    def followed(self):
        """The eval whose loss says which checkpoint is the best; "val" when there is none."""
        return "val" if "val" in self.evals else next(iter(self.evals), "val")


def _named(what, values):
    if values is None or isinstance(values, dict):
        return dict(values or {})
    raise InputError(f"a task's {what} is a {type(values).__name__}, it must be a dict: {{name: ...}}")


def checked_callbacks(callbacks):
    """Callbacks as a tuple; an InputError when one cannot be called."""
    if callable(callbacks) or not isinstance(callbacks, Iterable):
        given = type(callbacks).__name__
        raise InputError(f"callbacks is a {given}, it must be a list of functions: callbacks=[f]")
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if isinstance(callback, type):
            raise InputError(f"callbacks has the class {callback.__name__}, give an object of it")
        if not callable(callback):
            raise InputError(f"callbacks has {callback!r}, each must be a function f(trainer, record)")
    return callbacks


def check_metric(name, metric):
    """Raise for a metric that cannot be recorded under its name."""
    if not isinstance(name, str) or not name:
        raise InputError(f"a metric's name is {name!r}, it must be a word")
    same = name == "perplexity" and isinstance(metric, Perplexity)  # as [train] metrics may have it
    if (name in RESERVED and not same) or is_timing(name):
        raise InputError(f'a metric is named "{name}", which a record holds already; give it another name')
    if isinstance(metric, type):
        raise InputError(f"the metric {name!r} is the class {metric.__name__}, give an object of it")
    if not is_streaming(metric) and not callable(metric):
        raise InputError(
            f"the metric {name!r} is a {type(metric).__name__}, it must be a function (outputs, batch) -> "
            "(sum, count) or have reset, update and compute"
        )


def is_streaming(metric):
    """Whether a metric is an object with reset, update and compute, rather than a function."""
    return all(callable(getattr(metric, name, None)) for name in ("reset", "update", "compute"))


def build(config):
    """The Task that [task] build makes; the same one for the same config and file.

    That holds for a file that is run afresh, as each run does it (`userfile.forget`); otherwise what the
    function left in its file's variables is still there.

    Raises
    ------
    InputError
        When the function returns something else.
    """
    make = function("build", config.task.build)
    rng.manual_seed(config.train.seed)  # the initial values of the modules that it makes follow from it
    task = make(config, **config.task.arguments)
    if not isinstance(task, Task):
        raise InputError(
            f"task.build: {config.task.build} returned a {type(task).__name__}, it must return a cllm.Task"
        )
    return task


def for_config(config, text=None):
    """The Task of a configuration: what [task] build makes, or a GPT on a text, as `load_text` gives it."""
    if config.task.build is not None:
        return build(config)
    return Task(
        model=GPT(replace(config.model, vocab_size=text.vocab_size), seed=config.train.seed),
        train=text.train,
        evals={"val": text.val} if len(text.val) else {},
        tokenizer=text.tokenizer,
    )


def load_text(config):
    """The text that a configuration names, tokenised and cached, as `cllm.data.load` gives it.

    Raises
    ------
    InputError
        When the text cannot be used, or a split is too short for the model's block size.
    """
    text = data.load(**vars(config.data))
    # Says which split is too short, before anything is written.
    feed(text.train, "the train split", config.model.block_size)
    if config.data.val_fraction > 0 or len(text.val):
        feed(text.val, "the val split", config.model.block_size)
    return text


def language_targets(batch):
    """A batch's targets, with -100 where its mask leaves one out."""
    targets = batch.targets
    if batch.mask is None:
        return targets
    if targets.dtype.kind == "u":  # in which -100 would be some class
        targets = targets.astype(np.int64)
    return np.where(batch.mask, targets, IGNORED)


def target_count(batch):
    """How many targets of a batch `language_loss` counts."""
    return int(np.count_nonzero(language_targets(batch) != IGNORED))


def language_loss(model, batch, reduction="sum", **options):
    """The cross-entropy of a model's outputs and a batch's integer targets, and how many it counts.

    Parameters
    ----------
    model : nn.Module
        Its own ``loss(inputs, targets, ...)`` is used when it has one, as `GPT` does: that needs no array of
        all logits.
    batch : Batch
    reduction : {"sum", "none"}
    **options
        label_smoothing, z_loss.

    Returns
    -------
    losses : Tensor
        () or of the targets' shape.
    count : int
    """
    targets = language_targets(batch)
    if hasattr(model, "loss"):
        losses = model.loss(batch.inputs, targets, ignore_index=IGNORED, reduction=reduction, **options)
    else:
        logits = model(batch.inputs)
        shape = targets.shape
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction, **options
        )
        losses = losses.reshape(shape) if reduction == "none" else losses
    return losses, int(np.count_nonzero(targets != IGNORED))


def checked_loss(result):
    """What a task's loss returned, as (sum Tensor, count); an InputError when it is something else."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor):
        total, count = result
        try:
            if total.data.size == 1:
                return total, a_count(count)
        except ValueError:
            pass
        shown = " ".join((repr(count) if isinstance(count, str) else str(count)).split())
        shown = f"the count {shown}" if len(shown) <= 40 else f"a {type(count).__name__} as the count"
        given = f"a Tensor {total.shape} and {shown}"
    else:
        given = f"a {type(result).__name__}"
    raise InputError(f"the task's loss returned {given}, it must return a Tensor of one sum and a count")


def counted(batch):
    """Which of a batch's targets count, for a metric: its mask without ignored ones; None for all."""
    if batch.targets.dtype.kind not in "iu":
        return batch.mask
    ignored = batch.targets == IGNORED
    if not ignored.any():
        return batch.mask
    return ~ignored if batch.mask is None else batch.mask & ~ignored
