"""Activations, softmax and dropout."""

from numbers import Real

import numpy as np

from cllm import kernels, rng
from cllm.errors import InputError
from cllm.tensor import as_tensor, record


def relu(input):
    """max(input, 0)."""
    return as_tensor(input).relu()


def relu_squared(input):
    """max(input, 0)^2 (So et al. 2021)."""
    x = as_tensor(input)
    a = x.data
    return record(
        kernels.relu_squared_forward(a), (x,), lambda grad: (kernels.relu_squared_backward(grad, a),)
    )


def gelu(input, approximate="none"):
    """x Phi(x), Phi the normal distribution function; approximate: "none" (erf) or "tanh"."""
    return as_tensor(input).gelu(approximate)


def silu(input):
    """x sigmoid(x)."""
    return as_tensor(input).silu()


def swiglu(gate, up):
    """silu(gate) up (Shazeer 2020).  gate, up : Tensors of one shape."""
    gate, up = as_tensor(gate), as_tensor(up)
    a, b = gate.data, up.data
    return record(
        kernels.swiglu_forward(a, b), (gate, up), lambda grad: kernels.swiglu_backward(grad, a, b)
    )


def tanh(input):
    """The hyperbolic tangent."""
    return as_tensor(input).tanh()


def sigmoid(input):
    """1 / (1 + exp(-x))."""
    return as_tensor(input).sigmoid()


def softplus(input):
    """log(1 + exp(x)), without overflow."""
    x = as_tensor(input)
    a = x.data
    return record(np.logaddexp(a, a.dtype.type(0)), (x,), lambda grad: (grad * kernels.sigmoid_forward(a),))


#: What a feed-forward block may have between its matrices, by the names of `kernels.ACTIVATIONS`.
ACTIVATIONS = {
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "gelu": gelu,
    "relu": relu,
    "relu_squared": relu_squared,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "swiglu": lambda x: swiglu(*x.chunk(2, -1)),
}


def rotary(input, offset=0, base=10000.0):
    """Rotary position embedding (Su et al. 2021): channels i and i + D/2 of a row at position p turn by
    p base^(-2 i / D).

    Parameters
    ----------
    input : (B, H, T, D) Tensor
        D is even.
    offset : int or (B,) integer array
        The position of each sequence's first row.
    base : float
    """
    x = as_tensor(input)
    if isinstance(offset, np.ndarray) or np.ndim(offset):
        offset = np.array(offset)  # the caller may change it before the backward pass
    return record(
        kernels.rotary_forward(x.data, offset=offset, base=base),
        (x,),
        lambda grad: (kernels.rotary_backward(grad, offset=offset, base=base),),
    )


def softmax(input, dim):
    """exp(x) over its sum along dim."""
    return as_tensor(input).softmax(dim)


def log_softmax(input, dim):
    """log(softmax(x)) along dim."""
    return as_tensor(input).log_softmax(dim)


def check_probability(function, p):
    if not isinstance(p, Real) or not 0 <= p <= 1:
        raise InputError(f"{function}: p is {p!r}, it must be a number between 0 and 1")


def dropout(input, p=0.5, training=True):
    """Each element becomes 0 with probability p, the others are divided by 1 - p; no change unless training.

    The mask depends on `manual_seed`, or the Trainer's seed and step, and on the order of calls.
    """
    x = as_tensor(input)
    check_probability("dropout", p)
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0.0
    key = rng.next_key()
    out = kernels.dropout_forward(x.data, p, key)
    return record(out, (x,), lambda grad: (kernels.dropout_backward(grad, p, key),))
