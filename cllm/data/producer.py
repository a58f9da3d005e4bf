"""Batches that a thread of its own makes while the training computes."""

import os
import threading
import weakref

from cllm.data.queue import BatchQueue
from cllm.errors import InputError

__all__ = ["Producer"]


class Producer:
    """Makes a feed's batches ahead, in order, in a background thread.

    ``producer.batch(index, batch_size, seed)`` takes the place of ``feed.batch(...)`` and gives the same
    bits: batches are pure functions of their arguments. Asked for what comes next, it takes it from its
    queue; asked for anything else, it begins there, and nothing between is read. So the position that was
    consumed is all the state; batches in flight are none. An error in making a batch is raised when that
    batch is asked for.

    It pays where a batch takes long to make: a step at char size waits 7.3 ms for a dataset that takes 5, 4.4
    for a file of 2 GB on disk, and 0.1 in either case with this; for a text in memory it is 0.1 without, too
    (experiments/batches.py). A dataset of one's own is called from the thread, while evaluations may call it
    too, and must not draw from generators that the training shares.

    Parameters
    ----------
    feed : object
        With ``batch(index, batch_size, seed)``.
    ahead : int
        Batches that wait to be taken; one more is in the making.
    following : callable, optional
        index -> the index that is asked for next; by default index + 1.

    Raises
    ------
    InputError
        When `ahead` is not an integer of at least 1.
    """

    def __init__(self, feed, ahead=2, following=None):
        if type(ahead) is not int or ahead < 1:
            raise InputError(f"ahead is {ahead!r}, it must be an integer of at least 1")
        self.feed, self.ahead = feed, ahead
        self.following = following or _next
        self._expected = self._queue = self._thread = None

    def batch(self, index, batch_size, seed):
        """What ``feed.batch(index, batch_size, seed)`` returns or raises."""
        if self._expected != (index, batch_size, seed) or self._process != os.getpid():
            self.start(index, batch_size, seed)
        self._expected = None  # an error, or an interrupt, makes the next call begin anew
        batch = self._queue.get()
        self._expected = (self.following(index), batch_size, seed)
        return batch

    def start(self, index, batch_size, seed):
        """Begin to make batches, from `index` on; any that were made before are dropped."""
        self.close()
        queue = BatchQueue(self.ahead)
        arguments = (queue, self.feed, self.following, index, batch_size, seed)
        thread = threading.Thread(target=_produce, args=arguments, name="cllm batches", daemon=True)
        thread.start()
        queue.watch(thread)
        self._queue, self._thread, self._process = queue, thread, os.getpid()
        self._expected = (index, batch_size, seed)
        self._end = weakref.finalize(self, queue.close)  # also of one that was forgotten

    def close(self):
        """End the thread, after the batch in its hands; `batch` and `start` begin anew."""
        if self._queue is None:
            return
        queue, thread = self._queue, self._thread
        self._expected = self._queue = self._thread = None
        self._end.detach()
        if self._process == os.getpid():  # a fork has no such thread
            queue.close()
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _next(index):
    return index + 1


def _produce(queue, feed, following, index, batch_size, seed):
    """The thread. It does not know the Producer, which could else not be forgotten."""
    try:
        while not queue.closed:
            queue.put(feed.batch(index, batch_size, seed))
            index = following(index)
    except BaseException as error:
        if not queue.closed:  # else it is the put that found it closed, or nobody will ask
            queue.fail(error)
