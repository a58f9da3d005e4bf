"""Neighbours in memory: arrays that lie next to each other in one block and can be treated as one."""

import numpy as np

from cllm import kernels


def join(columns):
    """The longest chains of neighbours, as (start, stop) pairs that cut up the rows.

    Parameters
    ----------
    columns : list of tuple of ndarray
        A tuple for each parameter: its data, gradient, ...; rows i and i + 1 join when all their arrays
        are neighbours with the same gap.
    """
    start = 0
    for i in range(1, len(columns) + 1):
        if i < len(columns):
            gaps = list(map(kernels.gap, columns[i - 1], columns[i]))
            if gaps[0] != -1 and gaps.count(gaps[0]) == len(gaps):
                continue
        yield start, i
        start = i


def joined(arrays):
    """The same elements in fewer arrays: neighbours joined."""
    return [
        kernels.span(arrays[start], arrays[stop - 1]) for start, stop in join([(array,) for array in arrays])
    ]


def zeros_like(arrays):
    """Zeros of each array's shape and dtype, laid out as these are: neighbours stay neighbours."""
    result = []
    for start, stop in join([(array,) for array in arrays]):
        chain = arrays[start:stop]
        block = np.zeros(kernels.span(chain[0], chain[-1]).size, chain[0].dtype)
        offset = 0
        for i, array in enumerate(chain):
            if i:
                offset += kernels.gap(chain[i - 1], array)
            result.append(block[offset : offset + array.size].reshape(array.shape))
            offset += array.size
    return result
