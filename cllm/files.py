"""Files that appear whole or not at all."""

import os
import secrets
from pathlib import Path

__all__ = ["fsync", "write_atomic"]


def write_atomic(path, content):
    """Write a file under a temporary name beside `path`, then rename it there.

    A reader sees the old content or the new, never a part; several processes may write the same path
    at once. When writing fails, the old file is still there and the temporary one is gone.

    Parameters
    ----------
    path : path-like
        In an existing folder.
    content : str, bytes or buffer
        A str is written as UTF-8.

    Raises
    ------
    OSError
        When the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path):
    """Push a file's bytes, or a folder's list of names, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
