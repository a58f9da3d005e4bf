"""What `cllm.capi` calls of attention."""
from cython cimport floating
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef struct Strides:
    Py_ssize_t b, h, t          # elements from one batch item, head, position to the next
    Py_ssize_t s                # of a mask: from one key to the next


cdef struct Shape:
    Py_ssize_t H, group         # query heads; how many of them share a key/value head
    Py_ssize_t Tq, Tk, D, E     # queries, keys, size of a query or key, size of a value
    bint causal                 # query i sees keys 0..offset + i
    double scale
    const int64_t* offsets      # (B,) positions of the first queries; NULL: 0
    const double* slopes        # (H,) what each position between query and key takes from a score; NULL: 0
    const char* mask            # (B, H, Tq, Tk); NULL: none
    Py_ssize_t mask_size        # bytes of an element: 1 when boolean, else of float or double
    Strides mask_strides
    uint64_t key                # of the dropout mask
    uint32_t keep_limit         # an element stays when its 32 random bits are at most this
    double keep_scale           # 1 / (1 - dropout_p); 1: no dropout


cdef int forward_heads(const floating* q, Strides qs, const floating* k, Strides ks, const floating* v,
                       Strides vs, floating* out, Strides os, floating* lse, Py_ssize_t B, const Shape* shape,
                       int n_threads) noexcept nogil
cdef int backward_heads(const floating* dout, Strides gs, const floating* q, Strides qs, const floating* k,
                        Strides ks, const floating* v, Strides vs, const floating* out, Strides os,
                        const floating* lse, floating* dq, Strides dqs, floating* dk, Strides dks,
                        floating* dv, Strides dvs, Py_ssize_t B, const Shape* shape,
                        int n_threads) noexcept nogil
cdef int threads_for(const Shape* shape, Py_ssize_t B, int n_threads) noexcept nogil
