"""Sweeps: settings times seeds, run by worker processes, ending in a table and a verdict.

A sweep's file becomes a `Sweep`; its `trials()` are ordinary runs in SWEEP/trials/. `run` hands them to
spawned workers that live as long as the sweep, one trial at a time over a pipe, and gathers a `Result` for
each. Everything is in the trials' own files, so a sweep that was stopped at any point goes on from there.
"""

import copy
import csv
import io
import itertools
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from pathlib import Path
from time import monotonic

from cllm import checkpoint, kernels, optim, records, schedules, task, train, userfile, verdict, watch
from cllm import config as configs
from cllm.errors import InputError, nearest, plain_notes
from cllm.files import write_atomic
from cllm.lifecycle import TERMINATED, user_files
from cllm.progress import Silent
from cllm.verdict import text

__all__ = ["Result", "Sweep", "Trial", "run"]

REPORT_INTERVAL = 0.2  # seconds between two reports of a worker about its trial
TABLE_INTERVAL = 1.0  # seconds between two rewritings of results.csv
STOP_SECONDS = 15.0  # what a worker has to finish its step and write a checkpoint after Ctrl-C


# The sweep's file ------------------------------------------------------------------------------------


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
            replaced = _fixed(space) | {key.removeprefix("base.") for key in overrides or {}}
            _find_beside(space, path)
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
            sweep = cls(SweepConfig(**changes), sections, space, _settings(space), [])
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


def _blocks(space):
    return [block for block in space if isinstance(block, dict)] if isinstance(space, list) else []


def _fixed(space):
    """The keys that each block has, so that no setting has the base's value of them."""
    keys = [{name.strip() for key in block for name in key.split(",")} for block in _blocks(space)]
    return set.intersection(*keys) if keys else set()


def _find_beside(space, path):
    """Let the user's files that blocks name be found beside the sweep's file too, as `config.beside` does."""

    def found(value):
        if isinstance(value, list):
            return [found(part) for part in value]
        return userfile.beside(value, " or ".join(names), path) if userfile.is_reference(value) else value

    for block in _blocks(space):
        for key, values in block.items():
            if names := [name.strip() for name in key.split(",") if name.strip() in configs.OF_USER]:
                block[key] = found(values)


def _settings(space):
    """The settings of all blocks: each block's product, each setting once."""
    if not isinstance(space, list) or not all(isinstance(block, dict) for block in space):
        raise InputError("space must be made of blocks: [[space]]")
    if not space:
        raise InputError('there is no [[space]]: it lists what to vary, such as "optim.lr" = [1e-3, 3e-3]')
    settings = []
    for block in space:
        axes = [_axis(keys, values) for keys, values in block.items()]
        for choice in itertools.product(*axes):
            setting = {key: value for part in choice for key, value in part.items()}
            if setting not in settings:
                settings.append(setting)
    return settings


def _axis(keys, values):
    """One line of a block as its choices, each a dict: several when keys move together."""
    names = [name.strip() for name in keys.split(",")]
    for name in names:
        if name in ("train.seed", "train.threads", "run.dir"):
            instead = {"train.seed": "sweep.seeds", "train.threads": "sweep.threads"}.get(name, "--run.dir")
            raise InputError(f"{name} cannot be part of [[space]], use {instead}")
        if name in configs.SECTIONS and not isinstance(values, dict):
            raise InputError(f'"{name}" is a section, [[space]] needs its keys: "{name}.KEY"')
    if isinstance(values, dict):
        if {"low", "high"} & set(values):
            raise InputError(f'ranges are not supported so far: list the values, "{keys}" = [1e-3, 3e-3]')
        quoted = f'"{keys}.{next(iter(values), "key")}"'
        raise InputError(f"{keys} is a table; a dotted key in [[space]] needs quotes: {quoted}")
    if not isinstance(values, list):
        values = [values] if len(names) == 1 else values
    if values == []:
        raise InputError(f'"{keys}" = [] leaves nothing to run, it must list at least one value')
    if len(names) == 1:
        return [{names[0]: value} for value in values]
    if not isinstance(values, list) or not all(isinstance(v, list) and len(v) == len(names) for v in values):
        n = len(names)
        raise InputError(f'"{keys}" moves {n} keys together, it must be a list of lists of {n} values')
    return [dict(zip(names, choice)) for choice in values]


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


@dataclass(frozen=True)
class Result:
    """What is known of a trial. `value` is its objective, None unless the state is "finished"."""

    trial: Trial
    state: str = "pending"  # pending | finished | failed
    step: int = 0
    value: float | None = None
    error: str = ""
    seconds: float | None = None


def run(sweep, directory, workers=None, progress=None):
    """Run a sweep's trials, or what is left of them, and judge them.

    Finished trials of an earlier call are kept, those in flight go on from their checkpoints, failed ones
    are tried again. While it runs, `directory` always holds a whole results.csv.

    Parameters
    ----------
    sweep : Sweep
    directory : path-like
        New, empty, or that of the same sweep.
    workers : int, optional
        Trials at once; by default this process's cores divided by the threads of a trial.
    progress : object, optional
        Shows the sweep, see `cllm.watch`; by default what suits standard output.

    Returns
    -------
    dict
        What summary.json holds: each setting's mean, standard error and n, ranked, and the verdict.

    Raises
    ------
    InputError
        When the directory holds something else, or the data cannot be used. Nothing has been written then.
    KeyboardInterrupt, SystemExit
        After Ctrl-C and SIGTERM, when the workers have written their checkpoints.
    """
    directory = Path(directory)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, it must be at least 1")
    judged = _refuse_another(sweep, directory)
    trials = sweep.trials()
    results = {trial.name: _read(sweep, trial, directory) for trial in trials}
    todo = [trial for trial in trials if results[trial.name].state != "finished"]
    shown = progress or watch.choose()
    if todo:
        _prepare_data(sweep, todo, directory)
        directory.mkdir(parents=True, exist_ok=True)
    began = monotonic()
    with _locked(directory), _terminable():
        if todo or not judged:
            write_atomic(directory / "sweep.toml", configs.to_toml(sweep.resolved()))
            (directory / "summary.json").unlink(missing_ok=True)  # it told of an end that is not one any more
        n_workers = min(workers or max(1, kernels.get_num_threads() // sweep.config.threads), len(todo))
        shown.start(sweep, directory, results, n_workers)
        try:
            _run_trials(sweep, directory, todo, n_workers, results, shown)
        except BaseException:
            n_finished = sum(result.state == "finished" for result in results.values())
            shown.end(f"stopped with {n_finished} of {len(trials)} trials finished")
            raise
        summary = _summary(sweep, results, monotonic() - began)
        written = all((directory / name).exists() for name in ("results.csv", "summary.json"))
        if todo or not judged or not written:
            _write_table(sweep, directory, results)
            records.write_summary(directory, summary)
    lines = [*verdict.table(sweep, results), "", summary["verdict"], ""]
    shown.end("\n".join([*lines, f"all trials: {directory / 'results.csv'}"]))
    return summary


def _run_trials(sweep, directory, todo, n_workers, results, shown):
    """Keep `n_workers` processes busy until each trial of `todo` has its result in `results`."""
    queue = deque(todo)
    workers = []
    written = -math.inf
    try:
        while len(workers) < n_workers:
            workers.append(_Worker(sweep, directory, queue.popleft()))
        while busy := {worker.pipe: worker for worker in workers if worker.trial}:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    message = _died(worker, directory)
                    workers.remove(worker)
                if not isinstance(message, Result):
                    shown.step(worker.trial, **message)
                    continue
                if message.state == "failed" and not any(r.state == "finished" for r in results.values()):
                    _check_recorded(sweep, message.trial, directory)
                results[message.trial.name] = message
                worker.trial = None
                shown.ended(message)
                if queue and worker in workers:
                    worker.give(queue.popleft())
                elif queue:
                    workers.append(_Worker(sweep, directory, queue.popleft()))
            if monotonic() - written > TABLE_INTERVAL:
                _write_table(sweep, directory, results)
                written = monotonic()
    except BaseException:
        _stop(workers)
        _write_table(sweep, directory, results)
        raise
    for worker in workers:
        worker.pipe.close()  # an idle worker ends when its pipe does
    for worker in workers:
        worker.process.join()


def _check_recorded(sweep, trial, directory):
    """Raise when a finished run has no record of the objective: no other trial will have one."""
    run = records.Run(directory / "trials" / trial.name)
    names = run.names()
    if run.state == "finished" and sweep.config.objective not in names:
        given = f'"{sweep.config.objective}"{nearest(sweep.config.objective, names)}'
        raise InputError(f"sweep.objective is {given}, but {trial.name} has recorded {', '.join(names)}")


class _Worker:
    """A process that trains one trial after another; `trial` is the present one, or None."""

    def __init__(self, sweep, directory, trial):
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, sweep, directory), daemon=True)
        resource_tracker.ensure_running()  # or the first start would do that, and unblock the signal
        with _blas_threads(sweep.config.threads):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process unblocks it in `_work`
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        other_end.close()  # so that the pipe ends when the process does
        self.give(trial)

    def give(self, trial):
        self.trial = trial
        with suppress(OSError):  # it has died; reading from the pipe will say so
            self.pipe.send(trial)


@contextmanager
def _terminable():
    """In this context SIGTERM is an exception, so that workers are told; theirs to keep who handle it."""

    def terminate(signum, frame):
        raise SystemExit(TERMINATED)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _blas_threads(n):
    """Let processes started here have BLAS pools of n threads: NumPy's would be of all cores in each."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(n) for name in names if before[name] is None})
    try:
        yield
    finally:
        for name in names:
            if before[name] is None:
                del os.environ[name]


def _work(pipe, sweep, directory):
    """A worker's life: take a trial, train it, send its result, until the pipe ends."""
    # A process group of its own: Ctrl-C on a terminal reaches the sweep alone, which then asks each worker.
    os.setpgrp()
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with plain_notes():
            while True:
                pipe.send(_train(sweep, pipe.recv(), directory, _Report(pipe)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _end_with_the_sweep():
    """Leave at once when the sweep's process was killed: its successor must find the trials left alone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _train(sweep, trial, directory, report):
    """Train a trial, or go on with it; an exception is its result."""
    run_dir = directory / "trials" / trial.name
    (run_dir / "error.txt").unlink(missing_ok=True)
    began = monotonic()
    try:
        if (run_dir / "config.toml").exists():
            if not _trained(run_dir):  # as it is set now: a mended file may take other arguments
                config = configs.to_dict(sweep.trial_config(trial, directory))
                write_atomic(run_dir / "config.toml", configs.to_toml(config))
            summary = train.resume(run_dir, progress=report)
        else:
            summary = train.Trainer(sweep.trial_config(trial, directory), progress=report).fit()
        if summary["state"] == "interrupted":
            error = f"stopped, as {summary['stopped_by']} are over; the same command goes on with it"
            return Result(trial, "failed", report.done, None, error, monotonic() - began)
        return _read(sweep, trial, directory)
    except Exception as error:
        run_dir.mkdir(parents=True, exist_ok=True)
        where = userfile.own_traceback(error) or traceback.format_exc()
        (run_dir / "error.txt").write_text(where, encoding="utf-8")
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return Result(trial, "failed", report.done, None, f"{kind}{error}", monotonic() - began)


class _Report(Silent):
    """Tells the sweep where a trial is."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.done = 0
        self.due = 0.0

    def step(self, record):
        self.done = record["step"]
        if monotonic() >= self.due:
            self.due = monotonic() + REPORT_INTERVAL
            self.pipe.send({"step": record["step"], "loss": record.get("loss")})


def _died(worker, directory):
    """The result of a trial whose process ended without giving one."""
    worker.pipe.close()
    worker.process.join()
    code = worker.process.exitcode
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    error = f"worker died: {how}{hint}"
    if code in (TERMINATED, -signal.SIGTERM):
        error = "stopped by SIGTERM; the same command goes on with it"
    run_dir = directory / "trials" / worker.trial.name
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.txt").write_text(error + "\n", encoding="utf-8")
    return Result(worker.trial, "failed", error=error)


def _stop(workers):
    """Ask workers to write a checkpoint and leave; end those that take too long."""
    try:
        for worker in workers:
            if worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGINT)
        deadline = monotonic() + STOP_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - monotonic()))
    finally:  # also after a second Ctrl-C
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _prepare_data(sweep, todo, directory):
    """Tokenise and cache each text once, before workers want it; check that blocks fit it.

    Trials on a text, or with a user's file, that has changed since the others ran would not compare with
    them: an InputError. Those that failed without a checkpoint begin anew and do not count.
    """
    seen, hashes, files = [], {}, {}
    for trial in todo:
        config = sweep.trial_config(trial)
        files |= user_files(config)
        if config.task.key is not None:
            continue  # its data is its function's business
        needs = (config.data, config.model.block_size)
        if needs not in seen:
            seen.append(needs)
            hashes[config.data] = task.load_text(config).hash
    for trial in sweep.trials():
        trained = _trained(directory / "trials" / trial.name)
        source = sweep.trial_config(trial).data
        if trained and source in hashes and trained.get("data_hash") != hashes[source]:
            raise InputError(
                f"{source.source} has changed since {trial.name} was trained on it; "
                "to compare trials on the new text, choose another folder: --run.dir DIR"
            )
        for path, sha256 in (trained.get("files") or {}).items():
            if files.get(path, sha256) != sha256:
                raise InputError(
                    f"{path} has changed since {trial.name} was trained with it; "
                    "to compare trials with the new one, choose another folder: --run.dir DIR"
                )


def _trained(run_dir):
    """What a trial that is finished or has a checkpoint tells of its data and files; {} for another."""
    run = records.Run(run_dir)
    if run.state == "finished":
        return run.summary
    newest = checkpoint.newest(run_dir)
    return {} if newest is None else checkpoint.load(newest)[2]


def _read(sweep, trial, directory):
    """A trial's result as its own files tell it."""
    run_dir = directory / "trials" / trial.name
    if not (run_dir / "summary.json").exists():
        return Result(trial)
    (found,) = records.load(run_dir)
    step, seconds = found.summary["step"], found.summary["seconds"]
    if found.state != "finished":
        return Result(trial, "failed", step, None, found.summary.get("error", ""), seconds)
    split, _, metric = sweep.config.objective.partition(".")
    has = sweep.config.objective in found.names()
    values = found.series(split, metric)[1] if has else ()
    if not len(values):
        error = f"the run has no record of {sweep.config.objective}"
        return Result(trial, "failed", step, None, error, seconds)
    best = min if sweep.config.goal == "minimize" else max
    known = [value for value in values if not math.isnan(value)]
    value = float(values[-1] if sweep.config.at == "last" else best(known, default=math.nan))
    if not math.isfinite(value):
        return Result(trial, "failed", step, None, f"{sweep.config.objective} is {value}", seconds)
    return Result(trial, "finished", step, value, "", seconds)


def _refuse_another(sweep, directory):
    """Raise when `directory` holds something else than this sweep; whether it was judged in the same way.

    How trials are judged may change: that trains nothing anew.
    """
    path = directory / "sweep.toml"
    if not path.exists():
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is a file; a sweep needs a new or empty folder")
        if (directory / "config.toml").exists():
            raise InputError(f"{directory} holds a run; a sweep needs a new or empty folder: --run.dir DIR")
        return True
    there, here = _flat(configs.read_toml(path)), _flat(sweep.resolved())
    judged = True
    for key in [*here, *there]:
        if there.get(key) != here.get(key) and key in ("sweep.objective", "sweep.at", "sweep.goal"):
            judged = False
        elif there.get(key) != here.get(key):
            was, is_now = (f"{text(d[key])}" if key in d else "not set" for d in (there, here))
            raise InputError(
                f"{directory} holds another sweep: {key} is {was} there and {is_now} here; "
                "choose another folder: --run.dir DIR"
            )
    return judged


def _flat(resolved):
    """A resolved sweep with one key for each value."""
    flat = {f"sweep.{key}": value for key, value in resolved["sweep"].items()}
    flat.update({f"base.{key}": value for key, value in configs.flatten(resolved["base"]).items()})
    for index, block in enumerate(resolved["space"], 1):
        flat.update({f"[[space]] {index}, {key},": value for key, value in block.items()})
    return flat


@contextmanager
def _locked(directory):
    """Hold the sweep's directory: a second process that wants it is refused. Ends with the process."""
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"another process is running the sweep in {directory}; wait for its end") from None
    finally:
        os.close(descriptor)


def _write_table(sweep, directory, results):
    """results.csv: one line a trial, by setting and seed."""
    varied = sweep.varied()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["setting", "seed", *varied, "state", "step", sweep.config.objective, "error", "seconds"])
    for result in results.values():
        trial = result.trial
        values = [text(trial.overrides[key]) if key in trial.overrides else "" for key in varied]
        value = "" if result.value is None else repr(result.value)
        seconds = "" if result.seconds is None else f"{result.seconds:.2f}"
        outcome = [result.state, result.step, value, " ".join(result.error.split()), seconds]
        writer.writerow([trial.setting, trial.seed, *values, *outcome])
    write_atomic(directory / "results.csv", file.getvalue())


def _summary(sweep, results, seconds):
    """summary.json: the settings by rank, what became of the trials, the verdict."""
    states = [result.state for result in results.values()]
    return {
        "state": "finished",
        "objective": sweep.config.objective,
        "at": sweep.config.at,
        "goal": sweep.config.goal,
        "seeds": sorted(sweep.config.seeds),
        "trials": {state: states.count(state) for state in ("finished", "failed")},
        "settings": [
            {
                "setting": standing.setting,
                "values": sweep.settings[standing.setting],
                "mean": standing.mean,
                "standard_error": standing.standard_error,
                "n": len(standing.values),
                "finished": f"{len(standing.values)}/{standing.n_seeds}",
            }
            for standing in verdict.ranking(sweep, results)
        ],
        "verdict": verdict.verdict(sweep, results),
        "seconds": seconds,
    }
