"""What the kernel tests share: the error measure, arrays that are hard to read, threads, bad `out` arrays."""

import numpy as np
import pytest

from cllm import kernels

DTYPES = [np.float32, np.float64]
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}


def values(*shape, dtype=np.float64, seed=0, scale=1.0):
    """Normal random numbers."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def error(result, expected):
    """Norm of the error / norm of the expected array, taken as 1e-3 where it is smaller: it may be 0."""
    expected = np.asarray(expected, np.float64)
    size = max(np.linalg.norm(expected.ravel()), 1e-3)
    return np.linalg.norm((np.asarray(result, np.float64) - expected).ravel()) / size


def assert_close(result, expected, dtype):
    """Shape, dtype and error of a result, or of a tuple of results; None stands for None.

    An element that is off by at most 4 units in the last place of 1 always passes: a result near 0 of
    operands near 1 has no better digits.
    """
    if isinstance(expected, tuple):
        assert len(result) == len(expected)
        for one, other in zip(result, expected):
            assert_close(one, other, dtype)
    elif expected is None:
        assert result is None
    else:
        assert result.dtype == dtype
        assert result.shape == np.shape(expected)
        largest = np.abs(np.asarray(result, np.float64) - expected).max(initial=0)  # NaN fails both
        assert largest <= 4 * np.finfo(dtype).eps or error(result, expected) < TOLERANCE[np.dtype(dtype)]


def assert_torchs(result, theirs, size=0.0, unit=1.0):
    """A result is torch's: to 2e-5 (1e-12 in float64) of its norm or of `size`, the norm of the terms that it
    sums; or each element to 4 units in the last place of `unit`, the size of its operands."""
    theirs = theirs.detach().numpy()
    assert result.shape == theirs.shape
    assert result.dtype == theirs.dtype
    difference = np.asarray(result, np.float64) - theirs
    eps = np.finfo(result.dtype).eps
    tolerance = 2e-5 if result.dtype == np.float32 else 1e-12
    size = max(np.linalg.norm(theirs.astype(np.float64).ravel()), size)
    largest = np.abs(difference).max(initial=0)  # NaN fails both
    assert largest <= 4 * eps * unit or np.linalg.norm(difference.ravel()) <= tolerance * size


def numeric_gradient(function, arrays, i, dout, step=1e-6):
    """d sum(function(*arrays) dout) / d arrays[i] by central differences."""
    gradient = np.empty_like(arrays[i])
    for at in np.ndindex(arrays[i].shape):
        shifted = []
        for sign in (1, -1):
            copies = [array.copy() for array in arrays]
            copies[i][at] += sign * step
            shifted.append(np.sum(function(*copies) * dout))
        gradient[at] = (shifted[0] - shifted[1]) / (2 * step)
    return gradient


def check_gradients(function, backward, *arrays):
    """backward(dout, *arrays) gives the gradient of function(*arrays) for each of the arrays."""
    dout = values(*np.shape(function(*arrays)), seed=99)
    gradients = backward(dout, *arrays)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(arrays)
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == np.float64
        assert gradient.shape == arrays[i].shape
        assert error(gradient, numeric_gradient(function, arrays, i, dout)) < 1e-8


def same_bits(a, b):
    """Whether two arrays, or tuples of arrays, hold the same bytes."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def with_threads(n, function):
    """function() with n threads."""
    before = kernels.get_num_threads()
    kernels.set_num_threads(n)
    try:
        return function()
    finally:
        kernels.set_num_threads(before)


def assert_same_at_any_thread_count(function):
    one = with_threads(1, function)
    for n in (2, 3):
        assert same_bits(with_threads(n, function), one)


def strided(x):
    """x with gaps between its elements."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), 7, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def assert_reads_any_array(function, *arrays):
    """The same bits from plain, read-only, misaligned and strided inputs; the inputs stay as they were."""
    expected = function(*arrays)
    assert same_bits(function(*[read_only(x) for x in arrays]), expected)
    assert same_bits(function(*[misaligned(x) for x in arrays]), expected)
    views = [strided(x) for x in arrays]
    assert same_bits(function(*views), expected)
    for view, x in zip(views, arrays):
        assert np.array_equal(view, x)


def assert_refuses(kind, message, function, *arguments, **options):
    """function(...) raises this kind of error with exactly this message."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert str(caught.value) == message


def assert_refuses_bad_out(call, good, overlapping):
    """call(out=) writes to a good array and refuses each kind of bad one, which it leaves alone.

    good: an array of the result's shape and dtype; overlapping: one that shares memory with an input.
    """
    good = np.zeros_like(good)
    assert call(good) is good
    wide = np.zeros((*good.shape[:-1], 2 * good.shape[-1]), good.dtype)
    frozen = np.zeros_like(good)
    frozen.flags.writeable = False
    other = np.float64 if good.dtype == np.float32 else np.float32
    cases = [
        (wide[..., ::2], ValueError, "is strided, it must be C-contiguous"),
        (misaligned(good), ValueError, "is misaligned, its address must be a multiple of"),
        (frozen, ValueError, "is read-only, it must be writable"),
        (overlapping, ValueError, "overlaps an input"),
        (np.zeros((*good.shape, 1), good.dtype), ValueError, "it must be"),
        (np.zeros(good.shape, other), TypeError, "it must be"),
        (good.tolist(), TypeError, "it must be a NumPy array"),
    ]
    for out, kind, message in cases:
        before = np.array(out)
        with pytest.raises(kind, match=message):
            call(out)
        assert np.array_equal(before, np.array(out))


def misaligned(x):
    """x at an address that is no multiple of its item size."""
    y = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y
