"""Batches of a task: of examples that a user's dataset gives, or of a text's windows or documents.

A dataset is anything with ``len(d)`` and ``d[indices] -> Batch``, for an int64 array of indices. The order
in which training sees its examples is a pure function of (seed, epoch, index), as for a text's windows:
sample ``s = index * batch_size + i`` belongs to epoch ``s // n`` and takes example
``permutation(seed, epoch)[s % n]``.
"""

import copy
import hashlib
from functools import lru_cache
from itertools import pairwise

import numpy as np

from cllm import kernels
from cllm._core import pool
from cllm.data.pool import BatchPool
from cllm.data.tokens import Tokens, permute
from cllm.errors import InputError

__all__ = ["Batch", "Examples", "Sequences", "feed"]

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
    position : dict, optional
        Where in the data it begins, ``{"index", "epoch", "sample"}``; None where that means nothing.

    Raises
    ------
    InputError
        When inputs and targets differ in length, or the mask does not fit the targets.
    """

    __slots__ = ("inputs", "mask", "position", "targets")

    def __init__(self, inputs, targets, mask=None, position=None):
        self.position = position
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

    def split(self, n):
        """The batch cut for n processing units.

        Parameters
        ----------
        n : int
            From 1 to the number of examples.

        Returns
        -------
        list of Batch
            Views of this one's arrays, in order; their lengths differ by at most one, the longer ones first.
            Each has the position of the whole.

        Raises
        ------
        InputError
            For another n.
        """
        if not isinstance(n, (int, np.integer)) or not 1 <= n <= len(self):
            raise InputError(
                f"a batch of {len(self)} examples cannot be split into {n!r} parts, only 1 to {len(self)}"
            )
        short, longer = divmod(len(self), n)
        ends = [short * i + min(i, longer) for i in range(n + 1)]
        parts = []
        for start, end in pairwise(ends):
            part = copy.copy(self)
            part.inputs, part.targets = self.inputs[start:end], self.targets[start:end]
            part.mask = None if self.mask is None else self.mask[start:end]
            parts.append(part)
        return parts


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


class Sequences:
    """A dataset of token sequences of different lengths; a batch is padded to its longest.

    Example i predicts a sequence's tokens from those before; a sequence of more than `block_size` + 1 tokens
    is cut into several examples, so that each token but the first is a target once. Sequences of fewer than
    two tokens have no target and are left out. The mask says what is padding.

    Parameters
    ----------
    sequences : iterable of integer arrays or lists, or Tokens
        Tokens with `documents` or an `end` are cut there and used in place; to find `end` they are read once.
    block_size : int, optional
        The most targets of an example.

    Raises
    ------
    InputError
        When no sequence has two tokens, or one is not of integers.
    """

    def __init__(self, sequences, block_size=None):
        if block_size is not None and block_size < 1:
            raise InputError(f"block_size is {block_size}; it must be at least 1")
        if isinstance(sequences, Tokens):
            tokens, starts = sequences, _documents(sequences)
        else:
            arrays = [Tokens(sequence, f"sequence {i}").array for i, sequence in enumerate(sequences)]
            lengths = [len(array) for array in arrays]
            starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
            joined = np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)
            tokens = Tokens(joined, "sequences")
        ends = np.append(starts[1:], len(tokens))
        targets = np.maximum(ends - starts - 1, 0)
        most = targets.max(initial=0)
        if not most:
            raise InputError(f"{tokens.name}: no sequence has two tokens, an input and a target")
        most = most if block_size is None else min(most, block_size)
        pieces = -(-targets // most)  # of each sequence
        owner = np.repeat(np.arange(len(starts)), pieces)
        skipped = (np.arange(len(owner)) - (np.cumsum(pieces) - pieces)[owner]) * most
        self.tokens, self.pool = tokens, BatchPool()
        self.starts, self.lengths = starts[owner] + skipped, np.minimum(targets[owner] - skipped, most)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, indices):
        starts, lengths = self.starts[indices], self.lengths[indices]
        width = int(lengths.max(initial=1))
        out = self.pool.empty((len(starts), width), mask=True)
        tokens, large = self.tokens.array, self.tokens.large
        return Batch(*kernels.gather_windows(tokens, starts, width, out, lengths=lengths, prefetch=large))


def _documents(tokens):
    """Where the documents of Tokens begin."""
    if not tokens.masked:
        raise InputError("the tokens say nothing of documents, they need `documents` or an `end`")
    if tokens.end is None:
        return tokens.documents
    step = 1 << 20
    places = [np.zeros(1, np.int64)]
    for i in range(0, len(tokens), step):
        places.append(np.flatnonzero(tokens.array[i : i + step] == tokens.end) + (i + 1))
    return np.concatenate(places)


def feed(dataset, what, block_size=None):
    """What gives the Trainer batches: of a dataset's examples, or of the windows or documents of `Tokens`.

    Parameters
    ----------
    dataset : dataset or Tokens
    what : str
        What messages call it.
    block_size : int, optional
        Of the windows; without it `Tokens` cannot be used.

    Returns
    -------
    ExampleFeed, WindowFeed or PaddedFeed
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
        return PaddedFeed(dataset, block_size, what) if dataset.padded else WindowFeed(dataset, block_size)
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
        self.dataset, self.block_size = tokens, block_size
        self.n_windows = tokens.n_windows(block_size)
        self.size = block_size  # units in an example
        self.first = tokens.array[:1]
        self.pool = BatchPool()

    def __len__(self):
        return self.n_windows

    def batch(self, index, batch_size, seed):
        n = len(self) if batch_size == "full" else batch_size
        starts = self.dataset.starts(index, n, self.block_size, seed)
        arrays = self.pool.empty((n, self.block_size), mask=self.dataset.masked)
        return Batch(*self.dataset.gather(starts, self.block_size, arrays), self.position(index, batch_size))

    def batches(self, batch_size):
        for arrays in self.dataset.masked_windows(self.block_size, batch_size):
            yield Batch(*arrays)

    def position(self, index, batch_size):
        n = len(self) if batch_size == "full" else batch_size
        return self.dataset.position(index, n, self.block_size)


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
        full = batch_size == "full"
        indices = np.arange(len(self)) if full else order(index, batch_size, len(self), seed)
        batch = copy.copy(self._take(indices))  # the dataset may give the same object again
        batch.position = self.position(index, batch_size)
        return batch

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


class PaddedFeed(ExampleFeed):
    """The documents of `Tokens`, each a row of its own; those over `block_size` targets in several."""

    unit = "token"

    def __init__(self, tokens, block_size, what):
        super().__init__(Sequences(tokens, block_size), what)
        self.size = block_size  # a row's places, of which padding takes some


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
