"""CLLM's kernels for a Cython file of your own: `from cllm.capi cimport attention_forward_f32`.

Each function exists for float (_f32) and double (_f64) and calls the instruction set chosen when CLLM was
imported. All are `noexcept nogil`. Nothing is checked: the caller answers for sizes, for pointers and for
outputs that do not overlap inputs. Arrays are C-contiguous, of the shape given beside them. n_threads is the
most threads to use (little work stays serial); the result's bits do not depend on it. A function that returns
int gives 0, or -1 when there was no memory, and then its outputs hold nothing of use.

docs/examples/own_kernel/ is a complete example.
"""
from libc.stdint cimport int64_t

# c (M, N) = a (M, K) b (K, N) + bias, added to what c holds if accumulate; bias (N,) may be NULL. Row and
# column strides of a and b count elements; one of each two is 1. For a product with a weight (N, K)
# transposed, b's strides are 1 and K.
cdef int matmul_f32(
    const float* a, Py_ssize_t a_row, Py_ssize_t a_column, const float* b, Py_ssize_t b_row,
    Py_ssize_t b_column, const float* bias, float* c, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
    bint accumulate, int n_threads,
) noexcept nogil
cdef int matmul_f64(
    const double* a, Py_ssize_t a_row, Py_ssize_t a_column, const double* b, Py_ssize_t b_row,
    Py_ssize_t b_column, const double* bias, double* c, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
    bint accumulate, int n_threads,
) noexcept nogil

# out (B, H, T, E) = softmax(scale q k^T) v; q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), where G divides
# H and query head h uses key head h // (H // G); no size is 0. If causal, query i sees the keys 0..i. lse
# (B, H, T) is for backward.
cdef int attention_forward_f32(
    const float* q, const float* k, const float* v, float* out, float* lse, Py_ssize_t B, Py_ssize_t H,
    Py_ssize_t G, Py_ssize_t T, Py_ssize_t S, Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
    int n_threads,
) noexcept nogil
cdef int attention_forward_f64(
    const double* q, const double* k, const double* v, double* out, double* lse, Py_ssize_t B, Py_ssize_t H,
    Py_ssize_t G, Py_ssize_t T, Py_ssize_t S, Py_ssize_t D, Py_ssize_t E, bint causal, double scale,
    int n_threads,
) noexcept nogil
# dq, dk, dv like q, k, v; dout like out; out and lse as forward wrote them.
cdef int attention_backward_f32(
    const float* dout, const float* q, const float* k, const float* v, const float* out, const float* lse,
    float* dq, float* dk, float* dv, Py_ssize_t B, Py_ssize_t H, Py_ssize_t G, Py_ssize_t T, Py_ssize_t S,
    Py_ssize_t D, Py_ssize_t E, bint causal, double scale, int n_threads,
) noexcept nogil
cdef int attention_backward_f64(
    const double* dout, const double* q, const double* k, const double* v, const double* out,
    const double* lse, double* dq, double* dk, double* dv, Py_ssize_t B, Py_ssize_t H, Py_ssize_t G,
    Py_ssize_t T, Py_ssize_t S, Py_ssize_t D, Py_ssize_t E, bint causal, double scale, int n_threads,
) noexcept nogil

# y = gelu(x), dx = dy gelu'(x); all (n,). tanh: the tanh form, else the one with erf. y may be x, dx dy.
cdef void gelu_forward_f32(const float* x, float* y, Py_ssize_t n, bint tanh, int n_threads) noexcept nogil
cdef void gelu_forward_f64(const double* x, double* y, Py_ssize_t n, bint tanh, int n_threads) noexcept nogil
cdef void gelu_backward_f32(
    const float* dy, const float* x, float* dx, Py_ssize_t n, bint tanh, int n_threads,
) noexcept nogil
cdef void gelu_backward_f64(
    const double* dy, const double* x, double* dx, Py_ssize_t n, bint tanh, int n_threads,
) noexcept nogil

# y = softmax(x) along rows, dx from dy and y; all (N, C).
cdef void softmax_forward_f32(
    const float* x, float* y, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
cdef void softmax_forward_f64(
    const double* x, double* y, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
cdef void softmax_backward_f32(
    const float* dy, const float* y, float* dx, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
cdef void softmax_backward_f64(
    const double* dy, const double* y, double* dx, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil

# y (N, C) = (x - mean) rstd weight + bias by rows; weight (C,), bias (C,) or NULL; mean, rstd (N,) for
# backward. C is at least 1.
cdef void layer_norm_forward_f32(
    const float* x, const float* weight, const float* bias, double eps, float* y, float* mean, float* rstd,
    Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
cdef void layer_norm_forward_f64(
    const double* x, const double* weight, const double* bias, double eps, double* y, double* mean,
    double* rstd, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
# dx (N, C), dweight (C,), dbias (C,) or NULL.
cdef int layer_norm_backward_f32(
    const float* dy, const float* x, const float* weight, const float* mean, const float* rstd, float* dx,
    float* dweight, float* dbias, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil
cdef int layer_norm_backward_f64(
    const double* dy, const double* x, const double* weight, const double* mean, const double* rstd,
    double* dx, double* dweight, double* dbias, Py_ssize_t N, Py_ssize_t C, int n_threads,
) noexcept nogil

# losses (N,) = -log(softmax(logits)[target]) of logits (N, V), targets (N,) in [0, V) or ignore_index, with
# label smoothing in [0, 1]; lse (N,) is for backward. V is at least 1.
cdef void cross_entropy_forward_f32(
    const float* logits, const int64_t* targets, float* losses, float* lse, Py_ssize_t N, Py_ssize_t V,
    int64_t ignore_index, double label_smoothing, int n_threads,
) noexcept nogil
cdef void cross_entropy_forward_f64(
    const double* logits, const int64_t* targets, double* losses, double* lse, Py_ssize_t N, Py_ssize_t V,
    int64_t ignore_index, double label_smoothing, int n_threads,
) noexcept nogil
# dlogits (N, V), which may be logits; dlosses (N,).
cdef void cross_entropy_backward_f32(
    const float* dlosses, const float* logits, const int64_t* targets, const float* lse, float* dlogits,
    Py_ssize_t N, Py_ssize_t V, int64_t ignore_index, double label_smoothing, int n_threads,
) noexcept nogil
cdef void cross_entropy_backward_f64(
    const double* dlosses, const double* logits, const int64_t* targets, const double* lse, double* dlogits,
    Py_ssize_t N, Py_ssize_t V, int64_t ignore_index, double label_smoothing, int n_threads,
) noexcept nogil

# One AdamW step in place; all (n,); m and v are zeros before the first step, which is step 1.
cdef void adamw_update_f32(
    float* param, const float* grad, float* m, float* v, Py_ssize_t n, Py_ssize_t step, double lr,
    double beta1, double beta2, double eps, double weight_decay, int n_threads,
) noexcept nogil
cdef void adamw_update_f64(
    double* param, const double* grad, double* m, double* v, Py_ssize_t n, Py_ssize_t step, double lr,
    double beta1, double beta2, double eps, double weight_decay, int n_threads,
) noexcept nogil
