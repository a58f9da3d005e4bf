"""What `cllm.capi` calls of cross-entropy."""
from cython cimport floating
from libc.stdint cimport int64_t

cdef void forward(const floating* logits, const int64_t* targets, const floating* weight, double mean_weight,
                  int64_t ignore_index, double smoothing, double z_loss, floating* losses, floating* lse,
                  Py_ssize_t N, Py_ssize_t V, int n_threads) noexcept nogil
cdef void backward(const floating* dlosses, const floating* logits, const int64_t* targets,
                   const floating* lse, const floating* weight, double mean_weight, int64_t ignore_index,
                   double smoothing, double z_loss, floating* dlogits, Py_ssize_t N, Py_ssize_t V,
                   int n_threads) noexcept nogil
