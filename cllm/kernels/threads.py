"""How many threads kernels called from this process may use."""

import os

import numpy as np


def _cores():
    """The cores that this process may use: its affinity mask, limited by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 limit to read
    return cores


#: The cores that this process could use when CLLM was imported.
CORES = _cores()
count = CORES
_forked = False


# With some ten thousand threads a process dies in OpenMP without a word.
MAX_THREADS = 1024


def set_num_threads(n):
    """Set the number of threads that kernels called from this process may use.

    Parameters
    ----------
    n : int
        From 1 to `MAX_THREADS`. More than this process has cores are not used, as they would only wait for
        each other (a small training step on 2 cores: 1.7 ms with 2 threads, 5.2 with 4); a forked child keeps
        to 1. Results do not depend on it.
    """
    global count
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= MAX_THREADS:
        raise ValueError(f"set_num_threads: n is {n!r}, it must be an integer from 1 to {MAX_THREADS}")
    count = 1 if _forked else min(int(n), CORES)


def get_num_threads():
    """The number of threads that kernels use; at first the cores that this process may use."""
    return count


def _stay_serial():
    """libgomp's pool does not survive a fork, and waiting for it would hang: the child stays serial."""
    global _forked
    _forked = True
    set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stay_serial)
