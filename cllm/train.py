"""The Trainer: the one place where data, model, optimizer, schedule, records and checkpoints meet.

A step is a pure function of the configuration and the state that a checkpoint holds: batches, dropout
and generated lines follow from (seed, step), and what kernels return does not depend on the threads. So
a run that was stopped and resumed has the same weights and records as one that was not.

What is trained is a `task.Task`; without one of the user's own it is a GPT on the configuration's text.
"""

import json
import math
import re
import warnings
from collections import deque
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import numpy as np

from cllm import checkpoint as checkpoints
from cllm import config as configs
from cllm import evaluation, kernels, metrics, optim, parallel, records, rng, schedules, userfile
from cllm import guard as guards
from cllm import task as tasks
from cllm.data.producer import Producer
from cllm.data.tokenizers import digest
from cllm.errors import InputError
from cllm.files import Lock, clear_temporary, why, write_atomic
from cllm.generate import generate
from cllm.guard import Guard
from cllm.lifecycle import FILES, RESUMABLE, Diverged, Lifecycle, Unsaved, may_change, memory_mb
from cllm.loop import OwnLoop
from cllm.monitor import Monitor, TensorBoard
from cllm.profile import Profile
from cllm.progress import thousands
from cllm.records import METRICS
from cllm.saved import check as check_run

__all__ = ["METRICS", "Trainer", "resume"]

SAMPLE_TOKENS = 120  # of them about this many characters are shown, runs of spaces as one:
SAMPLE_LENGTH = 70  # with "step 2000: " one line of a common terminal
SAMPLE_TEMPERATURE = 0.8
# The Trainer's methods that a profile times.
PARTS = {"_batch": "data", "_loss": "forward", "_backward": "backward"}
PARTS |= {"_clip": "optimizer", "_apply": "optimizer"}
NO_CALLBACKS = "callbacks are given, but task.run is a loop of its own, which calls none"


class _ThreadChoice:
    """All threads or one, whichever makes the steps faster at present.

    On a busy machine threads wait for each other: two have been 40 times slower than one. Results do not
    depend on the count, so now and then one step is tried with the other choice, ever more rarely while that
    does not pay.
    """

    FIRST, RARELY = 5, 640  # steps before the first try, and at most between two
    GAIN = 0.8  # the other choice is taken when its step took less than this share of the recent ones

    def __init__(self, n_threads):
        self.counts = [n_threads, 1]
        self.wait = self.left = self.FIRST
        self.recent = deque(maxlen=5)

    def time(self, function):
        """function() with the present choice, or with the other one when its turn has come."""
        trying = self.left == 0 and self.counts[0] != self.counts[1]
        kernels.set_num_threads(self.counts[trying])
        began = perf_counter()
        result = function()
        seconds = perf_counter() - began
        if not trying:
            self.recent.append(seconds)
            self.left = max(0, self.left - 1)
        elif seconds < self.GAIN * sum(self.recent) / len(self.recent):
            self.counts.reverse()
            self.recent.clear()
            self.wait = self.left = 4 * self.FIRST
        else:
            self.wait = self.left = min(2 * self.wait, self.RARELY)
        kernels.set_num_threads(self.counts[0])
        return result


class _Laps:
    """Where a step's seconds go: each `end` names what was done since the one before."""

    def __init__(self):
        self.began = self.last = perf_counter()
        self.seconds = {}

    def end(self, name):
        now = perf_counter()
        key = f"time_{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.last = now

    @property
    def total(self):
        return self.last - self.began


class Trainer(Lifecycle):
    """One run: from a configuration to a directory with records, checkpoints and a summary.

    Parameters
    ----------
    config : cllm.Config, dict or path-like
        As ``cllm.config.load(path, overrides)`` gives it; a dict of its keys, nested or dotted, or the path
        of a TOML file will do. Its [task] names a task of the user's own; without one it is a GPT on [data].
    task : cllm.Task, optional
        A task made in Python, instead of [task] build. Its run can only be resumed from Python.
    callbacks : iterable of callables
        Each is called as ``f(trainer, record)`` before a record is written, after the task's own callbacks;
        it may add keys to the record, and set ``trainer.stop = True`` to end the run with this step. What
        the state_dict() of those that have one returns (JSON values) is part of each checkpoint, and a
        resumed run gives it to load_state_dict().
    progress : object, optional
        Shows the run, see `cllm.progress`; by default what suits standard output.
    name : str
        With an empty ``run.dir`` the run goes to the first free ``runs/<name>-<n>``.
    pause_at : int, optional
        The step after which the run ends as "interrupted", to be resumed later: with a checkpoint, and with
        the bits of a run that never paused. The last step is no pause. Not for a loop of one's own.

    Attributes
    ----------
    task, model, optimizer, step, run_dir
        The run's parts and the number of updates done; there once `fit` has begun.
    text
        The text of a run without a task of its own, else None.
    """

    def __init__(self, config, task=None, callbacks=(), *, progress=None, name="run", pause_at=None):
        config = configs.given(config)
        if pause_at is not None:
            _check_pause(config, pause_at)
        super().__init__(config, progress, name, pause_at)
        if task is not None:
            if not isinstance(task, tasks.Task):
                raise InputError(f"task is a {type(task).__name__}, it must be a cllm.Task")
            if config.task.key is not None and config.task.build != tasks.GIVEN:
                raise InputError(f"task is given, and task.{config.task.key} names another: leave out one")
            self.config = replace(config, task=tasks.TaskConfig(build=tasks.GIVEN))
        self.task = task
        self.given_callbacks = tasks.checked_callbacks(callbacks)
        self.profile = None
        self.position = 0  # micro-batches consumed, which is all that the loader has to remember

    def fit(self):
        if self.config.task.run is not None:
            _refuse_units(self.units)
            if self.given_callbacks:
                raise InputError(NO_CALLBACKS)
            return OwnLoop(self.config, self.progress, self.name).fit()
        return super().fit()

    fit.__doc__ = Lifecycle.fit.__doc__

    # Before the first step

    def _build(self):
        """Data, model and optimizer; nothing on disk but the data's cache."""
        super()._build()
        config, train = self.config, self.config.train
        self.text = None
        if self.task is None and config.task.build is None:
            self.text = tasks.load_text(config)
        if self.task is None:
            self.task = tasks.for_config(config, self.text)
        task = self.task
        if task.loss is not None and config.loss != tasks.LossConfig():
            raise InputError("[loss] is set, but the task has a loss of its own, which does not use it")
        if train.sample_interval and task.tokenizer is None:
            interval = train.sample_interval
            raise InputError(f"train.sample_interval is {interval}, but the task has no tokenizer")
        if train.sample_interval and not hasattr(getattr(task.model, "config", None), "block_size"):
            interval = train.sample_interval
            raise InputError(
                f"train.sample_interval is {interval}, but the task's model has no config.block_size"
            )
        self.model = task.model
        modules = self.model.modules()
        self.optimizer = optim.build(config.optim, self.model.named_parameters(), modules)
        self.gradients = optim.GradientBuffer(self.model.named_parameters())
        self.leaves = self.units.leaves(train.grad_accum)
        self.batch_size = len(task.train) if train.batch_size == "full" else train.batch_size
        self.unit = f"{task.train.unit}s"
        self.feed = Producer(task.train, train.prefetch, self._next) if train.prefetch else task.train
        self.board = TensorBoard() if config.monitor.tensorboard and self.units.rank == 0 else None
        self.callbacks = task.callbacks + self.given_callbacks + ((self.board,) if self.board else ())
        self.monitor = Monitor(config.monitor, self.model, self.units)
        self.guard = Guard(config.guard)
        self.stale = 0  # evaluations since the best one
        self.metrics = _metrics(config, task)
        # Only what is set, so that a model's own loss needs to know no more than that.
        options = {f.name: getattr(config.loss, f.name) for f in fields(config.loss)}
        self.loss_options = {name: value for name, value in options.items() if value}

    def _first_files(self):
        if self.task.tokenizer is not None and hasattr(self.task.tokenizer, "to_dict"):
            tokenizer = json.dumps(self.task.tokenizer.to_dict(), ensure_ascii=False)
            write_atomic(self.run_dir / "tokenizer.json", tokenizer + "\n")

    def _restore(self, loaded):
        """Take over the state of a checkpoint, as `checkpoint.load` gives it."""
        model_arrays, optimizer_arrays, state = loaded
        if self.text is not None and state["data_hash"] != self.text.hash:
            raise InputError(
                f"{self.config.data.source} has changed since {self.run_dir} was trained on it; "
                "to train on the new text, start a new run"
            )
        n = len(self.task.train)
        if state.get("examples", n) != n:
            raise InputError(
                f"the task has {n} training examples, and {self.run_dir} was trained on {state['examples']}; "
                "to train on the new ones, start a new run"
            )
        self._restore_callbacks(state.get("callbacks", []))
        self.guard.load_state_dict(state["guard"])
        self.stale = state["stale"]
        self.model.load_state_dict(model_arrays)
        self.optimizer.load_arrays(optimizer_arrays)
        if state.get("config", {}).get("optim") == configs.to_dict(self.config)["optim"]:
            for group, values in zip(self.optimizer.param_groups, state["optimizer"]):
                group |= {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name, values in state.get("metrics", {}).items():
            self.metrics[name].load_state_dict(values)
        self._restore_common(state)
        self.position = state["position"]["index"]
        self.losses = {self.task.followed: state[f"{self.task.followed}_loss"]}
        # Stopped early, and killed before its summary: it is done, unless more steps are asked for now.
        self.stop = state["stop"] and state["config"]["train"]["max_steps"] == self.config.train.max_steps
        if "random" in state:
            rng.set_state(state["random"])

    def _restore_callbacks(self, states):
        stateful = self._stateful_callbacks()
        if len(states) != len(stateful):
            raise InputError(
                f"{self.run_dir} was saved with {len(states)} callbacks with a state_dict(), and goes on "
                f"with {len(stateful)}: give the same ones to cllm.train.resume(run_dir, callbacks=[...])"
            )
        for callback, state in zip(stateful, states):
            callback.load_state_dict(state)

    def _stateful_callbacks(self):
        return [callback for callback in self.callbacks if hasattr(callback, "state_dict")]

    # The run

    def _train(self, stop):
        train = self.config.train
        self.model.train()
        self.thread_choice = None if train.threads else _ThreadChoice(self.threads)
        self.profile = Profile(self, PARTS) if train.profile else None
        last = self.recorder.truncate(self.step)
        if last < self.step:
            warnings.warn(
                f"{self.run_dir / 'metrics.jsonl'} has lost the records of steps {last + 1} to {self.step}; "
                "all else goes on as if it had them",
                stacklevel=2,
            )
        if self.config.guard.policy == "rollback" and self.step == 0:
            self._save(planned=True, final=False)  # so that there is something to go back to
        reason = self._pause()  # a resumed run may have come so far already
        try:
            while self.step < train.max_steps and not self.stop and reason is None:
                reason = self._step(stop)
        finally:
            if train.prefetch:
                self.feed.close()
            if self.board:
                self.board.close()
        return reason

    def _step(self, stop):
        """One update and whatever is due after it: evaluations, a line, a checkpoint; why to stop now."""
        train, followed = self.config.train, self.task.followed
        update = self._update if self.profile is None else partial(self.profile.step, self._update)
        record = self.thread_choice.time(update) if self.thread_choice else update()
        if record is None:
            return None  # the run went back to a checkpoint
        self._note(record, followed)
        self._log(record)
        self.shown.step(record)
        new_best = False
        if self._due(train.eval_interval):
            for split in self.task.evals:
                record = self._evaluate(split)
                better = self._note(record, followed)
                new_best |= better
                if split == followed:
                    self._stop_early(better)
                self._log(record)
                self.shown.evaluation(record)
        if train.sample_interval and self.step % train.sample_interval == 0:
            self.shown.sample(self.step, self._sample())
        reason = next(filter(None, self.units.gather(stop.reason)), None) or self._pause()
        last = self._due(0)
        planned = new_best or self._due(train.checkpoint_interval)
        if planned or reason:
            self._save(planned, final=last or reason is not None)
        return None if last and reason == "train.max_minutes" else reason

    def _stop_early(self, better):
        """End the run when the last `train.patience` evaluations brought nothing better."""
        self.stale = 0 if better else self.stale + 1
        if 0 < self.config.train.patience <= self.stale:
            self.stop = True
            self.shown.note(f"step {self.step}: stopped early, no better loss in {self.stale} evaluations")

    def _pause(self):
        """ "pause" when the run has come to its `pause_at`, and not to its end."""
        there = self.pause_at is not None and self.pause_at <= self.step
        return "pause" if there and not self._due(0) else None

    def _due(self, interval):
        if self.stop or self.step == self.config.train.max_steps:
            return True
        return interval > 0 and self.step % interval == 0

    def _update(self):
        """Forward and backward over the step's micro-batches, clip, update.

        Returns
        -------
        dict or None
            The step's record; None when the guard took the run back to a checkpoint.
        """
        config, laps = self.config, _Laps()
        lr = schedules.at(config.schedule, self.step, config.optim.lr, config.train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [self._batch(micro) for micro in self.leaves]
        laps.end("data")
        accumulate = self._one if config.train.grad_accum == 1 else self._several
        with self.monitor.forward(self.step + 1) as activations:
            total, count, examples = accumulate(batches, laps)
        loss = total / count if count else 0.0
        norms = self.monitor.gradients(self.step + 1, self.gradients)
        norm = self._clip()
        # Units of another instruction set may have another norm; what is done about it must be one.
        wrong = self.units.of_first(self.guard.judge(loss, norm))
        measured = {"loss": loss, "lr": lr, "grad_norm": norm}
        if wrong is None:
            with self.monitor.update(self.step + 1, self.gradients) as updates:
                self._apply()
            measured |= {**norms, **updates, **activations}
        elif self._went_wrong(wrong, measured, batches):
            self.optimizer.zero_grad()
            measured["skipped"] = wrong
        else:
            return None
        laps.end("optimizer")
        self.step += 1
        self.position += config.train.grad_accum
        return {
            "step": self.step,
            "split": "train",
            **measured,
            f"{self.unit}_per_s": (count if self.unit == "tokens" else examples) / laps.total,
            **laps.seconds,
            "memory_mb": memory_mb(),
        }

    def _went_wrong(self, wrong, measured, batches):
        """Keep the step for a replay and do as [guard] says; True: skip it, False: the run has gone back."""
        policy, limit = self.config.guard.policy, self.config.guard.limit
        kept = self._keep_incident(wrong, measured, batches) if self.units.rank == 0 else ""
        told = f"{wrong} in step {self.step + 1} at learning rate {measured['lr']:g}"
        if policy == "stop" or self.guard.count >= limit:
            often = "" if policy == "stop" else f", after {limit} such steps (guard.limit)"
            advice = "a lower optim.lr, a longer schedule.warmup_steps or optim.grad_clip may help"
            raise Diverged(f"{told}{often}; {advice}{kept}")
        if policy == "skip":
            self.guard.count += 1
            self.shown.note(f"{told}: skipped{kept}")
            return True
        unsaved = self.units.of_first(self.unsaved)
        if unsaved is not None:  # an older checkpoint would make it another run
            raise Unsaved(f"{told}, and there is no going back to where it should: {unsaved}")
        count, order = self.guard.count, self.guard.order
        path = None
        if self.units.rank == 0:
            # Another one than a planned one only where rolling back is new to the run.
            path = checkpoints.newest(self.run_dir, only_planned=True) or checkpoints.newest(self.run_dir)
        path = self.units.of_first(path)
        if path is None:
            raise Diverged(f"{told}, and {self.run_dir} has no checkpoint to go back to{kept}")
        self._restore(checkpoints.load(path))
        self.guard.count, self.guard.order = count + 1, order + 1
        self.recorder.truncate(self.step)
        self.optimizer.zero_grad()
        self.shown.note(f"{told}: back to step {self.step}, with the data in another order{kept}")
        return False

    def _keep_incident(self, wrong, measured, batches):
        """Write down a step that went wrong; where it can be looked at, in words."""
        mine, train = dict(zip(self.leaves, batches)), self.task.train
        batches = [
            mine[micro] if micro in mine else train.batch(*self._place(micro))  # another unit's
            for micro in range(self.config.train.grad_accum)
        ]
        facts = {
            "why": wrong,
            "seed": self.config.train.seed,
            "position": train.position(self.position, self.config.train.batch_size),
            "order": self.guard.order,
            "files": self.files,
            **records.plain(measured),
        }
        if self.text is not None:
            facts["vocab_size"] = self.text.vocab_size
        try:
            weights, keep = self.model.state_dict(), self.config.guard.keep
            path = guards.save_incident(self.run_dir, self.step + 1, weights, batches, facts, keep)
        except OSError as error:
            warnings.warn(
                f"step {self.step + 1} went wrong and cannot be kept for a replay ({why(error)})",
                stacklevel=2,
            )
            return ""
        return f"; its weights and batch are in {path}, and `cllm replay {self.run_dir}` looks into it"

    def _one(self, batches, laps):
        """The gradient of a step's only micro-batch; its losses' sum, their count, its examples."""
        total, count = self._loss(batches[0], 0)
        laps.end("forward")
        self._backward(total, 1.0 / (count or 1))
        laps.end("backward")
        return total.item(), count, len(batches[0])

    def _several(self, batches, laps):
        """As `_one`, of the sum over the leaves of all units."""
        units, known, parts = self.units, None, []
        if self.task.loss is None:  # a loss of one's own tells its count only afterwards
            known = sum(units.gather(sum(map(tasks.target_count, batches))))
        for micro, batch in zip(self.leaves, batches):
            total, count = self._loss(batch, micro)
            parts.append((total.item(), count, len(batch)))
            laps.end("forward")
            self._backward(total, 1.0 / (known or 1))
            self.gradients.accumulate()
            laps.end("backward")
        self.gradients.sum(units)
        total, count, examples = map(sum, zip(*chain.from_iterable(units.gather(parts))))
        if known is None and count:
            self.gradients.average(count)
        laps.end("sum")
        return total, count, examples

    def _batch(self, micro):
        return self.feed.batch(*self._place(micro))

    def _place(self, micro):
        """Index, batch size and seed of a step's micro-batch."""
        seed = self.config.train.seed + (self.guard.order << 64)  # no run's seed is so large
        return self.position + micro, self.config.train.batch_size, seed

    def _next(self, index):
        """The index of this unit's micro-batch after another one's."""
        step, micro = divmod(index, self.config.train.grad_accum)
        if micro + 1 in self.leaves:
            return index + 1
        return (step + 1) * self.config.train.grad_accum + self.leaves[0]

    def _loss(self, batch, micro):
        """The sum of a batch's losses and how many counted."""
        rng.set_stream(self.config.train.seed, self.step, micro)
        if self.task.loss is None:
            return tasks.language_loss(self.model, batch, **self.loss_options)
        return tasks.checked_loss(self.task.loss(self.model, batch))

    def _backward(self, loss, factor):
        (loss * factor).backward()

    def _clip(self):
        """Limit the norm of the gradients; what it was."""
        return self.gradients.clip_norm(self.config.optim.grad_clip or math.inf)

    def _apply(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _evaluate(self, split):
        began = perf_counter()
        source = self.task.evals[split]
        batches = source.batches(evaluation.batch_size_for(source, self.batch_size))
        result, count = evaluation.measure(self.model, batches, self.task.loss, self.metrics)
        if not count:
            raise InputError(f"the eval {split!r} has no target that counts: all are masked")
        if not all(math.isfinite(result[key]) for key in ("loss", "perplexity") if key in result):
            name = "validation" if split == "val" else split
            raise Diverged(f"the {name} loss is {result['loss']:g} after step {self.step}")
        seconds = perf_counter() - began
        return {"step": self.step, "split": split, **result, "seconds": seconds, "memory_mb": memory_mb()}

    def _log(self, record):
        if self.units.rank == 0:
            for callback in self.callbacks:
                callback(self, record)
        self.stop = self.units.of_first(self.stop)
        record.update({key: records.number(value) for key, value in record.items()})
        self.recorder.write(record)

    def _save(self, planned, final):
        if self.units.rank > 0:
            return
        followed = self.task.followed
        state = {"position": self.task.train.position(self.position, self.config.train.batch_size)}
        if self.text is not None:
            state |= {"vocab_size": self.text.vocab_size, "data_hash": self.text.hash}
            state["tokenizer"] = digest(self.text.tokenizer)
        else:
            state["examples"] = len(self.task.train)
        state |= {
            f"{followed}_loss": self.losses.get(followed),
            "guard": self.guard.state_dict(),
            "stale": self.stale,
            "stop": self.stop,
            "planned": planned,
        }
        # The learning rate is the schedule's; a callback may have changed the others.
        state["optimizer"] = [
            {name: group[name] for name in self.optimizer.defaults if _is_json(group[name])}
            for group in self.optimizer.param_groups
        ]
        if callbacks := self._stateful_callbacks():
            state["callbacks"] = [_json_state(callback) for callback in callbacks]
        kept = {name: metric for name, metric in self.metrics.items() if hasattr(metric, "state_dict")}
        if kept:
            state["metrics"] = {name: _json_state(metric) for name, metric in kept.items()}
        self._checkpoint(self.step, self.model.state_dict(), self.optimizer.arrays(), state, final)

    def _sample(self):
        """A generated line, the same for the same seed and step."""
        tokenizer = self.task.tokenizer
        try:
            prompt = tokenizer.encode("\n")
        except InputError:  # a vocabulary without line ends
            prompt = ()
        prompt = prompt if len(prompt) else self.task.train.first
        tokens = generate(
            self.model, prompt, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE,
            seed=self.config.train.seed + self.step,
        )  # fmt: skip
        line = tokenizer.decode(np.ravel(tokens)[len(prompt) :])
        line = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in line)
        return re.sub(" +", " ", line).strip()[:SAMPLE_LENGTH]

    def _results(self):
        followed = self.task.followed
        results = {
            "train_loss": self.train_loss,
            f"{followed}_loss": self.losses.get(followed),
            "best": self.best,
        }
        if self.text is not None:
            results["data_hash"] = self.text.hash
        results["parameters"] = self.n_parameters
        if self.guard.count:
            results["incidents"] = self.guard.count
        results[self.unit] = self.position * self.batch_size * self.task.train.size
        if self.profile is not None:
            results["profile"] = self.profile.results()
        return results

    # What is shown

    @property
    def n_parameters(self):
        return sum(parameter.data.size for parameter in self.gradients.parameters.values())

    @property
    def description(self):
        """What is trained on what, in words."""
        if self.text is not None:
            size = f"{thousands(len(self.text.train))} tokens, vocabulary {self.text.vocab_size}"
            of = f"{self.config.data.source} ({size})"
        else:
            task = self.config.task.build
            of = f"{'a task' if task == tasks.GIVEN else task} ({len(self.task.train)} examples)"
        per_step = self.config.train.grad_accum * self.batch_size * self.task.train.size
        return (
            f"{thousands(self.n_parameters)} parameters on {of}, "
            f"{self.config.train.max_steps} steps of {per_step} {self.unit}"
        )

    @property
    def next_command(self):
        return f"cllm {'plot' if self.task.tokenizer is None else 'sample'} {self.run_dir}"


def _metrics(config, task):
    """The metrics of [train] metrics and of the task, by name."""
    found = {name: metrics.build(name, task.tokenizer) for name in config.train.metrics}
    for name in task.metrics:
        if name in found:
            raise InputError(f'train.metrics has "{name}", and so has the task: leave out one')
    return found | task.metrics


def _json_state(kept):
    """The state_dict() of a callback or metric."""
    state = kept.state_dict()
    if not _is_json(state):
        name = getattr(kept, "__name__", type(kept).__name__)
        kind = "metric" if hasattr(kept, "compute") else "callback"
        raise InputError(f"the state_dict() of the {kind} {name} must be of JSON values, and finite")
    return state


def _is_json(value):
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def resume(run_dir, overrides=None, *, callbacks=(), progress=None, task=None, pause_at=None):
    """Continue a run from its newest complete checkpoint, or from step 0 when it has none.

    Parameters
    ----------
    run_dir : path-like
    overrides : dict, optional
        Dotted keys to values; of [train] the intervals, limits, threads and ``max_steps`` may change, and all
        of [guard] and [monitor]. Another ``max_steps`` needs a schedule that would have had the same rates in
        all steps so far.
    callbacks, progress, task, pause_at
        As the `Trainer`'s: the same callbacks and, if the run had one, the same task.

    Returns
    -------
    dict
        The run's summary. A finished run's is returned as it stands, and no file is touched.

    Raises
    ------
    InputError
        When there is no run, its data or the user's files have changed, an override would make it
        another run, or another process is training it.

    Warns
    -----
    UserWarning
        When a damaged checkpoint was passed over, a key of config.toml was changed by hand, or the run goes
        on with another instruction set or other versions, which summary.json then tells of ("environments").
    """
    units, run_dir, overrides = parallel.here(), Path(run_dir), overrides or {}
    with units.agreeing():
        summary = _finished(run_dir, overrides)
    summary = units.of_first(summary)
    if summary is not None:
        return summary
    with units.agreeing():
        lock = _held(run_dir) if units.rank == 0 else None
    try:
        with units.agreeing():  # only now that the first has put right what a killed process left
            run = _restored(run_dir, overrides, callbacks, progress, task, pause_at, lock)
        with units.agreeing():  # only now that all have read what is there
            if units.rank == 0:
                (run_dir / "summary.json").unlink(missing_ok=True)  # its end is not one any more
                run._write_config()
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return run._run()


def _finished(run_dir, overrides):
    """The summary of a run that has finished, and that the overrides do not prolong; else None."""
    for key in overrides:
        if not may_change(key):
            raise InputError(
                f"{key} cannot change when a run is resumed, only {', '.join(RESUMABLE)} and what is in "
                "[guard] and [monitor]"
            )
    check_run(run_dir)
    earlier = records.Run(run_dir)
    if earlier.state == "finished":
        # First of all: with another file, even the config's [task] may not fit any more.
        userfile.refuse_changed(earlier.summary.get("files", {}), run_dir / FILES, run_dir)
        saved, config = _configs(run_dir, overrides)
        if config.train.max_steps == saved.train.max_steps:
            return earlier.summary
    return None


def _held(run_dir):
    """The lock of a run's directory, in which what a killed process left is put right."""
    lock = Lock(run_dir)
    try:
        clear_temporary(run_dir)
        checkpoints.tidy(run_dir)
    except BaseException:
        lock.release()
        raise
    return lock


def _configs(run_dir, overrides):
    """A run's configuration as it was written, and with overrides."""
    return configs.load(run_dir / "config.toml"), configs.load(run_dir / "config.toml", overrides)


def _restored(run_dir, overrides, callbacks, progress, task, pause_at, lock):
    """A run at its newest checkpoint, ready to go on."""
    loaded = checkpoints.load_newest(run_dir)
    if loaded is None and checkpoints.listed(run_dir):
        raise InputError(
            f"all checkpoints of {run_dir} are damaged; to train it again from step 0, move them away: "
            f"{run_dir / 'checkpoints'}"
        )
    userfile.refuse_changed(loaded[2].get("files", {}) if loaded else {}, run_dir / FILES, run_dir)
    saved, config = _configs(run_dir, overrides)
    if config.task.run is not None:
        if task is not None:
            raise InputError("task is given, but task.run is a loop of its own, which has none")
        if tasks.checked_callbacks(callbacks):
            raise InputError(NO_CALLBACKS)
        if pause_at is not None:
            _check_pause(config, pause_at)
        _refuse_units(parallel.here())
        run = OwnLoop(config, progress)
    else:
        if config.task.build == tasks.GIVEN and task is None:
            raise InputError(
                f"{run_dir} was trained on a task made in Python; to go on: "
                f"cllm.train.resume({str(run_dir)!r}, task=...)"
            )
        run = Trainer(config, task, callbacks, progress=progress, pause_at=pause_at)
    done = loaded[2]["step"] if loaded else 0
    if config.train.max_steps < done:
        raise InputError(
            f"train.max_steps is {config.train.max_steps}, but {run_dir} has done {done} steps already"
        )
    if config.task.run is None:
        _refuse_another_past(saved, config.train.max_steps, done)
    run.run_dir, run.lock = run_dir, lock
    run._build()
    if loaded is not None:
        run._restore(loaded)
    return run


def _refuse_another_past(config, max_steps, done):
    """Raise unless a run of `max_steps` steps would have had the same learning rates in the first `done`."""
    schedule, lr, planned = config.schedule, config.optim.lr, config.train.max_steps
    if max_steps == planned:
        return
    for step in range(done):
        was, would = (schedules.at(schedule, step, lr, n) for n in (planned, max_steps))
        if was != would:
            raise InputError(
                f"train.max_steps cannot become {max_steps}: with it, step {step + 1} would have had the "
                f'learning rate {would:.6g} and not {was:.6g}, as schedule.name = "{schedule.name}" looks at '
                f"the length of the run ({planned} steps so far); start a new run, or next time choose one "
                'that does not, such as "constant", "inverse_sqrt" or, before its decay, "wsd"'
            )


def _check_pause(config, pause_at):
    if type(pause_at) is not int or pause_at < 1:
        raise InputError(f"pause_at is {pause_at!r}, it must be a step: an integer of at least 1")
    if config.task.run is not None:
        raise InputError(f"pause_at is {pause_at}, but task.run is a loop of its own, which cannot pause")


def _refuse_units(units):
    if units.size > 1:
        raise InputError(f"task.run is a loop of its own, which is one process; mpirun started {units.size}")
