"""A recorded value at the end of runs, against one key of their configs."""

import math
import textwrap

import numpy as np

from cllm.errors import InputError, nearest
from cllm.figures.groups import by_setting, end, ended, hashable, mean_or_inf, varied
from cllm.figures.style import (
    AXIS_NAMES,
    MARKERS,
    MAX_LINES,
    add_legend,
    is_task,
    log_if_wide,
    loss_unit,
    objective_name,
    palette,
    short,
    styled,
    text,
    ticks_at,
)
from cllm.verdict import plus_minus

__all__ = ["against"]

MOST_MEANS = 200  # beside more of them single runs are a haze
MOST_COUNTS = 8  # places with failures that have room for their numbers


@styled
def against(runs, x, y="val.loss", over="train.seed", at="last", goal="minimize"):
    """A recorded value at the end of each run, against one key of their configs.

    There is one line for each setting of the other keys in which the runs differ: means over `over`, with
    standard errors as bars, the single runs as small dots (both of at most 200 means), and a star on the best
    mean of those with most runs. Where a run failed or diverged there is no mean: the other runs stay as
    dots, and a cross at the top counts the failures. Diverged is a value that is NaN or, of a language
    model's loss, 5 % above the first training loss. Runs without an end, such as those that a sweep dropped
    at a rung, are left out. Settings that each have a value of x to themselves, as sampled ones have, are
    marks that nothing joins, with one look for all that only numbers tell apart.

    Parameters
    ----------
    runs : list of records.Run
    x : str
        Dotted key of the config, such as "optim.lr". Its axis is logarithmic when it spans a decade or more.
        Keys that move together, "model.n_embd,model.n_head", share the axis: it is that of the first whose
        numbers are all different.
    y : str
        SPLIT.METRIC of the records, such as "val.loss".
    over : str
        The key that only replicates; runs that differ in nothing else are averaged.
    at : {"last", "best"}
        Which record of a run counts; the best of those that are not NaN.
    goal : {"minimize", "maximize"}
        Which values of `y` are better.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run's config has `x`, no finished run has recorded `y`, or all that have diverged.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    n_unended = len(runs) - len(ended(runs))
    runs = ended(runs) or runs
    known = sorted(set().union(*(run.config for run in runs)))
    keys = [key.strip() for key in x.split(",")]
    n_without = len(runs)
    for key in keys:
        runs = [run for run in runs if key in run.config]
        if not runs:
            raise InputError(f'no run has the key "{key}" in its config{nearest(key, known)}')
    n_without -= len(runs)
    ends = {id(run): end(run, y, at, goal) for run in runs}
    if all(map(math.isnan, ends.values())):
        if any(run.state == "finished" and y in run.names() for run in runs):
            above = y.endswith(".loss") and not all(map(is_task, runs))
            how = "NaN or 5 % above the first training loss" if above else "NaN"
            raise InputError(f'every finished run diverged: its "{y}" is {how}')
        recorded = dict.fromkeys(name for run in runs for name in run.names())
        raise InputError(f'no finished run has recorded "{y}"{"" if y in recorded else nearest(y, recorded)}')
    sign = 1 if goal == "minimize" else -1

    at_x = {id(run): _values(run, keys) for run in runs}
    ticks = list(dict.fromkeys(at_x.values()))
    axis = next((i for i in range(len(keys)) if _is_axis([value[i] for value in ticks])), None)
    numeric = axis is not None
    if numeric:
        ticks.sort(key=lambda value: value[axis])
    places = {value: value[axis] if numeric else i for i, value in enumerate(ticks)}

    def points(group):
        """[(place, value of x, values of y)] of a line."""
        found = {}
        for run in group:
            found.setdefault(at_x[id(run)], []).append(ends[id(run)])
        points = [(places[value], value, np.array(values)) for value, values in found.items()]
        return sorted(points, key=lambda point: point[0])

    lines = [(label, points(group)) for label, group in by_setting(runs, over=(over, *keys))]
    scattered = len(lines) > MAX_LINES and sum(len(line) == 1 for _, line in lines) > len(lines) / 2
    if scattered:
        others = varied(runs, but=(over, *keys))
        numbers = [key for key in others if all(_is_number(run.config.get(key, 0)) for run in runs)]
        kinds = by_setting(runs, over=(over, *keys, *numbers))
        lines = [
            (kind, [point for _, group in by_setting(members, over=(over, *keys)) for point in points(group)])
            for kind, members in kinds
        ]
    n_lines = len(lines)
    if n_lines > MAX_LINES:
        rank = {label: min(mean_or_inf(sign * values) for _, _, values in line) for label, line in lines}
        lines = sorted(lines, key=lambda item: rank[item[0]])[:MAX_LINES]

    counts = [len(values) for _, line in lines for _, _, values in line]
    n_replicates = max(counts)
    dots = sum(len(line) for _, line in lines) <= MOST_MEANS

    figure = Figure()
    axes = figure.subplots()
    legend = []
    best = None  # (signed mean, place, colour, words)
    for index, ((label, line), marker) in enumerate(zip(lines, MARKERS)):
        color = palette(index)
        # Categories lie beside each other and are not joined: there is nothing between them.
        shift = 0.0 if numeric or scattered else 0.1 * (index - (len(lines) - 1) / 2)
        linestyle = "-" if numeric and not scattered else "none"
        complete = []
        single = [(place, value) for place, _, values in line if len(values) > 1 for value in values]
        if single and dots:
            where, values = np.array(single, float).T
            axes.plot(where + shift, values, ".", color=color, alpha=0.45, zorder=2)
        for place, value, values in line:
            if np.isnan(values).any():
                continue
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            complete.append((place + shift, values.mean(), error))
            if len(values) == n_replicates and (best is None or sign * values.mean() < best[0]):
                named = ", ".join(map(short, keys))
                words = f"{named} = {_together_text(value)}" + (f", {label}" if len(lines) > 1 else "")
                words = f"best: {words}: {plus_minus(values.mean(), error)}"
                best = (sign * values.mean(), place + shift, color, words)
        if complete:
            where, means, errors = zip(*complete)
            bars = errors if any(errors) and dots else None
            axes.errorbar(where, means, yerr=bars, color=color, marker=marker, linestyle=linestyle, zorder=3)
        if len(lines) > 1:
            legend.append(Line2D([], [], color=color, marker=marker, linestyle=linestyle, label=label))
    if best:
        star = {"marker": "*", "markersize": 14, "markeredgecolor": "black", "markeredgewidth": 0.8}
        axes.plot([best[1]], [sign * best[0]], color=best[2], zorder=4, **star)
        legend.append(Line2D([], [], color=best[2], linestyle="none", label=best[3], **star))
    replicate = "seed" if over == "train.seed" else f"value of {over}"
    if n_replicates > 1 and dots:
        legend.append(Line2D([], [], color="0.4", marker=".", linestyle="none", label=f"one {replicate}"))
    if _mark_failures(axes, lines):
        cross = {"marker": "X", "markersize": 8, "linestyle": "none"}
        legend.append(Line2D([], [], color="0.25", **cross, label="failed or diverged, of all runs there"))

    if numeric:
        log_if_wide(axes, places.values())
    if not numeric:
        axes.set_xlim(-0.5, len(ticks) - 0.5)

    name = objective_name(y)
    axes.set_xlabel(", ".join(AXIS_NAMES.get(key, key) for key in keys))
    axes.set_ylabel(name + loss_unit(runs, y))
    title = f"{name[0].upper()}{name[1:]} at {'the last step' if at == 'last' else 'its best'}"
    n = n_replicates if min(counts) == n_replicates else f"{min(counts)} to {n_replicates}"
    spread = f": mean{' ± standard error' if dots else ''}, {n} {replicate}s"
    title += spread if n_replicates > 1 else f", one {replicate}"
    if n_lines > len(lines):
        title += f"; best {len(lines)} of {n_lines} settings"
    if n_unended:
        title += f"; {n_unended} runs without an end left out"
    if n_without:
        title += f"; {n_without} run{'s' * (n_without > 1)} without this key left out"
    if scattered:
        title += "; one mark a setting"
    axes.set_title("\n".join(textwrap.wrap(title, 72)), loc="left")
    add_legend(figure, legend, "outside lower center", 76)
    if not numeric or len(ticks) <= 8:
        labels = [_together_text(value) for value in ticks]
        ticks_at(axes, list(places.values()), labels, words=not numeric)
    return figure


def _mark_failures(axes, lines):
    """Crosses at the top where runs failed, with their number; whether there are any."""
    counts = {}  # place -> [failed, all]
    for _, line in lines:
        for place, _, values in line:
            count = counts.setdefault(place, [0, 0])
            count[0] += int(np.isnan(values).sum())
            count[1] += len(values)
    failures = {place: count for place, count in counts.items() if count[0]}
    if not failures:
        return False
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))
    across = axes.get_xaxis_transform()  # x in data, y as a share of the axes' height
    look = {"color": "0.25", "markersize": 8, "linestyle": "none", "transform": across, "clip_on": False}
    axes.plot(list(failures), [0.97] * len(failures), "X", **look)
    for place, (failed, total) in failures.items() if len(failures) <= MOST_COUNTS else ():
        below = {"xycoords": across, "xytext": (0, -7), "textcoords": "offset points"}
        axes.annotate(f"{failed} of {total}", (place, 0.97), **below, ha="center", va="top", fontsize=8.5)
    return True


def _values(run, keys):
    """The run's values of some keys, to be compared."""
    return tuple(hashable(run.config[key]) for key in keys)


def _is_axis(values):
    """Whether values can be places on an axis: numbers, and no two the same."""
    return all(map(_is_number, values)) and len(set(values)) == len(values)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _together_text(values):
    return ", ".join(map(text, values))
