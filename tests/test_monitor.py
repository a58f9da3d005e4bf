"""What records hold of a run's inside, and the same as TensorBoard events."""

import errno
import json
import math
import os
import struct
import sys

import numpy as np
import pytest

import cllm
from cllm import config as configs
from cllm import monitor, records
from cllm.errors import InputError
from cllm.guard import Guard
from cllm.progress import Silent
from cllm.train import Trainer, resume

BASE = {
    "data.val_fraction": 0.2, "data.test_fraction": 0.1, "model.n_layer": 2, "model.n_head": 2,
    "model.n_embd": 16, "model.block_size": 16, "schedule.warmup_steps": 2, "train.batch_size": 4,
    "train.max_steps": 12, "train.eval_interval": 6, "train.checkpoint_interval": 5, "train.threads": 1,
}  # fmt: skip


@pytest.fixture
def text_path(tmp_path):
    words = np.random.default_rng(0).choice(["loss", "norm", "ratio", "layer"], 1500)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words))
    return path


def fit(text_path, run_dir, callbacks=(), **changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    config = configs.load(None, {**BASE, "data.source": str(text_path), "run.dir": str(run_dir), **more})
    trainer = Trainer(config, None, callbacks, progress=Silent())
    return trainer, trainer.fit()


def training(run_dir):
    return [r for r in records.Run(run_dir).records if r["split"] == "train"]


def untimed(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not records.is_timing(k)} for line in lines]


def test_layers():
    names = {
        "transformer.wte.weight": "wte", "transformer.h.11.attn.c_attn.weight": "h.11",
        "transformer.ln_f.bias": "ln_f", "lm_head.weight": "lm_head", "0.weight": "0", "weight": "weight",
        "blocks.2.norm.weight": "blocks.2",
    }  # fmt: skip
    assert {name: monitor.layer_of(name) for name in names} == names


def test_layers_are_measured_when_it_is_their_turn(tmp_path, text_path):
    before, seen = {}, {}

    def look(trainer, record):
        named = dict(trainer.model.named_parameters())
        if record["split"] == "train":
            if record["step"] == 4:
                ratio = {name: (p.data - before[name], before[name]) for name, p in named.items()}
                seen["ratio"] = lambda names: math.sqrt(
                    sum(np.sum(ratio[n][0].astype("d") ** 2) for n in names)
                    / sum(np.sum(ratio[n][1].astype("d") ** 2) for n in names)
                )
                seen["names"] = list(named)
            before.update({name: p.data.copy() for name, p in named.items()})

    fit(text_path, tmp_path / "run", [look], monitor__layers=4)
    lines = training(tmp_path / "run")
    having = [r["step"] for r in lines if "update_ratio" in r]
    assert having == [1, 4, 8, 12]
    record = lines[3]
    layers = {key.removeprefix("grad_norm.") for key in record if key.startswith("grad_norm.")}
    assert layers == {"wte", "wpe", "h.0", "h.1", "ln_f"}
    norms = [record[f"grad_norm.{layer}"] for layer in layers]
    assert math.sqrt(sum(n * n for n in norms)) == pytest.approx(record["grad_norm"], rel=1e-6)
    for layer in layers:
        names = [name for name in seen["names"] if monitor.layer_of(name) == layer]
        assert record[f"update_ratio.{layer}"] == pytest.approx(seen["ratio"](names), rel=1e-4)
    assert record["update_ratio"] == pytest.approx(seen["ratio"](seen["names"]), rel=1e-4)


def test_activations_are_those_of_the_forward_pass(tmp_path, text_path):
    seen = {}

    def look(trainer, record):
        if record["step"] == 5 and record["split"] == "train":  # the weights with which step 6 begins
            for micro in range(3):
                batch = trainer.task.train.batch(5 * 3 + micro, 4, 1337)
                with cllm.capture(trainer.model, "h.1.mlp", "ln_f") as found:
                    trainer.model(batch.inputs)
                for name, array in found.items():
                    seen.setdefault(name, []).append(array)

    fit(text_path, tmp_path / "run", [look], monitor__activations=6, train__grad_accum=3)
    having = [r for r in training(tmp_path / "run") if "activation_rms.ln_f" in r]
    assert [r["step"] for r in having] == [1, 6, 12]
    for name, arrays in seen.items():
        array = np.concatenate([a.ravel() for a in arrays])
        assert having[1][f"activation_rms.{name}"] == pytest.approx(np.sqrt(np.mean(array**2)), rel=1e-5)
        assert having[1][f"activation_max.{name}"] == pytest.approx(np.abs(array).max(), rel=1e-5)
        assert having[1][f"activation_zeros.{name}"] == np.mean(array == 0)


def test_watching_changes_no_bit(tmp_path, text_path):
    fit(text_path, tmp_path / "plain")
    fit(text_path, tmp_path / "watched", monitor__layers=1, monitor__activations=1)
    for a, b in zip(untimed(tmp_path / "plain"), untimed(tmp_path / "watched"), strict=True):
        assert a == {key: b[key] for key in a}
        assert a["split"] == "val" or len(b) > len(a)


def test_each_step_tells_where_its_time_went(tmp_path, text_path):
    _, summary = fit(text_path, tmp_path / "run")
    for record in training(tmp_path / "run"):
        parts = [record[f"time_{part}"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(4 * 16 / record["tokens_per_s"], rel=1e-6)
    _, memory = records.Run(tmp_path / "run").series("val", "memory_mb")
    assert len(memory) == 2 and (memory > 10).all() and (memory <= summary["memory_peak_mb"] + 1).all()


# TensorBoard ----------------------------------------------------------------------------------------


def masked_crc32c(content):
    """As the format wants it, bit by bit: Castagnoli's polynomial, rotated, with a constant added."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(run_dir):
    """(step, tag) -> value of a run's event file: length, checksum, message, checksum, again and again."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (run_dir / "tensorboard").iterdir()
    assert "tfevents" in path.name  # by which TensorBoard knows it
    content, at, messages = path.read_bytes(), 0, []
    while at < len(content):
        length, of_length = struct.unpack_from("<QI", content, at)
        message = content[at + 12 : at + 12 + length]
        (of_message,) = struct.unpack_from("<I", content, at + 12 + length)
        assert of_length == masked_crc32c(content[at : at + 8]) and of_message == masked_crc32c(message)
        messages.append(Event.FromString(message))
        at += length + 16
    assert messages[0].file_version == "brain.Event:2"
    found = [((e.step, value.tag), value.simple_value) for e in messages for value in e.summary.value]
    assert len({key for key, _ in found}) == len(found)  # no step twice
    return dict(found)


def assert_events_are_the_records(run_dir):
    found = events(run_dir)
    wanted = {
        (r["step"], f"{r['split']}/{key}"): value
        for r in records.Run(run_dir).records for key, value in r.items()
        if key not in ("step", "split") and isinstance(value, int | float)
    }  # fmt: skip
    assert found.keys() == wanted.keys() and {step for step, _ in found} == set(range(1, 13))
    assert all(found[key] == pytest.approx(wanted[key], rel=1e-6) for key in found)


def test_tensorboard_has_the_records(tmp_path, text_path):
    class Killed(Exception):
        pass

    def kill(trainer, record):
        if record["step"] == 9:
            raise Killed

    with pytest.raises(Killed):
        fit(text_path, tmp_path / "run", [kill], monitor__tensorboard=True)
    resume(tmp_path / "run", progress=Silent())
    assert_events_are_the_records(tmp_path / "run")


@pytest.mark.parametrize("step", [6, 7, 8, 11])  # of which 5 is the checkpoint before, or 10
def test_tensorboard_goes_back_with_the_run(tmp_path, text_path, monkeypatch, step):
    wrong = [step]

    def judge(self, loss, norm):
        self.seen = getattr(self, "seen", 0) + 1
        return "asked for" if self.seen in wrong else None

    monkeypatch.setattr(Guard, "judge", judge)
    _, summary = fit(text_path, tmp_path / "run", monitor__tensorboard=True, guard__policy="rollback")
    assert summary["incidents"] == 1
    assert_events_are_the_records(tmp_path / "run")


def test_tensorboard_on_a_full_disk(tmp_path, text_path, monkeypatch):
    """The run goes on, with one warning."""
    from tensorboardX.record_writer import RecordWriter

    left = [5]

    def write(self, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.warns(UserWarning, match="TensorBoard's file cannot be written .*No space left") as caught:
        _, summary = fit(text_path, tmp_path / "run", monitor__tensorboard=True)
    assert summary["state"] == "finished" and len(training(tmp_path / "run")) == 12
    assert len([w for w in caught if "TensorBoard" in str(w.message)]) == 1


def test_tensorboard_without_its_package(tmp_path, text_path, monkeypatch):
    for name in ["tensorboardX", *[name for name in sys.modules if name.startswith("tensorboardX.")]]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs tensorboardX .*pip install"):
        fit(text_path, tmp_path / "run", monitor__tensorboard=True)
    assert not (tmp_path / "run").exists()
