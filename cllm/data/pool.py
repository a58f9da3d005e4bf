"""Buffers for batches, from the pool that activations and gradients come from as well."""

import threading
import weakref

import numpy as np

from cllm._core import pool

__all__ = ["BatchPool"]


class BatchPool:
    """Gives batches their arrays, and counts what is out.

    Each array lies in a buffer of `cllm._core.pool`, which goes back when the last view of the array is gone:
    whoever shares a batch only drops it. Any thread may take and drop.
    """

    def __init__(self):
        self._lock = threading.Lock()  # of the counts
        self._taken = self._recycled = 0
        # Changed by single calls alone, which are atomic: an array may be dropped at any instant, also by a
        # collection of garbage within `empty`, so that a lock could be held already by the same thread.
        self._out = {}

    def empty(self, shape, dtype=np.int64, targets_shape=None, targets_dtype=None, mask=False):
        """Uninitialised arrays for one batch.

        Parameters
        ----------
        shape : tuple of int
            Of the inputs.
        dtype : NumPy dtype of numbers
        targets_shape, targets_dtype : optional
            As the inputs' unless given.
        mask : bool
            Whether there is to be one.

        Returns
        -------
        inputs, targets : ndarray
            C-contiguous; each begins at a multiple of 64 bytes.
        mask : ndarray or None
            bool, of the targets' shape.

        Raises
        ------
        ValueError, TypeError, MemoryError
            For a negative length, a dtype that is not one of numbers, and where there is no memory.
        """
        targets_shape = shape if targets_shape is None else targets_shape
        targets_dtype = dtype if targets_dtype is None else targets_dtype
        arrays = [pool.empty(shape, dtype), pool.empty(targets_shape, targets_dtype)]
        if mask:
            arrays.append(pool.empty(targets_shape, bool))
        recycled = 0
        for array in arrays:
            block, reference = array.base, weakref.ref(array, self._returned)
            self._out[id(reference)] = reference, block.size
            recycled += block.recycled
        with self._lock:
            self._taken += len(arrays)
            self._recycled += recycled
        return arrays if mask else (*arrays, None)

    def _returned(self, reference):
        del self._out[id(reference)]

    def stats(self):
        """What is out and what there was so far.

        Returns
        -------
        dict
            arrays_out, bytes_out: of this pool and not returned yet. bytes_free: of the idle buffers, which
            are there for activations, too. taken: arrays so far; recycled: those of them whose buffer had
            been used before and cost no new memory.
        """
        sizes = [size for _, size in list(self._out.values())]
        with self._lock:
            return {
                "arrays_out": len(sizes),
                "bytes_out": sum(sizes),
                "bytes_free": pool.usage()[1],
                "taken": self._taken,
                "recycled": self._recycled,
            }
