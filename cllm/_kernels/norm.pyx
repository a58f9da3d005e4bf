"""Layer norm (Ba, Kiros & Hinton 2016) and RMS norm (Zhang & Sennrich 2019) over the last axis.

They differ in the mean alone: RMS norm takes nothing off.

A row stays in the first cache while it is read two or three times: mean, then squared distances from it
(one pass over sum(x^2) - mean^2 cancels), then the result. A mean that is FAR deviations from 0 goes on as two
numbers: what rounding took from it, the mean of what is left, would show in the result. Threads share rows. The gradients of weight
and bias are sums over all rows: each block of ROW_BLOCK rows makes its own partial sums, which are then
combined in the order of the blocks (a plain float32 sum over 4096 rows loses 3.5e-4).
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport sqrt, sqrtf
from libc.string cimport memset
from numpy cimport PyArray_DATA as data

from cllm._kernels.threads cimport useful_threads

cnp.import_array()

cdef extern from "norm.h" nogil:
    float cllm_row_sum_f32(const float* x, float mean, Py_ssize_t C)
    double cllm_row_sum_f64(const double* x, double mean, Py_ssize_t C)
    float cllm_row_squares_f32(const float* x, float mean, float rest, Py_ssize_t C)
    double cllm_row_squares_f64(const double* x, double mean, double rest, Py_ssize_t C)
    void cllm_row_products_f32(const float* dy, const float* x, const float* weight, float mean, float rest,
                               Py_ssize_t C, float* plain, float* normed)
    void cllm_row_products_f64(const double* dy, const double* x, const double* weight, double mean, double rest,
                               Py_ssize_t C, double* plain, double* normed)
    void cllm_row_backward_f32(const float* dy, const float* x, const float* weight, float mean, float rest,
                               float rstd, float plain, float normed, float* dx, float* dweight, float* dbias,
                               Py_ssize_t C)
    void cllm_row_backward_f64(const double* dy, const double* x, const double* weight, double mean, double rest,
                               double rstd, double plain, double normed, double* dx, double* dweight,
                               double* dbias, Py_ssize_t C)

cdef enum:
    ROW_BLOCK = 32          # rows of one partial sum
    FAR = 16                # rounding a float32 mean of 16 deviations costs a result 1e-6 of its norm
    COLUMN_BLOCK = 64       # columns of partial sums combined together
# Elements from which a second thread pays (benchmarks/thresholds.py): 32768 layer norm forward 9.7 -> 6.6 us,
# backward 15.3 -> 12.2.
cdef double SERIAL_BELOW = 32768


cdef Py_ssize_t n_row_blocks(Py_ssize_t N) noexcept nogil:
    return (N + ROW_BLOCK - 1) // ROW_BLOCK


cdef inline floating root(floating x) noexcept nogil:
    return sqrtf(x) if floating is float else sqrt(x)


cdef inline floating row_sum(const floating* x, floating mean, Py_ssize_t C) noexcept nogil:
    if floating is float:
        return cllm_row_sum_f32(x, mean, C)
    else:
        return cllm_row_sum_f64(x, mean, C)


cdef inline floating row_squares(const floating* x, floating mean, floating rest, Py_ssize_t C) noexcept nogil:
    if floating is float:
        return cllm_row_squares_f32(x, mean, rest, C)
    else:
        return cllm_row_squares_f64(x, mean, rest, C)


cdef inline void write_row(const floating* x, const floating* weight, const floating* bias, floating mean,
                           floating rest, floating rstd, floating* y, Py_ssize_t C) noexcept nogil:
    """y = (x - mean - rest) rstd weight + bias."""
    cdef Py_ssize_t j
    if bias is NULL:
        for j in range(C):
            y[j] = (x[j] - mean - rest) * rstd * weight[j]
    else:
        for j in range(C):
            y[j] = (x[j] - mean - rest) * rstd * weight[j] + bias[j]


cdef void forward_row(const floating* x, const floating* weight, const floating* bias, double eps,
                      floating* y, floating* mean, floating* rstd, Py_ssize_t C) noexcept nogil:
    """y = (x - mean) rstd weight + bias."""
    cdef floating m = <floating>0 if mean is NULL else row_sum(x, 0, C) / <floating>C
    cdef floating variance = row_squares(x, m, 0, C) / <floating>C + <floating>eps
    cdef floating rest = 0
    if m * m > FAR * FAR * variance:
        rest = row_sum(x, m, C) / <floating>C
        variance = row_squares(x, m, rest, C) / <floating>C + <floating>eps
    rstd[0] = <floating>1 / root(variance)
    if rest == 0:  # the same loops without a subtraction
        write_row(x, weight, bias, m, <floating>0, rstd[0], y, C)
    else:
        write_row(x, weight, bias, m, rest, rstd[0], y, C)
    if mean is not NULL:
        mean[0] = m + rest


cdef inline void backward_row(const floating* dy, const floating* x, const floating* weight, bint centred,
                              floating mean, floating rest, floating rstd, floating* dx, floating* dweight,
                              floating* dbias, Py_ssize_t C) noexcept nogil:
    """dx = rstd (g - mean(g) - h mean(g h)), h = (x - mean - rest) rstd and g = dy weight; inverts forward_row.
    Without centring, mean is 0 and mean(g) falls away. dweight += dy h, dbias += dy."""
    cdef floating plain, normed
    if floating is float:
        cllm_row_products_f32(dy, x, weight, mean, rest, C, &plain, &normed)
    else:
        cllm_row_products_f64(dy, x, weight, mean, rest, C, &plain, &normed)
    plain = plain / <floating>C if centred else <floating>0
    normed = normed * rstd / <floating>C * rstd
    if floating is float:
        cllm_row_backward_f32(dy, x, weight, mean, rest, rstd, plain, normed, dx, dweight, dbias, C)
    else:
        cllm_row_backward_f64(dy, x, weight, mean, rest, rstd, plain, normed, dx, dweight, dbias, C)


cdef void backward_block(const floating* dy, const floating* x, const floating* weight, bint centred,
                         const floating* mean, const floating* rstd, floating* dx, floating* dweight,
                         floating* dbias, Py_ssize_t N, Py_ssize_t C) noexcept nogil:
    """dx, and the block's partial sums dweight, dbias (C,), which stay in the first cache."""
    cdef Py_ssize_t i
    cdef floating far, rest
    memset(dweight, 0, C * sizeof(floating))
    memset(dbias, 0, C * sizeof(floating))
    for i in range(N):
        far = mean[i] * rstd[i]
        if far > FAR or far < -FAR:
            rest = row_sum(x + i * C, mean[i], C) / <floating>C
            backward_row(dy + i * C, x + i * C, weight, centred, mean[i], rest, rstd[i], dx + i * C, dweight,
                         dbias, C)
        else:
            backward_row(dy + i * C, x + i * C, weight, centred, mean[i], <floating>0, rstd[i], dx + i * C,
                         dweight, dbias, C)


cdef void combine_columns(const floating* partials, Py_ssize_t stride, Py_ssize_t n_partials, floating* out,
                          Py_ssize_t n, bint accumulate) noexcept nogil:
    """out (n,) = the sum of n_partials rows, in order, in double (a long sum); n is at most COLUMN_BLOCK."""
    cdef double total[COLUMN_BLOCK]
    cdef Py_ssize_t i, j
    for j in range(n):
        total[j] = out[j] if accumulate else 0
    for i in range(n_partials):
        for j in range(n):
            total[j] += partials[i * stride + j]
    for j in range(n):
        out[j] = <floating>total[j]


cdef void combine(const floating* partials, Py_ssize_t stride, Py_ssize_t n_partials, floating* out,
                  Py_ssize_t C, bint accumulate, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, start
    for block in prange((C + COLUMN_BLOCK - 1) // COLUMN_BLOCK, num_threads=n_threads, schedule="static",
                        use_threads_if=n_threads > 1):
        start = block * COLUMN_BLOCK
        combine_columns(partials + start, stride, n_partials, out + start,
                        min(<Py_ssize_t>COLUMN_BLOCK, C - start), accumulate)


cdef void forward(const floating* x, const floating* weight, const floating* bias, double eps, floating* y,
                  floating* mean, floating* rstd, Py_ssize_t N, Py_ssize_t C, int n_threads) noexcept nogil:
    """x, y: (N, C); weight, bias (or NULL): (C,); mean (NULL: RMS norm), rstd: (N,)."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        forward_row(x + i * C, weight, bias, eps, y + i * C, NULL if mean is NULL else mean + i, rstd + i, C)


cdef void backward(const floating* dy, const floating* x, const floating* weight, bint centred,
                   const floating* mean, const floating* rstd, floating* dx, floating* dweight, floating* dbias, floating* partials,
                   Py_ssize_t N, Py_ssize_t C, bint accumulate, int n_threads) noexcept nogil:
    """dy, x, dx: (N, C); mean (0 unless centred), rstd: (N,); dweight, dbias (or NULL): (C,);
    partials: (n_row_blocks(N), 2, C)."""
    cdef Py_ssize_t block, i
    cdef Py_ssize_t n_partials = n_row_blocks(N)
    cdef floating* partial
    for block in prange(n_partials, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * ROW_BLOCK
        partial = partials + block * 2 * C
        backward_block(dy + i * C, x + i * C, weight, centred, mean + i, rstd + i, dx + i * C, partial, partial + C,
                       min(<Py_ssize_t>ROW_BLOCK, N - i), C)
    if dweight is not NULL:
        combine(partials, 2 * C, n_partials, dweight, C, accumulate, n_threads)
    if dbias is not NULL:
        combine(partials + C, 2 * C, n_partials, dbias, C, accumulate, n_threads)


cdef inline void* data_or_null(cnp.ndarray array):
    return NULL if array is None else data(array)


def norm_forward(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, double eps, cnp.ndarray y,
                 cnp.ndarray mean, cnp.ndarray rstd, int n_threads):
    """Layer norm; RMS norm where mean is None."""
    cdef Py_ssize_t N = cnp.PyArray_SIZE(rstd), C = cnp.PyArray_SIZE(weight)
    cdef void* b = data_or_null(bias)
    cdef void* m = data_or_null(mean)
    n_threads = useful_threads(N * C, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            forward(<float*>data(x), <float*>data(weight), <float*>b, eps, <float*>data(y), <float*>m,
                    <float*>data(rstd), N, C, n_threads)
    else:
        with nogil:
            forward(<double*>data(x), <double*>data(weight), <double*>b, eps, <double*>data(y), <double*>m,
                    <double*>data(rstd), N, C, n_threads)


def partials_shape(Py_ssize_t N, Py_ssize_t C):
    """The shape of the scratch array that norm_backward needs."""
    return n_row_blocks(N), 2, C


def norm_backward(cnp.ndarray dy, cnp.ndarray x, cnp.ndarray weight, bint centred, cnp.ndarray mean,
                  cnp.ndarray rstd, cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dbias,
                  cnp.ndarray partials, bint accumulate, int n_threads):
    """Of layer norm; of RMS norm unless centred: the mean is then zeros."""
    cdef Py_ssize_t N = cnp.PyArray_SIZE(rstd), C = cnp.PyArray_SIZE(weight)
    cdef void* dw = data_or_null(dweight)
    cdef void* db = data_or_null(dbias)
    n_threads = useful_threads(N * C, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dy), <float*>data(x), <float*>data(weight), centred, <float*>data(mean),
                     <float*>data(rstd), <float*>data(dx), <float*>dw, <float*>db, <float*>data(partials), N,
                     C, accumulate, n_threads)
    else:
        with nogil:
            backward(<double*>data(dy), <double*>data(x), <double*>data(weight), centred, <double*>data(mean),
                     <double*>data(rstd), <double*>data(dx), <double*>dw, <double*>db,
                     <double*>data(partials), N, C, accumulate, n_threads)
