"""Settings by rank: from the results of trials to what became of each setting."""

import math
from dataclasses import dataclass

from cllm.verdict import statistics

__all__ = ["Standing", "confirmed", "ranking", "sign"]


@dataclass(frozen=True)
class Standing:
    """What became of a setting's trials with some seeds: those of the search, or fresh ones.

    Attributes
    ----------
    setting : int
    n_seeds : int
        How many trials it is to have.
    values : dict
        Seed -> objective of the finished trials.
    at_rung : dict
        Seed -> objective at the step where the setting was pruned; None where a trial has no such value.
    n_failed : int
    step : int
        The furthest that a trial has come, failed ones left out.
    steps : int
        Of all trials together.
    """

    setting: int
    n_seeds: int
    values: dict
    at_rung: dict
    n_failed: int
    step: int
    steps: int

    @property
    def complete(self):
        return len(self.values) == self.n_seeds

    @property
    def state(self):
        """ "finished" with all seeds, "pruned", "unfinished" while a trial has not ended, or "failed"."""
        if self.complete:
            return "finished"
        if self.at_rung:
            return "pruned"
        return "failed" if len(self.values) + self.n_failed == self.n_seeds else "unfinished"

    @property
    def finished(self):
        """How many seeds have finished: "2/3"."""
        return f"{len(self.values)}/{self.n_seeds}"

    @property
    def mean(self):
        """Over all seeds; None while one is missing: the survivors' mean would flatter a failing setting."""
        return self._moments()[0]

    @property
    def standard_error(self):
        """Of the mean; None without one, and with one seed."""
        return self._moments()[1]

    @property
    def mean_at_rung(self):
        """Over all seeds, at the step where the setting was pruned; None where a seed has no value."""
        values = list(self.at_rung.values())
        whole = len(values) == self.n_seeds and None not in values
        return statistics.mean_and_error(values)[0] if whole else None

    def _moments(self):
        return statistics.mean_and_error(list(self.values.values())) if self.complete else (None, None)


def ranking(sweep, results):
    """All settings by the seeds of the search as `Standing`, the best first.

    Complete ones come first, by their means. Then those with trials that have not ended. Then the others, by
    the step that they have reached: among equals in that, pruned ones by their means there, and last those
    that lost a seed, however good their other seeds are. The lower number wins a tie.
    """
    return _ranked(sweep, results, sweep.config.seeds, sweep.numbers)


def confirmed(sweep, results):
    """The settings that have trials with the fresh seeds of [confirm], by these alone; ranked as all are."""
    fresh = sweep.confirm_seeds
    chosen = {result.trial.setting for result in results.values() if result.trial.seed in fresh}
    return _ranked(sweep, results, fresh, sorted(chosen))


def sign(sweep):
    """What objectives are multiplied by so that the lower is the better one."""
    return 1 if sweep.config.goal == "minimize" else -1


def _ranked(sweep, results, seeds, numbers):
    trials = {number: {} for number in numbers}
    for result in results.values():
        if result.trial.seed in seeds and result.trial.setting in trials:
            trials[result.trial.setting][result.trial.seed] = result
    standings = [_standing(number, len(seeds), by_seed) for number, by_seed in trials.items()]
    return sorted(standings, key=lambda standing: _place(standing, sign(sweep)))


def _standing(setting, n_seeds, by_seed):
    states = {
        state: {seed: by_seed[seed].value for seed in sorted(by_seed) if by_seed[seed].state == state}
        for state in ("finished", "pruned", "failed")
    }
    step = max((result.step for result in by_seed.values() if result.state != "failed"), default=0)
    steps = sum(result.step for result in by_seed.values())
    values, at_rung, failed = states.values()
    return Standing(setting, n_seeds, values, at_rung, len(failed), step, steps)


def _place(standing, sign):
    """What rankings sort by. A mean is part of it only where no seed is missing."""
    if standing.complete:
        return 0, 0, 0, sign * standing.mean, standing.setting
    if standing.state == "unfinished":
        return 1, standing.n_failed, -len(standing.values), 0, standing.setting
    reached = math.inf if standing.values else standing.step if standing.at_rung else -1
    n_lost = standing.n_failed + list(standing.at_rung.values()).count(None)
    mean = standing.mean_at_rung
    return 2, -reached, n_lost, 0 if mean is None else sign * mean, standing.setting
