"""What was measured, as lines of JSON: an environment, then the rows that were measured in it.

A row is a dict: group, case, threads, unit, samples (side -> one number a round), targets (side, or "CLLM"
for a number that stands alone -> what is wanted), most (whether the target is an upper limit), flops and
bytes of one call, and whatever else its group notes. Lines are appended, so that an interrupted bench keeps
what it measured; of rows that were measured again the newest counts.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

import cllm
from cllm import kernels
from cllm.errors import InputError

__all__ = [
    "FILE", "OURS", "append", "below_target", "cpu_model", "environment", "load", "noisy", "numbers", "other",
    "row", "target", "value",
]  # fmt: skip

FILE = "bench.jsonl"
NOISY = 1.15  # the middle half of the rounds differs by more than this factor
OURS = "CLLM"
# Units of what a busy machine changes.
TIMED = ("s", "GFLOP/s", "GB/s", "of FMA peak", "x of 1 thread")


def cpu_model():
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(torch=None):
    """What the numbers depend on: a dict from label to text."""
    versions = f"{cllm.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    found = {"CPU": cpu_model(), "instruction set": kernels.isa, "CLLM": versions}
    return found | ({"torch": torch.__version__} if torch else {})


def row(group, case, threads, samples, *, unit="s", targets=None, most=False, flops=0, n_bytes=0, **more):
    """A row of the table; see the head of this file."""
    return {
        "group": group, "case": case, "threads": threads, "unit": unit, "samples": samples,
        "targets": targets or {}, "most": most, "flops": flops, "bytes": n_bytes,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **more,
    }  # fmt: skip


def numbers(row, side=OURS):
    """Median, least and largest sample of a side."""
    samples = row["samples"][side]
    return statistics.median(samples), min(samples), max(samples)


def other(row):
    """The fastest (or smallest) of the sides beside CLLM; None when there is none."""
    others = [side for side in row["samples"] if side != OURS]
    return min(others, key=lambda side: numbers(row, side)[0], default=None)


def value(row, side=None):
    """What a row is about: (median, least, largest) of other / CLLM, or of CLLM's number where it is alone.

    Ratios are taken round by round: both sides of a round met the same weather. None for a time alone.
    """
    side = side or other(row)
    if side is None:
        return None if row["unit"] == "s" else numbers(row)
    ratios = [b / a for a, b in zip(row["samples"][OURS], row["samples"][side])]
    return statistics.median(ratios), min(ratios), max(ratios)


def target(row, side=None):
    """What is wanted of `value(row, side)`; None where nothing is."""
    return row["targets"].get(side or other(row) or OURS)


def below_target(row, side=None):
    """Whether the row misses its target, as far as two digits show; False without a target."""
    wanted = target(row, side)
    if wanted is None:
        return False
    found = round(value(row, side)[0], 3 if wanted < 1 else 2)
    return found > wanted if row["most"] else found < wanted


def noisy(row):
    """Whether the machine was: the middle half of a side's rounds spans over 15 %."""

    def wide(samples):
        if len(samples) < 3 or row["unit"] not in TIMED:
            return False
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return high > NOISY * low

    return any(map(wide, row["samples"].values()))


def append(path, record):
    """Add one environment or row to the file; a line is with the operating system when this returns."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a process was killed while it wrote
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def load(directory):
    """The newest environment in a directory's records, and the rows that were measured in it.

    Parameters
    ----------
    directory : path-like

    Returns
    -------
    environment : dict
    rows : list of dict
        In the order of their first measurement; each with its newest numbers.

    Raises
    ------
    InputError
        When the directory has no records of a bench.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {FILE}: `cllm bench --out {directory}` writes it")
    found, current = [], None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a process was killed while it wrote
        if "environment" in record:
            current = record["environment"]
        elif current is not None:
            found.append((current, record))
    if not found:
        raise InputError(f"{path} holds no rows yet")
    newest = found[-1][0]
    rows = {}
    for known, record in found:
        if all(known.get(label) == newest.get(label) for label in known.keys() & newest.keys()):
            rows[record["group"], record["case"], record["threads"]] = record
    return newest, list(rows.values())
