"""What the README shows works: its Python runs, its files exist, its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from cllm import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, text_file, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = [
        "sweep", str(ROOT / "experiments" / "quickstart_sweep.toml"), "--sweep.seeds", "0,1",
        "--base.data.source", str(text_file), "--base.data.val-fraction", "0.1",
        "--base.train.max-steps", "4", "--run.dir", "runs/quickstart-sweep",
    ]  # fmt: skip
    assert cli.main(sweep) == 0
    python = blocks("python")
    assert len(python) == 3
    for block in python:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "lr.svg").stat().st_size > 1000
    output = capsys.readouterr().out
    loss, val_loss = map(float, re.search(r"^(\d\.\d+) (\d\.\d+)$", output, re.MULTILINE).groups())
    assert 1 < loss < 3.5
    assert 1 < val_loss < 3.5
    assert "\ndef " in output  # and the generated text


def test_the_trees_files_exist():
    tree = README.partition("## The tree")[2]
    folder = ROOT
    for line in re.search(r"^```\n(.*?)^```$", tree, re.MULTILINE | re.DOTALL)[1].splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        for name in names:
            base = folder if line.startswith("  ") else ROOT
            assert (base / name).exists(), name
        if not line.startswith("  ") and names[0].endswith("/"):
            folder = ROOT / names[0]


@pytest.mark.parametrize(
    "line", [line for block in blocks("") for line in block.splitlines() if line.startswith("cllm ")]
)
def test_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    rest, _ = cli._split_overrides(words[1:])
    assert cli._parser().parse_args([words[0], *rest]).command == words[0]
