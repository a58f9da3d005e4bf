"""Files that appear whole or not at all, and folders that one process holds at a time.

All that writes a checkpoint goes through `os` as this module knows it, one call an operation: tests put
faults there.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from cllm.errors import InputError

__all__ = [
    "LOCK", "Lock", "clear_temporary", "create", "fsync", "is_temporary", "make_folder", "remove", "rename",
    "why", "write_atomic",
]  # fmt: skip

LOCK = ".lock"  # in a folder that a `Lock` holds
CHUNK = 1 << 20  # bytes hashed and then written, while they are in the cache
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.tmp")
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


# Files -----------------------------------------------------------------------------------------------


def create(path, parts):
    """Make a new file of buffers, one after the other, forced to the disk.

    Parameters
    ----------
    path : path-like
        In an existing folder; nothing may be there.
    parts : iterable of bytes-like
        One-dimensional, of bytes.

    Returns
    -------
    str
        The SHA-256 of the content in hexadecimal digits, computed on the way.

    Raises
    ------
    OSError
        Names the file, a part of which may be there.
    """
    digest = hashlib.sha256()
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), CHUNK):
                    piece = view[start : start + CHUNK]
                    digest.update(piece)
                    while piece:  # a system may write less than it was given
                        piece = piece[os.write(descriptor, piece) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return digest.hexdigest()


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
        When the folder is missing or not writable, or the disk is full: names `path`.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else memoryview(content).cast("B")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        create(temporary, [content])
        rename(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)  # the one that a user knows
        raise
    fsync(path.parent)


def is_temporary(name):
    """Whether a file of this name is what a killed process left of `write_atomic`."""
    return _TEMPORARY.fullmatch(name) is not None


def clear_temporary(folder):
    """Delete what killed processes left of `write_atomic`, where that can be; nobody may be writing."""
    for entry in Path(folder).iterdir():
        if is_temporary(entry.name):
            with suppress(OSError):
                os.unlink(entry)


def rename(source, target):
    """`source` takes the place of `target`, at once. OSError names the target."""
    with _naming(target):
        os.replace(source, target)


def make_folder(path):
    """Make a folder where there is none. OSError names it."""
    with suppress(FileExistsError):
        os.mkdir(path)


def remove(folder):
    """Delete a folder and all that is in it; links are deleted, not followed. OSError names what stays."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            remove(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(folder)


def fsync(path):
    """Push a file's bytes, or a folder's list of names, to the disk. OSError names it."""
    with _naming(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            return  # some systems open no folders
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def why(error):
    """An OSError in words: "No space left on device: runs/a/metrics.jsonl"."""
    plain = error.strerror is None or error.filename is None
    return str(error) if plain else f"{error.strerror}: {error.filename}"


@contextmanager
def _naming(path):
    """Let an OSError from a call on a descriptor say which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename2 is not None:
            error.filename, error.filename2 = str(path), None
        raise


# Locks -----------------------------------------------------------------------------------------------


class Lock:
    """A folder held by this process, until `release` or its end, however that comes.

    It is `flock` on the file ".lock", which says in words who holds it: the system lets go of it with its
    last owner, so a dead one holds nothing, and the file alone means nothing. A forked child gives up its
    share at once, or else it would hold the folder when its parent is gone. On NFS, Linux turns `flock` into
    a lock that the server keeps, between machines too; a file system without locks is used with a warning.

    Parameters
    ----------
    folder : path-like
        An existing folder.
    what : str
        What the folder is to the user, such as "run".

    Raises
    ------
    InputError
        When another process holds it, or this one does already; says who.
    OSError
        When ".lock" cannot be written.
    """

    _held = set()  # noqa: RUF012  (all of this process)

    def __init__(self, folder, what="run"):
        self.path = Path(folder) / LOCK
        while True:
            with _naming(self.path):
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take(folder, what)
                if self._is_there():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # its last owner deleted it after this process had opened it
        Lock._held.add(self)

    def _take(self, folder, what):
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.read(self._descriptor, 200).decode(errors="replace").strip()
            owner = said if said.isprintable() and said else "another process"
            raise InputError(
                f"{folder} is in use by {owner}; wait for the end of that {what}, or choose another directory"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): "
                f"start no second {what} in it",
                stacklevel=4,
            )
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with _naming(self.path):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{owner}\n".encode(), 0)

    def _is_there(self):
        """Whether the file that was locked is still the one of its name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        return False

    def release(self):
        """Let go, and delete the file. A second call does nothing."""
        if self in Lock._held:
            Lock._held.discard(self)
            with suppress(OSError):
                os.unlink(self.path)  # before closing: afterwards it may be another's
            with suppress(OSError):  # it is closed all the same
                os.close(self._descriptor)

    @classmethod
    def _forked(cls):
        for lock in cls._held:
            os.close(lock._descriptor)
        cls._held.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


os.register_at_fork(after_in_child=Lock._forked)
