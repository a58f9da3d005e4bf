"""The functions that `capi.pxd` declares: thin covers of the kernels' own loops.

A cimport from `cllm._kernels.x` imports that module, and so the variant of the instruction set in use: the
pointers that a user's module takes from this one lead there.
"""
from cython cimport floating
from libc.math cimport pow
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc

from cllm._kernels.attention cimport Shape, Strides, backward_heads, forward_heads, threads_for
from cllm._kernels.elementwise cimport GELU, GELU_TANH, activation_backward_blocks, activation_forward_blocks
from cllm._kernels.gemm cimport gemm
from cllm._kernels.loss cimport backward as loss_rows_backward
from cllm._kernels.loss cimport forward as loss_rows
from cllm._kernels.norm cimport backward as norm_rows_backward
from cllm._kernels.norm cimport forward as norm_rows
from cllm._kernels.norm cimport n_row_blocks
from cllm._kernels.optimizers cimport adam_blocks
from cllm._kernels.softmax cimport backward as softmax_rows_backward
from cllm._kernels.softmax cimport forward as softmax_rows
from cllm._kernels.threads cimport useful_threads

cdef inline int threads(Py_ssize_t n, int n_threads) noexcept nogil:
    return useful_threads(n, 32768, n_threads)


cdef inline int product(const floating* a, Py_ssize_t a_row, Py_ssize_t a_column, const floating* b,
                        Py_ssize_t b_row, Py_ssize_t b_column, const floating* bias, floating* c,
                        Py_ssize_t M, Py_ssize_t N, Py_ssize_t K, bint accumulate,
                        int n_threads) noexcept nogil:
    cdef const floating* add = NULL
    if accumulate:
        add = c
    return gemm(M, N, K, a, a_row, a_column, b, b_row, b_column, c, N, add, N, bias, n_threads)


cdef inline Strides contiguous(Py_ssize_t heads, Py_ssize_t length, Py_ssize_t size) noexcept nogil:
    """Of an array (B, heads, length, size)."""
    cdef Strides strides
    strides.b = heads * length * size
    strides.h = length * size
    strides.t = size
    strides.s = 1
    return strides


cdef inline Shape shape_of(Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S, Py_ssize_t D, Py_ssize_t E,
                           bint causal, double scale) noexcept nogil:
    """Attention without mask, slopes, offsets and dropout."""
    cdef Shape shape
    shape.H = H
    shape.group = H // G
    shape.Tq = T
    shape.Tk = S
    shape.D = D
    shape.E = E
    shape.causal = causal
    shape.scale = scale
    shape.offsets = NULL
    shape.slopes = NULL
    shape.mask = NULL
    shape.key = 0
    shape.keep_limit = <uint32_t>0xFFFFFFFF
    shape.keep_scale = 1
    return shape


cdef inline int attend(const floating* q, const floating* k, const floating* v, floating* out, floating* lse,
                       Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S, Py_ssize_t D,
                       Py_ssize_t E, bint causal, double scale, int n_threads) noexcept nogil:
    cdef Shape shape = shape_of(H, G, T, S, D, E, causal, scale)
    return forward_heads(q, contiguous(H, T, D), k, contiguous(G, S, D), v, contiguous(G, S, E), out,
                         contiguous(H, T, E), lse, B, &shape, threads_for(&shape, B, n_threads))


cdef inline int attend_backward(const floating* dout, const floating* q, const floating* k, const floating* v,
                                const floating* out, const floating* lse, floating* dq, floating* dk,
                                floating* dv, Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T,
                                Py_ssize_t S, Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
                                int n_threads) noexcept nogil:
    cdef Shape shape = shape_of(H, G, T, S, D, E, causal, scale)
    cdef Strides queries = contiguous(H, T, D), keys = contiguous(G, S, D), values = contiguous(G, S, E)
    cdef Strides outs = contiguous(H, T, E)
    return backward_heads(dout, outs, q, queries, k, keys, v, values, out, outs, lse, dq, queries, dk, keys,
                          dv, values, B, &shape, threads_for(&shape, B, n_threads))


cdef inline int norm_gradients(const floating* dy, const floating* x, const floating* weight,
                               const floating* mean, const floating* rstd, floating* dx, floating* dweight,
                               floating* dbias, Py_ssize_t N, Py_ssize_t C, int n_threads) noexcept nogil:
    cdef floating* partials = <floating*>malloc((n_row_blocks(N) * 2 * C + 1) * sizeof(floating))
    if partials is NULL:
        return -1
    norm_rows_backward(dy, x, weight, True, mean, rstd, dx, dweight, dbias, partials, N, C, False, n_threads)
    free(partials)
    return 0


cdef inline void step_blocks(floating* param, const floating* grad, floating* m, floating* v, Py_ssize_t n,
                             Py_ssize_t step, double lr, double beta1, double beta2, double eps,
                             double weight_decay, int n_threads) noexcept nogil:
    """The scalars that the Python door of AdamW computes."""
    adam_blocks(param, grad, m, v, <floating*>NULL, n, <floating>1, <floating>(lr / (1 - pow(beta1, step))),
                <floating>beta1, <floating>(1 - beta1), <floating>beta2, <floating>(1 - beta2),
                <floating>pow(1 - pow(beta2, step), -0.5), <floating>eps, <floating>(1 - lr * weight_decay),
                <floating>0, n_threads)


cdef int matmul_f32(const float* a, Py_ssize_t a_row, Py_ssize_t a_column, const float* b, Py_ssize_t b_row,
                    Py_ssize_t b_column, const float* bias, float* c, Py_ssize_t M, Py_ssize_t N,
                    Py_ssize_t K, bint accumulate, int n_threads) noexcept nogil:
    return product(a, a_row, a_column, b, b_row, b_column, bias, c, M, N, K, accumulate, n_threads)


cdef int matmul_f64(const double* a, Py_ssize_t a_row, Py_ssize_t a_column, const double* b, Py_ssize_t b_row,
                    Py_ssize_t b_column, const double* bias, double* c, Py_ssize_t M, Py_ssize_t N,
                    Py_ssize_t K, bint accumulate, int n_threads) noexcept nogil:
    return product(a, a_row, a_column, b, b_row, b_column, bias, c, M, N, K, accumulate, n_threads)


cdef int attention_forward_f32(const float* q, const float* k, const float* v, float* out, float* lse,
                               Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S,
                               Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
                               int n_threads) noexcept nogil:
    return attend(q, k, v, out, lse, B, H, G, T, S, D, E, causal, scale, n_threads)


cdef int attention_forward_f64(const double* q, const double* k, const double* v, double* out, double* lse,
                               Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S,
                               Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
                               int n_threads) noexcept nogil:
    return attend(q, k, v, out, lse, B, H, G, T, S, D, E, causal, scale, n_threads)


cdef int attention_backward_f32(const float* dout, const float* q, const float* k, const float* v,
                                const float* out, const float* lse, float* dq, float* dk, float* dv,
                                Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S,
                                Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
                                int n_threads) noexcept nogil:
    return attend_backward(dout, q, k, v, out, lse, dq, dk, dv, B, H, G, T, S, D, E, causal, scale, n_threads)


cdef int attention_backward_f64(const double* dout, const double* q, const double* k, const double* v,
                                const double* out, const double* lse, double* dq, double* dk, double* dv,
                                Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S,
                                Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
                                int n_threads) noexcept nogil:
    return attend_backward(dout, q, k, v, out, lse, dq, dk, dv, B, H, G, T, S, D, E, causal, scale, n_threads)


cdef void gelu_forward_f32(const float* x, float* y, Py_ssize_t n, bint tanh, int n_threads) noexcept nogil:
    activation_forward_blocks(GELU_TANH if tanh else GELU, x, y, n, threads(n, n_threads))


cdef void gelu_forward_f64(const double* x, double* y, Py_ssize_t n, bint tanh, int n_threads) noexcept nogil:
    activation_forward_blocks(GELU_TANH if tanh else GELU, x, y, n, threads(n, n_threads))


cdef void gelu_backward_f32(const float* dy, const float* x, float* dx, Py_ssize_t n, bint tanh,
                            int n_threads) noexcept nogil:
    activation_backward_blocks(GELU_TANH if tanh else GELU, dy, x, dx, n, threads(n, n_threads))


cdef void gelu_backward_f64(const double* dy, const double* x, double* dx, Py_ssize_t n, bint tanh,
                            int n_threads) noexcept nogil:
    activation_backward_blocks(GELU_TANH if tanh else GELU, dy, x, dx, n, threads(n, n_threads))


cdef void softmax_forward_f32(const float* x, float* y, Py_ssize_t N, Py_ssize_t C,
                              int n_threads) noexcept nogil:
    softmax_rows(x, y, False, N, C, threads(N * C, n_threads))


cdef void softmax_forward_f64(const double* x, double* y, Py_ssize_t N, Py_ssize_t C,
                              int n_threads) noexcept nogil:
    softmax_rows(x, y, False, N, C, threads(N * C, n_threads))


cdef void softmax_backward_f32(const float* dy, const float* y, float* dx, Py_ssize_t N, Py_ssize_t C,
                               int n_threads) noexcept nogil:
    softmax_rows_backward(dy, y, dx, False, N, C, threads(N * C, n_threads))


cdef void softmax_backward_f64(const double* dy, const double* y, double* dx, Py_ssize_t N, Py_ssize_t C,
                               int n_threads) noexcept nogil:
    softmax_rows_backward(dy, y, dx, False, N, C, threads(N * C, n_threads))


cdef void layer_norm_forward_f32(const float* x, const float* weight, const float* bias, double eps, float* y,
                                 float* mean, float* rstd, Py_ssize_t N, Py_ssize_t C,
                                 int n_threads) noexcept nogil:
    norm_rows(x, weight, bias, eps, y, mean, rstd, N, C, threads(N * C, n_threads))


cdef void layer_norm_forward_f64(const double* x, const double* weight, const double* bias, double eps,
                                 double* y, double* mean, double* rstd, Py_ssize_t N, Py_ssize_t C,
                                 int n_threads) noexcept nogil:
    norm_rows(x, weight, bias, eps, y, mean, rstd, N, C, threads(N * C, n_threads))


cdef int layer_norm_backward_f32(const float* dy, const float* x, const float* weight, const float* mean,
                                 const float* rstd, float* dx, float* dweight, float* dbias, Py_ssize_t N,
                                 Py_ssize_t C, int n_threads) noexcept nogil:
    return norm_gradients(dy, x, weight, mean, rstd, dx, dweight, dbias, N, C, threads(N * C, n_threads))


cdef int layer_norm_backward_f64(const double* dy, const double* x, const double* weight, const double* mean,
                                 const double* rstd, double* dx, double* dweight, double* dbias, Py_ssize_t N,
                                 Py_ssize_t C, int n_threads) noexcept nogil:
    return norm_gradients(dy, x, weight, mean, rstd, dx, dweight, dbias, N, C, threads(N * C, n_threads))


cdef void cross_entropy_forward_f32(const float* logits, const int64_t* targets, float* losses, float* lse,
                                    Py_ssize_t N, Py_ssize_t V, int64_t ignore_index, double label_smoothing,
                                    int n_threads) noexcept nogil:
    loss_rows(logits, targets, <const float*>NULL, 1, ignore_index, label_smoothing, 0, losses, lse, N, V,
              threads(N * V, n_threads))


cdef void cross_entropy_forward_f64(const double* logits, const int64_t* targets, double* losses, double* lse,
                                    Py_ssize_t N, Py_ssize_t V, int64_t ignore_index, double label_smoothing,
                                    int n_threads) noexcept nogil:
    loss_rows(logits, targets, <const double*>NULL, 1, ignore_index, label_smoothing, 0, losses, lse, N, V,
              threads(N * V, n_threads))


cdef void cross_entropy_backward_f32(const float* dlosses, const float* logits, const int64_t* targets,
                                     const float* lse, float* dlogits, Py_ssize_t N, Py_ssize_t V,
                                     int64_t ignore_index, double label_smoothing,
                                     int n_threads) noexcept nogil:
    loss_rows_backward(dlosses, logits, targets, lse, <const float*>NULL, 1, ignore_index, label_smoothing, 0,
                       dlogits, N, V, threads(N * V, n_threads))


cdef void cross_entropy_backward_f64(const double* dlosses, const double* logits, const int64_t* targets,
                                     const double* lse, double* dlogits, Py_ssize_t N, Py_ssize_t V,
                                     int64_t ignore_index, double label_smoothing,
                                     int n_threads) noexcept nogil:
    loss_rows_backward(dlosses, logits, targets, lse, <const double*>NULL, 1, ignore_index, label_smoothing,
                       0, dlogits, N, V, threads(N * V, n_threads))


cdef void adamw_update_f32(float* param, const float* grad, float* m, float* v, Py_ssize_t n, Py_ssize_t step,
                           double lr, double beta1, double beta2, double eps, double weight_decay,
                           int n_threads) noexcept nogil:
    step_blocks(param, grad, m, v, n, step, lr, beta1, beta2, eps, weight_decay, threads(n, n_threads))


cdef void adamw_update_f64(double* param, const double* grad, double* m, double* v, Py_ssize_t n,
                           Py_ssize_t step, double lr, double beta1, double beta2, double eps,
                           double weight_decay, int n_threads) noexcept nogil:
    step_blocks(param, grad, m, v, n, step, lr, beta1, beta2, eps, weight_decay, threads(n, n_threads))
