# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Causal attention whose heads pass through gates: CLLM's attention, and a loop of one's own.

out[b, h] = sigmoid(gate[h]) * attention(q, k, v)[b, h], for float32 and float64.
"""
import numpy as np

from cython cimport floating
from cllm.capi cimport attention_backward_f32, attention_backward_f64
from cllm.capi cimport attention_forward_f32, attention_forward_f64
from libc.math cimport exp, sqrt


cdef void apply_gates(const floating* x, const floating* gate, floating* out, Py_ssize_t B, Py_ssize_t H,
                      Py_ssize_t n) noexcept nogil:
    """out = sigmoid(gate) x; x, out: (B, H, n), gate: (H,)."""
    cdef Py_ssize_t row, i
    cdef floating open
    for row in range(B * H):
        open = <floating>(1 / (1 + exp(-gate[row % H])))
        for i in range(n):
            out[row * n + i] = open * x[row * n + i]


cdef void gate_gradients(const floating* dout, const floating* x, const floating* gate, floating* dgate,
                         Py_ssize_t B, Py_ssize_t H, Py_ssize_t n) noexcept nogil:
    """dgate[h] = sigmoid'(gate[h]) times the sum of dout x over the head, in double: it is a long sum."""
    cdef Py_ssize_t b, h, i
    cdef double open, total
    for h in range(H):
        total = 0
        for b in range(B):
            for i in range((b * H + h) * n, (b * H + h + 1) * n):
                total += <double>dout[i] * x[i]
        open = 1 / (1 + exp(-gate[h]))
        dgate[h] = <floating>(open * (1 - open) * total)


def forward(const floating[:, :, :, ::1] q, const floating[:, :, :, ::1] k, const floating[:, :, :, ::1] v,
            const floating[::1] gate, int n_threads):
    """q, k, v: (B, H, T, D), no size 0; gate: (H,) -> out (B, H, T, D), and what backward needs."""
    cdef Py_ssize_t B = q.shape[0], H = q.shape[1], T = q.shape[2], D = q.shape[3]
    dtype = np.float32 if floating is float else np.float64
    attended_array, lse_array = np.empty((B, H, T, D), dtype), np.empty((B, H, T), dtype)
    out_array = np.empty((B, H, T, D), dtype)
    cdef floating[:, :, :, ::1] attended = attended_array, out = out_array
    cdef floating[:, :, ::1] lse = lse_array
    cdef int status
    with nogil:
        if floating is float:
            status = attention_forward_f32(
                &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &attended[0, 0, 0, 0], &lse[0, 0, 0],
                B, H, H, T, T, D, D, True, 1 / sqrt(D), n_threads)
        else:
            status = attention_forward_f64(
                &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &attended[0, 0, 0, 0], &lse[0, 0, 0],
                B, H, H, T, T, D, D, True, 1 / sqrt(D), n_threads)
        apply_gates(&attended[0, 0, 0, 0], &gate[0], &out[0, 0, 0, 0], B, H, T * D)
    if status != 0:
        raise MemoryError
    return out_array, attended_array, lse_array


def backward(const floating[:, :, :, ::1] dout, const floating[:, :, :, ::1] q,
             const floating[:, :, :, ::1] k, const floating[:, :, :, ::1] v, const floating[::1] gate,
             const floating[:, :, :, ::1] attended, const floating[:, :, ::1] lse, int n_threads):
    """Gradients of `forward` -> dq, dk, dv, dgate."""
    cdef Py_ssize_t B = q.shape[0], H = q.shape[1], T = q.shape[2], D = q.shape[3]
    dtype = np.float32 if floating is float else np.float64
    dattended_array = np.empty((B, H, T, D), dtype)
    dq_array, dk_array, dv_array = (np.empty((B, H, T, D), dtype) for _ in range(3))
    dgate_array = np.empty(H, dtype)
    cdef floating[:, :, :, ::1] dattended = dattended_array, dq = dq_array, dk = dk_array, dv = dv_array
    cdef floating[::1] dgate = dgate_array
    cdef int status
    with nogil:
        gate_gradients(&dout[0, 0, 0, 0], &attended[0, 0, 0, 0], &gate[0], &dgate[0], B, H, T * D)
        apply_gates(&dout[0, 0, 0, 0], &gate[0], &dattended[0, 0, 0, 0], B, H, T * D)
        if floating is float:
            status = attention_backward_f32(
                &dattended[0, 0, 0, 0], &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &attended[0, 0, 0, 0],
                &lse[0, 0, 0], &dq[0, 0, 0, 0], &dk[0, 0, 0, 0], &dv[0, 0, 0, 0],
                B, H, H, T, T, D, D, True, 1 / sqrt(D), n_threads)
        else:
            status = attention_backward_f64(
                &dattended[0, 0, 0, 0], &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &attended[0, 0, 0, 0],
                &lse[0, 0, 0], &dq[0, 0, 0, 0], &dk[0, 0, 0, 0], &dv[0, 0, 0, 0],
                B, H, H, T, T, D, D, True, 1 / sqrt(D), n_threads)
    if status != 0:
        raise MemoryError
    return dq_array, dk_array, dv_array, dgate_array
