"""Rotary position embedding."""

import math
from functools import lru_cache

import numpy as np

from cllm._core import checks
from cllm._core.pool import empty
from cllm._kernels import rotary as _rotary
from cllm.kernels import threads

# Bytes of a table that is kept: each layer of a step asks for the same one. Eight of them are 64 MB at most;
# beyond 16384 positions of 128 float32 channels, computing one again is little beside attention itself.
_KEPT = 1 << 23


@lru_cache(maxsize=8)
def _angles(offsets, T, half, base, dtype):
    """cos and sin of (offset + t) base^(-i / half) as (len(offsets), T, half), rounded from float64."""
    positions = np.add.outer(np.array(offsets, np.float64), np.arange(T, dtype=np.float64))
    angles = np.multiply.outer(positions, base ** (-np.arange(half) / max(half, 1)))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _check_offset(function, offset, B):
    """The positions of the sequences' first elements as a tuple: one for all, or one for each."""
    if isinstance(offset, np.ndarray) and not offset.ndim:
        offset = offset[()]
    if not isinstance(offset, (np.ndarray, list, tuple)):
        checks.whole(function, "offset", offset, 0, 2**31, "in [0, 2**31)")
        return (int(offset),)
    offsets = checks.integers(function, "offset", offset)
    if offsets.shape != (B,):
        raise ValueError(f"{function}: offset is {offsets.shape}, it must be one integer or ({B},)")
    checks.indices(function, "offset", offsets, 2**31)
    found = tuple(offsets.tolist())
    return found[:1] if len(set(found)) == 1 else found


def _in_place(x):
    """Whether x can be read where it is: aligned, of unit stride in D, whole elements between the rows."""
    size = x.itemsize
    whole_steps = not any(stride % size for stride in x.strides)
    return x.flags.aligned and whole_steps and (x.strides[3] == size or x.shape[3] <= 1)


def _overlaps_itself(x):
    """Whether elements of x may lie at one address: a stride is shorter than the part below it."""
    end = 0
    for stride, n in sorted(zip(x.strides, x.shape)):
        if n > 1:
            if stride <= 0 or stride < end:
                return True
            end = stride * n
    return False


def _same_memory(a, b):
    """Whether two arrays of one shape are the same elements."""
    return a.strides == b.strides and a.__array_interface__["data"] == b.__array_interface__["data"]


def _check_out(function, out, x):
    """Raise unless `out` can take the result: x itself, or an array (perhaps strided) with its own memory."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{function}: out is {type(out).__name__}, it must be a NumPy array")
    if out.shape != x.shape:
        raise ValueError(f"{function}: out is {out.shape}, it must be {x.shape}")
    if out.dtype != x.dtype:
        raise TypeError(f"{function}: out is {out.dtype}, it must be {x.dtype}")
    if not out.size:
        return
    if not _in_place(out) or _overlaps_itself(out):
        raise ValueError(
            f"{function}: out must be aligned, of unit stride in D and without repeated elements"
        )
    if not out.flags.writeable:
        raise ValueError(f"{function}: out is read-only, it must be writable")
    if out is not x and np.may_share_memory(out, x) and not _same_memory(out, x):
        raise ValueError(f"{function}: out overlaps the input, it must be the input or have its own memory")


def _rotate(function, name, x, offset, base, out, back):
    x = checks.as_array(function, name, x)
    if x.dtype not in checks.FLOATS:
        raise TypeError(f"{function}: {name} is {checks.kind_of(x)}, it must be float32 or float64")
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"{function}: {name} is {x.shape}, it must be (B, H, T, D) with an even D")
    checks.real(function, base=base)
    if not 0 < base < math.inf:
        raise ValueError(f"{function}: base is {base}, it must be a finite number above 0")
    B, _, T, D = x.shape
    offsets = _check_offset(function, offset, B)
    if out is None:
        out = empty(x.shape, x.dtype)
    else:
        _check_out(function, out, x)
    if not x.size:
        return out
    if not _in_place(x):
        x = np.array(x, order="C")
    angles = _angles if len(offsets) * T * D * x.itemsize <= _KEPT else _angles.__wrapped__
    cosine, sine = angles(offsets, T, D // 2, float(base), x.dtype)
    _rotary.rotary(x, cosine, sine, back, out, threads.count)
    return out


def rotary_forward(x, *, offset=0, base=10000.0, out=None):
    """Rotary position embedding (Su et al. 2021): each pair of channels turned by its position's angle.

    Element i < D/2 and its partner i + D/2 of the row at position p = offset + t become

        x_i cos(a) - x_(i + D/2) sin(a)   and   x_(i + D/2) cos(a) + x_i sin(a),   a = p base^(-2 i / D).

    Parameters
    ----------
    x : (B, H, T, D) array
        D is even. Any strides; unit stride in D is read in place.
    offset : int or (B,) integer array
        Where each sequence's first row stands, in [0, 2**31).
    base : float
        Above 0.
    out : (B, H, T, D) array, optional
        It may be strided but for D, and it may be `x` itself.

    Returns
    -------
    (B, H, T, D) array

    Raises
    ------
    ValueError
        When a shape does not fit, offset or base is out of range, or `out` is unsuitable.
    TypeError
        When x is not float32 or float64, or offset not of integers.

    Notes
    -----
    Angles, their cosines and sines are computed in float64 and rounded once.
    """
    return _rotate("rotary_forward", "x", x, offset, base, out, False)


def rotary_backward(dy, *, offset=0, base=10000.0, out=None):
    """The gradient of `rotary_forward`: dy turned back by the same angles.

    Parameters
    ----------
    dy : (B, H, T, D) array
    offset, base
        As in the forward pass.
    out : (B, H, T, D) array, optional
        As in the forward pass; it may be `dy` itself.

    Returns
    -------
    (B, H, T, D) array

    Raises
    ------
    ValueError, TypeError
        As `rotary_forward`.
    """
    return _rotate("rotary_backward", "dy", dy, offset, base, out, True)
