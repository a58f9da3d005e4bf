"""What this machine can do at all: multiply-adds in registers, and memory traffic."""

import functools

import numpy as np

from cllm._kernels import ceilings as _ceilings
from cllm.bench import records, timing

__all__ = ["fma", "rows"]

FMA_SECONDS = 0.02
ELEMENTS = 1 << 25  # of each of three arrays: 128 MB, four times the largest cache in sight
UPDATED = 25 << 16  # elements of each of two arrays: 13 MB, as an Adam of 0.8 million parameters has
_rounds = {}  # threads -> rounds of multiply-adds that take about FMA_SECONDS


def fma(threads):
    """A function that multiplies and adds for about FMA_SECONDS, and its floating-point operations."""
    if threads not in _rounds:
        n = 10_000
        while timing.timed(functools.partial(_ceilings.fma, n, threads)) < FMA_SECONDS / 2:
            n *= 2
        _rounds[threads] = n
    n = _rounds[threads]
    return lambda: _ceilings.fma(n, threads), _ceilings.fma(1, threads) * n


def rows(threads, effort):
    """Rows of the group "ceilings": GFLOP/s and GB/s with each number of threads."""
    x, y, z = (np.zeros(ELEMENTS, np.float32) for _ in range(3))  # zeros: updates without end stay finite
    for array in (x, y, z):
        array.fill(0)  # and written, so that they have pages of their own
    found = []
    for n in threads:
        call, flops = fma(n)
        work = {  # case -> function, amount of work, unit
            "FMA in registers": (call, flops, "GFLOP/s"),
            "memory, copy": (lambda n=n: _ceilings.copy(x, y, n), 8 * ELEMENTS, "GB/s"),
            "memory, read": (lambda n=n: _ceilings.read(x, n), 4 * ELEMENTS, "GB/s"),
            "memory, triad": (lambda n=n: _ceilings.triad(x, y, z, n), 12 * ELEMENTS, "GB/s"),
            "memory, update": (lambda n=n: _ceilings.update(x, z, n), 12 * ELEMENTS, "GB/s"),
            "13 MB, update": (
                lambda n=n: _ceilings.update(x[:UPDATED], z[:UPDATED], n), 12 * UPDATED, "GB/s",
            ),
        }
        seconds = timing.measure({(case, n): call for case, (call, _, _) in work.items()}, effort)
        for case, (_, amount, unit) in work.items():
            samples = {records.OURS: [amount / s / 1e9 for s in seconds[case, n]]}
            found.append(records.row("ceilings", case, n, samples, unit=unit))
    return found
