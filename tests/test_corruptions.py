"""A few of the changed files of corruptions.py; and that it notices what it is there to notice."""

import corruptions
import pytest

from cllm import arrays, checkpoint, saved
from cllm.data import cache


def test_changed_files_are_noticed():
    counts, failures = corruptions.run(20 * len(corruptions.KINDS), seed=1)
    assert failures == []
    assert {kind.partition(" ")[0] for kind in counts} == {*corruptions.KINDS}


class Alike(str):
    """A hash that is every other."""

    def __ne__(self, other):
        return False


real_fill = arrays._fill


def wasteful_fill(file, view, path):
    bytearray(1_000_000)
    real_fill(file, view, path)


def wrong_error(file, sha256, found):
    if sha256 != found["sha256"][file.name]:
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("owner", "name", "broken", "kinds", "said"),
    [
        (checkpoint, "_check", lambda *_: None, {"checkpoint", "mixed", "step"}, "it was loaded"),
        (checkpoint, "_check", wrong_error, {"checkpoint", "mixed", "step"}, "RuntimeError: something else"),
        (checkpoint, "_sha256", lambda *_: "0" * 64, {"checkpoint", "step"}, "it was loaded"),
        (arrays, "check_name", lambda name: None, {"deceit"}, "it was loaded"),
        (arrays, "_once", dict, {"deceit"}, "it was loaded"),
        (arrays, "_fill", wasteful_fill, {"checkpoint", "deceit", "step"}, "bytes were taken for"),
        (saved, "digest", lambda tokenizer: Alike(), {"tokenizer"}, "it is another"),
        (cache, "_sha256", lambda array, description: "0" * 64, {"cached"}, "nothing was said"),
        (cache, "scan", lambda path, dtype: ("0" * 64, 0), {"plain"}, "other tokens have the same hash"),
    ],
)
def test_what_is_broken_is_noticed(monkeypatch, owner, name, broken, kinds, said):
    monkeypatch.setattr(owner, name, broken)
    _, failures = corruptions.run(40 * len(kinds), seed=2, kinds=sorted(kinds))
    assert {failure.partition(", ")[2].partition(":")[0] for failure in failures if said in failure} == kinds
