"""Maxima and sums of exponentials along a row of V elements, over fixed lanes (lanes.pxd)."""
from cython cimport floating
from libc.math cimport INFINITY
from libc.string cimport memcpy

from cllm._kernels.lanes cimport LANES, lanes_clear, lanes_largest, lanes_total
from cllm._kernels.vmath cimport vexp

cdef enum:
    CHUNK = 32              # groups of LANES elements summed before the sum goes on in double: rows are long


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
