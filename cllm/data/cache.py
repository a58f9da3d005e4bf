"""Token files on disk, by a key made of everything that they follow from. Safe to delete at any time.

``tokens/KEY.bin`` has the tokens, ``KEY.json`` their description and a hash over both. Several processes may
write one key at once: their files are the same, and each is renamed into place whole. ``scans/KEY.json``
has what `scan` found in a user's token file, which may be larger than memory: it is read once.
"""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np

from cllm.errors import InputError
from cllm.files import write_atomic

__all__ = ["folder", "read", "scan", "write"]

DTYPES = ("|u1", "<u2", "<u4")  # of cached tokens
SCAN_BYTES = 1 << 22  # read at once
# A file that was changed less than this before it was read could be changed again under the same times.
SETTLED = 2e9  # nanoseconds
LONG = 4 << 30  # bytes from which on a user is told why nothing happens: 3 s


def folder():
    """$CLLM_CACHE, else $XDG_CACHE_HOME/cllm, else ~/.cache/cllm. OSError when there is no home folder."""
    if os.environ.get("CLLM_CACHE"):
        return Path(os.environ["CLLM_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "cllm"
    try:
        return Path.home() / ".cache" / "cllm"
    except RuntimeError:
        raise OSError("there is no home folder") from None


def read(key):
    """The tokens (memory-mapped, read-only) and their description; None when missing or damaged.

    Warns
    -----
    UserWarning
        When they are damaged: names the file.
    """
    try:
        path = folder() / "tokens" / key
        content = path.with_suffix(".json").read_bytes()
        entry = json.loads(content)
        description = entry["description"]
        if description["dtype"] in DTYPES and content == _text(entry):  # every byte, not only the meaning
            array = np.asarray(np.memmap(path.with_suffix(".bin"), description["dtype"], mode="r"))
            if entry["sha256"] == _sha256(array, description):
                return array, description
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    warnings.warn(
        f"{path}.bin and its .json are damaged, they do not match; the text is tokenised again",
        stacklevel=3,
    )
    return None


def write(key, array, description):
    """Keep tokens under a key. Raises OSError where that cannot be written."""
    path = folder() / "tokens" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"sha256": _sha256(array, description), "description": description}
    write_atomic(path.with_suffix(".bin"), array.data)
    write_atomic(path.with_suffix(".json"), _text(entry))


def scan(path, dtype):
    """The SHA-256 of a token file's bytes and its largest token; read in pieces, and only after a change.

    A change is another path, size, inode, or time of change (of content or of anything).

    Parameters
    ----------
    path : Path
    dtype : NumPy dtype of integers
        Of the tokens.

    Returns
    -------
    sha256 : str
        In hexadecimal.
    largest : int

    Raises
    ------
    OSError
        When the file cannot be read.
    InputError
        When it is changed meanwhile.

    Warns
    -----
    UserWarning
        When that will take long.
    """
    identity = _identity(path, dtype)
    name = hashlib.sha256(repr(identity).encode()).hexdigest() + ".json"
    try:
        entry = json.loads((folder() / "scans" / name).read_bytes())
        if entry["check"] == _check(identity, entry["sha256"], entry["largest"]):
            return entry["sha256"], entry["largest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    if identity[3] >= LONG:
        warnings.warn(
            f"{path} is read once to take its hash, about {identity[3] / 1.2e9:.0f} s on a fast disk; "
            "later runs remember it",
            stacklevel=2,
        )
    digest, largest, buffer = hashlib.sha256(), 0, bytearray(min(SCAN_BYTES, identity[3]))
    with open(path, "rb", buffering=0) as file:
        while n := _fill(file, buffer):
            digest.update(memoryview(buffer)[:n])
            largest = max(largest, int(np.frombuffer(buffer, dtype, n // dtype.itemsize).max(initial=0)))
    if _identity(path, dtype) != identity:
        raise InputError(f"{path} was changed while it was read; wait until nothing writes to it")
    sha256 = digest.hexdigest()
    if time.time_ns() - max(identity[-2:]) > SETTLED:
        entry = {"check": _check(identity, sha256, largest), "sha256": sha256, "largest": largest}
        try:
            (folder() / "scans").mkdir(parents=True, exist_ok=True)
            write_atomic(folder() / "scans" / name, json.dumps(entry))
        except OSError:
            pass  # the next run reads the file again
    return sha256, largest


def _identity(path, dtype):
    stat = os.stat(path)
    return str(path.resolve()), dtype.str, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _check(identity, sha256, largest):
    return hashlib.sha256(repr((identity, sha256, largest)).encode()).hexdigest()


def _fill(file, buffer):
    """Read until the buffer is full or the file at its end; how many bytes."""
    n, view = 0, memoryview(buffer)
    while n < len(buffer) and (more := file.readinto(view[n:])):
        n += more
    return n


def _text(entry):
    return json.dumps(entry, indent=1).encode()


def _sha256(array, description):
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(array.data)
    return digest.hexdigest()
