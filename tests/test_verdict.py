"""What a sweep's results are said to mean: the numbers, the ranking, the sentences."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from cllm import sweep, verdict
from cllm.verdict import statistics

RANGES = """
[[space]]
"optim.lr" = {low = 1e-4, high = 1e-1, log = true}
"model.dropout" = {low = 0.0, high = 0.5}
"""


# Numbers ---------------------------------------------------------------------------------------------


numbers = st.floats(-100, 100).map(lambda value: round(value, 6))
some = st.lists(numbers, min_size=2, max_size=9)


@given(some)
def test_the_t_interval_is_scipys(values):
    assume(np.std(values) > 1e-6)
    found = statistics.estimate(values)
    error = stats.sem(values)
    assert (found.n, found.method) == (len(values), "t")
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12)
    assert found.standard_error == pytest.approx(error, rel=1e-9)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
    assert found.interval == pytest.approx((low, high), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12))
def test_paired_differences_are_scipys_t_test(pairs):
    first, second = map(list, zip(*pairs))
    assume(np.std(np.subtract(first, second)) > 1e-4)
    found, theirs = statistics.paired(first, second), stats.ttest_rel(first, second)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6, abs=1e-9)
    assert found.mean / found.standard_error == pytest.approx(theirs.statistic, rel=1e-6, abs=1e-9)
    if len(pairs) == 2:
        assert found.correlation is None
    elif min(np.std(first), np.std(second)) > 1e-4:
        assert found.correlation == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-7)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 15])
def test_intervals_cover_the_truth_in_95_of_100_draws(n):
    rng = np.random.default_rng(n)
    found = [statistics.estimate(list(rng.normal(3.0, 0.1, n))) for _ in range(2000)]
    assert {estimate.method for estimate in found} == {"bootstrap" if n >= 10 else "t"}
    covered = np.mean([low <= 3.0 <= high for low, high in (estimate.interval for estimate in found)])
    assert 0.93 < covered < 0.97


def test_bootstrap_covers_skewed_values_better_than_t():
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(2000):
        values = list(rng.exponential(size=10))
        mean, error = statistics.mean_and_error(values)
        low, high = statistics.estimate(values).interval
        covered += low <= 1.0 <= high, abs(mean - 1.0) <= stats.t.ppf(0.975, 9) * error
    assert covered[0] / 2000 > 0.915 > covered[1] / 2000  # 0.925 and 0.894 seen


@pytest.mark.parametrize("n", [3, 10])
def test_intervals_of_paired_differences_cover_too(n):
    rng = np.random.default_rng(n)
    covered = []
    for _ in range(2000):
        shared = rng.normal(0, 0.3, n)  # what a seed does to both
        first, second = (list(mean + shared + rng.normal(0, 0.1, n)) for mean in (2.0, 1.9))
        low, high = statistics.paired(first, second).interval
        covered.append(low <= 0.1 <= high)
    assert 0.93 < np.mean(covered) < 0.97


def test_the_bootstrap_interval_is_bca_but_for_its_width(monkeypatch):
    values = list(np.random.default_rng(3).exponential(size=12))
    monkeypatch.setattr(statistics, "_t_quantile", lambda n: stats.norm.ppf(0.975) * math.sqrt((n - 1) / n))
    found = statistics.estimate(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=200_000, rng=1, vectorized=True)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval), abs=0.05 * found.standard_error)


def test_the_bootstrap_has_no_chance_in_it():
    values = list(np.random.default_rng(0).exponential(size=11))
    low, high = statistics.estimate(values).interval
    assert low < np.mean(values) < high
    assert statistics.estimate(values[::-1]).interval == (low, high)
    mirrored = statistics.estimate([-value for value in values]).interval
    assert mirrored == pytest.approx((-high, -low), rel=1e-12)
    moved = statistics.estimate([8 * value + 2 for value in values]).interval
    assert moved == pytest.approx((8 * low + 2, 8 * high + 2), rel=1e-9)


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_closed_testing_with_bonferroni(ps):
    """p of i is the largest, over all sets of tests with i, of the set's Bonferroni p."""
    sets = [s for n in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), n)]
    expected = [max(min(1.0, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(len(ps))]
    assert statistics.holm(ps) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (-0.5, 34), (1.0, 10)])
def test_seeds_needed_are_those_of_tables_of_power(effect, n):
    assert statistics.seeds_needed(effect) == n


def test_seeds_needed_have_the_power_and_one_fewer_has_not():
    def power(n, effect, tests):
        limit = stats.t.ppf(1 - 0.025 / tests, n - 1)
        return stats.nct.sf(limit, n - 1, effect * math.sqrt(n))

    for effect, tests in itertools.product([0.15, 0.7, 2.5], [1, 3, 45]):
        n = statistics.seeds_needed(effect, tests)
        assert power(n - 1, effect, tests) < 0.8 <= power(n, effect, tests)
    assert statistics.seeds_needed(0.05) is None  # more than 1,000
    assert statistics.seeds_needed(0.0) is None
    assert statistics.seeds_needed(1e300, 45) == 2


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("value", [0.0, 0.1, -2.5, 1e300, 5e-324])
def test_equal_values_have_no_spread_and_no_interval(value, n):
    found = statistics.estimate([value] * n)
    assert (found.mean, found.standard_error, found.interval, found.method) == (value, 0.0, None, None)
    found = statistics.paired([value] * n, [value] * n)
    assert (found.mean, found.standard_error, found.interval, found.p) == (0.0, 0.0, None, None)


def test_rounding_is_no_spread():
    first, second = [1.1, 1.2, 1.3], [1.0, 1.1, 1.2]
    assert len({a - b for a, b in zip(first, second)}) > 1
    found = statistics.paired(first, second)
    assert found.mean == pytest.approx(0.1)
    assert (found.standard_error, found.p, found.effect) == (0.0, None, None)
    assert statistics.paired([0.1 + 0.2, 0.7], [0.3, 0.7]).mean == 0.0
    assert statistics.mean_and_error([0.1 + 0.2, 0.3])[1] == 0.0


@given(some, some, st.integers(-1000, 1000))
def test_the_unit_does_not_matter(first, second, power):
    """Values times a power of two give the same numbers times it, however large or small they are."""
    pairs = list(zip(first, second))
    first, second = map(list, zip(*pairs))

    def times(value):
        return math.ldexp(value, power)

    plain, scaled = statistics.estimate(first), statistics.estimate(list(map(times, first)))
    assert scaled.mean == times(plain.mean)
    if plain.standard_error:
        assert scaled.standard_error == times(plain.standard_error)
        assert scaled.interval == tuple(map(times, plain.interval))
    plain = statistics.paired(first, second)
    scaled = statistics.paired(list(map(times, first)), list(map(times, second)))
    assert (scaled.p, scaled.effect, scaled.correlation) == (plain.p, plain.effect, plain.correlation)
    assert scaled.mean == times(plain.mean)


# Words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "error", "words"),
    [
        (1.95, 0.0288675, "1.950 ± 0.029"),
        (1.95, 0.0999, "1.95 ± 0.10"),
        (1.95, 0.00999, "1.950 ± 0.010"),
        (1234.5, 67.8, "1234 ± 68"),
        (1.95, 12.0, "2 ± 12"),
        (-0.5, 0.25, "-0.50 ± 0.25"),
        (1.234e30, 5.6e28, "1.234e+30 ± 5.6e+28"),
        (1.2341e-9, 6.7e-11, "1.234e-09 ± 6.7e-11"),
        (2.0, 1e-9, "2.0000000000e+00 ± 1.0e-09"),
        (0.0, 1e-12, "0.0e+00 ± 1.0e-12"),
        (2.123456, None, "2.1235"),
        (2.0, 0.0, "2"),
        (1e300, math.inf, "1e+300 ± inf"),
    ],
)
def test_numbers_are_given_to_the_errors_second_digit(mean, error, words):
    assert verdict.plus_minus(mean, error) == words


@given(st.text("ab -\n", max_size=300).filter(lambda text: "  " not in text))
def test_wrapping_breaks_at_blanks_only(text):
    wrapped = verdict.wrap(text, 20)
    assert wrapped.split() == text.split()
    for line in wrapped.splitlines():
        assert len(line) <= 20 or " " not in line.strip()
    assert verdict.wrap("one two-three four-five", 12) == "one\n  two-three\n  four-five"


# A sweep whose results are made up -------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    """Makes a sweep of one learning rate a setting, or of a space as text."""

    def plan(n_settings=3, seeds=(0, 1, 2), fresh=None, space=None, **changes):
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"seeds": list(seeds), **changes}.items()]
        space = space or f'[[space]]\n"optim.lr" = {[10.0 ** (i - 4) for i in range(n_settings)]}\n'
        confirm = f"[confirm]\ntop = 3\nseeds = {list(fresh)}\n" if fresh else ""
        base = "[base.schedule]\nmin_lr = 0.0\n[base.train]\nmax_steps = 100\neval_interval = 10\n"
        path = tmp_path / "sweep.toml"
        path.write_text("\n".join(["[sweep]", *lines, base, space, confirm]), encoding="utf-8")
        return sweep.Sweep.load(path)

    return plan


def results(plan, values, fresh=()):
    """Results from one list of seeds' values a setting; `fresh` is {setting: values}. None: failed."""
    given = {(i, seed): v for i, row in enumerate(values) for seed, v in zip(plan.config.seeds, row)}
    given |= {(i, seed): v for i, row in dict(fresh).items() for seed, v in zip(plan.confirm_seeds, row)}
    made = {}
    for (setting, seed), value in given.items():
        trial = plan.trial(setting, seed)
        if isinstance(value, dict):
            made[trial.name] = sweep.Result(trial, **value)
        elif value is None:
            made[trial.name] = sweep.Result(trial, "failed", 30, error="loss is nan at step 30")
        else:
            made[trial.name] = sweep.Result(trial, "finished", 100, value)
    return made


def conclude(plan, values, fresh=()):
    found = verdict.conclude(plan, results(plan, values, fresh))
    json.dumps(found, allow_nan=False)
    assert not re.search(r"\b(nan|inf)\b", found["verdict"].replace("loss is nan", ""))
    return found


def order(plan, values):
    return [standing.setting for standing in verdict.ranking(plan, results(plan, values))]


# Without fresh seeds ---------------------------------------------------------------------------------


def test_without_fresh_seeds_the_verdict_is_a_ranking_unconfirmed(plan):
    found = conclude(plan(), [[2.5, 2.6, 2.4], [1.9, 2.0, 1.95], [2.0, 2.08, 2.06]])
    assert found["verdict"].splitlines() == [
        "Ranking, unconfirmed: best of 3 settings is optim.lr = 0.001.",
        "It has val.loss 1.950 ± 0.029 (mean ± standard error of 3 seeds; 95% interval 1.826 to 2.074, "
        "Student's t).",
        # differences 0.1, 0.08, 0.11: mean 0.0967, error 0.00882, t(2, 0.975) = 4.303
        "Second is optim.lr = 0.01 with 2.047 ± 0.024, worse by 0.0967 ± 0.0088 (pairs of 3 seeds; 95% "
        "interval 0.0587 to 0.1346; correlation 0.96).",
        "The interval leaves out 0; were these fresh seeds, that would separate the two.",
        "The best was chosen and judged on the same seeds, and looks better than it is. Only fresh seeds "
        "decide: [confirm] runs the top settings with them.",
        "Best optim.lr = 0.001 lies inside what was tried (0.0001 to 0.01).",
        "The search took 9 trials and 900 steps.",
    ]
    assert (found["state"], found["best"], found["decided"]) == ("finished", 1, False)
    assert found["confirmed"] is None
    first, second = found["comparisons"]
    assert (first["setting"], first["against"], second["against"]) == (1, 2, 0)
    assert (first["p"], first["p_holm"], first["apart"]) == (None, None, None)  # nothing is decided
    best = found["settings"][0]
    assert best["by_seed"] == {"0": 1.9, "1": 2.0, "2": 1.95}
    assert (best["finished"], best["n"], best["interval_method"]) == ("3/3", 3, "t")


def test_what_the_data_do_not_separate_is_said_with_the_seeds_it_would_take(plan):
    found = conclude(plan(4), [[2.0, 2.2, 2.1], [2.2, 2.1, 2.2], [2.1, 2.3, 2.2], [2.2, 2.3, 2.1]])
    lines = found["verdict"].splitlines()
    second, third, _ = found["comparisons"]
    assert (second["against"], second["apart"]) == (1, False)
    assert (third["apart"], third["interval"]) == (None, None)  # 0.1 with each seed
    n = second["seeds_needed"]
    assert lines[3] == (
        f"The data do not separate the two. If it is as large as it looks, roughly {n} seeds would show it "
        "in 4 of 5 sweeps."
    )
    assert lines[4] == "Nor do the data separate the best from optim.lr = 0.1."
    effect = np.array([0.2, -0.1, 0.1])
    assert n == statistics.seeds_needed(effect.mean() / effect.std(ddof=1)) > 3
    # Noise can hide the third where it does not hide the second.
    words = conclude(plan(), [[2.0, 2.1, 2.2], [2.1, 2.21, 2.3], [1.9, 2.3, 2.6]])["verdict"]
    assert "\nThe data do not separate the best from optim.lr = 0.01.\n" in words


def test_one_seed_has_no_interval_and_that_is_said_first(plan):
    found = conclude(plan(2, [0]), [[2.0], [1.5]])
    lines = found["verdict"].splitlines()
    assert lines[1] == "ONE SEED: there is no interval, and any difference may be chance. List three or more."
    assert lines[2:4] == [
        "It has val.loss 1.5 (one seed).", "Second is optim.lr = 0.0001 with 2, worse by 0.5."
    ]  # fmt: skip
    assert "±" not in found["verdict"] and "separate" not in found["verdict"]
    assert found["settings"][0]["standard_error"] is None and found["settings"][0]["interval"] is None
    assert found["comparisons"][0]["apart"] is None
    assert conclude(plan(2, [0]), [[1.5], [1.5]])["comparisons"][0]["apart"] is None  # equal, but by one seed


def test_two_seeds_claim_nothing(plan):
    found = conclude(plan(2, [0, 1]), [[2.0, 2.1], [1.5, 1.5999]])
    assert found["comparisons"][0]["interval"][0] > 0
    assert found["comparisons"][0]["correlation"] is None and found["comparisons"][0]["seeds_needed"] is None
    assert "The interval leaves out 0, but two seeds are hardly any evidence." in found["verdict"]
    assert "one degree of freedom" in found["warnings"][0]
    fresh = {0: [2.0, 2.1], 1: [1.5, 1.5999]}
    found = conclude(plan(2, fresh=[3, 4]), [[2, 2.1, 2.2], [1.5, 1.61, 1.72]], fresh)
    first = "Not decided, as 2 fresh seeds can hardly decide anything: optim.lr = 0.001 comes first of 2"
    assert found["verdict"].startswith(first)
    assert "The test would separate the two, on hardly any evidence." in found["verdict"]
    assert "one degree of freedom" in found["warnings"][0]


def test_from_ten_seeds_on_the_interval_is_bootstrapped_and_says_so(plan):
    values = np.random.default_rng(0).normal(2.0, 0.1, (2, 10)).tolist()
    found = conclude(plan(2, range(10)), values)
    assert found["settings"][0]["interval_method"] == "bootstrap"
    assert re.search(r"10 seeds; 95% interval \S+ to \S+, bootstrap\)", found["verdict"])


def test_one_setting_is_no_ranking(plan):
    found = conclude(plan(1), [[2.0, 2.1, 2.2]])
    assert found["verdict"].splitlines() == [
        "The one setting has val.loss 2.100 ± 0.058 (mean ± standard error of 3 seeds; 95% interval 1.852 "
        "to 2.348, Student's t).",
        "The search took 3 trials and 300 steps.",
    ]
    assert conclude(plan(1, [0]), [[2.0]])["verdict"].splitlines()[1].startswith("ONE SEED: ")


def test_nothing_is_best_when_all_have_failed(plan):
    found = conclude(plan(2, [0, 1], [7, 8]), [[None, 2.0], [None, None]])
    assert (found["best"], found["comparisons"], found["edges"]) == (None, [], [])
    assert found["verdict"].startswith(
        "No setting finished with all of its seeds, so there is no best one.\n"
    )
    assert found["settings"][0]["mean"] is None and found["settings"][0]["finished"] == "1/2"


def test_equal_values_bring_no_p_and_no_certainty(plan):
    same = {0: [2.0] * 3, 1: [2.0] * 3, 2: [2.5] * 3}
    found = conclude(plan(3, fresh=[7, 8, 9]), list(same.values()), same)
    assert found["decided"] and found["best"] == 0  # the lower number
    first, second = found["comparisons"][:2]
    assert (first["p"], first["p_holm"], first["apart"], first["interval"]) == (None, None, False, None)
    assert (second["p"], second["p_holm"], second["apart"], second["mean"]) == (None, None, None, 0.5)
    words = found["verdict"]
    assert "2 (the same with all 3 fresh seeds)" in words
    assert "With each seed the two have the same value." in words
    assert "The difference is the same with each seed: without a spread no test can weigh it." in words
    assert "Each seed gave the same value for optim.lr = 0.0001 or optim.lr = 0.001" in words
    assert words.startswith("Not decided by 3 fresh seeds")
    unconfirmed = conclude(plan(), list(same.values()))
    assert "With each seed the two have the same value." in unconfirmed["verdict"]


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1e300, 8e307])
def test_huge_and_tiny_values_are_judged_like_others(plan, scale):
    rows = [[2.0, 1.8, 2.1], [1.5, 1.7, 1.6], [1.52, 1.75, 1.59]]
    scaled = [[value * scale for value in row] for row in rows]
    plain, found = (
        conclude(plan(3, fresh=[7, 8, 9]), values, dict(enumerate(values))) for values in (rows, scaled)
    )
    for one, other in zip(plain["comparisons"], found["comparisons"]):
        assert other["p_holm"] == pytest.approx(one["p_holm"], rel=1e-6)
        assert (other["apart"], other["seeds_needed"]) == (one["apart"], one["seeds_needed"])
    assert max(map(len, found["verdict"].splitlines())) < 300


# Order -----------------------------------------------------------------------------------------------


def test_settings_with_failed_seeds_rank_last_whatever_their_survivors_reached(plan):
    made, values = plan(), [[1.0, None, 1.0], [2.0, 2.1, 2.2], [None, None, None]]
    standings = verdict.ranking(made, results(made, values))
    assert [standing.setting for standing in standings] == [1, 0, 2]
    assert [(s.mean, s.standard_error) for s in standings[1:]] == [(None, None)] * 2
    found = conclude(made, values)
    assert [entry["mean"] for entry in found["settings"]] == [pytest.approx(2.1), None, None]
    assert [entry["finished"] for entry in found["settings"]] == ["3/3", "2/3", "0/3"]
    assert found["settings"][1]["by_seed"] == {"0": 1.0, "1": None, "2": 1.0}
    assert "4 of 9 trials failed, first s000-seed1 with: loss is nan at step 30" in found["verdict"]
    assert "optim.lr = 0.0001: 2/3 finished, ranked last among equals." in found["verdict"]
    rows = verdict.table(made, results(made, values))
    assert [line.split("  ")[-1] for line in rows] == ["3/3 finished", "2/3 finished", "0/3 finished"]


def test_pruned_settings_rank_below_complete_ones_by_the_rung_they_reached(plan):
    def pruned(step, *values):
        return [{"state": "pruned", "step": step, "value": value} for value in values]

    rungs = '[prune]\nmethod = "halving"\nsteps = [10, 50]\n'
    made = plan(space=f'{rungs}[[space]]\n"optim.lr" = {[1e-4, 1e-3, 1e-2, 0.1, 1.0, 2.0, 3.0, 4.0]}')
    values = [
        pruned(10, 1.0, 1.0, 1.0),
        pruned(50, 4.0, 4.0, 4.0),
        [5.0, 5.0, 5.1],
        pruned(10, 0.9, 1.0, 1.0),
        [None, *pruned(10, 0.1, 0.1)],  # among those pruned at 10 it comes last, as it lost a seed
        [None, None, None],
        [6.0, 6.0, 6.1],
        [1.0, None, 1.0],  # came to the end, but not with all seeds
    ]
    assert order(made, values) == [2, 6, 7, 1, 3, 0, 4, 5]
    found = conclude(made, values)
    assert found["settings"][3]["state"] == "pruned" and found["settings"][3]["step"] == 50
    assert found["settings"][3]["mean"] is None and found["settings"][3]["mean_at_rung"] == 4.0
    assert found["settings"][6]["mean_at_rung"] is None
    assert "Pruned at step 10 and 50: 4 of 8 settings. They rank below complete ones" in found["verdict"]
    rows = verdict.table(made, results(made, values))
    assert re.search(r"^optim.lr = 0.001 +4 +pruned at step 50$", rows[3])
    assert re.search(r"^optim.lr = 1.0 +- +pruned at step 10, 1 failed$", rows[6])
    spent = [(entry["setting"], entry["steps"]) for entry in found["budget"]]
    assert spent[:4] == [
        (0, 30),
        (3, 60),
        (4, 110),
        (1, 260),
    ]  # pruned ones end at their rungs, before others
    assert [entry["best"] for entry in found["budget"]][3:] == [None, *[pytest.approx(5.0333, abs=1e-3)] * 4]


def test_the_budget_of_tpe_is_spent_in_the_order_of_the_numbers(plan):
    """Each of its rounds has its own rungs: what is dropped in a later one does not come first."""
    spent = {}
    for method in ("random", "tpe"):
        rungs = '[prune]\nmethod = "halving"\nsteps = [10, 50]\n'
        made = plan(space=rungs + RANGES, method=method, trials=3)
        dropped = [{"state": "pruned", "step": 10, "value": 3.0}] * 3
        found = conclude(made, [[1.0, 1.1, 1.2], [2.0, 2.1, 2.2], dropped])
        spent[method] = [(entry["setting"], entry["steps"]) for entry in found["budget"]]
    assert spent == {"random": [(2, 30), (0, 330), (1, 630)], "tpe": [(0, 300), (1, 600), (2, 630)]}


def test_trials_that_have_not_ended_are_not_failures(plan):
    made = plan(3)
    values = [[1.0, {"state": "running", "step": 40}, 1.0], [2.0, 2.1, 2.2], [None, None, None]]
    assert order(made, values) == [1, 0, 2]
    found = conclude(made, values)
    assert found["state"] == "unfinished" and found["settings"][1]["state"] == "unfinished"
    assert found["verdict"].startswith("Not finished: 8 of 9 trials have ended.\n")
    assert found["trials"] == {"finished": 5, "running": 1, "failed": 3}
    first = verdict.ranking(made, {})[0]
    assert (first.complete, first.state) == (False, "unfinished")
    assert verdict.conclude(made, {})["best"] is None


def test_neither_the_order_of_seeds_nor_the_numbers_of_settings_matter(plan):
    rng = random.Random(0)
    for n_seeds in (3, 11):
        seeds = list(range(n_seeds))
        lrs = [10.0**-i for i in range(5)]
        values = {lr: [rng.gauss(2 + i * 0.1, 0.1) for _ in seeds] for i, lr in enumerate(lrs)}
        values[lrs[4]][1] = None

        def judged(lrs, seeds, values=values):
            """Conclusions with learning rates instead of numbers, without what is in the numbers' order."""
            made = plan(seeds=seeds, fresh=[20, 21, 22], space=f'[[space]]\n"optim.lr" = {lrs}\n')
            rows = [[values[lr][seed] for seed in seeds] for lr in lrs]
            fresh = {
                i: [values[lr][seed] - 0.1 for seed in (0, 2, 1)] for i, lr in enumerate(lrs) if lr > 5e-4
            }
            shuffled = list(results(made, rows, fresh).items())
            rng.shuffle(shuffled)
            found = verdict.conclude(made, dict(shuffled))
            for entry in [*found["settings"], *found["confirmed"], *found["comparisons"]]:
                for key in {"setting", "against"} & entry.keys():
                    entry[key] = lrs[entry[key]]
            del found["budget"]
            found["best"], found["verdict"] = (
                lrs[found["best"]],
                found["verdict"].partition(" trials failed")[0],
            )
            return found

        expected = judged(lrs, seeds)
        assert expected["decided"] and len(expected["comparisons"]) == 6
        for _ in range(3):
            rng.shuffle(lrs)
            rng.shuffle(seeds)
            assert judged(lrs, seeds) == expected


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_maximize_mirrors_minimize(plan, n_seeds):
    rng = np.random.default_rng(n_seeds)
    values = rng.normal(2, 0.1, (4, n_seeds)) + np.arange(4)[:, None] * 0.1
    fresh = rng.normal(2, 0.1, (3, n_seeds)) + np.arange(3)[:, None] * 0.1
    found = []
    for sign, goal in ((1, "minimize"), (-1, "maximize")):
        made = plan(4, range(n_seeds), range(50, 50 + n_seeds), goal=goal)
        found.append(conclude(made, (sign * values).tolist(), dict(enumerate((sign * fresh).tolist()))))
    low, high = found
    for part in ("settings", "confirmed"):
        for one, other in zip(low[part], high[part], strict=True):
            assert one["setting"] == other["setting"] and one["mean"] == -other["mean"]
            assert one["interval"] == pytest.approx([-end for end in other["interval"][::-1]], rel=1e-12)
    assert low["comparisons"] == high["comparisons"] and low["comparisons"][0]["mean"] > 0
    assert low["edges"] == high["edges"]
    assert [entry["best"] for entry in low["budget"]] == [-entry["best"] for entry in high["budget"]]
    sentences = [text.replace("-", "") for text in (low["verdict"], high["verdict"])]
    shared = [line for line in sentences[0].splitlines() if line in sentences[1].splitlines()]
    assert len(shared) >= len(sentences[0].splitlines()) - 1  # the mean's interval has its ends swapped


# With fresh seeds ------------------------------------------------------------------------------------

SEARCH = [[2.0, 2.1, 2.2], [1.9, 2.0, 2.1], [2.05, 2.15, 2.26], [3.0, 3.1, 3.2]]


def test_fresh_seeds_alone_decide(plan):
    fresh = {
        0: [2.00, 2.11, 2.19, 2.05, 2.16],
        1: [2.02, 2.11, 2.20, 2.03, 2.18],
        2: [2.50, 2.62, 2.70, 2.54, 2.66],
    }
    found = conclude(plan(4, fresh=[10, 11, 12, 13, 14]), SEARCH, fresh)
    assert found["verdict"].splitlines() == [
        "Confirmed with 5 fresh seeds: optim.lr = 0.0001 comes first of 3 confirmed settings; the data "
        "separate it from optim.lr = 0.01 only.",
        "It has val.loss 2.102 ± 0.035 (mean ± standard error of 5 fresh seeds; 95% interval 2.005 to "
        "2.199, Student's t).",
        "The data do not separate it from optim.lr = 0.001: it is ahead by 0.0060 ± 0.0075 (pairs of 5 "
        "seeds; 95% interval -0.0148 to 0.0268; correlation 0.98; p = 0.47 by Holm). If it is as large as "
        "it looks, roughly 85 seeds would show it in 4 of 5 sweeps.",
        "It is better than optim.lr = 0.01 by 0.5020 ± 0.0037 (pairs of 5 seeds; 95% interval 0.4916 to "
        "0.5124; correlation 1.00; p < 0.0001 by Holm).",
        "On the seeds that chose it, it had 2.100 ± 0.058, and looked better by 0.002.",
        "The search had put optim.lr = 0.001 first.",
        "Best optim.lr = 0.0001 is at the lower edge of what was tried (0.0001 to 0.1): extend downwards.",
        "The search took 12 trials and 1,200 steps.",
    ]
    assert (found["best"], found["decided"]) == (0, True)
    assert [entry["setting"] for entry in found["confirmed"]] == [0, 1, 2]
    assert [entry["setting"] for entry in found["settings"]] == [1, 0, 2, 3]
    assert [(c["setting"], c["against"]) for c in found["comparisons"]] == [(0, 1), (0, 2), (1, 2)]
    ps = [stats.ttest_rel(fresh[a], fresh[b]).pvalue for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [c["p"] for c in found["comparisons"]] == pytest.approx(ps, rel=1e-9)
    corrected = [ps[0], min(2 * ps[2], 1), 3 * ps[1]]  # by hand: 0.2 % and less, then 50 %
    assert sorted(c["p_holm"] for c in found["comparisons"]) == pytest.approx(sorted(corrected), rel=1e-9)
    assert [c["apart"] for c in found["comparisons"]] == [False, True, True]
    assert found["comparisons"][1]["seeds_needed"] is None


def test_a_confirmed_best_is_called_so_when_the_data_separate_it_from_all_others(plan):
    fresh = {i: [2.0 + i / 10 + seed / 100 + i * seed % 3 / 500 for seed in range(5)] for i in range(2)}
    found = conclude(plan(4, fresh=range(10, 15)), SEARCH, fresh)
    first = "Confirmed with 5 fresh seeds: optim.lr = 0.0001 is the best of 2 confirmed settings."
    assert found["verdict"].startswith(first)
    luckier = conclude(plan(4, fresh=range(10, 15)), SEARCH, {0: [1.9, 1.92, 1.94, 1.93, 1.9]})
    assert "On the seeds that chose it, it had 2.100 ± 0.058.\n" in luckier["verdict"]


def test_the_few_that_are_not_apart_are_named_and_not_the_many_that_are(plan):
    fresh = {i: [2.0 + i / 10 + seed / 100 + i * seed % 3 / 500 for seed in range(5)] for i in range(3)}
    fresh |= {1: [2.0, 2.02, 2.01, 2.04, 2.03], 3: [2.5, 2.53, 2.49, 2.55, 2.52]}
    found = conclude(plan(4, fresh=range(10, 15)), SEARCH, fresh)["verdict"]
    assert "first of 4 confirmed settings; the data separate it from all but optim.lr = 0.001.\n" in found


def test_a_setting_that_was_not_compared_is_not_said_to_be_beaten(plan):
    fresh = {i: [2.0 + i / 10 + seed / 100 + i * seed % 3 / 500 for seed in range(5)] for i in range(2)}
    lost = {**fresh, 2: [2.5, None, 2.5, 2.5, 2.5]}
    found = conclude(plan(4, fresh=range(10, 15)), SEARCH, lost)["verdict"]
    assert "comes first of 3 confirmed settings; the data separate it from optim.lr = 0.001 only." in found
    close = {**lost, 1: [2.0, 2.02, 2.01, 2.04, 2.03]}
    found = conclude(plan(4, fresh=range(10, 15)), SEARCH, close)["verdict"]
    assert "but the data do not separate it from optim.lr = 0.001.\n" in found


def test_a_setting_that_loses_a_fresh_seed_is_confirmed_last_and_not_compared(plan):
    fresh = {0: [2.0, 2.1, 2.2], 1: [1.0, None, 1.0]}
    found = conclude(plan(4, fresh=[7, 8, 9]), SEARCH, fresh)
    assert [(entry["setting"], entry["mean"]) for entry in found["confirmed"]] == [
        (0, pytest.approx(2.1)), (1, None)
    ]  # fmt: skip
    assert found["decided"] and found["comparisons"] == []
    words = found["verdict"]
    assert "comes first of 2 confirmed settings, as the only one that finished with all of them." in words
    assert "optim.lr = 0.001: 2/3 fresh seeds finished, ranked last among equals." in words
    alone = conclude(plan(4, fresh=[7, 8, 9]), SEARCH, {0: [2.0, 2.1, 2.2]})
    assert "No other setting was, so it is compared with none." in alone["verdict"]


def test_fresh_seeds_that_have_not_ended_or_have_failed_decide_nothing(plan):
    made = plan(4, fresh=[7, 8, 9])
    running = {0: [2.0, 2.1, 2.2], 1: [1.0, {"state": "paused", "step": 50, "value": 3.0}, 1.0]}
    for fresh, words in [
        ({}, "The fresh seeds of [confirm], which decide, have not finished."),
        (running, "The fresh seeds of [confirm], which decide, have not finished."),
        ({0: [None, 1.0, 1.0]}, "No setting finished with all fresh seeds of [confirm]"),
    ]:
        found = conclude(made, SEARCH, fresh)
        assert not found["decided"] and found["best"] == 1
        assert "Ranking, unconfirmed" in found["verdict"] and words in found["verdict"]
        assert all(comparison["p"] is None for comparison in found["comparisons"])


def test_one_fresh_seed_decides_nothing(plan):
    found = conclude(plan(4, fresh=[7]), SEARCH, {0: [2.0], 1: [2.1]})
    assert found["verdict"].startswith("Not decided, as one fresh seed can hardly decide anything: ")
    assert "ONE FRESH SEED: there is no interval" in found["verdict"]
    assert found["comparisons"][0]["apart"] is None


def test_the_test_split_is_told_of_confirmed_settings_only(plan):
    def tested(value, test):
        return {"state": "finished", "step": 100, "value": value, "test": test}

    fresh = {0: [tested(2.0, 2.3), tested(2.1, 2.4), tested(2.2, 2.5)], 1: [2.2, 2.3, 2.5]}
    found = conclude(plan(4, fresh=[7, 8, 9]), SEARCH, fresh)
    assert found["confirmed"][0]["test"] == {"7": 2.3, "8": 2.4, "9": 2.5}
    assert "test" not in found["confirmed"][1] and "test" not in found["settings"][0]
    words = "On the test split, looked at for confirmed settings only: optim.lr = 0.0001: 2.400 ± 0.058."
    assert words in found["verdict"]


def test_the_best_of_equal_settings_is_flattered_and_fresh_seeds_do_not_flatter(plan):
    """20 settings that are all the same, 3 seeds: the best's mean is too good, its interval misses."""
    made = plan(space=f'[[space]]\n"model.dropout" = {[i / 40 for i in range(20)]}\n', fresh=[7, 8, 9])
    rng = np.random.default_rng(5)
    draws = 1000
    means, covered, apart = np.zeros((draws, 2)), np.zeros((draws, 2)), 0
    for draw in range(draws):
        values = rng.normal(2.0, 0.1, (20, 3))
        top = np.argsort(values.mean(1))[:3]
        fresh = {int(setting): rng.normal(2.0, 0.1, 3).tolist() for setting in top}
        found = verdict.conclude(made, results(made, values.tolist(), fresh))
        assert found["settings"][0]["setting"] == top[0]
        chosen = next(entry for entry in found["confirmed"] if entry["setting"] == top[0])
        for column, entry in enumerate((found["settings"][0], chosen)):
            low, high = entry["interval"]
            means[draw, column], covered[draw, column] = entry["mean"], low <= 2.0 <= high
        apart += any(c["apart"] for c in found["comparisons"] if c["setting"] == found["best"])
    error = 0.1 / math.sqrt(3)
    flattered, honest = (means.mean(0) - 2.0) / error
    assert flattered == pytest.approx(-1.87, abs=0.1)  # the least of 20 normal deviates, in the mean
    assert honest == pytest.approx(0.0, abs=0.1)
    assert covered[:, 0].mean() < 0.87 and 0.93 < covered[:, 1].mean() < 0.97  # 0.83 seen
    assert apart / draws < 0.06  # equal settings are held apart in 5 of 100 sweeps at most


# The space and the budget ----------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "edge"), [(0, "lower edge"), (2, "upper edge"), (1, None)])
def test_the_verdict_names_the_grids_edge(plan, best, edge):
    values = [[2.0, 2.1, 2.0] for _ in range(3)]
    values[best] = [1.0, 1.1, 1.0]
    found = conclude(plan(), values)
    assert found["edges"][0]["edge"] == {"lower edge": "low", "upper edge": "high", None: None}[edge]
    assert ("edge of what was tried" in found["verdict"]) == (edge is not None)
    assert f"at the {edge}" in found["verdict"] or edge is None


@pytest.mark.parametrize(
    ("lr", "log", "edge"),
    [(1.1e-4, "true", "low"), (1.5e-4, "true", None), (8e-2, "true", "high"), (6e-2, "true", None),
     (5e-3, "false", "low"), (6e-2, "false", None), (9.6e-2, "false", "high"), (9e-2, "false", None)],
)  # fmt: skip
def test_a_ranges_edge_is_a_twentieth_of_it_on_its_own_scale(plan, lr, log, edge):
    space = f'[[space]]\n"optim.lr" = {{low = 1e-4, high = 1e-1, log = {log}}}\n'
    made = plan(space=space, method="random", trials=4)
    made.settings[2]["optim.lr"] = lr
    found = conclude(made, [[2.0] * 3, [3.0] * 3, [1.0, 1.1, 1.2], [4.0] * 3])
    (told,) = found["edges"]
    assert told == {"key": "optim.lr", "value": lr, "low": 1e-4, "high": 0.1, "edge": edge}


def test_of_keys_that_move_together_the_first_speaks_for_all(plan):
    space = '[[space]]\n"model.n_embd,model.n_head" = [[16, 2], [32, 4]]\n"optim.lr" = [1e-3, 1e-2]\n'
    found = conclude(plan(seeds=[0], space=space), [[4.0], [3.0], [2.0], [1.0]])
    assert [edge["key"] for edge in found["edges"]] == ["model.n_embd", "optim.lr"]
    found = conclude(plan(seeds=[0], space=RANGES, method="random", trials=3), [[4.0], [3.0], [2.0]])
    assert [edge["key"] for edge in found["edges"]] == ["optim.lr", "model.dropout"]


def test_edges_are_those_of_the_same_optimizers_settings(plan):
    space = '[[space]]\n"optim.name" = "adamw"\n"optim.lr" = [1e-3, 1e-2]\n'
    space += '[[space]]\n"optim.name" = "sgd"\n"optim.lr" = [0.1, 1.0]\n'
    found = conclude(plan(seeds=[0], space=space), [[3.0], [2.0], [2.5], [2.6]])
    assert found["edges"][0] | {"value": 0.01, "high": 0.01, "edge": "high"} == found["edges"][0]


def test_what_cannot_be_lower_is_no_edge(plan):
    space = '[[space]]\n"model.dropout" = [0.0, 0.1, 0.2]\n'
    words = conclude(plan(seeds=[0], space=space), [[1.0], [2.0], [3.0]])["verdict"]
    assert "Best model.dropout = 0 is the lowest there is; up to 0.2 was tried." in words
    assert "edge" not in words
    space = '[[space]]\n"model.n_layer" = [1, 2]\n'
    assert "edge" not in conclude(plan(seeds=[0], space=space), [[1.0], [2.0]])["verdict"]


def test_contenders_have_their_budgets_and_unequal_ones_are_named(plan):
    space = '[[space]]\n"optim.lr" = [1e-3, 1e-2]\n[[space]]\n"optim.name" = "sgd"\n"optim.lr" = [0.1, 1.0]\n'
    values = [[3.0, 3.1], [2.0, 2.1], [2.5, 2.6], [2.6, 2.7]]
    found = conclude(plan(seeds=[0, 1], space=space), values)
    assert found["contenders"] == {
        "optim.name": {
            "default": {"settings": 2, "trials": 4, "steps": 400, "best": 1, "mean": pytest.approx(2.05),
                        "standard_error": pytest.approx(0.05)},
            "sgd": {"settings": 2, "trials": 4, "steps": 400, "best": 2, "mean": pytest.approx(2.55),
                    "standard_error": pytest.approx(0.05)},
        }
    }  # fmt: skip
    words = (
        "By optim.name: default 2.050 ± 0.050 (best of 2 settings, 4 trials, 400 steps), "
        "sgd 2.550 ± 0.050 (best of 2 settings, 4 trials, 400 steps)."
    )
    assert words in found["verdict"] and "UNEQUAL" not in found["verdict"]
    found = conclude(plan(seeds=[0, 1], space=space.replace("0.1, 1.0", "1.0")), values[:3])
    assert "UNEQUAL BUDGETS by optim.name: more settings find a better best" in found["verdict"]
    longer = [[{"state": "finished", "step": 200, "value": value} for value in row] for row in values[2:]]
    found = conclude(plan(seeds=[0, 1], space=space), values[:2] + longer)
    assert "UNEQUAL BUDGETS by optim.name: as many settings, but not as many steps." in found["verdict"]
    names = '[[space]]\n"model.activation" = ["relu", "silu", "gelu"]\n'
    words = conclude(plan(seeds=[0], space=names), [[3.0], [2.0], [1.0]])["verdict"]
    assert "By model.activation" not in words  # one setting each: the table says it


def test_the_best_so_far_is_told_against_what_was_spent(plan):
    made = plan(4, [0, 1], method="random", trials=4, space=RANGES)
    found = conclude(made, [[3.0, 3.0], [2.0, None], [2.5, 2.5], [2.7, 2.7]])
    assert found["budget"] == [
        {"setting": 0, "trials": 2, "steps": 200, "best": 3.0},
        {"setting": 1, "trials": 4, "steps": 330, "best": 3.0},
        {"setting": 2, "trials": 6, "steps": 530, "best": 2.5},
        {"setting": 3, "trials": 8, "steps": 730, "best": 2.5},
    ]
    words = "The search took 8 trials and 730 steps; its best setting was there after 6 trials and 530 steps."
    assert words in found["verdict"]


def test_the_best_of_many_evaluations_comes_with_a_warning(plan):
    values = [[2.0, 2.1, 2.2]] * 3
    assert "frequent evaluation flatters" in conclude(plan(at="best"), values)["verdict"]
    assert "flatters" not in conclude(plan(), values)["verdict"]


def test_several_instruction_sets_are_marked(plan):
    def on(isa, value):
        return {"state": "finished", "step": 100, "value": value, "isa": isa}

    made = plan(2)
    values = [
        [on("avx2", 2.0), on("avx2", 2.1), on("avx512", 2.2)],
        [on("avx2", value) for value in (1, 1.2, 1)],
    ]
    found = conclude(made, values)
    assert found["instruction_sets"] == {"avx2": 5, "avx512": 1}
    assert "several instruction sets (5 with avx2, 1 with avx512)" in found["verdict"]
    assert [entry["instruction_sets"] for entry in found["settings"]] == [["avx2"], ["avx2", "avx512"]]
    rows = verdict.table(made, results(made, values))
    assert rows[0].endswith("finished  avx2") and rows[1].endswith("finished  avx2, avx512")
    values = [values[1], values[1]]
    assert "instruction" not in conclude(made, values)["verdict"]
    assert verdict.table(made, results(made, values))[0].endswith("finished")


# For a terminal --------------------------------------------------------------------------------------


def test_the_table_has_confirmed_settings_first_and_says_how_many_are_left_out(plan):
    made = plan(4, fresh=[7, 8, 9])
    rows = verdict.table(made, results(made, SEARCH, {0: [2.0, 2.1, 2.2], 1: [2.2, 2.3, 2.5]}), most=3)
    assert [row.partition("  ")[0] for row in rows] == [
        "confirmed with fresh seeds", "optim.lr = 0.0001", "optim.lr = 0.001",
        "search", "optim.lr = 0.001", "optim.lr = 0.0001", "optim.lr = 0.01", "and 1 more",
    ]  # fmt: skip


def test_a_verdict_fits_80_columns_and_names_few_settings_of_many(plan):
    made = plan(space=RANGES, method="random", trials=200, at="best")
    rng = np.random.default_rng(0)
    values = rng.normal(2, 0.1, (200, 3)).tolist()
    for row in values[50:]:
        row[1] = None
    text = verdict.wrap(conclude(made, values)["verdict"])
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 60
