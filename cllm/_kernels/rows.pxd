"""Maxima and sums of exponentials along a row of V elements, over fixed lanes (lanes.pxd)."""
from cython cimport floating
from libc.math cimport INFINITY
from libc.string cimport memcpy

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_largest, lanes_total
from cllm._kernels.vmath cimport vexp

cdef extern from *:
    """
    #include "vmath.h"
    /* e^x for x <= 0, which need not be exact above: vmath.h's polynomial, with an error under 2e-7, in 17
     * operations for its 26. 0 below -87.33, the smallest normal number; NaN stays NaN. */
    static inline __attribute__((always_inline)) float cllm_expf_below(float x) {
        CLLM_EXP_PARTS(float, x, t, p);
        union { float f; uint32_t i; } u;
        u.f = t;
        u.i = (u.i << 23) + 0x3f800000u; /* 2^n: of t's bits only n's are left */
        return x < -87.33654f ? 0.0f : p * u.f;
    }
    """
    float cllm_expf_below(float) nogil
    void __builtin_prefetch(const void*) nogil

cdef enum:
    CHUNK = 32              # groups of LANES elements summed before the sum goes on in double: rows are long


cdef inline floating exp_below(floating x) noexcept nogil:
    """e^x for x <= 0."""
    if floating is float:
        return cllm_expf_below(x)
    else:
        return vexp(x)


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
    """sum(exp(z - shift)); no z is above shift.  The same bits as from row_exp."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef floating rest[LANES]
    cdef double total = 0
    if V % LANES > 0:
        load_rest(z, V, rest)
        for k in range(LANES):
            lane[k] = exp_below(rest[k] - shift)
        total = lanes_total(lane)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                lane[k] += exp_below(z[k] - shift)
            __builtin_prefetch(z + V)
            __builtin_prefetch(z + V + 16)
            z += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    return total


cdef inline double row_exp(const floating* z, floating shift, floating* out, Py_ssize_t V) noexcept nogil:
    """out = exp(z - shift), and its sum; no z is above shift.  out may be z: groups go through a local array,
    so that the loops vectorise nevertheless, and the rest is read before anything is written."""
    cdef Py_ssize_t groups = V // LANES, group, k
    cdef floating lane[LANES]
    cdef floating p[LANES]
    cdef floating rest[LANES]
    cdef double total = 0
    if V % LANES > 0:
        load_rest(z, V, rest)
        for k in range(LANES):
            rest[k] = exp_below(rest[k] - shift)
        for k in range(LANES):
            lane[k] = rest[k]
        total = lanes_total(lane)
    while groups > 0:
        lanes_clear(lane)
        for group in range(min(<Py_ssize_t>CHUNK, groups)):
            for k in range(LANES):
                p[k] = exp_below(z[k] - shift)
            for k in range(LANES):
                lane[k] += p[k]
            for k in range(LANES):
                out[k] = p[k]
            __builtin_prefetch(z + V)
            __builtin_prefetch(z + V + 16)
            z += LANES
            out += LANES
        total += lanes_total(lane)
        groups -= CHUNK
    if V % LANES > 0:
        memcpy(out, rest + LANES - V % LANES, V % LANES * sizeof(floating))
    return total
