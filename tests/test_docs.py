"""The guide is true: its Python stands in the examples, the examples run, its commands and links work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cllm import cli, records
from cllm import config as configs

ROOT = Path(__file__).resolve().parents[1]
GUIDE, RUNS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("guide.md", "runs.md"))
EXAMPLES = ROOT / "docs" / "examples"
COMMANDS = re.findall(r"^(cllm .*)$", GUIDE, re.MULTILINE)


def run_example(name):
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True)
    return done.stdout


def command(line, folder, *more):
    """Runs a command of the guide from the project's root into `folder`."""
    words = shlex.split(line, comments=True)[1:]
    assert cli.main([*words, *more, "--run.dir", str(folder)]) == 0


@pytest.fixture
def at_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    return tmp_path


def small(text_file):
    return [
        "--data.source", str(text_file), "--train.max-steps", "6", "--train.eval-interval", "3",
        "--model.n-layer", "2", "--model.n-embd", "32", "--schedule.warmup-steps", "2",
        "--schedule.min-lr", "0",
    ]  # fmt: skip


def test_each_python_block_is_part_of_an_example():
    sources = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.rglob("*.py"))]
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE + RUNS, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        assert any(block in source for source in sources), block


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_attention_variant(at_root, text_file):
    output = run_example("attention_variant.py")
    names = ["h.0.attn.weights (4, 2, 16, 16)", "h.1.attn.weights (4, 2, 16, 16)"]
    assert [f"{name} rows sum to one: True" for name in names] == output.splitlines()[1:]
    gates = re.search(r"gradients \[(.*)\]", output)[1].split()
    assert all(float(gate) != 0 for gate in gates)
    command(COMMANDS[0], at_root / "gated", *small(text_file))
    (run,) = records.load(at_root / "gated")
    assert run.state == "finished"
    assert run.config["model.attention"].endswith("attention_variant.py:GatedAttention")


def test_activation():
    output = run_example("activation.py")
    assert "gradcheck: True" in output
    first, *_, last = map(float, re.findall(r"loss (\S+)", output))
    assert last < first / 2


def test_optimizer(at_root, text_file):
    losses = [float(x) for x in re.findall(r"loss (\S+),", run_example("optimizer.py"))]
    assert losses[0] > 10
    assert losses[-1] < 0.05
    command(COMMANDS[1], at_root / "signs", *small(text_file))
    (run,) = records.load(at_root / "signs")
    assert run.state == "finished"
    assert run.config["optim.momentum"] == 0.95


def test_classification(at_root):
    command(COMMANDS[2], at_root / "spirals", "--train.eval-interval", "300")
    (run,) = records.load(at_root / "spirals")
    accuracy = run.series("val", "accuracy")[1][-1]
    assert accuracy > 0.85  # chance is a third; 0.93 seen
    assert run.series("noisy", "accuracy")[1][-1] < accuracy
    assert run.series("val", "f1")[1][-1] > 0.85


def test_classification_sweep(at_root):
    command(COMMANDS[3], at_root / "sweep", "--base.train.max-steps", "20", "--sweep.seeds", "0,1")
    lines = (at_root / "sweep" / "results.csv").read_text().splitlines()
    assert lines[0].split(",")[2:4] == ["task.width", "task.noise"]
    assert len(lines) == 1 + 4 * 2


def test_batches():
    lines = run_example("batches.py").splitlines()
    assert [line for line in lines if line.startswith("batch")] == [
        f"batch {i} in parts of 2 and 2" for i in range(5)
    ]
    assert "arrays that are out of the pool: 0" in lines
    assert next(line for line in lines if "1000000" in line).startswith("{'index': 1000000, 'epoch': 400000")
    assert lines[-2:] == [
        "packed [3 0 7 7 7 7 0 4 0] of which count [3 0 7 7 7 0 0]",
        "padded [[5, 3, 0, 0], [7, 7, 7, 7], [4, 0, 0, 0]]",
    ]


def test_the_commands_of_runs(tmp_path, monkeypatch, capsys, text_file):
    """In their order, on a run of a few steps; each ends as the page says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "README.md").write_text(text_file.read_text())
    (tmp_path / "experiments" / "char.toml").write_text((ROOT / "experiments" / "char.toml").read_text())
    assert cli.main(["train", "experiments/char.toml", *small(text_file), "--run.dir", "runs/char"]) == 0
    commands = re.findall(r"^(cllm .*)$", RUNS, re.MULTILINE)
    assert len(commands) == 8
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        extra = small(text_file) if words[0] == "verify-resume" else []
        expected = 2 if words[0] == "replay" else 0  # no step went wrong
        assert cli.main([*words, *extra]) == expected, line
    out, err = capsys.readouterr()
    assert "the bits agree" in out and "step 6: val loss" in out and "bits_per_byte" in out
    assert "kept no step that went wrong" in err
    known = {key for key, _, _ in configs.describe()}
    for key in re.findall(r"`(?:--)?((?:train|guard|monitor|data)\.[a-z_-]+)", RUNS):
        assert key.replace("-", "_") in known, key
