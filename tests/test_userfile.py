"""Things named "file.py:name": found, run once until forgotten, refused when changed."""

import dataclasses
import hashlib
import sys

import pytest

from cllm import userfile
from cllm.errors import InputError

MINE = """
import dataclasses
import neighbour

runs = neighbour.count()

@dataclasses.dataclass
class Pair:
    a: int = 1
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """my.py in the working directory, beside a module that counts how often it was asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    (tmp_path / "neighbour.py").write_text("n = [0]\ndef count():\n    n[0] += 1\n    return n[0]\n")
    (tmp_path / "my.py").write_text(MINE)
    yield tmp_path / "my.py"
    sys.modules.pop("neighbour", None)


def test_a_file_is_run_once_for_each_content(mine):
    pair = userfile.load("my.py:Pair", "task.build")
    assert dataclasses.is_dataclass(pair) and pair() == pair(1)
    assert userfile.load("my.py:Pair", "optim.name") is pair
    assert userfile.load("./my.py:Pair", "optim.name") is pair  # by another path
    assert userfile.load("my.py:runs", "task.build") == 1
    mine.write_text(MINE.replace("= 1", "= 2"))
    assert userfile.load("my.py:Pair", "task.build")().a == 2
    assert userfile.load("my.py:runs", "task.build") == 2
    userfile.forget()
    assert userfile.load("my.py:runs", "task.build") == 3
    assert userfile.load("my.py:Pair", "task.build") is userfile.load("my.py:Pair", "optim.name")


def test_a_config_files_reference_is_looked_for_beside_it(mine, monkeypatch):
    folder, config_file = mine.parent, mine.parent / "a.toml"
    assert userfile.beside("my.py:Pair", "task.build", "elsewhere/a.toml") == "my.py:Pair"
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    assert userfile.beside("my.py:Pair", "task.build", "../a.toml") == "../my.py:Pair"
    assert userfile.beside("my.py:Pair", "task.build", config_file) == f"{mine}:Pair"
    assert userfile.beside(f"{mine}:Pair", "task.build", "a.toml") == f"{mine}:Pair"
    monkeypatch.chdir(folder.parent)
    assert userfile.beside("my.py:Pair", "task.build", config_file) == f"{folder.name}/my.py:Pair"
    message = rf"names none.py, which is neither in the .*, {folder.parent}, nor beside {config_file}"
    with pytest.raises(InputError, match=message):
        userfile.beside("none.py:f", "task.build", config_file)
    with pytest.raises(InputError, match=r"it must be FILE\.py:NAME"):
        userfile.beside("my.py:", "task.build", config_file)


def test_digest_is_the_files_sha256(mine):
    sha256 = hashlib.sha256(MINE.encode()).hexdigest()
    assert userfile.digest("my.py:Pair", "optim.name") == sha256
    both = userfile.digests({"a": "my.py:Pair", "b": "my.py:runs", "c": "neighbour.py:n"})
    assert both.keys() == {"my.py", "neighbour.py"}
    assert userfile.digests({"optim.name": "my.py:Pair"}) == {"my.py": sha256}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my.py", r"^task.build is 'my.py', it must be FILE.py:NAME, such as my.py:build$"),
        ("my.py:", r"it must be FILE.py:NAME"),
        ("my.py:a.b", r"it must be FILE.py:NAME"),
        ("my.txt:build", r"it must be FILE.py:NAME"),
        ("my.py:Piar", r"^task.build is 'my.py:Piar', but my.py has no Piar \(did you mean \"Pair\"\?\)$"),
        ("none.py:f", r"^task.build names none.py, which cannot be read \(No such .* working directory, /"),
        ("folder.py:f", r"folder.py, which cannot be read \(Is a directory\)"),
    ],
)
def test_bad_references_are_one_sentence(mine, reference, message):
    (mine.parent / "folder.py").mkdir()
    with pytest.raises(InputError, match=message):
        userfile.load(reference, "task.build")


def test_what_is_a_reference():
    assert userfile.is_reference("a/my.py:f")
    assert not any(map(userfile.is_reference, ("adamw", "my.py", "given in Python", None, 3)))


def test_copies_are_kept_and_a_change_is_refused_with_the_way_on(mine):
    files = userfile.digests({"optim.name": "my.py:Pair"})
    folder = mine.parent / "kept"
    userfile.keep({"neighbour.py": "0" * 64}, folder)
    userfile.keep(files, folder)
    (copy,) = folder.iterdir()  # another version's is gone
    assert copy.name == f"my-{files['my.py'][:8]}.py" and copy.read_text() == MINE
    userfile.refuse_changed(files, folder, "runs/a")
    mine.write_text(MINE + "#")
    message = r"^my.py has changed since runs/a was trained with it; put back .*kept/my-\w{8}.py, or start"
    with pytest.raises(InputError, match=message):
        userfile.refuse_changed(files, folder, "runs/a")
    mine.write_bytes(copy.read_bytes())
    userfile.refuse_changed(files, folder, "runs/a")
    mine.unlink()
    message = rf"^my.py, with which runs/a was trained, cannot be read \(No such .* directory, {mine.parent};"
    with pytest.raises(InputError, match=message):
        userfile.refuse_changed(files, folder, "runs/a")


def test_an_error_in_the_file_shows_the_users_lines_alone(mine):
    mine.write_text("def f(x):\n    return g(x)\n\ndef g(x):\n    return 1 / x\n")
    try:
        userfile.load("my.py:f", "task.build")(0)
    except ZeroDivisionError as error:
        shown = userfile.own_traceback(error)
    lines = shown.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith('my.py", line 2, in f')
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "test_userfile" not in shown


def test_whose_error_it_is(mine):
    mine.write_text("import cllm\ndef f(x):\n    if x:\n        raise cllm.InputError('no')\n")
    f = userfile.load("my.py:f", "task.build")
    with pytest.raises(InputError) as caught:
        f(1)
    assert userfile.own_traceback(caught.value) is None  # a sentence that the file itself says
    mine.write_text("from cllm import schedules\ndef f():\n    return schedules.warmup(0, -1.0, 3)\n")
    with pytest.raises(InputError) as caught:
        userfile.load("my.py:f", "task.build")()
    assert 'my.py", line 3, in f' in userfile.own_traceback(caught.value)  # where it called us wrongly
    assert userfile.own_traceback(ValueError("ours")) is None
    mine.write_text("def f(:\n")
    with pytest.raises(SyntaxError) as caught:
        userfile.load("my.py:f", "task.build")
    shown = userfile.own_traceback(caught.value)
    assert shown.splitlines()[0].endswith('my.py", line 1') and "cllm/userfile" not in shown
