"""exp, erf and tanh of vmath.h for either float type; loops that call them vectorise in float32."""
from cython cimport floating

cdef extern from "vmath.h" nogil:
    float cllm_expf(float)
    double cllm_exp(double)
    float cllm_erff(float)
    double cllm_erf(double)
    float cllm_tanhf(float)
    double cllm_tanh(double)


cdef inline floating vexp(floating x) noexcept nogil:
    if floating is float:
        return cllm_expf(x)
    else:
        return cllm_exp(x)


cdef inline floating verf(floating x) noexcept nogil:
    if floating is float:
        return cllm_erff(x)
    else:
        return cllm_erf(x)


cdef inline floating vtanh(floating x) noexcept nogil:
    if floating is float:
        return cllm_tanhf(x)
    else:
        return cllm_tanh(x)
