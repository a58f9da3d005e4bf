"""Schedules: where warm-up and decay begin and end, and refused arguments."""

import itertools
import math

import pytest

from cllm import schedules
from cllm.errors import InputError
from cllm.schedules import ScheduleConfig


def test_warmup_starts_at_a_share_and_reaches_lr():
    rates = [schedules.warmup(step, 1e-3, 10) for step in range(12)]
    assert rates[0] == pytest.approx(1e-4, rel=1e-15)
    assert rates[4] == pytest.approx(5e-4, rel=1e-15)
    assert rates[8] < 1e-3
    assert rates[9:] == [1e-3] * 3


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warmup(warmup_steps):
    assert schedules.warmup(0, 0.5, warmup_steps) == 0.5
    assert schedules.constant(0, 0.5, warmup_steps) == 0.5
    assert schedules.cosine(0, 0.5, warmup_steps, 10) == 0.5


def test_constant_keeps_lr_after_the_warmup():
    assert schedules.constant(1, 0.4, 4) == pytest.approx(0.2, rel=1e-15)
    assert schedules.constant(10**6, 0.4, 4) == 0.4


def test_cosine_touches_lr_and_min_lr_exactly():
    def at(step):
        return schedules.cosine(step, lr=1e-3, warmup_steps=100, max_steps=2000, min_lr=1e-4)

    assert at(0) == pytest.approx(1e-5, rel=1e-15)
    assert at(99) == 1e-3
    assert at(1999) == at(2000) == at(10**6) == 1e-4
    rates = [at(step) for step in range(99, 2000)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert at(99 + 950) == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-12)  # half way of 1900 steps


def test_cosine_against_its_formula():
    for step in range(5, 40):
        share = (step - 4) / (39 - 4)
        expected = 0.1 + (2.0 - 0.1) * 0.5 * (1 + math.cos(math.pi * share))
        assert schedules.cosine(step, 2.0, 5, 40, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("max_steps", "expected"), [(1, [0.5]), (2, [0.5, 0.1])])
def test_cosine_of_very_short_runs(max_steps, expected):
    assert [schedules.cosine(step, 0.5, 0, max_steps, 0.1) for step in range(max_steps)] == expected


def test_a_run_shorter_than_its_warmup_only_warms_up():
    rates = [schedules.cosine(step, 1.0, 100, 50, 0.0) for step in range(50)]
    assert rates == [(step + 1) / 100 for step in range(50)]


def test_at_follows_the_config():
    config = ScheduleConfig(warmup_steps=10, min_lr=0.1)
    assert schedules.at(config, 30, 0.5, 60) == schedules.cosine(30, 0.5, 10, 60, 0.1)
    config = ScheduleConfig(name="constant", warmup_steps=10, min_lr=0.1)
    assert schedules.at(config, 30, 0.5, 60) == 0.5
    assert ScheduleConfig() == ScheduleConfig("cosine", 100, 1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.cosine(0, math.nan, 0, 10), "lr is nan, it must be a finite number of at least 0"),
        (lambda: schedules.constant(0, -1.0), r"lr is -1\.0"),
        (lambda: schedules.cosine(-1, 1.0, 0, 10), "step is -1, it must be an integer of at least 0"),
        (lambda: schedules.cosine(0, 1.0, 0), "max_steps is None, it must be an integer of at least 1"),
        (lambda: schedules.cosine(0, 1.0, 2.5, 10), r"warmup_steps is 2\.5"),
        (lambda: schedules.cosine(0, 0.1, 0, 10, 0.5), r"min_lr is 0\.5, it must be at most lr \(0\.1\)"),
        (lambda: ScheduleConfig("cosin"), r'name is "cosin" \(did you mean "cosine"\?\), it must be one of'),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: ScheduleConfig(min_lr=math.inf), "min_lr is inf"),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
