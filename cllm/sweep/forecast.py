"""What a sweep would do, without training: its trials, how long they take here, how much memory.

Seconds come from a short calibration: as many processes as there would be workers each take a few steps of
every shape of model that the trials have, and evaluate a part of the data. Which settings [prune] drops and
[confirm] confirms is not known before; the stages are played through with chance results instead.
"""

import heapq
import json
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from statistics import fmean
from time import perf_counter

import numpy as np

from cllm import config as configs
from cllm import evaluation, kernels, task, train
from cllm.errors import InputError
from cllm.lifecycle import memory_peak_mb
from cllm.progress import Silent, duration, thousands
from cllm.sweep import folder
from cllm.sweep import space as spaces
from cllm.sweep.engine import blas_threads
from cllm.sweep.results import Result
from cllm.sweep.stages import stages
from cllm.sweep.worker import Order

__all__ = ["forecast"]

SHOWN = (8, 4)  # trials listed from the beginning and the end, when there are more: a terminal has 24 lines
SECONDS = 3.0  # of calibration, in each process
STEPS = 20  # of a shape, at most
BATCHES = 4  # of an evaluation's data, at most


def forecast(sweep, directory, workers=None):
    """A sweep's trials, stages, time and memory as lines of text; nothing is trained or written.

    Texts are tokenised and cached, as a run would. What an earlier call has finished in `directory` takes no
    time again.

    Parameters
    ----------
    sweep : Sweep
    directory : Path
        The sweep's, which need not be there.
    workers : int, optional
        Trials at once, as of `run`.

    Raises
    ------
    InputError
        When the directory holds something else, or the data cannot be used.
    """
    folder.refuse_other_use(directory)
    sweep = folder.adopt(sweep, directory)
    workers = workers or max(1, kernels.get_num_threads() // sweep.config.threads)
    played, there = _played(sweep, directory)
    rows = _stages(sweep, played)
    finished = {result.trial.name for result in there.values() if result.state == "finished"}
    if finished:
        rows.append(("finished", f"{len(finished)} of these trials, in {directory}"))
    left = [[job for job in jobs if (job.trial.name, job.until) not in there] for jobs in played]
    if left := [jobs for jobs in left if jobs]:
        rows += _cost(sweep, left, min(workers, max(map(len, left))))
    else:
        rows.append(("time", "nothing is left to do"))
    return [*_listed(sweep), "", *(f"{label:9}{words}" for label, words in rows)]


# Trials ----------------------------------------------------------------------------------------------


def _listed(sweep):
    """The trials that are known, a line each; of many the first and the last."""
    trials = sweep.trials()
    n, n_seeds = len(sweep.numbers), len(sweep.config.seeds)
    lines = [f"{n} settings x {n_seeds} seeds = {len(trials)} trials"]
    if sweep.config.method == "tpe" and sweep.config.trials > n:
        more = sweep.config.trials - n
        lines[0] += f"; {more} more settings are proposed when these have ended"
    width = max(len(trial.name) for trial in trials)
    rows = [f"{trial.name:{width}}  {sweep.describe(trial.setting)}" for trial in trials]
    first, last = SHOWN
    if len(rows) > first + last + 1:
        rows = [*rows[:first], f"... and {len(rows) - first - last} more, to", *rows[-last:]]
    return [*sweep.notices, *lines, *rows]


def _played(sweep, directory):
    """The lists of jobs that `stages` would give when results that are not there were chance.

    And those that are there, by trial's name and how far a job goes.
    """
    settings = list(sweep.settings)
    if sweep.config.method == "tpe":  # points of its sequence stand for settings that are not proposed yet
        known = set(map(spaces.key, settings))
        more = spaces.sampled(sweep.blocks, "qmc", sweep.config.trials, sweep.config.sampler_seed)
        settings += [setting for setting in more if spaces.key(setting) not in known]
    sweep, results, lists, there = replace(sweep, settings=settings), {}, [], {}

    def value_at(trial, step):
        if known := there.get((trial.name, step)):
            return known.value
        at = [found.value for (_, until), found in there.items() if until == step and found.value is not None]
        chance = random.Random(trial.setting)
        return chance.uniform(min(at), max(at)) if at else chance.random()

    for jobs in stages(sweep, results, value_at):
        lists.append(jobs)
        for trial, until in ((job.trial, job.until) for job in jobs):
            order = Order(trial, sweep.trial_config(trial, directory), sweep.config, until)
            if order.done(found := folder.found(order)):
                there[trial.name, until] = found
            state, step = ("finished", 1) if until is None else ("paused", until)
            results[trial.name] = Result(trial, state, step, value_at(trial, until))
    return lists, there


def _stages(sweep, played):
    """How many trials go how far, in words with a label."""
    counts = Counter()
    fresh = set(sweep.confirm_seeds)
    for jobs in played:
        counts[jobs[0].trial.seed in fresh, jobs[0].until] += len(jobs)
    about = "about " if sweep.prune.method == "median" else ""
    parts = [
        f"{'' if i == 0 else about}{n} trial{'s' * (n > 1)} to {f'step {until}' if until else 'the end'}"
        for i, ((confirming, until), n) in enumerate(counts.items())
        if not confirming
    ]
    searching = [jobs[0].until for jobs in played if jobs[0].trial.seed not in fresh]
    n_rounds = searching.count(searching[0])
    rounds = f", in {n_rounds} rounds" if n_rounds > 1 else ""
    rows = [("search", ", then ".join(parts) + rounds)]
    if n := counts[True, None]:
        rows.append(("confirm", f"{n // len(fresh)} settings x {len(fresh)} fresh seeds = {n} trials"))
    return rows


# Calibration -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """What a shape costs: seconds to build, of a step, of an evaluation; numbers of parameters and bytes."""

    build: float
    step: float
    evaluation: float
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    memory_mb: float


def _cost(sweep, left, workers):
    """Time and memory of lists of jobs, in words with a label."""
    made = {}  # setting -> config
    shapes = {}  # shape -> (config, how much work)
    for job in (job for jobs in left for job in jobs):
        config = made.setdefault(job.trial.setting, sweep.trial_config(job.trial))
        shape = _shape(config)
        before = shapes[shape][1] if shape in shapes else 0
        shapes[shape] = config, before + _work(config) * config.train.max_steps
    if any(config.task.run is not None for config in made.values()):
        return [("time", "not known: task.run is a loop of its own")]
    texts = {(c.data, c.model.block_size): c for c, _ in shapes.values() if c.task.key is None}
    for config in texts.values():
        task.load_text(config)  # cached for all of the processes
    # The largest first, which says how much memory there must be; then those that take the most time.
    largest = max(shapes, key=lambda shape: _work(shapes[shape][0]))
    order = sorted(shapes, key=lambda shape: (shape != largest, -shapes[shape][1]))
    try:
        with blas_threads(sweep.config.threads), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            asked = [pool.submit(_calibrate, [shapes[s][0] for s in order]) for _ in range(workers)]
            answers = [future.result() for future in asked]
    except BrokenProcessPool:
        return [("time", "not known: a process of the calibration died; memory may not suffice")]
    if faults := [answer for answer in answers if isinstance(answer, str)]:
        return [("time", f"not known: a trial would fail with {faults[0]}")]
    measured = {s: found for s, *found in zip(order, *answers) if None not in found}
    rate = {s: fmean(m.step for m in found) / _work(shapes[s][0]) for s, found in measured.items()}
    typical = fmean(rate.values())

    def seconds(job, begin):
        config = made[job.trial.setting]
        shape, steps = _shape(config), config.train.max_steps
        end = steps if job.until is None else job.until
        known = measured.get(shape, measured[largest])
        each = rate.get(shape, typical) * _work(config)
        interval = config.train.eval_interval
        looks = end // interval - begin // interval if interval else 0
        looks += job.until is None and (not interval or steps % interval > 0)
        evaluation = fmean(m.evaluation for m in known)
        if shape not in measured:
            evaluation *= _work(config) / _work(shapes[largest][0])
        return fmean(m.build for m in known) + each * (end - begin) + evaluation * looks

    total, at = 0.0, {}
    for jobs in left:
        total += _makespan([seconds(job, at.get(job.trial.name, 0)) for job in jobs], workers)
        at.update({job.trial.name: job.until or 0 for job in jobs})
    peak = max(m.memory_mb for answer in answers for m in answer if m is not None)
    steps = [fmean(m.step for m in found) for found in measured.values()]
    threads = f"{sweep.config.threads} thread{'s' * (sweep.config.threads > 1)}"
    return [
        ("time", f"about {duration(total)} on this machine, {workers} at once with {threads} each"),
        ("", _measured_in_words(steps, len(shapes))),
        ("memory", f"about {peak * workers:.0f} MB, {peak:.0f} MB for each of {workers} at once"),
        ("", _bytes_in_words(measured[largest][0])),
    ]


def _shape(config):
    """What decides how long a step takes, and little else, as text."""
    nested = configs.to_dict(config)
    facts = {section: nested.get(section) for section in ("task", "data", "model", "loss", "monitor")}
    train = {key: nested["train"][key] for key in ("batch_size", "grad_accum", "metrics", "threads")}
    return json.dumps([facts, train, nested["optim"]["name"]], sort_keys=True)


def _work(config):
    """How much a step does, for comparing shapes with each other: about multiplications."""
    model, train = config.model, config.train
    batch = train.batch_size if train.batch_size != "full" else 1000
    tokens = batch * train.grad_accum * model.block_size
    return tokens * model.n_layer * model.n_embd * (12 * model.n_embd + model.block_size)


def _makespan(seconds, workers):
    """When the last of jobs ends that workers take one after another."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def _calibrate(shapes):
    """In a process of its own: a `_Measured` for each config, None when there was no time left for it.

    A fault of the user's code is text.
    """
    began = perf_counter()
    found = []
    for index, config in enumerate(shapes):
        left = SECONDS - (perf_counter() - began)
        try:
            found.append(_measure(config, left / (len(shapes) - index)) if index == 0 or left > 0 else None)
        except InputError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return found


class _Probe(train.Trainer):
    """A Trainer that takes steps and evaluates, but keeps nothing; also not what went wrong."""

    def _went_wrong(self, wrong, measured):
        return True

    def measure(self, seconds):
        """A `_Measured`, in about so many seconds, but with two steps at least."""
        began = perf_counter()
        self._build()
        kernels.set_num_threads(self.threads)
        self.model.train()
        build = perf_counter() - began
        times = []
        while len(times) < 2 or (len(times) < STEPS and perf_counter() - began < 0.6 * seconds):
            step_began = perf_counter()
            self._update()
            times.append(perf_counter() - step_began)
        evaluation = sum(map(self._evaluation_seconds, self.task.evals.values()))
        arrays = [parameter.data for parameter in self.gradients.parameters.values()]
        return _Measured(
            build, float(np.median(times[1:])), evaluation, self.n_parameters,
            sum(array.nbytes for array in arrays),
            sum(array.nbytes for array in self.optimizer.arrays().values()), memory_peak_mb(),
        )  # fmt: skip

    def _evaluation_seconds(self, source):
        size = evaluation.batch_size_for(source, self.batch_size)
        n = -(-len(source) // size)
        began = perf_counter()
        evaluation.measure(self.model, islice(source.batches(size), BATCHES), self.task.loss, self.metrics)
        return (perf_counter() - began) * n / min(n, BATCHES)


def _measure(config, seconds):
    return _Probe(config, progress=Silent()).measure(seconds)


# Words -----------------------------------------------------------------------------------------------


def _measured_in_words(steps, n_shapes):
    low, high = f"{1000 * min(steps):.3g}", f"{1000 * max(steps):.3g}"
    words = f"a step takes {low} ms" if low == high else f"a step takes {low} to {high} ms"
    if n_shapes == 1:
        return f"{words}, measured"
    if len(steps) == n_shapes:
        return f"{words}: {n_shapes} shapes measured"
    return f"{words}: {len(steps)} of {n_shapes} shapes measured, the others judged by their size"


def _bytes_in_words(largest):
    weights, state = (n / 1e6 for n in (largest.parameter_bytes, largest.optimizer_bytes))
    return (
        f"the largest model has {thousands(largest.parameters)} parameters: {weights:.1f} MB, as much again "
        f"for gradients, {state:.1f} MB for the optimizer"
    )
