"""Scaled dot-product attention."""

import math

import numpy as np

from cllm._core.pool import empty
from cllm._kernels import attention as _attention
from cllm.kernels import checks, threads


def _heads(function, name, x):
    """x (B, H, T, D) with unit stride in D (copied when it has none)."""
    if x.ndim != 4:
        raise ValueError(f"{function}: {name} is {x.shape}, it must be (B, H, T, D)")
    size = x.itemsize
    if (x.strides[3] != size and x.shape[3] > 1) or not x.flags.aligned or any(s % size for s in x.strides):
        return np.array(x, order="C")
    return x


def _scale(function, scale, head_size):
    """The factor of the scores, 1/sqrt(head size) when None."""
    if scale is None:
        return max(head_size, 1) ** -0.5
    checks.real(function, scale=scale)
    return float(scale)


def _check_attention_dropout(function, dropout_p, key):
    checks.real(function, dropout_p=dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{function}: dropout_p is {dropout_p}, it must be in [0, 1)")
    checks.key(function, key)


def _attention_inputs(function, scale, dropout_p, key, **arrays):
    """The arrays as heads of one dtype and fitting shapes, and the scale."""
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
    q, k = shapes["q"], shapes["k"]
    wanted = {"k": (q[0], q[1], k[2], q[3]), "v": k, "out": q, "dout": q}
    for name, shape in shapes.items():
        if name != "q" and shape != wanted[name]:
            raise ValueError(
                f"{function}: {name} is {shape}, it must be {wanted[name]}, since q is {q} and k is {k}"
            )
    _check_attention_dropout(function, dropout_p, key)
    return [*heads, _scale(function, scale, q[3])]


def attention_forward(q, k, v, is_causal=False, scale=None, out=None, *, dropout_p=0.0, key=0):
    """Multi-head scaled dot-product attention, softmax(scale q k^T) v (Vaswani et al. 2017, equation 1).

    Parameters
    ----------
    q : (B, H, T, D) array
        Any strides; unit stride in D is read in place.
    k, v : (B, H, S, D) arrays
    is_causal : bool
        Query i sees keys 0..i only.
    scale : float, optional
        1/sqrt(D) when None.
    out : tuple of arrays, optional
        For out (B, H, T, D) and lse (B, H, T).
    dropout_p : float
        Share of attention weights to drop, in [0, 1).
    key : int
        64 bits that choose the dropout mask.

    Returns
    -------
    out : (B, H, T, D) array
    lse : (B, H, T) array
        The log-sum-exp of each row of scores, which the backward pass needs.

    Raises
    ------
    ValueError
        When shapes do not match, there are no keys, or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.

    Notes
    -----
    Memory grows linearly with T and S: the (T, S) matrix is never stored.
    """
    q, k, v, scale = _attention_inputs("attention_forward", scale, dropout_p, key, q=q, k=k, v=v)
    if k.shape[2] == 0 and math.prod(q.shape[:3]):
        raise ValueError(f"attention_forward: k is {k.shape}, it must have at least one key")
    shapes = (q.shape, q.shape[:3])
    out, lse = checks.results("attention_forward", out, ("out", "lse"), shapes, q.dtype, (q, k, v))
    if lse.size:
        _attention.attention_forward(q, k, v, out, lse, is_causal, scale, dropout_p, key, threads.count)
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, is_causal=False, scale=None, results=None, *, dropout_p=0.0, key=0
):
    """Gradients of `attention_forward`; scores are computed again from q, k and lse, block by block.

    Parameters
    ----------
    dout, q, out : (B, H, T, D) arrays
    k, v : (B, H, S, D) arrays
    lse : (B, H, T) array
    is_causal, scale, dropout_p, key
        As in the forward pass.
    results : tuple of three arrays, optional
        Where dq, dk and dv go (`out` names an input here); None entries are allocated.

    Returns
    -------
    dq : (B, H, T, D) array
    dk, dv : (B, H, S, D) arrays

    Raises
    ------
    ValueError, TypeError
        As `attention_forward`.

    References
    ----------
    Dao et al. 2022, "FlashAttention", algorithm 4.
    """
    function = "attention_backward"
    q, k, v, out, dout, scale = _attention_inputs(
        function, scale, dropout_p, key, q=q, k=k, v=v, out=out, dout=dout
    )
    (lse,) = checks.floats(function, lse=lse)
    if lse.shape != q.shape[:3] or lse.dtype != q.dtype:
        raise ValueError(f"{function}: lse is {lse.shape} {lse.dtype}, it must be {q.shape[:3]} {q.dtype}")
    inputs = (dout, q, k, v, out, lse)
    shapes = (q.shape, k.shape, k.shape)
    dq, dk, dv = checks.results(function, results, ("dq", "dk", "dv"), shapes, q.dtype, inputs)
    if lse.size and k.shape[2]:
        _attention.attention_backward(
            dout, q, k, v, out, lse, dq, dk, dv, is_causal, scale, dropout_p, key, threads.count
        )
    else:
        for gradient in (dq, dk, dv):
            gradient[...] = 0
    return dq, dk, dv


def _split_heads(x, n_head, parts=1):
    """The `parts` views (B, H, T, D) of x (B, T, parts * H * D)."""
    B, T, C = x.shape
    return x.reshape(B, T, parts, n_head, C // parts // n_head).transpose(2, 0, 3, 1, 4)


def _check_packed(function, qkv, n_head, dropout_p, key):
    checks.whole(function, "n_head", n_head, 1, math.inf, "at least 1")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"{function}: qkv is {qkv.shape}, it must be (B, T, 3 C) with C divisible by {n_head} heads"
        )
    _check_attention_dropout(function, dropout_p, key)


def packed_attention_forward(qkv, n_head, *, is_causal=True, scale=None, dropout_p=0.0, key=0):
    """Self-attention on queries, keys and values side by side, as one projection leaves them.

    Parameters
    ----------
    qkv : (B, T, 3 C) array
        Queries, keys, values; each with the heads side by side.
    n_head : int
        Heads; C must be divisible by it.
    is_causal, scale, dropout_p, key
        As `attention_forward`.

    Returns
    -------
    out : (B, T, C) array
    lse : (B, H, T) array
    """
    (qkv,) = checks.floats("packed_attention_forward", qkv=qkv)
    _check_packed("packed_attention_forward", qkv, n_head, dropout_p, key)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    scale = _scale("packed_attention_forward", scale, C // n_head)
    out, lse = empty((B, T, C), qkv.dtype), empty((B, n_head, T), qkv.dtype)
    if lse.size:
        q, k, v = _split_heads(qkv, n_head, 3)
        heads = _split_heads(out, n_head)[0]
        _attention.attention_forward(q, k, v, heads, lse, is_causal, scale, dropout_p, key, threads.count)
    return out, lse


def packed_attention_backward(
    dout, qkv, out, lse, n_head, *, is_causal=True, scale=None, dropout_p=0.0, key=0
):
    """Gradient of `packed_attention_forward` with respect to qkv.

    Parameters
    ----------
    dout, out : (B, T, C) arrays
    qkv : (B, T, 3 C) array
    lse : (B, H, T) array
    n_head, is_causal, scale, dropout_p, key
        As in the forward pass.

    Returns
    -------
    (B, T, 3 C) array
    """
    function = "packed_attention_backward"
    dout, qkv, out, lse = checks.floats(function, dout=dout, qkv=qkv, out=out, lse=lse)
    _check_packed(function, qkv, n_head, dropout_p, key)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    for name, array, shape in (
        ("dout", dout, (B, T, C)),
        ("out", out, (B, T, C)),
        ("lse", lse, (B, n_head, T)),
    ):
        if array.shape != shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {shape}")
    scale = _scale(function, scale, C // n_head)
    dqkv = empty(qkv.shape, qkv.dtype)
    if out.size:
        q, k, v = _split_heads(qkv, n_head, 3)
        dq, dk, dv = _split_heads(dqkv, n_head, 3)
        _attention.attention_backward(
            _split_heads(dout, n_head)[0], q, k, v, _split_heads(out, n_head)[0], lse, dq, dk, dv,
            is_causal, scale, dropout_p, key, threads.count,
        )  # fmt: skip
    return dqkv
