"""What every run has, whoever trains: a directory, records, an end that its summary tells of.

`train.Trainer` and `loop.OwnLoop` are the two kinds of run.
"""

import platform
import resource
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import cllm
from cllm import config as configs
from cllm import kernels, parallel, progress, records, rng, userfile
from cllm.errors import InputError
from cllm.files import write_atomic

__all__ = ["Diverged", "Lifecycle", "user_files"]

FILES = "files"  # folder in a run's directory for copies of the user's files


class Diverged(Exception):
    """The loss or the gradient is not finite any more; the message is one sentence for the summary."""


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
    """

    unit = "tokens"

    def __init__(self, config, progress, name):
        self.config = config
        self.progress = progress
        self.name = name
        self.units = parallel.here()
        self.stop = False
        self.step = 0
        self.seconds = 0.0
        self.train_loss = self.best = None
        self.losses = {}  # the last loss of each evaluation, by its name

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
        self._write_config()

    def _write_config(self):
        write_atomic(self.run_dir / "config.toml", configs.to_toml(configs.to_dict(self.config)))

    def _run(self):
        """Train from the current step to the last; write the summary."""
        leading = self.units.rank == 0
        # Also when a run without a checkpoint is resumed: files may have changed.
        if leading and self.step == 0:
            userfile.keep(self.files, self.run_dir / FILES)
            self._first_files()
        self.recorder = records.Recorder(self.run_dir) if leading else records.Nowhere()
        self.shown = (self.progress or progress.choose()) if leading else progress.Silent()
        self.shown.start(self)
        threads_before = kernels.get_num_threads()
        self.began = perf_counter() - self.seconds
        state, error = "interrupted", None
        try:
            kernels.set_num_threads(self.threads)
            with _deferred_interrupt() as interrupt, self.units.together():
                self._train(interrupt)
            state = "finished"
        except Diverged as diverged:
            state, error = "failed", str(diverged)
        except Exception as other:
            state, error = "failed", f"{type(other).__name__}: {other}"
            raise
        finally:
            self.recorder.close()
            summary = self._summary(state, error)
            if leading and state != "interrupted":
                records.write_summary(self.run_dir, summary)
            kernels.set_num_threads(threads_before)
            self.shown.end(summary)
        return summary

    def _first_files(self):
        """Write what belongs to a run's directory before its first step."""

    def _note(self, record, followed):
        """Keep what the summary tells of a record's loss; whether it is the best on the split `followed`."""
        loss = record.get("loss")
        if record["split"] == "train":
            self.train_loss = loss
        elif loss is not None:
            self.losses[record["split"]] = loss
            key = f"{followed}_loss"
            if record["split"] == followed and (self.best is None or loss < self.best[key]):
                self.best = {"step": record["step"], key: loss}
                return True
        return False

    def _summary(self, state, error):
        self.seconds = perf_counter() - self.began
        summary = {
            "state": state,
            "step": self.step,
            **self._results(),
            "seconds": self.seconds,
            "memory_peak_mb": _memory_peak_mb(),
            "isa": kernels.isa,
            "threads": self.threads,
            "units": self.units.size,
            "versions": {
                "cllm": cllm.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
        }
        if self.files:
            summary["files"] = self.files
        if error is not None:
            summary["error"] = error
        return summary


def user_files(config):
    """The user's files that a configuration names, with their SHA-256."""
    named = (config.task.build, config.task.run, config.optim.name, config.model.attention)
    return userfile.digests(name for name in named if userfile.is_reference(name))


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
