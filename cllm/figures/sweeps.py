"""What a sweep's settings have come to: two keys at once, sensitivity, budgets, differences, rungs."""

import math
import textwrap

import numpy as np

from cllm.errors import InputError, nearest
from cllm.figures.groups import Trial, by_setting, end, ended, hashable, mean_over
from cllm.figures.style import (
    AXIS_NAMES,
    MARKERS,
    MAX_LINES,
    add_legend,
    log_if_wide,
    loss_unit,
    objective_name,
    palette,
    plain_log_ticks,
    short,
    styled,
    text,
    ticks_at,
    unmarked,
)
from cllm.verdict import plus_minus

__all__ = ["contenders", "differences", "heat_map", "rungs", "sensitivity"]

MOST_BARS = 12  # differences in one figure
MOST_PATHS = 60  # settings that were dropped at rungs, as lines
MOST_WORDS = 100  # cells of a heat map that have room for their numbers
FRAME = {"color": "black", "linewidth": 2.5, "zorder": 4}  # of the best cell, which is the palest one


@styled
def heat_map(runs, x, y, z="val.loss", over="train.seed", at="last", goal="minimize"):
    """A recorded value at the end of runs against two keys of their configs.

    A cell is the mean over `over`; where the runs of a cell differ in other keys as well, it is that of the
    best of them. A cross marks cells in which every setting has a run that failed or diverged, a frame the
    best cell. Where fewer than half of all cells have a value, as of sampled settings, these are dots at
    their places on axes of numbers.

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
    n_settings = np.zeros(cells.shape, int)
    for group, mean in mean_over(runs, over, z, at, goal):
        place = rows.index(hashable(group[0].config[y])), columns.index(hashable(group[0].config[x]))
        failed[place] |= any(math.isnan(end(run, z, at, goal)) for run in group)
        n_settings[place] += 1
        if not math.isnan(mean) and not sign * mean > sign * cells[place]:
            cells[place] = mean
    if np.isnan(cells).all():
        raise InputError(f'no cell has a setting whose runs have all recorded "{z}"')

    low, high = np.nanmin(cells), np.nanmax(cells)
    # Of one setting that went badly the others must not all look alike.
    middle = np.nanmedian(cells)
    if goal == "minimize":
        high = min(high, middle + 2 * (middle - low))
    else:
        low = max(low, middle - 2 * (high - middle))
    colors = "cividis_r" if goal == "minimize" else "cividis"
    look = {"cmap": colors, "vmin": low, "vmax": max(high, low + 1e-12), "zorder": 2}
    best = np.unravel_index(np.nanargmin(sign * cells), cells.shape)
    sparse = np.isfinite(cells).sum() < cells.size / 2
    size = (7.0, 4.8) if sparse else (2.6 + 0.85 * max(len(columns), 5), 1.7 + 0.55 * max(len(rows), 4))
    figure = Figure(figsize=size)
    axes = figure.subplots()
    places = [_places(axis, values, sparse) for axis, values in ((axes.xaxis, columns), (axes.yaxis, rows))]
    at_x, at_y = np.meshgrid(*places)
    crosses = failed & np.isnan(cells)
    if sparse:
        there = np.isfinite(cells)
        picture = axes.scatter(at_x[there], at_y[there], c=cells[there], s=70, edgecolor="0.3", **look)
        axes.plot(at_x[best], at_y[best], "o", markersize=15, markerfacecolor="none", **FRAME)
    else:
        shown = np.ma.masked_invalid(cells)
        picture = axes.pcolormesh(*places, shown, shading="nearest", edgecolor="white", linewidth=0.5, **look)
        axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, **FRAME))
        axes.grid(False)
        axes.set_facecolor("0.9")
    axes.plot(at_x[crosses], at_y[crosses], "X", color="0.25", markersize=8, linestyle="none")
    if not sparse and cells.size <= MOST_WORDS:
        _write_cells(axes, picture, cells)
    axes.set_xlabel(AXIS_NAMES.get(x, x))
    axes.set_ylabel(AXIS_NAMES.get(y, y))
    name = objective_name(z)
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    cut = bool(np.nanmin(cells) < low), bool(np.nanmax(cells) > high)
    figure.colorbar(picture, label=name + loss_unit(runs, z), extend=beyond[cut], aspect=30)
    notes = [f"means over {'seeds' if over == 'train.seed' else over}", "framed: the best"]
    notes += ["each cell the best of other keys"] if n_settings.max() > 1 else []
    notes += ["crosses: failed or diverged"] if crosses.any() else []
    title = f"{name[0].upper()}{name[1:]}: {', '.join(notes)}"
    axes.set_title("\n".join(textwrap.wrap(title, int(8.5 * size[0]))), loc="left")
    return figure


def _places(axis, values, sparse):
    """Where values lie on an axis: numbers of sampled settings at themselves, others one beside the other."""
    if sparse and all(isinstance(value, int | float) for value in values):
        if values[0] > 0 and values[-1] >= 10 * values[0]:
            axis._set_axes_scale("log")
            axis.set_view_interval(values[0], values[-1])
            plain_log_ticks(axis)
        return np.array(values, float)
    axis.set_ticks(range(len(values)), [text(value) for value in values])
    return np.arange(len(values))


def _write_cells(axes, picture, cells):
    """Each cell's number, in what can be read on its colour."""
    spread = np.nanmax(cells) - np.nanmin(cells)
    decimals = min(max(0, 2 - math.floor(math.log10(spread))), 4) if spread > 0 else 3
    for (row, column), value in np.ndenumerate(cells):
        if not math.isnan(value):
            shade = picture.cmap(picture.norm(value))
            dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
            how = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "white" if dark else "black"}
            axes.text(column, row, f"{value:.{decimals}f}" if abs(value) < 1e4 else f"{value:.2g}", **how)


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
    figure = Figure(figsize=(8.6, 4.4))
    curve, bars = figure.subplots(1, 2, width_ratios=[1.7, 1])
    reach, replicates = 0.0, set()
    for index, (label, group) in enumerate(groups):
        look = {"color": palette(index), "marker": MARKERS[index]}
        whole = _whole(group, x, y, over, at, places)
        if whole is None:
            raise InputError(f"{label} has not all {len(places)} values of {x} for any value of {over}")
        replicates.add(len(whole))
        curve.plot(places, whole.mean(0), label=label, **look)
        if len(whole) > 1:
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            curve.fill_between(places, whole.min(0), whole.max(0), **band)
        lost = (whole - whole.min(1, keepdims=True)).mean(1)
        error = lost.std(ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else None
        bars.barh(index, lost.mean(), 0.7, xerr=error, color=look["color"], alpha=0.45, edgecolor="black")
        bars.plot(lost, [index] * len(lost), marker=look["marker"], linestyle="none", color="black", ms=4)
        end_of_bar = max(lost.max(), lost.mean() + (error or 0.0))
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        bars.annotate(plus_minus(lost.mean(), error), (end_of_bar, index), **beside)
        reach = max(reach, end_of_bar)
    log_if_wide(curve, places)
    curve.set_xlabel(AXIS_NAMES.get(x, x))
    name = objective_name(y)
    curve.set_ylabel(name + loss_unit(runs, y))
    band = "; bands: range" if max(replicates) > 1 else ""
    curve.set_title(f"{name[0].upper()}{name[1:]}, at most the first{band}", loc="left")
    bars.set_yticks([])
    bars.invert_yaxis()  # as in the legend
    bars.grid(axis="y", visible=False)
    bars.set_xlim(0, (reach or 1.0) * 1.6)  # room for the numbers
    bars.set_xlabel(f"mean excess over the best {short(x)}")
    bars.set_title("Sensitivity", loc="left")
    add_legend(figure, curve.get_legend_handles_labels()[0], "outside lower center", 90)
    if len(places) <= 8:
        ticks_at(curve, places, [text(place) for place in places])
    return figure


def _whole(group, x, y, over, at, places):
    """A setting's losses, a row for each value of `over` that has all places; None without one."""
    table = {}  # value of over -> value of x -> loss
    for run in group:
        value = end(run, y, at, "minimize")
        first = run.first("train", "loss")
        if first is None:
            raise InputError(f"{run.path} has no recorded training step")
        value = first if math.isnan(value) else min(value, first)
        table.setdefault(hashable(run.config.get(over)), {})[run.config[x]] = value
    rows = [[row[place] for place in places] for row in table.values() if set(row) == set(places)]
    return np.array(rows) if rows else None


@styled
def contenders(runs, key, y="val.loss", over="train.seed", at="last", goal="minimize"):
    """The best mean so far of each contender against the steps that it has spent, setting by setting.

    A mark is a setting's end, when all its steps are spent; one that failed or was dropped spends too.

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
        color = palette(index % MAX_LINES)
        last = ": none came to the end" if math.isnan(values[-1]) else f": {values[-1]:.4g}"
        label = f"{text(name)}{last}"
        every = -(-len(steps) // 25)
        look = {"color": color, "marker": marker, "markevery": every, "label": label}
        axes.plot(steps, values, style, drawstyle="steps-post", **look)
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
    n_found, found = len(found), found[:MOST_BARS]
    figure = Figure(figsize=(8.2, 1.6 + 0.44 * len(found)))
    axes = figure.subplots()
    for row, entry in enumerate(found):
        mean, interval = entry["mean"], entry["interval"]
        reach = [[mean - interval[0]], [interval[1] - mean]] if interval else None
        apart = entry["apart"]
        face = palette(0) if apart else "white"
        look = {"marker": "o", "markersize": 7, "markerfacecolor": face, "capsize": 4}
        axes.errorbar(mean, row, xerr=reach, color=palette(0), **look)
    axes.axvline(0, color="0.4", linewidth=1, linestyle="--")
    words = [textwrap.fill(unmarked(describe(entry["against"])), 44) for entry in found]
    axes.set_yticks(range(len(found)), words)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    name, n = objective_name(summary["objective"]), found[0]["n"]
    axes.set_xlabel(f"by how much the {name} is worse than the best's")
    if summary["decided"]:
        words = f"Confirmed with {n} fresh seeds; filled: apart at 5 % (Holm)"
    else:
        words = f"Unconfirmed: judged on the {n} seeds that chose the best"
    more = f"; first {len(found)} of {n_found}" if n_found > len(found) else ""
    title = f"{name[0].upper()}{name[1:]} against that of {unmarked(describe(summary['best']))}"
    lines = [*textwrap.wrap(title, 80), *textwrap.wrap(f"{words}; bars: 95 % intervals{more}", 80)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=axes.title.get_fontsize())
    return figure


@styled
def rungs(runs, steps, y="val.loss", over="train.seed", goal="minimize"):
    """The settings of a pruned sweep over their steps: where each was dropped, and who was kept.

    Parameters
    ----------
    runs : list of records.Run
        Of more than 60 dropped settings only their ends are drawn.
    steps : list of int
        The rungs.
    y, over, goal
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

    sign = 1 if goal == "minimize" else -1
    kept, dropped, n_failed = [], [], 0  # (label, runs)
    groups = by_setting(runs, over=(over,))
    for label, group in groups:
        states = {run.state for run in group}
        if "failed" in states and not states & {"pruned", "unfinished"}:
            n_failed += 1
        else:
            (kept if states == {"finished"} else dropped).append((label, group))
    # a setting that still runs is in the table, but no run's own files tell that it was dropped
    going = any(run.state == "unfinished" for _, group in dropped for run in group)
    fate = "dropped at a rung or not at the end yet" if going else "dropped at a rung"
    brief = len(dropped) > MOST_PATHS
    paths = [_mean_path(group, y, last=brief) for _, group in dropped]
    ends = [float(np.mean([end(run, y, "last", goal) for run in group])) for _, group in kept]
    order = sorted(range(len(kept)), key=lambda i: (math.isnan(ends[i]), sign * ends[i]))[:MAX_LINES]
    drawn = [(kept[i][0], _mean_path(kept[i][1], y)) for i in order]
    values = [value for _, means in [*paths, *(path for _, path in drawn)] for value in means]
    if not values:
        raise InputError(f'no run has recorded "{y}", so there are no rungs to draw')

    figure = Figure(figsize=(7.8, 4.6))
    axes = figure.subplots()
    for at, means in paths if not brief else ():
        axes.plot(at, means, color="0.6", linewidth=0.9, zorder=2)
    cross = {"color": "0.35", "marker": "x", "markersize": 5}
    last = np.array([(at[-1], means[-1]) for at, means in paths if len(at)]).reshape(-1, 2)
    axes.plot(*last.T, linestyle="none", zorder=3, **cross)
    handles = []
    for index, (label, (at, means)) in enumerate(drawn):
        look = {"color": palette(index), "marker": MARKERS[index], "markevery": -(-len(at) // 20)}
        handles += axes.plot(at, means, zorder=4, label=label, **look)
    for step in steps:
        axes.axvline(step, color="0.4", linewidth=0.9, linestyle=":", zorder=1)
    line = "none" if brief else "-"
    handles.append(Line2D([], [], **{**cross, "color": "0.5"}, linestyle=line, label=fate))
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="rung"))
    name = objective_name(y)
    axes.set_xlabel("step")
    axes.set_ylabel(name + loss_unit(runs, y))
    start = max((run.first("train", "loss") or math.nan for _, group in kept[:1] for run in group), default=0)
    if y.endswith(".loss") and start > 0:  # one that was on its way to diverge must not flatten the others
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.1 * start))
    top = axes.get_ylim()[1]
    above = last[last[:, 1] > top]
    if len(above):
        look = {"color": "0.35", "marker": "^", "markersize": 6, "linestyle": "none"}
        axes.plot(above[:, 0], np.full(len(above), top), **look, clip_on=False, zorder=5)
        handles.insert(-1, Line2D([], [], **look, label=f"above the axis, up to {above[:, 1].max():.4g}"))
    title = f"{len(kept)} of {len(groups)} settings came to the end"
    title += f", {n_failed} failed" if n_failed else ""
    title += f"; the best {len(drawn)} of them, and all others" if len(kept) > len(drawn) else ""
    title += f"; means over {'seeds' if over == 'train.seed' else over}"
    axes.set_title("\n".join(textwrap.wrap(title, 62)), loc="left")
    add_legend(figure, handles, "outside right upper", 30)
    return figure


def _mean_path(group, y, last=False):
    """(steps, means over runs) where all runs of a setting have recorded y; of a trial `last` is enough."""
    split, _, metric = y.partition(".")
    series = []
    for run in group:
        if last and isinstance(run, Trial) and run.judged[0] == y:
            series.append({} if math.isnan(run.value) else {run.step: run.value})
        else:
            at, values = map(list, run.series(split, metric)) if y in run.names() else ([], [])
            # One that was dropped may have records beyond: it was trained before there were rungs.
            end = run.step if run.state == "pruned" else math.inf
            series.append({step: value for step, value in zip(at, values) if step <= end})
    steps = sorted(set.intersection(*map(set, series)))
    return steps, [float(np.mean([one[step] for one in series])) for step in steps]


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


def _steps(run):
    """How many steps a run has spent."""
    if isinstance(run, Trial):
        return run.step
    return run.summary.get("step") or max((record["step"] for record in run.records), default=0)
