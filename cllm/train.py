"""The Trainer: the one place where data, model, optimizer, schedule, records and checkpoints meet.

A step is a pure function of the configuration and the state that a checkpoint holds: batches, dropout
and generated lines follow from (seed, step), and what kernels return does not depend on the threads. So
a run that was stopped and resumed has the same weights and records as one that was not.

What is trained is a `task.Task`; without one of the user's own it is a GPT on the configuration's text.
"""

import json
import math
import re
from collections import deque
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import numpy as np

from cllm import checkpoint as checkpoints
from cllm import config as configs
from cllm import data, kernels, metrics, optim, parallel, records, rng, schedules, userfile
from cllm import task as tasks
from cllm.data.batch import feed
from cllm.data.tokenizers import load_tokenizer
from cllm.errors import InputError
from cllm.files import write_atomic
from cllm.generate import generate
from cllm.gpt import GPT
from cllm.lifecycle import FILES, Diverged, Lifecycle
from cllm.loop import OwnLoop
from cllm.profile import Profile
from cllm.progress import thousands
from cllm.records import METRICS
from cllm.tensor import no_grad

__all__ = ["METRICS", "Trainer", "evaluate", "load", "load_text", "resume"]

# Sequences of an evaluation's batch hold about this many tokens: enough for the kernels to run at full
# speed, and no more memory than a training step.
EVALUATION_TOKENS = 1024
SAMPLE_TOKENS = 120  # of them about this many characters are shown, runs of spaces as one:
SAMPLE_LENGTH = 70  # with "step 2000: " one line of a common terminal
SAMPLE_TEMPERATURE = 0.8
# What a resumed run may change: all else would make it another run.
RESUMABLE = ("max_steps", "eval_interval", "sample_interval", "checkpoint_interval", "threads", "profile")
# The Trainer's methods that a profile times.
PARTS = {"_batch": "data", "_loss": "forward", "_backward": "backward"}
PARTS |= {"_clip": "optimizer", "_apply": "optimizer"}
NO_CALLBACKS = "callbacks are given, but task.run is a loop of its own, which calls none"


class _ThreadChoice:
    """All threads or one, whichever makes the steps faster at present.

    On a busy machine threads wait for each other: two have been 40 times slower than one. Results do not
    depend on the count, so now and then one step is tried with the other choice, ever more rarely while that
    does not pay.
    """

    FIRST, RARELY = 5, 640  # steps before the first try, and at most between two
    GAIN = 0.8  # the other choice is taken when its step took less than this share of the recent ones

    def __init__(self, n_threads):
        self.counts = [n_threads, 1]
        self.wait = self.left = self.FIRST
        self.recent = deque(maxlen=5)

    def time(self, function):
        """function() with the present choice, or with the other one when its turn has come."""
        trying = self.left == 0 and self.counts[0] != self.counts[1]
        kernels.set_num_threads(self.counts[trying])
        began = perf_counter()
        result = function()
        seconds = perf_counter() - began
        if not trying:
            self.recent.append(seconds)
            self.left = max(0, self.left - 1)
        elif seconds < self.GAIN * sum(self.recent) / len(self.recent):
            self.counts.reverse()
            self.recent.clear()
            self.wait = self.left = 4 * self.FIRST
        else:
            self.wait = self.left = min(2 * self.wait, self.RARELY)
        kernels.set_num_threads(self.counts[0])
        return result


class _Laps:
    """Where a step's seconds go: each `end` names what was done since the one before."""

    def __init__(self):
        self.began = self.last = perf_counter()
        self.seconds = {}

    def end(self, name):
        now = perf_counter()
        key = f"time_{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.last = now

    @property
    def total(self):
        return self.last - self.began


class Trainer(Lifecycle):
    """One run: from a configuration to a directory with records, checkpoints and a summary.

    Parameters
    ----------
    config : cllm.Config, dict or path-like
        As ``cllm.config.load(path, overrides)`` gives it; a dict of its keys, nested or dotted, or the path
        of a TOML file will do. Its [task] names a task of the user's own; without one it is a GPT on [data].
    task : cllm.Task, optional
        A task made in Python, instead of [task] build. Its run can only be resumed from Python.
    callbacks : iterable of callables
        Each is called as ``f(trainer, record)`` before a record is written, after the task's own callbacks;
        it may add keys to the record, and set ``trainer.stop = True`` to end the run with this step. What
        the state_dict() of those that have one returns (JSON values) is part of each checkpoint, and a
        resumed run gives it to load_state_dict().
    progress : object, optional
        Shows the run, see `cllm.progress`; by default what suits standard output.
    name : str
        With an empty ``run.dir`` the run goes to the first free ``runs/<name>-<n>``.

    Attributes
    ----------
    task, model, optimizer, step, run_dir
        The run's parts and the number of updates done; there once `fit` has begun.
    text
        The text of a run without a task of its own, else None.
    """

    def __init__(self, config, task=None, callbacks=(), *, progress=None, name="run"):
        config = configs.given(config)
        super().__init__(config, progress, name)
        if task is not None:
            if not isinstance(task, tasks.Task):
                raise InputError(f"task is a {type(task).__name__}, it must be a cllm.Task")
            if config.task.key is not None and config.task.build != tasks.GIVEN:
                raise InputError(f"task is given, and task.{config.task.key} names another: leave out one")
            self.config = replace(config, task=tasks.TaskConfig(build=tasks.GIVEN))
        self.task = task
        self.given_callbacks = tasks.checked_callbacks(callbacks)
        self.profile = None
        self.position = 0  # micro-batches consumed, which is all that the loader has to remember

    def fit(self):
        if self.config.task.run is not None:
            _refuse_units(self.units)
            if self.given_callbacks:
                raise InputError(NO_CALLBACKS)
            return OwnLoop(self.config, self.progress, self.name).fit()
        return super().fit()

    fit.__doc__ = Lifecycle.fit.__doc__

    # Before the first step

    def _build(self):
        """Data, model and optimizer; nothing on disk but the data's cache."""
        super()._build()
        config, train = self.config, self.config.train
        self.text = None
        if self.task is None and config.task.build is None:
            self.text = load_text(config)
        if self.task is None:
            self.task = _task(config, self.text)
        task = self.task
        if task.loss is not None and config.loss != tasks.LossConfig():
            raise InputError("[loss] is set, but the task has a loss of its own, which does not use it")
        if train.sample_interval and task.tokenizer is None:
            interval = train.sample_interval
            raise InputError(f"train.sample_interval is {interval}, but the task has no tokenizer")
        if train.sample_interval and not hasattr(getattr(task.model, "config", None), "block_size"):
            interval = train.sample_interval
            raise InputError(
                f"train.sample_interval is {interval}, but the task's model has no config.block_size"
            )
        self.model = task.model
        self.optimizer = optim.build(config.optim, self.model.named_parameters())
        self.gradients = optim.GradientBuffer(self.model.named_parameters())
        self.leaves = self.units.leaves(train.grad_accum)
        self.batch_size = len(task.train) if train.batch_size == "full" else train.batch_size
        self.unit = f"{task.train.unit}s"
        self.callbacks = task.callbacks + self.given_callbacks
        self.metrics = _metrics(config, task)
        # Only what is set, so that a model's own loss needs to know no more than that.
        options = {f.name: getattr(config.loss, f.name) for f in fields(config.loss)}
        self.loss_options = {name: value for name, value in options.items() if value}

    def _first_files(self):
        if self.task.tokenizer is not None and hasattr(self.task.tokenizer, "to_dict"):
            tokenizer = json.dumps(self.task.tokenizer.to_dict(), ensure_ascii=False)
            write_atomic(self.run_dir / "tokenizer.json", tokenizer + "\n")

    def _restore(self, loaded):
        """Take over the state of a checkpoint, as `checkpoint.load` gives it."""
        model_arrays, optimizer_arrays, state = loaded
        if self.text is not None and state["data_hash"] != self.text.hash:
            raise InputError(
                f"{self.config.data.source} has changed since {self.run_dir} was trained on it; "
                "to train on the new text, start a new run"
            )
        n = len(self.task.train)
        if state.get("examples", n) != n:
            raise InputError(
                f"the task has {n} training examples, and {self.run_dir} was trained on {state['examples']}; "
                "to train on the new ones, start a new run"
            )
        self._restore_callbacks(state.get("callbacks", []))
        self.model.load_state_dict(model_arrays)
        self.optimizer.load_arrays(optimizer_arrays)
        self.step, self.position, self.seconds = state["step"], state["position"]["index"], state["seconds"]
        self.train_loss, self.best = state["train_loss"], state["best"]
        self.losses = {self.task.followed: state[f"{self.task.followed}_loss"]}

    def _restore_callbacks(self, states):
        stateful = self._stateful_callbacks()
        if len(states) != len(stateful):
            raise InputError(
                f"{self.run_dir} was saved with {len(states)} callbacks with a state_dict(), and goes on "
                f"with {len(stateful)}: give the same ones to cllm.train.resume(run_dir, callbacks=[...])"
            )
        for callback, state in zip(stateful, states):
            callback.load_state_dict(state)

    def _stateful_callbacks(self):
        return [callback for callback in self.callbacks if hasattr(callback, "state_dict")]

    # The run

    def _train(self, interrupt):
        train = self.config.train
        self.model.train()
        self.thread_choice = None if train.threads else _ThreadChoice(self.threads)
        self.profile = Profile(self, PARTS) if train.profile else None
        self.recorder.truncate(self.step)
        while self.step < train.max_steps and not self.stop:
            self._step(interrupt)

    def _step(self, interrupt):
        """One update and whatever is due after it: evaluations, generated line, checkpoint."""
        train, followed = self.config.train, self.task.followed
        update = self._update if self.profile is None else partial(self.profile.step, self._update)
        record = self.thread_choice.time(update) if self.thread_choice else update()
        self._note(record, followed)
        self._log(record)
        self.shown.step(record)
        new_best = False
        if self._due(train.eval_interval):
            for split in self.task.evals:
                record = self._evaluate(split)
                new_best |= self._note(record, followed)
                self._log(record)
                self.shown.evaluation(record)
        if train.sample_interval and self.step % train.sample_interval == 0:
            self.shown.sample(self.step, self._sample())
        interrupted = self.units.any(interrupt.is_set())
        if new_best or self._due(train.checkpoint_interval) or interrupted:
            self._save()
        if interrupted:
            raise KeyboardInterrupt

    def _due(self, interval):
        if self.stop or self.step == self.config.train.max_steps:
            return True
        return interval > 0 and self.step % interval == 0

    def _update(self):
        """Forward and backward over the step's micro-batches, clip, update; the step's record."""
        config, laps = self.config, _Laps()
        lr = schedules.at(config.schedule, self.step, config.optim.lr, config.train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [self._batch(micro) for micro in self.leaves]
        laps.end("data")
        accumulate = self._one if config.train.grad_accum == 1 else self._several
        total, count, examples = accumulate(batches, laps)
        loss = total / count if count else 0.0
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"the loss is {loss:g} and the gradient's norm {norm:g} in step {self.step + 1} at learning "
                f"rate {lr:g}; a lower optim.lr, a longer schedule.warmup_steps or optim.grad_clip may help"
            )
        self._apply()
        laps.end("optimizer")
        self.step += 1
        self.position += config.train.grad_accum
        return {
            "step": self.step,
            "split": "train",
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            f"{self.unit}_per_s": (count if self.unit == "tokens" else examples) / laps.total,
            **laps.seconds,
        }

    def _one(self, batches, laps):
        """The gradient of a step's only micro-batch; its losses' sum, their count, its examples."""
        total, count = self._loss(batches[0], 0)
        laps.end("forward")
        self._backward(total, 1.0 / (count or 1))
        laps.end("backward")
        return total.item(), count, len(batches[0])

    def _several(self, batches, laps):
        """As `_one`, of the sum over the leaves of all units."""
        units, known, parts = self.units, None, []
        if self.task.loss is None:  # a loss of one's own tells its count only afterwards
            known = sum(units.gather(sum(map(tasks.target_count, batches))))
        for micro, batch in zip(self.leaves, batches):
            total, count = self._loss(batch, micro)
            parts.append((total.item(), count, len(batch)))
            laps.end("forward")
            self._backward(total, 1.0 / (known or 1))
            self.gradients.accumulate()
            laps.end("backward")
        self.gradients.sum(units)
        total, count, examples = map(sum, zip(*chain.from_iterable(units.gather(parts))))
        if known is None and count:
            self.gradients.average(count)
        laps.end("sum")
        return total, count, examples

    def _batch(self, micro):
        return self.task.train.batch(
            self.position + micro, self.config.train.batch_size, self.config.train.seed
        )

    def _loss(self, batch, micro):
        """The sum of a batch's losses and how many counted."""
        rng.set_stream(self.config.train.seed, self.step, micro)
        if self.task.loss is None:
            return tasks.language_loss(self.model, batch, **self.loss_options)
        return tasks.checked_loss(self.task.loss(self.model, batch))

    def _backward(self, loss, factor):
        (loss * factor).backward()

    def _clip(self):
        """Limit the norm of the gradients; what it was."""
        return self.gradients.clip_norm(self.config.optim.grad_clip or math.inf)

    def _apply(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _evaluate(self, split):
        began = perf_counter()
        batches = self.task.evals[split].batches(_evaluation_batch(self.task.evals[split], self.batch_size))
        result, count = _measure(self.model, batches, self.task.loss, self.metrics)
        if not count:
            raise InputError(f"the eval {split!r} has no target that counts: all are masked")
        if not all(math.isfinite(result[key]) for key in ("loss", "perplexity") if key in result):
            name = "validation" if split == "val" else split
            raise Diverged(f"the {name} loss is {result['loss']:g} after step {self.step}")
        return {"step": self.step, "split": split, **result, "seconds": perf_counter() - began}

    def _log(self, record):
        if self.units.rank == 0:
            for callback in self.callbacks:
                callback(self, record)
        self.stop = self.units.of_first(self.stop)
        record.update({key: records.number(value) for key, value in record.items()})
        self.recorder.write(record)

    def _save(self):
        if self.units.rank > 0:
            return
        self.seconds = perf_counter() - self.began
        followed = self.task.followed
        state = {"position": self.task.train.position(self.position, self.config.train.batch_size)}
        if self.text is not None:
            state |= {"vocab_size": self.text.vocab_size, "data_hash": self.text.hash}
        else:
            state["examples"] = len(self.task.train)
        state |= {
            "train_loss": self.train_loss,
            f"{followed}_loss": self.losses.get(followed),
            "best": self.best,
            "seconds": self.seconds,
        }
        if self.files:
            state["files"] = self.files
        if callbacks := self._stateful_callbacks():
            state["callbacks"] = [_json_state(callback) for callback in callbacks]
        self.recorder.sync()  # no crash may leave a checkpoint newer than the records
        checkpoints.save(self.run_dir, self.step, self.model.state_dict(), self.optimizer.arrays(), state)
        checkpoints.prune(self.run_dir)

    def _sample(self):
        """A generated line, the same for the same seed and step."""
        tokenizer = self.task.tokenizer
        try:
            prompt = tokenizer.encode("\n")
        except InputError:  # a vocabulary without line ends
            prompt = ()
        prompt = prompt if len(prompt) else self.task.train.first
        tokens = generate(
            self.model, prompt, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE,
            seed=self.config.train.seed + self.step,
        )  # fmt: skip
        line = tokenizer.decode(np.ravel(tokens)[len(prompt) :])
        line = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in line)
        return re.sub(" +", " ", line).strip()[:SAMPLE_LENGTH]

    def _results(self):
        followed = self.task.followed
        results = {
            "train_loss": self.train_loss,
            f"{followed}_loss": self.losses.get(followed),
            "best": self.best,
        }
        if self.text is not None:
            results["data_hash"] = self.text.hash
        results["parameters"] = self.n_parameters
        results[self.unit] = self.position * self.batch_size * self.task.train.size
        if self.profile is not None:
            results["profile"] = self.profile.results()
        return results

    # What is shown

    @property
    def n_parameters(self):
        return sum(parameter.data.size for parameter in self.gradients.parameters.values())

    @property
    def description(self):
        """What is trained on what, in words."""
        if self.text is not None:
            size = f"{thousands(len(self.text.train))} tokens, vocabulary {self.text.vocab_size}"
            of = f"{self.config.data.source} ({size})"
        else:
            task = self.config.task.build
            of = f"{'a task' if task == tasks.GIVEN else task} ({len(self.task.train)} examples)"
        per_step = self.config.train.grad_accum * self.batch_size * self.task.train.size
        return (
            f"{thousands(self.n_parameters)} parameters on {of}, "
            f"{self.config.train.max_steps} steps of {per_step} {self.unit}"
        )

    @property
    def next_command(self):
        return f"cllm {'plot' if self.task.tokenizer is None else 'sample'} {self.run_dir}"


def _task(config, text=None):
    """The Task of a configuration: what [task] build makes, or a GPT on a text."""
    if config.task.build is not None:
        return tasks.build(config)
    return tasks.Task(
        model=GPT(replace(config.model, vocab_size=text.vocab_size), seed=config.train.seed),
        train=text.train,
        evals={"val": text.val} if len(text.val) else {},
        tokenizer=text.tokenizer,
    )


def _metrics(config, task):
    """The metrics of [train] metrics and of the task, by name."""
    found = {name: metrics.build(name, task.tokenizer) for name in config.train.metrics}
    for name in task.metrics:
        if name in found:
            raise InputError(f'train.metrics has "{name}", and so has the task: leave out one')
    return found | task.metrics


def _json_state(callback):
    state = callback.state_dict()
    try:
        json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        name = getattr(callback, "__name__", type(callback).__name__)
        raise InputError(f"the state_dict() of the callback {name} must be of JSON values: {error}") from None
    return state


def load_text(config):
    """The text that a configuration names, tokenised and cached, as `cllm.data.load` gives it.

    Raises
    ------
    InputError
        When the text cannot be used, or a split is too short for the model's block size.
    """
    text = data.load(
        config.data.source,
        tokenizer=config.data.tokenizer,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
    )
    # Says which split is too short, before anything is written.
    text.train.n_windows(config.model.block_size)
    if config.data.val_fraction > 0 or len(text.val):
        text.val.n_windows(config.model.block_size)
    return text


def resume(run_dir, overrides=None, *, callbacks=(), progress=None, task=None):
    """Continue a run from its newest complete checkpoint, or from step 0 when it has none.

    Parameters
    ----------
    run_dir : path-like
    overrides : dict, optional
        Dotted keys to values; of [train] the intervals, threads and ``max_steps`` may change.
    callbacks, progress, task
        As the `Trainer`'s: the same callbacks and, if the run had one, the same task.

    Returns
    -------
    dict
        The run's summary. A finished run's is returned as it stands, and no file is touched.

    Raises
    ------
    InputError
        When there is no run, its data or the user's files have changed, or an override would make it
        another run.
    """
    with parallel.here().agreeing():
        run = _resumed(Path(run_dir), overrides or {}, callbacks, progress, task)
    if isinstance(run, dict):
        return run
    if run.units.rank == 0:  # only now that all units have read what is there
        (run.run_dir / "summary.json").unlink(missing_ok=True)  # it told of an end that is not one any more
        run._write_config()
    return run._run()


def _resumed(run_dir, overrides, callbacks, progress, task):
    """A run at its newest checkpoint, ready to go on; the summary of one that has finished."""
    for key in overrides:
        if key not in {f"train.{name}" for name in RESUMABLE}:
            raise InputError(
                f"{key} cannot change when a run is resumed, only "
                + ", ".join(f"train.{name}" for name in RESUMABLE)
            )
    _check_run(run_dir)
    earlier = records.Run(run_dir)
    finished = earlier.state == "finished"
    newest = None if finished else checkpoints.newest(run_dir)
    loaded = None if newest is None else checkpoints.load(newest)
    # First of all: with another file, even the config's [task] may not fit any more.
    files = earlier.summary.get("files", {}) if finished else loaded[2].get("files", {}) if loaded else {}
    userfile.refuse_changed(files, run_dir / FILES, run_dir)
    saved = configs.load(run_dir / "config.toml")
    config = configs.load(run_dir / "config.toml", overrides)
    if finished and config.train.max_steps == saved.train.max_steps:
        return earlier.summary
    if config.task.run is not None:
        if task is not None:
            raise InputError("task is given, but task.run is a loop of its own, which has none")
        if tasks.checked_callbacks(callbacks):
            raise InputError(NO_CALLBACKS)
        _refuse_units(parallel.here())
        run = OwnLoop(config, progress)
    else:
        if config.task.build == tasks.GIVEN and task is None:
            raise InputError(
                f"{run_dir} was trained on a task made in Python; to go on: "
                f"cllm.train.resume({str(run_dir)!r}, task=...)"
            )
        run = Trainer(config, task, callbacks, progress=progress)
    run.run_dir = run_dir
    run._build()
    if finished and (newest := checkpoints.newest(run_dir)) is not None:
        loaded = checkpoints.load(newest)
    if loaded is not None:
        run._restore(loaded)
    if config.train.max_steps < run.step:
        raise InputError(
            f"train.max_steps is {config.train.max_steps}, but {run_dir} has done {run.step} steps already"
        )
    return run


def _refuse_units(units):
    if units.size > 1:
        raise InputError(f"task.run is a loop of its own, which is one process; mpirun started {units.size}")


def load(run_dir, checkpoint="last", task=None):
    """The model, in eval mode, and the tokenizer of a run.

    Files of the user's that have changed since, or are not there from this working directory, are taken from
    the copies in the run's directory.

    Parameters
    ----------
    run_dir : path-like
    checkpoint : "last" or "best"
        The newest checkpoint, or the one with the lowest validation loss.
    task : cllm.Task, optional
        For a run whose task was given in Python: the same one again. Its model is filled and returned.

    Returns
    -------
    model : nn.Module
    tokenizer : object or None
        None for a task without one.

    Raises
    ------
    InputError
        When there is no run or no complete checkpoint, or no model that belongs to it.
    """
    if checkpoint not in ("last", "best"):
        raise InputError(f'checkpoint is {checkpoint!r}, it must be "last" or "best"')
    run_dir = Path(run_dir)
    _check_run(run_dir)
    path = checkpoints.newest(run_dir) if checkpoint == "last" else checkpoints.best(run_dir)
    if path is None:
        raise InputError(f"{run_dir} has no complete checkpoint yet; continue it with: cllm resume {run_dir}")
    arrays, _, state = checkpoints.load(path)
    written = configs.flatten(configs.read_toml(run_dir / "config.toml"))
    kept = userfile.kept_references(written, state.get("files", {}), run_dir / FILES)
    config = configs.load(run_dir / "config.toml", kept)
    if config.task.run is not None:
        raise InputError(
            f"{run_dir} was trained by {config.task.run}, which alone knows its model; "
            f"cllm.checkpoint.load({str(path)!r}) gives what it saved"
        )
    if task is None and config.task.build == tasks.GIVEN:
        raise InputError(f"{run_dir} was trained on a task made in Python: give it again, as task=...")
    if task is None and config.task.build is None:
        model = GPT(replace(config.model, vocab_size=state["vocab_size"]), seed=config.train.seed)
        tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    else:
        task = task or _task(config)
        model, tokenizer = task.model, task.tokenizer
    model.load_state_dict(arrays)
    model.eval()
    return model, tokenizer


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
    result, count = _measure(model, batches.batches(batch_size or _evaluation_batch(batches)), loss, metrics)
    if not count:
        raise InputError("nothing to evaluate counts: all targets are masked")
    return {**result, "tokens": count}


def _evaluation_batch(source, training=1):
    """How many examples of a feed are evaluated at once, where training takes `training`."""
    return max(1, EVALUATION_TOKENS // source.size) if source.unit == "token" else max(training, 256)


def _measure(model, batches, loss=None, measured=None):
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


def _check_run(run_dir):
    if not (run_dir / "config.toml").exists():
        raise InputError(f"{run_dir} holds no run: it has no config.toml")
