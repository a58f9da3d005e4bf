"""The figures that suit a run's or a sweep's directory, as files."""

import math
import tomllib
from pathlib import Path

from cllm import records
from cllm.figures.against import against
from cllm.figures.curves import is_metric, loss_curves, metric_curves
from cllm.figures.groups import end, varied
from cllm.figures.style import STYLE

__all__ = ["for_directory", "save"]


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
        if not all(math.isnan(end(run, **how)) for run in runs):
            for keys in _axes(resolved["space"], varied(runs, but=("train.seed",))):
                stem = f"{sweep['objective']}-against-{'+'.join(keys)}"
                paths += save(against(runs, ",".join(keys), **how), out / stem)
    names = {name for run in runs for name in run.names()}
    if "train.loss" in names:
        paths += save(loss_curves(runs), out / "loss_curves")
    if any(is_metric(name.partition(".")[2]) for name in names) or "train.loss" not in names:
        paths += save(metric_curves(runs), out / "metric_curves")
    return paths


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
