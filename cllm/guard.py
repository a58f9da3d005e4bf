"""What a run does when a step goes wrong: its loss or gradient not finite, or its loss far above the last.

The step is judged before the weights change. What was there is kept in ``RUN/incidents/step-00000123/``,
written and verified as a checkpoint is: the weights, the batch, and why, for `cllm.replay`.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cllm import checkpoint
from cllm.errors import InputError

__all__ = ["Guard", "GuardConfig", "incidents", "load_incident", "save_incident"]

PARTS = ("weights.safetensors", "batch.safetensors")


@dataclass(frozen=True)
class GuardConfig:
    """[guard]: what happens when a step's loss or gradient is not finite, or its loss is a spike.

    Parameters
    ----------
    policy : {"stop", "skip", "rollback"}
        End the run; leave the weights as they were and go on with the next step; or go back to the newest
        checkpoint and on from there with the training data in another order.
    spike : float
        How many standard deviations above the mean of the last losses a loss is a spike; 0: none is.
    window : int
        How many last losses that are.
    limit : int
        How often a run may skip or go back; the next time it stops.
    keep : int
        How many of the steps that went wrong are kept for `cllm replay`, each with the model's weights.
    """

    policy: Literal["stop", "skip", "rollback"] = "stop"
    spike: float = 0.0
    window: int = 100
    limit: int = 10
    keep: int = 10

    def __post_init__(self):
        if not 0 <= self.spike < math.inf:
            raise InputError(f"spike is {self.spike:g}, it must be 0 or more")
        if self.window < 2:
            raise InputError(f"window is {self.window}, it must be at least 2")
        if self.limit < 0:
            raise InputError(f"limit is {self.limit}, it must be 0 or more")
        if self.keep < 1:
            raise InputError(f"keep is {self.keep}, it must be at least 1")


class Guard:
    """Judges steps; its state is part of each checkpoint.

    Attributes
    ----------
    count : int
        Steps that went wrong so far.
    order : int
        How often the order of the training data was changed.
    """

    def __init__(self, config):
        self.config = config
        self.recent = deque(maxlen=config.window)
        self.count = self.order = 0

    def judge(self, loss, norm):
        """What is wrong with a step, in words; None when nothing is, and its loss is then one of the last."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss:g} and the gradient's norm {norm:g}"
        if self.config.spike and len(self.recent) == self.config.window:
            mean, deviation = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + self.config.spike * deviation:
                above = (loss - mean) / deviation if deviation else math.inf
                return (
                    f"the loss is {loss:.4g}, {above:.1f} standard deviations above the last "
                    f"{self.config.window} losses' mean of {mean:.4g}"
                )
        self.recent.append(loss)
        return None

    def state_dict(self):
        return {"recent": list(self.recent), "count": self.count, "order": self.order}

    def load_state_dict(self, state):
        self.recent = deque(state["recent"], maxlen=self.config.window)
        self.count, self.order = state["count"], state["order"]


def save_incident(run_dir, step, weights, batches, facts, keep=GuardConfig.keep):
    """Keep a step that went wrong, and delete all but the last `keep` ones.

    After going back a step may go wrong again, with another batch, which is then kept in its place.

    Parameters
    ----------
    run_dir : path-like
    step : int
        As records count, from 1.
    weights : dict of str to ndarray
        As they were when it was computed.
    batches : list of Batch
        Its micro-batches.
    facts : dict
        JSON values: loss, gradient norm, why.
    keep : int

    Returns
    -------
    Path
        Its folder.

    Raises
    ------
    OSError
        When it cannot be written: names the file.
    """
    arrays = {}
    for i, batch in enumerate(batches):
        for name in ("inputs", "targets", "mask"):
            array = getattr(batch, name)
            if array is not None:
                arrays[f"{i}.{name}"] = array
    folder = Path(run_dir) / "incidents"
    path = checkpoint.write(folder, step, dict(zip(PARTS, (weights, arrays))), facts)
    # After going back, this one may be of an earlier step than those that are there.
    others = [other for other in incidents(run_dir) if other != path]
    for old in others[: max(0, len(others) + 1 - keep)]:
        checkpoint.remove(old)
    return path


def incidents(run_dir):
    """The folders of a run's incidents, in the order of steps."""
    return checkpoint.folders(Path(run_dir) / "incidents")


def load_incident(path):
    """What `save_incident` kept.

    Returns
    -------
    weights : dict of str to ndarray
    batches : list of dict
        "inputs", "targets" and perhaps "mask" of each micro-batch.
    facts : dict

    Raises
    ------
    InputError
        When a file is damaged: names it.
    """
    (weights, arrays), facts = checkpoint.read(path, PARTS)
    batches = {}
    for key, array in arrays.items():
        index, _, name = key.partition(".")
        batches.setdefault(int(index), {})[name] = array
    return weights, [batches[i] for i in sorted(batches)], facts
