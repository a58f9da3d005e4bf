"""One split's tokens, and the order in which training sees them.

The order is a pure function of (seed, epoch, index): sample ``s = index * batch_size + i`` belongs to epoch
``s // n_windows`` and takes window ``permutation(seed, epoch)[s % n_windows]``. The permutation is computed,
not stored: a Feistel network over the next power of four, walked along its cycles until it lands inside
(Black & Rogaway 2002). So seeking costs nothing, and nothing but the position needs saving.
"""

import hashlib
from functools import lru_cache

import numpy as np

from cllm import kernels
from cllm.errors import InputError

__all__ = ["Tokens", "permute"]

IGNORED = -100  # the target that cross-entropy leaves out
# Bytes. A file of 2 GB, none of it in memory: a tiny step takes 15.7 ms, with pages asked for first 4.3,
# and 3.8 when all of it is in memory. A smaller one is soon there, and each window's question takes 0.6 us.
LARGE = 1 << 28

ROUNDS = 6
CHUNK = 1024  # samples whose places are computed together: NumPy needs 0.3 ms for 12, 0.5 ms for 1024


class Tokens:
    """A split: its tokens, batches of random windows for training, fixed windows for evaluation.

    Parameters
    ----------
    array : ndarray
        Integers (n,), perhaps memory-mapped; made read-only. Used in place when contiguous uint8, uint16,
        uint32 or int64 in this machine's byte order, else copied.
    name : str
        What messages call it.
    documents : array of int, optional
        Where documents begin, ascending. A target that belongs to another document than its input, a
        document's first token, does not count then.
    end : int, optional
        The token that ends a document, instead of `documents`.
    padded : bool
        Let `feed` give each document a row of its own, padded, instead of cutting windows.

    Raises
    ------
    InputError
        When the array is not one of integers, or the documents do not ascend within it.
    """

    def __init__(self, array, name="token", *, documents=None, end=None, padded=False):
        array = np.asarray(array)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(f"{name}: tokens are {array.dtype} {array.shape}; they must be integers (n,)")
        if array.dtype not in kernels.TOKENS:
            array = array.astype(np.int64)
        self.array = np.require(array, requirements=["C", "A"])[:]  # a view of our own to lock
        self.array.flags.writeable = False
        self.name, self.end, self.padded = name, end, padded
        self.documents = None if documents is None else np.ascontiguousarray(documents, np.int64)
        if documents is not None and (np.diff(self.documents, prepend=0, append=len(self)) < 0).any():
            raise InputError(
                f"{name}: documents must ascend from 0 to {len(self)}, they say where documents begin"
            )

    @property
    def large(self):
        """Whether its pages should be asked for before they are read: they may not stay in memory."""
        return self.array.nbytes >= LARGE

    @property
    def masked(self):
        """Whether some targets may not count, because documents are known."""
        return self.documents is not None or self.end is not None

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
            int64 (batch_size, block_size); each target is the token after its input, or -100
            (cross-entropy's ignore_index) where that belongs to another document.

        Raises
        ------
        InputError
            When the split is too short for one window, or a number is out of range.
        """
        return _ignoring(*self.gather(self.starts(index, batch_size, block_size, seed), block_size))

    def starts(self, index, batch_size, block_size, seed):
        """Where the windows of `batch` begin, int64 (batch_size,)."""
        self._check(batch_size=batch_size, block_size=block_size)
        if index < 0:
            raise InputError(f"batch index is {index}; it must be at least 0")
        first = index * batch_size
        chunks = range(first // CHUNK, (first + batch_size - 1) // CHUNK + 1)
        starts = [_starts(chunk, len(self), block_size, int(seed)) for chunk in chunks]
        starts = starts[0] if len(starts) == 1 else np.concatenate(starts)
        return starts[first % CHUNK : first % CHUNK + batch_size]

    def gather(self, starts, block_size, out=None):
        """Windows from the given places on, as `cllm.kernels.gather_windows` gives them.

        Returns
        -------
        inputs, targets : ndarray
            int64 (len(starts), block_size).
        mask : ndarray or None
            bool, of the same shape; None unless `masked`.
        """
        return kernels.gather_windows(
            self.array, starts, block_size, out, documents=self.documents, end=self.end, prefetch=self.large
        )

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
            Targets that do not count are -100, as in `batch`.

        Raises
        ------
        InputError
            At once, when the split is too short for one window.
        """
        return (_ignoring(*arrays) for arrays in self.masked_windows(block_size, batch_size))

    def masked_windows(self, block_size, batch_size):
        """As `windows`, an iterator of (inputs, targets, mask), where `gather` says what the mask is."""
        self._check(batch_size=batch_size, block_size=block_size)
        return self._windows(block_size, batch_size)

    def _windows(self, block_size, batch_size):
        n, rest = divmod(len(self) - 1, block_size)
        for i in range(0, n, batch_size):
            yield self.gather(np.arange(i, min(i + batch_size, n)) * block_size, block_size)
        if rest:
            yield self.gather(np.array([n * block_size]), rest)

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


def _ignoring(inputs, targets, mask):
    """Inputs, and targets of which those that the mask leaves out are -100 now."""
    if mask is not None:
        np.putmask(targets, ~mask, IGNORED)
    return inputs, targets


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
