"""Batches of tokens: windows of one long array, widened to int64 inputs and targets, and their mask.

Row b reads the tokens from starts[b] on: input t is token t of the row, target t the one behind it. A row of
fewer than T targets is filled up with zeros that the mask leaves out, and so is a target that is the first
token of another document. Rows are copied by one thread: 768 tokens take 0.3 us, and whoever calls from a
thread of its own holds no GIL meanwhile, also where the pages of a file have to be read first.
"""
cimport numpy as cnp
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memset
from numpy cimport PyArray_DATA as data

cnp.import_array()

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #if defined(__unix__) || defined(__APPLE__)
    #include <sys/mman.h>
    #include <unistd.h>
    static void will_read(const void* first, size_t n) {
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)first / page * page;
        (void)!posix_madvise((void*)start, (uintptr_t)first + n - start, POSIX_MADV_WILLNEED);
    }
    #else
    static void will_read(const void* first, size_t n) {}
    #endif
    """
    void will_read(const void* first, size_t n) noexcept nogil

ctypedef fused token:
    uint8_t
    uint16_t
    uint32_t
    int64_t


cdef inline Py_ssize_t first_after(const int64_t* documents, Py_ssize_t n, int64_t place) noexcept nogil:
    """The index of the first of n ascending places that is larger than `place`, n when none is."""
    cdef Py_ssize_t low = 0, middle
    while low < n:
        middle = low + (n - low) // 2
        if documents[middle] > place:
            n = middle
        else:
            low = middle + 1
    return low


cdef void windows(const token* tokens, const int64_t* starts, const int64_t* lengths,
                  const int64_t* documents, Py_ssize_t n_documents, int64_t end, int64_t* inputs,
                  int64_t* targets, uint8_t* mask, bint prefetch, Py_ssize_t B, Py_ssize_t T) noexcept nogil:
    """starts, lengths: (B,); documents: ascending, (n_documents,); inputs, targets, mask: (B, T).

    lengths NULL: all T. documents NULL: none. end: the token that ends a document, -1: none. mask NULL: not
    wanted. prefetch: whether to ask the system for the pages of all rows before the first is copied.
    """
    cdef Py_ssize_t b, t, n, document
    cdef const token* row
    if prefetch:
        # A file of 2 GB, no page of it in memory, 8 windows: 11 of 16 ms less than one page after the other.
        for b in range(B):
            will_read(tokens + starts[b], ((T if lengths is NULL else lengths[b]) + 1) * sizeof(token))
    for b in range(B):
        row = tokens + starts[b]
        n = T if lengths is NULL else lengths[b]
        for t in range(n):
            inputs[t] = <int64_t>row[t]
            targets[t] = <int64_t>row[t + 1]
        memset(inputs + n, 0, (T - n) * sizeof(int64_t))
        memset(targets + n, 0, (T - n) * sizeof(int64_t))
        if mask is not NULL:
            memset(mask, 1, n)
            memset(mask + n, 0, T - n)
            if end >= 0:
                for t in range(n):
                    mask[t] = <int64_t>row[t] != end
            if documents is not NULL:
                document = first_after(documents, n_documents, starts[b])
                while document < n_documents and documents[document] <= starts[b] + n:
                    if documents[document] > starts[b]:  # also where they are not ascending
                        mask[documents[document] - starts[b] - 1] = 0
                    document += 1
            mask += T
        inputs += T
        targets += T


cdef inline int64_t* optional(array):
    return NULL if array is None else <int64_t*>data(<cnp.ndarray>array)


def gather_windows(cnp.ndarray tokens, cnp.ndarray starts, lengths, documents, int64_t end,
                   cnp.ndarray inputs, cnp.ndarray targets, mask, bint prefetch):
    cdef Py_ssize_t B = cnp.PyArray_DIM(inputs, 0), T = cnp.PyArray_DIM(inputs, 1)
    cdef Py_ssize_t n_documents = 0 if documents is None else cnp.PyArray_SIZE(<cnp.ndarray>documents)
    cdef int size = cnp.PyArray_ITEMSIZE(tokens)
    cdef void* x = data(tokens)
    cdef int64_t* s = <int64_t*>data(starts)
    cdef int64_t* l = optional(lengths)
    cdef int64_t* d = optional(documents)
    cdef int64_t* i = <int64_t*>data(inputs)
    cdef int64_t* o = <int64_t*>data(targets)
    cdef uint8_t* m = <uint8_t*>optional(mask)
    with nogil:
        if size == 1:
            windows(<uint8_t*>x, s, l, d, n_documents, end, i, o, m, prefetch, B, T)
        elif size == 2:
            windows(<uint16_t*>x, s, l, d, n_documents, end, i, o, m, prefetch, B, T)
        elif size == 4:
            windows(<uint32_t*>x, s, l, d, n_documents, end, i, o, m, prefetch, B, T)
        else:
            windows(<int64_t*>x, s, l, d, n_documents, end, i, o, m, prefetch, B, T)
