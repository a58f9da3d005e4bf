"""Activations (GELU, ReLU and its square, SiLU, tanh, sigmoid), SwiGLU and dropout.

Arrays are cut into blocks of BLOCK elements, which threads share; each block is one plain loop that
the compiler vectorises (exp, tanh and the erf form of GELU are inlined from vmath.h).
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport uint32_t, uint64_t
from numpy cimport PyArray_DATA as data

from cllm._kernels.threads cimport useful_threads
from cllm._kernels.vmath cimport vexp, vexp2, vgelu, vgelu_slope, vtanh

cnp.import_array()

cdef extern from "hash.h" nogil:
    uint32_t cllm_hash_high(uint64_t key, uint64_t index)
    uint32_t cllm_hash(uint64_t key, uint32_t high, uint32_t low)

cdef enum:
    BLOCK = 4096
# Elements from which a second thread pays (benchmarks/thresholds.py): 16384 GELU forward 5.3 -> 3.8 us, backward
# 7.5 -> 5.7, ReLU 2.6 -> 2.4.
cdef double SERIAL_BELOW = 16384


cdef inline Py_ssize_t n_blocks(Py_ssize_t n) noexcept nogil:
    return (n + BLOCK - 1) // BLOCK


cdef inline Py_ssize_t block_size(Py_ssize_t block, Py_ssize_t n) noexcept nogil:
    return min(<Py_ssize_t>BLOCK, n - block * BLOCK)


# GELU ------------------------------------------------------------------------------------------------
# The tanh form 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), is x sigmoid(2u): one exp and one
# division, and no cancellation where tanh is near -1. Under -10 both forms are 0 to float32; bounding x there
# keeps x^3, infinities and denormals out, and keeps exp in the range of vexp2. A NaN fails both comparisons
# and passes.

cdef inline floating bounded(floating v, floating low, floating high) noexcept nogil:
    v = low if v < low else v
    return high if v > high else v


cdef inline floating exp_minus_2u(floating v) noexcept nogil:
    """exp(-2u) as a power of 2: log2(e) is in the two constants."""
    return vexp2(v * (<floating>-2.302208198144325 - <floating>0.1029432395800235 * (v * v)))


cdef void gelu_tanh_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = x[i]
        out[i] = <floating>0 if v < <floating>-10 else v * (
            <floating>1 / (<floating>1 + exp_minus_2u(bounded(v, -10, 10))))


cdef void gelu_tanh_backward(const floating* dy, const floating* x, floating* dx,
                             Py_ssize_t n) noexcept nogil:
    """d(x s)/dx = s (1 + x (1 - s) 2u'), with s = sigmoid(2u) as in gelu_tanh_forward; 1 - s is s exp(-2u),
    which keeps its digits where s is near 1."""
    cdef Py_ssize_t i
    cdef floating v, e, s
    for i in range(n):
        v = bounded(x[i], -10, 10)
        e = exp_minus_2u(v)
        s = <floating>1 / (<floating>1 + e)
        dx[i] = dy[i] * (s * (<floating>1 + e * s * (v * (
            <floating>1.5957691216057308 + <floating>0.21406444881780076 * (v * v)))))


cdef void gelu_erf_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = vgelu(x[i])


cdef void gelu_erf_backward(const floating* dy, const floating* x, floating* dx,
                            Py_ssize_t n) noexcept nogil:
    """d(x Phi(x))/dx = Phi(x) + x Phi'(x)."""
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * vgelu_slope(x[i])


# Other activations -----------------------------------------------------------------------------------
# Where x <= 0 the slope of relu is 0 and dy does not matter; a NaN in x fails the comparison and passes.

cdef inline floating sigmoid(floating v) noexcept nogil:
    """1 / (1 + exp(-v)); exp(-v) turns infinite where the result is below the smallest normal number."""
    return <floating>1 / (<floating>1 + vexp(-v))


cdef inline floating silu(floating v) noexcept nogil:
    """v sigmoid(v). Under -1000 it is 0 to either dtype; the bound keeps -inf * 0 out."""
    v = <floating>-1000 if v < <floating>-1000 else v
    return v * sigmoid(v)


cdef inline floating silu_slope(floating v) noexcept nogil:
    """d(v s)/dv = s (1 + v (1 - s)), with s = sigmoid(v)."""
    cdef floating s
    v = bounded(v, -1000, 1000)
    s = sigmoid(v)
    return s * (<floating>1 + v * (<floating>1 - s))


cdef void relu_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <floating>0 if x[i] <= 0 else x[i]


cdef void relu_backward(const floating* dy, const floating* x, floating* dx, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v, g
    for i in range(n):
        v = x[i]
        g = dy[i]       # loaded in any case: a conditional load would not vectorise without AVX
        g = g if v > 0 else v
        dx[i] = <floating>0 if v <= 0 else g


cdef void relu_squared_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = <floating>0 if x[i] <= 0 else x[i]
        out[i] = v * v


cdef void relu_squared_backward(const floating* dy, const floating* x, floating* dx,
                                Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating v, g
    for i in range(n):
        v = x[i]
        g = dy[i] * (<floating>2 * v)
        dx[i] = <floating>0 if v <= 0 else g


cdef void silu_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = silu(x[i])


cdef void silu_backward(const floating* dy, const floating* x, floating* dx, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * silu_slope(x[i])


cdef void tanh_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = vtanh(x[i])


cdef void tanh_backward(const floating* dy, const floating* y, floating* dx, Py_ssize_t n) noexcept nogil:
    """dy (1 - y^2); written so, it keeps its digits where y is near 1."""
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * ((<floating>1 - y[i]) * (<floating>1 + y[i]))


cdef void sigmoid_forward(const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = sigmoid(x[i])


cdef void sigmoid_backward(const floating* dy, const floating* y, floating* dx, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * (y[i] * (<floating>1 - y[i]))


# All of these share the loop over blocks.

# The names of the codes in elementwise.pxd, in their order.
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "relu_squared", "silu", "tanh", "sigmoid")


cdef void forward_block(int activation, const floating* x, floating* out, Py_ssize_t n) noexcept nogil:
    if activation == GELU_TANH:
        gelu_tanh_forward(x, out, n)
    elif activation == GELU:
        gelu_erf_forward(x, out, n)
    elif activation == RELU:
        relu_forward(x, out, n)
    elif activation == RELU_SQUARED:
        relu_squared_forward(x, out, n)
    elif activation == SILU:
        silu_forward(x, out, n)
    elif activation == TANH:
        tanh_forward(x, out, n)
    elif activation == SIGMOID:
        sigmoid_forward(x, out, n)


cdef void backward_block(int activation, const floating* dy, const floating* saved, floating* dx,
                         Py_ssize_t n) noexcept nogil:
    if activation == GELU_TANH:
        gelu_tanh_backward(dy, saved, dx, n)
    elif activation == GELU:
        gelu_erf_backward(dy, saved, dx, n)
    elif activation == RELU:
        relu_backward(dy, saved, dx, n)
    elif activation == RELU_SQUARED:
        relu_squared_backward(dy, saved, dx, n)
    elif activation == SILU:
        silu_backward(dy, saved, dx, n)
    elif activation == TANH:
        tanh_backward(dy, saved, dx, n)
    elif activation == SIGMOID:
        sigmoid_backward(dy, saved, dx, n)


cdef void activation_forward_blocks(int activation, const floating* x, floating* out, Py_ssize_t n,
                                    int n_threads) noexcept nogil:
    """out = activation(x).  x, out: (n,)."""
    cdef Py_ssize_t block, start
    for block in prange(n_blocks(n), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        start = block * BLOCK
        forward_block(activation, x + start, out + start, block_size(block, n))


cdef void activation_backward_blocks(int activation, const floating* dy, const floating* saved, floating* dx,
                                     Py_ssize_t n, int n_threads) noexcept nogil:
    """dx = dy activation'.  dy, saved, dx: (n,); saved is the output for tanh and sigmoid, else the input."""
    cdef Py_ssize_t block, start
    for block in prange(n_blocks(n), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        start = block * BLOCK
        backward_block(activation, dy + start, saved + start, dx + start, block_size(block, n))


def activation_forward(int activation, cnp.ndarray x, cnp.ndarray out, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            activation_forward_blocks(activation, <float*>data(x), <float*>data(out), n, n_threads)
    else:
        with nogil:
            activation_forward_blocks(activation, <double*>data(x), <double*>data(out), n, n_threads)


def activation_backward(int activation, cnp.ndarray dy, cnp.ndarray saved, cnp.ndarray dx, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(dy)
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(dy) == cnp.NPY_FLOAT:
        with nogil:
            activation_backward_blocks(activation, <float*>data(dy), <float*>data(saved), <float*>data(dx), n,
                                       n_threads)
    else:
        with nogil:
            activation_backward_blocks(activation, <double*>data(dy), <double*>data(saved),
                                       <double*>data(dx), n, n_threads)


# SwiGLU ----------------------------------------------------------------------------------------------
# Gate and up may be the two halves of each row of one array, so rows have a stride.

cdef void swiglu_forward_block(const floating* gate, const floating* up, floating* out,
                               Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = silu(gate[i]) * up[i]


cdef void swiglu_backward_block(const floating* dy, const floating* gate, const floating* up, floating* dgate,
                                floating* dup, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dgate[i] = dy[i] * up[i] * silu_slope(gate[i])
        dup[i] = dy[i] * silu(gate[i])


cdef void swiglu_forward_rows(const floating* gate, const floating* up, Py_ssize_t stride, floating* out,
                              Py_ssize_t N, Py_ssize_t n, int n_threads) noexcept nogil:
    """out = silu(gate) up.  gate, up: (N, n), rows `stride` apart; out: (N, n)."""
    cdef Py_ssize_t part, row, start, per_row = n_blocks(n)
    for part in prange(N * per_row, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row = part // per_row
        start = part % per_row * BLOCK
        swiglu_forward_block(gate + row * stride + start, up + row * stride + start, out + row * n + start,
                             block_size(part % per_row, n))


cdef void swiglu_backward_rows(const floating* dy, const floating* gate, const floating* up,
                               Py_ssize_t stride, floating* dgate, floating* dup, Py_ssize_t N, Py_ssize_t n,
                               int n_threads) noexcept nogil:
    """dy: (N, n); gate, up, dgate, dup: (N, n), rows `stride` apart."""
    cdef Py_ssize_t part, row, start, per_row = n_blocks(n)
    for part in prange(N * per_row, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row = part // per_row
        start = part % per_row * BLOCK
        swiglu_backward_block(dy + row * n + start, gate + row * stride + start, up + row * stride + start,
                              dgate + row * stride + start, dup + row * stride + start,
                              block_size(part % per_row, n))


def swiglu_forward(cnp.ndarray gate, cnp.ndarray up, cnp.ndarray out, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(gate, 0), n = cnp.PyArray_DIM(gate, 1)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(gate, 0) // cnp.PyArray_ITEMSIZE(gate)
    n_threads = useful_threads(N * n, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(gate) == cnp.NPY_FLOAT:
        with nogil:
            swiglu_forward_rows(<float*>data(gate), <float*>data(up), stride, <float*>data(out), N, n,
                                n_threads)
    else:
        with nogil:
            swiglu_forward_rows(<double*>data(gate), <double*>data(up), stride, <double*>data(out), N, n,
                                n_threads)


def swiglu_backward(cnp.ndarray dy, cnp.ndarray gate, cnp.ndarray up, cnp.ndarray dgate, cnp.ndarray dup,
                    int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(gate, 0), n = cnp.PyArray_DIM(gate, 1)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(gate, 0) // cnp.PyArray_ITEMSIZE(gate)
    n_threads = useful_threads(N * n, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(gate) == cnp.NPY_FLOAT:
        with nogil:
            swiglu_backward_rows(<float*>data(dy), <float*>data(gate), <float*>data(up), stride,
                                 <float*>data(dgate), <float*>data(dup), N, n, n_threads)
    else:
        with nogil:
            swiglu_backward_rows(<double*>data(dy), <double*>data(gate), <double*>data(up), stride,
                                 <double*>data(dgate), <double*>data(dup), N, n, n_threads)


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
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            dropout_blocks(<float*>data(x), <float*>data(out), n, key, limit,
                           <float>scale, n_threads)
    else:
        with nogil:
            dropout_blocks(<double*>data(x), <double*>data(out), n, key, limit,
                           scale, n_threads)
