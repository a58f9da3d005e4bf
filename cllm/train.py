"""The Trainer: the one place where data, model, optimizer, schedule, records and checkpoints meet.

A step is a pure function of the configuration and the state that a checkpoint holds: batches, dropout
and generated lines follow from (seed, step), and what kernels return does not depend on the threads. So
a run that was stopped and resumed has the same weights and records as one that was not.
"""

import json
import math
import platform
import re
import resource
import signal
import sys
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import cllm
from cllm import checkpoint as checkpoints
from cllm import config as configs
from cllm import data, kernels, optim, progress, records, rng, schedules
from cllm.data.tokenizers import load_tokenizer
from cllm.errors import InputError
from cllm.files import write_atomic
from cllm.generate import generate
from cllm.gpt import GPT
from cllm.tensor import no_grad

__all__ = ["Trainer", "evaluate", "load", "load_text", "resume"]

# Sequences of an evaluation's batch hold about this many tokens: enough for the kernels to run at full
# speed, and no more memory than a training step.
EVALUATION_TOKENS = 1024
SAMPLE_TOKENS = 120  # of them about this many characters are shown, runs of spaces as one:
SAMPLE_LENGTH = 70  # with "step 2000: " one line of a common terminal
SAMPLE_TEMPERATURE = 0.8
#: What the records of each split have, next to "step" and "split"; a callback may add to it.
METRICS = {"train": ("loss", "lr", "grad_norm", "tokens_per_s"), "val": ("loss", "perplexity", "seconds")}
# What a resumed run may change: all else would make it another run.
RESUMABLE = ("max_steps", "eval_interval", "sample_interval", "checkpoint_interval", "threads")


class _Diverged(Exception):
    """The loss or the gradient is not finite any more; the message is one sentence for the summary."""


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


class Trainer:
    """One run: from a configuration to a directory with records, checkpoints and a summary.

    Parameters
    ----------
    config : cllm.config.Config
    task : None
        For now None: language modelling on the configuration's text.
    callbacks : iterable of callables
        Each is called as ``f(trainer, record)`` before a record is written; it may add keys to the
        record, and set ``trainer.stop = True`` to end the run with this step.
    progress : object, optional
        Shows the run, see `cllm.progress`; by default what suits standard output.
    name : str
        With an empty ``run.dir`` the run goes to the first free ``runs/<name>-<n>``.

    Attributes
    ----------
    model, optimizer, text, step, run_dir
        The run's parts and the number of updates done; there once `fit` has begun.
    """

    def __init__(self, config, task=None, callbacks=(), *, progress=None, name="run"):
        if task is not None:
            raise InputError("a task of one's own is not supported so far: leave out task")
        self.config = config
        self.callbacks = tuple(callbacks)
        self.progress = progress
        self.name = name
        self.stop = False
        self.step = 0
        self.position = 0  # micro-batches consumed, which is all that the loader has to remember
        self.seconds = 0.0
        self.train_loss = self.val_loss = self.best = None

    def fit(self):
        """Train from the first step in a new run directory.

        Returns
        -------
        dict
            What summary.json holds. ``state`` is "finished", or "failed" with an ``error`` when the loss
            is no longer finite.

        Raises
        ------
        InputError
            For data or a model that cannot be, or a directory that holds a run already. Nothing has been
            written then.
        """
        if self.config.run.dir:
            _refuse_used(Path(self.config.run.dir))
        self._build()
        self._create_directory()
        return self._run()

    # Before the first step

    def _build(self):
        """Data, model and optimizer; nothing on disk but the data's cache."""
        config, train = self.config, self.config.train
        self.text = load_text(config)
        n_windows = self.text.train.n_windows(config.model.block_size)
        self.model = GPT(replace(config.model, vocab_size=self.text.vocab_size), seed=train.seed)
        self.optimizer = optim.build(config.optim, self.model.named_parameters())
        self.parameters = list(self.model.parameters())
        self.batch_size = n_windows if train.batch_size == "full" else train.batch_size
        self.threads = train.threads or kernels.get_num_threads()  # the most that it uses

    def _create_directory(self):
        if self.config.run.dir:
            self.run_dir = Path(self.config.run.dir)
            self.run_dir.mkdir(parents=True, exist_ok=True)
        else:
            self.run_dir = _next_directory(self.name)
            self.config = replace(self.config, run=configs.RunConfig(str(self.run_dir)))
        self._write_config()

    def _write_config(self):
        write_atomic(self.run_dir / "config.toml", configs.to_toml(configs.to_dict(self.config)))

    def _restore(self, path):
        """Take over the state of a checkpoint."""
        model_arrays, optimizer_arrays, state = checkpoints.load(path)
        if state["data_hash"] != self.text.hash:
            raise InputError(
                f"{self.config.data.source} has changed since {self.run_dir} was trained on it; "
                "to train on the new text, start a new run"
            )
        self.model.load_state_dict(model_arrays)
        self.optimizer.load_arrays(optimizer_arrays)
        self.step, self.position, self.seconds = state["step"], state["position"]["index"], state["seconds"]
        self.train_loss, self.val_loss, self.best = state["train_loss"], state["val_loss"], state["best"]

    # The run

    def _run(self):
        """Train from the current step to the last; write the summary."""
        train = self.config.train
        if self.step == 0:  # also when a run that has no checkpoint yet is resumed: its text may have changed
            tokenizer = json.dumps(self.text.tokenizer.to_dict(), ensure_ascii=False)
            write_atomic(self.run_dir / "tokenizer.json", tokenizer + "\n")
        self.recorder = records.Recorder(self.run_dir)
        shown = self.progress or progress.choose()
        shown.start(self)
        threads_before = kernels.get_num_threads()
        self.began = perf_counter() - self.seconds
        state, error = "interrupted", None
        try:
            kernels.set_num_threads(self.threads)
            self.thread_choice = None if train.threads else _ThreadChoice(self.threads)
            self.recorder.truncate(self.step)
            with _deferred_interrupt() as interrupt:
                while self.step < train.max_steps and not self.stop:
                    self._step(shown, interrupt)
            state = "finished"
        except _Diverged as diverged:
            state, error = "failed", str(diverged)
        except Exception as other:
            state, error = "failed", f"{type(other).__name__}: {other}"
            raise
        finally:
            self.recorder.close()
            summary = self._summary(state, error)
            if state != "interrupted":
                records.write_summary(self.run_dir, summary)
            kernels.set_num_threads(threads_before)
            shown.end(summary)
        return summary

    def _step(self, shown, interrupt):
        """One update and whatever is due after it: evaluation, generated line, checkpoint."""
        train = self.config.train
        record = self.thread_choice.time(self._update) if self.thread_choice else self._update()
        self._log(record)
        shown.step(record)
        new_best = False
        if self._due(train.eval_interval) and len(self.text.val):
            record = self._evaluate()
            new_best = self.best is None or record["loss"] < self.best["val_loss"]
            if new_best:
                self.best = {"step": self.step, "val_loss": record["loss"]}
            self._log(record)
            shown.evaluation(record)
        if train.sample_interval and self.step % train.sample_interval == 0:
            shown.sample(self.step, self._sample())
        interrupted = interrupt.is_set()
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
        config, train = self.config, self.config.train
        began = perf_counter()
        lr = schedules.at(config.schedule, self.step, config.optim.lr, train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [self._batch(self.position + micro) for micro in range(train.grad_accum)]
        count = sum(targets.size for _, targets in batches)
        total = 0.0
        for micro, (tokens, targets) in enumerate(batches):
            rng.set_stream(train.seed, self.step, micro)
            loss = self.model.loss(tokens, targets, reduction="sum")
            total += loss.item()
            (loss * (1.0 / count)).backward()
        loss = total / count
        norm = optim.clip_grad_norm_(self.parameters, config.optim.grad_clip or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _Diverged(
                f"the loss is {loss:g} and the gradient's norm {norm:g} in step {self.step + 1} at learning "
                f"rate {lr:g}; a lower optim.lr, a longer schedule.warmup_steps or optim.grad_clip may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.position += train.grad_accum
        self.train_loss = loss
        return {
            "step": self.step,
            "split": "train",
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": count / (perf_counter() - began),
        }

    def _batch(self, index):
        train, model = self.config.train, self.config.model
        return self.text.train.batch(index, self.batch_size, model.block_size, train.seed)

    def _evaluate(self):
        began = perf_counter()
        result = evaluate(self.model, self.text.val)
        if not math.isfinite(result["perplexity"]):
            raise _Diverged(f"the validation loss is {result['loss']:g} after step {self.step}")
        self.val_loss = result["loss"]
        return {
            "step": self.step,
            "split": "val",
            "loss": result["loss"],
            "perplexity": result["perplexity"],
            "seconds": perf_counter() - began,
        }

    def _log(self, record):
        for callback in self.callbacks:
            callback(self, record)
        self.recorder.write(record)

    def _save(self):
        self.seconds = perf_counter() - self.began
        state = {
            "position": self.text.train.position(
                self.position, self.batch_size, self.config.model.block_size
            ),
            "vocab_size": self.text.vocab_size,
            "data_hash": self.text.hash,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "best": self.best,
            "seconds": self.seconds,
        }
        self.recorder.sync()  # no crash may leave a checkpoint newer than the records
        checkpoints.save(self.run_dir, self.step, self.model.state_dict(), self.optimizer.arrays(), state)
        checkpoints.prune(self.run_dir)

    def _sample(self):
        """A generated line, the same for the same seed and step."""
        tokenizer = self.text.tokenizer
        try:
            prompt = tokenizer.encode("\n")
        except InputError:  # a vocabulary without line ends
            prompt = ()
        prompt = prompt if len(prompt) else self.text.train.array[:1]
        tokens = generate(
            self.model, prompt, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE,
            seed=self.config.train.seed + self.step,
        )  # fmt: skip
        line = tokenizer.decode(np.ravel(tokens)[len(prompt) :])
        line = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in line)
        return re.sub(" +", " ", line).strip()[:SAMPLE_LENGTH]

    def _summary(self, state, error):
        self.seconds = perf_counter() - self.began
        summary = {
            "state": state,
            "step": self.step,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "best": self.best,
            "data_hash": self.text.hash,
            "parameters": self.n_parameters,
            "tokens": self.position * self.batch_size * self.config.model.block_size,
            "seconds": self.seconds,
            "memory_peak_mb": _memory_peak_mb(),
            "isa": kernels.isa,
            "threads": self.threads,
            "versions": {
                "cllm": cllm.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
        }
        if error is not None:
            summary["error"] = error
        return summary

    @property
    def n_parameters(self):
        return sum(parameter.data.size for parameter in self.parameters)

    @property
    def tokens_per_step(self):
        return self.config.train.grad_accum * self.batch_size * self.config.model.block_size


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


def resume(run_dir, overrides=None, *, callbacks=(), progress=None):
    """Continue a run from its newest complete checkpoint, or from step 0 when it has none.

    Parameters
    ----------
    run_dir : path-like
    overrides : dict, optional
        Dotted keys to values; of [train] the intervals, threads and ``max_steps`` may change.

    Returns
    -------
    dict
        The run's summary. A finished run's is returned as it stands, and no file is touched.

    Raises
    ------
    InputError
        When there is no run, its data has changed, or an override would make it another run.
    """
    run_dir = Path(run_dir)
    overrides = overrides or {}
    for key in overrides:
        if key not in {f"train.{name}" for name in RESUMABLE}:
            raise InputError(
                f"{key} cannot change when a run is resumed, only "
                + ", ".join(f"train.{name}" for name in RESUMABLE)
            )
    saved = _saved_config(run_dir)
    config = configs.load(run_dir / "config.toml", overrides)
    summary_path = run_dir / "summary.json"
    if summary_path.exists() and config.train.max_steps == saved.train.max_steps:
        earlier = records.Run(run_dir)
        if earlier.state == "finished":
            return earlier.summary
    trainer = Trainer(config, callbacks=callbacks, progress=progress)
    trainer.run_dir = run_dir
    trainer._build()
    newest = checkpoints.newest(run_dir)
    if newest is not None:
        trainer._restore(newest)
    if config.train.max_steps < trainer.step:
        raise InputError(
            f"train.max_steps is {config.train.max_steps}, "
            f"but {run_dir} has done {trainer.step} steps already"
        )
    summary_path.unlink(missing_ok=True)  # it told of an end that is not one any more
    if config != saved:
        trainer._write_config()
    return trainer._run()


def load(run_dir, checkpoint="last"):
    """The model, in eval mode, and the tokenizer of a run.

    Parameters
    ----------
    run_dir : path-like
    checkpoint : "last" or "best"
        The newest checkpoint, or the one with the lowest validation loss.

    Raises
    ------
    InputError
        When there is no run or no complete checkpoint.
    """
    if checkpoint not in ("last", "best"):
        raise InputError(f'checkpoint is {checkpoint!r}, it must be "last" or "best"')
    run_dir = Path(run_dir)
    config = _saved_config(run_dir)
    path = checkpoints.newest(run_dir) if checkpoint == "last" else checkpoints.best(run_dir)
    if path is None:
        raise InputError(f"{run_dir} has no complete checkpoint yet; continue it with: cllm resume {run_dir}")
    arrays, _, state = checkpoints.load(path)
    model = GPT(replace(config.model, vocab_size=state["vocab_size"]), seed=config.train.seed)
    model.load_state_dict(arrays)
    model.eval()
    return model, load_tokenizer(run_dir / "tokenizer.json")


def evaluate(model, tokens, batch_size=None):
    """The loss on a whole split, in fixed windows of the model's block size.

    Parameters
    ----------
    model : GPT
        It is evaluated in eval mode and left as it was.
    tokens : cllm.data.Tokens
    batch_size : int, optional
        Windows in a batch.

    Returns
    -------
    dict
        loss (nats a token), perplexity, tokens (predicted ones).

    Raises
    ------
    InputError
        When the split is shorter than one window.
    """
    block_size = model.config.block_size
    batch_size = batch_size or max(1, EVALUATION_TOKENS // block_size)
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with no_grad():
            for inputs, targets in tokens.windows(block_size, batch_size):
                losses = model.loss(inputs, targets, reduction="none").data
                total += float(losses.sum(dtype=np.float64))
                count += targets.size
    finally:
        model.train(training)
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": count}


def _refuse_used(run_dir):
    if (run_dir / "sweep.toml").exists():
        raise InputError(f"{run_dir} holds a sweep; choose another run.dir")
    if any((run_dir / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        raise InputError(
            f"{run_dir} already holds a run; continue it with `cllm resume {run_dir}` "
            "or choose another run.dir"
        )
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise InputError(f"{run_dir} holds other files; a run needs a new or empty folder: --run.dir DIR")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run.dir is {run_dir}, which is a file; it must be a new or empty folder")


def _next_directory(name):
    """Make the first free runs/<name>-<n>; two runs that start at once get two."""
    n = 1
    while True:
        path = Path("runs") / f"{name}-{n}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            n += 1


def _saved_config(run_dir):
    if not (run_dir / "config.toml").exists():
        raise InputError(f"{run_dir} holds no run: it has no config.toml")
    return configs.load(run_dir / "config.toml")


@contextmanager
def _deferred_interrupt():
    """An event that the first Ctrl-C sets, so that no step is torn; the second one interrupts at once."""
    event = threading.Event()

    def handle(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    main = threading.current_thread() is threading.main_thread()
    # Whoever has set a handler of their own, or ignores the signal, keeps that.
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield event
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _memory_peak_mb():
    """The most memory that this process has held, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, Linux kilobytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
