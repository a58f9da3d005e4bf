"""Steps that go wrong: kept, skipped or rolled back, the same after a kill, and replayed in float64."""

import errno
import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm import checkpoint, guard, nn, optim, records, rng, schedules
from cllm import config as configs
from cllm.data import Examples
from cllm.data.batch import order
from cllm.errors import InputError
from cllm.guard import Guard, GuardConfig
from cllm.progress import Silent
from cllm.replay import replay
from cllm.train import Trainer, resume

SHORT = {
    "optim.name": "adamw", "optim.lr": 0.01, "schedule.warmup_steps": 2, "train.batch_size": 4,
    "train.max_steps": 30, "train.eval_interval": 10, "train.checkpoint_interval": 5, "train.threads": 1,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        rng.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        for layer in (self.first, self.second):
            layer.weight.data[...] *= scale

    def forward(self, x):
        return self.second(self.first(cllm.Tensor(x)))


def squares(model, batch):
    difference = model(batch.inputs) - cllm.Tensor(batch.targets.astype(model.first.weight.dtype))
    return (difference * difference).sum(), difference.data.size


STEPS = (8, 17)  # those whose batch has one of the poisoned examples, in the run's first order
AT = tuple(int(order(step, 4, 200, 1337)[0]) for step in STEPS)


def task(poison=None, at=AT, n=200, scale=1.0):
    """Lines to fit; the targets of the examples `at` are `poison`."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((n, 3)).astype(np.float32)
    y = x[:, :2] * 2 + 1
    if poison is not None:
        y[list(at)] = poison
    return cllm.Task(
        model=Net(scale),
        train=Examples(x, y),
        evals={"val": Examples(x[:8], x[:8, :2] * 2 + 1)},
        loss=squares,
    )


def config_of(run_dir, **changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(None, {**SHORT, "run.dir": str(run_dir), **more})


def fit(run_dir, which, callbacks=(), **changes):
    trainer = Trainer(config_of(run_dir, **changes), which, callbacks, progress=Silent())
    return trainer, trainer.fit()


def training(run_dir):
    return [r for r in records.Run(run_dir).records if r["split"] == "train"]


def untimed(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not records.is_timing(k)} for line in lines]


# Judging --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5), st.floats(-5, 100))
def test_a_spike_is_above_mean_and_deviations(recent, loss):
    judge = Guard(GuardConfig(spike=3.0, window=5))
    for value in recent:
        assert judge.judge(value, 1.0) is None or len(judge.recent) == 5
    judge.recent.extend(recent)
    high = loss > np.mean(recent) + 3 * np.std(recent, ddof=1)
    near = math.isclose(loss, np.mean(recent) + 3 * np.std(recent, ddof=1), rel_tol=1e-9, abs_tol=1e-12)
    wrong = judge.judge(loss, 1.0)
    assert near or (wrong is not None) == high
    # What was wrong is none of the last losses.
    assert list(judge.recent) == (recent if wrong else [*recent[1:], loss])


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_is_not_finite_is_wrong(loss, norm):
    judge = Guard(GuardConfig())
    assert "the loss is" in judge.judge(loss, norm) and not judge.recent
    assert judge.judge(1.0, 1.0) is None and judge.judge(1e9, 1.0) is None  # no spike unless asked for


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "ignore"}, 'guard.policy is .*ignore.*"stop" or "skip" or "rollback"'),
        ({"spike": -1.0}, "guard.spike is -1, it must be 0 or more"),
        ({"window": 1}, "guard.window is 1, it must be at least 2"),
        ({"limit": -1}, "guard.limit is -1, it must be 0 or more"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(InputError, match=message):
        configs.load(None, {f"guard.{key}": value for key, value in values.items()})


# Policies -------------------------------------------------------------------------------------------


def test_stop_keeps_the_step(tmp_path):
    first = STEPS[0]
    trainer, summary = fit(tmp_path / "run", task(np.inf))
    assert summary["state"] == "failed"
    assert re.match(rf"the loss is inf and .* in step {first + 1} at learning rate", summary["error"])
    assert summary["step"] == first and len(training(tmp_path / "run")) == first
    (path,) = guard.incidents(tmp_path / "run")
    weights, (batch,), facts = guard.load_incident(path)
    assert path.name == f"step-{first + 1:08d}" and facts["step"] == first + 1
    assert facts["position"] == {"index": first, "epoch": 0, "sample": 4 * first} and facts["order"] == 0
    assert f"in {path}, and `cllm replay {tmp_path / 'run'}`" in summary["error"]
    for name, array in trainer.model.state_dict().items():
        assert np.isfinite(array).all() and array.tobytes() == weights[name].tobytes()
    assert np.isinf(batch["targets"]).any()
    assert batch["inputs"].tobytes() == task().train.batch(first, 4, 1337).inputs.tobytes()


def test_skip_leaves_out_the_step_and_nothing_else(tmp_path):
    at = list(STEPS)
    trainer, summary = fit(tmp_path / "run", task(np.inf), guard__policy="skip")
    assert (summary["state"], summary["step"], summary["incidents"]) == ("finished", 30, len(at))
    lines = training(tmp_path / "run")
    assert [r["step"] - 1 for r in lines if "skipped" in r] == at
    assert [r["loss"] is None for r in lines] == [step in at for step in range(30)]

    by_hand = task(np.inf)
    optimizer = optim.build(trainer.config.optim, by_hand.model.named_parameters())
    for step in range(30):
        batch = by_hand.train.batch(step, 4, 1337)
        total, count = squares(by_hand.model, batch)
        (total * (1.0 / count)).backward()
        if step not in at:
            optim.clip_grad_norm_(by_hand.model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = schedules.at(trainer.config.schedule, step, 0.01, 30)
            optimizer.step()
        optimizer.zero_grad()
    for name, array in by_hand.model.state_dict().items():
        assert array.tobytes() == trainer.model.state_dict()[name].tobytes()


def test_rollback_goes_on_from_the_checkpoint_in_another_order(tmp_path):
    trainer, summary = fit(tmp_path / "run", task(np.inf, at=AT[:1]), guard__policy="rollback")
    assert summary["state"] == "finished" and summary["incidents"] == trainer.guard.order >= 1
    lines = training(tmp_path / "run")
    assert [r["step"] for r in lines] == list(range(1, 31)) and all(r["loss"] is not None for r in lines)
    # Before the checkpoint the records are the first order's, after it another's.
    fit(tmp_path / "clean", task())
    same = [a["loss"] == b["loss"] for a, b in zip(lines, training(tmp_path / "clean"))]
    assert all(same[:5]) and not any(same[5:])  # step 9 went wrong, the checkpoint before was of 5


def test_a_run_stops_after_too_many(tmp_path):
    _, summary = fit(tmp_path / "run", task(np.inf, at=range(100)), guard__policy="skip", guard__limit=3)
    assert summary["state"] == "failed" and summary["incidents"] == 3
    assert "after 3 such steps (guard.limit)" in summary["error"]
    steps = [checkpoint.step_of(path) for path in guard.incidents(tmp_path / "run")]
    assert steps == [1, 2, 3, 4]
    more = {"guard__policy": "skip", "guard__limit": 3, "guard__keep": 2}
    fit(tmp_path / "two", task(np.inf, at=range(100)), **more)
    assert [checkpoint.step_of(path) for path in guard.incidents(tmp_path / "two")] == [3, 4]
    _, summary = fit(tmp_path / "back", task(np.inf, at=range(150)), guard__policy="rollback", guard__limit=2)
    assert summary["state"] == "failed" and summary["incidents"] == 2


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_killed_and_resumed_is_the_same(tmp_path, policy):
    class Killed(Exception):
        pass

    base = {"guard__policy": policy, "guard__spike": 8.0, "guard__window": 4}
    trainer, _ = fit(tmp_path / "whole", task(300.0), **base)
    assert trainer.guard.count > 0
    for at in (4, 9, 14, 22, 29):
        seen = []

        def kill(trainer, record, at=at, seen=seen):
            seen.append(record["step"])
            if record["split"] == "train" and record["step"] == at:
                raise Killed

        run_dir = tmp_path / f"killed-{at}"
        with pytest.raises(Killed):
            fit(run_dir, task(300.0), [kill], **base)
        resume(run_dir, task=task(300.0), progress=Silent())
        ours, whole = (checkpoint.load(checkpoint.newest(path)) for path in (run_dir, tmp_path / "whole"))
        for a, b in zip(ours[:2], whole[:2]):
            assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
        assert untimed(run_dir) == untimed(tmp_path / "whole")


def test_a_stopped_run_goes_on_with_another_policy(tmp_path):
    fit(tmp_path / "run", task(np.inf))
    with pytest.raises(InputError, match=r"optim\.lr cannot change .*, only .* \[guard\] and \[monitor\]"):
        resume(tmp_path / "run", {"optim.lr": 1e-5}, task=task(np.inf), progress=Silent())
    summary = resume(tmp_path / "run", {"guard.policy": "skip"}, task=task(np.inf), progress=Silent())
    assert (summary["state"], summary["step"], summary["incidents"]) == ("finished", 30, len(STEPS))
    fit(tmp_path / "skip", task(np.inf), guard__policy="skip")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "skip")
    ours, other = (checkpoint.load(checkpoint.newest(tmp_path / name))[0] for name in ("run", "skip"))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in other.items()}


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_of_several_micro_batches(tmp_path, policy):
    """One of them is enough; the replay finds it."""
    at = int(order(6 * 3 + 1, 4, 200, 1337)[2])  # in micro-batch 1 of step 7
    changes = {"guard__policy": policy, "train__grad_accum": 3}
    seen = {}

    def look(trainer, record):
        weights = {name: array.copy() for name, array in trainer.model.state_dict().items()}
        if record.get("skipped"):
            assert all(np.array_equal(array, seen[name]) for name, array in weights.items())
        seen.update(weights)

    _, summary = fit(tmp_path / "run", task(np.inf, at=[at]), [look], **changes)
    assert (summary["state"], summary["step"]) == ("finished", 30)
    assert 1 <= len(guard.incidents(tmp_path / "run")) <= summary["incidents"]  # one step may be twice
    _, batches, facts = guard.load_incident(guard.incidents(tmp_path / "run")[0])
    assert facts["step"] == 7 and facts["position"]["index"] == 18
    assert [bool(np.isinf(batch["targets"]).any()) for batch in batches] == [False, True, False]
    found = replay(tmp_path / "run", 7, task=task())
    assert found.micro == 1 and "the loss itself is inf" in found.verdict


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_policy_holds_on_a_full_disk(tmp_path, monkeypatch, policy):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors")

    monkeypatch.setattr(guard, "save_incident", full)
    changes = {"guard__policy": policy}
    with pytest.warns(UserWarning, match=r"step 9 went wrong and cannot be kept .*No space left"):
        _, summary = fit(tmp_path / "run", task(np.inf, at=AT[:1]), **changes)
    monkeypatch.undo()
    fit(tmp_path / "roomy", task(np.inf, at=AT[:1]), **changes)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "roomy")
    wanted = records.Run(tmp_path / "roomy").summary
    assert (summary["state"], summary["step"]) == (wanted["state"], wanted["step"])
    assert not guard.incidents(tmp_path / "run") and guard.incidents(tmp_path / "roomy")


def test_early_stopping(tmp_path):
    changes = {"optim__lr": 1e-9, "train__eval_interval": 2, "train__patience": 3, "optim__name": "sgd"}
    worse = task()
    worse.evals["val"].dataset.all.targets[...] = 1e3 * np.sign(
        np.random.default_rng(0).standard_normal((8, 2))
    )

    def grow(trainer, record):
        for parameter in trainer.model.parameters():
            parameter.data[...] *= 1.1 if record["split"] == "val" and record["step"] < 5 else 0.9

    _, summary = fit(tmp_path / "run", task(), [grow], **changes)
    steps, losses = records.Run(tmp_path / "run").series("val", "loss")
    best = int(losses.argmin())
    assert summary["state"] == "finished" and summary["step"] == steps[-1] < 30
    assert len(losses) - 1 - best == 3
    assert checkpoint.best(tmp_path / "run").name == f"step-{steps[best]:08d}"


# Replay ---------------------------------------------------------------------------------------------


def test_replay_names_the_layer_that_overflows_first(tmp_path):
    fit(tmp_path / "run", task(scale=1e25))
    found = replay(tmp_path / "run", task=task())
    assert not math.isfinite(found.loss) and math.isfinite(found.exact)
    assert [row.name for row in found.forward] == ["first", "second", "the model"]
    assert [row.wrong for row in found.forward] == [False, True, True]
    assert found.verdict == (
        "first wrong in the forward pass: the output of second is infinite or NaN; in float64 it is not"
    )
    text = "\n".join(found.lines())
    assert found.facts["why"] in text and text.count("<- wrong") >= 2


def test_replay_tells_of_the_backward_pass(tmp_path):
    """The loss is finite, 1e30, and the first layer's gradient is not."""

    def build():
        made = task(scale=1.0)
        made.model.second.weight.data[...] = 1e20
        made.model.first.weight.data[...] = 1e-20
        made.model.first.bias.data[...] = 0
        made.train.dataset.all.inputs[...] *= 1e3
        made.train.dataset.all.targets[...] = 3e17
        return made

    _, summary = fit(tmp_path / "run", build())
    assert summary["state"] == "failed"
    found = replay(tmp_path / "run", task=build())
    assert math.isfinite(found.loss) and not any(row.wrong for row in found.forward)
    assert "first wrong in the backward pass: the gradient of first." in found.verdict


def test_replay_of_a_spike_finds_nothing_wrong(tmp_path):
    fit(tmp_path / "run", task(300.0), guard__policy="skip", guard__spike=8.0, guard__window=4)
    found = replay(tmp_path / "run", task=task())
    assert "standard deviations above" in found.facts["why"]
    assert found.loss == pytest.approx(found.facts["loss"], rel=1e-6)
    assert found.exact == pytest.approx(found.loss, rel=1e-4) and "no layer differs" in found.verdict


def test_replay_of_a_gpt_has_the_bits_of_the_run(tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("in for a penny, in for a pound " * 100)
    changes = {
        "data.source": str(text), "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16,
        "model.block_size": 16, "model.dropout": 0.2, "optim.lr": 1e6, "optim.name": "sgd",
        "train.grad_accum": 2, "schedule.min_lr": 0.0, "optim.grad_clip": 0.0,
        "loss.label_smoothing": 0.1, "optim.weight_decay": 0.0, "run.dir": str(tmp_path / "run"),
    }  # fmt: skip
    summary = Trainer(
        {**{k: v for k, v in SHORT.items() if "optim" not in k}, **changes}, progress=Silent()
    ).fit()
    assert summary["state"] == "failed"
    found = replay(tmp_path / "run")
    assert any(row.wrong for row in found.forward + found.backward)
    assert {"h.0.attn", "ln_f"} <= {row.name for row in found.forward}


def test_replay_looks_between_the_modules(tmp_path):
    """Scores of attention overflow in float32: c_attn is sound, and c_proj is given NaN."""
    text = tmp_path / "words.txt"
    text.write_text("in for a penny, in for a pound " * 100)
    changes = {
        "data.source": str(text), "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16,
        "model.block_size": 16, "train.max_steps": 1, "run.dir": str(tmp_path / "run"),
    }  # fmt: skip
    trainer = Trainer({**{k: v for k, v in SHORT.items() if "optim" not in k}, **changes}, progress=Silent())
    trainer.fit()
    weights = dict(trainer.model.state_dict())
    weights["transformer.h.1.attn.c_attn.weight"] = weights["transformer.h.1.attn.c_attn.weight"] * 1e25
    batch = trainer.task.train.batch(0, 4, 1337)
    facts = {"seed": 1337, "position": batch.position, "vocab_size": trainer.text.vocab_size, "why": "?"}
    guard.save_incident(tmp_path / "run", 1, weights, [batch], facts)
    found = replay(tmp_path / "run")
    rows = {(row.name, row.what): row for row in found.forward}
    assert not rows["h.1.attn.c_attn", "output"].wrong and rows["h.1.attn.c_proj", "input"].wrong
    assert [row.what for row in found.forward].count("input") == 1
    assert found.verdict.startswith("first wrong in the forward pass: the input of h.1.attn.c_proj is inf")
    assert found.verdict.endswith("; in float64 it is not")
    assert all(len(line) <= 80 for line in found.lines() if "wrong in" not in line)


def test_replay_of_code_that_knows_float32_alone(tmp_path):
    class Narrow(Net):
        def forward(self, x):
            return super().forward(x.astype(np.float32))

    def build(poison=None):
        made = task(poison)
        made.model = Narrow()
        return made

    fit(tmp_path / "run", build(np.inf))
    found = replay(tmp_path / "run", task=build())
    assert found.exact is None and "does not run in float64" in found.note and "float32" in found.note
    assert "the loss itself is inf" in found.verdict and "float64" not in found.verdict
    assert any(row.wrong for row in found.backward) and "\n".join(found.lines()).count("<- wrong") >= 2


def test_what_cannot_be_replayed(tmp_path):
    fit(tmp_path / "run", task())
    with pytest.raises(InputError, match="kept no step that went wrong"):
        replay(tmp_path / "run", task=task())
    fit(tmp_path / "bad", task(np.inf), guard__policy="skip")
    with pytest.raises(InputError, match=r"step is 999, .* kept "):
        replay(tmp_path / "bad", 999, task=task())
    path = guard.incidents(tmp_path / "bad")[-1] / "batch.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=f"{path} is damaged"):
        replay(tmp_path / "bad", task=task())
