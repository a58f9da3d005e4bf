"""Checkpoints: exact round trips, equal files for equal runs, and no way to read half of one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from cllm import checkpoint
from cllm.errors import InputError

STATE = {
    "position": {"index": 7, "epoch": 0, "sample": 84},
    "versions": {"numpy": "2"},
    "rate": 0.1,
    "best": None,
}


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    model = {
        "wte.weight": generator.normal(size=(5, 4)).astype(np.float32),
        "transposed": generator.normal(size=(3, 4)).T,
        "scalar": np.array(2.5, np.float32),
        "special": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    return model, {"exp_avg.0": generator.normal(size=6).astype(np.float32), "steps": np.array([3, 2**62])}


def save(run_dir, step, best_step=None, seed=0):
    return checkpoint.save(run_dir, step, *arrays(seed), STATE | {"best": best_step and {"step": best_step}})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def test_round_trip_is_bitwise(tmp_path):
    model, optimizer = arrays()
    path = checkpoint.save(tmp_path, 600, model, optimizer, STATE)
    assert path == tmp_path / "checkpoints" / "step-00000600"
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    found_model, found_optimizer, state = checkpoint.load(path)
    assert state == {**STATE, "step": 600}
    for given, found in ((model, found_model), (optimizer, found_optimizer)):
        assert given.keys() == found.keys()
        for name, array in given.items():
            assert found[name].shape == array.shape
            assert found[name].dtype == array.dtype
            assert found[name].tobytes() == array.tobytes()
            found[name][...] = 0  # writable


def test_no_optimizer_arrays(tmp_path):
    path = checkpoint.save(tmp_path, 1, arrays()[0], {}, {})
    assert checkpoint.load(path)[1:] == ({}, {"step": 1})


def test_equal_runs_have_equal_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 5)
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        a, b = (
            (tmp_path / name / "checkpoints" / "step-00000005" / file).read_bytes() for name in ("a", "b")
        )
        assert a == b


def test_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 100_000_000, 20):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step-100000000"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file = bad / name
    content = file.read_bytes()
    if damage == "flip":
        flip(file)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage == "cut" else b"")
    with pytest.warns(UserWarning, match=rf"damaged checkpoint: .*step-00000002.*{name}"):
        assert checkpoint.newest(tmp_path) == good
    with pytest.raises(InputError, match=name):
        checkpoint.load(bad)
    flip(good / "model.safetensors")
    with pytest.warns(UserWarning) as seen:
        assert checkpoint.newest(tmp_path) is None
    assert ["step-00000002" in str(seen[0].message), "step-00000001" in str(seen[1].message)] == [True, True]
    save(tmp_path, 2)  # a resumed run comes to the same step again
    assert checkpoint.newest(tmp_path) == bad


def test_a_changed_state_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    entry = json.loads((path / "state.json").read_text())
    entry["state"]["position"]["index"] = 8
    (path / "state.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": []}, {"state": None}, {"step": "1"}, {"step": 2}, {"step": 1.0}, {"step": True},
        {"sha256": {}}, {"sha256": {"model.safetensors": "0" * 64}}, {"sha256": []},
        {"sha256": {"model.safetensors": "0", "optimizer.safetensors": "0", "../up": "0"}},
    ],
)  # fmt: skip
def test_a_state_that_vouches_for_itself_is_still_checked(tmp_path, changes):
    path = save(tmp_path, 1)
    entry = json.loads((path / "state.json").read_text())
    del entry["sha256"]["state"]
    entry |= changes
    if isinstance(entry["sha256"], dict):
        entry["sha256"]["state"] = checkpoint._sha256(entry["step"], entry["state"], entry["sha256"])
    (path / "state.json").write_bytes(checkpoint._text(entry))
    with pytest.raises(InputError, match=r"state\.json is (damaged|of step)"):
        checkpoint.load(path)


def test_a_changed_hash_is_the_states_damage(tmp_path):
    path = save(tmp_path, 1)
    entry = json.loads((path / "state.json").read_text())
    entry["sha256"]["model.safetensors"] = "0" * 64
    (path / "state.json").write_bytes(checkpoint._text(entry))
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        checkpoint.load(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*step-00000003"):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000003")


def test_state_must_be_json(tmp_path):
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            checkpoint.save(tmp_path, 1, {}, {}, {"loss": bad})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["optimizer.safetensors", "rename"])
def test_killed_while_saving(tmp_path, moment):
    good = save(tmp_path, 1)
    script = f"""
import os, signal, sys
import numpy as np
from cllm import checkpoint, files
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
create, moment = files.create, {moment!r}
if moment == "rename":
    os.replace = kill
else:
    files.create = lambda path, parts: kill() if path.name == moment else create(path, parts)
checkpoint.save(sys.argv[1], 2, {{"a": np.ones(3)}}, {{}}, {{}})
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == [".step-00000002.tmp", "step-00000001"]
    assert checkpoint.newest(tmp_path) == good
    save(tmp_path, 3)
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001", "step-00000003"]


def test_best_and_prune(tmp_path):
    assert checkpoint.best(tmp_path) is None
    save(tmp_path, 100)
    assert checkpoint.best(tmp_path) is None
    for step, best_step in ((200, 200), (300, 300), (400, 300), (500, 300), (600, 300)):
        save(tmp_path, step, best_step)
    assert checkpoint.best(tmp_path).name == "step-00000300"
    checkpoint.prune(tmp_path, keep=2)
    kept = sorted(os.listdir(tmp_path / "checkpoints"))
    assert kept == ["step-00000300", "step-00000500", "step-00000600"]
    save(tmp_path, 700, 700)
    checkpoint.prune(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000600", "step-00000700"]
    assert checkpoint.best(tmp_path) == checkpoint.newest(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoint.prune(tmp_path)
