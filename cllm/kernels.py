"""The one door to the compiled kernels: checks, allocates, picks threads; NumPy arrays in and out.

Inputs are float32 or float64 arrays, not mixed; they may be strided or read-only (copied when needed).
``out=`` takes an array, or a tuple where there are several outputs: each must have the result's shape
and dtype, be C-contiguous and writable, and must not overlap an input unless a docstring allows it.
Nothing is written before all arguments have passed their checks. Results are the same bits at any
thread count. Letters: B batch size, T sequence length, C channels, H heads, D head size, V vocabulary.
"""

import math
import numbers
import os

import numpy as np

from cllm._core.pool import empty
from cllm._kernels import attention as _attention
from cllm._kernels import available as available_isas  # noqa: F401  (for cllm info)
from cllm._kernels import elementwise as _elementwise
from cllm._kernels import embedding as _embedding
from cllm._kernels import gemm as _gemm
from cllm._kernels import isa  # noqa: F401  (the variant in use)
from cllm._kernels import loss as _loss
from cllm._kernels import norm as _norm
from cllm._kernels import optimizers as _optimizers

openmp = _gemm.OPENMP  # whether the kernels were built with threads

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


# Threads ---------------------------------------------------------------------------------------------


def _cores():
    """The cores that this process may use: its affinity mask, limited by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 limit to read
    return cores


_n_threads = _cores()
_forked = False


# With some ten thousand threads a process dies in OpenMP without a word.
MAX_THREADS = 1024


def set_num_threads(n):
    """Set the number of threads that kernels called from this process may use.

    Parameters
    ----------
    n : int
        From 1 to `MAX_THREADS`; a forked child keeps to 1. Results do not depend on it.
    """
    global _n_threads
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= MAX_THREADS:
        raise ValueError(f"set_num_threads: n is {n!r}, it must be an integer from 1 to {MAX_THREADS}")
    _n_threads = 1 if _forked else int(n)


def get_num_threads():
    """The number of threads that kernels use; at first the cores that this process may use."""
    return _n_threads


def _stay_serial():
    """libgomp's pool does not survive a fork, and waiting for it would hang: the child stays serial."""
    global _forked
    _forked = True
    set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stay_serial)


# Checks ----------------------------------------------------------------------------------------------


_OPTIONAL = ("bias", "b1", "b2", "momentum_buffer", "v_max", "grad_avg")  # arguments that may be None


def _kind(array):
    """What a message calls an array of a wrong dtype."""
    return "None" if array.dtype == object and array.ndim == 0 and array[()] is None else str(array.dtype)


def _array(function, name, array):
    """The argument as an array."""
    if type(array) is np.ndarray:
        return array
    try:
        return np.asarray(array)
    except ValueError:
        raise ValueError(f"{function}: {name} is a ragged list, its rows must have one length") from None


def _inputs(function, **arrays):
    """The arrays, C-contiguous, aligned and of one float dtype; None stays None where it is allowed.

    Raises
    ------
    TypeError
        When an array is not float32 or float64, or two of them differ.
    """
    first = None
    result = []
    for name, array in arrays.items():
        if array is None and name in _OPTIONAL:
            result.append(None)
            continue
        array = _array(function, name, array)
        dtype = array.dtype
        if dtype not in _FLOATS:
            raise TypeError(f"{function}: {name} is {_kind(array)}, it must be float32 or float64")
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            raise TypeError(
                f"{function}: {name} is {dtype} but {first[0]} is {first[1]}; all must have one dtype"
            )
        flags = array.flags
        result.append(array if flags.c_contiguous and flags.aligned else np.array(array, order="C"))
    return result


def _integers(function, name, array):
    """The array as C-contiguous, aligned int64."""
    array = _array(function, name, array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name} is {_kind(array)}, it must be an integer array")
    if array.dtype.kind == "u" and array.max(initial=0) >= 2**63:
        raise ValueError(f"{function}: {name} has {array.max()}, it must be below 2**63")
    flags = array.flags
    if array.dtype == np.int64 and flags.c_contiguous and flags.aligned:
        return array
    return np.array(array, np.int64, order="C")


def _check_real(function, **values):
    """Raise unless each value is a real number."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{function}: {name} is {value!r}, it must be a number")


def _check_whole(function, name, value, low, high, allowed):
    """Raise unless the value is an integer in [low, high), which `allowed` says in words."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} is {value!r}, it must be an integer")
    if not low <= value < high:
        raise ValueError(f"{function}: {name} is {value}, it must be {allowed}")


def _check_key(function, key):
    _check_whole(function, "key", key, 0, 2**64, "in [0, 2**64)")


def _check_out(function, out, shape, dtype, inputs, name="out"):
    """Raise unless `out` can take a result of this shape and dtype."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{function}: {name} is {type(out).__name__}, it must be a NumPy array")
    if out.shape != tuple(shape):
        raise ValueError(f"{function}: {name} is {out.shape}, it must be {tuple(shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{function}: {name} is {out.dtype}, it must be {dtype}")
    if not out.flags.c_contiguous:
        raise ValueError(f"{function}: {name} is strided, it must be C-contiguous")
    if not out.flags.aligned:
        raise ValueError(
            f"{function}: {name} is misaligned, its address must be a multiple of {out.itemsize}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{function}: {name} is read-only, it must be writable")
    for array in inputs:
        if array is not None and np.may_share_memory(out, array):
            raise ValueError(
                f"{function}: {name} overlaps an input or another output, it must have its own memory"
            )


def _out(function, out, shape, dtype, inputs, name="out"):
    """`out` after its checks, or a new array from the pool when it is None."""
    if out is None:
        return empty(shape, dtype)
    _check_out(function, out, shape, dtype, inputs, name)
    return out


def _outs(function, out, names, shapes, dtype, inputs, added=()):
    """As `_out` for several results: `out` is None or a tuple with an array or None for each.

    `added` names the results that are added to what `out` holds: these must not be None.
    """
    if out is None:
        out = (None,) * len(names)
    elif not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"{function}: out must be a tuple of {len(names)} arrays ({', '.join(names)})")
    if any(array is None and name in added for name, array in zip(names, out)):
        arrays = "arrays" if len(added) > 1 else "an array"
        raise ValueError(f"{function}: accumulate=True needs {arrays} for {' and '.join(added)} in out")
    for i, array in enumerate(out):
        if array is not None:
            others = [other for other in out[:i] if other is not None]
            _check_out(function, array, shapes[i], dtype, [*inputs, *others], f"out[{i}] ({names[i]})")
    return [empty(shape, dtype) if array is None else array for array, shape in zip(out, shapes)]


def _require(condition, function, message):
    if not condition:
        raise ValueError(f"{function}: {message}")


# Linear and matrix products --------------------------------------------------------------------------


def _rows(x):
    """How many rows x (..., C) has."""
    return math.prod(x.shape[:-1])


def _check_linear(function, x, weight):
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: x is {x.shape}, weight is {weight.shape}; they must be (..., I) and (O, I)"
        )


def linear_forward(x, weight, bias=None, out=None):
    """y = x weight^T + bias.

    Parameters
    ----------
    x : (..., I) array
    weight : (O, I) array
    bias : (O,) array, optional
    out : (..., O) array, optional

    Returns
    -------
    (..., O) array

    Raises
    ------
    ValueError
        When shapes do not match or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    inputs = x, weight, bias = _inputs("linear_forward", x=x, weight=weight, bias=bias)
    _check_linear("linear_forward", x, weight)
    n_out, n_in = weight.shape
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"linear_forward: bias is {bias.shape}, it must be {(n_out,)}")
    out = _out("linear_forward", out, (*x.shape[:-1], n_out), x.dtype, inputs)
    n = _rows(x)
    _gemm.linear_forward(x.reshape(n, n_in), weight, bias, out.reshape(n, n_out), _n_threads)
    return out


def linear_backward(dy, x, weight, *, bias=True, out=None, accumulate=False):
    """Gradients of `linear_forward`: dx = dy weight, dweight = dy^T x, dbias = the sum of dy's rows.

    Parameters
    ----------
    dy : (..., O) array
    x : (..., I) array
    weight : (O, I) array
    bias : bool
        Whether there is a bias; without it dbias is None.
    out : tuple of three arrays, optional
        For dx, dweight and dbias; None entries are allocated.
    accumulate : bool
        Add dweight and dbias to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., I) array
    dweight : (O, I) array
    dbias : (O,) array or None

    Raises
    ------
    ValueError, TypeError
        As `linear_forward`.
    """
    inputs = dy, x, weight = _inputs("linear_backward", dy=dy, x=x, weight=weight)
    _check_linear("linear_backward", x, weight)
    n_out = len(weight)
    if dy.shape != (*x.shape[:-1], n_out):
        raise ValueError(f"linear_backward: dy is {dy.shape}, it must be {(*x.shape[:-1], n_out)}")
    names, shapes = ("dx", "dweight", "dbias"), (x.shape, weight.shape, (n_out,))
    added = () if not accumulate else names[1:] if bias else names[1:2]
    dx, dweight, dbias = _outs("linear_backward", out, names, shapes, x.dtype, inputs, added)
    dbias = dbias if bias else None
    _linear_gradients(dy, x, weight, dx, dweight, dbias, accumulate)
    return dx, dweight, dbias


def _linear_gradients(dy, x, weight, dx, dweight, dbias, accumulate):
    """`linear_backward` on checked arrays; dbias may be None."""
    n_out, n_in = weight.shape
    n = _rows(x)
    dy, x = dy.reshape(n, n_out), x.reshape(n, n_in)
    _gemm.linear_backward_input(dy, weight, dx.reshape(n, n_in), _n_threads)
    _gemm.linear_backward_weight(dy, x, dweight, accumulate, _n_threads)
    if dbias is not None:
        _gemm.column_sums(dy, dbias, accumulate, _n_threads)


def _strided_matrices(x, batch):
    """x (..., M, K) for the batched product: the array (copied when neither stride is 1), where each matrix
    of the broadcast batch starts, and the two strides, counted in elements."""
    size = x.itemsize
    steps = [1 if n == 1 else stride // size for n, stride in zip(x.shape[-2:], x.strides[-2:])]
    if 1 not in steps or min(steps) < 1 or not x.flags.aligned:
        x = np.array(x, order="C")
        steps = [x.shape[-1], 1]
    starts = np.zeros((), np.intp)
    for n, stride in zip(batch, np.broadcast_to(x, (*batch, *x.shape[-2:])).strides):
        starts = np.add.outer(starts, np.arange(n, dtype=np.intp) * (stride // size))
    return x, starts.reshape(-1), steps


def matmul(a, b, out=None):
    """Matrix product over the last two dimensions; the leading ones broadcast.

    Parameters
    ----------
    a : (..., M, K) array
    b : (..., K, N) array
        Transposed views are read in place.
    out : (..., M, N) array, optional

    Returns
    -------
    (..., M, N) array

    Raises
    ------
    ValueError
        When K differs, the leading dimensions do not broadcast or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    a, b = _array("matmul", "a", a), _array("matmul", "b", b)
    if a.dtype not in _FLOATS or a.dtype != b.dtype:
        raise TypeError(f"matmul: a is {_kind(a)}, b is {_kind(b)}; both must be float32 or both float64")
    wrong = f"matmul: a is {a.shape}, b is {b.shape}; they must be (..., M, K) and (..., K, N)"
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(wrong)
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"{wrong}, with leading dimensions that broadcast") from None
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    out = _out("matmul", out, (*batch, M, N), a.dtype, (a, b))
    if out.size == 0:
        return out
    if K == 0:
        out[...] = 0
        return out
    a, a_starts, (ars, acs) = _strided_matrices(a, batch)
    b, b_starts, (brs, bcs) = _strided_matrices(b, batch)
    result = out.reshape(a_starts.size, M, N)
    _gemm.matmul(a, a_starts, ars, acs, b, b_starts, brs, bcs, K, result, _n_threads)
    return out


# Attention -------------------------------------------------------------------------------------------


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
    _check_real(function, scale=scale)
    return float(scale)


def _check_attention_dropout(function, dropout_p, key):
    _check_real(function, dropout_p=dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{function}: dropout_p is {dropout_p}, it must be in [0, 1)")
    _check_key(function, key)


def _attention_inputs(function, scale, dropout_p, key, **arrays):
    """The arrays as heads of one dtype and fitting shapes, and the scale."""
    dtype = _array(function, "q", arrays["q"]).dtype
    heads = []
    for name, x in arrays.items():
        x = _array(function, name, x)
        if x.dtype not in _FLOATS:
            raise TypeError(f"{function}: {name} is {_kind(x)}, it must be float32 or float64")
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
    out, lse = _outs("attention_forward", out, ("out", "lse"), shapes, q.dtype, (q, k, v))
    if lse.size:
        _attention.attention_forward(q, k, v, out, lse, is_causal, scale, dropout_p, key, _n_threads)
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
    (lse,) = _inputs(function, lse=lse)
    if lse.shape != q.shape[:3] or lse.dtype != q.dtype:
        raise ValueError(f"{function}: lse is {lse.shape} {lse.dtype}, it must be {q.shape[:3]} {q.dtype}")
    inputs = (dout, q, k, v, out, lse)
    shapes = (q.shape, k.shape, k.shape)
    dq, dk, dv = _outs(function, results, ("dq", "dk", "dv"), shapes, q.dtype, inputs)
    if lse.size and k.shape[2]:
        _attention.attention_backward(
            dout, q, k, v, out, lse, dq, dk, dv, is_causal, scale, dropout_p, key, _n_threads
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
    _check_whole(function, "n_head", n_head, 1, math.inf, "at least 1")
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
    (qkv,) = _inputs("packed_attention_forward", qkv=qkv)
    _check_packed("packed_attention_forward", qkv, n_head, dropout_p, key)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    scale = _scale("packed_attention_forward", scale, C // n_head)
    out, lse = empty((B, T, C), qkv.dtype), empty((B, n_head, T), qkv.dtype)
    if lse.size:
        q, k, v = _split_heads(qkv, n_head, 3)
        heads = _split_heads(out, n_head)[0]
        _attention.attention_forward(q, k, v, heads, lse, is_causal, scale, dropout_p, key, _n_threads)
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
    dout, qkv, out, lse = _inputs(function, dout=dout, qkv=qkv, out=out, lse=lse)
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
            is_causal, scale, dropout_p, key, _n_threads,
        )  # fmt: skip
    return dqkv


# GELU feed-forward -----------------------------------------------------------------------------------


def _check_feed_forward_shapes(function, x, w1, w2):
    if w1.ndim != 2 or w2.ndim != 2 or len(w1) != w2.shape[1] or x.shape[-1:] != w1.shape[1:]:
        raise ValueError(
            f"{function}: x is {x.shape}, w1 is {w1.shape}, w2 is {w2.shape}; "
            "they must be (..., C), (F, C) and (O, F)"
        )


def feed_forward_forward(x, w1, b1, w2, b2, approximate="tanh"):
    """y = GELU(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, section 3.3, with GELU).

    Parameters
    ----------
    x : (..., C) array
    w1 : (F, C) array
    b1 : (F,) array or None
    w2 : (O, F) array
    b2 : (O,) array or None
    approximate : {"tanh", "none"}
        As `gelu_forward`.

    Returns
    -------
    y : (..., O) array
    pre : (..., F) array
        x w1^T + b1, which the backward pass needs; GELU's output is computed again there.
    """
    function = "feed_forward_forward"
    x, w1, b1, w2, b2 = _inputs(function, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_feed_forward_shapes(function, x, w1, w2)
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{function}: {name} is {bias.shape}, it must be {weight.shape[:1]}")
    pre = linear_forward(x, w1, b1)
    return linear_forward(gelu_forward(pre, approximate), w2, b2), pre


def feed_forward_backward(dy, x, pre, w1, w2, *, approximate="tanh", bias=True, out=None, accumulate=False):
    """Gradients of `feed_forward_forward`.

    Parameters
    ----------
    dy : (..., O) array
    x, pre, w1, w2
        As given to and returned by the forward pass.
    bias : bool
        Whether there are biases; without them db1 and db2 are None.
    out : tuple of five arrays, optional
        For dx, dw1, db1, dw2 and db2; None entries are allocated.
    accumulate : bool
        Add the parameters' gradients to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., C) array
    dw1, db1, dw2, db2 : arrays of the parameters' shapes
    """
    function = "feed_forward_backward"
    inputs = dy, x, pre, w1, w2 = _inputs(function, dy=dy, x=x, pre=pre, w1=w1, w2=w2)
    _check_feed_forward_shapes(function, x, w1, w2)
    for name, array, n in (("dy", dy, len(w2)), ("pre", pre, len(w1))):
        if array.shape != (*x.shape[:-1], n):
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {(*x.shape[:-1], n)}")
    names = ("dx", "dw1", "db1", "dw2", "db2")
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    added = () if not accumulate else names[1:] if bias else names[1::2]
    dx, dw1, db1, dw2, db2 = _outs(function, out, names, shapes, x.dtype, inputs, added)
    if not bias:
        db1 = db2 = None
    hidden, dhidden = gelu_forward(pre, approximate), empty(pre.shape, pre.dtype)
    _linear_gradients(dy, hidden, w2, dhidden, dw2, db2, accumulate)
    dpre = gelu_backward(dhidden, pre, approximate, out=hidden)
    _linear_gradients(dpre, x, w1, dx, dw1, db1, accumulate)
    return dx, dw1, db1, dw2, db2


# GELU ------------------------------------------------------------------------------------------------


def _is_tanh(function, approximate):
    if approximate not in ("tanh", "none"):
        raise ValueError(f'{function}: approximate is {approximate!r}, it must be "tanh" or "none"')
    return approximate == "tanh"


def gelu_forward(x, approximate="tanh", out=None):
    """x Phi(x), with Phi the normal distribution function (Hendrycks & Gimpel 2016).

    Parameters
    ----------
    x : array of any shape
    approximate : {"tanh", "none"}
        "none" computes Phi by erf; "tanh" is their approximation
        0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which GPT-2 uses.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError
        When `approximate` is unknown or `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    tanh = _is_tanh("gelu_forward", approximate)
    inputs = (x,) = _inputs("gelu_forward", x=x)
    out = _out("gelu_forward", out, x.shape, x.dtype, inputs)
    _elementwise.gelu_forward(x, out, tanh, _n_threads)
    return out


def gelu_backward(dy, x, approximate="tanh", out=None):
    """dx = dy times the derivative of `gelu_forward` at x.

    Parameters
    ----------
    dy, x : arrays of one shape
    approximate : {"tanh", "none"}
        As in the forward pass.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape

    Raises
    ------
    ValueError, TypeError
        As `gelu_forward`; also when shapes differ.
    """
    tanh = _is_tanh("gelu_backward", approximate)
    inputs = dy, x = _inputs("gelu_backward", dy=dy, x=x)
    if dy.shape != x.shape:
        raise ValueError(f"gelu_backward: dy is {dy.shape}, x is {x.shape}; they must have one shape")
    out = _out("gelu_backward", out, x.shape, x.dtype, inputs)
    _elementwise.gelu_backward(dy, x, out, tanh, _n_threads)
    return out


# Dropout ---------------------------------------------------------------------------------------------


def _dropout(function, name, x, p, key, out):
    inputs = (x,) = _inputs(function, **{name: x})
    _check_real(function, p=p)
    if not 0 <= p <= 1:
        raise ValueError(f"{function}: p is {p}, it must be in [0, 1]")
    _check_key(function, key)
    out = _out(function, out, x.shape, x.dtype, inputs)
    limit = max(math.ceil((1 - p) * 2**32) - 1, 0)  # the largest hash that keeps an element
    _elementwise.dropout(x, out, key, limit, 1 / (1 - p) if p < 1 else 0.0, _n_threads)
    return out


def dropout_forward(x, p, key, out=None):
    """x with each element made 0 with probability p, the others divided by 1 - p (Srivastava et al. 2014).

    Parameters
    ----------
    x : array of any shape
    p : float
        In [0, 1].
    key : int
        In [0, 2**64). Element i (in C order) is kept when hash(key, i) < (1 - p) 2**32: the same key
        draws the same mask, at any thread count.
    out : array of x's shape, optional

    Returns
    -------
    array of x's shape
        NaN where x is NaN, also where the element is dropped.

    Raises
    ------
    ValueError
        When p or key is out of range or `out` is unsuitable.
    TypeError
        When x is not float32 or float64.
    """
    return _dropout("dropout_forward", "x", x, p, key, out)


def dropout_backward(dy, p, key, out=None):
    """The gradient of `dropout_forward` with the same p and key: dy under the same mask.

    Parameters
    ----------
    dy : array of any shape
    p, key
        As in the forward pass.
    out : array of dy's shape, optional

    Returns
    -------
    array of dy's shape

    Raises
    ------
    ValueError, TypeError
        As `dropout_forward`.
    """
    return _dropout("dropout_backward", "dy", dy, p, key, out)


# Layer norm ------------------------------------------------------------------------------------------


def _check_norm(function, x, weight, bias):
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; they must be (..., C), (C,)")
    if not weight.size:
        raise ValueError(f"{function}: x is {x.shape}, weight is {weight.shape}; C must be at least 1")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{function}: bias is {bias.shape}, it must be {weight.shape}")


def layer_norm_forward(x, weight, bias, eps=1e-5, out=None):
    """y = (x - mean) rstd weight + bias over the last axis (Ba, Kiros & Hinton 2016).

    Parameters
    ----------
    x : (..., C) array
        C is at least 1.
    weight : (C,) array
    bias : (C,) array or None
    eps : float
        Added to the variance (which divides by C); at least 0.
    out : tuple of three arrays, optional
        For y, mean and rstd; None entries are allocated.

    Returns
    -------
    y : (..., C) array
    mean, rstd : (...) arrays
        Each row's mean and 1 / sqrt(variance + eps), which the backward pass needs.

    Raises
    ------
    ValueError
        When shapes do not match, eps is negative or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    function = "layer_norm_forward"
    inputs = x, weight, bias = _inputs(function, x=x, weight=weight, bias=bias)
    _check_norm(function, x, weight, bias)
    _check_real(function, eps=eps)
    if not eps >= 0:
        raise ValueError(f"{function}: eps is {eps}, it must be at least 0")
    shapes = x.shape, x.shape[:-1], x.shape[:-1]
    y, mean, rstd = _outs(function, out, ("y", "mean", "rstd"), shapes, x.dtype, inputs)
    _norm.layer_norm_forward(x, weight, bias, eps, y, mean, rstd, _n_threads)
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd, *, bias=True, out=None, accumulate=False):
    """Gradients of `layer_norm_forward`.

    With n = (x - mean) rstd and g = dy weight, the means over the last axis and the sums over all rows:
    dx = rstd (g - mean(g) - n mean(g n)), dweight = sum(dy n), dbias = sum(dy).

    Parameters
    ----------
    dy, x : (..., C) arrays
    weight : (C,) array
    mean, rstd : (...) arrays
        As the forward pass returned them.
    bias : bool
        Whether there is a bias; without it dbias is None.
    out : tuple of three arrays, optional
        For dx, dweight and dbias; None entries are allocated.
    accumulate : bool
        Add dweight and dbias to the arrays given in `out` instead of assigning.

    Returns
    -------
    dx : (..., C) array
    dweight : (C,) array
    dbias : (C,) array or None

    Raises
    ------
    ValueError, TypeError
        As `layer_norm_forward`.
    """
    function = "layer_norm_backward"
    inputs = dy, x, weight, mean, rstd = _inputs(function, dy=dy, x=x, weight=weight, mean=mean, rstd=rstd)
    _check_norm(function, x, weight, None)
    rows = x.shape[:-1]
    for name, array, shape in (("dy", dy, x.shape), ("mean", mean, rows), ("rstd", rstd, rows)):
        if array.shape != shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {shape}")
    names, shapes = ("dx", "dweight", "dbias"), (x.shape, weight.shape, weight.shape)
    added = () if not accumulate else names[1:] if bias else names[1:2]
    dx, dweight, dbias = _outs(function, out, names, shapes, x.dtype, inputs, added)
    dbias = dbias if bias else None
    partials = empty(_norm.partials_shape(mean.size, weight.size), x.dtype)
    _norm.layer_norm_backward(
        dy, x, weight, mean, rstd, dx, dweight, dbias, partials, accumulate, _n_threads
    )  # fmt: skip
    return dx, dweight, dbias


# Embedding -------------------------------------------------------------------------------------------


def _check_indices(function, name, indices, n, ignore=None):
    """Raise unless each of the indices lies in [0, n) or is `ignore`."""
    if not indices.size or (indices.min() >= 0 and indices.max() < n):
        return
    wrong = (indices < 0) | (indices >= n)
    if ignore is not None:
        wrong &= indices != ignore
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        allowed = f"in [0, {n})" + ("" if ignore is None else f" or ignore_index, {ignore}")
        place = f"{name}[{', '.join(map(str, at))}]" if at else name
        raise ValueError(f"{function}: {place} is {indices[at]}, it must be {allowed}")


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
    tokens = _integers(function, "tokens", tokens)
    (weight,) = _inputs(function, weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight is {weight.shape}, it must be (V, C)")
    _check_indices(function, "tokens", tokens, len(weight))
    out = _out(function, out, (*tokens.shape, weight.shape[1]), weight.dtype, (tokens, weight))
    _embedding.embedding_forward(tokens, weight, out, _n_threads)
    return out


def embedding_backward(dy, tokens, n_rows, out=None, *, accumulate=False):
    """The gradient of `embedding_forward`'s weight: each row of dy added to the row that its token names.

    Parameters
    ----------
    dy : (*tokens.shape, C) array
    tokens : integer array of any shape
        In [0, n_rows).
    n_rows : int
        V.
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
    tokens = _integers(function, "tokens", tokens)
    (dy,) = _inputs(function, dy=dy)
    if dy.ndim != tokens.ndim + 1 or dy.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{function}: dy is {dy.shape}, tokens is {tokens.shape}; they must be (*tokens.shape, C)"
        )
    if accumulate and out is None:
        raise ValueError(f"{function}: accumulate=True needs an array in out")
    _check_whole(function, "n_rows", n_rows, 0, math.inf, "at least 0")
    _check_indices(function, "tokens", tokens, n_rows)
    out = _out(function, out, (n_rows, dy.shape[-1]), dy.dtype, (dy, tokens))
    lists = empty((n_rows + tokens.size,), np.int64)
    _embedding.embedding_backward(dy, tokens, lists, out, accumulate, _n_threads)
    return out


# Softmax cross-entropy -------------------------------------------------------------------------------


def _check_losses(function, logits, targets, ignore_index, label_smoothing):
    shapes = f"{function}: logits is {logits.shape}, targets is {targets.shape}"
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"{shapes}; they must be (N, V), (N,)")
    if not logits.shape[1]:
        raise ValueError(f"{shapes}; V must be at least 1")
    _check_targets(function, targets, logits.shape[1], ignore_index, label_smoothing)


def _check_targets(function, targets, n_classes, ignore_index, label_smoothing):
    _check_real(function, label_smoothing=label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing is {label_smoothing}, it must be in [0, 1]")
    _check_whole(function, "ignore_index", ignore_index, -(2**63), 2**63, "in [-2**63, 2**63)")
    _check_indices(function, "targets", targets, n_classes, ignore_index)


def cross_entropy_forward(logits, targets, *, ignore_index=-100, label_smoothing=0.0, out=None):
    """Softmax cross-entropy of each row, as torch defines it: -log(softmax(logits)[target]).

    With smoothing s: loss = lse - (1 - s) logits[target] - s mean(logits) (Szegedy et al. 2016).

    Parameters
    ----------
    logits : (N, V) array
        V is at least 1.
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    ignore_index : int
        Rows with this target have loss 0 and no gradient.
    label_smoothing : float
        In [0, 1].
    out : tuple of two arrays, optional
        For losses and lse; None entries are allocated.

    Returns
    -------
    losses : (N,) array
        In nats, not averaged.
    lse : (N,) array
        The log of each row's sum of exponentials, which the backward pass needs.

    Raises
    ------
    ValueError
        When a target is out of range (named with its position), shapes do not match, label_smoothing is
        out of range or `out` is unsuitable.
    TypeError
        When targets are not integers or logits are not float32 or float64.
    """
    function = "cross_entropy_forward"
    (logits,) = _inputs(function, logits=logits)
    targets = _integers(function, "targets", targets)
    _check_losses(function, logits, targets, ignore_index, label_smoothing)
    shapes = targets.shape, targets.shape
    losses, lse = _outs(function, out, ("losses", "lse"), shapes, logits.dtype, (logits, targets))
    _loss.cross_entropy_forward(logits, targets, ignore_index, label_smoothing, losses, lse, _n_threads)
    return losses, lse


def cross_entropy_backward(
    dlosses, logits, targets, lse, *, ignore_index=-100, label_smoothing=0.0, out=None
):
    """dlogits = dloss (softmax(logits) - (1 - s) onehot(target) - s / V); 0 in ignored rows.

    Parameters
    ----------
    dlosses, lse : (N,) arrays
        The gradient of each row's loss; lse as the forward pass returned it.
    logits : (N, V) array
    targets : (N,) integer array
    ignore_index, label_smoothing
        As in the forward pass.
    out : (N, V) array, optional
        May be `logits` itself, which is then overwritten.

    Returns
    -------
    (N, V) array

    Raises
    ------
    ValueError, TypeError
        As `cross_entropy_forward`; also when dtypes are mixed.
    """
    function = "cross_entropy_backward"
    in_place = out is not None and out is logits
    dlosses, logits, lse = _inputs(function, dlosses=dlosses, logits=logits, lse=lse)
    targets = _integers(function, "targets", targets)
    _check_losses(function, logits, targets, ignore_index, label_smoothing)
    for name, array in (("dlosses", dlosses), ("lse", lse)):
        if array.shape != targets.shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {targets.shape}")
    inputs = (dlosses, targets, lse) if in_place else (dlosses, targets, lse, logits)
    out = _out(function, out, logits.shape, logits.dtype, inputs)
    _loss.cross_entropy_backward(
        dlosses, logits, targets, lse, ignore_index, label_smoothing, out, _n_threads
    )  # fmt: skip
    return out


# Head and cross-entropy ------------------------------------------------------------------------------

# Logits in memory at a time: 4 M elements (16 MB in float32), but at least 128 rows, since the weight is
# packed again for each chunk.
_CHUNK_ELEMENTS, _CHUNK_ROWS = 1 << 22, 128


def _chunks(n_rows, n_classes):
    """Slices of rows whose logits fit in a chunk."""
    step = max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(n_classes, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _check_head(function, x, weight, targets, ignore_index, label_smoothing):
    _check_linear(function, x, weight)
    if not len(weight):
        raise ValueError(f"{function}: weight is {weight.shape}, V must be at least 1")
    if x.ndim != 2 or targets.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: x is {x.shape}, targets is {targets.shape}; they must be (N, C) and (N,)"
        )
    # all targets, before the first chunk
    _check_targets(function, targets, len(weight), ignore_index, label_smoothing)


def linear_cross_entropy_forward(x, weight, targets, *, ignore_index=-100, label_smoothing=0.0):
    """Softmax cross-entropy of the logits x weight^T, of which only a chunk of rows is in memory at a time.

    Parameters
    ----------
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
        In [0, V), or `ignore_index`.
    ignore_index, label_smoothing
        As `cross_entropy_forward`.

    Returns
    -------
    losses, lse : (N,) arrays
        As `cross_entropy_forward`.
    """
    function = "linear_cross_entropy_forward"
    x, weight = _inputs(function, x=x, weight=weight)
    targets = _integers(function, "targets", targets)
    _check_head(function, x, weight, targets, ignore_index, label_smoothing)
    losses, lse = empty(targets.shape, x.dtype), empty(targets.shape, x.dtype)
    for rows in _chunks(len(x), len(weight)):
        cross_entropy_forward(
            linear_forward(x[rows], weight), targets[rows], ignore_index=ignore_index,
            label_smoothing=label_smoothing, out=(losses[rows], lse[rows]),
        )  # fmt: skip
    return losses, lse


def linear_cross_entropy_backward(
    dlosses, x, weight, targets, lse, *, ignore_index=-100, label_smoothing=0.0, out=None, accumulate=False
):
    """Gradients of `linear_cross_entropy_forward`; each chunk's logits are computed again.

    Parameters
    ----------
    dlosses, lse : (N,) arrays
    x : (N, C) array
    weight : (V, C) array
    targets : (N,) integer array
    ignore_index, label_smoothing
        As in the forward pass.
    out : tuple of two arrays, optional
        For dx and dweight; None entries are allocated.
    accumulate : bool
        Add dweight to the array given in `out` instead of assigning.

    Returns
    -------
    dx : (N, C) array
    dweight : (V, C) array
    """
    function = "linear_cross_entropy_backward"
    inputs = dlosses, x, weight, lse = _inputs(function, dlosses=dlosses, x=x, weight=weight, lse=lse)
    targets = _integers(function, "targets", targets)
    _check_head(function, x, weight, targets, ignore_index, label_smoothing)
    for name, array in (("dlosses", dlosses), ("lse", lse)):
        if array.shape != targets.shape:
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {targets.shape}")
    names, shapes, added = ("dx", "dweight"), (x.shape, weight.shape), ("dweight",) if accumulate else ()
    dx, dweight = _outs(function, out, names, shapes, x.dtype, inputs, added)
    if not len(x) and not accumulate:
        dweight[...] = 0
    for rows in _chunks(len(x), len(weight)):
        logits = linear_forward(x[rows], weight)
        dlogits = cross_entropy_backward(
            dlosses[rows], logits, targets[rows], lse[rows], ignore_index=ignore_index,
            label_smoothing=label_smoothing, out=logits,
        )  # fmt: skip
        _gemm.linear_backward_input(dlogits, weight, dx[rows], _n_threads)
        _gemm.linear_backward_weight(dlogits, x[rows], dweight, accumulate or rows.start > 0, _n_threads)
    return dx, dweight


# Optimizers ------------------------------------------------------------------------------------------


def _updated(function, param, grad, **state):
    """`grad` ready to be read; raises unless `param` and the state arrays can be changed in place."""
    _, grad = _inputs(function, param=param, grad=grad)
    _require(grad.shape == np.shape(param), function, f"grad is {grad.shape}, param is {np.shape(param)}")
    seen = [grad]
    for name, array in {"param": param, **state}.items():
        if array is not None or name not in _OPTIONAL:
            _check_out(function, array, grad.shape, grad.dtype, seen, name)
            seen.append(array)
    return grad


def _check_scalars(function, fractions=(), **values):
    """Raise unless each value is finite and not negative, each of `fractions` below 1, and eps above 0."""
    _check_real(function, **values)
    for name, value in values.items():
        if not 0 <= value < np.inf:  # also catches NaN
            raise ValueError(f"{function}: {name} is {value}, it must be a finite number of at least 0")
        if name in fractions and value >= 1:
            raise ValueError(f"{function}: {name} is {value}, it must be below 1")
        if name == "eps" and value == 0:  # 0 / 0 where a gradient has always been zero
            raise ValueError(f"{function}: eps is {value}, it must be above 0")


def _check_eps(function, eps, dtype):
    """Raise when eps vanishes in the arrays' dtype, which would let 0 / 0 in."""
    tiny = np.finfo(dtype).tiny
    if eps < tiny:
        raise ValueError(f"{function}: eps is {eps}, it must be at least {tiny} in {dtype}")


def sgd_update(
    param, grad, momentum_buffer=None, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
    first=False, maximize=False,
):  # fmt: skip
    """Stochastic gradient descent: one step, in place.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        buffer = g                                         when first
        buffer = momentum * buffer + (1 - dampening) * g   otherwise
        param -= lr * (g + momentum * buffer)              when nesterov
        param -= lr * buffer                               otherwise; lr * g without momentum

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    momentum_buffer : ndarray like `param`, or None when momentum is 0
        Changed. Momenta that decay below the smallest normal number become 0.
    first : bool
        Whether this is the first step: the buffer's contents are then not read.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013, in the form that PyTorch uses.
    """
    _check_scalars("sgd_update", lr=lr, momentum=momentum, weight_decay=weight_decay)
    _check_real("sgd_update", dampening=dampening)
    _require(np.isfinite(dampening), "sgd_update", f"dampening is {dampening}, it must be finite")
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"sgd_update: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    _require(
        not nesterov or (momentum > 0 and dampening == 0),
        "sgd_update", "nesterov needs a momentum above 0 and a dampening of 0",
    )  # fmt: skip
    grad = _updated("sgd_update", param, grad, momentum_buffer=momentum_buffer)
    _optimizers.sgd(
        param, grad, momentum_buffer, -1.0 if maximize else 1.0, lr, weight_decay, momentum, 1 - dampening,
        nesterov, first, _n_threads,
    )  # fmt: skip


def adam_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, v_max=None, maximize=False
):
    """Adam: one step, in place, with weight decay added to the gradient.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        param -= lr * m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    m, v : ndarray like `param`
        Running means of the gradient and of its square, zeros before the first step; changed. Values
        below the smallest normal number become 0.
    step : int
        Which step this is, from 1.
    v_max : ndarray like `param`, optional
        The largest `v` so far (AMSGrad), used in its place; changed.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015. Reddi, Kale and Kumar, "On
    the Convergence of Adam and Beyond", ICLR 2018 (`v_max`).
    """
    _adam("adam_update", param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, False)


def adamw_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, v_max=None,
    maximize=False,
):  # fmt: skip
    """AdamW: one step, in place. As `adam_update`, but the weights decay by themselves: the gradient is
    left alone and ``param *= 1 - lr * weight_decay`` comes first.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    _adam("adamw_update", param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, True)


def _adam(function, param, grad, m, v, step, lr, betas, eps, weight_decay, v_max, maximize, decoupled):
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{function}: betas is {betas!r}, it must be a tuple of two numbers")
    beta1, beta2 = betas
    _check_real(function, step=step)
    _check_scalars(
        function, ("beta1", "beta2"), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
    _require(step >= 1, function, f"step is {step}, it must be at least 1")
    grad = _updated(function, param, grad, m=m, v=v, v_max=v_max)
    _check_eps(function, eps, grad.dtype)
    _optimizers.adam(
        param, grad, m, v, v_max, -1.0 if maximize else 1.0, lr / (1 - beta1**step), beta1, beta2,
        (1 - beta2**step) ** -0.5, eps, 1 - lr * weight_decay if decoupled else 1.0,
        0.0 if decoupled else weight_decay, _n_threads,
    )  # fmt: skip


def rmsprop_update(
    param, grad, v, *, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, momentum_buffer=None,
    grad_avg=None, maximize=False,
):  # fmt: skip
    """RMSprop: one step, in place.

    .. code-block:: text

        g = grad + weight_decay * param                    (-grad when maximize)
        v = alpha * v + (1 - alpha) * g**2
        u = g / (sqrt(v) + eps)
        grad_avg = alpha * grad_avg + (1 - alpha) * g, and v - grad_avg**2 under the root     when given
        u = buffer = momentum * buffer + u                                                    with momentum
        param -= lr * u

    Parameters
    ----------
    param, grad : ndarray of one shape, float32 or float64
        `param` is changed. `grad` may be strided or read-only.
    v : ndarray like `param`
        Running mean of the squared gradient, zeros before the first step; changed.
    momentum_buffer : ndarray like `param`, or None when momentum is 0
        Zeros before the first step; changed.
    grad_avg : ndarray like `param`, optional
        Running mean of the gradient, zeros before the first step: gives the centred form; changed.

    Raises
    ------
    TypeError
        For arrays that are not float32 or float64, or mixed.
    ValueError
        For unequal shapes, a strided, read-only or overlapping array to be changed, a scalar out of range.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5: RMSprop", 2012. Graves, "Generating Sequences With Recurrent
    Neural Networks", 2013 (the centred form).
    """
    function = "rmsprop_update"
    _check_scalars(
        function, ("alpha",), lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    if (momentum_buffer is None) != (momentum == 0):
        raise ValueError(
            f"{function}: momentum is {momentum}, momentum_buffer must be "
            f"{'None' if momentum == 0 else 'an array like param'}"
        )
    grad = _updated(function, param, grad, v=v, momentum_buffer=momentum_buffer, grad_avg=grad_avg)
    _check_eps(function, eps, grad.dtype)
    _optimizers.rmsprop(
        param, grad, v, grad_avg, momentum_buffer, -1.0 if maximize else 1.0, lr, alpha, eps, weight_decay,
        momentum, _n_threads,
    )  # fmt: skip


def gap(a, b):
    """How many elements lie between the end of `a` and the start of `b` in memory, or -1.

    It is -1 unless both are contiguous views of one contiguous array of their dtype, `b` begins less than
    16 elements after `a` ends, and the elements between are zeros. A chain of such neighbours can be
    updated as one array: see `span`.
    """
    return _optimizers.gap(a, b)


def span(first, last):
    """The flat view from the start of `first` to the end of `last`, which a chain of neighbours joins."""
    if first is not last and (first.base is not last.base or not isinstance(first.base, np.ndarray)):
        raise ValueError("span: first and last must be views of one array")
    return _optimizers.span(first, last)


def sum_of_squares(x):
    """The sum of the squares of all elements, added up in float64, as a float.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64

    Raises
    ------
    TypeError
        For another dtype.
    """
    (x,) = _inputs("sum_of_squares", x=x)
    return _optimizers.sum_of_squares(x, _n_threads)


def scale_(x, factor):
    """Multiply all elements by a number, in place.

    Parameters
    ----------
    x : ndarray of any shape, float32 or float64
        Contiguous and writable; changed.
    factor : float

    Raises
    ------
    TypeError, ValueError
        When `x` cannot be changed in place.
    """
    _check_real("scale_", factor=factor)
    (checked,) = _inputs("scale_", x=x)
    _check_out("scale_", x, checked.shape, checked.dtype, (), "x")
    _optimizers.scale(x, factor, _n_threads)
