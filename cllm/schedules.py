"""Learning-rate schedules: pure functions from a step to a learning rate.

Steps count from 0. All schedules but `one_cycle`, which rises in its own way, begin with the same linear
`warmup`: step 0 has ``lr / warmup_steps`` and step ``warmup_steps - 1`` has `lr`. The formulas below are of
what follows, with

.. code-block:: text

    start = max(warmup_steps - 1, 0)     the step at which the decay begins, from lr
    end = max_steps - 1                  the last step of the run
    t = step - start

`linear`, `cosine`, `cosine_restarts` and `wsd` have `min_lr` at `end` and stay there. `step`, `multi_step`,
`exponential` and `inverse_sqrt` have no end of their own; to them `min_lr` is a floor. A schedule holds no
state, so resuming needs none.
"""

import inspect
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Literal

from cllm.errors import InputError, nearest

__all__ = [
    "NAMES", "REQUIRED", "ScheduleConfig", "arguments", "at", "constant", "cosine", "cosine_restarts",
    "exponential", "inverse_sqrt", "join", "linear", "multi_step", "one_cycle", "shared_steps", "step",
    "warmup", "wsd",
]  # fmt: skip


# The functions ---------------------------------------------------------------------------------------


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
    """`lr` at every step after the `warmup`; parameters as there. torch: ConstantLR with factor 1."""
    return warmup(step, lr, warmup_steps)


def linear(step, lr, warmup_steps=0, max_steps=None, min_lr=0.0):
    """The `warmup`, then a straight line from `lr` down to `min_lr`. torch: LinearLR.

    .. code-block:: text

        min_lr + (lr - min_lr) * (1 - t / (end - start))

    Parameters are those of `cosine`.
    """
    return _decay(step, lr, warmup_steps, max_steps, min_lr, _line)


def cosine(step, lr, warmup_steps=0, max_steps=None, min_lr=0.0):
    """The `warmup`, then half a cosine from `lr` down to `min_lr`. torch: CosineAnnealingLR.

    .. code-block:: text

        min_lr + (lr - min_lr) / 2 * (1 + cos(pi * t / (end - start)))

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
    return _decay(step, lr, warmup_steps, max_steps, min_lr, _half_cosine)


def cosine_restarts(
    step, lr, cycle_steps, cycle_mult=1, warmup_steps=0, max_steps=None, min_lr=0.0
):  # fmt: skip
    """The `warmup`, then cosine after cosine from `lr` to `min_lr`. torch: CosineAnnealingWarmRestarts.

    .. code-block:: text

        min_lr + (lr - min_lr) / 2 * (1 + cos(pi * u / length))

    u counts the steps since the cycle began; the cycles' lengths are cycle_steps, cycle_steps * cycle_mult,
    cycle_steps * cycle_mult**2, ... The cycle that runs when the run ends is shortened to reach `min_lr` at
    `end`. Where ``end - start`` is a sum of whole cycles, the only difference to torch is at `end` itself,
    where torch restarts.

    Parameters
    ----------
    step : int
    lr : float
    cycle_steps : int
        Length of the first cycle; T_0 of torch.
    cycle_mult : int
        How much longer each cycle is than the one before it; T_mult of torch.
    warmup_steps : int
    max_steps : int, optional
        Steps in the whole run; None goes on without an end.
    min_lr : float

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count below 1 (`step`, `warmup_steps`: below 0) or a rate out of range.

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_count("cycle_steps", cycle_steps, 1)
    _check_count("cycle_mult", cycle_mult, 1)
    if max_steps is not None:
        _check_count("max_steps", max_steps, 1)
    _check_floor(min_lr, lr)
    start = max(warmup_steps - 1, 0)
    if step <= start:
        return rate
    end = math.inf if max_steps is None else max_steps - 1
    if step >= end:
        return min_lr
    begin, length = start, cycle_steps
    if cycle_mult == 1:
        begin += (step - start) // length * length
    while step >= begin + length:
        begin, length = begin + length, length * cycle_mult
    return _along(_half_cosine, (step - begin) / (min(begin + length, end) - begin), lr, min_lr)


def step(step, lr, step_size, gamma=0.1, warmup_steps=0, min_lr=0.0):
    """The `warmup`, then a rate that falls by the factor `gamma` every `step_size` steps. torch: StepLR.

    .. code-block:: text

        max(min_lr, lr * gamma ** (t // step_size))

    Parameters
    ----------
    step : int
    lr : float
    step_size : int
        Steps between two falls.
    gamma : float
        In (0, 1].
    warmup_steps : int
    min_lr : float
        No rate after the warm-up is lower.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count, rate or factor out of range.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_count("step_size", step_size, 1)
    _check_gamma(gamma)
    _check_floor(min_lr, lr)
    start = max(warmup_steps - 1, 0)
    return rate if step <= start else max(min_lr, lr * gamma ** ((step - start) // step_size))


def multi_step(step, lr, milestones, gamma=0.1, warmup_steps=0, min_lr=0.0):
    """The `warmup`, then a rate that falls by the factor `gamma` at each milestone. torch: MultiStepLR.

    .. code-block:: text

        max(min_lr, lr * gamma ** (number of milestones <= step))

    Parameters
    ----------
    step : int
    lr : float
    milestones : sequence of int
        Steps of the run, increasing, none before `warmup_steps`.
    gamma : float
        In (0, 1].
    warmup_steps : int
    min_lr : float
        No rate after the warm-up is lower.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count, rate or factor out of range, or milestones that do not increase.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_increasing("milestones", milestones, max(warmup_steps, 1), f" (warmup_steps is {warmup_steps})")
    _check_gamma(gamma)
    _check_floor(min_lr, lr)
    passed = bisect_right(milestones, step)
    return max(min_lr, lr * gamma**passed) if passed else rate


def exponential(step, lr, gamma, warmup_steps=0, min_lr=0.0):
    """The `warmup`, then a rate that falls by the factor `gamma` at every step. torch: ExponentialLR.

    .. code-block:: text

        max(min_lr, lr * gamma ** t)

    Parameters
    ----------
    step : int
    lr : float
    gamma : float
        In (0, 1].
    warmup_steps : int
    min_lr : float
        No rate after the warm-up is lower.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count, rate or factor out of range.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_gamma(gamma)
    _check_floor(min_lr, lr)
    start = max(warmup_steps - 1, 0)
    return rate if step <= start else max(min_lr, lr * gamma ** (step - start))


def inverse_sqrt(step, lr, warmup_steps=0, min_lr=0.0):
    """The `warmup`, then a rate that falls with the square root of the number of updates.

    .. code-block:: text

        max(min_lr, lr * sqrt(w / (step + 1))),  w = max(warmup_steps, 1)

    Without a warm-up it falls fast: to a tenth of `lr` in 100 steps.

    Parameters
    ----------
    step : int
    lr : float
    warmup_steps : int
        The warm-up, and the time scale of the decay: 4 times as many updates halve the rate.
    min_lr : float
        No rate after the warm-up is lower.

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a negative step or count, or a rate out of range.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 3, where lr is
    (d_model * warmup_steps)**-0.5.
    """
    rate = warmup(step, lr, warmup_steps)
    _check_floor(min_lr, lr)
    updates = max(warmup_steps, 1)
    return rate if step < updates else max(min_lr, lr * math.sqrt(updates / (step + 1)))


def wsd(
    step, lr, warmup_steps=0, max_steps=None, min_lr=0.0, decay_steps=None, decay_share=0.2,
    decay_shape="linear",
):  # fmt: skip
    """Warmup-stable-decay: the `warmup`, then `lr`, then at the end a decay to `min_lr`.

    .. code-block:: text

        lr                                            up to step end - decay_steps, then
        min_lr + (lr - min_lr) * (1 - s)              "linear"
        min_lr + (lr - min_lr) * (1 - sqrt(s))        "1-sqrt"
        s = 1 - (end - step) / decay_steps

    Parameters
    ----------
    step : int
    lr : float
    warmup_steps : int
    max_steps : int
        Steps in the whole run.
    min_lr : float
        The last learning rate, at most `lr`.
    decay_steps : int, optional
        Steps of decay, at least 1; a run that has fewer left after its warm-up decays in those.
    decay_share : float
        Where `decay_steps` is None: the decay's share of `max_steps`, in (0, 1].
    decay_shape : {"linear", "1-sqrt"}

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count, rate, share or shape out of range.

    References
    ----------
    Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    2024; Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", NeurIPS
    2024 (both shapes, and 20 % as the share).
    """
    rate = warmup(step, lr, warmup_steps)
    _check_count("max_steps", max_steps, 1)
    _check_floor(min_lr, lr)
    if decay_steps is None:
        if not _is_number(decay_share) or not 0 < decay_share <= 1:
            raise InputError(f"decay_share is {decay_share}, it must be a number in (0, 1]")
        decay_steps = max(round(decay_share * max_steps), 1)
    _check_count("decay_steps", decay_steps, 1)
    _check_word("decay_shape", decay_shape, _WSD_SHAPES)
    start, end = max(warmup_steps - 1, 0), max_steps - 1
    start = max(start, end - decay_steps)
    if step <= start:
        return rate
    if step >= end:
        return min_lr
    return _along(_WSD_SHAPES[decay_shape], (step - start) / (end - start), lr, min_lr)


def one_cycle(
    step, lr, max_steps, pct_start=0.3, anneal_strategy="cos", div_factor=25.0, final_div_factor=1e4,
    three_phase=False,
):  # fmt: skip
    """Up to `lr` and down again, to far below where it began. torch: OneCycleLR (its learning rate only).

    .. code-block:: text

        first = lr / div_factor,  last = first / final_div_factor,  peak = pct_start * max_steps - 1
        first -> lr from step 0 to peak, lr -> last from there to end
        three phases: first -> lr to peak, lr -> first to 2 * peak, first -> last to end
        a -> b over share s of a phase: a + (b - a) * s  or  a + (b - a) * (1 - cos(pi * s)) / 2

    It takes neither `warmup_steps` nor `min_lr`: it rises and ends in its own way. `peak` need not be whole.

    Parameters
    ----------
    step : int
        From 0; beyond the end the rate stays at `last`.
    lr : float
        The largest learning rate; max_lr of torch.
    max_steps : int
        Steps in the whole run; total_steps of torch.
    pct_start : float
        Share of the run in which the rate rises, in [0, 1); with three phases at most 0.5.
    anneal_strategy : {"cos", "linear"}
    div_factor, final_div_factor : float
        At least 1.
    three_phase : bool

    Returns
    -------
    float

    Raises
    ------
    InputError
        For a count, rate, share, factor or strategy out of range.

    References
    ----------
    Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    2018.
    """
    _check_count("step", step, 0)
    _check_rate("lr", lr)
    _check_count("max_steps", max_steps, 1)
    if not _is_number(pct_start) or not 0 <= pct_start < 1:
        raise InputError(f"pct_start is {pct_start}, it must be a number in [0, 1)")
    _check_word("anneal_strategy", anneal_strategy, _ONE_CYCLE_SHAPES)
    for name, value in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
        if not _is_number(value) or not 1 <= value < math.inf:
            raise InputError(f"{name} is {value}, it must be a finite number of at least 1")
    if not isinstance(three_phase, bool):
        raise InputError(f"three_phase is {three_phase}, it must be true or false")
    if three_phase and pct_start > 0.5:
        raise InputError(f"pct_start is {pct_start}, with three_phase it must be at most 0.5")
    first = lr / div_factor
    last = first / final_div_factor
    peak, end = pct_start * max_steps - 1, max_steps - 1
    if three_phase:
        phases = ((peak, first, lr), (2 * peak, lr, first), (end, first, last))
    else:
        phases = ((peak, first, lr), (end, lr, last))
    start = 0
    for stop, before, after in phases:
        if step <= stop:
            share = (step - start) / (stop - start) if stop > start else 1.0
            return _along(_ONE_CYCLE_SHAPES[anneal_strategy], share, before, after)
        start = stop
    return last


def join(schedules, boundaries):
    """Several schedules one after the other, as one. torch: SequentialLR; optax: join_schedules.

    Parameters
    ----------
    schedules : sequence of callables (step, lr) -> float
        ``functools.partial(schedules.linear, max_steps=500)``, for example. Each is given the steps since it
        took over.
    boundaries : sequence of int
        The steps at which the second, third, ... schedule takes over; increasing.

    Returns
    -------
    callable (step, lr) -> float

    Raises
    ------
    InputError
        When there is not one boundary between each two schedules, or they do not increase from 1 on.
    """
    schedules = tuple(schedules)
    _check_boundaries(boundaries, len(schedules))
    begins = (0, *boundaries)

    def joined(step, lr):
        _check_count("step", step, 0)
        part = bisect_right(begins, step) - 1
        return schedules[part](step - begins[part], lr)

    return joined


def _line(share):
    return 1 - share


def _half_cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


def _square_root(share):
    return 1 - math.sqrt(share)


_WSD_SHAPES = {"linear": _line, "1-sqrt": _square_root}
_ONE_CYCLE_SHAPES = {"cos": _half_cosine, "linear": _line}


def _decay(step, lr, warmup_steps, max_steps, min_lr, shape):
    """The warm-up, then `shape` from lr to min_lr over all other steps."""
    rate = warmup(step, lr, warmup_steps)
    _check_count("max_steps", max_steps, 1)
    _check_floor(min_lr, lr)
    start, end = max(warmup_steps - 1, 0), max_steps - 1
    if step <= start:
        return rate
    if step >= end:
        return min_lr
    return _along(shape, (step - start) / (end - start), lr, min_lr)


def _along(shape, share, before, after):
    """From `before` to `after` as `shape` goes from 1 to 0; never outside the two by rounding."""
    rate = after + (before - after) * shape(share)
    return min(max(rate, min(before, after)), max(before, after))


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value}, it must be an integer of at least {least}")


def _check_rate(name, value):
    if not _is_number(value) or not 0 <= value < math.inf:
        raise InputError(f"{name} is {value}, it must be a finite number of at least 0")


def _check_floor(min_lr, lr):
    _check_rate("min_lr", min_lr)
    if min_lr > lr:
        raise InputError(f"min_lr is {min_lr:g}, it must be at most lr ({lr:g})")


def _check_gamma(gamma):
    if not _is_number(gamma) or not 0 < gamma <= 1:
        raise InputError(f"gamma is {gamma}, it must be a number in (0, 1]")


def _check_word(name, value, allowed):
    if value not in tuple(allowed):
        words = ", ".join(allowed)
        raise InputError(f'{name} is "{value}"{nearest(value, allowed)}, it must be one of {words}')


def _check_increasing(name, steps, least, why=""):
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise InputError(f"{name} is {steps!r}, it must be a list of integers")
    for value in steps:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} has {value!r}, it must have integers of at least {least}{why}")
    for before, after in pairwise(steps):
        if before >= after:
            raise InputError(f"{name} has {after} after {before}, it must increase")


def _check_boundaries(boundaries, n_schedules):
    _check_increasing("boundaries", boundaries, 1)
    if len(boundaries) != n_schedules - 1:
        n = len(boundaries)
        raise InputError(
            f"boundaries has {n} step{'s' * (n != 1)}, it must have one less than the {n_schedules} schedules"
        )


# The configuration -----------------------------------------------------------------------------------

_FUNCTIONS = {
    function.__name__: function
    for function in (
        cosine, constant, warmup, linear, cosine_restarts, step, multi_step, exponential, inverse_sqrt, wsd,
        one_cycle,
    )
}  # fmt: skip

#: What a config may name.
NAMES = (*_FUNCTIONS, "join")

#: Stands for the default of an argument that has none.
REQUIRED = inspect.Parameter.empty

_PARAMETERS = {
    name: {key: p.default for key, p in inspect.signature(function).parameters.items()}
    for name, function in _FUNCTIONS.items()
}
_NOT_KEYS = ("step", "lr", "max_steps")  # the run gives these
# Other defaults than the functions' own: a run warms up, and does not end at a rate of zero.
_CONFIG_DEFAULTS = {"warmup_steps": 100, "min_lr": 1e-4}


def _of_the_run(name, lr, max_steps, given):
    """What a run gives a schedule for the arguments without a default that its config leaves out."""
    start, end = max(given.get("warmup_steps", 0) - 1, 0), max_steps - 1
    if name == "cosine_restarts":
        return {"cycle_steps": max(math.ceil((end - start) / (1 + given.get("cycle_mult", 1))), 1)}
    if name == "step":
        return {"step_size": max(math.ceil((max_steps - start) / 3), 1)}
    if name == "multi_step":
        shares = {max_steps // 2, 3 * max_steps // 4}
        return {"milestones": sorted(m for m in shares if m >= max(given.get("warmup_steps", 0), 1))}
    if name == "exponential":
        last = (given.get("min_lr") or lr / 100) / lr if lr else 1.0
        # The bounds are for a min_lr that is refused or out of proportion.
        return {"gamma": min(max(last, 1e-300), 1.0) ** (1 / (end - start)) if end > start else 1.0}
    return {}


def arguments(name, names=()):
    """What a schedule takes from [schedule], besides its name.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    names : sequence of str
        The parts of "join", which takes what they take; `warmup_steps` belongs to the first of them.

    Returns
    -------
    dict
        Keys to defaults; `REQUIRED` stands for none, None for one that follows from others or from the run.
    """
    if name != "join":
        keys = [key for key in _PARAMETERS[name] if key not in _NOT_KEYS]
        defaults = {key: _CONFIG_DEFAULTS.get(key, _PARAMETERS[name][key]) for key in keys}
        return {key: None if default is REQUIRED else default for key, default in defaults.items()}
    taken = {"names": REQUIRED, "boundaries": REQUIRED}
    for index, part in enumerate(part for part in names if part in NAMES[:-1]):
        for key, default in arguments(part).items():
            if index == 0 or key != "warmup_steps":
                taken[key] = default if taken.get(key, default) == default else None  # then each has its own
    return taken


@dataclass(frozen=True)
class ScheduleConfig:
    """[schedule]: how the learning rate goes from the first step to the last.

    A key left out (None) takes the default of the schedule's function, but for `warmup_steps`, here 100, and
    `min_lr`, here 1e-4. What has no default there follows from the run's length, see below, so that each
    schedule but "join" can be had by its name alone. What the chosen schedule does not take stays None.

    Parameters
    ----------
    name : str
        One of `NAMES`: a function of this module, or "join" for several of them.
    warmup_steps : int
        Steps of linear warm-up; 0 starts at the full rate. Not of "one_cycle", which rises in its own way.
    min_lr : float
        Where the decay ends, or its floor; at most the optimizer's lr. Not of "constant", "warmup" and
        "one_cycle".
    cycle_steps, cycle_mult : int
        Of "cosine_restarts". Without cycle_steps two cycles fill the run: there is one restart.
    step_size : int
        Of "step". Left out, a third of the steps after the warm-up, rounded up: the rate falls twice.
    milestones : tuple of int
        Of "multi_step". Left out, 50 % and 75 % of the run, rounded down, if not in the warm-up.
    gamma : float
        Of "step", "multi_step" and "exponential". Left out, "exponential" reaches min_lr at the last step, or
        a hundredth of lr when min_lr is 0.
    decay_steps : int
    decay_share : float
    decay_shape : {"linear", "1-sqrt"}
        Of "wsd", which takes either decay_steps or decay_share.
    pct_start, div_factor, final_div_factor : float
    anneal_strategy : {"cos", "linear"}
    three_phase : bool
        Of "one_cycle".
    names : tuple of str
        The parts of "join". They share all other keys; only the first has a warm-up. Each counts its steps
        from where it begins, and its decay ends where the next one begins.
    boundaries : tuple of int
        The steps at which the second, third, ... part of "join" begins.

    Raises
    ------
    InputError
        For an unknown name, a key that the schedule does not take or lacks, or a value out of range.
    """

    name: str = "cosine"
    warmup_steps: int | None = None
    min_lr: float | None = None
    cycle_steps: int | None = None
    cycle_mult: int | None = None
    step_size: int | None = None
    milestones: tuple[int, ...] | None = None
    gamma: float | None = None
    decay_steps: int | None = None
    decay_share: float | None = None
    decay_shape: Literal["linear", "1-sqrt"] | None = None
    pct_start: float | None = None
    anneal_strategy: Literal["cos", "linear"] | None = None
    div_factor: float | None = None
    final_div_factor: float | None = None
    three_phase: bool | None = None
    names: tuple[str, ...] | None = None
    boundaries: tuple[int, ...] | None = None

    def __post_init__(self):
        _check_word("name", self.name, NAMES)
        for key in ("milestones", "names", "boundaries"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.names == ():
            raise InputError("names is empty, it must have at least one schedule")
        for part in self.names or ():
            _check_word("names", part, NAMES[:-1])
        taken = arguments(self.name, self.names or ())
        given = [f.name for f in fields(self)[1:] if getattr(self, f.name) is not None]
        for key in given:
            if key not in taken:
                raise InputError(f"{key} is not an argument of {self.name}, which takes {', '.join(taken)}")
        if "decay_steps" in given and "decay_share" in given:
            raise InputError("decay_share is given along with decay_steps, it must be one of the two")
        for key in [key for key in taken if key not in given]:
            if taken[key] is REQUIRED:
                raise InputError(f"{key} is missing, {self.name} needs it")
            if key != "decay_share" or self.decay_steps is None:
                object.__setattr__(self, key, taken[key])
        # Each function checks its arguments; lr is as large as any min_lr, which is compared to it elsewhere.
        at(self, 0, 1e300, 1)
        for boundary in self.boundaries or ():
            at(self, boundary, 1e300, 1)


def at(config, step, lr, max_steps):
    """The learning rate of a `ScheduleConfig` at a step of a run of `max_steps` steps whose peak is `lr`.

    Returns
    -------
    float

    Raises
    ------
    InputError
        As the schedule's function does.
    """
    if config.name != "join":
        return _bound(config, config.name, max_steps)(step, lr)
    _check_boundaries(config.boundaries, len(config.names))
    warmup_steps = config.warmup_steps or 0  # None when the first part takes none
    if config.boundaries and warmup_steps > config.boundaries[0]:
        raise InputError(
            f"boundaries has {config.boundaries[0]}, it must have none before warmup_steps ({warmup_steps})"
        )
    begins = (0, *config.boundaries)
    lengths = [end - begin for begin, end in zip(begins, (*config.boundaries, max_steps))]
    parts = [
        _bound(config, name, length, **({} if index == 0 else {"warmup_steps": 0}))
        for index, (name, length) in enumerate(zip(config.names, lengths))
    ]
    return join(parts, config.boundaries)(step, lr)


def shared_steps(config, lr, max_steps, other):
    """How many first steps have the same rate in runs of `max_steps` and of `other` steps.

    A run can be lengthened as if it had been planned so for as long as it has not gone beyond these steps.
    "constant" and other schedules that do not look at the run's length share all steps of the shorter run,
    "wsd" those before its decay, "cosine" only the warm-up. One whose key follows from the run's length,
    since it was left out, does look at it.

    Parameters
    ----------
    config : ScheduleConfig
    lr : float
    max_steps, other : int

    Returns
    -------
    int
    """
    shorter = min(max_steps, other)
    same = (at(config, step, lr, max_steps) == at(config, step, lr, other) for step in range(shorter))
    return next((step for step, equal in enumerate(same) if not equal), shorter)


def _bound(config, name, max_steps, **changes):
    """A schedule's function with a config's values, as a function of step and lr."""
    own, max_steps = _PARAMETERS[name], max(max_steps, 1)
    values = {key: getattr(config, key, None) for key in own} | {"max_steps": max_steps} | changes
    given = {key: values[key] for key in own if values[key] is not None}

    def schedule(step, lr):
        return _FUNCTIONS[name](step, lr, **{**_of_the_run(name, lr, max_steps, given), **given})

    return schedule
