"""Two runs pointed at one directory: the second is refused, by a lock that a dead owner does not hold."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import kills
import pytest

from cllm import files, train
from cllm.errors import InputError
from cllm.files import LOCK, Lock
from cllm.lifecycle import TERMINATED
from cllm.progress import Silent

OWNER = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"


# The lock --------------------------------------------------------------------------------------------


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    with Lock(tmp_path):
        for what in ("run", "sweep"):
            with pytest.raises(InputError, match=rf"is in use by {OWNER}; wait for the end of that {what},"):
                Lock(tmp_path, what)
    assert list(tmp_path.iterdir()) == []
    lock = Lock(tmp_path)
    lock.release()
    with Lock(tmp_path):
        lock.release()  # a second time: not the other one's
        with pytest.raises(InputError):
            Lock(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"no\nowner"])
def test_an_owner_that_does_not_say_who_it_is(tmp_path, content):
    with Lock(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(InputError, match=r"is in use by another process; wait"):
            Lock(tmp_path)


def owner(folder, then):
    """A process that holds a folder, and whose last words are what it said before `then`."""
    script = f"import os, signal, sys, time\nfrom cllm.files import Lock\nlock = Lock(sys.argv[1])\n{then}"
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)


def test_a_dead_owner_holds_nothing(tmp_path):
    process = owner(tmp_path, "print('held', flush=True); time.sleep(600)")
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"is in use by process {process.pid} on "):
            Lock(tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / LOCK).is_file()  # which means nothing by itself
    with Lock(tmp_path), pytest.raises(InputError, match=f"is in use by {OWNER}"):
        Lock(tmp_path)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "lock.release()"])
def test_a_child_that_outlives_the_owner_holds_nothing(tmp_path, death):
    # The child says that it is there: what it inherited is closed before fork() returns in it.
    fork = "if os.fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    process = owner(tmp_path, fork + death)
    child = int(process.stdout.readline())
    try:
        process.wait(60)
        os.kill(child, 0)  # it lives
        with Lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_child_cannot_release_what_its_parent_holds(tmp_path):
    with Lock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(InputError, match="is in use"):
            Lock(tmp_path)


def test_a_file_that_its_last_owner_deletes_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
    """A second one opens the file, the first deletes it and lets go: then the second locks what none sees."""
    first, flock = Lock(tmp_path), fcntl.flock

    def late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Lock(tmp_path), pytest.raises(InputError, match="is in use"):
        Lock(tmp_path)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"without locks \(.*\): start no second run in it"), Lock(tmp_path):
        pass
    monkeypatch.setattr(files, "_NO_LOCKS", ())
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        Lock(tmp_path)


# Runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def config(text_file):
    return {**kills.CONFIG, "data.source": str(text_file), "train.max_steps": 30, "guard.policy": "skip"}


def fit(config, run_dir, callbacks=()):
    return train.Trainer({**config, "run.dir": str(run_dir)}, callbacks=callbacks, progress=Silent()).fit()


def at(step, function):
    def callback(trainer, record):
        if trainer.step == step and record["split"] == "train":
            function()

    return callback


def cllm(*words):
    return subprocess.run([sys.executable, "-m", "cllm", *words], capture_output=True, text=True)


@pytest.mark.parametrize("first", ["fit", "resume"])
def test_a_second_run_is_refused_and_the_first_is_as_if_it_had_not_been(config, tmp_path, first):
    run_dir, tried = tmp_path / "run", []

    def others():
        source = f"--data.source={config['data.source']}"
        for command in (["train", source, f"--run.dir={run_dir}"], ["resume", str(run_dir)]):
            done = cllm(*command)
            tried.append(done)
            assert done.returncode == 2 and done.stdout == "", done
            assert re.fullmatch(rf"cllm: \S+ is in use by {OWNER}; wait for .*\n", done.stderr), done
        for function in (lambda: fit(config, run_dir), lambda: train.resume(run_dir, progress=Silent())):
            with pytest.raises(InputError, match=f"is in use by {OWNER}"):
                function()
            tried.append(function)

    fit(config, tmp_path / "alone")
    if first == "fit":
        fit(config, run_dir, [at(13, others)])
    else:
        with pytest.raises(SystemExit):
            fit(config, run_dir, [at(4, lambda: os.kill(os.getpid(), signal.SIGTERM))])
        train.resume(run_dir, callbacks=[at(13, others)], progress=Silent())
    assert len(tried) == 4
    assert kills.differences(tmp_path / "alone", run_dir) == []


def test_of_several_that_begin_at_once_one_trains(config, tmp_path):
    assert kills.ended(kills.start(config, tmp_path / "alone"))[1]
    processes = [kills.start(config, tmp_path / "run") for _ in range(4)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in ends].count(0) >= 1, ends
    refused = re.compile(r"InputError: .*(is in use by process \d+ on|already holds a run)")
    assert all(code == 0 or refused.search(said) for said, code in ends), ends
    assert kills.differences(tmp_path / "alone", tmp_path / "run") == []


def test_a_run_whose_owner_was_killed_goes_on(config, tmp_path):
    assert kills.ended(kills.start(config, tmp_path / "alone"))[1]
    run_dir = tmp_path / "run"
    for n in (12, 9):  # records: the second time it is a resumed run that is killed
        _, ended = kills.ended(kills.start(config, run_dir, "records", n, "after"))
        assert not ended and (run_dir / LOCK).is_file()
    assert kills.ended(kills.start(config, run_dir))[1]
    assert kills.differences(tmp_path / "alone", run_dir) == []


def test_killed_before_it_wrote_anything_the_directory_is_still_new(config, tmp_path):
    run_dir = tmp_path / "run"
    places = []
    for n in range(1, 15, 2):
        lines, ended = kills.ended(kills.start(config, run_dir, "files", n, "before"))
        assert not ended
        places += lines
        if (run_dir / "config.toml").exists():
            break
    assert any(LOCK in place for place in places) and any("config.toml" in place for place in places)
    train.resume(run_dir, callbacks=[kills.draw], progress=Silent())


@pytest.mark.parametrize("end", ["finished", "SIGTERM", "an error", "diverged", "refused"])
def test_whatever_ends_a_run_lets_go_of_its_directory(config, tmp_path, end):
    run_dir = tmp_path / "run"

    def fail():
        raise ZeroDivisionError

    if end == "finished":
        fit(config, run_dir)
    elif end == "SIGTERM":
        with pytest.raises(SystemExit) as stopped:
            fit(config, run_dir, [at(4, lambda: os.kill(os.getpid(), signal.SIGTERM))])
        assert stopped.value.code == TERMINATED
    elif end == "an error":
        with pytest.raises(ZeroDivisionError):
            fit(config, run_dir, [at(4, fail)])
    elif end == "diverged":
        config |= {"guard.policy": "stop", "optim.name": "sgd", "optim.lr": 1e30, "optim.grad_clip": 0.0}
        del config["schedule.warmup_steps"]
        assert fit({**config, "train.max_steps": 200}, run_dir)["state"] == "failed"
    else:
        fit(config, run_dir)
        os.unlink(config["data.source"])
        with pytest.raises((InputError, OSError)):
            train.resume(run_dir, {"train.max_steps": 40}, progress=Silent())
    assert not (run_dir / LOCK).exists()
    Lock(run_dir).release()
