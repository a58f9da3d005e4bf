"""The Trainer: the same bits at any thread count, after a kill and resume, and clear ends of bad runs."""

import gc
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cllm
from cllm import config as configs
from cllm import data, kernels, optim, progress, records, rng, schedules, train
from cllm.errors import InputError
from cllm.evaluation import evaluate
from cllm.progress import Silent
from cllm.saved import load
from cllm.tensor import Tensor
from cllm.train import Trainer, resume

SENTENCE = "to be or not that is the question whether nobler in mind suffer slings and arrows"


@pytest.fixture
def text_path(tmp_path):
    """About 20 kB of made-up text."""
    chosen = np.random.default_rng(0).choice(SENTENCE.split(), 4000)
    path = tmp_path / "words.txt"
    path.write_text("\n".join(" ".join(chosen[i : i + 8]) for i in range(0, 4000, 8)), encoding="utf-8")
    return path


def tiny(text_path, run_dir, **overrides):
    """A run of 20 steps that takes well under a second; keys with __ for the dot."""
    values = {
        "data.source": str(text_path), "run.dir": str(run_dir),
        "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 16,
        "model.dropout": 0.1, "optim.lr": 3e-3, "schedule.warmup_steps": 5,
        "train.batch_size": 4, "train.max_steps": 20, "train.eval_interval": 10,
        "train.checkpoint_interval": 7,
    }  # fmt: skip
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return configs.load(None, values)


def fit(config, **options):
    trainer = Trainer(config, progress=Silent(), **options)
    return trainer, trainer.fit()


def weights(run_dir):
    return load(run_dir)[0].state_dict()


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def untimed(run_dir):
    """The records as written, without timing fields."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not records.is_timing(k)} for line in lines]


def snapshot(run_dir):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(run_dir.rglob("*"))
    }


class Killed(Exception):
    pass


def kill_at(step):
    def callback(trainer, record):
        if trainer.step == step:
            raise Killed

    return callback


# What a run leaves -----------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(tmp_path, text_path):
    run_dir = tmp_path / "run"
    trainer, summary = fit(tiny(text_path, run_dir))
    assert {path.name for path in run_dir.iterdir()} == {
        "config.toml", "metrics.jsonl", "summary.json", "tokenizer.json", "checkpoints",
    }  # fmt: skip
    assert configs.load(run_dir / "config.toml") == trainer.config
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["state"] == "finished" and summary["step"] == 20
    assert summary["tokens"] == 20 * 4 * 16
    assert summary["parameters"] == sum(p.data.size for p in trainer.model.parameters())
    assert summary["memory_peak_mb"] > 10

    lines = untimed(run_dir)
    for record in records.load(run_dir)[0].records:
        inside = {key for key in record if key.startswith(("grad_norm.", "update_ratio"))}
        assert record.keys() - inside == {"step", "split", *train.METRICS[record["split"]]}
        assert bool(inside) == (record["step"] == 1)  # of the default 50
    training = [r for r in lines if r["split"] == "train"]
    assert [r["step"] for r in training] == list(range(1, 21))
    schedule = trainer.config.schedule
    assert [r["lr"] for r in training] == [schedules.at(schedule, i, 3e-3, 20) for i in range(20)]
    assert [r["step"] for r in lines if r["split"] == "val"] == [10, 20]
    assert lines[-1]["perplexity"] == pytest.approx(np.exp(lines[-1]["loss"]))
    assert summary["val_loss"] == lines[-1]["loss"] and summary["train_loss"] == training[-1]["loss"]
    assert training[-1]["loss"] < training[0]["loss"]

    # The newest two checkpoints; the best evaluation was the last one.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-00000014", "step-00000020"]
    (run,) = records.load(run_dir)
    steps, losses = run.series("val", "loss")
    assert steps.tolist() == [10, 20] and losses[-1] == summary["val_loss"]


def test_evaluation_is_the_mean_over_the_whole_split(tmp_path, text_path):
    _, summary = fit(tiny(text_path, tmp_path / "run"))
    model, tokenizer = load(tmp_path / "run")
    text = data.load(text_path)
    assert tokenizer.vocab_size == text.vocab_size and not model.training
    tokens = text.val.array.astype(np.int64)
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        loss = model.loss(window[None, :-1], window[None, 1:], reduction="sum")
        total += loss.item()
    assert evaluate(model, text.val)["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
    assert summary["val_loss"] == evaluate(model, text.val)["loss"]
    assert evaluate(model, text.val)["tokens"] == len(tokens) - 1
    assert evaluate(model, text.val, batch_size=3)["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_models_mode_as_it_was(text_path, mode):
    text = data.load(text_path)
    config = cllm.GPTConfig(vocab_size=text.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    model = cllm.GPT(config, seed=1)
    model.train(mode)
    evaluate(model, text.val)
    assert model.training is mode and {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "full"])
def test_evaluations_batch_size_is_a_positive_integer(text_path, batch_size):
    text = data.load(text_path)
    config = cllm.GPTConfig(vocab_size=text.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16)
    with pytest.raises(InputError, match=rf"^batch_size is {batch_size!r}, it must be an integer of at"):
        evaluate(cllm.GPT(config, seed=1), text.val, batch_size)


def test_best_checkpoint_is_kept(tmp_path, text_path):
    # The model is wiped out after a good start, so the best evaluation is an early one.
    config = tiny(
        text_path, tmp_path / "run", train__max_steps=30, train__eval_interval=5,
        train__checkpoint_interval=10,
    )  # fmt: skip

    def wipe_out(trainer, record):
        if trainer.step >= 12:
            trainer.model.flat_data[...] = 0

    _, summary = fit(config, callbacks=[wipe_out])
    _, losses = records.load(tmp_path / "run")[0].series("val", "loss")
    best = 5 * (1 + int(np.argmin(losses)))
    assert best <= 10 and summary["best"] == {"step": best, "val_loss": losses.min()}
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"step-{best:08d}" in names and "step-00000030" in names and len(names) == 3
    text = data.load(text_path)
    assert evaluate(load(tmp_path / "run", "best")[0], text.val)["loss"] == losses.min()
    assert evaluate(load(tmp_path / "run", "last")[0], text.val)["loss"] == losses[-1]


def test_by_hand_equals_trainer(tmp_path, text_path):
    trainer, _ = fit(tiny(text_path, tmp_path / "run", model__dropout=0.0, train__max_steps=10))
    config = trainer.config
    text = data.load(text_path)
    model = cllm.GPT(trainer.model.config, seed=config.train.seed)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(10):
        tokens, targets = text.train.batch(step, batch_size=4, block_size=16, seed=1337)
        model.loss(tokens, targets).backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedules.cosine(step, lr=3e-3, warmup_steps=5, max_steps=10, min_lr=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    for name, array in trainer.model.state_dict().items():
        np.testing.assert_allclose(model.state_dict()[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_micro_batches_by_hand_give_the_same_bits(tmp_path, text_path):
    """With dropout, whose masks follow from (seed, step, micro-batch); the gradients summed as a tree."""
    trainer, _ = fit(tiny(text_path, tmp_path / "run", train__grad_accum=5, train__max_steps=3))
    text = data.load(text_path)
    model = cllm.GPT(trainer.model.config, seed=1337)
    optimizer = optim.build(trainer.config.optim, model.named_parameters())
    for step, record in enumerate(r for r in untimed(tmp_path / "run") if r["split"] == "train"):
        batches = [text.train.batch(5 * step + micro, 4, 16, 1337) for micro in range(5)]
        total, leaves = 0.0, []
        for micro, (tokens, targets) in enumerate(batches):
            rng.set_stream(1337, step, micro)
            loss = model.loss(tokens, targets, reduction="sum")
            total += loss.item()
            (loss * (1.0 / (5 * 4 * 16))).backward()
            leaves.append([p.grad.copy() for p in model.parameters()])
            model.zero_grad()
        assert record["loss"] == total / (5 * 4 * 16)
        for p, (a, b, c, d, e) in zip(model.parameters(), zip(*leaves)):
            p.grad = ((a + b) + (c + d)) + e
        assert record["grad_norm"] == optim.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        optimizer.step()
        optimizer.zero_grad()


def test_grad_accum_equals_the_big_batch(tmp_path, text_path):
    base = {"model__dropout": 0.0, "train__max_steps": 10}
    fit(tiny(text_path, tmp_path / "big", train__batch_size=8, **base))
    fit(tiny(text_path, tmp_path / "split", train__batch_size=2, train__grad_accum=4, **base))
    for a, b in zip(untimed(tmp_path / "big"), untimed(tmp_path / "split")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        if a["split"] == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_full_batch_is_every_window(tmp_path, text_path):
    trainer, summary = fit(tiny(text_path, tmp_path / "run", train__batch_size="full", train__max_steps=2))
    n = trainer.text.train.n_windows(16)
    assert summary["tokens"] == 2 * n * 16


def test_grad_clip_zero_is_off_and_the_norm_is_still_recorded(tmp_path, text_path):
    base = {"train__max_steps": 3, "model__dropout": 0.0, "optim__name": "sgd", "optim__lr": 0.1}
    fit(tiny(text_path, tmp_path / "off", optim__grad_clip=0.0, **base))
    fit(tiny(text_path, tmp_path / "loose", optim__grad_clip=1e9, **base))
    fit(tiny(text_path, tmp_path / "tight", optim__grad_clip=0.01, **base))
    off, loose, tight = (untimed(tmp_path / name) for name in ("off", "loose", "tight"))
    assert off == loose
    assert off[0]["grad_norm"] == tight[0]["grad_norm"] > 0.01  # before clipping
    assert off[0]["loss"] == tight[0]["loss"]
    assert off[2]["loss"] < tight[2]["loss"]


def test_without_validation_there_is_no_evaluation(tmp_path, text_path):
    _, summary = fit(tiny(text_path, tmp_path / "run", data__val_fraction=0.0))
    assert summary["val_loss"] is None and summary["best"] is None
    assert {r["split"] for r in untimed(tmp_path / "run")} == {"train"}


def test_metrics_are_recorded_and_leave_the_rest_as_it_was(tmp_path, text_path):
    fit(tiny(text_path, tmp_path / "without"))
    fit(tiny(text_path, tmp_path / "with", train__metrics=["accuracy", "top5", "perplexity"]))
    lines = untimed(tmp_path / "with")
    evaluated = [r for r in lines if r["split"] == "val"]
    assert all(list(r) == ["step", "split", "loss", "perplexity", "accuracy", "top5"] for r in evaluated)
    assert 0 < evaluated[-1]["accuracy"] < evaluated[-1]["top5"] < 1
    model, _ = load(tmp_path / "with")
    tokens = data.load(text_path).val.array.astype(np.int64)
    n = (len(tokens) - 1) // 16 * 16
    right = model(tokens[:n].reshape(-1, 16)).data.argmax(-1).ravel() == tokens[1 : n + 1]
    rest = model(tokens[None, n:-1]).data.argmax(-1).ravel() == tokens[n + 1 :] if n + 1 < len(tokens) else []
    assert evaluated[-1]["accuracy"] == (right.sum() + np.sum(rest)) / (len(tokens) - 1)
    for record in evaluated:
        del record["accuracy"], record["top5"]
    assert lines == untimed(tmp_path / "without")


def test_callbacks_add_keys_and_stop(tmp_path, text_path):
    def callback(trainer, record):
        record["seen"] = trainer.step
        if trainer.step == 12:
            trainer.stop = True

    _, summary = fit(tiny(text_path, tmp_path / "run"), callbacks=[callback])
    assert summary["state"] == "finished" and summary["step"] == 12
    lines = untimed(tmp_path / "run")
    assert all(r["seen"] == r["step"] for r in lines)
    assert lines[-1]["split"] == "val" and lines[-1]["step"] == 12
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir()


def test_what_callbacks_add_may_be_a_tensor_or_is_named(tmp_path, text_path, capsys):
    def callback(trainer, record):
        record["x"] = Tensor(trainer.step / 2) if trainer.step < 12 else {"a", "b"}

    with pytest.raises(InputError, match=r"^a record's 'x' is a set, it must be .* JSON can hold$"):
        Trainer(tiny(text_path, tmp_path / "run"), callbacks=[callback], progress=progress.Lines()).fit()
    found = [r["x"] for r in untimed(tmp_path / "run") if r["split"] == "train"]
    assert found == [n / 2 for n in range(1, 12)]
    assert "x 5.0000" in capsys.readouterr().out


# The same bits ---------------------------------------------------------------------------------------


def test_one_and_two_threads_give_the_same_bits(tmp_path, text_path):
    size = {"model__n_embd": 64, "model__block_size": 64, "train__batch_size": 12, "train__max_steps": 50}
    before = cllm.get_num_threads()
    for threads in (1, 2):
        fit(tiny(text_path, tmp_path / f"{threads}", train__threads=threads, **size))
        assert cllm.get_num_threads() == before
    assert_same_weights(weights(tmp_path / "1"), weights(tmp_path / "2"))
    assert untimed(tmp_path / "1") == untimed(tmp_path / "2")


@pytest.fixture
def unstopped(tmp_path, text_path):
    fit(tiny(text_path, tmp_path / "unstopped", train__max_steps=100, train__checkpoint_interval=30))
    return tmp_path / "unstopped"


@pytest.mark.parametrize("step", [60, 67])
def test_killed_and_resumed_equals_never_stopped(tmp_path, text_path, unstopped, step):
    run_dir = tmp_path / "killed"
    config = tiny(text_path, run_dir, train__max_steps=100, train__checkpoint_interval=30)
    with pytest.raises(Killed):
        fit(config, callbacks=[kill_at(step)])
    assert records.load(run_dir)[0].state == "failed"
    summary = resume(run_dir, progress=Silent())
    assert summary["state"] == "finished" and summary["step"] == 100
    assert_same_weights(weights(unstopped), weights(run_dir))
    assert untimed(unstopped) == untimed(run_dir)
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (path / "checkpoints" / "step-00000100" / name for path in (unstopped, run_dir))
        assert a.read_bytes() == b.read_bytes()


KILLED_BY_SIGNAL = """
import os, signal, sys
from cllm import config, progress, train

def kill(trainer, record):
    if trainer.step == 60 and record["split"] == "train":
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

train.Trainer(config.load(sys.argv[1]), callbacks=[kill], progress=progress.Lines()).fit()
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_killed_by_a_signal_and_resumed_equals_never_stopped(tmp_path, text_path, unstopped, name):
    run_dir = tmp_path / "killed"
    config = tiny(text_path, run_dir, train__max_steps=100, train__checkpoint_interval=25)
    path = tmp_path / "config.toml"
    path.write_text(configs.to_toml(configs.to_dict(config)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BY_SIGNAL, path, name], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode != 0
    assert not (run_dir / "summary.json").exists()
    if name == "SIGINT":
        # Ctrl-C waits for the end of the step and saves it.
        assert f"interrupted at step 60; continue with: cllm resume {run_dir}" in done.stdout
        assert (run_dir / "checkpoints" / "step-00000060").is_dir()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "split": "tr')  # a torn last line
    resume(run_dir, progress=Silent())
    assert_same_weights(weights(unstopped), weights(run_dir))
    assert untimed(unstopped) == untimed(run_dir)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, text_path):
    fit(tiny(text_path, tmp_path / "a"))
    with pytest.raises(Killed):
        fit(tiny(text_path, tmp_path / "b"), callbacks=[kill_at(4)])
    assert not list((tmp_path / "b").glob("checkpoints/*"))
    (tmp_path / "b" / "tokenizer.json").write_text("of another text")
    resume(tmp_path / "b", progress=Silent())
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, text_path, unstopped):
    run_dir = tmp_path / "killed"
    config = tiny(text_path, run_dir, train__max_steps=100, train__checkpoint_interval=30)
    with pytest.raises(Killed):
        fit(config, callbacks=[kill_at(67)])
    newest = sorted((run_dir / "checkpoints").iterdir())[-1] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000060"):
        resume(run_dir, progress=Silent())
    assert untimed(unstopped) == untimed(run_dir)


def test_finished_resume_changes_nothing(tmp_path, text_path):
    run_dir = tmp_path / "run"
    _, summary = fit(tiny(text_path, run_dir))
    before = snapshot(run_dir)
    assert resume(run_dir, progress=Silent()) == summary
    assert resume(run_dir, {"train.max_steps": 20}, progress=Silent()) == summary
    assert snapshot(run_dir) == before


def test_resume_with_more_steps_goes_on(tmp_path, text_path):
    run_dir = tmp_path / "run"
    fit(tiny(text_path, run_dir, schedule__name="constant"))
    summary = resume(run_dir, {"train.max_steps": 25}, progress=Silent())
    assert summary["step"] == 25 and configs.load(run_dir / "config.toml").train.max_steps == 25
    assert [r["step"] for r in untimed(run_dir) if r["split"] == "train"] == list(range(1, 26))


def test_resume_completes_a_run_that_lacks_only_its_summary(tmp_path, text_path):
    run_dir = tmp_path / "run"
    _, summary = fit(tiny(text_path, run_dir))
    (run_dir / "summary.json").unlink()
    again = resume(run_dir, progress=Silent())
    for key in ("state", "step", "train_loss", "val_loss", "best", "tokens", "parameters"):
        assert again[key] == summary[key]


# Bad input -------------------------------------------------------------------------------------------


def test_resume_refuses_what_would_be_another_run(tmp_path, text_path):
    run_dir = tmp_path / "run"
    fit(tiny(text_path, run_dir, schedule__name="constant"))
    before = snapshot(run_dir)
    with pytest.raises(InputError, match=r"^model.n_layer cannot change when a run is resumed, only"):
        resume(run_dir, {"model.n_layer": 3})
    with pytest.raises(InputError, match=r"train.max_steps is 10, but .* has done 20 steps already"):
        resume(run_dir, {"train.max_steps": 10})
    with pytest.raises(InputError, match="holds no run"):
        resume(tmp_path)
    (run_dir / "summary.json").write_text('{"state": "fin')
    with pytest.raises(InputError, match=r"summary.json is not a JSON file"):
        resume(run_dir)
    (run_dir / "summary.json").write_bytes(before[run_dir / "summary.json"][1])
    before = snapshot(run_dir)
    text_path.write_text(text_path.read_text() + " more words to be")
    with pytest.raises(InputError, match=r"words.txt has changed since"):
        resume(run_dir, {"train.max_steps": 30})
    assert snapshot(run_dir) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__source": "missing.txt"}, r"missing.txt"),
        ({"data__source": "python-stdlb"}, r'python-stdlb.*did you mean "python-stdlib"'),
        ({"data__tokenizer": "chr"}, r'chr.*did you mean "char"'),
        ({"model__block_size": 50000}, r"train split has \d+ tokens.*block_size = 50000"),
        ({"data__val_fraction": 1e-4}, r"val split has \d+ tokens"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, text_path, overrides, message):
    with pytest.raises((InputError, OSError), match=message):
        fit(tiny(text_path, tmp_path / "run", **overrides))
    assert not (tmp_path / "run").exists()


def test_used_directory_is_refused(tmp_path, text_path):
    run_dir = tmp_path / "run"
    fit(tiny(text_path, run_dir))
    before = snapshot(run_dir)
    with pytest.raises(InputError, match=rf"already holds a run.*`cllm resume {re.escape(str(run_dir))}`"):
        fit(tiny(text_path, run_dir))
    assert snapshot(run_dir) == before
    with pytest.raises(InputError, match="is a file"):
        fit(tiny(text_path, text_path))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.toml").touch()
    with pytest.raises(InputError, match="holds a sweep"):
        fit(tiny(text_path, tmp_path / "sweep"))


def test_bad_arguments_are_refused(text_path, tmp_path):
    with pytest.raises(InputError, match=r"task is a object, it must be a cllm.Task"):
        Trainer(tiny(text_path, tmp_path / "run"), task=object())
    config = tiny(text_path, tmp_path / "run")
    for callbacks, message in (
        (3, r"^callbacks is a int, it must be a list of functions: callbacks=\[f\]$"),
        (print, r"^callbacks is a builtin_function_or_method, it must be a list"),
        ([3], r"^callbacks has 3, each must be a function f\(trainer, record\)$"),
        ([Silent], r"^callbacks has the class Silent, give an object of it$"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(config, callbacks=callbacks)
    with pytest.raises(InputError, match=r"^config is a NoneType, it must be a cllm.Config, a dict"):
        Trainer(None)
    assert Trainer({"run": {"dir": "x"}, "optim.lr": 0.5}).config == configs.load(
        None, {"run.dir": "x", "optim.lr": 0.5}
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"train\.threads is 100000, it must be at most 1024"):
        tiny(text_path, tmp_path / "run", train__threads=100000)


def test_default_directory_is_the_first_free_one(tmp_path, text_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (1, 2):
        trainer, _ = fit(tiny(text_path, "", train__max_steps=1), name="char")
        assert str(trainer.run_dir) == f"runs/char-{n}" == trainer.config.run.dir


def test_load_without_a_checkpoint(tmp_path, text_path):
    with pytest.raises(Killed):
        fit(tiny(text_path, tmp_path / "run"), callbacks=[kill_at(2)])
    with pytest.raises(InputError, match=r"no complete checkpoint.*cllm resume"):
        load(tmp_path / "run")
    with pytest.raises(InputError, match='must be "last" or "best"'):
        load(tmp_path / "run", "first")


def test_diverged_run_fails_with_its_reason(tmp_path, text_path):
    config = tiny(
        text_path, tmp_path / "run", optim__name="sgd", optim__lr=1e30, optim__grad_clip=0.0,
        schedule__warmup_steps=0, train__eval_interval=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer, summary = fit(config)
    assert summary["state"] == "failed" and summary["step"] == trainer.step < 20
    assert re.match(rf"the loss is .* in step {trainer.step + 1} at learning rate", summary["error"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert untimed(tmp_path / "run")[-1]["step"] == summary["step"]


# What is shown ---------------------------------------------------------------------------------------


def test_plain_lines(tmp_path, text_path, capsys):
    config = tiny(text_path, tmp_path / "run", train__sample_interval=10)
    Trainer(config).fit()
    out = capsys.readouterr().out
    assert re.search(r"^training: [\d.]+k parameters on .*words.txt", out)
    assert len(re.findall(r"^step \d+/20: loss", out, re.M)) == 10
    assert len(re.findall(r"^step \d+: val loss", out, re.M)) == 2
    samples = re.findall(r"^step (?:10|20): (?!val)(.*)$", out, re.M)
    assert len(samples) == 2 and all(20 < len(line) <= train.SAMPLE_LENGTH for line in samples)
    assert re.search(r"finished 20 steps: val loss .*peak memory \d+ MB.*next: cllm sample", out)


def test_samples_change_nothing_and_are_the_same_again(tmp_path, text_path):
    class Samples(Silent):
        def __init__(self):
            self.lines = []

        def sample(self, step, text):
            self.lines.append((step, text))

    shown = [Samples(), Samples()]
    for i in (0, 1):
        Trainer(tiny(text_path, tmp_path / f"{i}", train__sample_interval=5), progress=shown[i]).fit()
    fit(tiny(text_path, tmp_path / "none"))
    assert shown[0].lines == shown[1].lines and len(shown[0].lines) == 4
    assert untimed(tmp_path / "0") == untimed(tmp_path / "none")


def test_samples_of_a_token_file(tmp_path, capsys):
    np.random.default_rng(0).integers(0, 50, 5000).astype("<u2").tofile(tmp_path / "tokens.bin")
    config = tiny(tmp_path / "tokens.bin", tmp_path / "run", train__sample_interval=20)
    Trainer(config).fit()
    assert re.search(r"^step 20: \d+ \d+ \d+ ", capsys.readouterr().out, re.M)


def test_bar_on_a_terminal(tmp_path, text_path):
    import io

    stream = io.StringIO()
    stream.isatty = lambda: True
    shown = progress.choose(stream)
    assert isinstance(shown, progress.Bar)
    Trainer(tiny(text_path, tmp_path / "run", train__sample_interval=10), progress=shown).fit()
    out = stream.getvalue()
    assert "20/20" in out and "tok/s" in out and "val loss" in out and "finished 20 steps" in out
    parts = r"data \d+ %, forward \d+ %, backward \d+ %, optimizer \d+ %"
    assert re.search(rf"{parts}  memory \d+ MB", out)
    assert re.search(rf"time: \S+ s of steps \({parts}\), \S+ s of evaluations, \S+ s of check", out)


@pytest.mark.parametrize("kind", [progress.Bar, progress.Lines])
def test_metrics_are_shown(tmp_path, text_path, kind):
    import io

    stream = io.StringIO()
    config = tiny(text_path, tmp_path / "run", train__metrics=["accuracy", "f1"])
    Trainer(config, progress=kind(stream)).fit()
    out = stream.getvalue()
    line = r"step \d+: val loss \S+, perplexity \S+, accuracy 0\.\d{4}, f1 0\.\d{4}"
    assert len(re.findall(line, out)) == 2
    if kind is progress.Bar:
        assert re.search(r"lr \S+  grad norm \S+  update/weight \S+  val accuracy 0\.\d{3}", out)


def test_what_a_record_says_in_a_line():
    record = {"step": 3, "split": "val", "matrix": [[1, 2]], "note": "x", "a": np.float32(0.5), "b": None}
    assert progress._evaluation_line(record) == "step 3: val a 0.5000, b nan"
    many = {"step": 3, "split": "val", "loss": 1, **{f"m{i}": i for i in range(20)}}
    assert progress._evaluation_line(many).count(",") == 7


def test_duration():
    said = [progress.duration(seconds) for seconds in (0.84, 42.2, 185, 7800)]
    assert said == ["0.8 s", "42 s", "3 min 5 s", "2 h 10 min"]


# Memory ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow(tmp_path, text_path):
    from cllm._core import pool

    seen = {}

    def measure(trainer, record):
        if record["split"] == "train" and trainer.step in (100, 2000):
            gc.collect()  # json's encoder leaves cycles with each checkpoint
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seen[trainer.step] = sys.getallocatedblocks(), sum(pool.usage()), resident

    config = tiny(
        text_path, tmp_path / "run", model__n_layer=1, model__n_embd=16, train__max_steps=2000,
        train__checkpoint_interval=0, train__eval_interval=50,
    )  # fmt: skip
    fit(config, callbacks=[measure])
    (blocks, pooled, resident), (blocks_end, pooled_end, resident_end) = seen[100], seen[2000]
    assert blocks_end - blocks < 1000  # Python objects; 1900 steps would leave several each
    assert pooled_end == pooled
    assert resident_end - resident < 4_000_000


def test_the_faster_thread_count_is_found(monkeypatch):
    """With a clock that makes two threads slow, then one: the choice follows, and tries get rarer."""
    now, slow, used = 0.0, 2, []
    before = kernels.get_num_threads()

    def step():
        nonlocal now
        used.append(kernels.get_num_threads())
        now += 10.0 if used[-1] == slow else 1.0
        return len(used)

    monkeypatch.setattr(train, "perf_counter", lambda: now)
    choice = train._ThreadChoice(2)
    try:
        assert [choice.time(step) for _ in range(300)] == list(range(1, 301))
        assert used[:6] == [2] * 5 + [1]
        assert used[6:26] == [1] * 20
        assert used.count(2) < 5 + 6  # then only tries, after 20, 40, 80 ... steps
        slow = 1
        for _ in range(700):
            choice.time(step)
        assert used[-10:].count(2) >= 9
    finally:
        kernels.set_num_threads(before)
