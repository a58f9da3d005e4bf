"""How many threads kernels use."""

import runpy
from pathlib import Path

import pytest
from kernel_checks import same_bits, values

from cllm import kernels
from cllm.kernels import threads

THRESHOLDS = Path(__file__).parent.parent / "benchmarks" / "thresholds.py"


@pytest.fixture
def count_kept(monkeypatch):
    monkeypatch.setattr(threads, "count", threads.count)


def test_more_threads_than_cores_are_not_used(monkeypatch, count_kept):
    monkeypatch.setattr(threads, "CORES", 3)
    for wanted, used in ((1, 1), (2, 2), (3, 3), (4, 3), (1024, 3)):
        kernels.set_num_threads(wanted)
        assert kernels.get_num_threads() == used


@pytest.mark.parametrize("n", [0, -1, 1025, 1.5, True, "2", None])
def test_a_number_of_threads_is_from_1_to_1024(n):
    with pytest.raises(ValueError, match=r"set_num_threads: n is .*, it must be an integer from 1 to 1024"):
        kernels.set_num_threads(n)


def test_the_calls_that_thresholds_are_measured_with(count_kept):
    """A negative count is for any work: here for little."""
    found = {}
    for family in runpy.run_path(str(THRESHOLDS))["FAMILIES"]:
        for call, (function, work) in family(4).items():
            found[family.__name__, call] = work
            threads.count = -2
            function()
    assert len(found) == 20
    assert min(found.values()) == 4 * 64


def test_little_work_for_two_threads_has_the_same_bits(count_kept):
    x, weight = values(40, 64, dtype="float32"), values(64, 64, dtype="float32", seed=1)
    results = []
    for threads.count in (1, -2, -3):
        results.append(kernels.linear_forward(x, weight))
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])
