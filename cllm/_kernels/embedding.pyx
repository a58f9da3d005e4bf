"""Embedding: rows of a table (V, C) by token, and the gradient of the table.

Forward copies rows. Backward adds the rows of dy that belong to one token: a list for each token, in the
order of the tokens, is made first; then threads take ranges of columns, so that each owns what it writes.
A row of dweight is summed in blocks of SUM_BLOCK rows of dy: one letter can occur thousands of times, and
a plain float32 sum of 4096 rows loses 3.5e-4. No bit depends on how the columns are cut.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from numpy cimport PyArray_DATA as data

cnp.import_array()

cdef enum:
    ROW_BLOCK = 32          # rows that one thread copies or clears together
    SUM_BLOCK = 32
    COLUMNS = 256           # the most columns that are summed together
    LINE = 16               # columns are cut at multiples of this: threads share no cache line
# Under this many elements a second thread costs more than it brings (0.2 ns an element, 4 us a region).
cdef Py_ssize_t SERIAL_BELOW = 65536


cdef void forward(const int64_t* tokens, const char* weight, char* out, Py_ssize_t N, Py_ssize_t row_bytes,
                  int n_threads) noexcept nogil:
    """tokens: (N,); weight, out: rows of row_bytes bytes."""
    cdef Py_ssize_t i
    for i in prange(N, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        memcpy(out + i * row_bytes, weight + tokens[i] * row_bytes, row_bytes)


def embedding_forward(cnp.ndarray tokens, cnp.ndarray weight, cnp.ndarray out, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(tokens), C = cnp.PyArray_DIM(weight, 1)
    if N * C < SERIAL_BELOW:
        n_threads = 1
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


cdef void sum_columns(const floating* dy, const int64_t* tokens, const int64_t* first,
                      const int64_t* following, floating* dweight, Py_ssize_t N, Py_ssize_t C,
                      Py_ssize_t n) noexcept nogil:
    """Adds the first n columns of dy (N, C) to those of dweight (V, C), token by token; n <= COLUMNS."""
    cdef floating partial[COLUMNS]
    cdef const floating* source
    cdef floating* row
    cdef Py_ssize_t start, i, count, j
    for start in range(N):
        if first[tokens[start]] != start:
            continue
        row = dweight + tokens[start] * C
        i = start
        while i >= 0:
            memcpy(partial, dy + i * C, n * sizeof(floating))
            i = following[i]
            count = 1
            while i >= 0 and count < SUM_BLOCK:
                source = dy + i * C
                for j in range(n):
                    partial[j] += source[j]
                i = following[i]
                count += 1
            for j in range(n):
                row[j] += partial[j]


cdef void backward(const floating* dy, const int64_t* tokens, int64_t* lists, floating* dweight, Py_ssize_t N,
                   Py_ssize_t V, Py_ssize_t C, bint accumulate, int n_threads) noexcept nogil:
    """dy: (N, C); tokens: (N,); lists: scratch, (V + N,); dweight: (V, C)."""
    cdef Py_ssize_t lines = max(<Py_ssize_t>1, (C + LINE - 1) // LINE)
    cdef Py_ssize_t width = min(<Py_ssize_t>COLUMNS, (lines + n_threads - 1) // n_threads * LINE)
    cdef Py_ssize_t block, start
    if not accumulate:
        for block in prange((V + ROW_BLOCK - 1) // ROW_BLOCK, num_threads=n_threads, schedule="static",
                            use_threads_if=n_threads > 1):
            start = block * ROW_BLOCK
            memset(dweight + start * C, 0, min(<Py_ssize_t>ROW_BLOCK, V - start) * C * sizeof(floating))
    list_tokens(tokens, lists, lists + V, N, V)
    for block in prange((C + width - 1) // width, num_threads=n_threads, schedule="static",
                        use_threads_if=n_threads > 1):
        start = block * width
        sum_columns(dy + start, tokens, lists, lists + V, dweight + start, N, C, min(width, C - start))


def embedding_backward(cnp.ndarray dy, cnp.ndarray tokens, cnp.ndarray lists, cnp.ndarray dweight,
                       bint accumulate, int n_threads):
    cdef Py_ssize_t N = cnp.PyArray_SIZE(tokens)
    cdef Py_ssize_t V = cnp.PyArray_DIM(dweight, 0), C = cnp.PyArray_DIM(dweight, 1)
    cdef int64_t* t = <int64_t*>data(tokens)
    cdef int64_t* scratch = <int64_t*>data(lists)
    if N * C < SERIAL_BELOW:
        n_threads = 1
    if cnp.PyArray_TYPE(dy) == cnp.NPY_FLOAT:
        with nogil:
            backward(<float*>data(dy), t, scratch, <float*>data(dweight), N, V, C, accumulate,
                     n_threads)
    else:
        with nogil:
            backward(<double*>data(dy), t, scratch, <double*>data(dweight), N, V, C,
                     accumulate, n_threads)
