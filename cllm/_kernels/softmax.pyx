"""Softmax and log-softmax of rows.

A row stays in a cache near the core while it is read twice: its largest element, then the exponentials of
the distances from it, whose sum divides them. Rows are independent; threads share them.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport log
from numpy cimport PyArray_DATA as data

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_total
from cllm._kernels.rows cimport CHUNK, row_exp, row_max, row_sum_exp
from cllm._kernels.threads cimport useful_threads
from cllm._kernels.vmath cimport vexp

cnp.import_array()

# Elements from which a second thread pays (benchmarks/thresholds.py): 8192 forward 7.2 -> 4.8 us, backward
# 4.2 -> 3.5.
cdef double SERIAL_BELOW = 8192


cdef inline double row_dot(const floating* a, const floating* b, Py_ssize_t V) noexcept nogil:
    """sum(a b)."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef double total
    lanes_clear(lane)
    for k in range(V % LANES):
        lane[k] = a[V - V % LANES + k] * b[V - V % LANES + k]
    total = lanes_total(lane)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += a[k] * b[k]
            a += LANES
            b += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    return total


cdef inline double row_sum(const floating* a, Py_ssize_t V) noexcept nogil:
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef double total
    lanes_clear(lane)
    for k in range(V % LANES):
        lane[k] = a[V - V % LANES + k]
    total = lanes_total(lane)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += a[k]
            a += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    return total


cdef void softmax_forward_row(const floating* x, floating* y, Py_ssize_t V) noexcept nogil:
    """y = exp(x - max) / sum. Infinity - infinity is NaN and spoils the whole row, as it does in torch."""
    cdef floating scale = <floating>(1 / row_exp(x, row_max(x, V), y, V))
    cdef Py_ssize_t j
    for j in range(V):
        y[j] *= scale


cdef void softmax_backward_row(const floating* dy, const floating* y, floating* dx,
                               Py_ssize_t V) noexcept nogil:
    """dx = y (dy - sum(dy y))."""
    cdef floating mean = <floating>row_dot(dy, y, V)
    cdef Py_ssize_t j
    for j in range(V):
        dx[j] = y[j] * (dy[j] - mean)


cdef void log_softmax_forward_row(const floating* x, floating* y, Py_ssize_t V) noexcept nogil:
    """y = (x - max) - log(sum(exp(x - max))): in this order logits of any size keep their digits."""
    cdef floating largest = row_max(x, V)
    cdef floating log_total = <floating>log(row_sum_exp(x, largest, V))
    cdef Py_ssize_t j
    for j in range(V):
        y[j] = (x[j] - largest) - log_total


cdef void log_softmax_backward_row(const floating* dy, const floating* y, floating* dx,
                                   Py_ssize_t V) noexcept nogil:
    """dx = dy - exp(y) sum(dy)."""
    cdef floating total = <floating>row_sum(dy, V)
    cdef Py_ssize_t j
    for j in range(V):
        dx[j] = dy[j] - vexp(y[j]) * total


cdef void forward(const floating* x, floating* y, bint logs, Py_ssize_t N, Py_ssize_t V,
                  int n_threads) noexcept nogil:
    """x, y: (N, V)."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        if logs:
            log_softmax_forward_row(x + i * V, y + i * V, V)
        else:
            softmax_forward_row(x + i * V, y + i * V, V)


cdef void backward(const floating* dy, const floating* y, floating* dx, bint logs, Py_ssize_t N, Py_ssize_t V,
                   int n_threads) noexcept nogil:
    """dy, y, dx: (N, V)."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        if logs:
            log_softmax_backward_row(dy + i * V, y + i * V, dx + i * V, V)
        else:
            softmax_backward_row(dy + i * V, y + i * V, dx + i * V, V)


def softmax_forward(cnp.ndarray x, cnp.ndarray y, Py_ssize_t V, bint logs, int n_threads):
    """V is at least 1."""
    cdef Py_ssize_t N = cnp.PyArray_SIZE(x) // V
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            forward(<float*>data(x), <float*>data(y), logs, N, V, n_threads)
    else:
        with nogil:
            forward(<double*>data(x), <double*>data(y), logs, N, V, n_threads)


def softmax_backward(cnp.ndarray dy, cnp.ndarray y, cnp.ndarray dx, Py_ssize_t V, bint logs, int n_threads):
    """V is at least 1."""
    cdef Py_ssize_t N = cnp.PyArray_SIZE(y) // V
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(y) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dy), <float*>data(y), <float*>data(dx), logs, N, V, n_threads)
    else:
        with nogil:
            backward(<double*>data(dy), <double*>data(y), <double*>data(dx), logs, N, V, n_threads)
