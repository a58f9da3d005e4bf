"""Which runs belong together, and what each of them has come to."""

import math
from pathlib import Path

import numpy as np

from cllm import records
from cllm.figures.style import is_task, short, text, unmarked

__all__ = ["Trial", "by_setting", "end", "ended", "hashable", "mean_or_inf", "mean_over", "varied"]


class Trial(records.Run):
    """A run whose state and end its sweep's table tells: of 2,000 of them the records take too long to read.

    Parameters
    ----------
    path : Path
    config : dict
        Flat, as that of a run.
    state : str
        "finished", "failed", "pruned" at a rung, or "unfinished".
    step : int
    judged : tuple
        The objective, and at of the sweep.
    value : float or None
        What it has reached in the objective.
    """

    state = None  # the table's, not that of a summary

    def __init__(self, path, config, state, step, judged, value):
        super().__init__(path)
        self.config, self.state, self.step, self.judged = config, state, step, judged
        self.value = math.nan if value is None else value
        self._firsts = {}

    def first(self, split, key):
        if (split, key) not in self._firsts:
            self._firsts[split, key] = super().first(split, key)
        return self._firsts[split, key]


def varied(runs, but):
    """Config keys in which the runs differ, without `but` and those that say only where or how fast."""
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    varied = []
    for key in keys:
        value = configs[0].get(key)
        if all(config.get(key) == value for config in configs):
            continue
        # Arguments of an optimizer or schedule are compared among the runs of one name: what else differs
        # follows from the name.
        name = f"{key.partition('.')[0]}.name"
        found = {}
        for config in configs:
            kind = None if key == name else config.get(name)
            found.setdefault(kind, set()).add(hashable(config.get(key)))
        differs = any(len(values) > 1 for values in found.values())
        if differs and key not in ("run.dir", "train.threads", "train.profile", *but):
            varied.append(key)
    return varied


def by_setting(runs, over):
    """[(label, runs that differ at most in the keys `over`)], in order of appearance."""
    keys = varied(runs, but=over)
    groups = {}
    for run in runs:
        groups.setdefault(tuple(hashable(run.config.get(key)) for key in keys), []).append(run)
    labelled = []
    for group in groups.values():
        config = group[0].config
        words = [f"{short(key)} = {text(config[key])}" for key in keys if key in config]
        labelled.append((", ".join(words) or unmarked(Path(group[0].path).resolve().name), group))
    return labelled


def end(run, y, at, goal):
    """The run's value of `y`; NaN when it did not finish, has none or, a language model's, diverged."""
    if run.state != "finished":
        return math.nan
    split, _, metric = y.partition(".")
    if isinstance(run, Trial) and run.judged == (y, at):
        value = run.value
    elif y in run.names():
        values = run.series(split, metric)[1]
        best = np.fmin if goal == "minimize" else np.fmax  # they pass over NaN, as `sweep` does
        value = float(values[-1] if at == "last" else best.reduce(values))
    else:
        return math.nan
    if metric == "loss" and not is_task(run):
        start = run.first("train", "loss")
        return math.nan if start is not None and value > 1.05 * start else value
    return value


def ended(runs):
    """The runs that have come to an end: neither dropped at a rung of a sweep nor still going."""
    return [run for run in runs if run.state in ("finished", "failed")]


def mean_over(runs, over, y, at, goal):
    """Mean objectives of settings: [(runs that differ at most in `over`, mean)].

    NaN where one has failed, and where there are fewer runs than of another setting: a lucky seed is no mean.
    """
    groups = [group for _, group in by_setting(runs, over=(over,))]
    n = max(map(len, groups), default=0)
    means = [float(np.mean([end(run, y, at, goal) for run in group])) for group in groups]
    return [(group, mean if len(group) == n else math.nan) for group, mean in zip(groups, means)]


def mean_or_inf(values):
    mean = float(values.mean())
    return math.inf if math.isnan(mean) else mean


def hashable(value):
    return tuple(value) if isinstance(value, list) else value
