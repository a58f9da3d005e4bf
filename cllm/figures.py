"""Records -> matplotlib figures.

Each function takes runs (`records.load`) and returns a `matplotlib.figure.Figure`; nothing is shown and no
global state of matplotlib is touched. Colours and fonts come from `cllm.mplstyle` alone.
"""

import functools
import math
import tomllib
from pathlib import Path

import numpy as np

from cllm import records
from cllm.errors import InputError, nearest

STYLE = Path(__file__).with_name("cllm.mplstyle")
MAX_CURVES = 7  # settings in one figure of loss curves: as many as the palette has colours

# What an axis says for a key; any other key stands for itself.
AXIS_NAMES = {
    "optim.lr": "learning rate",
    "optim.weight_decay": "weight decay",
    "optim.momentum": "momentum",
    "schedule.warmup_steps": "warm-up (steps)",
    "schedule.min_lr": "final learning rate",
    "train.batch_size": "batch size (sequences)",
    "train.grad_accum": "accumulated micro-batches",
    "train.max_steps": "training length (steps)",
    "train.seed": "seed",
    "model.n_layer": "depth (layers)",
    "model.n_embd": "width (channels)",
    "model.n_head": "attention heads",
    "model.block_size": "context length (tokens)",
    "model.dropout": "dropout probability",
}
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def _styled(function):
    """Run `function` under CLLM's style, whatever the caller's rcParams are."""
    @functools.wraps(function)
    def styled(*args, **kwargs):
        import matplotlib.style
        with matplotlib.style.context(["default", STYLE]):
            return function(*args, **kwargs)
    return styled


@_styled
def loss_curves(runs):
    """Training and validation loss over steps; learning rate and gradient norm below.

    Runs that differ in nothing but their seed share a colour: thick lines are means over the seeds, the band
    spans the seeds' smallest and largest validation loss, faint lines are each seed's raw training loss.

    Parameters
    ----------
    runs : list of records.Run
        At least one. With more than seven settings, the seven with the lowest last validation loss are drawn.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When there are no runs, or none has a recorded step.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = [run for run in runs if len(run.series("train", "loss")[0])]
    if not runs:
        raise InputError("loss_curves: none of these runs has a recorded training step")
    groups = _by_setting(runs, over="train.seed")
    n_settings = len(groups)
    if n_settings > MAX_CURVES:
        groups = sorted(groups, key=lambda group: _rank(group[1]))[:MAX_CURVES]
    n_seeds = max(len(group) for _, group in groups)

    figure = Figure(figsize=(7.2, 6.4))
    loss_axes, lr_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1])
    handles = []
    for index, (label, group) in enumerate(groups):
        color = f"C{index}"
        for run in group:
            loss_axes.plot(*run.series("train", "loss"), color=color, alpha=0.16, linewidth=0.6, rasterized=True)
        steps, losses = _together(group, "train", "loss")
        loss_axes.plot(steps, _smooth(losses.mean(0)), color=color, linewidth=1.3)
        steps, losses = _together(group, "val", "loss")
        loss_axes.plot(steps, losses.mean(0), color=color, linestyle="--", marker="o", markersize=4)
        if len(group) > 1:
            loss_axes.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
        steps, lrs = _together(group, "train", "lr")
        lr_axes.plot(steps, lrs.mean(0), color=color)
        steps, norms = _together(group, "train", "grad_norm")
        norm_axes.plot(steps, _smooth(norms.mean(0)), color=color, linewidth=1.3)
        handles.append(Line2D([], [], color=color, label=label, linewidth=3))

    first = max(run.series("train", "loss")[1][0] for run in runs)
    if math.isfinite(first):  # a run that blows up must not flatten the others
        loss_axes.set_ylim(top=min(loss_axes.get_ylim()[1], 1.15 * first))
    _log_where_wide(norm_axes.yaxis, norm_axes.get_lines())
    loss_axes.set_ylabel(f"loss ({_loss_unit(runs)})")
    lr_axes.set_ylabel("learning rate")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_xlabel("step")
    norm_axes.set_xlim(left=0)
    lr_axes.set_ylim(bottom=0)
    figure.align_ylabels()

    title = "Loss over training"
    if n_seeds > 1:
        title += f": means over {n_seeds} seeds, bands from lowest to highest"
    if n_settings > len(groups):
        title += f" ({len(groups)} best of {n_settings} settings)"
    loss_axes.set_title(title)
    handles += [
        Line2D([], [], color="0.35", linewidth=1.3, label="training, smoothed"),
        Line2D([], [], color="0.35", linewidth=0.6, alpha=0.5, label="training, raw"),
        Line2D([], [], color="0.35", linestyle="--", marker="o", markersize=4, label="validation"),
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


@_styled
def against(runs, x, y="val.loss", over="train.seed", at="last"):
    """A recorded value at the end of each run, against one key of their configs.

    The means over `over` are joined by one line for each setting of the other keys in which the runs differ;
    bars are standard errors, small dots the single runs, a star the best mean. A setting with a failed or
    diverged run has no mean: its other runs stay as dots, and a cross at the top counts the failures.

    Parameters
    ----------
    runs : list of records.Run
    x : str
        Dotted key of the config, such as "optim.lr". Its axis is logarithmic when it spans a decade or more.
    y : str
        SPLIT.METRIC of the records, such as "val.loss".
    over : str
        The key that only replicates; runs that differ in nothing else are averaged.
    at : {"last", "best"}
        Which record of a run counts: its last, or its lowest.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When there are no runs, the runs' configs lack `x`, or no run has recorded `y`.
    """
    from matplotlib.figure import Figure

    runs = list(runs)
    if not runs:
        raise InputError("against: there are no runs to draw")
    known = sorted(set().union(*(run.config for run in runs)))
    if x not in known:
        raise InputError(f"against: no run's config has the key {x!r}{nearest(x, known)}")
    runs = [run for run in runs if x in run.config]
    ends = {id(run): _end(run, y, at) for run in runs}
    if all(math.isnan(end) for end in ends.values()):
        raise InputError(f"against: no finished run has recorded {y!r}")

    positions, ticks = _positions([run.config[x] for run in runs])
    figure = Figure()
    axes = figure.subplots()
    lines = _by_setting(runs, over=(over, x))
    best = None  # (mean, line, position, value of x, standard error, n)
    crosses = []  # (position, line, text)
    for index, (label, group) in enumerate(lines):
        color = f"C{index % 7}"
        points = []
        for value in _distinct([run.config[x] for run in group]):
            position = positions[_hashable(value)]
            found = [ends[id(run)] for run in group if run.config[x] == value]
            finite = [end for end in found if not math.isnan(end)]
            axes.plot([position] * len(finite), finite, ".", color=color, alpha=0.45, markersize=5, zorder=2)
            if len(finite) < len(found):
                crosses.append((position, index, f"{len(found) - len(finite)}/{len(found)}"))
                continue
            error = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
            points.append((position, np.mean(found), error))
            if best is None or points[-1][1] < best[0]:
                best = (points[-1][1], index, position, value, error, len(found))
        points.sort()
        if points:
            where, means, errors = zip(*points)
            marker = "osD^vP<"[index % 7]
            axes.errorbar(where, means, yerr=errors if any(errors) else None, color=color, marker=marker, zorder=3,
                          linestyle="-" if index < 7 else "--", label=label if len(lines) > 1 else "_mean")
    _mark_best(axes, best, x)
    _mark_failures(axes, crosses)
    _x_axis(axes.xaxis, positions, ticks)

    split, _, metric = y.partition(".")
    name = f"{SPLIT_NAMES.get(split, split)} {metric}"
    axes.set_xlabel(_axis_name(x))
    axes.set_ylabel(f"{name} ({_loss_unit(runs)})" if metric == "loss" else name)
    axes.set_title(_against_title(name, at, over, runs))
    figure.legend(loc="outside lower center", ncols=min(3, len(axes.get_legend_handles_labels()[0])))
    return figure


def save(figure, stem):
    """Write `figure` as STEM.png and STEM.svg, making the folder if need be; return both paths."""
    import matplotlib.style

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(paths[0])
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def for_directory(path, out=None):
    """Draw the figures that suit a run's or a sweep's directory.

    A run gives its loss curves; a sweep also gives its objective against each key that it varied.

    Parameters
    ----------
    path : str or Path
    out : str or Path, optional
        Folder of the figures; by default `figures` inside `path`.

    Returns
    -------
    list of Path
        The files written, PNG and SVG of each figure.
    """
    path = Path(path)
    runs = records.load(path)
    out = Path(out) if out is not None else path / "figures"
    paths = save(loss_curves(runs), out / "loss_curves")
    if (path / "sweep.toml").is_file():
        sweep = tomllib.loads((path / "sweep.toml").read_text(encoding="utf-8"))["sweep"]
        for key in _varied(runs, but=("train.seed",)):
            figure = against(runs, key, sweep["objective"], at=sweep["at"])
            paths += save(figure, out / f"{sweep['objective']}-against-{key}")
    return paths


# Which runs belong together


def _varied(runs, but=()):
    """Config keys in which the runs differ, without `but` and those that only say where or how fast."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    aside = {"run.dir", "train.threads", *but}
    return [key for key in keys if key not in aside
            and any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def _by_setting(runs, over):
    """[(label, runs that differ at most in `over`)], in order of appearance."""
    over = (over,) if isinstance(over, str) else over
    keys = _varied(runs, but=over)
    groups = {}
    for run in runs:
        groups.setdefault(tuple(_hashable(run.config.get(key)) for key in keys), []).append(run)
    labelled = []
    for group in groups.values():
        config = group[0].config
        parts = [f"{_short(key)} = {_text(config[key])}" for key in keys if config.get(key) is not None]
        labelled.append((", ".join(parts) or Path(group[0].path).name, group))
    return labelled


def _rank(group):
    """The group's mean last validation loss; groups without one come last."""
    ends = [_end(run, "val.loss", "last") for run in group]
    return math.inf if any(math.isnan(end) for end in ends) else float(np.mean(ends))


def _end(run, y, at):
    """The run's value of `y`; NaN when it did not finish, recorded none, or ended above where it started."""
    split, _, metric = y.partition(".")
    values = run.series(split, metric)[1]
    if run.state != "finished" or not len(values):
        return math.nan
    end = float(values[-1] if at == "last" else np.min(values))
    starts = run.series("train", "loss")[1]
    diverged = metric == "loss" and len(starts) and end > starts[0]
    return math.nan if diverged or not math.isfinite(end) else end


def _together(group, split, key):
    """(steps that all runs of the group recorded, values with one row a run)."""
    series = [run.series(split, key) for run in group]
    steps = functools.reduce(np.intersect1d, (steps for steps, _ in series))
    return steps, np.array([values[np.isin(at, steps)] for at, values in series], dtype=np.float64)


def _smooth(values):
    """Centred running mean over a fiftieth of the values, shorter at the ends."""
    window = np.ones(len(values) // 50 // 2 * 2 + 1)
    if len(values) == 0:
        return values
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# Axes and words


def _positions(values):
    """({value: place on the axis}, tick labels or None where the axis is one of numbers)."""
    values = _distinct(values)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {value: float(value) for value in sorted(values)}, None
    return ({_hashable(value): float(i) for i, value in enumerate(values)}, [_text(value) for value in values])


def _x_axis(axis, positions, ticks):
    """Scale and ticks: the swept values themselves where they are few."""
    places = list(positions.values())
    if ticks is None and min(places) > 0 and max(places) >= 10 * min(places):
        axis.axes.set_xscale("log")
    if ticks is not None or len(places) <= 8:
        axis.set_ticks(places, ticks if ticks is not None else [_text(place) for place in places])
        axis.set_ticks([], minor=True)
    if ticks is not None:
        axis.axes.set_xlim(-0.5, len(places) - 0.5)


def _log_where_wide(axis, lines):
    """A logarithmic axis where the positive values of its lines span more than a decade."""
    values = np.concatenate([line.get_ydata() for line in lines])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 10 * values.min():
        axis.axes.set_yscale("log")


def _mark_best(axes, best, x):
    mean, index, position, value, error, n = best
    spread = f" ± {error:.2g}" if n > 1 else ""
    axes.plot([position], [mean], marker="*", markersize=15, color=f"C{index % 7}", markeredgecolor="black",
              markeredgewidth=0.8, linestyle="none", zorder=4,
              label=f"best: {_short(x)} = {_text(value)}, {mean:.4g}{spread}")


def _mark_failures(axes, crosses):
    if not crosses:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))
    place = axes.get_xaxis_transform()  # x as the data, y as a share of the axes' height
    for rank, (position, index, text) in enumerate(crosses):
        axes.plot([position], [0.97], "X", color=f"C{index % 7}", markersize=8, transform=place, clip_on=False,
                  label="failed or diverged" if rank == 0 else None)
        axes.annotate(text, (position, 0.97), xycoords=place, xytext=(0, -8), textcoords="offset points",
                      ha="center", va="top", fontsize=8.5, color="0.25")


def _against_title(name, at, over, runs):
    when = "at the last step" if at == "last" else "at its lowest"
    n = len(_distinct([run.config.get(over) for run in runs]))
    replicates = "seeds" if over == "train.seed" else f"values of {over}"
    spread = f"mean ± standard error over {n} {replicates}" if n > 1 else "one run each, so no uncertainty"
    return f"{name[0].upper()}{name[1:]} {when}: {spread}"


def _loss_unit(runs):
    tokens = {run.config.get("data.tokenizer") for run in runs}
    return {("char",): "nats per character", ("byte",): "nats per byte"}.get(tuple(tokens), "nats per token")


def _axis_name(key):
    return AXIS_NAMES.get(key, key)


def _short(key):
    """optim.lr -> lr, but optim.name -> optim."""
    section, _, name = key.rpartition(".")
    return section if name == "name" else name


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _distinct(values):
    """The values without repetition, in order of appearance."""
    return list({_hashable(value): value for value in values}.values())
