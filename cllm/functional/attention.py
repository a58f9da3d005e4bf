"""Scaled dot-product attention."""

import math

import numpy as np

from cllm import kernels, rng
from cllm.functional.elementwise import dropout
from cllm.tensor import as_tensor, record


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
