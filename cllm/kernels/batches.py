"""Batches of tokens."""

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import batches as _batches

TOKENS = tuple(map(np.dtype, ("uint8", "uint16", "uint32", "int64")))
INT64, BOOL = np.dtype(np.int64), np.dtype(bool)


def gather_windows(
    tokens, starts, block_size, out=None, *, lengths=None, documents=None, end=None, prefetch=False
):
    """Windows of a long array of tokens as inputs, targets and a mask.

    Parameters
    ----------
    tokens : (n,) array of uint8, uint16, uint32 or int64
        C-contiguous and in this machine's byte order; it may be memory-mapped, and is never copied.
    starts : (B,) integer array
        Where each window's inputs begin; its targets begin one further.
    block_size : int
        T, the most targets of a window.
    out : tuple of arrays, optional
        inputs and targets, int64 (B, T), and the mask, bool (B, T), or None where there is none.
    lengths : (B,) integer array, optional
        How many targets a window has, from 0 to T; what is left of the row is padded with zeros.
    documents : (m,) integer array, optional
        Where documents begin, ascending.
    end : int, optional
        The token that ends a document.
    prefetch : bool
        Ask the system to read the pages of all windows at once: for a file that memory may not hold.

    Returns
    -------
    inputs, targets : (B, T) int64 array
    mask : (B, T) bool array, or None
        None without lengths, documents and end. It is False at padding, and at a target that belongs to
        another document than its input: that is a document's first token.

    Raises
    ------
    ValueError
        When a window does not lie within the tokens, a shape does not match or `out` is unsuitable.
    TypeError
        For an unsuitable dtype.
    """
    function = "gather_windows"
    if not (isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype in TOKENS):
        raise TypeError(f"{function}: tokens must be a 1-D array of {', '.join(map(str, TOKENS))}")
    if not (tokens.flags.c_contiguous and tokens.flags.aligned):
        raise ValueError(f"{function}: tokens are strided or unaligned, they must be contiguous")
    starts = checks.integers(function, "starts", starts)
    block_size = checks.whole(function, "block_size", block_size, 1, 2**48, "in [1, 2**48)")
    if starts.ndim != 1:
        raise ValueError(f"{function}: starts is {starts.shape}, it must be (B,)")
    if lengths is None:
        checks.indices(function, "starts", starts, max(0, len(tokens) - block_size))
    else:
        lengths = checks.integers(function, "lengths", lengths)
        if lengths.shape != starts.shape:
            raise ValueError(f"{function}: lengths is {lengths.shape}, it must be {starts.shape}")
        checks.indices(function, "starts", starts, len(tokens))
        checks.indices(function, "lengths", lengths, block_size + 1)
        checks.indices(function, "starts + lengths", starts + lengths, len(tokens))
    if documents is not None:
        documents = checks.integers(function, "documents", documents)
        if documents.ndim != 1:
            raise ValueError(f"{function}: documents is {documents.shape}, it must be (m,)")
    end = -1 if end is None else checks.whole(function, "end", end, 0, 2**63, "in [0, 2**63)")
    masked = lengths is not None or documents is not None or end >= 0
    shape = (len(starts), block_size)
    if out is None:
        inputs, targets = empty(shape, np.int64), empty(shape, np.int64)
        mask = empty(shape, bool) if masked else None
    else:
        inputs, targets, mask = out
        read = (tokens, starts, lengths, documents)
        inputs = checks.check_out(function, inputs, shape, INT64, read, "inputs")
        targets = checks.check_out(function, targets, shape, INT64, (*read, inputs), "targets")
        if masked:
            mask = checks.check_out(function, mask, shape, BOOL, (*read, inputs, targets), "mask")
        elif mask is not None:
            raise ValueError(f"{function}: out has a mask, there is one only with lengths, documents or end")
    _batches.gather_windows(tokens, starts, lengths, documents, end, inputs, targets, mask, bool(prefetch))
    return inputs, targets, mask
