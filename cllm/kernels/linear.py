"""Linear layers, matrix products and the feed-forward block."""

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import gemm as _gemm
from cllm.kernels import threads
from cllm.kernels.elementwise import ACTIVATIONS, activate, activate_backward


def check_linear(function, x, weight):
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
    inputs = x, weight, bias = checks.floats("linear_forward", x=x, weight=weight, bias=bias)
    check_linear("linear_forward", x, weight)
    n_out = len(weight)
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"linear_forward: bias is {bias.shape}, it must be {(n_out,)}")
    out = checks.result("linear_forward", out, (*x.shape[:-1], n_out), x.dtype, inputs)
    _gemm.linear_forward(checks.rows(x), weight, bias, checks.rows(out), threads.count)
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
    inputs = dy, x, weight = checks.floats("linear_backward", dy=dy, x=x, weight=weight)
    check_linear("linear_backward", x, weight)
    n_out = len(weight)
    if dy.shape != (*x.shape[:-1], n_out):
        raise ValueError(f"linear_backward: dy is {dy.shape}, it must be {(*x.shape[:-1], n_out)}")
    names, shapes = ("dx", "dweight", "dbias"), (x.shape, weight.shape, (n_out,))
    added = () if not accumulate else names[1:] if bias else names[1:2]
    dx, dweight, dbias = checks.results("linear_backward", out, names, shapes, x.dtype, inputs, added)
    dbias = dbias if bias else None
    _linear_gradients(dy, x, weight, dx, dweight, dbias, accumulate)
    return dx, dweight, dbias


def leading_sums(x, out, accumulate):
    """out (+)= x (..., *out.shape) summed over its leading dimensions; out is contiguous and of x's dtype."""
    (x,) = checks.floats("leading_sums", x=x)
    rows = x.reshape(x.size // max(out.size, 1), out.size)
    _gemm.column_sums(rows, out.reshape(-1), accumulate, threads.count)


def _linear_gradients(dy, x, weight, dx, dweight, dbias, accumulate):
    """`linear_backward` on checked arrays; dbias may be None."""
    dy, x = checks.rows(dy), checks.rows(x)
    _gemm.linear_backward_input(dy, weight, checks.rows(dx), threads.count)
    _gemm.linear_backward_weight(dy, x, dweight, accumulate, threads.count)
    if dbias is not None:
        _gemm.column_sums(dy, dbias, accumulate, threads.count)


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
    a, b = checks.as_array("matmul", "a", a), checks.as_array("matmul", "b", b)
    if a.dtype not in checks.FLOATS or a.dtype != b.dtype:
        kinds = f"a is {checks.kind_of(a)}, b is {checks.kind_of(b)}"
        raise TypeError(f"matmul: {kinds}; both must be float32 or both float64")
    wrong = f"matmul: a is {a.shape}, b is {b.shape}; they must be (..., M, K) and (..., K, N)"
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(wrong)
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(f"{wrong}, with leading dimensions that broadcast") from None
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    out = checks.result("matmul", out, (*batch, M, N), a.dtype, (a, b))
    if out.size == 0:
        return out
    if K == 0:
        out[...] = 0
        return out
    a, a_starts, (ars, acs) = _strided_matrices(a, batch)
    b, b_starts, (brs, bcs) = _strided_matrices(b, batch)
    result = out.reshape(a_starts.size, M, N)
    _gemm.matmul(a, a_starts, ars, acs, b, b_starts, brs, bcs, K, result, threads.count)
    return out


# Feed-forward ----------------------------------------------------------------------------------------


# Elements between the two matrices that are in memory at a time, 4 MB in float32; the backward pass has two
# such arrays. All rows at once took 50 of the 560 MB that training `baby` took. But 256 rows at least, since
# each chunk reads and writes the gradients of both matrices.
HIDDEN_ELEMENTS, HIDDEN_ROWS = 1 << 20, 256


def row_chunks(n_rows, most):
    """Slices of at most `most` rows (at least one), as few and as equal as can be."""
    n_chunks = -(-n_rows // max(most, 1))
    step = -(-n_rows // max(n_chunks, 1))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, max(step, 1))]


def _hidden_rows(w1):
    return max(HIDDEN_ROWS, HIDDEN_ELEMENTS // max(len(w1), 1))


def _check_feed_forward(function, activation, x, w1, w2):
    if activation not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"{function}: activation is {activation!r}, it must be one of {allowed}")
    factor = 2 if activation == "swiglu" else 1
    fits = w1.ndim == 2 and w2.ndim == 2 and len(w1) == factor * w2.shape[1] and x.shape[-1:] == w1.shape[1:]
    if not fits:
        raise ValueError(
            f"{function}: x is {x.shape}, w1 is {w1.shape}, w2 is {w2.shape}; "
            f"they must be (..., C), ({'2 ' if factor == 2 else ''}F, C) and (O, F)"
        )


def feed_forward_forward(x, w1, b1, w2, b2, activation="gelu_tanh", out=None):
    """y = activation(x w1^T + b1) w2^T + b2 (Vaswani et al. 2017, section 3.3).

    Parameters
    ----------
    x : (..., C) array
    w1 : (F, C) array
        (2 F, C) for swiglu: the rows of the gates first, then the others.
    b1 : (F,) array or None
    w2 : (O, F) array
    b2 : (O,) array or None
    activation : str
        One of `ACTIVATIONS`.
    out : tuple of two arrays, optional
        For y and pre; None entries are allocated.

    Returns
    -------
    y : (..., O) array
    pre : (..., F) array, (..., 2 F) for swiglu
        x w1^T + b1, which the backward pass needs; its activation is computed again there.

    Raises
    ------
    ValueError
        When shapes do not match, the activation is unknown or `out` is unsuitable.
    TypeError
        When dtypes are mixed or not float32 or float64.
    """
    function = "feed_forward_forward"
    inputs = x, w1, b1, w2, b2 = checks.floats(function, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_feed_forward(function, activation, x, w1, w2)
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{function}: {name} is {bias.shape}, it must be {weight.shape[:1]}")
    shapes = tuple((*x.shape[:-1], len(weight)) for weight in (w2, w1))
    y, pre = checks.results(function, out, ("y", "pre"), shapes, x.dtype, inputs)
    linear_forward(x, w1, b1, out=pre)
    pre_rows, y_rows = checks.rows(pre), checks.rows(y)
    for rows in row_chunks(len(pre_rows), _hidden_rows(w1)):
        linear_forward(activate(pre_rows[rows], activation), w2, b2, out=y_rows[rows])
    return y, pre


def feed_forward_backward(
    dy, x, pre, w1, w2, *, activation="gelu_tanh", bias=True, out=None, accumulate=False
):
    """Gradients of `feed_forward_forward`.

    Parameters
    ----------
    dy : (..., O) array
    x, pre, w1, w2
        As given to and returned by the forward pass.
    activation : str
        As in the forward pass.
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

    Raises
    ------
    ValueError, TypeError
        As `feed_forward_forward`.
    """
    function = "feed_forward_backward"
    inputs = dy, x, pre, w1, w2 = checks.floats(function, dy=dy, x=x, pre=pre, w1=w1, w2=w2)
    _check_feed_forward(function, activation, x, w1, w2)
    for name, array, n in (("dy", dy, len(w2)), ("pre", pre, len(w1))):
        if array.shape != (*x.shape[:-1], n):
            raise ValueError(f"{function}: {name} is {array.shape}, it must be {(*x.shape[:-1], n)}")
    names = ("dx", "dw1", "db1", "dw2", "db2")
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    added = () if not accumulate else names[1:] if bias else names[1::2]
    dx, dw1, db1, dw2, db2 = checks.results(function, out, names, shapes, x.dtype, inputs, added)
    if not bias:
        db1 = db2 = None
    arrays = [checks.rows(array) for array in (dy, x, pre, dx)]
    for rows in row_chunks(len(arrays[0]), _hidden_rows(w1)) or [slice(0, 0)]:
        parts = [array[rows] for array in arrays]
        _feed_forward_gradients(*parts, w1, w2, dw1, db1, dw2, db2, activation, accumulate)
        accumulate = True
    return dx, dw1, db1, dw2, db2


def _feed_forward_gradients(dy, x, pre, dx, w1, w2, dw1, db1, dw2, db2, activation, accumulate):
    """`feed_forward_backward` of a chunk of rows, on checked arrays; what it allocates ends with it."""
    hidden = activate(pre, activation)
    dhidden = empty(hidden.shape, hidden.dtype)
    _linear_gradients(dy, hidden, w2, dhidden, dw2, db2, accumulate)
    dpre = activate_backward(dhidden, pre, hidden, activation)
    _linear_gradients(dpre, x, w1, dx, dw1, db1, accumulate)
