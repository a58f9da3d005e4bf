"""A pool of aligned buffers for activations, gradients and batches.

A training step asks for the same sizes again and again. Fresh large arrays cost 0.22 ms a MB in page
faults, recycled ones nothing. Each array that `empty` returns has a `Block` as the base of all its
views; when the last view dies, the block's memory goes back to the free list of its size.
"""
cimport numpy as cnp
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

import numpy as np

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    object PyArray_SimpleNewFromData(int nd, cnp.npy_intp* dims, int typenum, void* data)

cdef size_t ALIGNMENT = 64
cdef size_t LARGEST = <size_t>1 << 62   # bytes of an array
cdef size_t LARGE = 1 << 20     # bytes from which an idle buffer of a class up to half as large again serves as well
cdef size_t SLACK = 64 << 20            # idle bytes that are always kept
cdef void* _free[512]           # for each size class its idle buffers: each begins with the next one's address
cdef size_t _idle_bytes = 0     # in the free lists
cdef size_t _live_bytes = 0     # in arrays that are in use
cdef size_t _peak_bytes = 0     # the most that was in use


cdef inline size_t _size_class(size_t n, int* number) noexcept nogil:
    """n rounded up to one of eight steps for each power of two, at most 12.5 % wasted; and which one it is."""
    cdef size_t step = ALIGNMENT
    number[0] = 0
    while n > step * 16:
        step *= 2
        number[0] += 8
    number[0] += <int>((n + step - 1) // step)
    return (n + step - 1) // step * step


cdef inline size_t _class_bytes(int number) noexcept nogil:
    """The size of a class: the inverse of `_size_class`."""
    cdef int doublings = (number - 9) // 8 if number > 16 else 0
    return (ALIGNMENT << doublings) * <size_t>(number - 8 * doublings)


cdef class Block:
    """Owns one buffer and gives it back to the pool when the last array over it is gone."""
    cdef void* address          # what malloc returned; the data starts at the next multiple of 64
    cdef readonly size_t size   # bytes
    cdef readonly bint recycled # whether the pool had the buffer
    cdef int number             # of its size class

    def __dealloc__(self):
        global _idle_bytes, _live_bytes
        if self.address is NULL:
            return
        _live_bytes -= self.size
        _idle_bytes += self.size
        (<void**>self.address)[0] = _free[self.number]
        _free[self.number] = self.address


cpdef object empty(object shape, object dtype=np.float32):
    """An uninitialised C-contiguous array, 64-byte aligned, from the pool.

    Parameters
    ----------
    shape : tuple of int
        At most 64 of them.
    dtype : NumPy dtype of numbers
        In this machine's byte order.

    Raises
    ------
    ValueError
        When a length is negative or there are too many.
    TypeError
        When the dtype is not one of numbers.
    MemoryError
        When the system has no memory left.

    Notes
    -----
    Before the pool asks the system for more than three times what was ever in use at once, it gives its idle
    buffers back: a run through thousands of shapes does not keep a buffer of each.
    """
    global _idle_bytes, _live_bytes, _peak_bytes
    cdef cnp.npy_intp dims[64]
    cdef cnp.dtype descr = dtype if isinstance(dtype, cnp.dtype) else np.dtype(dtype)
    cdef size_t n = descr.itemsize
    cdef int nd = 0
    cdef Py_ssize_t length
    if not (cnp.PyTypeNum_ISNUMBER(descr.type_num) and cnp.PyArray_ISNBO(descr.byteorder)):
        raise TypeError(f"empty: dtype is {descr}, it must be one of numbers in this machine's byte order")
    for length in shape:
        if nd == 64:
            raise ValueError("empty: shape has more than 64 dimensions")
        if length < 0:
            raise ValueError(f"empty: shape is {tuple(shape)}, its lengths must be at least 0")
        if length > 0 and n > LARGEST // <size_t>length:
            raise MemoryError(f"no memory for an array of shape {tuple(shape)}")
        dims[nd] = length
        n *= <size_t>length
        nd += 1
    cdef Block block = Block.__new__(Block)
    block.size = _size_class(n if n > 0 else 1, &block.number)
    cdef int larger = block.number
    if n >= LARGE:
        while larger < block.number + 4 and _free[larger] is NULL:
            larger += 1
        if _free[larger] is not NULL:
            block.number = larger
            block.size = _class_bytes(larger)
    block.address = _free[block.number]
    if block.address is not NULL:
        block.recycled = True
        _free[block.number] = (<void**>block.address)[0]
        _idle_bytes -= block.size
    else:
        if _idle_bytes > SLACK and _idle_bytes + _live_bytes + block.size > 3 * _peak_bytes:
            trim()
        block.address = malloc(block.size + ALIGNMENT)
        if block.address is NULL:
            trim()
            block.address = malloc(block.size + ALIGNMENT)
        if block.address is NULL:
            raise MemoryError(f"no memory for an array of shape {tuple(shape)} and {n} bytes")
    _live_bytes += block.size
    _peak_bytes = max(_peak_bytes, _live_bytes)
    cdef uintptr_t start = (<uintptr_t>block.address + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    array = PyArray_SimpleNewFromData(nd, dims, descr.type_num, <void*>start)
    cnp.set_array_base(array, block)
    return array


def empty_like(cnp.ndarray array):
    """An uninitialised C-contiguous array of the same shape and dtype, from the pool."""
    return empty((<object>array).shape, array.dtype)


def trim():
    """Give all idle buffers back to the system."""
    global _idle_bytes
    cdef void* address
    cdef int number
    for number in range(512):
        while _free[number] is not NULL:
            address = _free[number]
            _free[number] = (<void**>address)[0]
            free(address)
    _idle_bytes = 0


def usage():
    """Bytes in use and bytes idle, as a tuple."""
    return _live_bytes, _idle_bytes
