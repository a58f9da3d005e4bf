"""What a sweep tries: ranges, samplers, rungs and fresh seeds in its file, numbers that stay, a forecast."""

import importlib
import json
import math
import re
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

import cllm
from cllm import config, sweep
from cllm.errors import InputError
from cllm.sweep import plan, results, space

SAMPLED = """
[sweep]
method = "{method}"
trials = {trials}
sampler_seed = 3
[[space]]
"optim.name" = "adamw"
"optim.lr" = {{low = 1e-4, high = 1e-2, log = true}}
"model.n_layer" = {{low = 1, high = 4}}
[[space]]
"optim.name" = "sgd"
"optim.lr" = {{low = 0.01, high = 1.0, log = true}}
"model.dropout" = {{low = 0, high = 0.75, step = 0.25}}
"""
ONE = '[[space]]\n"optim.lr" = 1e-3\n'


@pytest.fixture
def load(tmp_path):
    """Load a sweep from its text."""

    def load(text, overrides=None):
        path = tmp_path / "sweep.toml"
        path.write_text(text, encoding="utf-8")
        return sweep.Sweep.load(path, overrides)

    return load


def sampled(space_blocks, method, n, seed=0):
    return space.sampled(space.blocks(space_blocks, grid=False), method, n, seed)


# Ranges ----------------------------------------------------------------------------------------------


def test_a_range_with_a_step_is_a_list_in_a_grid(load):
    found = load("""
        [[space]]
        "optim.lr" = {low = 0.1, high = 0.35, step = 0.1}
        "model.n_layer" = {low = 2, high = 6, step = 2}
    """).settings
    assert [s["optim.lr"] for s in found[::3]] == [0.1, 0.2, 0.3]  # not 0.30000000000000004
    assert [s["model.n_layer"] for s in found[:3]] == [2, 4, 6]
    assert all(type(s["model.n_layer"]) is int for s in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"optim.lr" = {low = 1e-3, high = 1e-2}', 'has no step, which method = "grid" needs'),
        ('"optim.lr" = {low = 1e-3}', "the range of optim.lr has no high"),
        ('"optim.lr" = {low = "a", high = 1}', "has low = 'a', it must be a finite number"),
        ('"optim.lr" = {low = 1e-3, high = inf}', "has high = inf, it must be a finite number"),
        ('"optim.lr" = {low = 1e-2, high = 1e-3}', "low must be below high"),
        ('"optim.lr" = {low = 1e-3, high = 1e-2, log = 1e-3}', "has log = 0.001, it must be true or false"),
        ('"optim.lr" = {low = 1e-3, high = 1, log = true, step = 0.1}', "has log and step: leave out one"),
        ('"optim.lr" = {low = 0.0, high = 1, log = true}', "low must be above 0"),
        ('"optim.lr" = {low = 0.0, high = 1, step = 2}', "has step = 2, it must be above 0 and fit"),
        ('"optim.lr" = {low = 0.0, high = 1, setp = 0.1}', 'has setp (did you mean "step"?)'),
        ('"model.n_layer" = {low = 1.5, high = 3, step = 1}', "has 1.5, the key takes whole numbers"),
        ('"optim.lr,schedule.min_lr" = {low = 0.1, high = 1}', "moves 2 keys together, which a range cannot"),
        ('"optim.lr" = 1\n"optim.lr , model.n_layer" = [[1, 2]]', "[[space]] 1 has optim.lr twice"),
        ('"optim.lr" = [1e-3, 3e-3, 0.001]', '"optim.lr" lists 0.001 twice, each value can be there once'),
        ('"model.n_embd,model.n_head" = [[8, 1], [8, 2], [8, 1]]', "lists [8, 1] twice"),
        ("", "[[space]] 1 names no key: give it one"),
    ],
)
def test_bad_ranges_are_refused_in_one_sentence(load, line, message):
    with pytest.raises(InputError) as caught:
        load(f"[[space]]\n{line}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "low", "high", "kind"),
    [
        ("model.n_layer", 1, 4, int), ("model.n_layer", 1.0, 4.0, int), ("optim.lr", 1, 4, float),
        ("optim.momentum", 0, 1, float), ("schedule.warmup_steps", 1, 9, int),
        ("train.batch_size", 1, 9, int),
        ("task.width", 1, 4, int), ("task.width", 1.0, 4.0, float),
    ],
)  # fmt: skip
def test_whole_numbers_are_for_keys_that_hold_them(key, low, high, kind):
    found = sampled([{key: {"low": low, "high": high}}], "qmc", 3)
    assert {type(setting[key]) for setting in found} == {kind}


@given(
    low=st.floats(1e-6, 1.0), ratio=st.floats(1.01, 1e6), log=st.booleans(),
    u=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_sampled_number_lies_in_its_range_where_its_coordinate_says(low, ratio, log, u):
    axis = space.Range(("x",), low, low * ratio, log)
    value = axis.at(u)["x"]
    assert axis.low <= value <= axis.high
    place = math.log(value / low) / math.log(axis.high / low) if log else (value - low) / (axis.high - low)
    # Six digits: half a unit of the sixth against the width.
    slack = 5e-6 / (math.log(axis.high / low) if log else 1 - 1 / ratio) + 1e-9
    assert place == pytest.approx(u, abs=slack)


@given(low=st.integers(1, 50), width=st.integers(1, 40), log=st.booleans())
def test_each_whole_number_of_a_range_can_come_and_no_other(low, width, log):
    axis = space.Range(("x",), low, low + width, log, integer=True)
    found = [axis.at(u)["x"] for u in np.linspace(0, 1, 4000, endpoint=False)]
    assert sorted(set(found)) == list(range(low, low + width + 1))
    assert found == sorted(found)


# Samplers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "qmc"])
def test_settings_take_the_blocks_in_turn_with_values_of_their_ranges(load, method):
    found = load(SAMPLED.format(method=method, trials=21)).settings
    assert [setting["optim.name"] for setting in found] == (["adamw", "sgd"] * 11)[:21]
    for setting in found:
        if setting["optim.name"] == "adamw":
            assert 1e-4 <= setting["optim.lr"] <= 1e-2 and setting["model.n_layer"] in (1, 2, 3, 4)
        else:
            assert 0.01 <= setting["optim.lr"] <= 1 and setting["model.dropout"] in (0, 0.25, 0.5, 0.75)
    assert len({setting["optim.lr"] for setting in found}) == 21


axes = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.builds(lambda low: {"low": low, "high": low + 7.5}, st.floats(0.1, 9)),
    st.builds(lambda low, log: {"low": low, "high": 8 * low, "log": log}, st.integers(1, 9), st.booleans()),
)
tables = st.dictionaries(st.sampled_from(["task.a", "task.b", "task.c"]), axes, min_size=1)
blocks = st.lists(tables, min_size=1, max_size=3)


@given(blocks=blocks, method=st.sampled_from(["random", "qmc"]), n=st.integers(1, 30), data=st.data())
def test_more_trials_only_append(blocks, method, n, data):
    seed, fewer = data.draw(st.integers(0, 99)), data.draw(st.integers(1, n))
    try:
        found = sampled(blocks, method, n, seed)
    except InputError as error:
        assert "different settings, and sweep.trials" in str(error)
        return
    assert sampled(blocks, method, fewer, seed) == found[:fewer]
    assert len({space.key(setting) for setting in found}) == n
    made = space.blocks(blocks, grid=False)
    assert all(setting in made[i % len(made)] for i, setting in enumerate(found))


@given(
    n=st.integers(1, 9), low=st.integers(0, 9), step=st.integers(1, 3),
    method=st.sampled_from(["random", "qmc"]),
)  # fmt: skip
def test_a_finite_space_can_be_had_to_its_last_setting_and_no_further(n, low, step, method):
    blocks = [{"task.a": list(range(n)), "task.b": {"low": low, "high": low + 3, "step": step}, "task.c": 5}]
    size = n * {1: 4, 2: 2, 3: 2}[step]
    found = sampled(blocks, method, size)
    assert len({space.key(setting) for setting in found}) == size
    with pytest.raises(InputError, match=f"the space has only {size} different settings"):
        sampled(blocks, method, size + 1)


def test_settings_that_differ_in_rounding_only_are_no_endless_search():
    with pytest.raises(InputError, match="only 3 different settings"):
        sampled([{"optim.lr": {"low": 0.1, "high": 0.100002}}], "random", 4)


def test_qmc_is_a_scrambled_sobol_sequence_for_each_block():
    ranges = {"task.a": {"low": 0.0, "high": 1.0}, "task.b": {"low": 0.0, "high": 1.0}}
    found = sampled([ranges, {"task.c": 1, **ranges}], "qmc", 64, seed=7)
    for place in (0, 1):
        mine = np.array([[s["task.a"], s["task.b"]] for s in found[place::2]])
        theirs = qmc.Sobol(2, seed=np.random.default_rng([7, place])).random_base2(5)
        assert np.abs(mine - theirs).max() < 1e-6
        # Each of 32 equal parts of each axis has exactly one of 32 points; random ones never do that.
        assert [sorted((32 * mine[:, axis]).astype(int)) for axis in (0, 1)] == [list(range(32))] * 2
    assert [s["task.a"] for s in found[::2]] != [s["task.a"] for s in found[1::2]]


def test_random_settings_are_independent_and_follow_from_the_seed():
    ranges = [{"task.a": {"low": 0.0, "high": 1.0}, "task.b": {"low": 0.0, "high": 1.0}}]
    found = np.array([list(s.values()) for s in sampled(ranges, "random", 2000, seed=1)])
    # Deviations of a mean and of a correlation over 2000 points: 0.0065 and 0.022; five of them.
    assert np.abs(found.mean(0) - 0.5).max() < 0.033 and abs(np.corrcoef(found.T)[0, 1]) < 0.11
    assert sampled(ranges, "random", 5, seed=1) == sampled(ranges, "random", 5, seed=1)
    assert sampled(ranges, "random", 5, seed=1) != sampled(ranges, "random", 5, seed=2)
    one, other = sampled([{"task.c": c, **ranges[0]} for c in (0, 1)], "random", 2)
    assert one["task.a"] != other["task.a"]  # each block has points of its own


def test_keys_that_move_together_are_sampled_together(load):
    head = '[sweep]\nmethod = "random"\ntrials = 3\n[[space]]\n'
    found = load(head + '"model.n_embd,model.n_head" = [[16, 2], [32, 4], [48, 6]]').settings
    assert {tuple(setting.values()) for setting in found} == {(16, 2), (32, 4), (48, 6)}


def test_tpe_begins_with_points_of_the_sequence_and_refuses_what_it_cannot_fill(load):
    found = load(SAMPLED.format(method="tpe", trials=40))
    assert found.settings == load(SAMPLED.format(method="qmc", trials=40)).settings[:16]
    with pytest.raises(InputError, match="has only 2 different settings, and"):
        load('[sweep]\nmethod = "tpe"\ntrials = 3\n[[space]]\n"optim.lr" = [1e-3, 1e-2]')


def test_tpe_without_optuna_says_what_to_install(load, monkeypatch):
    monkeypatch.setattr("cllm.sweep.tpe.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'needs optuna; install it: pip install "cllm\[tpe\]"'):
        load(SAMPLED.format(method="tpe", trials=4))


# The rest of the file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[sweep]\ntrials = 3\n{ONE}", 'sweep.trials is 3, but method = "grid" takes all settings'),
        (f'[sweep]\nmethod = "qmc"\n{ONE}', 'sweep.trials is missing: method = "qmc" needs'),
        (f'[sweep]\nmethod = "qmc"\ntrials = 0\n{ONE}', "sweep.trials is 0, it must be an integer of at"),
        (f"[sweep]\nsampler_seed = -1\n{ONE}", "sweep.sampler_seed is -1"),
        (SAMPLED.format(method="qmc", trials=4).replace("optim.lr", "optim.lrr"), 'did you mean "optim.lr"?'),
        (SAMPLED.format(method="random", trials=1).replace("high = 4", "high = 4, low = 0"), "is not valid"),
        ('[sweep]\nmethod = "qmc"\ntrials = 1\n[[space]]\n"model.dropout" = {low = 0.0, high = 1.5}',
         "a range reaches too far: model.dropout is 1.5, it must be a number in [0, 1)"),
        ('[sweep]\nmethod = "tpe"\ntrials = 9\n[[space]]\n"model.n_layer" = {low = 0, high = 99}',
         "a range reaches too far: model.n_layer is 0, it must be an integer of at least 1"),
        (f'[prune]\nmethod = "halvin"\n{ONE}', 'halvin\' (did you mean "halving"?), it must be "none"'),
        (f'[prune]\nmethod = "halving"\n{ONE}', "prune.steps is missing"),
        (f"[prune]\nsteps = [5, 5]\n{ONE}", "prune.steps is [5, 5], it must be a list of ascending steps"),
        (f"[prune]\nsteps = [0]\n{ONE}", "prune.steps is [0]"),
        (f"[prune]\nkeep = 1\n{ONE}", "prune.keep is 1, it must be a share between 0 and 1"),
        (f"[prune]\nstep = [1]\n{ONE}", 'unknown key prune.step (did you mean "steps"?)'),
        (f'[prune]\nmethod = "median"\nsteps = [2000]\n{ONE}',
         "prune.steps has 2000, it must be below train.max_steps (2000)"),
        (f'[prune]\nmethod = "median"\nsteps = [250, 300]\n{ONE}',
         "prune.steps has 300, but val.loss is recorded every train.eval_interval = 250 steps only"),
        (f'[prune]\nmethod = "median"\nsteps = [250]\n{ONE}[base.train]\neval_interval = 0', "interval = 0"),
        ('[prune]\nmethod = "median"\nsteps = [250]\n[[space]]\n"train.max_steps" = [250, 500]',
         "setting 0 (train.max_steps = 250): prune.steps has 250, it must be below"),
        (f"[confirm]\ntop = 0\n{ONE}", "confirm.top is 0, it must be an integer of at least 1"),
        (f"[confirm]\nseeds = []\n{ONE}", "confirm.seeds is []"),
        (f"[confirm]\nseeds = [4, 2]\n{ONE}", "confirm.seeds has 2, which sweep.seeds has too"),
        (f"[confirm]\nseeds = [{2**63}]\n{ONE}", "confirm.seeds has 9223372036854775808, it must have"),
        ('[[space]]\n"optim.lr" = {low = 0, high = 1, step = 1e-9}', "values, a grid takes at most 100,000"),
        ('[[space]]\n"optim.lr" = {low = -1e308, high = 1e308, step = 1e307}', "low = -1e+308, it must"),
        (f'[[space]]\n"optim.lr" = {{low = 1, high = 1{"0" * 400}, step = 1}}', "it must be a finite number"),
        (f"[confirm]\ntops = 1\n{ONE}", 'unknown key confirm.tops (did you mean "top"?)'),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_sentence(load, text, message):
    with pytest.raises(InputError) as caught:
        load(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pruning_a_loop_of_the_users_own_is_refused(load, tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text("def train(config, run): ...\n")
    monkeypatch.chdir(tmp_path)
    task = '[base.task]\nrun = "my.py:train"\n'
    with pytest.raises(InputError, match=r"\[prune\] pauses trials, and task.run is a loop of its own"):
        load(f'{ONE}{task}[prune]\nmethod = "median"\nsteps = [250]')
    assert load(ONE + task).prune.rungs == []


def test_a_training_metric_is_there_at_each_step(load):
    text = f'[sweep]\nobjective = "train.loss"\n{ONE}[prune]\nmethod = "halving"\nsteps = [7, 13]\n'
    assert load(text).prune.rungs == [7, 13]
    assert load(text.replace("halving", "none")).prune.rungs == []


def test_only_the_best_evaluation_comes_with_a_warning(load):
    (notice,) = load(f'[sweep]\nat = "best"\n{ONE}').notices
    assert "the more often it evaluates, the better that looks by chance alone" in notice
    assert load(ONE).notices == []


def test_all_parts_can_be_overridden_and_the_resolved_copy_has_them(load, tmp_path):
    text = SAMPLED.format(method="qmc", trials=5)
    changes = {"sweep.trials": 6, "prune.method": "halving", "prune.steps": [250], "confirm.seeds": [8, 7]}
    found = load(text, changes)
    assert len(found.settings) == 6 and found.prune.rungs == [250]
    assert found.confirm == plan.ConfirmConfig(2, [8, 7]) and found.confirm_seeds == (7, 8)
    assert load(text).confirm is None and load(text).confirm_seeds == ()
    copy = tmp_path / "copy.toml"
    copy.write_text(config.to_toml(found.resolved()), encoding="utf-8")
    assert sweep.Sweep.load(copy) == found


def test_varied_keys_are_those_in_which_settings_differ(load):
    found = load("""
        [[space]]
        "optim.lr" = [1e-3, 1e-2]
        "optim.name" = "adamw"
        "model.bias" = true
        [[space]]
        "optim.lr" = 0.1
        "optim.name" = "sgd"
        "optim.momentum" = 0.9
        "model.bias" = [true]
    """)
    assert found.varied() == ["optim.lr", "optim.name", "optim.momentum"]
    assert load(SAMPLED.format(method="random", trials=1)).varied() == [
        "optim.name", "optim.lr", "model.n_layer", "model.dropout"
    ]  # fmt: skip


# Numbers that stay -----------------------------------------------------------------------------------


def grid(load, values):
    return load(f'[sweep]\nseeds = [0]\n[[space]]\n"optim.lr" = {values}')


def test_more_values_keep_the_numbers_of_settings_that_exist(load):
    earlier = grid(load, [1e-2, 1e-3]).settings
    found = plan.numbered(grid(load, [1e-4, 1e-3, 1e-2]), json.loads(json.dumps(earlier)))
    assert [setting["optim.lr"] for setting in found.settings] == [1e-2, 1e-3, 1e-4]
    assert found.numbers == [0, 1, 2]
    assert plan.numbered(found, found.settings) == found


def test_values_that_are_gone_keep_their_numbers_and_are_left_out(load):
    earlier = grid(load, [1e-2, 1e-3, 1e-4]).settings
    found = plan.numbered(grid(load, [1e-4, 1e-2, 0.1]), earlier)
    assert [setting["optim.lr"] for setting in found.settings] == [1e-2, 1e-3, 1e-4, 0.1]
    assert found.numbers == [0, 2, 3]
    assert [trial.name for trial in found.trials()] == ["s000-seed0", "s002-seed0", "s003-seed0"]
    back = plan.numbered(grid(load, [1e-3]), found.settings)
    assert back.numbers == [1] and len(back.settings) == 4


@pytest.mark.parametrize("method", ["random", "qmc"])
def test_fewer_and_more_trials_keep_numbers(load, method):
    few, many = (load(SAMPLED.format(method=method, trials=n)) for n in (5, 9))
    assert plan.numbered(many, few.settings) == many
    cut = plan.numbered(few, many.settings)
    assert cut.numbers == [0, 1, 2, 3, 4] and cut.settings == many.settings


def test_earlier_proposals_of_tpe_count_where_they_lie_in_the_space(load):
    made = load(SAMPLED.format(method="tpe", trials=20))
    mine = [{"optim.name": "adamw", "optim.lr": 2e-3, "model.n_layer": 2}] * 1
    other = [{**mine[0], "optim.lr": 0.5}, {**mine[0], "model.n_layer": 5}, {"optim.lr": 2e-3}]
    other += [{"optim.name": "sgd", "optim.lr": 0.5, "model.dropout": 0.3}]
    earlier = [*made.settings, *other, *mine]
    found = plan.numbered(made, earlier)
    assert found.settings == earlier and found.numbers == [*range(16), 20]
    fewer = plan.numbered(load(SAMPLED.format(method="tpe", trials=3)), earlier)
    assert fewer.numbers == [0, 1, 2] and fewer.settings == earlier
    fresh = plan.numbered(made, mine)
    assert fresh.settings == [*mine, *made.settings] and fresh.numbers == list(range(17))


# The forecast ----------------------------------------------------------------------------------------

TINY = """
[base.data]
source = "{source}"
[base.model]
n_layer = 1
n_head = 2
n_embd = 96
block_size = 16
[base.schedule]
warmup_steps = 2
[base.train]
batch_size = 4
max_steps = 200
eval_interval = 50
"""
GRID = '[[space]]\n"optim.lr" = {low = 1e-4, high = 30e-4, step = 1e-4}\n'
forecasting = importlib.import_module("cllm.sweep.forecast")


@pytest.fixture
def tiny(load, text_file):
    """Load a sweep of tiny models."""
    return lambda text: load(TINY.format(source=text_file) + text)


class Inline:
    """Stands for a ProcessPoolExecutor, in this process."""

    def __init__(self, n_workers, context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def costs(monkeypatch):
    """Let the calibration measure what the test says: seconds of building, a step, an evaluation."""

    def costs(measure):
        monkeypatch.setattr(forecasting, "ProcessPoolExecutor", Inline)
        monkeypatch.setattr(
            forecasting, "_measure",
            lambda config, seconds: forecasting._Measured(*measure(config), 1000, 4000, 8000, 50.0),
        )  # fmt: skip

    return costs


def rows(lines):
    """The forecast's last lines by their label."""
    return {line[:9].strip(): line[9:] for line in lines[lines.index("") + 1 :]}


def test_a_forecast_is_one_screen_and_leaves_nothing(tiny, tmp_path):
    plan = tiny(f"[sweep]\nseeds = [0, 1]\n{GRID}[confirm]\nseeds = [5, 6, 7]\n")
    lines = sweep.forecast(plan, tmp_path / "out", workers=2)
    assert lines[0] == "30 settings x 2 seeds = 60 trials"
    assert lines[1] == "s000-seed0  optim.lr = 0.0001" and "s029-seed1  optim.lr = 0.003" in lines
    assert "... and 48 more, to" in lines and len(lines) < 24
    found = rows(lines)
    assert found["search"] == "60 trials to the end"
    assert found["confirm"] == "2 settings x 3 fresh seeds = 6 trials"
    assert re.fullmatch(r"about .* s on this machine, 2 at once with 1 thread each", found["time"])
    total, each = map(float, re.match(r"about (\d+) MB, (\d+) MB for each of 2", found["memory"]).groups())
    assert abs(total - 2 * each) <= 1 and each > 30  # Python and NumPy alone have that much
    assert not (tmp_path / "out").exists()


def test_a_forecast_measures_what_a_trial_takes(tiny, tmp_path):
    plan = tiny(f"[sweep]\nseeds = [0]\n{ONE}")
    lines = sweep.forecast(plan, tmp_path / "out")
    vocabulary = cllm.data.load(plan.base["data"]["source"], tokenizer="char").vocab_size
    made = cllm.GPT(replace(plan.trial_config(plan.trials()[0]).model, vocab_size=vocabulary))
    n = sum(parameter.data.size for parameter in made.parameters())
    assert f"{n / 1000:.1f}k parameters: {4e-6 * n:.1f} MB, as much again for gradients" in lines[-1]
    assert f"{8e-6 * n:.1f} MB for the optimizer" in lines[-1]


def test_time_is_that_of_the_stages_on_so_many_workers(tiny, tmp_path, costs):
    costs(lambda config: (0.5, 0.01, 1.0))
    found = rows(sweep.forecast(tiny(f"[sweep]\nseeds = [0, 1, 2]\n{ONE}"), tmp_path / "out", workers=2))
    # 0.5 s + 200 steps + 4 evaluations are 6.5 s; three of these on two workers take two turns.
    assert found["time"] == "about 13 s on this machine, 2 at once with 1 thread each"
    halving = '[prune]\nmethod = "halving"\nsteps = [50, 100]\n[confirm]\nseeds = [4]\ntop = 1\n'
    space = '[[space]]\n"optim.lr" = [1e-4, 2e-4, 3e-4, 4e-4]\n'
    found = rows(sweep.forecast(tiny(f"[sweep]\nseeds = [0]\n{space}{halving}"), tmp_path / "out", workers=1))
    # To 50: 4 x (0.5 + 0.5 + 1); to 100: 2 x 2; to the end: 0.5 + 1 + 2; confirming: 6.5.
    assert found["time"].startswith(f"about {8 + 4 + 3.5 + 6.5:.0f} s")
    assert found["search"] == "4 trials to step 50, then 2 trials to step 100, then 1 trial to the end"


def test_shapes_that_there_is_no_time_for_are_judged_by_their_size(tiny, tmp_path, costs, monkeypatch):
    costs(lambda config: (0.0, 1e-3 * config.model.n_layer, 0.1 * config.model.n_layer))
    monkeypatch.setattr(forecasting, "SECONDS", -1.0)  # only one is measured: the largest, not the longest
    space = '[[space]]\n"model.n_layer,train.max_steps" = [[1, 4000], [2, 200], [5, 200]]\n'
    lines = sweep.forecast(tiny(f"[sweep]\nseeds = [0]\n{space}"), tmp_path / "out", workers=1)
    # Steps: 4 + 0.4 + 1 s; evaluations: 80 of 0.1 s, 4 of 0.2 s, 4 of 0.5 s.
    assert rows(lines)["time"].startswith("about 16 s")
    assert "a step takes 5 ms: 1 of 3 shapes measured, the others judged by their size" in "\n".join(lines)


def test_rounds_that_are_not_proposed_yet_count(tiny, tmp_path, costs):
    costs(lambda config: (0.0, 1e-3, 0.0))
    space = '[[space]]\n"optim.lr" = {low = 1e-4, high = 1e-2}\n'
    plan = tiny(f'[sweep]\nmethod = "tpe"\ntrials = 14\nseeds = [0, 1]\n{space}')
    lines = sweep.forecast(plan, tmp_path / "out", workers=2)
    assert lines[0] == "8 settings x 2 seeds = 16 trials; 6 more settings are proposed when these have ended"
    assert rows(lines)["search"] == "28 trials to the end, in 3 rounds"
    assert rows(lines)["time"].startswith("about 2.8 s")
    assert len(plan.settings) == 8


def test_what_is_finished_already_takes_no_time(tiny, tmp_path, costs):
    costs(lambda config: (0.0, 0.01, 0.0))
    plan = tiny(f"[sweep]\nseeds = [0, 1, 2, 3]\n{ONE}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.toml").write_text(config.to_toml(plan.resolved()))
    trial = plan.trials()[0]
    folder = out / "trials" / trial.name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml(config.to_dict(plan.trial_config(trial, str(folder)))))
    (folder / "metrics.jsonl").write_text('{"step": 200, "split": "val", "loss": 2.0}\n')
    (folder / "summary.json").write_text('{"state": "finished", "step": 200, "seconds": 1.0, "isa": "any"}')
    done = {trial.name: sweep.Result(trial) for trial in plan.trials()}
    for trial, state, step in zip(plan.trials(), ("finished", "failed", "finished"), (200, 200, 100)):
        done[trial.name] = sweep.Result(trial, state, step)
    (out / "results.csv").write_text(results.table(plan, done))
    (out / "settings.json").write_text(json.dumps(plan.settings))
    found = rows(sweep.forecast(plan, tmp_path / "out", workers=1))
    assert found["finished"].startswith("1 of these trials")
    assert found["time"].startswith("about 6.0 s on this machine")
    with pytest.raises(InputError, match="holds another sweep"):
        sweep.forecast(tiny(ONE.replace("1e-3", "1e-2")), out)


def test_what_is_known_decides_in_a_forecast(load, tmp_path, monkeypatch):
    rates = [1e-4, 2e-4, 4e-4, 1e-3, 2e-3, 4e-3]
    losses = [2.5, 4.0, 2.25, 3.5, 2.75, 4.5]
    plan = load(f"""
        [sweep]
        seeds = [0]
        [prune]
        method = "halving"
        steps = [100]
        [base.train]
        max_steps = 200
        eval_interval = 100
        [[space]]
        "optim.lr" = {rates}
    """)
    unknown = set()

    def found(order):
        number, until = order.trial.setting, order.until
        if number in unknown:
            return sweep.Result(order.trial)
        return sweep.Result(order.trial, "paused" if until else "finished", until or 200, losses[number])

    monkeypatch.setattr(forecasting.folder, "found", found)
    lists, there = forecasting._played(plan, tmp_path)
    assert [[job.trial.setting for job in jobs] for jobs in lists] == [[0, 1, 2, 3, 4, 5], [0, 2, 4]]
    assert len(there) == 9
    unknown.add(5)  # by chance it is no better than the best that is known
    lists, _ = forecasting._played(plan, tmp_path)
    assert {0, 2} <= {job.trial.setting for job in lists[1]}


def test_what_cannot_be_known_is_said(tiny, load, tmp_path, costs, monkeypatch):
    def fail(config):
        raise MemoryError("out of memory")

    costs(fail)
    found = rows(sweep.forecast(tiny(ONE), tmp_path / "out"))
    assert found["time"] == "not known: a trial would fail with MemoryError: out of memory"
    (tmp_path / "my.py").write_text("def train(config, run): ...\n")
    monkeypatch.chdir(tmp_path)
    found = rows(sweep.forecast(load(f'{ONE}[base.task]\nrun = "my.py:train"\n'), tmp_path / "own"))
    assert found["time"] == "not known: task.run is a loop of its own"
    with pytest.raises(InputError, match="block_size"):
        sweep.forecast(tiny('[[space]]\n"model.block_size" = 100000\n'), tmp_path / "out")
