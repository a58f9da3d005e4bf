"""Runs measured afterwards, the best checkpoint, and ends that an evaluation brings."""

import math
import re

import numpy as np
import pytest

import cllm
from cllm import checkpoint, cli, metrics, nn, records, rng, saved
from cllm import config as configs
from cllm.data import Examples, Tokens
from cllm.data.batch import feed
from cllm.errors import InputError
from cllm.progress import Silent
from cllm.train import Trainer, resume

BASE = {
    "data.val_fraction": 0.2, "data.test_fraction": 0.1, "model.n_layer": 1, "model.n_head": 2,
    "model.n_embd": 16, "model.block_size": 16, "schedule.warmup_steps": 2, "train.batch_size": 4,
    "train.max_steps": 12, "train.eval_interval": 3, "train.checkpoint_interval": 0, "train.threads": 1,
}  # fmt: skip


@pytest.fixture
def text_path(tmp_path):
    words = np.random.default_rng(0).choice(["loss", "norm", "ratio", "layer"], 1500)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def folder(tmp_path):
    """Thirty documents of 3 to 90 characters."""
    place = tmp_path / "texts"
    place.mkdir()
    for i in range(30):
        (place / f"{i:02}.txt").write_text(f"<{i:02}{'ab ' * i}>")
    return place


def fit(source, run_dir, callbacks=(), task=None, **changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**BASE, "run.dir": str(run_dir), **more}
    values |= {"data.source": str(source)} if source is not None else {}
    trainer = Trainer(configs.load(None, values), task, callbacks, progress=Silent())
    return trainer, trainer.fit()


def logits_and_targets(model, tokens, block_size=16):
    """Of all of a split, window by window: (n, V) and (n,)."""
    model.eval()
    rows = []
    for inputs, targets in tokens.windows(block_size, 7):
        logits = model(inputs).data
        rows.append((logits.reshape(-1, logits.shape[-1]).astype(np.float64), targets.ravel()))
    logits, targets = (np.concatenate(part) for part in zip(*rows))
    return logits[targets >= 0], targets[targets >= 0]


# A run afterwards -----------------------------------------------------------------------------------


def test_whole_splits_with_the_catalogue(tmp_path, text_path):
    trainer, summary = fit(text_path, tmp_path / "run", train__metrics=["accuracy"])
    (split,) = saved.evaluate(tmp_path / "run").items()
    assert split[0] == "val" and split[1]["loss"] == summary["val_loss"] and split[1]["step"] == 12
    assert split[1].keys() == {"step", "loss", "perplexity", "accuracy", "tokens"}
    last = records.Run(tmp_path / "run").records[-1]
    assert last["split"] == "val" and last["accuracy"] == split[1]["accuracy"]

    for name in ("train", "val", "test"):
        found = saved.evaluate(tmp_path / "run", split=name, measured=metrics.BY_NAME)[name]
        tokens = getattr(trainer.text, name)
        assert found["tokens"] == len(tokens) - 1
        logits, targets = logits_and_targets(trainer.model, tokens)
        shifted = logits - logits.max(-1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(targets)), targets]
        predicted = logits.argmax(-1)
        assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
        assert found["accuracy"] == np.mean(predicted == targets)
        assert found["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)  # all ASCII
        ranks = (logits > logits[np.arange(len(targets)), targets][:, None]).sum(-1)
        assert found["top5"] == np.mean(ranks < 5)
        f1 = []
        for kind in np.union1d(predicted, targets):
            right = np.sum((predicted == kind) & (targets == kind))
            f1.append(2 * right / (np.sum(predicted == kind) + np.sum(targets == kind)))
        assert found["f1"] == pytest.approx(np.mean(f1))


def test_another_text_in_the_runs_tokens(tmp_path, text_path, capsys):
    fit(text_path, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("norm layer loss ratio " * 30)
    found = saved.evaluate(tmp_path / "run", other)[str(other)]
    assert found["tokens"] == 22 * 30 - 1
    assert cli.main(["eval", str(tmp_path / "run"), "--data.source", str(other), "--metrics", "top5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"step 12: {other} loss {found['loss']:.6g}, perplexity ") and "top5 " in out
    other.write_text("norm")
    with pytest.raises(InputError, match=rf"{other} split has 4 tokens, too short for block_size = 16"):
        saved.evaluate(tmp_path / "run", other)


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_documents_are_cut_as_the_run_cuts_them(tmp_path, folder, packing):
    trainer, summary = fit(folder, tmp_path / "run", data__packing=packing)
    val = saved.evaluate(tmp_path / "run")["val"]
    mask = np.concatenate([b.mask.ravel() for b in feed(trainer.text.val, "val", 16).batches(5)])
    assert val["tokens"] == mask.sum() and val["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    # The folder as another text: no document's first token counts.
    found = saved.evaluate(tmp_path / "run", folder)[str(folder)]
    contents = [path.read_text() for path in sorted(folder.iterdir())]
    breaks = len(contents) - 1  # a line break behind each but the last
    assert found["tokens"] == sum(len(text) - 1 for text in contents) + breaks
    # One file is one document.
    alone = tmp_path / "alone.txt"
    alone.write_text(contents[-1])
    found = saved.evaluate(tmp_path / "run", alone)[str(alone)]
    assert found["tokens"] == len(contents[-1]) - 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        rng.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(cllm.Tensor(x))


def squares(model, batch):
    difference = model(batch.inputs) - cllm.Tensor(batch.targets)
    return (difference * difference).sum(), difference.data.size


def lines_task():
    x = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    parts = [Examples(x[i : i + 20], x[i : i + 20, :2] * 2 + 1) for i in (0, 20, 40)]
    near = {"near": lambda outputs, batch: (np.sum(np.abs(outputs.data - batch.targets) < 1), 2 * len(batch))}
    evals = {"val": parts[1], "shifted": parts[2]}
    return cllm.Task(Net(), parts[0], evals, loss=squares, metrics=near)


def test_a_task_of_ones_own(tmp_path):
    trainer, _ = fit(None, tmp_path / "run", task=lines_task())
    with pytest.raises(InputError, match="task made in Python: give it again"):
        saved.evaluate(tmp_path / "run")
    found = saved.evaluate(tmp_path / "run", task=lines_task())
    assert list(found) == ["val", "shifted"]
    last = {r["split"]: r for r in records.Run(tmp_path / "run").records}
    for name, values in found.items():
        assert values["loss"] == last[name]["loss"] and values["near"] == last[name]["near"]
        assert "perplexity" not in values
    train = saved.evaluate(tmp_path / "run", split="train", task=lines_task())["train"]
    everything = trainer.task.train.dataset.all
    assert train["loss"] == pytest.approx(squares(trainer.model, everything)[0].item() / 40, rel=1e-6)
    with pytest.raises(InputError, match=r"split is 'test', .* has train and val and shifted"):
        saved.evaluate(tmp_path / "run", split="test", task=lines_task())


def test_a_task_of_tokens(tmp_path):
    def build():
        tokens = np.random.default_rng(0).integers(0, 9, 400)
        model = cllm.GPT(cllm.GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8), seed=0)
        parts = Tokens(tokens[:200]), Tokens(tokens[200:], end=4), Tokens(tokens[200:], end=4, padded=True)
        return cllm.Task(model, parts[0], {"packed": parts[1], "padded": parts[2]})

    fit(None, tmp_path / "run", task=build())
    found = saved.evaluate(tmp_path / "run", task=build())
    last = {r["split"]: r for r in records.Run(tmp_path / "run").records}
    for name in ("packed", "padded"):
        assert found[name]["loss"] == pytest.approx(last[name]["loss"], rel=1e-6)
    assert found["packed"]["tokens"] == found["padded"]["tokens"]


def test_a_changed_text_is_told(tmp_path, text_path):
    fit(text_path, tmp_path / "run", train__max_steps=2)
    text_path.write_text(text_path.read_text() + " loss")
    with pytest.raises(InputError, match=r"has changed since .*cllm eval .* --data.source"):
        saved.evaluate(tmp_path / "run")


# The best checkpoint --------------------------------------------------------------------------------


def spoil(after):
    """A callback that makes the weights worse and worse after a step."""

    def callback(trainer, record):
        if record["split"] == "train" and record["step"] > after:
            for parameter in trainer.model.parameters():
                parameter.data[...] *= 2

    return callback


@pytest.mark.parametrize("checkpoint_interval", [0, 1])
def test_the_best_checkpoint_stays_and_can_be_measured(tmp_path, text_path, capsys, checkpoint_interval):
    changes = {"train__checkpoint_interval": checkpoint_interval, "train__keep_checkpoints": 1}
    _, summary = fit(text_path, tmp_path / "run", [spoil(6)], **changes)
    steps, losses = records.Run(tmp_path / "run").series("val", "loss")
    best = int(steps[losses.argmin()])
    assert best == 6 and losses[-1] > losses.min()
    assert summary["best"] == {"step": best, "val_loss": losses.min()}
    kept = [checkpoint.step_of(path) for path in checkpoint.listed(tmp_path / "run")]
    assert kept == [6, 12]
    found = saved.evaluate(tmp_path / "run", checkpoint="best")["val"]
    assert found["step"] == 6 and found["loss"] == losses.min()
    assert saved.evaluate(tmp_path / "run")["val"]["loss"] == losses[-1]
    assert cli.main(["eval", str(tmp_path / "run"), "--checkpoint", "best"]) == 0
    assert capsys.readouterr().out.startswith("step 6: val loss ")
    a, b = (saved.load(tmp_path / "run", which)[0].state_dict() for which in ("best", "last"))
    assert any(not np.array_equal(a[name], b[name]) for name in a)


# Early stopping -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def stops_early(run_dir, text_path, kill_at=None):
    """A run that gets worse after step 6 and has patience for two evaluations: at steps 9 and 12."""

    def kill(trainer, record):
        if record["split"] == "train" and record["step"] == kill_at:
            raise Killed

    changes = {"train__patience": 2, "train__max_steps": 30, "train__checkpoint_interval": 2}
    return fit(text_path, run_dir, [spoil(6), kill], **changes)


def test_a_run_ends_after_its_patience(tmp_path, text_path):
    trainer, summary = stops_early(tmp_path / "run", text_path)
    assert (summary["state"], summary["step"], summary["best"]["step"]) == ("finished", 12, 6)
    newest = checkpoint.newest(tmp_path / "run")
    assert newest.name == "step-00000012" and checkpoint.best(tmp_path / "run").name == "step-00000006"
    for name, array in checkpoint.load(newest)[0].items():
        assert array.tobytes() == trainer.model.state_dict()[name].tobytes()


@pytest.mark.parametrize("kill_at", [4, 8, 10, 12])
def test_patience_outlives_a_kill(tmp_path, text_path, kill_at):
    stops_early(tmp_path / "whole", text_path)
    with pytest.raises(Killed):
        stops_early(tmp_path / "killed", text_path, kill_at)
    summary = resume(tmp_path / "killed", callbacks=[spoil(6)], progress=Silent())
    assert (summary["state"], summary["step"]) == ("finished", 12)
    for name in checkpoint.ARRAY_FILES:
        ours, whole = (checkpoint.newest(tmp_path / run) / name for run in ("killed", "whole"))
        assert ours.read_bytes() == whole.read_bytes()


def test_patience_without_evaluations_ends_nothing(tmp_path, text_path):
    more = {"data__val_fraction": 0.0, "data__test_fraction": 0.0}
    _, summary = fit(text_path, tmp_path / "run", train__patience=1, **more)
    assert summary["step"] == 12 and summary["best"] is None


# Bad words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "vall"], "split is 'vall', .* has train and val and test"),
        (["--metrics", "acuracy"], 'metrics has "acuracy" .*accuracy'),
        (["--data.source", "nothing.txt"], "nothing.txt"),
        (["--data.source", "other.txt"], "'X'"),
        (["--data.source", "other.txt", "--split", "val"], "data.source is given, and split is 'val'"),
    ],
)
def test_bad_words_of_eval(tmp_path, text_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    fit(text_path, tmp_path / "run", train__max_steps=2)
    (tmp_path / "other.txt").write_text("XYZ" * 100)
    assert cli.main(["eval", "run", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err
