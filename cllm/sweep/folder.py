"""A sweep's directory: whose it is, which number each setting has there, what more steps mean there."""

import json
from contextlib import suppress
from pathlib import Path

from cllm import config as configs
from cllm import records, schedules
from cllm.errors import InputError
from cllm.files import rename, write_atomic
from cllm.sweep.plan import ConfirmConfig, PruneConfig, Sweep, SweepConfig, numbered
from cllm.sweep.results import Result, read_table, trained
from cllm.sweep.worker import wait_until_free
from cllm.verdict import text

__all__ = [
    "EARLIER", "adopt", "contents", "fit_steps", "found", "known_settings", "refuse_other_use", "write_new",
    "write_settings",
]  # fmt: skip

SETTINGS = "settings.json"  # the settings by number, as JSON
EARLIER = "earlier"  # folder for trials that were trained anew with more steps


def refuse_other_use(directory):
    """Raise when `directory` is something else than a folder for a sweep."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a sweep needs a new or empty folder")
    if (directory / "config.toml").exists() and not (directory / "sweep.toml").exists():
        raise InputError(f"{directory} holds a run; a sweep needs a new or empty folder: --run.dir DIR")


def adopt(sweep, directory):
    """The sweep as it goes on in `directory`, where each setting keeps the number that it has there.

    Raises
    ------
    InputError
        When another sweep is there: one of another base, but for more train.max_steps, or without a
        setting in common. How trials are judged and pruned, seeds, threads and [confirm] may change.
    """
    path = directory / "sweep.toml"
    if not path.exists():
        return sweep
    there, here = configs.read_toml(path), sweep.resolved()
    if not any((directory / name).exists() for name in (SETTINGS, "results.csv")):
        raise InputError(f"{path} was not written by a sweep: choose another folder: --run.dir DIR")
    if not {"sweep", "base", "space"} <= set(there):
        raise InputError(f"{path} is damaged: it has no {', '.join({'sweep', 'base', 'space'} - set(there))}")
    _refuse_other_base(configs.flatten(there["base"]), configs.flatten(here["base"]), directory)
    known = known_settings(directory)
    sweep = numbered(sweep, known)
    if not any(number < len(known) for number in sweep.numbers):
        told = _difference(_blocks(there), _blocks(here)) or "no setting is in both"
        raise InputError(f"{directory} holds another sweep: {told}; choose another folder: --run.dir DIR")
    return sweep


def _refuse_other_base(there, here, directory):
    steps = {"train.max_steps": configs.TrainConfig.max_steps}
    was, wanted = ({**steps, **base}["train.max_steps"] for base in (there, here))
    more = isinstance(wanted, int) and wanted > was
    if more:
        there, here = there | {"train.max_steps": wanted}, here | {"train.max_steps": wanted}
    told = _difference(*({f"base.{key}": value for key, value in base.items()} for base in (there, here)))
    if told:
        told += " (it can be raised only)" if told.startswith("base.train.max_steps") else ""
        raise InputError(f"{directory} holds another sweep: {told}; choose another folder: --run.dir DIR")


def _difference(there, here):
    """In words, the first key in which two flat dicts differ; "" when they do not."""
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            was, is_now = (f"{text(d[key])}" if key in d else "not set" for d in (there, here))
            return f"{key} is {was} there and {is_now} here"
    return ""


def _blocks(resolved):
    """The space of a resolved sweep, and what chooses from it, with one key for each value."""
    chosen = ("method", "trials", "sampler_seed")
    flat = {
        f"[[space]] {index}, {key},": value
        for index, block in enumerate(resolved["space"], 1)
        for key, value in block.items()
    }
    return flat | {f"sweep.{key}": value for key, value in resolved["sweep"].items() if key in chosen}


# Settings --------------------------------------------------------------------------------------------


def known_settings(directory):
    """The settings by number of the sweep in `directory`, those that it has no more too."""
    path = directory / SETTINGS
    try:
        known = json.loads(path.read_bytes())
    except FileNotFoundError:  # a sweep of a version that did not write them: all are in its copy
        return Sweep.load(directory / "sweep.toml").settings
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(known, list) or not all(isinstance(setting, dict) for setting in known):
        raise InputError(f"{path} is not a list of settings")
    return known


def write_settings(sweep, directory):
    """Write the settings by number, if they are not there already: one a line."""
    lines = ",\n".join(json.dumps(setting) for setting in sweep.settings)
    write_new(directory / SETTINGS, f"[\n{lines}\n]\n")


def write_new(path, content):
    """Write a text file, unless that is what it holds already."""
    try:
        if Path(path).read_bytes() == content.encode():
            return
    except FileNotFoundError:
        pass
    write_atomic(path, content)


# Trials that are there -------------------------------------------------------------------------------


def found(order):
    """The `Result` of a trial as far as its files tell: nothing where it was to have other steps.

    Raises
    ------
    InputError
        When its folder holds a trained one of another setting or seed: the sweep's own files were removed.
    """
    try:
        there = records.Run(order.run_dir).config
    except InputError:  # damaged; training will say what is wrong with it
        return Result(order.trial)
    _refuse_other_trial(order, there)
    if there.get("train.max_steps") == order.config.train.max_steps:
        with suppress(InputError):
            return order.found()
    return Result(order.trial)


def _refuse_other_trial(order, there):
    here = configs.flatten(configs.to_dict(order.config))
    keys = [key for key in (*order.trial.overrides, "train.seed") if key in here and key in there]
    told = _difference({key: there[key] for key in keys}, {key: here[key] for key in keys})
    if told and trained(order.run_dir):
        raise InputError(f"{order.run_dir} holds another trial: {told}; choose another folder: --run.dir DIR")


# More steps ------------------------------------------------------------------------------------------


def fit_steps(order, directory):
    """Let a trial of another number of steps go on to the one that is wanted, or make way for a new one.

    It goes on where a run of that length would have been the same so far: the learning rates, and what was
    evaluated, where that can matter. Else its folder moves to earlier/<steps>-steps/.

    Returns
    -------
    str or None
        "extended" or "anew"; None for a trial that has no checkpoint yet, or as many steps as wanted.
    """
    run_dir, wanted = order.run_dir, order.config
    was = records.Run(run_dir).config.get("train.max_steps")
    if was is None or was == wanted.train.max_steps:
        return None
    past = trained(run_dir)
    if not past:
        return None
    done = past.get("step", 0)  # 0: a checkpoint before the first, to roll back to
    wait_until_free(run_dir)
    if not _same_past(order, was, done):
        place = directory / EARLIER / f"{was}-steps"
        place.mkdir(parents=True, exist_ok=True)
        names = [order.trial.name, *(f"{order.trial.name}-{n}" for n in range(2, 1000))]
        rename(run_dir, next(place / name for name in names if not (place / name).exists()))
        return "anew"
    if done >= was:  # a run that has stopped earlier by itself would do so again
        (run_dir / "summary.json").unlink(missing_ok=True)
    write_atomic(run_dir / "config.toml", configs.to_toml(configs.to_dict(wanted)))
    return "extended"


def _same_past(order, was, done):
    """Whether the first `done` steps of a run of `was` steps are those of the run that is wanted."""
    config, train = order.config, order.config.train
    if config.task.run is not None or done > train.max_steps:
        return False
    # The last step was evaluated because it was the last; a longer run may not have looked there.
    looked = not train.eval_interval or was % train.eval_interval
    if done >= was and looked and (order.judged.at == "best" or train.patience):
        return False
    return schedules.shared_steps(config.schedule, config.optim.lr, was, train.max_steps) >= done


# Reading -----------------------------------------------------------------------------------------------


def contents(directory):
    """A sweep's directory as it is at present, from its own few files: for who looks at it.

    Parameters
    ----------
    directory : Path

    Returns
    -------
    sweep : Sweep
        With the numbers of settings that count there. Its configurations are not checked again.
    results : dict of str to Result
        What results.csv tells, which has no errors in full, no instruction sets and no test values.

    Raises
    ------
    InputError
        When there is no sweep.
    FileNotFoundError
        When there is nothing at all.
    """
    path = directory / "sweep.toml"
    if not directory.exists():
        raise FileNotFoundError(f"no such sweep: {directory}")
    if not path.is_file():
        raise InputError(f"{directory} holds no sweep (sweep.toml)")
    settings = known_settings(directory)
    results = read_table(directory, settings)
    there = {result.trial.setting for result in results.values()}
    left_out = frozenset(range(len(settings))) - there if results else frozenset()
    nested = configs.read_toml(path)
    try:
        config, prune = SweepConfig(**nested["sweep"]), PruneConfig(**nested.get("prune", {}))
        confirm = ConfirmConfig(**nested["confirm"]) if "confirm" in nested else None
        sweep = Sweep(config, nested["base"], nested["space"], settings, [], prune, confirm, left_out)
    except (KeyError, TypeError):
        raise InputError(f"{path} was not written by a sweep") from None
    return sweep, results
