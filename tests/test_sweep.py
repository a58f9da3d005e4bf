"""Sweeps: the file, what workers do and survive, the table, the verdict."""

import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

from cllm import config, records, sweep, train, verdict, watch
from cllm.errors import InputError
from cllm.files import Lock
from cllm.progress import Silent
from cllm.sweep.results import read, read_table

BASE = """
[data]
source = "{source}"
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[schedule]
warmup_steps = 2
min_lr = 0.0
[train]
batch_size = 4
max_steps = 12
eval_interval = 6
checkpoint_interval = 4
"""
LONG = BASE.replace("max_steps = 12", "max_steps = 500").replace("interval = 4", "interval = 50")
SPACE = """
[sweep]
base = "base.toml"
seeds = [1, 0]
[[space]]
"optim.lr" = [1e-3, 1e-2]
"""
ONE = '\n[[space]]\n"optim.lr" = 1e-3\n'


class Quiet:
    """A display that keeps what it is told."""

    def start(self, sweep, directory, results, n_workers):
        self.n_workers, self.ended_results, self.steps = n_workers, [], []
        self.lists, self.notes = [], []

    def stage(self, orders, left):
        self.lists.append([(order.trial.name, order.until) for order in left])

    def note(self, text):
        self.notes.append(text)

    def step(self, trial, step, loss):
        self.steps.append((trial.name, step))

    def ended(self, result):
        self.ended_results.append(result)

    def end(self, text):
        self.text = text


@pytest.fixture
def write(tmp_path, text_file):
    """Write a sweep's file beside its base and return its path."""

    def write(text=SPACE, base=BASE):
        (tmp_path / "base.toml").write_text(base.format(source=text_file), encoding="utf-8")
        path = tmp_path / "sweep.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def small(write):
    return sweep.Sweep.load(write())


def table(directory):
    with open(directory / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_seconds(directory):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table(directory)]


# The file --------------------------------------------------------------------------------------------


def test_settings_are_the_union_of_products(write):
    plan = sweep.Sweep.load(write("""
        [sweep]
        base = "base.toml"
        seeds = [5, 3]
        [[space]]
        "optim.lr" = [1e-3, 3e-3]
        "model.n_embd,model.n_head" = [[16, 2], [32, 4]]
        "optim.betas" = [[0.9, 0.99]]
        [[space]]
        "optim.name" = "sgd"
        "optim.momentum" = 0.9
        "optim.lr" = [0.1]
        [[space]]
        "optim.lr" = 3e-3
        "optim.betas" = [[0.9, 0.99]]
        "model.n_embd" = 32
        "model.n_head" = 4
    """))  # fmt: skip
    adamw = [
        {"optim.lr": lr, "model.n_embd": width, "model.n_head": heads, "optim.betas": [0.9, 0.99]}
        for lr, (width, heads) in itertools.product([1e-3, 3e-3], [(16, 2), (32, 4)])
    ]
    assert plan.settings == [*adamw, {"optim.name": "sgd", "optim.momentum": 0.9, "optim.lr": 0.1}]
    assert [trial.name for trial in plan.trials()][:3] == ["s000-seed3", "s000-seed5", "s001-seed3"]
    words = "optim.lr = 0.001, model.n_embd = 16, model.n_head = 2, optim.betas = [0.9, 0.99]"
    assert plan.describe(0) == words


def test_a_trial_is_the_base_with_its_setting_seed_and_threads(small, text_file):
    trial = small.trials()[3]
    made = small.trial_config(trial, "somewhere")
    assert (trial.setting, trial.seed) == (1, 1)
    assert [small.trial_config(trial).train.seed for trial in small.trials()] == [0, 1, 0, 1]
    assert made.data.source == str(text_file)
    assert (made.optim.lr, made.model.n_embd, made.train.seed, made.train.threads) == (1e-2, 16, 1, 1)
    assert made.run.dir == os.path.join("somewhere", "trials", "s001-seed1")


def test_the_sweeps_base_section_and_overrides_win_over_the_base_file(write):
    path = write(SPACE + "[base.train]\nmax_steps = 30\neval_interval = 10\n")
    plan = sweep.Sweep.load(path, {"base.train.max_steps": 40, "sweep.seeds": [7]})
    (first, _) = plan.trials()
    made = plan.trial_config(first)
    assert (made.train.max_steps, made.train.eval_interval, made.train.checkpoint_interval) == (40, 10, 4)
    assert first.seed == 7


def test_what_an_optimizer_lacks_is_left_out_of_the_base_with_a_notice(write):
    base = BASE + "[optim]\nname = 'adamw'\nbetas = [0.9, 0.95]\nweight_decay = 0.2\n"
    text = '[sweep]\nbase = "base.toml"\n[[space]]\n"optim.name" = ["adamw", "sgd"]'
    plan = sweep.Sweep.load(write(text, base))
    adamw, sgd = (plan.trial_config(trial).optim for trial in plan.trials()[::3])
    assert adamw.arguments["betas"] == (0.9, 0.95)
    assert "betas" not in sgd.arguments and sgd.arguments["weight_decay"] == 0.2
    assert plan.notices == ['optim.betas of the base is left out where optim.name is "sgd"']
    with pytest.raises(InputError, match=r"optim\.betas is not an argument of sgd"):
        sweep.Sweep.load(write('[[space]]\n"optim.name" = "sgd"\n"optim.betas" = [[0.9, 0.95]]'))


def test_the_resolved_copy_is_a_sweep_of_its_own(small, tmp_path):
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "sweep.toml"
    copy.write_text(config.to_toml(small.resolved()), encoding="utf-8")
    again = sweep.Sweep.load(copy)
    assert again == small
    for trial in small.trials():
        assert again.trial_config(trial) == small.trial_config(trial)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[space]]\n"optim.lrr" = [1e-3]', 'unknown key optim.lrr (did you mean "optim.lr"?)'),
        ('[[space]]\n"optim.lr" = [1e-3, "fast"]', "setting 1 (optim.lr = fast): optim.lr is"),
        ('[[space]]\n"optim.lr" = [1e-3, nan]', "optim.lr is nan"),
        ('[[space]]\n"model.n_embd" = [16, 17]', "setting 1 (model.n_embd = 17)"),
        ('[[space]]\n"optim.lr" = []', '"optim.lr" = [] leaves nothing to run'),
        ("", "there is no [[space]]"),
        ('[space]\n"optim.lr" = [1e-3]', "space must be made of blocks: [[space]]"),
        ("[[space]]\noptim.lr = [1e-3]", 'a dotted key in [[space]] needs quotes: "optim.lr"'),
        ('[[space]]\n"model.n_embd,model.n_head" = [16, 2]', "moves 2 keys together"),
        ('[[space]]\n"train.seed" = [1, 2]', "train.seed cannot be part of [[space]], use sweep.seeds"),
        (f'[sweep]\nmethod = "gird"{ONE}', "sweep.method is 'gird' (did you mean \"grid\"?), it must be"),
        (f"[sweep]\nsede = [1]{ONE}", 'unknown key sweep.sede (did you mean "seeds"?)'),
        (f"[sweep]\nseeds = []{ONE}", "sweep.seeds is [], it must be a list of integers"),
        (f"[sweep]\nseeds = [1, 1]{ONE}", "each seed must be there once"),
        (f'[sweep]\nobjective = "loss"{ONE}', "sweep.objective is 'loss', it must be SPLIT.METRIC"),
        (f'[sweep]\nobjective = "val.los"{ONE}', '"val.los" (did you mean "val.loss"?), it must be one of'),
        (f'[sweep]\nobjective = "val.accuracy"{ONE}', '"val.accuracy", it must be one of train.loss'),
        (f"sweep = 3{ONE}", "sweep is 3, it must be a section: [sweep]"),
        (f'base = "base.toml"{ONE}', "base is 'base.toml', it must be a section: [base]"),
        (f"[base]\ntrain = 3{ONE}", "base.train is 3, it must be a section"),
        (f"[sweep]\nbase = 3{ONE}", "sweep.base is 3, it must be the path"),
        (f"prune = 3{ONE}", "prune is 3, it must be a section"),
        ('[[space]]\n"optim" = [1e-3]', '"optim" is a section, [[space]] needs its keys: "optim.KEY"'),
        (f"[sweep]\nthreads = 0{ONE}", "sweep.threads is 0"),
        ('[spaces]\n"optim.lr" = 1e-3', 'unknown key spaces (did you mean "space"?)'),
        (f"[base.trian]\nmax_steps = 5{ONE}", "unknown key [trian]"),
        ('[[space]]\n"run.widht" = [1, 2]', "run.widht cannot be part of [[space]], use --run.dir"),
        ('[[space]]\n"optim.name" = [["adamw", 1e-3]]', "optim.name is"),
        (f'[[space]]\n"optim.lr" = [1{"0" * 400}]', "optim.lr is"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as caught:
        sweep.Sweep.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_a_runs_config_is_sent_to_cllm_train(write):
    path = write("[train]\nmax_steps = 3")
    message = f"{path} describes a run, not a sweep; train it with: cllm train {path}"
    with pytest.raises(InputError, match=re.escape(message)):
        sweep.Sweep.load(path)


def test_a_metric_can_be_the_objective(write, tmp_path):
    text = SPACE.replace("seeds = [1, 0]", 'seeds = [1]\nobjective = "val.accuracy"\ngoal = "maximize"')
    plan = sweep.Sweep.load(write(text + '[base.train]\nmetrics = ["accuracy"]\n'))
    summary = sweep.run(plan, tmp_path / "out", workers=1, progress=Quiet())
    best = max(run.series("val", "accuracy")[1][-1] for run in records.load(tmp_path / "out"))
    assert summary["settings"][0]["mean"] == best > 0


def test_users_files_are_found_beside_the_sweep_and_its_base(write, tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text("def build(config, a=1): ...\ndef other(config, a=2): ...\n")
    path = write("""
        [sweep]
        objective = "val.x"
        [[space]]
        "task.build" = ["my.py:build", "my.py:other"]
        [[space]]
        "task.a,task.build" = [[3, "my.py:other"]]
    """, base="")
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plan = sweep.Sweep.load(path)
    mine = f"{tmp_path.name}/my.py"
    assert [plan.trial_config(trial).task.build for trial in plan.trials()[::3]] == [
        f"{mine}:build", f"{mine}:other", f"{mine}:other"
    ]  # fmt: skip
    assert mine in str(plan.resolved()["space"])
    path.write_text(path.read_text() + '\n[base.task]\nbuild = "none.py:f"\n')
    sweep.Sweep.load(path)  # no setting has the base's
    path.write_text('[sweep]\nbase = "base.toml"\n[[space]]\n"task.a" = [1, 2]\n')
    (tmp_path / "base.toml").write_text('[task]\nbuild = "my.py:build"\n')
    assert sweep.Sweep.load(path).base["task"]["build"] == f"{mine}:build"
    (tmp_path / "base.toml").write_text('[task]\nbuild = "none.py:build"\n')
    with pytest.raises(InputError, match=r"names none.py, which is neither .* nor beside .*base.toml"):
        sweep.Sweep.load(path)


def test_bad_overrides_and_missing_files(write, tmp_path):
    with pytest.raises(InputError, match=r"train\.max_steps is not a key of a sweep"):
        sweep.Sweep.load(write(), {"train.max_steps": 3})
    with pytest.raises(FileNotFoundError, match=r"other\.toml"):
        sweep.Sweep.load(write('[sweep]\nbase = "other.toml"\n[[space]]\n"optim.lr" = 1e-3'))


# Running ---------------------------------------------------------------------------------------------


def test_a_sweep_runs_its_trials_and_writes_table_summary_and_copy(small, tmp_path):
    directory = tmp_path / "out"
    shown = Quiet()
    summary = sweep.run(small, directory, workers=2, progress=shown)
    assert shown.n_workers == 2 and len(shown.ended_results) == 4
    rows = table(directory)
    assert list(rows[0]) == ["setting", "seed", "optim.lr", "state", "step", "val.loss", "error", "seconds"]
    assert [(row["setting"], row["seed"], row["optim.lr"]) for row in rows] == [
        ("0", "0", "0.001"), ("0", "1", "0.001"), ("1", "0", "0.01"), ("1", "1", "0.01")
    ]  # fmt: skip
    assert {(row["state"], row["step"], row["error"]) for row in rows} == {("finished", "12", "")}
    for run, row in zip(records.load(directory), rows):
        assert float(row["val.loss"]) == run.series("val", "loss")[1][-1]
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary["trials"] == {"finished": 4, "failed": 0}
    values = [float(row["val.loss"]) for row in rows[2:]]
    (best, _) = summary["settings"]
    assert best["values"] == {"optim.lr": 1e-2} and best["n"] == 2
    assert best["mean"] == pytest.approx(np.mean(values))
    assert best["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))
    assert verdict.wrap(summary["verdict"]) in shown.text
    assert sweep.Sweep.load(directory / "sweep.toml") == small


@pytest.mark.parametrize(
    ("at", "goal", "expected"),
    [("last", "minimize", 2.5), ("best", "minimize", 2.0), ("best", "maximize", 3.0)],
)
def test_at_and_goal_say_which_record_of_a_trial_counts(write, tmp_path, at, goal, expected):
    plan = sweep.Sweep.load(write(), {"sweep.at": at, "sweep.goal": goal})
    trial = plan.trials()[0]
    run_dir = tmp_path / "out" / "trials" / trial.name
    run_dir.mkdir(parents=True)
    with records.Recorder(run_dir) as recorder:
        for step, loss in enumerate((3.0, 2.0, 2.5), 1):
            recorder.write({"step": step, "split": "val", "loss": loss})
    records.write_summary(run_dir, {"state": "finished", "step": 3, "seconds": 1.0, "isa": "avx2"})
    found = read(plan.config, trial, run_dir)
    assert (found.state, found.value) == ("finished", expected)


def test_workers_change_nothing_and_a_trial_is_an_ordinary_run(small, tmp_path):
    sweep.run(small, tmp_path / "one", workers=1, progress=Quiet())
    sweep.run(small, tmp_path / "three", workers=3, progress=Quiet())
    assert without_seconds(tmp_path / "one") == without_seconds(tmp_path / "three")
    trial = small.trials()[1]
    alone = train.Trainer(small.trial_config(trial, tmp_path / "alone"), progress=Silent()).fit()
    assert repr(alone["val_loss"]) == without_seconds(tmp_path / "one")[1]["val.loss"]


def test_running_a_finished_sweep_again_changes_no_file(small, tmp_path):
    directory = tmp_path / "out"
    first = sweep.run(small, directory, workers=2, progress=Quiet())
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    shown = Quiet()
    again = sweep.run(small, directory, workers=2, progress=shown)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert shown.n_workers == 0 and again["verdict"] == first["verdict"]


def test_a_failing_trial_is_reported_and_the_others_go_on(write, tmp_path):
    plan = sweep.Sweep.load(write(SPACE.replace("1e-2]", "1e30]")))
    directory = tmp_path / "out"
    summary = sweep.run(plan, directory, workers=2, progress=Quiet())
    rows = table(directory)
    assert [row["state"] for row in rows] == ["finished", "finished", "failed", "failed"]
    assert "loss is" in rows[2]["error"] and rows[2]["val.loss"] == ""
    assert summary["trials"] == {"finished": 2, "failed": 2}
    assert "2 of 4 trials failed, first s001-seed0 with: " in summary["verdict"]
    assert "optim.lr = 1e+30: 0/2 finished, ranked last" in summary["verdict"]
    shown = Quiet()
    sweep.run(plan, directory, workers=2, progress=shown)  # failed ones are tried again
    assert sorted(result.trial.name for result in shown.ended_results) == ["s001-seed0", "s001-seed1"]
    assert shown.notes == ["tried again, as they failed: s001-seed0, s001-seed1"]


def test_an_exception_in_a_trial_is_its_result_with_the_traceback_beside_it(small, tmp_path):
    directory = tmp_path / "out"
    (directory / "trials" / "s000-seed1").mkdir(parents=True)
    (directory / "trials" / "s000-seed1" / "checkpoints").write_text("a file where a folder should be")
    sweep.run(small, directory, workers=2, progress=Quiet())
    rows = table(directory)
    assert [row["state"] for row in rows] == ["finished", "failed", "finished", "finished"]
    assert "already holds a run" in rows[1]["error"]
    assert "Traceback" in (directory / "trials" / "s000-seed1" / "error.txt").read_text()


class Killer(Quiet):
    """Kills the worker of one trial when it reports its first step."""

    def __init__(self, name):
        self.name = name

    def step(self, trial, step, loss):
        if trial.name == self.name and step > 0:
            self.name = None
            for child in children():
                if trial.name in open_files(child):
                    os.kill(child, signal.SIGKILL)


def children():
    path = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    with open(path) as file:
        return list(map(int, file.read().split()))


def open_files(pid):
    paths = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed in the meantime
            paths.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return " ".join(paths)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the worker through /proc")
def test_a_killed_worker_fails_its_trial_alone_and_a_second_run_mends_it(write, tmp_path):
    # Long enough that the worker is still training when its first report has arrived.
    plan = sweep.Sweep.load(write(base=LONG))
    sweep.run(plan, tmp_path / "undisturbed", workers=2, progress=Quiet())
    directory = tmp_path / "out"
    summary = sweep.run(plan, directory, workers=2, progress=Killer("s000-seed1"))
    rows = table(directory)
    assert [row["state"] for row in rows] == ["finished", "failed", "finished", "finished"]
    assert rows[1]["error"].startswith("worker died: signal 9 (SIGKILL)")
    assert "1/2 finished" in summary["verdict"]
    sweep.run(plan, directory, workers=2, progress=Quiet())
    assert without_seconds(directory) == without_seconds(tmp_path / "undisturbed")
    assert not list(directory.rglob("error.txt"))


def test_ctrl_c_stops_cleanly_and_the_same_command_continues(write, tmp_path):
    path = write(base=LONG)
    plan = sweep.Sweep.load(path)
    sweep.run(plan, tmp_path / "undisturbed", workers=2, progress=Quiet())
    directory = tmp_path / "out"
    command = [sys.executable, "-m", "cllm", "sweep", path, "--run.dir", directory, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(directory.rglob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "again" in errors
    assert "trials finished" in output
    assert "pending" in {row["state"] for row in table(directory)}
    subprocess.run(command, check=True, capture_output=True)
    assert without_seconds(directory) == without_seconds(tmp_path / "undisturbed")


def test_another_sweep_in_the_directory_is_refused_with_the_difference(small, write, tmp_path):
    directory = tmp_path / "out"
    sweep.run(small, directory, workers=2, progress=Quiet())
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    for key, was, value, words in (
        ("train.max_steps", 12, 11, r" \(it can be raised only\)"), ("train.batch_size", 4, 5, ""),
        ("data.val_fraction", "not set", 0.2, ""),
    ):  # fmt: skip
        other = sweep.Sweep.load(write(), {f"base.{key}": value})
        told = rf"another sweep: base\.{key} is {was} there and {value} here{words};"
        with pytest.raises(InputError, match=told):
            sweep.run(other, directory, progress=Quiet())
    other = sweep.Sweep.load(write(SPACE.replace("[1e-3, 1e-2]", "[0.1, 0.3]")))
    with pytest.raises(InputError, match=r"optim\.lr, is \[0\.001, 0\.01\] there and \[0\.1, 0\.3\] here"):
        sweep.run(other, directory, progress=Quiet())
    with pytest.raises(InputError, match="holds a run"):
        sweep.run(small, directory / "trials" / "s000-seed0", progress=Quiet())
    with pytest.raises(InputError, match=r"sweep\.toml was not written by a sweep"):
        sweep.run(small, tmp_path, progress=Quiet())  # where the user's own sweep.toml is
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_trials_on_a_text_that_changed_meanwhile_are_refused(small, text_file, tmp_path):
    directory = tmp_path / "out"
    sweep.run(small, directory, workers=2, progress=Quiet())
    (directory / "trials" / "s001-seed1" / "summary.json").unlink()
    text_file.write_text(text_file.read_text() + "one more line\n")
    before = table(directory)
    with pytest.raises(InputError, match=r"text\.txt has changed since s000-seed0 was trained on it"):
        sweep.run(small, directory, progress=Quiet())
    assert table(directory) == before


def test_two_processes_cannot_run_one_sweep(small, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    told = r"in use by process .*; wait for the end of that sweep"
    with Lock(directory), pytest.raises(InputError, match=told):
        sweep.run(small, directory, progress=Quiet())
    assert list(directory.iterdir()) == []


def test_data_that_cannot_be_used_leaves_nothing_behind(write, tmp_path):
    plan = sweep.Sweep.load(write(base=BASE.replace("block_size = 16", "block_size = 100000")))
    with pytest.raises(InputError):
        sweep.run(plan, tmp_path / "out", progress=Quiet())
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="workers is 0"):
        sweep.run(plan, tmp_path / "out", workers=0)


# Displays --------------------------------------------------------------------------------------------


def test_plain_lines_tell_of_each_trial(small, tmp_path, capsys):
    sweep.run(small, tmp_path / "out", workers=2, progress=watch.Lines())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sweep: 2 settings x 2 seeds = 4 trials, 2 at once with 1 thread each; ")
    ends = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in ends] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    pattern = r"s00\d-seed\d \(optim\.lr = \S+\): val\.loss \d\.\d{4}, .* left"
    assert all(re.search(pattern, line) for line in ends)
    assert lines[-1] == f"all trials: {tmp_path / 'out' / 'results.csv'}"


def test_the_live_table_shows_running_trials_and_the_best_so_far(small, tmp_path):
    from rich.console import Console

    shown = watch.Table()
    sweep.run(small, tmp_path / "out", workers=2, progress=shown)
    shown.step(small.trials()[0], 6, 2.5)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert "4/4 trials" in text and "best so far: val.loss 3.349 ± 0.018, lr=0.01" in text
    assert re.search(r"s000-seed0 +running +6/12 .* 2\.500 .* lr=0\.001", text)
    assert len(re.findall(r"s00\d-seed\d +finished +12 ", text)) == 4


def test_an_override_of_a_section_that_is_a_number_is_refused(write):
    path = write(f"[base]\ntrain = 3{ONE}")
    with pytest.raises(InputError, match=r"base\.train is 3, it must be a section"):
        sweep.Sweep.load(path, {"base.train.max_steps": 5})


def test_trials_of_another_sweep_are_no_results_of_this_one(small, write, tmp_path):
    """Also when somebody has removed the file that tells whose they are."""
    sweep.run(small, tmp_path / "out", workers=1, progress=Quiet())
    (tmp_path / "out" / "sweep.toml").unlink()
    other = sweep.Sweep.load(write(SPACE.replace("1e-3", "7e-3")))
    with pytest.raises(InputError, match=r"s000-seed\d holds another trial: optim\.lr"):
        sweep.run(other, tmp_path / "out", workers=1, progress=Quiet())


@pytest.mark.parametrize(("raised", "said"), [("'x' * 200_000", "x" * 900), ("'bad \\udcff'", r"bad \udcff")])
def test_any_error_of_a_trial_can_be_written_and_read_again(write, tmp_path, monkeypatch, raised, said):
    (tmp_path / "my.py").write_text(f"def build(config):\n    raise ValueError({raised})\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = '[sweep]\nseeds = [0]\nobjective = "val.x"\n[[space]]\n"task.build" = ["my.py:build"]\n'
    plan = sweep.Sweep.load(write(text, base=""))
    summary = sweep.run(plan, tmp_path / "out", workers=1, progress=Quiet())
    assert summary["trials"]["failed"] == 1
    found = read_table(tmp_path / "out", plan.settings)
    assert said in found["s000-seed0"].error and "ValueError" in found["s000-seed0"].error
    assert "ValueError" in (tmp_path / "out" / "trials" / "s000-seed0" / "error.txt").read_text()
