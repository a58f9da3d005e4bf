"""What `cllm.capi` calls of softmax."""
from cython cimport floating

cdef void forward(const floating* x, floating* y, bint logs, Py_ssize_t N, Py_ssize_t V,
                  int n_threads) noexcept nogil
cdef void backward(const floating* dy, const floating* y, floating* dx, bint logs, Py_ssize_t N, Py_ssize_t V,
                   int n_threads) noexcept nogil
