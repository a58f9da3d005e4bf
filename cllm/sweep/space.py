"""[[space]] blocks -> settings: what a sweep tries."""

import itertools

from cllm import config as configs
from cllm import userfile
from cllm.errors import InputError

__all__ = ["find_beside", "fixed", "settings"]


def _blocks(space):
    return [block for block in space if isinstance(block, dict)] if isinstance(space, list) else []


def fixed(space):
    """The keys that each block has, so that no setting has the base's value of them."""
    keys = [{name.strip() for key in block for name in key.split(",")} for block in _blocks(space)]
    return set.intersection(*keys) if keys else set()


def find_beside(space, path):
    """Let the user's files that blocks name be found beside the sweep's file too, as `config.beside` does."""

    def found(value):
        if isinstance(value, list):
            return [found(part) for part in value]
        return userfile.beside(value, " or ".join(names), path) if userfile.is_reference(value) else value

    for block in _blocks(space):
        for key, values in block.items():
            if names := [name.strip() for name in key.split(",") if name.strip() in configs.OF_USER]:
                block[key] = found(values)


def settings(space):
    """The settings of all blocks: each block's product, each setting once."""
    if not isinstance(space, list) or not all(isinstance(block, dict) for block in space):
        raise InputError("space must be made of blocks: [[space]]")
    if not space:
        raise InputError('there is no [[space]]: it lists what to vary, such as "optim.lr" = [1e-3, 3e-3]')
    found = []
    for block in space:
        axes = [_axis(keys, values) for keys, values in block.items()]
        for choice in itertools.product(*axes):
            setting = {key: value for part in choice for key, value in part.items()}
            if setting not in found:
                found.append(setting)
    return found


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
