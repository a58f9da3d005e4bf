"""A run whose whole loop is the user's own: [task] run = "my.py:train".

The function is called as ``train(config, run, **arguments)``. What it cannot know, `LoopRun` gives it: the
run's directory, records that are shown and cut back on resuming, checkpoints, signals.
"""

import json

import numpy as np

from cllm import checkpoint as checkpoints
from cllm import rng
from cllm import task as tasks
from cllm.arrays import check_name
from cllm.errors import InputError
from cllm.lifecycle import Lifecycle, Unsaved
from cllm.records import number, plain

__all__ = ["LoopRun", "OwnLoop"]


class LoopRun:
    """What a user's own loop is given.

    Attributes
    ----------
    dir : Path
        The run's directory; files of the user's own may go there.
    seed : int
        train.seed.
    """

    def __init__(self, loop, stop):
        self._loop = loop
        self._stop = stop
        self._logged = -1
        self._begun = False  # whether anything was logged or saved
        self.dir = loop.run_dir
        self.seed = loop.config.train.seed

    @property
    def stop(self):
        """True after Ctrl-C, SIGTERM or train.max_minutes: save and return. A second signal ends at once."""
        return self._stop.reason is not None

    def log(self, step, split, **values):
        """Write a record, and show it.

        Parameters
        ----------
        step : int
            Updates done, from 0; never less than in the record before.
        split : str
            "train", or the name of what was evaluated.
        **values
            Numbers by name, or Tensors of one. "loss" of "val", or else of the first other split, says which
            checkpoint is the best.
        """
        step = _step(step)
        if step < self._logged:
            raise InputError(f"run.log: step is {step} after {self._logged}, steps must not go back")
        if not isinstance(split, str) or not split or "." in split:
            raise InputError(f"run.log: split is {split!r}, it must be a word without a dot")
        values = {name: number(value) for name, value in values.items()}
        for name, value in values.items():
            several = isinstance(value, list | tuple) or np.ndim(value) > 0
            if several or np.asarray(value).dtype.kind not in "biuf":
                raise InputError(f"run.log: {name} is a {type(value).__name__}, it must be one number")
        self._begin()
        self._logged = step
        # Here NaN becomes None, and NumPy's numbers Python's: a checkpoint's JSON has no others.
        loop, record = self._loop, {"step": step, "split": split, **plain(values)}
        loop.step = max(loop.step, step)
        follows = split != loop.followed if split == "val" else split != "train" and loop.followed is None
        if follows and "loss" in values:
            loop.followed, loop.best = split, None
        loop._note(record, loop.followed)
        loop.recorder.write(record)
        if split == "train":
            loop.shown.step(record)
        else:
            loop.shown.evaluation(record)

    def save(self, step, arrays, state=None):
        """Write a checkpoint; all but the newest (train.keep_checkpoints) and the best are deleted.

        One that cannot be written, as on a full disk, is a warning; if it was the last, the run has failed.

        Parameters
        ----------
        step : int
            Updates done.
        arrays : dict of str to ndarray
            Such as model.state_dict() and an optimizer's arrays, under names of your own.
        state : dict, optional
            JSON values.
        """
        step, loop = _step(step), self._loop
        for name, array in dict(arrays).items():
            if not isinstance(name, str) or np.asarray(array).dtype.kind not in "biuf":
                kind = type(array).__name__
                raise InputError(f"run.save: {name!r} is a {kind}, it must be an array of numbers")
            check_name(name)
        try:
            json.dumps(state, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"run.save: state must be of JSON values: {error}") from None
        self._begin()
        loop.step = max(loop.step, step)
        whole = {
            "state": state,
            "losses": loop.losses,
            "followed": loop.followed,
        }
        loop._checkpoint(step, dict(arrays), {}, whole, final=False)

    def restore(self):
        """What a resumed run goes on from: (step, arrays, state) of the newest checkpoint; None without one.

        Call it before anything is logged or saved: records after that step are dropped. A loop that does not
        call it starts again: the records and checkpoints of the earlier process are deleted.
        """
        loaded = self._loop.loaded
        if self._begun:
            raise InputError("run.restore: something was logged or saved before, restore first")
        if loaded is None:
            return None
        self._loop.recorder.truncate(loaded[2]["step"])
        self._loop.cut = True
        if "random" in loaded[2]:
            rng.set_state(loaded[2]["random"])
        return loaded[2]["step"], loaded[0], loaded[2]["state"]

    def _begin(self):
        """Before the first record or checkpoint: drop an earlier process's, unless they were restored."""
        self._begun = True
        if not self._loop.cut:
            self._loop.start_again()


class OwnLoop(Lifecycle):
    """A run of [task] run; it has no model, data or optimizer of CLLM's own.

    Parameters
    ----------
    config, progress, name
        As of `train.Trainer`.
    """

    unit = "steps"

    def __init__(self, config, progress=None, name="run"):
        super().__init__(config, progress, name)
        self.loaded = None  # the checkpoint to go on from
        self.followed = None  # the split whose loss says which checkpoint is the best
        self.cut = False  # whether the records of an earlier process were dropped

    def _build(self):
        super()._build()
        self.function = tasks.function("run", self.config.task.run)

    def _restore(self, loaded):
        self.loaded = loaded
        self._restore_common(loaded[2])
        self.losses, self.followed = loaded[2]["losses"], loaded[2]["followed"]

    def start_again(self):
        """Forget what an earlier process did."""
        checkpoints.clear(self.run_dir)
        self.recorder.truncate(-1)  # in this order: no checkpoint may be newer than the records
        self.step, self.losses = 0, {}
        self.environments = [{**self.environments[-1], "step": 0}]
        self.train_loss = self.best = self.followed = None
        self.cut = True

    def _train(self, stop):
        run = LoopRun(self, stop)
        rng.manual_seed(self.config.train.seed)
        self.function(self.config, run, **self.config.task.arguments)
        if self.unsaved is not None:
            raise Unsaved(self.unsaved)
        if stop.signal is None and self.step >= self.config.train.max_steps:
            return None  # the time was up, but so was the work
        return stop.reason

    def _results(self):
        split = self.followed or "val"
        return {"train_loss": self.train_loss, f"{split}_loss": self.losses.get(split), "best": self.best}

    @property
    def description(self):
        return f"{self.config.task.run}, {self.config.train.max_steps} steps"

    @property
    def next_command(self):
        return f"cllm plot {self.run_dir}"


def _step(step):
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise InputError(f"step is {step!r}, it must be an integer of at least 0")
    return int(step)
