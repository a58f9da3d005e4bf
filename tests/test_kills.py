"""Runs that are stopped at the worst moments, by kills and by signals, end as one that was left alone."""

import os
import signal

import kills
import pytest

from cllm import checkpoint, records, train
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
    found = kills.differences(tmp_path / "a", tmp_path / "b")
    assert {line.split(" ")[0] for line in found} == {
        "model.safetensors", "optimizer.safetensors", "the", "state:", "summary:"
    }  # fmt: skip


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


def test_killed_before_old_checkpoints_were_deleted(config, tmp_path, monkeypatch):
    fit(config, tmp_path / "alone")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint, "prune", lambda *_: checkpoint.listed(tmp_path / "killed")[-1:] != [] and
                checkpoint.step_of(checkpoint.listed(tmp_path / "killed")[-1]) == 30)  # fmt: skip
        fit(config, tmp_path / "killed")
    train.resume(tmp_path / "killed", progress=Silent())
    assert_same(tmp_path / "alone", tmp_path / "killed")


def signal_at(step, signum):
    def callback(trainer, record):
        if trainer.step == step and record["split"] == "train":
            os.kill(os.getpid(), signum)

    return callback


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
