"""Timing functions that take turns, and the threads of everything that may take a turn."""

import contextlib
import ctypes
import functools
import statistics
import sys
import time

import cllm

__all__ = ["Effort", "measure", "openblas", "threads_of_all", "timed", "use_threads"]

PAUSE_SECONDS = 0.02  # all pools' idle threads have stopped spinning by then
WARM_SECONDS = 1.0  # a call that takes longer is made once before it is timed, others three times
COLD_SECONDS = 0.1  # a call that takes longer does not show what a cold start of a block costs
LONG_SECONDS = 2.0  # a round of calls that takes longer is repeated half as often, but three times


class Effort:
    """How long to measure: blocks of each side, and about how many seconds a block takes."""

    def __init__(self, rounds=7, block_seconds=0.06):
        self.rounds, self.block_seconds = rounds, block_seconds


def measure(sides, effort):
    """Time functions that take turns, since a machine's speed drifts.

    A block starts with a call that is not timed, unless a call is long; and where there are threads after a
    pause, as each library has a pool of its own, whose idle threads spin for a while.

    Parameters
    ----------
    sides : dict
        (name, threads) -> function without arguments.
    effort : Effort

    Returns
    -------
    dict
        (name, threads) -> seconds of a call, the median of each round.
    """
    counts, seconds = {}, {}
    for side, call in sides.items():
        use_threads(side[1])
        for _ in range(3):  # first-time allocations, packing scratch, optimizer moments
            seconds[side] = timed(call)
            if seconds[side] > WARM_SECONDS:
                break
        counts[side] = max(1, min(200, round(effort.block_seconds / max(seconds[side], 1e-9))))
    rounds = {side: [] for side in sides}
    pause = PAUSE_SECONDS if any(n > 1 for _, n in sides) else 0
    long = sum(seconds.values()) > LONG_SECONDS
    for i in range(max(3, -(-effort.rounds // 2)) if long else effort.rounds):
        for side in sides if i % 2 == 0 else reversed(sides):
            use_threads(side[1])
            time.sleep(pause)
            if seconds[side] < COLD_SECONDS:
                sides[side]()
            rounds[side].append(statistics.median(timed(sides[side]) for _ in range(counts[side])))
    return rounds


def timed(call):
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def use_threads(n):
    """Set the threads of CLLM, of torch when it is loaded, and of NumPy's OpenBLAS."""
    cllm.set_num_threads(n)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(n)
    if openblas():
        openblas()[0](n)


@contextlib.contextmanager
def threads_of_all():
    """In this context `use_threads` may be called; the old numbers come back afterwards."""
    before = cllm.get_num_threads()
    torch = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch else None
    blas_before = openblas()[1]() if openblas() else None
    try:
        yield
    finally:
        cllm.set_num_threads(before)
        if torch:
            torch.set_num_threads(torch_before)
        if openblas():
            openblas()[0](blas_before)


@functools.cache
def openblas():
    """Functions that set and get the threads of the OpenBLAS in NumPy's wheel; None where there is none."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            paths = {line.split(maxsplit=5)[-1].strip() for line in file if "openblas" in line}
    except OSError:
        return None
    for path in sorted(path for path in paths if "numpy" in path):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_{}64_", "openblas_{}64_", "openblas_{}"):
            both = [name.format(f"{verb}_num_threads") for verb in ("set", "get")]
            if all(hasattr(library, function) for function in both):
                return tuple(getattr(library, function) for function in both)
    return None
