"""Sums and maxima over fixed lanes: what lets a reduction vectorise without letting the compiler reorder it.

Element j of a row goes to lane j % LANES; the lanes are combined in a fixed tree. The result depends
on the row alone. 32 lanes fill two AVX-512 registers, which hides the latency of an addition; loops
over 16 are unrolled by GCC before it vectorises them, and stay scalar.
"""
from cython cimport floating

cdef enum:
    LANES = 32


cdef inline void lanes_clear(floating* lane) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(LANES):
        lane[k] = 0


cdef inline floating lanes_total(floating* lane) noexcept nogil:
    """The sum of the lanes, by halves; overwrites them."""
    cdef Py_ssize_t k
    for k in range(16):
        lane[k] += lane[k + 16]
    for k in range(8):
        lane[k] += lane[k + 8]
    for k in range(4):
        lane[k] += lane[k + 4]
    return (lane[0] + lane[2]) + (lane[1] + lane[3])


cdef inline floating lanes_largest(floating* lane) noexcept nogil:
    """The largest lane, by halves; overwrites them."""
    cdef Py_ssize_t k
    for k in range(16):
        lane[k] = lane[k + 16] if lane[k + 16] > lane[k] else lane[k]
    for k in range(8):
        lane[k] = lane[k + 8] if lane[k + 8] > lane[k] else lane[k]
    for k in range(4):
        lane[k] = lane[k + 4] if lane[k + 4] > lane[k] else lane[k]
    for k in range(1, 4):
        lane[0] = lane[k] if lane[k] > lane[0] else lane[0]
    return lane[0]
