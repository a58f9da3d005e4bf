"""Multi-head scaled dot-product attention that never stores the T x T matrix.

Threads own heads. Forward: a block of rows of S = scale Q K^T, over all keys that the rows see, fits the L2
cache, so that softmax takes two plain passes over it (no running maximum to correct), then O = P V. Only the
rows' log-sum-exp is kept. Backward computes P again from it, in blocks of ROWS queries by KEYS keys
(Dao et al. 2022, "FlashAttention", algorithm 4): with D_i = dO_i . O_i,

    dV = P^T dO      dS = P * (dO V^T - D)      dQ = scale dS K      dK = scale dS^T Q

All products run on the register tile of `tile.h`. K and V are packed for it once for each head, padded with
zeros to whole vectors. Causal tiles stop at the diagonal; the few masked elements inside a tile are zeros.
Zero times NaN is NaN, so a head with a non-finite input takes tiles of one row, which stop exactly at the
diagonal: a NaN then reaches only what depends on it, and all other bits are the same.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange, threadid
from libc.math cimport ceil, log
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from cllm._kernels.tile cimport MR, NV, VBYTES, pack, pack_transposed, round_up, tile

cnp.import_array()

cdef extern from "scratch.h" nogil:
    void* cllm_scratch(size_t n_bytes)

cdef extern from "vmath.h" nogil:
    float cllm_expf(float x)
    double cllm_exp(double x)

cdef extern from "hash.h" nogil:
    uint32_t cllm_hash_high(uint64_t key, uint64_t index)
    uint32_t cllm_hash(uint64_t key, uint32_t high, uint32_t low)

cdef extern from "math.h" nogil:
    const float INFINITY

cdef enum:
    LANES = 32                  # lanes of a row's maximum and sum, whatever the vector's width
    KEYS = 64                   # keys in a block of the backward pass: a multiple of every tile's width
    PAD = 16                    # row padding of score blocks: no rows 4 KB apart, room for whole lanes

cdef Py_ssize_t ROWS = 16 * MR              # queries in a block
cdef Py_ssize_t SCORE_BYTES = 256 * 1024    # of a forward block of scores: a quarter of L2
# Below this many multiply-adds (all heads) a second thread costs more than it brings.
cdef double SERIAL_BELOW = 200_000


cdef struct Shape:
    Py_ssize_t H, Tq, Tk, D     # heads, queries, keys, head size
    bint causal                 # query i sees keys 0..i
    double scale
    uint64_t key                # of the dropout mask
    uint32_t keep_limit         # an element stays when its 32 random bits are at most this
    double keep_scale           # 1 / (1 - dropout_p); 1: no dropout


cdef struct Strides:
    Py_ssize_t b, h, t          # elements from one batch item, head, position to the next


cdef inline floating exp_(floating x) noexcept nogil:
    if floating is float:
        return cllm_expf(x)
    else:
        return cllm_exp(x)


cdef inline Py_ssize_t panel_width(Py_ssize_t item_size) noexcept nogil:
    return NV * VBYTES // item_size


cdef bint all_finite(const floating* x, Py_ssize_t stride, Py_ssize_t T, Py_ssize_t D) noexcept nogil:
    """Whether x (T, D) has no NaN and no infinity: x * 0 is 0 for finite x only."""
    cdef floating lane[LANES]
    cdef floating total = 0
    cdef Py_ssize_t i, c
    cdef int l
    for l in range(LANES):
        lane[l] = 0
    for i in range(T):
        c = 0
        while c + LANES <= D:
            for l in range(LANES):
                lane[l] += x[i * stride + c + l] * <floating>0
            c = c + LANES
        while c < D:
            lane[0] += x[i * stride + c] * <floating>0
            c = c + 1
    for l in range(LANES):
        total += lane[l]
    return total == 0


cdef floating softmax_row(floating* s, Py_ssize_t n, Py_ssize_t end, floating* lse) noexcept nogil:
    """s[:n] = exp(s - max), s[n:end] = 0.  Writes the log-sum-exp and returns 1 / sum.

    s has room for n rounded up to whole lanes. n >= 1.
    """
    cdef floating lane[LANES]
    cdef floating total[LANES]
    cdef floating biggest, v
    cdef Py_ssize_t whole = round_up(n, LANES), j
    cdef int l
    for j in range(n, whole):
        s[j] = -INFINITY
    for l in range(LANES):
        lane[l] = s[l]
        total[l] = 0
    for j from LANES <= j < whole by LANES:
        for l in range(LANES):
            lane[l] = s[j + l] if s[j + l] > lane[l] else lane[l]
    biggest = lane[0]
    for l in range(1, LANES):
        biggest = lane[l] if lane[l] > biggest else biggest
    for j from 0 <= j < whole by LANES:
        for l in range(LANES):
            v = exp_(s[j + l] - biggest)
            s[j + l] = v
            total[l] += v
    v = 0
    for l in range(LANES):
        v += total[l]
    for j in range(n, end):
        s[j] = 0
    lse[0] = biggest + <floating>log(v)
    return <floating>1 / v


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


# Forward ---------------------------------------------------------------------------------------------


cdef Py_ssize_t forward_rows(const Shape* shape, Py_ssize_t item_size) noexcept nogil:
    """Queries in a block, so that its scores fill SCORE_BYTES at most."""
    cdef Py_ssize_t row = (round_up(shape.Tk, KEYS) + PAD) * item_size
    return max(MR, min(ROWS, SCORE_BYTES // row // MR * MR))


cdef Py_ssize_t forward_scratch(const Shape* shape, Py_ssize_t item_size) noexcept nogil:
    """Elements of scratch that a head's forward pass needs: K^T, V and the scores of a block."""
    cdef Py_ssize_t Tk = round_up(shape.Tk, KEYS), D = round_up(shape.D, VBYTES // item_size)
    return round_up(2 * Tk * D + forward_rows(shape, item_size) * (Tk + PAD) + ROWS, 16)


cdef void forward_head(const floating* q, Py_ssize_t qt, const floating* k, Py_ssize_t kt, const floating* v,
                       Py_ssize_t vt, floating* out, Py_ssize_t ot, floating* lse, Py_ssize_t head,
                       const Shape* shape, floating* scratch) noexcept nogil:
    """out (Tq, D) = softmax(scale q k^T) v for one head; qt, kt, vt, ot are row strides."""
    cdef Py_ssize_t Tq = shape.Tq, Tk = shape.Tk, D = shape.D
    cdef Py_ssize_t W = panel_width(sizeof(floating)), Dp = round_up(D, VBYTES // <Py_ssize_t>sizeof(floating))
    cdef Py_ssize_t Tp = round_up(Tk, KEYS), ld = Tp + PAD, rows = forward_rows(shape, sizeof(floating))
    cdef floating* KT = scratch
    cdef floating* V = KT + Tp * Dp
    cdef floating* S = V + Tp * Dp
    cdef floating* inverse = S + rows * ld
    cdef Py_ssize_t step = MR if all_finite(v, vt, Tk, D) else 1
    cdef Py_ssize_t i0, i1, j0, g, i, c, n, mr, seen
    for j0 from 0 <= j0 < Tk by W:
        pack_transposed(k + j0 * kt, kt, D, min(W, Tk - j0), W, shape.scale, KT + j0 * D)
    pack(v, vt, Tk, D, Dp, 1, V)
    for i0 from 0 <= i0 < Tq by rows:
        i1 = min(i0 + rows, Tq)
        seen = min(i1, Tk) if shape.causal else Tk
        for j0 from 0 <= j0 < seen by W:
            for g from i0 <= g < i1 by MR:
                mr = min(MR, i1 - g)
                n = min(W, (min(g + mr, Tk) if shape.causal else Tk) - j0)
                if n > 0:
                    tile(mr, n, D, q + g * qt, qt, 1, KT + j0 * D, W, S + (g - i0) * ld + j0, ld,
                         <const floating*>NULL, 0, <const floating*>NULL)
        for i in range(i0, i1):
            n = min(i + 1, Tk) if shape.causal else Tk
            inverse[i - i0] = softmax_row(S + (i - i0) * ld, n, min(n + MR, ld), lse + i)
            if shape.keep_scale != 1:
                drop_row(S + (i - i0) * ld, n, shape, <uint64_t>(head * Tq + i) * Tk)
        for g from i0 <= g < i1 by step:
            mr = min(step, i1 - g)
            n = min(g + mr, Tk) if shape.causal else Tk
            for c from 0 <= c < D by W:
                tile(mr, min(W, D - c), n, S + (g - i0) * ld, ld, 1, V + c, Dp, out + g * ot + c, ot,
                     <const floating*>NULL, 0, <const floating*>NULL)
            for i in range(g, g + mr):
                for c in range(D):
                    out[i * ot + c] *= inverse[i - i0]


cdef int forward_heads(const floating* q, Strides qs, const floating* k, Strides ks, const floating* v, Strides vs,
                       floating* out, Strides os, floating* lse, Py_ssize_t B, const Shape* shape,
                       int n_threads) noexcept nogil:
    cdef Py_ssize_t H = shape.H, n, size = forward_scratch(shape, sizeof(floating))
    cdef floating* scratch = <floating*>cllm_scratch(size * n_threads * sizeof(floating))
    if scratch is NULL:
        return -1
    for n in prange(B * H, num_threads=n_threads, schedule="dynamic", use_threads_if=n_threads > 1):
        forward_head(q + n // H * qs.b + n % H * qs.h, qs.t, k + n // H * ks.b + n % H * ks.h, ks.t,
                     v + n // H * vs.b + n % H * vs.h, vs.t, out + n // H * os.b + n % H * os.h, os.t,
                     lse + n * shape.Tq, n, shape, scratch + size * threadid())
    return 0


# Backward --------------------------------------------------------------------------------------------


cdef Py_ssize_t backward_scratch(const Shape* shape, Py_ssize_t item_size) noexcept nogil:
    """Elements: K^T, V^T, scaled K, dK and dV of all keys; scaled Q, dO and dQ of all queries; two score blocks."""
    cdef Py_ssize_t Tk = round_up(shape.Tk, KEYS), Tq = round_up(shape.Tq, 16)
    cdef Py_ssize_t D = round_up(shape.D, VBYTES // item_size)
    return round_up(5 * Tk * D + 3 * Tq * D + Tq + 2 * ROWS * (KEYS + PAD), 16)


cdef void score_gradients(floating* p, floating* s, Py_ssize_t n, floating lse, floating delta, const Shape* shape,
                          uint64_t index) noexcept nogil:
    """p: scores to probabilities (after dropout: what multiplied V); s: dP to dS.  n <= KEYS elements."""
    cdef floating q[KEYS]
    cdef Py_ssize_t c
    cdef int l
    # Whole lanes, so that the loop has no tail: what lies beyond n is padding, and zeroed afterwards.
    if shape.keep_scale == 1:
        for c from 0 <= c < n by LANES:
            for l in range(LANES):
                p[c + l] = exp_(p[c + l] - lse)
                s[c + l] = p[c + l] * (s[c + l] - delta)
        return
    drop_row(s, n, shape, index)
    for c in range(n):
        q[c] = exp_(p[c] - lse)
        s[c] = q[c] * (s[c] - delta)
        p[c] = q[c]
    drop_row(p, n, shape, index)


cdef void backward_head(const floating* dout, Py_ssize_t gt, const floating* q, Py_ssize_t qt, const floating* k,
                        Py_ssize_t kt, const floating* v, Py_ssize_t vt, const floating* out, Py_ssize_t ot,
                        const floating* lse, floating* dq, Py_ssize_t dqt, floating* dk, Py_ssize_t dkt,
                        floating* dv, Py_ssize_t dvt, Py_ssize_t head, const Shape* shape,
                        floating* scratch) noexcept nogil:
    cdef Py_ssize_t Tq = shape.Tq, Tk = shape.Tk, D = shape.D
    cdef Py_ssize_t W = panel_width(sizeof(floating)), Dp = round_up(D, VBYTES // <Py_ssize_t>sizeof(floating))
    cdef Py_ssize_t k_size = round_up(Tk, KEYS) * Dp, q_size = round_up(Tq, 16) * Dp, ld = KEYS + PAD
    cdef floating* KT = scratch
    cdef floating* VT = KT + k_size
    cdef floating* K = VT + k_size          # times scale
    cdef floating* DK = K + k_size
    cdef floating* DV = DK + k_size
    cdef floating* Q = DV + k_size          # times scale
    cdef floating* DO = Q + q_size
    cdef floating* DQ = DO + q_size
    cdef floating* delta = DQ + q_size
    cdef floating* P = delta + round_up(Tq, 16)
    cdef floating* S = P + ROWS * ld
    cdef Py_ssize_t step = MR
    cdef Py_ssize_t i0, i1, first, end, j0, jb, g, i, c, n, mr
    cdef double total
    if not (all_finite(q, qt, Tq, D) and all_finite(k, kt, Tk, D) and all_finite(dout, gt, Tq, D)
            and all_finite(lse, 1, 1, Tq)):
        step = 1
    for j0 from 0 <= j0 < Tk by W:
        pack_transposed(k + j0 * kt, kt, D, min(W, Tk - j0), W, shape.scale, KT + j0 * D)
        pack_transposed(v + j0 * vt, vt, D, min(W, Tk - j0), W, 1, VT + j0 * D)
    pack(k, kt, Tk, D, Dp, shape.scale, K)
    pack(q, qt, Tq, D, Dp, shape.scale, Q)
    pack(dout, gt, Tq, D, Dp, 1, DO)
    memset(DK, 0, 2 * k_size * sizeof(floating))
    memset(DQ, 0, q_size * sizeof(floating))
    for i in range(Tq):
        total = 0               # double: it is subtracted from terms of its own size
        for c in range(D):
            total = total + <double>dout[i * gt + c] * out[i * ot + c]
        delta[i] = <floating>total
    for jb from 0 <= jb < Tk by KEYS:
        first = jb // ROWS * ROWS if shape.causal else 0
        for i0 from first <= i0 < Tq by ROWS:
            i1 = min(i0 + ROWS, Tq)
            end = min(jb + KEYS, min(i1, Tk) if shape.causal else Tk)
            if end <= jb:
                continue
            for j0 from jb <= j0 < end by W:
                for g from i0 <= g < i1 by MR:
                    mr = min(MR, i1 - g)
                    n = min(W, (min(g + mr, end) if shape.causal else end) - j0)
                    if n > 0:
                        tile(mr, n, D, q + g * qt, qt, 1, KT + j0 * D, W, P + (g - i0) * ld + j0 - jb, ld,
                             <const floating*>NULL, 0, <const floating*>NULL)
                        tile(mr, n, D, dout + g * gt, gt, 1, VT + j0 * D, W, S + (g - i0) * ld + j0 - jb, ld,
                             <const floating*>NULL, 0, <const floating*>NULL)
            for i in range(i0, i1):
                n = min(i + 1, end) - jb if shape.causal else end - jb
                if n > 0:
                    score_gradients(P + (i - i0) * ld, S + (i - i0) * ld, n, lse[i], delta[i], shape,
                                    <uint64_t>(head * Tq + i) * Tk + jb)
                else:
                    n = 0
                for c in range(n, min(n + MR, ld)):
                    P[(i - i0) * ld + c] = 0
                    S[(i - i0) * ld + c] = 0
            for j0 from jb <= j0 < end by step:
                mr = min(step, end - j0)
                g = max(i0, j0) if shape.causal else i0     # the first query that sees key j0
                for c from 0 <= c < Dp by W:
                    n = min(W, Dp - c)
                    tile(mr, n, i1 - g, P + (g - i0) * ld + j0 - jb, 1, ld, DO + g * Dp + c, Dp,
                         DV + j0 * Dp + c, Dp, DV + j0 * Dp + c, Dp, <const floating*>NULL)
                    tile(mr, n, i1 - g, S + (g - i0) * ld + j0 - jb, 1, ld, Q + g * Dp + c, Dp,
                         DK + j0 * Dp + c, Dp, DK + j0 * Dp + c, Dp, <const floating*>NULL)
            for g from i0 <= g < i1 by step:
                mr = min(step, i1 - g)
                n = (min(g + mr, end) if shape.causal else end) - jb
                if n > 0:
                    for c from 0 <= c < Dp by W:
                        tile(mr, min(W, Dp - c), n, S + (g - i0) * ld, ld, 1, K + jb * Dp + c, Dp,
                             DQ + g * Dp + c, Dp, DQ + g * Dp + c, Dp, <const floating*>NULL)
    copy_rows(DQ, Dp, Tq, D, dq, dqt)
    copy_rows(DK, Dp, Tk, D, dk, dkt)
    copy_rows(DV, Dp, Tk, D, dv, dvt)


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
    cdef Py_ssize_t H = shape.H, n, b, h, size = backward_scratch(shape, sizeof(floating))
    cdef floating* scratch = <floating*>cllm_scratch(size * n_threads * sizeof(floating))
    if scratch is NULL:
        return -1
    for n in prange(B * H, num_threads=n_threads, schedule="dynamic", use_threads_if=n_threads > 1):
        b = n // H
        h = n % H
        backward_head(dout + b * gs.b + h * gs.h, gs.t, q + b * qs.b + h * qs.h, qs.t, k + b * ks.b + h * ks.h, ks.t,
                      v + b * vs.b + h * vs.h, vs.t, out + b * os.b + h * os.h, os.t, lse + n * shape.Tq,
                      dq + b * dqs.b + h * dqs.h, dqs.t, dk + b * dks.b + h * dks.h, dks.t,
                      dv + b * dvs.b + h * dvs.h, dvs.t, n, shape, scratch + size * threadid())
    return 0


# Python ----------------------------------------------------------------------------------------------


cdef Strides strides_of(cnp.ndarray x):
    cdef Strides s
    cdef Py_ssize_t size = x.itemsize
    s.b = x.strides[0] // size
    s.h = x.strides[1] // size
    s.t = x.strides[2] // size
    return s


cdef Shape shape_of(cnp.ndarray q, cnp.ndarray k, bint causal, double scale, double dropout_p, uint64_t key):
    cdef Shape shape
    shape.H = q.shape[1]
    shape.Tq = q.shape[2]
    shape.Tk = k.shape[2]
    shape.D = q.shape[3]
    shape.causal = causal
    shape.scale = scale
    shape.key = key
    shape.keep_limit = <uint32_t>(ceil((1 - dropout_p) * 4294967296.0) - 1)
    shape.keep_scale = 1 / (1 - dropout_p)
    return shape


cdef int threads_for(const Shape* shape, Py_ssize_t B, int n_threads) noexcept nogil:
    """At most one thread for each head, and one alone for little work."""
    if <double>B * shape.H * shape.Tq * shape.Tk * shape.D < SERIAL_BELOW:
        return 1
    return <int>min(<Py_ssize_t>n_threads, B * shape.H)


def attention_forward(cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out, cnp.ndarray lse, bint causal,
                      double scale, double dropout_p, uint64_t key, int n_threads):
    """q, out: (B, H, Tq, D), k, v: (B, H, Tk, D), any strides but 1 in D; lse: (B, H, Tq) contiguous."""
    cdef Shape shape = shape_of(q, k, causal, scale, dropout_p, key)
    cdef Strides qs = strides_of(q), ks = strides_of(k), vs = strides_of(v), os = strides_of(out)
    cdef void* pq = cnp.PyArray_DATA(q)
    cdef void* pk = cnp.PyArray_DATA(k)
    cdef void* pv = cnp.PyArray_DATA(v)
    cdef void* po = cnp.PyArray_DATA(out)
    cdef void* pl = cnp.PyArray_DATA(lse)
    cdef Py_ssize_t B = q.shape[0]
    cdef bint single = cnp.PyArray_TYPE(q) == cnp.NPY_FLOAT
    cdef int status
    assert k.shape[3] == q.shape[3] and v.shape[2] == k.shape[2] and out.shape[2] == q.shape[2]
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
                       cnp.ndarray lse, cnp.ndarray dq, cnp.ndarray dk, cnp.ndarray dv, bint causal, double scale,
                       double dropout_p, uint64_t key, int n_threads):
    """Shapes and strides as in the forward pass; dq, dk, dv have those of q, k, v."""
    cdef Shape shape = shape_of(q, k, causal, scale, dropout_p, key)
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
    assert dq.shape[2] == q.shape[2] and dk.shape[2] == k.shape[2] and dv.shape[2] == k.shape[2]
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
