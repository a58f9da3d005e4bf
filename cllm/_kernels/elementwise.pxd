"""What `cllm.capi` calls of the activations."""
from cython cimport floating

cdef enum:
    GELU_TANH, GELU, RELU, RELU_SQUARED, SILU, TANH, SIGMOID

cdef void activation_forward_blocks(int activation, const floating* x, floating* out, Py_ssize_t n,
                                    int n_threads) noexcept nogil
cdef void activation_backward_blocks(int activation, const floating* dy, const floating* saved, floating* dx,
                                     Py_ssize_t n, int n_threads) noexcept nogil
