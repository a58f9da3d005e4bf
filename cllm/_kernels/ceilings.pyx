"""The machine's own limits, to measure kernels against: multiply-adds in registers, and memory traffic.

Each function does one amount of work on each of its threads and nothing else; `cllm.bench` times them.
Bytes are counted as in STREAM (McCalpin 1995): what is read and what is written, not the lines that a write
fetches first.
"""
cimport numpy as cnp
from cython.parallel cimport prange
from libc.string cimport memcpy

cnp.import_array()

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_total

cdef extern from "ceilings.h" nogil:
    float cllm_fma_chains(Py_ssize_t n, float a, float b)
    const Py_ssize_t CHAIN_FLOPS "CLLM_CHAIN_FLOPS"

cdef Py_ssize_t BLOCK = 1 << 16         # elements that a thread takes at a time


cdef float sum_block(const float* x, Py_ssize_t n) noexcept nogil:
    """The sum of x (n,); n is a multiple of LANES."""
    cdef float lane[LANES]
    cdef Py_ssize_t i, k
    lanes_clear(&lane[0])
    for i from 0 <= i < n by LANES:
        for k in range(LANES):
            lane[k] += x[i + k]
    return lanes_total(&lane[0])


cdef void triad_block(const float* x, const float* y, float scale, float* z, Py_ssize_t n) noexcept nogil:
    """z = x + scale y."""
    cdef Py_ssize_t i
    for i in range(n):
        z[i] = x[i] + scale * y[i]


cdef void update_block(const float* x, float scale, float* y, Py_ssize_t n) noexcept nogil:
    """y += scale x."""
    cdef Py_ssize_t i
    for i in range(n):
        y[i] += scale * x[i]


def fma(Py_ssize_t n, int n_threads):
    """n rounds of multiply-adds on each thread -> the floating-point operations done by all of them."""
    cdef float total = 0
    cdef int thread
    with nogil:
        for thread in prange(n_threads, num_threads=n_threads, schedule="static", chunksize=1,
                             use_threads_if=n_threads > 1):
            total += cllm_fma_chains(n, <float>0.999, <float>0.001)
    if total != total:
        raise ArithmeticError("multiply-adds of ones gave NaN")
    return CHAIN_FLOPS * n * n_threads


def copy(cnp.ndarray x, cnp.ndarray y, int n_threads):
    """y = x; float32 (n,), n a multiple of 65536 -> bytes moved."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x), i
    cdef const float* source = <const float*>cnp.PyArray_DATA(x)
    cdef float* target = <float*>cnp.PyArray_DATA(y)
    with nogil:
        for i in prange(n // BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
            memcpy(target + i * BLOCK, source + i * BLOCK, BLOCK * sizeof(float))
    return 8 * n


def read(cnp.ndarray x, int n_threads):
    """The sum of x; float32 (n,), n a multiple of 65536 -> bytes moved."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x), i
    cdef const float* source = <const float*>cnp.PyArray_DATA(x)
    cdef double total = 0
    with nogil:
        for i in prange(n // BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
            total += sum_block(source + i * BLOCK, BLOCK)
    if total != total:
        raise ArithmeticError("the array to read holds NaN")
    return 4 * n


def triad(cnp.ndarray x, cnp.ndarray y, cnp.ndarray z, int n_threads):
    """z = x + 2 y; float32 (n,), n a multiple of 65536 -> bytes moved."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x), i
    cdef const float* first = <const float*>cnp.PyArray_DATA(x)
    cdef const float* second = <const float*>cnp.PyArray_DATA(y)
    cdef float* target = <float*>cnp.PyArray_DATA(z)
    with nogil:
        for i in prange(n // BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
            triad_block(first + i * BLOCK, second + i * BLOCK, <float>2, target + i * BLOCK, BLOCK)
    return 12 * n


def update(cnp.ndarray x, cnp.ndarray y, int n_threads):
    """y += 2 x; float32 (n,), n a multiple of 65536 -> bytes moved. No write fetches a line of its own."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x), i
    cdef const float* source = <const float*>cnp.PyArray_DATA(x)
    cdef float* target = <float*>cnp.PyArray_DATA(y)
    with nogil:
        for i in prange(n // BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
            update_block(source + i * BLOCK, <float>2, target + i * BLOCK, BLOCK)
    return 12 * n
