"""One split's tokens, and the order in which training sees them.

The order is a pure function of (seed, epoch, index): sample ``s = index * batch_size + i`` belongs to epoch
``s // n_windows`` and takes window ``permutation(seed, epoch)[s % n_windows]``. The permutation is computed,
not stored: a Feistel network over the next power of four, walked along its cycles until it lands inside
(Black & Rogaway 2002). So seeking costs nothing, and nothing but the position needs saving.
"""

import hashlib
from functools import lru_cache

import numpy as np

from cllm._core import pool
from cllm.errors import InputError

__all__ = ["Tokens", "permute"]

ROUNDS = 6
CHUNK = 1024  # samples whose places are computed together: NumPy needs 0.3 ms for 12, 0.5 ms for 1024


class Tokens:
    """A split: its tokens, batches of random windows for training, fixed windows for evaluation.

    Parameters
    ----------
    array : ndarray
        Unsigned integers (n,), perhaps memory-mapped; made read-only.
    name : str
        What messages call it.
    """

    def __init__(self, array, name="token"):
        self.array = array[:]  # a view of our own to lock
        self.array.flags.writeable = False
        self.name = name

    def __len__(self):
        return len(self.array)

    def __repr__(self):
        return f"Tokens({self.name}, {len(self)} of {self.array.dtype})"

    def n_windows(self, block_size):
        """Windows of an epoch of training: `block_size` inputs each, without overlap.

        A little less than all that fit, so that the grid of windows can move from epoch to epoch.

        Raises
        ------
        InputError
            When the split is too short for one window.
        """
        self._check(block_size=block_size)
        return _n_windows(len(self), block_size)

    def batch(self, index, batch_size, block_size, seed):
        """The batch at a place in the training order: a pure function of its arguments.

        Parameters
        ----------
        index : int
            Which batch, from 0; any, in any order. It runs on through the epochs, and a batch may span two.
        batch_size, block_size : int
            Windows, and tokens in each.
        seed : int
            Of the order.

        Returns
        -------
        inputs, targets : ndarray
            int64 (batch_size, block_size); each target is the token after its input.

        Raises
        ------
        InputError
            When the split is too short for one window, or a number is out of range.
        """
        self._check(batch_size=batch_size, block_size=block_size)
        if index < 0:
            raise InputError(f"batch index is {index}; it must be at least 0")
        first = index * batch_size
        chunks = range(first // CHUNK, (first + batch_size - 1) // CHUNK + 1)
        starts = [_starts(chunk, len(self), block_size, int(seed)) for chunk in chunks]
        starts = starts[0] if len(starts) == 1 else np.concatenate(starts)
        starts = starts[first % CHUNK : first % CHUNK + batch_size]
        windows = self.array[starts[:, None] + np.arange(block_size + 1)]
        inputs, targets = (pool.empty((batch_size, block_size), np.int64) for _ in range(2))
        inputs[...], targets[...] = windows[:, :-1], windows[:, 1:]
        return inputs, targets

    def position(self, index, batch_size, block_size):
        """Where batch `index` begins: ``{"index", "epoch", "sample"}``, sample counting within the epoch."""
        epoch, sample = divmod(index * batch_size, self.n_windows(block_size))
        return {"index": index, "epoch": epoch, "sample": sample}

    def windows(self, block_size, batch_size):
        """The whole split once, in order, for evaluation: each token but the first is a target once.

        Parameters
        ----------
        block_size, batch_size : int
            Tokens in a window, and the most windows at once.

        Returns
        -------
        iterator of (inputs, targets)
            int64 (b, block_size) with b up to batch_size; a last shorter window comes alone, (1, rest).

        Raises
        ------
        InputError
            At once, when the split is too short for one window.
        """
        self._check(batch_size=batch_size, block_size=block_size)
        return self._windows(block_size, batch_size)

    def _windows(self, block_size, batch_size):
        n = (len(self) - 1) // block_size
        end = n * block_size
        inputs = self.array[:end].reshape(n, block_size)
        targets = self.array[1 : end + 1].reshape(n, block_size)
        for i in range(0, n, batch_size):
            yield inputs[i : i + batch_size].astype(np.int64), targets[i : i + batch_size].astype(np.int64)
        if end < len(self) - 1:
            rest = self.array[end:].astype(np.int64)
            yield rest[None, :-1].copy(), rest[None, 1:].copy()

    def _check(self, block_size, batch_size=1):
        for name, value in (("batch_size", batch_size), ("block_size", block_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if len(self) <= block_size:
            most = f"use block_size <= {len(self) - 1} or more text" if len(self) > 1 else "use more text"
            raise InputError(
                f"the {self.name} split has {len(self)} tokens, too short for block_size = {block_size}, "
                f"which needs {block_size + 1} (the inputs and one more target); {most}"
            )


def permute(index, n, keys):
    """Where a keyed permutation of 0 ... n - 1 takes each index.

    Parameters
    ----------
    index : array of int
        From 0 to n - 1.
    n : int
        At least 1.
    keys : array of uint64, or one
        The key of each index; one key makes one permutation.

    Returns
    -------
    ndarray
        int64, of the shape of index.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), np.shape(index))
    place = np.array(index, np.uint64)
    outside = np.ones(place.shape, bool)
    while outside.any():
        place[outside] = _feistel(place[outside], keys[outside], half, mask)
        outside = place >= n
    return place.astype(np.int64)


def _feistel(x, keys, half, mask):
    left, right = x >> half, x & mask
    for i in range(1, ROUNDS + 1):
        # splitmix64 (Steele, Lea & Flood 2014) as the round function; uint64 wraps
        z = keys + np.uint64(i * 0x9E3779B97F4A7C15 % 2**64) + right
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << half) | right


def _n_windows(n_tokens, block_size):
    return max(1, n_tokens // block_size - 1)


@lru_cache(maxsize=16)
def _starts(chunk, n_tokens, block_size, seed):
    """Where the windows of samples chunk * CHUNK ... begin, int64 (CHUNK,), read-only."""
    n = _n_windows(n_tokens, block_size)
    samples = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
    epochs, samples = np.divmod(samples, n)
    first = int(epochs[0])
    hashes = [
        hashlib.sha256(f"{seed} {epoch}".encode()).digest() for epoch in range(first, int(epochs[-1]) + 1)
    ]
    keys = np.array([int.from_bytes(h[:8], "little") for h in hashes], np.uint64)
    # An epoch's grid of windows begins at a place of its own, so that tokens meet different neighbours.
    room = min(block_size, n_tokens - n * block_size)
    shifts = np.array([int.from_bytes(h[8:16], "little") % room for h in hashes])
    starts = permute(samples, n, keys[epochs - first]) * block_size + shifts[epochs - first]
    starts.flags.writeable = False
    return starts
