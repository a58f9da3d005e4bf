"""[[space]] blocks -> settings: what a sweep tries.

Each line of a block is an axis: some choices, or a range of numbers. A grid takes all combinations of the
choices. Methods that sample take points of the unit cube, one coordinate for each axis with more than one
value, and an axis says which value a coordinate stands for. Point i of a block is a function of (sampler
seed, block, i) alone, so that more trials add settings and change none.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

from cllm import config as configs
from cllm import userfile
from cllm.errors import InputError, nearest

__all__ = [
    "Block", "Choices", "Range", "blocks", "find_beside", "fixed", "key", "next_new", "sampled", "settings",
    "stream", "varied",
]  # fmt: skip

DIGITS = 6  # significant ones of sampled numbers: short in tables, and alike where libraries round otherwise
REPEATS = 10_000  # points in a row that bring nothing new, after which a block counts as exhausted

LARGEST = 1e300  # end of a range: differences of two are floats
MOST_VALUES = 100_000  # of a range in a grid


# Axes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """Values to choose from; `choices` has a dict for each, with several keys when they move together."""

    names: tuple
    choices: list

    @property
    def size(self):
        return len(self.choices)

    def at(self, u):
        """The choice that u in [0, 1) stands for."""
        return self.choices[int(u * self.size)]

    def of(self, number):
        """The choice with this number."""
        return self.choices[number]

    def number(self, setting):
        """The number of a setting's choice; None when it has none of them."""
        mine = {name: setting.get(name) for name in self.names}
        return self.choices.index(mine) if mine in self.choices else None


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; as far apart as `step` says, evenly or in proportion."""

    names: tuple
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def size(self):
        """How many values there are; None when there is no end of them."""
        if self.step is not None:
            return math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return self.high - self.low + 1 if self.integer else None

    def at(self, u):
        """The value that u in [0, 1) stands for, as a dict."""
        if self.step is not None:
            return self.of(int(u * self.size))
        high = self.high + 1 if self.integer else self.high
        value = self.low * (high / self.low) ** u if self.log else self.low + u * (high - self.low)
        return self.of(math.floor(value) if self.integer else value)

    def of(self, number):
        """The value with this number, as a dict: with a step its place in the range, else about itself."""
        if self.step is not None:
            number = self.low + number * self.step
        if not self.integer:
            number = float(f"{number:.{DIGITS if self.step is None else 12}g}")  # 0.3, not 0.1 + 2 * 0.1
        return {self.names[0]: min(max(number, self.low), self.high)}

    def number(self, setting):
        """The number of a setting's value; None when the range does not have it."""
        value = setting.get(self.names[0])
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not self.low <= value <= self.high:
            return None
        if self.step is None:
            return value
        number = round((value - self.low) / self.step)
        return number if self.of(number) == {self.names[0]: value} else None


@dataclass(frozen=True)
class Block:
    """One [[space]] block: its axes as written."""

    axes: list

    @cached_property
    def free(self):
        """The axes with more than one value."""
        return [axis for axis in self.axes if axis.size != 1]

    @property
    def size(self):
        """How many settings there are; None when there is no end of them."""
        sizes = [axis.size for axis in self.axes]
        return None if None in sizes else math.prod(sizes)

    def product(self):
        """All settings, of axes that are choices."""
        for parts in itertools.product(*(axis.choices for axis in self.axes)):
            yield _joined(parts)

    def at(self, point):
        """The setting that a point of the unit cube stands for, with a coordinate for each free axis."""
        return self.filled(axis.at(float(u)) for axis, u in zip(self.free, point))

    def filled(self, parts):
        """The setting with these values of the free axes, a dict each, and the other axes' only ones."""
        parts = iter(parts)
        return _joined(axis.at(0.0) if axis.size == 1 else next(parts) for axis in self.axes)

    def __contains__(self, setting):
        names = {name for axis in self.axes for name in axis.names}
        return set(setting) == names and all(axis.number(setting) is not None for axis in self.axes)


def _joined(parts):
    return {name: value for part in parts for name, value in part.items()}


# The file's lines ------------------------------------------------------------------------------------


def _tables(space):
    return [block for block in space if isinstance(block, dict)] if isinstance(space, list) else []


def fixed(space):
    """The keys that each block has, so that no setting has the base's value of them."""
    keys = [{name.strip() for key in block for name in key.split(",")} for block in _tables(space)]
    return set.intersection(*keys) if keys else set()


def find_beside(space, path):
    """Let the user's files that blocks name be found beside the sweep's file too, as `config.beside` does."""

    def found(value):
        if isinstance(value, list):
            return [found(part) for part in value]
        return userfile.beside(value, " or ".join(names), path) if userfile.is_reference(value) else value

    for block in _tables(space):
        for key, values in block.items():
            if names := [name.strip() for name in key.split(",") if name.strip() in configs.OF_USER]:
                block[key] = found(values)


def blocks(space, grid):
    """The blocks of a [[space]]; in a grid every range is the list of its steps.

    Raises
    ------
    InputError
        For what is no block, an empty list, a range without sense, or, in a grid, one without a step.
    """
    if not isinstance(space, list) or not all(isinstance(block, dict) for block in space):
        raise InputError("space must be made of blocks: [[space]]")
    if not space:
        raise InputError('there is no [[space]]: it lists what to vary, such as "optim.lr" = [1e-3, 3e-3]')
    found = []
    for number, block in enumerate(space, 1):
        if not block:
            raise InputError(
                f'[[space]] {number} names no key: give it one, such as "optim.lr" = [1e-3, 3e-3]'
            )
        axes = [_axis(keys, values, grid) for keys, values in block.items()]
        names = [name for axis in axes for name in axis.names]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"[[space]] {number} has {name} twice, each key can be in a block once")
        found.append(Block(axes))
    return found


def _axis(keys, values, grid):
    """One line of a block as its axis."""
    names = tuple(name.strip() for name in keys.split(","))
    for name in names:
        if name in ("train.seed", "train.threads") or name.partition(".")[0] == "run":
            instead = {"train.seed": "sweep.seeds", "train.threads": "sweep.threads"}.get(name, "--run.dir")
            raise InputError(f"{name} cannot be part of [[space]], use {instead}")
        if name in configs.SECTIONS and not isinstance(values, dict):
            raise InputError(f'"{name}" is a section, [[space]] needs its keys: "{name}.KEY"')
    if isinstance(values, dict) and {"low", "high"} & set(values):
        if len(names) > 1:
            raise InputError(f'"{keys}" moves {len(names)} keys together, which a range cannot: list them')
        return _range(names, values, grid)
    if isinstance(values, dict):
        quoted = f'"{keys}.{next(iter(values), "key")}"'
        raise InputError(f"{keys} is a table; a dotted key in [[space]] needs quotes: {quoted}")
    if not isinstance(values, list):
        values = [values] if len(names) == 1 else values
    if values == []:
        raise InputError(f'"{keys}" = [] leaves nothing to run, it must list at least one value')
    n = len(names)
    if n == 1:
        values = [[value] for value in values]
    if not isinstance(values, list) or not all(isinstance(v, list) and len(v) == n for v in values):
        raise InputError(f'"{keys}" moves {n} keys together, it must be a list of lists of {n} values')
    choices = [dict(zip(names, choice)) for choice in values]
    seen = set()
    for choice in choices:
        if key(choice) in seen:
            shown = choice[names[0]] if n == 1 else list(choice.values())
            raise InputError(f'"{keys}" lists {shown!r} twice, each value can be there once')
        seen.add(key(choice))
    return Choices(names, choices)


def _range(names, table, grid):
    """{low = 1e-4, high = 1e-2, log = true} or {low = 16, high = 64, step = 16} as an axis."""
    (name,) = names
    for word in table:
        if word not in ("low", "high", "log", "step"):
            hint = nearest(word, ("low", "high", "log", "step"))
            raise InputError(f"the range of {name} has {word}{hint}, it may have low, high, log, step")
    low, high, log, step = (table.get(word) for word in ("low", "high", "log", "step"))
    for word, value in {"low": low, "high": high, "step": step}.items():
        if word in table or word != "step":
            if value is None:
                raise InputError(f"the range of {name} has no {word}, it must have low and high")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) < LARGEST:
                raise InputError(f"the range of {name} has {word} = {value!r}, it must be a finite number")
    if log not in (None, False, True):
        raise InputError(f"the range of {name} has log = {log!r}, it must be true or false")
    if not low < high:
        raise InputError(f"the range of {name} has low = {low} and high = {high}, low must be below high")
    if step is not None and log:
        raise InputError(f"the range of {name} has log and step: leave out one")
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"the range of {name} has step = {step}, it must be above 0 and fit into the range")
    if log and low <= 0:
        raise InputError(f"the range of {name} has log and low = {low}, low must be above 0 then")
    given = [value for value in (low, high, step) if value is not None]
    integer = configs.takes_integers(name)
    if integer is None:  # not known: as it is written
        integer = all(isinstance(value, int) for value in given)
    if integer:
        for value in given:
            if value != int(value):
                raise InputError(f"the range of {name} has {value}, the key takes whole numbers")
    kind = int if integer else float
    low, high, step = (None if value is None else kind(value) for value in (low, high, step))
    axis = Range(names, low, high, bool(log), step, integer)
    if grid and step is None:
        raise InputError(
            f'the range of {name} has no step, which method = "grid" needs: give one, list the values, or '
            'take method = "random", "qmc" or "tpe"'
        )
    if grid and axis.size > MOST_VALUES:
        most = f"a grid takes at most {MOST_VALUES:,}"
        raise InputError(f"the range of {name} has {axis.size:,} values, {most}")
    return Choices(names, [axis.of(index) for index in range(axis.size)]) if grid else axis


# Settings --------------------------------------------------------------------------------------------


def settings(space):
    """The settings of all blocks of a grid: each block's product, each setting once."""
    return _distinct(setting for block in space for setting in block.product())


def sampled(space, method, n, seed):
    """`n` settings of the blocks in turn, each setting once.

    Parameters
    ----------
    space : list of Block
    method : "random" or "qmc"
        Independent points, or a scrambled Sobol sequence for each block.
    n, seed : int

    Raises
    ------
    InputError
        When a block has fewer settings than its share.
    """
    streams = [stream(block, place, method, seed) for place, block in enumerate(space)]
    found = {}
    for index in range(n):
        place = index % len(space)
        setting = next_new(streams[place], found, space, place, n)
        found[key(setting)] = setting
    return list(found.values())


def stream(block, place, method, seed):
    """The settings of a block's points, without end; `place` is the block's among the space's."""
    points = {"random": _random, "qmc": _sobol}[method]
    return map(block.at, points(seed, place, len(block.free)))


def next_new(settings, known, space, place, n):
    """The first of a block's settings, from its stream, whose `key` is not in `known`."""
    seen = set()
    for repeats, setting in enumerate(settings):
        if key(setting) not in known:
            return setting
        seen.add(key(setting))
        if len(seen) == space[place].size or repeats == REPEATS:
            which = f"[[space]] {place + 1}" if len(space) > 1 else "the space"
            raise InputError(
                f"{which} has only {len(seen)} different settings, and sweep.trials = {n} asks for more: "
                'lower it, or take method = "grid", which runs each setting once'
            )


def _random(seed, block, dimensions):
    from numpy.random import default_rng

    for point in itertools.count():
        yield default_rng([seed, block, point]).random(dimensions)


def _sobol(seed, block, dimensions):
    from numpy.random import default_rng
    from scipy.stats import qmc

    if not dimensions:  # Sobol wants one
        yield from itertools.repeat(())
    sequence = qmc.Sobol(dimensions, scramble=True, seed=default_rng([seed, block]))
    for exponent in itertools.count(5):  # a power of two points in all, each time
        yield from sequence.random_base2(max(5, exponent - 1))


def varied(space):
    """The keys in which settings of the blocks differ, in the order of the lines."""
    names = dict.fromkeys(name for block in space for axis in block.axes for name in axis.names)
    return [name for name in names if len(_tried(space, name)) > 1]


def _tried(space, name):
    """The values of a key in the blocks as hashable things; both ends stand for a range."""
    found = set()
    for block in space:
        axes = [axis for axis in block.axes if name in axis.names]
        found |= {None} if not axes else set()
        for axis in axes:
            ranged = isinstance(axis, Range)
            found |= {axis.low, axis.high} if ranged else {_hashable(choice[name]) for choice in axis.choices}
    return found


def key(setting):
    """A setting as something hashable; equal settings have equal ones."""
    return frozenset((name, _hashable(value)) for name, value in setting.items())


def _hashable(value):
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return repr(value) if isinstance(value, dict) else value


def _distinct(found):
    first = {}
    for setting in found:
        first.setdefault(key(setting), setting)
    return list(first.values())
