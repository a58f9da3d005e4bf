"""Kill and resume a user's own run: what is exact passes, what is not is named, what cannot be is said."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from cllm import cli, verify
from cllm import config as configs

TASK = """
import json
import random
import time

import numpy as np

import cllm
from cllm import nn, rng
from cllm.data import Batch, Examples


class Noisy:
    '''Examples with noise: of an own generator that a resumed run begins anew, or drawn as it should be.'''

    def __init__(self, kind):
        self.kind, self.generator = kind, np.random.default_rng(0)

    def __len__(self):
        return 40

    def __getitem__(self, indices):
        inputs = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)[indices]
        if self.kind == "own":
            inputs += self.generator.standard_normal(inputs.shape, np.float32)
        if self.kind == "shared":
            inputs += np.float32(np.random.random() + random.random())
        return Batch(inputs, indices % 2)


class Mean:
    '''A callback that remembers, with or without a state_dict.'''

    def __init__(self):
        self.mean = 0.0

    def __call__(self, trainer, record):
        if record["split"] == "train":
            self.mean = record["smooth"] = 0.9 * self.mean + 0.1 * record["loss"]


class KeptMean(Mean):
    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def build(config, noise="none", kept=True, slow=0.0, wrong=False):
    if wrong:
        raise ValueError("no such data")
    rng.manual_seed(0)
    data = Noisy(noise)
    sleeper = lambda trainer, record: time.sleep(slow)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return cllm.Task(model, data, {"val": Noisy("none")}, callbacks=[KeptMean() if kept else Mean(), sleeper])


def loop(config, run, restores=True):
    weights, start = np.zeros(3), 0
    found = run.restore() if restores else None
    if found is not None:
        start, arrays, _ = found
        weights = arrays["weights"]
    for step in range(start + 1, config.train.max_steps + 1):
        weights = weights + np.float64(random.random()) * step
        run.log(step, "train", loss=float(weights.sum()))
        if step % 3 == 0 or step == config.train.max_steps:
            run.save(step, {"weights": weights})
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "my.py").write_text(TASK)
    return tmp_path


def children():
    """This process's own: other tests leave some, such as what tracks the memory that processes share."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def verified(overrides, steps=9, minutes=10.0):
    """Whether the bits agree, and what was said; nothing may be left."""
    said, before = [], children()
    try:
        return verify.resume_is_exact(configs.load(None, overrides), steps, minutes, said.append), said
    finally:
        assert list(Path(tempfile.gettempdir()).iterdir()) == []
        assert children() <= before


TEXT = {
    "data.source": "words.txt", "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16,
    "model.block_size": 8, "model.dropout": 0.1, "train.batch_size": 2, "train.grad_accum": 3,
    "train.threads": 1, "train.prefetch": 2, "monitor.activations": 2, "train.metrics": ["accuracy"],
    "guard.spike": 9.0, "guard.window": 2, "guard.policy": "rollback", "optim.name": "sgd",
    "optim.momentum": 0.9, "run.dir": "never-made",
}  # fmt: skip


def test_a_text(here, monkeypatch):
    (here / "words.txt").write_text("does it go on as if nothing had happened? " * 30)
    exact, said = verified(TEXT)
    assert exact and not (here / "never-made").exists()
    assert said[:3] == [
        "training 9 steps without a stop",
        "killed in step 2; resuming from the newest checkpoint: of step 0",  # of the policy
        "killed in step 5; resuming from the newest checkpoint: of step 3",
    ]
    assert re.fullmatch(r"the bits agree: \d+ arrays, 12 records \(.* for 9 steps\)", said[3]), said


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"task.noise": "shared"}, None),
        (
            {"task.noise": "own"},
            [r"model\.safetensors differs in [1-4] of 4 arrays", r"optimizer\.safetensors differs in",
             "the train record of step 1 differs first, in loss|the train record of step [2-6] differs"],
        ),
        ({"task.kept": False}, [r"the train record of step 4 differs first, in smooth"]),
    ],
    ids=["shared generators", "a generator of its own", "a callback without state"],
)  # fmt: skip
def test_a_task(here, overrides, named):
    exact, said = verified({"task.build": "my.py:build", "train.batch_size": 4, **overrides})
    assert exact == (named is None), said
    if exact:
        assert said[1] == "killed in step 2; resuming from the newest checkpoint: there is none yet"
    else:
        assert said[-1].startswith("the bits differ: a resumed run of this configuration is not the one")
        for pattern in named:
            assert any(re.search(pattern, line) for line in said[3:-1]), said


def test_a_loop_of_ones_own(here):
    exact, said = verified({"task.run": "my.py:loop"})
    assert exact, said
    exact, said = verified({"task.run": "my.py:loop", "task.restores": False})
    assert exact, said  # it starts again: the same numbers, later


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.toml"], "none.toml"),
        (["bad.toml"], "bad.toml: optim.lr is"),
        (["wrong.toml"], "the run cannot be verified, it does not train: ValueError: no such data"),
        (["slow.toml", "--minutes", "0.05"], "9 steps, twice over, take longer than --minutes allows"),
        (["slow.toml", "--steps", "2"], "--steps: '2' is not a whole number of at least 3"),
        (["slow.toml", "--minutes", "0"], "--minutes: '0' is not a number above 0"),
        (["slow.toml", "--train.max-stepz", "3"], "unknown key train.max_stepz"),
        ([], "required: CONFIG.toml"),
    ],
)
def test_what_cannot_be_verified(here, capsys, words, message):
    (here / "bad.toml").write_text("[optim]\nlr = -1.0\n")
    (here / "wrong.toml").write_text('[task]\nbuild = "my.py:build"\nwrong = true\n')
    (here / "slow.toml").write_text('[task]\nbuild = "my.py:build"\nslow = 5.0\n')
    steps = [] if "--steps" in words or not words else ["--steps", "9"]
    assert cli.main(["verify-resume", *words, *steps]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("cllm: ") and err.count("\n") == 1 and message in err, (out, err)
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
