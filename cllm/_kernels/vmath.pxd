"""The functions of vmath.h for either float type; loops that call them vectorise in float32."""
from cython cimport floating

cdef extern from "vmath.h" nogil:
    float cllm_expf(float)
    double cllm_exp(double)
    float cllm_exp2f(float)
    double cllm_exp2(double)
    float cllm_geluf(float)
    double cllm_gelu(double)
    float cllm_gelu_slopef(float)
    double cllm_gelu_slope(double)
    float cllm_tanhf(float)
    double cllm_tanh(double)


cdef inline floating vexp(floating x) noexcept nogil:
    if floating is float:
        return cllm_expf(x)
    else:
        return cllm_exp(x)


cdef inline floating vexp2(floating x) noexcept nogil:
    if floating is float:
        return cllm_exp2f(x)
    else:
        return cllm_exp2(x)


cdef inline floating vgelu(floating x) noexcept nogil:
    if floating is float:
        return cllm_geluf(x)
    else:
        return cllm_gelu(x)


cdef inline floating vgelu_slope(floating x) noexcept nogil:
    if floating is float:
        return cllm_gelu_slopef(x)
    else:
        return cllm_gelu_slope(x)


cdef inline floating vtanh(floating x) noexcept nogil:
    if floating is float:
        return cllm_tanhf(x)
    else:
        return cllm_tanh(x)
