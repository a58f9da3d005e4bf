"""Differentiable operations under torch.nn.functional's names, and the fused ones that a GPT runs on.

A fused operation is one forward and one backward kernel with one tape node. It saves its inputs and row
statistics, and its backward kernel writes the gradients of Parameters straight to where they live: the first
one after `zero_grad` assigns, later ones add, and nothing is copied or cleared.
"""

import math
import warnings

import numpy as np

from cllm import kernels, rng
from cllm.tensor import WRITTEN, Parameter, Tensor, _sigmoid, _sum, as_tensor, record, where

__all__ = [
    "binary_cross_entropy_with_logits", "causal_self_attention", "cross_entropy", "dropout", "embedding",
    "feed_forward", "gelu", "huber_loss", "l1_loss", "layer_norm", "linear", "linear_cross_entropy",
    "log_softmax", "mse_loss", "relu", "rms_norm", "scaled_dot_product_attention", "sigmoid", "silu",
    "smooth_l1_loss", "softmax", "softplus", "tanh", "token_position_embedding",
]  # fmt: skip


# Gradients of parameters -----------------------------------------------------------------------------


def _targets(*tensors):
    """Where a kernel writes the gradients of these: an array each, or None to allocate; and whether it adds.

    Only a Parameter's gradient has a place of its own. A kernel adds to all of its targets or to none: where
    only some hold a gradient, the others start from zero.
    """
    arrays, adds = [], []
    for x in tensors:
        array, add = x.grad_target() if isinstance(x, Parameter) and x.requires_grad else (None, False)
        arrays.append(array)
        adds.append(add)
    if True not in adds:
        return arrays, False
    for i, x in enumerate(tensors):
        if not adds[i] and x is not None:
            if arrays[i] is None:
                arrays[i] = np.zeros(x.data.shape, x.data.dtype)
            else:
                arrays[i].fill(0)
    return arrays, True


def _written(tensors, arrays):
    """What a backward function returns for these tensors once the kernel has filled the arrays."""
    results = []
    for x, array in zip(tensors, arrays):
        if x is None:
            continue
        if isinstance(x, Parameter) and x.requires_grad:
            x.grad_written(array)
            results.append(WRITTEN)
        else:
            results.append(array)
    return tuple(results)


def _data(x):
    return None if x is None else x.data


# Elementwise -----------------------------------------------------------------------------------------


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


# Layers ----------------------------------------------------------------------------------------------


def linear(input, weight, bias=None):
    """input weight^T + bias.  input (..., I), weight (O, I), bias (O,) or None -> (..., O)."""
    input = as_tensor(input)
    x, w = input.data, weight.data
    inputs = (input, weight) if bias is None else (input, weight, bias)

    def backward(grad):
        if not weight.requires_grad and (bias is None or not bias.requires_grad):
            return kernels.matmul(grad, w), *(None,) * (len(inputs) - 1)  # frozen
        (dw, db), add = _targets(weight, bias)
        dx, *found = kernels.linear_backward(
            grad, x, w, bias=bias is not None, out=(None, dw, db), accumulate=add
        )
        return dx, *_written((weight, bias), found)

    return record(kernels.linear_forward(x, w, _data(bias)), inputs, backward)


def embedding(input, weight):
    """The rows of weight that an integer array names.  input (...), weight (V, C) -> (..., C)."""
    tokens = np.asarray(input)
    n_rows = weight.data.shape[0]
    out = kernels.embedding_forward(tokens, weight.data)

    def backward(grad):
        (target,), add = _targets(weight)
        dw = kernels.embedding_backward(grad, tokens, n_rows, out=target, accumulate=add)
        return _written((weight,), (dw,))

    return record(out, (weight,), backward)


def token_position_embedding(tokens, token_weight, position_weight):
    """Each token's row plus its position's.

    tokens (..., T), token_weight (V, C), position_weight (P, C) with P >= T -> (..., T, C)
    """
    tokens = np.asarray(tokens)
    n_rows, T = token_weight.data.shape[0], tokens.shape[-1]
    n_positions = position_weight.data.shape[0]
    if n_positions < T:
        raise ValueError(f"token_position_embedding: {T} positions, the table has {n_positions}")
    out = kernels.embedding_forward(tokens, token_weight.data)
    out += position_weight.data[:T]

    def backward(grad):
        (dtoken,), add = _targets(token_weight)
        dtoken = kernels.embedding_backward(grad, tokens, n_rows, out=dtoken, accumulate=add)
        (dposition,), add = _targets(position_weight)
        if dposition is None:
            dposition = np.zeros_like(position_weight.data)
        total = _sum(grad, tuple(range(grad.ndim - 2)))
        if add:
            dposition[:T] += total
        else:
            dposition[:T] = total
            dposition[T:] = 0
        return _written((token_weight, position_weight), (dtoken, dposition))

    return record(out, (token_weight, position_weight), backward)


def _last(function, x, normalized_shape):
    """normalized_shape as a tuple; it must be the last dimensions of x."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{function}: normalized_shape is {shape}, input is {x.shape}")
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
    input = as_tensor(input)
    shape = _last("layer_norm", input, normalized_shape)
    if len(shape) > 1:
        flat = [None if x is None else x.reshape(-1) for x in (weight, bias)]
        lead = input.shape[: -len(shape)]
        return layer_norm(input.reshape(*lead, -1), math.prod(shape), *flat, eps).reshape(input.shape)
    x = input.data
    if weight is None:
        weight = Tensor(np.ones(shape, x.dtype))
    w = weight.data
    out, mean, rstd = kernels.layer_norm_forward(x, w, _data(bias), eps)
    inputs = (input, weight) if bias is None else (input, weight, bias)

    def backward(grad):
        (dw, db), add = _targets(weight, bias)
        dx, *found = kernels.layer_norm_backward(
            grad, x, w, mean, rstd, bias=bias is not None, out=(None, dw, db), accumulate=add
        )
        return dx, *_written((weight, bias), found)

    return record(out, inputs, backward)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions (Zhang & Sennrich 2019).

    eps : float or None
        None is the dtype's machine epsilon.
    """
    x = as_tensor(input)
    shape = _last("rms_norm", x, normalized_shape)
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    y = x * ((x * x).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def feed_forward(input, w1, b1, w2, b2, approximate="tanh"):
    """gelu(input w1^T + b1) w2^T + b2, one operation.

    Parameters
    ----------
    input : (..., C) Tensor
    w1, b1 : (F, C) and (F,) Tensors; b1 may be None
    w2, b2 : (O, F) and (O,) Tensors; b2 may be None
    approximate : {"tanh", "none"}
        GELU's form.
    """
    if (b1 is None) != (b2 is None) or w1 is w2 or (b1 is b2 and b1 is not None):
        return linear(gelu(linear(input, w1, b1), approximate), w2, b2)
    input = as_tensor(input)
    x = input.data
    parameters = (w1, b1, w2, b2)
    out, pre = kernels.feed_forward_forward(x, w1.data, _data(b1), w2.data, _data(b2), approximate)

    def backward(grad):
        targets, add = _targets(*parameters)
        dx, *found = kernels.feed_forward_backward(
            grad, x, pre, w1.data, w2.data, approximate=approximate, bias=b1 is not None,
            out=(None, *targets), accumulate=add,
        )  # fmt: skip
        return dx, *_written(parameters, found)

    return record(out, (input, *(p for p in parameters if p is not None)), backward)


# Attention -------------------------------------------------------------------------------------------


def causal_self_attention(qkv, n_head, dropout_p=0.0):
    """Causal attention of a packed projection: (B, T, 3C) = q | k | v, heads side by side -> (B, T, C)."""
    packed = qkv.data
    key = rng.next_key() if dropout_p > 0 else 0
    out, lse = kernels.packed_attention_forward(packed, n_head, dropout_p=dropout_p, key=key)

    def backward(grad):
        return (
            kernels.packed_attention_backward(grad, packed, out, lse, n_head, dropout_p=dropout_p, key=key),
        )

    return record(out, (qkv,), backward)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(scale query key^T + mask) value (Vaswani et al. 2017).

    Parameters
    ----------
    query : (B, H, T, D) Tensor
    key, value : (B, H, S, D) Tensors
    attn_mask : array or Tensor that broadcasts to (B, H, T, S), optional
        Boolean: True takes part; a row without any gives 0. Float: added to the scores.
    dropout_p : float
        Applied whatever the mode, as in torch.
    is_causal : bool
        Position i sees keys 0..i; not together with attn_mask.
    scale : float, optional
        1 / sqrt(D) unless given.
    enable_gqa : bool
        key and value may have fewer heads, a divisor of H: each serves a group of query heads.

    Returns
    -------
    (B, H, T, D) Tensor
    """
    q, k, v = as_tensor(query), as_tensor(key), as_tensor(value)
    if attn_mask is not None and is_causal:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        k, v = (_repeat_heads(x, q.shape[-3]) for x in (k, v))
    if attn_mask is None and q.ndim == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[-2], q.shape[-1]):
        return _fused_attention(q, k, v, dropout_p, is_causal, scale)
    T, S = q.shape[-2], k.shape[-2]
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = np.tri(T, S, dtype=bool)
    if attn_mask is None:
        weights = scores.softmax(-1)
    elif isinstance(attn_mask, np.ndarray) and attn_mask.dtype == bool:
        weights = scores.masked_fill(~attn_mask, -np.inf).softmax(-1)
        blind = ~attn_mask.any(-1, keepdims=True)
        if blind.any():
            weights = weights.masked_fill(blind, 0.0)
    else:
        weights = (scores + attn_mask).softmax(-1)
    return dropout(weights, dropout_p) @ v


def _repeat_heads(x, n_head):
    """(..., G, S, D) -> (..., n_head, S, D), each head repeated for its group."""
    *lead, G, S, D = x.shape
    if n_head % G:
        raise ValueError(f"scaled_dot_product_attention: {G} key heads do not divide {n_head} query heads")
    return x.unsqueeze(-3).expand(*lead, G, n_head // G, S, D).reshape(*lead, n_head, S, D)


def _fused_attention(query, key, value, dropout_p, is_causal, scale):
    q, k, v = query.data, key.data, value.data
    seed = rng.next_key() if dropout_p > 0 else 0
    out, lse = kernels.attention_forward(q, k, v, is_causal, scale, dropout_p=dropout_p, key=seed)

    def backward(grad):
        return kernels.attention_backward(
            grad, q, k, v, out, lse, is_causal, scale, dropout_p=dropout_p, key=seed
        )

    return record(out, (query, key, value), backward)


# Losses ----------------------------------------------------------------------------------------------


def _check_reduction(function, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{function}: reduction is {reduction!r}, it must be "mean", "sum" or "none"')


def _reduce(function, losses, reduction):
    _check_reduction(function, reduction)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _integer_targets(function, target, shape):
    target = np.asarray(target)
    if target.dtype.kind not in "iu":
        raise TypeError(f"{function}: target is {target.dtype}, it must be an integer array")
    if target.shape != shape:
        raise ValueError(f"{function}: target is {target.shape}, it must be {shape}")
    return target.reshape(-1)


def _reduced_rows(losses, targets, shape, ignore_index, reduction):
    """The rows' losses reduced, and the function from the result's gradient to the rows' gradients."""
    if reduction == "none":
        return losses.reshape(shape), lambda grad: grad.reshape(-1)
    total = losses.sum(dtype=np.float64)
    count = np.count_nonzero(targets != ignore_index) if reduction == "mean" else 1
    with np.errstate(all="ignore"):
        out = np.asarray(total / count, losses.dtype)  # nan without a target, as in torch
    n = losses.shape
    return out, lambda grad: np.full(n, grad / max(count, 1), losses.dtype)


def cross_entropy(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """The negative log-likelihood of target under softmax(input).

    Parameters
    ----------
    input : (N, V), (V,) or (N, V, ...) Tensor
        Logits; the classes lie in dimension 1.
    target : (N,), () or (N, ...) integer array
    weight : (V,) array, optional
        A weight for each class; "mean" divides by the targets' sum of weights.
    ignore_index : int
        Rows with this target have no loss.
    reduction : {"mean", "sum", "none"}
    label_smoothing : float in [0, 1]
        The share of the target distribution that is uniform over the classes.
    """
    _check_reduction("cross_entropy", reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, it must be between 0 and 1")
    x = as_tensor(input)
    if not x.ndim:
        raise ValueError("cross_entropy: input is a single number, it must be (N, V), (V,) or (N, V, ...)")
    V = x.shape[0 if x.ndim == 1 else 1]
    shape = x.shape[:-1] if x.ndim < 3 else (x.shape[0], *x.shape[2:])
    targets = _integer_targets("cross_entropy", target, shape)
    if x.ndim > 2:
        x = x.permute(0, *range(2, x.ndim), 1)
    x = x.reshape(targets.size, V)
    if weight is not None:
        return _weighted_cross_entropy(x, targets, weight, ignore_index, reduction, label_smoothing, shape)
    logits = x.data
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses, lse = kernels.cross_entropy_forward(logits, targets, **options)
    out, rows = _reduced_rows(losses, targets, shape, ignore_index, reduction)

    def backward(grad):
        return (kernels.cross_entropy_backward(rows(grad), logits, targets, lse, **options),)

    return record(out, (x,), backward)


def _weighted_cross_entropy(x, targets, weight, ignore_index, reduction, label_smoothing, shape):
    V = x.shape[1]
    weight = np.asarray(_data(weight) if not isinstance(weight, np.ndarray) else weight, x.dtype)
    if weight.shape != (V,):
        raise ValueError(f"cross_entropy: weight is {weight.shape}, it must be {(V,)}")
    valid = targets != ignore_index
    targets = np.where(valid, targets, 0)
    row_weight = np.where(valid, weight[targets], 0)
    log_p = x.log_softmax(-1)
    losses = log_p.gather(1, targets[:, None]).squeeze(1) * (-(1 - label_smoothing) * row_weight)
    if label_smoothing > 0:
        losses = losses + (log_p * weight).sum(-1) * valid * (-label_smoothing / V)
    if reduction == "mean":
        return losses.sum() / float(row_weight.sum(dtype=np.float64))
    return losses.sum() if reduction == "sum" else losses.reshape(shape)


def linear_cross_entropy(input, weight, target, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """cross_entropy(linear(input, weight), target) in chunks of rows: the logits never exist as a whole.

    Parameters
    ----------
    input : (..., C) Tensor
    weight : (V, C) Tensor
    target : (...) integer array
    ignore_index, reduction, label_smoothing
        As in `cross_entropy`.
    """
    _check_reduction("linear_cross_entropy", reduction)
    input = as_tensor(input)
    shape = input.shape[:-1]
    targets = _integer_targets("linear_cross_entropy", target, shape)
    x, w = input.data.reshape(targets.size, -1), weight.data
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses, lse = kernels.linear_cross_entropy_forward(x, w, targets, **options)
    out, rows = _reduced_rows(losses, targets, shape, ignore_index, reduction)

    def backward(grad):
        (dw,), add = _targets(weight)
        dx, dw = kernels.linear_cross_entropy_backward(
            rows(grad), x, w, targets, lse, out=(None, dw), accumulate=add, **options
        )
        return dx.reshape(*shape, -1), *_written((weight,), (dw,))

    return record(out, (input, weight), backward)


def _difference(function, input, target):
    x = as_tensor(input)
    shape = target.shape if hasattr(target, "shape") else np.shape(target)
    if shape != x.shape:
        warnings.warn(
            f"{function}: input is {x.shape} and target is {shape}; they broadcast, which may not be meant",
            stacklevel=3,
        )
    return x - target


def mse_loss(input, target, reduction="mean"):
    """(input - target)^2."""
    return _reduce("mse_loss", _difference("mse_loss", input, target) ** 2, reduction)


def l1_loss(input, target, reduction="mean"):
    """|input - target|."""
    return _reduce("l1_loss", _difference("l1_loss", input, target).abs(), reduction)


def smooth_l1_loss(input, target, reduction="mean", beta=1.0):
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 from there on (Girshick 2015)."""
    if not beta >= 0:
        raise ValueError(f"smooth_l1_loss: beta is {beta}, it must be at least 0")
    if beta == 0:
        return l1_loss(input, target, reduction)
    d = _difference("smooth_l1_loss", input, target).abs()
    return _reduce("smooth_l1_loss", where(d.data < beta, d * d * (0.5 / beta), d - 0.5 * beta), reduction)


def huber_loss(input, target, reduction="mean", delta=1.0):
    """With d = |input - target|: d^2 / 2 up to delta, delta (d - delta / 2) beyond (Huber 1964)."""
    if not delta > 0:
        raise ValueError(f"huber_loss: delta is {delta}, it must be above 0")
    d = _difference("huber_loss", input, target).abs()
    return _reduce("huber_loss", where(d.data <= delta, d * d * 0.5, (d - 0.5 * delta) * delta), reduction)


def binary_cross_entropy_with_logits(input, target, weight=None, reduction="mean", pos_weight=None):
    """-(pos_weight target log(sigmoid(input)) + (1 - target) log(1 - sigmoid(input))) * weight.

    weight and pos_weight are arrays that broadcast, or None for 1.
    """
    x = as_tensor(input)
    shape = target.shape if hasattr(target, "shape") else np.shape(target)
    if shape != x.shape:
        raise ValueError(f"binary_cross_entropy_with_logits: input is {x.shape}, target is {shape}")
    # log(sigmoid(x)) = -softplus(-x), and log(1 - sigmoid(x)) = -x - softplus(-x)
    positive = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    losses = x * (1 - target) + softplus(-x) * positive
    if weight is not None:
        losses = losses * weight
    return _reduce("binary_cross_entropy_with_logits", losses, reduction)
