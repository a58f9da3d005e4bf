"""Layer norm over the last axis (Ba, Kiros & Hinton 2016).

A row stays in the first cache while it is read two or three times: mean, then squared distances from it
(one pass over sum(x^2) - mean^2 cancels), then the result. Threads share blocks of ROW_BLOCK rows. The
gradients of weight and bias are sums over all rows: each block makes its own partial sums, which are
then combined in the order of the blocks (a plain float32 sum over 4096 rows loses 3.5e-4).
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport sqrt, sqrtf
from libc.string cimport memcpy

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_total

cnp.import_array()

cdef enum:
    ROW_BLOCK = 32
    COLUMN_BLOCK = 64       # columns of partial sums combined together
# Under this many elements a second thread costs more than it brings.
cdef Py_ssize_t SERIAL_BELOW = 32768


cdef inline Py_ssize_t n_row_blocks(Py_ssize_t N) noexcept nogil:
    return (N + ROW_BLOCK - 1) // ROW_BLOCK


cdef inline floating root(floating x) noexcept nogil:
    return sqrtf(x) if floating is float else sqrt(x)


cdef inline floating row_sum(const floating* x, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t block, k
    cdef floating lane[LANES]
    lanes_clear(lane)
    for block in range(C // LANES):
        for k in range(LANES):
            lane[k] += x[k]
        x += LANES
    for k in range(C % LANES):
        lane[k] += x[k]
    return lanes_total(lane)


cdef inline floating row_squares(const floating* x, floating mean, Py_ssize_t C) noexcept nogil:
    """The sum of (x - mean)^2."""
    cdef Py_ssize_t block, k
    cdef floating lane[LANES]
    lanes_clear(lane)
    for block in range(C // LANES):
        for k in range(LANES):
            lane[k] += (x[k] - mean) * (x[k] - mean)
        x += LANES
    for k in range(C % LANES):
        lane[k] += (x[k] - mean) * (x[k] - mean)
    return lanes_total(lane)


cdef inline void row_products(const floating* dy, const floating* x, const floating* weight, floating mean,
                              floating rstd, Py_ssize_t C, floating* plain, floating* normed) noexcept nogil:
    """plain = sum(dy weight), normed = sum(dy weight (x - mean) rstd)."""
    cdef Py_ssize_t block, k
    cdef floating a[LANES]
    cdef floating b[LANES]
    lanes_clear(a)
    lanes_clear(b)
    for block in range(C // LANES):
        for k in range(LANES):
            a[k] += dy[k] * weight[k]
            b[k] += dy[k] * weight[k] * (x[k] - mean)
        dy += LANES
        x += LANES
        weight += LANES
    for k in range(C % LANES):
        a[k] += dy[k] * weight[k]
        b[k] += dy[k] * weight[k] * (x[k] - mean)
    plain[0] = lanes_total(a)
    normed[0] = lanes_total(b) * rstd


cdef void forward_block(const floating* x, const floating* weight, const floating* bias, double eps, floating* y,
                        floating* mean, floating* rstd, Py_ssize_t N, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t i, j
    cdef floating m, r
    for i in range(N):
        m = row_sum(x, C) / <floating>C
        r = <floating>1 / root(row_squares(x, m, C) / <floating>C + <floating>eps)
        if bias is NULL:
            for j in range(C):
                y[j] = (x[j] - m) * r * weight[j]
        else:
            for j in range(C):
                y[j] = (x[j] - m) * r * weight[j] + bias[j]
        mean[i] = m
        rstd[i] = r
        x += C
        y += C


cdef inline void column_sums(const floating* dy, const floating* x, const floating* mean, const floating* rstd,
                             floating* dweight, floating* dbias, Py_ssize_t N, Py_ssize_t C,
                             Py_ssize_t n) noexcept nogil:
    """dweight, dbias (n,): the sums over N rows of dy (x - mean) rstd and of dy, for n <= LANES columns of C."""
    cdef Py_ssize_t i, k
    cdef floating a[LANES]
    cdef floating b[LANES]
    lanes_clear(a)
    lanes_clear(b)
    for i in range(N):
        for k in range(n):
            a[k] += dy[k] * ((x[k] - mean[i]) * rstd[i])
            b[k] += dy[k]
        dy += C
        x += C
    memcpy(dweight, a, n * sizeof(floating))
    if dbias is not NULL:
        memcpy(dbias, b, n * sizeof(floating))


cdef void backward_block(const floating* dy, const floating* x, const floating* weight, const floating* mean,
                         const floating* rstd, floating* dx, floating* dweight, floating* dbias, Py_ssize_t N,
                         Py_ssize_t C) noexcept nogil:
    """dx, and the block's partial sums dweight, dbias (C,): inverts the row loop of forward_block.

    With n = (x - m) r and g = dy weight: dx = r (g - mean(g) - n mean(g n)). The partial sums go column by
    column, in registers; the block's rows are still in the cache.
    """
    cdef Py_ssize_t i, j, full = C - C % LANES
    cdef floating r, m, g_mean, gn_mean
    for j in range(C // LANES):
        column_sums(dy + j * LANES, x + j * LANES, mean, rstd, dweight + j * LANES,
                    NULL if dbias is NULL else dbias + j * LANES, N, C, LANES)
    if full < C:
        column_sums(dy + full, x + full, mean, rstd, dweight + full, NULL if dbias is NULL else dbias + full, N, C,
                    C - full)
    for i in range(N):
        m = mean[i]
        r = rstd[i]
        row_products(dy, x, weight, m, r, C, &g_mean, &gn_mean)
        g_mean /= <floating>C
        gn_mean /= <floating>C
        for j in range(C):
            dx[j] = r * (dy[j] * weight[j] - g_mean - (x[j] - m) * r * gn_mean)
        dy += C
        x += C
        dx += C


cdef void combine_columns(const floating* partials, Py_ssize_t stride, Py_ssize_t n_partials, floating* out,
                          Py_ssize_t n, bint accumulate) noexcept nogil:
    """out (n,) = the sum of n_partials rows, in order and in double: a long sum; n is at most COLUMN_BLOCK."""
    cdef double total[COLUMN_BLOCK]
    cdef Py_ssize_t i, j
    for j in range(n):
        total[j] = out[j] if accumulate else 0
    for i in range(n_partials):
        for j in range(n):
            total[j] += partials[i * stride + j]
    for j in range(n):
        out[j] = <floating>total[j]


cdef void combine(const floating* partials, Py_ssize_t stride, Py_ssize_t n_partials, floating* out, Py_ssize_t C,
                  bint accumulate, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, start
    for block in prange((C + COLUMN_BLOCK - 1) // COLUMN_BLOCK, num_threads=n_threads, schedule="static",
                        use_threads_if=n_threads > 1):
        start = block * COLUMN_BLOCK
        combine_columns(partials + start, stride, n_partials, out + start, min(<Py_ssize_t>COLUMN_BLOCK, C - start),
                        accumulate)


cdef void forward(const floating* x, const floating* weight, const floating* bias, double eps, floating* y,
                  floating* mean, floating* rstd, Py_ssize_t N, Py_ssize_t C, int n_threads) noexcept nogil:
    """x, y: (N, C); weight, bias (or NULL): (C,); mean, rstd: (N,)."""
    cdef Py_ssize_t block, i
    for block in prange(n_row_blocks(N), num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * ROW_BLOCK
        forward_block(x + i * C, weight, bias, eps, y + i * C, mean + i, rstd + i, min(<Py_ssize_t>ROW_BLOCK, N - i), C)


cdef void backward(const floating* dy, const floating* x, const floating* weight, const floating* mean,
                   const floating* rstd, floating* dx, floating* dweight, floating* dbias, floating* partials,
                   Py_ssize_t N, Py_ssize_t C, bint accumulate, int n_threads) noexcept nogil:
    """dy, x, dx: (N, C); dweight, dbias (or NULL): (C,); partials: (n_row_blocks(N), 2, C)."""
    cdef Py_ssize_t block, i
    cdef Py_ssize_t n_partials = n_row_blocks(N)
    cdef floating* partial
    for block in prange(n_partials, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * ROW_BLOCK
        partial = partials + block * 2 * C
        backward_block(dy + i * C, x + i * C, weight, mean + i, rstd + i, dx + i * C, partial,
                       NULL if dbias is NULL else partial + C, min(<Py_ssize_t>ROW_BLOCK, N - i), C)
    combine(partials, 2 * C, n_partials, dweight, C, accumulate, n_threads)
    if dbias is not NULL:
        combine(partials + C, 2 * C, n_partials, dbias, C, accumulate, n_threads)


def layer_norm_forward(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, double eps, cnp.ndarray y,
                       cnp.ndarray mean, cnp.ndarray rstd, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(mean), C = cnp.PyArray_SIZE(weight)
    cdef void* b = NULL if bias is None else cnp.PyArray_DATA(bias)
    if N * C < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            forward(<float*>cnp.PyArray_DATA(x), <float*>cnp.PyArray_DATA(weight), <float*>b, eps,
                    <float*>cnp.PyArray_DATA(y), <float*>cnp.PyArray_DATA(mean), <float*>cnp.PyArray_DATA(rstd),
                    N, C, n_threads)
    else:
        with nogil:
            forward(<double*>cnp.PyArray_DATA(x), <double*>cnp.PyArray_DATA(weight), <double*>b, eps,
                    <double*>cnp.PyArray_DATA(y), <double*>cnp.PyArray_DATA(mean), <double*>cnp.PyArray_DATA(rstd),
                    N, C, n_threads)


def partials_shape(Py_ssize_t N, Py_ssize_t C):
    """The shape of the scratch array that layer_norm_backward needs."""
    return n_row_blocks(N), 2, C


def layer_norm_backward(cnp.ndarray dy, cnp.ndarray x, cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray rstd,
                        cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray partials,
                        bint accumulate, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(mean), C = cnp.PyArray_SIZE(weight)
    cdef void* db = NULL if dbias is None else cnp.PyArray_DATA(dbias)
    if N * C < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>cnp.PyArray_DATA(dy), <float*>cnp.PyArray_DATA(x), <float*>cnp.PyArray_DATA(weight),
                     <float*>cnp.PyArray_DATA(mean), <float*>cnp.PyArray_DATA(rstd), <float*>cnp.PyArray_DATA(dx),
                     <float*>cnp.PyArray_DATA(dweight), <float*>db, <float*>cnp.PyArray_DATA(partials), N, C,
                     accumulate, n_threads)
    else:
        with nogil:
            backward(<double*>cnp.PyArray_DATA(dy), <double*>cnp.PyArray_DATA(x), <double*>cnp.PyArray_DATA(weight),
                     <double*>cnp.PyArray_DATA(mean), <double*>cnp.PyArray_DATA(rstd), <double*>cnp.PyArray_DATA(dx),
                     <double*>cnp.PyArray_DATA(dweight), <double*>db, <double*>cnp.PyArray_DATA(partials), N, C,
                     accumulate, n_threads)
