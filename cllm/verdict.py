"""What a sweep's results say, and what they do not: ranking, uncertainty, the verdict in words.

Functions take a `sweep.Sweep` and its results, {trial name: `sweep.Result`}; they read no files.
"""

import json
import math
import statistics
from dataclasses import dataclass

__all__ = ["Standing", "plus_minus", "ranking", "table", "text", "verdict"]


@dataclass(frozen=True)
class Standing:
    """A setting's place: the objective of its finished trials by seed.

    `mean` and `standard_error` are None while a seed is missing: the survivors' mean would flatter a setting
    whose other seeds diverged. With one seed there is no standard error either.
    """

    setting: int
    values: dict
    n_seeds: int

    @property
    def complete(self):
        return len(self.values) == self.n_seeds

    @property
    def mean(self):
        return statistics.fmean(self.values.values()) if self.complete else None

    @property
    def standard_error(self):
        return _standard_error(list(self.values.values())) if self.complete else None


def ranking(sweep, results):
    """All settings as `Standing`, the best first; those with missing trials last, however good the others."""
    values = [{} for _ in sweep.settings]
    for result in results.values():
        if result.state == "finished":
            values[result.trial.setting][result.trial.seed] = result.value
    standings = [Standing(index, found, len(sweep.config.seeds)) for index, found in enumerate(values)]
    return sorted(standings, key=lambda s: (0, _sign(sweep) * s.mean) if s.complete else (1, -len(s.values)))


def table(sweep, results, most=10):
    """The best settings as lines of text: setting, mean ± standard error, seeds finished."""
    ranked = ranking(sweep, results)
    rows = []
    for standing in ranked[:most]:
        value = plus_minus(standing.mean, standing.standard_error) if standing.complete else "-"
        finished = f"{len(standing.values)}/{standing.n_seeds} seeds finished"
        rows.append((sweep.describe(standing.setting), value, finished))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    rest = len(ranked) - most
    return [*lines, f"and {rest} more"] if rest > 0 else lines


def verdict(sweep, results):
    """The sweep's conclusion in sentences, one a line."""
    ranked = ranking(sweep, results)
    best, n = ranked[0], len(sweep.config.seeds)
    if not best.complete:
        nothing = "No setting finished with all of its seeds, so there is no best one."
        return "\n".join([nothing, *_failures(sweep, results, ranked)])
    lines = [_first(sweep, best, len(ranked))]
    if len(ranked) > 1 and ranked[1].complete:
        lines.append(_comparison(sweep, best, ranked[1]))
    lines += _place_in_grid(sweep, best.setting)
    lines += _failures(sweep, results, ranked)
    if n == 1:
        lines.append("One seed gives no uncertainty: differences may be chance; list more seeds to know.")
    if len(ranked) > 1:
        lines.append("Ranking, unconfirmed: the best was chosen and judged on the same seeds.")
    return "\n".join(lines)


def _first(sweep, best, n_settings):
    n = len(sweep.config.seeds)
    value = plus_minus(best.mean, best.standard_error)
    over = f"mean ± standard error over {n} seeds" if n > 1 else "one seed"
    if n_settings == 1:
        return f"{sweep.config.objective} is {value} ({over})."
    return (
        f"Best of {n_settings} settings: {sweep.describe(best.setting)}, "
        f"with {sweep.config.objective} {value} ({over})."
    )


def _comparison(sweep, best, second):
    """The runner-up beside the best, by the differences between trials of one seed."""
    worse = [_sign(sweep) * (second.values[seed] - best.values[seed]) for seed in best.values]
    mean, error, n = statistics.fmean(worse), _standard_error(worse), len(worse)
    words = f"Second: {sweep.describe(second.setting)}, {plus_minus(second.mean, second.standard_error)}, "
    if error is None:
        return f"{words}worse by {mean:.3g}."
    from scipy.special import stdtrit

    reach = float(stdtrit(n - 1, 0.975)) * error  # Student's t: half the width of the 95 % interval
    decimals = _decimals(error)
    apart = "tell" if mean - reach > 0 else "do not tell"
    return (
        f"{words}worse by {plus_minus(mean, error)} (pairs of {n} seeds; 95 % interval "
        f"{mean - reach:.{decimals}f} to {mean + reach:.{decimals}f}): {n} seeds {apart} the two apart."
    )


def _place_in_grid(sweep, index):
    """For each number that was varied: whether the best lies at an end of what was tried.

    Of keys that move together the first speaks for all.
    """
    best = sweep.settings[index]
    peers = [other for other in sweep.settings if _kind(other) == _kind(best)]
    lines, told = [], []
    for key in sweep.varied():
        tried = {other[key] for other in peers if _is_number(other.get(key))}
        if not _is_number(best.get(key)) or len(tried) < 2:
            continue
        pairs = [{(other.get(key), other.get(first)) for other in peers} for first in told]
        if any(len(pair) == len(tried) for pair in pairs):
            continue
        told.append(key)
        low, high, value = text(min(tried)), text(max(tried)), text(best[key])
        if value == high:
            lines.append(f"Best {key} = {value} is at the grid's upper edge: extend upwards.")
        elif value == low and best[key] != 0:  # nothing to try below 0
            lines.append(f"Best {key} = {value} is at the grid's lower edge: extend downwards.")
        else:
            lines.append(f"Best {key} = {value} lies inside the grid ({low} to {high}).")
    return lines


def _failures(sweep, results, ranked):
    failed = [result for result in results.values() if result.state == "failed"]
    if not failed:
        return []
    first = f"{failed[0].trial.name} with: {failed[0].error}"
    lines = [f"{len(failed)} of {len(results)} trials failed, first {first}"]
    for standing in ranked:
        if not standing.complete:
            finished = f"{len(standing.values)}/{standing.n_seeds} finished"
            lines.append(f"{sweep.describe(standing.setting)}: {finished}, ranked below complete settings.")
    return [*lines, "Failed trials are tried again when the same command is given once more."]


# Words -----------------------------------------------------------------------------------------------


def plus_minus(mean, error):
    """mean ± error, both to the error's second digit; the mean alone when there is no error."""
    if not error:
        return f"{mean:.5g}"
    decimals = _decimals(error)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def text(value):
    """A value of a setting as TOML would write it, strings without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _decimals(error):
    """Decimals that show an error's first two digits."""
    return max(0, 1 - math.floor(math.log10(error))) if error else 4


def _standard_error(values):
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _sign(sweep):
    return 1 if sweep.config.goal == "minimize" else -1


def _kind(setting):
    """What of a setting is not a number: only settings of one kind form a grid."""
    return {key: value for key, value in setting.items() if not _is_number(value)}


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
