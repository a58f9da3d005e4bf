"""Watching a sweep: `cllm status` from its files, the live table, plain lines."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from test_sweep_running import CONFIRM, HALVING, THREE, Quiet, go, make_plan, snapshot

from cllm import config, records, status, sweep, watch
from cllm.errors import InputError
from cllm.files import LOCK, Lock
from cllm.sweep import folder
from cllm.sweep.results import Result, table
from cllm.sweep.worker import Order


@pytest.fixture
def plan(tmp_path, text_file):
    return partial(make_plan, tmp_path, text_file)


# Words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([5.0, 3.0, 1.0], 8, "█▅▁"),
        ([2.0, 2.0], 8, "▁▁"),
        ([4, 4, 2, 2, 0, 0], 3, "█▅▁"),  # means of two
        ([1.0, None, float("inf"), 3.0], 8, "▁  █"),
        ([None, None], 8, "  "),
        ([], 8, ""),
    ],
)
def test_sparklines(values, width, line):
    assert watch.sparkline(values, width) == line
    plain = watch.sparkline(values, width, watch.PLAIN_BLOCKS)
    assert plain == line.translate(str.maketrans(watch.BLOCKS, watch.PLAIN_BLOCKS)) and plain.isascii()


def test_settings_in_few_words(plan):
    both = plan(space='[[space]]\n"optim.lr" = [1e-3, 0.1]\n"model.norm" = ["layer", "rms"]\n')
    assert watch.short(both, 1) == "lr=0.001 norm=rms"
    alike = plan(space='[[space]]\n"optim.name" = ["adamw", "sgd"]\n"schedule.name" = ["cosine", "linear"]\n')
    assert watch.short(alike, 1) == "optim.name=adamw schedule.name=linear"


def test_the_best_so_far_is_that_of_the_furthest_rung_until_one_has_finished(plan):
    plan = plan(space=THREE, tail=HALVING)
    at = {(0, 4): 1.0, (1, 4): 2.0, (1, 8): 3.0, (2, 4): 9.0}
    results = {}

    def come(setting, step, state="paused"):
        for seed in (0, 1):
            trial = plan.trial(setting, seed)
            results[trial.name] = Result(trial, state, step, at.get((setting, step), 5.0))

    assert watch.best(plan, results) == ""
    come(0, 4), come(1, 4), come(2, 4)
    assert watch.best(plan, results) == "best so far: val.loss 1.0000 at step 4, lr=0.001"
    come(1, 8)
    assert watch.best(plan, results) == "best so far: val.loss 3.0000 at step 8, lr=0.01"
    del results["s001-seed1"]  # a mean over some seeds would not be one
    assert watch.best(plan, results) == "best so far: val.loss 1.0000 at step 4, lr=0.001"
    come(2, 12, "finished")
    assert watch.best(plan, results) == "best so far: val.loss 5, lr=0.1"
    assert watch.counts(results) == "2 finished, 3 paused"


# Displays --------------------------------------------------------------------------------------------


def test_plain_lines_tell_of_rungs_and_confirmation(plan, tmp_path, capsys):
    sweep.run(plan(space=THREE, tail=HALVING + CONFIRM), tmp_path / "out", workers=2, progress=watch.Lines())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "sweep: 3 settings x 2 seeds = 6 trials, 2 at once with 1 thread each; files in "
    )
    stages = [line for line in lines if re.match("rung|after|confirmation", line)]
    assert stages == [
        "rung 1 of 2: 3 settings to step 4", "rung 2 of 2: 2 settings to step 8, 1 dropped",
        "after the last rung: 1 setting to step 12, 1 dropped",
        "confirmation: the best 1 setting again, with 2 fresh seeds",
    ]  # fmt: skip
    ends = [line for line in lines if line.startswith("[")]
    assert [line[:5] for line in ends[:6]] == [f"[{i}/6]" for i in range(1, 7)]
    assert [line[:5] for line in ends[6:10]] == [f"[{i}/4]" for i in range(1, 5)]
    assert [line[:5] for line in ends[10:]] == ["[1/2]", "[2/2]"] * 2
    assert all(re.search(r"val\.loss \d\.\d{4} at step 4, .* left", line) for line in ends[:6])


def test_time_left_is_that_of_the_stage_at_the_rate_so_far(plan, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(watch, "monotonic", lambda: clock[0])
    plan = plan(tail='[prune]\nmethod = "halving"\nsteps = [4]\n')
    trials = plan.trials()
    results = {trial.name: Result(trial) for trial in trials}
    shown = watch.Lines()
    shown.start(plan, tmp_path, results, 2)
    orders = [Order(trial, plan.trial_config(trial), plan.config, 4) for trial in trials]
    shown.stage(orders, orders)
    assert shown.left() == "time left not known yet"
    clock[0] = 10.0
    shown.step(trials[0], 4, None), shown.step(trials[1], 1, None), shown.step(trials[1], 0, None)
    assert shown.left() == "22 s left"  # 5 of 16 steps
    clock[0] = 3600.0
    for trial in trials:
        results[trial.name] = Result(trial, "paused", 4, 2.0, seconds=1.0)
        shown.ended(results[trial.name])
    assert shown.left() == "0.0 s left"
    last = [Order(trial, plan.trial_config(trial), plan.config) for trial in trials[:2]]
    shown.stage(last, last)
    assert shown.left().startswith("1 h 0 min left, until ")  # 16 steps more, as many as were done


def test_what_is_done_already_is_said(plan, tmp_path, capsys):
    go(plan(space=THREE), tmp_path / "out")
    (tmp_path / "out" / "trials" / "s001-seed1" / "summary.json").unlink()
    sweep.run(plan(space=THREE), tmp_path / "out", workers=1, progress=watch.Lines())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "5 trials of 6 done already and kept" and lines[2].startswith("[6/6] s001-seed1 ")


class Screen(watch.Table):
    """A live table whose drawings are kept: of a terminal of 80 columns and 24 lines."""

    def start(self, *arguments):
        from rich.console import Console

        super().start(*arguments)
        self.live.stop()
        self.console = Console(width=80, height=24, file=io.StringIO(), markup=False, highlight=False)
        self.unicode, self.drawings = True, []

    def draw(self):
        from rich.console import Console

        console = Console(width=80, height=24, file=io.StringIO())
        self.best_due = 0.0
        console.print(self)
        self.drawings.append(console.file.getvalue().splitlines())

    def step(self, trial, step, loss):
        super().step(trial, step, loss)
        self.draw()

    def ended(self, result):
        super().ended(result)
        self.draw()


def test_the_live_table_fits_a_small_terminal(plan, tmp_path):
    space = (
        '[[space]]\n"optim.lr" = [1e-3, 1e-2, 0.1, 0.2, 1e30]\n"model.activation" = ["gelu_tanh", "relu"]\n'
    )
    shown = Screen()
    sweep.run(plan(space=space, tail=HALVING + CONFIRM), tmp_path / "out", workers=2, progress=shown)
    for lines in shown.drawings:
        assert len(lines) < 24 and max(map(len, lines)) <= 80
    first = next(lines for lines in shown.drawings if lines[0].startswith("rung 1 of 2"))
    assert re.match(r"0/20 trials ╌+ time left not known yet", first[1])
    assert re.match(r"s000-seed\d  running  \d/4 ", first[2])
    rung = [
        lines
        for lines in shown.drawings
        if lines[0].startswith("rung 2 of 2: 5 settings to step 8, 5 dropped")
    ]
    row = next(line for line in rung[-1] if line.startswith("s002"))
    assert re.match(r"s00\d-seed\d  paused +8 +[▁▂▃▄▅▆▇█]+ +\d\.\d{3}  +lr=0\.01 activation=gelu_tanh$", row)
    assert rung[-1][-2].startswith("best so far: val.loss ") and "at step 8" in rung[-1][-2]
    assert rung[-1][-1].endswith("4 failed")
    last = shown.drawings[-1]
    assert last[0].startswith("confirmation: the best 1 setting again, with 2 fresh seeds")
    assert re.match(r"2/2 trials ━+ 0\.0 s left", last[1])
    said = shown.console.file.getvalue()
    assert re.search(r"^rung 1 of 2: 10 settings to step 4 \(.* s\)$", said, re.MULTILINE)
    assert said.count(": failed: the loss is") == 4
    assert all(len(line) <= 80 for line in said.splitlines()[:-1])


# Status ----------------------------------------------------------------------------------------------


class Looking(Quiet):
    """Looks at the sweep from outside while it runs."""

    def __init__(self, directory):
        self.directory, self.seen = directory, []

    def step(self, trial, step, loss):
        if (self.directory / "results.csv").exists():
            self.seen.append(status.lines(self.directory))


def test_a_running_sweep_from_another_shell(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["cllm.sweep.run"], "TABLE_INTERVAL", 0.0)
    monkeypatch.setattr(sys.modules["cllm.sweep.run"], "TABLE_SHARE", 1e9)
    directory = tmp_path / "out"
    shown = Looking(directory)
    sweep.run(plan(space=THREE, train__max_steps=300), directory, workers=1, progress=shown)
    text = "\n".join("\n".join(lines) for lines in shown.seen)
    assert all(
        lines[:1] == [str(directory)] and lines[1].startswith(f"running, process {os.getpid()} on ")
        for lines in shown.seen
    )
    assert re.search(r"^1 finished, 1 running, 4 pending; .* left$", text, re.MULTILINE)
    row = re.search(r"^s00\d-seed\d  (\d+)/300 +[▁▂▃▄▅▆▇█]+ +\d\.\d{3} +\d.* s  lr=", text, re.MULTILINE)
    assert row and 0 < int(row[1]) <= 300
    assert "best so far by val.loss:" in text
    before = snapshot(directory)
    done = subprocess.run(
        [sys.executable, "-m", "cllm", "status", directory], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[1].startswith("finished in ") and lines[2] == "6 finished"
    assert "Ranking, unconfirmed: best of 3 settings is" in done.stdout
    assert snapshot(directory) == before


@pytest.fixture
def many(plan, tmp_path, monkeypatch):
    """A directory as a sweep of 2,000 trials leaves it that was killed; the sweep; its results."""
    rates = json.dumps([1e-5 * (1 + i) for i in range(1000)])
    whole = plan(space=f'[[space]]\n"optim.lr" = {rates}\n', tail=HALVING + CONFIRM)
    results, directory = {}, tmp_path / "many"
    for index, trial in enumerate(whole.trials()):
        state = "finished" if index < 1000 else "failed" if index < 1010 else "pending"
        value = 2.0 + index / 1000 if state == "finished" else None
        results[trial.name] = Result(
            trial, state, 12 if value else 0, value, "it, \n broke" * (state == "failed")
        )
    for index in range(1010, 1030):
        trial = whole.trials()[index]
        results[trial.name] = Result(trial, "running", 3)
    run_dir = directory / "trials" / "s505-seed0"
    run_dir.mkdir(parents=True)
    with records.Recorder(run_dir) as recorder:
        for step in range(1, 6):
            recorder.write({"step": step, "split": "train", "loss": 6.0 - step, "time_forward": 0.5})
    (run_dir / "metrics.jsonl").open("a").write('{"step": 6, "split": "tr')
    folder.write_settings(whole, directory)
    folder.write_new(directory / "sweep.toml", config.to_toml(whole.resolved()))
    folder.write_new(directory / "results.csv", table(whole, results))
    (directory / LOCK).write_text("process 1 on a-machine since yesterday")
    monkeypatch.setenv("COLUMNS", "60")
    return directory, whole, results


def test_two_thousand_trials(many):
    directory, whole, results = many
    lines = status.lines(directory)
    assert lines[:2] == [str(directory), "stopped; the command that started it goes on with it"]
    assert lines[2] == "1000 finished, 20 paused, 10 failed, 970 pending"
    assert lines[3] == "s500-seed0 failed: it, broke" and lines[6] == "and 7 more failed"
    assert lines[7:9] == ["best so far by val.loss:", "  2.00050 ± 0.00050  2/2 finished  lr=1e-05"]
    assert len(lines) == 13 and max(map(len, lines[1:])) <= 60
    with Lock(directory, "sweep"):
        lines = status.lines(directory)
    assert lines[1].startswith(f"running, process {os.getpid()} on ")
    assert lines[2].startswith("1000 finished, 20 running, 10 failed, 970 pending")
    assert lines[3].startswith("s505-seed0  5/12  █▆▅▃▁  1.000  3.5 s  lr=0.00506")
    assert lines[18].startswith("s512-seed1  3/12 ") and lines[19] == "and 4 more are running"
    there, found = folder.contents(directory)
    assert (there.settings, there.numbers) == (whole.settings, whole.numbers)
    assert there.config == whole.config and there.prune == whole.prune and there.confirm == whole.confirm
    assert {name: result.state for name, result in found.items()} == {
        name: result.state for name, result in results.items()
    }


def test_time_left_says_that_confirmation_is_still_to_come(many):
    _, whole, results = many
    for name in list(results)[:1000]:
        results[name] = replace(results[name], seconds=1.2, step=12)
    assert status._left(whole, results, 2).endswith(", and then what is to be confirmed")
    assert whole.prune.rungs and status._left(whole, results, 2).startswith("at most ")
    fresh = whole.trial(0, whole.confirm_seeds[0])
    assert not status._left(whole, {**results, fresh.name: Result(fresh)}, 2).endswith("confirmed")


def test_records_that_hold_no_number_are_no_losses_and_no_times(tmp_path):
    records_of = [{"loss": [1, 2], "time_x": None, "time_forward": 0.5}, {"loss": 2.5, "time_forward": 1.5}]
    lines = [json.dumps({"step": step, "split": "train", **one}) for step, one in enumerate(records_of, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert status._progress(tmp_path) == (2, [None, 2.5], 1.0)


def test_what_is_no_sweep_is_said_in_one_sentence(plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such sweep: "):
        status.lines(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no sweep \(sweep\.toml\)"):
        status.lines(tmp_path / "empty")
    go(plan(), tmp_path / "out")
    for name, text, words in (
        ("results.csv", "setting\n", "is not the table of this sweep|is not a sweep's table"),
        ("summary.json", "{", r"summary\.json is not a JSON file"),
        ("settings.json", "[", r"settings\.json is not a JSON file"),
        ("sweep.toml", "[sweep]\nmethod = 'grid'\n", r"sweep\.toml was not written by a sweep"),
    ):
        path = tmp_path / "out" / name
        before = path.read_bytes()
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            status.lines(tmp_path / "out")
        path.write_bytes(before)
    assert status.lines(tmp_path / "out")[2] == "4 finished"
