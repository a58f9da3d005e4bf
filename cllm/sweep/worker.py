"""What a worker does with a trial, wherever it runs: train it or go on with it, say what became of it."""

import json
import os
import random
import signal
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

import numpy as np

from cllm import config as configs
from cllm import kernels, saved, train, userfile
from cllm.errors import InputError
from cllm.files import Lock, write_atomic
from cllm.lifecycle import TERMINATED
from cllm.progress import Silent
from cllm.sweep.plan import SweepConfig, Trial
from cllm.sweep.results import TEST, Result, read, tested, trained

__all__ = ["ERROR", "Order", "died", "note_error", "perform", "teller", "wait_until_free"]

ERROR = "error.txt"  # in a trial that failed: the traceback, or how its worker died
LOCK_SECONDS = 60.0  # what a trial's former process has to let go of it: its worker was lost a moment ago


@dataclass(frozen=True)
class Order:
    """A trial to train, with all that a worker needs to know.

    Attributes
    ----------
    trial : Trial
    config : cllm.Config
        Of the trial; its run.dir is the trial's folder.
    judged : SweepConfig
        By what it is judged.
    until : int or None
        The step at which it pauses; None for its end.
    test : bool
        Whether it is measured on the test split when it has finished.
    """

    trial: Trial
    config: configs.Config
    judged: SweepConfig
    until: int | None = None
    test: bool = False

    @property
    def run_dir(self):
        return Path(self.config.run.dir)

    def found(self):
        """The trial's `Result` as its files tell it."""
        result = read(self.judged, self.trial, self.run_dir, self.until)
        if not self.test:  # a trial of the search may have been a confirmed one in an earlier call
            result = replace(result, test=None)
        if not self.test or result.state != "finished" or tested(self.judged, self.run_dir, result.step):
            return result
        return replace(result, state="paused", value=None)

    def done(self, result):
        """Whether a trial with that result has nothing left to do."""
        return result.state == "finished" or (result.state, result.step) == ("paused", self.until)


def perform(order, tell, interval):
    """Train a trial, or go on with it; an exception is its result.

    Parameters
    ----------
    order : Order
    tell : callable
        Told with dicts where the trial is: at first {"step", "isa"}, then {"step", "loss"}.
    interval : float
        Seconds between two of them, at least.

    Returns
    -------
    Result
    """
    run_dir, report, began = order.run_dir, _Report(tell, interval), monotonic()
    tell({"step": 0, "isa": kernels.isa})
    # A user's file may draw from the generators that all code shares; other trials have left them somewhere.
    random.seed(order.trial.seed)
    np.random.seed(order.trial.seed % 2**32)  # noqa: NPY002
    try:
        wait_until_free(run_dir)
        (run_dir / ERROR).unlink(missing_ok=True)
        if (run_dir / "config.toml").exists():
            if not trained(run_dir):  # as it is set now: a mended file may take other arguments
                write_atomic(run_dir / "config.toml", configs.to_toml(configs.to_dict(order.config)))
            threads = {"train.threads": order.config.train.threads}  # which a sweep may change
            summary = train.resume(run_dir, threads, progress=report, pause_at=order.until)
        else:
            summary = train.Trainer(order.config, progress=report, pause_at=order.until).fit()
        if summary.get("stopped_by") == "train.max_minutes":
            error = "stopped, as train.max_minutes are over; the same command goes on with it"
            return Result(order.trial, "failed", report.done, None, error, monotonic() - began, kernels.isa)
        if order.test and summary["state"] == "finished":
            _test(order, summary["step"])
        return order.found()
    except Exception as error:
        note_error(run_dir, userfile.own_traceback(error) or traceback.format_exc())
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        seconds = monotonic() - began
        said = f"{kind}{error}".encode(errors="backslashreplace").decode()
        return Result(order.trial, "failed", report.done, None, said, seconds, kernels.isa)


def teller(pipe):
    """`pipe.send`, which ends the process at once when nobody listens any more: another one will go on.

    As an exception in the midst of a step it would become the trial's result.
    """

    def tell(message):
        try:
            pipe.send(message)
        except OSError:
            os._exit(1)

    return tell


def died(order, code):
    """The result of a trial whose process ended with an exit code, without giving one.

    The trial has failed, unless its files tell that it was done.
    """
    with suppress(InputError):  # damaged
        if order.done(found := order.found()):
            return found
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    error = f"worker died: {how}{hint}"
    if code in (TERMINATED, -signal.SIGTERM):
        error = "stopped by SIGTERM; the same command goes on with it"
    note_error(order.run_dir, error + "\n")
    return Result(order.trial, "failed", error=error)


def note_error(run_dir, text):
    """Write down in a trial's folder why it failed, where that can be: the disk may be full."""
    with suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ERROR).write_text(text, encoding="utf-8", errors="backslashreplace")


def wait_until_free(run_dir):
    """Return when nobody else trains a trial; an InputError when somebody goes on doing so."""
    deadline = monotonic() + LOCK_SECONDS
    while run_dir.is_dir():
        try:
            Lock(run_dir).release()
            return
        except InputError:
            if monotonic() > deadline:
                raise
        sleep(0.05)


def _test(order, step):
    """Measure a finished trial on the test split, once."""
    if tested(order.judged, order.run_dir, step) is None:
        at = order.judged.at
        found = saved.evaluate(order.run_dir, split="test", checkpoint=at)["test"]
        text = json.dumps({"step": step, "checkpoint": at, **found}, indent=2)
        write_atomic(order.run_dir / TEST, text + "\n")


class _Report(Silent):
    """Tells the sweep where a trial is."""

    def __init__(self, tell, interval):
        self.tell, self.interval = tell, interval
        self.done = 0
        self.due = 0.0

    def start(self, trainer):
        self.done = trainer.step

    def step(self, record):
        self.done = record["step"]
        if monotonic() >= self.due:
            self.due = monotonic() + self.interval
            self.tell({"step": record["step"], "loss": record.get("loss")})
