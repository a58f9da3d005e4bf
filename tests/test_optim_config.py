"""[optim]: arguments and defaults, users' own optimizers, groups for decay and for Muon, TOML and back."""

import copy
import inspect
import math

import numpy as np
import pytest

import cllm
from cllm import config as configs
from cllm import nn, optim
from cllm.data import Examples
from cllm.errors import InputError
from cllm.optim import OptimConfig
from cllm.progress import Silent
from cllm.sweep import plan
from cllm.tensor import Tensor


def test_config_fills_in_the_arguments():
    adamw = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    assert OptimConfig().arguments == adamw
    config = OptimConfig("adam", arguments={"betas": [0.5, 0.6]})
    assert config.arguments == {**adamw, "betas": (0.5, 0.6), "weight_decay": 0.0}
    assert OptimConfig("adam", arguments=config.arguments) == config
    assert OptimConfig("rmsprop").arguments["alpha"] == 0.99
    assert OptimConfig("sgd", lr=0.5).arguments["momentum"] == 0.0
    assert OptimConfig("lion").arguments == {"betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}
    muon = OptimConfig("muon").arguments
    assert (muon["adjust_lr_fn"], muon["betas"], muon["ns_steps"]) == ("match_rms_adamw", (0.9, 0.99), 5)
    assert "eps" not in OptimConfig("adafactor").arguments  # (None, 1e-3), which TOML cannot say


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamv"}, r'name is "adamv" \(did you mean "adam"\?\), it must be one of sgd, adam, adamw'),
        ({"arguments": {"weight_deca": 1}}, r'adamw has no argument weight_deca \(did you mean "weight_d'),
        ({"arguments": {"momentum": 0.9}}, "adamw has no argument momentum, it takes betas, eps"),
        ({"arguments": {"betas": [0.9, 2]}}, r"betas is \[0\.9, 2\]"),
        ({"name": "sgd", "arguments": {"nesterov": True}}, "nesterov needs"),
        ({"lr": math.nan}, "lr is nan, it must be a finite number above 0"),
        ({"lr": 0.0}, r"lr is 0\.0"),
        ({"grad_clip": -1.0}, r"grad_clip is -1\.0"),
        ({"name": "muon", "arguments": {"muon": False}}, "muon has no argument muon"),
        ({"name": "muon", "arguments": {"adjust_lr_fn": "x"}}, "adjust_lr_fn is 'x', it must be None"),
        ({"name": "adafactor", "arguments": {"eps": (None, 1.0)}}, r"eps is \(None, 1.0\), a config holds"),
        ({"name": "adafactor", "arguments": {"d": 0}}, "d is 0, it must be a finite number of at least 1"),
        ({"name": 3}, 'optim.name is "3", it must be one of sgd'),
        ({"decay": "matrix"}, r'decay is "matrix" \(did you mean "matrices"\?\), it must be one of all'),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(InputError, match=message):
        OptimConfig(**fields)


def test_build_decays_all_or_matrices():
    names = [
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias", "transformer.h.0.ln_1.weight", "token_embedding.weight",
    ]  # fmt: skip
    shapes = [(5, 4), (3, 4), (12, 4), (12,), (4,), (5, 4)]
    named = [(name, Tensor(np.ones(shape), requires_grad=True)) for name, shape in zip(names, shapes)]
    optimizer = optim.build(OptimConfig(lr=0.25), iter(named))
    assert type(optimizer) is optim.AdamW
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 6 and group["lr"] == 0.25
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.1)
    decays, rest = optim.build(OptimConfig(decay="matrices"), named).param_groups
    assert decays["params"] == [named[2][1]] and decays["weight_decay"] == 0.1
    assert len(rest["params"]) == 5 and rest["weight_decay"] == 0.0


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_muon_takes_the_matrices_and_adamw_the_rest(decay):
    """The token table and position table, the untied head, biases, norms and a gate of three dimensions."""
    model = cllm.GPT(cllm.GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=4, tied=False))
    gate = Tensor(np.ones((2, 1, 1)), requires_grad=True)
    named = {**dict(model.named_parameters()), "gate": gate}
    optimizer = optim.build(OptimConfig("muon", lr=0.02, decay=decay), named.items())
    names = {id(p): name for name, p in named.items()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[names[id(p)]] = group
    assert found.keys() == named.keys()
    for name, group in found.items():
        is_matrix = named[name].ndim == 2 and name.startswith("transformer.h.")
        assert group["muon"] == is_matrix, name
        assert group["eps"] == (1e-7 if is_matrix else 1e-8)
        table = name.startswith(("transformer.wte", "transformer.wpe"))
        decays = decay == "all" or (named[name].ndim >= 2 and not table)
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
        assert (group["lr"], group["betas"], group["adjust_lr_fn"]) == (0.02, (0.9, 0.99), "match_rms_adamw")
    assert sum(group["muon"] for group in optimizer.param_groups) == 1
    for p in named.values():
        p.grad = np.ones(p.shape)
    optimizer.step()


class Named(nn.Module):
    """Tables and norms that no name gives away, a table that is also the head, and a matrix."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 4), nn.Embedding(3, 4)
        self.norms = nn.ModuleList([nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.LayerNorm(4)])
        self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.tokens.weight
        self.mixing = nn.Parameter(np.ones((3, 3), np.float32))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_embeddings_and_norms_are_known_by_their_modules(name):
    model = Named()
    config = OptimConfig(name, decay="matrices")
    optimizer = optim.build(config, model.named_parameters(), model.modules())
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for key, group in found.items():
        is_matrix = key in ("hidden.weight", "mixing")
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0), key
        assert group.get("muon", is_matrix) == is_matrix, key


def test_a_run_spares_a_tasks_embeddings(tmp_path):
    model = Named()
    dataset = Examples(np.zeros((6, 2), np.int64), np.zeros((6, 2), np.int64))
    task = cllm.Task(model, dataset, loss=lambda model, batch: (model.mixing.sum(), 1))
    values = {"run.dir": str(tmp_path / "run"), "train.max_steps": 1, "optim.decay": "matrices"}
    trainer = cllm.Trainer(values, task, progress=Silent())
    trainer.fit()
    (group,) = [group for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.1]
    assert {id(p) for p in group["params"]} == {id(model.hidden.weight), id(model.mixing)}


#: The learning rate that brings each from 3 near 0 in 200 steps: Adagrad's and Adafactor's falls over time.
LR = {"adagrad": 0.5, "adafactor": 0.3}


@pytest.mark.parametrize("name", optim.BY_NAME)
def test_every_optimizer_lowers_a_quadratic(name):
    p = Tensor(3 * np.random.default_rng(0).choice([-1.0, 1.0], (6, 5)), requires_grad=True)
    optimizer = optim.build(OptimConfig(name, lr=LR.get(name, 0.05)), [("p", p)])
    for _ in range(200):
        (p**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.abs(p.data).max() < 0.3


# To TOML and back ------------------------------------------------------------------------------------

OWN = {
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "lion": {"betas": [0.8, 0.9], "weight_decay": 1},
    "adafactor": {"eps": [1e-6, 0.01], "beta2_decay": -0.7, "d": 2},
    "muon": {"ns_coefficients": [2, -1.5, 0.5], "ns_steps": 6, "adjust_lr_fn": "original", "nesterov": False},
}


@pytest.mark.parametrize("name", optim.BY_NAME)
def test_a_config_file_holds_every_argument_of_every_optimizer(name, tmp_path):
    overrides = {f"optim.{key}": value for key, value in OWN.get(name, {}).items()}
    config = configs.load(None, {"optim.name": name, **overrides})
    for key, value in OWN.get(name, {}).items():
        assert config.optim.arguments[key] == (tuple(value) if isinstance(value, list) else value)
    path = tmp_path / "config.toml"
    path.write_text(configs.to_toml(configs.to_dict(config)))
    assert configs.load(path) == config
    missing = {
        key for key, parameter in inspect.signature(optim.BY_NAME[name]).parameters.items()
        if key not in ("params", "lr") and f"{key} = " not in path.read_text()
    }  # fmt: skip
    assert missing == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.name": "adafactor", "optim.eps": 1e-8}, "optim.eps is 1e-08, it must be a list of 2"),
        ({"optim.name": "muon", "optim.ns_steps": 2.5}, r"optim.ns_steps is 2\.5, it must be an integer"),
        ({"optim.name": "muon", "optim.ns_steps": 100}, "optim.ns_steps is 100, it must be an integer"),
        ({"optim.name": "muon", "optim.adjust_lr_fn": "matchrms"},
         'optim.adjust_lr_fn is "matchrms".*it must be "original" or "match_rms_adamw"'),
        ({"optim.name": "lion", "optim.eps": 1e-8}, "optim.eps is not an argument of lion, which takes"),
        ({"optim.name": "muom"}, r'optim.name is "muom" \(did you mean "muon"\?\), it must be one of sgd, '),
    ],
)  # fmt: skip
def test_bad_keys_in_a_config(overrides, message):
    with pytest.raises(InputError, match=message):
        configs.load(None, overrides)


def test_the_help_names_the_arguments_of_all():
    rows = {key: words for key, words, _ in configs.describe()}
    assert rows["optim.ns_steps"] == "an integer"
    assert rows["optim.adjust_lr_fn"] == '"original" or "match_rms_adamw"'
    assert rows["optim.lr_decay"] == rows["optim.eps"] == "a finite number"


# A user's own ----------------------------------------------------------------------------------------

MINE = """
import numpy as np
from cllm import optim

class SignSGD(optim.Optimizer):
    elementwise = True
    def __init__(self, params, lr=1e-4, momentum=0, mix=(0.5, 0.5), kind="plain", fast=False, hook=None):
        super().__init__(params, locals())
    def update(self, group, param, grad, step, state):
        param -= group["lr"] * np.sign(grad)

class Needs(SignSGD):
    def __init__(self, params, lr, scale):
        optim.Optimizer.__init__(self, params, locals())

class NoRate(SignSGD):
    def __init__(self, params):
        pass

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a user's file."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_users_optimizer_takes_its_arguments_from_the_config(folder):
    overrides = {
        "optim.name": "mine.py:SignSGD", "optim.lr": 0.25, "optim.momentum": 0.9, "optim.mix": [0.1, 0.2],
        "optim.kind": "other", "optim.fast": True,
    }  # fmt: skip
    config = configs.load(None, overrides)
    expected = {"momentum": 0.9, "mix": (0.1, 0.2), "kind": "other", "fast": True}
    assert config.optim.arguments == expected  # `hook` stays with the constructor
    path = folder / "config.toml"
    path.write_text(configs.to_toml(configs.to_dict(config)))
    assert configs.load(path) == config
    assert configs.load(path, {"optim.kind": "third"}).optim.arguments["kind"] == "third"
    p = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    optimizer = optim.build(config.optim, [("p", p)])
    p.grad = np.array([3.0, -0.5])
    optimizer.step()
    np.testing.assert_array_equal(p.data, [0.75, 2.25])
    assert type(optimizer).__name__ == "SignSGD" and optimizer.param_groups[0]["hook"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.name": "mine.py:Sign"}, "optim.name is 'mine.py:Sign', but mine.py has no Sign"),
        ({"optim.name": "other.py:SignSGD"}, "optim.name names other.py, which cannot be read"),
        ({"optim.name": "mine.py:number"}, 'optim.name is "mine.py:number", it must be a subclass of cllm'),
        ({"optim.name": "mine.py:NoRate"}, 'optim.name is "mine.py:NoRate", its constructor must take lr'),
        ({"optim.name": "mine.py:Needs"}, "optim.scale is missing, mine.py:Needs has no default for it"),
        ({"optim.name": "mine.py:SignSGD", "optim.mixx": 1}, r'optim.mixx \(did you mean "optim.mix"\?\)'),
        ({"optim.name": "mine.py:SignSGD", "optim.nesterov": True},
         "optim.nesterov is not an argument of mine.py:SignSGD, which takes momentum, mix"),
        ({"optim.name": "mine.py:SignSGD", "optim.fast": 1}, "optim.fast is 1, it must be true or false"),
        ({"optim.name": "mine.py:SignSGD", "optim.decay": "matrices"},
         'optim.decay is "matrices", but mine.py:SignSGD has no weight_decay'),
    ],
)  # fmt: skip
def test_errors_about_a_users_optimizer(overrides, message, folder):
    with pytest.raises(InputError, match=message):
        configs.load(None, overrides)


def test_an_argument_without_a_default_can_be_given(folder):
    config = configs.load(None, {"optim.name": "mine.py:Needs", "optim.scale": 2})
    assert config.optim.arguments == {"scale": 2}


def test_a_sweep_drops_what_the_chosen_optimizer_lacks(folder):
    base = {"optim": {"name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1}}
    before = copy.deepcopy(base)
    nested, notices = plan._merged(base, {"optim.name": "mine.py:SignSGD", "optim.kind": "other"})
    assert nested == {"optim": {"name": "mine.py:SignSGD", "kind": "other"}}
    assert notices[0] == 'optim.betas of the base is left out where optim.name is "mine.py:SignSGD"'
    assert len(notices) == 2 and base == before
    base = {"optim": {"name": "mine.py:SignSGD", "kind": "other", "momentum": 0.5}}
    nested, notices = plan._merged(base, {"optim.name": "lion"})
    assert nested == {"optim": {"name": "lion"}} and len(notices) == 2
