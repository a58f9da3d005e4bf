"""What every run has, whoever trains: a directory, records, checkpoints, an end that its summary tells of.

`train.Trainer` and `loop.OwnLoop` are the two kinds of run.
"""

import math
import os
import platform
import resource
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import cllm
from cllm import checkpoint as checkpoints
from cllm import config as configs
from cllm import kernels, parallel, progress, records, rng, userfile
from cllm.errors import InputError
from cllm.files import LOCK, Lock, clear_temporary, is_temporary, why, write_atomic

__all__ = [
    "RESUMABLE", "TERMINATED", "Diverged", "Lifecycle", "Stop", "may_change", "memory_peak_mb", "stopping",
    "user_files",
]  # fmt: skip

FILES = "files"  # folder in a run's directory for copies of the user's files
TERMINATED = 128 + signal.SIGTERM  # exit status of a process that SIGTERM has ended, as shells have it
# What a resumed run may change: all else would make it another run.
RESUMABLE = tuple(f"train.{name}" for name in (
    "max_steps", "eval_interval", "sample_interval", "checkpoint_interval", "keep_checkpoints",
    "max_minutes", "threads", "prefetch", "profile",
))  # fmt: skip
RESUMABLE_SECTIONS = ("guard", "monitor")  # they look at steps to come


def may_change(key):
    """Whether a resumed run may have another value of a key."""
    return key in RESUMABLE or key.partition(".")[0] in RESUMABLE_SECTIONS


class Diverged(Exception):
    """The loss or the gradient is not finite any more; the message is one sentence for the summary."""


class Unsaved(Exception):
    """The last checkpoint could not be written; the message is one sentence for the summary."""


class Lifecycle:
    """One run, from its directory's making to its summary.

    A subclass defines `_build()`, `_restore(loaded)`, `_train(interrupt)`, `_results()` and what `progress`
    reads: `description`, `unit`, `next_command`.

    Parameters
    ----------
    config : cllm.config.Config
    progress : object or None
        See `cllm.progress`; None is what suits standard output.
    name : str
        With an empty ``run.dir`` the run goes to the first free ``runs/<name>-<n>``.
    pause_at : int or None
        The step after which it ends as if interrupted, if that is not its last.
    """

    unit = "tokens"

    def __init__(self, config, progress, name, pause_at=None):
        self.config = config
        self.progress = progress
        self.name = name
        self.pause_at = pause_at
        self.units = parallel.here()
        self.stop = False
        self.step = 0
        self.seconds = 0.0
        self.train_loss = self.best = None
        self.losses = {}  # the last loss of each evaluation, by its name
        self.lock = None
        self.environments = []  # what the run was computed with, from which step on
        self.checkpoint_seconds = 0.0  # of this process
        self.unsaved = None  # why the newest checkpoint could not be written
        minutes = config.train.max_minutes
        self.deadline = perf_counter() + 60 * minutes if minutes else math.inf

    def fit(self):
        """Train from the first step in a new run directory.

        Returns
        -------
        dict
            What summary.json holds. ``state`` is "finished", or "failed" with an ``error`` when the loss
            is no longer finite or the last checkpoint cannot be written. It is "interrupted", and there is
            no summary.json, when train.max_minutes are over or step `pause_at` is done; a checkpoint is
            written then.

        Raises
        ------
        InputError
            For data or a model that cannot be, or a directory that holds a run already or is in use by
            one. Nothing has been written then.
        KeyboardInterrupt, SystemExit
            After SIGINT (Ctrl-C) and SIGTERM, when the step is done and a checkpoint is written.
        """
        with self.units.agreeing():
            if self.config.run.dir and self.units.rank == 0:
                _refuse_used(Path(self.config.run.dir))
            self._build()
            if self.units.rank == 0:
                self._create_directory()
        if self.units.size > 1:
            self.run_dir = Path(self.units.of_first(str(getattr(self, "run_dir", ""))))
        return self._run()

    def _build(self):
        userfile.forget()  # what another run of this process left in a file's variables is not this one's
        rng.manual_seed(self.config.train.seed)  # for modules that a file makes while it is run
        self.files = user_files(self.config)
        # The most that it uses; the processing units of a machine share its cores.
        self.threads = self.config.train.threads or max(1, kernels.get_num_threads() // self.units.local)

    def _create_directory(self):
        if self.config.run.dir:
            self.run_dir = Path(self.config.run.dir)
            self.run_dir.mkdir(parents=True, exist_ok=True)
        else:
            self.run_dir = _next_directory(self.name)
            self.config = replace(self.config, run=configs.RunConfig(str(self.run_dir)))
        self.lock = Lock(self.run_dir)
        try:
            _refuse_used(self.run_dir, held=True)  # by one that was quicker
            clear_temporary(self.run_dir)
            self._write_config()
        except BaseException:
            self.lock.release()
            raise

    def _write_config(self):
        write_atomic(self.run_dir / "config.toml", configs.to_toml(configs.to_dict(self.config)))

    def _run(self):
        """Train from the current step to the last; write the summary; let go of the directory."""
        try:
            summary, ended_by = self._trained()
        finally:
            if self.lock is not None:
                self.lock.release()
        if ended_by == "SIGINT":
            raise KeyboardInterrupt
        if ended_by == "SIGTERM":
            raise SystemExit(TERMINATED)
        return summary

    def _trained(self):
        """The summary, and the signal or limit that ended the run or came while it ended."""
        leading = self.units.rank == 0
        with self.units.agreeing():
            # Also when a run without a checkpoint is resumed: files may have changed.
            if leading and self.step == 0:
                userfile.keep(self.files, self.run_dir / FILES)
                self._first_files()
            self._enter_environment()
            self.recorder = records.Recorder(self.run_dir) if leading else records.Nowhere()
            self.shown = (self.progress or progress.choose()) if leading else progress.Silent()
            self.shown.start(self)
        threads_before = kernels.get_num_threads()
        self.began = perf_counter() - self.seconds
        state, error, reason = "interrupted", None, None
        try:
            kernels.set_num_threads(self.threads)
            with stopping(self.deadline) as stop, self.units.together():
                try:
                    reason = self._train(stop)
                    state = "finished" if reason is None else "interrupted"
                except (Diverged, Unsaved) as failure:  # no unit waits for this one
                    state, error = "failed", str(failure)
            if leading and state == "finished":
                self._prune()  # an earlier process may have been killed before it could
        except Exception as other:
            state, error = "failed", f"{type(other).__name__}: {other}"
            raise
        finally:
            summary = self._summary(state, error, reason)
            try:
                self.recorder.close()
                if leading and state != "interrupted":
                    records.write_summary(self.run_dir, summary)
            except OSError as problem:
                if error is None:
                    said = f"the end of the run cannot be written ({why(problem)})"
                    summary |= {"state": "failed", "error": f"{said}; then: cllm resume {self.run_dir}"}
            kernels.set_num_threads(threads_before)
            self.shown.end(summary)
        return summary, reason or stop.signal

    # Checkpoints

    def _checkpoint(self, step, model_arrays, optimizer_arrays, state, final):
        """Write a checkpoint, `state` and what all runs have to keep; delete older ones.

        One that cannot be written is an `Unsaved` when it is the last; before that training goes on, with a
        warning, since the one before it is still there and the next one may be written.
        """
        began = perf_counter()
        self.seconds = began - self.began
        config = configs.to_dict(self.config)
        state = state | {
            "train_loss": self.train_loss,
            "best": self.best,
            "seconds": self.seconds,
            "threads": self.threads,
            "units": self.units.size,
            "environments": self.environments,
            "random": rng.get_state(),
            "config": {section: values for section, values in config.items() if section != "run"},
        }
        if self.files:
            state["files"] = self.files
        try:
            self.recorder.sync()  # no crash may leave a checkpoint newer than the records
            checkpoints.save(self.run_dir, step, model_arrays, optimizer_arrays, state)
            self.unsaved = None
        except OSError as error:
            there = checkpoints.listed(self.run_dir)
            before = f"the newest is {there[-1]}" if there else f"{self.run_dir} has none"
            said = f"the checkpoint of step {step} could not be written ({why(error)}); {before}"
            self.unsaved = f"{said}; when it can be: cllm resume {self.run_dir}"
            if final:
                raise Unsaved(self.unsaved) from None
            warnings.warn(f"{said}; training goes on, and will try the next one", stacklevel=3)
            return
        finally:
            self.checkpoint_seconds += perf_counter() - began
        self._prune()

    def _prune(self):
        try:
            checkpoints.prune(self.run_dir, self.config.train.keep_checkpoints)
        except OSError as error:
            warnings.warn(f"an old checkpoint could not be deleted ({why(error)})", stacklevel=4)

    def _enter_environment(self):
        """Note what this process computes with; say so when an earlier one's was another."""
        versions = {"cllm": cllm.__version__, "python": platform.python_version(), "numpy": np.__version__}
        here = {"isa": kernels.isa, **versions}
        if self.environments:
            before = self.environments[-1]
            changed = [key for key in here if before.get(key) != here[key]]
            if not changed:
                return
            changed = [f"{key} {before.get(key)} became {here[key]}" for key in changed]
            warnings.warn(
                f"from step {self.step} on, {self.run_dir} is computed with something else than before: "
                f"{', '.join(changed)}; its numbers may differ in their last digits from those of a run "
                "without a change",
                stacklevel=3,
            )
        self.environments = [*self.environments, {"step": self.step, **here}]

    def _restore_common(self, state):
        """Take over what `_checkpoint` has added to a state; say which keys have another value now."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.train_loss, self.best = state["train_loss"], state["best"]
        # A run that goes back to a checkpoint knows its own.
        self.environments = self.environments or state.get("environments", [])
        before, now = configs.flatten(state.get("config", {})), configs.flatten(configs.to_dict(self.config))
        for key in now if before else ():
            if not may_change(key) and not key.startswith("run.") and before.get(key) != now[key]:
                warnings.warn(
                    f"{key} is {now[key]!r} in {self.run_dir / 'config.toml'}, and was {before.get(key)!r} "
                    f"up to step {self.step}: from here on it is another run",
                    stacklevel=3,
                )

    def _first_files(self):
        """Write what belongs to a run's directory before its first step."""

    def _note(self, record, followed):
        """Keep what the summary tells of a record's loss; whether it is the best on the split `followed`."""
        loss = record.get("loss")
        if record["split"] == "train":
            self.train_loss = self.train_loss if "skipped" in record else loss
        elif loss is not None:
            self.losses[record["split"]] = loss
            key = f"{followed}_loss"
            if record["split"] == followed and (self.best is None or loss < self.best[key]):
                self.best = {"step": record["step"], key: loss}
                return True
        return False

    def _summary(self, state, error, reason=None):
        self.seconds = perf_counter() - self.began
        summary = {
            "state": state,
            "step": self.step,
            **self._results(),
            "seconds": self.seconds,
            "time_checkpoints": self.checkpoint_seconds,
            "memory_peak_mb": memory_peak_mb(),
            "isa": kernels.isa,
            "threads": self.threads,
            "units": self.units.size,
            "versions": {
                "cllm": cllm.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
        }
        if len(self.environments) > 1:
            summary["environments"] = self.environments
        if self.files:
            summary["files"] = self.files
        if reason is not None:
            summary["stopped_by"] = reason
        if error is not None:
            summary["error"] = error
        return summary


def user_files(config):
    """The user's files that a configuration names, with their SHA-256."""
    named = {
        "task.build": config.task.build, "task.run": config.task.run, "optim.name": config.optim.name,
        "model.attention": config.model.attention,
    }  # fmt: skip
    return userfile.digests({key: name for key, name in named.items() if userfile.is_reference(name)})


def _refuse_used(run_dir, held=False):
    if (run_dir / "sweep.toml").exists():
        raise InputError(f"{run_dir} holds a sweep; choose another run.dir")
    if any((run_dir / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        if (run_dir / LOCK).exists() and not held:
            Lock(run_dir).release()  # says who trains there, if somebody does
        raise InputError(
            f"{run_dir} already holds a run; continue it with `cllm resume {run_dir}` "
            "or choose another run.dir"
        )
    if run_dir.is_dir() and not all(_is_left(path.name) for path in run_dir.iterdir()):
        raise InputError(f"{run_dir} holds other files; a run needs a new or empty folder: --run.dir DIR")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run.dir is {run_dir}, which is a file; it must be a new or empty folder")


def _is_left(name):
    """Whether a file of this name may be all that a process left that was killed before its run began."""
    return name == LOCK or is_temporary(name)


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


class Stop:
    """Whether a run is to end after the present step.

    Parameters
    ----------
    deadline : float
        Of perf_counter.
    """

    def __init__(self, deadline=math.inf):
        self.deadline = deadline
        self.signal = None

    @property
    def reason(self):
        """ "SIGINT" or "SIGTERM" after such a signal, "train.max_minutes" when the time is up, else None."""
        if self.signal is None and perf_counter() >= self.deadline:
            return "train.max_minutes"
        return self.signal


@contextmanager
def stopping(deadline=math.inf):
    """A `Stop` that the first SIGINT or SIGTERM sets, so that no step is torn; the second ends at once."""
    stop = Stop(deadline)

    def handle(signum, frame):
        if stop.signal is not None:
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(TERMINATED)
        stop.signal = signal.Signals(signum).name

    # Whoever has set a handler of their own, or ignores a signal, keeps that.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    ours = [signum for signum, default in defaults.items() if main and signal.getsignal(signum) is default]
    for signum in ours:
        signal.signal(signum, handle)
    try:
        yield stop
    finally:
        for signum in ours:
            signal.signal(signum, defaults[signum])


def memory_mb():
    """The memory that this process holds now, in MB (10^6 bytes); where that cannot be told, the peak."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return memory_peak_mb()


def memory_peak_mb():
    """The most memory that this process has held, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, Linux kilobytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
