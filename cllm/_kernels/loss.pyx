"""Softmax cross-entropy on rows of logits, for classes or for probabilities; losses element by element.

A row of up to 50000 logits stays in the second cache while it is read twice: its largest element, then
the sum of exp(z - largest). Rows are independent; threads share them. Losses are written for each row and
summed by the caller, in a fixed order. The elementwise losses (regression, binary cross-entropy) cut their
arrays into blocks of BLOCK elements, which threads share.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange, threadid
from libc.math cimport log, log1p
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset
from numpy cimport PyArray_DATA as data

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_total
from cllm._kernels.rows cimport CHUNK, row_exp, row_max, row_sum_exp
from cllm._kernels.threads cimport useful_threads
from cllm._kernels.vmath cimport vexp

cdef extern from "scratch.h" nogil:
    void* cllm_scratch(size_t n_bytes)

cdef extern from "stream.h" nogil:
    void cllm_stream(void* y, const void* x, size_t n_bytes)

cnp.import_array()

cdef enum:
    BLOCK = 4096            # elements in a block of the elementwise losses
# Logits from which a second thread pays (benchmarks/thresholds.py): 8192 forward 11.1 -> 7.9 us, backward 8.6 -> 6.9.
# The same for the elements of the other losses: 16384 4.3 -> 3.9 us.
cdef double SERIAL_BELOW = 8192
cdef double ELEMENTS_SERIAL_BELOW = 16384
# Bytes from which a gradient goes past the caches, in which little of it would stay: a line is then not read
# before it is written. 4096 x 8192: 32.9 -> 28.8 ms, on two threads 17.0 -> 15.0.
cdef Py_ssize_t STREAM_FROM = 32 << 20


cdef inline void* data_or_null(cnp.ndarray array):
    return NULL if array is None else data(array)


# Rows of logits --------------------------------------------------------------------------------------

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


cdef inline double row_share(const floating* z, floating shift, const floating* q, const floating* weight,
                             floating keep, floating smooth, Py_ssize_t V) noexcept nogil:
    """sum(share (z - shift)), share = weight (keep q + smooth).  A share of 0 adds nothing, whatever z is."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef floating share
    cdef double total = 0
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                share = weight[k] * (keep * q[k] + smooth)
                lane[k] += share * (z[k] - shift) if share != 0 else <floating>0
            z += LANES
            q += LANES
            weight += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    for k in range(V % LANES):
        share = weight[k] * (keep * q[k] + smooth)
        total += share * (z[k] - shift) if share != 0 else <floating>0
    return total


cdef inline double row_dot(const floating* q, const floating* weight, Py_ssize_t V) noexcept nogil:
    """sum(weight q)."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef double total = 0
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += weight[k] * q[k]
            q += LANES
            weight += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    for k in range(V % LANES):
        total += weight[k] * q[k]
    return total


cdef inline floating trimmed(floating p) noexcept nogil:
    """float32: tails under 1e-30 become 0; times a small dloss they would be denormals, which slow products."""
    if floating is double:
        return p
    else:
        return <floating>0 if p < <floating>1e-30 else p


# Cross-entropy of classes ----------------------------------------------------------------------------
# With the target's class weight w, smoothing s and the mean of all class weights m:
#     loss = w (1 - s) (lse - z[target]) + s mean(weight (lse - z)) + w z_loss lse^2,
# and the first two terms together hold lse w (1 - s) + s m times.

cdef inline double weight_of(int64_t target, int64_t ignore_index, const floating* weight,
                             double spread) noexcept nogil:
    """The weight of a row's class (weight NULL: 1); negative where the row has no loss.

    That is an ignored row, and one whose class has weight 0 where smoothing leaves the others nothing either.
    """
    cdef double w
    if target == ignore_index:
        return -1
    if weight == NULL:
        return 1
    w = weight[target]
    return -1 if w == 0 and spread == 0 else w


cdef inline double others(const floating* z, floating largest, const floating* weight, double smoothing,
                          Py_ssize_t V) noexcept nogil:
    """s mean(weight (z - largest))."""
    if smoothing == 0:
        return 0
    if weight == NULL:
        return smoothing * row_mean(z, largest, V)
    # no probabilities here: keep = 0, and any array does for q
    return row_share(z, largest, weight, weight, 0, <floating>(smoothing / V), V)


cdef inline double value_of(double w, double smoothing, double spread, double z_loss, double whole,
                            double log_total, double near, double others) noexcept nogil:
    """The loss, where w is not negative; near = z[target] - largest, whole = largest + log_total = lse."""
    cdef double hard = w * (1 - smoothing), value = spread * log_total - others
    if hard > 0:
        value += hard * (log_total - near)
    if z_loss > 0:
        value += w * z_loss * whole * whole
    return value


cdef inline void to_gradient(floating* dz, int64_t target, double w, const floating* weight, double smoothing,
                             double spread, double z_loss, double lse, double total, double dloss,
                             Py_ssize_t V) noexcept nogil:
    """dz, exponentials that add up to total, becomes
    dloss ((w (1 - s) + s m + 2 w z_loss lse) softmax(z) - w (1 - s) onehot(target) - s weight / V)."""
    cdef double hard = w * (1 - smoothing)
    cdef floating scale = <floating>(dloss * (hard + spread + 2 * w * z_loss * lse) / total)
    cdef floating shift = <floating>(dloss * smoothing / V)
    cdef Py_ssize_t j
    if weight == NULL or smoothing == 0:
        for j in range(V):
            dz[j] = trimmed(dz[j]) * scale - shift
    else:
        for j in range(V):
            dz[j] = trimmed(dz[j]) * scale - shift * weight[j]
    dz[target] -= <floating>(dloss * hard)


cdef void row_forward(const floating* z, int64_t target, double w, const floating* weight, double smoothing,
                      double spread, double z_loss, Py_ssize_t V, floating* loss,
                      floating* lse) noexcept nogil:
    """The loss above, all taken from the largest element: logits of any size keep their digits.

    w as from weight_of; spread = s m.
    """
    cdef floating largest = row_max(z, V)
    cdef double log_total = log(row_sum_exp(z, largest, V))
    cdef double whole = largest + log_total
    lse[0] = <floating>whole
    loss[0] = 0
    if w >= 0:
        loss[0] = <floating>value_of(w, smoothing, spread, z_loss, whole, log_total, z[target] - largest,
                                     others(z, largest, weight, smoothing, V))


cdef void row_backward(const floating* z, int64_t target, double w, const floating* weight, double smoothing,
                       double spread, double z_loss, floating lse, double dloss, Py_ssize_t V,
                       floating* dz) noexcept nogil:
    """dz as from to_gradient; it may be z.

    exp(z - lse) is divided by its sum, which would be 1 without rounding: a float32 lse of 1e4 is off by up
    to 5e-4, and the sum undoes that.
    """
    cdef double total = row_exp(z, lse, dz, V)
    to_gradient(dz, target, w, weight, smoothing, spread, z_loss, lse, total, dloss, V)


cdef void row_both(const floating* z, int64_t target, double w, const floating* weight, double smoothing,
                   double spread, double z_loss, double dloss, Py_ssize_t V, floating* loss,
                   floating* dz) noexcept nogil:
    """The loss of row_forward, with its bits, and its gradient: each exponential is taken once.

    w is not negative; dz may be z.
    """
    cdef floating largest = row_max(z, V)
    cdef double near = z[target] - largest, rest = others(z, largest, weight, smoothing, V)
    cdef double total = row_exp(z, largest, dz, V)
    cdef double log_total = log(total), whole = largest + log_total
    loss[0] = <floating>value_of(w, smoothing, spread, z_loss, whole, log_total, near, rest)
    to_gradient(dz, target, w, weight, smoothing, spread, z_loss, whole, total, dloss, V)


cdef void forward(const floating* logits, const int64_t* targets, const floating* weight, double mean_weight,
                  int64_t ignore_index, double smoothing, double z_loss, floating* losses, floating* lse,
                  Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil:
    """logits: (N, V); targets, losses, lse: (N,); weight: (V,) or NULL, its mean (then 1) beside it."""
    cdef Py_ssize_t i
    cdef double spread = smoothing * mean_weight
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row_forward(logits + i * V, targets[i], weight_of(targets[i], ignore_index, weight, spread), weight,
                    smoothing, spread, z_loss, V, losses + i, lse + i)


cdef void backward(const floating* dlosses, const floating* logits, const int64_t* targets,
                   const floating* lse, const floating* weight, double mean_weight, int64_t ignore_index,
                   double smoothing, double z_loss, floating* dlogits, Py_ssize_t N, Py_ssize_t V,
                   int n_threads) noexcept nogil:
    """dlosses, targets, lse: (N,); weight as in forward; logits, dlogits: (N, V), which may be one array."""
    cdef Py_ssize_t i
    cdef double spread = smoothing * mean_weight, w
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        w = weight_of(targets[i], ignore_index, weight, spread)
        if w < 0:
            memset(dlogits + i * V, 0, V * sizeof(floating))
        else:
            row_backward(logits + i * V, targets[i], w, weight, smoothing, spread, z_loss, lse[i], dlosses[i],
                         V, dlogits + i * V)


cdef int both(const floating* dlosses, const floating* logits, const int64_t* targets, const floating* weight,
              double mean_weight, int64_t ignore_index, double smoothing, double z_loss, floating* losses,
              floating* dlogits, Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil:
    """As forward and backward in one; dlogits may be logits. -1 when there is no memory for a row a thread."""
    cdef Py_ssize_t i, step = (V + 63) // 64 * 64
    cdef double spread = smoothing * mean_weight, w
    cdef bint streams = dlogits != logits and N * V * <Py_ssize_t>sizeof(floating) >= STREAM_FROM
    cdef floating* rows = NULL
    cdef floating* row
    if streams:
        rows = <floating*>cllm_scratch(step * n_threads * sizeof(floating))
        if rows is NULL:
            return -1
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row = rows + step * threadid() if streams else dlogits + i * V
        w = weight_of(targets[i], ignore_index, weight, spread)
        if w < 0:
            losses[i] = 0
            memset(row, 0, V * sizeof(floating))
        else:
            row_both(logits + i * V, targets[i], w, weight, smoothing, spread, z_loss, dlosses[i], V,
                     losses + i, row)
        if streams:
            cllm_stream(dlogits + i * V, row, V * sizeof(floating))
    return 0


def cross_entropy_forward(cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray weight, double mean_weight,
                          int64_t ignore_index, double smoothing, double z_loss, cnp.ndarray losses,
                          cnp.ndarray lse, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef int64_t* t = <int64_t*>data(targets)
    cdef void* w = data_or_null(weight)
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            forward(<float*>data(logits), t, <float*>w, mean_weight, ignore_index, smoothing, z_loss,
                    <float*>data(losses), <float*>data(lse), N, V, n_threads)
    else:
        with nogil:
            forward(<double*>data(logits), t, <double*>w, mean_weight, ignore_index, smoothing, z_loss,
                    <double*>data(losses), <double*>data(lse), N, V, n_threads)


def cross_entropy_backward(cnp.ndarray dlosses, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray lse,
                           cnp.ndarray weight, double mean_weight, int64_t ignore_index, double smoothing,
                           double z_loss, cnp.ndarray dlogits, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef int64_t* t = <int64_t*>data(targets)
    cdef void* w = data_or_null(weight)
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dlosses), <float*>data(logits), t, <float*>data(lse), <float*>w,
                     mean_weight, ignore_index, smoothing, z_loss, <float*>data(dlogits), N, V, n_threads)
    else:
        with nogil:
            backward(<double*>data(dlosses), <double*>data(logits), t, <double*>data(lse), <double*>w,
                     mean_weight, ignore_index, smoothing, z_loss, <double*>data(dlogits), N, V, n_threads)


def cross_entropy_both(cnp.ndarray dlosses, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray weight,
                       double mean_weight, int64_t ignore_index, double smoothing, double z_loss,
                       cnp.ndarray losses, cnp.ndarray dlogits, int n_threads):
    """The losses and their gradient; dlogits may be logits."""
    cdef int status
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef int64_t* t = <int64_t*>data(targets)
    cdef void* w = data_or_null(weight)
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            status = both(<float*>data(dlosses), <float*>data(logits), t, <float*>w, mean_weight, ignore_index,
                          smoothing, z_loss, <float*>data(losses), <float*>data(dlogits), N, V, n_threads)
    else:
        with nogil:
            status = both(<double*>data(dlosses), <double*>data(logits), t, <double*>w, mean_weight, ignore_index,
                          smoothing, z_loss, <double*>data(losses), <double*>data(dlogits), N, V, n_threads)
    if status != 0:
        raise MemoryError("no memory for a row of the gradient in each thread")


# Cross-entropy of probabilities ----------------------------------------------------------------------
# With share = weight ((1 - s) q + s / V), its sum S = (1 - s) r + s m, and r = sum(weight q):
#     loss = sum(share (lse - z)) + r z_loss lse^2.

cdef inline bint is_vacant(const floating* q, const floating* weight, double r, double spread,
                           Py_ssize_t V) noexcept nogil:
    """Whether no class has a share: such a row has loss 0 and no gradient, whatever its logits are."""
    cdef Py_ssize_t k
    if r != 0 or spread != 0:
        return False
    for k in range(V):
        if weight[k] * q[k] != 0:
            return False
    return True


cdef void row_soft_forward(const floating* z, const floating* q, const floating* weight, double smoothing,
                           double spread, double z_loss, Py_ssize_t V, floating* loss,
                           floating* lse) noexcept nogil:
    """The loss above; a class whose share is 0 adds nothing where its logit is minus infinity."""
    cdef floating largest = row_max(z, V)
    cdef double log_total = log(row_sum_exp(z, largest, V))
    cdef double whole = largest + log_total, r = row_dot(q, weight, V)
    cdef double value = ((1 - smoothing) * r + spread) * log_total
    value -= row_share(z, largest, q, weight, <floating>(1 - smoothing), <floating>(smoothing / V), V)
    if z_loss > 0:
        value += r * z_loss * whole * whole
    lse[0] = <floating>whole
    loss[0] = <floating>0 if is_vacant(q, weight, r, spread, V) else <floating>value


cdef void row_soft_backward(const floating* z, const floating* q, const floating* weight, double smoothing,
                            double spread, double z_loss, floating lse, double dloss, Py_ssize_t V,
                            floating* dz) noexcept nogil:
    """dz = dloss ((S + 2 r z_loss lse) softmax(z) - share); dz may be z, as in row_backward."""
    cdef double total = row_exp(z, lse, dz, V), r = row_dot(q, weight, V)
    cdef double whole = (1 - smoothing) * r + spread + 2 * r * z_loss * lse
    cdef floating scale = <floating>(dloss * whole / total)
    cdef floating keep = <floating>(dloss * (1 - smoothing)), smooth = <floating>(dloss * smoothing / V)
    cdef Py_ssize_t j
    if is_vacant(q, weight, r, spread, V):
        memset(dz, 0, V * sizeof(floating))
        return
    for j in range(V):
        dz[j] = trimmed(dz[j]) * scale - weight[j] * (keep * q[j] + smooth)


cdef void soft_forward(const floating* logits, const floating* q, const floating* weight, double mean_weight,
                       const uint8_t* mask, double smoothing, double z_loss, floating* losses, floating* lse,
                       Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil:
    """logits, q: (N, V); weight: (V,), its mean beside it; losses, lse: (N,); mask: (N,), or NULL for all."""
    cdef Py_ssize_t i
    cdef double spread = smoothing * mean_weight
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        row_soft_forward(logits + i * V, q + i * V, weight, smoothing, spread, z_loss, V, losses + i, lse + i)
        if mask != NULL and not mask[i]:
            losses[i] = 0


cdef void soft_backward(const floating* dlosses, const floating* logits, const floating* q,
                        const floating* lse, const floating* weight, double mean_weight, const uint8_t* mask,
                        double smoothing, double z_loss, floating* dlogits, Py_ssize_t N, Py_ssize_t V,
                        int n_threads) noexcept nogil:
    """As soft_forward; dlosses: (N,); logits and dlogits may be one array."""
    cdef Py_ssize_t i
    cdef double spread = smoothing * mean_weight
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        if mask != NULL and not mask[i]:
            memset(dlogits + i * V, 0, V * sizeof(floating))
        else:
            row_soft_backward(logits + i * V, q + i * V, weight, smoothing, spread, z_loss, lse[i],
                              dlosses[i], V, dlogits + i * V)


def soft_cross_entropy_forward(cnp.ndarray logits, cnp.ndarray q, cnp.ndarray weight, double mean_weight,
                               cnp.ndarray mask, double smoothing, double z_loss, cnp.ndarray losses,
                               cnp.ndarray lse, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef uint8_t* rows = <uint8_t*>data_or_null(mask)
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            soft_forward(<float*>data(logits), <float*>data(q), <float*>data(weight), mean_weight, rows,
                         smoothing, z_loss, <float*>data(losses), <float*>data(lse), N, V, n_threads)
    else:
        with nogil:
            soft_forward(<double*>data(logits), <double*>data(q), <double*>data(weight), mean_weight, rows,
                         smoothing, z_loss, <double*>data(losses), <double*>data(lse), N, V, n_threads)


def soft_cross_entropy_backward(cnp.ndarray dlosses, cnp.ndarray logits, cnp.ndarray q, cnp.ndarray lse,
                                cnp.ndarray weight, double mean_weight, cnp.ndarray mask, double smoothing,
                                double z_loss, cnp.ndarray dlogits, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_DIM(logits, 0), V = cnp.PyArray_DIM(logits, 1)
    cdef uint8_t* rows = <uint8_t*>data_or_null(mask)
    n_threads = useful_threads(N * V, SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT:
        with nogil:
            soft_backward(<float*>data(dlosses), <float*>data(logits), <float*>data(q), <float*>data(lse),
                          <float*>data(weight), mean_weight, rows, smoothing, z_loss, <float*>data(dlogits),
                          N, V, n_threads)
    else:
        with nogil:
            soft_backward(<double*>data(dlosses), <double*>data(logits), <double*>data(q), <double*>data(lse),
                          <double*>data(weight), mean_weight, rows, smoothing, z_loss, <double*>data(dlogits),
                          N, V, n_threads)


# Regression ------------------------------------------------------------------------------------------
# With d = |x - t|: curve d^2 up to bend, slope (d - bend / 2) beyond. That is
#     squared error at curve 1, bend infinity;         absolute error at bend 0, slope 1;
#     smooth L1 at curve 1 / (2 bend), slope 1;        Huber at curve 1/2, slope = bend.
# A NaN fails the comparisons with bend and stays on the curve, which it spoils.

cdef void regression_forward_block(const floating* x, const floating* t, floating* losses, Py_ssize_t n,
                                   floating curve, floating bend, floating slope) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating d
    for i in range(n):
        d = x[i] - t[i]
        d = -d if d < 0 else d
        losses[i] = slope * (d - <floating>0.5 * bend) if d > bend else curve * d * d


cdef void regression_backward_block(const floating* dlosses, const floating* x, const floating* t,
                                    floating* dx, Py_ssize_t n, floating curve, floating bend,
                                    floating slope) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating d
    for i in range(n):
        d = x[i] - t[i]
        dx[i] = dlosses[i] * (slope if d > bend else -slope if d < -bend else <floating>2 * curve * d)


cdef void regression_forward_blocks(const floating* x, const floating* t, floating* losses, Py_ssize_t n,
                                    double curve, double bend, double slope, int n_threads) noexcept nogil:
    """x, t, losses: (n,)."""
    cdef Py_ssize_t start
    for start in prange(0, n, BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        regression_forward_block(x + start, t + start, losses + start, min(<Py_ssize_t>BLOCK, n - start),
                                 <floating>curve, <floating>bend, <floating>slope)


cdef void regression_backward_blocks(const floating* dlosses, const floating* x, const floating* t,
                                     floating* dx, Py_ssize_t n, double curve, double bend, double slope,
                                     int n_threads) noexcept nogil:
    """dlosses, x, t, dx: (n,)."""
    cdef Py_ssize_t start
    for start in prange(0, n, BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        regression_backward_block(dlosses + start, x + start, t + start, dx + start,
                                  min(<Py_ssize_t>BLOCK, n - start), <floating>curve, <floating>bend,
                                  <floating>slope)


def regression_forward(cnp.ndarray x, cnp.ndarray t, double curve, double bend, double slope,
                       cnp.ndarray losses, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    n_threads = useful_threads(n, ELEMENTS_SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            regression_forward_blocks(<float*>data(x), <float*>data(t), <float*>data(losses), n, curve, bend,
                                      slope, n_threads)
    else:
        with nogil:
            regression_forward_blocks(<double*>data(x), <double*>data(t), <double*>data(losses), n, curve,
                                      bend, slope, n_threads)


def regression_backward(cnp.ndarray dlosses, cnp.ndarray x, cnp.ndarray t, double curve, double bend,
                        double slope, cnp.ndarray dx, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    n_threads = useful_threads(n, ELEMENTS_SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            regression_backward_blocks(<float*>data(dlosses), <float*>data(x), <float*>data(t),
                                       <float*>data(dx), n, curve, bend, slope, n_threads)
    else:
        with nogil:
            regression_backward_blocks(<double*>data(dlosses), <double*>data(x), <double*>data(t),
                                       <double*>data(dx), n, curve, bend, slope, n_threads)


# Binary cross-entropy --------------------------------------------------------------------------------
# loss = weight (pos t softplus(-x) + (1 - t) softplus(x)), softplus(x) = max(x, 0) + log(1 + exp(-|x|)): the
# larger part of each softplus is exact, and nothing cancels (t = 0, x = -20: 2.06e-9, not 0).

cdef inline floating log_1p(floating e) noexcept nogil:
    """log(1 + e) on [0, 1].

    float32: 2 atanh(r), r = e / (2 + e) <= 1/3, whose series ends with a relative error under 1e-8.
    """
    cdef floating r, u
    if floating is double:
        return log1p(e)
    else:
        r = e / (<floating>2 + e)
        u = r * r
        return <floating>2 * r * (<floating>1 + u * (<floating>(1. / 3) + u * (
            <floating>(1. / 5) + u * (<floating>(1. / 7) + u * (
                <floating>(1. / 9) + u * (<floating>(1. / 11) + u * <floating>(1. / 13)))))))


cdef void bce_forward_block(const floating* x, const floating* t, const floating* weight, const floating* pos,
                            floating* losses, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating size, yes, no
    for i in range(n):
        size = -x[i] if x[i] < 0 else x[i]
        yes = t[i] if pos == NULL else t[i] * pos[i]
        no = <floating>1 - t[i]
        losses[i] = (no if x[i] > 0 else yes) * size + (yes + no) * log_1p(vexp(-size))
    if weight != NULL:
        for i in range(n):
            losses[i] *= weight[i]


cdef void bce_backward_block(const floating* dlosses, const floating* x, const floating* t,
                             const floating* weight, const floating* pos, floating* dx,
                             Py_ssize_t n) noexcept nogil:
    """dx = dloss weight ((1 - t) sigmoid(x) - pos t sigmoid(-x))."""
    cdef Py_ssize_t i
    cdef floating e, large, small, yes, no
    for i in range(n):
        e = vexp(x[i] if x[i] < 0 else -x[i])
        large = <floating>1 / (<floating>1 + e)
        small = e * large
        yes = t[i] if pos == NULL else t[i] * pos[i]
        no = <floating>1 - t[i]
        dx[i] = dlosses[i] * (no * large - yes * small if x[i] > 0 else no * small - yes * large)
    if weight != NULL:
        for i in range(n):
            dx[i] *= weight[i]


cdef void bce_forward_blocks(const floating* x, const floating* t, const floating* weight,
                             const floating* pos, floating* losses, Py_ssize_t n,
                             int n_threads) noexcept nogil:
    """x, t, losses: (n,); weight, pos: (n,) or NULL for 1."""
    cdef Py_ssize_t start
    for start in prange(0, n, BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        bce_forward_block(x + start, t + start, weight + start if weight != NULL else weight,
                          pos + start if pos != NULL else pos, losses + start,
                          min(<Py_ssize_t>BLOCK, n - start))


cdef void bce_backward_blocks(const floating* dlosses, const floating* x, const floating* t,
                              const floating* weight, const floating* pos, floating* dx, Py_ssize_t n,
                              int n_threads) noexcept nogil:
    """dlosses, x, t, dx: (n,); weight, pos: (n,) or NULL for 1."""
    cdef Py_ssize_t start
    for start in prange(0, n, BLOCK, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        bce_backward_block(dlosses + start, x + start, t + start,
                           weight + start if weight != NULL else weight, pos + start if pos != NULL else pos,
                           dx + start, min(<Py_ssize_t>BLOCK, n - start))


def bce_with_logits_forward(cnp.ndarray x, cnp.ndarray t, cnp.ndarray weight, cnp.ndarray pos,
                            cnp.ndarray losses, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    cdef void* w = data_or_null(weight)
    cdef void* p = data_or_null(pos)
    n_threads = useful_threads(n, ELEMENTS_SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            bce_forward_blocks(<float*>data(x), <float*>data(t), <float*>w, <float*>p, <float*>data(losses),
                               n, n_threads)
    else:
        with nogil:
            bce_forward_blocks(<double*>data(x), <double*>data(t), <double*>w, <double*>p,
                               <double*>data(losses), n, n_threads)


def bce_with_logits_backward(cnp.ndarray dlosses, cnp.ndarray x, cnp.ndarray t, cnp.ndarray weight,
                             cnp.ndarray pos, cnp.ndarray dx, int n_threads):
    cdef Py_ssize_t n = cnp.PyArray_SIZE(x)
    cdef void* w = data_or_null(weight)
    cdef void* p = data_or_null(pos)
    n_threads = useful_threads(n, ELEMENTS_SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT:
        with nogil:
            bce_backward_blocks(<float*>data(dlosses), <float*>data(x), <float*>data(t), <float*>w, <float*>p,
                                <float*>data(dx), n, n_threads)
    else:
        with nogil:
            bce_backward_blocks(<double*>data(dlosses), <double*>data(x), <double*>data(t), <double*>w,
                                <double*>p, <double*>data(dx), n, n_threads)
