"""tests/instructions.py: what fails, on made-up counts; make instructions counts for real."""

import json

import instructions
import pytest

COUNTS = {"gelu: gelu_forward": 1000, "gelu: gelu_backward": 2000}


@pytest.fixture
def check(monkeypatch, tmp_path):
    """What the comparison of these counts with COUNTS prints; SystemExit when it fails."""
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"compiler": "GCC", "isa": "x", "instructions": COUNTS}))
    monkeypatch.setattr(instructions, "FILE", path)
    monkeypatch.setattr("sys.argv", ["instructions.py"])

    def compare(counts, compiler="GCC"):
        monkeypatch.setattr(instructions, "measure", lambda: (counts, compiler))
        instructions.main()

    return compare


def test_what_passes(check, capsys):
    check(COUNTS)
    check(COUNTS | {"gelu: gelu_forward": 1100})
    check(COUNTS | {"gelu: gelu_backward": 900}, "another")
    assert capsys.readouterr().out.splitlines()[-1] == "instructions: 2 kernels, 0 over 10% more, 1 fewer"


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (COUNTS | {"gelu: gelu_forward": 1101}, "gelu: gelu_forward: 1,101 instructions, +10%"),
        (COUNTS | {"gelu: gelu_forward": 0}, "gelu: gelu_forward: nothing was counted"),
        (COUNTS | {"new: new": 1}, "new: new: not in instructions.json"),
        ({"gelu: gelu_forward": 1000}, "gelu: gelu_backward: in instructions.json, but not called"),
    ],
)
def test_what_fails(check, capsys, counts, line):
    with pytest.raises(SystemExit, match="--update"):
        check(counts, "another")
    assert capsys.readouterr().out.splitlines()[1:] == [
        line, "compiled by another, the counts are of GCC: that may be the reason",
    ]  # fmt: skip
