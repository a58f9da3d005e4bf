"""Processes on this machine that train a sweep's trials, one after another, as long as the sweep lives."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from time import monotonic

from cllm.errors import plain_notes
from cllm.sweep.results import Result
from cllm.sweep.worker import died, perform, teller

__all__ = ["Processes", "blas_threads"]

REPORT_INTERVAL = 0.2  # seconds between two reports of a worker about its trial
STOP_SECONDS = 15.0  # what a worker has to finish its step and write a checkpoint after Ctrl-C
FALSE_STARTS = 3  # workers in a row that may end before they have taken a trial: then the trial has failed


class Processes:
    """An engine of worker processes; a context manager that ends them.

    When it is left with an exception, such as KeyboardInterrupt, they write checkpoints first.

    Parameters
    ----------
    n_workers : int
        Trials at once. Processes start when there is something for them to do.
    threads : int
        Of each trial.
    """

    def __init__(self, n_workers, threads):
        self.n_workers, self.threads = n_workers, threads
        self.workers = []
        self.false_starts = 0

    def run(self, orders, tell):
        """Train the trials of `orders`; return when each has its result.

        Parameters
        ----------
        orders : list of Order
        tell : callable
            ``tell(order, message)`` for each message: dicts as `worker.perform` tells them, then a `Result`.
        """
        queue = deque(orders)
        while True:
            for worker in self.workers:
                if queue and worker.order is None:
                    worker.give(queue.popleft())
            while queue and len(self.workers) < self.n_workers:
                self.workers.append(_Worker(self.threads))
                self.workers[-1].give(queue.popleft())
            busy = {worker.pipe: worker for worker in self.workers if worker.order}
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                order = worker.order
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    self.workers.remove(worker)
                    message = self._died(worker)
                    if message is None:
                        queue.appendleft(order)
                        continue
                worker.began, self.false_starts = True, 0
                if isinstance(message, Result):
                    worker.order = None
                tell(order, message)

    def _died(self, worker):
        """The result of a trial whose process ended without giving one; None if it had not begun with it."""
        worker.pipe.close()
        worker.process.join()
        if not worker.began and self.false_starts < FALSE_STARTS:
            self.false_starts += 1
            return None
        return died(worker.order, worker.process.exitcode)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self._stop()
        for worker in self.workers:
            worker.pipe.close()  # an idle worker ends when its pipe does
        for worker in self.workers:
            worker.process.join()

    def _stop(self):
        """Ask workers to write a checkpoint and leave; end those that take too long."""
        try:
            for worker in self.workers:
                if worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGINT)
            deadline = monotonic() + STOP_SECONDS
            for worker in self.workers:
                worker.process.join(max(0.0, deadline - monotonic()))
        finally:  # also after a second Ctrl-C
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()


class _Worker:
    """A process that trains one trial after another; `order` is the present one, or None."""

    def __init__(self, threads):
        self.order, self.began = None, False
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end,), daemon=True)
        resource_tracker.ensure_running()  # or the first start would do that, and unblock the signal
        with blas_threads(threads):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process unblocks it in `_work`
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        other_end.close()  # so that the pipe ends when the process does

    def give(self, order):
        self.order, self.began = order, False
        with suppress(OSError):  # it has died; reading from the pipe will say so
            self.pipe.send(order)


@contextmanager
def blas_threads(n):
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


def _work(pipe):
    """A worker's life: take a trial, train it, send its result, until the pipe ends."""
    # A process group of its own: Ctrl-C on a terminal reaches the sweep alone, which then asks each worker.
    os.setpgrp()
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    tell = teller(pipe)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with plain_notes():
            while True:
                tell(perform(pipe.recv(), tell, REPORT_INTERVAL))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _end_with_the_sweep():
    """Leave at once when the sweep's process was killed: its successor must find the trials left alone."""
    multiprocessing.parent_process().join()
    os._exit(1)
