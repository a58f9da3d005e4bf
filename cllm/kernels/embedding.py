"""Embedding tables."""

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import embedding as _embedding
from cllm.kernels import threads


def embedding_forward(tokens, weight, out=None):
    """The rows of weight that the tokens name.

    Parameters
    ----------
    tokens : integer array of any shape
        In [0, V).
    weight : (V, C) array
    out : (*tokens.shape, C) array, optional

    Returns
    -------
    (*tokens.shape, C) array

    Raises
    ------
    ValueError
        When a token is outside [0, V), a shape does not match or `out` is unsuitable.
    TypeError
        When tokens are not integers or weight is not float32 or float64.
    """
    function = "embedding_forward"
    tokens = checks.integers(function, "tokens", tokens)
    (weight,) = checks.floats(function, weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight is {weight.shape}, it must be (V, C)")
    checks.indices(function, "tokens", tokens, len(weight))
    out = checks.result(function, out, (*tokens.shape, weight.shape[1]), weight.dtype, (tokens, weight))
    _embedding.embedding_forward(tokens, weight, out, threads.count)
    return out


def embedding_backward(dy, tokens, n_rows, out=None, *, accumulate=False):
    """The gradient of `embedding_forward`'s weight: each row of dy added to the row that its token names.

    Parameters
    ----------
    dy : (*tokens.shape, C) array
    tokens : integer array of any shape
        In [0, n_rows).
    n_rows : int
        V, under 2**48.
    out : (n_rows, C) array, optional
    accumulate : bool
        Add to `out` instead of assigning.

    Returns
    -------
    (n_rows, C) array
        Rows of one token are summed in the order of the tokens, 32 at a time.

    Raises
    ------
    ValueError, TypeError
        As `embedding_forward`.
    """
    function = "embedding_backward"
    tokens = checks.integers(function, "tokens", tokens)
    (dy,) = checks.floats(function, dy=dy)
    if dy.ndim != tokens.ndim + 1 or dy.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{function}: dy is {dy.shape}, tokens is {tokens.shape}; they must be (*tokens.shape, C)"
        )
    if accumulate and out is None:
        raise ValueError(f"{function}: accumulate=True needs an array in out")
    n_rows = checks.whole(function, "n_rows", n_rows, 0, 2**48, "in [0, 2**48)")
    checks.indices(function, "tokens", tokens, n_rows)
    out = checks.result(function, out, (n_rows, dy.shape[-1]), dy.dtype, (dy, tokens))
    lists = empty((n_rows + tokens.size,), np.int64)
    _embedding.embedding_backward(dy, tokens, lists, out, accumulate, threads.count)
    return out
