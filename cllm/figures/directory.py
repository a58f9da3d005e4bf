"""The figures that suit a run's or a sweep's directory."""

import csv
import io
import itertools
import math
import re
import tomllib
from contextlib import suppress
from pathlib import Path

from cllm import records
from cllm.errors import InputError
from cllm.figures.against import against
from cllm.figures.curves import is_metric, loss_curves, metric_curves
from cllm.figures.groups import Trial, by_setting, end, ended, mean_over, varied
from cllm.figures.scaling import LEAST_SIZES, scaling_law
from cllm.figures.style import MAX_LINES, STYLE, short
from cllm.figures.sweeps import contenders, differences, heat_map, rungs, sensitivity
from cllm.verdict import text

# Names of the figures that `drawn` gives.
OWN = (
    r".+-against-.+|.+-over-.+-and-.+|contenders-.+|sensitivity|differences|rungs|scaling_law|"
    r"(loss|metric)_curves"
)

__all__ = ["drawn", "for_directory", "save", "to_svg"]

MOST_MAPS = 3  # heat maps of one block of a sweep's space
LEAST_RATES = 3  # learning rates, for the sensitivity to them


def save(figure, stem):
    """Write `figure` as STEM.png and STEM.svg, making the folder if need be; return the two paths."""
    import matplotlib.style

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(png)
    svg.write_text(to_svg(figure), encoding="utf-8")
    return [png, svg]


def to_svg(figure):
    """A figure as the text of an SVG file, the same each time."""
    import matplotlib.style

    file = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def for_directory(path, out=None):
    """Draw the figures that suit a run's or a sweep's directory as files, see `drawn`.

    Parameters
    ----------
    path : str or Path
    out : str or Path, optional
        Folder of the figures; by default `figures` inside `path`.

    Returns
    -------
    list of Path
        The files written: a PNG and an SVG of each figure.
    """
    folder = Path(out) if out is not None else Path(path) / "figures"
    found = [written for name, figure in drawn(path) for written in save(figure, folder / name)]
    if out is None:  # what an earlier call drew of a sweep that was another then
        for old in folder.iterdir():
            if old not in found and old.suffix in (".png", ".svg") and re.fullmatch(OWN, old.stem):
                old.unlink()
    return found


def drawn(path):
    """The figures that suit a run's or a sweep's directory, one after the other.

    A run gives its loss curves and, when it has recorded other metrics, theirs. A sweep gives these of its
    best seven settings, and before, as far as what it varied and how it went allow them:

    - against: its objective against each key that it varied, or keys that move together
    - heat_map: against two keys that one block of its space varies (the first three pairs of a block)
    - sensitivity: of a grid with three learning rates or more, the same for all settings of other keys
    - contenders: for each key with words as values, such as optim.name
    - differences: from the best setting, as its summary.json has them
    - rungs: with [prune]
    - scaling_law: when its trials have at least six sizes of model

    Trials with the fresh seeds of [confirm] are in the differences alone.

    Parameters
    ----------
    path : str or Path

    Yields
    ------
    name : str
        Of the file, without its ending.
    figure : matplotlib.figure.Figure
    """
    path, of = Path(path), None
    if (path / "sweep.toml").is_file():
        try:
            sweep = tomllib.loads((path / "sweep.toml").read_text(encoding="utf-8"))
            how = {
                "y": sweep["sweep"]["objective"],
                "at": sweep["sweep"]["at"],
                "goal": sweep["sweep"]["goal"],
            }
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path / 'sweep.toml'} is damaged: no sweep has written it like this") from None
        runs = _trials(path, sweep["sweep"])
        if not all(math.isnan(end(run, **how)) for run in runs):
            yield from _of_sweep(path, sweep, runs, how)
        runs, of = _best(runs, how)
    else:
        runs = records.load(path)
    names = {name for run in runs for name in run.names()}
    if "train.loss" in names:
        yield "loss_curves", loss_curves(runs, of=of)
    if any(is_metric(name.partition(".")[2]) for name in names) or "train.loss" not in names:
        yield "metric_curves", metric_curves(runs, of=of)


def _trials(path, config):
    """The search's trials that have begun, as the table tells; without a table, as their own files do."""
    seeds, found, configs = config.get("seeds"), [], {}
    try:
        with open(path / "results.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return [run for run in records.load(path) if seeds is None or run.config.get("train.seed") in seeds]
    judged = config["objective"], config["at"]
    try:
        for row in rows:
            number, seed, step = int(row["setting"]), int(row["seed"]), int(row["step"])
            run = records.Run(path / "trials" / f"s{number:03d}-seed{seed}")
            value = float(row[config["objective"]]) if row[config["objective"]] else None
            if seed not in seeds or row["state"] == "pending":
                continue
            # The trials of a setting differ in their seeds alone, and one file is read for all of them.
            of_setting = configs.get(number) or configs.setdefault(number, run.config)
            if of_setting:
                state = row["state"] if row["state"] in ("finished", "failed", "pruned") else "unfinished"
                one = {**of_setting, "train.seed": seed}
                found.append(Trial(run.path, one, state, step, judged, value))
    except InputError:  # of a trial's config.toml, which it names
        raise
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path / 'results.csv'} is not the table of this sweep") from None
    if not found:
        raise InputError(f"no trial of {path} has begun, so there is nothing to draw")
    return found


def _best(runs, how):
    """The runs of as many settings as have room in one figure, the best; and of how many, if not of all."""
    sign = 1 if how["goal"] == "minimize" else -1
    settings = mean_over(runs, "train.seed", **how)
    if len(settings) <= MAX_LINES:
        return runs, None
    ranked = sorted(settings, key=lambda item: math.inf if math.isnan(item[1]) else sign * item[1])
    return [run for group, _ in ranked[:MAX_LINES] for run in group], len(settings)


def _of_sweep(path, sweep, runs, how):
    """What a sweep asked for; at least one of its trials has finished."""
    objective = how["y"]
    keys = varied(runs, but=("train.seed",))
    for group in _axes(sweep["space"], keys):
        yield f"{objective}-against-{'+'.join(group)}", against(runs, ",".join(group), **how)
    named = {"z": objective, "at": how["at"], "goal": how["goal"]}
    for number, block in enumerate(sweep["space"], 1):
        mine = [run for run in ended(runs) if _lies_in(run, block)]
        axes = [group[0] for group in _axes([block], varied(mine, but=("train.seed",)))]
        for one, other in itertools.islice(itertools.combinations(axes, 2), MOST_MAPS):
            if not all(math.isnan(end(run, **how)) for run in mine):
                of_block = f"-block-{number}" if len(sweep["space"]) > 1 else ""
                name = f"{objective}-over-{one}-and-{other}{of_block}"
                yield from _if_drawable(name, heat_map, mine, one, other, **named)
    is_loss = objective.endswith(".loss") and how["goal"] == "minimize"
    is_grid = sweep["sweep"].get("method", "grid") == "grid" and len(ended(runs)) == len(runs)
    if is_loss and is_grid and _has_rates(runs):
        yield from _if_drawable("sensitivity", sensitivity, runs, y=objective, at=how["at"])
    for key in keys:
        values = {run.config[key] for run in runs if isinstance(run.config.get(key), str | bool)}
        if len(values) > 1:
            yield f"contenders-{key}", contenders(runs, key, **how)
    summary = records.Run(path).summary
    of_best = [one for one in summary.get("comparisons", ()) if one["setting"] == summary["best"]]
    if any(one["interval"] for one in of_best):
        settings = {entry["setting"]: entry["values"] for entry in summary["settings"]}
        yield "differences", differences(summary, lambda number: _words(settings[number], keys))
    prune = sweep.get("prune", {})
    if prune.get("method", "none") != "none":
        yield from _if_drawable("rungs", rungs, runs, prune["steps"], objective, goal=how["goal"])
    if is_loss:
        complete = [group[0] for group, mean in mean_over(ended(runs), "train.seed", **how) if mean == mean]
        if len({run.summary.get("parameters") for run in complete} - {None}) >= LEAST_SIZES:
            yield from _if_drawable("scaling_law", scaling_law, runs, objective, at=how["at"])


def _if_drawable(name, draw, *arguments, **options):
    """The figure with its name; nothing where trials that failed leave nothing to draw: others may follow."""
    with suppress(InputError):
        yield name, draw(*arguments, **options)


def _words(setting, keys):
    """A setting by the keys that the sweep has varied; lines break between keys only."""
    words = [f"{short(key)} = {text(setting[key])}" for key in keys if key in setting]
    return ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words) or "the one setting"


def _lies_in(run, block):
    """Whether a run is of a block of the space, as far as what is fixed there tells."""
    fixed = {key: value for key, value in block.items() if not isinstance(value, list | dict)}
    return all(run.config.get(key) == value for key, value in fixed.items())


def _has_rates(runs):
    """Whether settings of other keys, at least two, all have the same learning rates, at least three."""
    if not any("optim.lr" in run.config for run in runs):
        return False
    groups = by_setting(runs, over=("train.seed", "optim.lr"))
    rates = {frozenset(run.config.get("optim.lr") for run in group) for _, group in groups}
    return 1 < len(groups) <= MAX_LINES and len(rates) == 1 and len(rates.pop()) >= LEAST_RATES


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
