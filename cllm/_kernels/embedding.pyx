"""Embedding: rows of a table (V, C) by token, and the gradient of the table.

Forward copies rows. Backward adds the rows of dy that belong to one token: a list for each token, in the
order of the tokens, is made first; then threads take rows of the table, so that each owns what it writes.
A row of dweight is summed in blocks of SUM_BLOCK rows of dy: one letter can occur thousands of times, and
a plain float32 sum of 4096 rows loses 3.5e-4. No bit depends on how the table is cut.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from numpy cimport PyArray_DATA as data

from cllm._kernels.threads cimport useful_threads

cnp.import_array()

cdef enum:
    ROW_BLOCK = 128         # the most rows of the table that one thread clears and sums together
    SUM_BLOCK = 32
    COLUMNS = 256           # the most columns that are summed together
# Elements from which a second thread pays (benchmarks/thresholds.py): 16384 forward 2.9 -> 2.4 us. Backward counts
# those of the table, too: the lists come from another core; (4096, 65, 128) 66 -> 36 us, (2048, 65, 128) 17 -> 25.
cdef double SERIAL_BELOW = 16384
cdef double BACKWARD_SERIAL_BELOW = 500_000


cdef void forward(const int64_t* tokens, const char* weight, char* out, Py_ssize_t N, Py_ssize_t row_bytes,
                  int n_threads) noexcept nogil:
    """tokens: (N,); weight, out: rows of row_bytes bytes."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        memcpy(out + i * row_bytes, weight + tokens[i] * row_bytes, row_bytes)


def embedding_forward(cnp.ndarray tokens, cnp.ndarray weight, cnp.ndarray out, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(tokens), C = cnp.PyArray_DIM(weight, 1)
    n_threads = useful_threads(N * C, SERIAL_BELOW, n_threads)
    with nogil:
        forward(<int64_t*>data(tokens), <char*>data(weight), <char*>data(out), N,
                C * cnp.PyArray_ITEMSIZE(weight), n_threads)


cdef void list_tokens(const int64_t* tokens, int64_t* first, int64_t* following, Py_ssize_t N,
                      Py_ssize_t V) noexcept nogil:
    """first[v]: where token v occurs first; following[i]: where tokens[i] occurs next; -1: nowhere."""
    cdef Py_ssize_t i
    for i in range(V):
        first[i] = -1
    for i in range(N - 1, -1, -1):
        following[i] = first[tokens[i]]
        first[tokens[i]] = i


cdef void sum_tokens(const floating* dy, const int64_t* first, const int64_t* following, floating* dweight,
                     Py_ssize_t start, Py_ssize_t end, Py_ssize_t C, bint accumulate) noexcept nogil:
    """Rows start to end of dweight (V, C) (+)= the rows of dy (N, C) that belong to their tokens."""
    cdef floating partial[COLUMNS]
    cdef const floating* source
    cdef floating* row
    cdef Py_ssize_t v, c, n, i, count, j
    if not accumulate:
        memset(dweight + start * C, 0, (end - start) * C * sizeof(floating))
    for v in range(start, end):
        for c from 0 <= c < C by COLUMNS:
            row = dweight + v * C + c
            n = min(<Py_ssize_t>COLUMNS, C - c)
            i = first[v]
            while i >= 0:
                memcpy(partial, dy + i * C + c, n * sizeof(floating))
                i = following[i]
                count = 1
                while i >= 0 and count < SUM_BLOCK:
                    source = dy + i * C + c
                    for j in range(n):
                        partial[j] += source[j]
                    i = following[i]
                    count += 1
                for j in range(n):
                    row[j] += partial[j]


cdef void backward(const floating* dy, const int64_t* tokens, int64_t* lists, floating* dweight, Py_ssize_t N,
                   Py_ssize_t V, Py_ssize_t C, bint accumulate, int n_threads) noexcept nogil:
    """dy: (N, C); tokens: (N,); lists: scratch, (V + N,); dweight: (V, C)."""
    cdef Py_ssize_t step = max(1, min(<Py_ssize_t>ROW_BLOCK, V // (8 * n_threads))), block
    list_tokens(tokens, lists, lists + V, N, V)
    for block in prange((V + step - 1) // step, num_threads=n_threads, schedule="dynamic",
                        use_threads_if=n_threads > 1):
        sum_tokens(dy, lists, lists + V, dweight, block * step, min(V, block * step + step), C, accumulate)


def embedding_backward(cnp.ndarray dy, cnp.ndarray tokens, cnp.ndarray lists, cnp.ndarray dweight,
                       bint accumulate, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(tokens)
    cdef Py_ssize_t V = cnp.PyArray_DIM(dweight, 0), C = cnp.PyArray_DIM(dweight, 1)
    cdef int64_t* t = <int64_t*>data(tokens)
    cdef int64_t* scratch = <int64_t*>data(lists)
    n_threads = useful_threads((N + V) * C, BACKWARD_SERIAL_BELOW, n_threads)
    if cnp.PyArray_TYPE(dy) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dy), t, scratch, <float*>data(dweight), N, V, C, accumulate,
                     n_threads)
    else:
        with nogil:
            backward(<double*>data(dy), t, scratch, <double*>data(dweight), N, V, C,
                     accumulate, n_threads)
