"""Multi-head scaled dot-product attention that never stores the T x S matrix.

Threads own key/value heads, each with the query heads that share it (Ainslie et al. 2023, "GQA"). Forward: the
scores S = scale Q K^T of some rows and CHUNK keys fit the L2 cache with those keys and values; softmax takes two
plain passes over them, then O = P V. Further chunks correct what the rows have so far to the new maximum
(Milakov & Gimelshein 2018). Only the rows' log-sum-exp is kept.
Backward computes P again from it, in blocks of ROWS queries by KEYS keys (Dao et al. 2022, "FlashAttention",
algorithm 4): with D_i = dO_i . O_i,

    dV = P^T dO      dS = P * (dO V^T - D)      dQ = scale dS K      dK = scale dS^T Q

All products run on the register tile of `tile.h`. K and V are packed for it once for each key/value head,
padded with zeros to whole vectors, and no further than the last key that a query sees. Causal tiles stop at
the diagonal; the few elements beyond it inside a tile are zeros, as are those that a mask excludes. Blocks in
which a mask excludes everything are skipped.

Zero times NaN is NaN, so a row with a NaN or an infinity (perhaps only after its scaling) counts as zeros among
the packed operands of these products. What it gives is added afterwards, to those rows alone that see it.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange, threadid
from libc.math cimport NAN, ceil, exp, log, logf
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_total
from cllm._kernels.threads cimport useful_threads
from cllm._kernels.tile cimport MR, NV, VBYTES, pack, pack_transposed, round_up, tile

cnp.import_array()

cdef extern from "scratch.h" nogil:
    void* cllm_scratch(size_t n_bytes)

cdef extern from "attention.h" nogil:
    float cllm_softmax_row_f32(float* s, Py_ssize_t n, Py_ssize_t end, float* max)
    double cllm_softmax_row_f64(double* s, Py_ssize_t n, Py_ssize_t end, double* max)
    void cllm_score_gradients_f32(float* p, float* s, Py_ssize_t n, Py_ssize_t end, float lse, float delta)
    void cllm_score_gradients_f64(double* p, double* s, Py_ssize_t n, Py_ssize_t end, double lse, double delta)
    bint cllm_pack_finite_f32(const float* x, Py_ssize_t ld, Py_ssize_t T, Py_ssize_t D, Py_ssize_t width,
                              float scale, float* y)
    bint cllm_pack_finite_f64(const double* x, Py_ssize_t ld, Py_ssize_t T, Py_ssize_t D, Py_ssize_t width,
                              double scale, double* y)

cdef extern from "hash.h" nogil:
    uint32_t cllm_hash_high(uint64_t key, uint64_t index)
    uint32_t cllm_hash(uint64_t key, uint32_t high, uint32_t low)

cdef extern from "math.h" nogil:
    const float INFINITY

cdef enum:
    KEYS = 64                   # keys in a block of the backward pass: a multiple of every tile's width
    CHUNK = 1024                # keys of the forward pass at a time: a multiple of KEYS
    PAD = 16                    # row padding of score blocks: no rows 4 KB apart, room for whole lanes

cdef Py_ssize_t ROWS = 8 * MR               # queries in a block: of 16 the backward pass takes 8 % longer at T = 8192
# Multiply-adds of all heads from which a second thread pays (benchmarks/thresholds.py): 131072 forward 14 -> 12 us,
# backward 22 -> 18.
cdef double SERIAL_BELOW = 131072


cdef inline Py_ssize_t panel_width(Py_ssize_t item_size) noexcept nogil:
    return NV * VBYTES // item_size


cdef bint all_finite(const floating* x, Py_ssize_t stride, Py_ssize_t T, Py_ssize_t D) noexcept nogil:
    """Whether x (T, D) has no NaN and no infinity: x * 0 is 0 for finite x only."""
    cdef floating lane[LANES]
    cdef Py_ssize_t i, c
    cdef int l
    lanes_clear(lane)
    for i in range(T):
        c = 0
        while c + LANES <= D:
            for l in range(LANES):
                lane[l] += x[i * stride + c + l] * <floating>0
            c = c + LANES
        while c < D:
            lane[0] += x[i * stride + c] * <floating>0
            c = c + 1
    return lanes_total(lane) == 0


cdef inline floating softmax_row(floating* s, Py_ssize_t n, Py_ssize_t end, floating* top) noexcept nogil:
    """s[:n] = exp(s - max), s[n:end] = 0.  Writes max and returns the sum."""
    if floating is float:
        return cllm_softmax_row_f32(s, n, end, top)
    else:
        return cllm_softmax_row_f64(s, n, end, top)


cdef void drop_row(floating* s, Py_ssize_t n, const Shape* shape, uint64_t index) noexcept nogil:
    """s[j] = s[j] / (1 - p) or 0, by the random bits of element index + j of (B, H, Tq, Tk)."""
    cdef uint64_t room = (<uint64_t>1 << 32) - <uint32_t>index      # elements with the same high half
    cdef uint32_t high = cllm_hash_high(shape.key, index)
    cdef floating keep = <floating>shape.keep_scale
    cdef Py_ssize_t j
    if <uint64_t>n > room:
        drop_row(s + room, n - <Py_ssize_t>room, shape, index + room)
        n = <Py_ssize_t>room
    for j in range(n):
        s[j] = s[j] * keep if cllm_hash(shape.key, high, <uint32_t>(index + j)) <= shape.keep_limit else <floating>0


cdef inline Py_ssize_t offset_of(const Shape* shape, Py_ssize_t b) noexcept nogil:
    return 0 if shape.offsets is NULL else <Py_ssize_t>shape.offsets[b]


cdef inline Py_ssize_t keys_seen(const Shape* shape, Py_ssize_t offset, Py_ssize_t i,
                                 Py_ssize_t end) noexcept nogil:
    """How many of the first `end` keys query i sees, masks aside."""
    return min(offset + i + 1, end) if shape.causal else end


cdef inline Py_ssize_t mask_at(const Shape* shape, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i,
                               Py_ssize_t j) noexcept nogil:
    cdef const Strides* m = &shape.mask_strides
    return b * m.b + h * m.h + i * m.t + j * m.s


cdef inline bint allowed(const Shape* shape, Py_ssize_t at) noexcept nogil:
    """Whether the mask's element lets its key take part."""
    if shape.mask_size == 1:
        return shape.mask[at] != 0
    if shape.mask_size == 4:
        return (<const float*>shape.mask)[at] != -INFINITY
    return (<const double*>shape.mask)[at] != -INFINITY


cdef inline bint visible(const Shape* shape, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i,
                         Py_ssize_t j) noexcept nogil:
    """Whether query i sees key j."""
    if shape.causal and j > offset_of(shape, b) + i:
        return False
    return shape.mask is NULL or allowed(shape, mask_at(shape, b, h, i, j))


cdef void mask_range(const Shape* shape, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t i1,
                     Py_ssize_t* first, Py_ssize_t* end) noexcept nogil:
    """Narrows [0, end) to [first, end) with all keys that the mask allows any of the queries i0..i1-1.

    first is a multiple of KEYS; both are 0 where there is no such key.
    """
    cdef Py_ssize_t low = end[0], high = 0, step = shape.mask_strides.s, i, j, at
    for i in range(i0, i1):
        at = mask_at(shape, b, h, i, 0)
        j = 0
        while j < low and not allowed(shape, at + j * step):
            j = j + 1
        low = j
        j = end[0]
        while j > high and not allowed(shape, at + (j - 1) * step):
            j = j - 1
        high = j
    first[0] = min(low, high) // KEYS * KEYS
    end[0] = high


cdef bint any_allowed(const Shape* shape, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i0, Py_ssize_t i1,
                      Py_ssize_t j0, Py_ssize_t j1) noexcept nogil:
    """Whether the mask allows any of the queries i0..i1-1 any of the keys j0..j1-1."""
    cdef Py_ssize_t step = shape.mask_strides.s, i, j, at
    for i in range(i0, i1):
        at = mask_at(shape, b, h, i, 0)
        for j in range(j0, j1):
            if allowed(shape, at + j * step):
                return True
    return False


cdef void add_bias(floating* s, Py_ssize_t n, const Shape* shape, Py_ssize_t b, Py_ssize_t h, Py_ssize_t i,
                   Py_ssize_t j) noexcept nogil:
    """s[c] += mask - slope * distance for query i and the n keys from j on; a boolean mask adds nothing.

    A query beyond the last key counts from there: what all its distances share would only take digits.
    """
    cdef Py_ssize_t step = shape.mask_strides.s
    cdef const floating* mask
    cdef floating slope, ahead, distance
    cdef int c
    if shape.slopes is not NULL:
        slope = <floating>shape.slopes[h]
        ahead = <floating>(min(offset_of(shape, b) + i, shape.Tk - 1) - j)
        for c in range(<int>n):
            distance = ahead - <floating>c
            s[c] -= slope * (distance if distance > 0 else -distance)
    if shape.mask is not NULL and shape.mask_size != 1:
        mask = <const floating*>shape.mask + mask_at(shape, b, h, i, j)
        for c in range(<int>n):
            s[c] += mask[c * step]


cdef Py_ssize_t exclude(floating* s, Py_ssize_t n, const Shape* shape, Py_ssize_t b, Py_ssize_t h,
                        Py_ssize_t i, Py_ssize_t j, floating value) noexcept nogil:
    """s[c] = value where the mask excludes one of the n keys from j on from query i; how many are left."""
    cdef Py_ssize_t step = shape.mask_strides.s, at = mask_at(shape, b, h, i, j)
    cdef const floating* bias = <const floating*>shape.mask + at
    cdef const char* mask = shape.mask + at
    cdef int c, left = 0
    if shape.mask_size == 1:
        for c in range(<int>n):
            left += mask[c * step] != 0
            s[c] = s[c] if mask[c * step] != 0 else value
    else:
        for c in range(<int>n):
            left += bias[c * step] != -INFINITY
            s[c] = s[c] if bias[c * step] != -INFINITY else value
    return left


cdef bint pack_finite(const floating* x, Py_ssize_t stride, Py_ssize_t T, Py_ssize_t D, Py_ssize_t width,
                      double scale, floating* y) noexcept nogil:
    """y (T, width) = scale * x (T, D), with zeros beyond D and for rows of y that are not finite.

    Returns whether all are finite.
    """
    cdef bint finite
    cdef Py_ssize_t i
    if floating is float:
        finite = cllm_pack_finite_f32(x, stride, T, D, width, <float>scale, y)
    else:
        finite = cllm_pack_finite_f64(x, stride, T, D, width, scale, y)
    if finite:
        return True
    for i in range(T):
        if not all_finite(y + i * width, 0, 1, width):
            memset(y + i * width, 0, width * sizeof(floating))
    return False


cdef bint scaled_finite(const floating* x, floating scale, Py_ssize_t n) noexcept nogil:
    """Whether scale * x has no NaN and no infinity: whether `pack_finite` kept this row."""
    cdef Py_ssize_t c
    for c in range(n):
        if not (scale * x[c]) * <floating>0 == 0:
            return False
    return True


cdef void add_scaled(floating* y, floating factor, const floating* x, Py_ssize_t n) noexcept nogil:
    """y += factor * x."""
    cdef Py_ssize_t c
    for c in range(n):
        y[c] += factor * x[c]


# Forward ---------------------------------------------------------------------------------------------


cdef inline floating logarithm(floating x) noexcept nogil:
    return logf(x) if floating is float else log(x)


cdef inline void merge(floating highest, floating sum_, floating* top, floating* total, floating* before,
                       floating* now) noexcept nogil:
    """Add a chunk, its maximum and its sum, to those of a row; before and now are the factors that it takes."""
    before[0] = now[0] = 1
    if sum_ == 0:                           # all scores are -infinity: nothing, unless there is nothing else
        now[0] = 0
        if total[0] == 0:
            top[0] = <floating>NAN
        return
    if total[0] == 0:                       # the first one
        top[0] = highest
    elif highest > top[0]:
        before[0] = <floating>exp(top[0] - highest)
        top[0] = highest
    else:
        now[0] = <floating>exp(highest - top[0])
    total[0] = total[0] * before[0] + sum_ * now[0]



cdef Py_ssize_t score_columns(const Shape* shape) noexcept nogil:
    """Scores in a row of a forward block, padding included."""
    return round_up(min(shape.Tk, <Py_ssize_t>CHUNK), KEYS) + PAD


cdef Py_ssize_t forward_scratch(const Shape* shape, Py_ssize_t item_size) noexcept nogil:
    """Elements of scratch that a head's forward pass needs: K^T, V, the scores of a block, and for its rows the
    maximum, the sum, two factors, and what a tile's rows add to the output."""
    cdef Py_ssize_t Tk = round_up(shape.Tk, KEYS), vector = VBYTES // item_size, Ep = round_up(shape.E, vector)
    return round_up(Tk * (round_up(shape.D, vector) + Ep) + ROWS * (score_columns(shape) + 4) + MR * Ep, 16)


cdef void forward_head(const floating* q, Py_ssize_t qt, const floating* KT, const floating* v, Py_ssize_t vt,
                       const floating* V, bint finite, floating* out, Py_ssize_t ot, floating* lse,
                       Py_ssize_t b, Py_ssize_t h, Py_ssize_t Tk, const Shape* shape,
                       floating* S) noexcept nogil:
    """out (Tq, E) = softmax(scale q k^T) v for one query head; qt, vt, ot are row strides.

    KT: the first Tk keys in panels, scaled; V: as many values, packed by `pack_finite`.
    """
    cdef Py_ssize_t Tq = shape.Tq, D = shape.D, E = shape.E, offset = offset_of(shape, b)
    cdef Py_ssize_t W = panel_width(sizeof(floating)), vector = VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t Ep = round_up(E, vector), ld = score_columns(shape)
    cdef floating* top = S + ROWS * ld      # of each row so far: the maximum
    cdef floating* total = top + ROWS       # and the sum of exp(score - maximum)
    cdef floating* before = total + ROWS    # a chunk's factors: of the output so far,
    cdef floating* now = before + ROWS      # and of what it adds
    cdef floating* part = now + ROWS
    cdef floating* s
    cdef floating highest, sum_, inverse
    cdef bint biased = shape.mask is not NULL or shape.slopes is not NULL
    cdef Py_ssize_t i0, i1, j0, j1, g, i, j, c, n, mr, first, seen, left, start
    for i0 from 0 <= i0 < Tq by ROWS:
        i1 = min(i0 + ROWS, Tq)
        start = 0
        seen = keys_seen(shape, offset, i1 - 1, Tk)
        if shape.mask is not NULL:
            mask_range(shape, b, h, i0, i1, &start, &seen)
        for i in range(i1 - i0):
            top[i] = -INFINITY
            total[i] = 0
        first = start
        while True:
            j1 = min(first + CHUNK, seen)
            for j0 from first <= j0 < j1 by W:
                for g from i0 <= g < i1 by MR:
                    mr = min(MR, i1 - g)
                    n = min(W, keys_seen(shape, offset, g + mr - 1, j1) - j0)
                    if n > 0:       # whole vectors: stores of a part would go element by element
                        tile(mr, round_up(n, vector), D, q + g * qt, qt, 1, KT + j0 * D, W,
                             S + (g - i0) * ld + j0 - first, ld, <const floating*>NULL, 0, <const floating*>NULL)
            for i in range(i0, i1):
                s = S + (i - i0) * ld
                n = left = max(keys_seen(shape, offset, i, j1) - first, 0)
                if biased:
                    add_bias(s, n, shape, b, h, i, first)
                    if shape.mask is not NULL:
                        left = exclude(s, n, shape, b, h, i, first, <floating>-INFINITY)
                if left > 0:
                    sum_ = softmax_row(s, n, min(n + MR, ld), &highest)
                    merge(highest, sum_, top + i - i0, total + i - i0, before + i - i0, now + i - i0)
                    if shape.keep_scale != 1:
                        drop_row(s, n, shape, <uint64_t>((b * shape.H + h) * Tq + i) * shape.Tk + first)
                else:
                    memset(s, 0, min(n + MR, ld) * sizeof(floating))
                    before[i - i0] = 1
                    now[i - i0] = 0
            for g from i0 <= g < i1 by MR:
                mr = min(MR, i1 - g)
                s = S + (g - i0) * ld
                n = max(keys_seen(shape, offset, g + mr - 1, j1) - first, 0)
                for c from 0 <= c < E by W:
                    tile(mr, round_up(min(W, E - c), vector), n, s, ld, 1, V + first * Ep + c, Ep, part + c, Ep,
                         <const floating*>NULL, 0, <const floating*>NULL)
                if not finite:
                    for j in range(first, first + n):
                        if not all_finite(v + j * vt, 0, 1, E):
                            for i in range(g, g + mr):
                                if visible(shape, b, h, i, j):
                                    add_scaled(part + (i - g) * Ep, S[(i - i0) * ld + j - first], v + j * vt, E)
                for i in range(g, g + mr):
                    if first == start:
                        for c in range(E):
                            out[i * ot + c] = part[(i - g) * Ep + c]
                    elif now[i - i0] != 0 or before[i - i0] != 1:
                        for c in range(E):
                            out[i * ot + c] = out[i * ot + c] * before[i - i0] + part[(i - g) * Ep + c] * now[i - i0]
            first = first + CHUNK
            if first >= seen:
                break
        for i in range(i0, i1):
            inverse = <floating>0 if top[i - i0] == -INFINITY else 1 / total[i - i0]
            lse[i] = top[i - i0] + logarithm(total[i - i0])
            for c in range(E):
                out[i * ot + c] *= inverse


cdef void forward_group(const floating* q, Strides qs, const floating* k, Strides ks, const floating* v,
                        Strides vs, floating* out, Strides os, floating* lse, Py_ssize_t b, Py_ssize_t g,
                        const Shape* shape, floating* scratch) noexcept nogil:
    """The query heads of batch item b that share key/value head g."""
    cdef Py_ssize_t W = panel_width(sizeof(floating)), vector = VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t Tk = keys_seen(shape, offset_of(shape, b), shape.Tq - 1, shape.Tk)
    cdef Py_ssize_t Tp = round_up(shape.Tk, KEYS), D = shape.D, Ep = round_up(shape.E, vector), j, h
    cdef floating* KT = scratch
    cdef floating* V = KT + Tp * round_up(D, vector)
    cdef bint finite
    k = k + b * ks.b + g * ks.h
    v = v + b * vs.b + g * vs.h
    for j from 0 <= j < Tk by W:
        pack_transposed(k + j * ks.t, ks.t, D, min(W, Tk - j), W, shape.scale, KT + j * D)
    finite = pack_finite(v, vs.t, Tk, shape.E, Ep, 1, V)
    for h in range(g * shape.group, (g + 1) * shape.group):
        forward_head(q + b * qs.b + h * qs.h, qs.t, KT, v, vs.t, V, finite, out + b * os.b + h * os.h, os.t,
                     lse + (b * shape.H + h) * shape.Tq, b, h, Tk, shape, V + Tp * Ep)


cdef int forward_heads(const floating* q, Strides qs, const floating* k, Strides ks, const floating* v,
                       Strides vs, floating* out, Strides os, floating* lse, Py_ssize_t B, const Shape* shape,
                       int n_threads) noexcept nogil:
    cdef Py_ssize_t G = shape.H // shape.group, n, size = forward_scratch(shape, sizeof(floating))
    cdef floating* scratch = <floating*>cllm_scratch(size * n_threads * sizeof(floating))
    if scratch is NULL:
        return -1
    for n in prange(B * G, num_threads=n_threads, schedule="dynamic", use_threads_if=n_threads > 1):
        forward_group(q, qs, k, ks, v, vs, out, os, lse, n // G, n % G, shape, scratch + size * threadid())
    return 0


# Backward --------------------------------------------------------------------------------------------


cdef Py_ssize_t backward_scratch(const Shape* shape, Py_ssize_t item_size) noexcept nogil:
    """Elements: K^T, V^T, K, dK and dV of all keys; Q, dO and dQ of all queries; two score blocks."""
    cdef Py_ssize_t Tk = round_up(shape.Tk, KEYS), Tq = round_up(shape.Tq, 16), vector = VBYTES // item_size
    cdef Py_ssize_t D = round_up(shape.D, vector), E = round_up(shape.E, vector)
    return round_up(Tk * (3 * D + 2 * E) + Tq * (2 * D + E + 1) + 2 * ROWS * (KEYS + PAD), 16)


cdef void score_gradients(floating* p, floating* s, Py_ssize_t n, Py_ssize_t end, floating lse, floating delta,
                          const Shape* shape, uint64_t index) noexcept nogil:
    """p: scores to probabilities (after dropout: what multiplied V); s: dP to dS.  Zeros from n <= KEYS to end."""
    if shape.keep_scale != 1:
        drop_row(s, n, shape, index)
    if floating is float:
        cllm_score_gradients_f32(p, s, n, end, lse, delta)
    else:
        cllm_score_gradients_f64(p, s, n, end, lse, delta)
    if shape.keep_scale != 1:
        drop_row(p, n, shape, index)


cdef double row_product(const floating* x, const floating* y, Py_ssize_t n) noexcept nogil:
    """The sum of x y, in double: it is subtracted from terms of its own size."""
    cdef double lane[LANES]
    cdef Py_ssize_t c
    cdef int l
    lanes_clear(lane)
    for c from 0 <= c <= n - LANES by LANES:
        for l in range(LANES):
            lane[l] += <double>x[c + l] * <double>y[c + l]
    for c in range(n - n % LANES, n):
        lane[c % LANES] += <double>x[c] * <double>y[c]
    return lanes_total(lane)


cdef void backward_head(const floating* dout, Py_ssize_t gt, const floating* q, Py_ssize_t qt,
                        const floating* k, Py_ssize_t kt, const floating* KT, const floating* VT,
                        const floating* K, bint finite_k, const floating* out, Py_ssize_t ot,
                        const floating* lse, floating* dq, Py_ssize_t dqt, floating* DK, floating* DV,
                        Py_ssize_t b, Py_ssize_t h, Py_ssize_t Tk, const Shape* shape,
                        floating* scratch) noexcept nogil:
    """One query head: writes dq (Tq, D), adds to DK and DV.

    KT, VT: the first Tk keys, scaled, and values in panels; K: scaled keys, packed by `pack_finite`.
    """
    cdef Py_ssize_t Tq = shape.Tq, D = shape.D, E = shape.E, offset = offset_of(shape, b)
    cdef Py_ssize_t W = panel_width(sizeof(floating)), vector = VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t Dp = round_up(D, vector), Ep = round_up(E, vector), Tp = round_up(Tq, 16)
    cdef Py_ssize_t ld = KEYS + PAD
    cdef floating* Q = scratch              # times scale
    cdef floating* DQ = Q + Tp * Dp
    cdef floating* DO = DQ + Tp * Dp
    cdef floating* delta = DO + Tp * Ep
    cdef floating* P = delta + Tp
    cdef floating* S = P + ROWS * ld
    cdef floating scale = <floating>shape.scale
    cdef bint biased = shape.mask is not NULL or shape.slopes is not NULL
    cdef bint finite_q = pack_finite(q, qt, Tq, D, Dp, shape.scale, Q)
    cdef bint finite_dout = pack_finite(dout, gt, Tq, E, Ep, 1, DO)
    cdef Py_ssize_t i0, i1, first, end, j0, jb, g, i, j, c, n, mr, last
    memset(DQ, 0, Tp * Dp * sizeof(floating))
    for i in range(Tq):
        delta[i] = <floating>row_product(dout + i * gt, out + i * ot, E)
    for jb from 0 <= jb < Tk by KEYS:
        first = max(jb - offset, 0) // ROWS * ROWS if shape.causal else 0
        for i0 from first <= i0 < Tq by ROWS:
            i1 = min(i0 + ROWS, Tq)
            end = min(jb + KEYS, keys_seen(shape, offset, i1 - 1, Tk))
            if end <= jb or (shape.mask is not NULL and not any_allowed(shape, b, h, i0, i1, jb, end)):
                continue
            for j0 from jb <= j0 < end by W:
                for g from i0 <= g < i1 by MR:
                    mr = min(MR, i1 - g)
                    n = round_up(min(W, keys_seen(shape, offset, g + mr - 1, end) - j0), vector)
                    if n > 0:   # whole vectors, as in forward_head
                        tile(mr, n, D, q + g * qt, qt, 1, KT + j0 * D, W, P + (g - i0) * ld + j0 - jb, ld,
                             <const floating*>NULL, 0, <const floating*>NULL)
                        tile(mr, n, E, dout + g * gt, gt, 1, VT + j0 * E, W, S + (g - i0) * ld + j0 - jb, ld,
                             <const floating*>NULL, 0, <const floating*>NULL)
            for i in range(i0, i1):
                n = keys_seen(shape, offset, i, end) - jb
                last = min(max(n, 0) + MR, ld)
                if n > 0:
                    if biased:
                        add_bias(P + (i - i0) * ld, n, shape, b, h, i, jb)
                    score_gradients(P + (i - i0) * ld, S + (i - i0) * ld, n, last, lse[i], delta[i], shape,
                                    <uint64_t>((b * shape.H + h) * Tq + i) * shape.Tk + jb)
                    if shape.mask is not NULL:
                        exclude(P + (i - i0) * ld, n, shape, b, h, i, jb, <floating>0)
                        exclude(S + (i - i0) * ld, n, shape, b, h, i, jb, <floating>0)
                else:
                    memset(P + (i - i0) * ld, 0, last * sizeof(floating))
                    memset(S + (i - i0) * ld, 0, last * sizeof(floating))
            for j0 from jb <= j0 < end by MR:
                mr = min(MR, end - j0)
                g = max(i0, j0 - offset) if shape.causal else i0    # the first query that sees key j0
                for c from 0 <= c < Ep by W:
                    tile(mr, min(W, Ep - c), i1 - g, P + (g - i0) * ld + j0 - jb, 1, ld, DO + g * Ep + c, Ep,
                         DV + j0 * Ep + c, Ep, DV + j0 * Ep + c, Ep, <const floating*>NULL)
                for c from 0 <= c < Dp by W:
                    tile(mr, min(W, Dp - c), i1 - g, S + (g - i0) * ld + j0 - jb, 1, ld, Q + g * Dp + c, Dp,
                         DK + j0 * Dp + c, Dp, DK + j0 * Dp + c, Dp, <const floating*>NULL)
            for g from i0 <= g < i1 by MR:
                mr = min(MR, i1 - g)
                n = keys_seen(shape, offset, g + mr - 1, end) - jb
                if n > 0:
                    for c from 0 <= c < Dp by W:
                        tile(mr, min(W, Dp - c), n, S + (g - i0) * ld, ld, 1, K + jb * Dp + c, Dp,
                             DQ + g * Dp + c, Dp, DQ + g * Dp + c, Dp, <const floating*>NULL)
            if finite_k and finite_q and finite_dout:
                continue
            for i in range(i0, i1):
                for j in range(jb, end):
                    if not visible(shape, b, h, i, j):
                        continue
                    if not (finite_dout or all_finite(dout + i * gt, 0, 1, E)):
                        add_scaled(DV + j * Ep, P[(i - i0) * ld + j - jb], dout + i * gt, E)
                    if not (finite_q or scaled_finite(q + i * qt, scale, D)):
                        add_scaled(DK + j * Dp, S[(i - i0) * ld + j - jb] * scale, q + i * qt, D)
                    if not (finite_k or scaled_finite(k + j * kt, scale, D)):
                        add_scaled(DQ + i * Dp, S[(i - i0) * ld + j - jb] * scale, k + j * kt, D)
    copy_rows(DQ, Dp, Tq, D, dq, dqt)


cdef void backward_group(const floating* dout, Strides gs, const floating* q, Strides qs, const floating* k,
                         Strides ks, const floating* v, Strides vs, const floating* out, Strides os,
                         const floating* lse, floating* dq, Strides dqs, floating* dk, Strides dks, floating* dv,
                         Strides dvs, Py_ssize_t b, Py_ssize_t g, const Shape* shape,
                         floating* scratch) noexcept nogil:
    """The query heads of batch item b that share key/value head g, in their order: so are their sums."""
    cdef Py_ssize_t Tq = shape.Tq, D = shape.D, E = shape.E
    cdef Py_ssize_t Tk = keys_seen(shape, offset_of(shape, b), Tq - 1, shape.Tk)
    cdef Py_ssize_t Tp = round_up(shape.Tk, KEYS)
    cdef Py_ssize_t W = panel_width(sizeof(floating)), vector = VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t Dp = round_up(D, vector), Ep = round_up(E, vector), j, h
    cdef floating* KT = scratch
    cdef floating* VT = KT + Tp * Dp
    cdef floating* K = VT + Tp * Ep         # times scale
    cdef floating* DK = K + Tp * Dp
    cdef floating* DV = DK + Tp * Dp
    cdef bint finite
    k = k + b * ks.b + g * ks.h
    v = v + b * vs.b + g * vs.h
    for j from 0 <= j < Tk by W:
        pack_transposed(k + j * ks.t, ks.t, D, min(W, Tk - j), W, shape.scale, KT + j * D)
        pack_transposed(v + j * vs.t, vs.t, E, min(W, Tk - j), W, 1, VT + j * E)
    finite = pack_finite(k, ks.t, Tk, D, Dp, shape.scale, K)
    memset(DK, 0, shape.Tk * Dp * sizeof(floating))
    memset(DV, 0, shape.Tk * Ep * sizeof(floating))
    for h in range(g * shape.group, (g + 1) * shape.group):
        backward_head(dout + b * gs.b + h * gs.h, gs.t, q + b * qs.b + h * qs.h, qs.t, k, ks.t, KT, VT, K,
                      finite, out + b * os.b + h * os.h, os.t, lse + (b * shape.H + h) * Tq,
                      dq + b * dqs.b + h * dqs.h, dqs.t, DK, DV, b, h, Tk, shape, DV + Tp * Ep)
    copy_rows(DK, Dp, shape.Tk, D, dk + b * dks.b + g * dks.h, dks.t)
    copy_rows(DV, Ep, shape.Tk, E, dv + b * dvs.b + g * dvs.h, dvs.t)


cdef void copy_rows(const floating* x, Py_ssize_t ldx, Py_ssize_t T, Py_ssize_t D, floating* y,
                    Py_ssize_t ldy) noexcept nogil:
    cdef Py_ssize_t i, c
    for i in range(T):
        for c in range(D):
            y[i * ldy + c] = x[i * ldx + c]


cdef int backward_heads(const floating* dout, Strides gs, const floating* q, Strides qs, const floating* k,
                        Strides ks, const floating* v, Strides vs, const floating* out, Strides os,
                        const floating* lse, floating* dq, Strides dqs, floating* dk, Strides dks, floating* dv,
                        Strides dvs, Py_ssize_t B, const Shape* shape, int n_threads) noexcept nogil:
    cdef Py_ssize_t G = shape.H // shape.group, n, size = backward_scratch(shape, sizeof(floating))
    cdef floating* scratch = <floating*>cllm_scratch(size * n_threads * sizeof(floating))
    if scratch is NULL:
        return -1
    for n in prange(B * G, num_threads=n_threads, schedule="dynamic", use_threads_if=n_threads > 1):
        backward_group(dout, gs, q, qs, k, ks, v, vs, out, os, lse, dq, dqs, dk, dks, dv, dvs, n // G, n % G,
                       shape, scratch + size * threadid())
    return 0


# Python ----------------------------------------------------------------------------------------------


cdef Strides strides_of(cnp.ndarray x):
    cdef Strides s
    cdef Py_ssize_t size = x.itemsize
    s.b = x.strides[0] // size
    s.h = x.strides[1] // size
    s.t = x.strides[2] // size
    s.s = x.strides[3] // size
    return s


cdef Shape shape_of(cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, bint causal, double scale, double dropout_p,
                    uint64_t key, cnp.ndarray mask, cnp.ndarray slopes, cnp.ndarray offsets):
    """mask: (B, H, Tq, Tk), boolean or of q's dtype, any strides; slopes: (H,) float64; offsets: (B,) int64.

    Each of the three may be None.
    """
    cdef Shape shape
    assert k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0 and v.shape[1] == k.shape[1]
    assert k.shape[0] == q.shape[0] and v.shape[0] == q.shape[0]
    assert k.shape[3] == q.shape[3] and v.shape[2] == k.shape[2]
    shape.H = q.shape[1]
    shape.group = q.shape[1] // k.shape[1]
    shape.Tq = q.shape[2]
    shape.Tk = k.shape[2]
    shape.D = q.shape[3]
    shape.E = v.shape[3]
    shape.causal = causal
    shape.scale = scale
    shape.offsets = NULL
    shape.slopes = NULL
    shape.mask = NULL
    if offsets is not None:
        shape.offsets = <const int64_t*>cnp.PyArray_DATA(offsets)
    if slopes is not None:
        shape.slopes = <const double*>cnp.PyArray_DATA(slopes)
    if mask is not None:
        assert mask.shape[0] == q.shape[0] and mask.shape[1] == q.shape[1]
        assert mask.shape[2] == q.shape[2] and mask.shape[3] == k.shape[2]
        shape.mask = <const char*>cnp.PyArray_DATA(mask)
        shape.mask_size = mask.itemsize
        shape.mask_strides = strides_of(mask)
    shape.key = key
    shape.keep_limit = <uint32_t>(ceil((1 - dropout_p) * 4294967296.0) - 1)
    shape.keep_scale = 1 / (1 - dropout_p)
    return shape


cdef bint fits(cnp.ndarray x, cnp.ndarray like, Py_ssize_t width) noexcept:
    """Whether x is (B, H, T, width), with the first three sizes of `like`."""
    return (x.shape[0] == like.shape[0] and x.shape[1] == like.shape[1] and x.shape[2] == like.shape[2]
            and x.shape[3] == width)


cdef int threads_for(const Shape* shape, Py_ssize_t B, int n_threads) noexcept nogil:
    """At most one thread for each key/value head, and one alone for little work."""
    n_threads = useful_threads(<double>B * shape.H * shape.Tq * shape.Tk * shape.D, SERIAL_BELOW, n_threads)
    return <int>min(<Py_ssize_t>n_threads, B * shape.H // shape.group)


def attention_forward(cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out, cnp.ndarray lse,
                      bint causal, double scale, double dropout_p, uint64_t key, cnp.ndarray mask,
                      cnp.ndarray slopes, cnp.ndarray offsets, int n_threads):
    """q (B, H, Tq, D), k (B, G, Tk, D), v (B, G, Tk, E), out (B, H, Tq, E): any strides but 1 in the last.

    lse: (B, H, Tq) contiguous. No size but D and E is 0. mask, slopes, offsets: as `shape_of` says.
    """
    cdef Shape shape = shape_of(q, k, v, causal, scale, dropout_p, key, mask, slopes, offsets)
    cdef Strides qs = strides_of(q), ks = strides_of(k), vs = strides_of(v), os = strides_of(out)
    cdef void* pq = cnp.PyArray_DATA(q)
    cdef void* pk = cnp.PyArray_DATA(k)
    cdef void* pv = cnp.PyArray_DATA(v)
    cdef void* po = cnp.PyArray_DATA(out)
    cdef void* pl = cnp.PyArray_DATA(lse)
    cdef Py_ssize_t B = q.shape[0]
    cdef bint single = cnp.PyArray_TYPE(q) == cnp.NPY_FLOAT
    cdef int status
    assert fits(out, q, v.shape[3])
    n_threads = threads_for(&shape, B, n_threads)
    with nogil:
        if single:
            status = forward_heads[float](<float*>pq, qs, <float*>pk, ks, <float*>pv, vs, <float*>po, os,
                                          <float*>pl, B, &shape, n_threads)
        else:
            status = forward_heads[double](<double*>pq, qs, <double*>pk, ks, <double*>pv, vs, <double*>po, os,
                                           <double*>pl, B, &shape, n_threads)
    if status != 0:
        raise MemoryError("no memory for the packed keys and values of attention")


def attention_backward(cnp.ndarray dout, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out,
                       cnp.ndarray lse, cnp.ndarray dq, cnp.ndarray dk, cnp.ndarray dv, bint causal,
                       double scale, double dropout_p, uint64_t key, cnp.ndarray mask, cnp.ndarray slopes,
                       cnp.ndarray offsets, int n_threads):
    """Shapes and strides as in the forward pass; dq, dk, dv have those of q, k, v."""
    cdef Shape shape = shape_of(q, k, v, causal, scale, dropout_p, key, mask, slopes, offsets)
    cdef Strides gs = strides_of(dout), qs = strides_of(q), ks = strides_of(k), vs = strides_of(v)
    cdef Strides os = strides_of(out), dqs = strides_of(dq), dks = strides_of(dk), dvs = strides_of(dv)
    cdef void* pg = cnp.PyArray_DATA(dout)
    cdef void* pq = cnp.PyArray_DATA(q)
    cdef void* pk = cnp.PyArray_DATA(k)
    cdef void* pv = cnp.PyArray_DATA(v)
    cdef void* po = cnp.PyArray_DATA(out)
    cdef void* pl = cnp.PyArray_DATA(lse)
    cdef void* pdq = cnp.PyArray_DATA(dq)
    cdef void* pdk = cnp.PyArray_DATA(dk)
    cdef void* pdv = cnp.PyArray_DATA(dv)
    cdef Py_ssize_t B = q.shape[0]
    cdef bint single = cnp.PyArray_TYPE(q) == cnp.NPY_FLOAT
    cdef int status
    assert fits(out, q, v.shape[3]) and fits(dout, q, v.shape[3])
    assert fits(dq, q, q.shape[3]) and fits(dk, k, k.shape[3]) and fits(dv, v, v.shape[3])
    n_threads = threads_for(&shape, B, n_threads)
    with nogil:
        if single:
            status = backward_heads[float](<float*>pg, gs, <float*>pq, qs, <float*>pk, ks, <float*>pv, vs,
                                           <float*>po, os, <float*>pl, <float*>pdq, dqs, <float*>pdk, dks,
                                           <float*>pdv, dvs, B, &shape, n_threads)
        else:
            status = backward_heads[double](<double*>pg, gs, <double*>pq, qs, <double*>pk, ks, <double*>pv, vs,
                                            <double*>po, os, <double*>pl, <double*>pdq, dqs, <double*>pdk, dks,
                                            <double*>pdv, dvs, B, &shape, n_threads)
    if status != 0:
        raise MemoryError("no memory for the packed operands of attention")
