"""Tasks of a user's own: data, loss, metrics, callbacks, whole loops; the experiment on modular addition."""

import csv
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cllm
from cllm import checkpoint, cli, figures, metrics, nn, progress, records, saved, train
from cllm import config as configs
from cllm.data import Examples
from cllm.data.batch import feed, order
from cllm.errors import InputError
from cllm.lifecycle import user_files
from cllm.progress import Silent
from cllm.task import Task, language_loss

ROOT = Path(__file__).resolve().parents[1]
GROKKING = ROOT / "experiments" / "grokking.toml"

# A task whose loss knows its count only when it has seen the batch, and a callback with a state.
MINE = '''
import numpy as np
import cllm
from cllm import nn

class Smooth:
    """A running mean of the training loss, added to each record."""

    def __init__(self):
        self.mean = None

    def __call__(self, trainer, record):
        if record["split"] == "train":
            self.mean = record["loss"] if self.mean is None else 0.9 * self.mean + 0.1 * record["loss"]
        record["smooth"] = self.mean

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def squares(model, batch):
    d = (model(batch.inputs) - batch.targets) * batch.mask.astype(np.float32)
    return (d * d).sum(), batch.mask.sum()


def near(outputs, batch):
    return (np.abs(outputs.data - batch.targets) < 0.5)[batch.mask].sum(), batch.mask.sum()


class Data:
    def __init__(self, n, seed):
        generator = np.random.default_rng(seed)
        self.x = generator.standard_normal((n, 3)).astype(np.float32)
        self.y = self.x @ np.array([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]], np.float32) + 1
        self.mask = generator.random((n, 2)) < 0.7

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return cllm.Batch(self.x[i], self.y[i], self.mask[i])


def build(config, n=50, noise=0.0, name="line", sizes=(1, 2), wide=False):
    return cllm.Task(
        model=nn.Linear(3, 2),
        train=Data(n, seed=0),
        evals={"val": Data(31, seed=1), "other": Data(17, seed=2)},
        loss=squares,
        metrics={"near": near},
        callbacks=[Smooth()],
    )
'''
SHORT = {
    "optim.lr": 0.05, "schedule.warmup_steps": 2, "train.batch_size": 8, "train.max_steps": 20,
    "train.eval_interval": 5, "train.checkpoint_interval": 6,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with my.py in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my.py").write_text(MINE)
    return tmp_path


def config_of(run_dir, **overrides):
    """A run of my.py's task; keys with __ for the dot."""
    more = {key.replace("__", "."): value for key, value in overrides.items()}
    return configs.load(None, {**SHORT, "task.build": "my.py:build", "run.dir": str(run_dir), **more})


def fit(run_dir, callbacks=(), task=None, **overrides):
    if task is None:
        config = config_of(run_dir, **overrides)
    else:
        config = configs.load(None, {**SHORT, "run.dir": str(run_dir), **overrides})
    trainer = train.Trainer(config, task, callbacks, progress=Silent())
    return trainer, trainer.fit()


def untimed(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not records.is_timing(k)} for line in lines]


class Killed(Exception):
    pass


def kill_at(step):
    def callback(trainer, record):
        if record["step"] == step:
            raise Killed

    return callback


def cells(n=20, p=0.6, seed=0):
    """Examples of 5 classes, 3 targets each, some masked."""
    generator = np.random.default_rng(seed)
    mask = generator.random((n, 3)) < p
    return Examples(generator.integers(0, 5, (n, 3)), generator.integers(0, 5, (n, 3)), mask)


def tiny_gpt():
    return cllm.GPT(cllm.GPTConfig(vocab_size=5, block_size=3, n_layer=1, n_head=1, n_embd=8), seed=1)


# Batches -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 5000), st.integers(0, 5))
def test_the_order_of_examples(n, batch_size, index, seed):
    """Each epoch shows each example once; a batch may span epochs; nothing depends on earlier calls."""
    places = order(index, batch_size, n, seed)
    assert places.shape == (batch_size,)
    singles = [order(index * batch_size + i, 1, n, seed)[0] for i in range(batch_size)]
    assert places.tolist() == singles
    epoch = [order(n * (index % 7) + i, 1, n, seed)[0] for i in range(n)]
    assert sorted(epoch) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [order(i, 40, 40, seed).tolist() for i in range(3) for seed in (1, 2)]
    assert len({tuple(o) for o in orders}) == 6


def test_a_feed_of_examples():
    data = Examples(np.arange(7), 2 * np.arange(7), np.arange(7) % 2 == 0)
    source = feed(data, "data")
    full = source.batch(3, "full", seed=5)
    assert full.inputs.tolist() == list(range(7)) and full.mask.sum() == 4
    batch = source.batch(1, 5, seed=5)
    assert len(batch) == 5 and (batch.targets == 2 * batch.inputs).all()
    assert (batch.mask == (batch.inputs % 2 == 0)).all()
    assert [len(part) for part in source.batches(3)] == [3, 3, 1]
    assert np.concatenate([part.inputs for part in source.batches(3)]).tolist() == list(range(7))
    assert source.position(3, 5) == {"index": 3, "epoch": 2, "sample": 1}
    assert source.position(3, "full") == {"index": 3, "epoch": 3, "sample": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cllm.Batch([1, 2], [1]), r"inputs are \(2,\) and targets \(1,\), they must have as many"),
        (lambda: cllm.Batch(1, 1), r"as many examples on their first axes"),
        (lambda: cllm.Batch([1, 2], [1, 2], [1, 0]), r"mask is int64 \(2,\), it must be bool of .* \(2,\)"),
        (lambda: cllm.Batch([1, 2], [1, 2], [True]), r"mask is bool \(1,\)"),
    ],
)
def test_bad_batches(make, message):
    with pytest.raises(InputError, match=message):
        make()


class Wrong(Examples):
    def __getitem__(self, indices):
        return super().__getitem__(indices[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": object()}, "model is a object, it must be a cllm.nn.Module"),
        ({"train": 3}, r"train is a int, it must be a dataset: len\(d\) and d\[indices\] -> cllm.Batch"),
        ({"train": []}, "a task's train has no examples"),
        ({"train": cllm.data.Tokens(np.zeros(9, np.uint8))}, "need a model with a config.block_size"),
        ({"evals": {"train": cells()}}, "an eval's name is 'train', it must be a word"),
        ({"evals": {"a.b": cells()}}, "an eval's name is 'a.b'"),
        ({"evals": {"val": []}}, "the eval 'val' has no examples"),
        ({"loss": "mse"}, "loss is 'mse', it must be a function"),
        ({"metrics": {"loss": len}}, 'a metric is named "loss", which a record holds already'),
        ({"metrics": {"acc": metrics.Accuracy}}, "'acc' is the class Accuracy, give an object of it"),
        ({"metrics": {"tokens": len}}, 'a metric is named "tokens"'),
        ({"metrics": {"acc": 3}}, "'acc' is a int, it must be a function"),
    ],
)
def test_bad_tasks_are_one_sentence(change, message):
    with pytest.raises(InputError, match=message) as caught:
        Task(**{"model": nn.Linear(3, 2), "train": cells(), **change})
    assert "\n" not in str(caught.value)


# Training and evaluation ---------------------------------------------------------------------------------


def test_a_run_of_a_task(folder):
    trainer, summary = fit("run")
    lines = untimed("run")
    training = [r for r in lines if r["split"] == "train"]
    assert [r["step"] for r in training] == list(range(1, 21))
    assert list(training[1]) == ["step", "split", "loss", "lr", "grad_norm", "smooth"]
    evaluated = [(r["step"], r["split"]) for r in lines if r["split"] != "train"]
    assert evaluated == [(step, split) for step in (5, 10, 15, 20) for split in ("val", "other")]
    assert list(lines[-1]) == ["step", "split", "loss", "near", "smooth"]  # a loss of its own: no perplexity
    assert training[-1]["loss"] < training[0]["loss"]
    sha256 = hashlib.sha256(Path("my.py").read_bytes()).hexdigest()
    assert summary["files"] == {"my.py": sha256} and summary["examples"] == 20 * 8
    assert summary["val_loss"] == lines[-2]["loss"] and summary["best"]["val_loss"] <= summary["val_loss"]
    assert len(list(Path("run/files").iterdir())) == 1 and not Path("run/tokenizer.json").exists()
    state = checkpoint.load(checkpoint.newest("run"))[2]
    assert state["files"] == summary["files"] and state["callbacks"] == [{"mean": lines[-1]["smooth"]}]
    assert state["position"] == {"index": 20, "epoch": 3, "sample": 10}
    assert trainer.description == "8 parameters on my.py:build (50 examples), 20 steps of 8 examples"


def test_the_trainers_loss_is_total_over_total(folder):
    """The first step by hand: the mean over all that counts, and its gradient."""
    fit("run", train__grad_accum=3, train__max_steps=1, optim__name="sgd", optim__grad_clip=0)
    cllm.manual_seed(1337)
    task = load_mine().build(None)
    batch = task.train.batch(0, 24, 1337)
    total, count = load_mine().squares(task.model, batch)
    loss = total / count
    loss.backward()
    first = untimed("run")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = np.sqrt(sum((p.grad**2).sum() for p in task.model.parameters()))
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


def load_mine():
    from cllm import userfile

    return sys.modules[userfile.load("my.py:build", "task.build").__module__]


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(1, 24), (4, 6), (8, 3), (12, 2)])
def test_any_split_into_micro_batches_trains_the_same(folder, batch_size, grad_accum):
    base = {"train__max_steps": 6, "task__n": 40}
    fit("whole", train__batch_size=24, **base)
    fit("split", train__batch_size=batch_size, train__grad_accum=grad_accum, **base)
    for a, b in zip(untimed("whole"), untimed("split"), strict=True):
        assert a.pop("split") == b.pop("split") and a == pytest.approx(b, rel=1e-4)
    weights = [saved.load(name)[0].state_dict() for name in ("whole", "split")]
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [np.ones(3), np.array([3]), None, "x", float("nan"), -1, [3], {}])
def test_a_count_that_is_none_is_one_sentence(count):
    """The same for a task's loss and for a function's metric."""
    model = nn.Linear(3, 2)
    data = Examples(np.ones((4, 3), np.float32), np.zeros(4, int))
    message = r"^the task's loss returned a Tensor \(\) and .*, it must return a Tensor of one sum and a c"
    with pytest.raises(InputError, match=message):
        cllm.evaluate(model, data, loss=lambda model, batch: (model(batch.inputs).sum(), count))
    with pytest.raises(InputError, match=r"^<lambda> returned .*, it must return \(sum, count\): two num"):
        metrics.Mean(lambda outputs, batch: (1.0, count)).update(np.ones(4), np.ones(4))


def test_counts_may_be_numbers_of_any_kind():
    for count in (3, 3.0, np.int32(3), np.array(3), cllm.Tensor(np.array(3.0))):
        mean = metrics.Mean(lambda outputs, batch, count=count: (6, count))
        mean.update(np.ones(4), np.ones(4))
        assert mean.compute() == 2.0
        found = cllm.task.checked_loss((cllm.Tensor(np.array(6.0)), count))
        assert found[1] == 3 and type(found[1]) is float


def test_a_step_that_counts_nothing_has_loss_0_and_no_gradient(tmp_path):
    data = cells()
    data.all.mask[:] = False
    task = Task(tiny_gpt(), data, {"val": cells(seed=1)})
    before = task.model.flat_data.copy()
    config = configs.load(None, {
        **SHORT, "run.dir": str(tmp_path / "run"), "train.max_steps": 2, "optim.weight_decay": 0.0,
        "train.grad_accum": 2,
    })  # fmt: skip
    train.Trainer(config, task, progress=Silent()).fit()
    first = untimed(tmp_path / "run")[0]
    assert first["loss"] == 0 and first["grad_norm"] == 0
    np.testing.assert_array_equal(task.model.flat_data, before)


def test_an_eval_that_counts_nothing_is_an_error(tmp_path):
    data = cells()
    data.all.mask[:] = False
    with pytest.raises(InputError, match="the eval 'val' has no target that counts"):
        fit(tmp_path / "run", task=Task(tiny_gpt(), cells(), {"val": data}))
    with pytest.raises(InputError, match="nothing to evaluate counts"):
        cllm.evaluate(tiny_gpt(), data)


def test_language_modelling_leaves_out_what_is_masked():
    model, batch = tiny_gpt(), cells().all
    logits = model(batch.inputs).data[batch.mask].astype(np.float64)
    picked = np.take_along_axis(logits, batch.targets[batch.mask][:, None], 1)[:, 0]
    expected = (np.log(np.exp(logits).sum(1)) - picked).sum()
    total, count = language_loss(model, batch)
    assert count == batch.mask.sum() and total.item() == pytest.approx(expected, rel=1e-5)

    class Plain(nn.Module):  # a model without a loss of its own: its outputs are the logits
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, inputs):
            return self.inner(inputs)

    for reduction in ("sum", "none"):
        a, b = (language_loss(m, batch, reduction)[0].data for m in (model, Plain()))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    ignored = cllm.Batch(batch.inputs, np.where(batch.mask, batch.targets, -100))
    assert language_loss(model, ignored)[1] == count


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 64])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size):
    def right(outputs, batch):
        return (outputs.data.argmax(-1) == batch.targets)[batch.mask].sum(), batch.mask.sum()

    def rare(outputs, batch):
        return 1.0, 0

    def squares(model, batch):
        return (model(batch.inputs) ** 2.0).sum(), 15 * len(batch)

    measured = {"right": right, "accuracy": metrics.Accuracy(), "each": metrics.F1(None), "rare": rare}
    model, data = tiny_gpt(), cells()
    whole = cllm.evaluate(model, data, metrics=measured)
    each = [f"each.{i}" for i in range(5)]
    assert list(whole) == ["loss", "perplexity", "right", "accuracy", *each, "tokens"]
    assert whole["right"] == whole["accuracy"] and whole["tokens"] == data.all.mask.sum()
    assert cllm.evaluate(model, data, batch_size, metrics=measured) == pytest.approx(whole, rel=1e-6)
    own = cllm.evaluate(model, data, batch_size, loss=squares)
    assert own == pytest.approx({"loss": (model(data.all.inputs).data ** 2).mean(), "tokens": 300}, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_masked_targets_of_any_integer_type(dtype):
    """-100 is no class of them, though uint8 has 156 and uint16 65436."""
    data = cells()
    batch = cllm.Batch(data.all.inputs, data.all.targets.astype(dtype), data.all.mask)
    for model in (tiny_gpt(), nn.Embedding(5, 200)):
        loss, count = language_loss(model, batch)
        each, _ = language_loss(model, cllm.Batch(data.all.inputs, data.all.targets), "none")
        assert count == data.all.mask.sum()
        assert loss.item() == pytest.approx(each.data[data.all.mask].sum(), rel=1e-5)


def test_a_streaming_metric_is_given_what_counts():
    class Seen:
        def reset(self):
            self.n, self.masks = 0, []

        def update(self, outputs, targets, mask):
            self.n += len(targets)
            self.masks.append(mask)

        def compute(self):
            return {"n": self.n}

    seen, data = Seen(), cells()
    ignored = np.where(data.all.targets == 2, -100, data.all.targets)
    for mask, expected in ((data.all.mask, data.all.mask & (ignored != -100)), (None, ignored != -100)):
        result = cllm.evaluate(tiny_gpt(), Examples(data.all.inputs, ignored, mask), 8, metrics={"s": seen})
        assert result["s.n"] == 20
        np.testing.assert_array_equal(np.concatenate(seen.masks), expected)
    cllm.evaluate(tiny_gpt(), Examples(data.all.inputs, data.all.targets), metrics={"s": seen})
    assert seen.masks == [None]


def test_label_smoothing_and_z_loss_are_of_training_alone(tmp_path, text_file):
    base = {
        **SHORT, "data.source": str(text_file), "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16,
        "model.block_size": 16, "train.max_steps": 2, "train.metrics": ["accuracy", "bits_per_byte"],
    }  # fmt: skip
    changes = {"none": {}, "smooth": {"loss.label_smoothing": 0.2}, "z": {"loss.z_loss": 0.1}}
    for name, value in changes.items():
        config = configs.load(None, {**base, **value, "run.dir": str(tmp_path / name)})
        train.Trainer(config, progress=Silent()).fit()
    none, smooth, z = (untimed(tmp_path / name) for name in ("none", "smooth", "z"))
    assert none[0]["loss"] < z[0]["loss"] and none[0]["loss"] != smooth[0]["loss"]
    text = cllm.data.load(text_file)
    for name, lines in {"none": none, "smooth": smooth, "z": z}.items():
        model, _ = saved.load(tmp_path / name)
        assert lines[-1]["loss"] == cllm.evaluate(model, text.val)["loss"]
        assert lines[-1]["perplexity"] == pytest.approx(np.exp(lines[-1]["loss"]))
        assert list(lines[-1])[2:] == ["loss", "perplexity", "accuracy", "bits_per_byte"]
        assert lines[-1]["bits_per_byte"] == pytest.approx(lines[-1]["loss"] / np.log(2), rel=0.01)


def test_the_best_checkpoint_follows_val_or_else_the_first_eval(tmp_path):
    for names, followed in ((("a", "val"), "val"), (("a", "b"), "a"), ((), "val")):
        run_dir = tmp_path / "-".join(("run", *names))
        task = Task(tiny_gpt(), cells(), {name: cells(seed=i) for i, name in enumerate(names, 1)})
        _, summary = fit(run_dir, task=task)
        found = [(r["loss"], r["step"]) for r in untimed(run_dir) if r["split"] == followed]
        if names:
            assert summary["best"] == {"step": min(found)[1], f"{followed}_loss": min(found)[0]}
            assert summary[f"{followed}_loss"] == found[-1][0]
            best = checkpoint.load(checkpoint.best(run_dir))[2]
            assert best["step"] == min(found)[1]
        else:
            assert summary["best"] is None and summary["val_loss"] is None


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(folder):
    bad = MINE.replace("return (d * d).sum(),", "return (d * d).sum() * (1 if model.training else np.nan),")
    (folder / "my.py").write_text(bad)
    _, summary = fit("eval")
    assert summary["state"] == "failed" and summary["error"] == "the validation loss is nan after step 5"
    (folder / "my.py").write_text(MINE.replace("(d * d).sum(),", "(d * d).sum() * np.inf,"))
    _, summary = fit("train")
    assert summary["state"] == "failed" and re.match("the loss is inf and", summary["error"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return (d * d).sum(), batch.mask.sum()", "return (d * d).sum()", "loss returned a Tensor, it must"),
        ("(d * d).sum(), batch", "d * d, batch", r"loss returned a Tensor \(8, 2\) and the count \d+, it"),
        ("batch.mask.sum()\n\n\ndef near", "-1\n\n\ndef near", r"a Tensor \(\) and the count -1"),
        ("< 0.5)[batch.mask].sum(), batch", "< 0.5), batch", "near returned a tuple, it must return .sum"),
        ("cllm.Batch(self.x[i], self.y[i], self.mask[i])", "self.x[i]", "gave a ndarray, it must give a cll"),
        ("self.x[i], self.y[i]", "self.x[i[1:]], self.y[i[1:]]", "bool|as many"),
        ('return {"mean": self.mean}', "return {1, 2}", "state_dict.. of the callback Smooth must be of"),
    ],
)
def test_what_a_task_returns_is_checked(folder, old, new, message):
    assert old in MINE
    (folder / "my.py").write_text(MINE.replace(old, new))
    with pytest.raises(InputError, match=message):
        fit("run")
    assert records.Run("run").state == "failed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss__z_loss": 0.1}, r"\[loss\] is set, but the task has a loss of its own"),
        ({"train__sample_interval": 5}, "train.sample_interval is 5, but the task has no tokenizer"),
        ({"train__metrics": ["bits_per_byte"]}, "byte_lengths is None"),
        ({"task__build": "my.py:near"}, "task.batch is missing, my.py:near has no default for it"),
        ({"task__build": "my.py:np"}, "task.build is 'my.py:np', which is a module, not a function"),
        ({"task__build": "my.py:Smooth"}, "task.build: my.py:Smooth must take config before its own arg"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(folder, overrides, message):
    with pytest.raises(InputError, match=message):
        fit("run", **overrides)
    assert not Path("run").exists()


def test_what_build_returns_is_checked(folder):
    (folder / "my.py").write_text("def build(config):\n    return 3\n")
    with pytest.raises(InputError, match=r"my.py:build returned a int, it must return a cllm.Task"):
        fit("run")
    assert not Path("run").exists()


def test_a_model_that_comes_in_eval_mode_is_trained_in_train_mode(tmp_path):
    first = []
    for mode in (True, False):
        config = cllm.GPTConfig(vocab_size=5, block_size=3, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
        model = cllm.GPT(config, seed=1)
        model.train(mode)
        fit(tmp_path / f"{mode}", task=Task(model, cells()))
        first.append(untimed(tmp_path / f"{mode}"))
    assert first[0] == first[1] and model.training


def test_a_run_leaves_nothing_behind_in_a_users_file(folder):
    """Its variables are new in each run of a process, and the same for all that the run takes from it."""
    (folder / "my.py").write_text(
        MINE
        + """
generator = np.random.default_rng(0)
layer = nn.Linear(3, 2)
made = []

class Mine(cllm.optim.SGD):
    def step(self):
        assert made == [1]
        super().step()

def random(config):
    made.append(1)
    task = build(config)
    task.model = layer
    task.model.weight.data += generator.standard_normal((2, 3)).astype(np.float32)
    return task
"""
    )
    for name in "ab":
        fit(name, task__build="my.py:random", optim__name="my.py:Mine")
    with pytest.raises(Killed):
        fit("c", [kill_at(12)], task__build="my.py:random", optim__name="my.py:Mine")
    train.resume("c", progress=Silent())
    assert untimed("a") == untimed("b") == untimed("c")


def test_the_speed_is_in_examples(folder, monkeypatch):
    monkeypatch.setattr(train, "perf_counter", itertools.count().__next__)
    fit("run", train__grad_accum=2, train__threads=1)
    found = [r for r in records.Run("run").records if r["split"] == "train"]
    # Seven parts of a second each: data, twice forward and backward, the gradients' sum, the optimizer.
    assert {r["examples_per_s"] for r in found} == {16 / 7} and not any("tokens_per_s" in r for r in found)
    assert found[0]["time_forward"] == 2 and found[0]["time_sum"] == 1
    with pytest.raises(InputError, match='a metric is named "examples_per_s"'):
        Task(nn.Linear(3, 2), cells(), metrics={"examples_per_s": len})
    assert progress._speed(found[0], "examples") == ["2 examples/s"]
    assert len(progress._figures(found[0], 4)) == 2  # loss and smooth


def test_samples_need_a_models_block_size(tmp_path):
    task = Task(nn.Linear(3, 2), cells(), tokenizer=object())
    message = r"^train.sample_interval is 5, but the task's model has no config.block_size$"
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "run", task=task, **{"train.sample_interval": 5})
    assert not (tmp_path / "run").exists()


# Kill and resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 12, 15])
def test_killed_and_resumed_equals_never_stopped(folder, step):
    fit("unstopped")
    with pytest.raises(Killed):
        fit("killed", callbacks=[kill_at(step)])
    summary = train.resume("killed", progress=Silent())
    assert summary["state"] == "finished"
    assert untimed("unstopped") == untimed("killed")
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000020/{name}.safetensors"
        assert Path("unstopped", file).read_bytes() == Path("killed", file).read_bytes()
    state, other = (checkpoint.load(checkpoint.newest(run))[2] for run in ("unstopped", "killed"))
    assert state["callbacks"] == other["callbacks"]


def test_a_changed_file_is_refused_with_the_way_on(folder):
    with pytest.raises(Killed):
        fit("run", callbacks=[kill_at(12)])
    (folder / "my.py").write_text(MINE.replace("n=50", "size=50"))  # even its arguments do not fit any more
    before = Path("run/metrics.jsonl").read_bytes()
    message = r"^my.py has changed since run was trained with it; put back .* (run/files/my-\w+\.py)"
    with pytest.raises(InputError, match=message) as caught:
        train.resume("run", progress=Silent())
    assert Path("run/metrics.jsonl").read_bytes() == before
    # To be looked at, the model is made with the copy that the run keeps.
    model, _ = saved.load("run")
    (folder / "my.py").rename(folder / "elsewhere.py")
    again, _ = saved.load("run")
    for name, array in model.state_dict().items():
        assert array.tobytes() == again.state_dict()[name].tobytes()
    kept = re.search(message, str(caught.value))[1]
    (folder / "my.py").write_bytes(Path(kept).read_bytes())
    assert train.resume("run", progress=Silent())["state"] == "finished"
    (folder / "my.py").write_text(MINE + "# a remark\n")
    with pytest.raises(InputError, match=r"my.py has changed since"):
        train.resume("run", {"train.max_steps": 30}, progress=Silent())


def test_all_files_of_a_run_are_watched(folder):
    """An optimizer's and an attention's, too."""
    (folder / "attention.py").write_text((ROOT / "docs/examples/attention_variant.py").read_text())
    (folder / "rules.py").write_text((ROOT / "docs/examples/optimizer.py").read_text())
    keys = {"optim.name": "rules.py:SignSGD", "model.attention": "attention.py:GatedAttention"}
    config = configs.load(None, keys)
    assert user_files(config) == {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in ("rules.py", "attention.py")
    }
    assert user_files(configs.load()) == {}


def test_a_run_without_a_checkpoint_starts_again_with_the_new_file(folder):
    with pytest.raises(Killed):
        fit("run", callbacks=[kill_at(3)])
    (folder / "my.py").write_text(MINE.replace('"near"', '"close"'))
    assert train.resume("run", progress=Silent())["state"] == "finished"
    assert untimed("run")[-1].keys() >= {"close"} and len(list(Path("run/files").iterdir())) == 1


def test_a_task_made_in_python_is_resumed_from_python(tmp_path):
    class Counter:
        n = 0

        def __call__(self, trainer, record):
            self.n += 1
            record["n"] = self.n

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    def make():
        return Task(tiny_gpt(), cells(), {"val": cells(seed=1)})

    run_dir = tmp_path / "run"
    fit(tmp_path / "unstopped", [Counter()], make())
    with pytest.raises(Killed):
        fit(run_dir, [Counter(), kill_at(13)], make())
    with pytest.raises(InputError, match=r"trained on a task made in Python; to go on: cllm.train.resume\("):
        train.resume(run_dir)
    with pytest.raises(InputError, match=r"saved with 1 callbacks with a state_dict.*, and goes on with 0"):
        train.resume(run_dir, task=make())
    more = Task(tiny_gpt(), cells(n=21))
    with pytest.raises(InputError, match=r"the task has 21 training examples, and .* was trained on 20"):
        train.resume(run_dir, task=more, callbacks=[Counter()])
    train.resume(run_dir, task=make(), callbacks=[Counter()], progress=Silent())
    assert untimed(run_dir) == untimed(tmp_path / "unstopped")
    with pytest.raises(InputError, match="task made in Python: give it again, as task="):
        saved.load(run_dir)
    model, tokenizer = saved.load(run_dir, task=make())
    assert tokenizer is None and cllm.evaluate(model, cells(seed=1))["loss"] == untimed(run_dir)[-1]["loss"]
    with pytest.raises(InputError, match=r"task is given, and task.build names another"):
        config = configs.load(None, {"task.build": f"{ROOT}/experiments/grokking.py:build"})
        train.Trainer(config, task=make())


# A loop of the user's own ----------------------------------------------------------------------------------

LOOP = '''
import os, signal
import numpy as np

def train(config, run, rate=0.5, stop_at=0, fail_at=0):
    """Newton's method for the square root of 2, by hand."""
    found = run.restore()
    step, x, seen = 0, np.array([9.0]), []
    if found is not None:
        step, arrays, state = found
        x, seen = arrays["x"], state["seen"]
    while step < config.train.max_steps and not run.stop:
        x = x - rate * (x * x - 2) / (2 * x)
        step += 1
        seen.append(step)
        run.log(step, "train", loss=(x[0] ** 2 - 2) ** 2, n=len(seen))
        if step == fail_at:
            raise RuntimeError("on purpose")
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        if step % 3 == 0:
            run.log(step, "val", loss=abs(x[0] - 2**0.5), seed=run.seed)
            run.save(step, {"x": x}, {"seen": seen})
    if run.stop:
        run.save(step, {"x": x}, {"seen": seen})
'''


def loop(run_dir, **overrides):
    more = {key.replace("__", "."): value for key, value in overrides.items()}
    config = configs.load(None, {
        "task.run": "loop.py:train", "train.max_steps": 10, "run.dir": str(run_dir), **more
    })  # fmt: skip
    return train.Trainer(config, progress=Silent())


@pytest.fixture
def loop_file(folder):
    (folder / "loop.py").write_text(LOOP)
    return folder / "loop.py"


def test_a_loop_of_ones_own(loop_file):
    summary = loop("run").fit()
    lines = untimed("run")
    assert [r["step"] for r in lines if r["split"] == "val"] == [3, 6, 9]
    assert summary["state"] == "finished" and summary["step"] == 10
    assert summary["val_loss"] == lines[-2]["loss"] and lines[-2]["seed"] == 1337
    assert summary["best"] == {"step": 9, "val_loss": summary["val_loss"]}
    assert summary["train_loss"] == lines[-1]["loss"] and list(summary["files"]) == ["loop.py"]
    assert [p.name for p in sorted(Path("run/checkpoints").iterdir())] == ["step-00000006", "step-00000009"]
    assert train.resume("run") == summary
    with pytest.raises(InputError, match=r"by loop.py:train, which alone knows its model; .*step-00000009"):
        saved.load("run")
    longer = train.resume("run", {"train.max_steps": 12}, progress=Silent())
    assert longer["step"] == 12
    assert [r["n"] for r in untimed("run") if r["split"] == "train"] == list(range(1, 13))


@pytest.mark.parametrize("step", [2, 7])
def test_a_failed_loop_is_marked_and_resumed(loop_file, step):
    loop("unstopped").fit()
    with pytest.raises(RuntimeError, match="on purpose"):
        loop("run", task__fail_at=step).fit()
    assert records.Run("run").summary["error"] == "RuntimeError: on purpose"
    text = Path("run/config.toml").read_text()
    Path("run/config.toml").write_text(text.replace(f"fail_at = {step}", "fail_at = 0"))
    train.resume("run", progress=Silent())
    assert untimed("run") == untimed("unstopped")


def test_ctrl_c_in_a_loop_saves_and_is_resumed(loop_file):
    loop("unstopped").fit()
    command = [sys.executable, "-m", "cllm"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["train", "--task.run", "loop.py:train", "--task.stop-at", "5", "--train.max-steps", "10"]
    done = subprocess.run(
        [*command, *words, "--run.dir", "run"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 130 and "interrupted at step 5; continue with: cllm resume run" in done.stdout
    assert not Path("run/summary.json").exists()
    done = subprocess.run([*command, "resume", "run"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 5: loop.py:train, 10 steps" in done.stdout
    assert untimed("run") == untimed("unstopped")


def test_a_loop_that_restores_nothing_starts_again(loop_file):
    loop_file.write_text(LOOP.replace("found = run.restore()", "found = None"))
    loop("unstopped").fit()
    with pytest.raises(RuntimeError):
        loop("run", task__fail_at=7).fit()
    text = Path("run/config.toml").read_text()
    Path("run/config.toml").write_text(text.replace("fail_at = 7", "fail_at = 0"))
    train.resume("run", progress=Silent())
    assert untimed("run") == untimed("unstopped")


def test_a_loop_that_restores_nothing_leaves_nothing_of_the_process_before(loop_file):
    loop_file.write_text(LOOP.replace("found = run.restore()", "found = None"))
    with pytest.raises(RuntimeError):
        loop("run", task__fail_at=7).fit()
    assert checkpoint.newest("run").name == "step-00000006"
    text = Path("run/config.toml").read_text()
    Path("run/config.toml").write_text(text.replace("fail_at = 7", "fail_at = 2"))
    with pytest.raises(RuntimeError):
        train.resume("run", progress=Silent())
    assert checkpoint.newest("run") is None
    summary = records.Run("run").summary
    assert (summary["step"], summary["best"], summary["val_loss"]) == (2, None, None)
    assert [r["step"] for r in untimed("run")] == [1, 2]


def test_a_loop_that_only_saves_starts_again_too(loop_file):
    loop_file.write_text("""
import numpy as np
def train(config, run, first=9):
    run.save(first, {"x": np.zeros(2)})
    assert first == 1
""")
    with pytest.raises(AssertionError):
        loop("run").fit()
    text = Path("run/config.toml").read_text()
    Path("run/config.toml").write_text(text.replace("first = 9", "first = 1"))
    assert train.resume("run", progress=Silent())["step"] == 1
    assert checkpoint.newest("run").name == "step-00000001"


def test_a_loops_seed_is_its_randomness(loop_file):
    """Whatever ran in the process before."""
    loop_file.write_text("""
import numpy as np
from cllm import Tensor, nn
from cllm import functional as F
before = nn.Linear(3, 2)
def train(config, run):
    layer = nn.Linear(3, 2)
    dropped = F.dropout(Tensor(np.ones(64, np.float32)), 0.5)
    run.log(0, "val", a=before.weight.data.sum(), b=layer.weight.data.sum(), c=dropped.data @ np.arange(64))
""")
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        loop(name, train__seed=seed).fit()
    assert untimed("a") == untimed("c")
    one, two = untimed("a")[0], untimed("b")[0]
    assert all(one[key] != two[key] for key in "abc")
    assert one["a"] == one["b"]  # seeded for the function, whatever its file drew


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run.log(-1, 'train', loss=1.0)", "step is -1, it must be an integer of at least 0"),
        ("run.log(2, 'train', loss=1.0); run.log(1, 'train', loss=1.0)", "step is 1 after 2"),
        ("run.log(1, 'a.b', loss=1.0)", "split is 'a.b', it must be a word without a dot"),
        ("run.log(1, 'train', loss='x')", "loss is a str, it must be one number"),
        ("run.log(1, 'train', loss=[1.0, 2.0])", "loss is a list, it must be one number"),
        ("run.log(1, 'train', loss=[1.0, [2.0]])", "loss is a list, it must be one number"),
        ("import cllm; run.log(1, 'train', loss=cllm.Tensor([1.0, 2]))", "loss is a Tensor, it must be one"),
        ("run.log(1, 'train', loss=1.0); run.restore()", "something was logged or saved before"),
        ("run.save(1, {'x': 'y'})", "'x' is a str, it must be an array of numbers"),
        ("run.save(1, {}, {1, 2})", "state must be of JSON values"),
        ("run.save(1.5, {})", "step is 1.5"),
    ],
)
def test_what_a_loop_gives_is_checked(loop_file, line, message):
    loop_file.write_text(f"def train(config, run):\n    {line}\n")
    with pytest.raises(InputError, match=message):
        loop("run").fit()
    assert records.Run("run").state == "failed"


def test_a_loops_numbers(loop_file):
    """NaN, NumPy's numbers, a best that follows the first split until there is "val"."""
    loop_file.write_text("""
import numpy as np
import cllm
def train(config, run):
    run.log(0, "other", loss=np.float32(0.5))
    run.save(0, {"x": np.zeros(2)})
    run.log(1, "train", loss=float("nan"), n=np.int64(3), x=cllm.Tensor([0.5]))
    run.log(1, "val", loss=4.0)
    run.save(1, {"x": np.zeros(2)})
    run.log(2, "val", loss=float("nan"))
    run.log(3, "val", loss=5)
    run.save(3, {"x": np.zeros(2)})
""")
    summary = loop("run").fit()
    assert summary["train_loss"] is None and summary["val_loss"] == 5
    assert summary["best"] == {"step": 1, "val_loss": 4.0}
    assert checkpoint.best("run").name == "step-00000001"
    assert records.Run("run").series("train", "n")[1].tolist() == [3]
    assert records.Run("run").series("train", "x")[1].tolist() == [0.5]
    assert np.isnan(records.Run("run").series("val", "loss")[1]).tolist() == [False, True, False]
    assert {path.name for path in figures.for_directory("run")} >= {"loss_curves.png"}


def test_callbacks_have_no_place_in_a_loop(loop_file):
    trainer = loop("run")
    trainer.given_callbacks = (print,)
    with pytest.raises(InputError, match=r"task.run is a loop of its own, which calls none"):
        trainer.fit()
    trainer.given_callbacks = ()
    trainer.fit()
    longer = {"train.max_steps": 12}
    with pytest.raises(InputError, match=r"task.run is a loop of its own, which calls none"):
        train.resume("run", longer, callbacks=[print])
    with pytest.raises(InputError, match=r"task is given, but task.run is a loop of its own"):
        train.resume("run", longer, task=Task(nn.Linear(3, 2), cells()))


# The command line ------------------------------------------------------------------------------------------


def run_cllm(capsys, *words):
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_modular_addition_is_learnt(tmp_path, monkeypatch, capsys):
    """End to end: cllm train, resume, plot, sample and load on the experiment, made smaller."""
    monkeypatch.chdir(ROOT)
    run_dir = tmp_path / "run"
    words = [
        "--task.p", "11", "--task.train-share", "0.8", "--model.n-embd", "64", "--optim.lr", "3e-3",
        "--train.max-steps", "250", "--train.threads", "1", "--task.norms", "true",
        "--model.activation", "gelu", "--optim.grad-clip", "1",
    ]  # fmt: skip
    status, out, err = run_cllm(capsys, "train", GROKKING, *words, "--run.dir", run_dir)
    assert (status, err) == (0, "")
    assert re.search(r"on experiments/grokking.py:build \(97 examples\), 250 steps of 97 examples", out)
    assert re.search(r"^step 250: val loss \d\.\d{4}, perplexity \d\.\d\d, accuracy \d\.\d{4}$", out, re.M)
    assert re.search(r"next: cllm plot ", out)
    run = records.Run(run_dir)
    assert run.series("seen", "accuracy")[1][-1] == 1
    assert run.series("val", "accuracy")[1][-1] > 0.8  # chance is 0.09; 1.0 seen
    assert run.config["task.p"] == 11 and run.config["task.train_share"] == 0.8

    model, tokenizer = cllm.load(run_dir)
    assert tokenizer is None
    logits = model(np.array([[3, 9, 11]])).data[0, -1]
    assert len(logits) == 12 and not model.training
    status, out, err = run_cllm(capsys, "sample", run_dir, "--prompt", "3")
    assert status == 2 and err == f"cllm: {run_dir} has no tokenizer, so it has no text to continue\n"
    status, out, _ = run_cllm(capsys, "plot", run_dir)
    assert {Path(line).name for line in out.split()} == {
        "loss_curves.png", "loss_curves.svg", "metric_curves.png", "metric_curves.svg"
    }  # fmt: skip
    figure = figures.metric_curves([run])
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    status, out, _ = run_cllm(capsys, "resume", run_dir)
    assert status == 0 and "is finished after 250 steps" in out


SWEEP = """
[sweep]
seeds = [0]
objective = "{objective}"
goal = "maximize"
[base.task]
build = "my.py:build"
[base.schedule]
warmup_steps = 0
min_lr = 0.0
[base.train]
batch_size = "full"
max_steps = 10
[[space]]
"task.n" = [10, 40]
"optim.lr" = [0.01, 0.1]
"""


def test_a_sweep_over_a_tasks_arguments(folder, capsys):
    (folder / "sweep.toml").write_text(SWEEP.format(objective="val.near"))
    status, out, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s", "--workers", "2")
    assert (status, err) == (0, "")
    with open("s/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task.n"], row["optim.lr"], row["state"]) for row in rows] == [
        ("10", "0.01", "finished"), ("10", "0.1", "finished"), ("40", "0.01", "finished"),
        ("40", "0.1", "finished"),
    ]  # fmt: skip
    found = [run.series("val", "near")[1][-1] for run in records.load("s")]
    assert [float(row["val.near"]) for row in rows] == found
    assert "It has val.near" in out
    status, out, _ = run_cllm(capsys, "plot", "s")
    names = {Path(line).stem for line in out.split()}
    assert names == {
        "val.near-against-task.n", "val.near-against-optim.lr", "val.near-over-task.n-and-optim.lr",
        "loss_curves", "metric_curves",
    }  # fmt: skip

    (folder / "my.py").write_text(MINE + "# a remark\n")
    Path("s/trials/s003-seed0/summary.json").unlink()
    status, _, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s")
    assert status == 2 and "my.py has changed since s000-seed0 was trained with it" in err


def test_an_objective_that_no_task_records_is_told_after_the_first_trial(folder, capsys):
    (folder / "sweep.toml").write_text(SWEEP.format(objective="val.naer"))
    status, _, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s", "--workers", "1")
    assert status == 2 and err.count("\n") == 1
    assert 'sweep.objective is "val.naer" (did you mean "val.near"?), but s000-seed0 has recorded' in err
    assert not Path("s/trials/s003-seed0/summary.json").exists()  # the others were not run in vain
    (folder / "sweep.toml").write_text(SWEEP.format(objective="val.near"))
    status, out, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s", "--workers", "1")
    assert status == 0 and "1 trial of 4 done already and kept" in out
    (folder / "sweep.toml").write_text(SWEEP.format(objective="other.near"))
    status, out, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s")  # judged anew, not trained
    assert status == 0 and "other.near" in Path("s/results.csv").read_text()


def test_a_sweep_goes_on_when_the_users_file_is_mended(folder, capsys):
    """Where nothing was trained with the old one, not even to a checkpoint; its arguments may change, too."""
    (folder / "sweep.toml").write_text(SWEEP.format(objective="val.near"))
    (folder / "my.py").write_text(MINE.replace("    d = (model", "    1 / 0\n    d = (model"))
    words = ["sweep", "sweep.toml", "--run.dir", "s", "--workers", "1"]
    run_cllm(capsys, *words)
    assert records.Run("s/trials/s000-seed0").state == "failed"
    (folder / "my.py").write_text(MINE.replace('name="line"', "slope=1.0"))
    status, _, err = run_cllm(capsys, *words)
    assert (status, err) == (0, "")
    found = records.load("s")
    assert [run.state for run in found] == ["finished"] * 4
    assert all(run.config["task.slope"] == 1.0 and "task.name" not in run.config for run in found)


def test_a_trial_with_a_checkpoint_refuses_another_file(folder, capsys):
    text = SWEEP.format(objective="val.near").replace("[base.train]", "[base.train]\ncheckpoint_interval = 2")
    (folder / "sweep.toml").write_text(text)
    bad = MINE.replace(
        "def __call__(self, trainer, record):",
        """def __call__(self, trainer, record):
        assert trainer.step < 5""",
    )
    (folder / "my.py").write_text(bad)
    words = ["sweep", "sweep.toml", "--run.dir", "s", "--workers", "1"]
    run_cllm(capsys, *words)
    assert checkpoint.newest("s/trials/s000-seed0").name == "step-00000004"
    (folder / "my.py").write_text(MINE)
    status, _, err = run_cllm(capsys, *words)
    assert status == 2 and "my.py has changed since s000-seed0 was trained with it" in err


def test_a_sweep_of_a_loop(loop_file, capsys):
    text = SWEEP.format(objective="val.loss").replace('build = "my.py:build"', 'run = "loop.py:train"')
    text = text.replace('"task.n" = [10, 40]\n"optim.lr" = [0.01, 0.1]', '"task.rate" = [0.5, 1.0]')
    (loop_file.parent / "sweep.toml").write_text(text.replace("maximize", "minimize"))
    status, out, err = run_cllm(capsys, "sweep", "sweep.toml", "--run.dir", "s", "--workers", "2")
    assert (status, err) == (0, "") and "best of 2 settings is task.rate = 1.0" in out


def test_an_error_in_a_users_file_shows_their_traceback(folder, capsys):
    words = ["train", "--task.build", "my.py:build", "--train.max-steps", "200", "--run.dir"]
    (folder / "my.py").write_text(MINE.replace("    return cllm.Task(", "    1 / 0\n    return cllm.Task("))
    status, out, err = run_cllm(capsys, *words, "a")
    lines = err.splitlines()
    assert (status, out) == (1, "") and not Path("a").exists()
    assert lines[0].startswith("Traceback") and 'my.py", line ' in lines[1]
    assert lines[-1] == "ZeroDivisionError: division by zero" and "cllm/" not in err
    (folder / "my.py").write_text(MINE.replace("    d = (model", "    open('none.txt')\n    d = (model"))
    status, out, err = run_cllm(capsys, *words, "b")
    assert status == 1 and err.splitlines()[-1].startswith("FileNotFoundError")
    assert records.Run("b").state == "failed" and "failed at step 0: FileNotFoundError" in out
    (folder / "my.py").write_text("import cllm\ndef build(config):\n    raise cllm.InputError('n is odd')\n")
    status, out, err = run_cllm(capsys, *words, "c")
    assert (status, err) == (2, "cllm: n is odd\n")
    (folder / "my.py").write_text(MINE + "\n  x = 1\n")
    status, out, err = run_cllm(capsys, *words, "d")
    assert status == 1 and err.splitlines()[-1].startswith("IndentationError") and "cllm/" not in err
