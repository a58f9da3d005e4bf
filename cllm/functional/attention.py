"""Scaled dot-product attention."""

import math
from copy import copy

import numpy as np

from cllm import kernels, rng
from cllm._core import checks
from cllm._core.pool import empty
from cllm.errors import InputError
from cllm.tensor import Tensor, as_tensor, record


def causal_self_attention(qkv, n_head, dropout_p=0.0, *, n_kv_head=None, slopes=None, rotary_base=None):
    """Causal attention of a packed projection, heads side by side.

    Parameters
    ----------
    qkv : (B, T, (H + 2 G) D) Tensor
        Queries, keys, values.
    n_head : int
        H, the query heads.
    dropout_p : float
        Share of attention weights to drop, in [0, 1).
    n_kv_head : int, optional
        G, the key/value heads; divides n_head, which it is when None.
    slopes : (H,) array, optional
        ALiBi slopes (Press et al. 2022), as `kernels.alibi_slopes` gives them.
    rotary_base : float, optional
        Queries and keys get rotary positions (Su et al. 2021) of this base; D must be even.

    Returns
    -------
    (B, T, H D) Tensor
    """
    packed = qkv.data
    if rotary_base is not None:
        for name, n in (("n_head", n_head), ("n_kv_head", 1 if n_kv_head is None else n_kv_head)):
            checks.whole("causal_self_attention", name, n, 1, math.inf, "at least 1")
        packed = _rotated(packed, n_head, n_head if n_kv_head is None else n_kv_head, rotary_base)
    slopes = copy(slopes)  # the caller may change them before the backward pass
    options = {"n_kv_head": n_kv_head, "dropout_p": dropout_p, "slopes": slopes}
    options["key"] = rng.next_key() if dropout_p > 0 else 0
    out, lse = kernels.packed_attention_forward(packed, n_head, **options)

    def backward(grad):
        dpacked = kernels.packed_attention_backward(grad, packed, out, lse, n_head, **options)
        if rotary_base is not None:
            turned = _heads(dpacked, n_head, n_head if n_kv_head is None else n_kv_head)[0]
            kernels.rotary_backward(turned, base=rotary_base, out=turned)
        return (dpacked,)

    return record(out, (qkv,), backward)


def _heads(packed, n_head, n_kv_head):
    """The views (B, heads, T, D) of queries and keys, and of values."""
    n = n_head + 2 * n_kv_head
    if packed.ndim != 3 or packed.shape[2] % n:
        raise InputError(
            f"causal_self_attention: qkv is {packed.shape}, it must be (B, T, {n} D) for {n_head} heads and "
            f"{n_kv_head} key/value heads"
        )
    B, T, C = packed.shape
    heads = packed.reshape(B, T, n, C // n).transpose(0, 2, 1, 3)
    return heads[:, : n - n_kv_head], heads[:, n - n_kv_head :]


def _rotated(packed, n_head, n_kv_head, base):
    """A copy with queries and keys rotated."""
    result = empty(packed.shape, packed.dtype)
    turned, values = _heads(packed, n_head, n_kv_head)
    turned_result, values_result = _heads(result, n_head, n_kv_head)
    kernels.rotary_forward(turned, base=base, out=turned_result)
    values_result[...] = values
    return result


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(scale query key^T + mask) value (Vaswani et al. 2017), without storing a (T, S) matrix.

    Parameters
    ----------
    query : (..., H, T, D) Tensor
        Two dimensions, (T, D), are enough.
    key : (..., H, S, D) Tensor
    value : (..., H, S, E) Tensor
        Leading dimensions broadcast.
    attn_mask : array or Tensor that broadcasts to (..., H, T, S), optional
        Boolean: True takes part. Float: added to the scores; -inf excludes. A Tensor that requires a gradient
        gets it. A row in which nothing takes part gives 0, and zero gradients.
    dropout_p : float
        In [0, 1); applied whatever the mode, as in torch.
    is_causal : bool
        Position i sees keys 0..i; not together with attn_mask.
    scale : float, optional
        1 / sqrt(D) unless given.
    enable_gqa : bool
        key and value may have fewer heads, a divisor of H: each serves a group of query heads.

    Returns
    -------
    (..., H, T, E) Tensor

    Raises
    ------
    InputError
        When the mask does not broadcast, is given with is_causal, or the heads do not fit.
    TypeError
        When the mask is neither boolean nor of floats, or dtypes are mixed.
    """
    function = "scaled_dot_product_attention"
    q, k, v = as_tensor(query), as_tensor(key), as_tensor(value)
    if attn_mask is not None and is_causal:
        raise InputError(f"{function}: give attn_mask or is_causal, not both")
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim < 2:
            raise InputError(f"{function}: {name} is {x.shape}, it must have at least 2 dimensions")
    ndim = max(q.ndim, k.ndim, v.ndim)
    T, S = q.shape[-2], k.shape[-2]
    q, k, v, lead = _four_dimensions(function, q, k, v, enable_gqa)
    H = q.shape[1]
    shape = (*lead, H)[len(lead) + 3 - ndim :]
    mask = attn_mask
    if mask is not None:
        mask = _mask(function, mask, (*shape, T, S), q.dtype)
        if len(lead) > 1:
            sizes = (*lead, H, T, S)
            mask = mask.expand(sizes) if isinstance(mask, Tensor) else np.broadcast_to(mask, sizes)
            mask = mask.reshape((math.prod(lead), H, T, S))
    out = fused_attention(q, k, v, mask, dropout_p, is_causal, scale)
    return out if out.ndim == ndim else out.reshape(*shape, T, out.shape[-1])


def _four_dimensions(function, q, k, v, enable_gqa):
    """q (N, H, T, D), k (N, G, S, D) and v (N, G, S, E), and the leading dimensions that N stands for."""
    given = f"{function}: query is {q.shape}, key is {k.shape}, value is {v.shape}"
    q, k, v = (x if x.ndim > 2 else x.reshape(1, *x.shape) for x in (q, k, v))
    H, G = q.shape[-3], k.shape[-3]
    if enable_gqa and (not G or H % G or v.shape[-3] != G):
        raise InputError(f"{given}; the heads of key and value differ, or do not divide those of query")
    try:
        if not enable_gqa:
            (G,) = np.broadcast_shapes((G,), (v.shape[-3],))
            (H,) = np.broadcast_shapes((H,), (G,))
        lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        hint = "" if enable_gqa else " (enable_gqa=True lets query heads share a key head)"
        raise InputError(f"{given}; their leading dimensions must broadcast{hint}") from None
    return *(_expanded(x, lead, (n, *x.shape[-2:])) for x, n in ((q, H), (k, G), (v, G))), lead


def _expanded(x, lead, shape):
    """x broadcast to lead + shape, with the leading dimensions made one."""
    if x.shape != (*lead, *shape):
        x = x.expand(*lead, *shape)
    return x if len(lead) == 1 else x.reshape(math.prod(lead), *shape)


def _mask(function, mask, shape, dtype):
    """The mask as a boolean array, an array of the dtype or, where it requires a gradient, such a Tensor."""
    if isinstance(mask, Tensor):
        mask = mask.to(dtype) if mask.requires_grad else mask.data
    else:
        mask = np.asarray(mask)
    if isinstance(mask, np.ndarray) and mask.dtype != bool:
        if mask.dtype.kind != "f":
            raise TypeError(f"{function}: attn_mask is {mask.dtype}, it must be boolean or of floats")
        with np.errstate(over="ignore"):  # beyond float32's range is infinite there
            mask = mask.astype(dtype, copy=False)
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{function}: attn_mask is {mask.shape}, it must broadcast to {shape}")
    return mask


def fused_attention(
    query, key, value, mask=None, dropout_p=0.0, is_causal=False, scale=None, *, slopes=None, offsets=None
):
    """`kernels.attention_forward` on the tape: all that it takes, differentiable also in a float mask.

    Parameters
    ----------
    query : (B, H, T, D) Tensor
    key : (B, G, S, D) Tensor
    value : (B, G, S, E) Tensor
    mask : array, or Tensor, that broadcasts to (B, H, T, S), optional
        The gradient of a Tensor takes array code that does store (B, H, T, S).
    dropout_p, is_causal, scale, slopes, offsets
        As `kernels.attention_forward`.

    Returns
    -------
    (B, H, T, E) Tensor
    """
    q, k, v = query.data, key.data, value.data
    inputs = (query, key, value)
    if isinstance(mask, Tensor):
        mask = mask.expand(*q.shape[:3], k.shape[2])
        inputs, mask = (*inputs, mask), mask.data
    slopes, offsets = copy(slopes), copy(offsets)  # a cache moves its offsets on before the backward pass
    options = {"dropout_p": dropout_p, "mask": mask, "slopes": slopes, "offsets": offsets}
    options["key"] = rng.next_key() if dropout_p > 0 else 0
    out, lse = kernels.attention_forward(q, k, v, is_causal, scale, **options)

    def backward(grad):
        gradients = kernels.attention_backward(grad, q, k, v, out, lse, is_causal, scale, **options)
        if len(inputs) == 4:
            return *gradients, _score_gradient(grad, q, k, v, out, lse, is_causal, scale, **options)
        return gradients

    result = record(out, inputs, backward)
    if result.requires_grad and mask is not None and len(inputs) == 3:
        # The backward pass reads the mask again, and callers refill theirs. Repeats are copied once.
        mask = np.asarray(mask)
        options["mask"] = mask[tuple(slice(None if step else 1) for step in mask.strides)].copy()
    return result


def _score_gradient(dout, q, k, v, out, lse, is_causal, scale, *, dropout_p, key, mask, slopes, offsets):
    """dS = P (dP - dout . out), which is also the gradient of what is added to the scores: (B, H, T, S)."""
    (_, H, T, D), (G, S) = q.shape, k.shape[1:3]
    k, v = (np.repeat(x, H // G, axis=1).swapaxes(-1, -2) for x in (k, v))
    scores = kernels.matmul(q * q.dtype.type(D**-0.5 if scale is None else scale), k) + mask
    first = np.zeros(1, np.int64) if offsets is None else np.asarray(offsets)
    position = np.minimum(np.add.outer(first, np.arange(T)), S - 1)
    distance = np.subtract.outer(position, np.arange(S))[:, None]
    if slopes is not None:
        scores -= (np.reshape(slopes, (-1, 1, 1)) * np.abs(distance)).astype(scores.dtype)
    seen = mask != -np.inf
    if is_causal:
        seen &= distance >= 0
    dp = kernels.matmul(dout, v)
    if dropout_p > 0:
        dp = kernels.dropout_forward(dp, dropout_p, key)
    delta = np.sum(dout * out, axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        return np.where(seen, np.exp(scores - lse[..., None]) * (dp - delta), scores.dtype.type(0))
