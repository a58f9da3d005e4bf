"""What every function of the door checks before it writes: arrays, `out`, numbers."""

import math
import numbers
import operator

import numpy as np

from cllm._core.pool import empty

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in FLOATS}

OPTIONAL = ("bias", "b1", "b2", "momentum_buffer", "v_max", "grad_avg")  # arguments that may be None


def kind_of(array):
    """What a message calls an array of a wrong dtype."""
    return "None" if array.dtype == object and array.ndim == 0 and array[()] is None else str(array.dtype)


def as_array(function, name, array):
    """The argument as an array, of a subclass such as np.matrix (2-D in any shape) the plain one."""
    if type(array) is np.ndarray:
        return array
    try:
        return np.asarray(array)
    except ValueError:
        raise ValueError(f"{function}: {name} is a ragged list, its rows must have one length") from None


def floats(function, **arrays):
    """The arrays, C-contiguous, aligned and of one float dtype; None stays None where it is allowed.

    Raises
    ------
    TypeError
        When an array is not float32 or float64, or two of them differ.
    """
    first = None
    result = []
    for name, array in arrays.items():
        if array is None and name in OPTIONAL:
            result.append(None)
            continue
        array = as_array(function, name, array)
        dtype = array.dtype
        if dtype not in FLOATS:
            raise TypeError(f"{function}: {name} is {kind_of(array)}, it must be float32 or float64")
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            raise TypeError(
                f"{function}: {name} is {dtype} but {first[0]} is {first[1]}; all must have one dtype"
            )
        flags = array.flags
        result.append(array if flags.c_contiguous and flags.aligned else np.array(array, order="C"))
    return result


def integers(function, name, array):
    """The array as C-contiguous, aligned int64."""
    array = as_array(function, name, array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name} is {kind_of(array)}, it must be an integer array")
    if array.dtype.kind == "u" and array.max(initial=0) >= 2**63:
        raise ValueError(f"{function}: {name} has {array.max()}, it must be below 2**63")
    flags = array.flags
    if array.dtype == np.int64 and flags.c_contiguous and flags.aligned:
        return array
    return np.array(array, np.int64, order="C")


def real(function, **values):
    """The values, which must be real numbers, as a list of floats: NumPy's smaller ones would round."""
    result = []
    for name, value in values.items():
        if value.__class__ is not float:  # 0.05 instead of 0.4 us
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{function}: {name} is {value!r}, it must be a number")
            try:
                value = float(value)
            except OverflowError:
                raise ValueError(f"{function}: {name} is too large for a float") from None
        result.append(value)
    return result


def finite(function, name, value, dtype):
    """Raise unless the float is finite, also in the arrays' dtype."""
    if not abs(value) <= LARGEST[dtype]:
        raise ValueError(f"{function}: {name} is {value}, it must be finite in {dtype}")


def whole(function, name, value, low, high, allowed):
    """The value, an integer in [low, high), which `allowed` says in words, as an int: NumPy's wrap around."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} is {value!r}, it must be an integer")
    if not low <= value < high:
        raise ValueError(f"{function}: {name} is {value}, it must be {allowed}")
    return operator.index(value)


def key(function, key):
    return whole(function, "key", key, 0, 2**64, "in [0, 2**64)")


def check_out(function, out, shape, dtype, inputs, name="out"):
    """`out`, which must be able to take a result of this shape and dtype; of a subclass, the plain view."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{function}: {name} is {type(out).__name__}, it must be a NumPy array")
    if type(out) is not np.ndarray:  # an np.matrix would stay 2-D when it is reshaped
        out = out.view(np.ndarray)
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
    return out


def result(function, out, shape, dtype, inputs, name="out"):
    """`out` after its checks, or a new array from the pool when it is None."""
    return empty(shape, dtype) if out is None else check_out(function, out, shape, dtype, inputs, name)


def results(function, out, names, shapes, dtype, inputs, added=()):
    """As `result` for several results: `out` is None or a tuple with an array or None for each.

    `added` names the results that are added to what `out` holds: these must not be None.
    """
    if out is None:
        out = (None,) * len(names)
    elif not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"{function}: out must be a tuple of {len(names)} arrays ({', '.join(names)})")
    if any(array is None and name in added for name, array in zip(names, out)):
        arrays = "arrays" if len(added) > 1 else "an array"
        raise ValueError(f"{function}: accumulate=True needs {arrays} for {' and '.join(added)} in out")
    out = list(out)
    for i, array in enumerate(out):
        if array is not None:
            others = [other for other in out[:i] if other is not None]
            place = f"out[{i}] ({names[i]})"
            out[i] = check_out(function, array, shapes[i], dtype, [*inputs, *others], place)
    return [empty(shape, dtype) if array is None else array for array, shape in zip(out, shapes)]


def require(condition, function, message):
    if not condition:
        raise ValueError(f"{function}: {message}")



def indices(function, name, indices, n, ignore=None):
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


def n_rows(x):
    """How many rows x (..., C) has."""
    return math.prod(x.shape[:-1])
