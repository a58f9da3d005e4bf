"""What became of a sweep's trials, from their own files, and the table of it."""

import csv
import io
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace

from cllm import checkpoint, records
from cllm.errors import InputError
from cllm.sweep.plan import Trial
from cllm.verdict import text

__all__ = ["TEST", "Result", "read", "read_table", "table", "tested", "trained"]

TEST = "test.json"  # in a trial that was confirmed: what it reached on the test split
MOST_ERROR = 1000  # characters of an error in the table; error.txt has all, and csv reads 131,072 of a cell
STATES = ("pending", "running", "paused", "pruned", "finished", "failed")


@dataclass(frozen=True)
class Result:
    """What is known of a trial.

    Attributes
    ----------
    trial : Trial
    state : str
        "pending", "running", "paused" (at a rung, or when the sweep was stopped), "pruned" (dropped at a
        rung), "finished" or "failed".
    step : int
        Updates done.
    value : float or None
        The objective: of a finished trial as [sweep] at says, of one at a rung as recorded at that step.
    error : str
        Why it failed.
    seconds : float or None
    isa : str or None
        The instruction set that computed it; several with + between when it moved.
    test : float or None
        The objective's metric on the test split, which is measured on confirmed trials only.
    """

    trial: Trial
    state: str = "pending"
    step: int = 0
    value: float | None = None
    error: str = ""
    seconds: float | None = None
    isa: str | None = None
    test: float | None = None


def read(config, trial, run_dir, until=None):
    """A trial's result as its own files tell it.

    Parameters
    ----------
    config : SweepConfig
    trial : Trial
    run_dir : Path
    until : int, optional
        A rung's step: what the trial had reached there counts, however far it has gone since.

    Returns
    -------
    Result
        "paused" at that step with its value there, or without one at its newest checkpoint.
    """
    run = records.Run(run_dir)
    known = run.summary or _checkpoint_state(run_dir)
    if not known:
        return Result(trial)
    step, isas = known["step"], [entry["isa"] for entry in known.get("environments", [known])]
    facts = {"seconds": known["seconds"], "isa": "+".join(dict.fromkeys(isas))}
    if until is not None and step >= until:
        value = dict(_recorded(config, run_dir)).get(until)
        if value is not None:
            return _finite(config, Result(trial, "paused", until, value, **facts))
        if run.state != "failed":
            error = f"the run has no record of {config.objective} at step {until}"
            return Result(trial, "failed", until, None, error, **facts)
    if not run.summary:
        return Result(trial, "paused", step, **facts)
    if run.state == "failed":
        return Result(trial, "failed", step, None, run.summary.get("error", ""), **facts)
    values = [value for _, value in _recorded(config, run_dir)]
    if not values:
        error = f"the run has no record of {config.objective}"
        return Result(trial, "failed", step, None, error, **facts)
    best = min if config.goal == "minimize" else max
    known = [value for value in values if not math.isnan(value)]
    value = values[-1] if config.at == "last" else best(known, default=math.nan)
    test = (tested(config, run_dir, step) or {}).get(config.objective.partition(".")[2])
    return _finite(config, Result(trial, "finished", step, value, test=test, **facts))


def _finite(config, result):
    if math.isfinite(result.value):
        return result
    return replace(result, state="failed", value=None, error=f"{config.objective} is {result.value}")


def _recorded(config, run_dir):
    """(step, value) of each record that has the objective; NaN for what was not finite.

    Only lines of its split are parsed: a sweep that goes on reads thousands of trials, and most of their
    records are of training steps (of 1,000 steps: 4.5 -> 0.4 ms).
    """
    split, _, metric = config.objective.partition(".")
    mark, found = json.dumps(split).encode(), []
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines[:-1]:  # after the last line end is nothing, or what a killed process left unfinished
        if mark in line:
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{run_dir / 'metrics.jsonl'} is damaged: {error}") from None
            if record["split"] == split and metric in record:
                value = record[metric]
                found.append((record["step"], math.nan if value is None else float(value)))
    return found


def trained(run_dir):
    """What a trial that is finished or has a checkpoint tells of its data and files; {} for another."""
    run = records.Run(run_dir)
    return run.summary if run.state == "finished" else _checkpoint_state(run_dir) or {}


def _checkpoint_state(run_dir):
    """The state in the newest checkpoint that has one, with its step; None without. Arrays are not read."""
    for path in reversed(checkpoint.listed(run_dir)):
        with suppress(InputError, OSError):
            found = checkpoint.entry(path)
            return {**found["state"], "step": found["step"]}
    return None


def tested(config, run_dir, step):
    """What a trial of so many steps has reached on the test split, or None when that was not looked at."""
    try:
        found = json.loads((run_dir / TEST).read_bytes())
        return found if (found["step"], found["checkpoint"]) == (step, config.at) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged one tells nothing
        return None


# results.csv -----------------------------------------------------------------------------------------


def table(sweep, results):
    """results.csv as text: one line a trial, by setting and seed."""
    varied = sweep.varied()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["setting", "seed", *varied, "state", "step", sweep.config.objective, "error", "seconds"])
    for result in sorted(results.values(), key=lambda result: (result.trial.setting, result.trial.seed)):
        trial = result.trial
        values = [text(trial.overrides[key]) if key in trial.overrides else "" for key in varied]
        value = "" if result.value is None else repr(result.value)
        seconds = "" if result.seconds is None else f"{result.seconds:.2f}"
        outcome = [result.state, result.step, value, " ".join(result.error.split())[:MOST_ERROR], seconds]
        writer.writerow([trial.setting, trial.seed, *values, *outcome])
    return file.getvalue()


def read_table(directory, settings):
    """The results that a sweep's results.csv tells of; what only the trials' files hold is left out.

    Parameters
    ----------
    directory : Path
    settings : list of dict
        By number.

    Returns
    -------
    dict of str to Result
        By trial's name, in the table's order; empty without a table.

    Raises
    ------
    InputError
        When the file is not such a table.
    """
    path = directory / "results.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
    except FileNotFoundError:
        return {}
    except (ValueError, csv.Error):
        raise InputError(f"{path} is not a sweep's table") from None
    found = {}
    if head[:2] != ["setting", "seed"] or head[-1] != "seconds":
        raise InputError(f"{path} is not a sweep's table")
    try:
        for row in rows:
            number, seed = int(row[0]), int(row[1])
            state, step, value, error, seconds = row[-5:]
            if state not in STATES or len(row) != len(head):
                raise ValueError
            trial = Trial(number, seed, settings[number])
            value, seconds = (None if cell == "" else float(cell) for cell in (value, seconds))
            found[trial.name] = Result(trial, state, int(step), value, error, seconds)
    except (ValueError, IndexError):
        raise InputError(f"{path} is not the table of this sweep: its line {len(found) + 2}") from None
    return found
