/* Matrix products on the tiles of AMX (x86-64-v4-amx), float32 in and out.
 *
 * The tiles multiply bfloat16 and add up float32. A float32 is exactly the sum of three bfloat16: x = x0 + x1 + x2,
 * where x1 <= 2^-8 x0 and x2 <= 2^-17 x0 in magnitude. Of the nine products of the parts of a and b the six with
 * i + j <= 2 are added up; the others are below 2^-25 of a b, half of what rounding a b to float32 loses. (Henry,
 * Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
 * Computations", 2019.) A core does 3300 GFLOP/s in bfloat16 here, so 550 of such products, where its vector
 * units do 250.
 *
 * Tiles flush what is below 2^-126 to zero and an infinity has no parts, so a row of A or a column of B whose largest
 * magnitude is neither 0 nor in [2^-50, 2^62] is left to the vector units. In this range what is flushed is below
 * 2^-26 of the largest product, and no sum of parts overflows where that of products would not.
 *
 * Packed: a group is 32 rows of A, or 32 columns of B. For each 32 steps of K it holds three parts of two tiles of
 * 16 x 64 bytes; a lane of 32 bits holds the elements k and k + 16 of them, in A and in B, so that no lanes need to
 * change places. After the tiles come 128 bytes, which begin with a bit for each row or column that is out of range.
 */
#ifndef CLLM_SPLIT_H
#define CLLM_SPLIT_H
#include <stddef.h>

#if defined(__AMX_BF16__) && defined(__AVX512F__)
#define CLLM_SPLIT 1
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define CLLM_TILE_BYTES 1024
#define CLLM_PART_BYTES (2 * CLLM_TILE_BYTES)
#define CLLM_STEP_BYTES (3 * CLLM_PART_BYTES)
#define CLLM_RANGE_BYTES 128
#define CLLM_SMALLEST 0x26800000u /* the bits of 2^-50 */
#define CLLM_LARGEST 0x5e800000u  /* of 2^62 */

static inline ptrdiff_t cllm_split_bytes(ptrdiff_t k) { return (k + 31) / 32 * CLLM_STEP_BYTES + CLLM_RANGE_BYTES; }

/* Each thread that uses tiles says how large they are before, and gives them back after. */
static inline void cllm_split_begin(void)
{
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
}

static inline void cllm_split_end(void) { _tile_release(); }

static inline __mmask16 cllm_first(ptrdiff_t n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }

/* y[j][i] = x[i][j] of 16 x 16; rows from n on and columns that are not in mask count as zeros. */
static inline void cllm_turn(const float *x, ptrdiff_t ld, ptrdiff_t n, __mmask16 mask, float *y, ptrdiff_t ldy)
{
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        r[i] = i < n ? _mm512_maskz_loadu_ps(mask, x + i * ld) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_permutex2var_ps(r[i], low, r[i + 8]);
            t[2 * i + 1] = _mm512_permutex2var_ps(r[i], high, r[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            r[i] = t[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        _mm512_store_ps(y + i * ldy, r[i]);
}

/* The parts of x, each in the upper halves of the lanes and rounded to nearest.
 * range: the largest bits of magnitudes so far, and the smallest less one, where those of 0 are the largest of all. */
static inline __attribute__((always_inline)) void cllm_parts(__m512 x, __m512i part[3], __m512i range[2])
{
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    range[0] = _mm512_max_epu32(range[0], bits);
    range[1] = _mm512_min_epu32(range[1], _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
        part[p] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
        x = _mm512_sub_ps(x, _mm512_castsi512_ps(part[p]));
    }
    part[2] = _mm512_castps_si512(x);
}

/* A row of the three tiles at `out`: the parts of u in the lower halves of the lanes, those of v in the upper. */
static inline __attribute__((always_inline)) void cllm_pair(__m512 u, __m512 v, char *out, __m512i range[2])
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512i low[3], high[3];
    cllm_parts(u, low, range);
    cllm_parts(v, high, range);
#pragma GCC unroll 3
    for (int p = 0; p < 3; p++) /* of a denormal number something is left below the third part */
        _mm512_store_si512(out + p * CLLM_PART_BYTES,
                           _mm512_or_si512(_mm512_srli_epi32(low[p], 16), _mm512_and_si512(high[p], upper)));
}

/* The three tiles of 16 rows (of A) or columns (of B) and 32 steps of K. Element (i, k) is x[i * is + k * ks], one
 * stride is 1; from n and from `count` on, elements count as zeros. */
static inline __attribute__((always_inline)) void cllm_pack_tiles(
    int rows, const float *x, ptrdiff_t is, ptrdiff_t ks, ptrdiff_t n, ptrdiff_t count, char *out, __m512i range[2])
{
    float turned[512] __attribute__((aligned(64)));
    __mmask16 line = cllm_first(n), early = cllm_first(count), late = cllm_first(count - 16);
    if (rows) {
        if (ks != 1) {
            cllm_turn(x, ks, count, line, turned, 32);
            cllm_turn(x + 16 * ks, ks, count - 16, line, turned + 16, 32);
            x = turned, is = 32, n = 16, early = late = 0xffff;
        }
        for (int i = 0; i < 16; i++) {
            const __mmask16 inside = i < n ? 0xffff : 0;
            cllm_pair(_mm512_maskz_loadu_ps(early & inside, x + i * is),
                      _mm512_maskz_loadu_ps(late & inside, x + i * is + 16), out + i * 64, range);
        }
    } else {
        if (ks == 1) {
            cllm_turn(x, is, n, early, turned, 16);
            cllm_turn(x + 16, is, n, late, turned + 256, 16);
            x = turned, ks = 16, count = 32, line = 0xffff;
        }
        for (int k = 0; k < 16; k++)
            cllm_pair(_mm512_maskz_loadu_ps(k < count ? line : 0, x + k * ks),
                      _mm512_maskz_loadu_ps(k + 16 < count ? line : 0, x + (k + 16) * ks), out + k * 64, range);
    }
}

/* A bit for each of at most 32 rows of A or columns of B whose largest magnitude is out of range. */
static uint32_t cllm_out_of_range(const float *x, ptrdiff_t is, ptrdiff_t ks, ptrdiff_t n, ptrdiff_t count)
{
    uint32_t most[32] = {0}, result = 0;
    for (ptrdiff_t o = 0; o < (ks == 1 ? n : count); o++) /* along the memory's rows */
        for (ptrdiff_t q = 0; q < (ks == 1 ? count : n); q++) {
            const ptrdiff_t i = ks == 1 ? o : q, k = ks == 1 ? q : o;
            uint32_t bits;
            memcpy(&bits, x + i * is + k * ks, sizeof bits);
            bits &= 0x7fffffff;
            most[i] = bits > most[i] ? bits : most[i];
        }
    for (ptrdiff_t i = 0; i < n; i++)
        if (most[i] && (most[i] < CLLM_SMALLEST || most[i] > CLLM_LARGEST)) result |= (uint32_t)1 << i;
    return result;
}

/* Packs n rows of A (rows) or columns of B, `count` steps of K: groups of cllm_split_bytes(count) each. */
static void cllm_split_pack(
    int rows, const float *x, ptrdiff_t is, ptrdiff_t ks, ptrdiff_t n, ptrdiff_t count, char *out)
{
    const ptrdiff_t size = cllm_split_bytes(count), at = size - CLLM_RANGE_BYTES, down = ks == 1 ? 16 : n;
    for (ptrdiff_t i = 0; i < n; i += 32) {
        _mm512_store_si512(out + i / 32 * size + at, _mm512_setzero_si512());
        _mm512_store_si512(out + i / 32 * size + at + 64, _mm512_set1_epi32(-1));
    }
    /* Along the memory's rows: line after line of them, where k runs along them; else all of 32 rows. */
    for (ptrdiff_t i0 = 0; i0 < n; i0 += down)
        for (ptrdiff_t k = 0; k < count; k += 32)
            for (ptrdiff_t i = i0; i < i0 + down; i += 16) {
                char *group = out + i / 32 * size, *tiles = group + k / 32 * CLLM_STEP_BYTES + i / 16 % 2 * CLLM_TILE_BYTES;
                const float *start = x + i * is + k * ks;
                const ptrdiff_t inside = n - i, steps = count - k;
                __m512i range[2] = {_mm512_load_si512(group + at), _mm512_load_si512(group + at + 64)};
                if (ks != 1) /* a row is another page, where no prefetcher of the CPU follows */
                    for (ptrdiff_t q = 32; q < 64 && q < steps; q++)
                        _mm_prefetch((const char *)(start + q * ks), _MM_HINT_T1);
                if (rows && ks == 1)
                    cllm_pack_tiles(1, start, is, 1, inside, steps, tiles, range);
                else if (rows)
                    cllm_pack_tiles(1, start, 1, ks, inside, steps, tiles, range);
                else if (ks == 1)
                    cllm_pack_tiles(0, start, is, 1, inside, steps, tiles, range);
                else
                    cllm_pack_tiles(0, start, 1, ks, inside, steps, tiles, range);
                _mm512_store_si512(group + at, range[0]);
                _mm512_store_si512(group + at + 64, range[1]);
            }
    for (ptrdiff_t i = 0; i < n; i += 32) {
        char *range = out + i / 32 * size + at;
        const uint32_t most = _mm512_reduce_max_epu32(_mm512_load_si512(range));
        const uint32_t least = _mm512_reduce_min_epu32(_mm512_load_si512(range + 64));
        /* small elements are common, rows of nothing else are not: look at each */
        *(uint32_t *)range = most > CLLM_LARGEST || least < CLLM_SMALLEST - 1
            ? cllm_out_of_range(x + i * is, is, ks, n - i < 32 ? n - i : 32, count) : 0;
    }
}

/* A bit for each row or column of a group that is out of range. */
static inline uint32_t cllm_split_outside(const char *group, ptrdiff_t count)
{
    return *(const uint32_t *)(group + cllm_split_bytes(count) - CLLM_RANGE_BYTES);
}

/* y = the product of two groups of `count` steps, mt tiles of rows by nt of columns. */
static inline __attribute__((always_inline)) void cllm_split_tile(
    const int mt, const int nt, ptrdiff_t count, const char *a, const char *b, float *y, ptrdiff_t ldy)
{
#define LOAD_A(part)                                                                      \
    _tile_loadd(4, a + (part) * CLLM_PART_BYTES, 64);                                     \
    if (mt > 1) _tile_loadd(5, a + (part) * CLLM_PART_BYTES + CLLM_TILE_BYTES, 64);
#define LOAD_B(part)                                                                      \
    _tile_loadd(6, b + (part) * CLLM_PART_BYTES, 64);                                     \
    if (nt > 1) _tile_loadd(7, b + (part) * CLLM_PART_BYTES + CLLM_TILE_BYTES, 64);
#define MULTIPLY                                                                          \
    _tile_dpbf16ps(0, 4, 6);                                                              \
    if (nt > 1) _tile_dpbf16ps(1, 4, 7);                                                  \
    if (mt > 1) _tile_dpbf16ps(2, 5, 6);                                                  \
    if (mt > 1 && nt > 1) _tile_dpbf16ps(3, 5, 7);
    __asm__ volatile("" ::: "memory"); /* GCC's tile loads do not say that they read memory */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; count > 0; count -= 32, a += CLLM_STEP_BYTES, b += CLLM_STEP_BYTES) {
        /* small products first; from one to the next only one side changes: 14 loads for 24 products */
        LOAD_A(0) LOAD_B(2) MULTIPLY
        LOAD_B(1) MULTIPLY
        LOAD_A(1) MULTIPLY
        LOAD_B(0) MULTIPLY
        LOAD_A(2) MULTIPLY
        LOAD_A(0) MULTIPLY
    }
    _tile_stored(0, y, ldy * 4);
    if (nt > 1) _tile_stored(1, y + 16, ldy * 4);
    if (mt > 1) _tile_stored(2, y + 16 * ldy, ldy * 4);
    if (mt > 1 && nt > 1) _tile_stored(3, y + 16 * ldy + 16, ldy * 4);
#undef LOAD_A
#undef LOAD_B
#undef MULTIPLY
}

/* sums (32, 32): the product of two groups, of which m rows and n columns are there. */
static void cllm_split_sums(ptrdiff_t m, ptrdiff_t n, ptrdiff_t count, const char *a, const char *b, float *sums)
{
    if (m > 16 && n > 16)
        cllm_split_tile(2, 2, count, a, b, sums, 32);
    else if (m > 16)
        cllm_split_tile(2, 1, count, a, b, sums, 32);
    else if (n > 16)
        cllm_split_tile(1, 2, count, a, b, sums, 32);
    else
        cllm_split_tile(1, 1, count, a, b, sums, 32);
}

/* c (m, n) = sums (32, 32) + add + bias. Tiles could begin with these, 5 % faster, but would round at their magnitude at
 * each of their steps: bits that a long sum cannot spare. */
static void cllm_split_store(ptrdiff_t m, ptrdiff_t n, const float *sums, float *c, ptrdiff_t ldc, const float *add,
                             ptrdiff_t ldadd, const float *bias)
{
    for (ptrdiff_t j = 0; j < n; j += 16) {
        const __mmask16 mask = cllm_first(n - j);
        const __m512 every = bias ? _mm512_maskz_loadu_ps(mask, bias + j) : _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < m; i++) {
            __m512 v = _mm512_loadu_ps(sums + i * 32 + j);
            if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, add + i * ldadd + j));
            if (bias) v = _mm512_add_ps(v, every);
            _mm512_mask_storeu_ps(c + i * ldc + j, mask, v);
        }
    }
}

/* c (m, n) = add + bias + the product of two groups of `count` steps, m and n at most 32. */
static void cllm_split_block(ptrdiff_t m, ptrdiff_t n, ptrdiff_t count, const char *a, const char *b, float *c,
                             ptrdiff_t ldc, const float *add, ptrdiff_t ldadd, const float *bias)
{
    float sums[32 * 32] __attribute__((aligned(64)));
    if (m == 32 && n == 32 && !add && !bias) {
        cllm_split_tile(2, 2, count, a, b, c, ldc);
        return;
    }
    cllm_split_sums(m, n, count, a, b, sums);
    cllm_split_store(m, n, sums, c, ldc, add, ldadd, bias);
}
#else
/* Other instruction sets never call these. */
#define CLLM_SPLIT 0
static inline ptrdiff_t cllm_split_bytes(ptrdiff_t k) { return k; }
static inline void cllm_split_begin(void) {}
static inline void cllm_split_end(void) {}
static inline void cllm_split_pack(int rows, const float *x, ptrdiff_t is, ptrdiff_t ks, ptrdiff_t n, ptrdiff_t count,
                                   char *out) {}
static inline unsigned cllm_split_outside(const char *group, ptrdiff_t count) { return 0; }
static inline void cllm_split_sums(ptrdiff_t m, ptrdiff_t n, ptrdiff_t count, const char *a, const char *b, float *sums) {}
static inline void cllm_split_store(ptrdiff_t m, ptrdiff_t n, const float *sums, float *c, ptrdiff_t ldc,
                                    const float *add, ptrdiff_t ldadd, const float *bias) {}
static inline void cllm_split_block(ptrdiff_t m, ptrdiff_t n, ptrdiff_t count, const char *a, const char *b, float *c,
                                    ptrdiff_t ldc, const float *add, ptrdiff_t ldadd, const float *bias) {}
#endif
#endif
