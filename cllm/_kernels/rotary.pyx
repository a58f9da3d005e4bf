"""Rotary position embedding (Su et al. 2021): pairs (i, i + D/2) of a head turned by angles that grow with t.

Each row of D elements is read into local arrays before its result is written, so that the output may be
the input and both cases run the same vectorised loop. Heads at one position share their angles; threads
share positions.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.string cimport memcpy
from numpy cimport PyArray_DATA as data

from cllm._kernels.threads cimport useful_threads

cnp.import_array()

cdef enum:
    PIECE = 64              # pairs of a row that are turned together
# Elements from which a second thread pays (benchmarks/thresholds.py): 16384 9.1 -> 7.6 us.
cdef double SERIAL_BELOW = 16384


cdef inline void turn(const floating* x, const floating* cosine, const floating* sine, floating sign,
                      floating* out, Py_ssize_t half) noexcept nogil:
    """out = x turned by the angles, or back by them where sign is -1.  x, out: (2 half,)."""
    cdef Py_ssize_t piece, start, n, k
    cdef floating a[PIECE]
    cdef floating b[PIECE]
    for piece in range((half + PIECE - 1) // PIECE):
        start = piece * PIECE
        n = min(<Py_ssize_t>PIECE, half - start)
        memcpy(a, x + start, n * sizeof(floating))
        memcpy(b, x + half + start, n * sizeof(floating))
        for k in range(n):
            out[start + k] = a[k] * cosine[start + k] - b[k] * (sign * sine[start + k])
            out[half + start + k] = b[k] * cosine[start + k] + a[k] * (sign * sine[start + k])


cdef void rotate(const floating* x, const Py_ssize_t* xs, const floating* cosine, const floating* sine,
                 bint shared, floating sign, floating* out, const Py_ssize_t* os, Py_ssize_t B, Py_ssize_t H,
                 Py_ssize_t T, Py_ssize_t half, int n_threads) noexcept nogil:
    """x, out: (B, H, T, 2 half) with strides xs, os (3,), which may be the same array; cosine, sine:
    (T, half) when all sequences share them, else (B, T, half)."""
    cdef Py_ssize_t part, h, angle
    for part in prange(B * T, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        angle = (part % T if shared else part) * half
        for h in range(H):
            turn(x + part // T * xs[0] + h * xs[1] + part % T * xs[2], cosine + angle, sine + angle, sign,
                 out + part // T * os[0] + h * os[1] + part % T * os[2], half)


def rotary(cnp.ndarray x, cnp.ndarray cosine, cnp.ndarray sine, bint back, cnp.ndarray out, int n_threads):
    """cosine, sine: (1 or B, T, half)."""
    cdef Py_ssize_t B = cnp.PyArray_DIM(x, 0), H = cnp.PyArray_DIM(x, 1), T = cnp.PyArray_DIM(x, 2)
    cdef Py_ssize_t half = cnp.PyArray_DIM(x, 3) // 2, size = cnp.PyArray_ITEMSIZE(x), i
    cdef bint shared = cnp.PyArray_DIM(cosine, 0) == 1
    cdef double sign = -1 if back else 1
    cdef Py_ssize_t xs[3]
    cdef Py_ssize_t os[3]
    for i in range(3):
        xs[i] = cnp.PyArray_STRIDE(x, i) // size
        os[i] = cnp.PyArray_STRIDE(out, i) // size
    n_threads = useful_threads(cnp.PyArray_SIZE(x), SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            rotate(<float*>data(x), xs, <float*>data(cosine), <float*>data(sine), shared, <float>sign,
                   <float*>data(out), os, B, H, T, half, n_threads)
    else:
        with nogil:
            rotate(<double*>data(x), xs, <double*>data(cosine), <double*>data(sine), shared, sign,
                   <double*>data(out), os, B, H, T, half, n_threads)
