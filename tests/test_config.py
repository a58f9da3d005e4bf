"""Configuration: defaults, TOML both ways, overrides, and one sentence for each bad value."""

import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm import config as configs
from cllm.config import Config, from_dict, load, parse_value, to_dict, to_toml
from cllm.errors import InputError


def write(tmp_path, text):
    path = tmp_path / "char.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_documented_ones():
    config = load()
    assert config == Config()
    flat = configs.flatten(to_dict(config))
    expected = {
        "data.source": "python-stdlib", "data.tokenizer": "char",
        "data.val_fraction": 0.1, "data.test_fraction": 0.0,
        "model.n_layer": 4, "model.n_head": 4, "model.n_embd": 128, "model.block_size": 64,
        "optim.name": "adamw", "optim.lr": 1e-3, "optim.betas": [0.9, 0.99],
        "optim.weight_decay": 0.1, "optim.decay": "all", "optim.grad_clip": 1.0,
        "schedule.name": "cosine", "schedule.warmup_steps": 100, "schedule.min_lr": 1e-4,
        "train.batch_size": 12, "train.grad_accum": 1, "train.max_steps": 2000,
        "train.eval_interval": 250, "train.sample_interval": 0, "train.checkpoint_interval": 500,
        "train.seed": 1337, "train.threads": 0, "train.metrics": [], "run.dir": "",
        "loss.label_smoothing": 0.0, "loss.z_loss": 0.0,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected


def test_file_and_overrides(tmp_path):
    path = write(
        tmp_path, '[model]\nn_layer = 2\nbias = false\n[train]\nmax_steps = 1e3\nbatch_size = "full"\n'
    )
    config = load(path, {"model.n_layer": 3, "optim.betas": [0.8, 0.9]})
    assert config.model.n_layer == 3 and config.model.bias is False
    assert config.train.max_steps == 1000 and type(config.train.max_steps) is int
    assert config.train.batch_size == "full"
    assert config.optim.arguments["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"optim.name": "sgd", "optim.momentum": 0.9, "optim.nesterov": True, "optim.lr": 0.1},
        {"model.d_ff": 96, "model.dropout": 0.1, "train.batch_size": "full", "run.dir": 'a "b"\\c\n€'},
    ],
)
def test_written_toml_is_complete_and_reloads_equal(tmp_path, overrides):
    config = load(None, overrides)
    path = write(tmp_path, to_toml(to_dict(config)))
    assert load(path) == config
    written = configs.flatten(tomllib.loads(path.read_text()))
    defaults = configs.flatten(to_dict(load(None, {"optim.name": config.optim.name})))
    assert set(defaults) <= set(written)


def test_another_optimizer_starts_from_its_own_defaults():
    assert "betas" not in to_dict(load(None, {"optim.name": "sgd"}))["optim"]
    assert to_dict(load(None, {"optim.name": "adam"}))["optim"]["betas"] == [0.9, 0.999]
    assert to_dict(load(None, {"optim.name": "sgd"}))["optim"]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nn_layr = 2", r'char.toml: unknown key model.n_layr \(did you mean "model.n_layer"\?\)'),
        ("[model]\nlr = 2", r'unknown key model.lr \(did you mean "optim.lr"\?\)'),
        ("[model]\nzzz = 2", r"unknown key model.zzz; \[model\] has .*n_layer"),
        ("[modle]\nn_layer = 2", r'unknown key \[modle\] \(did you mean "model"\?\)'),
        ("lr = 1e-3", r'unknown key lr \(did you mean "optim.lr"\?\)'),
        ("[model]\nvocab_size = 5", r"unknown key model.vocab_size"),
        ("model = 3", r"model is 3, it must be a section: \[model\]"),
        ("[optim]\nlr = nan", r"char.toml: optim.lr is nan, it must be a finite number"),
        ("[optim]\nlr = inf", r"optim.lr is inf"),
        ("[optim]\nlr = -1.0", r"optim.*lr.*-1"),
        ("[optim]\nlr = 0.0", r"optim.*lr.*0"),
        ("[optim]\nlr = true", r"optim.lr is true, it must be a finite number"),
        ('[optim]\nlr = "fast"', r'optim.lr is "fast", it must be a finite number'),
        ('[optim]\nname = "adamww"', r'optim.name is "adamww" \(did you mean "adamw"\?\), it must be one of'),
        ("[optim]\nmomentum = 0.9", r"optim.momentum is not an argument of adamw, which takes .*betas"),
        ("[optim]\nbetas = [0.9]", r"optim.betas is \[0.9\], it must be a list of 2 numbers"),
        ("[optim]\nbetas = [0.9, 1.0]", r"optim.*betas.*1"),
        ("[optim]\ngrad_clip = -1.0", r"optim.*grad_clip.*-1"),
        ("[train]\nmax_steps = 2.5", r"train.max_steps is 2.5, it must be an integer"),
        ("[train]\nmax_steps = true", r"train.max_steps is true, it must be an integer"),
        ("[train]\nmax_steps = 0", r"char.toml: train.max_steps is 0, it must be at least 1"),
        ("[train]\nbatch_size = 0", r"train.batch_size is 0, it must be at least 1"),
        (
            '[train]\nbatch_size = "ful"',
            r'train.batch_size is "ful" \(did you mean "full"\?\), .*integer or "full"',
        ),
        ("[train]\ngrad_accum = 0", r"train.grad_accum is 0"),
        ("[train]\neval_interval = -5", r"train.eval_interval is -5, it must be 0 or more"),
        ("[train]\nthreads = -1", r"train.threads is -1"),
        ("[train]\nseed = -1", r"train.seed is -1"),
        ("[schedule]\nmin_lr = 1e-2", r"schedule.min_lr is 0.01, it must be at most optim.lr \(0.001\)"),
        ("[schedule]\nwarmup_steps = -1", r"schedule.*warmup_steps.*-1"),
        ('[schedule]\nname = "cosin"', r'schedule.*cosin.*did you mean "cosine"'),
        ("[schedule]\ngama = 0.5", r'unknown key schedule.gama \(did you mean "schedule.gamma"\?\)'),
        ("[schedule]\ngamma = 0.5", r"schedule.gamma is not an argument of cosine, .* warmup_steps, min_lr"),
        ('[schedule]\nname = "join"', r"schedule.names is missing, join needs it"),
        ('[schedule]\nname = "step"\nstep_size = 2.5', r"schedule.step_size is 2.5, it must be an integer"),
        (
            '[schedule]\nname = "multi_step"\nmilestones = [500, 300]',
            r"char.toml: schedule.milestones has 300 after 500, it must increase",
        ),
        (
            '[schedule]\nname = "multi_step"\nmilestones = [0.5]',
            r"schedule.milestones is \[0.5\], it must be a list of integers",
        ),
        (
            '[schedule]\nname = "wsd"\ndecay_shape = "linea"',
            r'schedule.decay_shape is "linea" \(did you mean "linear"\?\), it must be "linear" or "1-sqrt"',
        ),
        ('[schedule]\nname = "one_cycle"\nmin_lr = 0.0', r"schedule.min_lr is not an argument of one_cycle"),
        (
            '[schedule]\nname = "join"\nnames = ["constant", "cosin"]\nboundaries = [500]',
            r'schedule.names is "cosin" \(did you mean "cosine"\?\)',
        ),
        ('[train]\nmetrics = ["acuracy"]', r'train.metrics has "acuracy" \(did you mean "accuracy"\?\), it'),
        ("[train]\nmetrics = [3]", r"train.metrics is \[3\], it must be a list of strings"),
        ('[train]\nmetrics = ["f1", "f1"]', r"train.metrics is .*, each must be there once"),
        ("[loss]\nlabel_smoothing = 1.5", r"loss.label_smoothing is 1.5, it must be from 0 to 1"),
        ("[loss]\nz_loss = -1.0", r"loss.z_loss is -1, it must be 0 or more"),
        ("[loss]\nz_los = 1.0", r'unknown key loss.z_los \(did you mean "loss.z_loss"\?\)'),
        ("[model]\nn_embd = 130", r"model.*n_embd.*130.*n_head.*4"),
        ("[model]\nn_layer = 0", r"model.*n_layer.*0"),
        ("[model]\ndropout = 1.5", r"model.*dropout.*1.5"),
        ("[data]\nval_fraction = 1.0", r"data.*val_fraction.*1"),
        ("[data]\nval_fraction = 0.6\ntest_fraction = 0.5", r"val_fraction.*test_fraction"),
        ("[data]\nsource = 3", r"data.source is 3, it must be a string"),
        ("[model\nn_layer = 2", r"char.toml is not valid TOML"),
    ],
)
def test_bad_values_are_one_sentence(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load(write(tmp_path, text))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


MINE = """
def build(config, p=53, share=0.5, name="add", deep=False, sizes=(1, 2), extra=None, steps=[1], make=print):
    pass

def free(config, **options):
    pass

def needs(config, run, p):
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MINE)


def test_a_tasks_arguments_are_checked_against_the_functions_defaults(mine, tmp_path):
    config = load(None, {"task.build": "my.py:build", "task.p": 7.0, "task.share": 1, "task.sizes": [3, 4]})
    expected = {"p": 7, "share": 1.0, "name": "add", "deep": False, "sizes": (3, 4), "steps": [1]}
    assert config.task.arguments == expected and type(config.task.arguments["share"]) is float
    path = write(tmp_path, to_toml(to_dict(config)))
    assert load(path) == config and "[task]" in path.read_text()
    free = load(None, {"task.build": "my.py:free", "task.anything": "x"})
    assert free.task.arguments == {"anything": "x"}
    assert load(None, {"task.run": "my.py:needs", "task.p": 3}).task.arguments == {"p": 3}
    assert load(None, {"task.build": "my.py:build", "task.extra": [1, 2]}).task.arguments["extra"] == [1, 2]
    assert "[task]" not in to_toml(to_dict(Config()))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"build": "my.py:build", "pp": 3}, 'not an argument of my.py:build (did you mean "task.p"?), which'),
        ({"build": "my.py:build", "zzz": 3}, "of my.py:build, which takes p, share, name, deep, sizes, ex"),
        ({"build": "my.py:build", "p": "x"}, 'task.p is "x", it must be an integer or a finite number'),
        ({"build": "my.py:build", "p": True}, "task.p is true, it must be an integer"),
        ({"build": "my.py:build", "share": "much"}, 'task.share is "much", it must be a finite number'),
        ({"build": "my.py:build", "name": 3}, "task.name is 3, it must be a string"),
        ({"build": "my.py:build", "deep": 1}, "task.deep is 1, it must be true or false"),
        ({"build": "my.py:build", "sizes": [1]}, "task.sizes is [1], it must be a list of 2 numbers"),
        ({"build": "my.py:build", "steps": 1}, "task.steps is 1, it must be a list"),
        ({"run": "my.py:needs"}, "task.p is missing, my.py:needs has no default for it"),
        ({"build": "my.py:build", "run": "my.py:needs"}, "task.build and task.run are both set"),
        ({"p": 3}, "task.p is set, but neither task.build nor task.run is"),
        ({"biuld": "my.py:build"}, 'task.biuld is set (did you mean "task.build"?)'),
        ({"build": "my.py:bulid"}, 'my.py has no bulid (did you mean "build"?)'),
        ({"build": "mine.py:build"}, "task.build names mine.py, which cannot be read"),
        ({"build": "build"}, "task.build is 'build', it must be FILE.py:NAME"),
        ({"build": 3}, "task.build is 3, it must be a string"),
    ],
)
def test_bad_tasks_are_one_sentence(mine, keys, message):
    with pytest.raises(InputError) as caught:
        load(None, {f"task.{key}": value for key, value in keys.items()})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tasks_integer_may_become_a_float(mine):
    for value in (2.5, 3):
        found = load(None, {"task.build": "my.py:build", "task.p": value}).task.arguments["p"]
        assert found == value and type(found) is type(value)


def test_a_task_that_takes_any_argument_has_those_with_a_name_too(mine, tmp_path):
    (tmp_path / "any.py").write_text("def build(config, p, share=0.5, *, deep=False, **more):\n    pass\n")
    keys = {"task.build": "any.py:build", "task.p": 3, "task.other": "x"}
    assert load(None, keys).task.arguments == {"share": 0.5, "deep": False, "p": 3, "other": "x"}
    with pytest.raises(InputError, match=r'^task.share is "x", it must be a finite number$'):
        load(None, {**keys, "task.share": "x"})
    with pytest.raises(InputError, match=r"^task.p is missing, any.py:build has no default for it$"):
        load(None, {"task.build": "any.py:build"})


def test_a_class_without_a_signature_is_no_task(mine, tmp_path):
    (tmp_path / "any.py").write_text("build = dict\n")
    with pytest.raises(InputError, match=r"^task.build: the arguments of any.py:build cannot be found"):
        load(None, {"task.build": "any.py:build"})


def test_a_small_lr_lowers_the_min_lr_that_was_not_set(mine):
    assert load(None, {"optim.lr": 5e-5}).schedule.min_lr == 5e-5
    assert load(None, {"optim.lr": 5e-3}).schedule.min_lr == 1e-4
    assert load(None, {"optim.lr": 5e-5, "schedule.name": "constant"}).schedule.min_lr is None
    with pytest.raises(InputError, match=r"schedule.min_lr is 0.0001, it must be at most optim.lr \(5e-05\)"):
        load(None, {"optim.lr": 5e-5, "schedule.min_lr": 1e-4})
    own = {"task.run": "my.py:needs", "task.p": 1, "schedule.min_lr": 1.0}
    assert load(None, own).schedule.min_lr == 1.0  # a loop of one's own need not use it


def test_the_file_is_named_for_a_key_of_task(mine, tmp_path):
    path = write(tmp_path, '[task]\nbuild = "my.py:build"\np = true\n')
    with pytest.raises(InputError, match=r"char.toml: task.p is true"):
        load(path)


def test_the_users_file_is_found_beside_the_config(mine, tmp_path, monkeypatch):
    path = write(tmp_path, '[task]\nbuild = "my.py:build"\np = 7\n')
    monkeypatch.chdir(tmp_path.parent)
    config = load(path)
    assert config.task.build == f"{tmp_path.name}/my.py:build" and config.task.arguments["p"] == 7
    assert load(path, {"task.build": f"{path.parent}/my.py:build"}).task.build == f"{tmp_path}/my.py:build"
    with pytest.raises(InputError, match=r"^task.build names my.py, which cannot be read"):
        load(None, {"task.build": "my.py:build"})
    path = write(tmp_path, '[model]\nattention = "none.py:A"\n')
    with pytest.raises(InputError, match=r"^model.attention names none.py, which is neither .* nor beside /"):
        load(path)
    assert load(path, {"model.attention": "plain"}).model.attention == "plain"


def test_a_config_as_a_dict_or_path(tmp_path):
    expected = load(None, {"optim.lr": 0.01, "model.n_layer": 2})
    nested = {"optim": {"lr": 0.01}, "model.n_layer": 2}
    assert configs.given(nested) == configs.given(expected) == expected
    assert nested == {"optim": {"lr": 0.01}, "model.n_layer": 2}
    assert configs.given(str(write(tmp_path, "optim.lr = 0.01\nmodel.n_layer = 2"))) == expected
    for wrong, message in ((3, "config is a int, it must be a cllm.Config, a"), ({3: 4}, "unknown key 3")):
        with pytest.raises(InputError, match=message):
            configs.given(wrong)


def test_lists_of_any_length():
    assert load(None, {"train.metrics": "accuracy"}).train.metrics == ("accuracy",)
    assert load(None, {"train.metrics": ["f1", "top5"]}).train.metrics == ("f1", "top5")
    assert to_dict(load(None, {"train.metrics": ["f1"]}))["train"]["metrics"] == ["f1"]


def test_a_sweeps_file_is_sent_to_cllm_sweep(tmp_path):
    for text in ("[sweep]\nseeds = [1]\n", '[[space]]\n"optim.lr" = 1e-3\n'):
        with pytest.raises(InputError, match=r"a sweep, not a run; run it with: cllm sweep .*char.toml"):
            load(write(tmp_path, text))


def test_bad_override_names_the_key():
    with pytest.raises(InputError, match=r'^unknown key model.n_heads \(did you mean "model.n_head"\?\)$'):
        load(None, {"model.n_heads": 2})
    with pytest.raises(InputError, match=r"^unknown key lr"):
        load(None, {"lr": 2})


def test_messages_name_the_file_only_for_what_stands_in_it(tmp_path):
    path = write(tmp_path, "[train]\nmax_steps = 10\nseed = -1\n")
    with pytest.raises(InputError, match=r"^train.max_steps is 0, it must be at least 1$"):
        load(path, {"train.max_steps": 0, "train.seed": 1})
    with pytest.raises(InputError, match=r"^train.threads is 1.5, it must be an integer$"):
        load(path, {"train.threads": 1.5, "train.seed": 1})
    with pytest.raises(InputError, match=r"char.toml: train.seed is -1"):
        load(path, {"train.max_steps": 5})


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config file .*none\.toml$"):
        load(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[run]\ndir = '\xe9'\n")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 13\)"):
        load(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("1e-3", 1e-3), (".5", 0.5), ("true", True), ("0.9,0.99", [0.9, 0.99]),
        ("[64, 128]", [64, 128]), ("adamw", "adamw"), ("a b", "a b"), ('"12"', "12"), ("", ""),
        ("1\nx = 2", "1\nx = 2"), ("2024-01-01", "2024-01-01"), ("full", "full"),
    ],
)  # fmt: skip
def test_parse_value(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_parse_value_leaves_text_for_a_string_key():
    assert parse_value("12", "run.dir") == "12"
    assert parse_value("a,b.txt", "data.source") == "a,b.txt"
    assert parse_value("12", "train.batch_size") == 12
    assert math.isnan(parse_value("nan", "optim.lr"))


scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
lists = st.lists(scalars, max_size=3)
values = st.one_of(scalars, lists, st.lists(lists, max_size=3))
tables = st.dictionaries(st.text(), values, max_size=4)


blocks = st.lists(tables, min_size=1, max_size=3)


@given(st.dictionaries(st.text(), st.one_of(values, tables, blocks), max_size=5))
def test_to_toml_is_read_back_the_same(nested):
    assert tomllib.loads(to_toml(nested)) == nested


def test_from_dict_inverts_to_dict():
    config = load(None, {"model.n_embd": 64, "train.seed": 5})
    assert from_dict(to_dict(config)) == config


def test_describe_lists_each_key_with_type_and_default():
    rows = {key: (words, default) for key, words, default in configs.describe()}
    assert rows["train.max_steps"] == ("an integer", 2000)
    assert rows["train.batch_size"] == ('an integer or "full"', 12)
    assert rows["model.bias"] == ("true or false", True)
    assert rows["optim.betas"] == ("a list of 2 numbers", [0.9, 0.99])
    assert rows["schedule.warmup_steps"] == ("an integer", 100)
    assert rows["schedule.milestones"] == ("a list of integers", None)
    assert rows["optim.momentum"][1] is None and "model.vocab_size" not in rows
    assert rows["model.norm"] == ('"layer" or "rms"', "layer")
    assert rows["optim.name"][0].endswith('or "muon" or "FILE.py:CLASS"')
    assert rows["task.build"] == ('"FILE.py:NAME"', None)
    assert rows["train.metrics"][0].startswith('a list of "accuracy" or "top5"')
    assert set(configs.flatten(to_dict(Config()))) <= set(rows)


def test_a_warm_up_longer_than_the_run_is_noted():
    assert configs.notes(configs.from_dict({})) == []
    (note,) = configs.notes(configs.from_dict({"train": {"max_steps": 20}}))
    assert "warmup_steps is 100" in note
    assert "20% of optim.lr" in note
    without = {"schedule": {"name": "one_cycle"}, "train": {"max_steps": 20}}
    assert configs.notes(configs.from_dict(without)) == []


def test_values_from_python():
    """NumPy's numbers and paths are taken; what nothing can be made of is named in a sentence."""
    values = {"train.max_steps": np.int64(3), "optim.lr": np.float64(0.5), "run.dir": Path("a")}
    config = configs.given(values)
    assert (config.train.max_steps, config.optim.lr, config.run.dir) == (3, 0.5, "a")
    assert type(config.train.max_steps) is int and type(config.optim.lr) is float
    for values, message in (
        ({"optim.lr": 1j}, "optim.lr is 1j, it must be a finite number"),
        ({"model.n_head": np.ones(2)}, r"model.n_head is array\(\[1., 1.\]\), it must be an integer"),
    ):
        with pytest.raises(InputError, match=message):
            configs.given(values)


@pytest.mark.parametrize("name", ["wsd", "cosine", "exponential"])
def test_a_warm_up_that_fills_the_run_is_noted(name):
    values = {"schedule": {"name": name, "warmup_steps": 40}, "train": {"max_steps": 40}}
    (note,) = configs.notes(configs.from_dict(values))
    assert note.endswith("train.max_steps is 40: the learning rate rises to the end, never to fall")
    values["train"]["max_steps"] = 41
    assert configs.notes(configs.from_dict(values)) == []
    range_test = {"schedule": {"name": "constant", "warmup_steps": 40}, "train": {"max_steps": 40}}
    assert configs.notes(configs.from_dict(range_test)) == []
