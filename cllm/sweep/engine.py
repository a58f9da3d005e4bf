"""Processes on this machine that train a sweep's trials, one after another, as long as the sweep lives."""

import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from time import monotonic

from cllm import config as configs
from cllm import records, train, userfile
from cllm.errors import InputError, nearest, plain_notes
from cllm.files import write_atomic
from cllm.lifecycle import TERMINATED
from cllm.progress import Silent
from cllm.sweep.results import Result, read, trained, write_table

__all__ = ["run_trials"]

REPORT_INTERVAL = 0.2  # seconds between two reports of a worker about its trial
TABLE_INTERVAL = 1.0  # seconds between two rewritings of results.csv
STOP_SECONDS = 15.0  # what a worker has to finish its step and write a checkpoint after Ctrl-C


def run_trials(sweep, directory, todo, n_workers, results, shown):
    """Keep `n_workers` processes busy until each trial of `todo` has its result in `results`."""
    queue = deque(todo)
    workers = []
    written = -math.inf
    try:
        while len(workers) < n_workers:
            workers.append(_Worker(sweep, directory, queue.popleft()))
        while busy := {worker.pipe: worker for worker in workers if worker.trial}:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    message = _died(worker, directory)
                    workers.remove(worker)
                if not isinstance(message, Result):
                    shown.step(worker.trial, **message)
                    continue
                if message.state == "failed" and not any(r.state == "finished" for r in results.values()):
                    _check_recorded(sweep, message.trial, directory)
                results[message.trial.name] = message
                worker.trial = None
                shown.ended(message)
                if queue and worker in workers:
                    worker.give(queue.popleft())
                elif queue:
                    workers.append(_Worker(sweep, directory, queue.popleft()))
            if monotonic() - written > TABLE_INTERVAL:
                write_table(sweep, directory, results)
                written = monotonic()
    except BaseException:
        _stop(workers)
        write_table(sweep, directory, results)
        raise
    for worker in workers:
        worker.pipe.close()  # an idle worker ends when its pipe does
    for worker in workers:
        worker.process.join()


def _check_recorded(sweep, trial, directory):
    """Raise when a finished run has no record of the objective: no other trial will have one."""
    run = records.Run(directory / "trials" / trial.name)
    names = run.names()
    if run.state == "finished" and sweep.config.objective not in names:
        given = f'"{sweep.config.objective}"{nearest(sweep.config.objective, names)}'
        raise InputError(f"sweep.objective is {given}, but {trial.name} has recorded {', '.join(names)}")


class _Worker:
    """A process that trains one trial after another; `trial` is the present one, or None."""

    def __init__(self, sweep, directory, trial):
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, sweep, directory), daemon=True)
        resource_tracker.ensure_running()  # or the first start would do that, and unblock the signal
        with _blas_threads(sweep.config.threads):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process unblocks it in `_work`
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        other_end.close()  # so that the pipe ends when the process does
        self.give(trial)

    def give(self, trial):
        self.trial = trial
        with suppress(OSError):  # it has died; reading from the pipe will say so
            self.pipe.send(trial)


@contextmanager
def _blas_threads(n):
    """Let processes started here have BLAS pools of n threads: NumPy's would be of all cores in each."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(n) for name in names if before[name] is None})
    try:
        yield
    finally:
        for name in names:
            if before[name] is None:
                del os.environ[name]


def _work(pipe, sweep, directory):
    """A worker's life: take a trial, train it, send its result, until the pipe ends."""
    # A process group of its own: Ctrl-C on a terminal reaches the sweep alone, which then asks each worker.
    os.setpgrp()
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with plain_notes():
            while True:
                pipe.send(_train(sweep, pipe.recv(), directory, _Report(pipe)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _end_with_the_sweep():
    """Leave at once when the sweep's process was killed: its successor must find the trials left alone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _train(sweep, trial, directory, report):
    """Train a trial, or go on with it; an exception is its result."""
    run_dir = directory / "trials" / trial.name
    (run_dir / "error.txt").unlink(missing_ok=True)
    began = monotonic()
    try:
        if (run_dir / "config.toml").exists():
            if not trained(run_dir):  # as it is set now: a mended file may take other arguments
                config = configs.to_dict(sweep.trial_config(trial, directory))
                write_atomic(run_dir / "config.toml", configs.to_toml(config))
            summary = train.resume(run_dir, progress=report)
        else:
            summary = train.Trainer(sweep.trial_config(trial, directory), progress=report).fit()
        if summary["state"] == "interrupted":
            error = f"stopped, as {summary['stopped_by']} are over; the same command goes on with it"
            return Result(trial, "failed", report.done, None, error, monotonic() - began)
        return read(sweep, trial, directory)
    except Exception as error:
        run_dir.mkdir(parents=True, exist_ok=True)
        where = userfile.own_traceback(error) or traceback.format_exc()
        (run_dir / "error.txt").write_text(where, encoding="utf-8")
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return Result(trial, "failed", report.done, None, f"{kind}{error}", monotonic() - began)


class _Report(Silent):
    """Tells the sweep where a trial is."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.done = 0
        self.due = 0.0

    def step(self, record):
        self.done = record["step"]
        if monotonic() >= self.due:
            self.due = monotonic() + REPORT_INTERVAL
            self.pipe.send({"step": record["step"], "loss": record.get("loss")})


def _died(worker, directory):
    """The result of a trial whose process ended without giving one."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    error = f"worker died: {how}{hint}"
    if code in (TERMINATED, -signal.SIGTERM):
        error = "stopped by SIGTERM; the same command goes on with it"
    run_dir = directory / "trials" / worker.trial.name
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.txt").write_text(error + "\n", encoding="utf-8")
    return Result(worker.trial, "failed", error=error)


def _stop(workers):
    """Ask workers to write a checkpoint and leave; end those that take too long."""
    try:
        for worker in workers:
            if worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGINT)
        deadline = monotonic() + STOP_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - monotonic()))
    finally:  # also after a second Ctrl-C
        for worker in workers:
            worker.process.kill()
            worker.process.join()
