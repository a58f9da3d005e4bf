"""Checkpoints: all that resuming needs, there whole or not at all, and verified on reading.

``RUN/checkpoints/step-00000600/`` has model.safetensors, optimizer.safetensors and state.json, which holds
the SHA-256 of each part. It is written as a hidden folder, forced to the disk, and then renamed.
No part has a timestamp, so equal runs have equal files.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np

from cllm.errors import InputError
from cllm.files import fsync

__all__ = ["best", "clear", "load", "newest", "prune", "save"]

ARRAY_FILES = ("model.safetensors", "optimizer.safetensors")


def save(run_dir, step, model_arrays, optimizer_arrays, state):
    """Write the checkpoint of a step; what a killed process left unfinished is cleared away first.

    Parameters
    ----------
    run_dir : path-like
        An existing folder.
    step : int
        Updates done.
    model_arrays, optimizer_arrays : dict of str to ndarray
        By name; either may be empty.
    state : dict
        JSON values: counters, the loader's position, versions. ``state["best"]["step"]`` equal to this
        step marks the checkpoint as the best so far, see `best`. NaN is refused, as JSON has none.

    Returns
    -------
    Path
        The checkpoint's folder. An earlier checkpoint of the same step is replaced.

    Raises
    ------
    OSError
        When it cannot be written; no checkpoint of that step is then there but an earlier one.
    """
    from safetensors.numpy import save_file

    state_sha256 = _state_sha256(step, state)  # first of all, as it refuses what is not JSON
    folder = _folder(run_dir)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    hashes = {}
    for name, arrays in zip(ARRAY_FILES, (model_arrays, optimizer_arrays)):
        path = temporary / name
        save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, path)
        fsync(path)
        hashes[name] = _sha256(path)
    text = json.dumps(
        {"step": step, "state": state, "sha256": {**hashes, "state": state_sha256}}, indent=2
    )  # fmt: skip
    (temporary / "state.json").write_text(text + "\n", encoding="utf-8")
    fsync(temporary / "state.json")
    fsync(temporary)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    fsync(folder)
    fsync(folder.parent)
    return final


def load(path):
    """Read a checkpoint back, verified.

    Returns
    -------
    model_arrays, optimizer_arrays : dict of str to ndarray
        Writable, and the caller's own.
    state : dict
        As it was given to `save`, with "step".

    Raises
    ------
    InputError
        When a part is damaged or missing: names the file.
    FileNotFoundError
        When there is no such checkpoint.
    """
    from safetensors.numpy import load_file

    path = Path(path)
    entry = _verified(path)
    model_arrays, optimizer_arrays = (load_file(path / name) for name in ARRAY_FILES)
    return model_arrays, optimizer_arrays, {**entry["state"], "step": entry["step"]}


def newest(run_dir):
    """The newest complete checkpoint's folder, or None.

    Warns
    -----
    UserWarning
        For each damaged one on the way: names it, and why it was passed over.
    """
    return _first_complete(reversed(_all(run_dir)))


def best(run_dir):
    """The complete checkpoint with the lowest validation loss, or None when none was measured.

    That is the newest one whose state says that the best evaluation was at its own step. Warns as `newest`.
    """
    return _first_complete(path for path in reversed(_all(run_dir)) if _is_best(path))


def prune(run_dir, keep=2):
    """Delete all checkpoints but the `keep` newest and the best one."""
    paths = _all(run_dir)
    kept = set(paths[-keep:]) | set([path for path in paths if _is_best(path)][-1:])
    for path in paths:
        if path not in kept:
            _remove(path)


def clear(run_dir):
    """Delete all checkpoints."""
    for path in _all(run_dir):
        _remove(path)


def _folder(run_dir):
    return Path(run_dir) / "checkpoints"


def _all(run_dir):
    """The checkpoints by step, complete or damaged; what is still being written has another name."""
    return sorted(_folder(run_dir).glob("step-*"), key=lambda path: (len(path.name), path.name))


def _first_complete(paths):
    for path in paths:
        try:
            _verified(path)
            return path
        except (InputError, OSError) as error:
            warnings.warn(f"passed over a damaged checkpoint: {error}", stacklevel=3)
    return None


def _verified(path):
    """A checkpoint's state.json, after all hashes agreed."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    entry = _entry(path)
    for name in ARRAY_FILES:
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing")
        if _sha256(path / name) != entry["sha256"][name]:
            raise InputError(f"{path / name} is damaged: its SHA-256 is not the one in state.json")
    return entry


def _entry(path):
    path = path / "state.json"
    try:
        entry = json.loads(path.read_bytes())
        intact = (
            entry["sha256"]["state"] == _state_sha256(entry["step"], entry["state"])
            and set(ARRAY_FILES) <= entry["sha256"].keys()
        )
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged: it does not match its own SHA-256")
    return entry


def _is_best(path):
    try:
        entry = _entry(path)
    except (InputError, OSError):
        return False
    return (entry["state"].get("best") or {}).get("step") == entry["step"]


def _remove(path):
    """Delete a checkpoint so that a half-deleted one never passes for one."""
    doomed = path.with_name(f".{path.name}-old.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_sha256(step, state):
    # Through JSON, so that what was written and what is read back hash alike (a tuple is a list there).
    text = json.dumps([step, json.loads(json.dumps(state, allow_nan=False))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
