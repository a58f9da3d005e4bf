"""Faults in each operation on files: one clear error, what was there stays whole, training goes on or is resumed.

Two classes stand in for `os` where cllm writes: `Faulty` lets one operation go wrong, or all from there on.
What a system does by itself when a file may not grow is tried in a process of its own.
"""

import errno
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cllm import checkpoint, cli, data, files, guard, records
from cllm import config as configs
from cllm.data import cache
from cllm.progress import Silent
from cllm.train import Trainer, resume

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT)
OPERATIONS = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir", "scandir", "ftruncate", "pwrite")
CHANGES = ("create", "write", "fsync", "replace", "mkdir", "ftruncate", "pwrite")
# What a system that is broken in one way refuses from then on.
LASTING = {
    "full disk": (errno.ENOSPC, ("create", "write", "fsync", "mkdir", "pwrite")),
    "no room in folders": (errno.ENOSPC, ("create", "mkdir", "replace")),
    "read-only": (errno.EROFS, (*CHANGES, "unlink", "rmdir")),
    "read-only folder": (errno.EACCES, ("create", "mkdir", "replace", "unlink", "rmdir")),
    "broken disk": (errno.EIO, (*CHANGES, "unlink", "rmdir", "scandir", "open")),
}  # fmt: skip


class Faulty:
    """`os`, in which one operation goes wrong.

    Parameters
    ----------
    at : int
        Which one, from 0; in the end `seen` has all that there were: (operation, path).
    code : int, optional
        The error; None lets it pass.
    refused : tuple of str
        What fails with the error from there on, too.
    short : bool
        Only half of the bytes are written before the error comes, or instead of it.
    """

    def __init__(self, at=-1, code=None, refused=(), short=False):
        self.at, self.code, self.refused, self.short = at, code, refused, short
        self.seen, self.paths = [], {}

    def __getattr__(self, name):
        call = getattr(os, name)
        return self._watched(name, call) if name in OPERATIONS else call

    def _watched(self, name, call):
        def operation(*args, **options):
            kind = "create" if name == "open" and args[1] & os.O_CREAT else name
            path = self.paths.get(args[0]) if isinstance(args[0], int) else os.fspath(args[-1 if name == "replace" else 0])
            here = len(self.seen) == self.at
            self.seen.append((kind, path))
            if here and self.short and name == "write" and len(args[1]) > 1:
                if self.code is not None:
                    self.at += 1  # the other half fails
                return call(args[0], args[1][: len(args[1]) // 2])
            if self.code is not None and (here or (len(self.seen) > self.at >= 0 and kind in self.refused)):
                if name == "close":
                    call(*args)  # it is closed all the same
                named = () if isinstance(args[0], int) else (os.fspath(args[0]),)
                if name == "replace":
                    named += None, os.fspath(args[1])
                raise OSError(self.code, os.strerror(self.code), *named)
            found = call(*args, **options)
            if name == "open":
                self.paths[found] = os.fspath(args[0])
            return found

        return operation


@pytest.fixture
def faults(monkeypatch):
    """Put a Faulty in the place of `os`; None takes it away."""

    def use(faulty):
        for module in (files, records):
            monkeypatch.setattr(module, "os", faulty or os)
        return faulty

    return use


def arrays(seed):
    generator = np.random.default_rng(seed)
    return {"a": generator.normal(size=300), "b": generator.integers(9, size=(4, 5))}


def save(run_dir, step, seed):
    return checkpoint.save(run_dir, step, arrays(seed), arrays(seed + 100), {"seed": seed})


def holds(path, seed):
    """Whether a checkpoint is whole and that of `seed`."""
    model, optimizer, state = checkpoint.load(path)
    return state["seed"] == seed and all(
        found.keys() == wanted.keys() and all(found[k].tobytes() == wanted[k].tobytes() for k in wanted)
        for found, wanted in ((model, arrays(seed)), (optimizer, arrays(seed + 100)))
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# One checkpoint -------------------------------------------------------------------------------------


class Place:
    """A run's folder with a checkpoint of step 1 and perhaps one of step 2, which is then written (again)."""

    def __init__(self, root, faults, replaces):
        self.root, self.faults, self.replaces, self.n = root, faults, replaces, 0

    def write(self, faulty):
        """Save step 2 in a fresh folder; the error, or None."""
        self.n += 1
        self.run_dir = self.root / str(self.n)
        self.run_dir.mkdir()
        self.one = save(self.run_dir, 1, seed=1)
        if self.replaces:
            save(self.run_dir, 2, seed=2)
        self.two = self.one.with_name("step-00000002")
        self.faults(faulty)
        try:
            assert save(self.run_dir, 2, seed=3) == self.two
        except OSError as error:
            return error
        finally:
            self.faults(None)
        return None

    def check(self, error, written):
        """All that is there is whole, step 2 is new if it was `written`; and the next one leaves nothing over."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert holds(self.one, 1)
            assert checkpoint.newest(self.run_dir) == (self.two if written or self.replaces else self.one)
        if written or self.replaces:
            assert holds(self.two, 3 if written else 2)
        assert error is not None or written
        save(self.run_dir, 2, seed=4)
        assert holds(self.one, 1) and holds(self.two, 4)
        assert names(self.one.parent) == ["step-00000001", "step-00000002"]


@pytest.fixture(params=[False, True], ids=["new", "replaces"])
def place(request, tmp_path, faults):
    return Place(tmp_path, faults, request.param)


def test_what_is_counted(place):
    """All that writing a checkpoint does, so that no operation is left out below."""
    place.write(seen := Faulty())
    kinds = [kind for kind, _ in seen.seen]
    assert kinds.count("create") == 3 and kinds.count("write") == 4 + 4 + 1
    assert kinds.count("fsync") == 6 and kinds.count("replace") == 1 + place.replaces
    assert kinds.count("close") == kinds.count("create") + kinds.count("open")
    assert ("rmdir" in kinds) == place.replaces
    assert all(place.run_dir == Path(path) or place.run_dir in Path(path).parents for _, path in seen.seen)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_each_operation_fails_once(place, code):
    place.write(whole := Faulty())
    last = max(i for i, (kind, _) in enumerate(whole.seen) if kind == "replace")
    for at, (kind, _) in enumerate(whole.seen):
        error = place.write(faulty := Faulty(at, code))
        # Deleting what is left over can wait, and some systems let nobody open a folder.
        passes = kind in ("scandir", "unlink", "rmdir") or (kind == "open" and code == errno.EACCES)
        assert (error is None) == passes, (at, kind)
        if error is not None:
            assert error.errno == code and error.filename == faulty.seen[at][1]
            assert files.why(error) == f"{os.strerror(code)}: {error.filename}"
        place.check(error, written=at > last or passes)


@pytest.mark.parametrize("what", LASTING)
def test_from_each_operation_on_all_fail(place, what):
    code, refused = LASTING[what]
    place.write(whole := Faulty())
    last = max(i for i, (kind, _) in enumerate(whole.seen) if kind == "replace")
    for at, (kind, _) in enumerate(whole.seen):
        if kind not in refused:
            continue
        error = place.write(Faulty(at, code, refused))
        assert holds(place.one, 1)
        checkpoint.tidy(place.run_dir)  # what resuming does first, now that it can
        place.check(error, written=at > last)


def test_short_writes(place):
    place.write(whole := Faulty())
    expected = {path.name: path.read_bytes() for path in place.two.iterdir()}
    for at, (kind, _) in enumerate(whole.seen):
        if kind != "write":
            continue
        assert place.write(Faulty(at, short=True)) is None
        assert {path.name: path.read_bytes() for path in place.two.iterdir()} == expected
        place.check(None, written=True)
        error = place.write(faulty := Faulty(at, errno.ENOSPC, short=True))
        assert error.errno == errno.ENOSPC and error.filename == faulty.seen[at + 1][1]
        place.check(error, written=False)


def test_what_cannot_be_renamed_back_is_not_deleted(tmp_path, faults):
    """The old one has gone out of the way, the new one cannot come, and the old one cannot come back."""
    place = Place(tmp_path, faults, replaces=True)
    place.write(whole := Faulty())
    second = [i for i, (kind, _) in enumerate(whole.seen) if kind == "replace"][1]
    assert place.write(Faulty(second, errno.ENOSPC, ("replace",))) is not None
    assert not place.two.exists()
    checkpoint.tidy(place.run_dir)
    assert holds(place.two, 2)


def test_files_that_may_not_grow(tmp_path):
    """The system's own short writes and errors: RLIMIT_FSIZE, in a process of its own."""
    whole = save(tmp_path, 1, seed=1)
    sizes = {path.stat().st_size for path in whole.iterdir()}
    script = f"""
import resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_faults import save
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in range(0, {max(sizes)}, 97):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save({str(tmp_path)!r}, 2, seed=2)
    except OSError as error:
        print(error.errno, error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, ({max(sizes)}, hard))
save({str(tmp_path)!r}, 3, seed=3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(range(0, max(sizes), 97))
    folder = tmp_path / "checkpoints" / ".step-00000002.tmp"
    assert set(lines) <= {f"{errno.EFBIG} {folder / name}" for name in os.listdir(whole)}
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000003"]
    assert holds(whole, 1) and holds(whole.with_name("step-00000003"), 3)
