"""exp and erf of vmath.h for either float type; loops that call them vectorise in float32."""
from cython cimport floating

cdef extern from "vmath.h" nogil:
    float cllm_expf(float)
    double cllm_exp(double)
    float cllm_erff(float)
    double cllm_erf(double)


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
