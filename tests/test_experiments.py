"""The experiments: files load, tables draw their figures alone, heads and gallery say what tables hold."""

import csv
import importlib.util
import re
import statistics
import tomllib
from pathlib import Path

import pytest

from cllm import records, sweep

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "plots" / "gallery"


@pytest.fixture(scope="module")
def plots():
    spec = importlib.util.spec_from_file_location("plots_experiments", ROOT / "plots" / "experiments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def file_of(name):
    return ROOT / "experiments" / f"{'grokking_seeds' if name == 'grokking' else name}.toml"


def rows_of(plots, name):
    with open(plots.TABLES / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


NAMES = [
    "optimizers", "lr_sensitivity", "schedules", "batch_size", "depth_width", "attention", "activations",
    "grokking", "induction", "scaling",
]  # fmt: skip


def test_these_are_all(plots):
    assert set(plots.FIGURES) == set(NAMES)
    assert {path.stem for path in plots.TABLES.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_of_the_file_and_the_head_says_what_was_found(plots, name, monkeypatch):
    """Its settings and seeds, all of which have ended; question, command and answer in the head."""
    monkeypatch.chdir(ROOT)
    path = file_of(name)
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert head.startswith("# Question: ") and f"cllm sweep experiments/{path.name}\n" in head
    assert re.search(r"^# Answer \(small mode, [^)]*\)", head, re.MULTILINE)
    plan = sweep.Sweep.load(path)
    found = {"search": set(), "confirm": set()}
    for row in rows_of(plots, name):
        found[row["stage"]].add((int(row["setting"]), int(row["seed"])))
    assert found["search"] == {(trial.setting, trial.seed) for trial in plan.trials()}
    top = tomllib.loads(path.read_text(encoding="utf-8")).get("confirm", {}).get("top", 0)
    assert len(found["confirm"]) == top * len(plan.confirm_seeds)
    assert {row["state"] for row in rows_of(plots, name)} == {"finished"}


@pytest.mark.parametrize("name", NAMES)
def test_a_table_draws_its_figure(plots, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    trials = plots.kept(plots.TABLES / f"{name}.csv")
    seeds = sweep.Sweep.load(file_of(name)).config.seeds
    assert {run.config["train.seed"] for run in trials} == set(seeds)  # none of the fresh ones
    figure = plots.FIGURES[name](trials)
    assert all(axes.lines or axes.collections or axes.patches for axes in figure.axes)
    assert "nan" not in " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_grokking_says_when_both_kinds_of_pairs_come_right(plots):
    first = {}  # (kind, seed) -> step
    for row in rows_of(plots, "grokking"):
        for kind, least in (("seen", 0.99), ("val", 0.90)):
            if float(row[f"{kind}.accuracy"] or 0) > least:
                first.setdefault((kind, row["seed"]), int(row["step"]))
    seen, val = ([step for (kind, _), step in first.items() if kind == which] for which in ("seen", "val"))
    head = file_of("grokking").read_text(encoding="utf-8").replace("\n# ", " ")
    low, middle, high = min(seen), round(statistics.median(seen)), max(seen)
    assert f"over 0.99 from step {middle} on (median of five seeds, {low} to {high})" in head
    low, middle, high = min(val), round(statistics.median(val)), max(val)
    assert f"over 0.90 from step {middle:,} on ({low:,} to {high:,})" in head


def test_a_sweep_becomes_a_table_and_its_trials_again(plots, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = {"base.train.max_steps": 4, "base.train.eval_interval": 2, "base.task.length": 8}
    plan = sweep.Sweep.load(file_of("induction"), {**small, "sweep.seeds": [0]})
    sweep.run(plan, tmp_path / "induction", workers=1)
    plots.keep(tmp_path / "induction", tmp_path / "tables" / "induction.csv")
    kept = plots.kept(tmp_path / "tables" / "induction.csv")
    assert [run.config["task.n_layer"] for run in kept] == [1, 2, 3]
    for run, own in zip(kept, records.load(tmp_path / "induction"), strict=True):
        for of_kept, of_run in zip(run.series("val", "accuracy"), own.series("val", "accuracy"), strict=True):
            assert of_kept.tolist() == pytest.approx(of_run.tolist(), rel=1e-6)
        assert run.summary["parameters"] == own.summary["parameters"]
        assert run.first("train", "loss") == pytest.approx(own.first("train", "loss"), rel=1e-6)


def test_the_gallery_names_each_figure_and_no_other():
    text = (GALLERY / "README.md").read_text(encoding="utf-8")
    there = {path.relative_to(GALLERY).as_posix() for path in GALLERY.rglob("*.png")}
    assert set(re.findall(r"\]\(([^)]*\.png)\)", text)) == there
