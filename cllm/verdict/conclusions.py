"""From standings to conclusions: means, differences, edges, budgets, as a dict of plain values."""

import itertools
import math
from collections import Counter

from cllm.verdict import statistics
from cllm.verdict.sentences import sentences, warnings
from cllm.verdict.standings import confirmed, ranking, sign
from cllm.verdict.words import text

__all__ = ["conclude"]

EDGE = 0.05  # of a range's width: a best value so near to an end may only be the best because it ends there


def conclude(sweep, results):
    """All that can be said of a sweep, as JSON has it; what is not known is None.

    Parameters
    ----------
    sweep : Sweep
    results : dict
        Trial name -> Result; the sweep need not have ended.

    Returns
    -------
    dict
        - state ("finished" | "unfinished"), objective, at, goal, seeds, confirm_seeds
        - trials: state -> number
        - best: a setting's number, None while no setting is complete; decided: whether fresh seeds say so
        - settings: by rank, each with setting, values, state, finished ("2/3"), n, mean, standard_error,
          interval, interval_method ("t" | "bootstrap"), step, mean_at_rung, by_seed, instruction_sets
        - confirmed: the same by fresh seeds, None without any; with test, {seed: value}, where looked at
        - comparisons: if decided, of all pairs of confirmed settings, those of the best first; else of the
          best with each other complete setting. mean is by how much `setting` is better than `against`, over
          the n seeds that both have, with standard_error, interval (t) and correlation. p and p_holm are
          there if decided. apart is True or False as they say; if not decided False where the interval holds
          0, and else None: fresh seeds must tell. seeds_needed is for a power of 80 %
        - edges: of each number that was varied key, value, low, high, and edge ("low" | "high" | None)
        - contenders: key -> value -> settings, trials, steps, best, mean, standard_error
        - budget: in the order in which settings end, setting, trials and steps spent, best mean so far
        - instruction_sets: name -> number of trials
        - warnings: sentences; verdict: all sentences, one or two a line
    """
    ranked, fresh = ranking(sweep, results), confirmed(sweep, results)
    unfinished = any(standing.state == "unfinished" for standing in fresh)
    decided = bool(fresh) and fresh[0].complete and not unfinished
    leaders = fresh if decided else ranked
    best = leaders[0].setting if leaders and leaders[0].complete else None
    states = Counter(result.state for result in results.values())
    going = any(states[state] for state in ("pending", "running", "paused"))
    entry = _Entries(sweep, results)
    found = {
        "state": "unfinished" if going else "finished",
        "objective": sweep.config.objective,
        "at": sweep.config.at,
        "goal": sweep.config.goal,
        "seeds": sorted(sweep.config.seeds),
        "confirm_seeds": list(sweep.confirm_seeds),
        "trials": {"finished": 0, "failed": 0, **states},
        "best": best,
        "decided": decided,
        "settings": [entry(standing, sweep.config.seeds) for standing in ranked],
        "confirmed": [entry(standing, sweep.confirm_seeds) for standing in fresh] or None,
        "comparisons": _comparisons(sweep, leaders, decided),
        "edges": [] if best is None else _edges(sweep, best),
        "contenders": _contenders(sweep, ranked),
        "budget": _budget(sweep, ranked),
        "instruction_sets": dict(sorted(Counter(r.isa for r in results.values() if r.isa).items())),
    }
    found["warnings"] = warnings(sweep, found)
    found["verdict"] = "\n".join(sentences(sweep, found, results))
    return found


class _Entries:
    """Standings as dicts, with what the results add to them."""

    def __init__(self, sweep, results):
        self.sweep = sweep
        self.by_setting = {}
        for result in results.values():
            self.by_setting.setdefault(result.trial.setting, {})[result.trial.seed] = result

    def __call__(self, standing, seeds):
        values, seeds = list(standing.values.values()), sorted(seeds)
        known = statistics.estimate(values) if standing.complete else None
        by_seed = {**standing.at_rung, **standing.values}
        trials = self.by_setting.get(standing.setting, {})
        trials = {seed: trials[seed] for seed in seeds if seed in trials}
        tests = {str(seed): result.test for seed, result in trials.items() if result.test is not None}
        return {
            "setting": standing.setting,
            "values": self.sweep.settings[standing.setting],
            "state": standing.state,
            "finished": standing.finished,
            "n": len(values),
            "mean": known and known.mean,
            "standard_error": known and known.standard_error,
            "interval": known and known.interval and list(known.interval),
            "interval_method": known and known.method,
            "step": standing.step,
            "mean_at_rung": standing.mean_at_rung,
            "by_seed": {str(seed): by_seed.get(seed) for seed in seeds},
            "instruction_sets": sorted({result.isa for result in trials.values() if result.isa}),
            **({"test": tests} if tests else {}),
        }


# Differences -----------------------------------------------------------------------------------------


def _comparisons(sweep, standings, decided):
    """Paired differences, corrected by Holm if they decide.

    Which setting is the best is known from the same values, so that its tests are chosen among those of all
    pairs, and all count. Of 8 equal settings with 8 seeds, counting only the best's 7 finds a difference in
    11 of 100 sweeps (simulated); counting all 28, in 4.
    """
    complete = [standing for standing in standings if standing.complete]
    if not decided:
        return [_comparison(sweep, complete[0], other) for other in complete[1:]]
    pairs = list(itertools.combinations(complete, 2))
    found = [_comparison(sweep, *pair, n_tests=len(pairs)) for pair in pairs]
    tested = [entry for entry in found if entry["p"] is not None]
    for entry, p in zip(tested, statistics.holm([entry["p"] for entry in tested])):
        entry["p_holm"], entry["apart"] = p, p < 1 - statistics.LEVEL
        if entry["apart"]:
            entry["seeds_needed"] = None
    return found


def _comparison(sweep, better, worse, n_tests=None):
    """Two settings, as far as their interval tells; without `n_tests` no test is to decide."""
    pair = (worse, better) if sweep.config.goal == "minimize" else (better, worse)
    found = statistics.paired(*([standing.values[seed] for seed in better.values] for standing in pair))
    low, high = found.interval or (found.mean, found.mean)
    alike = found.n > 1 and low <= 0 <= high
    needed = None
    if found.n > 2 and found.effect is not None:  # of two pairs the deviation is as good as unknown
        needed = statistics.seeds_needed(found.effect, n_tests or 1)
    return {
        "setting": better.setting,
        "against": worse.setting,
        "n": found.n,
        "mean": found.mean,
        "standard_error": found.standard_error,
        "interval": found.interval and list(found.interval),
        "correlation": found.correlation,
        "p": found.p if n_tests else None,
        "p_holm": None,
        "apart": False if alike else None,
        "seeds_needed": needed,
    }


# The space and the budget ----------------------------------------------------------------------------


def _edges(sweep, best):
    """For each number that was varied: whether the best lies at an end of what was tried.

    Of keys that move together the first speaks for all.
    """
    chosen = sweep.settings[best]
    peers = [sweep.settings[number] for number in sweep.numbers]
    peers = [other for other in peers if _kind(other) == _kind(chosen)]
    axes = [axis for block in sweep.blocks if chosen in block for axis in block.axes]
    found, told = [], set()
    for key in sweep.varied():
        tried = {other[key] for other in peers if _is_number(other.get(key))}
        if key in told or not _is_number(chosen.get(key)) or len(tried) < 2:
            continue
        own = [axis for axis in axes if key in axis.names]
        told.update(name for axis in own for name in axis.names)
        ranges = [axis for axis in own if hasattr(axis, "low")]
        low = min([*tried, *(axis.low for axis in ranges)])
        high = max([*tried, *(axis.high for axis in ranges)])
        at = math.log if low > 0 and any(axis.log for axis in ranges) else float
        reach = EDGE * (at(high) - at(low)) if ranges else 0.0
        edge = None
        if at(high) - at(chosen[key]) <= reach:
            edge = "high"
        elif at(chosen[key]) - at(low) <= reach and not _is_least(low):
            edge = "low"
        found.append({"key": key, "value": chosen[key], "low": low, "high": high, "edge": edge})
    return found


def _is_least(value):
    """Whether nothing is below a value: 0 of a rate or a share, 1 of layers or sequences."""
    return value == 0 or (value == 1 and isinstance(value, int))


def _kind(setting):
    """What of a setting is not a number: only settings of one kind form a grid."""
    return {key: value for key, value in setting.items() if not _is_number(value)}


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contenders(sweep, ranked):
    """Of each varied key that has words as values: what each of them was given, and its best setting."""
    found = {}
    for key in sweep.varied():
        given = [sweep.settings[number][key] for number in sweep.numbers if key in sweep.settings[number]]
        if not any(isinstance(value, str | bool) for value in given):
            continue
        section, _, name = key.partition(".")
        base = sweep.base.get(section, {}).get(name, "default")
        values = {number: sweep.settings[number].get(key, base) for number in sweep.numbers}
        groups = {text(value): [] for value in values.values()}
        for standing in ranked:
            groups[text(values[standing.setting])].append(standing)
        found[key] = {value: _contender(group) for value, group in groups.items()}
    return found


def _contender(group):
    """One contender's budget; its standings come by rank."""
    best = group[0] if group[0].complete else None
    return {
        "settings": len(group),
        "trials": sum(standing.n_seeds for standing in group),
        "steps": sum(standing.steps for standing in group),
        "best": best and best.setting,
        "mean": best and best.mean,
        "standard_error": best and best.standard_error,
    }


def _budget(sweep, ranked):
    """What was spent, and the best mean so far, at each setting's end; then all its steps count.

    Pruned settings end first, in the order of their rungs, all others by number. With method "tpe", whose
    rounds each have their rungs, the number alone orders them.
    """
    early = bool(sweep.prune.rungs) and sweep.config.method != "tpe"
    ended = [standing for standing in ranked if standing.state != "unfinished"]
    ended.sort(key=lambda s: (s.step if early and s.at_rung else math.inf, s.setting))
    found, trials, steps, best = [], 0, 0, None
    for standing in ended:
        trials, steps = trials + standing.n_seeds, steps + standing.steps
        if standing.complete and (best is None or sign(sweep) * (standing.mean - best) < 0):
            best = standing.mean
        found.append({"setting": standing.setting, "trials": trials, "steps": steps, "best": best})
    return found
