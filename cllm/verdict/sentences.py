"""Conclusions in sentences, and the ranking as a table of text."""

from cllm.verdict import statistics
from cllm.verdict.standings import confirmed, ranking, sign
from cllm.verdict.words import plus_minus, short, shown

__all__ = ["sentences", "table", "warnings"]

MOST = 5  # settings or contenders named in one list
ENDED = ("finished", "failed", "pruned")
ONE_SEED = "there is no interval, and any difference may be chance. List three or more."


def sentences(sweep, found, results):
    """The verdict on what `conclude` has found, one or two sentences a line."""
    lines = []
    if found["state"] == "unfinished":
        n_ended = sum(n for state, n in found["trials"].items() if state in ENDED)
        lines.append(f"Not finished: {n_ended} of {len(results)} trials have ended.")
    if found["best"] is None:
        lines.append("No setting finished with all of its seeds, so there is no best one.")
    else:
        lines += _confirmed(sweep, found) if found["decided"] else _unconfirmed(sweep, found)
    lines += [_edge(edge) for edge in found["edges"]]
    for key, contenders in found["contenders"].items():
        lines += _contenders(key, contenders, found)
    return [*lines, *_spent(sweep, found), *found["warnings"], *_failures(sweep, found, results)]


# Without fresh seeds ---------------------------------------------------------------------------------


def _unconfirmed(sweep, found):
    """The best of the search and its runner-up; nothing that is judged by the seeds that chose is decided."""
    best, *others = found["settings"]
    value = f"{found['objective']} {_value(best, 'seed')}"
    if not others:
        lines = [f"The one setting has {value}."]
    else:
        n = len(others) + 1
        lines = [f"Ranking, unconfirmed: best of {n} settings is {_name(sweep, best)}.", f"It has {value}."]
    if best["n"] == 1:
        lines.insert(1, f"ONE SEED: {ONE_SEED}")
    if found["comparisons"]:
        lines += _second(sweep, found)
    if others and sweep.confirm is None:
        lines.append(
            "The best was chosen and judged on the same seeds, and looks better than it is. Only fresh seeds "
            "decide: [confirm] runs the top settings with them."
        )
    elif others:
        fresh = found["confirmed"]
        going = fresh is None or any(entry["state"] == "unfinished" for entry in fresh)
        lines.append(
            "The fresh seeds of [confirm], which decide, have not finished."
            if going
            else "No setting finished with all fresh seeds of [confirm], so nothing is confirmed."
        )
    return lines


def _second(sweep, found):
    """The runner-up beside the best, and the others that the data do not separate from it."""
    first, *rest = found["comparisons"]
    entry = next(entry for entry in found["settings"] if entry["setting"] == first["against"])
    other = f"Second is {_name(sweep, entry)} with {plus_minus(entry['mean'], entry['standard_error'])}"
    if first["n"] == 1:
        return [f"{other}, worse by {first['mean']:.3g}."]
    lines = [f"{other}, worse by {_difference(first)}."]
    if first["interval"] is None:
        lines.append(_without_spread(first))
    elif first["apart"] is False:
        lines.append(f"The data do not separate the two.{_needed(first)}")
    elif first["n"] == 2:
        lines.append("The interval leaves out 0, but two seeds are hardly any evidence.")
    else:
        lines.append("The interval leaves out 0; were these fresh seeds, that would separate the two.")
    alike = [comparison["against"] for comparison in rest if comparison["apart"] is False]
    if alike:
        neither = "Nor do the data" if first["apart"] is False else "The data do not"
        lines.append(f"{neither} separate the best from {_names(sweep, alike)}.")
    return lines


# With fresh seeds ------------------------------------------------------------------------------------


def _confirmed(sweep, found):
    """What the fresh seeds say: the best of the confirmed settings, and each other beside it."""
    best, *others = found["confirmed"]
    name, n = _name(sweep, best), best["n"]
    differences = [c for c in found["comparisons"] if c["setting"] == best["setting"]]
    lines = [_headline(sweep, name, n, len(others), differences)]
    if n == 1:
        lines.append(f"ONE FRESH SEED: {ONE_SEED}")
    lines.append(f"It has {found['objective']} {_value(best, 'fresh seed')}.")
    if n > 1:
        lines += [_judged(sweep, difference) for difference in differences[:MOST]]
        if len(differences) > MOST:
            lines.append(f"And so on: {len(differences) - MOST} more confirmed settings come after these.")
    before = next(entry for entry in found["settings"] if entry["setting"] == best["setting"])
    if before["mean"] is not None:
        gap = sign(sweep) * (best["mean"] - before["mean"])
        better = f", and looked better by {shown(gap, best['standard_error'])}" if gap > 0 else ""
        had = plus_minus(before["mean"], before["standard_error"])
        lines.append(f"On the seeds that chose it, it had {had}{better}.")
    if found["settings"][0]["setting"] != best["setting"]:
        lines.append(f"The search had put {_name(sweep, found['settings'][0])} first.")
    looked = [entry for entry in found["confirmed"] if "test" in entry]
    if looked:
        values = [
            f"{_name(sweep, entry)}: {plus_minus(*statistics.mean_and_error(list(entry['test'].values())))}"
            for entry in looked[:MOST]
        ]
        lines.append(f"On the test split, looked at for confirmed settings only: {'; '.join(values)}.")
    return lines


def _headline(sweep, name, n, n_others, differences):
    """Which setting comes first, and how sure that is."""
    seeds = f"{n} fresh seeds" if n > 1 else "one fresh seed"
    first = f"{name} comes first of {n_others + 1} confirmed settings"
    apart = [difference["against"] for difference in differences if difference["apart"]]
    if not n_others:
        return f"Run again with {seeds}: {name}. No other setting was, so it is compared with none."
    if not differences:
        return f"Run again with {seeds}: {first}, as the only one that finished with all of them."
    if n <= 2:
        return f"Not decided, as {seeds} can hardly decide anything: {first}."
    if not apart:
        rest = "the other" + "s" * (n_others > 1)
        if len(differences) < n_others:  # one has lost a seed, and is compared with none
            rest = _names(sweep, [difference["against"] for difference in differences])
        return f"Not decided by {seeds}: {first}, but the data do not separate it from {rest}."
    near = [difference["against"] for difference in differences if not difference["apart"]]
    if len(differences) == n_others and 0 < len(near) < len(apart):
        return f"Confirmed with {seeds}: {first}; the data separate it from all but {_names(sweep, near)}."
    if len(apart) < n_others:
        return f"Confirmed with {seeds}: {first}; the data separate it from {_names(sweep, apart)} only."
    return f"Confirmed with {seeds}: {name} is the best of {n_others + 1} confirmed settings."


def _judged(sweep, difference):
    """One confirmed setting beside the best."""
    other, by = _name(sweep, difference["against"]), _difference(difference)
    if difference["interval"] is None:
        return f"It is ahead of {other} by {by}. {_without_spread(difference)}"
    if not difference["apart"]:
        return f"The data do not separate it from {other}: it is ahead by {by}.{_needed(difference)}"
    if difference["n"] == 2:
        return f"It is ahead of {other} by {by}. The test would separate the two, on hardly any evidence."
    return f"It is better than {other} by {by}."


# Parts of sentences ----------------------------------------------------------------------------------


def _value(entry, seed):
    """A setting's value with what is known of it: "1.950 ± 0.029 (mean ± standard error of 3 seeds; ...)"."""
    n, interval, error = entry["n"], entry["interval"], entry["standard_error"]
    value = plus_minus(entry["mean"], error)
    if n == 1:
        return f"{value} (one {seed})"
    if not error:
        return f"{value} (the same with all {n} {seed}s)"
    known = f"{value} (mean ± standard error of {n} {seed}s"
    if interval is None:
        return f"{known})"
    method = "Student's t" if entry["interval_method"] == "t" else "bootstrap"
    return f"{known}; 95% interval {_interval(interval, error)}, {method})"


def _difference(difference):
    """A paired difference with what is known of it: "0.097 ± 0.009 (pairs of 3 seeds; 95% interval ...)"."""
    interval, error, p = (difference[key] for key in ("interval", "standard_error", "p_holm"))
    known = [f"pairs of {difference['n']} seeds"]
    if interval is not None:
        known.append(f"95% interval {_interval(interval, error)}")
    if difference["correlation"] is not None:
        known.append(f"correlation {difference['correlation']:.2f}")
    if p is not None:
        known.append(f"p {'= ' + format(p, '.2g') if p >= 1e-4 else '< 0.0001'} by Holm")
    return f"{plus_minus(difference['mean'], error)} ({'; '.join(known)})"


def _interval(interval, error):
    low, high = (shown(end, error) for end in interval)
    return f"{low} to {high}"


def _without_spread(difference):
    if difference["mean"] == 0:
        return "With each seed the two have the same value."
    return "The difference is the same with each seed: without a spread no test can weigh it."


def _needed(difference):
    """How many seeds a difference that is not seen would take; nothing of two pairs."""
    if difference["n"] < 3:
        return ""
    n = difference["seeds_needed"]
    seeds = f"roughly {n} seeds" if n else "more than 1,000 seeds"
    return f" If it is as large as it looks, {seeds} would show it in 4 of 5 sweeps."


def _edge(edge):
    value, low, high = (short(edge[key]) for key in ("value", "low", "high"))
    best, tried = f"Best {edge['key']} = {value}", f"what was tried ({low} to {high})"
    if edge["edge"] is not None:
        upper = edge["edge"] == "high"
        end, extend = ("upper", "upwards") if upper else ("lower", "downwards")
        return f"{best} is at the {end} edge of {tried}: extend {extend}."
    if edge["value"] == edge["low"]:
        return f"{best} is the lowest there is; up to {high} was tried."
    return f"{best} lies inside {tried}."


def _contenders(key, contenders, found):
    """What each contender was given, and what the best of its settings reached."""
    sizes = {contender["settings"] for contender in contenders.values()}
    if sizes == {1}:
        return []  # the table says the same
    words = []
    for value, contender in list(contenders.items())[:MOST]:
        n, mean = contender["settings"], contender["mean"]
        best = "none complete" if mean is None else plus_minus(mean, contender["standard_error"])
        spent = f"{n} setting{'s' * (n > 1)}, {contender['trials']:,} trials, {contender['steps']:,} steps"
        words.append(f"{value} {best} (best of {spent})")
    more = f", and {len(contenders) - MOST} more" if len(contenders) > MOST else ""
    lines = [f"By {key}: {', '.join(words)}{more}."]
    if len(sizes) > 1:
        lines.append(f"UNEQUAL BUDGETS by {key}: more settings find a better best by chance alone.")
    elif all(entry["state"] == "finished" for entry in found["settings"]):
        steps = [contender["steps"] for contender in contenders.values()]
        if max(steps) > 1.1 * min(steps):
            lines.append(f"UNEQUAL BUDGETS by {key}: as many settings, but not as many steps.")
    return lines


def _spent(sweep, found):
    """What the search took; and when its best was there, unless the order of settings says nothing."""
    if not found["budget"]:
        return []
    *_, end = found["budget"]
    words = f"The search took {end['trials']:,} trials and {end['steps']:,} steps"
    first = found["settings"][0]
    if sweep.config.method != "grid" and first["state"] == "finished":
        then = next(spent for spent in found["budget"] if spent["setting"] == first["setting"])
        words += f"; its best setting was there after {then['trials']:,} trials and {then['steps']:,} steps"
    return [f"{words}."]


def warnings(sweep, found):
    """What to be careful about, as sentences."""
    lines = []
    judging = (found["confirmed"] if found["decided"] else found["settings"]) or []
    if found["best"] is not None and judging[0]["n"] == 2:
        lines.append("Two seeds leave one degree of freedom: intervals are wide, and nothing here is firm.")
    same = [entry["setting"] for entry in judging if entry["n"] > 1 and entry["standard_error"] == 0]
    if same:
        lines.append(
            f"Each seed gave the same value for {_names(sweep, same)}: seeds that change nothing repeat "
            "nothing."
        )
    pruned = [entry for entry in found["settings"] if entry["state"] == "pruned"]
    if pruned:
        steps = " and ".join(f"{step:,}" for step in sorted({entry["step"] for entry in pruned}))
        lines.append(
            f"Pruned at step {steps}: {len(pruned)} of {len(found['settings'])} settings. They rank below "
            "complete ones; what they would have reached is not known."
        )
    if found["at"] == "best":
        lines.append('at = "best" takes the best of each trial\'s evaluations: frequent evaluation flatters.')
    if len(found["instruction_sets"]) > 1:
        sets = ", ".join(f"{n} with {name}" for name, n in found["instruction_sets"].items())
        lines.append(
            f"Trials ran on several instruction sets ({sets}). These round differently, so a part of a "
            "difference may be theirs."
        )
    return lines


def _failures(sweep, found, results):
    failed = [result for result in results.values() if result.state == "failed"]
    if not failed:
        return []
    first = f"{failed[0].trial.name} with: {' '.join(failed[0].error.split())}"
    lines = [f"{len(failed)} of {len(results)} trials failed, first {first}"]
    for seeds, entries in (("", found["settings"]), (" fresh seeds", found["confirmed"] or ())):
        lost = [entry for entry in entries if entry["state"] in ("failed", "pruned") and _has_lost(entry)]
        for entry in lost[:MOST]:
            at = f" (pruned at step {entry['step']:,})" if entry["state"] == "pruned" else ""
            lines.append(
                f"{_name(sweep, entry)}: {entry['finished']}{seeds} finished{at}, ranked last among equals."
            )
        if len(lost) > MOST:
            lines.append(f"{len(lost) - MOST} more settings have failed trials.")
    return [*lines, "Failed trials are tried again when the same command is given once more."]


def _has_lost(entry):
    return None in entry["by_seed"].values()


def _name(sweep, entry):
    return sweep.describe(entry["setting"] if isinstance(entry, dict) else entry)


def _names(sweep, settings):
    """Settings in words, the first few of them."""
    names = [sweep.describe(setting) for setting in settings[:MOST]]
    words = " or ".join(f"({name})" if ", " in name else name for name in names)
    return f"{words} or {len(settings) - MOST} more" if len(settings) > MOST else words


# The table -------------------------------------------------------------------------------------------


def table(sweep, results, most=10):
    """The best settings as lines of text: setting, mean ± standard error, what became of its trials.

    Confirmed ones come first, by their fresh seeds. Where several instruction sets computed, each line names
    its own.
    """
    sets = {}
    for result in results.values():
        if result.isa:
            sets.setdefault(result.trial.setting, set()).add(result.isa)
    several = len(set().union(*sets.values())) > 1
    fresh, searched = confirmed(sweep, results), ranking(sweep, results)
    parts = {"confirmed with fresh seeds": fresh, "search": searched} if fresh else {"": searched}
    lines = []
    for title, standings in parts.items():
        rows = []
        for standing in standings[:most]:
            mark = ", ".join(sorted(sets.get(standing.setting, ()))) if several else ""
            rows.append((sweep.describe(standing.setting), *_outcome(standing), mark))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += [title] if title else []
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"and {len(standings) - most} more"] if len(standings) > most else []
    return lines


def _outcome(standing):
    """A setting's value, and what became of its trials."""
    if standing.state == "pruned":
        value, lost = standing.mean_at_rung, f", {standing.n_failed} failed" if standing.n_failed else ""
        return "-" if value is None else f"{value:.5g}", f"pruned at step {standing.step:,}{lost}"
    value = plus_minus(standing.mean, standing.standard_error) if standing.complete else "-"
    return value, f"{standing.finished} finished"
