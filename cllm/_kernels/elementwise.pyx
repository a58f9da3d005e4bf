"""GELU (tanh and erf forms) and dropout.

Arrays are cut into blocks of BLOCK elements, which threads share; each block is one plain loop that
the compiler vectorises (exp and erf are inlined from vmath.h).
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport uint32_t, uint64_t
from numpy cimport PyArray_DATA as data

from cllm._kernels.vmath cimport verf, vexp

cnp.import_array()

cdef extern from "hash.h" nogil:
    uint32_t cllm_hash_high(uint64_t key, uint64_t index)
    uint32_t cllm_hash(uint64_t key, uint32_t high, uint32_t low)

cdef enum:
    BLOCK = 4096
# Under this many elements a second thread costs more than it brings (0.4 ns an element, 4 us a region).
cdef Py_ssize_t SERIAL_BELOW = 32768


cdef inline Py_ssize_t n_blocks(Py_ssize_t n) noexcept nogil:
    return (n + BLOCK - 1) // BLOCK


cdef inline Py_ssize_t block_size(Py_ssize_t block, Py_ssize_t n) noexcept nogil:
    return min(<Py_ssize_t>BLOCK, n - block * BLOCK)


# GELU ------------------------------------------------------------------------------------------------
# The tanh form 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), is x sigmoid(2u): one exp and one
# division, and no cancellation where tanh is near -1. Under -10 both forms are 0 to any dtype here;
# bounding x there keeps x^3, infinities and denormals out. A NaN fails both comparisons and passes.

cdef inline floating bounded(floating v, floating low, floating high) noexcept nogil:
    v = low if v < low else v
    return high if v > high else v


cdef inline floating sigmoid_2u(floating v) noexcept nogil:
    """1 / (1 + exp(-2u))."""
    return <floating>1 / (<floating>1 + vexp(
        v * (<floating>-1.5957691216057308 - <floating>0.07135481627260025 * v * v)))


cdef inline floating normal_cdf(floating v) noexcept nogil:
    return <floating>0.5 * (<floating>1 + verf(v * <floating>0.7071067811865476))


cdef void gelu_tanh_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = x[i]
        v = <floating>-10 if v < <floating>-10 else v
        out[i] = v * sigmoid_2u(bounded(v, -10, 10))


cdef void gelu_tanh_backward(const floating* dy, const floating* x, floating* dx,
                             Py_ssize_t n) noexcept nogil:
    """d(x s)/dx = s + x s (1 - s) 2u', with s = sigmoid(2u) as in gelu_tanh_forward."""
    cdef Py_ssize_t i
    cdef floating v, s
    for i in range(n):
        v = bounded(x[i], -10, 10)
        s = sigmoid_2u(v)
        dx[i] = dy[i] * (s + s * (<floating>1 - s) * v * (
            <floating>1.5957691216057308 + <floating>0.21406444881780076 * v * v))


cdef void gelu_erf_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = x[i]
        v = <floating>-10 if v < <floating>-10 else v
        out[i] = v * normal_cdf(v)


cdef void gelu_erf_backward(const floating* dy, const floating* x, floating* dx,
                            Py_ssize_t n) noexcept nogil:
    """d(x Phi(x))/dx = Phi(x) + x phi(x)."""
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = bounded(x[i], -10, 10)
        dx[i] = dy[i] * (normal_cdf(v) + v * <floating>0.3989422804014327 * vexp(<floating>-0.5 * v * v))


cdef void gelu_forward_blocks(const floating* x, floating* out, Py_ssize_t n, bint tanh,
                              int n_threads) noexcept nogil:
    """out = gelu(x).  x, out: (n,)."""
    cdef Py_ssize_t block, start
    for block in prange(n_blocks(n), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        start = block * BLOCK
        if tanh:
            gelu_tanh_forward(x + start, out + start, block_size(block, n))
        else:
            gelu_erf_forward(x + start, out + start, block_size(block, n))


cdef void gelu_backward_blocks(const floating* dy, const floating* x, floating* dx, Py_ssize_t n, bint tanh,
                               int n_threads) noexcept nogil:
    """dx = dy gelu'(x).  dy, x, dx: (n,)."""
    cdef Py_ssize_t block, start
    for block in prange(n_blocks(n), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        start = block * BLOCK
        if tanh:
            gelu_tanh_backward(dy + start, x + start, dx + start, block_size(block, n))
        else:
            gelu_erf_backward(dy + start, x + start, dx + start, block_size(block, n))


def gelu_forward(cnp.ndarray x, cnp.ndarray out, bint tanh, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    if n < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            gelu_forward_blocks(<float*>data(x), <float*>data(out), n, tanh, n_threads)
    else:
        with nogil:
            gelu_forward_blocks(<double*>data(x), <double*>data(out), n, tanh, n_threads)


def gelu_backward(cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dx, bint tanh, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    if n < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            gelu_backward_blocks(<float*>data(dy), <float*>data(x),
                                 <float*>data(dx), n, tanh, n_threads)
    else:
        with nogil:
            gelu_backward_blocks(<double*>data(dy), <double*>data(x),
                                 <double*>data(dx), n, tanh, n_threads)


# Dropout ---------------------------------------------------------------------------------------------

cdef void dropout_block(const floating* x, floating* out, Py_ssize_t n, uint64_t key, uint64_t start,
                        uint32_t limit, floating scale) noexcept nogil:
    """out = x scale where hash(key, start + i) <= limit, else x times 0 (which keeps a NaN)."""
    cdef uint32_t high = cllm_hash_high(key, start)
    cdef uint32_t low = <uint32_t>start
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = x[i] * (scale if cllm_hash(key, high, low + <uint32_t>i) <= limit else <floating>0)


cdef void dropout_blocks(const floating* x, floating* out, Py_ssize_t n, uint64_t key, uint32_t limit,
                         floating scale, int n_threads) noexcept nogil:
    """out = dropout(x).  x, out: (n,). Its own backward: the gradient passes where the value passed."""
    cdef Py_ssize_t block, start
    for block in prange(n_blocks(n), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        start = block * BLOCK
        dropout_block(x + start, out + start, block_size(block, n), key, start, limit, scale)


def dropout(cnp.ndarray x, cnp.ndarray out, uint64_t key, uint32_t limit, double scale, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    if n < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            dropout_blocks(<float*>data(x), <float*>data(out), n, key, limit,
                           <float>scale, n_threads)
    else:
        with nogil:
            dropout_blocks(<double*>data(x), <double*>data(out), n, key, limit,
                           scale, n_threads)
