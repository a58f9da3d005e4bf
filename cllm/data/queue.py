"""A bounded queue between threads that make batches and threads that use them."""

import os
import threading
import time
from collections import deque

from cllm.errors import InputError

__all__ = ["BatchQueue", "QueueClosed"]

# A waiting thread looks again after this many seconds even if nobody woke it: its partner may have died, or
# have been interrupted between changing the queue and saying so.
PATIENCE = 0.2


class QueueClosed(RuntimeError):
    """Nothing can be put any more; or nothing is left and nothing will come."""


class BatchQueue:
    """First in, first out, with room for `maxsize` items; any number of threads may put and get.

    One mutex guards everything, and two condition variables say "an item came" and "an item went". What one
    thread puts comes out in that order. The queue ends by `close()` or `fail(error)`: waiting puts raise at
    once, and gets return what is left, then raise. ``with queue:`` closes at the end, and
    ``for item in queue`` runs until it is closed and empty.

    Parameters
    ----------
    maxsize : int
        At least 1.

    Raises
    ------
    InputError
        For another `maxsize`.
    """

    def __init__(self, maxsize):
        if type(maxsize) is not int or maxsize < 1:
            raise InputError(f"maxsize is {maxsize!r}, it must be an integer of at least 1")
        self.maxsize = maxsize
        self._items = deque()
        self._lock = threading.Lock()
        self._came, self._went = threading.Condition(self._lock), threading.Condition(self._lock)
        self._closed = False
        self._error = self._traceback = None
        self._producers = []
        self._process = os.getpid()

    def put(self, item, timeout=None):
        """Append an item; wait while there is no room.

        Parameters
        ----------
        item : object
        timeout : float, optional
            Seconds to wait at most; 0 does not wait, None waits for ever.

        Raises
        ------
        QueueClosed
            When the queue is closed, or is closed meanwhile.
        TimeoutError
            When there is no room in time.
        """
        deadline = _deadline(timeout)
        self._check_process()
        with self._lock:
            while not self._closed and len(self._items) >= self.maxsize:
                self._wait(self._went, deadline, f"put: no room after {timeout} s")
            if self._closed:
                raise QueueClosed("put: the queue is closed")
            self._items.append(item)
            self._came.notify()

    def get(self, timeout=None):
        """Take the first item; wait while there is none.

        Parameters
        ----------
        timeout : float, optional
            As of `put`.

        Raises
        ------
        QueueClosed
            When nothing is left and the queue is closed, or all threads that were named to `watch` are dead.
        TimeoutError
            When nothing came in time.
        BaseException
            What was handed to `fail`, once nothing is left.
        """
        deadline = _deadline(timeout)
        self._check_process()
        with self._lock:
            while not self._items:
                if self._error is not None:
                    raise self._error.with_traceback(self._traceback)
                if self._closed:
                    raise QueueClosed("get: the queue is closed and empty")
                if self._producers and not any(thread.is_alive() for thread in self._producers):
                    raise QueueClosed("get: every thread that filled the queue died without closing it")
                self._wait(self._came, deadline, f"get: no item after {timeout} s")
            item = self._items.popleft()
            self._went.notify()
            return item

    def close(self):
        """End the queue; again and again does no harm, and in a forked child it does nothing."""
        self._end()

    def fail(self, error):
        """End the queue by an error: each get raises it, with its traceback, once the items are taken.

        Parameters
        ----------
        error : BaseException
            The first one counts.
        """
        if not isinstance(error, BaseException):
            raise InputError(f"fail: {error!r} is no exception")
        self._end(error)

    def _end(self, error=None):
        if self._process != os.getpid():  # the lock may have been held when the process was forked
            return
        with self._lock:
            if error is not None and self._error is None:
                self._error, self._traceback = error, error.__traceback__
            self._closed = True
            self._came.notify_all()
            self._went.notify_all()

    def drain(self):
        """Take all that is there, as a list; what waits for room goes on."""
        self._check_process()
        with self._lock:
            items = list(self._items)
            self._items.clear()
            self._went.notify_all()
        return items

    def watch(self, *threads):
        """Name threads that put, once they run: when all have died, a get does not wait for them."""
        self._check_process()
        with self._lock:
            self._producers += threads

    @property
    def closed(self):
        """Whether `close` or `fail` was called."""
        return self._closed

    def __len__(self):
        return len(self._items)

    def __iter__(self):
        while True:
            try:
                item = self.get()
            except QueueClosed:
                if not self._closed:
                    raise
                return
            yield item

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _wait(self, condition, deadline, message):
        left = PATIENCE if deadline is None else min(PATIENCE, deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError(message)
        condition.wait(left)

    def _check_process(self):
        if self._process != os.getpid():
            raise QueueClosed(
                f"the queue belongs to process {self._process}, whose threads a fork does not take along"
            )


def _deadline(timeout):
    """The instant on the monotonic clock at which waiting ends, None for never."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise InputError(f"timeout is {timeout!r}, it must be seconds of at least 0, or None")
    return time.monotonic() + timeout
