"""Multi-head attention: self- and cross-attention, grouped heads, positions, a key/value cache."""

import numpy as np

from cllm import functional as F
from cllm import kernels
from cllm.errors import InputError
from cllm.functional.attention import _mask, fused_attention
from cllm.nn.layers import Linear, RMSNorm
from cllm.nn.module import Module
from cllm.tensor import Tensor


class MultiHeadAttention(Module):
    """Multi-head attention (Vaswani et al. 2017) with query, key, value and output projections.

    `c_attn` projects to queries, keys and values side by side, as GPT-2's: weight ((H + 2 G) D, C) with H
    query heads, G key and value heads and head size D = C / H. `c_proj` is the output projection.

    Parameters
    ----------
    config : GPTConfig
        Of it n_embd, n_head, dropout, bias and

        n_kv_head : G; below n_head, each key and value head serves a group of n_head / G query heads
            (Ainslie et al. 2023), a single one all of them (Shazeer 2019).
        qk_norm : RMS norm of each query and key over the head size, with weights `q_norm` and `k_norm` that
            all heads share, before positions (Henry et al. 2020; this form as in Qwen3).
        position : "rotary" turns queries and keys by their position (Su et al. 2021, base `rotary_base`),
            "alibi" lowers scores in proportion to the distance (Press et al. 2022).
        attention : "plain" computes in array code on the tape; otherwise by fused kernels.
    """

    def __init__(self, config):
        super().__init__()
        C, H, G = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.n_head, self.n_kv_head, self.dropout = H, G, config.dropout
        self.plain = config.attention == "plain"
        self.rotary_base = config.rotary_base if config.position == "rotary" else None
        self.slopes = kernels.alibi_slopes(H) if config.position == "alibi" else None
        self.c_attn = Linear(C, (H + 2 * G) * (C // H), bias=config.bias)
        self.c_proj = Linear(C, C, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(C // H, eps=1e-5), RMSNorm(C // H, eps=1e-5)

    def forward(self, x, context=None, attn_mask=None, is_causal=None, need_weights=False, cache=None):
        """Attention of x to itself, or to a context.

        Parameters
        ----------
        x : (B, T, C) Tensor
            Queries come from it; keys and values too, unless there is a context.
        context : (B, S, C) Tensor, optional
            Where keys and values come from. Rotary and ALiBi positions then do not apply: there is no
            distance between places of two sequences.
        attn_mask : array or Tensor that broadcasts to (B, H, T, S), optional
            Boolean: True takes part; a row without any gives zeros. Float: added to the scores.
        is_causal : bool, optional
            Position i sees positions 0..i only, of these what attn_mask leaves. Without a context True
            unless given, with one False.
        need_weights : bool
            Return the attention weights as well.
        cache : LayerCache, optional
            x continues the sequences that it holds. Neither with a context nor with a mask.

        Returns
        -------
        (B, T, C) Tensor
            With need_weights a tuple: it and the weights (B, H, T, S), before dropout.

        Raises
        ------
        InputError
            For a context or a mask that does not fit, and a cache beside them.
        TypeError
            For a mask that is neither boolean nor of floats.
        """
        if cache is not None and (context is not None or attn_mask is not None or is_causal is False):
            raise InputError("attention with a cache is causal, without a context and without attn_mask")
        p = self.dropout if self.training else 0.0
        is_causal = context is None if is_causal is None else bool(is_causal)
        weighed = need_weights or self.plain or self.observed("weights")
        weights = None
        if is_causal and not weighed and all(z is None for z in (context, attn_mask, cache, self.q_norm)):
            y = F.causal_self_attention(
                self.c_attn(x), self.n_head, p, n_kv_head=self.n_kv_head, slopes=self.slopes,
                rotary_base=self.rotary_base,
            )  # fmt: skip
        else:
            q, k, v = self._heads(x, context)
            options = {"is_causal": is_causal, "dropout_p": p}
            if attn_mask is not None:
                options["mask"] = _mask("attention", attn_mask, (*q.shape[:3], k.shape[2]), q.dtype)
            if context is None:
                offsets = None if cache is None else cache.lengths
                if self.rotary_base is not None:
                    first = 0 if cache is None else offsets
                    q, k = F.rotary(q, first, self.rotary_base), F.rotary(k, first, self.rotary_base)
                options |= {"slopes": self.slopes, "offsets": offsets}
            if cache is not None:
                k, v = cache.append(k, v)
            if weighed:
                y, weights = plain_attention(q, k, v, **options)
                self.observe("weights", weights)
            else:
                y = fused_attention(q, k, v, **options)
            B, H, T, D = y.shape
            y = y.transpose(1, 2).reshape(B, T, H * D)
        y = self.c_proj(y)
        if p:
            y = F.dropout(y, p)
        return (y, weights) if need_weights else y

    def _heads(self, x, context):
        """Queries (B, H, T, D) of x, and keys and values (B, G, S, D) of the context or of x."""
        (C, H, G), attn = (self.c_proj.weight.shape[0], self.n_head, self.n_kv_head), self.c_attn
        D = C // H
        if context is None:
            q, k, v = attn(x).split((C, G * D, G * D), -1)
            context = x
        else:
            if len(context.shape) != 3 or context.shape[0] != x.shape[0] or context.shape[2] != C:
                raise InputError(f"context is {context.shape}, it must be ({x.shape[0]}, S, {C})")
            of_q, of_kv = attn.weight.split((C, 2 * G * D))
            bias = (None, None) if attn.bias is None else attn.bias.split((C, 2 * G * D))
            q = F.linear(x, of_q, bias[0])
            k, v = F.linear(context, of_kv, bias[1]).chunk(2, -1)
        B, T, S = x.shape[0], x.shape[1], context.shape[1]
        q, k, v = q.reshape(B, T, H, D), k.reshape(B, S, G, D), v.reshape(B, S, G, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return tuple(part.transpose(1, 2) for part in (q, k, v))


def plain_attention(query, key, value, mask=None, is_causal=False, dropout_p=0.0, slopes=None, offsets=None):
    """softmax(query key^T / sqrt(D)) value on the tape, by array operations: what the fused kernels compute.

    Parameters
    ----------
    query : (B, H, T, D) Tensor
    key, value : (B, G, S, D) Tensors
        G divides H: query head h uses head h // (H / G).
    mask : array or Tensor that broadcasts to (B, H, T, S), optional
        Boolean: True takes part. Float: added to the scores.
    is_causal : bool
        Query i sees the keys up to its own position.
    dropout_p : float
    slopes : (H,) array, optional
        Head h's scores fall by slopes[h] for each position between query and key (Press et al. 2022).
    offsets : (B,) integer array, optional
        The position of each sequence's first query; 0 unless given. Keys start at position 0.

    Returns
    -------
    (B, H, T, D) Tensor, (B, H, T, S) Tensor
        The output, and the attention weights before dropout; a query that sees no key has zeros in both.
    """
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    if H != G:
        key, value = (x.unsqueeze(2).expand(B, G, H // G, S, D).reshape(B, H, S, D) for x in (key, value))
    first = 0 if offsets is None else np.array(offsets)[:, None, None, None]
    distance = first + np.arange(T)[:, None] - np.arange(S)
    seen = distance >= 0 if is_causal else np.ones((T, S), bool)
    scores = (query @ key.transpose(-1, -2)) * D**-0.5
    if slopes is not None:
        scores = scores - (slopes[:, None, None] * np.abs(distance)).astype(scores.dtype)
    if mask is not None:
        values = mask.data if isinstance(mask, Tensor) else mask
        if values.dtype == bool:
            seen = seen & values
        else:
            seen = seen & (values != -np.inf)
            scores = scores + mask
    weights = scores.masked_fill(~seen, -np.inf).softmax(-1)
    blind = ~seen.any(-1, keepdims=True)
    if blind.any():
        weights = weights.masked_fill(blind, 0.0)
    return F.dropout(weights, dropout_p) @ value, weights
