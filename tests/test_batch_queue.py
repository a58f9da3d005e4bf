"""The queue: order, bounds, time limits, errors; ending it, or a thread, at every point of the protocol."""

import linecache
import os
import signal
import sys
import threading
import time
import traceback

import batch_stress
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.data import BatchQueue, QueueClosed
from cllm.data import queue as queue_module
from cllm.errors import InputError

SECONDS = 30  # after which a thread counts as hanging


def run(*functions):
    """Run each in a thread of its own; what each returned or raised."""
    results = [None] * len(functions)

    def call(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    return results


def test_first_in_first_out():
    queue = BatchQueue(3)
    for i in range(3):
        queue.put(i)
    assert len(queue) == 3
    with pytest.raises(TimeoutError, match=r"put: no room after 0\.01 s"):
        queue.put(3, timeout=0.01)
    assert [queue.get(timeout=0) for _ in range(3)] == [0, 1, 2]
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match=f"get: no item after {timeout} s"):
            queue.get(timeout)
    assert not queue.closed


def test_closed():
    queue = BatchQueue(2)
    with queue as same:
        assert same is queue
        queue.put("a")
        queue.put("b")
    assert queue.closed
    queue.close()
    with pytest.raises(QueueClosed, match="put: the queue is closed"):
        queue.put("c")
    assert queue.get() == "a"
    assert list(queue) == ["b"]
    assert list(queue) == []
    for timeout in (None, 0, 1):
        with pytest.raises(QueueClosed, match="get: the queue is closed and empty"):
            queue.get(timeout)


def test_drain_makes_room():
    queue = BatchQueue(2)
    queue.put(1)
    queue.put(2)

    def drain():
        while True:
            if items := queue.drain():
                return items

    assert run(lambda: queue.put(3), drain) == [None, [1, 2]]
    queue.close()
    assert queue.drain() == [3]
    with pytest.raises(QueueClosed):
        queue.get()


def failing_function():
    return 1 // 0


def test_an_error_reaches_each_consumer_after_the_items():
    queue = BatchQueue(5)

    def produce():
        queue.put("good")
        try:
            failing_function()
        except ZeroDivisionError as error:
            queue.fail(error)
            queue.fail(ValueError("only the first one counts"))

    run(produce)
    assert queue.get() == "good"
    lengths = set()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError) as caught:
            queue.get()
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert "failing_function" in [frame.name for frame in frames]
        lengths.add(len(frames))
    assert len(lengths) == 1  # it does not grow each time that it is raised
    with pytest.raises(QueueClosed, match="put"):
        queue.put("late")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, QueueClosed])
def test_any_exception_passes(kind):
    queue = BatchQueue(1)
    queue.fail(kind("why"))
    with pytest.raises(kind, match="why"):
        queue.get()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchQueue(0), "maxsize is 0, it must be an integer of at least 1"),
        (lambda: BatchQueue(1.5), r"maxsize is 1\.5, it must be"),
        (lambda: BatchQueue(True), "maxsize is True, it must be"),
        (
            lambda: BatchQueue(1).put(1, timeout=-1),
            "timeout is -1, it must be seconds of at least 0, or None",
        ),
        (lambda: BatchQueue(1).get(timeout=float("nan")), "timeout is nan, it must be"),
        (lambda: BatchQueue(1).get(timeout="1"), "timeout is '1', it must be"),
        (lambda: BatchQueue(1).fail("no"), "fail: 'no' is no exception"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


@given(
    maxsize=st.integers(1, 4),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    consumers=st.integers(1, 4),
)
def test_each_item_once_and_in_its_producers_order(maxsize, counts, consumers):
    queue, left, lock = BatchQueue(maxsize), [len(counts)], threading.Lock()
    sizes = []

    def producer(number):
        def produce():
            for i in range(counts[number]):
                queue.put((number, i))
                sizes.append(len(queue))
            with lock:
                left[0] -= 1
                if not left[0]:
                    queue.close()

        return produce

    results = run(*map(producer, range(len(counts))), *[lambda: list(queue)] * consumers)
    taken = results[len(counts) :]
    assert sorted(item for items in taken for item in items) == [
        (number, i) for number, count in enumerate(counts) for i in range(count)
    ]
    for items in taken:
        for number in range(len(counts)):
            mine = [i for owner, i in items if owner == number]
            assert mine == sorted(mine)
    assert max(sizes, default=0) <= maxsize


# Ending at every point. A tracer stops one thread before each line of the queue's code in turn, and does
# something there.

N = 4  # items of a scenario


class At:
    """Does `action` once, before the k-th line of the queue's code that the traced thread runs."""

    def __init__(self, k, action):
        self.left, self.action, self.done = k, action, False

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != queue_module.__file__:
            return None
        # Python runs the end of a `with` as its line, outside of what it protects: an exception there, which
        # only a tracer can raise, would leave the lock held. Signals are not looked for at that point.
        line = linecache.getline(queue_module.__file__, frame.f_lineno)
        if event == "line" and "with self._lock" not in line:
            self.left -= 1
            if self.left < 0 and not self.done:
                self.done = True
                self.action()
        return self.trace

    def __call__(self, function):
        sys.settrace(self.trace)
        try:
            return function()
        finally:
            sys.settrace(None)


def scenario(queue, role, at):
    """One producer of N items and one consumer that takes all; `at` traces one of them."""
    watched, taken, put = threading.Event(), [], []
    trace = {role: at}

    def fill():
        for i in range(N):
            queue.put(i)
            put.append(i)
        queue.close()

    def produce():
        queue.watch(threading.current_thread())
        watched.set()
        trace.get("produce", call)(fill)

    def consume():
        assert watched.wait(SECONDS)  # a producer that dies before is not known to the queue
        trace.get("consume", call)(lambda: taken.extend(queue))

    return *run(produce, consume), put, taken


def call(function):
    return function()


def at_every_point(role, action, monkeypatch):
    """The outcomes of the scenario, for each line before which `action(queue)` can happen."""
    monkeypatch.setattr(queue_module, "PATIENCE", 0.01)
    for k in range(10_000):
        queue = BatchQueue(2)
        at = At(k, lambda queue=queue: action(queue))
        outcome = scenario(queue, role, at)
        assert not queue._lock.locked()
        yield queue, *outcome
        if not at.done:
            assert k > 30  # it was traced
            return


def elsewhere(function):
    """Call it in another thread, and wait for that as long as this one may hold the lock."""

    def action(queue):
        thread = threading.Thread(target=function, args=(queue,), daemon=True)
        thread.start()
        thread.join(0.002 if queue._lock.locked() else SECONDS)

    return action


def closed_or(kind):
    return lambda result: result is None or isinstance(result, kind)


@pytest.mark.parametrize("role", ["produce", "consume"])
def test_closing_at_every_point(role, monkeypatch):
    cut = 0
    for queue, produced, consumed, put, taken in at_every_point(
        role, elsewhere(BatchQueue.close), monkeypatch
    ):
        assert closed_or(QueueClosed)(produced)
        assert consumed is None
        assert taken == list(range(len(taken)))
        assert taken[: len(put)] == put  # an interrupted put may have been complete
        assert queue.closed and not len(queue)
        cut += len(put) < N
    assert cut > 5


@pytest.mark.parametrize("role", ["produce", "consume"])
def test_failing_at_every_point(role, monkeypatch):
    def fail(queue):
        queue.fail(ZeroDivisionError())

    failed = 0
    for _, produced, consumed, put, taken in at_every_point(role, elsewhere(fail), monkeypatch):
        assert closed_or(QueueClosed)(produced)
        assert closed_or(ZeroDivisionError)(consumed)
        assert taken[: len(put)] == put
        failed += consumed is not None
    assert failed > 5


@pytest.mark.parametrize("role", ["produce", "consume"])
def test_draining_at_every_point(role, monkeypatch):
    gone = []

    def drain(queue):
        gone.extend(queue.drain())

    for _, produced, consumed, put, taken in at_every_point(role, elsewhere(drain), monkeypatch):
        assert produced is consumed is None
        assert put == list(range(N))
        # the thread that drains may still run, and find nothing
        assert sorted(taken + gone) == put and taken == sorted(taken)
        gone.clear()


def test_a_producer_that_dies_at_every_point(monkeypatch):
    def die(queue):
        raise SystemExit

    died = 0
    for queue, produced, consumed, put, taken in at_every_point("produce", die, monkeypatch):
        assert closed_or(SystemExit)(produced)
        assert taken[: len(put)] == put
        if isinstance(produced, SystemExit) and not queue.closed:
            assert isinstance(consumed, QueueClosed)
            assert "died without closing" in str(consumed)
            died += 1
    assert died > 30


def test_a_consumer_that_stops_at_every_point(monkeypatch):
    """And closes the queue on its way out: the producer's put raises, and none hangs."""
    monkeypatch.setattr(queue_module, "PATIENCE", 0.01)

    for k in range(10_000):
        queue = BatchQueue(1)
        put, taken = [], []

        def stop():
            raise KeyboardInterrupt

        at = At(k, stop)

        def produce(queue=queue, put=put):
            for i in range(N):
                queue.put(i)
                put.append(i)

        def consume(queue=queue, taken=taken, at=at):
            try:
                at(lambda: [taken.append(queue.get()) for _ in range(N)])
            finally:
                queue.close()

        produced, consumed = run(produce, consume)
        assert closed_or(QueueClosed)(produced)
        assert closed_or(KeyboardInterrupt)(consumed)
        left = queue.drain()
        # Only the item in the hands of the interrupted get can be gone with it.
        assert len(taken) + len(left) >= len(put) - 1
        assert sorted(taken + left) == taken + left
        if not at.done:
            assert k > 20
            return


def test_a_wakeup_that_got_lost_is_made_up_for(monkeypatch):
    monkeypatch.setattr(queue_module, "PATIENCE", 0.01)
    queue = BatchQueue(1)

    def put_and_be_interrupted():
        time.sleep(0.05)
        queue._items.append("item")  # and no notify: the thread was interrupted between the two

    assert run(queue.get, put_and_be_interrupted)[0] == "item"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_ctrl_c_while_waiting():
    queue = BatchQueue(1)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            queue.get()
        queue.put(1)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            queue.put(2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert queue.get() == 1
    queue.close()
    assert list(queue) == []


def test_another_process_is_refused(monkeypatch):
    queue = BatchQueue(1)
    queue.put(1)
    queue._lock.acquire()  # as it may be when the process is forked
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for call in (lambda: queue.put(1), queue.get, queue.drain, lambda: queue.watch()):
        with pytest.raises(QueueClosed, match=r"the queue belongs to process \d+"):
            call()
    queue.close()
    queue.fail(ValueError())


def test_eight_producers_and_eight_consumers():
    counts = batch_stress.run(2)
    assert counts.pop("items") > 100
    assert counts.pop("recycled") > 0
    assert set(counts.values()) == {0}, counts
