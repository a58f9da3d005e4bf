"""Schedules against torch's, against formulas worked by hand, and what holds for all of them."""

import itertools
import math
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import config, schedules, sweep
from cllm.errors import InputError
from cllm.schedules import ScheduleConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")

# A value for each key that the run's length would give, and what "join" needs.
NEEDED = {
    "cosine_restarts": {"cycle_steps": 7},
    "step": {"step_size": 5},
    "multi_step": {"milestones": (100, 130)},
    "exponential": {"gamma": 0.97},
    "join": {"names": ("constant", "cosine"), "boundaries": (100,)},
}
ENDING = ("linear", "cosine", "cosine_restarts", "wsd")  # with min_lr at max_steps - 1
UNENDING = ("constant", "warmup", "step", "multi_step", "exponential", "inverse_sqrt")


def rates(function, n, **arguments):
    return [function(step, **arguments) for step in range(n)]


# Warm-up ---------------------------------------------------------------------------------------------


def test_warmup_starts_at_a_share_and_reaches_lr():
    found = rates(schedules.warmup, 12, lr=1e-3, warmup_steps=10)
    assert found[0] == pytest.approx(1e-4, rel=1e-15)
    assert found[4] == pytest.approx(5e-4, rel=1e-15)
    assert found[8] < 1e-3
    assert found[9:] == [1e-3] * 3


@pytest.mark.parametrize("warmup_steps", [0, 1])
@pytest.mark.parametrize("name", ["constant", *ENDING, *UNENDING])
def test_no_warmup_starts_at_lr(name, warmup_steps):
    chosen = ScheduleConfig(name, warmup_steps=warmup_steps, **NEEDED.get(name, {}))
    assert schedules.at(chosen, 0, 0.5, 10) == 0.5


@pytest.mark.parametrize("name", ["join", *ENDING, *UNENDING])
def test_all_begin_with_the_same_warmup(name):
    chosen = ScheduleConfig(name, warmup_steps=20, **NEEDED.get(name, {}))
    found = [schedules.at(chosen, step, 0.5, 200) for step in range(20)]
    assert found == rates(schedules.warmup, 20, lr=0.5, warmup_steps=20)
    assert found[0] == 0.5 / 20
    assert found[19] == 0.5


@pytest.mark.parametrize("name", [*ENDING, *UNENDING])
def test_a_run_shorter_than_its_warmup_only_warms_up(name):
    chosen = ScheduleConfig(name, warmup_steps=100, **NEEDED.get(name, {}))
    found = [schedules.at(chosen, step, 1.0, 50) for step in range(50)]
    assert found == [(step + 1) / 100 for step in range(50)]


def test_constant_keeps_lr_after_the_warmup():
    assert schedules.constant(1, 0.4, 4) == pytest.approx(0.2, rel=1e-15)
    assert schedules.constant(10**6, 0.4, 4) == 0.4


# Formulas --------------------------------------------------------------------------------------------


def test_cosine_touches_lr_and_min_lr_exactly():
    def at(step):
        return schedules.cosine(step, lr=1e-3, warmup_steps=100, max_steps=2000, min_lr=1e-4)

    assert at(0) == pytest.approx(1e-5, rel=1e-15)
    assert at(99) == 1e-3
    assert at(1999) == at(2000) == at(10**6) == 1e-4
    found = [at(step) for step in range(99, 2000)]
    assert all(a > b for a, b in itertools.pairwise(found))
    assert at(99 + 950) == pytest.approx((1e-3 + 1e-4) / 2, rel=1e-12)  # half way of 1900 steps


def test_cosine_against_its_formula():
    for step in range(5, 40):
        share = (step - 4) / (39 - 4)
        expected = 0.1 + (2.0 - 0.1) * 0.5 * (1 + math.cos(math.pi * share))
        assert schedules.cosine(step, 2.0, 5, 40, 0.1) == pytest.approx(expected, rel=1e-12)


def test_rounding_never_lifts_a_rate_above_lr():
    assert 0.15 + (0.42 - 0.15) > 0.42
    assert schedules.cosine(1, 0.42, 0, 10**9, 0.15) == 0.42


def test_linear_by_hand():
    found = rates(schedules.linear, 8, lr=1.0, warmup_steps=2, max_steps=6, min_lr=0.2)
    assert found == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2], rel=1e-12)


def test_cosine_restarts_by_hand():
    found = rates(schedules.cosine_restarts, 8, lr=1.0, cycle_steps=2, cycle_mult=2)
    half, quarter = 0.5, (1 + math.sqrt(0.5)) / 2
    assert found == pytest.approx([1, half, 1, quarter, half, 1 - quarter, 1, 0.9619397662556434], rel=1e-12)


def test_the_last_cycle_is_shortened_to_end_with_the_run():
    arguments = {"lr": 1.0, "cycle_steps": 4, "warmup_steps": 3, "min_lr": 0.2}
    endless = rates(schedules.cosine_restarts, 30, **arguments)
    found = rates(schedules.cosine_restarts, 30, max_steps=13, **arguments)
    assert found[:10] == endless[:10]  # cycles from 2 and from 6, and the beginning of that from 10
    assert found[2] == found[6] == found[10] == 1.0
    assert found[11] == pytest.approx(0.6, rel=1e-12)
    assert found[12:] == [0.2] * 18
    # A cycle that would begin at the last step does not.
    assert rates(schedules.cosine_restarts, 30, max_steps=11, **arguments)[9:12] == [endless[9], 0.2, 0.2]


def test_step_and_multi_step_by_hand():
    found = rates(schedules.step, 9, lr=1.0, step_size=2, gamma=0.5, warmup_steps=2, min_lr=0.2)
    assert found == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    found = rates(
        schedules.multi_step, 9, lr=1.0, milestones=[3, 4, 8], gamma=0.5, warmup_steps=2, min_lr=0.2
    )
    assert found == [0.5, 1.0, 1.0, 0.5, 0.25, 0.25, 0.25, 0.25, 0.2]
    assert rates(schedules.multi_step, 3, lr=1.0, milestones=[]) == [1.0] * 3


def test_exponential_by_hand():
    found = rates(schedules.exponential, 6, lr=1.0, gamma=0.5, warmup_steps=2, min_lr=0.2)
    assert found == [0.5, 1.0, 0.5, 0.25, 0.2, 0.2]
    assert schedules.exponential(10**6, 1.0, 0.5) == 0.0


def test_inverse_sqrt_is_the_transformers_formula():
    d_model, warmup_steps = 512, 40
    lr = (d_model * warmup_steps) ** -0.5
    for step in range(200):
        n = step + 1  # the paper counts updates from 1
        expected = d_model**-0.5 * min(n**-0.5, n * warmup_steps**-1.5)
        assert schedules.inverse_sqrt(step, lr, warmup_steps) == pytest.approx(expected, rel=1e-12)
    assert rates(schedules.inverse_sqrt, 4, lr=1.0, min_lr=0.55) == pytest.approx(
        [1.0, math.sqrt(0.5), math.sqrt(1 / 3), 0.55], rel=1e-12
    )


def test_wsd_by_hand():
    found = rates(schedules.wsd, 12, lr=1.0, warmup_steps=2, max_steps=10, min_lr=0.2, decay_steps=4)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2], rel=1e-12)
    found = rates(schedules.wsd, 10, lr=1.0, max_steps=10, decay_steps=4, decay_shape="1-sqrt")
    assert found == pytest.approx([1] * 6 + [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0], rel=1e-12)


def test_wsd_takes_its_decay_as_a_share_and_shortens_it_after_a_long_warmup():
    assert rates(schedules.wsd, 50, lr=1.0, max_steps=50) == rates(
        schedules.wsd, 50, lr=1.0, max_steps=50, decay_steps=10
    )
    assert rates(schedules.wsd, 50, lr=1.0, max_steps=50, decay_share=1.0, warmup_steps=5) == pytest.approx(
        rates(schedules.linear, 50, lr=1.0, max_steps=50, warmup_steps=5), rel=1e-12
    )
    assert rates(schedules.wsd, 2, lr=1.0, max_steps=2, decay_share=0.01) == [1.0, 0.0]  # one step at least


def test_one_cycle_by_hand():
    found = rates(schedules.one_cycle, 12, lr=1.0, max_steps=10, anneal_strategy="linear", div_factor=5.0)
    first, last = 0.2, 0.2 / 1e4
    up = [first + (1 - first) * i / 2 for i in range(3)]
    down = [1 - (1 - last) * i / 7 for i in range(1, 8)]
    assert found == pytest.approx([*up, *down, last, last], rel=1e-12)
    assert found[9] == found[11]
    # Where the peak falls on step 0, torch divides by zero.
    assert schedules.one_cycle(0, 1.0, max_steps=10, pct_start=0.1) == 1.0


def test_join_gives_each_part_its_own_steps():
    parts = [
        partial(schedules.constant, warmup_steps=2),
        partial(schedules.linear, max_steps=3),
        partial(schedules.step, step_size=2, gamma=0.5),
    ]
    joined = schedules.join(parts, [4, 7])
    assert [joined(step, 1.0) for step in range(12)] == [0.5, 1, 1, 1, 1, 0.5, 0, 1, 1, 0.5, 0.5, 0.25]
    assert schedules.join([schedules.constant], [])(5, 0.3) == 0.3


@pytest.mark.parametrize("name", ENDING)
def test_very_short_runs(name):
    arguments = {"warmup_steps": 0, "min_lr": 0.1, **NEEDED.get(name, {})}
    function = getattr(schedules, name)
    assert rates(function, 3, lr=0.5, max_steps=1, **arguments) == [0.5, 0.1, 0.1]
    assert rates(function, 3, lr=0.5, max_steps=2, **arguments) == [0.5, 0.1, 0.1]


# torch -----------------------------------------------------------------------------------------------

TWINS = {  # our function and its arguments; torch's scheduler and its; both from lr = 0.5
    "constant": ({}, "ConstantLR", {"factor": 1.0}),
    "linear": ({"max_steps": 60, "min_lr": 0.05}, "LinearLR",
               {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 59}),
    "cosine": ({"max_steps": 60, "min_lr": 0.05}, "CosineAnnealingLR", {"T_max": 59, "eta_min": 0.05}),
    "cosine_restarts": ({"cycle_steps": 10, "cycle_mult": 2, "min_lr": 0.05}, "CosineAnnealingWarmRestarts",
                        {"T_0": 10, "T_mult": 2, "eta_min": 0.05}),
    "step": ({"step_size": 7, "gamma": 0.6}, "StepLR", {"step_size": 7, "gamma": 0.6}),
    "multi_step": ({"milestones": [9, 20, 21], "gamma": 0.6}, "MultiStepLR",
                   {"milestones": [9, 20, 21], "gamma": 0.6}),
    "exponential": ({"gamma": 0.93}, "ExponentialLR", {"gamma": 0.93}),
}  # fmt: skip


def torch_rates(n, make):
    """The first n rates of a torch scheduler, from lr = 0.5."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    found = []
    for step in range(n):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step < n - 1:
            scheduler.step()
    return found


@pytest.mark.parametrize("name", TWINS)
def test_against_torch_over_a_whole_run(name):
    ours, twin, theirs = TWINS[name]
    expected = torch_rates(60, lambda lr_scheduler, o: getattr(lr_scheduler, twin)(o, **theirs))
    assert rates(getattr(schedules, name), 60, lr=0.5, **ours) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in TWINS if name != "multi_step"])
def test_against_torch_with_a_warmup(name):
    # torch's SequentialLR counts a schedule's steps from where it takes over: the end of the warm-up.
    ours, twin, theirs = TWINS[name]
    if "max_steps" in ours:
        ours = {**ours, "max_steps": 69}

    def make(lr_scheduler, optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
        decay = getattr(lr_scheduler, twin)(optimizer, **theirs)
        return lr_scheduler.SequentialLR(optimizer, [warm, decay], milestones=[9])

    found = rates(getattr(schedules, name), 69, lr=0.5, warmup_steps=10, **ours)
    assert found == pytest.approx(torch_rates(69, make), rel=1e-12)


def test_cosine_restarts_of_whole_cycles_differs_from_torch_in_the_last_step_alone():
    expected = torch_rates(31, lambda s, o: s.CosineAnnealingWarmRestarts(o, 10, eta_min=0.05))
    found = rates(schedules.cosine_restarts, 31, lr=0.5, cycle_steps=10, max_steps=31, min_lr=0.05)
    assert found[:30] == pytest.approx(expected[:30], rel=1e-12)
    assert (found[30], expected[30]) == (0.05, 0.5)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
@pytest.mark.parametrize(
    ("max_steps", "pct_start"), [(100, 0.3), (60, 0.5), (37, 0.21), (5, 0.0), (2, 0.3), (1, 0.3)]
)
def test_one_cycle_against_torch(max_steps, pct_start, anneal_strategy, three_phase):
    arguments = {
        "pct_start": pct_start, "anneal_strategy": anneal_strategy, "div_factor": 20.0,
        "final_div_factor": 100.0, "three_phase": three_phase,
    }  # fmt: skip
    expected = torch_rates(
        max_steps,
        lambda s, o: s.OneCycleLR(o, 0.5, total_steps=max_steps, cycle_momentum=False, **arguments),
    )
    found = rates(schedules.one_cycle, max_steps, lr=0.5, max_steps=max_steps, **arguments)
    assert found == pytest.approx(expected, rel=1e-12)


def test_join_against_torchs_sequential():
    def make(lr_scheduler, optimizer):
        parts = [
            lr_scheduler.ConstantLR(optimizer, factor=1.0),
            lr_scheduler.StepLR(optimizer, 4),
            lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[10, 25])

    parts = [
        schedules.constant, partial(schedules.step, step_size=4), partial(schedules.exponential, gamma=0.9)
    ]  # fmt: skip
    joined = schedules.join(parts, [10, 25])
    assert [joined(step, 0.5) for step in range(40)] == pytest.approx(torch_rates(40, make), rel=1e-12)


# Properties ------------------------------------------------------------------------------------------


@st.composite
def drawn(draw):
    """A schedule's name, its arguments and the run: (name, config, lr, max_steps)."""
    name = draw(st.sampled_from(schedules.NAMES))
    lr = draw(st.floats(1e-8, 1e3))
    max_steps = draw(st.integers(1, 60))
    count, gamma = st.integers(1, 40), st.floats(0.01, 1.0)
    increasing = st.lists(st.integers(30, 60), max_size=3, unique=True).map(sorted)
    values = {
        "warmup_steps": st.integers(0, 30), "min_lr": st.floats(0.0, lr), "cycle_steps": count,
        "cycle_mult": st.integers(1, 3), "step_size": count, "milestones": increasing, "gamma": gamma,
        "decay_steps": count, "decay_share": st.floats(0.01, 1.0),
        "decay_shape": st.sampled_from(["linear", "1-sqrt"]), "pct_start": st.floats(0.0, 0.5),
        "anneal_strategy": st.sampled_from(["cos", "linear"]), "div_factor": st.floats(1.0, 100.0),
        "final_div_factor": st.floats(1.0, 1e4), "three_phase": st.booleans(),
    }  # fmt: skip
    names = ()
    own = {}
    if name == "join":
        own["boundaries"] = draw(increasing)
        size = len(own["boundaries"]) + 1
        parts = st.sampled_from([n for n in schedules.NAMES if n not in ("join", "multi_step")])
        own["names"] = names = tuple(draw(st.lists(parts, min_size=size, max_size=size)))
    left_out = draw(st.sampled_from(["decay_steps", "decay_share"]))
    keys = [key for key in schedules.arguments(name, names) if key in values and key != left_out]
    return ScheduleConfig(name, **own, **{key: draw(values[key]) for key in keys}), lr, max_steps


@settings(max_examples=150)
@given(drawn())
def test_bounds_warmup_and_end(case):
    chosen, lr, max_steps = case
    found = [schedules.at(chosen, step, lr, max_steps) for step in range(max_steps + 80)]
    assert all(isinstance(rate, float) and 0 <= rate <= lr for rate in found)
    first = chosen.names[0] if chosen.names else chosen.name
    if first != "one_cycle":
        n = chosen.warmup_steps
        assert found[:n] == rates(schedules.warmup, n, lr=lr, warmup_steps=n)
        assert found[max(n - 1, 0)] == lr
        if chosen.min_lr is not None and "one_cycle" not in (chosen.names or ()):
            assert min(found[n:]) >= chosen.min_lr
    if chosen.name in ENDING and max_steps > max(chosen.warmup_steps, 1):
        assert set(found[max_steps - 1 :]) == {chosen.min_lr}
    if chosen.name == "one_cycle":
        end = lr / chosen.div_factor / chosen.final_div_factor
        assert set(found[max_steps - 1 :]) == {end}


@settings(max_examples=60)
@given(drawn(), st.integers(1, 60))
def test_decays_only_fall_and_ignore_the_length_where_they_say_so(case, other):
    chosen, lr, max_steps = case
    found = [schedules.at(chosen, step, lr, max_steps) for step in range(max_steps)]
    longer = [schedules.at(chosen, step, lr, max_steps + other) for step in range(max_steps)]
    shared = schedules.shared_steps(chosen, lr, max_steps, max_steps + other)
    assert shared == schedules.shared_steps(chosen, lr, max_steps + other, max_steps)
    assert found[:shared] == longer[:shared]
    assert shared == max_steps or found[shared] != longer[shared]
    if chosen.name in UNENDING:
        assert shared == max_steps
    if chosen.name not in ("join", "one_cycle", "cosine_restarts"):
        falling = found[max(chosen.warmup_steps - 1, 0) :]
        assert all(a >= b for a, b in itertools.pairwise(falling))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "one_cycle"])
def test_smooth_ones_take_no_jumps(name):
    chosen = ScheduleConfig(name, min_lr=None if name == "one_cycle" else 0.1)
    found = [schedules.at(chosen, step, 1.0, 10_000) for step in range(10_000)]
    assert max(abs(a - b) for a, b in itertools.pairwise(found)) < 0.011  # 1 / warmup_steps


def test_shared_steps():
    def shared(name, **keys):
        return schedules.shared_steps(ScheduleConfig(name, **keys), 1.0, 1000, 2000)

    assert shared("constant") == shared("inverse_sqrt") == shared("exponential", gamma=0.99) == 1000
    assert shared("cosine") == shared("linear") == 100
    assert shared("cosine", warmup_steps=0) == 1
    assert shared("wsd", decay_steps=200) == 1000 - 200
    assert shared("wsd", decay_share=0.5) == 1000 - 500
    assert shared("one_cycle") == 1
    # What follows from the run's length is not shared, if it was left out.
    assert shared("exponential") == 100 and shared("step") == 99 + math.ceil((1000 - 99) / 3)
    # Cycles begin at 99, 399 and 699, which goes on to 999: it ends there anyway, but at min_lr.
    assert shared("cosine_restarts", cycle_steps=300) == 999
    assert shared("join", names=["constant", "cosine"], boundaries=[600]) == 601


# The configuration -----------------------------------------------------------------------------------


def test_at_follows_the_config():
    chosen = ScheduleConfig(warmup_steps=10, min_lr=0.1)
    assert schedules.at(chosen, 30, 0.5, 60) == schedules.cosine(30, 0.5, 10, 60, 0.1)
    chosen = ScheduleConfig(name="constant", warmup_steps=10)
    assert schedules.at(chosen, 30, 0.5, 60) == 0.5
    assert ScheduleConfig() == ScheduleConfig("cosine", 100, 1e-4)


def test_what_is_left_out_follows_from_the_runs_length():
    def falls(name, max_steps, **keys):
        """The steps at which the rate is lower than before, and the last rate."""
        chosen = ScheduleConfig(name, **keys)
        found = [schedules.at(chosen, step, 0.5, max_steps) for step in range(max_steps)]
        return [n for n, (a, b) in enumerate(itertools.pairwise(found), 1) if b < a], found[-1]

    for warmup_steps, max_steps in itertools.product((0, 1, 7), (1, 2, 3, 8, 9, 10, 300, 301, 302)):
        keys = {"warmup_steps": warmup_steps, "min_lr": 0.0}
        start = max(warmup_steps - 1, 0)
        steps, _ = falls("step", max_steps, **keys)
        third = max(math.ceil((max_steps - start) / 3), 1)
        assert steps == [n for n in (start + third, start + 2 * third) if n < max_steps]
        steps, _ = falls("multi_step", max_steps, **keys)
        milestones = sorted({max_steps // 2, 3 * max_steps // 4})
        assert steps == [n for n in milestones if n >= max(warmup_steps, 1)]
        if max_steps > start + 1:
            assert falls("exponential", max_steps, **keys)[1] == pytest.approx(0.005)
            assert falls("exponential", max_steps, **keys | {"min_lr": 0.1})[1] == pytest.approx(0.1)
    assert falls("step", 300, warmup_steps=0, min_lr=0.0)[1] == pytest.approx(0.5 * 0.1**2)
    assert falls("step", 300, warmup_steps=0, min_lr=0.0, gamma=0.5)[1] == 0.125
    for cycle_mult, restart in ((1, 150), (2, 100)):
        chosen = ScheduleConfig("cosine_restarts", 0, 0.1, cycle_mult=cycle_mult)
        found = [schedules.at(chosen, step, 0.5, 301) for step in range(301)]
        assert [n for n, (a, b) in enumerate(itertools.pairwise(found), 1) if b > a] == [restart]
        assert found[restart] == 0.5 and found[300] == 0.1
    # In a join each part follows from its own length, and has its own gamma.
    chosen = ScheduleConfig("join", 0, 0.0, names=["step", "exponential"], boundaries=[30])
    found = [schedules.at(chosen, step, 0.5, 60) for step in range(60)]
    assert found[9:11] == [0.5, 0.05] and found[30] == 0.5 and found[59] == pytest.approx(0.005)


@pytest.mark.parametrize("name", [name for name in schedules.NAMES if name != "join"])
def test_at_is_the_function_of_that_name(name):
    chosen = ScheduleConfig(name, **NEEDED.get(name, {}))
    keys = schedules.arguments(name)
    values = {key: getattr(chosen, key) for key in keys if getattr(chosen, key) is not None}
    assert values == {
        key: default for key, default in keys.items() if default not in (None, schedules.REQUIRED)
    } | NEEDED.get(name, {})
    ends = {} if name in UNENDING else {"max_steps": 200}
    for step in (0, 50, 120, 150, 199, 300):
        expected = getattr(schedules, name)(step, 0.5, **values, **ends)
        assert schedules.at(chosen, step, 0.5, 200) == expected


def test_at_joins():
    chosen = ScheduleConfig(
        "join",
        warmup_steps=10,
        min_lr=0.1,
        names=["linear", "wsd", "constant"],
        boundaries=[40, 90],
        decay_steps=20,
    )
    assert chosen.decay_share is None and chosen.decay_shape == "linear"
    found = [schedules.at(chosen, step, 0.5, 120) for step in range(120)]
    assert found[:40] == rates(schedules.linear, 40, lr=0.5, warmup_steps=10, max_steps=40, min_lr=0.1)
    assert found[40:90] == rates(schedules.wsd, 50, lr=0.5, max_steps=50, min_lr=0.1, decay_steps=20)
    assert found[90:] == [0.5] * 30
    # A run that ends before its last part begins.
    assert [schedules.at(chosen, step, 0.5, 60) for step in range(60)] == found[:60]


def test_a_join_takes_what_its_parts_take():
    assert set(schedules.arguments("join", ["constant"])) == {"names", "boundaries", "warmup_steps"}
    taken = schedules.arguments("join", ["one_cycle", "step", "exponential"])
    assert "warmup_steps" not in taken and {"pct_start", "step_size", "min_lr"} <= set(taken)
    assert taken["gamma"] is None  # each part's own
    assert schedules.arguments("join", ["exponential", "step"])["gamma"] is None
    assert schedules.arguments("join", ["multi_step", "step"])["gamma"] == 0.1
    chosen = ScheduleConfig("join", names=["one_cycle", "linear"], boundaries=[50])
    assert schedules.at(chosen, 50, 0.5, 80) == 0.5


def test_config_to_toml_and_back():
    sections = [{"name": name, **NEEDED.get(name, {})} for name in schedules.NAMES]
    for section in sections + [{"name": name} for name in schedules.NAMES[:-1]]:
        name = section["name"]
        chosen = config.from_dict({"schedule": section})
        nested = tomllib.loads(config.to_toml(config.to_dict(chosen)))
        assert config.from_dict(nested) == chosen
        names = section.get("names", ())
        known = {key for key in schedules.arguments(name, names) if getattr(chosen.schedule, key) is not None}
        assert set(nested["schedule"]) == {"name", *known}


def test_every_schedule_can_be_swept(tmp_path, text_file):
    path = tmp_path / "sweep.toml"
    path.write_text(
        f"""
        [sweep]
        seeds = [0]
        [base.data]
        source = "{text_file}"
        [base.schedule]
        warmup_steps = 10
        min_lr = 0.0
        [[space]]
        "schedule.name" = [
            "cosine", "constant", "linear", "inverse_sqrt", "wsd", "one_cycle", "warmup", "step",
            "multi_step", "exponential", "cosine_restarts",
        ]
        [[space]]
        "schedule.name" = "step"
        "schedule.step_size" = [100, 200]
        "schedule.gamma" = 0.5
        [[space]]
        "schedule.name" = "multi_step"
        "schedule.milestones" = [[100, 150], [150]]
        [[space]]
        "schedule.name" = "exponential"
        "schedule.gamma" = [0.99, 0.999]
        [[space]]
        "schedule.name" = "cosine_restarts"
        "schedule.cycle_steps,schedule.cycle_mult" = [[50, 1], [30, 2]]
        [[space]]
        "schedule.name" = "join"
        "schedule.names" = [["constant", "cosine"], ["one_cycle", "linear"]]
        "schedule.boundaries" = [[50], [100]]
        """
    )
    plan = sweep.Sweep.load(path)
    found = [plan.trial_config(trial).schedule for trial in plan.trials()]
    assert len(found) == 11 + 2 + 2 + 2 + 2 + 4
    assert {chosen.name for chosen in found} == set(schedules.NAMES)
    assert found[12].step_size == 200 and found[13].milestones == (100, 150)
    assert plan.notices == [
        'schedule.min_lr of the base is left out where schedule.name is "constant"',
        'schedule.min_lr of the base is left out where schedule.name is "one_cycle"',
        'schedule.warmup_steps of the base is left out where schedule.name is "one_cycle"',
        'schedule.min_lr of the base is left out where schedule.name is "warmup"',
        'schedule.warmup_steps of the base is left out where schedule.name is "join"',
    ]


def test_the_documentations_snippets_are_configs_of_every_schedule():
    blocks = re.findall(r"^```toml\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    found = [config.from_dict(tomllib.loads(block)).schedule.name for block in blocks]
    assert set(found) == set(schedules.NAMES)
    for block in re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL):
        exec(compile(block, "schedules.md", "exec"), {})


def test_the_documentations_table_names_each_schedules_keys():
    for name in schedules.NAMES:
        (section,) = re.findall(rf"^## `{name}`\n(.*?)(?=^## |\Z)", DOCS, re.MULTILINE | re.DOTALL)
        for key in schedules.arguments(name):
            assert f"`{key}" in section or key in ("warmup_steps", "min_lr"), (name, key)


def _config(**keys):
    return lambda: ScheduleConfig(**keys)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.cosine(0, math.nan, 0, 10), "lr is nan, it must be a finite number of at least 0"),
        (lambda: schedules.constant(0, -1.0), r"lr is -1\.0"),
        (lambda: schedules.cosine(-1, 1.0, 0, 10), "step is -1, it must be an integer of at least 0"),
        (lambda: schedules.cosine(0, 1.0, 0), "max_steps is None, it must be an integer of at least 1"),
        (lambda: schedules.linear(0, 1.0), "max_steps is None, it must be an integer of at least 1"),
        (lambda: schedules.wsd(0, 1.0), "max_steps is None, it must be an integer of at least 1"),
        (lambda: schedules.one_cycle(0, 1.0, 0), "max_steps is 0, it must be an integer of at least 1"),
        (lambda: schedules.cosine(0, 1.0, 2.5, 10), r"warmup_steps is 2\.5"),
        (lambda: schedules.cosine(0, 0.1, 0, 10, 0.5), r"min_lr is 0\.5, it must be at most lr \(0\.1\)"),
        (lambda: schedules.inverse_sqrt(0, 0.1, 0, 0.5), r"min_lr is 0\.5, it must be at most lr \(0\.1\)"),
        (lambda: schedules.step(0, 0.1, 0), "step_size is 0, it must be an integer of at least 1"),
        (lambda: schedules.step(0, 0.1, 3, 0.0), r"gamma is 0\.0, it must be a number in \(0, 1\]"),
        (lambda: schedules.exponential(0, 0.1, 1.5), r"gamma is 1\.5, it must be a number in \(0, 1\]"),
        (lambda: schedules.multi_step(0, 0.1, [3, 3]), "milestones has 3 after 3, it must increase"),
        (lambda: schedules.multi_step(0, 0.1, [3, 2.5]), r"milestones has 2\.5, it must have integers of at"),
        (lambda: schedules.multi_step(0, 0.1, 3), "milestones is 3, it must be a list of integers"),
        (
            lambda: schedules.multi_step(0, 0.1, [3], warmup_steps=5),
            r"milestones has 3, it must have integers of at least 5 \(warmup_steps is 5\)",
        ),
        (lambda: schedules.cosine_restarts(0, 0.1, 0), "cycle_steps is 0, it must be an integer of at "),
        (lambda: schedules.cosine_restarts(0, 0.1, 5, 1.5), r"cycle_mult is 1\.5, it must be an integer"),
        (lambda: schedules.cosine_restarts(0, 0.1, 5, max_steps=0), "max_steps is 0, it must be an integer"),
        (lambda: schedules.wsd(0, 0.1, 0, 9, decay_steps=0), "decay_steps is 0, it must be an integer of at"),
        (lambda: schedules.wsd(0, 0.1, 0, 9, decay_share=0), r"decay_share is 0, it must be a number in "),
        (
            lambda: schedules.wsd(0, 0.1, 0, 9, decay_shape="sqrt"),
            r'decay_shape is "sqrt" \(did you mean "1-sqrt"\?\), it must be one of linear, 1-sqrt',
        ),
        (lambda: schedules.one_cycle(0, 0.1, 9, 1.0), r"pct_start is 1\.0, it must be a number in \[0, 1\)"),
        (
            lambda: schedules.one_cycle(0, 0.1, 9, 0.6, three_phase=True),
            r"pct_start is 0\.6, with three_phase it must be at most 0\.5",
        ),
        (lambda: schedules.one_cycle(0, 0.1, 9, three_phase=1), "three_phase is 1, it must be true or false"),
        (lambda: schedules.one_cycle(0, 0.1, 9, div_factor=0.5), r"div_factor is 0\.5, it must be a finite"),
        (lambda: schedules.one_cycle(0, 0.1, 9, anneal_strategy="sine"), 'anneal_strategy is "sine"'),
        (lambda: schedules.join([schedules.constant], [3]), r"boundaries has 1 step, .* the 1 schedules"),
        (lambda: schedules.join([schedules.constant] * 3, [3, 1]), "boundaries has 1 after 3, it must inc"),
        (_config(name="cosin"), r'name is "cosin" \(did you mean "cosine"\?\), it must be one of'),
        (_config(warmup_steps=-1), "warmup_steps is -1"),
        (_config(min_lr=math.inf), "min_lr is inf"),
        (_config(gamma=0.5), "^gamma is not an argument of cosine, which takes warmup_steps, min_lr$"),
        (_config(name="constant", min_lr=0.1), "^min_lr is not an argument of constant, which takes war"),
        (
            _config(name="one_cycle", warmup_steps=3),
            "^warmup_steps is not an argument of one_cycle, which takes pct_start, anneal_strategy, ",
        ),
        (_config(name="step", step_size=0), "^step_size is 0, it must be an integer of at least 1$"),
        (_config(name="step", step_size=3, gamma=2.0), r"^gamma is 2\.0, it must be a number in \(0, 1\]$"),
        (_config(name="wsd", decay_steps=3, decay_share=0.1), "^decay_share is given along with decay_steps"),
        (_config(name="join"), "^names is missing, join needs it$"),
        (_config(name="join", names=[], boundaries=[]), "^names is empty"),
        (_config(name="join", names=["join"], boundaries=[]), '^names is "join".*, it must be one of cosine'),
        (
            _config(name="join", names=["cosine", "linear"], boundaries=[]),
            r"^boundaries has 0 steps, it must have one less than the 2 schedules$",
        ),
        (
            _config(name="join", names=["constant", "exponential"], boundaries=[200], gamma=-1.0),
            r"^gamma is -1\.0, it must be a number in \(0, 1\]$",
        ),
        (
            _config(name="join", names=["constant", "linear"], boundaries=[50]),
            r"^boundaries has 50, it must have none before warmup_steps \(100\)$",
        ),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
