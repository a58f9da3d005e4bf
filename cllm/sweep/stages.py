"""In which order a sweep's trials are run, how far, and which settings are dropped on the way.

Pure logic: `stages` reads results and recorded values, starts nothing and writes nothing. What it says
depends on those alone, not on the order in which they came or on how many workers there were, so a sweep
that was killed is told the same lists again.
"""

import math
import statistics
from dataclasses import dataclass, replace
from fractions import Fraction

from cllm import verdict
from cllm.sweep import tpe
from cllm.sweep.plan import Trial
from cllm.sweep.results import Result

__all__ = ["Job", "stages"]


@dataclass(frozen=True)
class Job:
    """A trial and how far it is to go: `until` is the step at which it pauses, None the end of the run."""

    trial: Trial
    until: int | None = None


def stages(sweep, results, value_at):
    """The lists of jobs of a sweep, one after another: all of a list are done before the next is asked for.

    First the search: with [prune] one list a rung, in each only the settings that the rungs before have
    kept, then one to the end; with method "tpe" so for each round. At last [confirm]'s trials.

    Parameters
    ----------
    sweep : Sweep
        With method "tpe" a round's new settings are appended to ``sweep.settings`` before its first list
        comes; whoever runs the list records them first.
    results : dict
        Trial name -> Result. The caller enters what became of each job before it takes the next list; a
        trial that it does not know yet may be in any list. At each rung the trials of dropped settings
        become "pruned" in it, at the rung's step and with their value there; failed ones stay failed.
    value_at : callable
        ``value_at(trial, step)`` is the objective that the trial recorded at exactly that step, or None.

    Yields
    ------
    list of Job
        Never empty, by setting and seed. All seeds of a setting go equally far. A job may be done already,
        by an earlier call. A trial that is "failed" in `results` is in no list: whoever wants it tried again
        gives it as "pending".
    """
    cohorts = _rounds(sweep, results) if sweep.config.method == "tpe" else [sweep.numbers]
    for cohort in cohorts:
        yield from _search(sweep, cohort, results, value_at)
    if sweep.confirm is not None:
        yield from _jobs(sweep, _best(sweep, results), sweep.confirm_seeds, None, results)


def _rounds(sweep, results):
    """The settings of each round of method "tpe", which are proposed when the round before has ended."""
    for begin, end in tpe.rounds(sweep.config, len(sweep.blocks)):
        if len(sweep.numbers) < end:
            sweep.settings.extend(tpe.propose(sweep, begin, end, results))
        yield sweep.numbers[begin:end]


def _best(sweep, results):
    """The settings that are confirmed: the first of the ranking that have finished with all seeds."""
    ranked = [standing.setting for standing in verdict.ranking(sweep, results) if standing.complete]
    return sorted(ranked[: sweep.confirm.top])


def _search(sweep, settings, results, value_at):
    """The lists of settings that are compared with each other: to each rung, then to the end."""
    for step in sweep.prune.rungs:
        yield from _jobs(sweep, settings, sweep.config.seeds, step, results)
        kept = _kept(sweep, settings, step, results, value_at)
        for setting in settings:
            if setting not in kept:
                _drop(sweep, setting, step, results, value_at)
        settings = [setting for setting in settings if setting in kept]
    yield from _jobs(sweep, settings, sweep.config.seeds, None, results)


def _jobs(sweep, settings, seeds, until, results):
    """One list, or none when it would be empty."""
    trials = [sweep.trial(setting, seed) for setting in settings for seed in sorted(seeds)]
    failed = {name for name, result in results.items() if result.state == "failed"}
    jobs = [Job(trial, until) for trial in trials if trial.name not in failed]
    if jobs:
        yield jobs


# Rungs -----------------------------------------------------------------------------------------------


def _kept(sweep, settings, step, results, value_at):
    """The settings that go on after a rung, by their means over seeds; the lower number wins a tie."""
    sign = 1 if sweep.config.goal == "minimize" else -1
    means = {}  # lower is better; infinite where a seed has no value
    for setting in settings:
        values = [_value(sweep.trial(setting, seed), step, results, value_at) for seed in sweep.config.seeds]
        means[setting] = math.inf if None in values else sign * statistics.fmean(values)
    if sweep.prune.method == "median":
        known = [mean for mean in means.values() if mean < math.inf]
        middle = statistics.median(known) if known else -math.inf
        return {setting for setting, mean in means.items() if mean <= middle}
    n = math.ceil(Fraction(str(sweep.prune.keep)) * len(settings))  # as floats, 0.07 * 100 is more than 7
    return set(sorted(settings, key=lambda setting: (means[setting], setting))[:n])


def _value(trial, step, results, value_at):
    """A trial's objective at a rung; what it ended with when it ended well before; None when it failed."""
    value = value_at(trial, step)
    result = results.get(trial.name, Result(trial))
    if value is None and result.state == "finished" and result.step < step:
        value = result.value  # it stopped early, by train.patience
    return value if value is not None and math.isfinite(value) else None


def _drop(sweep, setting, step, results, value_at):
    for seed in sweep.config.seeds:
        trial = sweep.trial(setting, seed)
        result = results.get(trial.name, Result(trial))
        if result.state != "failed":
            value = _value(trial, step, results, value_at)
            results[trial.name] = replace(result, state="pruned", step=step, value=value)
