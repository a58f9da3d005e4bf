"""Matrix products: C (M, N) = A (M, K) B (K, N) + add + bias.

K is cut into blocks and B's block is packed into panels as wide as a register tile (threads share
this work); then each thread takes blocks of rows of A, small enough for its L2 cache, and runs the
tiles of `tile.h` over all panels. Blocks of K depend on K and on whether A is packed (as for dW, but for that
of a single output), and an element is summed along K by one tile at a time in the order of k: the bits depend
neither on the thread count nor on how M and N are cut. With the tiles of AMX, float32 products with weights that are
large enough go another way (`split.h`), for which the same holds.
"""
cimport numpy as cnp
from cython cimport floating
from cython.parallel cimport parallel, prange, threadid

from cllm._kernels.threads cimport useful_threads
from cllm._kernels.tile cimport MR, NV, VBYTES, ceil_div, pack, pack_transposed, round_up, tile

from libc.string cimport memcpy

cnp.import_array()

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void* address) nogil

cdef extern from "scratch.h" nogil:
    void* cllm_scratch(size_t n_bytes)

cdef extern from *:
    """
    #ifdef _OPENMP
    #define CLLM_OPENMP 1
    #define CLLM_BARRIER() _Pragma("omp barrier")
    #else
    #define CLLM_OPENMP 0
    #define CLLM_BARRIER()
    #endif
    """
    bint CLLM_OPENMP
    void wait_for_all "CLLM_BARRIER"() nogil    # a prange inside of `parallel` does not wait at its end

cdef extern from "split.h" nogil:
    const bint SPLIT "CLLM_SPLIT"           # whether this instruction set has the tiles
    Py_ssize_t cllm_split_bytes(Py_ssize_t k)
    void cllm_split_begin()
    void cllm_split_end()
    void cllm_split_pack(int rows, const float* x, Py_ssize_t stride, Py_ssize_t ks, Py_ssize_t n, Py_ssize_t count,
                         char* out)
    unsigned int cllm_split_outside(const char* group, Py_ssize_t count)
    void cllm_split_sums(Py_ssize_t m, Py_ssize_t n, Py_ssize_t count, const char* a, const char* b, float* sums)
    void cllm_split_store(Py_ssize_t m, Py_ssize_t n, const float* sums, float* c, Py_ssize_t ldc, const float* add,
                          Py_ssize_t ldadd, const float* bias)
    void cllm_split_block(Py_ssize_t m, Py_ssize_t n, Py_ssize_t count, const char* a, const char* b, float* c,
                          Py_ssize_t ldc, const float* add, Py_ssize_t ldadd, const float* bias)

OPENMP = bool(CLLM_OPENMP)              # whether the kernels were built with threads

# Bytes of a column of a K block: 768 float32 when A is read in place, 256 when it is packed (dW), so that
# a packed block of A and a panel of B stay in L2 together.
cdef Py_ssize_t K_BYTES = 768 * 4
cdef Py_ssize_t K_BYTES_PACKED = 384 * 4
cdef Py_ssize_t M_BLOCK = 192           # rows of A that stay in L2 over all panels
cdef enum:
    FLIP_FROM = 4                       # rows of x under which flipped tiles waste more lanes than packing takes time
    A_PANEL = 12                        # rows of A packed side by side: a multiple of every tile's; 48: dW 3 % slower
    MAX_TILE = 6 * 64                   # elements in the largest tile
cdef Py_ssize_t N_CHUNK = 4096          # columns of B packed at a time: bounds the scratch memory
cdef Py_ssize_t OWN_BYTES = 1024 * 1024 # an operand of at most this size each thread packs for itself
# Multiply-adds from which a second thread pays (benchmarks/thresholds.py): 524288 forward 7.5 -> 6.8 us, backward
# 14.5 -> 12.9. The same for the elements of column sums: 65536 5.3 -> 4.1 us.
cdef double SERIAL_BELOW = 500_000
cdef double SUMS_SERIAL_BELOW = 65536


cdef void pack_panel(const floating* b, Py_ssize_t brs, Py_ssize_t bcs, Py_ssize_t k, Py_ssize_t n,
                     Py_ssize_t width, floating* y) noexcept nogil:
    """y (k, width) = the first n columns of b, zeros up to the next whole vector; one of b's strides is 1."""
    if bcs == 1:
        pack(b, brs, k, n, width, 1, y)
    else:
        pack_transposed(b, bcs, k, n, width, 1, y)


cdef void pack_rows(const floating* a, Py_ssize_t ld, Py_ssize_t k, Py_ssize_t m, floating* y) noexcept nogil:
    """The columns of a (k, m) in panels of A_PANEL, one after the other.

    Row by row of a, which is read ahead: a row is another page, where no prefetcher of the CPU follows.
    """
    cdef Py_ssize_t p, q, line
    for q in range(k):
        for line from 0 <= line < m by 64 // <Py_ssize_t>sizeof(floating):
            prefetch(a + min(q + 8, k - 1) * ld + line)
        for p from 0 <= p <= m - A_PANEL by A_PANEL:
            memcpy(y + p * k + q * A_PANEL, a + q * ld + p, A_PANEL * sizeof(floating))
        p = m - m % A_PANEL
        memcpy(y + p * k + q * A_PANEL, a + q * ld + p, m % A_PANEL * sizeof(floating))


cdef void flip_tile(Py_ssize_t mr, Py_ssize_t n, Py_ssize_t k, const floating* a, Py_ssize_t ars, const floating* b,
                    Py_ssize_t width, floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
                    const floating* bias) noexcept nogil:
    """A tile whose transpose (n, mr) goes to c; bias: (mr,)."""
    cdef floating sums[MAX_TILE]
    cdef floating v
    cdef Py_ssize_t i, j
    tile(mr, n, k, a, ars, 1, b, width, sums, width, <const floating*>NULL, 0, <const floating*>NULL)
    for j in range(n):
        for i in range(mr):
            v = sums[i * width + j]
            if add is not NULL:
                v = v + add[j * ldadd + i]
            if bias is not NULL:
                v = v + bias[i]
            c[j * ldc + i] = v


cdef void row_block(bint flipped, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const floating* a, Py_ssize_t ars,
                    Py_ssize_t acs, const floating* panels, Py_ssize_t width, Py_ssize_t panel_step, floating* c,
                    Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd, const floating* bias,
                    floating* packed) noexcept nogil:
    """c (m, n) = a (m, k) times the packed panels; a is packed first when its rows are not contiguous.

    flipped: c is (n, m) and bias (m,); a's rows are contiguous then.
    """
    cdef Py_ssize_t i, j, p, end, columns, n_rows
    cdef const floating* source
    cdef const floating* panel
    if acs != 1:
        pack_rows(a, acs, k, m, packed)
    for j from 0 <= j < n by width:
        columns = min(width, n - j)
        panel = panels + j // width * panel_step
        if flipped:
            for i from 0 <= i < m by MR:
                flip_tile(min(<Py_ssize_t>MR, m - i), columns, k, a + i * ars, ars, panel, width, c + j * ldc + i, ldc,
                          add + j * ldadd + i if add is not NULL else NULL, ldadd,
                          bias + i if bias is not NULL else NULL)
            continue
        for p from 0 <= p < m by A_PANEL:
            end = min(p + A_PANEL, m)
            i = p
            while i < end:
                n_rows = min(MR, end - i)
                source = a + i * ars if acs == 1 else packed + p * k + (i - p)
                tile(n_rows, columns, k, source, ars if acs == 1 else 1, 1 if acs == 1 else A_PANEL, panel, width,
                     c + i * ldc + j, ldc, add + i * ldadd + j if add is not NULL else NULL, ldadd,
                     bias + j if bias is not NULL else NULL)
                i = i + MR


cdef int gemm(Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
              const floating* a, Py_ssize_t ars, Py_ssize_t acs,
              const floating* b, Py_ssize_t brs, Py_ssize_t bcs,
              floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
              const floating* bias, int n_threads) noexcept nogil:
    """c = a b + add + bias.  a: (M, K), b: (K, N) with strides of which one is 1; c, add: (M, N); bias: (N,).

    add and bias may be NULL; add may be c itself. Returns -1 when there is no memory for the packed operands.

    The operand on the right is packed. Of x weight^T with few rows in x that would be the large one: then the
    transpose, weight x^T, is computed, which reads weight in place.
    """
    cdef bint flipped = acs == 1 and brs == 1 and M >= FLIP_FROM and (N - M) * K > M * N
    n_threads = useful_threads(<double>M * N * max(K, 1), SERIAL_BELOW, n_threads)
    if floating is float:
        if SPLIT and K > 0 and (M * N if acs != 1 else N * K) >= SPLIT_FROM:
            return split_product(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add, ldadd, bias, n_threads)
    if flipped:
        return shares(True, N, M, K, b, bcs, 1, a, 1, ars, c, ldc, add, ldadd, bias, n_threads)
    return shares(False, M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add, ldadd, bias, n_threads)


cdef inline bint in_place(Py_ssize_t N, Py_ssize_t brs, Py_ssize_t bcs, Py_ssize_t width) noexcept nogil:
    """Whether b is its own packed panel."""
    return N == width and brs == width and bcs == 1


cdef inline bint panel_by_panel(Py_ssize_t M, Py_ssize_t N, Py_ssize_t acs, Py_ssize_t width,
                                int n_threads) noexcept nogil:
    """Few rows: a panel is packed and used at once, while it is in L2, by one thread."""
    return acs == 1 and M <= 2 * M_BLOCK and min(N_CHUNK, round_up(N, width)) >= 4 * width * n_threads


cdef int shares(bint flipped, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
                const floating* a, Py_ssize_t ars, Py_ssize_t acs,
                const floating* b, Py_ssize_t brs, Py_ssize_t bcs,
                floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
                const floating* bias, int n_threads) noexcept nogil:
    """`blocks`, where the smaller operand is small by threads that pack it each for itself.

    What another core has packed comes slowly; and the threads need not wait for one another. (256,192,64) on 2
    threads: fwd 28 -> 20 us, dW, whose b is its own panel, 40 -> 22; (768,128,128): fwd 70 -> 60, dW 130 -> 85.
    """
    cdef Py_ssize_t width = NV * VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t rows = round_up(ceil_div(M, n_threads), MR), most = OWN_BYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t columns = width * ceil_div(ceil_div(N, width), n_threads), at
    cdef int status = 0, task
    cdef bint ready = in_place(N, brs, bcs, width)
    if n_threads == 1 or not ready and panel_by_panel(M, N, acs, width, n_threads):
        return blocks(flipped, M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add, ldadd, bias, n_threads)
    if acs != 1 and N > M and M * K <= most and columns * n_threads == N:
        for task in prange(n_threads, num_threads=n_threads, schedule="static"):
            at = task * columns
            status |= blocks(flipped, M, columns, K, a, ars, acs, b + at * bcs, brs, bcs, c + at, ldc,
                             add + at if add is not NULL else NULL, ldadd, bias + at if bias is not NULL else NULL, 1)
        return status
    if ready or N * K <= most and rows * (n_threads - 1) < M:
        for task in prange(n_threads, num_threads=n_threads, schedule="static"):
            at = task * rows
            if at < M:
                status |= blocks(flipped, min(rows, M - at), N, K, a + at * ars, ars, acs, b, brs, bcs,
                                 c + (at if flipped else at * ldc), ldc,
                                 add + (at if flipped else at * ldadd) if add is not NULL else NULL, ldadd,
                                 bias + at if flipped and bias is not NULL else bias, 1)
        return status
    return blocks(flipped, M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add, ldadd, bias, n_threads)


cdef int blocks(bint flipped, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
                const floating* a, Py_ssize_t ars, Py_ssize_t acs,
                const floating* b, Py_ssize_t brs, Py_ssize_t bcs,
                floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
                const floating* bias, int n_threads) noexcept nogil:
    """`gemm` cut into blocks; flipped: c and add are (N, M), bias is (M,) and a's rows are contiguous."""
    cdef Py_ssize_t width = NV * VBYTES // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t k_limit = (K_BYTES if acs == 1 else K_BYTES_PACKED) // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t n_k = max(ceil_div(K, k_limit), 1)
    cdef Py_ssize_t k_block = round_up(ceil_div(K, n_k), 16)
    cdef Py_ssize_t n_chunk = min(N_CHUNK, round_up(N, width))
    cdef Py_ssize_t m_block, n_m, n_split, panels_each, k0, k, n0, n, n_panels, p, task, a_size, b_size, at
    cdef const floating* start
    cdef Py_ssize_t ldstart
    cdef const floating* last
    cdef floating* scratch
    cdef floating* packed
    cdef bint by_panels
    cdef bint ready = in_place(N, brs, bcs, width)
    cdef floating* panels
    if M == 0 or N == 0:
        return 0
    by_panels = not ready and panel_by_panel(M, N, acs, width, n_threads)
    # Equal blocks of rows, as many as a multiple of the threads; too few rows: columns are cut as well.
    n_m = ceil_div(M, M_BLOCK * n_threads) * n_threads
    m_block = round_up(ceil_div(M, n_m), MR)
    n_m = ceil_div(M, m_block)
    n_split = ceil_div(n_threads, n_m)
    a_size = 0 if acs == 1 else round_up(m_block, A_PANEL) * k_block
    b_size = (n_threads * width if by_panels else n_chunk) * k_block
    scratch = <floating*>cllm_scratch((b_size + a_size * n_threads + 16) * sizeof(floating))
    if scratch is NULL:
        return -1
    packed = scratch + b_size
    for n0 from 0 <= n0 < N by n_chunk:
        n = min(n_chunk, N - n0)
        at = n0 * ldc if flipped else n0
        n_panels = ceil_div(n, width)
        panels_each = ceil_div(n_panels, n_split)
        k0 = 0
        while True:
            k = min(k_block, K - k0)
            start = c + at
            ldstart = ldc
            if k0 == 0:
                start = add + (n0 * ldadd if flipped else n0) if add is not NULL else NULL
                ldstart = ldadd
            last = bias if bias is not NULL and k0 + k >= K else NULL
            if last is not NULL and not flipped:
                last = bias + n0
            if by_panels:
                for p in prange(n_panels, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
                    panel_block(flipped, p * width, M, n, k, a + k0 * acs, ars, b + k0 * brs + n0 * bcs, brs, bcs,
                                scratch + threadid() * width * k_block, width, c + at, ldc, start, ldstart, last)
            else:
                panels = <floating*>b + k0 * brs if ready else scratch
                with parallel(num_threads=n_threads, use_threads_if=n_threads > 1):
                    if not ready:
                        for p in prange(n_panels, schedule="static"):
                            pack_panel(b + k0 * brs + (n0 + p * width) * bcs, brs, bcs, k, min(width, n - p * width),
                                       width, scratch + p * width * k_block)
                        wait_for_all()
                    for task in prange(n_m * n_split, schedule="static"):
                        grid_block(flipped, task, n_split, m_block, panels_each, M, n, k, a + k0 * acs, ars, acs,
                                   panels, width, width * k_block, c + at, ldc, start, ldstart, last,
                                   packed + a_size * threadid())
            k0 = k0 + k
            if k0 >= K:
                break
    return 0


cdef void panel_block(bint flipped, Py_ssize_t j, Py_ssize_t M, Py_ssize_t n, Py_ssize_t k, const floating* a,
                      Py_ssize_t ars, const floating* b, Py_ssize_t brs, Py_ssize_t bcs, floating* panel,
                      Py_ssize_t width, floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd,
                      const floating* bias) noexcept nogil:
    """All rows times the panel of columns from j on."""
    cdef Py_ssize_t columns = min(width, n - j)
    pack_panel(b + j * bcs, brs, bcs, k, columns, width, panel)
    part(flipped, 0, j, M, columns, k, a, ars, 1, panel, width, 0, c, ldc, add, ldadd, bias, <floating*>NULL)


cdef void grid_block(bint flipped, Py_ssize_t task, Py_ssize_t n_split, Py_ssize_t m_block, Py_ssize_t panels_each,
                     Py_ssize_t M, Py_ssize_t n, Py_ssize_t k, const floating* a, Py_ssize_t ars, Py_ssize_t acs,
                     const floating* panels, Py_ssize_t width, Py_ssize_t panel_step, floating* c, Py_ssize_t ldc,
                     const floating* add, Py_ssize_t ldadd, const floating* bias, floating* packed) noexcept nogil:
    """One task of the grid: a block of rows times a share of the panels."""
    cdef Py_ssize_t i = task // n_split * m_block
    cdef Py_ssize_t p = task % n_split * panels_each
    cdef Py_ssize_t j = p * width
    if j < n:
        part(flipped, i, j, min(m_block, M - i), min(panels_each * width, n - j), k, a, ars, acs,
             panels + p * panel_step, width, panel_step, c, ldc, add, ldadd, bias, packed)


cdef void part(bint flipped, Py_ssize_t i, Py_ssize_t j, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const floating* a,
               Py_ssize_t ars, Py_ssize_t acs, const floating* panels, Py_ssize_t width, Py_ssize_t panel_step,
               floating* c, Py_ssize_t ldc, const floating* add, Py_ssize_t ldadd, const floating* bias,
               floating* packed) noexcept nogil:
    """m rows from i on times the panels of n columns from j on."""
    cdef Py_ssize_t at = j * ldc + i if flipped else i * ldc + j
    cdef Py_ssize_t at_add = j * ldadd + i if flipped else i * ldadd + j
    row_block(flipped, m, n, k, a + i * ars, ars, acs, panels, width, panel_step, c + at, ldc,
              add + at_add if add is not NULL else NULL, ldadd,
              bias + (i if flipped else j) if bias is not NULL else NULL, packed)


# Float32 products on tiles of bfloat16 ---------------------------------------------------------------

cdef enum:
    GROUP = 32                          # rows of A, or columns of B, that are packed together
    SPLIT_K = 384                       # steps of K in a block: 72 kB a group
    SPLIT_GROUPS = 8                    # groups in a slice, which stays in L2 beside one of the kept operand
    SPLIT_KEPT = 4096                   # rows or columns that are kept at a time: bounds the scratch memory
# Elements of the weight from which tiles are used: while a core uses them, everything on it runs 13 to 20 % slower,
# so that a step has to be mostly products. C = 64: 2.8 -> 3.1 ms, 128: equal, 192: 110 -> 103, 384: 1970 -> 1640. The
# weight's, not the input's, so that a row of A gives the same bits alone and among others.
cdef Py_ssize_t SPLIT_FROM = 32768
cdef Py_ssize_t SPLIT_OWN = 65536       # elements of a kept operand that each thread packs for itself


cdef int split_product(Py_ssize_t M, Py_ssize_t N, Py_ssize_t K, const float* a, Py_ssize_t ars, Py_ssize_t acs,
                       const float* b, Py_ssize_t brs, Py_ssize_t bcs, float* c, Py_ssize_t ldc,
                       const float* add, Py_ssize_t ldadd, const float* bias, int n_threads) noexcept nogil:
    """`gemm` on the tiles of `split.h`: the smaller operand is packed whole, the other a slice at a time."""
    cdef bint keep_b = N <= M
    cdef Py_ssize_t kept = N if keep_b else M, streamed = M if keep_b else N
    cdef Py_ssize_t kept_is = bcs if keep_b else ars, kept_ks = brs if keep_b else acs
    cdef Py_ssize_t n_k = ceil_div(K, SPLIT_K)
    cdef Py_ssize_t k_block = round_up(ceil_div(K, n_k), GROUP)
    cdef Py_ssize_t size = cllm_split_bytes(k_block)
    cdef Py_ssize_t n_slices = ceil_div(streamed, SPLIT_GROUPS * GROUP * n_threads) * n_threads
    cdef Py_ssize_t slice = round_up(ceil_div(streamed, n_slices), GROUP)
    cdef Py_ssize_t chunk = min(<Py_ssize_t>SPLIT_KEPT, kept), groups = ceil_div(chunk, GROUP)
    cdef bint own = chunk * k_block <= SPLIT_OWN
    cdef Py_ssize_t each = slice // GROUP * size + plain_bytes(k_block)
    cdef Py_ssize_t k0, k, j0, j, n, task, task_size
    cdef const float* start
    cdef const float* source
    cdef char* scratch
    cdef char* mine
    cdef char* packed
    if M == 0 or N == 0:
        return 0
    scratch = <char*>cllm_scratch(groups * size * (n_threads if own else 1) + each * n_threads)
    if scratch is NULL:
        return -1
    n_slices = ceil_div(streamed, slice)
    for j0 from 0 <= j0 < kept by chunk:
        n = min(chunk, kept - j0)
        for k0 from 0 <= k0 < K by k_block:
            k = min(k_block, K - k0)
            start = add if k0 == 0 else c
            source = (b if keep_b else a) + j0 * kept_is + k0 * kept_ks
            with parallel(num_threads=n_threads, use_threads_if=n_threads > 1):
                cllm_split_begin()
                packed = scratch + each * n_threads
                if own:
                    packed = packed + threadid() * groups * size
                    cllm_split_pack(not keep_b, source, kept_is, kept_ks, n, k, packed)
                else:
                    for j in prange(ceil_div(n, GROUP), schedule="static"):
                        cllm_split_pack(not keep_b, source + j * GROUP * kept_is, kept_is, kept_ks,
                                        min(<Py_ssize_t>GROUP, n - j * GROUP), k, packed + j * cllm_split_bytes(k))
                    wait_for_all()
                mine = scratch + each * threadid()
                for task in prange(n_slices, schedule="static"):
                    task_size = min(slice, streamed - task * slice)
                    if keep_b:
                        split_slice(True, task_size, n, k, a + task * slice * ars + k0 * acs, ars, acs,
                                    source, brs, bcs, packed, mine,
                                    c + task * slice * ldc + j0, ldc,
                                    start + task * slice * (ldadd if k0 == 0 else ldc) + j0 if start is not NULL else NULL,
                                    ldadd if k0 == 0 else ldc,
                                    bias + j0 if bias is not NULL and k0 + k == K else NULL)
                    else:
                        split_slice(False, n, task_size, k, source, ars, acs,
                                    b + task * slice * bcs + k0 * brs, brs, bcs, packed, mine,
                                    c + j0 * ldc + task * slice, ldc,
                                    start + j0 * (ldadd if k0 == 0 else ldc) + task * slice if start is not NULL else NULL,
                                    ldadd if k0 == 0 else ldc,
                                    bias + task * slice if bias is not NULL and k0 + k == K else NULL)
                cllm_split_end()
    return 0


cdef inline Py_ssize_t plain_bytes(Py_ssize_t k) noexcept nogil:
    """Scratch of `mixed_block` for k steps: sums, a panel of B, a block of A."""
    return round_up((NV * VBYTES + round_up(GROUP, A_PANEL) * <Py_ssize_t>sizeof(float)) * k
                    + GROUP * GROUP * <Py_ssize_t>sizeof(float), 64)


cdef void split_slice(bint keep_b, Py_ssize_t M, Py_ssize_t N, Py_ssize_t k, const float* a, Py_ssize_t ars,
                      Py_ssize_t acs, const float* b, Py_ssize_t brs, Py_ssize_t bcs, const char* packed, char* mine,
                      float* c, Py_ssize_t ldc, const float* add, Py_ssize_t ldadd,
                      const float* bias) noexcept nogil:
    """c (M, N) for a slice of A's rows (keep_b) or of B's columns, which is packed first, and all that is kept."""
    cdef Py_ssize_t size = cllm_split_bytes(k), streamed = M if keep_b else N, kept = N if keep_b else M
    cdef Py_ssize_t s, t, i, j, m, n
    cdef const char* left
    cdef const char* right
    cdef char* plain = mine + ceil_div(streamed, GROUP) * size
    cllm_split_pack(keep_b, a if keep_b else b, ars if keep_b else bcs, acs if keep_b else brs, streamed, k, mine)
    for s in range(ceil_div(kept, GROUP)):
        for t in range(ceil_div(streamed, GROUP)):
            i = (t if keep_b else s) * GROUP
            j = (s if keep_b else t) * GROUP
            m = min(<Py_ssize_t>GROUP, M - i)
            n = min(<Py_ssize_t>GROUP, N - j)
            left = mine + t * size if keep_b else packed + s * size
            right = packed + s * size if keep_b else mine + t * size
            if cllm_split_outside(left, k) == 0 and cllm_split_outside(right, k) == 0:
                cllm_split_block(m, n, k, left, right, c + i * ldc + j, ldc,
                                 add + i * ldadd + j if add is not NULL else NULL, ldadd,
                                 bias + j if bias is not NULL else NULL)
            else:
                mixed_block(m, n, k, left, right, a + i * ars, ars, acs, b + j * bcs, brs, bcs, <float*>plain)
                cllm_split_store(m, n, <float*>plain, c + i * ldc + j, ldc,
                                 add + i * ldadd + j if add is not NULL else NULL, ldadd,
                                 bias + j if bias is not NULL else NULL)


cdef void mixed_block(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, const char* left, const char* right, const float* a,
                      Py_ssize_t ars, Py_ssize_t acs, const float* b, Py_ssize_t brs, Py_ssize_t bcs,
                      float* scratch) noexcept nogil:
    """The product of two groups at the start of scratch (GROUP, GROUP); rows and columns out of range in vectors."""
    cdef Py_ssize_t width = NV * VBYTES // <Py_ssize_t>sizeof(float), i
    cdef float* panel = scratch + GROUP * GROUP
    cdef float* block = panel + width * k
    cdef unsigned int rows = cllm_split_outside(left, k), columns = cllm_split_outside(right, k)
    cllm_split_sums(m, n, k, left, right, scratch)
    pack_panel(b, brs, bcs, k, n, width, panel)
    for i in range(m):
        if rows >> i & 1:
            row_block(False, 1, n, k, a + i * ars, ars, acs, panel, width, 0, scratch + i * GROUP, GROUP,
                      <const float*>NULL, 0, <const float*>NULL, block)
    for i in range(n):
        if columns >> i & 1:
            row_block(False, m, 1, k, a, ars, acs, panel + i, width, 0, scratch + i, GROUP,
                      <const float*>NULL, 0, <const float*>NULL, block)


cdef int product(cnp.ndarray a, bint a_transposed, cnp.ndarray b, bint b_transposed, cnp.ndarray out,
                 cnp.ndarray bias, bint accumulate, int n_threads) except -1:
    """out (+)= op(a) op(b) + bias for C-contiguous matrices of one dtype."""
    cdef Py_ssize_t M = out.shape[0], N = out.shape[1]
    cdef Py_ssize_t K = a.shape[0] if a_transposed else a.shape[1]
    cdef Py_ssize_t lda = a.shape[1], ldb = b.shape[1]
    cdef Py_ssize_t ars = 1 if a_transposed else lda, acs = lda if a_transposed else 1
    cdef Py_ssize_t brs = 1 if b_transposed else ldb, bcs = ldb if b_transposed else 1
    cdef void* pa = cnp.PyArray_DATA(a)
    cdef void* pb = cnp.PyArray_DATA(b)
    cdef void* pc = cnp.PyArray_DATA(out)
    cdef void* pbias = cnp.PyArray_DATA(bias) if bias is not None else NULL
    cdef void* add = pc if accumulate else NULL
    cdef bint single = cnp.PyArray_TYPE(out) == cnp.NPY_FLOAT
    cdef int status
    assert (a.shape[1] if a_transposed else a.shape[0]) == M
    assert (b.shape[1] if b_transposed else b.shape[0]) == K and (b.shape[0] if b_transposed else b.shape[1]) == N
    with nogil:
        if single:
            status = gemm[float](M, N, K, <float*>pa, ars, acs, <float*>pb, brs, bcs, <float*>pc, N,
                                 <float*>add, N, <float*>pbias, n_threads)
        else:
            status = gemm[double](M, N, K, <double*>pa, ars, acs, <double*>pb, brs, bcs, <double*>pc, N,
                                  <double*>add, N, <double*>pbias, n_threads)
    if status != 0:
        raise MemoryError("no memory for the packed operands of a matrix product")
    return 0


def linear_forward(cnp.ndarray x, cnp.ndarray weight, bias, cnp.ndarray out, int n_threads):
    """out (N, O) = x (N, I) weight (O, I)^T + bias (O,)."""
    product(x, False, weight, True, out, bias, False, n_threads)


def linear_backward_input(cnp.ndarray dy, cnp.ndarray weight, cnp.ndarray dx, int n_threads):
    """dx (N, I) = dy (N, O) weight (O, I)."""
    product(dy, False, weight, False, dx, None, False, n_threads)


def linear_backward_weight(cnp.ndarray dy, cnp.ndarray x, cnp.ndarray dweight, bint accumulate, int n_threads):
    """dweight (O, I) (+)= dy (N, O)^T x (N, I)."""
    product(dy, True, x, False, dweight, None, accumulate, n_threads)


# Column sums -----------------------------------------------------------------------------------------

cdef Py_ssize_t SUM_ROWS = 64       # rows in a partial sum: fixed, so that the bits do not depend on threads


cdef void sum_block(const floating* x, Py_ssize_t n_rows, Py_ssize_t n, floating* out) noexcept nogil:
    cdef Py_ssize_t i, j
    for j in range(n):
        out[j] = x[j]
    for i in range(1, n_rows):
        for j in range(n):
            out[j] += x[i * n + j]


cdef int column_sums_loop(const floating* x, Py_ssize_t n_rows, Py_ssize_t n, floating* out, bint accumulate,
                          int n_threads) noexcept nogil:
    cdef Py_ssize_t n_blocks = ceil_div(n_rows, SUM_ROWS), block, j
    cdef floating* partial = <floating*>cllm_scratch((n_blocks * n + 1) * sizeof(floating))
    cdef double total
    if partial is NULL:
        return -1
    for block in prange(n_blocks, num_threads=n_threads, schedule="static", use_threads_if=n_threads > 1):
        sum_block(x + block * SUM_ROWS * n, min(SUM_ROWS, n_rows - block * SUM_ROWS), n, partial + block * n)
    for j in range(n):
        total = 0                   # double: 64 partial sums of 64 rows lose nothing that float32 keeps
        for block in range(n_blocks):
            total = total + partial[block * n + j]
        out[j] = <floating>(out[j] + total) if accumulate else <floating>total
    return 0


def column_sums(cnp.ndarray x, cnp.ndarray out, bint accumulate, int n_threads):
    """out (N,) (+)= the sum over the rows of x (M, N): a bias gradient."""
    cdef Py_ssize_t n_rows = x.shape[0], n = x.shape[1]
    cdef void* px = cnp.PyArray_DATA(x)
    cdef void* pout = cnp.PyArray_DATA(out)
    cdef bint single = cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT
    cdef int status
    assert out.shape[0] == n
    n_threads = useful_threads(n_rows * n, SUMS_SERIAL_BELOW, n_threads)
    with nogil:
        if single:
            status = column_sums_loop[float](<float*>px, n_rows, n, <float*>pout, accumulate, n_threads)
        else:
            status = column_sums_loop[double](<double*>px, n_rows, n, <double*>pout, accumulate, n_threads)
    if status != 0:
        raise MemoryError("no memory for the partial sums of a bias gradient")


# Batched products ------------------------------------------------------------------------------------


cdef int matmul_loop(Py_ssize_t n_batch, const Py_ssize_t* ia, const Py_ssize_t* ib, Py_ssize_t M, Py_ssize_t N,
                     Py_ssize_t K, const floating* a, Py_ssize_t ars, Py_ssize_t acs, const floating* b,
                     Py_ssize_t brs, Py_ssize_t bcs, floating* out, int n_threads) noexcept nogil:
    """Product i reads the matrices that start at a + ia[i] and b + ib[i]."""
    cdef Py_ssize_t i
    cdef int failed = 0
    cdef int useful = useful_threads(<double>n_batch * M * N * K, SERIAL_BELOW, n_threads)
    if n_batch < useful:
        for i in range(n_batch):
            failed |= gemm(M, N, K, a + ia[i], ars, acs, b + ib[i], brs, bcs, out + i * M * N, N,
                           <const floating*>NULL, 0, <const floating*>NULL, n_threads)
    else:
        for i in prange(n_batch, num_threads=useful, schedule="static", use_threads_if=useful > 1):
            failed |= gemm(M, N, K, a + ia[i], ars, acs, b + ib[i], brs, bcs, out + i * M * N, N,
                           <const floating*>NULL, 0, <const floating*>NULL, 1)
    return failed


def matmul(cnp.ndarray a, cnp.ndarray ia, Py_ssize_t ars, Py_ssize_t acs,
           cnp.ndarray b, cnp.ndarray ib, Py_ssize_t brs, Py_ssize_t bcs, Py_ssize_t K,
           cnp.ndarray out, int n_threads):
    """out[i] (M, N) = a_i (M, K) b_i (K, N), where the matrices start ia[i] and ib[i] elements into a and b.

    Strides count elements; one of each operand's two is 1. out: (n_batch, M, N), ia, ib: (n_batch,) intp.
    """
    cdef Py_ssize_t n_batch = out.shape[0], M = out.shape[1], N = out.shape[2]
    cdef void* pa = cnp.PyArray_DATA(a)
    cdef void* pb = cnp.PyArray_DATA(b)
    cdef void* pout = cnp.PyArray_DATA(out)
    cdef Py_ssize_t* pia = <Py_ssize_t*>cnp.PyArray_DATA(ia)
    cdef Py_ssize_t* pib = <Py_ssize_t*>cnp.PyArray_DATA(ib)
    cdef bint single = cnp.PyArray_TYPE(out) == cnp.NPY_FLOAT
    cdef int status
    with nogil:
        if single:
            status = matmul_loop[float](n_batch, pia, pib, M, N, K, <float*>pa, ars, acs, <float*>pb, brs, bcs,
                                        <float*>pout, n_threads)
        else:
            status = matmul_loop[double](n_batch, pia, pib, M, N, K, <double*>pa, ars, acs, <double*>pb, brs, bcs,
                                         <double*>pout, n_threads)
    if status != 0:
        raise MemoryError("no memory for the packed operands of a matrix product")
