"""Values over the steps of training: loss, learning rate, metrics."""

import functools
import itertools
import math

import numpy as np

from cllm import records
from cllm.errors import InputError, nearest
from cllm.figures.groups import by_setting, end, mean_or_inf
from cllm.figures.style import (
    LINESTYLES,
    MARKERS,
    MAX_LINES,
    OTHER_LINESTYLES,
    SPLIT_NAMES,
    add_legend,
    loss_unit,
    palette,
    plain_log_ticks,
    styled,
)

__all__ = ["is_metric", "loss_curves", "metric_curves"]

MAX_PANELS = 8
MAX_RAW = 4  # more raw training curves on one axis make a haze in which none can be followed
# What `metric_curves` draws only when it is asked to: what the loss curves show, or what time it took.
NOT_METRICS = ("loss", "perplexity", "lr", "grad_norm")


@styled
def loss_curves(runs, of=None):
    """Training and validation loss over steps; learning rate and gradient norm below, where recorded.

    Without a split "val" the first other one that has a loss stands in its place.

    Runs that differ in nothing but their seed share a colour: lines are means over the seeds that have the
    step, the band spans their lowest and highest validation loss. Of at most four runs faint lines show the
    raw training loss as well.

    Parameters
    ----------
    runs : list of records.Run
        At least one. Of more than seven settings, the seven with the lowest last validation loss are drawn.
    of : int, optional
        Of how many settings these are the best, if they are not all.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When none of the runs has a recorded training step.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = [run for run in runs if len(run.series("train", "loss")[0])]
    if not runs:
        raise InputError("none of these runs has a recorded training step, so there is no loss curve to draw")
    settings, legend, shown = _settings(runs, rank=_mean_end, of=of)
    drawn = [run for _, group in settings for run in group]
    raw = len(drawn) <= MAX_RAW

    below = [key for key in ("lr", "grad_norm") if any(len(run.series("train", key)[0]) for run in drawn)]
    figure = Figure(figsize=(7.6, 4 + 1.2 * len(below)))
    panels = figure.subplots(1 + len(below), 1, sharex=True, height_ratios=[3.2] + [1] * len(below))
    loss_axes, *others = np.atleast_1d(panels)
    axes_of = dict(zip(below, others))
    split = followed(runs)
    trained, evaluated = [], []  # numbers of seeds at the steps
    for look, group in settings:
        plain = {"color": look["color"]}
        for run in group if raw else ():
            faint = {"alpha": 0.3, "linewidth": 0.6, "rasterized": True}
            loss_axes.plot(*run.series("train", "loss"), **plain, **faint, zorder=1)
        trained += _draw_mean(loss_axes, group, "train", "loss", smooth=True, **plain)
        evaluated += _draw_mean(loss_axes, group, split, "loss", band=True, **look, linestyle="--", zorder=4)
        if "lr" in axes_of:
            _draw_mean(axes_of["lr"], group, "train", "lr", **plain)
        if "grad_norm" in axes_of:
            _draw_mean(axes_of["grad_norm"], group, "train", "grad_norm", smooth=True, **plain)

    start = max(run.series("train", "loss")[1][0] for run in runs)
    if math.isfinite(start):  # a run that blows up must not flatten the others
        loss_axes.set_ylim(top=min(loss_axes.get_ylim()[1], 1.1 * start))
    if "lr" in axes_of:
        peaks = [line.get_ydata().max() for line in axes_of["lr"].get_lines()]
        if min(peaks) > 0 and max(peaks) >= 10 * min(peaks):
            axes_of["lr"].set_yscale("log", nonpositive="mask")
            axes_of["lr"].set_ylim(bottom=min(peaks) / 30)  # a decay to 0 would stretch the axis without end
        else:
            axes_of["lr"].set_ylim(bottom=0)
        axes_of["lr"].set_ylabel("learning rate")
    if "grad_norm" in axes_of:
        norms = np.concatenate([line.get_ydata() for line in axes_of["grad_norm"].get_lines()])
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if len(norms) and norms.max() >= 10 * norms.min():
            axes_of["grad_norm"].set_yscale("log")
        axes_of["grad_norm"].set_ylabel("gradient norm")
    for axes in axes_of.values():
        plain_log_ticks(axes.yaxis)

    loss_axes.set_ylabel("loss" + loss_unit(runs))
    last = others[-1] if others else loss_axes
    last.set_xlabel("step")
    last.set_xlim(left=0)
    figure.align_ylabels()
    each = f"{_seeds(trained)} each" if max(trained) > 1 else ""
    loss_axes.set_title(", ".join(filter(None, ["Loss over training", shown, each])), loc="left")

    gray = {"color": "0.4"}
    over_seeds = f":\nmean and range\nof {_seeds(evaluated)}" if max(evaluated, default=1) > 1 else ""
    legend.append(Line2D([], [], **gray, linewidth=1.3, label="training, smoothed"))
    if raw:
        legend.append(Line2D([], [], **gray, linewidth=0.6, alpha=0.6, label="training, raw"))
    line = {"linestyle": "--"} if len(evaluated) > len(settings) else {"linestyle": "none", "marker": "o"}
    legend.append(Line2D([], [], **gray, **line, label=SPLIT_NAMES.get(split, split) + over_seeds))
    add_legend(figure, legend, "outside right upper", 30)
    return figure


@styled
def metric_curves(runs, metrics=None, of=None):
    """What was measured besides the loss, over steps: a panel for each metric, a kind of line a split.

    Runs that differ in nothing but their seed share a colour: means over the seeds that have the step, and a
    band from the lowest to the highest.

    Parameters
    ----------
    runs : list of records.Run
        Of more than seven settings, the first seven are drawn.
    metrics : list of str, optional
        Names in the records, "loss" included; by default all numbers but those of the loss curves and of
        time, at most eight.
    of : int, optional
        Of how many settings these are the best, if they are not all.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run has recorded one of `metrics`, or any metric at all.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    recorded = dict.fromkeys(name for run in runs for name in run.names())
    splits_of = {}  # metric -> the splits that have it
    for name in recorded:
        split, _, metric = name.partition(".")
        if all(_is_series(run, split, metric) for run in runs):
            splits_of.setdefault(metric, []).append(split)
    for metric in metrics or ():
        if metric not in splits_of:
            raise InputError(f'no run has recorded "{metric}"{nearest(metric, splits_of)}')
    found = metrics or _metrics(splits_of)
    if not found:
        raise InputError("these runs have recorded no metric besides the loss, so there is none to draw")
    chosen = found[:MAX_PANELS]
    settings, legend, shown = _settings(runs, of=of)
    splits = list(dict.fromkeys(split for metric in chosen for split in splits_of[metric]))
    others = itertools.cycle(OTHER_LINESTYLES)
    styles = {split: LINESTYLES.get(split) or next(others) for split in splits}

    figure = Figure(figsize=(7.6, 1.2 + 2.2 * len(chosen)))
    panels = np.atleast_1d(figure.subplots(len(chosen), 1, sharex=True))
    counts = []
    for axes, metric in zip(panels, chosen):
        for look, group in settings:
            for split in splits_of[metric]:
                counts += _draw_mean(axes, group, split, metric, band=True, **look, linestyle=styles[split])
        axes.set_ylabel(metric + (loss_unit(runs) if metric == "loss" else ""))
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(left=0)
    figure.align_ylabels()
    words = [
        "Metrics over training",
        f"first {len(chosen)} of {len(found)}" if len(found) > len(chosen) else "",
        shown,
        f"mean and range of {_seeds(counts)}" if max(counts, default=1) > 1 else "",
    ]
    panels[0].set_title(", ".join(filter(None, words)), loc="left")
    legend += [
        Line2D([], [], color="0.4", linestyle=style, label=SPLIT_NAMES.get(split, split))
        for split, style in styles.items()
    ]
    add_legend(figure, legend, "outside right upper", 30)
    return figure


def _mean_end(group):
    """The group's mean last validation loss; infinite when one of its runs has none."""
    split = followed(group)
    return mean_or_inf(np.array([end(run, f"{split}.loss", "last", "minimize") for run in group]))


def followed(runs):
    """The split whose loss is drawn beside that of training: "val", or the first other one that has one."""
    names = [name for run in runs for name in run.names()]
    others = [name.partition(".")[0] for name in names if name.endswith(".loss") and name != "train.loss"]
    return "val" if "val" in others or not others else others[0]


def _metrics(splits_of):
    """The metrics to draw unless told: none that the loss curves have, but the loss of several splits."""
    evaluated = [split for split in splits_of.get("loss", []) if split != "train"]
    found = [metric for metric in splits_of if is_metric(metric)]
    return ["loss"] * (len(evaluated) > 1) + found


def is_metric(name):
    return name not in NOT_METRICS and not records.is_timing(name) and not records.is_inside(name)


def _is_series(run, split, metric):
    """Whether the run's records of a number can be drawn; a matrix cannot."""
    if f"{split}.{metric}" not in run.names():
        return True
    try:
        run.series(split, metric)
    except InputError:
        return False
    return True


def _together(group, split, key):
    """(steps that any run of the group recorded, values with one row a run: masked where it has none)."""
    series = [run.series(split, key) for run in group if f"{split}.{key}" in run.names()]
    steps = functools.reduce(np.union1d, (at for at, _ in series), np.zeros(0, np.int64))
    values = np.ma.masked_all((len(series), len(steps)))
    for row, (at, found) in zip(values, series):
        row[np.searchsorted(steps, at)] = found
    return steps, values


def _smooth(values):
    """Running mean under a bell of about a fiftieth of the values, cut off at both ends."""
    if len(values) < 9:
        return values
    window = np.hanning(max(len(values) // 50, 4) * 2 + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _settings(runs, rank=None, of=None):
    """The settings to draw, [(look, runs)], their legend, and words when they are not all.

    Of too many, those with the lowest `rank(runs)`, or the first.
    """
    from matplotlib.lines import Line2D

    groups = by_setting(runs, over=("train.seed",))
    words = f"best {len(groups)} of {of} settings" if of else ""
    if len(groups) > MAX_LINES:
        words = f"{'best' if rank else 'first'} {MAX_LINES} of {len(groups)} settings"
        groups = (sorted(groups, key=lambda group: rank(group[1])) if rank else groups)[:MAX_LINES]
    looks = [{"color": palette(index), "marker": MARKERS[index]} for index in range(len(groups))]
    legend = [Line2D([], [], **look, label=label) for look, (label, _) in zip(looks, groups)]
    return [(look, group) for look, (_, group) in zip(looks, groups)], legend, words


def _draw_mean(axes, group, split, key, band=False, smooth=False, **look):
    """Draw the mean over the seeds that have the step, and their range; how many they are at each step."""
    steps, values = _together(group, split, key)
    if not len(steps):
        return []
    mean = np.asarray(values.mean(0))
    look = {"zorder": 3, "linewidth": 1.3 if smooth else None, "markevery": -(-len(steps) // 50)} | look
    axes.plot(steps, _smooth(mean) if smooth else mean, **look)
    if band and len(values) > 1:
        fill = {"color": look["color"], "alpha": 0.2, "linewidth": 0, "zorder": 2}
        axes.fill_between(steps, values.min(0), values.max(0), **fill)
    return values.count(0).tolist()


def _seeds(counts):
    low, high = min(counts), max(counts)
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"
