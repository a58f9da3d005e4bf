"""Learning-rate schedules: pure functions from a step to a learning rate.

Steps count from 0. `warmup` starts at ``lr / warmup_steps`` and reaches `lr` at step ``warmup_steps - 1``;
`cosine` reaches `min_lr` at step ``max_steps - 1``. A schedule holds no state, so resuming needs none.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from cllm.errors import InputError, nearest

__all__ = ["NAMES", "ScheduleConfig", "at", "constant", "cosine", "warmup"]

#: What a config may name.
NAMES = ("cosine", "constant")


@dataclass(frozen=True)
class ScheduleConfig:
    """[schedule]: how the learning rate goes from the first step to the last.

    Parameters
    ----------
    name : {"cosine", "constant"}
    warmup_steps : int
        Steps of linear warm-up; 0 starts at the full rate.
    min_lr : float
        Where the cosine ends; at most the optimizer's lr. "constant" does not use it.

    Raises
    ------
    InputError
        For an unknown name or a value out of range.
    """

    name: str = "cosine"
    warmup_steps: int = 100
    min_lr: float = 1e-4

    def __post_init__(self):
        if self.name not in NAMES:
            hint = nearest(self.name, NAMES)
            raise InputError(f'name is "{self.name}"{hint}, it must be one of {", ".join(NAMES)}')
        _check_count("warmup_steps", self.warmup_steps, 0)
        _check_rate("min_lr", self.min_lr)


def warmup(step, lr, warmup_steps):
    """The linear warm-up: ``lr * (step + 1) / warmup_steps``, and `lr` from step ``warmup_steps - 1`` on.

    Parameters
    ----------
    step : int
        From 0.
    lr : float
        The full learning rate.
    warmup_steps : int
        0 for none.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a negative step or count, or a rate that is negative or not finite.
    """
    _check_count("step", step, 0)
    _check_rate("lr", lr)
    _check_count("warmup_steps", warmup_steps, 0)
    return lr * (step + 1) / warmup_steps if step + 1 < warmup_steps else lr


def constant(step, lr, warmup_steps=0):
    """`lr` at every step after the `warmup`; parameters as there."""
    return warmup(step, lr, warmup_steps)


def cosine(step, lr, warmup_steps=0, max_steps=None, min_lr=0.0):
    """The `warmup`, then half a cosine from `lr` down to `min_lr`.

    .. code-block:: text

        start = max(warmup_steps - 1, 0),  end = max_steps - 1
        min_lr + (lr - min_lr) / 2 * (1 + cos(pi * (step - start) / (end - start)))

    Parameters
    ----------
    step : int
        From 0; beyond the end the rate stays at `min_lr`.
    lr : float
        The largest learning rate.
    warmup_steps : int
        0 for none. A run that is not longer than its warm-up never decays.
    max_steps : int
        Steps in the whole run.
    min_lr : float
        The last learning rate, at most `lr`.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a negative step or count, a missing `max_steps`, or a rate out of range.

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_count("max_steps", max_steps, 1)
    _check_rate("min_lr", min_lr)
    if min_lr > lr:
        raise InputError(f"min_lr is {min_lr:g}, it must be at most lr ({lr:g})")
    start, end = max(warmup_steps - 1, 0), max_steps - 1
    if step <= start:
        return rate
    if step >= end:
        return min_lr
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def at(config, step, lr, max_steps):
    """The learning rate of a `ScheduleConfig` at a step; the other parameters are those of `cosine`."""
    if config.name == "constant":
        return constant(step, lr, config.warmup_steps)
    return cosine(step, lr, config.warmup_steps, max_steps, config.min_lr)


def _check_count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value}, it must be an integer of at least {least}")


def _check_rate(name, value):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise InputError(f"{name} is {value}, it must be a finite number of at least 0")
