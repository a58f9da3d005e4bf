"""Workers of a Dask cluster that train a sweep's trials: past one machine, over a directory that they share.

The scheduler gives each trial to a worker, and to another one when that is lost; it goes on there from its
last checkpoint. In the worker a trial is a child process of its own, which has the signals and threads that
a run expects, and which ends when the worker does. What it tells goes to the sweep as events of a topic.
"""

import asyncio
import logging
import multiprocessing.connection as connection
import os
import queue
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from cllm import kernels, parallel
from cllm.errors import InputError, plain_notes
from cllm.files import LOCK
from cllm.sweep.results import Result
from cllm.sweep.worker import died, note_error, perform, teller

__all__ = ["Cluster"]

CONNECT_SECONDS = 5.0  # what a scheduler has to answer
REPORT_INTERVAL = 0.5  # seconds between two reports of a trial: all of them pass through the scheduler
STOP_SECONDS = 15.0  # what trials have to write a checkpoint after Ctrl-C
CHILD = "from cllm.sweep.cluster import _child; _child()"


@dataclass(frozen=True)
class _Place:
    """What a worker needs to know besides its order.

    `held` is what the sweep's lock says: who reads the same has the same directory. `isa` is the one that is
    allowed, or None.
    """

    topic: str
    cwd: str
    directory: str
    held: str
    isa: str | None
    threads: int


class Cluster:
    """An engine of the workers of a Dask scheduler; a context manager.

    When it is left with an exception, such as KeyboardInterrupt, trials write checkpoints first.

    Parameters
    ----------
    address : str
        Of the scheduler: tcp://HOST:PORT.
    directory : Path
        The sweep's, which this process holds.
    threads : int
        Of each trial.
    same_isa : bool
        Whether workers of another instruction set are left idle: than most of `isas`, or of the workers.
    isas : list of str
        Of the trials so far.

    Raises
    ------
    InputError
        When there is no dask.distributed, or the scheduler does not answer.
    """

    def __init__(self, address, directory, threads, same_isa=False, isas=()):
        try:
            import distributed
        except ImportError:
            raise InputError('--scheduler needs dask.distributed: pip install "cllm[cluster]"') from None
        for name in ("distributed.client", "distributed.comm", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what went wrong is told in one sentence
        self.address = address
        with ThreadPoolExecutor(1) as aside:  # a notebook's thread has an event loop already
            aside.submit(asyncio.run, _check_answers(address)).result()
        self.client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        isa = Counter(isas or self._isas()).most_common(1)[0][0] if same_isa else None
        held = (directory / LOCK).read_text(encoding="utf-8")
        topic = f"cllm-{uuid.uuid4().hex}"
        self.place = _Place(topic, os.getcwd(), str(directory.resolve()), held, isa, threads)
        self.inbox = queue.SimpleQueue()  # events and futures, as they come
        self.flying = {}  # future -> order
        self.client.subscribe_topic(topic, lambda event: self.inbox.put(event[1]))
        self._end_trials()  # of a sweep's process that was killed: they hold their folders

    def _isas(self):
        """The instruction sets of the workers, of which there is one at least when this returns."""
        self.client.wait_for_workers(1)
        found = self.client.run(_isa, on_error="return").values()
        known = [isa for isa in found if isinstance(isa, str)]
        if not known:
            raise self._unfit(next(iter(found)))
        return known

    @property
    def n_workers(self):
        """Threads of all workers: so many trials can run at once, at present."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return sum(worker["nthreads"] for worker in workers)

    def run(self, orders, tell):
        """Train the trials of `orders`, see `engine.Processes.run`."""
        waiting = {order.trial.name: order for order in orders}
        for index, order in enumerate(orders):
            future = self.client.submit(
                _train, order, self.place, key=f"{order.trial.name}-{uuid.uuid4().hex}", pure=False,
                priority=-index,
            )  # fmt: skip
            self.flying[future] = order
            future.add_done_callback(self.inbox.put)
        while self.flying:
            try:
                item = self.inbox.get(timeout=1.0)
            except queue.Empty:
                if self.client.status != "running":
                    raise self._lost() from None
                continue
            if isinstance(item, dict):
                name = item.pop("trial")
                if name in waiting:  # an event may come after the result
                    tell(waiting[name], item)
            else:
                order = self.flying.pop(item)
                del waiting[order.trial.name]
                tell(order, self._result(order, item))

    def _result(self, order, future):
        from distributed import KilledWorker

        if future.status == "finished":
            return future.result()
        if future.status != "error":
            raise self._lost()
        error = future.exception()
        if isinstance(error, InputError):
            raise error
        if not isinstance(error, KilledWorker):
            raise self._unfit(error)
        said = "its worker was lost, again and again; the machines may have run out of memory"
        note_error(order.run_dir, said + "\n")
        return Result(order.trial, "failed", error=said)

    def _unfit(self, error):
        return InputError(f"a worker of {self.address} cannot train: {type(error).__name__}: {error}")

    def _lost(self):
        return InputError(f"the scheduler {self.address} has gone; the same command goes on with the sweep")

    def _end_trials(self, topic=None):
        """Let trials of this directory write checkpoints and end, wherever they run."""
        with suppress(OSError):
            self.client.run(_stop, self.place.directory, topic, on_error="return")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None and self.client.status == "running":
            with suppress(OSError):
                self.client.cancel(list(self.flying))
            self._end_trials(self.place.topic)
        self.client.close(timeout=2)


async def _check_answers(address):
    """Raise when there is no scheduler; first of all, as a client that waits for one cannot be closed."""
    from distributed import rpc

    try:
        async with asyncio.timeout(CONNECT_SECONDS), rpc(address) as there:
            kind = (await there.identity())["type"]
    except Exception as error:  # whatever the library makes of an answer that is none
        late = isinstance(error, OSError)
        why = f"within {CONNECT_SECONDS:.0f} s" if late else f"({' '.join(str(error).split())})"
        raise InputError(f"no scheduler answers at {address} {why}; it must be tcp://HOST:PORT") from None
    if kind != "Scheduler":
        raise InputError(f"{address} is a {kind.lower()}, it must be the scheduler")


# In a Dask worker -------------------------------------------------------------------------------------

_children = set()  # of this worker
_over = set()  # topics of sweeps that were stopped


def _isa():
    return kernels.isa


def _train(order, place):
    """Train a trial in a child process, and send on what it tells."""
    from distributed import Reschedule, get_worker

    worker = get_worker()
    if place.isa is not None and kernels.isa != place.isa:
        sleep(1.0)  # as long as others are free they will get it
        raise Reschedule
    _check_shared(worker.address, place)
    child = _Child(order, place)
    try:
        while place.topic not in _over:
            message = child.next()
            if not isinstance(message, dict):
                return message
            worker.log_event(place.topic, {"trial": order.trial.name, **message})
    finally:
        child.end()


def _check_shared(address, place):
    """Raise when this worker does not see the sweep's directory."""
    try:
        same = Path(place.directory, LOCK).read_text(encoding="utf-8") == place.held
    except OSError:
        same = False
    if not same:
        where = f"the sweep's directory, {place.directory}"
    elif not Path(place.cwd).is_dir():
        where = f"this working directory, {place.cwd}"
    else:
        return
    raise InputError(f"worker {address} does not have {where}: it must be shared by all machines")


class _Child:
    """A process that trains one trial."""

    def __init__(self, order, place):
        env = {key: value for key, value in os.environ.items() if key not in parallel.SIZES}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            env[name] = str(place.threads)
        self.order, self.place, self.stopped = order, place, False
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=place.cwd,
            env=env, start_new_session=True,
        )  # fmt: skip
        self.orders = connection.Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self.messages = connection.Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        _children.add(self)
        self.send(order)

    def send(self, what):
        with suppress(OSError):  # it has died; reading from it will say so
            self.orders.send(what)

    def next(self):
        """What it tells next; its result when it has died, None when it was stopped."""
        try:
            return self.messages.recv()
        except (EOFError, OSError):
            self.process.wait()
            return None if self.stopped else died(self.order, self.process.returncode)

    def end(self):
        _children.discard(self)
        self.orders.close()  # which ends it, if it is still there
        self.process.wait()
        self.messages.close()


async def _stop(directory, topic):
    """Let the trials of a directory write checkpoints and end; for a topic no more begin."""
    if topic is not None:
        _over.add(topic)
    mine = [child for child in list(_children) if child.place.directory == directory]
    for child in mine:
        child.stopped = True
        child.send("stop")
    deadline = monotonic() + STOP_SECONDS
    while any(child.process.poll() is None for child in mine) and monotonic() < deadline:
        await asyncio.sleep(0.05)
    for child in mine:
        child.process.kill()


def _child():
    """In a process of its own: train a trial as standard input says."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a user's file prints is no message
    orders, messages = connection.Connection(0, writable=False), connection.Connection(out, readable=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    order, tell = orders.recv(), teller(messages)
    threading.Thread(target=_obey, args=(orders,), daemon=True).start()
    with suppress(KeyboardInterrupt), plain_notes():
        tell(perform(order, tell, REPORT_INTERVAL))


def _obey(orders):
    """Stop when the worker says so; end at once when it has gone: another one will go on."""
    with suppress(EOFError, OSError):
        orders.recv()
        os.kill(os.getpid(), signal.SIGINT)
        orders.recv()
    os._exit(1)
