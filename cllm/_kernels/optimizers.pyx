"""Optimizer updates, sums of squares and scaling: each one pass over arrays of n elements.

An update reads the gradient once and reads and writes the parameter and its moments once: its speed is
the memory's. The arrays of a call have n elements each and lie apart; the door has checked that. Work
is cut into blocks of BLOCK elements, whatever the thread count. Scalars such as 1 - beta are computed
by the door, in double, and arrive hoisted.

A moment whose gradients have stopped (an unused token's embedding) decays into the denormal numbers,
rounds to itself there and stays for ever; arithmetic on denormals is many times slower on some CPUs.
Moments below the smallest normal number are therefore stored as zero. NaN passes through.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.float cimport DBL_MIN, FLT_MIN
from libc.math cimport fabs, fabsf, sqrt, sqrtf
from libc.stdlib cimport free, malloc

cnp.import_array()

cdef enum:
    BLOCK = 4096            # 16 KB of float32 an array
    LANES = 32              # partial sums of a block's squares
    SERIAL_BELOW = 65536    # elements; 65536 with a second thread: Adam 29 -> 20 us, scaling 3.1 -> 4.7 us


cdef inline floating root(floating x) noexcept nogil:
    return sqrtf(x) if floating is float else sqrt(x)


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
    if n < SERIAL_BELOW:
        n_threads = 1
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
    if n < SERIAL_BELOW:
        n_threads = 1
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
    if n < SERIAL_BELOW:
        n_threads = 1
    with nogil:
        if single:
            rmsprop_blocks[float](<float*>p, <float*>g, <float*>v_, <float*>m, <float*>b, n, sign, lr, alpha,
                                  1 - alpha, eps, weight_decay, momentum, n_threads)
        else:
            rmsprop_blocks[double](<double*>p, <double*>g, <double*>v_, <double*>m, <double*>b, n, sign, lr,
                                   alpha, 1 - alpha, eps, weight_decay, momentum, n_threads)


# Norms and clipping ----------------------------------------------------------------------------------


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
    if n < SERIAL_BELOW:
        n_threads = 1
    with nogil:
        if single:
            sum_of_squares_blocks[float](<float*>p, partial, n, n_threads)
        else:
            sum_of_squares_blocks[double](<double*>p, partial, n, n_threads)
        for block in range(n_blocks):
            total += partial[block]
    free(partial)
    return total


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
    if n < SERIAL_BELOW:
        n_threads = 1
    with nogil:
        if single:
            scale_blocks[float](<float*>p, n, factor, n_threads)
        else:
            scale_blocks[double](<double*>p, n, factor, n_threads)


# Neighbours ------------------------------------------------------------------------------------------


def gap(cnp.ndarray a, cnp.ndarray b):
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


def span(cnp.ndarray first, cnp.ndarray last):
    """The flat view from first's first element to last's last one, for a chain of neighbours (`gap`)."""
    if first is last:
        return first
    cdef cnp.ndarray base = cnp.get_array_base(first)
    cdef char* origin = <char*>cnp.PyArray_DATA(base)
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(base)
    cdef Py_ssize_t start = (<char*>cnp.PyArray_DATA(first) - origin) // size
    cdef Py_ssize_t stop = (<char*>cnp.PyArray_DATA(last) - origin) // size + cnp.PyArray_SIZE(last)
    return base.reshape(-1)[start:stop]
