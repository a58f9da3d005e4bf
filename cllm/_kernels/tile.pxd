"""The register tile and the packing of `tile.h` for fused code; declarations and inline functions only."""
from cython cimport floating

cdef extern from "tile.h" nogil:
    const Py_ssize_t MR "CLLM_MR"           # rows of a tile
    const Py_ssize_t NV "CLLM_NV"           # vectors in a tile's row
    const Py_ssize_t VBYTES "CLLM_VBYTES"   # bytes in a vector
    void cllm_tile_f32(Py_ssize_t mr, Py_ssize_t n, Py_ssize_t k, const float* a, Py_ssize_t ars, Py_ssize_t acs,
                       const float* b, Py_ssize_t ldb, float* c, Py_ssize_t ldc,
                       const float* add, Py_ssize_t ldadd, const float* bias)
    void cllm_tile_f64(Py_ssize_t mr, Py_ssize_t n, Py_ssize_t k, const double* a, Py_ssize_t ars, Py_ssize_t acs,
                       const double* b, Py_ssize_t ldb, double* c, Py_ssize_t ldc,
                       const double* add, Py_ssize_t ldadd, const double* bias)
    void cllm_pack_f32(const float* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n, Py_ssize_t width,
                       float scale, float* y)
    void cllm_pack_f64(const double* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n, Py_ssize_t width,
                       double scale, double* y)
    void cllm_pack_transposed_f32(const float* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n,
                                  Py_ssize_t width, float scale, float* y)
    void cllm_pack_transposed_f64(const double* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n,
                                  Py_ssize_t width, double scale, double* y)


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t round_up(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b * b


cdef inline void tile(Py_ssize_t mr, Py_ssize_t n, Py_ssize_t k, const floating* a, Py_ssize_t ars, Py_ssize_t acs,
                      const floating* b, Py_ssize_t ldb, floating* c, Py_ssize_t ldc,
                      const floating* add, Py_ssize_t ldadd, const floating* bias) noexcept nogil:
    """c (mr, n) = a (mr, k) b (k, n) + add + bias; add and bias may be NULL."""
    if floating is float:
        cllm_tile_f32(mr, n, k, a, ars, acs, b, ldb, c, ldc, add, ldadd, bias)
    else:
        cllm_tile_f64(mr, n, k, a, ars, acs, b, ldb, c, ldc, add, ldadd, bias)


cdef inline void pack(const floating* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n, Py_ssize_t width,
                      double scale, floating* y) noexcept nogil:
    """y (count, width) = scale * x (count, n) with row stride ld, zeros from n to the next whole vector."""
    if floating is float:
        cllm_pack_f32(x, ld, count, n, width, <float>scale, y)
    else:
        cllm_pack_f64(x, ld, count, n, width, scale, y)


cdef inline void pack_transposed(const floating* x, Py_ssize_t ld, Py_ssize_t count, Py_ssize_t n, Py_ssize_t width,
                                 double scale, floating* y) noexcept nogil:
    """y (count, width) = scale * the transpose of x (n, count) with row stride ld, and zeros as from `pack`."""
    if floating is float:
        cllm_pack_transposed_f32(x, ld, count, n, width, <float>scale, y)
    else:
        cllm_pack_transposed_f64(x, ld, count, n, width, scale, y)
