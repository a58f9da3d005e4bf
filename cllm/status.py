"""`cllm status SWEEP`: how far a sweep is, from its files alone, whoever runs it and wherever.

The sweep rewrites results.csv every second; who holds the directory's lock is running it. Only the trials
that run at present are looked at themselves, for their losses.
"""

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from cllm import config as configs
from cllm import verdict, watch
from cllm.errors import InputError
from cllm.files import LOCK
from cllm.progress import duration
from cllm.sweep import folder

__all__ = ["lines"]

TAIL = 1 << 16  # bytes of a running trial's records that are read, the last ones
MOST_ROWS = 16  # running trials
MOST_SETTINGS = 5
MOST_FAILED = 3


def lines(directory):
    """What there is to say of a sweep, as lines that fit the terminal.

    Parameters
    ----------
    directory : path-like

    Raises
    ------
    InputError
        When there is no sweep, or its files are damaged.
    FileNotFoundError
        When there is nothing at all.
    """
    directory = Path(directory)
    sweep, results = folder.contents(directory)
    owner, summary = _owner(directory), _summary(directory)
    if owner is None:  # the table was written while somebody did
        for name, result in results.items():
            if result.state == "running":
                results[name] = replace(result, state="paused")
    width = shutil.get_terminal_size().columns
    running = [result for result in results.values() if result.state == "running"]
    if owner is None and summary is not None:
        state = f"finished in {duration(summary['seconds'])}"
    elif owner is not None:
        state = f"running, {owner}"
    else:
        state = "stopped; the command that started it goes on with it"
    left = _left(sweep, results, len(running)) if owner is not None else ""
    found = [state, "; ".join(filter(None, (watch.counts(results) or "no trial has begun", left)))]
    if owner is not None:
        rows = [_row(sweep, result, directory) for result in running[:MOST_ROWS]]
        found += watch.columns(rows)
        if len(running) > MOST_ROWS:
            found.append(f"and {len(running) - MOST_ROWS} more are running")
    failed = [result for result in results.values() if result.state == "failed"]
    found += [f"{result.trial.name} failed: {result.error}" for result in failed[:MOST_FAILED]]
    if len(failed) > MOST_FAILED:
        found.append(f"and {len(failed) - MOST_FAILED} more failed")
    found += _best(sweep, results)
    found = [str(directory), *(watch.cut(line, width) for line in found)]
    if summary is not None and owner is None:
        found += ["", verdict.wrap(summary["verdict"], width)]
    return found


def _owner(directory):
    """Who runs the sweep, as its lock says; None when nobody does."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:  # held; or on a file system without locks, where the file is all there is
        return os.read(descriptor, 200).decode(errors="replace").strip() or "by another process"
    finally:
        os.close(descriptor)


def _summary(directory):
    path = directory / "summary.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None


def _best(sweep, results):
    """The first settings of the ranking as lines, the confirmed ones before; or what is best at a rung."""
    found = []
    for title, ranked in (
        ("confirmed with fresh seeds:", verdict.confirmed(sweep, results)),
        (f"best so far by {sweep.config.objective}:", verdict.ranking(sweep, results)),
    ):
        rows = [
            (
                f"  {verdict.plus_minus(standing.mean, standing.standard_error)}",
                f"{standing.finished} finished",
                watch.short(sweep, standing.setting),
            )
            for standing in ranked[:MOST_SETTINGS] if standing.complete
        ]  # fmt: skip
        found += [title, *watch.columns(rows)] if rows else []
    return found or list(filter(None, [watch.best(sweep, results)]))


def _left(sweep, results, n_running):
    """How long it takes at most, by the seconds and steps of the trials that have ended; in words."""
    ended = [result for result in results.values() if result.seconds and result.step]
    if not ended or not n_running:
        return ""
    seconds = sum(result.seconds for result in ended) / sum(result.step for result in ended)
    steps = 0
    for result in results.values():
        if result.state in ("pending", "running", "paused"):
            steps += max(0, _max_steps(sweep, result.trial) - result.step)
    left = ("at most " if sweep.prune.rungs else "") + watch.until(seconds * steps / n_running)
    confirming = any(result.trial.seed in sweep.confirm_seeds for result in results.values())
    return f"{left}, and then what is to be confirmed" if sweep.confirm_seeds and not confirming else left


def _max_steps(sweep, trial):
    """The trial's train.max_steps, without making its whole configuration."""
    of_base = configs.flatten(sweep.base).get("train.max_steps", configs.TrainConfig.max_steps)
    return trial.overrides.get("train.max_steps", of_base)


def _row(sweep, result, directory):
    """A running trial: name, step, losses, the last one, time to its end, setting."""
    name, goal = result.trial.name, _max_steps(sweep, result.trial)
    step, losses, seconds = _progress(directory / "trials" / name)
    spark = watch.sparkline(losses)
    loss = f"{losses[-1]:.3f}" if losses and losses[-1] is not None else ""
    step = max(step, result.step)
    left = duration(seconds * (goal - step)) if seconds else ""
    return name, f"{step}/{goal}", spark, loss, left, watch.short(sweep, result.trial.setting)


def _progress(run_dir):
    """From the end of a trial's records: its step, its losses, the seconds that a step takes."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            tail = file.read().splitlines()
    except FileNotFoundError:
        return 0, [], 0.0
    records = []
    for line in tail:
        try:
            record = json.loads(line)
        except ValueError:  # the first or the last one, of which a part is here
            continue
        if isinstance(record, dict) and record.get("split") == "train" and "step" in record:
            records.append(record)
    if not records:
        return 0, [], 0.0
    times = [value for record in records for key, value in record.items() if key.startswith("time_")]
    losses = [record.get("loss") for record in records]
    losses = [loss if isinstance(loss, int | float) else None for loss in losses]
    seconds = sum(value for value in times if isinstance(value, int | float)) / len(records)
    return records[-1]["step"], losses, seconds
