"""What became of a sweep's trials: read from their own files, written as results.csv."""

import csv
import io
import math
from dataclasses import dataclass

from cllm import checkpoint, records
from cllm.files import write_atomic
from cllm.sweep.plan import Trial
from cllm.verdict import text

__all__ = ["Result", "read", "trained", "write_table"]


@dataclass(frozen=True)
class Result:
    """What is known of a trial. `value` is its objective, None unless the state is "finished"."""

    trial: Trial
    state: str = "pending"  # pending | finished | failed
    step: int = 0
    value: float | None = None
    error: str = ""
    seconds: float | None = None


def read(sweep, trial, directory):
    """A trial's result as its own files tell it."""
    run_dir = directory / "trials" / trial.name
    if not (run_dir / "summary.json").exists():
        return Result(trial)
    (found,) = records.load(run_dir)
    step, seconds = found.summary["step"], found.summary["seconds"]
    if found.state != "finished":
        return Result(trial, "failed", step, None, found.summary.get("error", ""), seconds)
    split, _, metric = sweep.config.objective.partition(".")
    has = sweep.config.objective in found.names()
    values = found.series(split, metric)[1] if has else ()
    if not len(values):
        error = f"the run has no record of {sweep.config.objective}"
        return Result(trial, "failed", step, None, error, seconds)
    best = min if sweep.config.goal == "minimize" else max
    known = [value for value in values if not math.isnan(value)]
    value = float(values[-1] if sweep.config.at == "last" else best(known, default=math.nan))
    if not math.isfinite(value):
        return Result(trial, "failed", step, None, f"{sweep.config.objective} is {value}", seconds)
    return Result(trial, "finished", step, value, "", seconds)


def trained(run_dir):
    """What a trial that is finished or has a checkpoint tells of its data and files; {} for another."""
    run = records.Run(run_dir)
    if run.state == "finished":
        return run.summary
    newest = checkpoint.newest(run_dir)
    return {} if newest is None else checkpoint.load(newest)[2]


def write_table(sweep, directory, results):
    """results.csv: one line a trial, by setting and seed."""
    varied = sweep.varied()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["setting", "seed", *varied, "state", "step", sweep.config.objective, "error", "seconds"])
    for result in results.values():
        trial = result.trial
        values = [text(trial.overrides[key]) if key in trial.overrides else "" for key in varied]
        value = "" if result.value is None else repr(result.value)
        seconds = "" if result.seconds is None else f"{result.seconds:.2f}"
        outcome = [result.state, result.step, value, " ".join(result.error.split()), seconds]
        writer.writerow([trial.setting, trial.seed, *values, *outcome])
    write_atomic(directory / "results.csv", file.getvalue())
