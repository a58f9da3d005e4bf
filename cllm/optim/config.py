"""A config's [optim] section, and the optimizer that it asks for."""

import inspect
from dataclasses import dataclass, field
from functools import lru_cache

from cllm import userfile
from cllm.errors import InputError, nearest
from cllm.optim.base import Optimizer, from_zero
from cllm.optim.rules import SGD, Adafactor, Adagrad, Adam, AdamW, Lion, Muon, RMSprop
from cllm.tensor import Parameter

#: What a config may name, besides a class in a user's file.
BY_NAME = {
    "sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop, "adagrad": Adagrad, "lion": Lion,
    "adafactor": Adafactor, "muon": Muon,
}  # fmt: skip

#: Where a config's defaults are other than the constructor's.
_CONFIG_DEFAULTS = {
    "adamw": {"betas": (0.9, 0.99), "weight_decay": 0.1},
    # Muon shares its learning rate with AdamW, which updates all but the matrices.
    "muon": {"adjust_lr_fn": "match_rms_adamw", "betas": (0.9, 0.99)},
}

_ADAMW_EPS = 1e-8
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DECAY = ("all", "matrices")


def find(name):
    """The optimizer class of a name in `BY_NAME`, or of a reference such as "my.py:SignSGD".

    Raises
    ------
    InputError
        For an unknown name, or when the file has no such subclass of `Optimizer`.
    """
    if not userfile.is_reference(name):
        if name not in BY_NAME:
            hint = nearest(name, BY_NAME)
            allowed = ", ".join(BY_NAME)
            raise InputError(f'optim.name is "{name}"{hint}, it must be one of {allowed}, or FILE.py:CLASS')
        return BY_NAME[name]
    cls = userfile.load(name, "optim.name")
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise InputError(f'optim.name is "{name}", it must be a subclass of cllm.optim.Optimizer')
    missing = {"params", "lr"} - set(inspect.signature(cls).parameters)
    if missing:
        takes = " and ".join(sorted(missing))
        raise InputError(f'optim.name is "{name}", its constructor must take {takes}')
    return cls


def arguments(name):
    """The optimizer's own arguments, as its constructor declares them: all but params and lr.

    Returns
    -------
    dict of str to inspect.Parameter
    """
    return dict(_own_parameters(find(name)))


@lru_cache(32)  # a configuration asks for all optimizers' twice; a sweep has thousands of configurations
def _own_parameters(cls):
    return {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if key not in ("params", "lr") and parameter.kind not in _STARRED
    }


def _is_plain(value):
    """Whether TOML can hold a value."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: the optimizer and its arguments.

    Parameters
    ----------
    name : {"sgd", "adam", "adamw", "rmsprop", "adagrad", "lion", "adafactor", "muon"}
        Or a subclass of `Optimizer` in a file: "my.py:SignSGD".
    lr : float
        The largest learning rate; above 0.
    decay : {"all", "matrices"}
        What `weight_decay` applies to: all parameters, or those of two or more dimensions that belong neither
        to an embedding or position table nor to a norm.
    grad_clip : float
        The largest norm of all gradients; 0 for no clipping.
    arguments : dict
        The optimizer's own arguments. Those left out are filled in from its constructor's defaults, but for
        AdamW's betas, here (0.9, 0.99), and weight decay, here 0.1; and Muon's adjust_lr_fn, here
        "match_rms_adamw", and betas, here (0.9, 0.99). A default that TOML cannot hold, such as None, stays
        with the constructor.

    Raises
    ------
    InputError
        For an unknown name or argument, or a value out of range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    decay: str = "all"
    grad_clip: float = 1.0
    arguments: dict = field(default_factory=dict)

    def __post_init__(self):
        cls = find(self.name)
        known = arguments(self.name)
        for name in self.arguments:
            if name not in known:
                hint = nearest(name, known)
                raise InputError(f"{self.name} has no argument {name}{hint}, it takes {', '.join(known)}")
            if not _is_plain(self.arguments[name]):
                value = self.arguments[name]
                raise InputError(f"{name} is {value!r}, a config holds numbers, strings, and lists of them")
        if self.decay not in _DECAY:
            hint = nearest(self.decay, _DECAY)
            raise InputError(f'decay is "{self.decay}"{hint}, it must be one of {", ".join(_DECAY)}')
        if self.decay == "matrices" and "weight_decay" not in known:
            raise InputError(f'decay is "matrices", but {self.name} has no weight_decay')
        if not from_zero(self.lr) or self.lr == 0:
            raise InputError(f"lr is {self.lr!r}, it must be a finite number above 0")
        if not from_zero(self.grad_clip):
            raise InputError(f"grad_clip is {self.grad_clip!r}, it must be a finite number of at least 0")
        values = {key: p.default for key, p in known.items() if _is_plain(p.default)}
        values |= {**_CONFIG_DEFAULTS.get(self.name, {}), **self.arguments}
        for name, parameter in known.items():
            if name not in values and parameter.default is parameter.empty:
                raise InputError(f"{name} is missing, {self.name} has no default for it")
        cls.check(values)
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        object.__setattr__(self, "arguments", values)


def build(config, named_parameters, modules=()):
    """The optimizer of an `OptimConfig`.

    Parameters
    ----------
    config : OptimConfig
    named_parameters : iterable of (str, Tensor)
        A name with a part "wte", "wpe" or one that contains "embed" is a table, one with a part "lm_head" is
        the head.
    modules : iterable of Module, optional
        Those that hold the parameters. What belongs to one whose `holds_matrices` is False, as `nn.Embedding`
        and the norms have it, is no matrix whatever its name is.

    Returns
    -------
    Optimizer
        With decay = "matrices" parameters of fewer than two dimensions, tables and norms are in a group that
        does not decay. With Muon all but matrices, and the tables and the head, are in groups for AdamW.
    """
    cls = find(config.name)
    spared = {
        id(value) for module in modules if not module.holds_matrices
        for value in vars(module).values() if isinstance(value, Parameter)
    }  # fmt: skip
    groups = {}
    for name, p in named_parameters:
        parts = name.lower().split(".")
        is_spared = id(p) in spared or any(part in ("wte", "wpe") or "embed" in part for part in parts)
        own = {}
        if config.name == "muon" and (p.data.ndim != 2 or is_spared or "lm_head" in parts):
            own.update(muon=False, eps=_ADAMW_EPS)
        if config.decay == "matrices" and (p.data.ndim < 2 or is_spared):
            own.update(weight_decay=0.0)
        groups.setdefault(tuple(own), {"params": [], **own})["params"].append(p)
    order = sorted(groups, key=len)  # the group that takes all of the config's arguments first
    return cls([groups[key] for key in order], lr=config.lr, **config.arguments)
