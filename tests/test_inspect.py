"""What `cllm inspect` says of a run's checkpoints, and that it is true."""

import hashlib
import re

import numpy as np
import pytest

from cllm import arrays, checkpoint, cli, contents, records
from cllm import config as configs
from cllm.errors import InputError
from cllm.progress import Silent
from cllm.train import Trainer, resume

BASE = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 8, "train.batch_size": 3,
    "train.max_steps": 12, "train.eval_interval": 4, "train.checkpoint_interval": 6, "train.threads": 1,
    "train.keep_checkpoints": 3, "schedule.warmup_steps": 2,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """A finished run with checkpoints of steps 6, 8 (an evaluation that was the best so far) and 12."""
    (tmp_path / "words.txt").write_text("what does a checkpoint hold? " * 60)
    values = {**BASE, "data.source": str(tmp_path / "words.txt"), "run.dir": str(tmp_path / "run")}
    Trainer(configs.load(None, values), progress=Silent()).fit()
    return tmp_path / "run"


def rows(lines):
    """The part of two columns as a dict; what does not fit one line goes on in the second column."""
    found, label = {}, None
    for line in lines:
        if match := re.fullmatch(r"  ([a-z][a-z0-9 ]{11,}?) +(\S.*)|               (\S.*)", line):
            label = match[1].strip() if match[1] else label
            found[label] = f"{found[label]} {match[3]}" if match[3] else match[2]
    return found


def test_each_checkpoint_is_listed_and_the_last_in_full(run_dir, capsys):
    lines, intact = contents.lines(run_dir)
    assert intact and lines[0] == f"{run_dir}: finished"
    listed = checkpoint.listed(run_dir)
    text = "\n".join(lines)
    for path in listed:
        (line,) = [line for line in lines if line.startswith(f"  step {checkpoint.step_of(path)} ")]
        state = checkpoint.load(path)[2]
        assert "verified" in line and f"val loss {state['val_loss']:.4f}" in line
        size = sum(file.stat().st_size for file in path.iterdir())
        unit, n = re.search(r"([\d.]+) (kB|MB)", line).group(2, 1)
        assert float(n) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(size, rel=0.01, abs=5e4)
        assert line.endswith(", the best") == (path == checkpoint.best(run_dir))
    assert str(listed[-1]) in lines and str(listed[0]) not in lines

    model, optimizer, state = checkpoint.load(listed[-1])
    summary = records.Run(run_dir).summary
    for name, array in model.items():
        shape = " x ".join(map(str, array.shape))
        assert re.search(rf"^  {re.escape(name)} +float32 +{shape}$", text, re.MULTILINE)
    assert f"model: {len(model)} arrays of float32" in text
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        assert re.search(rf"^  {kind} +\d+ arrays? of ", text, re.MULTILINE)
    numbers = sum(array.size for array in optimizer.values())
    assert f"optimizer: {len(optimizer)} arrays of float32, int64, {numbers / 1000:.1f}k numbers" in text
    found = rows(lines)
    assert found["position"] == "index 12, epoch {epoch}, sample {sample}".format(**state["position"])
    assert found["val loss"] == f"{summary['val_loss']:.6g}" and found["units"] == "1"
    assert found["from step 0"] == "isa {isa}, cllm {cllm}, python {python}, numpy {numpy}".format(
        **state["environments"][0]
    )
    assert found["vocab size"] == str(state["vocab_size"]) and "betas [0.9, 0.99]" in found["group 0"]
    order = [line.split()[0] for line in lines if ".h." in line]
    assert order.index("transformer.h.0.mlp.c_proj.weight") < order.index("transformer.h.1.ln_1.bias")

    assert cli.main(["inspect", str(run_dir)]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert all(len(line) <= 80 for line in lines if str(run_dir) not in line)


def test_another_checkpoint(run_dir):
    best = checkpoint.best(run_dir)
    assert str(best) in contents.lines(run_dir, "best")[0]
    assert str(checkpoint.listed(run_dir)[0]) in contents.lines(run_dir, 6)[0]
    with pytest.raises(InputError, match=r"has no checkpoint of step 7, it has 6, 8, 12"):
        contents.lines(run_dir, 7)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_one_is_named_and_the_one_before_shown(run_dir, capsys, name):
    newest = checkpoint.listed(run_dir)[-1]
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    assert cli.main(["inspect", str(run_dir)]) == 1
    out, err = capsys.readouterr()
    assert err == "" and re.search(rf"^  step 12 .*damaged: .*{name}", out, re.MULTILINE)
    assert f"\n{checkpoint.listed(run_dir)[-2]}\n" in out and f"\n{newest}\n" not in out
    assert cli.main(["inspect", str(run_dir), "--checkpoint", "12"]) == 2
    err = capsys.readouterr().err
    assert err == f"cllm: {run_dir} has no whole checkpoint that is of step 12\n"


def test_all_are_damaged(run_dir, capsys):
    for path in checkpoint.listed(run_dir):
        (path / "state.json").unlink()
    assert cli.main(["inspect", str(run_dir)]) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"damaged: .*state\.json is missing", out)) == 3 and "model:" not in out
    # Nor is what the records tell of thrown away by going on from step 0.
    before = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "summary.json").unlink()
    message = rf"all checkpoints of {run_dir} are damaged; .* move them away"
    with pytest.warns(UserWarning, match="passed over a dam"), pytest.raises(InputError, match=message):
        resume(run_dir, progress=Silent())
    assert (run_dir / "metrics.jsonl").read_bytes() == before


LOOP = """
import numpy as np

def train(config, run):
    run.save(2, {"w": np.ones((2, 3)), "n": np.arange(4)}, {"done": 2})
    run.log(2, "val", loss=0.5)
    run.save(4, {"w": np.zeros((2, 3)), "n": np.arange(4)}, {"done": 4})
"""


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(LOOP)
    values = {"task.run": "my.py:train", "run.dir": "run", "train.max_steps": 4}
    Trainer(configs.load(None, values), progress=Silent()).fit()
    lines, intact = contents.lines("run")
    text = "\n".join(lines)
    assert intact and re.search(r"^  w +float64 +2 x 3$", text, re.MULTILINE)
    assert "model: 2 arrays of float64, int64, 10 numbers" in text and "optimizer: nothing" in text
    found = rows(lines)
    assert found["state"] == "of the loop's own: done" and found["val loss"] == "0.5"
    digest = hashlib.sha256(LOOP.encode()).hexdigest()
    assert found["file"] == f"my.py, SHA-256 {digest}"


def test_steps_that_went_wrong_and_another_instruction_set(run_dir, monkeypatch):
    path = checkpoint.newest(run_dir)
    model, optimizer, state = checkpoint.load(path)
    state["environments"].append({**state["environments"][0], "step": 9, "isa": "portable"})
    state.pop("step")
    checkpoint.save(run_dir, 12, model, optimizer, state)
    for step in (3, 5):
        checkpoint.write(
            run_dir / "incidents", step, {"weights.safetensors": model, "batch.safetensors": {}}, {}
        )
    lines, _ = contents.lines(run_dir)
    assert lines[1] == f"went wrong in steps 3, 5; for a closer look: cllm replay {run_dir} --step 5"
    assert rows(lines)["from step 9"].startswith("isa portable, ")
    assert np.isfinite([arrays.header(path / name) is not None for name in checkpoint.ARRAY_FILES]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "run holds no run: it has no config.toml"),
        (lambda path: path.mkdir(), "run holds no run: it has no config.toml"),
        (lambda path: path.write_text("x"), "run holds no run: it has no config.toml"),
        (lambda path: (path.mkdir(), (path / "config.toml").touch()), "run has no checkpoint yet; continue"),
    ],
    ids=["nothing", "an empty folder", "a file", "a run that has just begun"],
)
def test_what_cannot_be_inspected(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    assert cli.main(["inspect", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
