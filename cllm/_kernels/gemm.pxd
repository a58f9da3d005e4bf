cimport cython
from cython cimport floating

cdef int gemm(Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
              const floating* a, Py_ssize_t ars, Py_ssize_t acs,
              const floating* b, Py_ssize_t brs, Py_ssize_t bcs,
              floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
              const floating* bias, int n_threads) noexcept nogil
