"""A sweep's file as a `Sweep`: a base configuration, the settings that change it, the seeds."""

import copy
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from cllm import config as configs
from cllm import optim, records, schedules, userfile
from cllm.errors import InputError, nearest
from cllm.sweep import space as spaces
from cllm.sweep import tpe
from cllm.verdict import text

__all__ = ["ConfirmConfig", "PruneConfig", "Sweep", "SweepConfig", "Trial", "numbered"]

PARTS = ("sweep", "base", "space", "prune", "confirm")  # of a sweep's file


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
    method : "grid", "random", "qmc" or "tpe"
        How settings are chosen from the space. "grid" takes all; "random" draws independent ones; "qmc" takes
        points of a scrambled Sobol sequence, which cover the space more evenly; "tpe" proposes settings in
        rounds, from what those of finished rounds have reached (Bergstra et al. 2011, as optuna has it).
        The last three take the blocks in turn, so that each gets an equal share.
    trials : int, optional
        How many settings; "grid" takes none, the others need it.
    sampler_seed : int
        What the samplers draw follows from it.
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
    trials: int | None = None
    sampler_seed: int = 0
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    objective: str = "val.loss"
    at: str = "last"
    goal: str = "minimize"
    threads: int = 1

    def __post_init__(self):
        _check_choice("sweep.method", self.method, ("grid", "random", "qmc", "tpe"))
        _check_choice("sweep.at", self.at, ("last", "best"))
        _check_choice("sweep.goal", self.goal, ("minimize", "maximize"))
        _check_seeds("sweep.seeds", self.seeds)
        parts = self.objective.split(".") if isinstance(self.objective, str) else []
        if len(parts) < 2 or not all(parts):
            raise InputError(f'sweep.objective is {self.objective!r}, it must be SPLIT.METRIC: "val.loss"')
        _check_whole("sweep.threads", self.threads, 1)
        _check_whole("sweep.sampler_seed", self.sampler_seed, 0)
        if self.method == "grid" and self.trials is not None:
            raise InputError(
                f'sweep.trials is {self.trials!r}, but method = "grid" takes all settings of the space: '
                'leave it out, or choose method = "random", "qmc" or "tpe"'
            )
        if self.method != "grid" and self.trials is None:
            raise InputError(f'sweep.trials is missing: method = "{self.method}" needs a number of settings')
        if self.trials is not None:
            _check_whole("sweep.trials", self.trials, 1)


@dataclass(frozen=True)
class PruneConfig:
    """[prune]: dropping settings on the way, by their means over seeds at exactly the same step.

    Parameters
    ----------
    method : "none", "median" or "halving"
        At each of `steps`, "median" drops the settings that are worse than the median, "halving" keeps the
        share `keep` of them. A seed is never dropped without its setting.
    steps : list of int
        The rungs, ascending: steps at which the objective is recorded.
    keep : float
        Of the settings that reach a rung; rounded up to a whole setting.
    """

    method: str = "none"
    steps: list = field(default_factory=list)
    keep: float = 0.5

    def __post_init__(self):
        _check_choice("prune.method", self.method, ("none", "median", "halving"))
        steps = self.steps
        ints = isinstance(steps, list) and all(_is_whole(step, 1) for step in steps)
        if not ints or steps != sorted(set(steps)):
            raise InputError(f"prune.steps is {steps!r}, it must be a list of ascending steps of at least 1")
        if self.method != "none" and not steps:
            raise InputError(f'prune.steps is missing: method = "{self.method}" compares settings at them')
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep < 1:
            raise InputError(f"prune.keep is {self.keep!r}, it must be a share between 0 and 1")

    @property
    def rungs(self):
        """The steps at which settings are dropped; none of them without a method."""
        return [] if self.method == "none" else self.steps


@dataclass(frozen=True)
class ConfirmConfig:
    """[confirm]: the best settings run again, with seeds that did not choose them.

    Parameters
    ----------
    top : int
        How many settings of the ranking.
    seeds : list of int
        None of them in sweep.seeds.
    """

    top: int = 2
    seeds: list = field(default_factory=lambda: [10, 11, 12, 13, 14])

    def __post_init__(self):
        _check_whole("confirm.top", self.top, 1)
        _check_seeds("confirm.seeds", self.seeds)


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
        Dotted keys to values, one dict a setting, by number; each once. With method "tpe" those known so
        far: `stages` appends to it.
    notices : list of str
        What the user should know before the sweep starts.
    prune : PruneConfig
    confirm : ConfirmConfig or None
    left_out : frozenset of int
        Numbers of settings that an earlier call of the sweep had and this one has not; see `numbered`.
    """

    config: SweepConfig
    base: dict
    space: list
    settings: list
    notices: list
    prune: PruneConfig = field(default_factory=PruneConfig)
    confirm: ConfirmConfig | None = None
    left_out: frozenset = frozenset()

    @classmethod
    def load(cls, path, overrides=None):
        """Read a sweep's file and check all of its trials' configurations.

        Parameters
        ----------
        path : path-like
        overrides : dict, optional
            Dotted keys to values: ``base.train.max_steps``, ``sweep.seeds``, ``prune.keep``.

        Raises
        ------
        InputError
            For an unknown key, a value out of its range, an empty grid, or a space with too few settings.
        FileNotFoundError
            When the file or its base is missing.
        """
        path = Path(path)
        nested = configs.read_toml(path)
        for key in nested:
            if key in configs.SECTIONS and not {"sweep", "base", "space"} & set(nested):
                raise InputError(f"{path} describes a run, not a sweep; train it with: cllm train {path}")
            if key not in PARTS:
                hint = nearest(key, PARTS)
                raise InputError(f"{path}: unknown key {key}{hint}; a sweep has {', '.join(PARTS)}")
        for key, value in nested.items():
            if key != "space" and not isinstance(value, dict):
                raise InputError(f"{path}: {key} is {value!r}, it must be a section: [{key}]")
        base, changes = dict(nested.get("base", {})), dict(nested.get("sweep", {}))
        prune, confirm = dict(nested.get("prune", {})), dict(nested.get("confirm", {}))
        from_file = configs.flatten(base)
        for key, value in (overrides or {}).items():
            kind, _, rest = key.partition(".")
            section, dot, name = rest.partition(".")
            if kind in ("sweep", "prune", "confirm") and rest:
                {"sweep": changes, "prune": prune, "confirm": confirm}[kind][rest] = value
            elif kind == "base" and dot:
                if not isinstance(base.get(section, {}), dict):
                    raise InputError(f"{path}: base.{section} is {base[section]!r}, it must be a section")
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
            config = _section(SweepConfig, "sweep", changes, ("base",))
            pruning = _section(PruneConfig, "prune", prune)
            confirming = None
            if confirm or "confirm" in nested:
                confirming = _section(ConfirmConfig, "confirm", confirm)
            blocks = spaces.blocks(space, config.method == "grid")
            settings = _chosen(config, blocks)
            sweep = cls(config, sections, space, settings, [], pruning, confirming)
            sweep._check()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return sweep

    @cached_property
    def blocks(self):
        """The [[space]] blocks as `space.Block`."""
        return spaces.blocks(self.space, self.config.method == "grid")

    @property
    def numbers(self):
        """The numbers of the settings that this sweep runs, ascending."""
        return [number for number in range(len(self.settings)) if number not in self.left_out]

    @property
    def confirm_seeds(self):
        """The fresh seeds of [confirm], ascending; none without it."""
        return () if self.confirm is None else tuple(sorted(self.confirm.seeds))

    def trial(self, setting, seed):
        """The trial of a setting's number with a seed."""
        return Trial(setting, seed, self.settings[setting])

    def trials(self):
        """The search's trials, by setting and seed; [confirm]'s are known when these have ended."""
        return [self.trial(number, seed) for number in self.numbers for seed in sorted(self.config.seeds)]

    @cached_property
    def _varied(self):
        return spaces.varied(self.blocks)

    def varied(self):
        """The keys in which settings differ, in the order of the space."""
        return self._varied

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
        parts = {"sweep": self.config, "prune": self.prune, "confirm": self.confirm}
        nested = {
            name: {key: value for key, value in asdict(part).items() if value is not None}
            for name, part in parts.items()
            if part is not None
        }
        return {"sweep": nested.pop("sweep"), "base": self.base, "space": self.space, **nested}

    def _check(self):
        """Each setting's configuration, once, and the ends of each range; the first fault is reported."""
        both = set(self.config.seeds) & set(self.confirm_seeds)
        if both:
            raise InputError(
                f"confirm.seeds has {min(both)}, which sweep.seeds has too: a setting is confirmed by "
                "seeds that did not choose it"
            )
        if self.config.at == "best":
            self.notices.append(
                'sweep.at = "best" takes the best of a trial\'s evaluations: the more often it evaluates, '
                'the better that looks by chance alone; "last" does not flatter'
            )
        self._check_ranges()
        faults = []
        for index, setting in enumerate(self.settings):
            if error := self.fault(setting, self.notices):
                faults.append((index, error))
        if faults:
            index, error = faults[0]
            shared = len(faults) == len(self.settings)  # then it is not this setting's own
            raise InputError(str(error) if shared else f"setting {index} ({self.describe(index)}): {error}")

    def fault(self, setting, notices=None):
        """Why a setting cannot be trained, an InputError; None when it can. Adds to a list of notices."""
        found = _merged(self.base, setting)[1]
        error = None
        try:
            made = self.trial_config(Trial(0, self.config.seeds[0], setting))
            found += configs.notes(made)
            self._check_objective(made)
            self._check_rungs(made)
        except InputError as fault:
            error = fault
        if notices is not None:
            notices.extend(notice for notice in found if notice not in notices)
        return error

    def _check_ranges(self):
        """Raise when an end of a range is out of its key's range: a sample may or may not show that."""
        for block in self.blocks:
            middle = block.at([0.5] * len(block.free))
            for axis in block.axes:
                if not isinstance(axis, spaces.Range):
                    continue
                for u in (0.0, math.nextafter(1.0, 0.0)):
                    try:
                        self.trial_config(Trial(0, self.config.seeds[0], middle | axis.at(u)))
                    except InputError as error:
                        if str(error).startswith(f"{axis.names[0]} "):  # else the combination is at fault
                            raise InputError(f"a range reaches too far: {error}") from None

    def _check_rungs(self, config):
        """Raise when trials cannot be compared at the steps of [prune]."""
        if not self.prune.rungs:
            return
        if config.task.run is not None:
            raise InputError("[prune] pauses trials, and task.run is a loop of its own: leave out one")
        train = config.train
        for step in self.prune.rungs:
            if step >= train.max_steps:
                raise InputError(
                    f"prune.steps has {step}, it must be below train.max_steps ({train.max_steps})"
                )
            if not self.config.objective.startswith("train.") and (
                not train.eval_interval or step % train.eval_interval
            ):
                raise InputError(
                    f"prune.steps has {step}, but {self.config.objective} is recorded every "
                    f"train.eval_interval = {train.eval_interval} steps only: choose multiples of it"
                )

    def _check_objective(self, config):
        """Raise when a language model's records will not have the objective; a task's are not known yet."""
        if config.task.key is not None:
            return
        found = {**records.METRICS, "val": (*records.METRICS["val"], *config.train.metrics)}
        known = [f"{split}.{metric}" for split, metrics in found.items() for metric in metrics]
        if self.config.objective not in known:
            given = f'"{self.config.objective}"{nearest(self.config.objective, known)}'
            raise InputError(f"sweep.objective is {given}, it must be one of {', '.join(known)}")


def numbered(sweep, earlier):
    """The sweep with the numbers that its settings had in earlier calls; new ones come after those.

    Parameters
    ----------
    sweep : Sweep
    earlier : list of dict
        The settings by number, as settings.json has them.

    Returns
    -------
    Sweep
        Earlier settings that the sweep has no more keep their numbers, and are `left_out`. With method "tpe"
        the earlier ones count as its own proposals where they lie in its space, up to sweep.trials.
    """
    there = {spaces.key(setting): number for number, setting in enumerate(earlier)}
    if sweep.config.method == "tpe":
        kept = [n for n, setting in enumerate(earlier) if any(setting in block for block in sweep.blocks)]
        kept = kept[: sweep.config.trials]
    else:
        kept = [there[spaces.key(setting)] for setting in sweep.settings if spaces.key(setting) in there]
    new = [setting for setting in sweep.settings if spaces.key(setting) not in there]
    if sweep.config.method == "tpe":
        new = new[: sweep.config.trials - len(kept)]
    left_out = frozenset(range(len(earlier))) - frozenset(kept)
    return replace(sweep, settings=[*earlier, *new], left_out=left_out)


def _chosen(config, blocks):
    """The settings that are known before the first trial runs."""
    if config.method == "grid":
        return spaces.settings(blocks)
    if config.method == "tpe":
        return tpe.first(config, blocks)
    return spaces.sampled(blocks, config.method, config.trials, config.sampler_seed)


def _section(cls, section, values, others=()):
    """[section] as its dataclass."""
    known = (*others, *cls.__dataclass_fields__)
    for key in values:
        if key not in known:
            hint = f"{nearest(key, known)}; [{section}] has {', '.join(known)}"
            raise InputError(f"unknown key {section}.{key}{hint}")
    return cls(**values)


def _merged(base, setting):
    """The base's sections with a setting's values, without what its optimizer or schedule lacks; notices."""
    overrides = configs.unflatten(setting)
    name = {**base.get("optim", {}), **overrides.get("optim", {})}.get("name", optim.OptimConfig().name)
    nested = copy.deepcopy(base)
    notices = []
    if isinstance(name, str) and (name in optim.BY_NAME or userfile.is_reference(name)):
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


def _is_whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_whole(name, value, least):
    if not _is_whole(value, least):
        raise InputError(f"{name} is {value!r}, it must be an integer of at least {least}")


def _check_choice(name, value, allowed):
    if value not in allowed:
        words = " or ".join(f'"{word}"' for word in allowed)
        raise InputError(f"{name} is {value!r}{nearest(value, allowed)}, it must be {words}")


def _check_seeds(name, seeds):
    if not isinstance(seeds, list) or not seeds or not all(_is_whole(seed, 0) for seed in seeds):
        raise InputError(f"{name} is {seeds!r}, it must be a list of integers of at least 0")
    if max(seeds) >= 2**63:
        raise InputError(f"{name} has {max(seeds)}, it must have integers below 2**63")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{name} is {seeds}, each seed must be there once")
