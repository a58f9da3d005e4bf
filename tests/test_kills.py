"""Runs that are stopped at the worst moments, by kills and by signals, end as one that was left alone."""

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import kills
import numpy as np
import pytest
import soak

from cllm import checkpoint, files, records, train, userfile
from cllm._core import pool
from cllm.guard import Guard
from cllm.progress import Silent


class Killed(BaseException):
    """The end of a process, as far as the code that it meets is concerned."""


@pytest.fixture
def config(text_file):
    return {**kills.CONFIG, "data.source": str(text_file), "train.max_steps": 30, "guard.policy": "skip"}


def fit(config, run_dir, callbacks=()):
    return train.Trainer({**config, "run.dir": str(run_dir)}, callbacks=callbacks, progress=Silent()).fit()


def assert_same(alone, run_dir):
    assert kills.differences(alone, run_dir) == []


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_survives_kills(policy):
    said = []
    assert kills.run(6, seed=1, policy=policy, say=said.append), said


def test_kills_that_changed_something_would_be_seen(config, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        fit({**config, "train.seed": seed}, tmp_path / name)
    found = " ".join(kills.differences(tmp_path / "a", tmp_path / "b"))
    for what in ("model.safetensors", "optimizer.safetensors", "state", "summary", "record 1"):
        assert f"{what}: differs" in found


# The moments between two files ------------------------------------------------------------------------


def kill_at(monkeypatch, module, name, wanted):
    """Let `module.name` be the end of the process where `wanted` says so of its arguments."""
    call = getattr(module, name)

    def last(*arguments, **named):
        if wanted(*arguments):
            raise Killed
        return call(*arguments, **named)

    monkeypatch.setattr(module, name, last)


def stop_at(step):
    def callback(trainer, record):
        trainer.stop = trainer.step >= step

    return callback


@pytest.mark.parametrize("how", ["patience", "callback"])
def test_a_run_that_stopped_early_and_was_killed_before_its_summary_is_done(
    config, tmp_path, monkeypatch, how
):
    config["train.max_steps"] = 300
    changes, callbacks = ({"train.patience": 2}, ()) if how == "patience" else ({}, [stop_at(22)])
    alone = fit({**config, **changes}, tmp_path / "alone", callbacks)
    assert alone["state"] == "finished" and alone["step"] < 300
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, records, "write_summary", lambda *_: True)
        fit({**config, **changes}, tmp_path / "killed", callbacks)
    assert train.resume(tmp_path / "killed", progress=Silent())["state"] == "finished"
    assert_same(tmp_path / "alone", tmp_path / "killed")


def test_a_run_that_stopped_early_goes_on_where_more_steps_are_asked_for(config, tmp_path, monkeypatch):
    config |= {"schedule.name": "constant", "guard.spike": 0.0}
    fit(config, tmp_path / "run", [stop_at(22)])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, train.Trainer, "_step", lambda trainer, stop: trainer.step == 24)
        train.resume(tmp_path / "run", {"train.max_steps": 40}, progress=Silent())
    assert train.resume(tmp_path / "run", progress=Silent())["step"] == 40


def test_killed_between_the_old_end_and_the_new_configuration(config, tmp_path, monkeypatch):
    config |= {"schedule.name": "constant", "train.max_steps": 6}
    fit(config, tmp_path / "run")
    prolonged = {"train.max_steps": 8}
    for module, name, wanted in (
        (Path, "unlink", lambda path, *_: path.name == "summary.json"),
        (train.Trainer, "_write_config", lambda trainer: True),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, module, name, wanted)
            train.resume(tmp_path / "run", prolonged, progress=Silent())
        assert train.resume(tmp_path / "run", progress=Silent())["step"] == 6
    assert train.resume(tmp_path / "run", prolonged, progress=Silent())["step"] == 8


def test_killed_before_old_checkpoints_were_deleted(config, tmp_path, monkeypatch):
    fit(config, tmp_path / "alone")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint, "prune", lambda *_: checkpoint.listed(tmp_path / "killed")[-1:] != [] and
                checkpoint.step_of(checkpoint.listed(tmp_path / "killed")[-1]) == 30)  # fmt: skip
        fit(config, tmp_path / "killed")
    train.resume(tmp_path / "killed", progress=Silent())
    assert_same(tmp_path / "alone", tmp_path / "killed")


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_of_a_stop_is_not_where_a_run_goes_back_to(config, tmp_path, monkeypatch, keep):
    """The run that was never stopped has no such checkpoint, and goes back to the one before."""
    config |= {"guard.policy": "rollback", "train.keep_checkpoints": keep, "train.max_steps": 60}
    config |= {"train.eval_interval": 0, "train.checkpoint_interval": 20, "guard.window": 1000}
    judge, spikes = Guard.judge, (15, 37, 55)

    def with_spikes(guard, loss, norm):
        """As many steps were judged to be good, and the run has gone back so often."""
        if guard.order < len(spikes) and len(guard.recent) == spikes[guard.order]:
            return "made up"
        return judge(guard, loss, norm)

    monkeypatch.setattr(Guard, "judge", with_spikes)
    assert fit(config, tmp_path / "alone")["incidents"] == len(spikes)
    with pytest.raises(SystemExit):
        fit(config, tmp_path / "stopped", [signal_at(5, signal.SIGTERM)])
    for step in (11, 13, 26, 33, 52):
        with pytest.raises(SystemExit):
            train.resume(tmp_path / "stopped", callbacks=[signal_at(step, signal.SIGTERM)], progress=Silent())
    train.resume(tmp_path / "stopped", progress=Silent())
    assert_same(tmp_path / "alone", tmp_path / "stopped")


def test_a_run_to_which_going_back_is_new_goes_back_to_where_it_was_stopped(config, tmp_path, monkeypatch):
    config |= {"train.eval_interval": 0, "train.checkpoint_interval": 0, "guard.spike": 0.0}
    with pytest.raises(SystemExit):
        fit(config, tmp_path / "run", [signal_at(5, signal.SIGTERM)])
    monkeypatch.setattr(Guard, "judge", lambda guard, loss, norm: "made up" if guard.order == 0 else None)
    summary = train.resume(tmp_path / "run", {"guard.policy": "rollback"}, progress=Silent())
    assert (summary["state"], summary["step"], summary["incidents"]) == ("finished", 30, 1)


def test_records_that_are_older_than_the_checkpoint_are_told_of(config, tmp_path):
    """No kill brings that about, but a folder that was put back may."""
    fit(config, tmp_path / "alone")
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit):
        fit(config, run_dir, [signal_at(20, signal.SIGTERM)])
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 16))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has lost the records of steps 17 to 20; all else"):
        train.resume(run_dir, progress=Silent())
    assert records.Run(run_dir).series("train", "loss")[0].tolist() == [*range(1, 17), *range(21, 31)]
    assert all(line.startswith("record") for line in kills.differences(tmp_path / "alone", run_dir))


def test_what_a_kill_left_of_a_users_file_goes(tmp_path):
    mine, folder = tmp_path / "my.py", tmp_path / "files"
    mine.write_text("x = 1\n")
    found = userfile.digests({"optim.name": f"{mine}:x"})
    assert killed_child(2, "half", lambda: userfile.keep(found, folder))
    assert [files.is_temporary(path.name) for path in folder.iterdir()] == [True]
    userfile.keep(found, folder)
    assert [path.read_text() for path in folder.iterdir()] == ["x = 1\n"]


# Each operation of a process --------------------------------------------------------------------------


def killed_child(n, moment, function):
    """Whether a fork that calls the function is killed in its n-th operation on a file, or ends before it."""
    child = os.fork()
    if child == 0:
        try:
            files.os = records.os = kills.Deadly(n, moment)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def arrays(step):
    return {"a": np.full(3, step, np.float32)}, {"b": np.full(2, -step, np.float32)}


def saved(run_dir, step, planned=True):
    checkpoint.save(run_dir, step, *arrays(step), {"planned": planned, "best": {"step": 1}})


def contents_of(run_dir):
    """What a run that goes on finds: its checkpoints, its records, its configuration."""
    files.clear_temporary(run_dir)
    checkpoint.tidy(run_dir)
    found = {}
    for path in checkpoint.listed(run_dir):
        loaded = checkpoint.load(path)
        assert loaded[0]["a"].tolist() == [loaded[2]["step"]] * 3
        found[loaded[2]["step"]] = loaded[2]["planned"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder = records.Recorder(run_dir)
    recorder.close()
    hidden = [path.name for path in run_dir.rglob(".*")]
    assert hidden == []
    steps = [record["step"] for record in records.Run(run_dir).records]
    return found, steps, (run_dir / "config.toml").read_text()


@pytest.mark.parametrize(
    "work",
    [
        lambda run_dir: saved(run_dir, 9),
        lambda run_dir: saved(run_dir, 5, planned=False),  # in the place of another one
        lambda run_dir: checkpoint.prune(run_dir, 1),
        lambda run_dir: checkpoint.clear(run_dir),
        lambda run_dir: records.Recorder(run_dir).truncate(5),
        lambda run_dir: records.Recorder(run_dir).write({"step": 8, "split": "train"}),
        lambda run_dir: files.write_atomic(run_dir / "config.toml", "new"),
    ],
    ids=["save", "replace", "prune", "clear", "truncate", "write", "write_atomic"],
)
@pytest.mark.parametrize("moment", kills.MOMENTS)
def test_killed_in_each_operation_all_is_as_before_or_as_after(tmp_path, work, moment):
    before = tmp_path / "before"
    before.mkdir()
    for step in (1, 3, 5):
        saved(before, step)
    with records.Recorder(before) as recorder:
        for step in range(1, 8):
            recorder.write({"step": step, "split": "train"})
    (before / "config.toml").write_text("old")
    shutil.copytree(before, tmp_path / "after")
    work(tmp_path / "after")
    old, new = contents_of(before), contents_of(tmp_path / "after")
    n, died, seen = 0, True, []
    while died:
        n += 1
        run_dir = tmp_path / f"run-{n}"
        shutil.copytree(before, run_dir)
        died = killed_child(n, moment, lambda: work(run_dir))  # noqa: B023  (called at once)
        seen.append(contents_of(run_dir))
        checkpoints, steps, config = seen[-1]
        # What deletes several may have deleted some of them, the oldest first.
        fewer = [dict(list(old[0].items())[i:]) for i in range(len(old[0]))]
        assert checkpoints in (old[0], new[0], *(fewer if len(new[0]) < len(old[0]) else ()))
        assert steps in (old[1], new[1]) and config in (old[2], new[2])
    assert n > 1 and seen[-1] == new


def test_killed_in_every_third_operation_while_more_steps_are_asked_for(config, tmp_path, capfd):
    """Its old end is undone, records after it are dropped, its configuration is rewritten; in this order."""
    config |= {"schedule.name": "constant", "train.max_steps": 6, "train.checkpoint_interval": 0}
    config |= {"train.eval_interval": 0, "train.keep_checkpoints": 1, "guard.spike": 0.0}
    config |= {"optim.name": "sgd", "model.bias": False}  # fewer arrays, each of which is written by itself

    def prolonged():
        return train.resume(tmp_path / "run", {"train.max_steps": 8}, progress=Silent())

    fit(config, tmp_path / "short")
    shutil.copytree(tmp_path / "short", tmp_path / "run")
    prolonged()
    (tmp_path / "run").rename(tmp_path / "alone")
    n, died = 0, True
    while died:
        n += 3
        shutil.copytree(tmp_path / "short", tmp_path / "run")
        moment = kills.MOMENTS[n // 3 % 3]
        died = killed_child(n, moment, prolonged)
        if died and n % 2:
            killed_child(n // 2 + 1, moment, prolonged)
        assert prolonged()["step"] == 8
        assert_same(tmp_path / "alone", tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    there = capfd.readouterr().out
    for name in (".lock", "config.toml", "metrics.jsonl", "state.json", "gone", "summary.json"):
        assert name in there


LOOP = """
import numpy as np

def restoring(config, run):
    step, arrays, _ = run.restore() or (0, {"w": np.zeros(3)}, None)
    train(config, run, step, arrays["w"])

def starting_again(config, run):
    train(config, run, 0, np.zeros(3))

def train(config, run, step, w):
    while step < config.train.max_steps:
        w = w + np.random.default_rng(step).normal(size=3)
        step += 1
        run.log(step, "train", loss=w.sum())
        if step % 3 == 0:
            run.log(step, "val", loss=w[0] ** 2)
            run.save(step, {"w": w})
"""


@pytest.mark.parametrize("loop", ["restoring", "starting_again"])
def test_a_loop_of_ones_own_killed_in_every_third_operation(tmp_path, monkeypatch, loop):
    (tmp_path / "my.py").write_text(LOOP)
    monkeypatch.chdir(tmp_path)
    config = {"task.run": f"my.py:{loop}", "train.max_steps": 6, "train.threads": 1}

    def whole(run_dir="run"):
        random.seed(0)  # a fork has another one, and its state is in the checkpoints
        if Path(run_dir, "config.toml").exists():
            train.resume(run_dir, progress=Silent())
        else:
            fit(config, run_dir)

    whole("alone")

    n, died = 0, True
    while died:
        n += 3
        moment = kills.MOMENTS[n // 3 % 3]
        died = killed_child(n, moment, whole)
        if died and n % 2:
            killed_child(n // 2 + 1, moment, whole)
        whole()
        assert_same(Path("alone"), Path("run"))
        shutil.rmtree("run")
    assert n > 60


# Stops that are asked for ------------------------------------------------------------------------------


def signal_at(step, *signals):
    def callback(trainer, record):
        if trainer.step == step and record["split"] == "train":
            for signum in signals:
                os.kill(os.getpid(), signum)

    return callback


def cllm(*words, struck=()):
    """The end of `cllm ...` in a process of its own; `struck` is what tests/struck.py wants to know."""
    program = [str(Path(kills.__file__).with_name("struck.py")), *struck] if struck else ["-m", "cllm"]
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True)


def words(config, run_dir):
    """A run as a command."""
    values = {**config, "run.dir": run_dir, "train.metrics": ",".join(config["train.metrics"])}
    return ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]


def assert_stopped(run_dir, step):
    """There is a checkpoint of all that was done, and no summary."""
    assert checkpoint.step_of(checkpoint.newest(run_dir)) == step
    assert records.Run(run_dir).records[-1]["step"] == step
    assert records.Run(run_dir).state == "unfinished"


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGTERM", 143, "cllm: stopped by SIGTERM\n"), ("SIGINT", 130, "cllm: interrupted\n")],
)
def test_a_signal_saves_before_the_end(config, tmp_path, name, status, said):
    fit(config, tmp_path / "alone")
    run_dir = tmp_path / "stopped"
    done = cllm(*words(config, run_dir), struck=[name, "0", "2", "step"])
    assert (done.returncode, done.stderr) == (status, said)
    assert f"at step 3; continue with: cllm resume {run_dir}" in done.stdout
    assert_stopped(run_dir, 3)
    # In the midst of a checkpoint: it is written to its end, and the next step is the last one.
    done = cllm("resume", str(run_dir), struck=[name, "0", "10", "model.safetensors"])
    assert (done.returncode, done.stderr) == (status, said)
    assert_stopped(run_dir, 11)
    done = cllm("resume", str(run_dir))
    assert done.returncode == 0 and done.stderr == "", done
    assert kills.differences(tmp_path / "alone", run_dir, but=("random",)) == []


def test_the_time_that_was_allowed_saves_before_the_end(config, tmp_path):
    fit(config, tmp_path / "alone")
    run_dir = tmp_path / "stopped"
    for step, command in ((1, words(config, run_dir)), (2, ["resume", str(run_dir)])):
        done = cllm(*command, "--train.max-minutes=1e-6")
        assert done.returncode == 124 and done.stderr == "", done
        said = f"train.max_minutes are over, at step {step}; continue with: cllm resume {run_dir}"
        assert said in done.stdout
        assert_stopped(run_dir, step)
    done = cllm("resume", str(run_dir), "--train.max-minutes=0")
    assert done.returncode == 0, done
    assert kills.differences(tmp_path / "alone", run_dir, but=("random",)) == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_does_not_wait_for_the_step(config, tmp_path, name, status):
    fit(config, tmp_path / "alone")
    run_dir = tmp_path / "stopped"
    done = cllm(*words(config, run_dir), struck=[f"{name},{name}", "0", "17", "step"])
    assert done.returncode == status and "Traceback" not in done.stderr
    assert records.Run(run_dir).records[-1]["step"] == 17
    assert checkpoint.step_of(checkpoint.newest(run_dir)) <= 15
    assert cllm("resume", str(run_dir)).returncode == 0
    assert kills.differences(tmp_path / "alone", run_dir, but=("random",)) == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_the_last_checkpoint_finds_a_finished_run(config, tmp_path, name, status):
    fit(config, tmp_path / "alone")
    done = cllm(*words(config, tmp_path / "stopped"), struck=[name, "0", "30", "model.safetensors"])
    assert done.returncode == status and "finished 30 steps" in done.stdout, done
    assert kills.differences(tmp_path / "alone", tmp_path / "stopped", but=("random",)) == []


def test_signals_are_left_to_those_who_handle_them(config, tmp_path):
    seen = []
    before = [signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))]
    before.append(signal.signal(signal.SIGINT, signal.SIG_IGN))
    try:
        assert fit(config, tmp_path / "run", [signal_at(3, signal.SIGTERM, signal.SIGINT)])["step"] == 30
        assert seen == ["mine"] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "other", [signal_at(3, signal.SIGINT)])
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before


def test_a_run_outside_the_main_thread(config, tmp_path):
    ends = []
    thread = threading.Thread(target=lambda: ends.append(fit(config, tmp_path / "run")["state"]))
    thread.start()
    thread.join()
    assert ends == ["finished"]


# The soak ----------------------------------------------------------------------------------------------


def test_a_run_leaves_nothing_open(monkeypatch):
    monkeypatch.setattr(soak, "STEPS", 30)
    monkeypatch.setattr(soak, "STOPS", (8, 23))
    growth = soak.run(0, say=lambda line: None)
    assert {"files", "threads", "pool_kb"}.isdisjoint(soak.too_much(growth)), growth


def test_the_soak_would_see_what_is_left_open(monkeypatch):
    left = []

    def leave(config, run_dir):
        buffer = pool.empty((10**6,))
        buffer[...] = 0
        pages = mmap.mmap(-1, 5 * 2**20)  # the buffer's may have been this process's before
        pages.write(bytes(len(pages)))
        left.append((os.open(config["data.source"], os.O_RDONLY), buffer, pages, [[] for _ in range(1000)]))
        left.append(threading.Thread(target=ended.wait))
        left[-1].start()

    monkeypatch.setattr(soak, "live", leave)
    ended = threading.Event()
    try:
        assert soak.too_much(soak.run(0, say=lambda line: None)) == list(soak.GROWTH)
    finally:
        ended.set()
        for one in left:
            if isinstance(one, tuple):
                os.close(one[0])
            else:
                one.join()
