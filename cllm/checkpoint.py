"""Checkpoints: all that resuming needs, there whole or not at all, and verified on reading.

``RUN/checkpoints/step-00000600/`` has model.safetensors, optimizer.safetensors and state.json, which holds
the SHA-256 of each part. It is written as a hidden folder, forced to the disk, and then renamed.
No part has a timestamp, so equal runs have equal arrays in equal files. `cllm.guard` keeps steps that went
wrong in the same way, as other parts in another folder: `write` and `read` are for both.
"""

import hashlib
import json
import re
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from cllm import arrays as array_files
from cllm import files
from cllm.errors import InputError

__all__ = [
    "best", "clear", "entry", "folders", "listed", "load", "load_newest", "newest", "prune", "read", "remove",
    "save", "step_of", "tidy", "verify", "write",
]  # fmt: skip

ARRAY_FILES = ("model.safetensors", "optimizer.safetensors")
STEP = re.compile(r"step-(\d{8,})", re.ASCII)


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
        When it cannot be written: names the file. Other checkpoints are as they were, one of the same step
        too, and nothing is left that a later `save` would meet.
    """
    return write(_folder(run_dir), step, dict(zip(ARRAY_FILES, (model_arrays, optimizer_arrays))), state)


def write(folder, step, parts, state):
    """As `save`, for parts and a folder of any name: `parts` is a dict of file names to dicts of arrays."""
    _sha256(step, state, {})  # first of all, as it refuses what is not JSON
    folder = Path(folder)
    files.make_folder(folder)
    files.fsync(folder.parent)  # each time, as it may have failed when the folder was made
    _tidy(folder)
    final = folder / f"step-{step:08d}"
    temporary, old = folder / f".{final.name}.tmp", folder / f".{final.name}-old.tmp"
    try:
        files.make_folder(temporary)
        hashes = {name: array_files.write(temporary / name, arrays) for name, arrays in parts.items()}
        hashes["state"] = _sha256(step, state, hashes)
        files.create(temporary / "state.json", [_text({"step": step, "state": state, "sha256": hashes})])
        files.fsync(temporary)
        if final.exists():
            files.rename(final, old)
        files.rename(temporary, final)
    except BaseException:
        _tidy(folder)
        raise
    files.fsync(folder)
    _tidy(folder)
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
    (model_arrays, optimizer_arrays), state = read(path, ARRAY_FILES)
    return model_arrays, optimizer_arrays, state


def read(path, names):
    """As `load`, for parts of these names: a list of their dicts of arrays, and the state."""
    path = Path(path)
    found = entry(path, names)
    loaded = []
    for name in names:
        with _whole(path / name):
            arrays, sha256 = array_files.read(path / name)
        _check(path / name, sha256, found)
        loaded.append(arrays)
    return loaded, {**found["state"], "step": found["step"]}


def newest(run_dir, only_planned=False):
    """The newest complete checkpoint's folder, or None.

    With `only_planned` it is one that the run would have if it had never been stopped: not one whose state
    says ``"planned": false``.

    Warns
    -----
    UserWarning
        For each damaged one on the way: names it, and why it was passed over.
    """
    return _first(run_dir, verify, _is_planned if only_planned else None)


def load_newest(run_dir, only_best=False):
    """The newest complete checkpoint, or the `best`, as `load` gives it; None when there is none.

    Each file is read once, and a run that deletes old checkpoints meanwhile does no harm. Warns as `newest`.
    """
    return _first(run_dir, load, _is_best if only_best else None)


def best(run_dir):
    """The complete checkpoint with the lowest validation loss, or None when none was measured.

    That is the newest one whose state says that the best evaluation was at its own step. Warns as `newest`.
    """
    return _first(run_dir, verify, _is_best)


def prune(run_dir, keep=2):
    """Delete all but the `keep` newest checkpoints and the best one. OSError names one that stays.

    One that is not planned, see `newest`, takes no other's place, and is kept while it is the newest.
    """
    paths = listed(run_dir)
    kept = {*paths[-1:], *[path for path in paths if _is_planned(path)][-keep:]}
    kept |= set([path for path in paths if _is_best(path)][-1:])
    for path in paths:
        if path not in kept:
            remove(path)


def clear(run_dir):
    """Delete all checkpoints."""
    for path in listed(run_dir):
        remove(path)


def remove(path):
    """Delete a checkpoint so that a half-deleted one never passes for one. OSError names what stays."""
    doomed = path.with_name(f".{path.name}-gone.tmp")
    files.rename(path, doomed)
    files.remove(doomed)


def listed(run_dir):
    """The checkpoints' folders by step, complete or damaged; what is being written has another name."""
    return folders(_folder(run_dir))


def folders(folder):
    """What `write` has made in a folder, by step."""
    return sorted((path for path in Path(folder).glob("step-*") if STEP.fullmatch(path.name)), key=step_of)


def step_of(path):
    """The step that a checkpoint's folder is named after."""
    return int(STEP.fullmatch(Path(path).name)[1])


def tidy(run_dir):
    """Clear away what a killed process left, as far as possible; nobody else may be writing."""
    _tidy(_folder(run_dir))


def entry(path, names=ARRAY_FILES):
    """A checkpoint's state.json, verified by itself: a dict of "step", "state", "sha256" of the named parts.

    Raises
    ------
    InputError
        When it is damaged or missing: names the file.
    FileNotFoundError
        When there is no such checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    file = path / "state.json"
    with _whole(file):
        content = file.read_bytes()
    try:
        found = json.loads(content)
        intact = (
            content == _text(found)  # every byte, not only what they mean
            and found["sha256"].keys() == {*names, "state"}
            and found["sha256"].pop("state") == _sha256(found["step"], found["state"], found["sha256"])
            and isinstance(found["state"], dict)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise InputError(f"{file} is damaged: it does not match its own SHA-256")
    named = STEP.fullmatch(path.resolve().name)  # a copy may have another name
    if type(found["step"]) is not int or (named and int(named[1]) != found["step"]):
        raise InputError(f"{file} is of step {found['step']}, which its folder's name does not say")
    return found


def _folder(run_dir):
    return Path(run_dir) / "checkpoints"


def _tidy(folder):
    for leftover in list(folder.glob(".step-*.tmp")):
        final = leftover.with_name(leftover.name[1:].removesuffix("-old.tmp"))
        with suppress(OSError):
            if leftover.name.endswith("-old.tmp") and not final.exists():
                files.rename(leftover, final)  # replaced, but the new one did not come to its place
            else:
                files.remove(leftover)


def _first(run_dir, read, wanted=None):
    """What `read` gives of the newest checkpoint that is whole; the damaged ones before it are named.

    The folder is listed anew after each: while a run trains, old checkpoints go and new ones come.
    """
    seen = set()
    while left := [path for path in listed(run_dir) if path not in seen and (wanted is None or wanted(path))]:
        path = left[-1]
        seen.add(path)
        try:
            return read(path)
        except (InputError, OSError) as error:
            if path.exists():  # else the run has deleted it
                said = files.why(error) if isinstance(error, OSError) else error
                warnings.warn(f"passed over a damaged checkpoint: {said}", stacklevel=3)
    return None


def verify(path):
    """The path of a checkpoint, after all hashes agreed."""
    found = entry(path)
    for name in ARRAY_FILES:
        with _whole(path / name), open(path / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _check(path / name, sha256, found)
    return path


@contextmanager
def _whole(file):
    """Let a part that is not there be damage: the checkpoint itself is."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None


def _check(file, sha256, found):
    if sha256 != found["sha256"][file.name]:
        raise InputError(f"{file} is damaged: its SHA-256 is not the one in state.json")


def _is_best(path):
    state, step = _state(path)
    best = state.get("best")
    return isinstance(best, dict) and best.get("step") == step


def _is_planned(path):
    return _state(path)[0].get("planned", True)


def _state(path):
    """A checkpoint's state and step; of a damaged one nothing is known."""
    try:
        found = entry(path)
    except (InputError, OSError):
        return {}, None
    return found["state"], found["step"]


def _text(entry):
    return (json.dumps(entry, indent=2) + "\n").encode()


def _sha256(step, state, hashes):
    # Through JSON, so that what was written and what is read back hash alike (a tuple is a list there).
    text = json.dumps([step, json.loads(json.dumps(state, allow_nan=False)), hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
