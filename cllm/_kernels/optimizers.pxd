"""What `cllm.capi` calls of the optimizers."""
from cython cimport floating

cdef void adam_blocks(floating* param, const floating* grad, floating* m, floating* v, floating* v_max,
                      Py_ssize_t n, floating sign, floating step_size, floating beta1, floating rest1,
                      floating beta2, floating rest2, floating correction, floating eps, floating decay,
                      floating l2, int n_threads) noexcept nogil
