"""What every function of the door checks before it writes: arrays, `out`, numbers.

It is compiled since each step makes hundreds of these checks: `floats` of three arrays takes 0.3 us, where
Python took 1.3, and `check_out` beside three inputs 0.13, where it took 1.7.
"""
import numbers
import operator

cimport numpy as cnp
from libc.stdint cimport uint64_t

import numpy as np

from cllm._core.pool cimport empty

cnp.import_array()

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in FLOATS}

OPTIONAL = ("bias", "b1", "b2")  # arrays that may be None

cdef int READABLE = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED


def kind_of(array):
    """What a message calls an array of a wrong dtype."""
    return "None" if array.dtype == object and array.ndim == 0 and array[()] is None else str(array.dtype)


cpdef cnp.ndarray as_array(function, name, array):
    """The argument as an array, of a subclass such as np.matrix (2-D in any shape) the plain one."""
    if cnp.PyArray_CheckExact(array):
        return array
    try:
        return np.asarray(array)
    except ValueError:
        raise ValueError(f"{function}: {name} is a ragged list, its rows must have one length") from None


cdef inline int float_type(cnp.ndarray array) noexcept:
    """The type number of an array of float32 or float64, -1 of any other."""
    cdef int number = cnp.PyArray_TYPE(array)
    if (number == cnp.NPY_FLOAT or number == cnp.NPY_DOUBLE) and cnp.PyArray_ISNOTSWAPPED(array):
        return number
    return -1


def floats(function, **arrays):
    """The arrays, C-contiguous, aligned and of one float dtype; None stays None where it is allowed.

    Raises
    ------
    TypeError
        When an array is not float32 or float64, or two of them differ.
    """
    cdef cnp.ndarray array
    cdef int number, first_number = -1
    cdef list result = []
    first = None
    for name, given in arrays.items():
        if given is None and name in OPTIONAL:
            result.append(None)
            continue
        array = as_array(function, name, given)
        number = float_type(array)
        if number < 0:
            raise TypeError(f"{function}: {name} is {kind_of(array)}, it must be float32 or float64")
        if first is None:
            first, first_number, first_dtype = name, number, array.dtype
        elif number != first_number:
            raise TypeError(
                f"{function}: {name} is {array.dtype} but {first} is {first_dtype}; all must have one dtype"
            )
        result.append(array if cnp.PyArray_CHKFLAGS(array, READABLE) else np.array(array, order="C"))
    return result


cdef inline bint is_int64(cnp.ndarray array) noexcept:
    """Whether the array is C-contiguous, aligned int64 in this machine's byte order."""
    return cnp.PyArray_TYPE(array) == cnp.NPY_INT64 and cnp.PyArray_CHKFLAGS(array, READABLE) \
        and cnp.PyArray_ISNOTSWAPPED(array)


def integers(function, name, given):
    """The array as C-contiguous, aligned int64."""
    array = as_array(function, name, given)
    if is_int64(array):
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"{function}: {name} is {kind_of(array)}, it must be an integer array")
    if array.dtype.kind == "u" and array.max(initial=0) >= 2**63:
        raise ValueError(f"{function}: {name} has {array.max()}, it must be below 2**63")
    return np.array(array, np.int64, order="C")


def real(function, **values):
    """The values, which must be real numbers, as a list of floats: NumPy's smaller ones would round."""
    cdef list result = []
    for name, value in values.items():
        if type(value) is not float:
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
    return value if type(value) is int else operator.index(value)


def key(function, key):
    return whole(function, "key", key, 0, 2**64, "in [0, 2**64)")


cdef bint has_shape(cnp.ndarray array, tuple shape) except -1:
    cdef Py_ssize_t i, n = cnp.PyArray_NDIM(array)
    if n != len(shape):
        return False
    for i in range(n):
        if cnp.PyArray_DIM(array, <int>i) != <Py_ssize_t>shape[i]:
            return False
    return True


cdef bint bounds(cnp.ndarray array, char** low, char** high) noexcept:
    """The first byte of an array and the one behind its last; False when it has no elements."""
    cdef int i
    cdef cnp.npy_intp n, reach
    low[0] = high[0] = cnp.PyArray_BYTES(array)
    for i in range(cnp.PyArray_NDIM(array)):
        n = cnp.PyArray_DIM(array, i)
        if n == 0:
            return False
        reach = (n - 1) * cnp.PyArray_STRIDE(array, i)
        if reach > 0:
            high[0] += reach
        else:
            low[0] += reach
    high[0] += cnp.PyArray_ITEMSIZE(array)
    return True


cdef bint fits(out, tuple shape, dtype, inputs) except -1:
    """Whether `check_out` certainly has nothing to say."""
    cdef char* low
    cdef char* high
    cdef char* other_low
    cdef char* other_high
    if not cnp.PyArray_CheckExact(out):
        return False
    cdef cnp.ndarray array = out
    if <object>cnp.PyArray_DESCR(array) is not dtype or not cnp.PyArray_CHKFLAGS(array, cnp.NPY_ARRAY_CARRAY):
        return False
    if not has_shape(array, shape):
        return False
    if bounds(array, &low, &high):
        for other in inputs:
            if other is None:
                continue
            if not cnp.PyArray_Check(other):
                return False
            # what np.may_share_memory compares
            if bounds(other, &other_low, &other_high) and low < other_high and other_low < high:
                return False
    return True


cpdef check_out(function, out, shape, dtype, inputs, name="out"):
    """`out`, which must be able to take a result of this shape and dtype; of a subclass, the plain view."""
    shape = tuple(shape)
    if fits(out, shape, dtype, inputs):
        return out
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{function}: {name} is {type(out).__name__}, it must be a NumPy array")
    if type(out) is not np.ndarray:  # an np.matrix would stay 2-D when it is reshaped
        out = out.view(np.ndarray)
    if out.shape != shape:
        raise ValueError(f"{function}: {name} is {out.shape}, it must be {shape}")
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
    cdef list checked, taken
    cdef Py_ssize_t i
    if out is None and not added:
        return [empty(shape, dtype) for shape in shapes]
    if out is None:
        out = (None,) * len(names)
    elif not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"{function}: out must be a tuple of {len(names)} arrays ({', '.join(names)})")
    for i, array in enumerate(out):
        if array is None and names[i] in added:
            arrays = "arrays" if len(added) > 1 else "an array"
            raise ValueError(f"{function}: accumulate=True needs {arrays} for {' and '.join(added)} in out")
    checked = list(out)
    taken = list(inputs)
    for i, array in enumerate(checked):
        if array is not None:
            if not fits(array, tuple(shapes[i]), dtype, taken):
                place = f"out[{i}] ({names[i]})"
                checked[i] = check_out(function, array, shapes[i], dtype, taken, place)
            taken.append(checked[i])
    for i, array in enumerate(checked):
        if array is None:
            checked[i] = empty(shapes[i], dtype)
    return checked


def require(condition, function, message):
    if not condition:
        raise ValueError(f"{function}: {message}")


cdef bint all_within(cnp.ndarray indices, uint64_t n) noexcept:
    """Whether each of the int64 indices lies in [0, n)."""
    cdef const uint64_t* index = <const uint64_t*>cnp.PyArray_DATA(indices)
    cdef bint wrong = False
    cdef cnp.npy_intp i
    for i in range(cnp.PyArray_SIZE(indices)):
        wrong |= index[i] >= n  # a negative one is above 2**63 here
    return not wrong


def indices(function, name, indices, n, ignore=None):
    """Raise unless each of the indices lies in [0, n) or is `ignore`."""
    if is_int64(indices) and all_within(indices, n):
        return
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


cpdef Py_ssize_t n_rows(cnp.ndarray x) except -1:
    """How many rows x (..., C) has."""
    cdef Py_ssize_t i, n = 1
    for i in range(cnp.PyArray_NDIM(x) - 1):
        n *= cnp.PyArray_DIM(x, <int>i)
    return n


def rows(cnp.ndarray x):
    """x (..., C), C-contiguous, as (n, C)."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    return x if ndim == 2 else (<object>x).reshape(n_rows(x), cnp.PyArray_DIM(x, ndim - 1))
