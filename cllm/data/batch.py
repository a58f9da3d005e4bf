"""Batches of a task: of examples that a user's dataset gives, or of windows of a text.

A dataset is anything with ``len(d)`` and ``d[indices] -> Batch``, for an int64 array of indices. The order
in which training sees its examples is a pure function of (seed, epoch, index), as for a text's windows:
sample ``s = index * batch_size + i`` belongs to epoch ``s // n`` and takes example
``permutation(seed, epoch)[s % n]``.
"""

import hashlib
from functools import lru_cache

import numpy as np

from cllm._core import pool
from cllm.data.tokens import Tokens, permute
from cllm.errors import InputError

__all__ = ["Batch", "Examples", "feed"]

CHUNK = 1024  # samples whose places are computed together, as in `tokens`


class Batch:
    """Some examples: what a model takes, what it should give, and which of that counts.

    Parameters
    ----------
    inputs : array
        Its first axis is the examples.
    targets : array
        As many examples; for classes integers.
    mask : boolean array, optional
        Of targets' shape; where it is False, neither loss nor metrics count.

    Raises
    ------
    InputError
        When inputs and targets differ in length, or the mask does not fit the targets.
    """

    __slots__ = ("inputs", "mask", "targets")

    def __init__(self, inputs, targets, mask=None):
        self.inputs, self.targets = np.asarray(inputs), np.asarray(targets)
        self.mask = None if mask is None else np.asarray(mask)
        shapes = f"inputs are {self.inputs.shape} and targets {self.targets.shape}"
        if not self.inputs.ndim or not self.targets.ndim or len(self.inputs) != len(self.targets):
            raise InputError(f"a batch's {shapes}, they must have as many examples on their first axes")
        if mask is not None and (self.mask.dtype != bool or self.mask.shape != self.targets.shape):
            raise InputError(
                f"a batch's mask is {self.mask.dtype} {self.mask.shape}, "
                f"it must be bool of the targets' shape, {self.targets.shape}"
            )

    def __len__(self):
        return len(self.inputs)

    def __repr__(self):
        mask = "" if self.mask is None else f", mask {self.mask.shape}"
        return f"Batch(inputs {self.inputs.shape}, targets {self.targets.shape}{mask})"


class Examples:
    """A dataset of arrays that are in memory: example i is (inputs[i], targets[i], mask[i]).

    Parameters
    ----------
    inputs, targets, mask
        As a `Batch` of everything.
    """

    def __init__(self, inputs, targets, mask=None):
        self.all = Batch(inputs, targets, mask)

    def __len__(self):
        return len(self.all)

    def __getitem__(self, indices):
        mask = None if self.all.mask is None else self.all.mask[indices]
        return Batch(_taken(self.all.inputs, indices), _taken(self.all.targets, indices), mask)


def _taken(array, indices):
    """array[indices], from the pool where it can be: numbers at an array of places from the first on."""
    numbers = array.dtype.kind in "biufc" and array.dtype.isnative and type(array) is np.ndarray
    places = isinstance(indices, np.ndarray) and indices.ndim == 1 and indices.dtype.kind in "iu"
    if not (numbers and places and len(indices)) or indices.min() < 0 or indices.max() >= len(array):
        return array[indices]
    out = pool.empty((len(indices), *array.shape[1:]), array.dtype)
    return np.take(array, indices, axis=0, out=out, mode="clip")  # "raise" would take a copy first


def feed(dataset, what, block_size=None):
    """What gives the Trainer batches: of a dataset's examples, or of the windows of `Tokens`.

    Parameters
    ----------
    dataset : dataset or Tokens
    what : str
        What messages call it.
    block_size : int, optional
        Of the windows; without it `Tokens` cannot be used.

    Returns
    -------
    ExampleFeed or WindowFeed
        ``len(f)`` examples in an epoch; ``f.batch(index, batch_size, seed)``, where "full" takes all;
        ``f.batches(batch_size)``, everything once and in order; ``f.position(index, batch_size)``;
        ``f.first``, the first number of the first example; ``f.unit`` and ``f.size``, of what and how much
        an example has.

    Raises
    ------
    InputError
        When it is no dataset, or empty.
    """
    if isinstance(dataset, Tokens):
        if block_size is None:
            raise InputError(f"{what} is tokens, which need a model with a config.block_size to cut them")
        return WindowFeed(dataset, block_size)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(
            f"{what} is a {type(dataset).__name__}, it must be a dataset: len(d) and d[indices] -> cllm.Batch"
        )
    if not len(dataset):
        raise InputError(f"{what} has no examples, it must have at least one")
    return ExampleFeed(dataset, what)


class WindowFeed:
    """Windows of a text's tokens, in the order of `Tokens.batch`."""

    unit = "token"

    def __init__(self, tokens, block_size):
        self.tokens, self.block_size = tokens, block_size
        self.n_windows = tokens.n_windows(block_size)
        self.size = block_size  # units in an example
        self.first = tokens.array[:1]

    def __len__(self):
        return self.n_windows

    def batch(self, index, batch_size, seed):
        n = len(self) if batch_size == "full" else batch_size
        return Batch(*self.tokens.batch(index, n, self.block_size, seed))

    def batches(self, batch_size):
        for inputs, targets in self.tokens.windows(self.block_size, batch_size):
            yield Batch(inputs, targets)

    def position(self, index, batch_size):
        n = len(self) if batch_size == "full" else batch_size
        return self.tokens.position(index, n, self.block_size)


class ExampleFeed:
    """A dataset's examples, in an order of their own each epoch; "full" batches in the dataset's."""

    unit = "example"
    size = 1

    def __init__(self, dataset, what):
        self.dataset, self.what = dataset, what

    @property
    def first(self):
        return np.ravel(self._take(np.arange(1)).inputs)[:1]

    def __len__(self):
        return len(self.dataset)

    def batch(self, index, batch_size, seed):
        if batch_size == "full":
            return self._take(np.arange(len(self)))
        return self._take(order(index, batch_size, len(self), seed))

    def batches(self, batch_size):
        for start in range(0, len(self), batch_size):
            yield self._take(np.arange(start, min(start + batch_size, len(self))))

    def position(self, index, batch_size):
        n = len(self) if batch_size == "full" else batch_size
        epoch, sample = divmod(index * n, len(self))
        return {"index": index, "epoch": epoch, "sample": sample}

    def _take(self, indices):
        batch = self.dataset[indices]
        if not isinstance(batch, Batch) or len(batch) != len(indices):
            given = batch if isinstance(batch, Batch) else f"a {type(batch).__name__}"
            raise InputError(
                f"{self.what}[{len(indices)} indices] gave {given}, it must give a cllm.Batch of as many"
            )
        return batch


def order(index, batch_size, n, seed):
    """Which of n examples make the batch at a place in the training order: int64 (batch_size,).

    Parameters
    ----------
    index : int
        Which batch, from 0; it runs on through the epochs, and a batch may span two or more.
    batch_size, n, seed : int
    """
    first = index * batch_size
    chunks = range(first // CHUNK, (first + batch_size - 1) // CHUNK + 1)
    places = np.concatenate([_places(chunk, n, int(seed)) for chunk in chunks])
    return places[first % CHUNK : first % CHUNK + batch_size]


@lru_cache(maxsize=16)
def _places(chunk, n, seed):
    """Where the permutations of their epochs take samples chunk * CHUNK ..., int64 (CHUNK,)."""
    epochs, samples = np.divmod(np.arange(chunk * CHUNK, (chunk + 1) * CHUNK), n)
    first, last = int(epochs[0]), int(epochs[-1])
    hashes = [hashlib.sha256(f"{seed} {epoch}".encode()).digest() for epoch in range(first, last + 1)]
    keys = np.array([int.from_bytes(h[:8], "little") for h in hashes], np.uint64)
    return permute(samples, n, keys[epochs - first])
