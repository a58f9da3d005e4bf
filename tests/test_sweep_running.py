"""Running a sweep: pausing, rungs, directories that grow, workers that die, full disks, the test split."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import sweep_kills

from cllm import checkpoint, config, files, kernels, records, saved, sweep, train
from cllm.errors import InputError
from cllm.progress import Lines, Silent
from cllm.sweep import engine, folder, worker
from cllm.sweep import results as sweep_results
from cllm.sweep.engine import Processes, _Worker
from cllm.sweep.worker import Order, died, wait_until_free

TINY = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "model.dropout": 0.1,
    "optim.lr": 3e-3, "schedule.warmup_steps": 5, "train.batch_size": 4, "train.max_steps": 20,
    "train.eval_interval": 5, "train.checkpoint_interval": 7,
}  # fmt: skip


@pytest.fixture
def tiny(text_file, tmp_path):
    """The configuration of a run of 20 steps in a folder of tmp_path; keys with __ for the dot."""

    def tiny(name, **changes):
        own = {"data.source": str(text_file), "run.dir": str(tmp_path / name)}
        return config.load(None, TINY | own | {key.replace("__", "."): v for key, v in changes.items()})

    return tiny


def untimed(run_dir):
    """A run's records without what they say of time and memory."""
    return [
        {key: value for key, value in record.items() if not records.is_timing(key)}
        for record in records.Run(run_dir).records
    ]


def last_arrays(run_dir):
    return [(checkpoint.newest(run_dir) / name).read_bytes() for name in checkpoint.ARRAY_FILES]


# Pausing ---------------------------------------------------------------------------------------------


def test_a_run_that_paused_has_the_bits_of_one_that_did_not(tiny, tmp_path):
    train.Trainer(tiny("alone"), progress=Silent()).fit()
    run_dir = tmp_path / "paused"
    summary = train.Trainer(tiny("paused"), progress=Silent(), pause_at=10).fit()
    assert (summary["state"], summary["stopped_by"], summary["step"]) == ("interrupted", "pause", 10)
    assert not (run_dir / "summary.json").exists()
    assert checkpoint.step_of(checkpoint.newest(run_dir)) == 10
    assert [r["step"] for r in untimed(run_dir) if r["split"] == "val"] == [5, 10]  # the step's records too
    files = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    assert train.resume(run_dir, progress=Silent(), pause_at=10)["step"] == 10  # it is there already
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == files
    assert train.resume(run_dir, progress=Silent(), pause_at=13)["step"] == 13
    assert train.resume(run_dir, progress=Silent())["state"] == "finished"
    assert untimed(run_dir) == untimed(tmp_path / "alone")
    assert last_arrays(run_dir) == last_arrays(tmp_path / "alone")


def test_a_run_does_not_pause_where_it_ends(tiny):
    assert train.Trainer(tiny("a"), progress=Silent(), pause_at=20).fit()["state"] == "finished"

    def stop(trainer, record):
        trainer.stop = trainer.step == 10

    stopped = train.Trainer(tiny("b"), callbacks=[stop], progress=Silent(), pause_at=10).fit()
    assert (stopped["state"], stopped["step"]) == ("finished", 10)


def test_a_pause_is_shown(tiny, tmp_path, capsys):
    train.Trainer(tiny("a"), progress=Lines(), pause_at=10).fit()
    told = f"paused at step 10; continue with: cllm resume {tmp_path / 'a'}"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_what_cannot_pause_is_refused(tiny, tmp_path):
    for step in (0, -1, 2.5, True):
        with pytest.raises(InputError, match=r"pause_at is .*, it must be a step"):
            train.Trainer(tiny("a"), pause_at=step)
    (tmp_path / "own.py").write_text("def train(config, run): run.log(0, 'train', loss=1.0)\n")
    own = {"task.run": f"{tmp_path / 'own.py'}:train", "run.dir": str(tmp_path / "own"), "train.max_steps": 5}
    with pytest.raises(InputError, match=r"task\.run is a loop of its own, which cannot pause"):
        train.Trainer(own, pause_at=2)
    train.Trainer(own, progress=Silent()).fit()
    (tmp_path / "own" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"task\.run is a loop of its own, which cannot pause"):
        train.resume(tmp_path / "own", pause_at=2)
    assert json.loads((tmp_path / "own" / "metrics.jsonl").read_text())["loss"] == 1.0


# Sweeps ----------------------------------------------------------------------------------------------

BASE = """
[base.data]
source = "{source}"
[base.model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[base.schedule]
warmup_steps = 2
min_lr = 0.0
[base.train]
batch_size = 4
max_steps = 12
eval_interval = 4
checkpoint_interval = 5
"""
SPACE = '[[space]]\n"optim.lr" = [1e-3, 1e-2]\n'


class Quiet:
    """A display that keeps what it is told."""

    def start(self, sweep, directory, results, n_workers):
        self.results, self.lists, self.notes, self.ends = results, [], [], []

    def stage(self, orders, left):
        self.lists.append([(order.trial.name, order.until) for order in left])

    def step(self, trial, step, loss):
        assert self.results[trial.name].state == "running"

    def ended(self, result):
        self.ends.append(result)

    def note(self, text):
        self.notes.append(text)

    def end(self, text):
        self.text = text


def make_plan(folder, source, head="", space=SPACE, tail="", **overrides):
    """A sweep of a text, made of parts of its file and overrides of base.SECTION.KEY."""
    path = folder / "plan.toml"
    text = f"[sweep]\nseeds = [0, 1]\n{head}\n{BASE.format(source=source)}\n{tail}\n{space}"
    path.write_text(text, encoding="utf-8")
    overrides = {f"base.{key.replace('__', '.')}": value for key, value in overrides.items()}
    return sweep.Sweep.load(path, overrides)


@pytest.fixture
def plan(tmp_path, text_file):
    return partial(make_plan, tmp_path, text_file)


def go(plan, directory, workers=1, **options):
    """Run a sweep and return what its display was told, with the summary."""
    shown = Quiet()
    shown.summary = sweep.run(plan, directory, workers=workers, progress=shown, **options)
    return shown


def table(directory):
    with open(directory / "results.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def snapshot(directory):
    """All files with their times."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


# Rungs -----------------------------------------------------------------------------------------------

THREE = '[[space]]\n"optim.lr" = [1e-3, 1e-2, 0.1]\n'
HALVING = '[prune]\nmethod = "halving"\nsteps = [4, 8]\nkeep = 0.5\n'
CONFIRM = "[confirm]\ntop = 1\nseeds = [7, 8]\n"


def test_settings_are_dropped_at_rungs_and_the_others_have_the_bits_of_ordinary_runs(plan, tmp_path):
    pruned, whole = plan(space=THREE, tail=HALVING), plan(space=THREE)
    shown = go(pruned, tmp_path / "pruned")
    go(whole, tmp_path / "whole")
    assert [len(jobs) for jobs in shown.lists] == [6, 4, 2]
    assert [{until for _, until in jobs} for jobs in shown.lists] == [{4}, {8}, {None}]
    rows, full = table(tmp_path / "pruned"), table(tmp_path / "whole")
    assert [row["state"] for row in rows].count("finished") == 2
    assert sorted(int(row["step"]) for row in rows) == [4, 4, 8, 8, 12, 12]
    for row, other in zip(rows, full):
        name = f"s00{row['setting']}-seed{row['seed']}"
        alone = records.Run(tmp_path / "whole" / "trials" / name)
        steps, losses = alone.series("val", "loss")
        assert float(row["val.loss"]) == losses[list(steps).index(int(row["step"]))]
        there = untimed(tmp_path / "pruned" / "trials" / name)
        assert there == [r for r in untimed(alone.path) if r["step"] <= int(row["step"])]
        if row["state"] == "finished":
            assert row == other
        else:
            assert row["state"] == "pruned"
            assert not (tmp_path / "pruned" / "trials" / name / "summary.json").exists()
    assert {result.isa for result in shown.results.values()} == {kernels.isa}
    before = snapshot(tmp_path / "pruned")
    assert go(pruned, tmp_path / "pruned").lists == []
    assert snapshot(tmp_path / "pruned") == before
    go(pruned, tmp_path / "three", workers=3)
    assert table(tmp_path / "three") == rows


def test_pruning_can_come_later_and_counts_what_was_recorded_at_its_steps(plan, tmp_path):
    go(plan(space=THREE), tmp_path / "later")
    shown = go(plan(space=THREE, tail=HALVING), tmp_path / "later")
    assert shown.lists == []
    go(plan(space=THREE, tail=HALVING), tmp_path / "first")
    assert table(tmp_path / "later") == table(tmp_path / "first")


# Growing ---------------------------------------------------------------------------------------------


def test_more_values_and_seeds_reuse_what_is_there(plan, tmp_path):
    directory = tmp_path / "out"
    go(plan(), directory)
    before = snapshot(directory / "trials")
    more = plan("threads = 2", '[[space]]\n"optim.lr" = [3e-4, 1e-3, 1e-2]\n')
    shown = go(more, directory)
    assert sorted(name for name, _ in shown.lists[0]) == ["s002-seed0", "s002-seed1"]
    assert {path: time for path, time in snapshot(directory / "trials").items() if path in before} == before
    assert json.loads((directory / "settings.json").read_text()) == [
        {"optim.lr": 1e-3}, {"optim.lr": 1e-2}, {"optim.lr": 3e-4}
    ]  # fmt: skip
    assert [row["optim.lr"] for row in table(directory)] == ["0.001"] * 2 + ["0.01"] * 2 + ["0.0003"] * 2
    assert sweep.Sweep.load(directory / "sweep.toml") == more
    fewer = plan(space='[[space]]\n"optim.lr" = [1e-2, 3e-4]\n')
    assert go(fewer, directory).lists == []
    assert [row["setting"] for row in table(directory)] == ["1", "1", "2", "2"]
    path = tmp_path / "plan.toml"
    path.write_text(path.read_text().replace("seeds = [0, 1]", "seeds = [1, 2, 0]"))
    shown = go(sweep.Sweep.load(path), directory)
    assert shown.lists == [[("s001-seed2", None), ("s002-seed2", None)]]
    assert [row["seed"] for row in table(directory)] == ["0", "1", "2"] * 2


def test_confirmation_can_come_later(plan, tmp_path):
    go(plan(), tmp_path / "out")
    shown = go(plan(tail=CONFIRM), tmp_path / "out")
    assert shown.lists == [[("s001-seed7", None), ("s001-seed8", None)]]
    assert [(row["setting"], row["seed"]) for row in table(tmp_path / "out")] == [
        ("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("1", "7"), ("1", "8")
    ]  # fmt: skip
    (confirmed,) = shown.summary["confirmed"]
    assert confirmed["setting"] == 1 and confirmed["n"] == 2 and "test" not in confirmed


@pytest.mark.parametrize(
    ("schedule", "head", "interval", "anew"),
    [
        ("constant", "", 4, False),
        ("cosine", "", 4, True),
        ("constant", 'at = "best"', 4, False),
        ("constant", 'at = "best"', 5, True),  # step 12 was evaluated only as the last one
        ("constant", "", 5, False),
    ],
)
def test_more_steps_reuse_what_would_have_been_the_same(plan, tmp_path, schedule, head, interval, anew):
    name = {"schedule__name": schedule, "train__eval_interval": interval}
    if schedule == "constant":
        name["schedule__min_lr"] = None
    options = {key: value for key, value in name.items() if value is not None}
    space = SPACE + ('"schedule.min_lr" = 0.0\n' if schedule == "cosine" else "")
    short, longer = (plan(head, space, **options, train__max_steps=steps) for steps in (12, 20))
    directory = tmp_path / "out"
    go(short, directory)
    before = {path.name: untimed(path) for path in (directory / "trials").iterdir()}
    shown = go(longer, directory)
    go(longer, tmp_path / "at-once")
    assert table(directory) == table(tmp_path / "at-once")
    (note,) = shown.notes
    earlier = directory / "earlier" / "12-steps"
    if anew:
        assert "4 trials of fewer steps are trained anew" in note
        assert {path.name: untimed(path) for path in earlier.iterdir()} == before
        for run in records.load(directory):
            assert untimed(run.path) == untimed(tmp_path / "at-once" / "trials" / run.path.name)
    else:
        assert "4 trials of fewer steps go on to 20" in note
        assert not earlier.exists()
        for run in records.load(directory):
            there = untimed(run.path)
            assert there[: len(before[run.path.name])] == before[run.path.name]
            assert last_arrays(run.path) == last_arrays(tmp_path / "at-once" / "trials" / run.path.name)
    with pytest.raises(InputError, match=r"max_steps is 20 there and 12 here \(it can be raised only\)"):
        go(short, directory)
    assert go(longer, directory).lists == []


def test_a_trial_that_stopped_early_is_kept_as_more_steps_would_not_have_helped(plan, tmp_path):
    options = {"schedule__name": "constant", "train__patience": 1, "train__eval_interval": 1}
    space = '[[space]]\n"optim.lr" = [1e-3, 1.0]\n'
    directory = tmp_path / "out"
    go(plan(space=space, **options), directory)
    stopped = [row for row in table(directory) if int(row["step"]) < 12]
    assert {row["optim.lr"] for row in stopped} == {"1.0"}
    go(plan(space=space, **options, train__max_steps=20), directory)
    go(plan(space=space, **options, train__max_steps=20), tmp_path / "at-once")
    assert table(directory) == table(tmp_path / "at-once")
    assert [row for row in table(directory) if row in stopped] == stopped


def test_more_steps_after_a_kill_between_two_trials(plan, tmp_path):
    """Some trials are fitted already, and one is only half: its summary is gone."""
    options = {"schedule__name": "constant"}
    short, longer = (plan(**options, train__max_steps=steps) for steps in (12, 20))
    directory = tmp_path / "out"
    go(short, directory)
    trial = directory / "trials" / "s000-seed0"
    (trial / "summary.json").unlink()
    train.resume(directory / "trials" / "s001-seed1", {"train.max_steps": 20}, progress=Silent())
    shown = go(longer, directory)
    assert [name for name, _ in shown.lists[0]] == ["s000-seed0", "s000-seed1", "s001-seed0"]
    go(longer, tmp_path / "at-once")
    assert table(directory) == table(tmp_path / "at-once")


def test_more_steps_of_a_trial_that_has_only_the_checkpoint_before_its_first(plan, tmp_path):
    """A guard that rolls back keeps one there."""

    class Broken(Silent):
        def step(self, record):
            raise RuntimeError("no")

    options = {"schedule__name": "constant", "guard__policy": "rollback"}
    short, longer = (plan(**options, train__max_steps=steps) for steps in (12, 20))
    directory = tmp_path / "out"
    go(short, directory)
    trial = short.trials()[0]
    shutil.rmtree(directory / "trials" / trial.name)
    with pytest.raises(RuntimeError, match="no"):
        train.Trainer(short.trial_config(trial, directory), progress=Broken()).fit()
    assert sweep_results.trained(directory / "trials" / trial.name)["step"] == 0
    go(longer, directory)
    go(longer, tmp_path / "at-once")
    assert table(directory) == table(tmp_path / "at-once")


# What fails ------------------------------------------------------------------------------------------

TASK = """
import errno, os, random
import numpy as np

def train(config, run, fault="none"):
    run.log(1, "train", loss=1.0)
    if fault == "memory":
        raise MemoryError("Unable to allocate 99 GiB")
    if fault == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    if fault == "exit":
        os._exit(3)
    print("a line of the user's")
    drawn = np.random.random() + random.random() if fault.startswith("draw") else 2.0
    run.log(2, "val", loss=float("nan") if fault == "nan" else drawn)
"""


@pytest.fixture
def faults(tmp_path):
    """A sweep over faults of a loop of the user's own."""

    def faults(*names):
        (tmp_path / "own.py").write_text(TASK)
        space = f'[[space]]\n"task.run" = "{tmp_path / "own.py"}:train"\n"task.fault" = {json.dumps(names)}\n'
        (tmp_path / "faults.toml").write_text(f"[sweep]\nseeds = [0]\n{space}")
        return sweep.Sweep.load(tmp_path / "faults.toml")

    return faults


def test_whatever_happens_to_a_trial_is_its_own_result(faults, tmp_path):
    shown = go(faults("memory", "none", "exit", "nan"), tmp_path / "out")
    rows = {row["task.fault"]: (row["state"], row["step"], row["error"]) for row in table(tmp_path / "out")}
    assert rows == {
        "memory": ("failed", "1", "MemoryError: Unable to allocate 99 GiB"),
        "none": ("finished", "2", ""),
        "exit": ("failed", "0", "worker died: exit status 3"),
        "nan": ("failed", "2", "val.loss is nan"),
    }
    assert shown.summary["trials"] == {"finished": 1, "failed": 3}


def test_what_a_users_file_draws_does_not_depend_on_the_trials_before(faults, tmp_path):
    names = ("draw a", "draw b", "draw c")
    go(faults(*names), tmp_path / "one", workers=1)
    go(faults(*names), tmp_path / "three", workers=3)
    assert table(tmp_path / "one") == table(tmp_path / "three")


def test_a_full_disk_in_a_trial_ends_the_sweep_with_one_sentence(faults, tmp_path):
    directory = tmp_path / "out"
    words = "s001-seed0 failed: .*No space left on device.*the same command"
    with pytest.raises(InputError, match=words) as caught:
        go(faults("none", "disk", "memory"), directory)
    assert "\n" not in str(caught.value)
    assert [row["state"] for row in table(directory)] == ["finished", "failed", "pending"]


def full_for(monkeypatch, name):
    """Let files of this name find no room."""
    create = files.create

    def refuse(path, parts):
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return create(path, parts)

    monkeypatch.setattr(files, "create", refuse)


@pytest.mark.parametrize("name", ["settings.json", "sweep.toml"])
def test_a_full_disk_before_the_first_trial_leaves_all_as_it_was(plan, tmp_path, monkeypatch, name):
    directory = tmp_path / "out"
    go(plan(), directory)
    before = snapshot(directory)
    full_for(monkeypatch, name)
    with pytest.raises(OSError, match="No space left on device"):
        go(plan(space=THREE), directory)
    left = snapshot(directory)
    left.pop(directory / "settings.json"), before.pop(directory / "settings.json")  # the first to be written
    assert left == before
    if name == "settings.json":
        with pytest.raises(OSError, match="No space left on device"):
            go(plan(), tmp_path / "new")
        assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert len(go(plan(space=THREE), directory).lists[0]) == 2


@pytest.mark.parametrize("name", ["results.csv", "summary.json"])
def test_a_full_disk_at_the_end_keeps_the_trials(plan, tmp_path, monkeypatch, name):
    directory = tmp_path / "out"
    go(plan(), directory)
    old = (directory / "results.csv").read_bytes()
    full_for(monkeypatch, name)
    with pytest.raises(InputError, match=r"No space left on device: .*the same command writes it") as caught:
        go(plan(space=THREE), directory)
    assert "\n" not in str(caught.value)
    assert (directory / "results.csv").read_bytes() == old or name == "summary.json"
    monkeypatch.undo()
    assert go(plan(space=THREE), directory).lists == []
    go(plan(space=THREE), tmp_path / "at-once")
    assert table(directory) == table(tmp_path / "at-once")
    assert (directory / "summary.json").exists()


def test_a_table_that_cannot_be_written_meanwhile_is_told_once(plan, tmp_path, monkeypatch):
    module = sys.modules["cllm.sweep.run"]  # the name in the package is the function's
    monkeypatch.setattr(module, "TABLE_INTERVAL", 0.0)
    monkeypatch.setattr(module, "TABLE_SHARE", 1e9)
    full_for(monkeypatch, "results.csv")
    shown = Quiet()
    with pytest.raises(InputError, match="No space left"):
        sweep.run(plan(), tmp_path / "out", workers=2, progress=shown)
    assert len(shown.ends) == 4 and len(shown.notes) == 1
    assert shown.notes[0].startswith("results.csv is not up to date (No space left on device")


def test_a_damaged_list_of_settings_is_named(plan, tmp_path):
    go(plan(), tmp_path / "out")
    for text in ("[{", '{"a": 1}'):
        (tmp_path / "out" / "settings.json").write_text(text)
        with pytest.raises(InputError, match=r"settings\.json is not a"):
            go(plan(space=THREE), tmp_path / "out")


def test_numbers_are_those_of_the_copy_where_an_older_version_wrote_no_list(plan, tmp_path):
    go(plan(), tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    shown = go(plan(space='[[space]]\n"optim.lr" = [1e-2, 1e-3, 0.1]\n'), tmp_path / "out")
    assert shown.lists == [[("s002-seed0", None), ("s002-seed1", None)]]


def test_a_damaged_trial_fails_alone(plan, tmp_path):
    go(plan(), tmp_path / "out")
    trial = tmp_path / "out" / "trials" / "s000-seed1"
    lines = (trial / "metrics.jsonl").read_text().splitlines()
    (trial / "metrics.jsonl").write_text("\n".join([*lines[:3], "{torn", *lines[3:]]) + "\n")
    (trial / "summary.json").unlink()
    go(plan(), tmp_path / "out")
    assert [row["state"] for row in table(tmp_path / "out")] == ["finished", "failed", "finished", "finished"]
    assert "metrics.jsonl, line 4, is not a record" in table(tmp_path / "out")[1]["error"]


# Workers ---------------------------------------------------------------------------------------------


def order_of(plan, directory, number=0):
    trial = plan.trials()[number]
    return Order(trial, plan.trial_config(trial, directory), plan.config)


def test_a_worker_that_dies_before_it_begins_costs_nothing(plan, tmp_path):
    plan, told = plan(), []
    with Processes(1, 1) as engine:
        engine.workers.append(_Worker(1))
        os.kill(engine.workers[0].process.pid, signal.SIGKILL)
        engine.workers[0].process.join()
        engine.run([order_of(plan, tmp_path, n) for n in (0, 1)], lambda o, message: told.append(message))
        pids = [worker.process.pid for worker in engine.workers]
        engine.run([order_of(plan, tmp_path, 2)], lambda o, message: told.append(message))
        assert [worker.process.pid for worker in engine.workers] == pids  # it lives as long as the engine
    assert [message.state for message in told if isinstance(message, sweep.Result)] == ["finished"] * 3
    assert told[0] == {"step": 0, "isa": kernels.isa}
    assert not list(tmp_path.rglob("error.txt"))


def test_a_users_file_that_is_not_there_is_no_trials_failure(plan, tmp_path):
    (tmp_path / "gone.py").write_text("")
    found = plan(space='[[space]]\n"model.attention" = ["fused", "gone.py:Mine"]\n')
    (tmp_path / "gone.py").unlink()
    with pytest.raises(InputError, match=r"model\.attention names .*gone\.py, which cannot be read"):
        go(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_one_that_was_asked_for_it_tells_its_test_value(plan, tmp_path, monkeypatch):
    order = order_of(plan(), tmp_path)
    result = sweep.Result(order.trial, "finished", 12, 1.0, test=2.0)
    monkeypatch.setattr(worker, "read", lambda *arguments: result)
    assert order.found().test is None and order.found().state == "finished"
    monkeypatch.setattr(worker, "tested", lambda *arguments: {"loss": 2.0})
    assert replace(order, test=True).found() == result


def test_a_past_of_fewer_steps_counts_where_nothing_would_have_been_otherwise(plan, tmp_path):
    def same(done, was=10, at="last", **overrides):
        order = order_of(plan(f'at = "{at}"', train__max_steps=20, **overrides), tmp_path)
        return folder._same_past(order, was, done)

    constant = {"schedule__name": "constant"}
    assert same(10, **constant) and not same(10)  # a cosine of 10 steps is another
    assert not same(10, **constant, train__patience=2)  # 10 was evaluated as the last step alone
    assert same(12, was=12, **constant, train__patience=2)
    assert not same(10, at="best", **constant) and same(12, was=12, at="best", **constant)
    order = order_of(plan(train__max_steps=20, **constant), tmp_path)
    own = replace(order.config, task=replace(order.config.task, run="own.py:train"))
    assert not folder._same_past(replace(order, config=own), 10, 10)


def test_a_trial_whose_workers_never_begin_has_failed(plan, tmp_path, monkeypatch):
    started, told = [], []

    class Counted(_Worker):
        def __init__(self, threads):
            started.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(engine, "_Worker", Counted)
    monkeypatch.setattr(engine, "_work", id)  # a process that ends without a word
    with Processes(1, 1) as processes:
        processes.run([order_of(plan(), tmp_path)], lambda order, message: told.append(message))
    assert [message.state for message in told] == ["failed"] and len(started) == engine.FALSE_STARTS + 1
    assert told[0].error == "worker died: exit status 0"


def test_a_worker_that_dies_when_its_trial_is_done_costs_nothing(plan, tmp_path):
    done = order_of(plan(), tmp_path)
    assert died(done, -signal.SIGKILL).state == "failed"
    (tmp_path / "trials" / "s000-seed0" / "error.txt").unlink()
    train.Trainer(done.config, progress=Silent()).fit()
    assert died(done, -signal.SIGKILL) == done.found()
    assert not list(tmp_path.rglob("error.txt"))


HOLD = "import sys, time; from cllm.files import Lock; Lock(sys.argv[1]); print(flush=True); time.sleep(60)"


def test_a_trial_waits_for_its_former_process_to_go(tmp_path, monkeypatch):
    wait_until_free(tmp_path / "not-there")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        monkeypatch.setattr("cllm.sweep.worker.LOCK_SECONDS", 0.1)
        with pytest.raises(InputError, match=f"in use by process {holder.pid} "):
            wait_until_free(tmp_path)
        monkeypatch.setattr("cllm.sweep.worker.LOCK_SECONDS", 60.0)
        monkeypatch.setattr("cllm.sweep.worker.sleep", lambda seconds: (holder.kill(), time.sleep(seconds)))
        wait_until_free(tmp_path)
    finally:
        holder.kill()
        holder.communicate()


def test_a_trial_of_another_instruction_set_is_marked(plan, tmp_path):
    directory = tmp_path / "out"
    go(plan(), directory)
    path = directory / "trials" / "s000-seed0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"isa": "other"}))
    (directory / "trials" / "s000-seed1" / "summary.json").unlink()
    for name in ("s001-seed0", "s001-seed1"):
        found = json.loads((directory / "trials" / name / "summary.json").read_text())
        (directory / "trials" / name / "summary.json").write_text(json.dumps(found | {"isa": "other"}))
    shown = go(plan(), directory)
    assert shown.notes == [
        f"s000-seed1 was computed with {kernels.isa}, others with other: they may differ in their last digits"
    ]
    assert shown.summary["instruction_sets"] == {kernels.isa: 1, "other": 3}


# The test split --------------------------------------------------------------------------------------


def test_confirmed_trials_alone_are_measured_on_test_and_once(plan, tmp_path, monkeypatch):
    head = 'objective = "val.accuracy"\ngoal = "maximize"'
    confirmed = plan(head, tail=CONFIRM, data__test_fraction=0.1, train__metrics=["accuracy"])
    directory = tmp_path / "out"
    shown = go(confirmed, directory)
    looked = sorted(path.parent.name for path in directory.rglob("test.json"))
    assert looked == [f"s00{shown.summary['best']}-seed7", f"s00{shown.summary['best']}-seed8"]
    (entry,) = shown.summary["confirmed"]
    for name, seed in zip(looked, ("7", "8")):
        alone = saved.evaluate(directory / "trials" / name, split="test")["test"]
        assert entry["test"][seed] == shown.results[name].test == alone["accuracy"]
    assert all(result.test is None for name, result in shown.results.items() if name not in looked)
    assert not any("test" in str(r["split"]) for run in records.load(directory) for r in run.records)
    before = snapshot(directory)
    assert go(confirmed, directory).lists == []
    assert snapshot(directory) == before
    measured = directory / "trials" / looked[0] / "test.json"
    measured.unlink()  # killed before it was written
    assert go(confirmed, directory).lists == [[(looked[0], None)]]
    for damaged in ("{", "[1]", '{"a": 1}'):
        measured.write_text(damaged)
        assert go(confirmed, directory).lists == [[(looked[0], None)]]
    after = snapshot(directory)
    assert all(after[path] == time for path, time in before.items() if path.name == "metrics.jsonl")
    assert json.loads((directory / "summary.json").read_text())["confirmed"][0]["test"] == entry["test"]


def test_without_a_test_split_nothing_is_measured_on_it(plan, tmp_path):
    shown = go(plan(tail=CONFIRM), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("test.json")) and "test" not in shown.summary["confirmed"][0]


# The table -------------------------------------------------------------------------------------------


def test_the_table_can_be_read_back(plan, tmp_path):
    plan = plan(space=THREE, tail=HALVING)
    shown = go(plan, tmp_path / "out")
    found = sweep_results.read_table(tmp_path / "out", plan.settings)
    assert list(found) == sorted(shown.results)
    for name, result in found.items():
        there = shown.results[name]
        assert (result.trial, result.state, result.step) == (there.trial, there.state, there.step)
        assert result.value == there.value and result.seconds == pytest.approx(there.seconds, abs=0.01)
    assert sweep_results.read_table(tmp_path, plan.settings) == {}
    head = "setting,seed,state,step,val.loss,error,seconds\n"
    for text, words in (
        ("", "is not a sweep's table"), ("setting,seed\n1,2\n", "is not a sweep's table"),
        (f"{head}0,0,ended,3,,,\n", "its line 2"),
        (f"{head}0,0,pending,0,,,\n9,0,pending,0,,,\n", "its line 3"),
    ):  # fmt: skip
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(InputError, match=words):
            sweep_results.read_table(tmp_path, plan.settings)


# Kills -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers through /proc")
def test_a_sweep_survives_kills():
    said = []
    assert sweep_kills.run(3, seed=1, say=said.append), said


def test_kills_that_changed_something_would_be_seen(plan, tmp_path):
    for name in ("alone", "killed"):
        go(plan(space=THREE, tail=HALVING + CONFIRM, data__test_fraction=0.1), tmp_path / name)
    assert sweep_kills.differences(tmp_path / "alone", tmp_path / "killed") == []
    table, (test, *_) = tmp_path / "killed" / "results.csv", (tmp_path / "killed").rglob("test.json")
    table.write_text(table.read_text().replace("pruned", "paused", 1))
    path = tmp_path / "killed" / "summary.json"
    path.write_text(path.read_text().replace('"decided": true', '"decided": false'))
    test.unlink()
    found = " ".join(sweep_kills.differences(tmp_path / "alone", tmp_path / "killed"))
    assert "results.csv: " in found and "summary.json: decided is False, not True" in found
    assert f"{test.parent.name}: files: ['test.json'] are in one of the two only" in found
