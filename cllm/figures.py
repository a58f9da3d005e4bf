"""Records -> matplotlib figures; and one of attention weights.

They take runs (`records.load`), `attention` an array; they return a `matplotlib.figure.Figure`, show nothing
and touch no global state of matplotlib. Colours and fonts come from `cllm.mplstyle` alone.
"""

import functools
import itertools
import math
import textwrap
import tomllib
from pathlib import Path

import numpy as np

from cllm import records
from cllm.errors import InputError, nearest
from cllm.verdict import plus_minus

__all__ = ["against", "attention", "for_directory", "loss_curves", "metric_curves", "save"]

STYLE = Path(__file__).with_name("cllm.mplstyle")
MARKERS = "osD^vP<"  # one for each colour of the style, so that a print in black and white can be read
MAX_LINES = len(MARKERS)
MAX_PANELS = 8
MAX_RAW = 4  # more raw training curves on one axis make a haze in which none can be followed
# What `metric_curves` draws only when it is asked to: what the loss curves show, or what time it took.
NOT_METRICS = ("loss", "perplexity", "lr", "grad_norm")

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
LINESTYLES = {"train": "-", "val": "--"}
OTHER_LINESTYLES = (":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # of further splits, in turn


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
    """Training and validation loss over steps; learning rate and gradient norm below, where recorded.

    Without a split "val" the first other one that has a loss stands in its place.

    Runs that differ in nothing but their seed share a colour: lines are means over the seeds that have the
    step, the band spans their lowest and highest validation loss. Of at most four runs faint lines show the
    raw training loss as well.

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
    settings, legend, shown = _settings(runs, rank=_mean_end)
    drawn = [run for _, group in settings for run in group]
    raw = len(drawn) <= MAX_RAW

    below = [key for key in ("lr", "grad_norm") if any(len(run.series("train", key)[0]) for run in drawn)]
    figure = Figure(figsize=(7.6, 4 + 1.2 * len(below)))
    panels = figure.subplots(1 + len(below), 1, sharex=True, height_ratios=[3.2] + [1] * len(below))
    loss_axes, *others = np.atleast_1d(panels)
    axes_of = dict(zip(below, others))
    split = _followed(runs)
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
        _plain_log_ticks(axes)

    loss_axes.set_ylabel("loss" + _loss_unit(runs))
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
    legend.append(Line2D([], [], **gray, linestyle="--", label=SPLIT_NAMES.get(split, split) + over_seeds))
    _add_legend(figure, legend, "outside right upper", 30)
    return figure


@_styled
def metric_curves(runs, metrics=None):
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
    settings, legend, shown = _settings(runs)
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
        axes.set_ylabel(metric + (_loss_unit(runs) if metric == "loss" else ""))
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
    _add_legend(figure, legend, "outside right upper", 30)
    return figure


@_styled
def against(runs, x, y="val.loss", over="train.seed", at="last", goal="minimize"):
    """A recorded value at the end of each run, against one key of their configs.

    There is one line for each setting of the other keys in which the runs differ: means over `over`, with
    standard errors as bars, the single runs as small dots and a star on the best mean. Where a run failed
    or diverged there is no mean: the other runs stay as dots, and a cross at the top counts the failures.
    Diverged is a value that is NaN or, of a language model's loss, 5 % above the first training loss.

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

    known = sorted(set().union(*(run.config for run in runs)))
    keys = [key.strip() for key in x.split(",")]
    for key in keys:
        runs = [run for run in runs if key in run.config]
        if not runs:
            raise InputError(f'no run has the key "{key}" in its config{nearest(key, known)}')
    ends = {id(run): _end(run, y, at, goal) for run in runs}
    if all(map(math.isnan, ends.values())):
        if any(run.state == "finished" and y in run.names() for run in runs):
            above = y.endswith(".loss") and not all(map(_is_task, runs))
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
    lines = []  # (label, [(place, value of x, values of y)])
    for label, group in _by_setting(runs, over=(over, *keys)):
        points = []
        for value in dict.fromkeys(at_x[id(run)] for run in group):
            values = np.array([ends[id(run)] for run in group if at_x[id(run)] == value])
            points.append((places[value], value, values))
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
                short = ", ".join(map(_short, keys))
                words = f"{short} = {_together_text(value)}" + (f", {label}" if len(lines) > 1 else "")
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

    if numeric and min(places.values()) > 0 and max(places.values()) >= 10 * min(places.values()):
        axes.set_xscale("log")
    if not numeric or len(ticks) <= 8:
        axes.set_xticks(list(places.values()), [_together_text(value) for value in ticks])
        axes.set_xticks([], minor=True)
    if not numeric:
        axes.set_xlim(-0.5, len(ticks) - 0.5)

    split, _, metric = y.partition(".")
    name = f"{SPLIT_NAMES.get(split, split)} {metric}"
    unit = _loss_unit(runs) if metric == "loss" else ""
    axes.set_xlabel(", ".join(AXIS_NAMES.get(key, key) for key in keys))
    axes.set_ylabel(name + unit)
    title = f"{name[0].upper()}{name[1:]} at {'the last step' if at == 'last' else 'its best'}"
    spread = f": mean ± standard error, {n_replicates} {replicate}s"
    title += spread if n_replicates > 1 else f", one {replicate}"
    if n_lines > len(lines):
        title += f"; best {len(lines)} of {n_lines} settings"
    axes.set_title(title, loc="left")
    _add_legend(figure, legend, "outside lower center", 76)
    return figure


@_styled
def attention(weights, tokens=None):
    """The attention weights of one layer's heads on one sequence: a small picture for each head.

    Rows are queries, columns keys. All heads share one colour scale, so that they can be compared; a weight
    of exactly 0, such as that of a key that a query must not see, is gray.

    ::

        with cllm.capture(model, "h.*.attn.weights") as seen:
            model(tokenizer.encode(text)[None])
        figures.attention(seen["h.0.attn.weights"][0], list(text)).savefig("heads.png")

    Parameters
    ----------
    weights : (H, T, S) array
        Of H heads, T queries and S keys.
    tokens : sequence of str, optional
        The S tokens, to label the axes; the queries are the last T of them. Beyond 48 there is no room
        for labels, and positions are counted instead.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        When weights have another shape or are not finite, or tokens another number.
    """
    from matplotlib.figure import Figure

    weights = np.asarray(weights)
    if weights.ndim != 3 or weights.dtype.kind != "f" or not weights.size:
        hint = "; of a batch take one sequence, weights[0]" if weights.ndim == 4 else ""
        raise InputError(f"weights are {weights.dtype} {weights.shape}, they must be floats (H, T, S){hint}")
    if not np.isfinite(weights).all():
        raise InputError("weights hold NaN or infinity, they must be finite")
    H, T, S = weights.shape
    if tokens is not None and len(tokens) != S:
        raise InputError(f"tokens are {len(tokens)}, they must be {S}: one for each key of the weights")
    n_columns = min(H, 4) if H != 6 and H != 9 else 3
    n_rows = -(-H // n_columns)
    height = 1.9 * min(max(T / S, 0.4), 2.5)
    figure = Figure(figsize=(1.9 * n_columns + 1.1, height * n_rows + 0.9))
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[H:]:
        axes.set_axis_off()
    shown = np.ma.masked_equal(weights, 0)
    for head, axes in enumerate(grid.flat[:H]):
        picture = axes.imshow(
            shown[head], cmap="Blues", vmin=0, vmax=weights.max(), aspect="auto", interpolation="nearest"
        )
        axes.set_facecolor("0.9")
        axes.set_title(f"head {head}", loc="left")
        axes.grid(False)
        axes.label_outer()
    if tokens is not None and S <= 48:
        words = [_visible(token) for token in tokens]
        size = 9 if S <= 12 else 6.5 if S <= 24 else 4
        across = {"rotation": 90} if max(map(len, words)) > 1 else {}
        grid[0, 0].set_xticks(range(S), words)
        grid[0, 0].set_yticks(range(T), words[S - T :])
        for axes in grid.flat[:H]:
            axes.tick_params(length=0, labelsize=size)
            axes.tick_params(axis="x", **across)
    figure.supxlabel("key" if tokens is not None else "key position", fontsize=10)
    figure.supylabel("query" if tokens is not None else "query position", fontsize=10)
    figure.colorbar(picture, ax=grid, label="attention weight", aspect=30)
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

    A run gives its loss curves and, when it has recorded other metrics, theirs. A sweep gives those of its
    settings, and its objective against each key that it varied, or keys that move together, unless all of
    its trials failed.

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
        if not all(math.isnan(_end(run, **how)) for run in runs):
            for keys in _axes(resolved["space"], _varied(runs, but=("train.seed",))):
                stem = f"{sweep['objective']}-against-{'+'.join(keys)}"
                paths += save(against(runs, ",".join(keys), **how), out / stem)
    names = {name for run in runs for name in run.names()}
    if "train.loss" in names:
        paths += save(loss_curves(runs), out / "loss_curves")
    if any(_is_metric(name.partition(".")[2]) for name in names) or "train.loss" not in names:
        paths += save(metric_curves(runs), out / "metric_curves")
    return paths


def _add_legend(figure, handles, place, width):
    """A legend beside the axes, or below them in as many columns as fit `width` characters.

    Longer labels are broken: a legend takes its room from the axes, or runs out of the figure.
    """
    for handle in handles:
        handle.set_label("\n".join(textwrap.wrap(handle.get_label(), width)))
    columns = 1
    if "lower" in place:
        widest = max((len(handle.get_label()) for handle in handles), default=0)
        most = 2 if len(handles) > 3 else len(handles)
        columns = max(1, min(most, width // max(widest + 6, 1)))  # 6: the line before the words
    figure.legend(handles=handles, loc=place, ncols=columns)


# Which runs belong together --------------------------------------------------------------------------


def _varied(runs, but):
    """Config keys in which the runs differ, without `but` and those that say only where or how fast."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    varied = []
    for key in keys:
        # Arguments of an optimizer or schedule are compared among the runs of one name: what else differs
        # follows from the name.
        name = f"{key.partition('.')[0]}.name"
        found = {}
        for run in runs:
            kind = None if key == name else run.config.get(name)
            found.setdefault(kind, set()).add(_hashable(run.config.get(key)))
        differs = any(len(values) > 1 for values in found.values())
        if differs and key not in ("run.dir", "train.threads", "train.profile", *but):
            varied.append(key)
    return varied


def _axes(space, varied):
    """The varied keys of a sweep's space as the axes of its figures: those that move together are one."""
    together = []  # groups of keys
    for block in space:
        for keys in block:
            group = [key for key in map(str.strip, keys.split(",")) if key in varied]
            near = [other for other in together if set(other) & set(group)]
            together = [other for other in together if other not in near]
            merged = list(dict.fromkeys(key for other in [*near, group] for key in other))
            together += [merged] if merged else []
    return together


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
    """The run's value of `y`; NaN when it did not finish, has none or, a language model's, diverged."""
    split, _, metric = y.partition(".")
    if run.state != "finished" or y not in run.names():
        return math.nan
    values = run.series(split, metric)[1]
    best = np.fmin if goal == "minimize" else np.fmax  # they pass over NaN, as `sweep` does
    value = float(values[-1] if at == "last" else best.reduce(values))
    starts = run.series("train", "loss")[1]
    if metric == "loss" and not _is_task(run) and len(starts) and value > 1.05 * starts[0]:
        return math.nan
    return value


def _mean_end(group):
    """The group's mean last validation loss; infinite when one of its runs has none."""
    split = _followed(group)
    return _mean_or_inf(np.array([_end(run, f"{split}.loss", "last", "minimize") for run in group]))


def _followed(runs):
    """The split whose loss is drawn beside that of training: "val", or the first other one that has one."""
    names = [name for run in runs for name in run.names()]
    others = [name.partition(".")[0] for name in names if name.endswith(".loss") and name != "train.loss"]
    return "val" if "val" in others or not others else others[0]


def _metrics(splits_of):
    """The metrics to draw unless told: none that the loss curves have, but the loss of several splits."""
    evaluated = [split for split in splits_of.get("loss", []) if split != "train"]
    found = [metric for metric in splits_of if _is_metric(metric)]
    return ["loss"] * (len(evaluated) > 1) + found


def _is_metric(name):
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


def _is_task(run):
    """Whether the run is one of a task of the user's own, whose loss may be anything."""
    return not {"task.build", "task.run"}.isdisjoint(run.config)


def _mean_or_inf(values):
    mean = float(values.mean())
    return math.inf if math.isnan(mean) else mean


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


# Lines over steps ------------------------------------------------------------------------------------


def _settings(runs, rank=None):
    """The settings to draw, [(look, runs)], their legend, and words when they are not all.

    Of too many, those with the lowest `rank(runs)`, or the first.
    """
    from matplotlib.lines import Line2D

    groups = _by_setting(runs, over=("train.seed",))
    words = ""
    if len(groups) > MAX_LINES:
        words = f"{'best' if rank else 'first'} {MAX_LINES} of {len(groups)} settings"
        groups = (sorted(groups, key=lambda group: rank(group[1])) if rank else groups)[:MAX_LINES]
    looks = [{"color": f"C{index}", "marker": MARKERS[index]} for index in range(len(groups))]
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
    """What an axis adds to "loss"; nothing for a task of the user's own, whose loss may be anything."""
    if any(map(_is_task, runs)):
        return ""
    tokenizers = {run.config.get("data.tokenizer") for run in runs}
    units = {"char": " (nats per character)", "byte": " (nats per byte)"}
    return units.get(tokenizers.pop() if len(tokenizers) == 1 else None, " (nats per token)")


def _short(key):
    """optim.lr -> lr, but optim.name -> optim."""
    section, _, name = key.rpartition(".")
    return section if name == "name" else name


def _values(run, keys):
    """The run's values of some keys, to be compared."""
    return tuple(_hashable(run.config[key]) for key in keys)


def _is_axis(values):
    """Whether values can be places on an axis: numbers, and no two the same."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and len(set(values)) == len(values)


def _together_text(values):
    return ", ".join(map(_text, values))


def _text(value):
    """A value in a label; of a user's "file.py:Name" the name."""
    if isinstance(value, str) and ".py:" in value:
        return value.rpartition(":")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _visible(token):
    """A token whose blanks can be seen on an axis."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _distinct(values):
    """The values without repetition: sorted when they are numbers, else in order of appearance."""
    distinct = list({_hashable(value): value for value in values}.values())
    return sorted(distinct) if all(isinstance(value, int | float) for value in distinct) else distinct
