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
from cllm.verdict import plus_minus

__all__ = ["against", "for_directory", "loss_curves", "save"]

STYLE = Path(__file__).with_name("cllm.mplstyle")
MARKERS = "osD^vP<"  # one for each colour of the style, so that a print in black and white can be read
MAX_LINES = len(MARKERS)

# What an axis says for a key; any other key stands for itself.
AXIS_NAMES = {
    "model.block_size": "context length (tokens)",
    "model.dropout": "dropout probability",
    "model.n_embd": "width (channels)",
    "model.n_head": "attention heads",
    "model.n_layer": "depth (layers)",
    "optim.lr": "learning rate",
    "optim.momentum": "momentum",
    "optim.name": "optimizer",
    "optim.weight_decay": "weight decay",
    "schedule.min_lr": "final learning rate",
    "schedule.name": "schedule",
    "schedule.warmup_steps": "warm-up (steps)",
    "train.batch_size": "batch size (sequences)",
    "train.grad_accum": "accumulated micro-batches",
    "train.max_steps": "training length (steps)",
    "train.seed": "seed",
}
SPLIT_NAMES = {"train": "training", "val": "validation"}


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

    Runs that differ in nothing but their seed share a colour: lines are means over the seeds, the band
    spans the seeds' lowest and highest validation loss, faint lines are each seed's raw training loss.

    Parameters
    ----------
    runs : list of records.Run
        At least one. Of more than seven settings, the seven with the lowest last validation loss are drawn.

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
    groups = _by_setting(runs, over=("train.seed",))
    n_settings = len(groups)
    if n_settings > MAX_LINES:
        groups = sorted(groups, key=lambda group: _mean_end(group[1]))[:MAX_LINES]
    n_seeds = max(len(group) for _, group in groups)

    figure = Figure(figsize=(7.6, 6.4))
    loss_axes, lr_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1])
    faint = 0.3 / math.sqrt(sum(len(group) for _, group in groups))
    legend = []
    peaks = []
    for (label, group), marker in zip(groups, MARKERS):
        color = f"C{len(legend)}"
        legend.append(Line2D([], [], color=color, marker=marker, label=label))
        for run in group:
            raw = run.series("train", "loss")
            loss_axes.plot(*raw, color=color, alpha=faint, linewidth=0.6, zorder=1, rasterized=True)
        steps, losses = _together(group, "train", "loss")
        loss_axes.plot(steps, _smooth(losses.mean(0)), color=color, linewidth=1.3, zorder=3)
        steps, losses = _together(group, "val", "loss")
        loss_axes.plot(steps, losses.mean(0), color=color, linestyle="--", marker=marker, zorder=4)
        if len(group) > 1:
            low, high = losses.min(0), losses.max(0)
            loss_axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, zorder=2)
        steps, lrs = _together(group, "train", "lr")
        lr_axes.plot(steps, lrs.mean(0), color=color)
        peaks.append(lrs.max(initial=0.0))
        steps, norms = _together(group, "train", "grad_norm")
        norm_axes.plot(steps, _smooth(norms.mean(0)), color=color, linewidth=1.3)

    start = max(run.series("train", "loss")[1][0] for run in runs)
    if math.isfinite(start):  # a run that blows up must not flatten the others
        loss_axes.set_ylim(top=min(loss_axes.get_ylim()[1], 1.1 * start))
    if min(peaks) > 0 and max(peaks) >= 10 * min(peaks):
        lr_axes.set_yscale("log", nonpositive="mask")
        lr_axes.set_ylim(bottom=min(peaks) / 30)  # a decay to 0 would stretch the axis without end
    else:
        lr_axes.set_ylim(bottom=0)
    norms = np.concatenate([line.get_ydata() for line in norm_axes.get_lines()])
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() >= 10 * norms.min():
        norm_axes.set_yscale("log")
    for axes in (lr_axes, norm_axes):
        _plain_log_ticks(axes)

    loss_axes.set_ylabel(f"loss ({_loss_unit(runs)})")
    lr_axes.set_ylabel("learning rate")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_xlabel("step")
    norm_axes.set_xlim(left=0)
    figure.align_ylabels()
    shown = f"best {len(groups)} of {n_settings} settings" if n_settings > len(groups) else ""
    seeds = f"{n_seeds} seeds each" if n_seeds > 1 else ""
    loss_axes.set_title(", ".join(filter(None, ["Loss over training", shown, seeds])), loc="left")

    gray = {"color": "0.4"}
    over_seeds = f":\nmean and range\nof {n_seeds} seeds" if n_seeds > 1 else ""
    legend += [
        Line2D([], [], **gray, linewidth=1.3, label="training, smoothed"),
        Line2D([], [], **gray, linewidth=0.6, alpha=0.6, label="training, raw"),
        Line2D([], [], **gray, linestyle="--", label="validation" + over_seeds),
    ]
    figure.legend(handles=legend, loc="outside right upper")
    return figure


@_styled
def against(runs, x, y="val.loss", over="train.seed", at="last", goal="minimize"):
    """A recorded value at the end of each run, against one key of their configs.

    There is one line for each setting of the other keys in which the runs differ: means over `over`, with
    standard errors as bars, the single runs as small dots and a star on the best mean. Where a run failed
    or diverged (ended above its first loss) there is no mean: the other runs stay as dots, and a cross at
    the top counts the failures.

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
        Which record of a run counts.
    goal : {"minimize", "maximize"}
        Which values of `y` are better.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When no run's config has `x`, or no finished run has recorded `y`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    known = sorted(set().union(*(run.config for run in runs)))
    runs = [run for run in runs if x in run.config]
    if not runs:
        raise InputError(f'no run has the key "{x}" in its config{nearest(x, known)}')
    ends = {id(run): _end(run, y, at, goal) for run in runs}
    if all(map(math.isnan, ends.values())):
        raise InputError(f'no finished run has recorded "{y}"')
    sign = 1 if goal == "minimize" else -1

    ticks = _distinct([run.config[x] for run in runs])
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in ticks)
    places = {_hashable(value): value if numeric else i for i, value in enumerate(ticks)}
    lines = []  # (label, [(place, value of x, values of y)])
    for label, group in _by_setting(runs, over=(over, x)):
        points = []
        for value in _distinct([run.config[x] for run in group]):
            values = np.array([ends[id(run)] for run in group if run.config[x] == value])
            points.append((places[_hashable(value)], value, values))
        lines.append((label, sorted(points, key=lambda point: point[0])))
    n_lines = len(lines)
    if n_lines > MAX_LINES:
        rank = {label: min(_mean_or_inf(sign * values) for _, _, values in points) for label, points in lines}
        lines = sorted(lines, key=lambda line: rank[line[0]])[:MAX_LINES]

    figure = Figure()
    axes = figure.subplots()
    legend = []
    best = None  # (signed mean, place, colour, words)
    for index, ((label, points), marker) in enumerate(zip(lines, MARKERS)):
        color = f"C{index}"
        # Categories lie beside each other and are not joined: there is nothing between them.
        shift = 0.0 if numeric else 0.1 * (index - (len(lines) - 1) / 2)
        linestyle = "-" if numeric else "none"
        complete = []
        for place, value, values in points:
            if len(values) > 1:
                axes.plot([place + shift] * len(values), values, ".", color=color, alpha=0.45, zorder=2)
            if np.isnan(values).any():
                continue
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            complete.append((place + shift, values.mean(), error))
            if best is None or sign * values.mean() < best[0]:
                words = f"{_short(x)} = {_text(value)}" + (f", {label}" if len(lines) > 1 else "")
                words = f"best: {words}: {plus_minus(values.mean(), error)}"
                best = (sign * values.mean(), place + shift, color, words)
        if complete:
            where, means, errors = zip(*complete)
            bars = errors if any(errors) else None
            axes.errorbar(where, means, yerr=bars, color=color, marker=marker, linestyle=linestyle, zorder=3)
        if len(lines) > 1:
            legend.append(Line2D([], [], color=color, marker=marker, linestyle=linestyle, label=label))
    if best:
        star = {"marker": "*", "markersize": 14, "markeredgecolor": "black", "markeredgewidth": 0.8}
        axes.plot([best[1]], [sign * best[0]], color=best[2], zorder=4, **star)
        legend.append(Line2D([], [], color=best[2], linestyle="none", label=best[3], **star))
    n_replicates = max(len(values) for _, points in lines for _, _, values in points)
    replicate = "seed" if over == "train.seed" else f"value of {over}"
    if n_replicates > 1:
        legend.append(Line2D([], [], color="0.4", marker=".", linestyle="none", label=f"one {replicate}"))
    if _mark_failures(axes, lines):
        cross = {"marker": "X", "markersize": 8, "linestyle": "none"}
        legend.append(Line2D([], [], color="0.25", **cross, label="failed or diverged, of all runs there"))

    if numeric and min(places) > 0 and max(places) >= 10 * min(places):
        axes.set_xscale("log")
    if not numeric or len(ticks) <= 8:
        axes.set_xticks(list(places.values()), [_text(value) for value in ticks])
        axes.set_xticks([], minor=True)
    if not numeric:
        axes.set_xlim(-0.5, len(ticks) - 0.5)

    split, _, metric = y.partition(".")
    name = f"{SPLIT_NAMES.get(split, split)} {metric}"
    unit = f" ({_loss_unit(runs)})" if metric == "loss" else ""
    axes.set_xlabel(AXIS_NAMES.get(x, x))
    axes.set_ylabel(name + unit)
    title = f"{name[0].upper()}{name[1:]} at {'the last step' if at == 'last' else 'its best'}"
    spread = f": mean ± standard error, {n_replicates} {replicate}s"
    title += spread if n_replicates > 1 else f", one {replicate}"
    if n_lines > len(lines):
        title += f"; best {len(lines)} of {n_lines} settings"
    axes.set_title(title, loc="left")
    figure.legend(handles=legend, loc="outside lower center", ncols=2 if len(legend) > 3 else len(legend))
    return figure


def save(figure, stem):
    """Write `figure` as STEM.png and STEM.svg, making the folder if need be; return the two paths."""
    import matplotlib.style

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(png)
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def for_directory(path, out=None):
    """Draw the figures that suit a run's or a sweep's directory.

    A run gives its loss curves. A sweep gives those of its settings, and its objective against each key
    that it varied, unless all of its trials failed.

    Parameters
    ----------
    path : str or Path
    out : str or Path, optional
        Folder of the figures; by default `figures` inside `path`.

    Returns
    -------
    list of Path
        The files written: a PNG and an SVG of each figure, what a sweep asked for first.
    """
    path = Path(path)
    runs = records.load(path)
    out = Path(out) if out is not None else path / "figures"
    paths = []
    if (path / "sweep.toml").is_file():
        resolved = tomllib.loads((path / "sweep.toml").read_text(encoding="utf-8"))
        sweep = resolved["sweep"]
        how = {"y": sweep["objective"], "at": sweep["at"], "goal": sweep["goal"]}
        swept = {key.strip() for block in resolved["space"] for keys in block for key in keys.split(",")}
        if not all(math.isnan(_end(run, **how)) for run in runs):
            for key in _varied(runs, but=("train.seed",)):
                if key in swept:
                    paths += save(against(runs, key, **how), out / f"{sweep['objective']}-against-{key}")
    return paths + save(loss_curves(runs), out / "loss_curves")


# Which runs belong together --------------------------------------------------------------------------


def _varied(runs, but):
    """Config keys in which the runs differ, without `but` and those that say only where or how fast."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    varied = []
    for key in keys:
        # An optimizer's own arguments are compared among the runs that have them: that others lack them
        # follows from optim.name.
        having = [run.config.get(key) for run in runs if key in run.config or not key.startswith("optim.")]
        if key not in ("run.dir", "train.threads", *but) and any(value != having[0] for value in having):
            varied.append(key)
    return varied


def _by_setting(runs, over):
    """[(label, runs that differ at most in the keys `over`)], in order of appearance."""
    keys = _varied(runs, but=over)
    groups = {}
    for run in runs:
        groups.setdefault(tuple(_hashable(run.config.get(key)) for key in keys), []).append(run)
    labelled = []
    for group in groups.values():
        config = group[0].config
        words = [f"{_short(key)} = {_text(config[key])}" for key in keys if key in config]
        labelled.append((", ".join(words) or Path(group[0].path).resolve().name, group))
    return labelled


def _end(run, y, at, goal):
    """The run's value of `y`; NaN when it did not finish, recorded none, or ended above its first loss."""
    split, _, metric = y.partition(".")
    values = run.series(split, metric)[1]
    if run.state != "finished" or not len(values):
        return math.nan
    starts = run.series("train", "loss")[1]
    if metric == "loss" and len(starts) and not values[-1] <= starts[0]:
        return math.nan
    if at == "last":
        return float(values[-1])
    return float(values.min() if goal == "minimize" else values.max())


def _mean_end(group):
    """The group's mean last validation loss; infinite when one of its runs has none."""
    return _mean_or_inf(np.array([_end(run, "val.loss", "last", "minimize") for run in group]))


def _mean_or_inf(values):
    mean = float(values.mean())
    return math.inf if math.isnan(mean) else mean


def _together(group, split, key):
    """(steps that all runs of the group recorded, values with one row a run)."""
    series = [run.series(split, key) for run in group]
    steps = functools.reduce(np.intersect1d, (at for at, _ in series))
    return steps, np.array([values[np.isin(at, steps)] for at, values in series], dtype=np.float64)


def _smooth(values):
    """Running mean under a bell of about a fiftieth of the values, cut off at both ends."""
    if len(values) < 9:
        return values
    window = np.hanning(max(len(values) // 50, 4) * 2 + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# Marks and words -------------------------------------------------------------------------------------


def _mark_failures(axes, lines):
    """Crosses at the top where runs failed, with their number; whether there are any."""
    counts = {}  # place -> [failed, all]
    for _, points in lines:
        for place, _, values in points:
            count = counts.setdefault(place, [0, 0])
            count[0] += int(np.isnan(values).sum())
            count[1] += len(values)
    failures = {place: count for place, count in counts.items() if count[0]}
    if failures:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.16 * (high - low))
    across = axes.get_xaxis_transform()  # x in data, y as a share of the axes' height
    for place, (failed, total) in failures.items():
        axes.plot([place], [0.97], "X", color="0.25", markersize=8, transform=across, clip_on=False)
        below = {"xycoords": across, "xytext": (0, -7), "textcoords": "offset points"}
        axes.annotate(f"{failed} of {total}", (place, 0.97), **below, ha="center", va="top", fontsize=8.5)
    return bool(failures)


def _plain_log_ticks(axes):
    """Ticks such as 0.2, 0.5, 1 on a logarithmic axis, instead of powers of ten with small print."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    wide = high > 300 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 3), numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _loss_unit(runs):
    tokenizers = {run.config.get("data.tokenizer") for run in runs}
    return {"char": "nats per character", "byte": "nats per byte"}.get(
        tokenizers.pop() if len(tokenizers) == 1 else None, "nats per token"
    )


def _short(key):
    """optim.lr -> lr, but optim.name -> optim."""
    section, _, name = key.rpartition(".")
    return section if name == "name" else name


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _distinct(values):
    """The values without repetition: sorted when they are numbers, else in order of appearance."""
    distinct = list({_hashable(value): value for value in values}.values())
    return sorted(distinct) if all(isinstance(value, int | float) for value in distinct) else distinct
