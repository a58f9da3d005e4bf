"""The pool of aligned buffers."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from kernel_checks import assert_refuses

from cllm import kernels
from cllm._core import pool

SHAPES = [(), (0,), (1,), (3, 0, 2), (17,), (1000, 7), (1 << 20,), (1,) * 64]


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float32", "float64", "complex128"])
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_are_as_asked_for_and_aligned(shape, dtype):
    for array in (pool.empty(shape, dtype), pool.empty_like(np.zeros(shape, dtype).T)):
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert address(array) % 64 == 0
    assert pool.empty(shape, dtype).shape == shape


def test_a_buffer_is_used_again_when_its_last_view_dies():
    array = pool.empty((1000, 30))
    array[...] = 7
    first, view = address(array), array[5::2, :3].T
    live, idle = pool.usage()
    del array
    assert pool.usage() == (live, idle)
    others = [pool.empty((1000, 30)) for _ in range(3)]
    for other in others:
        other[...] = 9
    assert first not in map(address, others)
    assert (view == 7).all()
    del others
    live, idle = pool.usage()
    del view
    freed = pool.usage()[1] - idle
    assert 1000 * 30 * 4 <= freed <= 1000 * 30 * 4 * 1.125
    assert pool.usage()[0] == live - freed
    assert address(pool.empty((30, 999))) == first  # of the same size class


def test_a_large_array_takes_an_idle_buffer_of_up_to_half_more():
    pool.trim()
    large = pool.empty((3 << 20,), "uint8")
    first = address(large)
    del large
    live, idle = pool.usage()
    for n in ((3 << 19) - 1, 1000):  # over half more; small arrays have their own
        assert address(pool.empty((n,), "uint8")) != first
    array = pool.empty((2 << 20,), "uint8")
    assert address(array) == first
    assert pool.usage()[0] == live + idle
    del array
    assert address(pool.empty((3 << 20,), "uint8")) == first  # and it is of its own size again


def test_trim_gives_back_what_is_idle_alone():
    kept, dropped = pool.empty((5000,)), pool.empty((5000,))
    kept[...] = 3
    del dropped
    live, idle = pool.usage()
    assert idle >= 20_000
    pool.trim()
    assert pool.usage() == (live, 0)
    assert (kept == 3).all()
    pool.trim()
    assert pool.usage() == (live, 0)


def test_thousands_of_shapes_leave_a_bounded_heap():
    """In a process of its own, with a peak of its own: each size class would keep 50 MB, 900 MB in all."""
    program = """
from cllm._core import pool
for n in range(1, 1500, 7):
    pair = [pool.empty((n, 4096)) for _ in range(2)]
    assert sum(pool.usage()) < 300 << 20, pool.usage()
assert pool.usage()[0] >= 2 * pair[0].nbytes
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_arrays_that_outlive_others_keep_their_values():
    rng = np.random.default_rng(0)
    kept = []
    for i in range(3000):
        array = pool.empty((int(rng.integers(1, 300)), int(rng.integers(1, 20))))
        array[...] = i
        if i % 7 == 0:
            kept.append((i, array[::2, :1]))
    assert all((view == i).all() for i, view in kept)


def test_an_error_gives_the_buffer_back():
    x, weight = np.zeros((50, 40), np.float32), np.zeros((6, 7), np.float32)
    before = pool.usage()[0]
    for _ in range(10):
        with pytest.raises(ValueError, match="linear_forward"):
            kernels.linear_forward(x, weight)
        with pytest.raises(ValueError, match="array is too big"):
            pool.empty((0, 2**62))
    assert pool.usage()[0] == before


def test_threads_share_the_pool():
    wrong = []

    def work(n):
        for i in range(500):
            array = pool.empty((n + i % 5, 100))
            array[...] = n
            if not (array == n).all():
                wrong.append(n)

    before = pool.usage()[0]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.usage()[0] == before


@pytest.mark.parametrize(
    ("kind", "message", "shape", "dtype"),
    [
        (ValueError, "empty: shape is (-1,), its lengths must be at least 0", (-1,), "float32"),
        (ValueError, "empty: shape is (2, -3), its lengths must be at least 0", (2, -3), "float32"),
        (ValueError, "empty: shape has more than 64 dimensions", (1,) * 65, "float32"),
        (MemoryError, f"no memory for an array of shape {(2**32, 2**32)}", (2**32, 2**32), "float32"),
        (TypeError, "'float' object cannot be interpreted as an integer", (2.5,), "float32"),
        *[
            (
                TypeError,
                f"empty: dtype is {dtype}, it must be one of numbers in this machine's byte order",
                (3,),
                dtype,
            )
            for dtype in ("object", "|S5", ">f4", "datetime64[s]")
        ],
    ],
)
def test_refuses_what_it_cannot_make(kind, message, shape, dtype):
    before = pool.usage()
    assert_refuses(kind, message, pool.empty, shape, dtype)
    assert pool.usage() == before
