"""Linear layers, embeddings, norms and the feed-forward block."""

import math

import numpy as np

from cllm import kernels
from cllm.errors import InputError
from cllm.functional.elementwise import ACTIVATIONS
from cllm.functional.gradients import data_of, kept, made_again, targets_of, written
from cllm.kernels.linear import leading_sums
from cllm.tensor import Tensor, as_tensor, record


def _optional(x):
    """x as a Tensor; None stays None."""
    return None if x is None else as_tensor(x)


def linear(input, weight, bias=None):
    """input weight^T + bias.  input (..., I), weight (O, I), bias (O,) or None -> (..., O).

    A weight of shape (I,), with a bias of shape (), gives (...).
    """
    input, weight, bias = as_tensor(input), as_tensor(weight), _optional(bias)
    if weight.ndim == 1 and (bias is None or not bias.ndim):
        if not input.ndim or input.shape[-1] != weight.shape[0]:
            raise InputError(f"linear: input is {input.shape}, weight is {weight.shape}")
        return input @ weight if bias is None else input @ weight + bias
    x, w = kept(input), weight.data
    inputs = (input, weight) if bias is None else (input, weight, bias)
    n_parameters = len(inputs) - 1  # `backward` must not hold on to the inputs: one may be made again

    def backward(grad):
        if not weight.requires_grad and (bias is None or not bias.requires_grad):
            return kernels.matmul(grad, w), *(None,) * n_parameters  # frozen
        (dw, db), add = targets_of(weight, bias)
        dx, *found = kernels.linear_backward(
            grad, x(), w, bias=bias is not None, out=(None, dw, db), accumulate=add
        )
        return dx, *written((weight, bias), found)

    return record(kernels.linear_forward(input.data, w, data_of(bias)), inputs, backward)


def embedding(input, weight):
    """The rows of weight that an integer array names.  input (...), weight (V, C) -> (..., C)."""
    tokens, weight = np.asarray(input), as_tensor(weight)
    out = kernels.embedding_forward(tokens, weight.data)
    n_rows = len(weight.data)

    def backward(grad):
        (target,), add = targets_of(weight)
        dw = kernels.embedding_backward(grad, tokens, n_rows, out=target, accumulate=add)
        return written((weight,), (dw,))

    return record(out, (weight,), backward)


def token_position_embedding(tokens, token_weight, position_weight):
    """Each token's row plus its position's.

    tokens (..., T), token_weight (V, C), position_weight (P, C) with P >= T -> (..., T, C)
    """
    token_weight, position_weight = as_tensor(token_weight), as_tensor(position_weight)
    tokens = np.asarray(tokens)
    out = kernels.embedding_forward(tokens, token_weight.data)
    n_rows, T = len(token_weight.data), tokens.shape[-1] if tokens.ndim else 0
    C, table = out.shape[-1], position_weight.data
    if not tokens.ndim or table.ndim != 2 or table.shape[1] != C or table.dtype != out.dtype:
        raise InputError(
            f"token_position_embedding: tokens are {tokens.shape}, position_weight is {table.shape} "
            f"{table.dtype}; they must be (..., T) and (P, {C}) {out.dtype}"
        )
    if len(table) < T:
        raise InputError(f"token_position_embedding: {T} positions, the table has {len(table)}")
    out += table[:T]

    def backward(grad):
        (dtoken,), add = targets_of(token_weight)
        dtoken = kernels.embedding_backward(grad, tokens, n_rows, out=dtoken, accumulate=add)
        (dposition,), add = targets_of(position_weight)
        if dposition is None:
            dposition = np.zeros_like(position_weight.data)
        leading_sums(grad, dposition[:T], add)
        if not add:
            dposition[T:] = 0
        return written((token_weight, position_weight), (dtoken, dposition))

    return record(out, (token_weight, position_weight), backward)


def _last(function, x, normalized_shape, **parameters):
    """normalized_shape as a tuple; it must be the last dimensions of x, and the parameters' shape."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if not all(isinstance(n, (int, np.integer)) for n in shape):
        raise InputError(f"{function}: normalized_shape is {normalized_shape!r}, it must be of integers")
    if not shape or x.shape[-len(shape) :] != shape:
        raise InputError(f"{function}: normalized_shape is {shape}, input is {x.shape}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != shape:
            raise InputError(f"{function}: {name} is {parameter.shape}, it must be {shape}")
    return shape


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimensions (Ba, Kiros & Hinton 2016).

    Parameters
    ----------
    input : (..., *normalized_shape) Tensor
    normalized_shape : int or tuple of int
    weight, bias : Tensors of normalized_shape, or None
    eps : float
    """
    input, weight, bias = as_tensor(input), _optional(weight), _optional(bias)
    shape = _last("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    if len(shape) > 1:
        flat = [None if x is None else x.reshape(-1) for x in (weight, bias)]
        lead = input.shape[: -len(shape)]
        n = math.prod(shape)
        return layer_norm(input.reshape(*lead, n), n, *flat, eps).reshape(input.shape)
    x = input.data
    if weight is None:
        weight = Tensor(np.ones(shape, x.dtype))
    w, b = weight.data, data_of(bias)
    out, mean, rstd = kernels.layer_norm_forward(x, w, b, eps)
    inputs = (input, weight) if bias is None else (input, weight, bias)

    def backward(grad):
        (dw, db), add = targets_of(weight, bias)
        dx, *found = kernels.layer_norm_backward(
            grad, x, w, mean, rstd, bias=bias is not None, out=(None, dw, db), accumulate=add
        )
        return dx, *written((weight, bias), found)

    return made_again(record(out, inputs, backward), lambda: kernels.layer_norm_forward(x, w, b, eps)[0])


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang & Sennrich 2019).

    Parameters
    ----------
    input : (..., *normalized_shape) Tensor
    normalized_shape : int or tuple of int
    weight : Tensor of normalized_shape, or None
    eps : float or None
        None is the dtype's machine epsilon.
    """
    input, weight = as_tensor(input), _optional(weight)
    shape = _last("rms_norm", input, normalized_shape, weight=weight)
    if len(shape) > 1:
        flat = None if weight is None else weight.reshape(-1)
        lead = input.shape[: -len(shape)]
        n = math.prod(shape)
        return rms_norm(input.reshape(*lead, n), n, flat, eps).reshape(input.shape)
    x, w = input.data, data_of(weight)
    out, rstd = kernels.rms_norm_forward(x, w, eps)

    def backward(grad):
        (target,), add = targets_of(weight)
        dx, dw = kernels.rms_norm_backward(grad, x, w, rstd, out=(None, target), accumulate=add)
        return dx, *written((weight,), (dw,))

    result = record(out, (input,) if weight is None else (input, weight), backward)
    return made_again(result, lambda: kernels.rms_norm_forward(x, w, eps)[0])


def feed_forward(input, w1, b1, w2, b2, activation="gelu_tanh"):
    """activation(input w1^T + b1) w2^T + b2, one operation.

    Parameters
    ----------
    input : (..., C) Tensor
    w1, b1 : (F, C) and (F,) Tensors; b1 may be None
        (2 F, C) and (2 F,) for swiglu, the gates first.
    w2, b2 : (O, F) and (O,) Tensors; b2 may be None
    activation : str
        One of `kernels.ACTIVATIONS`: gelu_tanh, gelu, relu, relu_squared, silu, tanh, sigmoid, swiglu.
    """
    if activation not in kernels.ACTIVATIONS:
        allowed = ", ".join(kernels.ACTIVATIONS)
        raise InputError(f"feed_forward: activation is {activation!r}, it must be one of {allowed}")
    if (b1 is None) != (b2 is None) or w1 is w2 or (b1 is b2 and b1 is not None):
        return linear(ACTIVATIONS[activation](linear(input, w1, b1)), w2, b2)
    input, w1, b1, w2, b2 = as_tensor(input), as_tensor(w1), _optional(b1), as_tensor(w2), _optional(b2)
    x = kept(input)
    parameters = (w1, b1, w2, b2)
    arrays = (input.data, w1.data, data_of(b1), w2.data, data_of(b2))
    out, pre = kernels.feed_forward_forward(*arrays, activation)

    def backward(grad):
        targets, add = targets_of(*parameters)
        dx, *found = kernels.feed_forward_backward(
            grad, x(), pre, w1.data, w2.data, activation=activation, bias=b1 is not None,
            out=(None, *targets), accumulate=add,
        )  # fmt: skip
        return dx, *written(parameters, found)

    return record(out, (input, *(p for p in parameters if p is not None)), backward)
