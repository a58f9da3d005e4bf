"""Running a sweep: from its plan to a table and a verdict."""

import errno
import json
import os
import signal
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic

from cllm import config as configs
from cllm import kernels, records, task, verdict, watch
from cllm.errors import InputError, nearest
from cllm.files import Lock, clear_temporary, why, write_atomic
from cllm.lifecycle import TERMINATED, user_files
from cllm.sweep import folder
from cllm.sweep.engine import Processes
from cllm.sweep.results import Result, table, trained
from cllm.sweep.stages import stages
from cllm.sweep.worker import Order

__all__ = ["run"]

TABLE_INTERVAL = 1.0  # seconds between two rewritings of results.csv,
TABLE_SHARE = 0.005  # or longer, so that they take at most this share of the time
FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


def run(sweep, directory, workers=None, progress=None, scheduler=None, same_isa=False):
    """Run a sweep's trials, or what is left of them, and judge them.

    Finished trials of an earlier call are kept, those in flight go on from their checkpoints, failed ones
    are tried again. The sweep may have grown meanwhile: by values, seeds, [prune], [confirm], and by more
    train.max_steps, where trials whose learning rates would have been others so far are trained anew and
    their folders kept in earlier/. While it runs, `directory` always holds a whole results.csv.

    Parameters
    ----------
    sweep : Sweep
    directory : path-like
        New, empty, or that of the same sweep.
    workers : int, optional
        Trials at once; by default this process's cores divided by the threads of a trial. Not with
        `scheduler`, where each worker of the cluster trains as many as it has threads.
    progress : object, optional
        Shows the sweep, see `cllm.watch`; by default what suits standard output.
    scheduler : str, optional
        Address of a Dask scheduler, tcp://HOST:PORT, whose workers train the trials. They need CLLM, and
        this working directory and `directory` under the same paths.
    same_isa : bool
        Whether workers of another instruction set than the first are left idle, not used and marked.

    Returns
    -------
    dict
        What summary.json holds: `verdict.conclude`, and the seconds that this call took.

    Raises
    ------
    InputError
        When the directory holds something else, the data cannot be used, or the scheduler does not answer.
        What was there stays as it was.
    OSError
        When the sweep's own files cannot be written, as on a full disk; trials are kept.
    KeyboardInterrupt, SystemExit
        After Ctrl-C and SIGTERM, when the workers have written their checkpoints.
    """
    directory = Path(directory)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, it must be at least 1")
    if workers is not None and scheduler is not None:
        raise InputError(f"workers is {workers}, but with a scheduler its own workers count: leave out one")
    if same_isa and scheduler is None:
        raise InputError("same_isa is about a scheduler's workers, and there is no scheduler")
    folder.refuse_other_use(directory)

    def engine(isas):
        if scheduler is not None:
            from cllm.sweep.cluster import Cluster

            return Cluster(scheduler, directory, sweep.config.threads, same_isa, isas)
        limit = workers or max(1, kernels.get_num_threads() // sweep.config.threads)
        return Processes(limit, sweep.config.threads)

    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(directory, "sweep"), _terminable():
            sweep = folder.adopt(sweep, directory)
            return _Course(sweep, directory, engine, progress or watch.choose()).run()
    except BaseException:
        if new:
            with suppress(OSError):
                directory.rmdir()  # nothing was written
        raise


@contextmanager
def _terminable():
    """In this context SIGTERM is an exception, so that workers are told; theirs to keep who handle it."""

    def terminate(signum, frame):
        raise SystemExit(TERMINATED)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Course:
    """One call's way through a sweep's stages, in a directory that it holds.

    Parameters
    ----------
    sweep : Sweep
    directory : Path
    engine : callable
        Given the instruction sets of the trials so far, gives an engine, such as `engine.Processes`.
    shown : object
        See `cllm.watch`.
    """

    def __init__(self, sweep, directory, engine, shown):
        self.sweep, self.directory, self.shown = sweep, directory, shown
        self.make_engine, self.engine, self.stack = engine, None, ExitStack()
        self.results = {trial.name: Result(trial) for trial in sweep.trials()}
        self.running = {}  # trial name -> Order
        self.again = []  # names of trials that failed in an earlier call
        self.hashes = {}  # DataConfig -> hash, of the texts that are ready
        self.prepared = []  # what trials need of them
        self.due = 0.0  # when results.csv is written next
        self.unwritten = False  # whether it could not be, the last time

    def run(self):
        began = monotonic()
        try:
            with self.stack:
                for jobs in stages(self.sweep, self.results, self._value_at):
                    orders = [self._order(job) for job in jobs]
                    if left := [order for order in orders if not self._is_done(order)]:
                        self._train(orders, left)
        except BaseException:
            if self.engine is not None:
                self._stopped()
            raise
        summary = verdict.conclude(self.sweep, self.results) | {"seconds": monotonic() - began}
        if self.engine is None:
            self.shown.start(self.sweep, self.directory, self.results, 0)
        self._conclude(summary)
        lines = [*verdict.table(self.sweep, self.results), "", verdict.wrap(summary["verdict"]), ""]
        self.shown.end("\n".join([*lines, f"all trials: {self.directory / 'results.csv'}"]))
        return summary

    def _order(self, job):
        config = self.sweep.trial_config(job.trial, self.directory)
        measured = ("loss", "perplexity", *config.train.metrics)
        test = (
            job.trial.seed in self.sweep.confirm_seeds
            and config.data.test_fraction > 0
            and config.task.key is None
            and self.sweep.config.objective.partition(".")[2] in measured
        )
        return Order(job.trial, config, self.sweep.config, job.until, test)

    def _is_done(self, order):
        """Whether a trial has come so far in an earlier call; takes over what its files tell."""
        name, found = order.trial.name, folder.found(order)
        if found.state == "failed":
            found = Result(order.trial)
            self.again.append(name)
        if order.done(found) or name not in self.results or self.results[name].state == "pending":
            self.results[name] = found
        return order.done(found)

    def _value_at(self, trial, step):
        """The objective at a rung, once a list of jobs has come there."""
        result = self.results[trial.name]
        return result.value if (result.state, result.step) == ("paused", step) else None

    def _train(self, orders, left):
        """Let the engine train what is left of a list of jobs."""
        first = self.engine is None
        if self._prepare(left) or first:
            self._check_unchanged()
        if first:
            isas = [result.isa for result in self.results.values() if result.isa]
            engine = self.stack.enter_context(self.make_engine(isas))
            clear_temporary(self.directory)
        folder.write_settings(self.sweep, self.directory)
        if first:
            folder.write_new(self.directory / "sweep.toml", configs.to_toml(self.sweep.resolved()))
            (self.directory / "summary.json").unlink(missing_ok=True)  # its end is not one any more
            self.engine = engine
            n_workers = engine.n_workers
            self.shown.start(self.sweep, self.directory, self.results, max(1, min(n_workers, len(left))))
            if n_workers == 0:
                self.shown.note("the scheduler has no workers yet; trials begin when one joins it")
        fitted = [folder.fit_steps(order, self.directory) for order in left]
        steps = left[0].config.train.max_steps
        if n := fitted.count("extended"):
            self.shown.note(f"{n} trials of fewer steps go on to {steps}: so far they would be the same")
        if n := fitted.count("anew"):
            self.shown.note(
                f"{n} trials of fewer steps are trained anew, as with {steps} their learning rates or "
                f"evaluations would have been others; what they were is in {self.directory / folder.EARLIER}"
            )
        if self.again:
            more = f" and {len(self.again) - 5} more" if len(self.again) > 5 else ""
            self.shown.note(f"tried again, as they failed: {', '.join(self.again[:5])}{more}")
            self.again.clear()
        self.shown.stage(orders, left)
        self.engine.run(left, self._told)

    def _told(self, order, message):
        """Note what a worker says of its trial."""
        name = order.trial.name
        if isinstance(message, Result):
            others = {result.isa for result in self.results.values() if result.value is not None}
            self.results[name] = message
            self.running.pop(name, None)
            if message.state == "failed":
                self._check_recorded(order)
                if any(words in message.error for words in FULL):
                    raise InputError(f"{name} failed: {message.error}; the same command goes on with it")
            elif others and message.isa not in others:
                self.shown.note(
                    f"{name} was computed with {message.isa}, others with {', '.join(sorted(others))}: they "
                    "may differ in their last digits"
                )
            self.shown.ended(message)
        else:
            self.running[name] = order
            isa = message.get("isa", self.results[name].isa)
            self.results[name] = Result(order.trial, "running", message["step"], isa=isa)
            self.shown.step(order.trial, message["step"], message.get("loss"))
        if monotonic() >= self.due:
            self._write_table()

    def _write_table(self):
        """Write results.csv, so often that it takes little time; a full disk may have room the next time."""
        began = monotonic()
        try:
            write_atomic(self.directory / "results.csv", table(self.sweep, self.results))
            self.unwritten = False
        except OSError as error:
            if not self.unwritten:
                self.shown.note(f"results.csv is not up to date ({why(error)}); training goes on")
            self.unwritten = True
        now = monotonic()
        self.due = now + max(TABLE_INTERVAL, (now - began) / TABLE_SHARE)

    def _stopped(self):
        """Say how far the sweep is when it ends before its time; the workers have left."""
        for name, order in self.running.items():
            self.results[name] = Result(order.trial)
            with suppress(InputError):
                self.results[name] = order.found()
        self._write_table()
        n_finished = sum(result.state == "finished" for result in self.results.values())
        self.shown.end(f"stopped with {n_finished} of {len(self.results)} trials finished")

    def _conclude(self, summary):
        """Write what has changed of the copy, the table and the summary."""
        try:
            folder.write_settings(self.sweep, self.directory)
            folder.write_new(self.directory / "sweep.toml", configs.to_toml(self.sweep.resolved()))
            folder.write_new(self.directory / "results.csv", table(self.sweep, self.results))
            if self.engine is not None or _untimed(self.directory / "summary.json") != _plain(summary):
                records.write_summary(self.directory, summary)
        except OSError as error:
            self.shown.end("all trials have ended, but not all could be written")
            raise InputError(f"{why(error)}; the trials are kept, and the same command writes it") from None

    def _prepare(self, orders):
        """Tokenise and cache each text once, before workers want it; check that blocks fit it.

        A user's file that cannot be read is an error here too, not that of each trial which names it.

        Returns
        -------
        bool
            Whether one was new.
        """
        before = len(self.prepared)
        for order in orders:
            user_files(order.config)
            needs = (order.config.data, order.config.model.block_size)
            # A task's data is its own business.
            if order.config.task.key is None and needs not in self.prepared:
                self.hashes[order.config.data] = task.load_text(order.config).hash
                self.prepared.append(needs)
        return len(self.prepared) > before

    def _check_unchanged(self):
        """Raise when a text, or a user's file, has changed since trials were trained with it.

        They would not compare with the others. Those that failed without a checkpoint begin anew and do not
        count.
        """
        files = {}
        for result in self.results.values():
            config = self.sweep.trial_config(result.trial, self.directory)
            done = trained(Path(config.run.dir))
            changed = []
            if done and self.hashes.get(config.data, done.get("data_hash")) != done.get("data_hash"):
                changed.append((config.data.source, "on it; to compare trials on the new text"))
            for path, sha256 in (done.get("files") or {}).items():
                if path not in files:
                    files |= user_files(config)
                if files.get(path, sha256) != sha256:
                    changed.append((path, "with it; to compare trials with the new one"))
            for what, words in changed:
                raise InputError(
                    f"{what} has changed since {result.trial.name} was trained {words}, "
                    "choose another folder: --run.dir DIR"
                )

    def _check_recorded(self, order):
        """Raise when a finished run has no record of the objective: no other trial will have one."""
        if any(result.value is not None for result in self.results.values()):
            return
        found = records.Run(order.run_dir)
        objective, names = self.sweep.config.objective, found.names()
        if found.state == "finished" and objective not in names:
            given = f'"{objective}"{nearest(objective, names)}'
            recorded = f"{order.trial.name} has recorded {', '.join(names)}"
            raise InputError(f"sweep.objective is {given}, but {recorded}")


def _untimed(path):
    """A summary that was written, without its seconds; None without one."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return _plain(found)


def _plain(summary):
    """A summary as JSON has it, without its seconds."""
    found = json.loads(json.dumps(records.plain(summary)))
    return {key: value for key, value in found.items() if key != "seconds"}
