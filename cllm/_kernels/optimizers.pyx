"""Optimizer updates, statistics of gradients, scaling and clipping: passes over arrays of n elements.

An elementwise update reads the gradient once and reads and writes the parameter and its moments once: its
speed is the memory's. The arrays of a call have n elements each and lie apart; the door has checked that.
Work is cut into blocks of BLOCK elements, whatever the thread count. Scalars such as 1 - beta are computed
by the door, in double, and arrive hoisted. Two rules need more than a pass: Adafactor, whose step depends on
means over the rows, the columns and the whole of a matrix; and Muon, which is matrix products (`gemm`), but
for the pass over its momentum that is here.

A moment whose gradients have stopped (an unused token's embedding) decays into the denormal numbers,
rounds to itself there and stays for ever; arithmetic on denormals is many times slower on some CPUs.
Moments below the smallest normal number are therefore stored as zero. NaN passes through.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.float cimport DBL_MIN, FLT_MIN
from libc.math cimport fabs, fabsf, isnan, sqrt, sqrtf
from libc.stdlib cimport calloc, free, malloc

from cllm._kernels.threads cimport useful_threads

cnp.import_array()

cdef enum:
    BLOCK = 4096            # 16 KB of float32 an array
    LANES = 32              # partial sums of a block's squares
    ROW_BLOCKS = 64         # the most blocks that a matrix's rows are cut into (Adafactor)
# Elements from which a second thread pays (benchmarks/thresholds.py): 32768 AdamW 18.5 -> 13.1 us, SGD 10.1 -> 8.3.
cdef double SERIAL_BELOW = 32768


cdef inline floating root(floating x) noexcept nogil:
    return sqrtf(x) if floating is float else sqrt(x)


cdef inline floating magnitude(floating x) noexcept nogil:
    return fabsf(x) if floating is float else fabs(x)


cdef inline floating normal(floating x) noexcept nogil:
    """x, or 0 where x is denormal."""
    if floating is float:
        return <float>0 if fabsf(x) < FLT_MIN else x
    else:
        return <double>0 if fabs(x) < DBL_MIN else x


# SGD -------------------------------------------------------------------------------------------------


cdef void sgd_block(floating* param, const floating* grad, floating* buffer, Py_ssize_t n, floating sign,
                    floating lr, floating weight_decay, floating momentum, floating keep, bint nesterov,
                    bint first) noexcept nogil:
    """g = sign * grad + weight_decay * param; without a buffer: param -= lr * g. With one:
    buffer = g if first else momentum * buffer + keep * g;
    param -= lr * (g + momentum * buffer if nesterov else buffer)."""
    cdef Py_ssize_t i
    cdef floating g, b
    if buffer == NULL:
        for i in range(n):
            param[i] = param[i] - lr * (sign * grad[i] + weight_decay * param[i])
        return
    for i in range(n):
        g = sign * grad[i] + weight_decay * param[i]
        b = normal(g if first else momentum * buffer[i] + keep * g)
        buffer[i] = b
        param[i] = param[i] - lr * (g + momentum * b if nesterov else b)


cdef void sgd_blocks(floating* param, const floating* grad, floating* buffer, Py_ssize_t n, floating sign,
                     floating lr, floating weight_decay, floating momentum, floating keep, bint nesterov,
                     bint first, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        sgd_block(param + i, grad + i, NULL if buffer == NULL else buffer + i, min(<Py_ssize_t>BLOCK, n - i),
                  sign, lr, weight_decay, momentum, keep, nesterov, first)


def sgd(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray buffer, double sign, double lr, double weight_decay,
        double momentum, double keep, bint nesterov, bint first, int n_threads):
    """One SGD step in place; buffer is None without momentum; keep is 1 - dampening."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* b = NULL if buffer is None else cnp.PyArray_DATA(buffer)
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            sgd_blocks[float](<float*>p, <float*>g, <float*>b, n, sign, lr, weight_decay, momentum, keep,
                              nesterov, first, n_threads)
        else:
            sgd_blocks[double](<double*>p, <double*>g, <double*>b, n, sign, lr, weight_decay, momentum, keep,
                               nesterov, first, n_threads)


# Adam ------------------------------------------------------------------------------------------------


cdef void adam_block(floating* param, const floating* grad, floating* m, floating* v, floating* v_max,
                     Py_ssize_t n, floating sign, floating step_size, floating beta1, floating rest1,
                     floating beta2, floating rest2, floating correction, floating eps, floating decay,
                     floating l2) noexcept nogil:
    """g = sign * grad + l2 * param;  m = beta1 * m + rest1 * g;  v = beta2 * v + rest2 * g * g;
    param = decay * param - step_size * m / (sqrt(v) * correction + eps)   (v_max in v's place if given).

    Adam passes decay = 1, AdamW l2 = 0: both are exact, so one body serves the two.
    """
    cdef Py_ssize_t i
    cdef floating g, mi, vi
    for i in range(n):
        g = sign * grad[i] + l2 * param[i]
        mi = normal(beta1 * m[i] + rest1 * g)
        vi = normal(beta2 * v[i] + rest2 * g * g)
        m[i] = mi
        v[i] = vi
        if v_max != NULL:
            vi = v_max[i] if v_max[i] > vi else vi
            v_max[i] = vi
        param[i] = decay * param[i] - mi * (step_size / (root(vi) * correction + eps))


cdef void adam_blocks(floating* param, const floating* grad, floating* m, floating* v, floating* v_max,
                      Py_ssize_t n, floating sign, floating step_size, floating beta1, floating rest1,
                      floating beta2, floating rest2, floating correction, floating eps, floating decay,
                      floating l2, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        adam_block(param + i, grad + i, m + i, v + i, NULL if v_max == NULL else v_max + i,
                   min(<Py_ssize_t>BLOCK, n - i), sign, step_size, beta1, rest1, beta2, rest2, correction,
                   eps, decay, l2)


def adam(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray m, cnp.ndarray v, cnp.ndarray v_max, double sign,
         double step_size, double beta1, double beta2, double correction, double eps, double decay, double l2,
         int n_threads):
    """One Adam or AdamW step in place.

    step_size is lr / (1 - beta1**step), correction is 1 / sqrt(1 - beta2**step), decay is 1 - lr * weight
    decay for AdamW, l2 is Adam's weight decay; v_max is None without amsgrad.
    """
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* m_ = cnp.PyArray_DATA(m)
    cdef void* v_ = cnp.PyArray_DATA(v)
    cdef void* x = NULL if v_max is None else cnp.PyArray_DATA(v_max)
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            adam_blocks[float](<float*>p, <float*>g, <float*>m_, <float*>v_, <float*>x, n, sign, step_size,
                               beta1, 1 - beta1, beta2, 1 - beta2, correction, eps, decay, l2, n_threads)
        else:
            adam_blocks[double](<double*>p, <double*>g, <double*>m_, <double*>v_, <double*>x, n, sign,
                                step_size, beta1, 1 - beta1, beta2, 1 - beta2, correction, eps, decay, l2,
                                n_threads)


# RMSprop ---------------------------------------------------------------------------------------------


cdef inline void rmsprop_loop(floating* param, const floating* grad, floating* v, floating* mean,
                              floating* buffer, Py_ssize_t n, floating sign, floating lr, floating alpha,
                              floating rest, floating eps, floating weight_decay, floating momentum,
                              bint centered, bint has_buffer) noexcept nogil:
    """g = sign * grad + weight_decay * param;  v = alpha * v + rest * g * g;
    if centered: mean = alpha * mean + rest * g, and v - mean**2 takes v's place;  u = g / (sqrt(v) + eps);
    if has_buffer: buffer = u = momentum * buffer + u;  param -= lr * u."""
    cdef Py_ssize_t i
    cdef floating g, u, vi, mi
    for i in range(n):
        g = sign * grad[i] + weight_decay * param[i]
        vi = normal(alpha * v[i] + rest * g * g)
        v[i] = vi
        if centered:
            mi = normal(alpha * mean[i] + rest * g)
            mean[i] = mi
            vi = vi - mi * mi
            vi = <floating>0 if vi < <floating>0 else vi     # a variance; rounding can leave it below zero
        u = g / (root(vi) + eps)
        if has_buffer:
            u = normal(momentum * buffer[i] + u)
            buffer[i] = u
        param[i] = param[i] - lr * u


cdef void rmsprop_block(floating* param, const floating* grad, floating* v, floating* mean, floating* buffer,
                        Py_ssize_t n, floating sign, floating lr, floating alpha, floating rest, floating eps,
                        floating weight_decay, floating momentum) noexcept nogil:
    """The loop with its two options as constants: with them open GCC does not vectorise it."""
    if mean == NULL and buffer == NULL:
        rmsprop_loop(param, grad, v, mean, buffer, n, sign, lr, alpha, rest, eps, weight_decay, momentum, 0, 0)
    elif mean == NULL:
        rmsprop_loop(param, grad, v, mean, buffer, n, sign, lr, alpha, rest, eps, weight_decay, momentum, 0, 1)
    elif buffer == NULL:
        rmsprop_loop(param, grad, v, mean, buffer, n, sign, lr, alpha, rest, eps, weight_decay, momentum, 1, 0)
    else:
        rmsprop_loop(param, grad, v, mean, buffer, n, sign, lr, alpha, rest, eps, weight_decay, momentum, 1, 1)


cdef void rmsprop_blocks(floating* param, const floating* grad, floating* v, floating* mean, floating* buffer,
                         Py_ssize_t n, floating sign, floating lr, floating alpha, floating rest,
                         floating eps, floating weight_decay, floating momentum, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        rmsprop_block(param + i, grad + i, v + i, NULL if mean == NULL else mean + i,
                      NULL if buffer == NULL else buffer + i, min(<Py_ssize_t>BLOCK, n - i), sign, lr, alpha,
                      rest, eps, weight_decay, momentum)


def rmsprop(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray v, cnp.ndarray mean, cnp.ndarray buffer,
            double sign, double lr, double alpha, double eps, double weight_decay, double momentum,
            int n_threads):
    """One RMSprop step in place; mean is None unless centred, buffer is None without momentum."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* v_ = cnp.PyArray_DATA(v)
    cdef void* m = NULL if mean is None else cnp.PyArray_DATA(mean)
    cdef void* b = NULL if buffer is None else cnp.PyArray_DATA(buffer)
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            rmsprop_blocks[float](<float*>p, <float*>g, <float*>v_, <float*>m, <float*>b, n, sign, lr, alpha,
                                  1 - alpha, eps, weight_decay, momentum, n_threads)
        else:
            rmsprop_blocks[double](<double*>p, <double*>g, <double*>v_, <double*>m, <double*>b, n, sign, lr,
                                   alpha, 1 - alpha, eps, weight_decay, momentum, n_threads)


# Adagrad ---------------------------------------------------------------------------------------------


cdef void adagrad_block(floating* param, const floating* grad, floating* total, Py_ssize_t n, floating sign,
                        floating lr, floating eps, floating weight_decay) noexcept nogil:
    """g = sign * grad + weight_decay * param;  total += g * g;  param -= lr * g / (sqrt(total) + eps)."""
    cdef Py_ssize_t i
    cdef floating g, t
    for i in range(n):
        g = sign * grad[i] + weight_decay * param[i]
        t = normal(total[i] + g * g)
        total[i] = t
        param[i] = param[i] - lr * (g / (root(t) + eps))


cdef void adagrad_blocks(floating* param, const floating* grad, floating* total, Py_ssize_t n, floating sign,
                         floating lr, floating eps, floating weight_decay, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        adagrad_block(param + i, grad + i, total + i, min(<Py_ssize_t>BLOCK, n - i), sign, lr, eps,
                      weight_decay)


def adagrad(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray total, double sign, double lr, double eps,
            double weight_decay, int n_threads):
    """One Adagrad step in place; lr is this step's."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* t = cnp.PyArray_DATA(total)
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            adagrad_blocks[float](<float*>p, <float*>g, <float*>t, n, sign, lr, eps, weight_decay, n_threads)
        else:
            adagrad_blocks[double](<double*>p, <double*>g, <double*>t, n, sign, lr, eps, weight_decay,
                                   n_threads)


# Lion ------------------------------------------------------------------------------------------------


cdef inline floating signed_size(floating size, floating x) noexcept nogil:
    """size * sign(x); x itself where that is 0 or NaN."""
    return size if x > 0 else (-size if x < 0 else x)


cdef void lion_block(floating* param, const floating* grad, floating* m, Py_ssize_t n, floating sign,
                     floating lr, floating beta1, floating rest1, floating beta2, floating rest2,
                     floating decay) noexcept nogil:
    """param = decay * param - lr * sign(beta1 * m + rest1 * grad);  m = beta2 * m + rest2 * grad.

    The decay is a loop of its own, in the L1 cache: in one expression GCC fuses its product with the
    difference where the loop is vectorised, but not in the rest of the loop, whose bits then differ.
    """
    cdef Py_ssize_t i
    cdef floating g, mi
    scale_block(param, n, decay)
    for i in range(n):
        g = sign * grad[i]
        mi = m[i]
        param[i] = param[i] - signed_size(lr, beta1 * mi + rest1 * g)
        m[i] = normal(beta2 * mi + rest2 * g)


cdef void lion_blocks(floating* param, const floating* grad, floating* m, Py_ssize_t n, floating sign,
                      floating lr, floating beta1, floating rest1, floating beta2, floating rest2,
                      floating decay, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        lion_block(param + i, grad + i, m + i, min(<Py_ssize_t>BLOCK, n - i), sign, lr, beta1, rest1, beta2,
                   rest2, decay)


def lion(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray m, double sign, double lr, double beta1,
         double beta2, double decay, int n_threads):
    """One Lion step in place; decay is 1 - lr * weight decay."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* m_ = cnp.PyArray_DATA(m)
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            lion_blocks[float](<float*>p, <float*>g, <float*>m_, n, sign, lr, beta1, 1 - beta1, beta2,
                               1 - beta2, decay, n_threads)
        else:
            lion_blocks[double](<double*>p, <double*>g, <double*>m_, n, sign, lr, beta1, 1 - beta1, beta2,
                                1 - beta2, decay, n_threads)


# Muon's momentum -------------------------------------------------------------------------------------


cdef void muon_block(const floating* grad, floating* buffer, floating* mixed, Py_ssize_t n,
                     floating momentum, floating rest, bint nesterov) noexcept nogil:
    """buffer = momentum * buffer + rest * grad;
    mixed = momentum * buffer + rest * grad if nesterov else buffer."""
    cdef Py_ssize_t i
    cdef floating g, b
    for i in range(n):
        g = grad[i]
        b = normal(momentum * buffer[i] + rest * g)
        buffer[i] = b
        mixed[i] = momentum * b + rest * g if nesterov else b


cdef void muon_blocks(const floating* grad, floating* buffer, floating* mixed, Py_ssize_t n,
                      floating momentum, floating rest, bint nesterov, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, i, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        muon_block(grad + i, buffer + i, mixed + i, min(<Py_ssize_t>BLOCK, n - i), momentum, rest, nesterov)


def muon_momentum(cnp.ndarray grad, cnp.ndarray buffer, cnp.ndarray mixed, double momentum, bint nesterov,
                  int n_threads):
    """The buffer takes in the gradient; mixed becomes what Muon makes orthogonal."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(grad)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* b = cnp.PyArray_DATA(buffer)
    cdef void* x = cnp.PyArray_DATA(mixed)
    cdef bint single = cnp.PyArray_TYPE(grad) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            muon_blocks[float](<float*>g, <float*>b, <float*>x, n, momentum, 1 - momentum, nesterov, n_threads)
        else:
            muon_blocks[double](<double*>g, <double*>b, <double*>x, n, momentum, 1 - momentum, nesterov,
                                n_threads)


# Sums of squares -------------------------------------------------------------------------------------


cdef double sum_of_squares_block(const floating* x, Py_ssize_t n) noexcept nogil:
    """The sum of x * x in double: LANES partial sums, added in order."""
    cdef double[LANES] lane
    cdef double value, total = 0
    cdef Py_ssize_t i, j, rows = n // LANES
    for j in range(LANES):
        lane[j] = 0
    for i in range(rows):
        for j in range(LANES):
            value = x[i * LANES + j]
            lane[j] += value * value
    for j in range(n - rows * LANES):
        value = x[rows * LANES + j]
        lane[j] += value * value
    for j in range(LANES):
        total += lane[j]
    return total


cdef void sum_of_squares_blocks(const floating* x, double* partial, Py_ssize_t n, int n_threads) noexcept nogil:
    """partial[b]: the sum over block b."""
    cdef Py_ssize_t block, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        partial[block] = sum_of_squares_block(x + block * BLOCK, min(<Py_ssize_t>BLOCK, n - block * BLOCK))


def sum_of_squares(cnp.ndarray x, int n_threads):
    """The sum of the squares of all elements, in double: a model has too many for a float32 sum."""
    cdef Py_ssize_t block, n = cnp.PyArray_SIZE(x), n_blocks = (n + BLOCK - 1) // BLOCK
    cdef void* p = cnp.PyArray_DATA(x)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT
    cdef double total = 0
    cdef double* partial = <double*>malloc((n_blocks + 1) * sizeof(double))
    if partial == NULL:
        raise MemoryError()
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            sum_of_squares_blocks[float](<float*>p, partial, n, n_threads)
        else:
            sum_of_squares_blocks[double](<double*>p, partial, n, n_threads)
        for block in range(n_blocks):
            total += partial[block]
    free(partial)
    return total


# Statistics ------------------------------------------------------------------------------------------


cdef struct Statistics:
    double squares          # the sum of squares
    double largest          # the largest magnitude; NaN when there is a NaN
    double zeros            # how many elements are zero
    double nonfinite        # how many are infinite or NaN


cdef void statistics_block(const floating* x, Py_ssize_t n, Statistics* result) noexcept nogil:
    """The statistics of a block; its second loop finds the block in the L1 cache."""
    cdef floating[LANES] largest, zeros, nonfinite      # a lane counts to BLOCK / LANES: floats are exact
    cdef floating size
    cdef Py_ssize_t i, j, start, rows = n // LANES
    for j in range(LANES):
        largest[j] = zeros[j] = nonfinite[j] = 0
    for i in range(rows):
        for j in range(LANES):
            size = magnitude(x[i * LANES + j])
            largest[j] = size if size > largest[j] else largest[j]
            zeros[j] += <floating>1 if size == 0 else <floating>0
            # Infinity minus itself is NaN, as NaN minus itself is: neither equals zero.
            nonfinite[j] += <floating>0 if size - size == 0 else <floating>1
    start = rows * LANES
    for j in range(n - start):
        size = magnitude(x[start + j])
        largest[j] = size if size > largest[j] else largest[j]
        zeros[j] += <floating>1 if size == 0 else <floating>0
        nonfinite[j] += <floating>0 if size - size == 0 else <floating>1
    result.squares = sum_of_squares_block(x, n)
    result.largest = result.zeros = result.nonfinite = 0
    for j in range(LANES):
        result.largest = largest[j] if largest[j] > result.largest else result.largest
        result.zeros += zeros[j]
        result.nonfinite += nonfinite[j]
    if isnan(result.squares):       # a sum of squares is NaN through a NaN alone, which no `>` above saw
        result.largest = result.squares


cdef struct Part:
    void* data
    Py_ssize_t size
    Py_ssize_t first        # the number of its first block
    bint single


cdef void statistics_blocks(const Part* part, const Py_ssize_t* owner, Statistics* result,
                            Py_ssize_t n_blocks, int n_threads) noexcept nogil:
    """result[b]: the statistics of block b, which lies in array owner[b]."""
    cdef Py_ssize_t block, i
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = (block - part[owner[block]].first) * BLOCK
        if part[owner[block]].single:
            statistics_block[float](<float*>part[owner[block]].data + i,
                                    min(<Py_ssize_t>BLOCK, part[owner[block]].size - i), result + block)
        else:
            statistics_block[double](<double*>part[owner[block]].data + i,
                                     min(<Py_ssize_t>BLOCK, part[owner[block]].size - i), result + block)


def statistics(list arrays, cnp.ndarray table, int n_threads):
    """table[i]: sum of squares, largest magnitude, number of zeros and of non-finite elements of arrays[i]."""
    cdef Py_ssize_t n_arrays = len(arrays), n_blocks = 0, total = 0, i, b
    cdef cnp.ndarray array
    cdef Statistics* row = <Statistics*>cnp.PyArray_DATA(table)
    cdef Part* part = <Part*>malloc((n_arrays + 1) * sizeof(Part))
    cdef Py_ssize_t* owner = NULL
    cdef Statistics* partial = NULL
    try:
        if part == NULL:
            raise MemoryError()
        for i in range(n_arrays):
            array = arrays[i]
            part[i].data = cnp.PyArray_DATA(array)
            part[i].size = cnp.PyArray_SIZE(array)
            part[i].single = cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT
            part[i].first = n_blocks
            n_blocks += (part[i].size + BLOCK - 1) // BLOCK
            total += part[i].size
        part[n_arrays].first = n_blocks
        owner = <Py_ssize_t*>malloc((n_blocks + 1) * sizeof(Py_ssize_t))
        partial = <Statistics*>malloc((n_blocks + 1) * sizeof(Statistics))
        if owner == NULL or partial == NULL:
            raise MemoryError()
        for i in range(n_arrays):
            for b in range(part[i].first, part[i + 1].first):
                owner[b] = i
        n_threads = useful_threads(total, SERIAL_BELOW, n_threads)
        with nogil:
            statistics_blocks(part, owner, partial, n_blocks, n_threads)
        for i in range(n_arrays):
            row[i].squares = row[i].largest = row[i].zeros = row[i].nonfinite = 0
            for b in range(part[i].first, part[i + 1].first):
                row[i].squares += partial[b].squares
                if partial[b].largest > row[i].largest or isnan(partial[b].largest):
                    row[i].largest = partial[b].largest
                row[i].zeros += partial[b].zeros
                row[i].nonfinite += partial[b].nonfinite
    finally:
        free(part)
        free(owner)
        free(partial)


# Adafactor -------------------------------------------------------------------------------------------
#
# A parameter of two or more dimensions is a batch of matrices of R rows and C columns. The rows of each are
# cut into blocks that depend on the shape alone. Three passes, each over blocks: sums of squares of rows and
# columns (and of the parameter); the size of the update that they give; the update. A vector takes two.


cdef void square_sums(const floating* grad, Py_ssize_t rows, Py_ssize_t C, double* row_sum,
                      double* column_sum) noexcept nogil:
    """row_sum[i] = the sum of grad[i, :]**2; column_sum[j] += the sums of grad[:, j]**2."""
    cdef double[LANES] lane
    cdef double square, total
    cdef const floating* g
    cdef Py_ssize_t i, j, k, strips = C // LANES
    for i in range(rows):
        g = grad + i * C
        for k in range(LANES):
            lane[k] = 0
        for j in range(strips):
            for k in range(LANES):
                square = g[j * LANES + k]
                square = square * square
                lane[k] += square
                column_sum[j * LANES + k] += square
        for j in range(strips * LANES, C):
            square = g[j]
            square = square * square
            lane[j - strips * LANES] += square
            column_sum[j] += square
        total = 0
        for k in range(LANES):
            total += lane[k]
        row_sum[i] = total


cdef inline floating factored(floating g, floating row, floating column, floating floor) noexcept nogil:
    """g over the root of its estimated square; a NaN is above the floor and passes."""
    cdef floating v = row * column
    return g / root(floor if v < floor else v)


cdef double factored_squares(const floating* grad, Py_ssize_t rows, Py_ssize_t C, const double* row,
                             const floating* column, floating floor) noexcept nogil:
    """The sum of the squared updates of a block of rows."""
    cdef double[LANES] lane
    cdef double u, total = 0
    cdef floating r
    cdef const floating* g
    cdef Py_ssize_t i, j, k, strips = C // LANES
    for k in range(LANES):
        lane[k] = 0
    for i in range(rows):
        g = grad + i * C
        r = <floating>row[i]
        for j in range(strips):
            for k in range(LANES):
                u = factored(g[j * LANES + k], r, column[j * LANES + k], floor)
                lane[k] += u * u
        for j in range(strips * LANES, C):
            u = factored(g[j], r, column[j], floor)
            lane[j - strips * LANES] += u * u
    for k in range(LANES):
        total += lane[k]
    return total


cdef void factored_step(floating* param, const floating* grad, Py_ssize_t rows, Py_ssize_t C,
                        const double* row, const floating* column, floating floor, floating decay,
                        floating step_size) noexcept nogil:
    """param = decay * param - step_size * update, for a block of rows."""
    cdef floating r
    cdef Py_ssize_t i, j
    for i in range(rows):
        r = <floating>row[i]
        for j in range(C):
            param[i * C + j] = decay * param[i * C + j] - step_size * factored(grad[i * C + j], r, column[j],
                                                                              floor)


cdef double adafactor_step_size(double param_squares, double update_squares, Py_ssize_t n, double rho,
                                double eps2, double d) noexcept nogil:
    """max(eps2, RMS of the parameter) * rho / max(1, RMS of the update / d); NaN passes through both."""
    cdef double size = sqrt(param_squares / n), clip = sqrt(update_squares / n) / d
    size = eps2 if size < eps2 else size
    clip = 1 if clip < 1 else clip
    return size * rho / clip


cdef int adafactor_matrices(floating* param, const floating* grad, floating* row_var, floating* col_var,
                            Py_ssize_t B, Py_ssize_t R, Py_ssize_t C, double sign, double rest, double rho,
                            double eps1, floating floor, double eps2, double d, double decay,
                            int n_threads) noexcept nogil:
    """A step of B matrices (R, C); row_var is (B, R), col_var is (B, C). -1 without memory, else 0."""
    # At least 4 rows a block, so that its column sums, in double, stay under the size of its parameter.
    cdef Py_ssize_t rows = max((R + ROW_BLOCKS - 1) // ROW_BLOCKS, (BLOCK + C - 1) // C, 4)
    cdef Py_ssize_t per_matrix = (R + rows - 1) // rows
    cdef Py_ssize_t n_blocks = B * per_matrix, block, b, i, j, k
    cdef double* row = <double*>malloc(B * R * sizeof(double))
    cdef double* column = <double*>calloc(n_blocks * C, sizeof(double))
    cdef double* squares = <double*>malloc(n_blocks * sizeof(double))
    cdef double param_squares = 0, update_squares = 0, beta2 = 1 - rest, total
    cdef floating step_size
    if row == NULL or column == NULL or squares == NULL:
        free(row)
        free(column)
        free(squares)
        return -1
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        b = block // per_matrix
        i = b * R + block % per_matrix * rows
        k = min(rows, (b + 1) * R - i)
        square_sums(grad + i * C, k, C, row + i, column + block * C)
        squares[block] = sum_of_squares_block(param + i * C, k * C)
    for block in range(n_blocks):
        param_squares += squares[block]
    for b in range(B):
        for block in range(b * per_matrix + 1, (b + 1) * per_matrix):
            for j in range(C):
                column[b * per_matrix * C + j] += column[block * C + j]
        for j in range(C):
            total = beta2 * col_var[b * C + j] + rest * column[b * per_matrix * C + j] / R
            col_var[b * C + j] = normal(<floating>total)
        total = 0
        for i in range(b * R, (b + 1) * R):
            row_var[i] = normal(<floating>(beta2 * row_var[i] + rest * row[i] / C))
            total += row_var[i]
        total /= R
        total = eps1 if total < eps1 else total
        for i in range(b * R, (b + 1) * R):
            row[i] = row_var[i] / total
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        b = block // per_matrix
        i = b * R + block % per_matrix * rows
        squares[block] = factored_squares(grad + i * C, min(rows, (b + 1) * R - i), C, row + i, col_var + b * C,
                                          floor)
    for block in range(n_blocks):
        update_squares += squares[block]
    step_size = <floating>(sign * adafactor_step_size(param_squares, update_squares, B * R * C, rho, eps2, d))
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        b = block // per_matrix
        i = b * R + block % per_matrix * rows
        factored_step(param + i * C, grad + i * C, min(rows, (b + 1) * R - i), C, row + i, col_var + b * C,
                      floor, <floating>decay, step_size)
    free(row)
    free(column)
    free(squares)
    return 0


cdef double variance_block(const floating* grad, floating* variance, Py_ssize_t n, floating beta2,
                           floating rest, floating floor) noexcept nogil:
    """variance = beta2 * variance + rest * grad**2; the sum of the squared updates grad / sqrt(variance)."""
    cdef double[LANES] lane
    cdef double u, total = 0
    cdef Py_ssize_t i, j, rows = n // LANES
    for j in range(LANES):
        lane[j] = 0
    for i in range(n):
        variance[i] = normal(beta2 * variance[i] + rest * (grad[i] * grad[i]))
    for i in range(rows):
        for j in range(LANES):
            u = factored(grad[i * LANES + j], variance[i * LANES + j], <floating>1, floor)
            lane[j] += u * u
    for i in range(rows * LANES, n):
        u = factored(grad[i], variance[i], <floating>1, floor)
        lane[i - rows * LANES] += u * u
    for j in range(LANES):
        total += lane[j]
    return total


cdef void variance_step(floating* param, const floating* grad, const floating* variance, Py_ssize_t n,
                        floating floor, floating decay, floating step_size) noexcept nogil:
    """param = decay * param - step_size * grad / sqrt(variance)."""
    cdef Py_ssize_t i
    for i in range(n):
        param[i] = decay * param[i] - step_size * factored(grad[i], variance[i], <floating>1, floor)


cdef int adafactor_vector(floating* param, const floating* grad, floating* variance, Py_ssize_t n,
                          double sign, double rest, double rho, floating floor, double eps2, double d,
                          double decay, int n_threads) noexcept nogil:
    """A step of a parameter without rows and columns. -1 without memory, else 0."""
    cdef Py_ssize_t n_blocks = (n + BLOCK - 1) // BLOCK, block, i
    cdef double* squares = <double*>malloc(2 * n_blocks * sizeof(double))
    cdef double param_squares = 0, update_squares = 0
    cdef floating step_size
    if squares == NULL:
        return -1
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        squares[2 * block] = sum_of_squares_block(param + i, min(<Py_ssize_t>BLOCK, n - i))
        squares[2 * block + 1] = variance_block(grad + i, variance + i, min(<Py_ssize_t>BLOCK, n - i),
                                                <floating>(1 - rest), <floating>rest, floor)
    for block in range(n_blocks):
        param_squares += squares[2 * block]
        update_squares += squares[2 * block + 1]
    step_size = <floating>(sign * adafactor_step_size(param_squares, update_squares, n, rho, eps2, d))
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        i = block * BLOCK
        variance_step(param + i, grad + i, variance + i, min(<Py_ssize_t>BLOCK, n - i), floor,
                      <floating>decay, step_size)
    free(squares)
    return 0


def adafactor(cnp.ndarray param, cnp.ndarray grad, cnp.ndarray row_var, cnp.ndarray col_var,
              cnp.ndarray variance, double sign, double rest, double rho, double eps1, double floor,
              double eps2, double d, double decay, int n_threads):
    """One Adafactor step in place: row_var and col_var of a matrix, or variance of a vector.

    rest is 1 - beta2 of this step, rho the step size relative to the parameter, floor the least square of a
    gradient, decay is 1 - lr * weight decay.
    """
    cdef Py_ssize_t n = cnp.PyArray_SIZE(param), B, R = 0, C = 0
    cdef int failed, n_dims = cnp.PyArray_NDIM(param)
    cdef void* p = cnp.PyArray_DATA(param)
    cdef void* g = cnp.PyArray_DATA(grad)
    cdef void* r = NULL
    cdef void* c = NULL
    cdef void* v = NULL
    cdef bint single = cnp.PyArray_TYPE(param) == cnp.NPY_FLOAT
    if n == 0:
        return
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    if variance is None:
        R, C = cnp.PyArray_DIM(param, n_dims - 2), cnp.PyArray_DIM(param, n_dims - 1)
        B = n // (R * C)
        r = cnp.PyArray_DATA(row_var)
        c = cnp.PyArray_DATA(col_var)
    else:
        v = cnp.PyArray_DATA(variance)
    with nogil:
        if v != NULL and single:
            failed = adafactor_vector[float](<float*>p, <float*>g, <float*>v, n, sign, rest, rho, floor, eps2,
                                             d, decay, n_threads)
        elif v != NULL:
            failed = adafactor_vector[double](<double*>p, <double*>g, <double*>v, n, sign, rest, rho, floor,
                                              eps2, d, decay, n_threads)
        elif single:
            failed = adafactor_matrices[float](<float*>p, <float*>g, <float*>r, <float*>c, B, R, C, sign, rest,
                                               rho, eps1, floor, eps2, d, decay, n_threads)
        else:
            failed = adafactor_matrices[double](<double*>p, <double*>g, <double*>r, <double*>c, B, R, C, sign,
                                                rest, rho, eps1, floor, eps2, d, decay, n_threads)
    if failed:
        raise MemoryError()


# Scaling and clipping --------------------------------------------------------------------------------


cdef void scale_block(floating* x, Py_ssize_t n, floating factor) noexcept nogil:
    """x *= factor."""
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] * factor


cdef void scale_blocks(floating* x, Py_ssize_t n, floating factor, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        scale_block(x + block * BLOCK, min(<Py_ssize_t>BLOCK, n - block * BLOCK), factor)


def scale(cnp.ndarray x, double factor, int n_threads):
    """x *= factor in place."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    cdef void* p = cnp.PyArray_DATA(x)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            scale_blocks[float](<float*>p, n, factor, n_threads)
        else:
            scale_blocks[double](<double*>p, n, factor, n_threads)


cdef void clip_block(floating* x, Py_ssize_t n, floating limit) noexcept nogil:
    """x limited to [-limit, limit]; NaN fails both comparisons and stays."""
    cdef Py_ssize_t i
    cdef floating value
    for i in range(n):
        value = x[i]
        value = limit if value > limit else value
        x[i] = -limit if value < -limit else value


cdef void clip_blocks(floating* x, Py_ssize_t n, floating limit, int n_threads) noexcept nogil:
    cdef Py_ssize_t block, n_blocks = (n + BLOCK - 1) // BLOCK
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        clip_block(x + block * BLOCK, min(<Py_ssize_t>BLOCK, n - block * BLOCK), limit)


def clip(cnp.ndarray x, double limit, int n_threads):
    """x limited to [-limit, limit] in place."""
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    cdef void* p = cnp.PyArray_DATA(x)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT
    n_threads = useful_threads(n, SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            clip_blocks[float](<float*>p, n, limit, n_threads)
        else:
            clip_blocks[double](<double*>p, n, limit, n_threads)


# Neighbours ------------------------------------------------------------------------------------------


def gap(cnp.ndarray a not None, cnp.ndarray b not None):
    """How many elements lie between the end of a and the start of b, or -1.

    -1 unless both are contiguous views of one contiguous array of their dtype, b begins less than 16
    elements after a's end, and the elements between, the padding, are zero.
    """
    cdef object block = cnp.get_array_base(a)
    if block is not cnp.get_array_base(b) or not isinstance(block, cnp.ndarray):
        return -1
    cdef cnp.ndarray base = block
    cdef int kind = cnp.PyArray_TYPE(base)
    if not (cnp.PyArray_IS_C_CONTIGUOUS(base) and cnp.PyArray_IS_C_CONTIGUOUS(a)
            and cnp.PyArray_IS_C_CONTIGUOUS(b) and cnp.PyArray_TYPE(a) == kind and cnp.PyArray_TYPE(b) == kind):
        return -1
    cdef char* end = <char*>cnp.PyArray_DATA(a) + cnp.PyArray_NBYTES(a)
    cdef Py_ssize_t i, size = cnp.PyArray_ITEMSIZE(a), distance = <char*>cnp.PyArray_DATA(b) - end
    if distance < 0 or distance >= 16 * size:
        return -1
    for i in range(distance):
        if end[i] != 0:
            return -1
    return distance // size


def span(cnp.ndarray first not None, cnp.ndarray last not None):
    """The flat view from first's first element to last's last one, for a chain of neighbours (`gap`)."""
    if first is last:
        return first
    cdef cnp.ndarray base = (<object>cnp.get_array_base(first)).view(cnp.ndarray)  # np.matrix stays 2-D
    cdef char* origin = <char*>cnp.PyArray_DATA(base)
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(base)
    cdef Py_ssize_t start = (<char*>cnp.PyArray_DATA(first) - origin) // size
    cdef Py_ssize_t stop = (<char*>cnp.PyArray_DATA(last) - origin) // size + cnp.PyArray_SIZE(last)
    return base.reshape(-1)[start:stop]
