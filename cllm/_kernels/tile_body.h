/* Included by tile.h once for each REAL (float, double); SUFFIX names the results. */
#define NAME(x) CLLM_CAT(x, SUFFIX)
#define LANES ((ptrdiff_t)(CLLM_VBYTES / sizeof(REAL)))

typedef REAL NAME(vec) __attribute__((vector_size(CLLM_VBYTES)));
/* the same at any address of an element */
typedef REAL NAME(vecu) __attribute__((vector_size(CLLM_VBYTES), aligned(sizeof(REAL)), may_alias));

/* c[i][j] = add[i][j] + bias[j] + sum over k of a[i * ars + k * acs] * b[k * ldb + j], i < mr, j < n.
 * b's rows hold nv whole vectors (zeros beyond n); add and bias may be NULL; add may be c. */
static inline __attribute__((always_inline)) void NAME(tile_body)(
    const int mr, const int nv, ptrdiff_t n, ptrdiff_t k,
    const REAL *restrict a, ptrdiff_t ars, ptrdiff_t acs, const REAL *restrict b, ptrdiff_t ldb,
    REAL *c, ptrdiff_t ldc, const REAL *add, ptrdiff_t ldadd, const REAL *bias)
{
    NAME(vec) sum[CLLM_MR][CLLM_NV];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            sum[i][j] = (NAME(vec)){0};
    /* The lines of c arrive while the sums are made; small products have them in a cache. */
    if (k >= 256 || (add && k >= 64))
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            __builtin_prefetch(c + i * ldc + j * LANES, 1);
#pragma GCC unroll 4 /* 1-3 % of a product */
    for (; k > 0; k--) {
        NAME(vec) bv[CLLM_NV];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            bv[j] = *(const NAME(vecu) *)(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            const REAL s = a[i * ars];
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                sum[i][j] += s * bv[j];
        }
        a += acs;
        b += ldb;
    }
    /* Keeps GCC from holding the addresses of all rows of c live across the loop, which spills. */
    __asm__ volatile("" : "+r"(c));
    if (n == nv * LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) {
                NAME(vec) v = sum[i][j];
                if (add) v += *(const NAME(vecu) *)(add + i * ldadd + j * LANES);
                if (bias) v += *(const NAME(vecu) *)(bias + j * LANES);
                *(NAME(vecu) *)(c + i * ldc + j * LANES) = v;
            }
    } else {
        REAL row[CLLM_NV * (CLLM_VBYTES / sizeof(REAL))];
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                *(NAME(vecu) *)(row + j * LANES) = sum[i][j];
            for (ptrdiff_t j = 0; j < n; j++) {
                REAL v = row[j];
                if (add) v += add[i * ldadd + j];
                if (bias) v += bias[j];
                c[i * ldc + j] = v;
            }
        }
    }
}

typedef void (*NAME(tile_function))(
    ptrdiff_t n, ptrdiff_t k, const REAL *a, ptrdiff_t ars, ptrdiff_t acs, const REAL *b, ptrdiff_t ldb,
    REAL *c, ptrdiff_t ldc, const REAL *add, ptrdiff_t ldadd, const REAL *bias);

#define TILE(mr, nv)                                                                                          \
    static __attribute__((noinline)) void NAME(tile_##mr##_##nv)(                                             \
        ptrdiff_t n, ptrdiff_t k, const REAL *a, ptrdiff_t ars, ptrdiff_t acs, const REAL *b, ptrdiff_t ldb,  \
        REAL *c, ptrdiff_t ldc, const REAL *add, ptrdiff_t ldadd, const REAL *bias)                           \
    { NAME(tile_body)(mr, nv, n, k, a, ars, acs, b, ldb, c, ldc, add, ldadd, bias); }
#if CLLM_NV == 4
#define TILES(mr) TILE(mr, 1) TILE(mr, 2) TILE(mr, 3) TILE(mr, 4)
#define ROW(mr) {NAME(tile_##mr##_1), NAME(tile_##mr##_2), NAME(tile_##mr##_3), NAME(tile_##mr##_4)}
#else
#define TILES(mr) TILE(mr, 1) TILE(mr, 2)
#define ROW(mr) {NAME(tile_##mr##_1), NAME(tile_##mr##_2)}
#endif
#if CLLM_MR == 6
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
static const NAME(tile_function) NAME(tiles)[CLLM_MR][CLLM_NV] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#else
TILES(1) TILES(2) TILES(3) TILES(4)
static const NAME(tile_function) NAME(tiles)[CLLM_MR][CLLM_NV] = {ROW(1), ROW(2), ROW(3), ROW(4)};
#endif

/* One tile of 1 <= mr <= CLLM_MR rows and 1 <= n <= CLLM_NV * LANES columns. */
static inline void NAME(cllm_tile)(
    ptrdiff_t mr, ptrdiff_t n, ptrdiff_t k, const REAL *a, ptrdiff_t ars, ptrdiff_t acs,
    const REAL *b, ptrdiff_t ldb, REAL *c, ptrdiff_t ldc, const REAL *add, ptrdiff_t ldadd, const REAL *bias)
{
    NAME(tiles)[mr - 1][(n + LANES - 1) / LANES - 1](n, k, a, ars, acs, b, ldb, c, ldc, add, ldadd, bias);
}

/* y[k][j] = x[j * ld + k] * scale for j < n (zeros up to the next whole vector), k < count: a panel of the
 * transposed operand. */
static inline void NAME(cllm_pack_transposed)(
    const REAL *restrict x, ptrdiff_t ld, ptrdiff_t count, ptrdiff_t n, ptrdiff_t width, REAL scale, REAL *restrict y)
{
    for (ptrdiff_t j = 0; j < n; j += LANES) {
        ptrdiff_t k = 0;
#if defined(__GNUC__) && !defined(__clang__)
        /* A square of LANES x LANES: log2(LANES) rounds of interleaving row i with row i + LANES / 2. */
        if (j + LANES <= n) {
            typedef __typeof__((NAME(vec)){0} < (NAME(vec)){0}) mask;
            mask low, high;
            for (int i = 0; i < LANES; i++) {
                low[i] = i / 2 + (i % 2) * LANES;
                high[i] = low[i] + LANES / 2;
            }
            for (; k + LANES <= count; k += LANES) {
                NAME(vec) r[CLLM_VBYTES / sizeof(REAL)], t[CLLM_VBYTES / sizeof(REAL)];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    r[i] = *(const NAME(vecu) *)(x + (j + i) * ld + k) * scale;
#pragma GCC unroll 4
                for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
                    for (int i = 0; i < LANES / 2; i++) {
                        t[2 * i] = __builtin_shuffle(r[i], r[i + LANES / 2], low);
                        t[2 * i + 1] = __builtin_shuffle(r[i], r[i + LANES / 2], high);
                    }
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; i++)
                        r[i] = t[i];
                }
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    *(NAME(vecu) *)(y + (k + i) * width + j) = r[i];
            }
        }
#endif
        for (; k < count; k++)
            for (ptrdiff_t i = j; i < j + LANES; i++)
                y[k * width + i] = i < n ? x[i * ld + k] * scale : 0;
    }
}

/* y[k][j] = x[k * ld + j] * scale for j < n (zeros up to the next whole vector), k < count: a panel of a
 * row-major operand. */
static inline void NAME(cllm_pack)(
    const REAL *restrict x, ptrdiff_t ld, ptrdiff_t count, ptrdiff_t n, ptrdiff_t width, REAL scale, REAL *restrict y)
{
    const ptrdiff_t whole = (n + LANES - 1) / LANES * LANES;
    for (ptrdiff_t k = 0; k < count; k++, x += ld, y += width) {
        for (ptrdiff_t j = 0; j < n; j++)
            y[j] = x[j] * scale;
        for (ptrdiff_t j = n; j < whole; j++)
            y[j] = 0;
    }
}

#undef TILE
#undef TILES
#undef ROW
#undef NAME
#undef LANES
