"""The experiments' figures, each from its records alone: plots/gallery/experiments/NAME.png and .svg.

    python plots/experiments.py                 # all, from the tables in experiments/results
    python plots/experiments.py scaling         # one
    python plots/experiments.py --from runs     # first make tables of the sweeps runs/NAME that are there

A table has a line for each evaluation of each trial: its setting and seed, what the sweep varied, how the
trial ended, whether it was of the search or confirms it, its parameters, the step, and what was measured.
"""

import argparse
import csv
import json
import tomllib
from collections import defaultdict
from functools import partial
from pathlib import Path

from cllm import figures, records

ROOT = Path(__file__).resolve().parents[1]
TABLES, GALLERY = ROOT / "experiments" / "results", ROOT / "plots" / "gallery" / "experiments"

against = figures.against
curves = partial(figures.metric_curves, metrics=["accuracy"])


def in_words(run, name):
    """The run with one key for the last that its setting has: those of several blocks have not the same."""
    *_, (key, value) = ((key, value) for key, value in run.config.items() if key != "train.seed")
    word = value if isinstance(value, str) else f"{key.rpartition('.')[2]} = {value}"
    run.config = {name: word, "train.seed": run.config["train.seed"]}
    return run


FIGURES = {
    "optimizers": partial(figures.contenders, key="optim.name"),
    "lr_sensitivity": figures.sensitivity,
    "schedules": partial(against, x="optim.lr"),
    "batch_size": partial(against, x="optim.lr"),
    "depth_width": partial(against, x="model.n_layer,model.n_embd"),
    "attention": lambda runs: against([in_words(run, "attention") for run in runs], "attention"),
    "activations": partial(against, x="model.activation"),
    "grokking": curves,
    "induction": curves,
    "scaling": figures.scaling_law,
}


class Kept(records.Run):
    """A trial as the lines of its table tell it."""

    def __init__(self, name, rows):
        super().__init__(name)
        facts = rows[0]
        keys = [key for key in facts if "." in key and not _is_measured(key)]
        self.config = {key: _value(facts[key]) for key in keys if facts[key]}
        self.config["train.seed"] = int(facts["seed"])
        self.summary = {"state": facts["state"], "parameters": int(facts["parameters"])}
        self.records = []
        for row in rows:
            by_split = defaultdict(dict)
            for column in filter(_is_measured, row):
                if row[column]:
                    split, _, metric = column.partition(".")
                    by_split[split][metric] = json.loads(row[column])
            step = int(row["step"])
            self.records += [{"step": step, "split": split, **found} for split, found in by_split.items()]

    def first(self, split, key):
        return next((one[key] for one in self.records if one["split"] == split and key in one), None)


def _is_measured(column):
    return column.endswith((".loss", ".accuracy"))


def _value(cell):
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def keep(sweep, path):
    """Write the table of a sweep's directory."""
    with open(sweep / "results.csv", newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    columns = list(trials[0])
    keys = columns[2 : columns.index("state")]
    chosen_on = tomllib.loads((sweep / "sweep.toml").read_text(encoding="utf-8"))["sweep"]["seeds"]
    rows = []
    for trial in trials:
        fresh = int(trial["seed"]) not in chosen_on
        run = records.Run(sweep / "trials" / f"s{int(trial['setting']):03d}-seed{trial['seed']}")
        evaluated = defaultdict(dict)
        for record in run.records:
            for metric in ("loss", "accuracy"):
                if metric in record and (record["split"] != "train" or not evaluated):
                    value = "NaN" if record[metric] is None else f"{record[metric]:.7g}"
                    evaluated[record["step"]][f"{record['split']}.{metric}"] = value
        fixed = {key: trial[key] for key in ("setting", "seed", *keys, "state")}
        fixed["stage"] = "confirm" if fresh else "search"
        fixed["parameters"] = run.summary.get("parameters", 0)
        rows += [{**fixed, "step": step, **values} for step, values in (evaluated or {0: {}}).items()]
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def kept(path):
    """The trials of a table but those with fresh seeds, which only some settings have."""
    with open(path, newline="", encoding="utf-8") as file:
        of_trial = defaultdict(list)
        for row in csv.DictReader(file):
            if row["stage"] == "search":
                of_trial[row["setting"], row["seed"]].append(row)
    return [Kept(path.stem, rows) for rows in of_trial.values()]


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--from", dest="sweeps", type=Path, help="the folder of the sweeps, such as runs")
    options = parser.parse_args()
    if unknown := set(options.names) - set(FIGURES):
        parser.error(f"no experiment is called {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    for name in options.names or FIGURES:
        table = TABLES / f"{name}.csv"
        if options.sweeps and (options.sweeps / name / "results.csv").is_file():
            keep(options.sweeps / name, table)
        if table.is_file():
            for path in figures.save(FIGURES[name](kept(table)), GALLERY / name):
                print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
