"""A run's directory, as records: writing them while it trains, reading them afterwards.

metrics.jsonl has one JSON object a line: ``step`` (updates done), ``split``, and numbers. JSON has no NaN and
no infinity: such a number is written as null and read as NaN. A number that was not measured has no key.
"""

import json
import math
import os
import re
import tomllib
import warnings
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from cllm.errors import InputError, nearest
from cllm.files import why, write_atomic

__all__ = [
    "METRICS", "Nowhere", "Recorder", "Run", "is_inside", "is_timing", "load", "number", "plain",
    "write_summary",
]  # fmt: skip

#: What each record of a language model has; [monitor], metrics and callbacks add to it.
METRICS = {
    "train": (
        "loss", "lr", "grad_norm", "tokens_per_s", "time_data", "time_forward", "time_backward",
        "time_optimizer", "memory_mb",
    ),
    "val": ("loss", "perplexity", "seconds", "memory_mb"),
}  # fmt: skip
_INSIDE = re.compile(r"(grad_norm|update_ratio|activation_(rms|max|zeros))\..*|update_ratio")
_TIMING = re.compile(r"time.*|seconds|(tokens|examples)_per_s|memory.*")


class Recorder:
    """Appends records to a run's metrics.jsonl; each is with the operating system when `write` returns.

    A line that a killed process left unfinished is dropped at once. What cannot be written, as on a full
    disk, is kept and tried again with the next record. A context manager that closes itself.

    Parameters
    ----------
    run_dir : path-like
        An existing folder.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._waiting = b""  # what could not be written so far
        self._open()
        if self.path.read_bytes() != b"".join(line for line, _ in _lines(self.path)):
            self._keep(lambda record: True)

    def write(self, record):
        """Append one record, a dict with at least "step" and "split"; NumPy's numbers and Tensors will do.

        Raises
        ------
        InputError
            Names the key whose value JSON cannot hold. Nothing has been written then.
        """
        if not {"step", "split"} <= record.keys():
            raise ValueError(
                f'a record needs "step" and "split"; this one has {", ".join(record) or "nothing"}'
            )
        line = _json(record, "a record's {}")
        waited = bool(self._waiting)
        self._waiting += f"{line}\n".encode()
        try:
            self._flush()
        except OSError as error:
            if not waited:  # once for each time that it goes wrong
                warnings.warn(
                    f"records cannot be written ({why(error)}); they wait until they can be, and no "
                    "checkpoint is written before them",
                    stacklevel=2,
                )

    def truncate(self, step):
        """Drop all records after `step`, atomically; the others stay byte for byte.

        Returns
        -------
        int
            The last step that there is a record of now; 0 without records.
        """
        last = 0

        def wanted(record):
            nonlocal last
            if record["step"] > step:
                return False
            last = max(last, record["step"])
            return True

        self._keep(wanted)
        return last

    def sync(self):
        """Push all records to the disk, so that they survive a crash of the machine.

        Raises
        ------
        OSError
            When not all are there: names the file.
        """
        self._flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self):
        """Write what waits, if that is possible now; OSError when records are lost."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self):
        try:
            while self._waiting:  # a system may write less than it was given
                self._waiting = self._waiting[os.write(self._file.fileno(), self._waiting) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _open(self):
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (kept open; close() ends it)

    def _keep(self, wanted):
        self._flush()
        write_atomic(self.path, b"".join(line for line, record in _lines(self.path) if wanted(record)))
        self._file.close()  # only now: what cannot be written is to wait
        self._open()


class Nowhere:
    """A Recorder of a process that leaves the writing to another one."""

    def write(self, record):
        pass

    def truncate(self, step):
        return step

    def sync(self):
        pass

    def close(self):
        pass


def write_summary(run_dir, summary):
    """Write a run's summary.json whole or not at all; numbers that are not finite become null."""
    text = _json(summary, "the summary's {}", indent=2)
    write_atomic(Path(run_dir) / "summary.json", text + "\n")


class Run:
    """One run's files; each is read when first asked for.

    Parameters
    ----------
    path : path-like
        The run's directory.
    """

    def __init__(self, path):
        self.path = Path(path)

    def __repr__(self):
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self):
        """config.toml as a flat dict: ``run.config["optim.lr"]``. Empty when there is none."""
        try:
            return _flat(tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.path / 'config.toml'} is not a TOML file: {error}") from None

    @cached_property
    def summary(self):
        """summary.json as a dict; empty for a run that has not ended."""
        try:
            summary = json.loads((self.path / "summary.json").read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.path / 'summary.json'} is not a JSON file: {error}") from None
        if not isinstance(summary, dict):
            raise InputError(f"{self.path / 'summary.json'} is not a JSON object")
        return summary

    @cached_property
    def records(self):
        """metrics.jsonl as a list of dicts, in the order of writing; an unfinished last line is left out."""
        return [record for _, record in _lines(self.path / "metrics.jsonl")]

    @property
    def state(self):
        """ "finished" or "failed" as the summary says; "unfinished" without one."""
        return self.summary.get("state", "unfinished")

    def series(self, split, key):
        """The values of `key` in the records of `split`.

        Returns
        -------
        steps : ndarray
            int64 (n,), of the records that have the key.
        values : ndarray
            float64 (n,); NaN where the number was not finite. Empty for what this run has not come to record.

        Raises
        ------
        InputError
            When the run records no such number: another of its split, or no such split by its end.
        """
        found = [
            (record["step"], math.nan if record[key] is None else record[key])
            for record in self.records
            if record["split"] == split and key in record
        ]
        if not found:
            self._check_known(split, key)
        steps, values = zip(*found) if found else ((), ())
        if not all(isinstance(value, int | float) for value in values):
            raise InputError(f"{split}.{key} of {self.path} is not one number a record")
        return np.array(steps, np.int64), np.array(values, np.float64)

    def first(self, split, key):
        """The first value of `key` in the records of `split`, without reading further; None without one."""
        with suppress(FileNotFoundError), open(self.path / "metrics.jsonl", "rb") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):  # no record: `records` says which line
                    record = json.loads(line)
                    if record["split"] == split and key in record:
                        return math.nan if record[key] is None else record[key]
        return None

    def names(self):
        """All SPLIT.KEY that the records have, "step" and "split" left out, in order of appearance."""
        return list(self._names)

    @cached_property
    def _names(self):
        return dict.fromkeys(
            f"{record['split']}.{key}" for record in self.records for key in record
            if key not in ("step", "split")
        )  # fmt: skip

    def _check_known(self, split, key):
        if key in METRICS.get(split, ()):
            return
        names = self.names()
        splits = {name.partition(".")[0] for name in names}
        if split in splits or (names and self.state == "finished"):
            raise InputError(
                f"{self.path} has no record of {split}.{key}{nearest(f'{split}.{key}', names)}; "
                f"it has {', '.join(names)}"
            )


def load(path):
    """The runs of a directory: itself, or a sweep's trials sorted by name.

    Returns
    -------
    list of Run

    Raises
    ------
    InputError
        When `path` is a file, or a folder without a run.
    FileNotFoundError
        When there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such run or sweep: {path}")
    if _is_run(path):
        return [Run(path)]
    trials = path / "trials"
    runs = [Run(trial) for trial in sorted(trials.iterdir()) if _is_run(trial)] if trials.is_dir() else []
    if not runs:
        raise InputError(
            f"{path} holds no run (config.toml, metrics.jsonl) and no sweep (trials/*/config.toml)"
        )
    return runs


def is_timing(key):
    """Whether a record's key tells of the machine: seconds, speed, memory; all others repeat exactly."""
    return _TIMING.fullmatch(key) is not None


def is_inside(key):
    """Whether a record's key is [monitor]'s: of a layer or module, or the ratio of update to weights."""
    return _INSIDE.fullmatch(key) is not None


def number(value):
    """A Tensor of one element as its number; all else as it is."""
    if isinstance(value, np.ndarray | type) or not callable(getattr(value, "item", None)):
        return value
    try:
        return value.item()  # known by this method: a module that reads records needs no tensors
    except (TypeError, ValueError, RuntimeError):
        return value


def plain(value):
    """A value for JSON: NumPy's and Tensors' numbers as Python's, NaN and infinity as None, paths as str."""
    value = number(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (float, np.floating)):  # a long double's item is one again
        value = float(value)
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _json(values, what, indent=None):
    """A dict as JSON text; an InputError that names the key which JSON cannot hold."""
    try:
        return json.dumps(plain(values), indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        for key, value in values.items():
            try:
                json.dumps(plain(value), allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                shape = getattr(value, "shape", ())
                shape = f" of shape {shape}" if isinstance(shape, tuple) and shape else ""
                given = f"{what.format(repr(str(key)))} is a {type(value).__name__}{shape}"
                raise InputError(
                    f"{given}, it must be a number, a text or a list of such, which JSON can hold"
                ) from None
        raise


def _is_run(path):
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl"))


def _lines(path):
    """The complete lines of a metrics.jsonl: each as bytes with its line end, and as a record.

    One after the other: all records at once would take four times the memory of the file.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not {"step", "split"} <= record.keys():
                raise ValueError('"step" or "split" is missing')
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break  # the process was killed while writing it
            raise InputError(f"{path}, line {number}, is not a record: {error}") from None
        yield line if line.endswith(b"\n") else line + b"\n", record


def _flat(nested, prefix=""):
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
