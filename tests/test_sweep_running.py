"""Running a sweep: pausing, directories that grow, workers that die, full disks, the test split."""

import json

import pytest

from cllm import checkpoint, config, records, train
from cllm.errors import InputError
from cllm.progress import Lines, Silent

TINY = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "model.dropout": 0.1,
    "optim.lr": 3e-3, "schedule.warmup_steps": 5, "train.batch_size": 4, "train.max_steps": 20,
    "train.eval_interval": 5, "train.checkpoint_interval": 7,
}  # fmt: skip


@pytest.fixture
def tiny(text_file, tmp_path):
    """The configuration of a run of 20 steps in a folder of tmp_path; keys with __ for the dot."""

    def tiny(name, **changes):
        own = {"data.source": str(text_file), "run.dir": str(tmp_path / name)}
        return config.load(None, TINY | own | {key.replace("__", "."): v for key, v in changes.items()})

    return tiny


def untimed(run_dir):
    """A run's records without what they say of time and memory."""
    return [
        {key: value for key, value in record.items() if not records.is_timing(key)}
        for record in records.Run(run_dir).records
    ]


def last_arrays(run_dir):
    return [(checkpoint.newest(run_dir) / name).read_bytes() for name in checkpoint.ARRAY_FILES]


# Pausing ---------------------------------------------------------------------------------------------


def test_a_run_that_paused_has_the_bits_of_one_that_did_not(tiny, tmp_path):
    train.Trainer(tiny("alone"), progress=Silent()).fit()
    run_dir = tmp_path / "paused"
    summary = train.Trainer(tiny("paused"), progress=Silent(), pause_at=10).fit()
    assert (summary["state"], summary["stopped_by"], summary["step"]) == ("interrupted", "pause", 10)
    assert not (run_dir / "summary.json").exists()
    assert checkpoint.step_of(checkpoint.newest(run_dir)) == 10
    assert [r["step"] for r in untimed(run_dir) if r["split"] == "val"] == [5, 10]  # the step's records too
    files = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    assert train.resume(run_dir, progress=Silent(), pause_at=10)["step"] == 10  # it is there already
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == files
    assert train.resume(run_dir, progress=Silent(), pause_at=13)["step"] == 13
    assert train.resume(run_dir, progress=Silent())["state"] == "finished"
    assert untimed(run_dir) == untimed(tmp_path / "alone")
    assert last_arrays(run_dir) == last_arrays(tmp_path / "alone")


def test_a_run_does_not_pause_where_it_ends(tiny):
    assert train.Trainer(tiny("a"), progress=Silent(), pause_at=20).fit()["state"] == "finished"

    def stop(trainer, record):
        trainer.stop = trainer.step == 10

    stopped = train.Trainer(tiny("b"), callbacks=[stop], progress=Silent(), pause_at=10).fit()
    assert (stopped["state"], stopped["step"]) == ("finished", 10)


def test_a_pause_is_shown(tiny, tmp_path, capsys):
    train.Trainer(tiny("a"), progress=Lines(), pause_at=10).fit()
    told = f"paused at step 10; continue with: cllm resume {tmp_path / 'a'}"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_what_cannot_pause_is_refused(tiny, tmp_path):
    for step in (0, -1, 2.5, True):
        with pytest.raises(InputError, match=r"pause_at is .*, it must be a step"):
            train.Trainer(tiny("a"), pause_at=step)
    (tmp_path / "own.py").write_text("def train(config, run): run.log(0, 'train', loss=1.0)\n")
    own = {"task.run": f"{tmp_path / 'own.py'}:train", "run.dir": str(tmp_path / "own"), "train.max_steps": 5}
    with pytest.raises(InputError, match=r"task\.run is a loop of its own, which cannot pause"):
        train.Trainer(own, pause_at=2)
    train.Trainer(own, progress=Silent()).fit()
    (tmp_path / "own" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"task\.run is a loop of its own, which cannot pause"):
        train.resume(tmp_path / "own", pause_at=2)
    assert json.loads((tmp_path / "own" / "metrics.jsonl").read_text())["loss"] == 1.0
