"""What `cllm.capi` calls of layer norm."""
from cython cimport floating

cdef Py_ssize_t n_row_blocks(Py_ssize_t N) noexcept nogil
cdef void forward(const floating* x, const floating* weight, const floating* bias, double eps, floating* y,
                  floating* mean, floating* rstd, Py_ssize_t N, Py_ssize_t C, int n_threads) noexcept nogil
cdef void backward(const floating* dy, const floating* x, const floating* weight, bint centred,
                   const floating* mean, const floating* rstd, floating* dx, floating* dweight,
                   floating* dbias, floating* partials, Py_ssize_t N, Py_ssize_t C, bint accumulate,
                   int n_threads) noexcept nogil
