"""Scaled dot-product attention."""

import math

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import attention as _attention
from cllm.kernels import threads


def _heads(function, name, x):
    """x (B, H, T, D) with unit stride in D (copied when it has none)."""
    if x.ndim != 4:
        raise ValueError(f"{function}: {name} is {x.shape}, it must be (B, H, T, D)")
    size = x.itemsize
    if (x.strides[3] != size and x.shape[3] > 1) or not x.flags.aligned or any(s % size for s in x.strides):
        return np.array(x, order="C")
    return x


def _scale(function, scale, head_size, dtype):
    """The factor of the scores, 1/sqrt(head size) when None."""
    if scale is None:
        return max(head_size, 1) ** -0.5
    (scale,) = checks.real(function, scale=scale)
    checks.finite(function, "scale", scale, dtype)
    return scale


def _check_attention_dropout(function, dropout_p, key):
    checks.real(function, dropout_p=dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{function}: dropout_p is {dropout_p}, it must be in [0, 1)")
    checks.key(function, key)


def _attention_inputs(function, scale, dropout_p, key, mask, slopes, offsets, **arrays):
    """The arrays as heads of one dtype and fitting shapes, and the rest as the loops take it."""
    dtype = checks.as_array(function, "q", arrays["q"]).dtype
    heads = []
    for name, x in arrays.items():
        x = checks.as_array(function, name, x)
        if x.dtype not in checks.FLOATS:
            raise TypeError(f"{function}: {name} is {checks.kind_of(x)}, it must be float32 or float64")
        if x.dtype != dtype:
            raise TypeError(f"{function}: {name} is {x.dtype} but q is {dtype}; all must have one dtype")
        heads.append(_heads(function, name, x))
    shapes = {name: x.shape for name, x in zip(arrays, heads)}
    q, k, v = shapes["q"], shapes["k"], shapes["v"]
    result = (*q[:3], v[3])
    wanted = {"k": (q[0], k[1], k[2], q[3]), "v": (*k[:3], v[3]), "out": result, "dout": result}
    for name, shape in shapes.items():
        if name != "q" and shape != wanted[name]:
            raise ValueError(
                f"{function}: {name} is {shape}, it must be {wanted[name]}, since q is {q} and k is {k}"
            )
    if q[1] != k[1] and (not k[1] or q[1] % k[1]):
        raise ValueError(f"{function}: k has {k[1]} heads, they must divide the {q[1]} of q")
    _check_attention_dropout(function, dropout_p, key)
    return (
        heads,
        _scale(function, scale, q[3], dtype),
        _mask(function, mask, (*q[:3], k[2]), dtype),
        _slopes(function, slopes, q[1]),
        _offsets(function, offsets, q[0]),
    )


def _mask(function, mask, shape, dtype):
    """The mask as a view of (B, H, T, S); whole elements apart."""
    if mask is None:
        return None
    mask = checks.as_array(function, "mask", mask)
    if mask.dtype != bool and mask.dtype != dtype:
        raise TypeError(f"{function}: mask is {checks.kind_of(mask)}, it must be bool or q's {dtype}")
    if not mask.flags.aligned or any(stride % mask.itemsize for stride in mask.strides):
        mask = mask.copy()
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"{function}: mask is {mask.shape}, it must broadcast to {shape}") from None


def _slopes(function, slopes, n_head):
    """The slopes as contiguous, aligned float64."""
    if slopes is None:
        return None
    slopes = checks.as_array(function, "slopes", slopes)
    if slopes.dtype not in checks.FLOATS:
        raise TypeError(f"{function}: slopes is {checks.kind_of(slopes)}, it must be float32 or float64")
    if slopes.shape != (n_head,):
        raise ValueError(f"{function}: slopes is {slopes.shape}, it must be {(n_head,)}, one for each head")
    if not np.isfinite(slopes).all():
        raise ValueError(f"{function}: slopes has {slopes[~np.isfinite(slopes)][0]}, all must be finite")
    return np.require(slopes, np.float64, ["C", "A"])


def _offsets(function, offsets, batch_size):
    """The offsets as contiguous int64."""
    if offsets is None:
        return None
    offsets = checks.integers(function, "offsets", offsets)
    if offsets.shape != (batch_size,):
        raise ValueError(
            f"{function}: offsets is {offsets.shape}, it must be {(batch_size,)}, one for each sequence"
        )
    checks.indices(function, "offsets", offsets, 2**31)
    return offsets


def alibi_slopes(n_head):
    """The slopes of attention with linear biases (Press et al. 2022, "Train short, test long", section 3).

    Parameters
    ----------
    n_head : int
        At least 1.

    Returns
    -------
    (n_head,) float64 array
        2^(-8 h / n_head) for h = 1 to n_head when that is a power of two. Otherwise, as in the authors' code,
        the slopes of the next smaller power of two, then every other one of twice that power.
    """
    n_head = checks.whole("alibi_slopes", "n_head", n_head, 1, math.inf, "at least 1")
    n = 2 ** (n_head.bit_length() - 1)
    slopes = 2.0 ** (-8 / n * np.arange(1, n + 1))
    between = 2.0 ** (-4 / n * np.arange(1, 2 * n + 1, 2))
    return np.concatenate([slopes, between[: n_head - n]])


def attention_forward(
    q, k, v, is_causal=False, scale=None, out=None, *, dropout_p=0.0, key=0, mask=None, slopes=None,
    offsets=None,
):  # fmt: skip
    """Multi-head scaled dot-product attention, softmax(scale q k^T + bias) v (Vaswani et al. 2017).

    Parameters
    ----------
    q : (B, H, T, D) array
        Any strides; unit stride in D is read in place.
    k : (B, G, S, D) array
        G divides H; query head h uses key head h // (H / G) (Ainslie et al. 2023, grouped-query attention).
    v : (B, G, S, E) array
    is_causal : bool
        Query i sees keys 0..i only (those up to its own position when there are offsets).
    scale : float, optional
        1/sqrt(D) when None.
    out : tuple of arrays, optional
        For out (B, H, T, E) and lse (B, H, T).
    dropout_p : float
        Share of attention weights to drop, in [0, 1).
    key : int
        64 bits that choose the dropout mask.
    mask : array that broadcasts to (B, H, T, S), optional
        Boolean: True lets a query see a key. Of q's dtype: added to the scores; -inf excludes like False.
        Read in place, with any strides. With is_causal, a query sees the keys that both let it see.
    slopes : (H,) array, optional
        ALiBi (Press et al. 2022): slope times the distance of the two positions is subtracted from a score. A
        query beyond the last key counts from there: softmax does not see what all its distances share.
    offsets : (B,) integer array, optional
        Query i of sequence b stands at position offsets[b] + i, key j at j: for the queries that follow on a
        key/value cache. Zeros when None.

    Returns
    -------
    out : (B, H, T, E) array
        0 in the row of a query that sees no key.
    lse : (B, H, T) array
        The log-sum-exp of each row of scores, which the backward pass needs; -inf where no key is seen.

    Raises
    ------
    ValueError
        When shapes do not match, an offset is negative, a slope is not finite, or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64, or the mask is neither boolean nor of q's dtype.

    Notes
    -----
    Memory grows linearly with T and S: the (T, S) matrix is never stored. A NaN or an infinity in a key or
    value does not reach a query that does not see it.
    """
    function = "attention_forward"
    (q, k, v), scale, mask, slopes, offsets = _attention_inputs(
        function, scale, dropout_p, key, mask, slopes, offsets, q=q, k=k, v=v
    )
    shapes = ((*q.shape[:3], v.shape[3]), q.shape[:3])
    inputs = (q, k, v, mask, slopes, offsets)
    out, lse = checks.results(function, out, ("out", "lse"), shapes, q.dtype, inputs)
    if not k.shape[2]:
        out[...] = 0
        lse[...] = -np.inf
    elif lse.size:
        _attention.attention_forward(
            q, k, v, out, lse, is_causal, scale, dropout_p, key, mask, slopes, offsets, threads.count
        )
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, is_causal=False, scale=None, results=None, *, dropout_p=0.0, key=0, mask=None,
    slopes=None, offsets=None,
):  # fmt: skip
    """Gradients of `attention_forward`; scores are computed again from q, k and lse, block by block.

    Parameters
    ----------
    dout, out : (B, H, T, E) arrays
    q : (B, H, T, D) array
    k : (B, G, S, D) array
    v : (B, G, S, E) array
    lse : (B, H, T) array
    is_causal, scale, dropout_p, key, mask, slopes, offsets
        As in the forward pass.
    results : tuple of three arrays, optional
        Where dq, dk and dv go (`out` names an input here); None entries are allocated.

    Returns
    -------
    dq : (B, H, T, D) array
    dk : (B, G, S, D) array
        The sum over the query heads of a group.
    dv : (B, G, S, E) array

    Raises
    ------
    ValueError, TypeError
        As `attention_forward`.

    References
    ----------
    Dao et al. 2022, "FlashAttention", algorithm 4.
    """
    function = "attention_backward"
    (q, k, v, out, dout), scale, mask, slopes, offsets = _attention_inputs(
        function, scale, dropout_p, key, mask, slopes, offsets, q=q, k=k, v=v, out=out, dout=dout
    )
    (lse,) = checks.floats(function, lse=lse)
    if lse.shape != q.shape[:3] or lse.dtype != q.dtype:
        raise ValueError(f"{function}: lse is {lse.shape} {lse.dtype}, it must be {q.shape[:3]} {q.dtype}")
    inputs = (dout, q, k, v, out, lse, mask, slopes, offsets)
    shapes = (q.shape, k.shape, v.shape)
    dq, dk, dv = checks.results(function, results, ("dq", "dk", "dv"), shapes, q.dtype, inputs)
    if lse.size and k.shape[2]:
        _attention.attention_backward(
            dout, q, k, v, out, lse, dq, dk, dv, is_causal, scale, dropout_p, key, mask, slopes, offsets,
            threads.count,
        )  # fmt: skip
    else:
        for gradient in (dq, dk, dv):
            gradient[...] = 0
    return dq, dk, dv


def _split_heads(x, n_head, n_kv_head):
    """The views q (B, H, T, D), k and v (B, G, T, D) of x (B, T, (H + 2 G) D)."""
    B, T, C = x.shape
    n = n_head + 2 * n_kv_head
    heads = x.reshape(B, T, n, C // n).transpose(0, 2, 1, 3)
    return heads[:, :n_head], heads[:, n_head : n_head + n_kv_head], heads[:, n_head + n_kv_head :]


def _merged_heads(x, n_head):
    """x (B, T, C) seen as (B, H, T, D)."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def _check_packed(function, qkv, n_head, n_kv_head, dropout_p, key):
    """The numbers of heads and of key/value heads, and the head size."""
    n_head = checks.whole(function, "n_head", n_head, 1, math.inf, "at least 1")
    if n_kv_head is None:
        n_kv_head = n_head
    n_kv_head = checks.whole(function, "n_kv_head", n_kv_head, 1, math.inf, "at least 1")
    if n_head % n_kv_head:
        raise ValueError(f"{function}: n_kv_head is {n_kv_head}, it must divide n_head, {n_head}")
    n = n_head + 2 * n_kv_head
    if qkv.ndim != 3 or qkv.shape[2] % n:
        heads = f"{n_head} heads" + (f" and {n_kv_head} key/value heads" if n_kv_head != n_head else "")
        raise ValueError(f"{function}: qkv is {qkv.shape}, it must be (B, T, {n} D) for {heads}")
    _check_attention_dropout(function, dropout_p, key)
    return n_head, n_kv_head, qkv.shape[2] // n


def packed_attention_forward(
    qkv, n_head, out=None, *, n_kv_head=None, is_causal=True, scale=None, dropout_p=0.0, key=0, slopes=None
):
    """Self-attention on queries, keys and values side by side, as one projection leaves them.

    Parameters
    ----------
    qkv : (B, T, (H + 2 G) D) array
        Queries, keys, values; each with the heads side by side.
    n_head : int
        H, the query heads.
    out : tuple of arrays, optional
        For out (B, T, H D) and lse (B, H, T).
    n_kv_head : int, optional
        G, the key/value heads; divides n_head, which it is when None.
    is_causal, scale, dropout_p, key, slopes
        As `attention_forward`.

    Returns
    -------
    out : (B, T, H D) array
    lse : (B, H, T) array
    """
    function = "packed_attention_forward"
    (qkv,) = checks.floats(function, qkv=qkv)
    n_head, n_kv_head, D = _check_packed(function, qkv, n_head, n_kv_head, dropout_p, key)
    slopes = _slopes(function, slopes, n_head)
    scale = _scale(function, scale, D, qkv.dtype)
    B, T, _ = qkv.shape
    shapes = ((B, T, n_head * D), (B, n_head, T))
    out, lse = checks.results(function, out, ("out", "lse"), shapes, qkv.dtype, (qkv, slopes))
    if lse.size:
        q, k, v = _split_heads(qkv, n_head, n_kv_head)
        _attention.attention_forward(
            q, k, v, _merged_heads(out, n_head), lse, is_causal, scale, dropout_p, key, None, slopes, None,
            threads.count,
        )  # fmt: skip
    return out, lse


def packed_attention_backward(
    dout, qkv, out, lse, n_head, *, n_kv_head=None, is_causal=True, scale=None, dropout_p=0.0, key=0,
    slopes=None,
):  # fmt: skip
    """Gradient of `packed_attention_forward` with respect to qkv.

    Parameters
    ----------
    dout, out : (B, T, H D) arrays
    qkv : (B, T, (H + 2 G) D) array
    lse : (B, H, T) array
    n_head, n_kv_head, is_causal, scale, dropout_p, key, slopes
        As in the forward pass.

    Returns
    -------
    (B, T, (H + 2 G) D) array
    """
    function = "packed_attention_backward"
    dout, qkv, out, lse = checks.floats(function, dout=dout, qkv=qkv, out=out, lse=lse)
    n_head, n_kv_head, D = _check_packed(function, qkv, n_head, n_kv_head, dropout_p, key)
    B, T, _ = qkv.shape
    for name, array, shape in (
        ("dout", dout, (B, T, n_head * D)),
        ("out", out, (B, T, n_head * D)),
        ("lse", lse, (B, n_head, T)),
    ):
        if array.shape != shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {shape}")
    slopes = _slopes(function, slopes, n_head)
    scale = _scale(function, scale, D, qkv.dtype)
    dqkv = empty(qkv.shape, qkv.dtype)
    if out.size:
        q, k, v = _split_heads(qkv, n_head, n_kv_head)
        _attention.attention_backward(
            _merged_heads(dout, n_head), q, k, v, _merged_heads(out, n_head), lse,
            *_split_heads(dqkv, n_head, n_kv_head), is_causal, scale, dropout_p, key, None, slopes, None,
            threads.count,
        )  # fmt: skip
    return dqkv
