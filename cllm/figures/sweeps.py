"""What a sweep's settings have come to: two keys at once, sensitivity, budgets, differences, rungs."""

import math

import numpy as np

from cllm.errors import InputError, nearest
from cllm.figures.groups import by_setting, end, ended, hashable, mean_over
from cllm.figures.style import (
    AXIS_NAMES,
    MARKERS,
    MAX_LINES,
    add_legend,
    log_if_wide,
    loss_unit,
    objective_name,
    short,
    styled,
    text,
)
from cllm.verdict import plus_minus

__all__ = ["contenders", "differences", "heat_map", "rungs", "sensitivity"]

MOST_WORDS = 100  # cells of a heat map that have room for their numbers


@styled
def heat_map(runs, x, y, z="val.loss", over="train.seed", at="last", goal="minimize"):
    """A recorded value at the end of runs against two keys of their configs.

    A cell is the mean over `over`; where the runs of a cell differ in other keys as well, it is that of the
    best of them. A cross marks cells in which every setting has a run that failed or diverged, a frame the
    best cell.

    Parameters
    ----------
    runs : list of records.Run
    x, y : str
        Dotted keys of the config, such as "optim.lr".
    z, over, at, goal
        As `against` has y, over, at and goal.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run has both keys, one key has a single value, or no cell has a value.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    runs = _with_keys(ended(runs), (x, y))
    columns, rows = (_distinct([run.config[key] for run in runs]) for key in (x, y))
    for key, values in ((x, columns), (y, rows)):
        if len(values) < 2:
            raise InputError(f"{key} has one value in these runs, a heat map needs at least two")
    sign = 1 if goal == "minimize" else -1
    cells, failed = np.full((len(rows), len(columns)), math.nan), np.zeros((len(rows), len(columns)), bool)
    for group, mean in mean_over(runs, over, z, at, goal):
        place = rows.index(hashable(group[0].config[y])), columns.index(hashable(group[0].config[x]))
        failed[place] |= math.isnan(mean)
        if not math.isnan(mean) and not sign * mean > sign * cells[place]:
            cells[place] = mean
    if np.isnan(cells).all():
        raise InputError(f'no cell has a setting whose runs have all recorded "{z}"')

    figure = Figure(figsize=(2.2 + 0.85 * max(len(columns), 4), 1.6 + 0.55 * max(len(rows), 4)))
    axes = figure.subplots()
    low, high = np.nanmin(cells), np.nanmax(cells)
    # Of one setting that went badly the others must not all look alike.
    top = min(high, np.nanmedian(cells) + 2 * (np.nanmedian(cells) - low)) if goal == "minimize" else high
    picture = axes.imshow(
        np.ma.masked_invalid(cells), cmap="cividis" if sign < 0 else "cividis_r", vmin=low,
        vmax=max(top, low + 1e-12), origin="lower", aspect="auto",
    )  # fmt: skip
    axes.grid(False)
    axes.set_facecolor("0.9")
    decimals = max(0, 2 - math.floor(math.log10(high - low))) if high > low else 3
    for (row, column), value in np.ndenumerate(cells):
        if math.isnan(value) and failed[row, column]:
            axes.plot(column, row, "X", color="0.25", markersize=8)
        elif not math.isnan(value) and cells.size <= MOST_WORDS:
            shade = picture.cmap(picture.norm(value))
            dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
            axes.text(
                column, row, f"{value:.{min(decimals, 4)}f}", ha="center", va="center", fontsize=8.5,
                color="white" if dark else "black",
            )  # fmt: skip
    best = np.unravel_index(np.nanargmin(sign * cells), cells.shape)
    frame = Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5)
    axes.add_patch(frame)
    axes.set_xticks(range(len(columns)), [text(value) for value in columns])
    axes.set_yticks(range(len(rows)), [text(value) for value in rows])
    axes.set_xlabel(AXIS_NAMES.get(x, x))
    axes.set_ylabel(AXIS_NAMES.get(y, y))
    name = objective_name(z)
    more = "max" if top < high else "neither"
    figure.colorbar(picture, label=name + loss_unit(runs, z), extend=more, aspect=30)
    cross = "; cross: failed or diverged" if (failed & np.isnan(cells)).any() else ""
    axes.set_title(f"{name[0].upper()}{name[1:]}, means over {over}; frame: the best{cross}", loc="left")
    return figure


@styled
def sensitivity(runs, x="optim.lr", y="val.loss", over="train.seed", at="last"):
    """How much a loss suffers where a key, such as the learning rate, is not at its best value.

    The sensitivity of a setting is the mean over the values of `x` of how far its loss lies above that at
    the best value (Wortsman et al. 2023, "Small-scale proxies for large-scale transformer training
    instabilities"), where a loss counts as at most the first training loss, and that of a run that failed or
    diverged as just that. It is computed for each value of `over` by itself: bars are means with standard
    errors, dots the single ones.

    Parameters
    ----------
    runs : list of records.Run
        All settings must have the same values of `x`, or their sensitivities would not compare.
    x, y, over, at
        As of `against`; y is a loss, of which less is better.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When there are fewer than three values of `x`, or they are not the same for all settings.
    """
    from matplotlib.figure import Figure

    runs = _with_keys(ended(runs), (x,))
    groups = by_setting(runs, over=(over, x))
    if len(groups) > MAX_LINES:
        raise InputError(f"there are {len(groups)} settings besides {x}, of which {MAX_LINES} can be shown")
    places = _distinct([run.config[x] for run in runs])
    if len(places) < 3 or not all(isinstance(place, int | float) for place in places):
        raise InputError(f"{x} must have at least three values that are numbers, it has {len(places)}")
    figure = Figure(figsize=(8.2, 4.2))
    curve, bars = figure.subplots(1, 2, width_ratios=[2.2, 1])
    for index, (label, group) in enumerate(groups):
        look = {"color": f"C{index}", "marker": MARKERS[index]}
        table = {}  # value of over -> value of x -> loss
        for run in group:
            value = end(run, y, at, "minimize")
            first = _first_loss(run)
            value = first if math.isnan(value) else min(value, first)
            table.setdefault(hashable(run.config.get(over)), {})[run.config[x]] = value
        whole = [[row[place] for place in places] for row in table.values() if set(row) == set(places)]
        if not whole:
            raise InputError(f"{label} has not all {len(places)} values of {x} for any value of {over}")
        whole = np.array(whole)
        curve.plot(places, whole.mean(0), label=label, **look)
        if len(whole) > 1:
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            curve.fill_between(places, whole.min(0), whole.max(0), **band)
        lost = (whole - whole.min(1, keepdims=True)).mean(1)
        error = lost.std(ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else None
        bars.bar(index, lost.mean(), 0.7, yerr=error, color=look["color"], alpha=0.55, edgecolor="black")
        bars.plot([index] * len(lost), lost, marker=look["marker"], linestyle="none", color="black", ms=3.5)
        bars.annotate(
            plus_minus(lost.mean(), error), (index, lost.max()), xytext=(0, 6), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    log_if_wide(curve, places)
    curve.set_xlabel(AXIS_NAMES.get(x, x))
    name = objective_name(y)
    curve.set_ylabel(name + loss_unit(runs, y))
    band = "; bands: range over seeds" if over == "train.seed" else ""
    curve.set_title(f"{name[0].upper()}{name[1:]}, at most the first loss{band}", loc="left")
    bars.set_xticks([])
    bars.grid(axis="x", visible=False)
    bars.margins(y=0.15)
    bars.set_ylabel(f"mean excess over the best {short(x)}")
    bars.set_title("Sensitivity", loc="left")
    add_legend(figure, curve.get_legend_handles_labels()[0], "outside lower center", 90)
    return figure


@styled
def contenders(runs, key, y="val.loss", over="train.seed", at="last", goal="minimize"):
    """The best mean so far of each contender against the steps that it has spent, setting by setting.

    Parameters
    ----------
    runs : list of records.Run
    key : str
        Whose values are the contenders, such as "optim.name".
    y, over, at, goal
        As of `against`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run has the key.
    """
    from matplotlib.figure import Figure

    runs = _with_keys(runs, (key,))
    names = list(dict.fromkeys(hashable(run.config[key]) for run in runs))
    sign = 1 if goal == "minimize" else -1
    figure = Figure(figsize=(7.4, 4.4))
    axes = figure.subplots()
    ends = []
    for name in names:
        mine = [run for run in runs if hashable(run.config[key]) == name]
        spent, best, steps, values = 0, math.inf, [], []
        for group, mean in mean_over(mine, over, y, at, goal):
            spent += sum(_steps(run) for run in group)
            best = best if math.isnan(mean) else min(best, sign * mean)
            steps.append(spent)
            values.append(sign * best if best < math.inf else math.nan)
        ends.append((sign * values[-1] if values else math.nan, name, steps, values))
    ends.sort(key=lambda item: (math.isnan(item[0]), item[0]))
    for index, (_, name, steps, values) in enumerate(ends):
        style = "-" if index < MAX_LINES else "--"
        marker = MARKERS[index % MAX_LINES]
        color = f"C{index % MAX_LINES}"
        last = "" if math.isnan(values[-1]) else f": {values[-1]:.4g}"
        label = f"{text(name)}{last}"
        axes.plot(steps, values, style, drawstyle="steps-post", color=color, marker=marker, label=label)
    axes.set_xlabel("training steps spent on it")
    what = objective_name(y)
    axes.set_ylabel(f"best mean {what} so far" + loss_unit(runs, y))
    axes.set_xlim(left=0)
    axes.set_title(f"Best so far against budget, by {AXIS_NAMES.get(key, key)}", loc="left")
    add_legend(figure, axes.get_legend_handles_labels()[0], "outside right upper", 26)
    return figure


@styled
def differences(summary, describe=str):
    """How much worse than the best the other settings are: paired differences with 95 % intervals.

    Parameters
    ----------
    summary : dict
        Of a sweep, as its summary.json has it.
    describe : callable
        A setting's number -> words.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When the summary compares nothing with its best setting.
    """
    from matplotlib.figure import Figure

    found = [entry for entry in summary["comparisons"] if entry["setting"] == summary["best"]]
    if not found:
        raise InputError("the sweep has compared no setting with its best one")
    found = found[:12]
    figure = Figure(figsize=(7.4, 1.5 + 0.42 * len(found)))
    axes = figure.subplots()
    for row, entry in enumerate(found):
        mean, interval = entry["mean"], entry["interval"]
        reach = [[mean - interval[0]], [interval[1] - mean]] if interval else None
        apart = entry["apart"]
        face = "C0" if apart else "white"
        axes.errorbar(
            mean, row, xerr=reach, color="C0", marker="o", markerfacecolor=face, markersize=7, capsize=4
        )
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(found)), [describe(entry["against"]) for entry in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    n = found[0]["n"]
    axes.set_xlabel(f"{objective_name(summary['objective'])}: worse than the best, paired over {n} seeds")
    if summary["decided"]:
        words = "Confirmed with fresh seeds; filled: apart at 5 % (Holm)"
    else:
        words = "Unconfirmed: judged on the seeds that chose the best"
    axes.set_title(f"Against {describe(summary['best'])}\n{words}; bars: 95 % intervals", loc="left")
    return figure


@styled
def rungs(runs, steps, y="val.loss", over="train.seed"):
    """The settings of a pruned sweep over their steps: where each was dropped, and who was kept.

    Parameters
    ----------
    runs : list of records.Run
    steps : list of int
        The rungs.
    y, over
        As of `against`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run has recorded `y`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    split, _, metric = y.partition(".")
    lines = []
    for label, group in by_setting(runs, over=(over,)):
        series = [dict(zip(*map(list, run.series(split, metric)))) for run in group if y in run.names()]
        common = sorted(set.intersection(*map(set, series))) if series else []
        if common:
            means = [float(np.mean([one[step] for one in series])) for step in common]
            whole = all(run.state == "finished" for run in group)
            lines.append((whole, means[-1], label, common, means))
    if not lines:
        raise InputError(f'no run has recorded "{y}", so there are no rungs to draw')
    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.subplots()
    kept = sorted((line for line in lines if line[0]), key=lambda line: line[1])
    for _, _, _, at, means in (line for line in lines if not line[0]):
        axes.plot(at, means, color="0.6", linewidth=0.9, zorder=2)
        axes.plot(at[-1:], means[-1:], "x", color="0.35", markersize=5, zorder=3)
    handles = []
    for index, (_, _, label, at, means) in enumerate(kept):
        look = {"color": f"C{index}", "marker": MARKERS[index]} if index < MAX_LINES else {"color": "0.2"}
        (line,) = axes.plot(at, means, zorder=4, label=label, markevery=-(-len(at) // 20), **look)
        handles += [line] if index < MAX_LINES else []
    for step in steps:
        axes.axvline(step, color="0.4", linewidth=0.9, linestyle=":", zorder=1)
    handles.append(Line2D([], [], color="0.6", marker="x", markeredgecolor="0.35", label="dropped at a rung"))
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="rung"))
    name = objective_name(y)
    axes.set_xlabel("step")
    axes.set_ylabel(name + loss_unit(runs, y))
    values = np.array([value for line in lines for value in line[4] if math.isfinite(value)])
    if metric == "loss" and len(values) > 3:
        axes.set_ylim(top=min(values.max(), np.percentile(values, 95) * 1.02))
    axes.set_title(f"{len(kept)} of {len(lines)} settings came to the end; means over {over}", loc="left")
    add_legend(figure, handles, "outside right upper", 30)
    return figure


def _with_keys(runs, keys):
    known = sorted(set().union(*(run.config for run in runs)))
    for key in keys:
        runs = [run for run in runs if key in run.config]
        if not runs:
            raise InputError(f'no run has the key "{key}" in its config{nearest(key, known)}')
    return runs


def _distinct(values):
    """The values without repetition: sorted when they are numbers, else in order of appearance."""
    distinct = list(dict.fromkeys(map(hashable, values)))
    return sorted(distinct) if all(isinstance(value, int | float) for value in distinct) else distinct


def _first_loss(run):
    losses = run.series("train", "loss")[1]
    if not len(losses):
        raise InputError(f"{run.path} has no recorded training step")
    return float(losses[0])


def _steps(run):
    """How many steps a run has spent."""
    return run.summary.get("step") or max((record["step"] for record in run.records), default=0)
