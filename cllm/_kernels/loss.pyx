"""Softmax cross-entropy on rows of logits, with ignore_index and label smoothing.

A row of up to 50000 logits stays in the second cache while it is read twice: its largest element, then
the sum of exp(z - largest). Rows are independent; threads share them. Losses are written for each row and
summed by the caller, in a fixed order.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport INFINITY, log
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from numpy cimport PyArray_DATA as data

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_largest, lanes_total
from cllm._kernels.vmath cimport vexp

cnp.import_array()

cdef enum:
    CHUNK = 32              # groups of LANES elements summed before the sum goes on in double: rows are long
# Under this many logits a second thread costs more than it brings (1 ns a logit, 4 us a region).
cdef Py_ssize_t SERIAL_BELOW = 16384


cdef inline void load_rest(const floating* z, Py_ssize_t V, floating* lane) noexcept nogil:
    """The last V % LANES elements in the last lanes, minus infinity (its exponential is 0) in the others."""
    cdef int k, skip = LANES - V % LANES
    if V >= LANES:          # whole vectors that overlap the group before; V = 65, both passes: 290 -> 205 ns
        z += V - LANES
        for k in range(LANES):
            lane[k] = z[k] if k >= skip else -INFINITY
    else:
        for k in range(skip):
            lane[k] = -INFINITY
        for k in range(skip, LANES):
            lane[k] = z[k - skip]


cdef inline floating row_max(const floating* z, Py_ssize_t V) noexcept nogil:
    """The largest element; where there is a NaN, perhaps NaN: it spoils the row's sum in any case."""
    cdef Py_ssize_t group, k
    cdef floating lane[LANES]
    load_rest(z, V, lane)
    for group in range(V // LANES):
        for k in range(LANES):
            lane[k] = z[k] if z[k] > lane[k] else lane[k]
        z += LANES
    return lanes_largest(lane)


cdef inline double row_sum_exp(const floating* z, floating shift, Py_ssize_t V) noexcept nogil:
    """sum(exp(z - shift))."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef floating rest[LANES]
    cdef double total = 0
    if V % LANES > 0:
        load_rest(z, V, rest)
        for k in range(LANES):
            lane[k] = vexp(rest[k] - shift)
        total = lanes_total(lane)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += vexp(z[k] - shift)
            z += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    return total


cdef inline double row_mean(const floating* z, floating shift, Py_ssize_t V) noexcept nogil:
    """mean(z - shift)."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef double total = 0
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += z[k] - shift
            z += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    for k in range(V % LANES):
        total += z[k] - shift
    return total / V


cdef void row_forward(const floating* z, int64_t target, bint ignored, double smoothing, Py_ssize_t V,
                      floating* loss, floating* lse) noexcept nogil:
    """loss = lse - (1 - smoothing) z[target] - smoothing mean(z), all taken from the largest element: logits
    of any size keep their digits."""
    cdef floating largest = row_max(z, V)
    cdef double log_total = log(row_sum_exp(z, largest, V))
    cdef double value = 0
    lse[0] = <floating>(largest + log_total)
    if not ignored:
        value = log_total - (1 - smoothing) * (z[target] - largest)
        if smoothing > 0:
            value -= smoothing * row_mean(z, largest, V)
    loss[0] = <floating>value


cdef inline double row_exp(const floating* z, floating lse, floating* out, Py_ssize_t V) noexcept nogil:
    """out = exp(z - lse), and its sum; out may be z: groups go through a local array, so that the loops
    vectorise nevertheless, and the rest is read before anything is written."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef floating p[LANES]
    cdef floating rest[LANES]
    cdef double total = 0
    load_rest(z, V, rest)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                p[k] = vexp(z[k] - lse)
            for k in range(LANES):
                lane[k] += p[k]
            for k in range(LANES):
                out[k] = p[k]
            z += LANES
            out += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    if V % LANES > 0:
        for k in range(LANES):
            p[k] = vexp(rest[k] - lse)
        memcpy(out, p + LANES - V % LANES, V % LANES * sizeof(floating))
        total += lanes_total(p)
    return total


cdef void row_backward(const floating* z, int64_t target, double smoothing, floating lse, double dloss,
                       Py_ssize_t V, floating* dz) noexcept nogil:
    """dz = dloss (softmax(z) - (1 - smoothing) onehot(target) - smoothing / V); dz may be z.

    exp(z - lse) is divided by its sum, which would be 1 without rounding: a float32 lse of 1e4 is off by up
    to 5e-4, and the sum undoes that.
    """
    cdef double total = row_exp(z, lse, dz, V)
    cdef floating scale = <floating>(dloss / total), shift = <floating>(dloss * smoothing / V)
    cdef Py_ssize_t j
    for j in range(V):
        # Tails under 1e-30 become 0: times a small dloss they would be denormals, which slow the products.
        dz[j] = (<floating>0 if dz[j] < <floating>1e-30 else dz[j]) * scale - shift
    dz[target] -= <floating>(dloss * (1 - smoothing))


cdef void forward(const floating* logits, const int64_t* targets, int64_t ignore_index, double smoothing,
                  floating* losses, floating* lse, Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil:
    """logits: (N, V); targets, losses, lse: (N,)."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row_forward(logits + i * V, targets[i], targets[i] == ignore_index, smoothing, V, losses + i, lse + i)


cdef void backward(const floating* dlosses, const floating* logits, const int64_t* targets,
                   const floating* lse, int64_t ignore_index, double smoothing, floating* dlogits,
                   Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil:
    """dlosses, targets, lse: (N,); logits, dlogits: (N, V), which may be the same array."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        if targets[i] == ignore_index:
            memset(dlogits + i * V, 0, V * sizeof(floating))
        else:
            row_backward(logits + i * V, targets[i], smoothing, lse[i], dlosses[i], V, dlogits + i * V)


def cross_entropy_forward(cnp.ndarray logits, cnp.ndarray targets, int64_t ignore_index, double smoothing,
                          cnp.ndarray losses, cnp.ndarray lse, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef int64_t* t = <int64_t*>data(targets)
    if N * V < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            forward(<float*>data(logits), t, ignore_index, smoothing, <float*>data(losses),
                    <float*>data(lse), N, V, n_threads)
    else:
        with nogil:
            forward(<double*>data(logits), t, ignore_index, smoothing, <double*>data(losses),
                    <double*>data(lse), N, V, n_threads)


def cross_entropy_backward(cnp.ndarray dlosses, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray lse,
                           int64_t ignore_index, double smoothing, cnp.ndarray dlogits, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef int64_t* t = <int64_t*>data(targets)
    if N * V < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dlosses), <float*>data(logits), t,
                     <float*>data(lse), ignore_index, smoothing, <float*>data(dlogits), N, V,
                     n_threads)
    else:
        with nogil:
            backward(<double*>data(dlosses), <double*>data(logits), t,
                     <double*>data(lse), ignore_index, smoothing, <double*>data(dlogits), N, V,
                     n_threads)
