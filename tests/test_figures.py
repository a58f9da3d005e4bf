"""Figures: what they show, checked on their matplotlib objects, and that nothing is cut or overlaps."""

import math
import shutil

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from cllm import figures, records, sweep
from cllm.errors import InputError
from cllm.figures import style
from cllm.sweep import results

LRS = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
SEEDS = [0, 1, 2]


def final_loss(lr, seed):
    """A valley over the learning rate with its lowest point at 3e-3, and a spread between seeds."""
    return 1.9 + 0.3 * math.log10(lr / 3e-3) ** 2 + 0.02 * (seed - 1)


def write_run(path, config, end, state="finished", steps=60):
    """A run's directory with a loss that falls from 4.5 to `end`."""
    path.mkdir(parents=True)
    sections = {}
    for key, value in {"data.tokenizer": "char", "run.dir": str(path), **config}.items():
        section, name = key.split(".")
        text = f'"{value}"' if isinstance(value, str) else str(value)
        sections.setdefault(section, []).append(f"{name} = {text}\n")
    toml = "".join(f"[{name}]\n{''.join(lines)}" for name, lines in sections.items())
    (path / "config.toml").write_text(toml, encoding="utf-8")
    noise = np.random.default_rng(config["train.seed"]).normal(0, 0.05, steps)
    with records.Recorder(path) as recorder:
        for step in range(1, steps + 1):
            loss = end + (4.5 - end) * math.exp(-(step - 1) / 8)
            lr = config.get("optim.lr", 1e-3) * min(1, step / 10) * (1.1 - step / steps)
            recorder.write({
                "step": step, "split": "train", "loss": loss + noise[step - 1] * (step > 1), "lr": lr,
                "grad_norm": 4 * math.exp(-step / 20) + 0.2,
            })  # fmt: skip
            if step % 20 == 0:
                recorder.write({"step": step, "split": "val", "loss": end if step == steps else loss})
    records.write_summary(path, {"state": state})


@pytest.fixture
def sweep_dir(tmp_path):
    """Five learning rates, three seeds."""
    for setting, lr in enumerate(LRS):
        for seed in SEEDS:
            path = tmp_path / "trials" / f"s{setting:03d}-seed{seed}"
            write_run(path, {"optim.lr": lr, "train.seed": seed}, final_loss(lr, seed))
    toml = '[sweep]\nobjective = "val.loss"\nat = "last"\ngoal = "minimize"\n[[space]]\n"optim.lr" = []\n'
    (tmp_path / "sweep.toml").write_text(toml, encoding="utf-8")
    return tmp_path


def assert_tidy(figure):
    """Nothing is cut off, no tick labels overlap, and the legend lies outside the axes."""
    figure.draw_without_rendering()
    shown = []
    for axes in figure.axes:
        shown += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i]), labels[i].get_text()
            shown += labels
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    page = figure.bbox.padded(1)
    for artist in shown + [text for legend in figure.legends for text in legend.get_texts()]:
        if artist.get_text():
            box = artist.get_window_extent()
            assert page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1), artist.get_text()


def title_of(figure):
    return figure.axes[0].get_title(loc="left")


def line_at(axes, marker):
    return [line for line in axes.get_lines() if line.get_marker() == marker]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_loss_curves_has_one_colour_a_setting_and_the_schedule_below(sweep_dir):
    figure = figures.loss_curves(records.load(sweep_dir))
    assert isinstance(figure, Figure)
    loss, lr, norm = figure.axes
    assert loss.get_ylabel() == "loss (nats per character)"
    assert (lr.get_ylabel(), norm.get_ylabel()) == ("learning rate", "gradient norm")
    assert norm.get_xlabel() == "step"
    assert loss.get_shared_x_axes().joined(loss, norm)
    assert len({line.get_color() for line in loss.get_lines()}) == len(LRS)
    assert legend_texts(figure)[:2] == ["lr = 0.0003", "lr = 0.001"]
    assert lr.get_yscale() == "log"  # two decades of learning rates
    (means,) = (line.get_ydata() for line in loss.get_lines() if line.get_marker() == "D")
    assert means[-1] == pytest.approx(final_loss(3e-3, 1))
    assert_tidy(figure)


def test_loss_curves_of_one_run(sweep_dir):
    figure = figures.loss_curves(records.load(sweep_dir / "trials" / "s001-seed2"))
    assert legend_texts(figure)[0] == "s001-seed2"
    assert figure.axes[1].get_yscale() == "linear"
    assert_tidy(figure)


def test_loss_curves_keeps_to_the_best_settings_of_many(tmp_path):
    for index in range(12):
        config = {"optim.lr": 1e-3 + index / 1e4, "train.seed": 0}
        write_run(tmp_path / "trials" / f"s{index:03d}-seed0", config, 2 + index / 10)
    figure = figures.loss_curves(records.load(tmp_path))
    assert "best 7 of 12 settings" in title_of(figure)
    assert legend_texts(figure)[0] == "lr = 0.001"
    assert_tidy(figure)


def write_metrics(path, seed, names=("accuracy", "f1"), splits=("val", "seen"), rows=False):
    """A run's directory with metrics, of a task of the user's own."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(f'[task]\nbuild = "my.py:build"\n[train]\nseed = {seed}\n')
    with records.Recorder(path) as recorder:
        for step in range(1, 21):
            recorder.write({"step": step, "split": "train", "loss": 2 / step, "tokens_per_s": 5.0})
            if step % 5 == 0:
                for index, split in enumerate(splits):
                    values = dict.fromkeys(names, step / 20 - 0.1 * index - 0.02 * seed)
                    more = {"rows": [[1, 2], [3, 4]]} if rows else {}
                    recorder.write({"step": step, "split": split, "loss": 1 / step, **values, **more})
    records.write_summary(path, {"state": "finished"})


def test_metric_curves_has_a_panel_a_metric_and_a_kind_of_line_a_split(tmp_path):
    for seed in (0, 1):
        write_metrics(tmp_path / "trials" / f"s000-seed{seed}", seed, rows=True)
    runs = records.load(tmp_path)
    figure = figures.metric_curves(runs)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy", "f1"]  # and no matrix
    loss, accuracy, _ = figure.axes
    assert [line.get_linestyle() for line in loss.get_lines()] == ["-", "--", ":"]  # and of training
    val, seen = accuracy.get_lines()
    np.testing.assert_allclose(val.get_ydata(), np.array([0.25, 0.5, 0.75, 1]) - 0.01)
    np.testing.assert_allclose(seen.get_ydata(), val.get_ydata() - 0.1)
    assert len(accuracy.collections) == 2  # the seeds' range, once a split
    assert legend_texts(figure)[1:] == ["training", "validation", "seen"]
    assert "mean and range of 2 seeds" in title_of(figure)
    assert_tidy(figure)
    assert len(figures.metric_curves(runs, ["f1"]).axes) == 1
    with pytest.raises(InputError, match=r'no run has recorded "acuracy" \(did you mean "accuracy"\?\)'):
        figures.metric_curves(runs, ["acuracy"])


def test_a_mean_is_over_the_seeds_that_have_the_step_and_the_words_count_them(tmp_path):
    for seed, steps in enumerate((60, 60, 20)):
        config = {"optim.lr": 1e-3, "train.seed": seed}
        write_run(tmp_path / "trials" / f"s000-seed{seed}", config, 2.0 + seed, steps=steps)
    figure = figures.loss_curves(records.load(tmp_path))
    loss, lr, _ = figure.axes
    (mean,) = line_at(loss, "o")
    assert mean.get_xdata().tolist() == [20, 40, 60]
    assert mean.get_ydata()[-1] == pytest.approx((2.0 + 3.0) / 2)
    (band,) = loss.collections
    assert band.get_paths()[0].get_extents().intervaly[1] == pytest.approx(4.0)  # of the short run
    assert len(lr.get_lines()[0].get_xdata()) == 60
    assert title_of(figure) == "Loss over training, 2 to 3 seeds each"
    assert legend_texts(figure)[-1].replace("\n", " ").endswith("of 2 to 3 seeds")
    assert_tidy(figure)


def test_a_seed_without_the_metric_is_neither_drawn_nor_counted(tmp_path):
    for seed, names in enumerate((["accuracy", "f1"], ["accuracy", "f1"], ["f1"])):
        write_metrics(tmp_path / "trials" / f"s000-seed{seed}", seed, names)
    runs = records.load(tmp_path)
    figure = figures.metric_curves(runs, ["accuracy"])
    val, _ = figure.axes[0].get_lines()
    np.testing.assert_allclose(val.get_ydata(), np.array([0.25, 0.5, 0.75, 1]) - 0.01)
    assert title_of(figure) == "Metrics over training, mean and range of 2 seeds"
    assert "2 to 3 seeds" in title_of(figures.metric_curves(runs, ["accuracy", "f1"]))
    alone = figures.metric_curves(runs[1:], ["accuracy"])
    assert title_of(alone) == "Metrics over training" and not alone.axes[0].collections


@pytest.mark.parametrize("n_runs", [4, 5])
def test_raw_losses_are_drawn_of_few_runs(tmp_path, n_runs):
    for seed in range(n_runs):
        write_run(tmp_path / "trials" / f"s000-seed{seed}", {"train.seed": seed}, 2.0)
    figure = figures.loss_curves(records.load(tmp_path))
    few = n_runs == 4
    assert len(figure.axes[0].get_lines()) == 2 + 4 * few
    assert ("training, raw" in legend_texts(figure)) == few


def test_metric_curves_of_many_metrics_and_of_none(tmp_path, sweep_dir):
    write_metrics(tmp_path / "many", 0, names=[f"m{i}" for i in range(20)])
    figure = figures.metric_curves(records.load(tmp_path / "many"))
    assert len(figure.axes) == 8 and "first 8 of 21" in title_of(figure)
    with pytest.raises(InputError, match="no metric besides the loss"):
        figures.metric_curves(records.load(sweep_dir))


def test_loss_curves_of_a_task_follow_its_first_eval_and_draw_what_there_is(tmp_path):
    write_metrics(tmp_path / "run", 0, splits=("seen", "other"))
    figure = figures.loss_curves(records.load(tmp_path / "run"))
    (axes,) = figure.axes  # neither learning rate nor gradient norm
    assert axes.get_ylabel() == "loss" and axes.get_xlabel() == "step"
    assert "seen" in legend_texts(figure)
    assert_tidy(figure)
    names = [path.name for path in figures.for_directory(tmp_path / "run")]
    assert names == ["loss_curves.png", "loss_curves.svg", "metric_curves.png", "metric_curves.svg"]


def test_keys_that_move_together_share_an_axis_and_a_figure(tmp_path):
    sizes = [(16, 2), (32, 4), (64, 4)]
    for setting, (width, heads) in enumerate(sizes):
        for seed in SEEDS:
            config = {"model.n_embd": width, "model.n_head": heads, "train.seed": seed}
            write_run(tmp_path / "trials" / f"s{setting:03d}-seed{seed}", config, 2 - setting / 10)
    toml = '[sweep]\nobjective = "val.loss"\nat = "last"\ngoal = "minimize"\n'
    toml += '[[space]]\n"model.n_embd, model.n_head" = []\n'
    (tmp_path / "sweep.toml").write_text(toml, encoding="utf-8")
    stems = {path.stem for path in figures.for_directory(tmp_path)}
    assert stems == {"val.loss-against-model.n_embd+model.n_head", "loss_curves"}
    figure = figures.against(records.load(tmp_path), "model.n_embd,model.n_head")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "width (channels), attention heads"
    assert axes.get_xticks().tolist() == [16, 32, 64]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16, 2", "32, 4", "64, 4"]
    assert any("n_embd, n_head = 64, 4" in text for text in legend_texts(figure))
    assert len(line_at(axes, "*")) == 1
    assert_tidy(figure)
    figure = figures.against(records.load(tmp_path), "model.n_head, model.n_embd")  # 4 heads twice
    assert figure.axes[0].get_xticks().tolist() == [16, 32, 64]
    with pytest.raises(InputError, match=r'no run has the key "model.n_heads" .*"model.n_head"'):
        figures.against(records.load(tmp_path), "model.n_embd,model.n_heads")


def test_a_run_that_blows_up_does_not_flatten_the_others(tmp_path):
    write_run(tmp_path / "trials" / "s000-seed0", {"optim.lr": 1e-3, "train.seed": 0}, 2.0)
    write_run(tmp_path / "trials" / "s001-seed0", {"optim.lr": 1.0, "train.seed": 0}, 500.0)
    runs = records.load(tmp_path)
    assert figures.loss_curves(runs).axes[0].get_ylim()[1] < 6
    figure = figures.against(runs, "optim.lr")
    assert figure.axes[0].get_ylim()[1] < 6
    assert "1 of 1" in [text.get_text() for text in figure.axes[0].texts]


def test_against_draws_means_standard_errors_and_single_seeds(sweep_dir):
    figure = figures.against(records.load(sweep_dir), "optim.lr", "val.loss", over="train.seed")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0.0003", "0.001", "0.003", "0.01", "0.03"]
    (bars,) = axes.containers
    lines, _, (segments,) = bars
    values = np.array([[final_loss(lr, seed) for seed in SEEDS] for lr in LRS])
    errors = values.std(1, ddof=1) / math.sqrt(len(SEEDS))
    np.testing.assert_allclose(lines.get_xdata().astype(float), LRS)
    np.testing.assert_allclose(lines.get_ydata().astype(float), values.mean(1))
    drawn = np.array([segment[:, 1] for segment in segments.get_segments()])
    np.testing.assert_allclose(drawn, np.stack([values.mean(1) - errors, values.mean(1) + errors], 1))
    dots = np.concatenate([line.get_ydata() for line in line_at(axes, ".")])
    np.testing.assert_allclose(np.sort(dots), np.sort(values.ravel()))
    (star,) = line_at(axes, "*")
    assert star.get_xdata() == [3e-3]
    assert "best: lr = 0.003: 1.900 ± 0.012" in legend_texts(figure)
    assert title_of(figure) == "Validation loss at the last step: mean ± standard error, 3 seeds"
    assert_tidy(figure)


def test_against_shows_failures_at_the_top_and_gives_them_no_mean(sweep_dir):
    path = sweep_dir / "trials" / "s004-seed1"
    records.write_summary(path, {"state": "failed"})
    figure = figures.against(records.load(sweep_dir), "optim.lr")
    (axes,) = figure.axes
    (cross,) = line_at(axes, "X")
    assert cross.get_xdata() == [3e-2]
    assert [text.get_text() for text in axes.texts] == ["1 of 3"]
    assert len(axes.containers[0][0].get_xdata()) == 4
    assert "failed or diverged, of all runs there" in legend_texts(figure)
    assert_tidy(figure)


def test_against_has_a_line_for_each_other_setting_and_beside_each_other_for_words(tmp_path):
    for index, (name, lr) in enumerate([(name, lr) for name in ("adamw", "sgd") for lr in (1e-3, 3e-3)]):
        for seed in SEEDS:
            config = {"optim.name": name, "optim.lr": lr, "train.seed": seed}
            if name == "sgd":
                config["optim.momentum"] = 0.9  # follows from the name, so labels leave it out
            path = tmp_path / "trials" / f"s{index:03d}-seed{seed}"
            write_run(path, config, final_loss(lr, seed) + index / 10)
    runs = records.load(tmp_path)
    figure = figures.against(runs, "optim.lr")
    assert legend_texts(figure)[:2] == ["optim = adamw", "optim = sgd"]
    assert_tidy(figure)
    figure = figures.against(runs, "optim.name")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["adamw", "sgd"]
    assert legend_texts(figure)[:2] == ["lr = 0.001", "lr = 0.003"]
    assert figure.axes[0].get_xlabel() == "optimizer"
    assert_tidy(figure)


def test_against_at_best_and_maximize(sweep_dir):
    runs = records.load(sweep_dir)
    assert "at its best" in title_of(figures.against(runs, "optim.lr", at="best"))
    (star,) = line_at(figures.against(runs, "optim.lr", goal="maximize").axes[0], "*")
    worst = max(LRS, key=lambda lr: final_loss(lr, 1))
    assert star.get_xdata() == [worst]


@pytest.mark.parametrize("goal, best", [("minimize", 2.0), ("maximize", 3.0)])
def test_against_takes_each_runs_best_record(tmp_path, goal, best):
    write_run(tmp_path / "run", {"optim.lr": 1e-3, "train.seed": 0}, 2.2)
    with records.Recorder(tmp_path / "run") as recorder:
        recorder.truncate(0)
        recorder.write({"step": 1, "split": "train", "loss": 4.0})
        for step, loss in enumerate((3.0, 2.0, 2.5), 1):
            recorder.write({"step": step, "split": "val", "loss": loss})
    runs = records.load(tmp_path / "run")
    for at, value in (("last", 2.5), ("best", best)):
        (star,) = line_at(figures.against(runs, "optim.lr", at=at, goal=goal).axes[0], "*")
        assert star.get_ydata() == [value]


def write_ends(path, config, losses, perplexities=()):
    """A run's directory with a first training loss of 1 and some records of validation."""
    write_run(path, {"train.seed": 0, **config}, 2.0)
    with records.Recorder(path) as recorder:
        recorder.truncate(0)
        recorder.write({"step": 1, "split": "train", "loss": 1.0})
        for step, (loss, perplexity) in enumerate(zip(losses, perplexities or losses), 1):
            recorder.write({"step": step, "split": "val", "loss": loss, "perplexity": perplexity})


@pytest.mark.parametrize("key", ["task.build", "task.run"])
def test_a_tasks_loss_may_end_above_that_of_its_first_training_step(tmp_path, key):
    for index, lr in enumerate((1e-3, 3e-3)):
        config = {"optim.lr": lr, key: "my.py:function"}
        write_ends(tmp_path / "trials" / f"s{index:03d}-seed0", config, [1.2, 1.5 + index])
    toml = '[sweep]\nobjective = "val.loss"\nat = "last"\ngoal = "minimize"\n[[space]]\n"optim.lr" = []\n'
    (tmp_path / "sweep.toml").write_text(toml, encoding="utf-8")
    (axes,) = figures.against(records.load(tmp_path), "optim.lr").axes
    assert axes.containers[0][0].get_ydata().tolist() == [1.5, 2.5]
    assert not line_at(axes, "X")
    assert "val.loss-against-optim.lr.png" in [path.name for path in figures.for_directory(tmp_path)]


def test_a_lucky_seed_is_no_best_mean(tmp_path):
    """Where other settings have more seeds: the star, the frame and the best so far are of whole means."""
    for lr, ends in ((1e-3, [2.4, 2.5, 2.6]), (1e-2, [2.1]), (1e-1, [2.7, 2.7, 2.8])):
        for seed, end in enumerate(ends):
            for width in (16, 32):
                config = {"optim.lr": lr, "model.n_embd": width, "optim.name": "adam", "train.seed": seed}
                write_run(tmp_path / "trials" / f"{lr}-{width}-{seed}", config, end + width / 1e3)
    runs = records.load(tmp_path)
    figure = figures.against(runs, "optim.lr")
    assert any(text.startswith("best: lr = 0.001, n_embd = 16: 2.516") for text in legend_texts(figure))
    assert title_of(figure).endswith("1 to 3 seeds")
    cells = figures.heat_map(runs, "optim.lr", "model.n_embd").axes[0]
    assert [text.get_text() for text in cells.texts] == ["2.516", "2.749", "2.532", "2.765"]
    assert "crosses" not in title_of(cells.figure)
    contender = figures.contenders(runs, "optim.name")
    assert legend_texts(contender) == ["adam: 2.516"]


def test_what_a_figure_leaves_out_or_chooses_is_said(tmp_path):
    for index, (lr, heads) in enumerate([(1e-3, 2), (1e-2, 2), (1e-3, 4), (1e-2, 4), (1e-3, None)]):
        config = {"optim.lr": lr, "model.n_embd": 16 * (1 + index % 2), "train.seed": 0}
        config |= {"model.n_kv_head": heads} if heads else {}
        config["model.n_layer"] = index
        write_run(tmp_path / "trials" / f"s{index:03d}-seed0", config, 2 + index / 10)
    runs = records.load(tmp_path)
    title = title_of(figures.against(runs, "model.n_kv_head"))
    assert "; 1 run without this key left out" in title.replace("\n", " ")
    cells = figures.heat_map(runs, "optim.lr", "model.n_embd")
    assert "each cell the best of other keys" in title_of(cells).replace("\n", " ")


def test_a_zero_has_its_place_beside_a_logarithmic_axis(tmp_path):
    for index, decay in enumerate((0.0, 1e-3, 1e-2, 1e-1, 1.0)):
        config = {"optim.weight_decay": decay, "train.seed": 0}
        write_run(tmp_path / "trials" / f"s{index:03d}-seed0", config, 2 + index / 10)
    figure = figures.against(records.load(tmp_path), "optim.weight_decay")
    (axes,) = figure.axes
    assert axes.get_xscale() == "symlog"
    places = axes.transData.transform([(x, 2.0) for x in (0.0, 1e-3, 1e-2, 1e-1, 1.0)])[:, 0]
    assert np.diff(places).min() > 0.1 * np.ptp(places)
    assert all(label.get_visible() for label in axes.get_xticklabels())
    assert_tidy(figure)


def test_a_figure_that_cannot_be_drawn_does_not_keep_others_from_it(sweep_dir):
    """No whole cell for the heat map; what else suits the sweep is there."""
    for index, run in enumerate(records.load(sweep_dir)):
        text = (run.path / "config.toml").read_text() + f"[model]\nn_layer = {1 + index % 2}\n"
        (run.path / "config.toml").write_text(text)
        if index % 3 == 0:
            records.write_summary(run.path, {"state": "failed"})
    toml = (sweep_dir / "sweep.toml").read_text() + '"model.n_layer" = [1, 2]\n'
    (sweep_dir / "sweep.toml").write_text(toml)
    names = [name for name, _ in figures.drawn(sweep_dir)]
    assert names[-1] == "loss_curves" and "val.loss-against-optim.lr" in names


def test_when_all_runs_diverged_the_error_says_so(tmp_path):
    write_ends(tmp_path / "run", {"optim.lr": 1e-3}, [1.2, 1.5], [0.5, math.nan])
    runs = records.load(tmp_path / "run")
    message = r'every finished run diverged: its "val\.loss" is NaN or 5 % above the first training loss$'
    with pytest.raises(InputError, match=message):
        figures.against(runs, "optim.lr")
    with pytest.raises(InputError, match=r'every finished run diverged: its "val\.perplexity" is NaN$'):
        figures.against(runs, "optim.lr", "val.perplexity")


def test_the_value_that_counts_says_whether_a_run_diverged(tmp_path):
    write_ends(tmp_path / "run", {"optim.lr": 1e-3}, [0.8, 1.5])
    runs = records.load(tmp_path / "run")
    (star,) = line_at(figures.against(runs, "optim.lr", at="best").axes[0], "*")
    assert star.get_ydata() == [0.8]
    with pytest.raises(InputError, match="every finished run diverged"):
        figures.against(runs, "optim.lr", at="last")


@pytest.mark.parametrize("at, goal, expected", [
    ("best", "minimize", [0.4, 0.4, None]), ("best", "maximize", [0.6, 0.6, None]),
    ("last", "minimize", [0.6, None, None]),
])  # fmt: skip
@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_nan_is_never_best_and_no_end_as_in_the_sweeps_table(tmp_path, metric, at, goal, expected):
    series = [[math.nan, 0.4, 0.6], [0.4, 0.6, math.nan], [math.nan, math.nan, math.nan]]
    toml = f'[sweep]\nat = "{at}"\ngoal = "{goal}"\nobjective = "val.{metric}"\nseeds = [0]\n'
    toml += '[base.data]\nsource = "text.txt"\n[[space]]\n"optim.lr" = [0.001, 0.003, 0.01]\n'
    (tmp_path / "grid.toml").write_text(toml, encoding="utf-8")
    plan = sweep.Sweep.load(tmp_path / "grid.toml")
    table = []
    for trial, losses in zip(plan.trials(), series):
        path = tmp_path / "trials" / trial.name
        write_ends(path, {"optim.lr": trial.overrides["optim.lr"]}, losses)
        records.write_summary(path, {"state": "finished", "step": 3, "seconds": 1.0, "isa": "x"})
        table.append(results.read(plan.config, trial, path).value)
    assert table == expected
    (axes,) = figures.against(records.load(tmp_path), "optim.lr", f"val.{metric}", at=at, goal=goal).axes
    assert axes.containers[0][0].get_ydata().tolist() == [value for value in expected if value is not None]
    assert [text.get_text() for text in axes.texts] == ["1 of 1"] * expected.count(None)


def test_against_one_seed_has_no_error_bars(sweep_dir):
    runs = [run for run in records.load(sweep_dir) if run.config["train.seed"] == 0]
    figure = figures.against(runs, "optim.lr")
    assert title_of(figure).endswith("one seed")
    assert figure.axes[0].containers[0].has_yerr is False
    assert "±" not in "".join(legend_texts(figure))


def test_bad_keys_are_named(sweep_dir):
    runs = records.load(sweep_dir)
    with pytest.raises(InputError, match=r'no run has the key "optim\.lrr" .*did you mean "optim\.lr"'):
        figures.against(runs, "optim.lrr")
    with pytest.raises(InputError, match=r'no finished run has recorded "val\.accuracy"'):
        figures.against(runs, "optim.lr", "val.accuracy")
    with pytest.raises(InputError, match="no loss curve"):
        figures.loss_curves([])


def test_for_directory_writes_png_and_svg_that_are_the_same_each_time(sweep_dir):
    paths = figures.for_directory(sweep_dir)
    assert [path.name for path in paths] == [
        "val.loss-against-optim.lr.png", "val.loss-against-optim.lr.svg", "loss_curves.png", "loss_curves.svg"
    ]  # fmt: skip
    assert {path.parent for path in paths} == {sweep_dir / "figures"}
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in figures.for_directory(sweep_dir)] == before
    (one, two) = figures.for_directory(sweep_dir / "trials" / "s000-seed0", out=sweep_dir / "elsewhere")
    assert one == sweep_dir / "elsewhere" / "loss_curves.png" and two.exists()


def test_a_sweep_whose_trials_all_failed_still_has_its_loss_curves(sweep_dir):
    for path in (sweep_dir / "trials").iterdir():
        records.write_summary(path, {"state": "failed"})
    assert [path.name for path in figures.for_directory(sweep_dir)] == ["loss_curves.png", "loss_curves.svg"]


def test_the_callers_style_is_left_alone(sweep_dir):
    before = dict(matplotlib.rcParams)
    figures.save(figures.loss_curves(records.load(sweep_dir)), sweep_dir / "new" / "figure")
    assert dict(matplotlib.rcParams) == before


# Attention weights


def heads(H=4, T=7, S=7):
    weights = np.random.default_rng(0).random((H, T, S)) * (np.arange(S) <= np.arange(S - T, S)[:, None])
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("n_head, shape", [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (6, (2, 3)), (10, (3, 4))])
def test_attention_shows_each_head_on_one_scale(n_head, shape):
    weights = heads(n_head) / np.arange(1, n_head + 1)[:, None, None]  # each head has another maximum
    figure = figures.attention(weights)
    pictures = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(pictures) == n_head
    for head, picture in enumerate(pictures):
        assert picture.axes.get_title(loc="left") == f"head {head}"
        shown = picture.get_array()
        np.testing.assert_array_equal(shown.filled(0), weights[head])
        np.testing.assert_array_equal(shown.mask, weights[head] == 0)  # gray
        assert picture.get_clim() == (0, weights.max())
    assert pictures[0].axes.get_gridspec().get_geometry() == shape
    assert figure.axes[-1].get_ylabel() == "attention weight"
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("key position", "query position")


def test_attention_labels_tokens():
    figure = figures.attention(heads(2, 3, 5), ["a", " ", "b\n", "\t", "c"])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "␣", "b⏎", "⇥", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b⏎", "⇥", "c"]  # the last three
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("key", "query")
    long = figures.attention(heads(1, 60, 60), "x" * 60)
    assert len(long.axes[0].get_xticklabels()) < 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones((2, 3, 4, 4)),), r"float64 \(2, 3, 4, 4\).*; of a batch take one sequence, weights\[0\]$"),
        ((np.ones((4, 4)),), r"float64 \(4, 4\), they must be floats \(H, T, S\)$"),
        ((np.ones((1, 4, 4), int),), "weights are int64"),
        ((np.zeros((1, 0, 4)),), r"\(1, 0, 4\)"),
        ((np.full((1, 2, 2), np.nan),), "weights hold NaN or infinity"),
        ((np.ones((1, 2, 2)), "abc"), "tokens are 3, they must be 2: one for each key"),
    ],
)
def test_attention_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        figures.attention(*arguments)


def test_what_follows_from_an_optimizers_name_is_no_label_and_long_labels_are_broken(tmp_path):
    own = {
        "adamw": {"optim.eps": 1e-8, "optim.weight_decay": 0.1},
        "muon": {"optim.eps": 1e-7, "optim.weight_decay": 0.1, "optim.nesterov": 1},
        "folder/of/mine/optimizers.py:ASignSGDWithALongName": {"optim.momentum": 0.9},
    }
    runs = []
    for setting, (name, arguments) in enumerate(own.items()):
        for seed in SEEDS:
            path = tmp_path / "trials" / f"s{setting}-seed{seed}"
            config = {"optim.name": name, **arguments, "train.seed": seed}
            write_run(path, config, final_loss(3e-3 * (setting + 1), seed))
            runs.append(records.Run(path))
    curves = figures.loss_curves(runs)
    words = [text.get_text().replace("\n", " ") for text in curves.legends[0].get_texts()]
    names = ["optim = adamw", "optim = muon", "optim = ASignSGDWithALongName"]
    assert words[:3] == names
    assert_tidy(curves)
    figure = figures.against(runs, "optim.name")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [name[8:] for name in names]
    assert len(figure.axes[0].containers) == 1  # one line: no other key tells settings apart
    assert_tidy(figure)


# Sweeps ----------------------------------------------------------------------------------------------


def write_sweep(folder, settings, ends, space, sections="", seeds=SEEDS, **run):
    """A sweep's directory: its copy, table and trials; `ends(setting, seed)` is a loss, or a state."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    rows = [",".join(["setting", "seed", *keys, "state", "step", "val.loss", "error", "seconds"])]
    for number, setting in enumerate(settings):
        for seed in seeds:
            end = ends(setting, seed)
            state, step = ("finished", 60) if isinstance(end, float) else (end, 20)
            path = folder / "trials" / f"s{number:03d}-seed{seed}"
            value = end if isinstance(end, float) else 2.75
            write_run(path, {**setting, "train.seed": seed, **run}, value, steps=step)
            if state in ("finished", "failed"):
                parameters = 100 * setting.get("model.n_embd", 1) ** 2
                records.write_summary(path, {"state": state, "step": step, "parameters": parameters})
            else:
                (path / "summary.json").unlink()
            shown = "" if state == "failed" else repr(value)
            cells = [*(str(setting.get(key, "")) for key in keys), state, str(step), shown, "", "1.00"]
            rows.append(",".join([str(number), str(seed), *cells]))
    (folder / "results.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    toml = f'[sweep]\nobjective = "val.loss"\nat = "last"\ngoal = "minimize"\nseeds = [0, 1, 2]\n{sections}'
    (folder / "sweep.toml").write_text(toml + "".join(f"[[space]]\n{block}" for block in space))
    return folder


RATES = [1e-3, 1e-2, 1e-1]
WIDTHS = [16, 32]
GRID = [{"optim.lr": lr, "model.n_embd": width} for lr in RATES for width in WIDTHS]
GRID_SPACE = ['"optim.lr" = [0.001, 0.01, 0.1]\n"model.n_embd" = [16, 32]\n']


def grid_end(setting, seed):
    return 2.0 + abs(math.log10(setting["optim.lr"]) + 2) / 4 - setting["model.n_embd"] / 100 + seed / 50


@pytest.fixture
def grid_dir(tmp_path):
    return write_sweep(tmp_path, GRID, grid_end, GRID_SPACE)


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_heat_map_has_the_mean_of_each_cell_and_frames_the_best(grid_dir):
    figure = figures.heat_map(records.load(grid_dir), "optim.lr", "model.n_embd")
    axes, bar = figure.axes
    cells = axes.collections[0].get_array().reshape(2, 3)
    expected = [[grid_end({"optim.lr": lr, "model.n_embd": w}, 1) for lr in RATES] for w in WIDTHS]
    np.testing.assert_allclose(cells, expected)
    assert texts_of(axes) == ["2.110", "1.860", "2.110", "1.950", "1.700", "1.950"]
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, 0.5)]  # of lr 0.01, width 32
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert bar.get_ylabel() == "validation loss (nats per character)"
    assert_tidy(figure)
    runs = [run for run in records.load(grid_dir) if run.config["optim.lr"] == 1e-3]
    with pytest.raises(InputError, match=r"optim\.lr has one value in these runs"):
        figures.heat_map(runs, "optim.lr", "model.n_embd")


def test_heat_map_gives_a_cell_with_a_failure_no_mean_of_the_others(grid_dir):
    records.write_summary(grid_dir / "trials" / "s003-seed1", {"state": "failed"})  # the best cell
    figure = figures.heat_map(records.load(grid_dir), "optim.lr", "model.n_embd")
    axes = figure.axes[0]
    assert "1.700" not in texts_of(axes) and len(texts_of(axes)) == 5
    (cross,) = line_at(axes, "X")
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([1], [1])
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, -0.5)]
    assert "crosses: failed or diverged" in title_of(figure).replace("\n", " ")
    assert_tidy(figure)


def test_heat_map_of_sampled_settings_is_dots_where_they_lie(tmp_path):
    sampled = [{"optim.lr": 10**-i, "optim.weight_decay": i / 10} for i in (1.5, 2.25, 3.5)]
    write_sweep(tmp_path, sampled, lambda setting, seed: 2.0 + setting["optim.weight_decay"], ["x = 1\n"])
    figure = figures.heat_map(records.load(tmp_path), "optim.lr", "optim.weight_decay")
    axes = figure.axes[0]
    np.testing.assert_allclose(sorted(axes.collections[0].get_offsets()[:, 1]), [0.15, 0.225, 0.35])
    assert axes.get_xscale() == "log" and not texts_of(axes)
    assert_tidy(figure)


def test_sensitivity_is_the_mean_excess_over_the_best_rate_by_hand(grid_dir):
    figure = figures.sensitivity(records.load(grid_dir))
    curve, bars = figure.axes
    for bar in bars.patches:  # at 0.001 and 0.1 a quarter more than at 0.01: (1/4 + 0 + 1/4) / 3
        assert bar.get_width() == pytest.approx(1 / 6)
    assert curve.get_lines()[0].get_ydata()[1] == pytest.approx(2.0 - 0.16 + 0.02)
    assert legend_texts(figure) == ["n_embd = 16", "n_embd = 32"]
    assert_tidy(figure)
    records.write_summary(grid_dir / "trials" / "s004-seed0", {"state": "failed"})  # lr 0.1, width 16
    bars = figures.sensitivity(records.load(grid_dir)).axes[1]
    first = records.Run(grid_dir / "trials" / "s004-seed0").series("train", "loss")[1][0]
    best = grid_end({"optim.lr": 0.01, "model.n_embd": 16}, 0)
    assert bars.patches[0].get_width() == pytest.approx((2 / 6 + (0.25 + first - best) / 3) / 3)
    with pytest.raises(InputError, match="at least three values"):
        figures.sensitivity([run for run in records.load(grid_dir) if run.config["optim.lr"] > 1e-3])


def test_contenders_count_the_steps_of_all_trials_also_of_failed_ones(tmp_path):
    settings = [{"optim.name": name, "optim.lr": lr} for name in ("adamw", "sgd") for lr in RATES]
    ends = {("adamw", 1e-3): 2.5, ("adamw", 1e-2): "failed", ("adamw", 1e-1): 2.25,
            ("sgd", 1e-3): 2.75, ("sgd", 1e-2): 2.5, ("sgd", 1e-1): 2.625}  # fmt: skip
    write_sweep(tmp_path, settings, lambda s, seed: ends[s["optim.name"], s["optim.lr"]], ["x = 1\n"])
    figure = figures.contenders(records.load(tmp_path), "optim.name")
    adamw, sgd = figure.axes[0].get_lines()
    assert adamw.get_xdata().tolist() == [180, 240, 420] and sgd.get_xdata().tolist() == [180, 360, 540]
    assert adamw.get_ydata().tolist() == [2.5, 2.5, 2.25] and sgd.get_ydata().tolist() == [2.75, 2.5, 2.5]
    assert legend_texts(figure) == ["adamw: 2.25", "sgd: 2.5"]
    assert_tidy(figure)
    other = figures.contenders(records.load(tmp_path), "optim.name", goal="maximize")
    assert other.axes[0].get_lines()[0].get_ydata().tolist() == [2.75, 2.75, 2.75]
    assert legend_texts(other) == ["sgd: 2.75", "adamw: 2.5"]


def test_a_contender_of_which_nothing_came_to_the_end_says_so(tmp_path):
    settings = [{"optim.name": name} for name in ("adamw", "sgd")]
    write_sweep(
        tmp_path, settings, lambda s, seed: 2.5 if s["optim.name"] == "sgd" else "pruned", ["x = 1\n"]
    )
    figure = figures.contenders(records.load(tmp_path), "optim.name")
    assert " ".join(legend_texts(figure)).replace("\n", " ") == "sgd: 2.5 adamw: none came to the end"
    assert_tidy(figure)


def test_a_heat_map_frames_the_largest_where_more_is_better(grid_dir):
    for goal, best in (("minimize", min), ("maximize", max)):
        axes = figures.heat_map(records.load(grid_dir), "optim.lr", "model.n_embd", goal=goal).axes[0]
        (frame,) = [patch for patch in axes.patches if not patch.get_fill()]
        column, row = frame.get_x() + 0.5, frame.get_y() + 0.5
        words = {text.get_position(): float(text.get_text()) for text in axes.texts}
        assert words[column, row] == best(words.values())
        shades = axes.collections[0].to_rgba(np.array(sorted(words.values())))[:, :3].sum(1)
        assert (shades[0] > shades[-1]) == (goal == "minimize")  # the best is the palest


def test_bars_of_sensitivity_are_standard_errors_over_seeds(tmp_path):
    losses = {0: [2.5, 2.0, 2.25], 1: [2.25, 2.0, 2.25], 2: [2.0, 2.0, 2.75]}  # of a seed at the rates
    settings = [{"optim.lr": lr} for lr in RATES]
    write_sweep(tmp_path, settings, lambda s, seed: losses[seed][RATES.index(s["optim.lr"])], ["x = 1\n"])
    curve, bars = figures.sensitivity(records.load(tmp_path)).axes
    excess = np.array([0.25, 0.5 / 3, 0.25])
    (container,) = [one for one in bars.containers if hasattr(one, "errorbar")]
    ((low, _), (high, _)) = container.errorbar.lines[2][0].get_segments()[0]
    assert (low + high) / 2 == pytest.approx(excess.mean())
    assert (high - low) / 2 == pytest.approx(excess.std(ddof=1) / math.sqrt(3))
    ends = curve.collections[0].get_paths()[0].vertices
    at_first = ends[np.isclose(ends[:, 0], RATES[0]), 1]
    assert at_first.min() == pytest.approx(2.0) and at_first.max() == pytest.approx(2.5)


def summary_of(decided):
    found = {
        "objective": "val.loss", "best": 1, "decided": decided,
        "comparisons": [
            {"setting": 1, "against": 0, "n": 4, "mean": 0.3, "interval": [0.1, 0.5], "apart": True},
            {"setting": 1, "against": 2, "n": 4, "mean": 0.1, "interval": [-0.2, 0.4], "apart": False},
            {"setting": 0, "against": 2, "n": 4, "mean": 0.2, "interval": None, "apart": None},
        ],
    }  # fmt: skip
    settings = [{"optim.lr": lr} for lr in RATES]
    return {**found, "settings": [{"setting": n, "values": s} for n, s in enumerate(settings)]}


@pytest.mark.parametrize("decided, words", [(True, "Confirmed with 4 fresh"), (False, "Unconfirmed")])
def test_differences_are_those_from_the_best_with_their_intervals(decided, words):
    figure = figures.differences(summary_of(decided), lambda number: f"setting {number}")
    (axes,) = figure.axes
    drawn = [bars[2][0].get_segments()[0][:, 0].tolist() for bars in axes.containers]
    np.testing.assert_allclose(drawn, [[0.1, 0.5], [-0.2, 0.4]])
    faces = [line.get_markerfacecolor() for line in line_at(axes, "o")]
    assert faces == ["#0072b2", "white"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["setting 0", "setting 2"]
    assert words in figure.get_suptitle() and "setting 1" in figure.get_suptitle()
    assert_tidy(figure)
    with pytest.raises(InputError, match="no setting with its best"):
        figures.differences({"best": None, "comparisons": []})


def rung_end(setting, seed):
    return {1e-3: "pruned", 1e-2: 2.0, 1e-1: "failed"}[setting["optim.lr"]]


def test_rungs_show_who_was_dropped_and_count_who_failed(tmp_path):
    settings = [{"optim.lr": lr} for lr in RATES]
    write_sweep(tmp_path, settings, rung_end, ["x = 1\n"])
    figure = figures.rungs(records.load(tmp_path), [20, 40])
    (axes,) = figure.axes
    (crosses,) = line_at(axes, "x")
    assert crosses.get_xdata().tolist() == [20]
    assert crosses.get_ydata()[0] == pytest.approx(2.75)
    (kept,) = line_at(axes, "o")
    assert kept.get_xdata().tolist() == [20, 40, 60] and kept.get_ydata()[-1] == pytest.approx(2.0)
    assert title_of(figure).startswith("1 of 3 settings came to the end, 1 failed")
    assert "dropped at a rung or not at the end yet" in " ".join(legend_texts(figure)).replace("\n", " ")
    prune = '[prune]\nmethod = "halving"\nsteps = [20, 40]\n'  # the table knows
    write_sweep(tmp_path / "known", settings, rung_end, ['"optim.lr" = [0]\n'], prune)
    assert "dropped at a rung" in legend_texts(dict(figures.drawn(tmp_path / "known"))["rungs"])
    assert_tidy(figure)


def test_what_was_trained_beyond_the_rung_that_dropped_it_is_not_drawn(tmp_path):
    """As when a sweep gets its rungs after it has ended."""
    settings = [{"optim.lr": lr} for lr in RATES]
    prune = '[prune]\nmethod = "halving"\nsteps = [20, 40]\n'
    write_sweep(tmp_path, settings, rung_end, ['"optim.lr" = [0]\n'], prune)
    for seed in SEEDS:
        path = tmp_path / "trials" / f"s000-seed{seed}"
        shutil.rmtree(path)
        write_run(path, {"optim.lr": 1e-3, "train.seed": seed}, 2.25, steps=60)
    (axes,) = dict(figures.drawn(tmp_path))["rungs"].axes
    (crosses,) = line_at(axes, "x")
    assert crosses.get_xdata().tolist() == [20]


def test_figures_of_what_a_sweep_was_do_not_stay(tmp_path):
    settings = [{"optim.lr": lr} for lr in RATES]
    prune = '[prune]\nmethod = "halving"\nsteps = [20, 40]\n'
    write_sweep(tmp_path, settings, rung_end, ['"optim.lr" = [0]\n'], prune)
    figures.for_directory(tmp_path)
    folder = tmp_path / "figures"
    assert (folder / "rungs.png").exists() and (folder / "rungs.svg").exists()
    (folder / "mine.png").write_bytes(b"a user's own")
    before = (tmp_path / "sweep.toml").read_text()
    (tmp_path / "sweep.toml").write_text(before.replace(prune, ""))
    written = figures.for_directory(tmp_path)
    assert sorted(folder.iterdir()) == sorted([*written, folder / "mine.png"])
    assert not any("rungs" in path.name for path in written)


@pytest.mark.parametrize("text", ["x =", "x = 1", "[sweep]\nseeds = [0]", "sweep = 1"])
def test_a_damaged_sweep_is_said_to_be_one(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(InputError, match=r"sweep\.toml is damaged"):
        figures.for_directory(tmp_path)


def test_names_that_do_not_fit_below_an_axis_are_turned_and_numbers_left_out():
    for words in (True, False):
        figure = Figure(figsize=(3, 2))
        axes = figure.subplots()
        axes.set_xlim(0, 5)
        style.ticks_at(axes, range(6), [f"name of number {i}" for i in range(6)], words=words)
        labels = [label for label in axes.get_xticklabels() if label.get_visible()]
        assert {label.get_rotation() for label in labels} == {30.0 if words else 0.0}
        assert len(labels) == 6 if words else 1 <= len(labels) < 6


def test_the_legend_shows_validation_as_it_is_drawn(tmp_path):
    for steps, marker, line in ((4, "o", "None"), (60, "None", "--")):
        path = tmp_path / str(steps)
        write_run(path, {"optim.lr": 1e-3, "train.seed": 0}, 2.0, steps=steps)
        handle = figures.loss_curves(records.load(path)).legends[0].legend_handles[-1]
        assert (handle.get_marker(), handle.get_linestyle()) == (marker, line)


def test_rungs_mark_what_lies_above_the_axis(tmp_path):
    settings = [{"optim.lr": lr} for lr in RATES]
    write_sweep(tmp_path, settings, rung_end, ["x = 1\n"])
    for seed in SEEDS:
        path = tmp_path / "trials" / f"s000-seed{seed}"
        shutil.rmtree(path)
        write_run(path, {"optim.lr": 1e-3, "train.seed": seed}, 40.0, steps=20)
        (path / "summary.json").unlink()
    figure = figures.rungs(records.load(tmp_path), [20, 40])
    (axes,) = figure.axes
    top = axes.get_ylim()[1]
    (mark,) = line_at(axes, "^")
    assert top < 10 and mark.get_xdata().tolist() == [20] and mark.get_ydata().tolist() == [top]
    assert "above the axis, up to 40" in " ".join(legend_texts(figure)).replace("\n", " ")
    assert_tidy(figure)


def power_law(sizes, noise=0.0):
    sizes = np.asarray(sizes, float)
    return 1.5 + (2e4 / sizes) ** 0.4 + noise * np.random.default_rng(0).normal(size=sizes.shape)


def test_fit_power_law_recovers_what_it_was_made_of():
    sizes = np.geomspace(1e3, 1e7, 9)
    exact = figures.fit_power_law(sizes, power_law(sizes))
    assert (exact.E, exact.alpha, exact.N_A) == pytest.approx((1.5, 0.4, 2e4), rel=1e-4)
    fit = figures.fit_power_law(sizes, power_law(sizes, noise=0.01))
    for name, true in (("E", 1.5), ("alpha", 0.4)):
        low, high = fit.interval(name)
        assert low < true < high and high - low < 0.1
    line, reach = fit.curve(sizes)
    assert (np.abs(line - power_law(sizes)) < reach).all()


@pytest.mark.parametrize(("alpha", "noise"), [(0.4, 0.02), (0.9, 0.02), (0.4, 3e-4)])
def test_the_intervals_of_fit_power_law_hold_the_truth_as_often_as_they_say(alpha, noise):
    sizes = np.geomspace(1e3, 1e7, 8)
    rng = np.random.default_rng(1)
    held = {"E": 0, "alpha": 0}
    for _ in range(100):
        losses = 1.5 + (2e4 / sizes) ** alpha + rng.normal(0, noise, len(sizes))
        fit = figures.fit_power_law(sizes, losses)
        for name, true, own in (("E", 1.5, fit.E), ("alpha", alpha, fit.alpha)):
            low, high = fit.interval(name)
            assert low < own < high
            held[name] += low < true < high
    assert all(88 <= n <= 100 for n in held.values())  # 95 expected, of standard deviation 2.2


def test_at_the_ends_of_its_intervals_a_power_law_fits_worse_by_as_much_as_it_should():
    sizes = np.geomspace(1e3, 1e7, 9)
    losses = 1.5 + (2e4 / sizes) ** 0.4 + np.random.default_rng(3).normal(0, 0.02, 9)
    fit, relative = figures.fit_power_law(sizes, losses), sizes / 2e4

    def squares(alpha, E=None):
        """The least sum of squares with this alpha, and with this E if given."""
        x = np.stack([np.ones(9), relative**-alpha], 1)
        if E is None:
            return np.sum((x @ np.linalg.lstsq(x, losses, rcond=None)[0] - losses) ** 2)
        return np.sum((x[:, 1] * (x[:, 1] @ (losses - E) / (x[:, 1] @ x[:, 1])) - (losses - E)) ** 2)

    alphas = np.linspace(0.05, 2, 20_000)
    limit = min(map(squares, alphas)) * (1 + stats.t.ppf(0.975, 6) ** 2 / 6)
    for end in fit.interval("alpha"):
        assert squares(end) == pytest.approx(limit, rel=1e-3)
    for end in fit.interval("E"):
        assert min(squares(alpha, end) for alpha in alphas) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 5]])
def test_fit_power_law_refuses_fewer_than_six_sizes(sizes):
    with pytest.raises(InputError, match="6 different sizes above 0"):
        figures.fit_power_law(sizes, np.ones(len(sizes)))


def test_scaling_law_takes_the_best_setting_of_each_size(tmp_path):
    widths = [8, 12, 16, 24, 32, 48]
    settings = [{"model.n_embd": width, "optim.lr": lr} for width in widths for lr in (1e-3, 1e-2)]

    def end(setting, seed):
        worse = 0.2 if setting["optim.lr"] == 1e-2 else 0.0
        return float(power_law(100 * setting["model.n_embd"] ** 2)) / 4 + worse

    write_sweep(tmp_path, settings, end, ["x = 1\n"])
    figure = figures.scaling_law(records.load(tmp_path))
    above, below = figure.axes
    np.testing.assert_allclose(below.containers[0][0].get_ydata(), 0, atol=1e-4)
    assert above.containers[0][0].get_xdata().tolist() == [100 * width**2 for width in widths]
    assert "α = 0.40" in " ".join(legend_texts(figure))
    assert_tidy(figure)
    few = [run for run in records.load(tmp_path) if run.config["model.n_embd"] > 8]
    with pytest.raises(InputError, match=r"there are 5 sizes .* needs 6"):
        figures.scaling_law(few)


def stems(folder):
    return [path.stem for path in figures.for_directory(folder) if path.suffix == ".png"]


def test_for_directory_draws_what_a_grid_asks_for(grid_dir):
    summary = summary_of(True)
    records.write_summary(grid_dir, summary)
    assert stems(grid_dir) == [
        "val.loss-against-optim.lr", "val.loss-against-model.n_embd",
        "val.loss-over-optim.lr-and-model.n_embd", "sensitivity", "differences", "loss_curves",
    ]  # fmt: skip


def test_for_directory_draws_contenders_sizes_and_rungs(tmp_path):
    names = [{"optim.name": name, "optim.lr": lr} for name in ("adamw", "sgd") for lr in RATES]
    space = ['"optim.name" = "adamw"\n"optim.lr" = [0]\n', '"optim.name" = "sgd"\n"optim.lr" = [0]\n']
    prune = '[prune]\nmethod = "halving"\nsteps = [20]\n'
    write_sweep(tmp_path / "names", names, rung_end, space, prune)
    found = stems(tmp_path / "names")
    assert "contenders-optim.name" in found and "rungs" in found
    assert "sensitivity" not in found  # pruning has taken rates away
    sizes = [{"model.n_embd": width} for width in (8, 12, 16, 24, 32, 48)]
    write_sweep(
        tmp_path / "sizes", sizes, lambda s, seed: float(power_law(100 * s["model.n_embd"] ** 2)) / 4,
        ['"model.n_embd" = [0]\n'],
    )  # fmt: skip
    assert stems(tmp_path / "sizes") == ["val.loss-against-model.n_embd", "scaling_law", "loss_curves"]


def test_fresh_seeds_and_unfinished_trials_are_not_pooled_with_the_search(tmp_path):
    settings = [{"optim.lr": lr} for lr in RATES]

    def end(setting, seed):
        if seed == 10:
            return 1.0 if setting["optim.lr"] == 1e-1 else "pending"
        return {1e-3: 2.5, 1e-2: "pruned", 1e-1: 2.25}[setting["optim.lr"]]

    space = ['"optim.lr" = [0]\n']
    write_sweep(tmp_path, settings, end, space, seeds=[*SEEDS, 10])
    (axes,) = dict(figures.drawn(tmp_path))["val.loss-against-optim.lr"].axes
    assert axes.containers[0][0].get_xdata().tolist() == [1e-3, 1e-1]
    assert axes.containers[0][0].get_ydata().tolist() == [2.5, 2.25]
    assert not line_at(axes, "X")
    assert axes.get_title(loc="left").replace("\n", " ").endswith("3 runs without an end left out")


@pytest.mark.parametrize("table", ["setting,seed\n0,0\n", "setting,seed,state,step,val.loss\n0,x,,1,\n"])
def test_a_table_that_is_none_is_named(grid_dir, table):
    (grid_dir / "results.csv").write_text(table)
    with pytest.raises(InputError, match=r"results\.csv is not the table of this sweep"):
        figures.for_directory(grid_dir)


def test_sampled_settings_share_a_look_and_are_not_joined(tmp_path):
    settings = [
        {"optim.name": name, "optim.lr": 10 ** -(i / 3), "optim.weight_decay": i / 50}
        for name in ("adamw", "sgd") for i in range(5)
    ]  # fmt: skip
    write_sweep(tmp_path, settings, lambda setting, seed: 2.0 + setting["optim.lr"], ["x = 1\n"])
    figure = figures.against(records.load(tmp_path), "optim.lr")
    (axes,) = figure.axes
    assert legend_texts(figure)[:2] == ["optim = adamw", "optim = sgd"]
    assert [len(bars[0].get_xdata()) for bars in axes.containers] == [5, 5]
    assert {bars[0].get_linestyle() for bars in axes.containers} == {"None"}
    assert "one mark a setting" in title_of(figure).replace("\n", " ")
    assert_tidy(figure)


def test_colours_are_the_styles_whoever_saves_the_figure(grid_dir):
    line = figures.loss_curves(records.load(grid_dir)).axes[0].get_lines()[0]
    assert line.get_color() == "#0072b2"


def test_a_users_words_are_no_formulas(tmp_path):
    settings = [{"optim.name": name} for name in ("a$x_{$", "b$\\\\frac$")]
    write_sweep(tmp_path, settings, lambda setting, seed: 2.0 + seed, ["x = 1\n"])
    figure = figures.loss_curves(records.load(tmp_path))
    svg = figures.to_svg(figure)
    assert "a$x_{$" in svg and "b$\\frac$" in svg
