"""Activations, softmax and dropout."""

import numpy as np

from cllm import kernels, rng
from cllm.tensor import _sigmoid, as_tensor, record


def relu(input):
    """max(input, 0)."""
    return as_tensor(input).relu()


def gelu(input, approximate="none"):
    """x Phi(x), Phi the normal distribution function; approximate: "none" (erf) or "tanh"."""
    return as_tensor(input).gelu(approximate)


def silu(input):
    """x sigmoid(x)."""
    return as_tensor(input).silu()


def tanh(input):
    return as_tensor(input).tanh()


def sigmoid(input):
    """1 / (1 + exp(-x))."""
    return as_tensor(input).sigmoid()


def softplus(input):
    """log(1 + exp(x)), without overflow."""
    x = as_tensor(input)
    a = x.data
    return record(np.logaddexp(a, a.dtype.type(0)), (x,), lambda grad: (grad * _sigmoid(a),))


def softmax(input, dim):
    """exp(x) over its sum along dim."""
    return as_tensor(input).softmax(dim)


def log_softmax(input, dim):
    """log(softmax(x)) along dim."""
    return as_tensor(input).log_softmax(dim)


def dropout(input, p=0.5, training=True):
    """Each element becomes 0 with probability p, the others are divided by 1 - p; no change unless training.

    The mask depends on `manual_seed`, or the Trainer's seed and step, and on the order of calls.
    """
    x = as_tensor(input)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p}, it must be between 0 and 1")
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0.0
    key = rng.next_key()
    out = kernels.dropout_forward(x.data, p, key)
    return record(out, (x,), lambda grad: (kernels.dropout_backward(grad, p, key),))
