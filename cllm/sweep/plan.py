"""A sweep's file as a `Sweep`: a base configuration, the settings that change it, the seeds."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from cllm import config as configs
from cllm import optim, records, schedules, userfile
from cllm.errors import InputError, nearest
from cllm.sweep import space as spaces
from cllm.verdict import text

__all__ = ["Sweep", "SweepConfig", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a setting with a seed."""

    setting: int
    seed: int
    overrides: dict  # dotted keys of the setting -> values

    @property
    def name(self):
        return f"s{self.setting:03d}-seed{self.seed}"


@dataclass(frozen=True)
class SweepConfig:
    """[sweep]: which trials are run and what they are judged by.

    Parameters
    ----------
    method : "grid"
        How settings are chosen from the space; "grid" takes all.
    seeds : list of int
        Each setting runs with each of them as train.seed.
    objective : str
        SPLIT.METRIC of the records, such as "val.loss". What a task of the user's own records is known only
        when the first trial has ended.
    at : "last" or "best"
        Which record of a trial counts.
    goal : "minimize" or "maximize"
    threads : int
        Threads of each trial.
    """

    method: str = "grid"
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    objective: str = "val.loss"
    at: str = "last"
    goal: str = "minimize"
    threads: int = 1

    def __post_init__(self):
        for name, allowed in {
            "method": ("grid",), "at": ("last", "best"), "goal": ("minimize", "maximize")
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                words = " or ".join(f'"{word}"' for word in allowed)
                raise InputError(f"sweep.{name} is {value!r}, it must be {words}")
        if not isinstance(self.seeds, list) or not self.seeds or not all(map(_is_seed, self.seeds)):
            raise InputError(f"sweep.seeds is {self.seeds!r}, it must be a list of integers of at least 0")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"sweep.seeds is {self.seeds}, each seed must be there once")
        parts = self.objective.split(".") if isinstance(self.objective, str) else []
        if len(parts) < 2 or not all(parts):
            raise InputError(f'sweep.objective is {self.objective!r}, it must be SPLIT.METRIC: "val.loss"')
        if not _is_seed(self.threads) or self.threads < 1:
            raise InputError(f"sweep.threads is {self.threads!r}, it must be an integer of at least 1")


@dataclass(frozen=True)
class Sweep:
    """A sweep: a base configuration, the settings that change it, and the seeds.

    Attributes
    ----------
    config : SweepConfig
    base : dict
        Nested like a run's config file; what it leaves out keeps its default.
    space : list of dict
        The [[space]] blocks as written.
    settings : list of dict
        Dotted keys to values, one dict a setting, each once, in the order of the blocks.
    notices : list of str
        What the user should know before the sweep starts.
    """

    config: SweepConfig
    base: dict
    space: list
    settings: list
    notices: list

    @classmethod
    def load(cls, path, overrides=None):
        """Read a sweep's file and check all of its trials' configurations.

        Parameters
        ----------
        path : path-like
        overrides : dict, optional
            Dotted keys to values: ``base.train.max_steps``, ``sweep.seeds``.

        Raises
        ------
        InputError
            For an unknown key, a value out of its range, an empty grid, or what this version cannot do.
        FileNotFoundError
            When the file or its base is missing.
        """
        path = Path(path)
        nested = configs.read_toml(path)
        for key in nested:
            if key in configs.SECTIONS and not {"sweep", "base", "space"} & set(nested):
                raise InputError(f"{path} describes a run, not a sweep; train it with: cllm train {path}")
            if key not in ("sweep", "base", "space", "prune", "confirm"):
                hint = nearest(key, ("sweep", "base", "space"))
                raise InputError(f"{path}: unknown key {key}{hint}; a sweep has sweep, base, space")
        for key, value in nested.items():
            if key != "space" and not isinstance(value, dict):
                raise InputError(f"{path}: {key} is {value!r}, it must be a section: [{key}]")
        base, changes = dict(nested.get("base", {})), dict(nested.get("sweep", {}))
        from_file = configs.flatten(base)
        for key, value in (overrides or {}).items():
            kind, _, rest = key.partition(".")
            section, dot, name = rest.partition(".")
            if kind == "sweep" and rest:
                changes[rest] = value
            elif kind == "base" and dot:
                base[section] = {**base.get(section, {}), name: value}
            else:
                raise InputError(f"{key} is not a key of a sweep; its trials' keys are base.SECTION.KEY")
        try:
            file = changes.pop("base", "")
            if not isinstance(file, str):
                raise InputError(f"sweep.base is {file!r}, it must be the path of a config file")
            sections = configs.read_toml(path.parent / file) if file else {}
            space = nested.get("space", [])
            replaced = spaces.fixed(space) | {key.removeprefix("base.") for key in overrides or {}}
            spaces.find_beside(space, path)
            configs.beside(base, path, replaced)
            configs.beside(sections, path.parent / file, replaced | set(from_file))
            for where, part in (("", sections), ("base.", base)):
                for section, values in part.items():
                    if not isinstance(values, dict):
                        raise InputError(f"{where}{section} is {values!r}, it must be a section")
            for section, values in base.items():
                sections[section] = {**sections.get(section, {}), **values}
            _refuse_what_comes_later(nested, changes)
            fields = SweepConfig.__dataclass_fields__
            for key in changes:
                if key not in fields:
                    known = ("base", *fields)
                    hint = f"{nearest(key, known)}; [sweep] has {', '.join(known)}"
                    raise InputError(f"unknown key sweep.{key}{hint}")
            sweep = cls(SweepConfig(**changes), sections, space, spaces.settings(space), [])
            sweep._check()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return sweep

    def trials(self):
        """All trials, by setting and seed."""
        return [
            Trial(index, seed, setting)
            for index, setting in enumerate(self.settings)
            for seed in sorted(self.config.seeds)
        ]

    def varied(self):
        """The keys in which settings differ, in the order of the space."""
        keys = dict.fromkeys(key for setting in self.settings for key in setting)
        return [key for key in keys if any(s.get(key) != self.settings[0].get(key) for s in self.settings)]

    def describe(self, setting):
        """A setting in words, by its varied keys: "optim.lr = 0.003, model.n_layer = 4"."""
        values = self.settings[setting]
        words = [f"{key} = {text(values[key])}" for key in self.varied() if key in values]
        return ", ".join(words) or "the one setting"

    def trial_config(self, trial, directory=""):
        """The `Config` of a trial whose sweep lives in `directory`."""
        nested, _ = _merged(self.base, trial.overrides)
        nested["train"] = {**nested.get("train", {}), "seed": trial.seed, "threads": self.config.threads}
        nested["run"] = {"dir": str(Path(directory, "trials", trial.name))}
        return configs.from_dict(nested)

    def resolved(self):
        """The whole sweep as a nested dict, without a base file; what sweep.toml holds."""
        sweep = {name: getattr(self.config, name) for name in SweepConfig.__dataclass_fields__}
        return {"sweep": sweep, "base": self.base, "space": self.space}

    def _check(self):
        """Each setting's configuration, once; the first fault is reported."""
        faults = []
        for index, setting in enumerate(self.settings):
            notices = _merged(self.base, setting)[1]
            try:
                made = self.trial_config(Trial(index, self.config.seeds[0], setting))
                notices += configs.notes(made)
                self._check_objective(made)
            except InputError as error:
                faults.append((index, error))
            self.notices.extend(notice for notice in notices if notice not in self.notices)
        if faults:
            index, error = faults[0]
            shared = len(faults) == len(self.settings)  # then it is not this setting's own
            raise InputError(str(error) if shared else f"setting {index} ({self.describe(index)}): {error}")

    def _check_objective(self, config):
        """Raise when a language model's records will not have the objective; a task's are not known yet."""
        if config.task.key is not None:
            return
        found = {**records.METRICS, "val": (*records.METRICS["val"], *config.train.metrics)}
        known = [f"{split}.{metric}" for split, metrics in found.items() for metric in metrics]
        if self.config.objective not in known:
            given = f'"{self.config.objective}"{nearest(self.config.objective, known)}'
            raise InputError(f"sweep.objective is {given}, it must be one of {', '.join(known)}")


def _refuse_what_comes_later(nested, sweep):
    """Parts of a sweep's file that have a meaning, but not in this version."""
    if sweep.get("method") in ("random", "qmc", "tpe") or "trials" in sweep:
        raise InputError('only sweep.method = "grid" is supported so far, which takes no sweep.trials')
    if nested.get("prune", {}).get("method", "none") != "none":
        raise InputError('pruning is not supported so far: [prune] method must be "none"')
    if "confirm" in nested:
        raise InputError("[confirm] is not supported so far: leave it out, or list more seeds in [sweep]")


def _merged(base, setting):
    """The base's sections with a setting's values, without what its optimizer or schedule lacks; notices."""
    overrides = configs.unflatten(setting)
    name = {**base.get("optim", {}), **overrides.get("optim", {})}.get("name", optim.OptimConfig().name)
    nested = copy.deepcopy(base)
    notices = []
    if name in optim.BY_NAME or userfile.is_reference(name):
        others = [*optim.BY_NAME, *filter(userfile.is_reference, [base.get("optim", {}).get("name")])]
        foreign = {key for other in others for key in configs.optimizer_arguments(other)}
        for key in foreign - set(configs.optimizer_arguments(name)):
            if key in nested.get("optim", {}):
                del nested["optim"][key]
                notices.append(f'optim.{key} of the base is left out where optim.name is "{name}"')
    chosen = {**base.get("schedule", {}), **overrides.get("schedule", {})}
    name, parts = chosen.get("name", schedules.ScheduleConfig.name), chosen.get("names")
    if name in schedules.NAMES:
        taken = {"name", *schedules.arguments(name, parts if isinstance(parts, list) else ())}
        for key in set(schedules.ScheduleConfig.__dataclass_fields__) - taken:
            if key in nested.get("schedule", {}):
                del nested["schedule"][key]
                notices.append(f'schedule.{key} of the base is left out where schedule.name is "{name}"')
    for section, values in overrides.items():
        nested[section] = {**nested.get(section, {}), **values} if isinstance(values, dict) else values
    return nested, sorted(notices)


def _is_seed(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Running ---------------------------------------------------------------------------------------------
