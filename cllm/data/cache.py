"""Token files on disk, by a key made of everything that they follow from. Safe to delete at any time.

``KEY.bin`` has the tokens, ``KEY.json`` their description and a hash over both. Several processes may write
one key at once: their files are the same, and each is renamed into place whole.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from cllm.files import write_atomic

__all__ = ["folder", "read", "write"]


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
    """The tokens (memory-mapped, read-only) and their description; None when missing or damaged."""
    try:
        path = folder() / "tokens" / key
        entry = json.loads(path.with_suffix(".json").read_bytes())
        description = entry["description"]
        array = np.asarray(np.memmap(path.with_suffix(".bin"), description["dtype"], mode="r"))
        if entry["sha256"] != _sha256(array, description):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return array, description


def write(key, array, description):
    """Keep tokens under a key. Raises OSError where that cannot be written."""
    path = folder() / "tokens" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"sha256": _sha256(array, description), "description": description}
    write_atomic(path.with_suffix(".bin"), array.data)
    write_atomic(path.with_suffix(".json"), json.dumps(entry, indent=1))


def _sha256(array, description):
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(array.data)
    return digest.hexdigest()
