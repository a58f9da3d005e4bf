"""A run's configuration: sections, each a frozen dataclass beside its owner, to TOML and back.

A section's fields and defaults are its dataclass's; here are the checks that all of them share: unknown
sections and keys, types, NaN, and what holds between sections. Keys are dotted, ``optim.lr``. Each bad
value is an InputError of one sentence that names the key, its value and what is allowed.
"""

import functools
import inspect
import json
import os
import re
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from cllm import gpt, kernels, metrics, optim, schedules, task, userfile
from cllm.data import DataConfig
from cllm.errors import InputError, nearest
from cllm.gpt import GPTConfig
from cllm.guard import GuardConfig
from cllm.monitor import MonitorConfig
from cllm.optim import OptimConfig
from cllm.schedules import ScheduleConfig
from cllm.task import LossConfig, TaskConfig

__all__ = [
    "Config", "RunConfig", "TrainConfig", "describe", "flatten", "from_dict", "given", "load",
    "optimizer_arguments", "parse_value", "takes_integers", "task_flags", "to_dict", "to_toml", "unflatten",
]  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """[train]: how long, in which portions, and what is written when.

    Parameters
    ----------
    batch_size : int or "full"
        Sequences in a micro-batch; "full" takes all windows of the training split.
    grad_accum : int
        Micro-batches in a step; their gradients are added before the update.
    max_steps : int
        Updates in the whole run.
    eval_interval, sample_interval, checkpoint_interval : int
        Steps between evaluations, generated lines, checkpoints. 0: no regular ones; the last step is
        evaluated and has a checkpoint in any case.
    keep_checkpoints : int
        How many of the newest checkpoints are kept, and the best one with them.
    max_minutes : float
        Minutes after which this process writes a checkpoint and ends; resuming counts anew. 0: no limit.
    seed : int
        Initial weights, batch order, dropout and generated lines follow from it.
    threads : int
        Threads of the kernels, at most one for each core; 0 keeps what the process uses. Results do not
        depend on it.
    metrics : list of str
        Of `cllm.metrics.BY_NAME`: what evaluations measure besides the loss.
    patience : int
        Evaluations in a row without a better loss after which the run ends early; 0: it does not.
    prefetch : int
        Batches that a thread of its own makes ahead; 0: each is made when it is needed. It pays for a token
        file that memory does not hold, and for a dataset of one's own that takes a millisecond or more, most
        of all if it waits. Results do not depend on it.
    profile : bool
        Time the kernels in a few of the steps; the run ends with a table, which its summary holds too.
    """

    batch_size: int | typing.Literal["full"] = 12
    grad_accum: int = 1
    max_steps: int = 2000
    eval_interval: int = 250
    sample_interval: int = 0
    checkpoint_interval: int = 500
    keep_checkpoints: int = 2
    max_minutes: float = 0.0
    seed: int = 1337
    threads: int = 0
    metrics: tuple[str, ...] = ()
    patience: int = 0
    prefetch: int = 0
    profile: bool = False

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "max_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value != "full" and value < 1:
                raise InputError(f"{name} is {value}, it must be at least 1")
        intervals = ("eval_interval", "sample_interval", "checkpoint_interval")
        for name in (*intervals, "max_minutes", "seed", "threads", "patience", "prefetch"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must be 0 or more")
        if self.threads > kernels.MAX_THREADS:
            raise InputError(f"threads is {self.threads}, it must be at most {kernels.MAX_THREADS}")
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}, it must be below 2**63")
        for name in self.metrics:
            if name not in metrics.BY_NAME:
                hint = nearest(name, metrics.BY_NAME)
                raise InputError(f'metrics has "{name}"{hint}, it must be of {", ".join(metrics.BY_NAME)}')
        if len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"metrics is {list(self.metrics)}, each must be there once")


@dataclass(frozen=True)
class RunConfig:
    """[run]: where the run's files go. An empty dir becomes runs/<config name>-<n> when the run starts."""

    dir: str = ""


@dataclass(frozen=True)
class Config:
    """A whole run's configuration. `model.vocab_size` is not part of it: the tokenizer decides."""

    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        # A loop of the user's own need not use the schedule.
        if self.task.run is None and (self.schedule.min_lr or 0) > self.optim.lr:
            raise InputError(
                f"schedule.min_lr is {self.schedule.min_lr:g}, "
                f"it must be at most optim.lr ({self.optim.lr:g})"
            )
        if self.task.run is not None and self.train.profile:
            raise InputError("train.profile is true, but task.run is a loop of its own: leave out one")


SECTIONS = {f.name: f.type for f in fields(Config)}
_HIDDEN = {"model.vocab_size", "optim.arguments", "task.arguments"}


# What a string may be, for the help: those of a choice, and those that name something in a user's file.
_CHOICES = {
    "optim.name": tuple(optim.BY_NAME),
    "optim.decay": ("all", "matrices"),
    "schedule.name": schedules.NAMES,
    "train.metrics": tuple(metrics.BY_NAME),
    **{f"model.{name}": choices for name, choices in gpt.CHOICES.items()},
}
OF_USER = {"task.build": "NAME", "task.run": "NAME", "optim.name": "CLASS", "model.attention": "CLASS"}


# Reading ---------------------------------------------------------------------------------------------


def load(path=None, overrides=None):
    """The configuration that a TOML file and overrides give; what neither names keeps its default.

    Parameters
    ----------
    path : path-like or None
        A TOML file; None starts from the defaults alone.
    overrides : dict, optional
        Dotted keys to values, ``{"model.n_layer": 2}``; they win over the file.

    Raises
    ------
    InputError
        For what is not TOML, an unknown key, a wrong type, a value out of range.
    FileNotFoundError
        When there is no such file.
    """
    nested = {} if path is None else read_toml(path)
    beside(nested, path, overrides or {})
    if isinstance(nested.get("sweep"), dict) or "space" in nested:
        raise InputError(f"{path} describes a sweep, not a run; run it with: cllm sweep {path}")
    optimizer = (flatten(nested) | (overrides or {})).get("optim.name")
    try:
        _check_keys(nested, optimizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _check_keys(unflatten(overrides or {}), optimizer)
    merged = flatten(nested) | (overrides or {})
    try:
        return from_dict(unflatten(merged))
    except InputError as error:
        key = str(error).split()[0]
        in_file = key in flatten(nested) and key not in (overrides or {})
        raise InputError(f"{path}: {error}" if in_file else str(error)) from None


def given(config):
    """The Config that was given as such, as a dict of nested or dotted keys, or as a file's path."""
    if isinstance(config, Config):
        return config
    if isinstance(config, dict):
        return from_dict(unflatten(flatten(config)))
    if isinstance(config, str | os.PathLike):
        return load(config)
    kind = type(config).__name__
    raise InputError(f"config is a {kind}, it must be a cllm.Config, a dict of its keys or a file's path")


def beside(nested, path, but=()):
    """Let the user's files that a config file names be found beside it too; changes `nested` in place.

    Dotted keys in `but` are left as they are: other values take their place.
    """
    for key in OF_USER:
        section, _, name = key.partition(".")
        values = nested.get(section)
        if isinstance(values, dict) and key not in but and userfile.is_reference(values.get(name)):
            values[name] = userfile.beside(values[name], key, path)


def read_toml(path):
    """The nested dict of a TOML file; one-sentence errors."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, it must be a TOML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}), it must be a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def from_dict(nested):
    """The Config of a nested dict such as `to_dict` gives; missing keys take their defaults.

    A missing schedule.min_lr is optim.lr where that is lower than its default.

    Raises
    ------
    InputError
        Begins with the dotted key that is wrong, except for an unknown key.
    """
    _check_keys(nested, flatten(nested).get("optim.name"))
    sections = {}
    for section, cls in SECTIONS.items():
        values = dict(nested.get(section, {}))
        if section == "optim":
            values = _gather_arguments(values)
        elif section == "task":
            values = _gather_task_arguments(values)
        hints = _hints(cls)
        for name, value in values.items():
            if f"{section}.{name}" not in _HIDDEN:
                values[name] = _typed(value, hints[name], f"{section}.{name}")
        try:
            sections[section] = cls(**values)
        except InputError as error:
            message = str(error)
            if not message.startswith(f"{section}."):
                message = f"{section}.{message}"  # a section's class need not know where it stands
            raise InputError(message) from None
    lr, schedule = sections.get("optim", OptimConfig()).lr, sections.get("schedule", ScheduleConfig())
    if "min_lr" not in nested.get("schedule", {}) and (schedule.min_lr or 0) > lr:
        sections["schedule"] = replace(schedule, min_lr=lr)
    return Config(**sections)


def parse_value(text, key=None):
    """The value that a command line's text stands for, read as TOML would.

    ``"3e-4"`` is a float, ``"true"`` a bool, ``"0.9,0.99"`` a list, anything else a string. With the
    dotted `key` given, text for a key that holds a string stays as it is (a folder may be named 12).
    """
    if key is not None:
        section, _, name = key.partition(".")
        if section in SECTIONS and _hints(SECTIONS[section]).get(name) is str:
            return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if list(parsed) == ["value"] and isinstance(parsed["value"], bool | int | float | str | list):
        return parsed["value"]
    if "," in text:
        return [parse_value(part.strip()) for part in text.split(",")]
    try:
        return float(text)  # spellings that TOML lacks: .5 and 1.
    except ValueError:
        return text


def _check_keys(nested, optimizer):
    """Raise for a section or key that no config has; the optimizers' own arguments are all allowed here.

    `optimizer` is the optim.name that holds in the end: a user's own brings arguments of its own.
    """
    known = {section: _keys(section, optimizer) for section in SECTIONS}
    dotted = [f"{section}.{name}" for section, names in known.items() for name in names]
    for section, values in nested.items():
        if section not in SECTIONS:
            key = f"[{section}]" if isinstance(values, dict) else section
            hint = _homonym(section, known) or nearest(section, [*SECTIONS, *dotted])
            raise InputError(f"unknown key {key}{hint}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise InputError(f"{section} is {values!r}, it must be a section: [{section}]")
        for name in values if section != "task" else ():  # that one's keys are the function's business
            if name not in known[section]:
                close = nearest(name, known[section])
                hint = (
                    close.replace('"', f'"{section}.', 1)
                    if close
                    else _homonym(name, known) or f"; [{section}] has {', '.join(known[section])}"
                )
                raise InputError(f"unknown key {section}.{name}{hint}")


def _homonym(name, known):
    """A hint at the section that does have a key of this name, or ''."""
    for section, names in known.items():
        if name in names:
            return f' (did you mean "{section}.{name}"?)'
    return ""


def _keys(section, optimizer=None):
    """The keys that [section] may hold, whichever built-in optimizer is chosen, or with a user's own."""
    names = [f.name for f in fields(SECTIONS[section]) if f"{section}.{f.name}" not in _HIDDEN]
    if section == "optim":
        optimizers = [*optim.BY_NAME, *filter(userfile.is_reference, [optimizer])]
        names += sorted({key for name in optimizers for key in optimizer_arguments(name)} - set(names))
    return names


def _gather_arguments(values):
    """[optim]'s flat keys as OptimConfig's fields: the chosen optimizer's own go to `arguments`."""
    own = _hints(OptimConfig)
    values = {"name": OptimConfig().name, **values}
    name = _typed(values["name"], own["name"], "optim.name")
    hints = optimizer_arguments(name)
    arguments = {}
    for key in [key for key in values if key not in own]:
        if key not in hints:
            raise InputError(f"optim.{key} is not an argument of {name}, which takes {', '.join(hints)}")
        arguments[key] = _typed(values.pop(key), hints[key], f"optim.{key}")
    return {**values, "arguments": arguments}


def _gather_task_arguments(values):
    """[task]'s flat keys as TaskConfig's fields, the function's arguments checked against its defaults."""
    values = dict(values)
    names = {key: values.pop(key) for key in ("build", "run") if key in values}
    for key, reference in names.items():
        _typed(reference, str, f"task.{key}")
    found = TaskConfig(**names)  # says when both are set
    if found.key is None:
        if values:
            name = next(iter(values))
            hint = nearest(name, ("build", "run")).replace('"', '"task.', 1)
            raise InputError(f"task.{name} is set{hint}, but neither task.build nor task.run is")
        return {}
    if found.build == task.GIVEN:
        return {**names, "arguments": values}
    known = task.arguments(found.key, found.reference)
    plain = (bool, int, float, str, list, tuple)  # any other default stays with the function
    arguments = {
        name: default for name, default in known.items()
        if isinstance(default, plain) or default is inspect.Parameter.empty
    }  # fmt: skip
    for name, value in values.items():
        if name not in known and not task.takes_any(found.key, found.reference):
            takes = f"which takes {', '.join(known)}" if known else "which takes none"
            hint = nearest(name, known).replace('"', '"task.', 1)
            raise InputError(f"task.{name} is not an argument of {found.reference}{hint}, {takes}")
        hint = _hint_of_default(arguments.get(name))
        hint = int | float if hint is int else hint  # noise=0 may become 0.1
        arguments[name] = _typed(value, hint, f"task.{name}")
    for name, value in arguments.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"task.{name} is missing, {found.reference} has no default for it")
    return {**names, "arguments": arguments}


def task_flags(key, reference):
    """The keys of [task] that are true or false, as the function of [task] `key` = `reference` says."""
    defaults = task.arguments(key, reference).items()
    return {f"task.{name}" for name, default in defaults if isinstance(default, bool)}


def _hint_of_default(default):
    """The type that an argument with this default may have; without one, all that TOML has in one line."""
    if default is None or default is inspect.Parameter.empty:
        return bool | int | float | str | list
    if isinstance(default, tuple):
        return tuple[tuple(map(_hint_of_default, default))] if default else tuple[float, ...]
    for kind in (bool, int, float, str):
        if isinstance(default, kind):
            return kind
    return list if isinstance(default, list) else bool | int | float | str | list


def notes(config):
    """What is allowed in a `Config`, but is seldom meant: sentences for the user."""
    name, warmup, steps = config.schedule.name, config.schedule.warmup_steps, config.train.max_steps
    if warmup is None or warmup < steps or (warmup == steps and name in ("constant", "warmup")):
        return []
    what = f"only reaches {steps / warmup:.0%} of optim.lr"
    if warmup == steps:
        what = "rises to the end, never to fall"
    return [f"schedule.warmup_steps is {warmup} and train.max_steps is {steps}: the learning rate {what}"]


def optimizer_arguments(name):
    """An optimizer's own arguments and their types, which its constructor's annotations or defaults show."""
    # A sweep asks for the built-in ones' tens of thousands of times; a user's file may change.
    return _cached_arguments(name) if name in optim.BY_NAME else _arguments_of(name)


def _arguments_of(name):
    hints = {}
    for key, parameter in optim.arguments(name).items():
        hint = parameter.annotation
        plain = (bool, int, float, str, types.NoneType)
        if not all(x in plain or typing.get_origin(x) in (tuple, typing.Literal) for x in _options(hint)):
            hint = _hint_of_default(parameter.default)
            hint = int | float if hint is int else hint  # momentum=0 may become 0.9
        hints[key] = hint
    return hints


_cached_arguments = functools.cache(_arguments_of)
_hints = functools.cache(typing.get_type_hints)  # of a section's class


def takes_integers(key):
    """Whether a dotted key holds whole numbers only; None where a function or class of the user's decides."""
    section, _, name = key.partition(".")
    hints = dict(_hints(SECTIONS[section])) if section in SECTIONS else {}
    if section == "optim":
        for optimizer in optim.BY_NAME:
            hints = {**optimizer_arguments(optimizer), **hints}
    if name not in hints or section == "task":
        return None
    options = _options(hints[name])
    return int in options and float not in options


# Types -----------------------------------------------------------------------------------------------


def _typed(value, hint, key):
    """`value` as the annotation `hint` asks for; 2.0 passes as an int, 2 as a float, nothing as a bool."""
    options = _options(hint)
    if isinstance(value, os.PathLike):  # from Python, as NumPy's numbers
        value = os.fspath(value)
    elif isinstance(value, np.generic):
        value = value.item()
    for option in options:
        if _fits(value, option):
            return _converted(value, option)
    words = [choice for option in options for choice in _choices(option)]
    close = nearest(value, words) if isinstance(value, str) else ""
    raise InputError(f"{key} is {_shown(value)}{close}, it must be {_described(options)}")


def _options(hint):
    """The members of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value, option):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return number and abs(value) <= sys.float_info.max and value == int(value)
    if option is float:
        return number and abs(value) <= sys.float_info.max
    if typing.get_origin(option) is tuple:
        parts = typing.get_args(option)
        if parts[-1] is Ellipsis:  # a list of any length; one value stands for a list of one
            return all(_fits(part, parts[0]) for part in _listed(value))
        return (
            isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
        )
    if typing.get_origin(option) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(option)
    return isinstance(value, option)


def _converted(value, option):
    if typing.get_origin(option) is tuple:
        parts = typing.get_args(option)
        if parts[-1] is Ellipsis:
            return tuple(_converted(part, parts[0]) for part in _listed(value))
        return tuple(map(_converted, value, parts))
    return option(value) if option in (int, float) else value


def _listed(value):
    return value if isinstance(value, list | tuple) else [value]


def _choices(option):
    return typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()


def _described(options):
    """What may be given, in words; None is not to be given but left out."""
    return " or ".join(_named(option) for option in options if option is not types.NoneType)


def _named(option):
    if typing.get_origin(option) is tuple:
        parts = typing.get_args(option)
        if parts[-1] is Ellipsis:
            return {str: "a list of strings", int: "a list of integers"}.get(parts[0], "a list of numbers")
        return f"a list of {len(parts)} {'values' if str in parts else 'numbers'}"
    if _choices(option):
        return " or ".join(f'"{choice}"' for choice in _choices(option))
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "a string",
            list: "a list"}[option]


def _shown(value):
    """A value as TOML would write it, where it could."""
    if value is None:
        return "none"
    try:
        return _toml(value)
    except TypeError:
        return " ".join(repr(value).split())


# Writing ---------------------------------------------------------------------------------------------


def to_dict(config):
    """The configuration as a nested dict of plain values, complete: `from_dict` gives an equal Config.

    A value of None is left out, since TOML has none and all such fields default to it.
    """
    nested = {}
    for section, cls in SECTIONS.items():
        values = {f.name: getattr(getattr(config, section), f.name) for f in fields(cls)}
        values.update(values.pop("arguments", {}))
        nested[section] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and f"{section}.{name}" not in _HIDDEN
        }
    if not nested["task"]:
        del nested["task"]  # language modelling on [data] and [model]
    return nested


def to_toml(nested):
    """A nested dict as TOML text: plain keys, then [sections]; lists of dicts become [[blocks]]."""
    lines = []
    _write_table(nested, (), lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table, path, lines):
    def is_table(value):
        return isinstance(value, dict)

    def is_blocks(value):
        return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_table, value))

    for key, value in table.items():
        if not is_table(value) and not is_blocks(value):
            lines.append(f"{_toml_key(key)} = {_toml(value)}")
    for key, value in table.items():
        header = ".".join(map(_toml_key, (*path, key)))
        if is_table(value):
            lines += ["", f"[{header}]"]
            _write_table(value, (*path, key), lines)
        elif is_blocks(value):
            for block in value:
                lines += ["", f"[[{header}]]"]
                _write_table(block, (*path, key), lines)


def _toml_key(key):
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    raise TypeError(f"TOML has no {type(value).__name__}")


# Dotted keys -----------------------------------------------------------------------------------------


def flatten(nested):
    """``{"optim": {"lr": 1e-3}}`` as ``{"optim.lr": 1e-3}``."""
    flat = {}
    for section, values in nested.items():
        if isinstance(values, dict):
            flat.update({f"{section}.{name}": value for name, value in values.items()})
        else:
            flat[section] = values
    return flat


def unflatten(flat):
    """``{"optim.lr": 1e-3}`` as ``{"optim": {"lr": 1e-3}}``."""
    nested = {}
    for key, value in flat.items():
        section, dot, name = str(key).partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def describe():
    """Each key with its type in words and its default, for a command line's help.

    Returns
    -------
    list of (str, str, object)
        Dotted key, type, default. The default of an optimizer's own argument that the default optimizer
        lacks is None: its constructor says.
    """
    defaults = flatten(to_dict(Config()))
    rows = []
    for section, cls in SECTIONS.items():
        hints = dict(_hints(cls))
        if section == "optim":
            for name in optim.BY_NAME:
                hints = {**optimizer_arguments(name), **hints}
        for name in _keys(section):
            key = f"{section}.{name}"
            words = _described(_options(hints[name]))
            if key in _CHOICES:
                words = " or ".join(f'"{choice}"' for choice in _CHOICES[key])
                words = f"a list of {words}" if isinstance(defaults.get(key), list) else words
            if key in OF_USER:
                words = f"{words} or " * (key in _CHOICES) + f'"FILE.py:{OF_USER[key]}"'
            rows.append((key, words, defaults.get(key)))
    return rows
